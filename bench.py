"""The figures of the documents: `python bench.py` for speed, each beside its aim.

One need not read this to understand Bone. Parts alone: `python bench.py layer`, `step`,
`quantized`, `infctx`, `loss`, `wkv`. Beside speed:

    python bench.py memory      train models of the true sizes, for an hour (bench_memory.py); or
                                `memory 1.6B nf4`, say, `memory long`, `ranks`, `compiled`
    python bench.py compile     compare eager and compiled blocks (bench_compile.py)
    python bench.py launches    count what a step asks of a GPU (launches.py)
    python bench.py gpu         measure on a GPU, and write a report (bench_gpu.py)
    python bench.py optim       moments in 8 bits beside AdamW: speed and quality (bench_optim.py)

A figure of speed is a ratio. What is compared runs in turn, round after round, in one process. The
ratio of each round is taken, and their median printed: a shared machine, or one that slows down,
slows both sides. Times, medians too, are for orientation.
"""

import functools
import importlib
import statistics
import sys
import timeit
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import data
import memory
import rwkv6
import train
from adapt import add_bone
from bone import BoneLinear
from cli import run_cli
from loss import count_tokens
from passes import Passes
from quant import quantize, to_dense
from wkv6 import kernel_problem, wkv6

# RWKV-6 1.6B.
N_EMBD, DIM_FFN, R = 2048, 7168, 64
# A head in the same proportion to 2 blocks as the real one is to 24.
VOCAB = 65536 * 2 // 24

Times = list[dict[str, float]]  # of each round, {name: seconds}


# ---- how ratios are measured and printed -------------------------------------------------------


def in_turn(rounds: int, **functions: Callable[[], object]) -> Times:
    """Time functions in turn, round after round. A first round does not count."""
    times = []
    for _ in range(rounds + 1):
        times.append({name: timeit.timeit(f, number=1) for name, f in functions.items()})
    return times[1:]


def row(
    what: str,
    times: Times,
    a: str,
    *,
    to: str,
    at_most: float | None = None,
    at_least: float = 0.0,
) -> None:
    """Print the ratio of a's time to that of `to`, and whether it meets its aim."""
    ratio = statistics.median(t[a] / t[to] for t in times)
    if at_most is not None:
        aim = f"<= {at_most}"
        met = ratio <= at_most
    else:
        aim = f">= {at_least}"
        met = ratio >= at_least
    ms = {name: 1000 * statistics.median(t[name] for t in times) for name in (a, to)}
    print(
        f"{what:<62} {ms[a]:8.1f} ms / {ms[to]:8.1f} ms = {ratio:5.2f}"
        f"   ({aim}: {'met' if met else 'NOT MET'})",
        flush=True,
    )


# ---- models ------------------------------------------------------------------------------------


class BuiltLinear(BoneLinear):
    """The straightforward way: build W' in every step, all in bfloat16."""

    def forward(self, x: Tensor) -> Tensor:
        dtype = self.weight.dtype
        weight = to_dense(self.weight, dtype)
        blocks = weight.unflatten(0, (-1, self.r)).unflatten(2, (-1, self.r))
        blocks = blocks.transpose(1, 2)  # (a, b, r, r)
        B = self.bone.to(dtype)
        delta = (blocks @ B + B).transpose(1, 2).reshape(weight.shape)
        return F.linear(x.to(dtype), weight + delta)


def random_model(
    config: rwkv6.Config, quant: str | None = None, device: torch.device | str = "cpu"
) -> rwkv6.RWKV:
    """Return a bfloat16 model of random weights. quant: int8, nf4 or None."""
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


def add_lora(model: rwkv6.RWKV, r: int) -> None:
    """Put peft's LoRA into the linear layers of the blocks, with as many parameters as bat has."""
    from peft import LoraConfig, inject_adapter_in_model

    ranks = {}
    for name, module in model.named_modules():
        if isinstance(module, rwkv6.Linear) and name.startswith("blocks."):
            # in * r parameters of bat, rank * (in + out) of LoRA
            ranks[name] = round(module.in_features * r / (module.in_features + module.out_features))
    config = LoraConfig(target_modules=list(ranks), rank_pattern=ranks)
    inject_adapter_in_model(config, model)


