"""Several devices: this process's device, the world of ranks, what they tell one another.

One need not read this to understand Bone. Each device has a process of its own, a rank. They are
started by `--devices N`, or by `torchrun --nproc_per_node N train.py ...`. What the ranks share out
among them is the matter of sharding.py.

Tensors of the model travel by NCCL between GPUs and by gloo between CPUs. The few numbers that
ranks tell one another (sum_over_ranks, gather_objects, ...) always travel by gloo.

A single process is a world of one: every function here then returns what it is given.
"""

import contextlib
import datetime
import logging
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist

from cli import one_line, settable_signals

# Of one rank for another: the first one may have much text to tokenize while the others wait.
LONGEST_WAIT = datetime.timedelta(hours=2)
# What ranks that `launch` starts find in TORCHELASTIC_RUN_ID.
RUN_ID = "train.py --devices"


def size() -> int:
    """Return the number of ranks. (train.py refuses a WORLD_SIZE that is not a number.)"""
    started = os.environ.get("WORLD_SIZE", "")
    return max(1, int(started)) if started.isdecimal() else 1


def rank() -> int:
    """Return this process's number among all ranks, from 0. A RANK without a WORLD_SIZE is 0."""
    return int(os.environ["RANK"]) if size() > 1 else 0


def local_rank() -> int:
    """Return this process's number among the ranks of its machine, from 0."""
    return int(os.environ["LOCAL_RANK"]) if size() > 1 else 0


def on_one_machine() -> bool:
    """Return whether all ranks are on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", size())) == size()


def started_here() -> bool:
    """Return whether `python train.py`, on this machine alone, is what started this world."""
    if size() == 1:
        return True
    return os.environ.get("TORCHELASTIC_RUN_ID") == RUN_ID and on_one_machine()


def find(accelerator: str = "auto") -> torch.device:
    """Return the device that --accelerator means.

    That is the CPU for `cpu`; for `gpu` and `auto` PyTorch's accelerator: CUDA's, ROCm's, Intel's
    or Apple's. Where there is none, it is the CPU. (parse_options.py refuses `gpu` then.)
    """
    found = None
    if accelerator != "cpu":
        found = torch.accelerator.current_accelerator(check_available=True)
    return found or torch.device("cpu")


# ---- starting ranks, and ending them -----------------------------------------------------------


class CollectiveError(ValueError):
    """An error that all ranks raise at the same place: all can still save, and one reports it."""


def launch(devices: int, num_nodes: int) -> None:
    """Run this program once for each device of this machine, and return when all have succeeded.

    torchrun's library does it, which on one machine chooses a free port. Each of several machines
    calls this; MASTER_ADDR, MASTER_PORT and NODE_RANK say where the first one is, and which one
    this is.

    What is printed: the ranks' own words, their errors included; nothing by torchrun. One line is
    added here where it was a signal that ended a rank, which then could not say so itself.
    Exit code, by SystemExit: that of the rank that failed first; 2 where a signal ended it; 128 + N
    where signal N was sent to this process. It is passed on to the ranks, which have 30 s to save
    their state before they are killed. They have as long when one of them fails.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # torchrun's warnings and reports of what is said here already.
    logging.disable(logging.ERROR)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, torch.get_num_threads() // devices)))
    config = LaunchConfig(
        min_nodes=num_nodes,
        max_nodes=num_nodes,
        nproc_per_node=devices,
        run_id=RUN_ID,
        max_restarts=0,
        logs_specs=DefaultLogsSpecs(log_dir=os.devnull),
        signals_to_handle=",".join(signals_to_pass_on()),
        **meeting_place(num_nodes),
    )
    try:
        with ended_by_signals():
            elastic_launch(config, sys.executable)(*sys.argv)
    except ChildFailedError as failed:
        failed_rank, failure = failed.get_first_failure()
        if failure.exitcode > 0:  # the rank has said why
            sys.exit(failure.exitcode)
        raise ValueError(
            f"rank {failed_rank} of {devices * num_nodes} was ended by {failure.signal_name()}, "
            "and the others with it; if nobody did that, and nothing is said above, there was too "
            "little memory"
        ) from failed
    except SignalException as stopped:
        sys.exit(128 + stopped.sigval)
    except dist.DistError as error:
        raise ValueError(why_not_met(error, config.rdzv_endpoint)) from error


