"""Bone in any PyTorch model: give its linear layers bones, save and load these, merge them.

    add_bone(model, r=64)                              # the bones alone require gradients
    ...                                                # train them
    torch.save(bone_state(model), "bones.pth")
    load_bone_state(model, torch.load("bones.pth"))    # into a model prepared in the same way
    merge_bone(model)                                  # plain layers again

One need not read this to understand Bone: the layer itself is BoneLinear in bone.py.
"""

import re

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from bone import BoneLinear
from quant import Quantized

# The last part of the name of an output head: head, head_q, lm_head, embed_out.
OUTPUT_HEAD = re.compile(r"(lm_)?head(_\w+)?|embed_out")


def layers_to_adapt(model: nn.Module, names: str | None) -> dict[str, nn.Linear | Quantized]:
    """Return {name: layer} of the linear layers that `add_bone` adapts."""
    layers: dict[str, nn.Linear | Quantized] = {}
    for name, module in model.named_modules():
        # nn.MultiheadAttention multiplies by the weight of its out_proj without calling it.
        is_called = not isinstance(module, NonDynamicallyQuantizableLinear)
        if names is None:
            wanted = not OUTPUT_HEAD.fullmatch(name.rpartition(".")[2])
        else:
            wanted = re.fullmatch(names, name) is not None
        if isinstance(module, nn.Linear | Quantized) and is_called and wanted:
            layers[name] = module
    return layers


def bone_layers(model: nn.Module) -> dict[str, BoneLinear]:
    """Return {name: layer} of the layers of a model that have a bone."""
    return {name: m for name, m in model.named_modules() if isinstance(m, BoneLinear)}


def check_rank(layers: dict[str, nn.Linear | Quantized], r: int) -> None:
    """Raise ValueError, naming ranks that fit, where r does not divide both sides of a weight."""
    shapes = {name: shape_of(layer) for name, layer in layers.items()}
    sizes = {size for shape in shapes.values() for size in shape}
    for name, (out_features, in_features) in shapes.items():
        if in_features % r or out_features % r:
            ranks = (8, 16, 32, 64, 128, 256)
            fitting = [rank for rank in ranks if all(size % rank == 0 for size in sizes)]
            raise ValueError(
                f"bone_r {r} does not divide {name} ({out_features} x {in_features}); "
                f"this model takes {fitting}, or any with mode bone"
            )


def shape_of(layer: nn.Linear | Quantized) -> torch.Size:
    """Return the shape (out, in) of a layer's weight."""
    return layer.shape if isinstance(layer, Quantized) else layer.weight.shape


def add_bone(model: nn.Module, r: int, mode: str = "bat", *, names: str | None = None) -> nn.Module:
    """Freeze a model and give its linear layers bones of rank r.

    names: a regular expression for the whole name of a layer, as in r".*\\.(q_proj|v_proj)";
    without it, every linear layer but an output head gets one. out_proj of nn.MultiheadAttention
    never does: that multiplies by its weights itself.
    Returns the model, changed in place; only the bones require gradients afterwards.
    ValueError where no layer is to be adapted, where the model has bones already, and where r does
    not divide a layer (mode `bat` needs it to); the model is unchanged then.
    """
    if mode not in ("bat", "bone"):
        raise ValueError(
            f"bone mode {mode!r} is unknown: use bat (block affine) or bone (shard sharing)"
        )
    if r < 1:
        raise ValueError(f"bone_r {r} must be at least 1; 64 is the usual choice")
    if bone_layers(model):
        raise ValueError("the model has bones already; merge_bone puts them into its weights")
    layers = layers_to_adapt(model, names)
    if not layers:
        linear = [n for n, m in model.named_modules() if isinstance(m, nn.Linear | Quantized)]
        raise ValueError(f"no layer is to get a bone; linear layers of this model: {linear}")
    if mode == "bat":
        check_rank(layers, r)
    model.requires_grad_(False)
    for name, layer in layers.items():
        if isinstance(layer, Quantized):
            bone_layer = BoneLinear(layer, r, mode)
        else:
            bone_layer = BoneLinear(layer.weight, r, mode, bias=layer.bias)
        model.set_submodule(name, bone_layer)
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            # Without gradients it would multiply by the weights itself, past the bones. This tells
            # it that it cannot.
            module.activation_relu_or_gelu = 0
    return model


def merge_bone(model: nn.Module) -> nn.Module:
    """Put plain linear layers with the merged weights back, in place; return the model."""
    for name, layer in bone_layers(model).items():
        model.set_submodule(name, layer.merged())
    return model


def bone_state(model: nn.Module) -> dict[str, Tensor]:
    """Return {name: bone} of all bones of a model: what there is to save of a fine-tuning."""
    return {f"{name}.bone": layer.bone.detach() for name, layer in bone_layers(model).items()}


@torch.no_grad()
def load_bone_state(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Copy saved bones into a model that `add_bone` has prepared.

    ValueError, with the model unchanged, unless names and shapes are those of its bones.
    """
    bones = bone_state(model)
    for name in sorted(bones.keys() | state.keys()):
        found, wanted = (b[name].shape if name in b else "missing" for b in (state, bones))
        if found != wanted:
            raise ValueError(f"{name}: {found} in the state, {wanted} in the model")
    for name, bone in bones.items():
        bone.copy_(state[name])
