"""Bone in any PyTorch model: give its linear layers bones, save and load these, merge them.

    add_bone(model, r=64)                              # the bones alone require gradients
    ...                                                # train them
    torch.save(bone_state(model), "bones.pth")
    load_bone_state(model, torch.load("bones.pth"))    # into a model prepared in the same way
    merge_bone(model)                                  # plain layers again

What else you train (a new classifier, say) you save yourself. Wrap the model in
DistributedDataParallel or compile it after add_bone.

One need not read this to understand Bone: the layer itself is BoneLinear in bone.py.
"""

import re

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import is_lazy

from bone import BoneLinear, check_bone
from quant import Quantized

# The last part of the name of an output head: head, head_q, lm_head, embed_out.
OUTPUT_HEAD = re.compile(r"(lm_)?head(_\w+)?|embed_out")


def linear_layers(model: nn.Module) -> dict[str, nn.Linear | Quantized]:
    """Return {name: layer} of the linear layers of a model; one that has two names, by both."""
    layers: dict[str, nn.Linear | Quantized] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        # nn.MultiheadAttention multiplies by the weight of its out_proj without calling it.
        is_called = not isinstance(module, NonDynamicallyQuantizableLinear)
        if isinstance(module, nn.Linear | Quantized) and is_called:
            layers[name] = module
    return layers


def is_output_head(model: nn.Module, name: str, layer: nn.Module) -> bool:
    """Return whether a layer is an output head, by its name or by what `transformers` says."""
    get = getattr(model, "get_output_embeddings", None)
    return (get and get() is layer) or OUTPUT_HEAD.fullmatch(name.rpartition(".")[2]) is not None


def layers_to_adapt(model: nn.Module, names: str | None) -> dict[str, nn.Linear | Quantized]:
    """Return {name: layer} of the linear layers that `add_bone` adapts.

    ValueError where there are none, or one that cannot be adapted.
    """
    layers = {}
    for name, layer in linear_layers(model).items():
        if re.fullmatch(names, name) if names else not is_output_head(model, name, layer):
            layers[name] = layer
    if not layers:
        some = ", ".join([*linear_layers(model)][:10]) or "none"
        raise ValueError(f"no layer is to get a bone; linear layers of this model: {some}")
    if "" in layers:
        raise ValueError("the model is itself a linear layer: use BoneLinear of bone.py")
    for name, layer in layers.items():
        weight = None if isinstance(layer, Quantized) else layer.weight
        if weight is not None and (is_lazy(weight) or not weight.is_floating_point()):
            raise ValueError(
                f"{name} is a {type(layer).__name__} whose weight is not a matrix of "
                "floating-point numbers; quant.py quantizes for Bone"
            )
    return layers


def bone_layers(model: nn.Module) -> dict[str, BoneLinear]:
    """Return {name: layer} of the layers of a model that have a bone."""
    modules = model.named_modules(remove_duplicate=False)
    return {name: module for name, module in modules if isinstance(module, BoneLinear)}


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
    never does: that multiplies by its weights itself. A subclass of nn.Linear is taken for one. A
    head that shares its weight with an embedding no longer does once it is merged.
    Returns the model, changed in place; only the bones require gradients afterwards.
    ValueError where no layer is to be adapted, where the model has bones already or is wrapped in
    DistributedDataParallel, which would not see them, and where r does not divide a layer (mode
    `bat` needs it to); the model is unchanged then.
    """
    check_bone(r, mode)
    if bone_layers(model):
        raise ValueError("the model has bones already; merge_bone puts them into its weights")
    if any(isinstance(module, DistributedDataParallel) for module in model.modules()):
        raise ValueError("DistributedDataParallel would not see the bones: wrap after add_bone")
    layers = layers_to_adapt(model, names)
    if mode == "bat":
        check_rank(layers, r)
    model.requires_grad_(False)
    adapted: dict[nn.Module, BoneLinear] = {}
    for name, layer in layers.items():
        if layer not in adapted:
            adapted[layer] = with_bone(layer, r, mode)
        model.set_submodule(name, adapted[layer])
    leave_fast_paths(model)
    return model


def with_bone(layer: nn.Linear | Quantized, r: int, mode: str) -> BoneLinear:
    """Return the layer with a new bone."""
    if isinstance(layer, Quantized):
        return BoneLinear(layer, r, mode)
    return BoneLinear(layer.weight, r, mode, bias=layer.bias)


def leave_fast_paths(model: nn.Module) -> None:
    """Have PyTorch's encoder call its layers: in eval mode it would use their weights itself."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer) and bone_layers(module):
            module.activation_relu_or_gelu = 0  # an activation for which it has no other way
        if isinstance(module, nn.TransformerEncoder) and bone_layers(module):
            module.use_nested_tensor = False  # padded rows stay rows


def merge_bone(model: nn.Module) -> nn.Module:
    """Put plain linear layers with the merged weights back, in place; return the model.

    All of it stays frozen. PyTorch's encoder does not get its fast path back.
    """
    merged: dict[nn.Module, nn.Linear] = {}
    for name, layer in bone_layers(model).items():
        if layer not in merged:
            merged[layer] = layer.merged()
        model.set_submodule(name, merged[layer])
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
    for name in sorted(bones.keys() ^ state.keys()):
        where = "state" if name in bones else "model"
        raise ValueError(f"{name} is missing in the {where}; names, r and mode have to be the same")
    for name, bone in bones.items():
        if bone.shape != state[name].shape:
            raise ValueError(f"{name}: {state[name].shape} in the state, {bone.shape} in the model")
    for name, bone in bones.items():
        bone.copy_(state[name])
