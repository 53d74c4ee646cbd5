"""The figures that the README quotes: `python bench.py` for speed, or its parts alone: `python bench.py layer`, `step`, `quantized`,
`infctx`, `loss`, `wkv`; and `python bench.py memory` (or `memory 1.6B nf4`, say), which trains models of the true sizes for an hour, and
`memory long`, rows of 65,536 tokens, and `memory ranks`, several devices. `python bench.py launches` counts what a step asks of a GPU,
and `python bench.py gpu` (bench_gpu.py) measures on one all that a GPU changes, and writes a report.

A figure of speed is a ratio. What is compared runs in turn, round after round, in one process; the ratio of each round is taken, and
their median printed: a machine that is shared, or slows down, slows both sides. Times, medians too, are there for orientation.
"""

import functools
import os
import re
import statistics
import subprocess
import sys
import tempfile
import timeit

import torch
import torch.nn.functional as F
from torch import nn

import corpus
import data
import devices
import estimate
import rwkv6
import train
from archive import save_stream
from bone import BoneLinear, add_bone
from cli import run_cli
from gradient import Passes
from loss import count_tokens
from memory import reuse_freed
from plan import resolve_options
from quant import dense, quantize
from wkv6 import kernel_problem, wkv6

N_EMBD, DIM_FFN, R = 2048, 7168, 64  # RWKV-6 1.6B
VOCAB = 65536 * 2 // 24  # a head in the same proportion to 2 blocks as the real one is to 24


def in_turn(rounds, **functions):
    """[{name: seconds of that function}], a dict per round; a first round is not counted."""
    return [
        {name: timeit.timeit(function, number=1) for name, function in functions.items()}
        for _ in range(rounds + 1)
    ][1:]


def row(what, times, a, b, sign, aim):
    """Print the ratio a / b, and whether it meets its aim: "<=", 1.15, say."""
    ratio = statistics.median(t[a] / t[b] for t in times)
    met = "met" if (ratio <= aim if sign == "<=" else ratio >= aim) else "NOT MET"
    a, b = (f"{1000 * statistics.median(t[name] for t in times):8.1f} ms" for name in (a, b))
    print(f"{what:<62} {a} / {b} = {ratio:5.2f}   ({sign} {aim}: {met})", flush=True)


class BuiltLinear(BoneLinear):
    """The straightforward way: build W' in every step, all in bfloat16."""

    def forward(self, x):
        dtype = self.weight.dtype
        weight = dense(self.weight, dtype)
        blocks = weight.unflatten(0, (-1, self.r)).unflatten(2, (-1, self.r))
        blocks = blocks.transpose(1, 2)  # (a, b, r, r)
        B = self.bone.to(dtype)
        delta = (blocks @ B + B).transpose(1, 2).reshape(weight.shape)
        return F.linear(x.to(dtype), weight + delta)


def layer_functions(in_features, out_features, tokens, *, r=R, device="cpu"):
    """Return {name: function} of one layer, forward and backward: frozen, with Bone, building W'."""
    weight = (0.02 * torch.randn(out_features, in_features, device=device)).bfloat16()
    x = torch.randn(tokens, in_features, device=device).bfloat16().requires_grad_()
    gy = torch.randn(tokens, out_features, device=device).bfloat16()
    layers = {
        "frozen": functools.partial(F.linear, weight=weight),
        "bone": BoneLinear(weight, r),
        "built": BuiltLinear(weight, r),
    }
    return {name: lambda layer=layer: layer(x).backward(gy) for name, layer in layers.items()}


def layer():
    print(f"\none layer, bat r {R}, bfloat16, forward + backward")
    for out_features in (N_EMBD, DIM_FFN):
        for T in (512, 1024):
            times = in_turn(15, **layer_functions(N_EMBD, out_features, T))
            row(
                f"{N_EMBD} -> {out_features}, {T} tokens: Bone / the frozen layer",
                times,
                "bone",
                "frozen",
                "<=",
                1.15,
            )
            row(
                f"{N_EMBD} -> {out_features}, {T} tokens: building W' / Bone",
                times,
                "built",
                "bone",
                ">=",
                1.5,
            )


