"""Checkpoints into models: read a base model's sizes, load it, and put a Bone checkpoint into it.

One need not read this to understand Bone.
"""

import os
import re
from collections.abc import Collection, Iterator, Mapping

import torch
from torch import Tensor, nn

from adapt import add_bone
from archive import all_finite, drop_mapped_pages, read_checkpoint
from bone import bone_shape
from host_embedding import HostEmbedding
from quant import CHUNK_NUMEL, Quantized, quantize
from rwkv6 import RWKV, Config, storage_dtype

StrPath = str | os.PathLike[str]
Shape = tuple[int, ...]

# Tensors of a time mix that tell the versions which are not supported, the surest sign first.
UNSUPPORTED = {"r_k": "7", "x_r": "7", "ln_x.weight": "5.0 or 5.1", "time_mix_k": "4"}

# ---- What a base model is ------------------------------------------------------------------------


def read_config(checkpoint: Mapping[str, Tensor], path: StrPath) -> Config:
    """Read version and sizes off a base model's tensors.

    ValueError, naming the version where it is known, for anything but x060 and x052.
    """
    if any(name.endswith(".bone") for name in checkpoint):
        raise ValueError(f"{path}: a Bone checkpoint, not a base model; give the base here")
    n_layer = count_blocks(checkpoint, path)
    # The last block, since the first may have ffnPre in place of its time mix.
    att = f"blocks.{n_layer - 1}.att."
    version = find_version(checkpoint, att)
    if version is None:
        what = describe_unsupported(checkpoint, att)
        raise ValueError(
            f"{path}: {what}; only RWKV-6 (x060) and RWKV-5.2 (x052) are supported here"
        )
    try:
        return config_from_shapes(checkpoint, n_layer, version)
    except ValueError as error:
        raise ValueError(f"{path}: not a complete {version} checkpoint ({error})") from error


def count_blocks(checkpoint: Mapping[str, Tensor], path: StrPath) -> int:
    """Return how many blocks the tensors' names speak of."""
    matches = [re.match(r"blocks\.([0-9]{1,9})\.", name) for name in checkpoint]
    n_layer = 1 + max((int(match[1]) for match in matches if match), default=0)
    # A damaged file can name any block. A block has at least one tensor.
    if n_layer > len(checkpoint):
        raise ValueError(
            f"{path}: {len(checkpoint)} tensors cannot be {n_layer} blocks; "
            "not an RWKV-6 or RWKV-5 checkpoint"
        )
    return n_layer


def find_version(checkpoint: Mapping[str, Tensor], att: str) -> str | None:
    """Return x060, x052, or None where it is another. att: what a time mix's names begin with."""
    if f"{att}time_maa_x" in checkpoint:
        return "x060"
    if f"{att}time_mix_g" not in checkpoint:
        return None
    # RWKV-5.1 has the same names, but one decay per head. RWKV-5.2 has one per channel.
    decay = checkpoint.get(f"{att}time_decay")
    if decay is not None and decay.ndim == 1:
        return None
    return "x052"


def describe_unsupported(checkpoint: Mapping[str, Tensor], att: str) -> str:
    """Say which RWKV a checkpoint of another version is, if any."""
    for name, version in UNSUPPORTED.items():
        if f"{att}{name}" in checkpoint:
            return f"an RWKV-{version} checkpoint"
    return "not an RWKV-6 or RWKV-5 checkpoint"


def config_from_shapes(checkpoint: Mapping[str, Tensor], n_layer: int, version: str) -> Config:
    """Read a model's sizes off its tensors. ValueError where one of these is missing or odd."""

    def shape(name: str, ndim: int = 2) -> Shape:
        if name not in checkpoint:
            raise ValueError(f"{name} is missing")
        found = tuple(checkpoint[name].shape)
        if len(found) != ndim:
            raise ValueError(f"{name} is {found}, but needs {ndim} dimensions")
        return found

    att = f"blocks.{n_layer - 1}.att."
    vocab_size, n_embd = shape("emb.weight")
    _, head_size = shape(f"{att}time_faaaa")
    if n_embd % head_size:
        raise ValueError(f"a width of {n_embd} is not a multiple of the head size {head_size}")
    ranks = {}
    if version == "x060":
        ranks["mix_rank"] = shape(f"{att}time_maa_w2", ndim=3)[1]
        ranks["decay_rank"] = shape(f"{att}time_decay_w1")[1]
    return Config(
        n_layer,
        n_embd,
        vocab_size,
        dim_ffn=shape("blocks.0.ffn.key.weight")[0],
        head_size=head_size,
        **ranks,
        version=version,
        pre_ffn="blocks.0.ffnPre.key.weight" in checkpoint,
        head_qk=shape("head_q.weight")[0] if "head_q.weight" in checkpoint else 0,
    )


