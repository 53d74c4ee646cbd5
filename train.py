"""Fine-tune an RWKV-6 or RWKV-5 model with Bone, or pretrain a small one from scratch. `python train.py --help` lists every flag.

Data flows one way: file -> tokens -> batch -> model -> loss -> step -> checkpoint. A batch is a function of (seed, step),
so a run is a function of its command line, wherever it is interrupted and resumed.
"""

import argparse
import contextlib
import functools
import importlib.util
import math
import os
import shlex
import time

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import bone
import data
import memory
import resume
import rwkv6
from files import fingerprint, read_checkpoint, run_cli, trained_quant
from log import Log
from options import parse_args

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "tf32": torch.float32}  # of frozen matrices, by --precision


# ---- loss and optimizer -------------------------------------------------------------------------------------------------------

def largest_of_rows(x):
    """x.max(-1, keepdim=True), in a third of the time on a CPU: the block of numbers that holds it first (amax is vectorized, max is not)."""
    blocks = x.unflatten(-1, (-1, math.gcd(x.shape[-1], 256)))
    block = blocks.amax(-1).argmax(-1, keepdim=True)
    largest, at = blocks[torch.arange(len(x), device=x.device), block[:, 0]].max(-1, keepdim=True)
    return largest, at + block * blocks.shape[-1]