def random_model(config, quant=None, device="cpu"):
    """A bfloat16 model of random weights, made on its device one by one; quant: int8, nf4 or None."""
    with torch.device("meta"):
        model = rwkv6.RWKV(config)
    for name, p in list(model.named_parameters()):
        module_name, _, kind = name.rpartition(".")
        module = model.get_submodule(module_name)
        dtype = rwkv6.storage_dtype(model, name, torch.bfloat16)
        weight = torch.empty(p.shape, dtype=dtype, device=device).normal_(0, 0.02)
        if quant and name.startswith("blocks.") and isinstance(module, rwkv6.Linear):
            model.set_submodule(module_name, quantize(weight, quant))
        else:
            setattr(module, kind, nn.Parameter(weight))
    return model


def add_lora(model, r):
    """Put peft's LoRA into the linear layers of the blocks, with as many parameters as bat has."""
    from peft import LoraConfig, inject_adapter_in_model

    ranks = {}
    for name, module in model.named_modules():
        if isinstance(module, rwkv6.Linear) and name.startswith("blocks."):
            # in * r parameters of bat, rank * (in + out) of LoRA
            ranks[name] = round(module.in_features * r / (module.in_features + module.out_features))
    config = LoraConfig(target_modules=list(ranks), rank_pattern=ranks)
    inject_adapter_in_model(config, model)


def fine_tuned(model, kind, r=R):
    """Make `model` one that is fine-tuned by `kind`: bone, built (W') or lora (peft). Returns it."""
    if kind == "lora":
        add_lora(model, r)
    else:
        add_bone(model, r)
    if kind == "built":
        set_layers(model, BuiltLinear)
    for name, p in model.named_parameters():
        p.requires_grad_(any(part in name for part in ("time", "ln", "bone", "lora")))
    model.grad_cp = True
    return model


def set_layers(model, layer_class):
    """Make the layers with Bone BoneLinear or BuiltLinear, which compute the same."""
    for module in model.modules():
        if isinstance(module, BoneLinear):
            module.__class__ = layer_class


def model_2_blocks(kind, quant=None):
    """Two blocks of the 1.6B model with random weights, fine-tuned by `kind`."""
    config = rwkv6.Config(2, N_EMBD, VOCAB, DIM_FFN)
    return fine_tuned(random_model(config, quant), kind)


def train_step(model, optimizer, T):
    """One whole optimizer step on T random tokens, as train.py takes it. Returns the loss."""
    device = model.head.weight.device
    idx, targets = torch.randint(model.config.vocab_size, (2, 1, T))
    micro = [(idx, targets, torch.ones(1, T))]
    counts = count_tokens(micro)
    autocast = torch.autocast(device.type, torch.bfloat16)
    micro, passes = data.to_device(micro, device), Passes(autocast=autocast)
    losses = train.accumulate_gradients(model, micro, passes, counts=counts)
    scaler = torch.amp.GradScaler(device.type, enabled=False)
    norm, scale = train.update(optimizer, scaler, sum(losses))
    [loss, *_] = torch.stack([*losses, norm, scale]).tolist()  # the only wait for a GPU
    return loss


def products(matrices, x):
    """Only the matrix products a step cannot do without: for each (W, times), W x so many times (2: grad_cp repeats it), W^T gy once."""
    for W, times in matrices:
        for _ in range(times):
            F.linear(x[W.shape[1]], W)
        x[W.shape[0]] @ W


