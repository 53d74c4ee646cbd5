"""What the ranks share out among them, by PyTorch's engines.

One need not read this to understand Bone.

    --strategy          engine                                   what one of N ranks holds
    auto, ddp           DistributedDataParallel                  everything; gradients are summed
    deepspeed_stage_1   the same, and ZeroRedundancyOptimizer    everything, but an N-th of Adam's
                                                                 moments
    deepspeed_stage_2   FSDP2 (fully_shard) of what is trained   the frozen base; an N-th of the
                                                                 rest, its gradients and moments
    deepspeed_stage_3   FSDP2 of all weights                     an N-th of everything, and the
                                                                 blocks that are being computed
    deepspeed_stage_2_offload, deepspeed_stage_3_offload         the same, that N-th in the CPU's
                                                                 memory

The names are those of DeepSpeed's ways to do the same. DeepSpeed is not used.

FSDP2 keeps a weight as a DTensor, of which each rank has an N-th of the rows. Checkpoints and
states hold whole tensors: `full_tensor` makes them, and `local_shard` takes them apart.

A single process is a world of one, which shares out nothing. (PyTorch's engines take seconds to
import, so they are imported where they are used.)
"""

import contextlib
import dataclasses
import functools
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import devices
from adamw8bit import AdamW8bit
from quant import Quantized
from rwkv6 import RWKV

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

ENGINES = {
    "auto": "DDP",
    "ddp": "DDP",
    "deepspeed_stage_1": "DDP, Adam's moments shared out (ZeroRedundancyOptimizer)",
    "deepspeed_stage_2": "FSDP2, what is trained shared out",
    "deepspeed_stage_3": "FSDP2, all weights shared out",
}


def describe(strategy: str) -> str:
    """Say what a --strategy is here."""
    engine = ENGINES[strategy.removesuffix("_offload")]
    if strategy.endswith("_offload"):
        return f"{engine}, kept in the memory of the CPU"
    return engine


def ranks(options: Any) -> int:
    """Return how many ranks there are, or would be if this were no dry run."""
    return max(devices.size(), options.devices * options.num_nodes)


@dataclasses.dataclass(frozen=True)
class Sharding:
    """What is shared out: each rank has an N-th of it. Each of these includes the one before."""

    optimizer_state: bool = False
    trained: bool = False
    frozen: bool = False

    @classmethod
    def of(cls, strategy: str, ranks: int | None = None) -> "Sharding":
        """Return what a --strategy shares out among `ranks`; None: among those of this world."""
        if (ranks or devices.size()) == 1 or not strategy.startswith("deepspeed_stage_"):
            return cls()
        stage = int(strategy.split("_")[2])
        return cls(optimizer_state=stage >= 1, trained=stage >= 2, frozen=stage >= 3)


def memory_of_one_rank(
    parts: dict[str, float], model: RWKV, strategy: str, *, ranks: int
) -> dict[str, float]:
    """Return what one of several ranks takes, from {part: bytes} of a single process."""
    shared = Sharding.of(strategy, ranks)
    parts = dict(parts)
    if shared.optimizer_state:
        parts["optimizer"] /= ranks
    if not shared.trained:
        return parts

    def shared_bytes(module: nn.Module) -> int:
        tensors = (*module.parameters(), *module.buffers())
        return sum(t.nbytes for t in tensors if shared.frozen or t.requires_grad)

    everything = shared_bytes(model)
    blocks = [shared_bytes(block) for block in model.blocks]
    # Embedding and head stay gathered from the beginning to the end of a step. So do the blocks,
    # unless the frozen weights are shared out too: then one block is gathered at a time.
    gathered = everything - sum(blocks)
    gathered += max(blocks) if shared.frozen else sum(blocks)
    # A block is gathered into one piece. It is there until the block's weights are cut from it.
    parts["gathered weights"] = gathered + max(blocks)
    parts["weights"] -= everything * (1 - 1 / ranks)
    return parts


# ---- the model ---------------------------------------------------------------------------------


class Loss(nn.Module):
    """loss_fn as a module, since DDP sums the gradients of a module whose forward was called."""

    def __init__(self, model: nn.Module, loss_fn: Callable[..., Any]):
        super().__init__()
        self.model = model
        self.loss_fn = loss_fn

    def forward(self, *batch: Tensor, **options: Any) -> Any:
        return self.loss_fn(self.model, *batch, **options)


def wrap(model: RWKV, loss_fn: Callable[..., Any], strategy: str) -> Callable[..., Any]:
    """Return loss_fn(model, ...) as a function of the rest.

    Its backward pass takes the mean of the gradients of all ranks, but in `no_gradient_sync`. With
    FSDP2 the model itself does so, see `shard`.
    """
    if devices.size() == 1 or Sharding.of(strategy).trained:
        return functools.partial(loss_fn, model)
    # PyTorch 2.13 warns of a new name for broadcast_buffers, which 2.11 does not know.
    with warnings.catch_warnings(action="ignore"):
        return DistributedDataParallel(
            Loss(model, loss_fn),
            broadcast_buffers=False,
            init_sync=False,
            gradient_as_bucket_view=True,
        )


def no_gradient_sync(compute: Callable[..., Any]) -> contextlib.AbstractContextManager:
    """Let passes through what `wrap` returned add to this rank's gradients alone."""
    if isinstance(compute, DistributedDataParallel):
        return compute.no_sync()
    return contextlib.nullcontext()


def shares_out_integers() -> bool:
    """Return whether PyTorch's FSDP2 takes the integers of a quantized base: since 2.12."""
    major, minor = torch.__version__.split(".")[:2]
    return (int(major), int(minor)) >= (2, 12)