def fine_tuned(model: rwkv6.RWKV, kind: str, r: int = R) -> rwkv6.RWKV:
    """Make `model` one that is fine-tuned by `kind`: bone, built (W') or lora (peft). Return it."""
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


def set_layers(model: nn.Module, layer_class: type[BoneLinear]) -> None:
    """Turn the layers with Bone into BoneLinear or BuiltLinear, which compute the same."""
    for module in model.modules():
        if isinstance(module, BoneLinear):
            module.__class__ = layer_class


def model_2_blocks(kind: str, quant: str | None = None) -> rwkv6.RWKV:
    """Return two blocks of the 1.6B model with random weights, fine-tuned by `kind`."""
    config = rwkv6.Config(2, N_EMBD, VOCAB, DIM_FFN)
    return fine_tuned(random_model(config, quant), kind)


# ---- what is timed -----------------------------------------------------------------------------


def layer_functions(
    in_features: int,
    out_features: int,
    tokens: int,
    *,
    r: int = R,
    device: torch.device | str = "cpu",
) -> dict[str, Callable[[], None]]:
    """Return {name: forward and backward of one layer}: frozen, with Bone, building W'."""
    weight = (0.02 * torch.randn(out_features, in_features, device=device)).bfloat16()
    x = torch.randn(tokens, in_features, device=device).bfloat16().requires_grad_()
    gy = torch.randn(tokens, out_features, device=device).bfloat16()

    def forward_backward(layer: Callable[[Tensor], Tensor]) -> None:
        layer(x).backward(gy)

    layers: dict[str, Callable[[Tensor], Tensor]] = {
        "frozen": functools.partial(F.linear, weight=weight),
        "bone": BoneLinear(weight, r),
        "built": BuiltLinear(weight, r),
    }
    return {name: functools.partial(forward_backward, layer) for name, layer in layers.items()}