def wkv_function(T, impl, blocks=1, forwards=1, device="cpu"):
    """A function that runs WKV-6 over T tokens, as `blocks` blocks of the 1.6B model do: `forwards` times forward, once backward."""
    r, k, v, gy = (
        torch.randn(blocks, T, 32, 64, device=device).bfloat16().requires_grad_() for _ in range(4)
    )
    w, u = (
        (torch.randn(blocks, T, 32, 64, device=device) - 4).requires_grad_(),
        torch.randn(32, 64, device=device).requires_grad_(),
    )

    def run():
        for _ in range(forwards):
            y, _ = wkv6(r, k, v, w, u, impl=impl)
        torch.autograd.grad(y, (r, k, v, w, u), gy)

    return run


def step():
    models = {kind: model_2_blocks(kind) for kind in ("bone", "built", "lora")}
    optimizers = {kind: train.make_optimizer(model, 1e-6) for kind, model in models.items()}
    bat, lora = (
        sum(p.numel() for name, p in models[kind].named_parameters() if kind in name)
        for kind in ("bone", "lora")
    )
    print(
        f"\nwhole training step, 2 blocks of the 1.6B model, vocabulary {VOCAB}, grad_cp; trained: bat {bat:,}, LoRA {lora:,} parameters"
    )
    matrices = [(m.weight, 2) for m in models["bone"].modules() if isinstance(m, BoneLinear)] + [
        (models["bone"].head.weight, 1)
    ]
    for T in (512, 1024):
        x = {n: torch.randn(T, n).bfloat16() for n in (N_EMBD, DIM_FFN, VOCAB)}
        steps = {
            kind: lambda kind=kind: train_step(models[kind], optimizers[kind], T) for kind in models
        }
        times = in_turn(
            5,
            **steps,
            products=lambda: products(matrices, x),
            wkv=wkv_function(T, "auto", blocks=2, forwards=2),
        )
        row(f"{T} tokens: building W' / Bone", times, "built", "bone", ">=", 1.4)
        row(f"{T} tokens: Bone / LoRA", times, "bone", "lora", "<=", 1.0)
        row(
            f"{T} tokens: necessary products / the step (arithmetic achieved)",
            times,
            "products",
            "bone",
            ">=",
            0.75,
        )
        row(f"{T} tokens: WKV-6 / the step", times, "wkv", "bone", "<=", 0.1)


def quantized():
    print("\nthe same step over a quantized base")
    models = {quant: model_2_blocks("bone", quant) for quant in (None, "int8", "nf4")}
    steps = {
        str(quant): functools.partial(train_step, model, train.make_optimizer(model, 1e-6), 1024)
        for quant, model in models.items()
    }
    times = in_turn(7, **steps)
    row("1024 tokens: int8 / bfloat16", times, "int8", "None", "<=", 1.1)
    row("1024 tokens: nf4 / bfloat16", times, "nf4", "None", "<=", 1.25)


def loss():
    print(
        "\nhead (vocabulary 65536), cross-entropy and L2 wrap, 1024 tokens, bfloat16, forward + backward"
    )
    model = rwkv6.RWKV(rwkv6.Config(1, N_EMBD, 65536, DIM_FFN))
    model.head.weight = torch.nn.Parameter(
        (0.02 * torch.randn(65536, N_EMBD)).bfloat16(), requires_grad=False
    )
    x, targets = torch.randn(1, 1024, N_EMBD, requires_grad=True), torch.randint(65536, (1, 1024))
    model.hidden = lambda idx: (x, None)

    def plain():
        """With the logits whole; the L2 wrap as the gradient of a term of the loss."""
        logits = model.head(x)[0].float()
        (
            F.cross_entropy(logits, targets[0])
            + 0.5e-4 / 1024 * logits.max(-1).values.square().sum()
        ).backward()

    def chunked():
        with torch.autocast("cpu", torch.bfloat16):
            value, _ = train.loss_fn(model, targets, targets, torch.ones(1, 1024))
        value.backward()

    row(
        "in chunks / with the logits whole",
        in_turn(5, chunked=chunked, plain=plain),
        "chunked",
        "plain",
        "<=",
        1.0,
    )


