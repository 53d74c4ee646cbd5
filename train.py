"""Fine-tune an RWKV-6 model with Bone, or pretrain a small one from scratch. `python train.py --help` lists every flag.

Data flows one way: file -> tokens -> batch -> model -> loss -> step -> checkpoint. A batch is a function of (seed, step),
so a run is a function of its command line.
"""

import argparse
import contextlib
import csv
import functools
import glob
import json
import math
import os
import shlex
import time

import torch
from torch import nn
from tqdm import tqdm

import bone
import data
import memory
import rwkv6
from files import Parser, atomic_path, read_checkpoint, run_cli, save_checkpoint, trained_quant


def parse_args(argv=None):
    parser = Parser(prog="train.py", usage="train.py --load_model base.pth --data_file data.jsonl [flags]",
                    description="Fine-tune an RWKV-6 model with Bone, on a GPU or a CPU. merge.py makes a complete model of the result.")

    def group(title, flags):
        g = parser.add_argument_group(title)
        for name, kind, default, text in flags:
            shown = "" if default in (None, "", False) else f" (default: {' '.join(default) if kind is list else default})"
            options = {list: {"nargs": "*"}, bool: {"action": "store_true"}}.get(kind) or (
                {"choices": kind} if isinstance(kind, tuple) else {"type": kind, "metavar": kind.__name__.upper()})
            g.add_argument(f"--{name}", default=default, help=text + shown, **options)

    group("model", [
        ("load_model", str, "", "base model, a published x060 .pth; without it a new model of --n_layer and --n_embd is pretrained"),
        ("n_layer", int, None, "number of blocks; read from the base model, where it must agree"),
        ("n_embd", int, None, "width; likewise"),
        ("vocab_size", int, 65536, "vocabulary of a new model; a base model brings its own"),
    ])
    group("Bone", [
        ("bone_r", int, None, "rank: the side of a block; must divide every layer's sizes (default: 64, or that of --bone_load)"),
        ("bone_mode", ("bat", "bone"), None, "bat: block affine; bone: shard sharing (default: bat, or that of --bone_load)"),
        ("bone_load", str, "", "go on from this Bone checkpoint"),
        ("train_parts", list, ["time", "ln"], "also train parameters whose names contain these: time ln emb head, or nothing"),
    ])
    group("data", [
        ("data_file", str, None, "a .jsonl with a \"text\" per line, or a binidx prefix (x for x.bin and x.idx)"),
        ("val_file", str, "", "held-out data of the same kind; its loss is measured after every epoch"),
        ("ctx_len", int, 512, "longest row in tokens; longer documents are cut"),
        ("dataload", ("pad", "only", "get"), "pad", "pad: one document per row; only: the same without padding, micro_bsz 1; get: random windows"),
        ("loss_mask", ("pad", "none", "qa"), "pad", "what counts: pad: the documents; none: the padding too; qa: only what follows Assistant:"),
    ])
    group("training", [
        ("proj_dir", str, "out", "folder for checkpoints and logs"),
        ("epoch_count", int, 1, "number of epochs"),
        ("epoch_begin", int, 0, "number of the first epoch"),
        ("epoch_steps", int, 0, "optimizer steps in an epoch; 0: as many as it takes to see the data once"),
        ("epoch_save", int, 1, "save a checkpoint every this many epochs"),
        ("micro_bsz", int, 1, "rows in a micro batch: what goes through the model at once"),
        ("accumulate_grad_batches", int, 1, "micro batches in an optimizer step"),
        ("random_seed", int, 0, "seed of the data order and of a new model"),
    ])
    group("optimizer (Adam)", [
        ("lr_init", float, 2e-5, "learning rate at the start; 6e-4 suits a new small model"),
        ("lr_final", float, 2e-5, "and at the end; exponential in between, linear where one is 0"),
        ("warmup_steps", int, 0, "steps over which the learning rate rises from a fifth to the whole"),
        ("beta1", float, 0.9, "decay of the mean of gradients"),
        ("beta2", float, 0.99, "decay of the mean of squared gradients"),
        ("adam_eps", float, 1e-8, "added to the denominator"),
    ])
    group("machine", [
        ("accelerator", ("auto", "gpu", "cpu"), "auto", "auto: the GPU where there is one"),
        ("precision", ("bf16", "fp32"), "bf16", "of the matrix products; trained parameters are always float32"),
        ("quant", ("none", "int8", "nf4"), None, "keep the base model's large matrices in 8 or 4 bits (default: none, or as --bone_load was trained)"),
        ("grad_cp", int, 1, "1: recompute activations block by block in the backward pass, to save memory; 0: keep them"),
        ("dry_run", bool, False, "only say what would be trained, and how much memory that takes"),
    ])
    args = parser.parse_args(argv)
    args.train_parts = [word for part in args.train_parts for word in part.strip("[]").replace(",", " ").replace('"', " ").split()]
    check_args(args)
    return args


