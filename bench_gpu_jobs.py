"""The jobs of `python bench.py gpu`: what it measures, each in a process of its own.

One need not read this to understand Bone. `python bench_gpu_jobs.py [--standin] NAME ARGUMENTS`
runs one function. It prints the cells of a row with tabs between them.
"""

import contextlib
import dataclasses
import functools
import importlib.util
import io
import math
import os
import pathlib
import platform
import runpy
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Callable

import torch

import bench
import devices
import estimate
import launches as launch_counts
import memory
import rwkv6
import train
from bench_gpu_race import (
    Race,
    as_graph,
    gpu_busy,
    seconds_of_a_launch,
    short,
    synchronizations,
)
from bench_memory import MODELS, prepare_run, printed_peak
from bone import BoneLinear
from loss import Counts, loss_fn
from plan import resolve_options
from wkv6 import kernel_problem

HERE = pathlib.Path(__file__).parent


# ---- what is measured, and on what -------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Sizes:
    """models: {name: (n_layer, n_embd)}, of which the first is timed; tokens: in a step."""

    models: dict[str, tuple[int, int]]
    vocab: int
    r: int
    layers: tuple[tuple[int, int], ...]
    tokens: tuple[int, ...]
    wkv_tokens: tuple[int, ...]
    peak_tokens: int
    rounds: int
    repeat: int  # how often something short runs within a round

    def config(self, name: str) -> rwkv6.Config:
        return rwkv6.sizes(*self.models[name], self.vocab)

    def first(self) -> str:
        return next(iter(self.models))


FULL = Sizes(
    models={name: (model.n_layer, model.n_embd) for name, model in MODELS.items()},
    vocab=65536,
    r=bench.R,
    layers=((bench.N_EMBD, bench.N_EMBD), (bench.N_EMBD, bench.DIM_FFN)),
    tokens=(512, 1024),
    wkv_tokens=(1024, 4096, 16384),
    peak_tokens=1024,
    rounds=7,
    repeat=20,
)
TINY = Sizes(
    models={"tiny": (2, 64)},
    vocab=256,
    r=16,
    layers=((64, 64),),
    tokens=(16,),
    wkv_tokens=(32,),
    peak_tokens=32,
    rounds=1,
    repeat=1,
)


@dataclasses.dataclass(frozen=True)
class Setup:
    """What every job is called with."""

    device: torch.device
    sizes: Sizes


def say(*cells: object) -> None:
    """Print a row of the table."""
    print("\t".join(map(word, cells)), flush=True)


def word(cell: object) -> str:
    """Write what stands in a cell: numbers with two decimals, "?" for NaN."""
    if isinstance(cell, float):
        return "?" if math.isnan(cell) else f"{cell:.2f}"
    return str(cell).replace("\n", " ").replace("\t", " ")


def machine(setup: Setup) -> None:
    """Name the card, PyTorch and driver; compile the kernel, and say which way."""
    module = torch.get_device_module(setup.device)
    name_of = getattr(module, "get_device_name", None)
    say("card", name_of() if name_of else setup.device.type)
    say("PyTorch", torch.__version__)
    say("CUDA, ROCm", f"{torch.version.cuda}, {torch.version.hip}")
    if hasattr(module, "get_device_capability"):
        say("compute capability", module.get_device_capability())
    query = ["nvidia-smi", "--query-gpu=driver_version,power.limit", "--format=csv,noheader"]
    say("driver, power limit", output_of(query) or "?")
    say("system", f"{platform.platform()}, Python {platform.python_version()}")
    say("commit", output_of(["git", "-C", str(HERE), "describe", "--always", "--dirty"]) or "?")
    with contextlib.suppress(RuntimeError, AttributeError, NotImplementedError):
        free, total = (size / 1e9 for size in torch.accelerator.get_memory_info())
        say("memory", f"{total:.2f} GB, of which {free:.2f} are free")
    say("host's time for a launch", f"{1e6 * seconds_of_a_launch(setup.device):.1f} us")
    with contextlib.redirect_stderr(io.StringIO()) as notes:
        began = time.monotonic()
        problem = kernel_problem(setup.device.type)
    say("WKV-6", problem or f"compiled by {compiler()}, in {time.monotonic() - began:.0f} s")
    for note in notes.getvalue().splitlines():
        say("", note)