def infctx():
    print(
        "\nthe same step on 4096 tokens: 8 rows of 512, one by one, or one row of 4096 by --train_type infctx, in chunks of 512 (tokens/s)"
    )
    for quant in (None, "nf4"):
        model = model_2_blocks("bone", quant)
        optimizer = train.make_optimizer(model, 1e-6)

        def run(rows, T, keep_products, **chunks):
            model.keep_products = keep_products
            micro = [(*torch.randint(VOCAB, (2, 1, T)), torch.ones(1, T)) for _ in range(rows)]
            passes = Passes(autocast=torch.autocast("cpu", torch.bfloat16), **chunks)
            losses = train.accumulate_gradients(model, micro, passes)
            train.update(optimizer, passes.scaler, sum(losses))

        times = in_turn(
            5,
            rows=lambda: run(8, 512, False),
            exact=lambda: run(1, 4096, True, chunk_ctx=512),
            cut=lambda: run(1, 4096, True, chunk_ctx=512, bptt=1),
        )
        row(f"{quant or 'bfloat16'}: infctx / rows of one chunk", times, "rows", "exact", ">=", 0.9)
        row(
            f"{quant or 'bfloat16'}: infctx --bptt 1 / rows of one chunk",
            times,
            "rows",
            "cut",
            ">=",
            0.9,
        )


def wkv():
    print("\nWKV-6, 32 heads of 64, bfloat16, forward + backward")
    if kernel_problem():
        return
    for T, name, impl, rounds in (
        (512, "chunked", "chunked", 5),
        (1024, "chunked", "chunked", 5),
        (512, "the loop", "reference", 1),
    ):
        times = in_turn(rounds, compiled=wkv_function(T, "compiled"), other=wkv_function(T, impl))
        row(f"{T} tokens: {name} / compiled", times, "other", "compiled", ">=", 1)


def count_launches():
    """What a GPU has to do in a step, counted on the device that is there, or on a stand-in for one."""
    if not torch.accelerator.is_available():
        import gpu_standin  # noqa: F401 (makes a device)
    import launches

    print(
        "\nforward, recomputation and backward of 512 tokens, 1.6B, bat r 64, WKV-6 as one launch; bytes read and written, caches not considered"
    )
    for part, count in launches.table(devices.find("gpu")).items():
        print(f"{part:<24}{count}", flush=True)
    os._exit(0)  # the threads of the stand-in can abort the interpreter's end


def random_checkpoint(n_layer, n_embd, vocab_size, path):
    """A bfloat16 model with random weights, the same in all blocks."""
    with torch.device("meta"):
        like = {
            name: p.bfloat16()
            for name, p in rwkv6.RWKV(rwkv6.sizes(n_layer, n_embd, vocab_size)).named_parameters()
        }
    shared = {
        re.sub(r"^blocks.\d+.", "", name): (0.02 * torch.randn(t.shape)).bfloat16()
        for name, t in like.items()
    }
    save_stream(like, lambda name: shared[re.sub(r"^blocks.\d+.", "", name)], path)


def prepare_run(folder, config, ctx_len, *, r, steps=2, accelerator="cpu"):
    """Write data, and a base of random weights if none is there. Return train.py's flags for them."""
    base, prefix = f"{folder}/base.pth", f"{folder}/x"
    if not os.path.exists(base):
        random_checkpoint(config.n_layer, config.n_embd, config.vocab_size, base)
    corpus.write_binidx(prefix, torch.randint(1, config.vocab_size, (2, ctx_len + 1)).tolist())
    flags = f"--ctx_len {ctx_len} --epoch_steps {steps} --bone_r {r} --accelerator {accelerator}"
    paths = ["--load_model", base, "--data_file", prefix, "--proj_dir", f"{folder}/out"]
    return [*paths, *flags.split()]


def peak_said(output):
    """Return the GB of the line that train.py says at its end."""
    return float(re.search(r"peak memory ([\d.]+) GB", output)[1])


