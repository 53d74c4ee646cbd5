"""Several devices: a process for each, its rank, through PyTorch's engines. `torchrun --nproc_per_node N train.py ...` starts them, or --devices N.

    --strategy                  engine                                         what one of N ranks holds
    auto, ddp                   DistributedDataParallel                        everything; gradients are added up
    deepspeed_stage_1           the same, and ZeroRedundancyOptimizer          everything, but an N-th of Adam's moments
    deepspeed_stage_2           FSDP2 (fully_shard) of what is trained         the frozen base; an N-th of the rest, its gradients and moments
    deepspeed_stage_3           FSDP2 of all weights                           an N-th of everything, and the blocks that are being computed
    deepspeed_stage_2_offload, deepspeed_stage_3_offload                       the same, the N-th in the memory of the CPU

The names are those of DeepSpeed's ways to do the same, which is not used. Tensors of the model travel by NCCL between GPUs and by gloo between CPUs;
the few numbers that ranks tell one another (`total`, `most`, `in_turn`) always by gloo.

A single process is a world of one: every function here then returns what it is given.
"""

import contextlib
import ctypes
import datetime
import math
import os
import re
import signal
import socket
import subprocess
import sys
import time
import traceback
import warnings

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from cli import STOPPING, in_words
from quant import (
    Quantized,
)  # PyTorch's engines are imported where they are used: that takes seconds, which one process need not wait

ENGINES = {
    "auto": "DDP",
    "ddp": "DDP",
    "deepspeed_stage_1": "DDP, Adam's moments shared out (ZeroRedundancyOptimizer)",
    "deepspeed_stage_2": "FSDP2, what is trained shared out",
    "deepspeed_stage_3": "FSDP2, all weights shared out",
}


def engine(strategy):
    """What a --strategy is here, in words."""
    return ENGINES[
        strategy.removesuffix("_offload")
    ] + ", kept in the memory of the CPU" * strategy.endswith("_offload")


def size():
    started = os.environ.get("WORLD_SIZE", "")  # `train` refuses what is no number
    return max(1, int(started)) if started.isdecimal() else 1


def rank():
    return int(os.environ.get("RANK", 0)) if size() > 1 else 0


def started_here():
    """Whether `python train.py`, on this machine alone, is what started this world."""
    return size() == 1 or (
        "LAUNCHER" in os.environ and size() == int(os.environ["LOCAL_WORLD_SIZE"])
    )


def shares(strategy, n=None):
    """Whether a strategy, among n ranks (None: of this world), shares out (Adam's moments, what is trained itself, the frozen base, too)."""
    stage = (n or size()) > 1 and strategy.removeprefix("deepspeed_stage_")[0]
    return stage in ("1", "2", "3"), stage in ("2", "3"), stage == "3"


def memory_of_one(parts, model, strategy, n):
    """What one of n ranks takes, from {part: bytes} of a single process. A block is gathered into one piece, then cut into its weights, while the
    piece is there; those outside of the blocks, embedding and head, are there from the beginning to the end of a step."""

    def bytes_of(module):
        return sum(
            t.nbytes for t in (*module.parameters(), *module.buffers()) if base or t.requires_grad
        )

    moments, trained, base = shares(strategy, n)
    if moments:
        parts["optimizer"] /= n
    if trained:
        everything, blocks = bytes_of(model), [bytes_of(block) for block in model.blocks]
        parts["gathered weights"] = (
            everything - sum(blocks) + (2 * max(blocks) if base else sum(blocks) + max(blocks))
        )
        parts["weights"] -= everything * (1 - 1 / n)
    return parts


def find(accelerator: str = "auto") -> torch.device:
    """Return the device that --accelerator means: `cpu`; or, for `gpu` and `auto`, PyTorch's accelerator.

    That is what torch.accelerator names: CUDA's, ROCm's, Intel's or Apple's; where there is none,
    the CPU. (options.py refuses `gpu` then.)
    """
    found = None
    if accelerator != "cpu":
        found = torch.accelerator.current_accelerator(check_available=True)
    return found or torch.device("cpu")


# ---- processes ----------------------------------------------------------------------------------------------------------------


class Agreed(ValueError):
    """An error that all ranks come to at the same place, so that the first of each machine says it, and all can still save."""


