"""Checkpoints into models: what a base model is, reading it, and putting a Bone checkpoint into it.

One need not read this to understand Bone.
"""

import re

import torch
from torch import nn

from archive import all_finite, drop_mapped_pages, read_checkpoint
from bone import add_bone, bone_shape
from quant import PIECE, Quantized, quantize
from rwkv6 import RWKV, Config, storage_dtype


def config_of(checkpoint, path):
    """Read version and sizes off a checkpoint's tensors. ValueError, naming the version, for anything but x060 and x052."""
    names = checkpoint.keys()
    if any(name.endswith(".bone") for name in names):
        raise ValueError(f"{path}: a Bone checkpoint, not a base model; give the base here")
    n_layer = 1 + max(
        (int(match[1]) for name in names if (match := re.match(r"blocks\.([0-9]{1,9})\.", name))),
        default=0,
    )
    if n_layer > len(names):
        raise ValueError(
            f"{path}: {len(names)} tensors cannot be {n_layer} blocks; not an RWKV-6 or RWKV-5 checkpoint"
        )
    att = f"blocks.{n_layer - 1}.att."  # the first block may have pre_ffn instead
    version = {f"{att}time_maa_x": "x060", f"{att}time_mix_g": "x052"}
    version = next((version[name] for name in version if name in names), "")
    if not version or (
        version == "x052"
        and checkpoint.get(f"{att}time_decay", checkpoint[f"{att}time_mix_g"]).ndim == 1
    ):
        kinds = {"r_k": "7", "x_r": "7", "ln_x.weight": "5.0 or 5.1", "time_mix_k": "4"}
        kind = next(
            (f"an RWKV-{kinds[name]} checkpoint" for name in kinds if att + name in names),
            "not an RWKV-6 or RWKV-5 checkpoint",
        )
        raise ValueError(
            f"{path}: {kind}; only RWKV-6 (x060) and RWKV-5.2 (x052) are supported here"
        )
    try:
        vocab_size, n_embd = checkpoint["emb.weight"].shape
        ranks = (
            {
                "mix_rank": checkpoint[f"{att}time_maa_w2"].shape[1],
                "decay_rank": checkpoint[f"{att}time_decay_w1"].shape[1],
            }
            if version == "x060"
            else {}
        )
        head_size = checkpoint[f"{att}time_faaaa"].shape[1]
        if n_embd % head_size:
            raise ValueError(f"a width of {n_embd} is no multiple of the head size {head_size}")
        return Config(
            n_layer,
            n_embd,
            vocab_size,
            dim_ffn=checkpoint["blocks.0.ffn.key.weight"].shape[0],
            head_size=head_size,
            **ranks,
            version=version,
            pre_ffn="blocks.0.ffnPre.key.weight" in names,
            head_qk=checkpoint["head_q.weight"].shape[0] if "head_q.weight" in names else 0,
        )
    except (KeyError, IndexError, ValueError) as error:
        raise ValueError(f"{path}: not a complete {version} checkpoint ({error})") from error


def load_model(path, dtype=None, device="cpu", quant="none"):
    """Load a published .pth. dtype: of the matrices; None keeps the checkpoint's. quant: `none`, `int8` or `nf4`, of the blocks' matrices.

    The file is mapped; a tensor is placed, then its pages are given back, so memory is never more than the model's and one tensor's.
    Returns an RWKV. ValueError for a missing, misshapen or non-finite tensor. On the meta device, sizes are all that is looked at.
    """
    with torch.device("meta"):
        model = RWKV(config_of(read_checkpoint(path, verify=False), path))
    for name, value in stream(path, model.config, dtype, device, quant):
        module, _, kind = name.rpartition(".")
        if isinstance(value, Quantized):
            model.set_submodule(module, value)
        else:
            setattr(model.get_submodule(module), kind, nn.Parameter(value))
    return model


