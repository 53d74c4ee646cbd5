"""From the options to the model that is trained, and how batches pass through it.

One need not read this to understand Bone.
"""

import functools
import importlib.util
import itertools
import math
import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

import adamw8bit
import adapt
import checkpoint
import data
import devices
import memory
import rwkv6
import sharding
from archive import read_checkpoint
from host_embedding import HostEmbedding
from loss import loss_fn
from passes import Passes
from quant import Quantized

# Of frozen matrices, by --precision.
DTYPES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "tf32": torch.float32,
}


# ---- model --------------------------------------------------------------------------------------


class BuiltModel(NamedTuple):
    """A model that is ready to be trained, and what its checkpoints hold."""

    model: rwkv6.RWKV
    saved_names: Collection[str]
    save_dtype: Mapping[str, torch.dtype]  # of each of them


def build_for_training(options: Any, device: torch.device) -> BuiltModel:
    """Build the model of resolved options, shared out among the ranks if --strategy says so."""
    shared = sharding.Sharding.of(options.strategy)
    if device.type == "cpu" and shared.frozen:
        memory.give_back_freed()
    if shared.trained:
        return build_sharded_model(options, device)
    return build_model(options, device)


def build_model(
    options: Any, device: torch.device, *, for_device: torch.device | None = None
) -> BuiltModel:
    """Build the model of resolved options; on the meta device without its numbers.

    for_device: where a model on the meta device would run.
    Exactly the trained parameters require gradients, and are float32.
    """
    torch.manual_seed(options.random_seed)
    built = fine_tuned(options, device) if options.load_model else from_scratch(options, device)
    model = built.model
    if keeps_embedding_on_host(built, options, for_device or device):
        model.emb = HostEmbedding(model.emb.weight.detach(), device)
    model.grad_cp = options.grad_cp > 0
    model.keep_products = options.grad_cp < 1
    if model.config.head_qk and options.train_type == "infctx":
        raise ValueError(
            "--train_type infctx: head_qk looks at every earlier token, so that no state can stand "
            "for them; leave infctx out"
        )
    if options.fla and not why_no_fla(options):
        for module in model.modules():
            if isinstance(module, rwkv6.TimeMix):
                module.impl = "fla"
    return built


def keep_small_gradients(model: rwkv6.RWKV, options: Any, micro_batches: int) -> None:
    """Keep the gradients in bfloat16, with adamw8bit, that autocast computes in it.

    They are those of the bones and the low-rank matrices. Not where the gradients of several micro
    batches, chunks or ranks are added up, which needs float32.
    micro_batches: of a step, on this rank.
    """
    one_batch = micro_batches == 1 and options.train_type == "none"
    if options.optim != "adamw8bit" or options.precision != "bf16" or not one_batch:
        return
    if sharding.ranks(options) > 1:
        return
    for name, p in model.named_parameters():
        is_product = name.endswith((".bone", "_w1", "_w2"))
        if p.requires_grad and is_product and adamw8bit.block_size(p.shape):
            p.grad_dtype = torch.bfloat16


def keeps_embedding_on_host(built: BuiltModel, options: Any, device: torch.device) -> bool:
    """Return whether the embedding stays in the memory of a GPU's host.

    Not where it is trained or saved, where the ids are needed on the device, too, or where it is
    shared out among the ranks. (On Apple's GPU, whose memory is the host's, nothing is gained.)
    """
    if device.type in ("cpu", "meta", "mps") or built.model.config.head_qk:
        return False
    if "emb.weight" in built.saved_names:
        return False
    shared = sharding.Sharding.of(options.strategy, sharding.ranks(options)).frozen
    return not shared


def why_no_fla(options: Any) -> str:
    """Return why flash-linear-attention's operator cannot run here; "" if it can."""
    if devices.find(options.accelerator).type == "cpu":
        return "runs on GPUs alone"
    if importlib.util.find_spec("fla") is None:
        return "is not installed (pip install flash-linear-attention)"
    return ""


def from_scratch(options: Any, device: torch.device) -> BuiltModel:
    """Return a new model, all of which is trained."""
    with torch.device("meta" if device.type == "meta" else "cpu"):
        model = rwkv6.init_model(
            options.n_layer,
            options.n_embd,
            options.vocab_size or 65536,
            device=device,
            version=options.my_testing or "x060",
            pre_ffn=bool(options.pre_ffn),
            head_qk=options.head_qk or 0,
        )
    names = dict(model.named_parameters()).keys()
    return BuiltModel(model, names, dict.fromkeys(names, DTYPES[options.precision]))


