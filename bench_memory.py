"""What training takes in memory, measured: `python bench.py memory`, an hour or more.

One need not read this to understand Bone. `python bench.py memory 1.6B nf4` measures one cell of
the table; `memory --lean` the same with 8-bit moments, and the embedding, which a GPU leaves to its
host, counted apart; `memory long` rows of 65,536 tokens; `memory ranks` several devices. Each
figure is the peak of a whole train.py on a model of random weights that has the true sizes, with
freed memory given back, as train.py does on a CPU where memory is tight (memory.give_back_freed).
"""

import os
import pathlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass

import torch

import binidx
import estimate
import rwkv6
import train
from archive import save_stream
from plan import resolve_options

R = 64
VOCAB = 65536
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Model:
    """A published size, and GB of its training by --quant.

    tutorial: RWKV-PEFT's; aim: ours; lean: ours with everything on that saves memory.
    """

    n_layer: int
    n_embd: int
    tutorial: dict[str, float]
    aim: dict[str, float]
    lean: dict[str, float]


MODELS = {
    "1.6B": Model(
        n_layer=24,
        n_embd=2048,
        tutorial={"none": 7.3, "int8": 5.9, "nf4": 5.4},
        aim={"none": 4.8, "int8": 3.5, "nf4": 2.9},
        lean={"none": 4.0, "int8": 2.7, "nf4": 2.2},
    ),
    "3B": Model(
        n_layer=32,
        n_embd=2560,
        tutorial={"none": 11.8, "int8": 9.4, "nf4": 8.1},
        aim={"none": 8.6, "int8": 5.9, "nf4": 4.6},
        lean={"none": 7.4, "int8": 4.8, "nf4": 3.5},
    ),
    "7B": Model(
        n_layer=32,
        n_embd=4096,
        tutorial={"none": 23.7, "int8": 17.3, "nf4": 14.9},
        aim={"none": 20.0, "int8": 13.0, "nf4": 9.8},
        lean={"none": 17.4, "int8": 10.8, "nf4": 7.5},
    ),
}
# The name of a column -> the value of --quant.
QUANTS = {"bf16": "none", "int8": "int8", "nf4": "nf4"}

# What memory.give_back_freed sets, by glibc's environment variable: whatever is free here.
MEMORY_IS_TIGHT = {"MALLOC_MMAP_THRESHOLD_": "65536"}

STRATEGIES = ("ddp", "deepspeed_stage_1", "deepspeed_stage_2", "deepspeed_stage_3")
LARGE_MODELS = {"7B": (32, 4096), "14B": (61, 4096)}  # n_layer, n_embd


# ---- a run on random weights -------------------------------------------------------------------


def shapes(config: rwkv6.Config) -> dict[str, torch.Tensor]:
    """Return the bfloat16 parameters of a model, without data."""
    with torch.device("meta"):
        model = rwkv6.RWKV(config)
    return {name: p.bfloat16() for name, p in model.named_parameters()}


def random_checkpoint(config: rwkv6.Config, path: str) -> None:
    """Write a bfloat16 model with random weights, the same in all blocks."""
    parameters = shapes(config)
    weights = {}
    for name, p in parameters.items():
        weights[without_block(name)] = (0.02 * torch.randn(p.shape)).bfloat16()
    save_stream(parameters, lambda name: weights[without_block(name)], path)


def without_block(name: str) -> str:
    """Return "att.key.weight" for "blocks.3.att.key.weight"."""
    return re.sub(r"^blocks\.\d+\.", "", name)


def prepare_run(
    folder: str,
    config: rwkv6.Config,
    ctx_len: int,
    *,
    r: int = R,
    steps: int = 2,
    accelerator: str = "cpu",
) -> list[str]:
    """Write data, and a base of random weights unless there is one. Return train.py's flags."""
    base = f"{folder}/base.pth"
    prefix = f"{folder}/x"
    if not os.path.exists(base):
        random_checkpoint(config, base)
    binidx.write_binidx(prefix, torch.randint(1, config.vocab_size, (2, ctx_len + 1)).tolist())
    paths = ["--load_model", base, "--data_file", prefix, "--proj_dir", f"{folder}/out"]
    flags = f"--ctx_len {ctx_len} --epoch_steps {steps} --bone_r {r} --accelerator {accelerator} "
    flags += "--grad_cp 1 --compile 0"
    return [*paths, *flags.split()]