def check_args(args):
    if not args.data_file and not args.dry_run:
        raise ValueError("--data_file is missing: give a .jsonl or a binidx prefix, as in --data_file data.jsonl")
    for name, least in dict(ctx_len=1, epoch_count=1, epoch_begin=0, epoch_steps=0, epoch_save=1, micro_bsz=1, accumulate_grad_batches=1,
                            lr_init=0, lr_final=0, warmup_steps=0, vocab_size=1, random_seed=0).items():
        if not least <= getattr(args, name) < 2**63:
            raise ValueError(f"--{name} {getattr(args, name)} must be a number of at least {least}, and below 2^63")
    if not args.load_model and not (args.n_layer and args.n_embd):
        raise ValueError("--load_model is missing: give a base model, or --n_layer and --n_embd to pretrain a new one")
    if not args.load_model and args.quant not in (None, "none"):
        raise ValueError(f"--quant {args.quant} is for the frozen matrices of a base model: add --load_model, or drop it")
    if not args.load_model and args.bone_load:
        raise ValueError("--bone_load needs the base model it was trained on: add --load_model")
    if unknown := set(args.train_parts) - {"time", "ln", "emb", "head"}:
        raise ValueError(f"--train_parts {unknown.pop()} is unknown: time, ln, emb and head can be trained")
    if args.accelerator == "gpu" and not torch.cuda.is_available():
        raise ValueError("--accelerator gpu, but PyTorch sees no GPU here; use --accelerator cpu or leave it out")


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
    copies: (M, S) or None, added to the logits of the tokens seen: (M, S). The gradient is made with the loss, chunk by chunk, and
    only scaled in the backward pass.
    """

    @staticmethod
    def forward(ctx, x, head, targets, weight, l2, dtype, copies, seen):
        W = head.to(dtype)
        gx, ghead, gcopies = (make(a) if needed else None for make, a, needed in zip(
            (torch.empty_like, torch.zeros_like, torch.empty_like), (x, head, copies), (*ctx.needs_input_grad[:2], copies is not None)))
        loss = torch.zeros((), dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
        many = max(1, (1 << 24) // len(head))  # tokens in a product: with fewer, reading W would take longer than multiplying by it
        few = max(1, many // 8)                # and in what is done in float32: 8 MB, which stay in the cache
        for start in range(0, len(x), many):
            rows = slice(start, start + many)
            x_rows = x[rows].to(dtype)
            g_rows = x_rows @ W.t()            # the logits, and soon, in their place, the gradient
            if copies is not None:
                g_rows.scatter_add_(-1, seen[rows], copies[rows].to(dtype))
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
            if copies is not None:
                gcopies[rows] = g_rows.gather(-1, seen[rows]).to(gcopies.dtype)
        ctx.save_for_backward(gx, ghead, gcopies)
        return loss

    @staticmethod
    def backward(ctx, gloss):
        gx, ghead, gcopies = (g if g is None else g * gloss for g in ctx.saved_tensors)
        return gx, ghead, None, None, None, None, gcopies, None


def loss_fn(model, idx, targets, mask, tokens=None, positions=None):
    """Mean cross-entropy over the masked tokens; its backward includes the RWKV L2 wrap, + 1e-4 / positions * the largest logit.

    idx, targets: (B, T) int64; mask: (B, T), 1 where a token counts. A negative target is padding, and no position. A micro batch of
    a larger step gives the step's `tokens` (sum of masks) and `positions`, so that losses and gradients of its micro batches add up.
    """
    targets, mask = targets.reshape(-1), mask.reshape(-1)
    tokens = max(float(mask.sum() if tokens is None else tokens), 1.0)
    positions = max(int((targets >= 0).sum()) if positions is None else positions, 1)
    x, _ = model.hidden(idx)
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else model.head.weight.dtype
    copies = seen = None
    if model.config.head_qk:
        copies = model.copies(x, idx)[0].flatten(0, 1)
        seen = idx[:, None].expand(-1, idx.shape[1], -1).reshape(copies.shape)
    l2 = (targets >= 0).to(x.dtype) * (1e-4 * tokens / positions)   # the sum is divided only below, so that fp16 can hold its gradient
    return HeadLoss.apply(x.flatten(0, 1), model.head.weight, targets.clamp(min=0), mask.to(x.dtype), l2, dtype, copies, seen) / tokens


def make_optimizer(model, lr, betas=(0.9, 0.99), eps=1e-8):
    """Adam over the parameters that require gradients; time_decay (not its _w1, _w2) at twice the rate."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    fast = [p for name, p in trained.items() if name.endswith("time_decay")]
    rest = [p for name, p in trained.items() if not name.endswith("time_decay")]
    groups = [{"params": params, "lr": lr * scale, "lr_scale": scale} for params, scale in ((rest, 1.0), (fast, 2.0)) if params]
    return torch.optim.Adam(groups, lr=lr, betas=betas, eps=eps, fused=True)


