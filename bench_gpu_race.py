"""Time functions on a GPU, in turn; with the host's time, or without. Used by bench_gpu_jobs.py.

One need not read this to understand Bone.
"""

import functools
import math
import statistics
import traceback
from collections.abc import Callable

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

import bench


def short(error: BaseException) -> str:
    """An error in one line."""
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    first_line = str(error).partition("\n")[0]
    return f"{type(error).__name__}: {first_line}"[:200]


class Race:
    """Functions that run in turn, round after round; those that fail have a `problem` instead."""

    def __init__(self, functions: dict[str, Callable], rounds: int, repeat: int = 1) -> None:
        self.repeat = repeat
        self.problems = {
            name: problem for name, f in functions.items() if (problem := problem_of(f))
        }
        timed = {
            name: functools.partial(repeated, f, repeat)
            for name, f in functions.items()
            if name not in self.problems
        }
        self.times = bench.in_turn(rounds, **timed)

    def ms(self, name: str) -> str:
        """The median time, or why there is none."""
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
        """The median of the rounds' ratios."""
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
    """Run a function so often, and wait for the GPU."""
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
    """The seconds that the GPU is at work, of a run of the function; NaN where none can tell."""
    if not torch.cuda.is_available():
        return math.nan
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        function()
        torch.cuda.synchronize()
    on_gpu = [event for event in profiled.events() if event.device_type == DeviceType.CUDA]
    return sum(event.time_range.elapsed_us() for event in on_gpu) / 1e6
