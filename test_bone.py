"""Bone: exactly the layer whose merged weight it never builds; checkpoints fit or are refused."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from adapt import add_bone
from bone import BoneLinear, merge_weight
from checkpoint import load_bone


def naive_weight(weight, b):
    """W' block by block, as the formula reads."""
    merged = weight.clone()
    if b.ndim == 3:
        r = b.shape[1]
        for i in range(0, weight.shape[0], r):
            for j in range(0, weight.shape[1], r):
                block = weight[i : i + r, j : j + r]
                B = b[j // r]
                merged[i : i + r, j : j + r] = block + block @ B + B
    else:
        for j in range(weight.shape[1]):
            merged[:, j] += b[j % len(b)]
    return merged


def layer(mode, out_features=24, in_features=32, r=8, dtype=torch.float64):
    torch.manual_seed(0)
    linear = BoneLinear(torch.randn(out_features, in_features, dtype=dtype), r, mode)
    nn.init.normal_(linear.bone, std=0.3)
    return linear


def test_the_case_that_is_traced_by_hand():
    """That of the head of bone.py."""
    W = torch.tensor([[1, 0, 2, 1], [0, 1, 1, 0], [1, 1, 0, 0], [2, 0, 0, 1.0]])
    B = torch.tensor([[[0, 1], [0, 0]], [[1, 0], [0, 0.0]]])
    x = torch.tensor([1, 1, 1, 2.0])
    merged = torch.tensor([[1, 2, 5, 1], [0, 1, 2, 0], [1, 3, 1, 0], [2, 2, 0, 1.0]])
    assert merge_weight(W, B).equal(merged)
    assert (merged @ x).tolist() == [10, 3, 5, 6]
    linear = BoneLinear(W, 2)
    linear.bone.data = B
    assert linear(x).tolist() == [10, 3, 5, 6]


CASES = [
    ("bat", 24, 32, 8),
    ("bat", 64, 16, 16),
    ("bone", 24, 32, 8),
    ("bone", 10, 30, 8),
    ("bone", 10, 7, 16),
]


@pytest.mark.parametrize("mode, out_features, in_features, r", CASES)
def test_output_and_gradients_are_those_of_the_merged_weight(mode, out_features, in_features, r):
    linear = layer(mode, out_features, in_features, r)
    x = torch.randn(3, 5, in_features, dtype=torch.float64, requires_grad=True)
    gy = torch.randn(3, 5, out_features, dtype=torch.float64)
    ours = linear(x)
    b = linear.bone.detach().requires_grad_()
    theirs = F.linear(x, naive_weight(linear.weight.detach(), b))
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    our_gradients = torch.autograd.grad(ours, [x, linear.bone], gy)
    their_gradients = torch.autograd.grad(theirs, [x, b], gy)
    torch.testing.assert_close(our_gradients, their_gradients, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("mode, out_features, in_features, r", CASES)
def test_merging_writes_the_weight_of_the_formula(mode, out_features, in_features, r):
    linear = layer(mode, out_features, in_features, r)
    weight = linear.weight.detach()
    b = linear.bone.detach()
    merged = merge_weight(weight, b)
    torch.testing.assert_close(merged, naive_weight(weight, b), rtol=1e-13, atol=1e-13)


def test_merging_in_pieces_is_merging_whole():
    weight = torch.randn(4096, 2048)
    b = torch.randn(32, 64, 64) * 0.02
    w = weight.view(64, 64, 32, 64)
    delta = torch.einsum("aibj,bjk->aibk", w, b) + b.transpose(0, 1)
    whole = weight + delta.reshape(4096, 2048)
    torch.testing.assert_close(merge_weight(weight, b), whole, rtol=1e-5, atol=1e-5)


def test_merging_rounds_once_to_the_dtype_of_the_base():
    weight = torch.randn(64, 64).bfloat16()
    b = (torch.randn(4, 16, 16) * 0.01).bfloat16()
    merged = merge_weight(weight, b)
    assert merged.dtype == torch.bfloat16
    exact = naive_weight(weight.double(), b.double())
    same = merged == exact.to(torch.bfloat16)
    # Now and then float32 meets a tie of bfloat16.
    assert same.float().mean() > 0.999


def test_a_new_bone_changes_nothing():
    linear = BoneLinear(torch.randn(32, 64), 16)
    x = torch.randn(7, 64)
    torch.testing.assert_close(linear(x), F.linear(x, linear.weight))


@pytest.mark.parametrize(
    "size", [1, 0.02], ids=["most of it through W", "most of it through the tile"]
)
def test_a_bone_far_below_one_step_of_bfloat16_still_counts(size):
    """The change W' x - W x comes out whole on average, at a tenth of a bfloat16 step of x or y."""
    torch.manual_seed(0)
    linear = BoneLinear((size * torch.randn(64, 128)).bfloat16(), 64)
    nn.init.normal_(linear.bone, std=3e-5 * size)
    x = 1 + torch.rand(50000, 128)
    W = linear.weight.double()
    merged = naive_weight(W, linear.bone.detach().double())
    before = F.linear(x.double(), W)
    change = F.linear(x.double(), merged) - before
    with torch.no_grad():
        ours = linear(x).double() - before
    assert change.abs().mean() < 0.1 * 2**-8 * before.abs().mean()
    assert (ours * change).sum() / change.square().sum() == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("mode", ["bat", "bone"])
def test_autocast_computes_in_bfloat16_and_trains_in_float32(mode):
    linear = layer(mode, 64, 64, 16, torch.bfloat16)
    x = torch.randn(2, 9, 64, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = linear(x)
    y.float().square().mean().backward()
    assert y.dtype == torch.bfloat16
    assert linear.bone.grad.dtype == torch.float32
    assert x.grad.dtype == torch.float32
    merged = naive_weight(linear.weight.double(), linear.bone.detach().double())
    exact = F.linear(x.double(), merged)
    assert ((y.double() - exact).norm() / exact.norm()).item() < 0.01


class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        block = {"key": nn.Linear(32, 64, bias=False), "ln": nn.LayerNorm(32)}
        self.blocks = nn.ModuleList([nn.ModuleDict(block)])
        self.head = nn.Linear(32, 100, bias=False)


def test_add_bone_adapts_the_layers_of_the_blocks_and_freezes_the_rest():
    model = add_bone(Tiny(), 16)
    assert isinstance(model.blocks[0]["key"], BoneLinear)
    assert isinstance(model.head, nn.Linear)
    assert [n for n, p in model.named_parameters() if p.requires_grad] == ["blocks.0.key.bone"]
    assert model.blocks[0]["key"].bone.shape == (2, 16, 16)
    assert add_bone(Tiny(), 16, "bone").blocks[0]["key"].bone.shape == (16, 64)


@pytest.mark.parametrize(
    "r, mode, words",
    [(24, "bat", "does not divide blocks.0.key"), (0, "bat", "at least 1"), (8, "lora", "unknown")],
)
def test_a_rank_or_mode_that_cannot_be_is_refused(r, mode, words):
    model = Tiny()
    with pytest.raises(ValueError, match=words):
        add_bone(model, r, mode)
    assert isinstance(model.blocks[0]["key"], nn.Linear)
    with pytest.raises(ValueError, match=words.removesuffix(" blocks.0.key")):
        BoneLinear(model.blocks[0]["key"].weight, r, mode)


def test_a_checkpoint_brings_its_rank_mode_and_trained_parts(tmp_path):
    for mode in ("bat", "bone"):
        model = add_bone(Tiny(), 8, mode)
        nn.init.normal_(model.blocks[0]["key"].bone)
        nn.init.normal_(model.blocks[0]["ln"].weight)
        parameters = dict(model.named_parameters())
        saved = {n: p.detach() for n, p in parameters.items() if "bone" in n or ".ln." in n}
        torch.save(saved, tmp_path / "ckpt.pth")
        loaded = dict(load_bone(Tiny(), tmp_path / "ckpt.pth").named_parameters())
        assert all(torch.equal(loaded[n], t) for n, t in saved.items())


@pytest.mark.parametrize(
    "checkpoint, words",
    [
        ({"blocks.0.ln.weight": torch.ones(32)}, "no tensor named"),
        (
            {"blocks.0.key.bone": torch.ones(4, 8, 8), "blocks.9.key.bone": torch.ones(4, 8, 8)},
            "blocks.9.key.bone has no counterpart",
        ),
        ({"blocks.0.key.bone": torch.ones(5, 8, 8)}, "needs"),
        ({"blocks.0.key.bone": torch.ones(8, 65)}, "needs"),
        ({"blocks.0.key.bone": torch.ones(1, 24, 24)}, "does not divide"),
        ({"blocks.0.key.bone": torch.ones(4, 8, 8), "blocks.0.ln.weight": torch.ones(33)}, "needs"),
        (
            {"blocks.0.key.bone": torch.ones(4, 8, 8), "blocks.0.ffn.bone": torch.ones(8, 64)},
            "mixes",
        ),
    ],
)
def test_a_checkpoint_of_another_model_is_refused_and_the_model_left_alone(
    tmp_path, checkpoint, words
):
    torch.save(checkpoint, tmp_path / "ckpt.pth")
    model = Tiny()
    with pytest.raises(ValueError, match=words):
        load_bone(model, tmp_path / "ckpt.pth")
    assert isinstance(model.blocks[0]["key"], nn.Linear)


class LargestTensor(torch.utils._python_dispatch.TorchDispatchMode):
    """Finds the number of elements of the largest tensor that operators return, W's views apart."""

    def __init__(self, weight):
        super().__init__()
        self.weight = weight.untyped_storage().data_ptr()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in torch.utils._pytree.tree_leaves(out):
            if isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() != self.weight:
                self.numel = max(self.numel, t.numel())
        return out


def test_no_tensor_of_the_size_of_the_weight_is_made():
    """Forward and backward make activations, never (out, in): with few tokens all are small."""
    linear = layer("bat", 1024, 1024, 64, torch.float32)
    x = torch.randn(2, 1024, requires_grad=True)
    with LargestTensor(linear.weight) as largest:
        linear(x).sum().backward()
    assert 0 < largest.numel <= linear.bone.numel()