def signals_to_pass_on() -> list[str]:
    """Name the signals that torchrun passes on to ranks, but for those that nohup has ignored."""
    names = ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT")
    return [
        name
        for name in names
        if hasattr(signal, name) and signal.getsignal(getattr(signal, name)) != signal.SIG_IGN
    ]


def meeting_place(num_nodes: int) -> dict[str, Any]:
    """Return where the ranks find one another, as torchrun's words for it."""
    if num_nodes == 1:
        return {
            "rdzv_backend": "c10d",
            "rdzv_endpoint": "localhost:0",
            "local_addr": "localhost",
        }
    node = int(os.environ["NODE_RANK"])
    endpoint = f"{os.environ['MASTER_ADDR']}:{os.environ.get('MASTER_PORT', '29500')}"
    print(
        f"machine {node} of {num_nodes}, counted from 0: "
        f"waits until all are at {endpoint}, the first machine's",
        flush=True,
    )
    return {
        "rdzv_backend": "static",
        "rdzv_endpoint": endpoint,
        "rdzv_configs": {"rank": node, "timeout": LONGEST_WAIT.total_seconds()},
    }


def why_not_met(error: RuntimeError, endpoint: str) -> str:
    """Say in one line why ranks, or machines, did not meet."""
    if "EADDRINUSE" in str(error):
        port = endpoint.rpartition(":")[2]
        return (
            f"port {port} is taken on this machine; "
            "set another MASTER_PORT, the same on all machines"
        )
    first_line = str(error).partition("\n")[0]
    return f"the ranks did not meet at {endpoint} ({first_line}); is its port open?"


@contextlib.contextmanager
def ended_by_signals() -> Iterator[None]:
    """Let a signal end this process at once, while it waits for others and has nothing to save.

    A handler in Python would be called only when the wait is over.
    """
    handlers = {number: signal.getsignal(number) for number in settable_signals()}
    ours = {number: handler for number, handler in handlers.items() if callable(handler)}
    for number in ours:
        signal.signal(number, signal.SIG_DFL)
    try:
        yield
    finally:
        for number, handler in ours.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def world(device: torch.device) -> Iterator[None]:
    """Connect this rank with the others for what it does within, and end it as it should end.

    All but rank 0 print nothing there. Of an error that all have (CollectiveError) the first rank
    of each machine prints its line; of any other error the rank that has it.
    """
    if size() == 1:
        yield
        return
    join_world(device)
    try:
        with contextlib.ExitStack() as silence:
            if rank() > 0:
                nowhere = silence.enter_context(open(os.devnull, "w", errors="replace"))
                silence.enter_context(contextlib.redirect_stdout(nowhere))
            yield
        dist.destroy_process_group()
    except CollectiveError:
        if local_rank() > 0:
            sys.exit(2)
        raise
    except ValueError as error:
        if rank() == 0:
            raise
        raise ValueError(f"rank {rank()}: {error}") from error
    except RuntimeError as error:
        if not is_lost_connection(error):
            raise
        # That rank has ended. Who started the ranks is to see its end first, and ends this one.
        time.sleep(1)
        if on_one_machine() or local_rank() > 0:
            sys.exit(2)
        raise ValueError(
            f"rank {rank()}: the connection to another rank was lost; "
            "it has ended, or cannot be reached"
        ) from error


