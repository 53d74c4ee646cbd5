"""Fine-tune an RWKV-6 or RWKV-5 model with Bone, or pretrain a small one from scratch. `python train.py --help` lists every flag.

Data flows one way: file -> tokens -> batch -> model -> loss -> step -> checkpoint. A batch is a function of (seed, step),
so a run is a function of its command line, wherever it is interrupted and resumed.
"""

import argparse
import contextlib
import functools
import importlib.util
import itertools
import math
import os
import shlex
import time
import types

import torch
from torch import nn
from tqdm import tqdm

import bone
import data
import devices
import memory
import resume
import rwkv6
from files import fingerprint, read_checkpoint, run_cli, trained_quant
from log import Log
from loss import apart, loss_fn, step, tensors, val_loss
from options import parse_args
from quant import Quantized

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "tf32": torch.float32}  # of frozen matrices, by --precision


# ---- optimizer ---------------------------------------------------------------------------------------------------------------

def make_optimizer(model, lr, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.0, layerwise_lr=True, strategy="auto"):
    """Adam over the parameters that require gradients, grouped as RWKV-LM groups them. With layerwise_lr time_decay (not its _w1, _w2)
    learns at twice the rate, and no time parameter decays; otherwise what has two dimensions decays (as in AdamW) by lr * weight_decay."""
    groups = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            apart = layerwise_lr and "time_" in name
            scale = 2.0 if apart and name.endswith("time_decay") else 1.0
            decay = weight_decay if not apart and p.squeeze().ndim >= 2 else 0.0
            groups.setdefault((scale, decay), {"params": [], "lr": lr * scale, "lr_scale": scale, "weight_decay": decay})["params"].append(p)
    return devices.optimizer([*groups.values()], strategy, lr=lr, betas=betas, eps=eps, fused=True)


def learning_rate(step, first, total, lr_init, lr_final, warmup_steps):
    """Learning rate of optimizer step `step`, as RWKV-LM computes it: from lr_init to lr_final over `total` steps counted from epoch 0,
    whatever the first step of this run is; from there the warm-up goes from 0.2 to 1."""
    progress = min(1.0, max(0.0, (step - warmup_steps + 1) / (total - warmup_steps or 1)))
    if lr_init == 0 or lr_final == 0:
        lr = lr_init + (lr_final - lr_init) * progress
    else:
        lr = lr_init * math.exp(math.log(lr_final / lr_init) * progress)
    return lr * (0.2 + 0.8 * (step - first) / warmup_steps if step - first < warmup_steps else 1.0)


# ---- what is trained ----------------------------------------------------------------------------------------------------------

def build_model(args, device):
    """The model with exactly the trained parameters requiring gradients, as float32; the names to save, and in which dtype.
    What a --bone_load checkpoint had trained is saved again, even where it is not trained any further: merging needs it."""
    args.quant = trained_quant(args.bone_load, args.quant)
    torch.manual_seed(args.random_seed)
    if not args.load_model:
        with torch.device("meta" if device.type == "meta" else "cpu"):
            model = rwkv6.init_model(args.n_layer, args.n_embd, args.vocab_size or 65536, device=device, version=args.my_testing or "x060",
                                     pre_ffn=bool(args.pre_ffn), head_qk=args.head_qk or 0)
        trained, save_dtype = dict(model.named_parameters()).keys(), DTYPES[args.precision]
    else:
        loaded = read_checkpoint(args.bone_load) if args.bone_load else {}
        r, mode = bone.rank_and_mode(loaded, args.bone_load) if loaded else (args.bone_r or 64, args.bone_mode or "bat")
        model = rwkv6.load_model(args.load_model, DTYPES[args.precision], device, args.quant)
        config = vars(model.config) | {"my_testing": model.config.version}
        for flag, value, path in (("bone_r", r, args.bone_load), ("bone_mode", mode, args.bone_load), *(
                (flag, config[flag], args.load_model) for flag in ("n_layer", "n_embd", "vocab_size", "my_testing", "pre_ffn", "head_qk"))):
            given = getattr(args, flag)
            if given not in (None, value) and (flag, given) != ("vocab_size", 0):
                raise ValueError(f"{path}: has {flag} {value}, but --{flag} is {given}; drop --{flag} to use {value}")
            setattr(args, flag, value)
        bone.load_bone(model, args.bone_load) if args.bone_load else bone.add_bone(model, r, mode)
        for name, p in model.named_parameters():
            if not name.endswith(".bone") and any(part in name for part in args.train_parts):
                p.data = p.data.float()
                p.requires_grad_(True)
        trained = {name for name, p in model.named_parameters() if p.requires_grad} | loaded.keys()
        save_dtype = read_checkpoint(args.load_model, verify=False)["emb.weight"].dtype
    model.grad_cp, model.keep_products = bool(args.grad_cp), args.train_type == "infctx"
    if model.config.head_qk and model.keep_products:
        raise ValueError("--train_type infctx: head_qk looks at every earlier token, so that no state can stand for them; leave infctx out")
    for time_mix in model.modules():
        if args.fla and isinstance(time_mix, rwkv6.TimeMix):
            time_mix.impl = "fla" if device.type == "cuda" and importlib.util.find_spec("fla") else "chunked"
    return model, trained, save_dtype