def measure(folder, n_layer, n_embd, vocab_size, ctx_len, r, flags, steps=2):
    """GB at the peak of a training run of some steps on a model of random weights, less what importing PyTorch takes; {part: GB} expected."""
    with tempfile.TemporaryDirectory(dir=folder) as folder:
        config = rwkv6.sizes(n_layer, n_embd, vocab_size)
        flags = [*prepare_run(folder, config, ctx_len, r=r, steps=steps), *flags.split()]
        options = resolve_options(train.parse_args(flags))
        expected = estimate.expected_memory(options, torch.device("cpu"))[1]
        imported = subprocess.check_output(
            [
                sys.executable,
                "-c",
                "import torch, psutil; print(psutil.Process().memory_info().rss)",
            ]
        )
        said = subprocess.check_output([sys.executable, train.__file__, *flags], text=True)
        return peak_said(said) - int(imported) / 1e9, {
            part: size / 1e9 for part, size in expected.items()
        }


# n_layer, n_embd; and GB for bf16, int8 and nf4: what the tutorial of RWKV-PEFT names, and what is to be reached here
MODELS = {
    "1.6B": (24, 2048, (7.3, 4.8), (5.9, 3.5), (5.4, 2.9)),
    "3B": (32, 2560, (11.8, 8.6), (9.4, 5.9), (8.1, 4.6)),
    "7B": (32, 4096, (23.7, 20.0), (17.3, 13.0), (14.9, 9.8)),
}


def memory(only=()):
    kinds = {"bf16": "none", "int8": "int8", "nf4": "nf4"}
    if unknown := {*only} - MODELS.keys() - kinds.keys():
        raise ValueError(
            f"{unknown.pop()} is no part of the memory table: {', '.join([*MODELS, *kinds, 'long', 'ranks'])} are"
        )
    print(
        f"\nGB at the peak of `python train.py`, 2 steps, ctx_len 1024, micro_bsz 1, bat r {R}, on the CPU, beyond importing PyTorch"
    )
    print(f"{'':<12}{'measured':>9}{'expected':>9}{'tutorial':>9}{'aim':>9}")
    with tempfile.TemporaryDirectory() as folder:
        for model, (n_layer, n_embd, *figures) in MODELS.items():
            for kind, (tutorial, aim) in zip(kinds, figures):
                if (model in only or not {*only} & MODELS.keys()) and (
                    kind in only or not {*only} & kinds.keys()
                ):
                    measured, expected = measure(
                        folder, n_layer, n_embd, 65536, 1024, R, f"--quant {kinds[kind]}"
                    )
                    met = "met" if measured <= aim else "NOT MET"
                    print(
                        f"{model + ' ' + kind:<12}{measured:9.2f}{sum(expected.values()):9.2f}{tutorial:9.1f}{aim:9.1f}  {met}",
                        flush=True,
                    )