def output_of(arguments: list[str]) -> str:
    """Return the first line that a program prints; "" if it is not installed, or fails."""
    if not shutil.which(arguments[0]):
        return ""
    ended = subprocess.run(arguments, capture_output=True, text=True)
    return ended.stdout.partition("\n")[0]


def compiler() -> str:
    """Return which compiler's kernel is loaded."""
    if not hasattr(torch.ops.wkv6, "launch"):
        return "NVRTC"
    return "hipcc" if torch.version.hip else "nvcc"


def tests(_: Setup) -> None:
    """Run the tests of the kernels that are skipped where there is no GPU."""
    if not importlib.util.find_spec("pytest"):
        return say("", "left out: pytest is not installed (pip install pytest)")
    import pytest

    # Their mark. (-k GPU would select by the names of folders, too.)
    options = ["-q", "-rf", "--tb=line", "-p", "no:cacheprovider", "-m", "skipif"]
    with contextlib.redirect_stdout(io.StringIO()) as output:
        pytest.main([*options, str(HERE / "test_wkv6_cuda.py")])
    *lines, result = output.getvalue().rstrip().splitlines()
    for line in [line for line in lines if line.startswith("FAILED")][:10]:
        say("", line)
    return say("all", result)


def wkv(setup: Setup) -> None:
    """Time WKV-6 beside the chunked form, and beside copying the necessary bytes."""
    for tokens in setup.sizes.wkv_tokens:
        functions = wkv_functions(setup, tokens, "chunked")
        # r, k, v, w, y; then r, k, v, w, gy, gr, gk, gv, gw; w and gw have 4 bytes. A copy reads
        # and writes, so it takes half of them.
        necessary = tokens * 32 * 64 * (12 + 22)
        source = torch.empty(necessary // 2, dtype=torch.uint8, device=setup.device)
        race = Race({**functions, "copy": source.clone}, setup.sizes.rounds, setup.sizes.repeat)
        others = []
        for name in ("chunked", "copy"):
            others += [race.ms(name), race.ratio(name, "compiled")]
        say(tokens, race.ms("compiled"), *others)


def wkv_functions(setup: Setup, tokens: int, other: str) -> dict[str, Callable]:
    """Return {name: function}: the compiled kernel, if there is one, and another form."""
    names = [other]
    if not kernel_problem(setup.device.type):
        names.append("compiled")
    return {name: bench.wkv_function(tokens, name, device=setup.device) for name in names}


def wkv_fla(setup: Setup) -> None:
    """Time WKV-6 beside fla's kernels, for one length: Triton compiles them for minutes."""
    if not importlib.util.find_spec("fla"):
        return say("", "left out: fla is not installed (pip install flash-linear-attention)")
    tokens = setup.sizes.wkv_tokens[0]
    race = Race(wkv_functions(setup, tokens, "fla"), setup.sizes.rounds, setup.sizes.repeat)
    return say(tokens, race.ms("compiled"), race.ms("fla"), race.ratio("fla", "compiled"))


def layer(setup: Setup) -> None:
    """Time one layer: frozen, with Bone, building W'."""
    sizes = setup.sizes
    for in_features, out_features in sizes.layers:
        for tokens in sizes.tokens:
            functions = bench.layer_functions(
                in_features, out_features, tokens, r=sizes.r, device=setup.device
            )
            graphs = {name: as_graph(function) for name, function in functions.items()}
            race = Race(graphs, sizes.rounds, sizes.repeat)
            times = [race.ms(name) for name in functions]
            ratios = race.ratio("bone", "frozen"), race.ratio("built", "bone")
            with_host = Race({"bone": functions["bone"]}, sizes.rounds, sizes.repeat).ms("bone")
            say(f"{in_features} -> {out_features}", tokens, *times, *ratios, with_host)


def quant_of(kind: str) -> str | None:
    return None if kind == "none" else kind


def bone_model(setup: Setup, name: str, kind: str, *, device: torch.device | str) -> rwkv6.RWKV:
    """Return a model with Bone on random weights. kind: none, int8 or nf4."""
    model = bench.random_model(setup.sizes.config(name), quant_of(kind), device)
    return bench.fine_tuned(model, "bone", setup.sizes.r)


def expected_bytes(setup: Setup, name: str, kind: str, *, tokens: int) -> float:
    """Return what --dry_run of train.py expects of such a model, for rows of `tokens` tokens."""

    def outputs() -> list[torch.Tensor]:
        idx = torch.zeros(1, tokens, dtype=torch.int64, device=setup.device)
        mask = torch.ones(idx.shape, device=setup.device)
        with torch.autocast(setup.device.type, torch.bfloat16):
            value, _ = loss_fn(model, idx, idx, mask, counts=Counts(1, idx.numel()))
            return [value]

    model = bone_model(setup, name, kind, device="meta")
    parts = memory.expected(model, outputs, setup.device)
    return sum(parts.values()) + sum(memory.beside_tensors(parts, setup.device).values())


def too_large(setup: Setup, expected: float) -> str:
    """Return why a model of so many bytes is left out, as train.py would refuse it; or ""."""
    free = memory.available(setup.device)
    if expected <= free:
        return ""
    return f"left out: it would take {expected / 1e9:.2f} GB, {free / 1e9:.2f} GB are free"


def step(setup: Setup, *kinds: str) -> None:
    """Time whole optimizer steps over a base of each kind: none, int8, nf4."""
    name, longest = setup.sizes.first(), max(setup.sizes.tokens)
    for kind in kinds:
        problem = too_large(setup, expected_bytes(setup, name, kind, tokens=longest))
        if problem:
            say(kind, longest, problem)
            continue
        model = bone_model(setup, name, kind, device=setup.device)
        optimizer = train.make_optimizer(model, 1e-6)
        lora, lora_problem = lora_step(model, kind, setup.sizes.r)
        for tokens in setup.sizes.tokens:
            functions = step_functions(model, optimizer, tokens) | lora(tokens)
            race = Race(functions, setup.sizes.rounds)
            speed = f"{tokens / race.seconds('bone'):,.0f}"
            busy = {
                name: math.nan if name in race.problems else gpu_busy(function)
                for name, function in functions.items()
            }
            ratios = [
                race.problems.get("built") or race.ratio("built", "bone"),
                busy["built"] / busy["bone"],
                lora_problem or race.problems.get("lora") or race.ratio("bone", "lora"),
                busy["bone"] / busy.get("lora", math.nan),
                busy["products"] / busy["bone"],
            ]
            loss = functions["bone"]() if "bone" not in race.problems else math.nan
            say(kind, tokens, race.ms("bone"), speed, 1000 * busy["bone"], *ratios, loss)


def step_functions(
    model: rwkv6.RWKV, optimizer: torch.optim.Optimizer, tokens: int
) -> dict[str, Callable]:
    """Return {name: function}: a step with Bone, one that builds W', its products alone."""

    def step_of(layer_class: type[BoneLinear]) -> float:
        bench.set_layers(model, layer_class)
        return bench.train_step(model, optimizer, tokens)

    return {
        "bone": functools.partial(step_of, BoneLinear),
        "built": functools.partial(step_of, bench.BuiltLinear),
        "products": bench.products_function(model, tokens),
    }


def lora_step(
    model: rwkv6.RWKV, kind: str, r: int
) -> tuple[Callable[[int], dict[str, Callable]], str]:
    """Return a function from tokens to {"lora": step on the same weights}; or to {}, and why."""
    if kind != "none":
        return lambda tokens: {}, "-"
    if not importlib.util.find_spec("peft"):
        return lambda tokens: {}, "no peft"
    try:
        lora = bench.fine_tuned(same_weights(model), "lora", r)
        optimizer = train.make_optimizer(lora, 1e-6)
    except Exception as error:  # whatever a release of peft raises
        return lambda tokens: {}, short(error)
    return lambda tokens: {"lora": functools.partial(bench.train_step, lora, optimizer, tokens)}, ""


def same_weights(model: rwkv6.RWKV) -> rwkv6.RWKV:
    """Return a model without Bone that shares the parameters of `model`."""
    with torch.device("meta"):
        other = rwkv6.RWKV(model.config)
    parameters = dict(model.named_parameters())
    for name, _ in list(other.named_parameters()):
        module, _, kind = name.rpartition(".")
        setattr(other.get_submodule(module), kind, parameters[name])
    return other


def waits(setup: Setup, *kinds: str) -> None:
    """Count how often a step of a few blocks waits for the GPU."""
    set_mode = getattr(torch.get_device_module(setup.device), "set_sync_debug_mode", None)
    if not set_mode:
        return say("any", f"not available for {setup.device.type}")
    n_layer, n_embd = setup.sizes.models[setup.sizes.first()]
    for kind in kinds:
        config = rwkv6.sizes(min(n_layer, 4), n_embd, setup.sizes.vocab)
        model = bench.random_model(config, quant_of(kind), setup.device)
        model = bench.fine_tuned(model, "bone", setup.sizes.r)
        optimizer = train.make_optimizer(model, 1e-6)
        run = functools.partial(bench.train_step, model, optimizer, setup.sizes.tokens[0])
        run()
        places = synchronizations(run, set_mode)
        say(kind, len(places), ", ".join(places))
    return None


def launches(setup: Setup) -> None:
    """Count launches, and bytes that they move."""
    for part, count in launch_counts.table(setup.device).items():
        say(part, count.launches, count.moved / 1e9)


def peak(setup: Setup, name: str, *kinds: str) -> None:
    """Measure the peak of two steps of a model, over a base of each kind."""
    for kind in kinds:
        expected = expected_bytes(setup, name, kind, tokens=setup.sizes.peak_tokens)
        figures = gb(expected), tutorial(name, kind)
        problem = too_large(setup, expected)
        if problem:
            say(f"{name} {kind}", problem, "", "", *figures)
            continue
        try:
            say(f"{name} {kind}", *measured_peak(setup, name, kind), *figures)
        except torch.OutOfMemoryError as error:
            say(f"{name} {kind}", short(error), "", "", *figures)


def measured_peak(setup: Setup, name: str, kind: str) -> tuple[str, str, str]:
    """Return the GB that two steps allocated and reserved at most, and that are then in use."""
    model = bone_model(setup, name, kind, device=setup.device)
    optimizer = train.make_optimizer(model, 1e-6)
    torch.accelerator.reset_peak_memory_stats()
    for _ in range(2):
        bench.train_step(model, optimizer, setup.sizes.peak_tokens)
    allocated, reserved = memory.peak(setup.device), torch.accelerator.max_memory_reserved()
    return gb(allocated), gb(reserved) if reserved else "?", gb(in_use())


def in_use() -> float:
    """Return the bytes of the device that all programs have, libraries included."""
    try:
        free, total = torch.accelerator.get_memory_info()
    except (RuntimeError, AttributeError, NotImplementedError):
        return math.nan
    return total - free


def gb(size: float) -> str:
    """Write bytes in GB."""
    return "?" if math.isnan(size) else f"{size / 1e9:.3g}"


def tutorial(name: str, kind: str) -> str:
    """Return what RWKV-PEFT's tutorial says, in GB."""
    if name not in MODELS:
        return "-"
    return str(MODELS[name].tutorial[kind])


def peak_of_train(setup: Setup, kind: str) -> None:
    """Run train.py for two steps, in this process, and repeat the peak that it prints."""
    name = setup.sizes.first()
    config = setup.sizes.config(name)
    flags = prepare_run(".", config, setup.sizes.peak_tokens, r=setup.sizes.r, accelerator="gpu")
    flags += ["--quant", kind, "--proj_dir", f"out-{kind}"]
    options = resolve_options(train.parse_args(flags))
    _, parts = estimate.expected_memory(options, setup.device)
    sys.argv = [str(HERE / "train.py"), *flags]
    with contextlib.redirect_stdout(io.StringIO()) as said:
        runpy.run_path(sys.argv[0], run_name="__main__")
    expected = gb(sum(parts.values()))
    say(
        f"{name} {kind}, train.py",
        printed_peak(said.getvalue()),
        gb(torch.accelerator.max_memory_reserved()),
        gb(in_use()),
        expected,
        tutorial(name, kind),
    )


JOBS: dict[str, Callable] = {
    job.__name__: job
    for job in (
        *(machine, tests, wkv, wkv_fla, layer),
        *(step, waits, launches, peak, peak_of_train),
    )
}


def run_in_this_process(arguments: list[str]) -> None:
    """Run one job: [--standin] NAME ARGUMENTS."""
    standin = arguments[0] == "--standin"
    if standin:
        import gpu_standin  # noqa: F401 (makes the device)

        arguments = arguments[1:]
    name, *rest = arguments
    try:
        JOBS[name](Setup(devices.find("gpu"), TINY if standin else FULL), *rest)
    except Exception as error:
        traceback.print_exc()
        print(short(error), file=sys.stderr, flush=True)
        os._exit(1)
    # At once: everything is printed, and the threads of a device can abort the interpreter's end.
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    run_in_this_process(sys.argv[1:])