def learning_rate(step, total, lr_init, lr_final, warmup_steps):
    """Learning rate of optimizer step `step` of `total`, as RWKV-LM computes it; the warm-up goes from 0.2 to 1."""
    progress = min(1.0, max(0.0, (step - warmup_steps + 1) / max(1, total - warmup_steps)))
    if lr_init == 0 or lr_final == 0:
        lr = lr_init + (lr_final - lr_init) * progress
    else:
        lr = lr_init * math.exp(math.log(lr_final / lr_init) * progress)
    return lr * (0.2 + 0.8 * step / warmup_steps if step < warmup_steps else 1.0)


# ---- what is trained ----------------------------------------------------------------------------------------------------------

def build_model(args, device):
    """The model with exactly the trained parameters requiring gradients, as float32; the names to save, and in which dtype.
    What a --bone_load checkpoint had trained is saved again, even where it is not trained any further: merging needs it."""
    dtype = torch.bfloat16 if args.precision == "bf16" else torch.float32
    args.quant = trained_quant(args.bone_load, args.quant)
    if not args.load_model:
        torch.manual_seed(args.random_seed)
        with torch.device("meta" if device.type == "meta" else "cpu"):
            model = rwkv6.init_model(args.n_layer, args.n_embd, args.vocab_size, device=device)
        return model, set(dict(model.named_parameters())), dtype
    loaded = read_checkpoint(args.bone_load) if args.bone_load else {}
    r, mode = bone.rank_and_mode(loaded, args.bone_load) if loaded else (64, "bat")
    for flag, value in (("bone_r", r), ("bone_mode", mode)):
        if args.bone_load and getattr(args, flag) not in (None, value):
            raise ValueError(f"{args.bone_load}: has {flag} {value}, but --{flag} is {getattr(args, flag)}; drop --{flag} to use {value}")
        setattr(args, flag, getattr(args, flag) if getattr(args, flag) is not None else value)
    model = rwkv6.load_model(args.load_model, dtype, device, args.quant)
    for name in ("n_layer", "n_embd"):
        if getattr(args, name) not in (None, getattr(model.config, name)):
            raise ValueError(f"--{name} {getattr(args, name)}, but {args.load_model} has {getattr(model.config, name)}; drop the flag to use that")
    bone.load_bone(model, args.bone_load) if args.bone_load else bone.add_bone(model, args.bone_r, args.bone_mode)
    for name, p in model.named_parameters():
        if not name.endswith(".bone") and any(part in name for part in args.train_parts):
            p.data = p.data.float()
            p.requires_grad_(True)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    return model, trained | loaded.keys(), read_checkpoint(args.load_model)["emb.weight"].dtype