def check_quant(options: Any) -> None:
    """Raise ValueError where a quantized base is to be shared out, and PyTorch is too old."""
    shared = Sharding.of(options.strategy, ranks(options)).frozen
    if shared and options.quant != "none" and not shares_out_integers():
        raise ValueError(
            f"--strategy {options.strategy} shares out a quantized base with PyTorch 2.12 or "
            f"newer, and this is {torch.__version__}; "
            "use deepspeed_stage_2, or --quant none, or install a newer one"
        )


def shard(model: RWKV, strategy: str, device: torch.device) -> None:
    """Share out the weights of the model, or those that are trained, by FSDP2.

    Each rank will hold an N-th of every tensor, along its first dimension.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import (
        CPUOffloadPolicy,
        OffloadPolicy,
        fully_shard,
        register_fsdp_forward_method,
    )

    all_weights = Sharding.of(strategy).frozen
    ignored: set[nn.Parameter] = set()
    if all_weights:
        quantized_to_parameters(model)
    else:
        ignored = {p for p in model.parameters() if not p.requires_grad}
    offload = OffloadPolicy()
    if strategy.endswith("_offload") and device.type != "cpu":
        offload = CPUOffloadPolicy()
    fsdp = functools.partial(
        fully_shard,
        mesh=init_device_mesh(device.type, (devices.size(),)),
        ignored_params=ignored,
        offload_policy=offload,
    )
    for block in model.blocks:
        # What is trained is small: it stays gathered from the forward to the backward pass.
        fsdp(block, reshard_after_forward=all_weights)
    fsdp(model, reshard_after_forward=False)
    register_fsdp_forward_method(model, "hidden")


def quantized_to_parameters(model: RWKV) -> None:
    """Make parameters of the buffers of quantized layers: FSDP2 shares out only parameters.

    check_quant has refused it where PyTorch is too old.
    """
    for layer in [module for module in model.modules() if isinstance(module, Quantized)]:
        for name, buffer in list(layer.named_buffers(recurse=False)):
            delattr(layer, name)
            layer.register_parameter(name, nn.Parameter(buffer, requires_grad=False))


# ---- whole tensors and shards ------------------------------------------------------------------


def is_shared(tensor: Tensor) -> "TypeGuard[DTensor]":
    """Return whether a tensor is shared out: a DTensor."""
    return hasattr(tensor, "full_tensor")


def full_tensor(tensor: Tensor) -> Tensor:
    """Return the whole of a tensor that is shared out, any other as it is. On all ranks at once."""
    return tensor.full_tensor() if is_shared(tensor) else tensor


def local_shard(tensor: Tensor, parameter: Tensor) -> Tensor:
    """Return this rank's part of a whole tensor, as `parameter` is shared out.

    For a plain parameter that is the tensor itself.
    """
    if not is_shared(parameter):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(
        tensor, parameter.device_mesh, parameter.placements, src_data_rank=None
    )


def summed_on_cpu(tensor: Tensor) -> Tensor:
    """Return the sum of the tensors that all ranks give, on the CPU."""
    summed = tensor.to("cpu", copy=True).contiguous()
    dist.all_reduce(summed)
    return summed


# ---- the optimizer -----------------------------------------------------------------------------


def adamw(
    groups: Sequence[dict[str, Any]], strategy: str, *, in_8_bits: bool = False, **options: Any
) -> torch.optim.Optimizer:
    """Return AdamW over groups of parameters; in_8_bits: with its moments in 8 bits.

    With deepspeed_stage_1 each rank has the moments of its share of the parameters, and sends the
    others these parameters after a step.
    """
    shared = Sharding.of(strategy)
    kind = AdamW8bit if in_8_bits else torch.optim.AdamW
    if not in_8_bits:
        options["fused"] = True
    if shared.optimizer_state and not shared.trained:
        from torch.distributed.optim import ZeroRedundancyOptimizer

        return ZeroRedundancyOptimizer(groups, kind, **options)
    return kind(groups, **options)


def clip_gradients(optimizer: torch.optim.Optimizer) -> Tensor:
    """Scale the gradients down to a norm of 1, if it is larger. Return the norm, a tensor ()."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    gradients = [p.grad for p in parameters if p.grad is not None]
    # clip_grad_norm_ would compute the norm of a bfloat16 gradient in bfloat16.
    norms: list[Tensor] = []
    for dtype in dict.fromkeys(gradient.dtype for gradient in gradients):
        of_dtype = [gradient for gradient in gradients if gradient.dtype == dtype]
        norms += torch._foreach_norm(of_dtype, 2, torch.float32)
    norm = torch.linalg.vector_norm(torch.stack(norms))
    nn.utils.clip_grads_with_norm_(parameters, 1.0, norm)
    return full_tensor(norm)


def step_if_finite(optimizer: torch.optim.Optimizer, number: Tensor) -> None:
    """Take the optimizer's step if `number`, a tensor (), is finite on all ranks.

    The device is not waited for: the fused kernel of AdamW looks at `found_inf`, which is there for
    fp16. Where that is 1, weights, moments and step counts keep their bits. (On CPUs and by CUDA;
    Apple's kernel does not look.)
    """
    found_inf = (~number.isfinite()).float()
    if devices.size() > 1:
        dist.all_reduce(found_inf, dist.ReduceOp.MAX)
    if found_inf.device.type == "mps" and found_inf.item():
        return
    # ZeroRedundancyOptimizer has an AdamW of its own inside.
    inner: Any = getattr(optimizer, "optim", optimizer)
    # With offload the parameters are the CPU's.
    inner.found_inf = found_inf.to(optimizer.param_groups[0]["params"][0].device)
    optimizer.step()
    del inner.found_inf