def launch(devices, num_nodes):
    """Run this program once for each device, and end as they end: SystemExit. Of several machines each runs this; MASTER_ADDR, MASTER_PORT and
    NODE_RANK say where the first one is, and which one this is. Signals are passed on. When a rank fails the others are asked to end, too; after
    a minute, or 5 s after a second Ctrl-C, they are made to. (torchrun, which does the same, leaves them half a minute for saving, too.)"""
    with socket.socket() as s:
        s.bind(("", 0))  # a free port
        where = (
            {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(s.getsockname()[1])}
            if num_nodes == 1
            else {"MASTER_PORT": "29500"} | os.environ
        )
    node, ranks, asked, since, deadline = (
        int(os.environ["NODE_RANK"]) if num_nodes > 1 else 0,
        [],
        [],
        0,
        math.inf,
    )

    def pass_on(number, _):
        nonlocal deadline, since
        if (
            asked and number == signal.SIGINT and time.monotonic() - since > 0.2
        ):  # see `unbroken` in resume.py
            deadline = time.monotonic() + 5
        since = since if asked else time.monotonic()
        asked.append(number)
        for process in ranks:
            process.send_signal(number)

    for number in STOPPING:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, pass_on)
    if num_nodes > 1:
        print(
            f"machine {node} of {num_nodes}, counted from 0: waits until all are at {where['MASTER_ADDR']}:{where['MASTER_PORT']}, the first machine's",
            flush=True,
        )
    for local in range(devices):
        numbers = {
            "WORLD_SIZE": devices * num_nodes,
            "RANK": node * devices + local,
            "LOCAL_WORLD_SIZE": devices,
            "LOCAL_RANK": local,
            "LAUNCHER": os.getpid(),
        }
        environment = os.environ | where | {name: str(n) for name, n in numbers.items()}
        # A session of its own, or a terminal's Ctrl-C would reach a rank twice.
        ranks.append(
            subprocess.Popen([sys.executable, *sys.argv], env=environment, start_new_session=True)
        )
        if asked:
            ranks[-1].send_signal(asked[0])
    failed = None
    while any(process.poll() is None for process in ranks):
        time.sleep(0.1)
        failed = failed or next((process for process in ranks if process.poll()), None)
        if failed and not asked and deadline == math.inf:
            deadline = time.monotonic() + 60
            for process in ranks:
                process.terminate()
        if time.monotonic() > deadline:
            for process in ranks:
                process.kill()
    failed = failed or next((process for process in ranks if process.poll()), None)
    if failed and failed.returncode < 0 and not asked:
        print(
            f"\nerror: rank {node * devices + ranks.index(failed)} of {devices * num_nodes} was ended by {signal.Signals(-failed.returncode).name}, and the "
            "others with it; where nobody did that, and nothing is said above, memory was too small",
            file=sys.stderr,
        )
    sys.exit(
        0
        if not failed
        else failed.returncode
        if failed.returncode > 0
        else 128 + asked[0]
        if asked
        else 2
    )


@contextlib.contextmanager
def world(device, strategy):
    """Around what a rank does. All but rank 0 are silent, but for errors that are not Agreed."""
    if size() == 1:
        yield
        return
    local, on_this_machine = (
        int(os.environ.get("LOCAL_RANK", 0)),
        int(os.environ.get("LOCAL_WORLD_SIZE", size())),
    )
    if device.type != "cpu":
        if local >= torch.accelerator.device_count():
            raise ValueError(
                f"rank {rank()}: {on_this_machine} processes were started here, but PyTorch sees {torch.accelerator.device_count()} GPUs"
            )
        torch.accelerator.set_device_index(local)
    elif "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, torch.get_num_threads() // on_this_machine))
    if "LAUNCHER" in os.environ and sys.platform == "linux":
        ctypes.CDLL(None).prctl(
            1, signal.SIGTERM
        )  # PR_SET_PDEATHSIG: when the launcher is killed, nobody would be left to end this
    handlers = {number: signal.getsignal(number) for number in STOPPING}
    try:
        for number in (
            STOPPING
        ):  # nothing is to be saved yet, and a handler would wait until the others are there
            if callable(handlers[number]):
                signal.signal(number, signal.SIG_DFL)
        engine = (
            f",{device.type}:{dist.get_default_backend_for_device(device)}"
            if device.type != "cpu"
            else ""
        )
        dist.init_process_group(f"cpu:gloo{engine}", timeout=datetime.timedelta(hours=2))
        for number, handler in handlers.items():
            signal.signal(number, handler)
        with (
            contextlib.redirect_stdout(open(os.devnull, "w"))
            if rank()
            else contextlib.nullcontext()
        ):
            yield
        most([0])  # none goes while another one still speaks
        dist.destroy_process_group()
    except Agreed:
        if rank() == 0 or local == 0:  # once on each machine
            raise
        sys.exit(2)
    except RuntimeError as error:
        if "EADDRINUSE" in str(error):
            raise ValueError(
                f"port {os.environ['MASTER_PORT']} is taken on this machine; set another MASTER_PORT, the same on all machines"
            ) from error
        if not isinstance(error, dist.DistError) and not re.search(
            "gloo|nccl|process group", str(error), re.IGNORECASE
        ):
            raise
        if started_here():
            time.sleep(1)  # so that the launcher sees the other one's end first, and says it
            sys.exit(2)
        time.sleep(10)  # torchrun ends this one meanwhile, and says why the other ended
        raise ValueError(
            f"rank {rank()}: the connection to another rank was lost, which has ended, or cannot be reached"
        ) from error
    except ValueError as error:
        if "env://" in str(error):
            raise ValueError(
                "WORLD_SIZE is set, but not all of RANK, LOCAL_RANK, MASTER_ADDR and MASTER_PORT; unset it, or start the ranks by torchrun"
            ) from error
        if rank() == 0:
            raise
        raise ValueError(f"rank {rank()}: {error}") from error