@torch.no_grad()
def build_shares(args, device):
    """What `build_model` makes, shared out among the ranks; where that is the base, too: made without data, then filled tensor by tensor, so that no
    rank ever holds the whole."""
    if not args.load_model or not devices.shares(args.strategy)[2]:
        model, *_ = built = build_model(args, device)
        devices.shard(model, args.strategy, device)
        return built
    model, *_ = built = build_model(args, torch.device("meta"))
    devices.shard(model, args.strategy, device)
    model.to_empty(device="cpu" if args.strategy.endswith("offload") else device)
    parameters = dict(model.named_parameters())
    loaded = read_checkpoint(args.bone_load) if args.bone_load else {}
    for name in [name for name in parameters if name.endswith(".bone")]:
        parameters[name].zero_()
    for name, tensor in itertools.chain(rwkv6.stream(args.load_model, model.config, DTYPES[args.precision], device, args.quant), loaded.items()):
        whole = {f"{name}.{key}": buffer for key, buffer in tensor.named_buffers()} if isinstance(tensor, Quantized) else {name: tensor}
        for key, values in whole.items():
            parameters[key].copy_(devices.part(values.view(parameters[key].shape), parameters[key]))
    return built


def count(model):
    """Numbers of trained parameters and of all, the quantized ones included."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return trained, sum(math.prod(shape) for shape in bone.weight_shapes(model).values())


def precision(args, device):
    """The autocast of --precision, and the gradient scaler, which only fp16 needs."""
    dtype = DTYPES[args.precision]
    torch.set_float32_matmul_precision("high" if args.precision == "tf32" else "highest")  # of a GPU's products
    half = dtype != torch.float32
    return torch.autocast(device.type, dtype if half else torch.bfloat16, enabled=half), torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)


def open_documents(args, vocab_size=None):
    """Training and held-out data, None where there is none. What characters mean is said by a vocab.json beside the base or in proj_dir."""
    kind, vocabulary = args.data_type or data.kind_of(args.data_file), None
    if kind in data.CHARACTERS:
        found, here = (os.path.join(folder, "vocab.json") for folder in (os.path.dirname(args.load_model), args.proj_dir))
        if args.load_model and not os.path.exists(found):
            raise ValueError(f"{args.load_model}: has no vocab.json beside it that says which characters it reads. "
                             "A World model reads none: write the text as a .jsonl")
        vocabularies = [data.read_vocabulary(path) for path in (found, here) if os.path.exists(path) and (args.load_model or path == here)]
        if len({*vocabularies}) > 1:
            raise ValueError(f"{here}: has other characters than {found}; give another --proj_dir")
        vocabulary = next(iter(vocabularies), None)
    documents = data.open_data(args.data_file, vocab_size, kind, args.ctx_len, vocabulary)
    if documents.vocabulary and vocab_size not in (None, documents.vocab_size()):
        raise ValueError(f"{args.data_file or kind}: has {documents.vocab_size()} characters, but the model's vocabulary is {vocab_size}; "
                         + ("take the vocab.json that it was trained with" if args.load_model else "drop --vocab_size"))
    if kind in data.CHARACTERS and (kind == "dummy" or not args.data_type):
        kind = "utf-16le" if data.kind_of(args.val_file) == "utf-16le" else "utf-8"
    return documents, data.open_data(args.val_file, vocab_size, kind, args.ctx_len, documents.vocabulary) if args.val_file else None


def chunk_ctx(args):
    """Tokens that go through the model at once; 0: whole rows."""
    return args.chunk_ctx if args.train_type == "infctx" else 0


def longest_row(args):
    """Tokens of the longest row that the model will see. With infctx the data says it, since no document is cut."""
    if args.train_type == "none" or args.dataload == "get" or not args.data_file:
        return args.ctx_len
    longest = int(open_documents(args)[0].sizes.max()) - 1
    return max(longest, args.ctx_len) if args.loss_mask == "none" else max(longest, 1)


def expected_memory(args, device, longest=None):
    """What `build_model` makes on the meta device, and {part: bytes} of what its training takes at the peak, on rows of `longest` tokens."""
    model, *_ = built = build_model(args, torch.device("meta"))
    autocast, _ = precision(args, device)
    longest = longest or longest_row(args)
    at_once = min(longest, chunk_ctx(args) or longest)

    def outputs():
        idx = torch.zeros(args.micro_bsz, at_once, dtype=torch.int64, device=device)
        with autocast:
            state = model.empty_state()
            if at_once < longest:
                with torch.no_grad():
                    state = apart(model.hidden(idx[:, :1], state)[1], requires_grad=True)
            value, after = loss_fn(model, idx, idx, torch.ones(idx.shape, device=device), 1, idx.numel(), state)
            return [value] + tensors(after) * (at_once < longest)
    n = devices.size() if devices.size() > 1 else args.devices * args.num_nodes
    earlier = args.accumulate_grad_batches > 1 or at_once < longest or n > 1     # DDP keeps the place of gradients from step to step
    parts = memory.expected(model, outputs, device, earlier, n if devices.shares(args.strategy, n)[1] else 1)
    if at_once < longest:
        chunks = -(-longest // at_once)
        together = min(args.bptt or chunks, chunks)     # and where there are several groups, the states before and after the group
        parts["states between chunks"] = (together - 2 + 2 * (together < chunks)) * model.state_bytes(args.micro_bsz)  # one more is in `outputs`
    return built, devices.memory_of_one(parts, model, args.strategy, n)


def check_memory(args, device):
    """What is trained, and the memory that takes: printed with --dry_run, or where it is not there, which is a ValueError before anything
    is loaded. Returns what `build_model` makes on the meta device."""
    longest = longest_row(args)
    (model, *_), parts = built, _ = expected_memory(args, device, longest)
    need, here = sum(parts.values()), int(os.environ.get("LOCAL_WORLD_SIZE", args.devices))
    free = memory.available(device) / (here if device.type == "cpu" else 1)
    if args.dry_run or need > free:
        print(model.config)
        if args.devices * args.num_nodes > 1:
            print(f"each of {args.devices * args.num_nodes} ranks, by {devices.engine(args.strategy)}:")
        trained, total = count(model)
        for what, number in (("trained", trained), ("frozen", total - trained)):
            size = sum(t.nbytes for t in memory.tensors(model) if t.requires_grad == (what == "trained"))
            print(f"{what:<26}{size / 1e9:8.2f} GB   {number:,} parameters")
        for part, size in [*parts.items(), ("expected peak", need),
                           (f"free on {device.type}: {'it fits' if need <= free else 'too little'}", free)]:
            print(f"{part:<26}{size / 1e9:8.2f} GB")
    if need > free:
        def need_with(name, value):
            with contextlib.suppress(ValueError):  # of a flag that this model cannot take
                return sum(expected_memory(argparse.Namespace(**vars(args) | {name: value}), device, value if name == "ctx_len" else longest)[1].values())
            return need
        shorter = ("chunk_ctx", -(-args.chunk_ctx // 2)) if chunk_ctx(args) else ("ctx_len", -(-args.ctx_len // 2))
        more = [("train_type", "infctx")] * (args.ctx_len > args.chunk_ctx) + [("strategy", "deepspeed_stage_3")] * (max(devices.size(), args.devices) > 1)
        changes = [("grad_cp", 1), ("micro_bsz", 1), shorter, *more] + [("quant", "nf4")] * bool(args.load_model)
        less, flag = min((need_with(*change), "--{} {}".format(*change)) for change in changes)
        advice = f"what helps most is {flag}, with which it would take {less / 1e9:.2f} GB" if less < need else "no flag helps: take a smaller model"
        raise ValueError(f"training would take {need / 1e9:.2f} GB, but {free / 1e9:.2f} GB are free; {advice}")
    return built


def describe(args, model, device, documents, steps, micro_batches):
    """Print what is about to be trained on what. model: on the meta device."""
    print(f"{model.config}\n{f'Bone {args.bone_mode} r {args.bone_r}' if args.load_model else 'from scratch'}: "
          f"{' of '.join(f'{n:,}' for n in count(model))} parameters trained, {args.precision} on "
          f"{f'{devices.size()} x ' * (devices.size() > 1)}{device.type}{f', by {devices.engine(args.strategy)}' * (devices.size() > 1)}\n"
          f"{len(documents):,} documents, {len(documents.tokens):,} tokens; {args.epoch_count} x {steps} steps of "
          f"{args.micro_bsz * micro_batches} rows up to {longest_row(args):,} tokens"
          + f", in chunks of {args.chunk_ctx}" * (args.train_type == "infctx"))
    if "deepspeed" in args.strategy and devices.size() == 1:
        print(f"note: {args.strategy} shares out what several devices hold; on one, plain PyTorch stands in for it (--dry_run says the memory)")


def update(optimizer, scaler, lr, loss):
    """A step of the optimizer, on gradients clipped to a norm of 1. Returns what that norm was, and whether it is a mere overflow of fp16.
    Where the norm, or the loss, is not finite, nothing is changed but the scale of fp16, which is halved."""
    scale = scaler.get_scale()
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]
    scaler.unscale_(optimizer)
    norm = devices.whole(nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 1.0)).item()
    if math.isfinite(loss + norm):
        scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    return norm, scale > 1 and math.isfinite(loss) and not math.isfinite(norm)


# ---- the loop -----------------------------------------------------------------------------------------------------------------

def train(args):
    """A whole run: data and model, then epochs of optimizer steps, with logs, held-out losses, checkpoints and states in proj_dir."""
    if devices.size() not in (1, args.devices * args.num_nodes) and args.devices * args.num_nodes > 1:
        raise ValueError(f"--devices {args.devices} --num_nodes {args.num_nodes}, but {devices.size()} processes were started; leave both out with torchrun")
    if devices.size() < args.devices * args.num_nodes and not args.dry_run:
        return devices.launch(args.devices, args.num_nodes)
    device = torch.device("cuda" if args.accelerator != "cpu" and torch.cuda.is_available() else "cpu")
    if not (args.load_model or args.vocab_size) and (args.data_type or data.kind_of(args.data_file)) not in ("binidx", "jsonl"):
        args.vocab_size = open_documents(args)[0].vocab_size()
    with devices.world(device, args.strategy):
        with devices.main_first():
            built = check_memory(args, device)
        if not args.dry_run:
            with contextlib.nullcontext() if devices.rank() else resume.lock(args.proj_dir):
                run(args, device, built)


def open_batches(args, vocab_size):
    """The data as training sees it: documents and held-out ones, loss mask, `rows` (what says which rows a micro batch has, see data.rows_of),
    micro_batch(number), and the function from micro batches in an optimizer step to steps in an epoch."""
    documents, held_out = open_documents(args, vocab_size)
    loss_mask = args.loss_mask if args.loss_mask != "se" else (args.mask_id["mask1"], args.mask_id["mask0"])
    cut = args.train_type != "infctx"
    silent, _ = (data.check_mask(d, args.ctx_len, loss_mask, cut) if d else 0 for d in (documents, held_out))
    if silent:
        marker, _ = data.MARKERS.get(loss_mask, loss_mask)
        print(f"note: {silent} of the first {min(1000, len(documents))} documents have nothing after {marker}{f' within {args.ctx_len} tokens' * cut} and count for nothing")
    rows = dict(micro_bsz=args.micro_bsz, ctx_len=args.ctx_len, dataload=args.dataload, seed=args.random_seed, shuffle=bool(args.data_shuffle))
    micro_batch = functools.partial(data.batch, documents, loss_mask=loss_mask, cut=cut, **rows)
    micro_batch(0)  # what cannot be batched is refused here
    once = len(documents) if args.dataload != "get" else len(documents.tokens) / args.ctx_len
    return documents, held_out, loss_mask, rows, micro_batch, lambda micro_batches: args.epoch_steps or math.ceil(once / (args.micro_bsz * micro_batches))


def prepare(args, built):
    """What a run needs to know before it begins, as a namespace; ValueError for what is in its way. built: what `build_model` makes on the meta device."""
    documents, held_out, loss_mask, rows, micro_batch, steps_of = open_batches(args, built[0].config.vocab_size)
    state, N, steps = resume.load(args.proj_dir, args.resume, args.epoch_begin, steps_of, args.accumulate_grad_batches * devices.size())
    epochs = range(args.epoch_begin, args.epoch_begin + args.epoch_count)
    paths = {(epoch + 1) * steps: os.path.join(args.proj_dir, f"rwkv-{epoch}.pth") for epoch in epochs
             if (epoch + 1 - epochs[0]) % (args.epoch_save or len(epochs)) == 0 or epoch == epochs[-1]}
    first, last = epochs[0] * steps, epochs.stop * steps
    about = {"base": fingerprint(args.load_model), "data": documents.fingerprint(), "micro_batches": N}
    changes = resume.check_same_run(state, args, about) if state else []
    resume.check_folder(args, paths, first, state and state.progress, not changes)
    complete = state and (state.progress.step > last or state.progress.step == last and os.path.exists(paths[last]))
    if not complete and not devices.rank():
        resume.check_room(args, built, paths, first, state.progress.step if state else first)
    return types.SimpleNamespace(**locals())


def run(args, device, built):
    """What `train` does when it holds the lock of proj_dir."""
    with devices.main_first():
        plan = prepare(args, built)
        state, first, last, N, steps, epochs, paths = plan.state, plan.first, plan.last, plan.N, plan.steps, plan.epochs, plan.paths
        log = None if plan.complete else Log(args, plan.documents.vocabulary, state and state.about["wandb"])
    where = devices.in_turn([state.progress.step if state else first])
    if len({*where}) > 1:
        raise ValueError(f"{args.proj_dir}: rank {devices.rank()} finds the state of step {where[devices.rank()]:.0f}, rank 0 that of {where[0]:.0f}; "
                         "all need the same folder, or a copy of it")
    if plan.complete:
        resume.prune(args.proj_dir, args.keep, first)
        return print(f"{args.proj_dir}: this run is complete, {state.progress.step - first} steps; a higher --epoch_count than "
                     f"{state.progress.step // steps - epochs[0]} trains on")
    if device.type == "cpu":
        memory.reuse_freed()
    shares = devices.shares(args.strategy)
    model, saved_names, save_dtype = build_shares(args, device) if shares[1] else build_model(args, device)
    optimizer = make_optimizer(model, args.lr_init, (args.beta1, args.beta2), args.adam_eps, args.weight_decay, args.layerwise_lr, args.strategy)
    compute = devices.wrap(model, loss_fn, args.strategy)
    autocast, scaler = precision(args, device)
    held_out_loss = functools.partial(val_loss, model, plan.held_out, args.micro_bsz, args.ctx_len, plan.loss_mask, autocast,
                                      args.train_type != "infctx", chunk_ctx(args), device)
    weights = {name: p for name, p in model.named_parameters() if name in saved_names}
    progress = state.restore(weights, optimizer, scaler) if state else resume.Progress(first)
    saver = resume.Saver(args.proj_dir, args.keep, first, log, plan.about | {"args": vars(args), "wandb": log.wandb and log.wandb.id},
                         progress, weights, optimizer, scaler, shares)
    mine = range(devices.rank(), N, devices.size())     # the rank's micro batches of a step
    idle = -(-N // devices.size()) - len(mine)          # passes in which the others have one more

    describe(args, built[0], device, plan.documents, steps, N)
    log.open(progress, bool(state))
    if state:
        log.line(f"going on from {state.path}: step {progress.step} of {last}" + f", with other {', '.join(plan.changes)}" * bool(plan.changes))
        if N != args.accumulate_grad_batches * devices.size():
            log.line(f"a step has {N} micro batches, as before, for {devices.size()} devices")
    elif plan.held_out:
        print(f"held-out loss before training: {log.point(first, val_loss=held_out_loss()):.4f}")

    if state and not progress.losses and progress.step in paths and not os.path.exists(paths[progress.step]):
        saver.save_checkpoint(paths[progress.step], save_dtype)  # it was moved away, but the state has it

    missing = []
    with saver.rescue(), resume.unbroken() as check:
        for epoch in range((progress.step - bool(progress.losses)) // steps, epochs.stop):
            with tqdm(total=steps, initial=progress.step - epoch * steps, desc=f"epoch {epoch}", unit="step", dynamic_ncols=True, disable=devices.rank() > 0) as bar:
                while (i := progress.step) < (epoch + 1) * steps:
                    started = time.perf_counter()
                    lr = learning_rate(i, first, args.epoch_count * steps, args.lr_init, args.lr_final, args.warmup_steps)
                    micro = [[x.to(device) for x in batch] for batch in [plan.micro_batch(i * N + n) for n in mine] + [data.silent()] * idle]
                    losses = step(model, micro, autocast, scaler, chunk_ctx(args), args.bptt, compute)[:N]
                    loss = sum(losses)
                    with saver.changing():
                        norm, overflow = update(optimizer, scaler, lr, loss)
                        progress.count(loss, norm, overflow)
                    log.point(i, loss=loss, lr=lr)
                    if progress.bad_in_a_row:
                        log.line(f"step {i} left out: loss {loss}, gradient norm {norm}; {data.suspects(plan.documents, losses, i * N, plan.rows)}")
                        progress.check()
                    check()
                    speed = devices.total([sum(idx.numel() for idx, _, _ in micro)])[0] / (time.perf_counter() - started)
                    bar.set_postfix_str(f"loss {loss:.3f}, lr {lr:.1e}, {speed:,.0f} tokens/s, {memory.peak(device) / 1e9:.1f} GB")
                    bar.update()
                    if args.save_steps and progress.step % args.save_steps == 0 and progress.step < (epoch + 1) * steps:
                        saver.save_state()
                        check()
            log.line(f"epoch {epoch}: {progress.summary(last - first)}"
                     + (f", held-out loss {log.point(progress.step, val_loss=held_out_loss(check=check)):.4f}" if plan.held_out else ""))
            if progress.step not in paths or saver.save_checkpoint(paths[progress.step], save_dtype):
                progress.losses.clear()
            else:
                missing.append(paths[progress.step])
            if progress.step in paths or args.save_steps and progress.step % args.save_steps == 0:
                saver.save_state()
            if progress.step < last:
                progress.losses.clear()
            check()
    said = log.close()
    if devices.rank():
        return
    if not os.path.exists(paths[last]):
        raise ValueError(f"{paths[last]}: could not be saved, as said above; " + ("mend that, then give the same command with --resume"
                         if resume.states(args.proj_dir, first) else "neither could any state"))
    if missing:
        print(f"note: {', '.join(missing)} could not be saved, as said above")
    print(f"wrote {paths[last]}{said}; peak memory {memory.peak(device) / 1e9:.2f} GB")
    if args.load_model:
        print(f"next: python {shlex.join(['merge.py', args.load_model, paths[last], os.path.join(args.proj_dir, 'tuned.pth')])}")


if __name__ == "__main__":
    run_cli(lambda: train(parse_args()))