def count(model):
    """Numbers of trained parameters and of all, the quantized ones included."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return trained, sum(math.prod(shape) for shape in bone.weight_shapes(model).values())


def expected_memory(args, device):
    """The model that the flags ask for, on the meta device, and {part: bytes} of what its training takes at the peak."""
    model, _, _ = build_model(args, torch.device("meta"))
    model.grad_cp = bool(args.grad_cp)

    def loss():
        idx = torch.zeros(args.micro_bsz, args.ctx_len, dtype=torch.int64, device=device)
        with torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16"):
            return loss_fn(model, idx, idx, torch.ones(idx.shape, device=device), 1, idx.numel())
    return model, memory.expected(model, loss, device, args.accumulate_grad_batches > 1)


def check_memory(args, device):
    """What is trained, and the memory that takes: printed with --dry_run, or where it is not there, which is a ValueError before anything
    is loaded. Returns the model on the meta device."""
    model, parts = expected_memory(args, device)
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
    return model


def step(model, micro, autocast):
    """Forward and backward of an optimizer step's micro batches. Returns the mean loss over all their counting tokens."""
    tokens, positions = sum(mask.sum().item() for _, _, mask in micro), sum((targets >= 0).sum().item() for _, targets, _ in micro)
    total = 0.0
    for batch in micro:
        with autocast:
            loss = loss_fn(model, *(x.to(model.head.weight.device) for x in batch), tokens, positions)
        loss.backward()
        total += loss.item()
    return total


@torch.no_grad()
def val_loss(model, documents, args, autocast):
    """Mean loss over the counting tokens of all documents, each seen once."""
    total = tokens = 0.0
    for start in range(0, len(documents), args.micro_bsz):
        rows = [documents[i] for i in range(start, min(start + args.micro_bsz, len(documents)))]
        idx, targets, mask = (x.to(model.head.weight.device) for x in data.collate(rows, args.ctx_len, args.loss_mask))
        with autocast:
            total += loss_fn(model, idx, targets, mask, tokens=1).item()
        tokens += mask.sum().item()
    return total / max(tokens, 1.0)


# ---- the loop -----------------------------------------------------------------------------------------------------------------

def train(args):
    """A whole run: data and model, then epochs of optimizer steps, with logs, held-out losses and checkpoints in proj_dir."""
    device = torch.device("cuda" if args.accelerator != "cpu" and torch.cuda.is_available() else "cpu")
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16")
    epochs, N = range(args.epoch_begin, args.epoch_begin + args.epoch_count), args.accumulate_grad_batches
    paths = {epoch: os.path.join(args.proj_dir, f"rwkv-{epoch}.pth") for epoch in epochs if (epoch + 1 - epochs[0]) % args.epoch_save == 0 or epoch == epochs[-1]}
    vocab_size = check_memory(args, device).config.vocab_size
    if args.dry_run:
        return
    if os.path.exists(args.proj_dir) and not os.path.isdir(args.proj_dir):
        raise ValueError(f"--proj_dir {args.proj_dir} is a file; give a folder, which is made where it is missing")
    for path in filter(os.path.exists, paths.values()):
        raise ValueError(f"{path}: already there, from an earlier run; give another --proj_dir, or move it away")
    for path in glob.glob(os.path.join(glob.escape(args.proj_dir), "rwkv-*.pth")):
        trained_quant(path, args.quant)  # args.json, written anew below, must stay true of what is there
    documents, held_out = (data.open_data(file, vocab_size) if file else None for file in (args.data_file, args.val_file))
    if device.type == "cpu":
        memory.reuse_freed()
    model, saved_names, save_dtype = build_model(args, device)
    model.grad_cp = bool(args.grad_cp)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = make_optimizer(model, args.lr_init, (args.beta1, args.beta2), args.adam_eps)
    silent, _ = (data.check_mask(d, args.ctx_len, args.loss_mask) if d else 0 for d in (documents, held_out))
    micro_batch = functools.partial(data.batch, documents, micro_bsz=args.micro_bsz, ctx_len=args.ctx_len, dataload=args.dataload,
                                    loss_mask=args.loss_mask, seed=args.random_seed)
    micro_batch(0)  # what cannot be batched is refused here
    once = len(documents) if args.dataload != "get" else len(documents.tokens) / args.ctx_len
    steps = args.epoch_steps or math.ceil(once / (args.micro_bsz * N))
    print(f"{model.config}\n{f'Bone {args.bone_mode} r {args.bone_r}' if args.load_model else 'from scratch'}: "
          f"{' of '.join(f'{n:,}' for n in count(model))} parameters trained, {args.precision} on {device}\n"
          f"{len(documents):,} documents, {len(documents.tokens):,} tokens; "
          f"{len(epochs)} x {steps} steps of {args.micro_bsz * N} rows up to {args.ctx_len} tokens")
    if silent:
        print(f"note: {silent} of the first {min(1000, len(documents))} documents have nothing after Assistant: within {args.ctx_len} tokens and count for nothing")

    log = Log(args)
    if held_out:
        print(f"held-out loss before training: {log.point(epochs[0] * steps, val_loss=val_loss(model, held_out, args, autocast)):.4f}")
    for epoch in epochs:
        losses = []
        with tqdm(total=steps, desc=f"epoch {epoch}", unit="step", dynamic_ncols=True) as bar:
            for i in range(epoch * steps, (epoch + 1) * steps):
                started = time.perf_counter()
                lr = learning_rate(i, (epochs[-1] + 1) * steps, args.lr_init, args.lr_final, args.warmup_steps)
                for group in optimizer.param_groups:
                    group["lr"] = lr * group["lr_scale"]
                micro = [micro_batch(i * N + n) for n in range(N)]
                losses.append(step(model, micro, autocast))
                norm = nn.utils.clip_grad_norm_(trained.values(), 1.0).item()
                if not math.isfinite(losses[-1] + norm):
                    raise ValueError(f"step {i}: loss {losses[-1]}, gradient norm {norm}; what is saved is good. Try a smaller --lr_init, or --precision fp32")
                optimizer.step()
                optimizer.zero_grad()
                log.point(i, loss=losses[-1], lr=lr)
                speed = sum(idx.numel() for idx, _, _ in micro) / (time.perf_counter() - started)
                bar.set_postfix_str(f"loss {losses[-1]:.3f}, lr {lr:.1e}, {speed:,.0f} tokens/s, {memory.peak(device) / 1e9:.1f} GB")
                bar.update()
        log.line(f"epoch {epoch}: mean loss {sum(losses) / steps:.4f}" + (
            f", held-out loss {log.point((epoch + 1) * steps, val_loss=val_loss(model, held_out, args, autocast)):.4f}" if held_out else ""))
        if epoch in paths:
            save_checkpoint({name: p.detach().to("cpu", save_dtype) for name, p in model.named_parameters() if name in saved_names}, paths[epoch])
    print(f"wrote {paths[epochs[-1]]}{log.draw()}; peak memory {memory.peak(device) / 1e9:.2f} GB")
    if args.load_model:
        print(f"next: python {shlex.join(['merge.py', args.load_model, paths[epochs[-1]], 'tuned.pth'])}")