def leave(main):
    """Run main(), and end as it ends. A rank ends at once when all is said: in the interpreter's own end, the threads by which ranks talk can abort it."""
    if size() == 1:
        return main()
    code = 0
    try:
        main()
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        traceback.print_exc()
        code = 1
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    os._exit(code)


@contextlib.contextmanager
def main_first():
    """Rank 0 goes through the block before the others do: what it makes, they find, and where it refuses something, they need not. On other machines,
    too, one goes before the rest. What any of them refuses is Agreed by all."""
    turn = 0 if rank() == 0 else 1 if os.environ.get("LOCAL_RANK") == "0" else 2
    if size() == 1:
        yield
        return
    refused = None
    for at in range(3):
        if at == turn:
            try:
                yield
            except (OSError, ValueError) as error:
                refused = in_words(error)
        for n, words in enumerate(of_all(refused)):
            if words:
                raise Agreed(f"rank {n}: {words}" if n else words)


def check_same(what):
    """Agreed, unless {name: value} is the same on all ranks."""
    for n, other in enumerate(of_all(what) if size() > 1 else ()):
        for name in [name for name in what if other[name] != what[name]]:
            raise Agreed(
                f"{name} differs: {what[name]} on rank {rank()}, {other[name]} on rank {n}; all need the same"
            )


# ---- numbers ------------------------------------------------------------------------------------------------------------------


def reduced(numbers, operation):
    if size() == 1:
        return numbers
    dist.all_reduce(x := torch.tensor(numbers, dtype=torch.float64), operation)
    return x.tolist()


def total(numbers):
    """The sums of a list of numbers over all ranks."""
    return reduced(numbers, dist.ReduceOp.SUM)


def most(numbers):
    """The largest of all ranks, of each of a list of numbers."""
    return reduced(numbers, dist.ReduceOp.MAX)


def of_all(what):
    """A list of what each rank has, objects that pickle holds."""
    gathered = [None] * size()
    dist.all_gather_object(gathered, what)
    return gathered


def in_turn(numbers):
    """The first numbers of all ranks, then the second ones, and so on. All ranks have as many."""
    if size() == 1:
        return numbers
    gathered = [torch.empty(len(numbers), dtype=torch.float64) for _ in range(size())]
    dist.all_gather(gathered, torch.tensor(numbers, dtype=torch.float64))
    return torch.stack(gathered, 1).flatten().tolist()


# ---- engines ------------------------------------------------------------------------------------------------------------------


class Loss(nn.Module):
    """DDP adds up the gradients of a module when its forward was called: here that is loss_fn."""

    def __init__(self, model, loss_fn):
        super().__init__()
        self.model, self.loss_fn = model, loss_fn

    def forward(self, *batch, **options):
        return self.loss_fn(self.model, *batch, **options)