def ranks():
    """What one of N ranks takes: as --dry_run expects it, for the large models; and measured with two processes on CPUs, for 1.6B with 6 of its blocks."""
    strategies = ("ddp", "deepspeed_stage_1", "deepspeed_stage_2", "deepspeed_stage_3")
    with tempfile.TemporaryDirectory() as folder:
        print(
            f"\nGB that a rank takes, expected by --dry_run: bf16, ctx_len 1024, micro_bsz 1, bat r {R}\n{'':<8}{'ranks':>6}"
            + "".join(f"{s:>19}" for s in strategies)
        )
        for model, (n_layer, n_embd) in {"7B": (32, 4096), "14B": (61, 4096)}.items():
            with torch.device("meta"):
                like = {
                    name: p.bfloat16()
                    for name, p in rwkv6.RWKV(
                        rwkv6.sizes(n_layer, n_embd, 65536)
                    ).named_parameters()
                }
            with (
                torch.serialization.skip_data()
            ):  # a file with holes, whose sizes are all that is looked at
                torch.save(
                    {name: torch.empty(t.shape, dtype=t.dtype) for name, t in like.items()},
                    f"{folder}/{model}.pth",
                )
            for n in (1, 2, 4, 8):
                flags = [
                    f"--load_model {folder}/{model}.pth --ctx_len 1024 --bone_r {R} --accelerator cpu --dry_run --devices {n} --strategy {s}"
                    for s in strategies
                ]
                expected = [
                    sum(
                        estimate.expected_memory(
                            resolve_options(train.parse_args(line.split())), torch.device("cpu")
                        )[1].values()
                    )
                    for line in flags
                ]
                print(
                    f"{model:<8}{n:>6}" + "".join(f"{size / 1e9:19.2f}" for size in expected),
                    flush=True,
                )
        print(
            "\nGB at the peak of the first of two ranks: 1.6B with 6 of its 24 blocks, vocabulary 16,384, ctx_len 512; measured, expected"
        )
        for flags in (
            "",
            *(f"--devices 2 --strategy {s}" for s in strategies),
            "--devices 2 --quant nf4",
            "--devices 2 --quant nf4 --strategy deepspeed_stage_3",
        ):
            measured, expected = measure(folder, 6, N_EMBD, 16384, 512, R, flags)
            print(
                f"{flags or 'one process':<56}{measured:6.2f}{sum(expected.values()):6.2f}",
                flush=True,
            )


def long():
    """The peak with ctx_len 65,536 against that with ctx_len = chunk_ctx; the states between chunks are counted apart."""
    print(
        "\nGB at the peak of `python train.py`, 1.6B with 2 of its 24 blocks, in brackets what --dry_run expects"
    )
    with tempfile.TemporaryDirectory() as folder:
        short, long = (
            measure(
                folder,
                2,
                N_EMBD,
                65536,
                ctx_len,
                R,
                f"--train_type {kind} --chunk_ctx 512",
                steps=1,
            )
            for ctx_len, kind in ((512, "none"), (65536, "infctx"))
        )
    states = long[1]["states between chunks"]
    for (measured, expected), what in (
        (short, "512 tokens"),
        (long, "65,536 tokens, infctx, in chunks of 512"),
    ):
        print(f"{what:<42}{measured:6.2f} ({sum(expected.values()):.2f})")
    ratio = (long[0] - states) / short[0]
    print(
        f"{'the latter, without the states between chunks':<42}{long[0] - states:6.2f}, of which there are {states:.2f}; ratio {ratio:.3f} "
        f"(<= 1.1: {'met' if ratio <= 1.1 else 'NOT MET'})"
    )


def main():
    parts = {
        "layer": layer,
        "step": step,
        "quantized": quantized,
        "infctx": infctx,
        "loss": loss,
        "wkv": wkv,
    }
    if sys.argv[1:2] == ["launches"]:
        if sys.argv[2:]:
            raise ValueError(
                f"bench.py launches takes nothing more; leave {' '.join(sys.argv[2:])} out"
            )
        return count_launches()
    if sys.argv[1:2] == ["gpu"]:
        import bench_gpu

        return bench_gpu.main(sys.argv[2:])
    if sys.argv[1:2] == ["memory"]:
        return (
            {"long": long, "ranks": ranks}[sys.argv[2]]()
            if sys.argv[2:] in (["long"], ["ranks"])
            else memory(sys.argv[2:])
        )
    if {"-h", "--help"} & {*sys.argv[1:]}:
        return print(__doc__)
    if unknown := set(sys.argv[1:]) - set(parts):
        raise ValueError(
            f"{unknown.pop()} is no part of the benchmark: {', '.join(parts)}, launches, gpu and memory are"
        )
    reuse_freed()
    print(
        f"PyTorch {torch.__version__}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
    )
    for name in sys.argv[1:] or parts:
        parts[name]()


if __name__ == "__main__":
    run_cli(main)