class Log:
    """In proj_dir: args.json, train_log.txt (a line per epoch), loss.csv (a row per step and held-out loss), loss.png."""

    def __init__(self, args):
        os.makedirs(args.proj_dir, exist_ok=True)
        self.curve, self.picture = (os.path.join(args.proj_dir, name) for name in ("loss.csv", "loss.png"))
        with atomic_path(os.path.join(args.proj_dir, "args.json")) as path, open(path, "w") as f:
            json.dump(vars(args), f, indent=1)
        self.text, self.csv = open(os.path.join(args.proj_dir, "train_log.txt"), "a", buffering=1), open(self.curve, "a", buffering=1)
        self.text.write(f"NEW RUN {json.dumps(vars(args))}\n")
        if self.csv.tell() == 0:
            self.csv.write("step,loss,lr,val_loss\n")

    def line(self, text):
        print(text)
        self.text.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")

    def point(self, step, loss="", lr="", val_loss=""):
        self.csv.write(f"{step},{loss},{lr},{val_loss}\n")
        return val_loss

    def draw(self):
        """Draw loss.png, where matplotlib is. Returns what to say of it."""
        try:
            from matplotlib.figure import Figure
        except ImportError:
            return ""
        axes = (figure := Figure(figsize=(8, 4.5))).add_subplot(xlabel="step", ylabel="loss (nats per token)")
        with open(self.curve) as f:
            rows = list(csv.DictReader(f))
        for column, label, style in (("loss", "training loss", "-"), ("val_loss", "held-out loss", "o-")):
            if points := [(int(row["step"]), float(row[column])) for row in rows if row[column]]:
                axes.plot(*zip(*points), style, label=label, linewidth=1)
        axes.legend()
        with atomic_path(self.picture) as path:
            figure.savefig(path, format="png", dpi=120)
        return f" and {self.picture}"


if __name__ == "__main__":
    run_cli(lambda: train(parse_args()))