# ---- Loading a base model ------------------------------------------------------------------------


def load_model(
    path: StrPath,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    *,
    quant: str = "none",
    parts: Collection[str] = (),
) -> RWKV:
    """Load a base model from a published .pth.

    dtype: of the matrices; None keeps the checkpoint's. quant: `none`, `int8` or `nf4`, of the
    blocks' matrices. parts: texts in the names of parameters that will be trained, and are kept in
    at least float32. ValueError for a missing, misshapen or non-finite tensor; on the meta device
    only shapes are checked.

    The file is mapped into memory. Each tensor's pages are dropped once it is in its place, so
    memory never holds more than the model and one tensor.
    """
    with torch.device("meta"):
        model = RWKV(read_config(read_checkpoint(path, verify=False), path))
    weights = stream_weights(path, model.config, dtype, device=device, quant=quant, parts=parts)
    for name, value in weights:
        module, _, parameter = name.rpartition(".")
        if isinstance(value, Quantized):
            model.set_submodule(module, value)
        else:
            setattr(model.get_submodule(module), parameter, nn.Parameter(value))
    return model


def stream_weights(
    path: StrPath,
    config: Config,
    dtype: torch.dtype | None = None,
    *,
    device: torch.device | str = "cpu",
    quant: str = "none",
    parts: Collection[str] = (),
) -> Iterator[tuple[str, Tensor | Quantized]]:
    """Yield what `load_model` puts into a model, one by one: (name, tensor or Quantized)."""
    has_data = torch.device(device).type != "meta"
    checkpoint = read_checkpoint(path, verify=has_data)
    # RWKV-PEFT saves this mask of models with head_qk, which use `tril` instead.
    checkpoint.pop("copy_mask", None)
    with torch.device("meta"):
        model = RWKV(config)
    expected = dict(model.named_parameters())
    check_names(checkpoint, expected, path, version=config.version)
    for name, parameter in expected.items():
        tensor = checkpoint.pop(name)
        where = f"{path}: {name}"
        check_shape(tensor, parameter.shape, where)
        kept_dtype = storage_dtype(model, name, dtype or tensor.dtype)
        if any(part in name for part in parts):
            kept_dtype = torch.promote_types(kept_dtype, torch.float32)
        if has_data:
            check_numbers(tensor, kept_dtype, where)
        module = model.get_submodule(name.rpartition(".")[0])
        # Nothing here may keep what is yielded: the caller alone decides how long it lives.
        if quant != "none" and name.startswith("blocks.") and isinstance(module, nn.Linear):
            yield name, quantize_named(tensor.to(device), quant, kept_dtype, where=where)
        else:
            yield name, tensor.view(parameter.shape).to(device, kept_dtype, copy=True)
        drop_mapped_pages(tensor)


def check_names(
    checkpoint: Mapping[str, Tensor], expected: Mapping[str, Tensor], path: StrPath, *, version: str
) -> None:
    """Raise ValueError unless a base model has exactly the tensors it should have."""
    for name in expected:
        if name not in checkpoint:
            hint = ""
            if name == "head.weight":
                hint = "; where the head is the embedding, save emb.weight as head.weight, too"
            raise ValueError(f"{path}: {name} is missing{hint}")
    for name in checkpoint:
        if name not in expected:
            raise ValueError(f"{path}: {name} is not part of RWKV {version}")


def check_shape(tensor: Tensor, needed: Shape, where: str) -> None:
    """Raise ValueError unless a tensor has the shape, sides of length 1 apart."""
    if without_ones(tensor.shape) != without_ones(needed):
        raise ValueError(
            f"{where} is {tuple(tensor.shape)}, but the other tensors ask for {tuple(needed)}"
        )


def without_ones(shape: Shape) -> list[int]:
    """Leave out the sides of length 1: of time_maa_*, both (1, 1, C) and (C,) are common."""
    return [size for size in shape if size != 1]


def check_numbers(tensor: Tensor, kept_dtype: torch.dtype, where: str) -> None:
    """Raise ValueError where a tensor is not finite, or would not be in the dtype it is kept in."""
    for chunk in tensor.flatten().split(CHUNK_NUMEL):
        if not all_finite(chunk):
            raise ValueError(
                f"{where} holds NaN or infinite values; "
                "the file is damaged or its training went wrong"
            )
        if kept_dtype == torch.float16 and not all_finite(chunk.half()):
            raise ValueError(
                f"{where} reaches {chunk.abs().max().item():g}, but float16 ends at 65504; "
                "use --precision bf16"
            )