def fine_tuned(options: Any, device: torch.device) -> BuiltModel:
    """Return the base model with bones, new ones or those of --bone_load.

    What the --bone_load checkpoint had trained is saved again, even where it is not trained any
    further: merging needs it.
    """
    loaded = read_checkpoint(options.bone_load) if options.bone_load else {}
    dtype = DTYPES[options.precision]
    model = checkpoint.load_model(
        options.load_model, dtype, device, quant=options.quant, parts=options.train_parts
    )
    if options.bone_load:
        checkpoint.load_bone(model, options.bone_load)
    else:
        adapt.add_bone(model, options.bone_r, options.bone_mode)
    for name, p in model.named_parameters():
        if not name.endswith(".bone") and any(part in name for part in options.train_parts):
            p.data = p.data.float()
            p.requires_grad_(True)
    saved = loaded.keys() | {name for name, p in model.named_parameters() if p.requires_grad}
    # A tensor is saved as the base has it, a bone as the base has the weight that it adapts.
    base = read_checkpoint(options.load_model, verify=False)
    save_dtype = {name: base[re.sub(r"\bbone$", "weight", name)].dtype for name in saved}
    return BuiltModel(model, saved, save_dtype)


@torch.no_grad()
def build_sharded_model(options: Any, device: torch.device) -> BuiltModel:
    """Build the model of resolved options, shared out among the ranks.

    Where the base is shared out too, the model is made without numbers, and then filled tensor by
    tensor: no rank ever holds all of it.
    """
    if not options.load_model or not sharding.Sharding.of(options.strategy).frozen:
        built = build_model(options, device)
        sharding.shard(built.model, options.strategy, device)
        return built
    built = build_model(options, torch.device("meta"))
    sharding.shard(built.model, options.strategy, device)
    offload = options.strategy.endswith("offload")
    built.model.to_empty(device=torch.device("cpu") if offload else device)
    parameters = dict(built.model.named_parameters())
    for name, p in parameters.items():
        if name.endswith(".bone"):
            p.zero_()
    for name, tensor in tensors_of_files(options, built.model.config, device):
        p = parameters[name]
        p.copy_(sharding.local_shard(tensor.view(p.shape), p))
    return built


def tensors_of_files(
    options: Any, config: rwkv6.Config, device: torch.device
) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, tensor) of all that base and --bone_load hold, one after the other."""
    loaded = read_checkpoint(options.bone_load) if options.bone_load else {}
    dtype = DTYPES[options.precision]
    base = checkpoint.stream_weights(
        options.load_model,
        config,
        dtype,
        device=device,
        quant=options.quant,
        parts=options.train_parts,
    )
    for name, tensor in itertools.chain(base, loaded.items()):
        if isinstance(tensor, Quantized):
            for key, buffer in tensor.named_buffers():
                yield f"{name}.{key}", buffer
        else:
            yield name, tensor


def count_parameters(model: rwkv6.RWKV) -> tuple[int, int]:
    """Return how many numbers are trained, and how many there are, the quantized ones included."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return trained, sum(math.prod(shape) for shape in checkpoint.weight_shapes(model).values())


# ---- precision ----------------------------------------------------------------------------------


def precision(options: Any, device: torch.device) -> tuple[torch.autocast, torch.amp.GradScaler]:
    """Set up the matrix products; return --precision's autocast, and fp16's gradient scaler."""
    dtype = DTYPES[options.precision]
    # "high" is tf32, where a GPU has that.
    torch.set_float32_matmul_precision("high" if options.precision == "tf32" else "highest")
    # Bone's small terms rely on sums in float32 inside of a product.
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    half = dtype != torch.float32
    autocast = torch.autocast(device.type, dtype if half else torch.bfloat16, enabled=half)
    return autocast, torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)


def emulates_bf16(device: torch.device) -> bool:
    """Return whether a GPU has no bfloat16, so that CUDA computes it, more slowly, in float32."""
    if device.type != "cuda":
        return False
    return not torch.cuda.is_bf16_supported(including_emulation=False)


def chunk_ctx(options: Any) -> int:
    """Return how many tokens go through the model at once; 0: whole rows."""
    return options.chunk_ctx if options.train_type == "infctx" else 0


def make_passes(options: Any, model: rwkv6.RWKV, device: torch.device) -> Passes:
    """Say how batches pass through the model, as the options have it."""
    autocast, scaler = precision(options, device)
    engine = sharding.wrap(model, loss_fn, options.strategy)
    embedding = model.emb if isinstance(model.emb, HostEmbedding) else None
    return Passes(
        to_device=functools.partial(data.to_device, device=device, embedding=embedding),
        autocast=autocast,
        scaler=scaler,
        chunk_ctx=chunk_ctx(options),
        bptt=options.bptt,
        ranks=devices.size(),
        max_over_ranks=lambda number: int(devices.max_over_ranks([number])[0]),
        engine=engine,
        no_gradient_sync=functools.partial(sharding.no_gradient_sync, engine),
    )