class HeadLoss(torch.autograd.Function):
    """Head product, summed cross-entropy and L2 wrap over chunks of tokens, so that the logits (tokens x vocabulary) never exist whole.

    x: (M, C); head: (vocab, C); targets: (M,); weight: (M,) of each token in the sum; l2: (M,) factor of each position's L2 wrap.
    The gradient is made with the loss, chunk by chunk, and only scaled in the backward pass.
    """

    @staticmethod
    def forward(ctx, x, head, targets, weight, l2, dtype):
        W = head.to(dtype)
        gx = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        ghead = torch.zeros_like(head) if ctx.needs_input_grad[1] else None
        loss = torch.zeros((), dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
        many = max(1, (1 << 24) // len(head))  # tokens in a product: with fewer, reading W would take longer than multiplying by it
        few = max(1, many // 8)                # and in what is done in float32: 8 MB, which stay in the cache
        for start in range(0, len(x), many):
            rows = slice(start, start + many)
            x_rows = x[rows].to(dtype)
            g_rows = x_rows @ W.t()            # the logits, and soon, in their place, the gradient
            for g, t, wt, l2_t in zip(*(a.split(few) for a in (g_rows, targets[rows, None], weight[rows, None], l2[rows, None]))):
                largest, at = largest_of_rows(g)
                largest, logits_of_targets = largest.to(loss.dtype), g.gather(-1, t)
                e = (g - largest).exp_()
                total = e.sum(-1, keepdim=True)
                loss += (wt * (total.log() + largest - logits_of_targets)).sum()
                g.copy_(e.mul_(wt / total).scatter_add_(-1, t, -wt).scatter_add_(-1, at, largest * l2_t))  # softmax - target + L2 wrap
            if gx is not None:
                gx[rows] = g_rows @ W
            if ghead is not None:
                ghead += g_rows.t() @ x_rows
        ctx.save_for_backward(gx, ghead)
        return loss

    @staticmethod
    def backward(ctx, gloss):
        return *(g if g is None else g * gloss for g in ctx.saved_tensors), None, None, None, None


def loss_fn(model, idx, targets, mask, tokens=None, positions=None):
    """Mean cross-entropy over the masked tokens; its backward includes the RWKV L2 wrap, + 1e-4 / positions * the largest logit.

    idx, targets: (B, T) int64; mask: (B, T), 1 where a token counts. A negative target is padding, and no position. A micro batch of
    a larger step gives the step's `tokens` (sum of masks) and `positions`, so that losses and gradients of its micro batches add up.
    """
    targets, mask = targets.reshape(-1), mask.reshape(-1)
    tokens = max(float(mask.sum() if tokens is None else tokens), 1.0)
    positions = max(int((targets >= 0).sum()) if positions is None else positions, 1)
    real = targets >= 0
    if model.config.head_qk:  # more than the head makes these logits: they are kept whole
        logits = model(idx).flatten(0, 1).float()
        wrap = 0.5e-4 / positions * (logits.amax(-1).square() * real).sum()
        return (F.cross_entropy(logits, targets.clamp(min=0), reduction="none") * mask).sum() / tokens + wrap - wrap.detach()
    x, _ = model.hidden(idx)
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else model.head.weight.dtype
    l2 = real.to(x.dtype) * (1e-4 * tokens / positions)     # the sum is divided only below, so that fp16 can hold its gradient
    return HeadLoss.apply(x.flatten(0, 1), model.head.weight, targets.clamp(min=0), mask.to(x.dtype), l2, dtype) / tokens


def make_optimizer(model, lr, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.0, layerwise_lr=True):
    """Adam over the parameters that require gradients, grouped as RWKV-LM groups them. With layerwise_lr time_decay (not its _w1, _w2)
    learns at twice the rate, and no time parameter decays; otherwise what has two dimensions decays (as in AdamW) by lr * weight_decay."""
    groups = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            apart = layerwise_lr and "time_" in name
            scale = 2.0 if apart and name.endswith("time_decay") else 1.0
            decay = weight_decay if not apart and p.squeeze().ndim >= 2 else 0.0
            groups.setdefault((scale, decay), {"params": [], "lr": lr * scale, "lr_scale": scale, "weight_decay": decay})["params"].append(p)
    return torch.optim.AdamW(groups.values(), lr=lr, betas=betas, eps=eps, fused=True)


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
    model.grad_cp = bool(args.grad_cp)
    for time_mix in model.modules():
        if args.fla and isinstance(time_mix, rwkv6.TimeMix):
            time_mix.impl = "fla" if device.type == "cuda" and importlib.util.find_spec("fla") else "chunked"
    return model, trained, save_dtype


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


def expected_memory(args, device):
    """What `build_model` makes on the meta device, and {part: bytes} of what its training takes at the peak."""
    model, *_ = built = build_model(args, torch.device("meta"))
    autocast, _ = precision(args, device)

    def loss():
        idx = torch.zeros(args.micro_bsz, args.ctx_len, dtype=torch.int64, device=device)
        with autocast:
            return loss_fn(model, idx, idx, torch.ones(idx.shape, device=device), 1, idx.numel())
    return built, memory.expected(model, loss, device, args.accumulate_grad_batches > 1)


def check_memory(args, device):
    """What is trained, and the memory that takes: printed with --dry_run, or where it is not there, which is a ValueError before anything
    is loaded. Returns what `build_model` makes on the meta device."""
    (model, *_), parts = built, _ = expected_memory(args, device)
    need, free = sum(parts.values()), memory.available(device)
    if args.dry_run or need > free:
        print(model.config)
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
                return sum(expected_memory(argparse.Namespace(**vars(args) | {name: value}), device)[1].values())
            return need
        changes = [("grad_cp", 1), ("micro_bsz", 1), ("ctx_len", -(-args.ctx_len // 2))] + [("quant", "nf4")] * bool(args.load_model)
        less, flag = min((need_with(*change), "--{} {}".format(*change)) for change in changes)
        advice = f"what helps most is {flag}, with which it would take {less / 1e9:.2f} GB" if less < need else "no flag helps: take a smaller model"
        raise ValueError(f"training would take {need / 1e9:.2f} GB, but {free / 1e9:.2f} GB are free; {advice}")
    return built


def describe(args, model, documents, steps):
    """Print what is about to be trained on what."""
    print(f"{model.config}\n{f'Bone {args.bone_mode} r {args.bone_r}' if args.load_model else 'from scratch'}: "
          f"{' of '.join(f'{n:,}' for n in count(model))} parameters trained, {args.precision} on {model.head.weight.device.type}\n"
          f"{len(documents):,} documents, {len(documents.tokens):,} tokens; {args.epoch_count} x {steps} steps of "
          f"{args.micro_bsz * args.accumulate_grad_batches} rows up to {args.ctx_len} tokens")
    if "deepspeed" in args.strategy:
        print(f"note: {args.strategy} shares out what several devices hold; on one, plain PyTorch stands in for it (--dry_run says the memory)")


def step(model, micro, autocast, scaler=None):
    """Forward and backward of an optimizer step's micro batches. Returns the loss of each; their sum is the mean over all counting tokens."""
    tokens, positions = sum(mask.sum().item() for _, _, mask in micro), sum((targets >= 0).sum().item() for _, targets, _ in micro)
    losses = []
    for batch in micro:
        with autocast:
            loss = loss_fn(model, *(x.to(model.head.weight.device) for x in batch), tokens, positions)
        (scaler.scale(loss) if scaler else loss).backward()
        losses.append(loss.item())
    return losses


def update(optimizer, scaler, lr, loss):
    """A step of the optimizer, on gradients clipped to a norm of 1. Returns what that norm was, and whether it is a mere overflow of fp16.
    Where the norm, or the loss, is not finite, nothing is changed but the scale of fp16, which is halved."""
    scale = scaler.get_scale()
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]
    scaler.unscale_(optimizer)
    norm = nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 1.0).item()
    if math.isfinite(loss + norm):
        scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    return norm, scale > 1 and math.isfinite(loss) and not math.isfinite(norm)


@torch.no_grad()
def val_loss(model, documents, micro_bsz, ctx_len, loss_mask, autocast):
    """Mean loss over the counting tokens of all documents, each seen once."""
    total = tokens = 0.0
    for start in range(0, len(documents), micro_bsz):
        rows = [documents[i] for i in range(start, min(start + micro_bsz, len(documents)))]
        idx, targets, mask = (x.to(model.head.weight.device) for x in data.collate(rows, ctx_len, loss_mask))
        with autocast:
            total += loss_fn(model, idx, targets, mask, tokens=1).item()
        tokens += mask.sum().item()
    return total / max(tokens, 1.0)


# ---- the loop -----------------------------------------------------------------------------------------------------------------

def train(args):
    """A whole run: data and model, then epochs of optimizer steps, with logs, held-out losses, checkpoints and states in proj_dir."""
    device = torch.device("cuda" if args.accelerator != "cpu" and torch.cuda.is_available() else "cpu")
    if not (args.load_model or args.vocab_size) and (args.data_type or data.kind_of(args.data_file)) not in ("binidx", "jsonl"):
        args.vocab_size = open_documents(args)[0].vocab_size()
    built = check_memory(args, device)
    if not args.dry_run:
        with resume.lock(args.proj_dir):
            run(args, device, built)


def open_batches(args, vocab_size):
    """The data as training sees it: documents and held-out ones, loss mask, `rows` (what says which rows a micro batch has, see data.rows_of),
    micro_batch(number), and the number of optimizer steps in an epoch."""
    documents, held_out = open_documents(args, vocab_size)
    loss_mask = args.loss_mask if args.loss_mask != "se" else (args.mask_id["mask1"], args.mask_id["mask0"])
    silent, _ = (data.check_mask(d, args.ctx_len, loss_mask) if d else 0 for d in (documents, held_out))
    if silent:
        marker, _ = data.MARKERS.get(loss_mask, loss_mask)
        print(f"note: {silent} of the first {min(1000, len(documents))} documents have nothing after {marker} within {args.ctx_len} tokens and count for nothing")
    rows = dict(micro_bsz=args.micro_bsz, ctx_len=args.ctx_len, dataload=args.dataload, seed=args.random_seed, shuffle=bool(args.data_shuffle))
    micro_batch = functools.partial(data.batch, documents, loss_mask=loss_mask, **rows)
    micro_batch(0)  # what cannot be batched is refused here
    once = len(documents) if args.dataload != "get" else len(documents.tokens) / args.ctx_len
    steps = args.epoch_steps or math.ceil(once / (args.micro_bsz * args.accumulate_grad_batches))
    return documents, held_out, loss_mask, rows, micro_batch, steps


def run(args, device, built):
    """What `train` does when it holds the lock of proj_dir. built: what `build_model` makes on the meta device."""
    documents, held_out, loss_mask, rows, micro_batch, steps = open_batches(args, built[0].config.vocab_size)
    epochs, N = range(args.epoch_begin, args.epoch_begin + args.epoch_count), args.accumulate_grad_batches
    paths = {(epoch + 1) * steps: os.path.join(args.proj_dir, f"rwkv-{epoch}.pth") for epoch in epochs
             if (epoch + 1 - epochs[0]) % (args.epoch_save or len(epochs)) == 0 or epoch == epochs[-1]}
    first, last = epochs[0] * steps, epochs.stop * steps

    about = {"base": fingerprint(args.load_model), "data": documents.fingerprint()}
    state = resume.load(args.proj_dir, args.resume, first) if args.resume else None
    changes = resume.check_same_run(state, args, about) if state else []
    resume.check_folder(args, paths, first, state and state.progress, not changes)
    if state and (state.progress.step > last or state.progress.step == last and os.path.exists(paths[last])):
        resume.prune(args.proj_dir, args.keep, first)
        return print(f"{args.proj_dir}: this run is complete, {state.progress.step - first} steps; a higher --epoch_count than "
                     f"{state.progress.step // steps - epochs[0]} trains on")
    resume.check_room(args, built, paths, first, state.progress.step if state else first)
    log = Log(args, documents.vocabulary, state and state.about["wandb"])
    if device.type == "cpu":
        memory.reuse_freed()
    model, saved_names, save_dtype = build_model(args, device)
    optimizer = make_optimizer(model, args.lr_init, (args.beta1, args.beta2), args.adam_eps, args.weight_decay, args.layerwise_lr)
    autocast, scaler = precision(args, device)
    held_out_loss = functools.partial(val_loss, model, held_out, args.micro_bsz, args.ctx_len, loss_mask, autocast)
    weights = {name: p for name, p in model.named_parameters() if name in saved_names}
    progress = state.restore(weights, optimizer, scaler) if state else resume.Progress(first)
    saver = resume.Saver(args.proj_dir, args.keep, first, log, about | {"args": vars(args), "wandb": log.wandb and log.wandb.id},
                         progress, weights, optimizer, scaler)
    describe(args, model, documents, steps)
    log.open(progress, bool(state))
    if state:
        log.line(f"going on from {state.path}: step {progress.step} of {last}" + f", with other {', '.join(changes)}" * bool(changes))
    elif held_out:
        print(f"held-out loss before training: {log.point(first, val_loss=held_out_loss()):.4f}")

    if state and not progress.losses and progress.step in paths and not os.path.exists(paths[progress.step]):
        saver.save_checkpoint(paths[progress.step], save_dtype)  # it was moved away, but the state has it

    missing = []
    with saver.rescue():
        for epoch in range((progress.step - bool(progress.losses)) // steps, epochs.stop):
            with tqdm(total=steps, initial=progress.step - epoch * steps, desc=f"epoch {epoch}", unit="step", dynamic_ncols=True) as bar:
                while (i := progress.step) < (epoch + 1) * steps:
                    started = time.perf_counter()
                    lr = learning_rate(i, first, args.epoch_count * steps, args.lr_init, args.lr_final, args.warmup_steps)
                    with resume.unbroken():
                        micro = [micro_batch(i * N + n) for n in range(N)]
                        losses = step(model, micro, autocast, scaler)
                        loss = sum(losses)
                        with saver.changing():
                            norm, overflow = update(optimizer, scaler, lr, loss)
                            progress.count(loss, norm, overflow)
                        log.point(i, loss=loss, lr=lr)
                        if progress.bad_in_a_row:
                            log.line(f"step {i} left out: loss {loss}, gradient norm {norm}; {data.suspects(documents, losses, i * N, rows)}")
                            progress.check()
                    speed = sum(idx.numel() for idx, _, _ in micro) / (time.perf_counter() - started)
                    bar.set_postfix_str(f"loss {loss:.3f}, lr {lr:.1e}, {speed:,.0f} tokens/s, {memory.peak(device) / 1e9:.1f} GB")
                    bar.update()
                    if args.save_steps and progress.step % args.save_steps == 0 and progress.step < (epoch + 1) * steps:
                        saver.save_state()
            log.line(f"epoch {epoch}: {progress.summary(last - first)}"
                     + (f", held-out loss {log.point(progress.step, val_loss=held_out_loss()):.4f}" if held_out else ""))
            if progress.step not in paths or saver.save_checkpoint(paths[progress.step], save_dtype):
                progress.losses.clear()
            else:
                missing.append(paths[progress.step])
            if progress.step in paths or args.save_steps and progress.step % args.save_steps == 0:
                saver.save_state()
            if progress.step < last:
                progress.losses.clear()
    said = log.close()
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