def printed_peak(output: str) -> float:
    """Return the GB of the line that train.py prints at its end."""
    return float(re.findall(r"peak memory ([\d.]+) GB", output)[0])


def expected_parts(flags: Sequence[str]) -> dict[str, float]:
    """Return {part: GB} that --dry_run expects on a CPU."""
    _, parts = estimate.expected_memory(resolve_options(train.parse_args(flags)), CPU)
    return {part: size / 1e9 for part, size in parts.items()}


def measure(
    folder: str | pathlib.Path,
    config: rwkv6.Config,
    ctx_len: int,
    *,
    flags: str = "",
    steps: int = 2,
) -> tuple[float, dict[str, float]]:
    """Train on random weights, in a process of its own; return the peak and what was expected.

    In GB, without those of importing PyTorch; what was expected as {part: GB}.
    """
    environment = os.environ | MEMORY_IS_TIGHT
    with tempfile.TemporaryDirectory(dir=folder) as run_folder:
        arguments = prepare_run(run_folder, config, ctx_len, steps=steps)
        arguments += flags.split()
        expected = expected_parts(arguments)
        command = [sys.executable, train.__file__, *arguments]
        output = subprocess.check_output(command, text=True, env=environment)
    return printed_peak(output) - gb_of_importing_pytorch(), expected


def gb_of_importing_pytorch() -> float:
    script = "import torch, psutil; print(psutil.Process().memory_info().rss)"
    return int(subprocess.check_output([sys.executable, "-c", script])) / 1e9


# ---- the tables --------------------------------------------------------------------------------


def memory(only: Sequence[str] = ()) -> None:
    """Print the peak of each model and --quant beside its aim; `only` names those wanted."""
    names = {*MODELS, *QUANTS, "--lean"}
    for name in only:
        if name not in names:
            known = ", ".join([*MODELS, *QUANTS, "--lean", "compiled", "long", "ranks"])
            raise ValueError(f"{name} is not a part of the memory table; its parts are {known}")
    models = [name for name in MODELS if name in only] or list(MODELS)
    quants = [name for name in QUANTS if name in only] or list(QUANTS)

    lean = "--lean" in only
    print(
        "\nGB at the peak of `python train.py`, 2 steps, ctx_len 1024, micro_bsz 1, "
        f"bat r {R}, on the CPU, freed memory given back, beyond importing PyTorch"
        + (" and the embedding, with --optim adamw8bit" if lean else "")
    )
    print(f"{'':<12}{'measured':>9}{'expected':>9}{'tutorial':>9}{'aim':>9}")
    with tempfile.TemporaryDirectory() as folder:
        for name in models:
            for quant in quants:
                memory_row(folder, name, quant, lean=lean)
                if lean and (name, quant) == ("7B", "nf4"):
                    memory_row(folder, name, quant, lean=lean, ctx_len=512, aim=7.0)


def memory_row(
    folder: str,
    name: str,
    quant: str,
    *,
    lean: bool,
    ctx_len: int = 1024,
    aim: float | None = None,
) -> None:
    """Measure a cell and print it. aim: in place of the model's."""
    model = MODELS[name]
    kind = QUANTS[quant]
    config = rwkv6.sizes(model.n_layer, model.n_embd, VOCAB)
    flags, elsewhere = f"--quant {kind}", 0.0
    if lean:
        flags += " --optim adamw8bit"
        elsewhere = 2 * VOCAB * model.n_embd / 1e9
    measured, parts = measure(folder, config, ctx_len, flags=flags)
    measured -= elsewhere
    expected = sum(parts.values()) - elsewhere
    aim = aim or (model.lean if lean else model.aim)[kind]
    met = "met" if measured <= aim else "NOT MET"
    label = f"{name} {quant}" + ("" if ctx_len == 1024 else f", {ctx_len}")
    print(
        f"{label:<12}{measured:9.2f}{expected:9.2f}{model.tutorial[kind]:9.1f}{aim:9.1f}  {met}",
        flush=True,
    )


def ranks() -> None:
    """Print what one of N ranks takes: expected for large models, measured for a small one."""
    with tempfile.TemporaryDirectory() as folder:
        expected_of_ranks(folder)
        measured_of_two_ranks(folder)