def join_world(device: torch.device) -> None:
    """Choose this rank's device, then wait until all ranks are there."""
    needed = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in needed if name not in os.environ]
    if missing:
        raise ValueError(
            f"WORLD_SIZE is set, but not {', '.join(missing)}; "
            "unset it, or start the ranks by torchrun"
        )
    backends = "gloo"
    if device.type != "cpu":
        available = torch.accelerator.device_count()
        if local_rank() >= available:
            raise ValueError(
                f"rank {rank()}: is number {local_rank()} of this machine, counted from 0, "
                f"but PyTorch sees {available} GPUs"
            )
        torch.accelerator.set_device_index(local_rank())
        backends = f"cpu:gloo,{device.type}:{dist.get_default_backend_for_device(device)}"
    try:
        with ended_by_signals():
            dist.init_process_group(backends, timeout=LONGEST_WAIT)
    except RuntimeError as error:
        endpoint = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise ValueError(f"rank {rank()}: {why_not_met(error, endpoint)}") from error


def is_lost_connection(error: RuntimeError) -> bool:
    """Return whether this is what PyTorch raises when another rank has ended."""
    if isinstance(error, dist.DistError):
        return True
    return bool(re.search("gloo|nccl|process group", str(error), re.IGNORECASE))


def exit_process(main: Callable[[], None]) -> None:
    """Run main(), and end the process as it ends.

    A rank leaves without the interpreter's own end, in which the threads by which ranks talk can
    abort it: a run that is complete would look like one that crashed.
    """
    if size() == 1:
        main()
        return
    code = 0
    try:
        main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0
    except BaseException:
        traceback.print_exc()
        code = 1
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    os._exit(code)


# ---- agreeing ----------------------------------------------------------------------------------


@contextlib.contextmanager
def rank0_first() -> Iterator[None]:
    """Let the first rank of each machine go through the block before its others do.

    What it makes, they find. What any of them refuses by an OSError or ValueError becomes a
    CollectiveError of all.
    """
    if size() == 1:
        yield
        return
    if local_rank() > 0:
        agree(None)
    refusal = None
    try:
        yield
    except (OSError, ValueError) as error:
        refusal = one_line(error)
    agree(refusal)
    if local_rank() == 0:
        agree(None)


def agree(refusal: str | None) -> None:
    """Raise a CollectiveError on all ranks if one of them gives a refusal."""
    for number, words in enumerate(gather_objects(refusal)):
        if words is not None:
            raise CollectiveError(f"rank {number}: {words}" if number else words)


def check_same(values: dict[str, Any]) -> None:
    """Raise a CollectiveError unless {name: value} is the same on all ranks."""
    for number, others in enumerate(gather_objects(values)):
        for name, value in values.items():
            if others[name] != value:
                raise CollectiveError(
                    f"{name} differs: {value} on rank {rank()}, {others[name]} on rank {number}; "
                    "all need the same"
                )


# ---- numbers -----------------------------------------------------------------------------------


def sum_over_ranks(numbers: Sequence[float]) -> list[float]:
    """Return the sums of a list of numbers over all ranks."""
    return _reduce(numbers, dist.ReduceOp.SUM)


def max_over_ranks(numbers: Sequence[float]) -> list[float]:
    """Return the largest of all ranks, for each of a list of numbers."""
    return _reduce(numbers, dist.ReduceOp.MAX)


def _reduce(numbers: Sequence[float], operation: Any) -> list[float]:
    if size() == 1:
        return list(numbers)
    reduced = torch.tensor(numbers, dtype=torch.float64)
    dist.all_reduce(reduced, operation)
    return reduced.tolist()


def gather_objects(what: Any) -> list[Any]:
    """Return what each rank gives, in the order of ranks: objects that pickle can hold."""
    if size() == 1:
        return [what]
    gathered = [None] * size()
    dist.all_gather_object(gathered, what)
    return gathered


def interleave_ranks(numbers: Sequence[float]) -> list[float]:
    """Return the first numbers of all ranks, then their second ones, and so on.

    All ranks have as many.
    """
    if size() == 1:
        return list(numbers)
    mine = torch.tensor(numbers, dtype=torch.float64)
    gathered = [torch.empty_like(mine) for _ in range(size())]
    dist.all_gather(gathered, mine)
    return torch.stack(gathered, dim=1).flatten().tolist()
