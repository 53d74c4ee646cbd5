"""AdamW with moments in 8 bits: its codes, its steps beside AdamW's, what it keeps."""

import types

import pytest
import torch

import adamw8bit
import build
import memory
import rwkv6
from adamw8bit import AdamW8bit, block_size, dequantize, dynamic_values, quantize
from adapt import add_bone
from loss import loss_fn

CPU = torch.device("cpu")
# Of a bone, a low-rank matrix with blocks of 32, an LN, and a matrix without blocks.
SHAPES = ((32, 64, 64), (2048, 160), (128,), (7, 1000))


def parameters():
    torch.manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape)) for shape in SHAPES]


def train(optimizer, steps):
    """Take steps on gradients that are partly noise, of many sizes."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        for group in optimizer.param_groups:
            for p in group["params"]:
                noise = torch.randn(p.shape, generator=generator)
                p.grad = 0.3 * p.detach() + noise * torch.rand(p.shape, generator=generator)
        optimizer.step()


# ---- codes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("signed", [True, False])
def test_the_values_are_those_of_bitsandbytes(signed):
    functional = pytest.importorskip("bitsandbytes.functional")
    expected = functional.create_dynamic_map(signed=signed)
    torch.testing.assert_close(dynamic_values(signed=signed), expected, rtol=0, atol=1e-7)


@pytest.mark.parametrize("signed", [True, False])
def test_a_number_takes_the_nearest_value(signed):
    torch.manual_seed(0)
    moments = torch.randn(500, 64) * 10 ** torch.linspace(-20, 5, 500)[:, None]
    moments *= 10 ** (-5 * torch.rand(500, 64))
    if not signed:
        moments = moments.abs()
    codes, scale = quantize(moments, signed=signed)
    assert codes.dtype == torch.uint8
    scaled = (moments / scale).double()
    distances = (scaled[..., None] - dynamic_values(signed=signed).double()).abs()
    found = (dequantize(codes, scale, signed=signed) / scale - scaled).abs()
    # Rounding to bfloat16 moves a number by 1/256 of it at most, away from its nearest value.
    assert (found <= distances.amin(-1) + 2 * scaled.abs() / 256 + 1e-6).all()


def test_zeros_stay_zeros_and_no_other_square_becomes_one():
    zeros = torch.zeros(2, 64)
    for signed in (True, False):
        assert dequantize(*quantize(zeros, signed=signed), signed=signed).equal(zeros)
    squares = torch.ones(1, 64)
    squares[0, 1:] = torch.logspace(-30, -1, 63)
    assert (dequantize(*quantize(squares, signed=False), signed=False) > 0).all()


# ---- steps -------------------------------------------------------------------------------------


def test_it_goes_where_adamw_goes():
    ours, theirs = parameters(), parameters()
    options = {"lr": 1e-2, "betas": (0.9, 0.99), "weight_decay": 0.1}
    train(AdamW8bit(ours, **options), 30)
    train(torch.optim.AdamW(theirs, fused=True, **options), 30)
    for p, expected, start in zip(ours, theirs, parameters(), strict=True):
        difference = (p - expected).norm() / (expected - start).norm()
        if block_size(p.shape):
            assert 0 < difference < 0.02
        else:  # PyTorch's own
            assert p.equal(expected)


def test_the_first_step_is_that_of_adamw():
    """Nothing was coded before it, so it is as exact; a tensor begins when its gradient comes."""
    ours, theirs = parameters(), parameters()
    optimizer = AdamW8bit(ours, lr=1e-2, weight_decay=0.1)
    optimizer.zero_grad()
    ours[0].grad = torch.ones_like(ours[0])
    optimizer.step()
    with torch.no_grad():
        ours[0].copy_(theirs[0])
    optimizer.state[ours[0]].clear()
    train(optimizer, 1)
    train(torch.optim.AdamW(theirs, lr=1e-2, weight_decay=0.1), 1)
    for p, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, expected, rtol=1e-6, atol=1e-6)


def test_the_pieces_that_it_works_in_make_no_difference(monkeypatch):
    whole, pieces = parameters(), parameters()
    train(AdamW8bit(whole, lr=1e-2), 3)
    monkeypatch.setattr(adamw8bit, "CHUNK_NUMEL", 1 << 12)
    train(AdamW8bit(pieces, lr=1e-2), 3)
    assert all(p.equal(expected) for p, expected in zip(pieces, whole, strict=True))


def bits(optimizer):
    """Copies of all that a step may change."""
    found = []
    for p, state in optimizer.state.items():
        found += [x.detach().clone() for x in (p, *state.values())]
    return found


@pytest.mark.parametrize("without_looking", [False, True])
def test_a_step_that_is_not_finite_changes_nothing(monkeypatch, without_looking):
    if without_looking:  # as on a GPU, which would have to be waited for
        monkeypatch.setattr(adamw8bit, "is_known", lambda found_inf: False)
    optimizer = AdamW8bit(parameters(), lr=1e-2, weight_decay=0.1)
    train(optimizer, 2)
    before = bits(optimizer)
    for p in optimizer.param_groups[0]["params"]:
        p.grad = torch.full_like(p, torch.nan)
    optimizer.found_inf = torch.ones(())
    optimizer.step()
    assert all(x.equal(y) for x, y in zip(bits(optimizer), before, strict=True))
    optimizer.found_inf = torch.zeros(())
    train(optimizer, 1)
    assert optimizer.state[optimizer.param_groups[0]["params"][0]]["step"] == 3
    assert not any(x.equal(y) for x, y in zip(bits(optimizer)[:1], before[:1], strict=True))


@pytest.mark.parametrize(
    ("flags", "small"),
    [
        ({}, True),
        ({"optim": "adamw"}, False),
        ({"precision": "fp16"}, False),
        ({"micro_batches": 2}, False),
        ({"train_type": "infctx"}, False),
        ({"devices": 2}, False),
    ],
)
def test_gradients_stay_in_bfloat16_where_that_loses_nothing(flags, small):
    options = {"optim": "adamw8bit", "precision": "bf16", "micro_batches": 1}
    options |= {"train_type": "none", "devices": 1, "num_nodes": 1} | flags
    micro_batches = options.pop("micro_batches")
    gradients = []
    for kept in (False, True):
        torch.manual_seed(0)
        model = add_bone(rwkv6.init_model(2, 128, 100), 32)
        for name, p in model.named_parameters():
            p.requires_grad_("bone" in name or "time" in name or "head" in name)
        if kept:
            build.keep_small_gradients(model, types.SimpleNamespace(**options), micro_batches)
        idx = torch.randint(100, (2, 20))
        with torch.autocast("cpu", torch.bfloat16):
            loss, _ = loss_fn(model, idx, idx, torch.ones(2, 20))
        loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    for name, gradient in gradients[1].items():
        matrix = "bone" in name or name.endswith(("_w1", "_w2"))
        assert gradient.dtype == (torch.bfloat16 if small and matrix else torch.float32), name
        assert gradient.float().equal(gradients[0][name]), name


def test_a_state_dict_is_loaded_as_it_was():
    whole, parts = parameters(), parameters()
    optimizer = AdamW8bit(whole, lr=1e-2)
    train(optimizer, 3)
    first = AdamW8bit(parts, lr=1e-2)
    train(first, 3)
    second = AdamW8bit(parts, lr=1e-2)
    second.load_state_dict(first.state_dict())
    train(optimizer, 1)
    train(second, 1)
    assert all(p.equal(expected) for p, expected in zip(parts, whole, strict=True))
    assert [x.dtype for x in bits(second)] == [x.dtype for x in bits(optimizer)]


def test_parameters_are_float32():
    with pytest.raises(ValueError, match=r"a parameter is torch\.bfloat16"):
        AdamW8bit([torch.nn.Parameter(torch.zeros(64, 64, dtype=torch.bfloat16))])


# ---- memory ------------------------------------------------------------------------------------


def test_it_takes_two_bytes_a_number_and_little_more_while_it_works(monkeypatch):
    monkeypatch.setattr(adamw8bit, "CHUNK_NUMEL", 1 << 15)
    p = torch.nn.Parameter(torch.randn(64, 64, 64))
    optimizer = AdamW8bit([p])
    train(optimizer, 1)
    moments = optimizer.state[p]
    assert sum(x.nbytes for x in moments.values()) <= (2 + 2 * 4 / 256) * p.numel() + 4
    kept = [p, p.grad, *moments.values()]
    kept += [x for signed in (True, False) for x in adamw8bit.tables(CPU, signed=signed)]
    with memory.LiveBytes(kept) as live:
        optimizer.step()
    assert 0.8 * adamw8bit.UPDATE_BYTES <= live.peak / (1 << 15) <= adamw8bit.UPDATE_BYTES


@pytest.mark.parametrize(
    ("shape", "block"),
    [
        ((32, 64, 64), 256),
        ((64, 4096), 256),
        ((4096, 320), 64),
        ((2048, 160), 32),
        ((4095,), 0),
        ((4096,), 0),
        ((1, 1, 4096), 0),
        ((64, 63), 0),
    ],
)
def test_blocks_lie_within_a_row(shape, block):
    assert block_size(shape) == block