def stream(path, config, dtype=None, device="cpu", quant="none"):
    """What `load_model` puts into a model, one by one: (name, tensor), or (name, Quantized) for a weight that is to be kept so."""
    checkpoint = read_checkpoint(path, verify=torch.device(device).type != "meta")
    checkpoint.pop(
        "copy_mask", None
    )  # of a model with head_qk that RWKV-PEFT wrote: what `tril` does
    with torch.device("meta"):
        model = RWKV(config)
    expected = dict(model.named_parameters())
    for name in expected.keys() ^ checkpoint.keys():
        raise ValueError(
            f"{path}: {name} is {'missing' if name in expected else f'not part of RWKV {config.version}'}"
        )
    for name, meta in expected.items():
        tensor = checkpoint.pop(name)
        if tensor.shape != meta.shape and tensor.squeeze().shape != meta.squeeze().shape:
            raise ValueError(
                f"{path}: {name} is {tuple(tensor.shape)}, but the other tensors ask for {tuple(meta.shape)}"
            )
        module, kept = name.rpartition(".")[0], storage_dtype(model, name, dtype or tensor.dtype)
        if torch.device(device).type != "meta":
            for piece in tensor.flatten().split(PIECE):
                if not all_finite(piece):
                    raise ValueError(
                        f"{path}: {name} holds NaN or infinite values; the file is damaged or its training went wrong"
                    )
                if kept == torch.float16 and not all_finite(piece.half()):
                    raise ValueError(
                        f"{path}: {name} reaches {piece.abs().max().item():g}, but float16 ends at 65504; use --precision bf16"
                    )
        if (
            quant != "none"
            and name.startswith("blocks.")
            and isinstance(model.get_submodule(module), nn.Linear)
        ):
            try:
                yield name, quantize(tensor.to(device), quant, kept)
            except ValueError as error:
                raise ValueError(f"{path}: {name}: {error}") from error
        else:
            yield name, tensor.view(meta.shape).to(device, kept, copy=True)
        drop_mapped_pages(tensor)


def weight_shapes(model):
    """{name: shape} of every parameter of a base model, the quantized ones included."""
    quantized = {
        f"{name}.weight": m.shape for name, m in model.named_modules() if isinstance(m, Quantized)
    }
    return {name: p.shape for name, p in model.named_parameters()} | quantized


def rank_and_mode(checkpoint, path):
    """Rank and mode of a Bone checkpoint (dict of tensors), read off the shapes. ValueError where it holds no bone or several ranks."""
    shapes = [tensor.shape for name, tensor in checkpoint.items() if name.endswith(".bone")]
    for shape in shapes:
        if len(shape) not in (2, 3) or (len(shape) == 3 and shape[1] != shape[2]):
            raise ValueError(
                f"{path}: a bone is {tuple(shape)}; (in/r, r, r) or (r, out) is needed, so it is damaged, or of another method"
            )
    found = {(shape[-2], "bat" if len(shape) == 3 else "bone") for shape in shapes}
    if not found:
        raise ValueError(
            f"{path}: holds no tensor named *.bone; it is not a Bone checkpoint (a base model, or another method's?)"
        )
    if len(found) > 1:
        raise ValueError(
            f"{path}: mixes {' and '.join(f'{mode} r {r}' for r, mode in sorted(found))}; one rank and one mode are needed"
        )
    return found.pop()


@torch.no_grad()
def load_bone(model, path):
    """Put Bone layers into `model` and load a checkpoint: rank and mode from the file, bones and trained parts into place.

    Returns the model. ValueError, with the model unchanged, where a tensor of the file has no counterpart of its shape.
    """
    checkpoint = read_checkpoint(path)
    r, mode = check_fits(checkpoint, weight_shapes(model), path)
    add_bone(model, r, mode)
    parameters = dict(model.named_parameters())
    for name, tensor in checkpoint.items():
        parameters[name].copy_(tensor.view_as(parameters[name]))
    return model


def check_fits(checkpoint, shapes, path):
    """Rank and mode of a Bone checkpoint; ValueError unless its tensors are finite and fit the base model's {name: shape}."""
    r, mode = rank_and_mode(checkpoint, path)
    for name, tensor in checkpoint.items():
        linear = (
            shapes.get(name.removesuffix("bone") + "weight", ())
            if name.endswith(".bone") and name.startswith("blocks.")
            else ()
        )
        linear = linear if len(linear) == 2 else None
        expected = bone_shape(linear, r, mode) if linear else shapes.get(name)
        if expected is None:
            raise ValueError(
                f"{path}: {name} has no counterpart in the base model; it was trained on another model"
            )
        if mode == "bat" and linear and any(n % r for n in linear):
            raise ValueError(
                f"{path}: r {r} of {name} does not divide {tuple(linear)}; it was trained on another model"
            )
        if [n for n in tensor.shape if n != 1] != [
            n for n in expected if n != 1
        ]:  # time_maa_*: (1, 1, C) and (C,) are both about
            raise ValueError(
                f"{path}: {name} is {tuple(tensor.shape)}, but this base model needs {tuple(expected)}; it was trained on another model"
            )
        if not all_finite(tensor):
            raise ValueError(
                f"{path}: {name} holds NaN or infinite values; its training went wrong, use an earlier checkpoint"
            )
    return r, mode