def quantize_named(tensor: Tensor, quant: str, dtype: torch.dtype, *, where: str) -> Quantized:
    """Quantize, with the tensor's name in the ValueError for one that cannot be quantized."""
    try:
        return quantize(tensor, quant, dtype)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


# ---- Bone checkpoints ----------------------------------------------------------------------------


@torch.no_grad()
def load_bone(model: RWKV, path: StrPath) -> RWKV:
    """Put Bone layers into `model`, and a checkpoint's bones and trained parts into place.

    Rank and mode are read from the file. Returns the model. ValueError, with the model unchanged,
    where a tensor of the file has no counterpart of its shape.
    """
    checkpoint = read_checkpoint(path)
    r, mode = check_fits(checkpoint, weight_shapes(model), path)
    add_bone(model, r, mode)
    parameters = dict(model.named_parameters())
    for name, tensor in checkpoint.items():
        parameters[name].copy_(tensor.view_as(parameters[name]))
    return model


def weight_shapes(model: nn.Module) -> dict[str, Shape]:
    """Return {name: shape} of every parameter of a base model, the quantized ones included."""
    shapes: dict[str, Shape] = {name: p.shape for name, p in model.named_parameters()}
    for name, module in model.named_modules():
        if isinstance(module, Quantized):
            shapes[f"{name}.weight"] = module.shape
        if isinstance(module, HostEmbedding):
            shapes[f"{name}.weight"] = module.weight.shape
    return shapes


def rank_and_mode(checkpoint: Mapping[str, Tensor], path: StrPath) -> tuple[int, str]:
    """Read rank and mode of a Bone checkpoint off the shapes of its bones.

    ValueError where it holds no bone, or bones of several ranks or modes.
    """
    found = set()
    for name, tensor in checkpoint.items():
        if not name.endswith(".bone"):
            continue
        shape = tuple(tensor.shape)
        if len(shape) == 2:
            found.add((shape[0], "bone"))
        elif len(shape) == 3 and shape[1] == shape[2]:
            found.add((shape[1], "bat"))
        else:
            raise ValueError(
                f"{path}: {name} is {shape}; (in/r, r, r) or (r, out) is needed, "
                "so it is damaged, or of another method"
            )
    if not found:
        raise ValueError(
            f"{path}: holds no tensor named *.bone; "
            "it is not a Bone checkpoint (a base model, or another method's?)"
        )
    if len(found) > 1:
        all_found = " and ".join(f"{mode} r {r}" for r, mode in sorted(found))
        raise ValueError(f"{path}: mixes {all_found}; one rank and one mode are needed")
    return found.pop()


def check_fits(
    checkpoint: Mapping[str, Tensor], shapes: Mapping[str, Shape], path: StrPath
) -> tuple[int, str]:
    """Check that a Bone checkpoint is finite and fits a base model; return its rank and mode.

    shapes: {name: shape} of the base. ValueError, naming the tensor, for one that does not fit.
    """
    r, mode = rank_and_mode(checkpoint, path)
    for name, tensor in checkpoint.items():
        where = f"{path}: {name}"
        adapted = adapted_shape(name, shapes)
        if adapted and mode == "bat" and any(size % r for size in adapted):
            raise ValueError(
                f"{path}: r {r} of {name} does not divide {tuple(adapted)}; "
                "it was trained on another model"
            )
        needed = bone_shape(adapted, r, mode) if adapted else shapes.get(name)
        if needed is None:
            raise ValueError(
                f"{where} has no counterpart in the base model; it was trained on another model"
            )
        if without_ones(tensor.shape) != without_ones(needed):
            raise ValueError(
                f"{where} is {tuple(tensor.shape)}, but this base model needs {tuple(needed)}; "
                "it was trained on another model"
            )
        if not all_finite(tensor):
            raise ValueError(
                f"{where} holds NaN or infinite values; "
                "its training went wrong, use an earlier checkpoint"
            )
    return r, mode


def adapted_shape(name: str, shapes: Mapping[str, Shape]) -> Shape | None:
    """Return the shape (out, in) of the weight that a bone adapts, None for any other tensor."""
    if not name.startswith("blocks.") or not name.endswith(".bone"):
        return None
    shape = shapes.get(name.removesuffix("bone") + "weight")
    if shape is None or len(shape) != 2:
        return None
    return shape
