"""Time functions on a GPU in turn, with the host's time or without, and find where it waits.

Used by bench_gpu_jobs.py. One need not read this to understand Bone.
"""

import functools
import math
import pathlib
import statistics
import time
import traceback
import warnings
from collections.abc import Callable

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

import bench


def short(error: BaseException) -> str:
    """Write an error in one line."""
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    first_line = str(error).partition("\n")[0]
    return f"{type(error).__name__}: {first_line}"[:200]


class Race:
    """Functions that run in turn, round after round; those that fail have a `problem` instead."""

    def __init__(self, functions: dict[str, Callable], rounds: int, repeat: int = 1) -> None:
        self.repeat = repeat
        problems = {name: problem_of(f) for name, f in functions.items()}
        self.problems = {name: problem for name, problem in problems.items() if problem}
        timed = {
            name: functools.partial(repeated, f, repeat)
            for name, f in functions.items()
            if name not in self.problems
        }
        self.times = bench.in_turn(rounds, **timed)

    def ms(self, name: str) -> str:
        """Return the median time, or why there is none."""
        if name in self.problems:
            return self.problems[name]
        if name not in self.times[0]:
            return "not there"
        return f"{1000 * self.seconds(name):.3f}"

    def seconds(self, name: str) -> float:
        if name not in self.times[0]:
            return math.nan
        return statistics.median(t[name] for t in self.times) / self.repeat

    def ratio(self, a: str, b: str) -> str:
        """Return the median of the rounds' ratios."""
        if not {a, b} <= self.times[0].keys():
            return "-"
        return f"{statistics.median(t[a] / t[b] for t in self.times):.2f}"


def problem_of(function: Callable) -> str:
    """Run a function for a first time, and return what went wrong, or ""."""
    try:
        function()
        torch.accelerator.synchronize()
    except Exception as error:
        if not isinstance(error, torch.OutOfMemoryError):
            traceback.print_exc()
        return short(error)
    return ""


def repeated(function: Callable, times: int) -> None:
    """Run a function so many times, and wait for the GPU."""
    for _ in range(times):
        function()
    torch.accelerator.synchronize()


def as_graph(function: Callable) -> Callable:
    """Return a function that launches as one CUDA graph all that `function` would launch.

    The host then has one launch to make, so that what is timed is the GPU. Without CUDA or ROCm,
    returns the function itself.
    """
    if not torch.cuda.is_available():
        return function
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        function()
    return graph.replay


def gpu_busy(function: Callable) -> float:
    """Return the seconds that the GPU works in a run of the function; NaN without CUDA."""
    if not torch.cuda.is_available():
        return math.nan
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        function()
        torch.cuda.synchronize()
    on_gpu = [event for event in profiled.events() if event.device_type == DeviceType.CUDA]
    return sum(event.time_range.elapsed_us() for event in on_gpu) / 1e6


def seconds_of_a_launch(device: torch.device) -> float:
    """Return how long the host takes for the simplest of operators."""
    x = torch.zeros(8, device=device)
    torch.accelerator.synchronize()
    began = time.perf_counter()
    for _ in range(1000):
        x.add_(1)
    return (time.perf_counter() - began) / 1000


def synchronizations(run: Callable, set_mode: Callable[[str], None]) -> list[str]:
    """Return the lines of Python at which `run` waits for the GPU, by PyTorch's warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        set_mode("warn")
        try:
            run()
        finally:
            set_mode("default")
    found = [w for w in caught if "called a synchronizing" in str(w.message)]
    return [f"{pathlib.Path(w.filename).name}:{w.lineno}" for w in found]