def wrap(model, loss_fn, strategy):
    """loss_fn(model, ...) as a function of the rest, whose backward pass adds up the gradients of all ranks. Outside `quiet`, that is."""
    if size() == 1 or shares(strategy)[1]:
        return lambda *batch, **options: loss_fn(model, *batch, **options)
    with warnings.catch_warnings(
        action="ignore"
    ):  # of another name for broadcast_buffers, in some releases
        return DistributedDataParallel(
            Loss(model, loss_fn),
            broadcast_buffers=False,
            init_sync=False,
            gradient_as_bucket_view=True,
        )


def quiet(compute):
    """The forward and backward passes within only add to this rank's gradients."""
    return (
        compute.no_sync()
        if isinstance(compute, DistributedDataParallel)
        else contextlib.nullcontext()
    )


def shares_out_integers():
    """Whether PyTorch's FSDP2 takes the integers of a quantized base: since 2.12."""
    major, minor = torch.__version__.split(".")[:2]
    return (int(major), int(minor)) >= (2, 12)


def shard(model, strategy, device):
    """Share out the weights of `model`, or those that are trained: each rank will hold an N-th of every tensor, along its first dimension."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import (
        CPUOffloadPolicy,
        OffloadPolicy,
        fully_shard,
        register_fsdp_forward_method,
    )

    _, _, base = shares(strategy)
    if (
        base
        and not shares_out_integers()
        and any(isinstance(module, Quantized) for module in model.modules())
    ):
        raise ValueError(
            f"--strategy {strategy} shares out a quantized base with PyTorch 2.12 or newer, and this is {torch.__version__}; "
            "use deepspeed_stage_2, or --quant none, or install a newer one"
        )
    for module in model.modules() if base else ():
        if isinstance(module, Quantized):  # only parameters are shared out
            for name, buffer in list(module.named_buffers(recurse=False)):
                delattr(module, name)
                module.register_parameter(name, nn.Parameter(buffer, requires_grad=False))
    options = {
        "mesh": init_device_mesh(device.type, (size(),)),
        "ignored_params": set() if base else {p for p in model.parameters() if not p.requires_grad},
        "offload_policy": CPUOffloadPolicy()
        if strategy.endswith("_offload") and device.type != "cpu"
        else OffloadPolicy(),
    }
    for block in model.blocks:
        fully_shard(
            block, reshard_after_forward=base, **options
        )  # what is trained is small, and stays from the forward to the backward pass
    fully_shard(model, reshard_after_forward=False, **options)
    register_fsdp_forward_method(model, "hidden")


def is_shared(tensor):
    return hasattr(tensor, "full_tensor")  # a DTensor


def part(tensor, parameter):
    """This rank's part of a whole tensor, as `parameter` is shared out; for a plain parameter, the tensor."""
    if not is_shared(parameter):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(
        tensor, parameter.device_mesh, parameter.placements, src_data_rank=None
    )


def whole(tensor):
    """The whole of a tensor that is shared out; any other as it is. On all ranks at once."""
    return tensor.full_tensor() if is_shared(tensor) else tensor


def added_up(tensor):
    """The sum of what all ranks have, on the CPU."""
    dist.all_reduce(tensor := tensor.to("cpu", copy=True).contiguous())
    return tensor


def optimizer(groups, strategy, **options):
    """AdamW; with deepspeed_stage_1 each rank has the moments of its share of the parameters, and sends these out after a step."""
    if shares(strategy) == (True, False, False):
        from torch.distributed.optim import ZeroRedundancyOptimizer

        return ZeroRedundancyOptimizer(groups, torch.optim.AdamW, **options)
    return torch.optim.AdamW(groups, **options)


def step_if_finite(optimizer, number):
    """Take the optimizer's step if `number`, a tensor (), is finite on all ranks, without waiting for the device.

    The fused kernel of AdamW looks at `found_inf`, which is there for fp16: where it is 1, weights,
    moments and step counts keep their bits. (On CPUs and by CUDA; Apple's kernel does not look.)
    """
    found_inf = (~number.isfinite()).float()
    if size() > 1:
        dist.all_reduce(found_inf, dist.ReduceOp.MAX)
    if found_inf.device.type == "mps" and found_inf.item():
        return
    inner = getattr(optimizer, "optim", optimizer)  # ZeroRedundancyOptimizer's own
    inner.found_inf = found_inf.to(
        optimizer.param_groups[0]["params"][0].device
    )  # the CPU's, with offload
    optimizer.step()
    del inner.found_inf
