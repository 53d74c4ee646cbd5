"""What the options leave open: --compile auto and --grad_cp auto.

One need not read this to understand Bone. Both are decided once, from the run's steps and sizes and
from the machine, never by a stopwatch. args.json and the states hold what was decided, so that a
resumed run goes on with it.
"""

import dataclasses
import importlib.util
import os
import shutil
import sys
from collections.abc import Callable

import torch

import devices
import sharding
from build import why_no_fla
from estimate import (
    MemoryCheck,
    MemoryEstimate,
    expected_memory,
    free_memory,
    memory_of_compiled,
)
from options import Options
from training_data import open_documents

# What compiling gains grows with the work of a run. On a CPU it is passes over memory: by the
# number of the blocks' weights times tokens. Measured: compiling took two cores 60 s, and a step
# got faster by 0.2e-11 to 0.4e-11 s per weight and token; at 0.3e-11 a run gains three times 60 s.
CPU_WORK = 6e13
# A GPU waits for its host, which then has fewer kernels to start: by the number of blocks times
# micro batches. Measured: 35 s of compiling on an H100, and 15 ms gained each (nf4), with a slow
# host. Others are faster: 5 ms each are to gain three times those 35 s.
GPU_BLOCKS = 20_000

# The share of what is free that a faster step may take. A CPU's memory also holds other programs,
# and files that are being read.
CPU_SHARE, GPU_SHARE = 0.5, 0.9

# Values of --grad_cp to try, the fastest first. Eager blocks know three.
COMPILED_GRAD_CP = (0, 0.25, 0.5, 0.75, 1)
EAGER_GRAD_CP = (0, 0.5, 1)


def settle(options: Options, device: torch.device) -> tuple[Options, MemoryCheck]:
    """Return resolved options without `auto`, and whether the run fits, as this rank sees it."""
    options = dataclasses.replace(options, compile=settle_compile(options, device))
    free = free_memory(options, device)
    room = free * (CPU_SHARE if device.type == "cpu" else GPU_SHARE)
    values = [options.grad_cp]
    if options.grad_cp == "auto":
        values = list(COMPILED_GRAD_CP if options.compile else EAGER_GRAD_CP)
        if sharding.Sharding.of(options.strategy, sharding.ranks(options)).trained:
            values = [1]  # whoever shares out weights is short of memory
    expected = memory_by_grad_cp(options, device)
    for grad_cp in values:
        check = MemoryCheck(expected(grad_cp), free)
        if check.estimate.total <= room:
            break
    return dataclasses.replace(options, grad_cp=grad_cp), check


def memory_by_grad_cp(options: Options, device: torch.device) -> Callable[[float], MemoryEstimate]:
    """Return a function of grad_cp: what training takes with it."""
    if options.compile:
        return memory_of_compiled(options, device)
    return lambda grad_cp: expected_memory(dataclasses.replace(options, grad_cp=grad_cp), device)


def same_on_all_ranks(
    given: Options, settled: Options, check: MemoryCheck, *, device: torch.device
) -> tuple[Options, MemoryCheck]:
    """Return settled options as all ranks can have them, and whether the run fits.

    given: the options before. The blocks are compiled where every rank can, and --grad_cp is that
    of the rank with the least memory.
    """
    [eager_somewhere] = devices.max_over_ranks([1 - settled.compile])
    if settled.compile and eager_somewhere:
        print("note: on another rank the blocks cannot be compiled, so on none they are")
        settled, check = settle(dataclasses.replace(given, compile=0), device)
    [grad_cp] = devices.max_over_ranks([settled.grad_cp])
    if grad_cp == settled.grad_cp:
        return settled, check
    settled = dataclasses.replace(settled, grad_cp=grad_cp)
    return settled, MemoryCheck(expected_memory(settled, device), check.free)


def settle_compile(options: Options, device: torch.device) -> int:
    """Return whether the blocks are to be compiled, 0 or 1; say so where that was asked for."""
    if options.compile == 0 or (options.compile == "auto" and not is_worth_it(options, device)):
        return 0
    problem = why_not(options, device)
    if problem and options.compile == 1:
        print(f"note: --compile 1: {problem}; the blocks run without")
    return int(not problem)


def why_not(options: Options, device: torch.device) -> str:
    """Return why the blocks cannot be compiled here; "" if nothing is known to be in the way."""
    if device.type not in ("cpu", "cuda"):
        return f"PyTorch's compiler has nothing for {device.type} devices"
    if options.fla and not why_no_fla(options):
        return "flash-linear-attention's operator is compiled by itself"
    if sharding.Sharding.of(options.strategy, sharding.ranks(options)).trained:
        return f"--strategy {options.strategy} gathers weights between the blocks' operators"
    if device.type == "cuda":
        if importlib.util.find_spec("triton") is None:
            return "Triton is not installed (Linux has it with PyTorch; Windows: triton-windows)"
        if torch.version.cuda and torch.cuda.get_device_capability() < (7, 0):
            return "Triton needs an RTX 20 or newer"
    compiler = os.environ.get("CXX", "cl" if sys.platform == "win32" else "g++")
    if not shutil.which(compiler):
        return f"no C++ compiler ({compiler}) found"
    try:
        import fused  # noqa: F401 (it takes parts of PyTorch that may move)
    except (ImportError, AttributeError) as error:
        return f"PyTorch {torch.__version__} is newer than this program knows ({error})"
    return ""


def is_worth_it(options: Options, device: torch.device) -> bool:
    """Return whether a run is long enough to gain by compiling its blocks."""
    if not options.data_file and options.data_type != "dummy":
        return False
    documents, _ = open_documents(options)
    rows = float(len(documents))
    tokens_per_row = len(documents.tokens) / rows
    if options.dataload == "get":
        tokens_per_row = options.ctx_len
        rows = len(documents.tokens) / tokens_per_row
    elif options.train_type != "infctx":
        tokens_per_row = min(tokens_per_row, options.ctx_len)
    rows *= options.epoch_count / sharding.ranks(options)
    if options.epoch_steps:
        rows_per_step = options.micro_bsz * options.accumulate_grad_batches
        rows = options.epoch_count * options.epoch_steps * rows_per_step

    n_layer, n_embd = options.n_layer or 0, options.n_embd or 0
    if device.type == "cuda":
        return n_layer * rows / options.micro_bsz >= GPU_BLOCKS
    weights_of_blocks = 13 * n_layer * n_embd**2
    return weights_of_blocks * rows * tokens_per_row >= CPU_WORK