def expected_of_ranks(folder: str) -> None:
    """Print what --dry_run expects of each strategy for large models."""
    print(
        f"\nGB that a rank takes, expected by --dry_run: bf16, ctx_len 1024, micro_bsz 1, bat r {R}"
    )
    print(f"{'':<8}{'ranks':>6}" + "".join(f"{strategy:>19}" for strategy in STRATEGIES))
    for name, (n_layer, n_embd) in LARGE_MODELS.items():
        base = f"{folder}/{name}.pth"
        save_holes(rwkv6.sizes(n_layer, n_embd, VOCAB), base)
        common = f"--load_model {base} --ctx_len 1024 --bone_r {R} --accelerator cpu --dry_run "
        common += "--grad_cp 1 --compile 0"
        for n in (1, 2, 4, 8):
            row = f"{name:<8}{n:>6}"
            for strategy in STRATEGIES:
                flags = f"{common} --devices {n} --strategy {strategy}"
                row += f"{sum(expected_parts(flags.split()).values()):19.2f}"
            print(row, flush=True)


def save_holes(config: rwkv6.Config, path: str) -> None:
    """Write a file with holes in place of a model's numbers, for those who look at sizes only."""
    with torch.serialization.skip_data():
        tensors = {name: torch.empty(p.shape, dtype=p.dtype) for name, p in shapes(config).items()}
        torch.save(tensors, path)


def measured_of_two_ranks(folder: str) -> None:
    """Measure the first of two processes on CPUs, for 6 blocks of 1.6B."""
    print(
        "\nGB at the peak of the first of two ranks: 1.6B with 6 of its 24 blocks, "
        "vocabulary 16,384, ctx_len 512; measured, expected"
    )
    config = rwkv6.sizes(6, MODELS["1.6B"].n_embd, 16384)
    for flags in (
        "",
        *(f"--devices 2 --strategy {strategy}" for strategy in STRATEGIES),
        "--devices 2 --quant nf4",
        "--devices 2 --quant nf4 --strategy deepspeed_stage_3",
    ):
        measured, parts = measure(folder, config, 512, flags=flags)
        print(f"{flags or 'one process':<56}{measured:6.2f}{sum(parts.values()):6.2f}", flush=True)


def long() -> None:
    """Print the peak of infctx with ctx_len 65,536 beside that of rows of one chunk.

    The states between the chunks are counted apart: without them the two should be the same.
    """
    print(
        "\nGB at the peak of `python train.py`, 1.6B with 2 of its 24 blocks, in brackets what "
        "--dry_run expects"
    )
    config = rwkv6.sizes(2, MODELS["1.6B"].n_embd, VOCAB)
    with tempfile.TemporaryDirectory() as folder:
        chunk, chunk_parts = measure(folder, config, 512, steps=1)
        infctx = "--train_type infctx --chunk_ctx 512"
        row, row_parts = measure(folder, config, 65536, flags=infctx, steps=1)
    print(f"{'512 tokens':<42}{chunk:6.2f} ({sum(chunk_parts.values()):.2f})")
    what = "65,536 tokens, infctx, in chunks of 512"
    print(f"{what:<42}{row:6.2f} ({sum(row_parts.values()):.2f})")

    states = row_parts["states between chunks"]
    ratio = (row - states) / chunk
    met = "met" if ratio <= 1.1 else "NOT MET"
    what = "the latter, without the states between chunks"
    print(
        f"{what:<42}{row - states:6.2f}, of which there are {states:.2f}; "
        f"ratio {ratio:.3f} (<= 1.1: {met})"
    )


def compiled() -> None:
    """Print the peak of compiled runs of the 1.6B model."""
    print("\nGB at the peak of `python train.py`, compiled: 1.6B, ctx_len 1024; measured, expected")
    config = rwkv6.sizes(MODELS["1.6B"].n_layer, MODELS["1.6B"].n_embd, VOCAB)
    with tempfile.TemporaryDirectory() as folder:
        for quant in ("none", "nf4"):
            for grad_cp in (0, 1):
                flags = f"--quant {quant} --compile 1 --grad_cp {grad_cp}"
                measured, parts = measure(folder, config, 1024, flags=flags)
                print(f"{flags:<42}{measured:6.2f}{sum(parts.values()):6.2f}", flush=True)


def main(arguments: list[str]) -> None:
    """Print the table that the arguments name: compiled, long, ranks, or cells of the memory's."""
    if arguments == ["compiled"]:
        compiled()
    elif arguments == ["long"]:
        long()
    elif arguments == ["ranks"]:
        ranks()
    else:
        memory(arguments)