def random_micro_batch(vocab_size: int, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return ids, targets and mask of one row."""
    idx, targets = torch.randint(vocab_size, (2, 1, tokens))
    return idx, targets, torch.ones(1, tokens)


def train_step(model: rwkv6.RWKV, optimizer: torch.optim.Optimizer, T: int) -> float:
    """Take a whole optimizer step on T random tokens, as train.py does. Return the loss."""
    device = model.head.weight.device
    micro = [random_micro_batch(model.config.vocab_size, T)]
    counts = count_tokens(micro)
    to_device = functools.partial(data.to_device, device=device)
    passes = Passes(autocast=torch.autocast(device.type, torch.bfloat16), to_device=to_device)
    losses = train.accumulate_gradients(model, micro, passes, counts=counts)
    norm, scale = train.update(optimizer, passes.scaler, torch.stack(losses).sum())
    # The only wait for a GPU.
    [loss, *_] = torch.stack([*losses, norm, scale]).tolist()
    return loss


def necessary_matrices(model: rwkv6.RWKV, forwards: int = 2) -> list[tuple[Tensor, int]]:
    """Return what `products` takes; forwards: 2 with grad_cp. Quantized weights have stand-ins."""
    stand_ins: dict[torch.Size, Tensor] = {}
    matrices = []
    for module in model.modules():
        if not isinstance(module, BoneLinear):
            continue
        weight: Any = module.weight
        if not isinstance(weight, Tensor):
            shape = weight.shape
            if shape not in stand_ins:
                stand_ins[shape] = torch.randn(shape, device=weight.device).bfloat16()
            weight = stand_ins[shape]
        matrices.append((weight, forwards))
    return [*matrices, (model.head.weight, 1)]


def products(matrices: Iterable[tuple[Tensor, int]], x: dict[int, Tensor]) -> None:
    """Compute only the matrix products that a step cannot do without.

    matrices: each with how often W x is computed; W^T gy is computed once.
    x: {width: (tokens, width)}.
    """
    for W, times in matrices:
        for _ in range(times):
            F.linear(x[W.shape[1]], W)
        x[W.shape[0]] @ W


def products_function(model: rwkv6.RWKV, tokens: int, *, forwards: int = 2) -> Callable[[], None]:
    """Return a function that computes the necessary products of a step."""
    matrices = necessary_matrices(model, forwards)
    device = model.head.weight.device
    widths = {n for W, _ in matrices for n in W.shape}
    x = {n: torch.randn(tokens, n, device=device).bfloat16() for n in widths}
    return functools.partial(products, matrices, x)


def wkv_function(
    T: int,
    impl: str,
    *,
    blocks: int = 1,
    forwards: int = 1,
    device: torch.device | str = "cpu",
) -> Callable[[], None]:
    """Return a function that runs WKV-6 over T tokens, as `blocks` blocks of the 1.6B model do.

    It runs `forwards` times forward, once backward.
    """
    shape = (blocks, T, 32, 64)
    r, k, v, gy = (torch.randn(shape, device=device).bfloat16().requires_grad_() for _ in range(4))
    w = (torch.randn(shape, device=device) - 4).requires_grad_()
    u = torch.randn(32, 64, device=device).requires_grad_()

    def run() -> None:
        for _ in range(forwards):
            y, _ = wkv6(r, k, v, w, u, impl=impl)
        torch.autograd.grad(y, (r, k, v, w, u), gy)

    return run


# ---- the tables --------------------------------------------------------------------------------


def layer() -> None:
    print(f"\none layer, bat r {R}, bfloat16, forward + backward")
    for out_features in (N_EMBD, DIM_FFN):
        for T in (512, 1024):
            times = in_turn(15, **layer_functions(N_EMBD, out_features, T))
            what = f"{N_EMBD} -> {out_features}, {T} tokens:"
            row(f"{what} Bone / the frozen layer", times, "bone", to="frozen", at_most=1.15)
            row(f"{what} building W' / Bone", times, "built", to="bone", at_least=1.5)


def step() -> None:
    models = {kind: model_2_blocks(kind) for kind in ("bone", "built", "lora")}
    bat = parameter_count(models["bone"], "bone")
    lora = parameter_count(models["lora"], "lora")
    print(
        f"\nwhole training step, 2 blocks of the 1.6B model, vocabulary {VOCAB}, grad_cp; "
        f"trained: bat {bat:,}, LoRA {lora:,} parameters"
    )
    optimizers = {kind: train.make_optimizer(model, 1e-6) for kind, model in models.items()}
    for T in (512, 1024):
        functions: dict[str, Callable] = {
            kind: functools.partial(train_step, model, optimizers[kind], T)
            for kind, model in models.items()
        }
        functions["products"] = products_function(models["bone"], T)
        functions["wkv"] = wkv_function(T, "auto", blocks=2, forwards=2)
        times = in_turn(5, **functions)
        what = f"{T} tokens:"
        necessary = f"{what} necessary products / the step (arithmetic achieved)"
        row(f"{what} building W' / Bone", times, "built", to="bone", at_least=1.4)
        row(f"{what} Bone / LoRA", times, "bone", to="lora", at_most=1.0)
        row(necessary, times, "products", to="bone", at_least=0.75)
        row(f"{what} WKV-6 / the step", times, "wkv", to="bone", at_most=0.1)


def parameter_count(model: nn.Module, kind: str) -> int:
    return sum(p.numel() for name, p in model.named_parameters() if kind in name)


def quantized() -> None:
    print("\nthe same step over a quantized base")
    functions = {}
    for quant in (None, "int8", "nf4"):
        model = model_2_blocks("bone", quant)
        optimizer = train.make_optimizer(model, 1e-6)
        functions[str(quant)] = functools.partial(train_step, model, optimizer, 1024)
    times = in_turn(7, **functions)
    row("1024 tokens: int8 / bfloat16", times, "int8", to="None", at_most=1.1)
    row("1024 tokens: nf4 / bfloat16", times, "nf4", to="None", at_most=1.25)


class HeadAlone(rwkv6.RWKV):
    """A model without its blocks: the hidden states are given."""

    given: Tensor

    def hidden(self, idx: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        return self.given, state


def loss() -> None:
    print(
        "\nhead (vocabulary 65536), cross-entropy and L2 wrap, 1024 tokens, bfloat16, "
        "forward + backward"
    )
    model = HeadAlone(rwkv6.Config(1, N_EMBD, 65536, DIM_FFN))
    weight = (0.02 * torch.randn(65536, N_EMBD)).bfloat16()
    model.head.weight = nn.Parameter(weight, requires_grad=False)
    x = torch.randn(1, 1024, N_EMBD, requires_grad=True)
    targets = torch.randint(65536, (1, 1024))
    model.given = x

    def plain() -> None:
        """With the logits whole; the L2 wrap as the gradient of a term of the loss."""
        logits = model.head(x)[0].float()
        wrap = 0.5e-4 / 1024 * logits.max(-1).values.square().sum()
        (F.cross_entropy(logits, targets[0]) + wrap).backward()

    def chunked() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            value, _ = train.loss_fn(model, targets, targets, torch.ones(1, 1024))
        value.backward()

    times = in_turn(5, chunked=chunked, plain=plain)
    row("in chunks / with the logits whole", times, "chunked", to="plain", at_most=1.0)


def infctx() -> None:
    print(
        "\nthe same step on 4096 tokens: 8 rows of 512, one by one, or one row of 4096 by "
        "--train_type infctx, in chunks of 512 (tokens/s)"
    )
    for quant in (None, "nf4"):
        model = model_2_blocks("bone", quant)
        optimizer = train.make_optimizer(model, 1e-6)
        one = functools.partial(infctx_step, model, optimizer, rows=1, tokens=4096)
        times = in_turn(
            5,
            rows=functools.partial(infctx_step, model, optimizer, rows=8, tokens=512),
            exact=functools.partial(one, chunk_ctx=512),
            cut=functools.partial(one, chunk_ctx=512, bptt=1),
        )
        name = quant or "bfloat16"
        what = "rows of one chunk"
        row(f"{name}: infctx / {what}", times, "rows", to="exact", at_least=0.9)
        row(f"{name}: infctx --bptt 1 / {what}", times, "rows", to="cut", at_least=0.9)


def infctx_step(
    model: rwkv6.RWKV,
    optimizer: torch.optim.Optimizer,
    *,
    rows: int,
    tokens: int,
    chunk_ctx: int = 0,
    bptt: int = 0,
) -> None:
    """Take a step on rows of so many tokens; with a chunk_ctx as --train_type infctx does."""
    model.keep_products = chunk_ctx > 0
    micro = [random_micro_batch(VOCAB, tokens) for _ in range(rows)]
    autocast = torch.autocast("cpu", torch.bfloat16)
    passes = Passes(autocast=autocast, chunk_ctx=chunk_ctx, bptt=bptt)
    losses = train.accumulate_gradients(model, micro, passes)
    train.update(optimizer, passes.scaler, torch.stack(losses).sum())


def wkv() -> None:
    print("\nWKV-6, 32 heads of 64, bfloat16, forward + backward")
    if kernel_problem():
        return
    for T, name, impl, rounds in (
        (512, "chunked", "chunked", 5),
        (1024, "chunked", "chunked", 5),
        (512, "the loop", "reference", 1),
    ):
        times = in_turn(rounds, compiled=wkv_function(T, "compiled"), other=wkv_function(T, impl))
        row(f"{T} tokens: {name} / compiled", times, "other", to="compiled", at_least=1)


SPEED: dict[str, Callable[[], None]] = {
    "layer": layer,
    "step": step,
    "quantized": quantized,
    "infctx": infctx,
    "loss": loss,
    "wkv": wkv,
}


def speed(only: Sequence[str]) -> None:
    """Print the tables of speed, or `only` those."""
    for name in only:
        if name not in SPEED:
            known = ", ".join([*SPEED, "compile", "launches", "gpu", "memory", "optim"])
            raise ValueError(f"{name} is not a part of the benchmark; its parts are {known}")
    print(f"PyTorch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}")
    print(f"{torch.get_num_threads()} threads, memory from {memory.allocator()}")
    for name in only or SPEED:
        SPEED[name]()


def main() -> None:
    command, *rest = sys.argv[1:] or [""]
    if command in ("compile", "gpu", "launches", "memory", "optim"):
        name = command if command == "launches" else f"bench_{command}"
        importlib.import_module(name).main(rest)
    elif {"-h", "--help"} & {*sys.argv[1:]}:
        print(__doc__)
    else:
        speed(sys.argv[1:])


if __name__ == "__main__":
    run_cli(main)
