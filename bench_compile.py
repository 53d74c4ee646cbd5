"""What compiling the blocks gains: `python bench.py compile`, or `compile bf16`, `nf4`, `int8`.

One need not read this to understand Bone. A whole training step of 2 blocks of the 1.6B model,
eager and compiled, with three values of --grad_cp each; and other methods, with as many trained
parameters. The first time compiling all of them takes some ten minutes.
"""

import functools
from collections.abc import Callable, Sequence

import torch

import bench
import fused
import memory
import rwkv6
import train

# {--grad_cp: how it is named here}. With 0.8 the activations of 24 blocks add less than a tenth to
# the memory of a 1.6B run.
COMPILED = {1: "compiled, grad_cp 1", 0.8: "compiled, grad_cp 0.8", 0: "compiled, grad_cp 0"}
EAGER = "eager, grad_cp 1"

# Where a CPU multiplies matrices in units of their own, all else weighs more.
HAS_MATRIX_UNIT = torch.cpu._is_amx_tile_supported()


def kept_bytes(model: rwkv6.RWKV, tokens: int) -> int:
    """Return how many bytes the last block keeps for the backward pass, on a row of tokens."""
    weights = {tensor.untyped_storage().data_ptr() for tensor in memory.tensors(model)}
    kept = {}

    def look_at(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    x = torch.randn(1, tokens, model.config.n_embd, requires_grad=True)
    state = (None, model.empty_wkv_state(x), None)
    with torch.autograd.graph.saved_tensors_hooks(look_at, lambda tensor: tensor):
        model.run_block(model.blocks[-1], x, state)
    return sum(kept.values())


def miss_model() -> rwkv6.RWKV:
    """Return two blocks with MiSS, as the `peft` package has it: Bone's shard mode."""
    from peft import MissConfig, inject_adapter_in_model

    model = bench.random_model(rwkv6.Config(2, bench.N_EMBD, bench.VOCAB, bench.DIM_FFN))
    names = [name for name, module in model.named_modules() if isinstance(module, rwkv6.Linear)]
    targets = [name for name in names if name.startswith("blocks.")]
    inject_adapter_in_model(MissConfig(r=bench.R, target_modules=targets), model)
    for name, p in model.named_parameters():
        p.requires_grad_(any(part in name for part in ("time", "ln", "miss")))
    model.grad_cp = True
    return model


def compiled(model: rwkv6.RWKV, grad_cp: float = 0) -> rwkv6.RWKV:
    fused.compile_blocks(model, grad_cp)
    return model


def models_of(quant: str | None) -> dict[str, rwkv6.RWKV]:
    """Return the models to compare, {name: model}. Other methods only without quantization."""
    models = {EAGER: bench.model_2_blocks("bone", quant)}
    models["eager, products kept"] = bench.model_2_blocks("bone", quant)
    models["eager, products kept"].keep_products = True
    models["eager, grad_cp 0"] = bench.model_2_blocks("bone", quant)
    models["eager, grad_cp 0"].grad_cp = False
    for grad_cp, name in COMPILED.items():
        models[name] = compiled(bench.model_2_blocks("bone", quant), grad_cp)
    if quant:
        return models
    others: dict[str, Callable[[], rwkv6.RWKV]] = {
        "W'": functools.partial(bench.model_2_blocks, "built"),
        "LoRA": functools.partial(bench.model_2_blocks, "lora"),
        "MiSS": miss_model,
    }
    for name, make in others.items():
        models[f"{name}, eager, grad_cp 1"] = make()
        models[f"{name}, compiled, grad_cp 0"] = compiled(make())
    return models


def compare(quant: str | None) -> None:
    """Print the table of one kind of base."""
    models = models_of(quant)
    steps: dict[str, Callable[[], object]] = {}
    for T in (1024, 512):
        for name, model in models.items():
            optimizer = train.make_optimizer(model, 1e-6)
            steps[name] = functools.partial(bench.train_step, model, optimizer, T)
        steps["products"] = bench.products_function(models[EAGER], T, forwards=1)
        times = bench.in_turn(7, **steps)
        print(f"\n{quant or 'bfloat16'}, {T} tokens: ms (median), activations kept per block in MB")
        for name, model in models.items():
            ms = 1000 * sorted(round_[name] for round_ in times)[len(times) // 2]
            with torch.autocast("cpu", torch.bfloat16):
                kept = kept_bytes(model, T) / 1e6
            print(f"{name:<32}{ms:10.0f}{kept:10.0f}")
        little, more = (1.3, 1.3) if quant else (1.6, 1.9)
        frugal = COMPILED[1 if quant else 0.8]
        fastest = COMPILED[0]
        bench.row(f"eager / {frugal}", times, EAGER, to=frugal, at_least=little)
        bench.row(f"eager / {fastest}", times, EAGER, to=fastest, at_least=more)
        if not quant:
            lora, built = "LoRA, compiled, grad_cp 0", "W', compiled, grad_cp 0"
            bench.row("compiled: Bone / LoRA", times, fastest, to=lora, at_most=1.0)
            bench.row("compiled: building W' / Bone", times, built, to=fastest, at_least=1.4)
            least = 0.6 if HAS_MATRIX_UNIT else 0.85
            what = "necessary products / compiled"
            bench.row(what, times, "products", to=fastest, at_least=least)


def main(only: Sequence[str]) -> None:
    """Print all tables, or `only` those of bf16, int8 or nf4."""
    kinds = {"bf16": None, "int8": "int8", "nf4": "nf4"}
    for name in only:
        if name not in kinds:
            raise ValueError(f"compile {name} is unknown; there are {', '.join(kinds)}")
    unit = "with" if HAS_MATRIX_UNIT else "without"
    print(f"PyTorch {torch.__version__}, {torch.get_num_threads()} threads, {unit} AMX")
    print(f"memory from {memory.allocator()}")
    for name in only or kinds:
        compare(kinds[name])
        torch._dynamo.reset()
