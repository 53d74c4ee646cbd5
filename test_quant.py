"""quant.py: nf4 is that of bitsandbytes bit for bit, and int8 is better than its 8 bits.

A model on a quantized base trains, merges and writes as one on the dequantized weights does.
"""

import json
import os
import shutil

import pytest
import torch
import torch.nn.functional as F

import adapt
import archive
import binidx
import bone
import bone_record
import checkpoint
import merge
import quant
import rwkv6
import train
from memory import LiveBytes

KINDS = ["int8", "nf4"]
FIXTURE = os.path.join(os.path.dirname(__file__), "fixtures", "x060_bone.pth")


def matrix(out_features=192, in_features=128, dtype=torch.bfloat16):
    """Normal weights, with rows of zeros, an outlier, a far larger row and a far smaller one."""
    torch.manual_seed(0)
    weight = 0.02 * torch.randn(out_features, in_features)
    weight[:2] = 0
    weight[3, 5] = 3.0
    weight[4] *= 50
    weight[5] *= 1e-3
    return weight.to(dtype)


@pytest.fixture
def base(tmp_path, monkeypatch):
    """Change to a folder with base.pth and ckpt.pth, the reference's tiny model, and give both."""
    monkeypatch.chdir(tmp_path)
    fixture = torch.load(FIXTURE, weights_only=True)
    torch.save(fixture["base"], "base.pth")
    torch.save(fixture["ckpt"], "ckpt.pth")
    return fixture


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_nf4_is_that_of_bitsandbytes(dtype):
    bnb = pytest.importorskip("bitsandbytes.functional")
    weight = matrix(dtype=dtype)
    codes, state = bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    q = quant.quantize(weight, "nf4")
    assert q.codes.flatten().equal(codes.flatten())
    assert q.scale.equal(state.absmax)
    state.dtype = torch.float32
    assert q.dequantize(torch.float32).equal(bnb.dequantize_4bit(codes, state))
    state.dtype = torch.bfloat16
    mine = q.dequantize(torch.bfloat16).view(torch.int16).int()
    theirs = bnb.dequantize_4bit(codes, state).view(torch.int16).int()
    # In units in the last place.
    assert (mine - theirs).abs().max() <= 2


def test_every_code_of_nf4_comes_back_as_its_value():
    values = quant.NF4.repeat(4).view(1, 64) * 0.75
    assert quant.quantize(values, "nf4").dequantize(torch.float32).equal(values)


@pytest.mark.parametrize(
    "blocksize, weight",
    [
        (64, torch.randn(256, 256)),
        (64, matrix().float()),
        (4096, torch.randn(256, 256)),
        (4096, matrix().float()),
        (4096, torch.randn(256, 256) ** 3),
    ],
)
def test_int8_is_nearer_to_the_weight_than_the_8_bits_of_bitsandbytes(blocksize, weight):
    """4096 is the default of bitsandbytes. Only with heavy tails and blocks of 64 is it nearer."""
    bnb = pytest.importorskip("bitsandbytes.functional")
    mine = quant.quantize(weight, "int8").dequantize(torch.float32)
    theirs = bnb.dequantize_blockwise(*bnb.quantize_blockwise(weight, blocksize=blocksize))
    assert (mine - weight).norm() < (theirs - weight).norm()


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_small_weights_are_as_precise_in_float16(kind):
    weight = 2e-4 * torch.randn(64, 256)
    q = quant.quantize(weight, kind)
    exact, half = q.dequantize(torch.float32), q.dequantize(torch.float16).float()
    assert (half - exact).norm() < 1e-3 * exact.norm()


def test_int8_is_off_by_half_a_step_at_most():
    weight = matrix(dtype=torch.float32)
    q = quant.quantize(weight, "int8")
    error = (q.dequantize(torch.float32) - weight).view(-1, 64).abs().amax(1)
    assert (error <= 0.5001 * q.scale.float()).all()
    assert (q.scale.float() <= 1.01 * weight.view(-1, 64).abs().amax(1) / 127).all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_quantized_layer_is_the_linear_layer_of_its_own_weight_and_keeps_no_dense_one(kind):
    q = quant.quantize(matrix(), kind)
    x = torch.randn(2, 5, 128).bfloat16().requires_grad_()
    gy = torch.randn(2, 5, 192).bfloat16()
    saved = []
    remember = torch.autograd.graph.saved_tensors_hooks(saved.append, lambda _: None)
    with remember, LiveBytes([x, gy, *q.buffers()]) as live:
        y = q(x)
        assert live.now == y.nbytes
        assert not saved
        (gx,) = torch.autograd.grad(y, x, gy)
    x2 = x.detach().requires_grad_()
    y2 = F.linear(x2, q.dequantize(torch.bfloat16))
    assert y.equal(y2)
    assert gx.equal(torch.autograd.grad(y2, x2, gy)[0])


@pytest.mark.parametrize("kind", KINDS)
def test_a_float64_weight_becomes_a_float32_layer(kind):
    q = quant.quantize(matrix(dtype=torch.float64), kind)
    assert q(torch.randn(3, 128)).dtype == torch.float32


@pytest.mark.parametrize("mode", ["bat", "bone"])
@pytest.mark.parametrize("kind", KINDS)
def test_bone_on_a_quantized_weight_is_bone_on_the_dequantized_one(kind, mode):
    q = quant.quantize(matrix(dtype=torch.float32), kind)
    results = []
    for weight in (q, q.dequantize(torch.float32)):
        linear = bone.BoneLinear(weight, 16, mode)
        torch.manual_seed(1)
        torch.nn.init.normal_(linear.bone, std=0.1)
        x = torch.randn(7, 128, requires_grad=True)
        y = linear(x)
        y.square().sum().backward()
        results.append((y, x.grad, linear.bone.grad))
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_temporary_is_larger_than_one_layer(kind):
    weight = torch.randn(4096, 1024).bfloat16()
    with LiveBytes([weight]) as live:
        q = quant.quantize(weight, kind)
    # The chunks and what they are joined to; a chunk in float32.
    assert live.peak < 2 * sum(b.nbytes for b in q.buffers()) + 30e6
    with LiveBytes(q.buffers()) as live:
        dense = q.dequantize(torch.bfloat16)
    assert live.peak < dense.nbytes + 10e6


@pytest.mark.parametrize(
    "kind, weight, words",
    [
        ("fp4", torch.ones(64, 64), "'fp4' is unknown: int8 and nf4"),
        ("int8", torch.ones(3, 100), "3 x 100 is not a multiple of 64 numbers"),
        ("nf4", torch.ones(3, 100), "3 x 100 is not a multiple of 64"),
        ("nf4", torch.full((64, 64), torch.nan), "NaN or infinite"),
        ("int8", torch.full((64, 64), torch.inf), "NaN or infinite"),
        ("nf4", torch.full((64, 64), -torch.inf), "NaN or infinite"),
    ],
)
def test_what_cannot_be_quantized_is_refused(kind, weight, words):
    with pytest.raises(ValueError, match=words):
        quant.quantize(weight, kind)


def test_a_model_whose_matrices_do_not_fit_the_block_is_refused_with_the_matrix_named(base):
    torch.manual_seed(0)
    odd = rwkv6.init_model(1, 20, 50, head_size=4)
    torch.save(odd.state_dict(), "odd.pth")
    words = r"^odd.pth: blocks.0.att.receptance.weight: a weight of 20 x 20 is not a multiple of 64"
    with pytest.raises(ValueError, match=words):
        checkpoint.load_model("odd.pth", quant="int8")


@pytest.mark.parametrize("kind", KINDS)
def test_loading_quantizes_the_matrices_of_the_blocks_alone_from_the_dtype_of_the_file(base, kind):
    model = checkpoint.load_model("base.pth", torch.bfloat16, quant=kind)
    plain = checkpoint.load_model("base.pth", torch.bfloat16)
    linears = {name for name, m in plain.named_modules() if isinstance(m, torch.nn.Linear)}
    layers = {name: m for name, m in model.named_modules() if isinstance(m, quant.Quantized)}
    assert set(layers) == linears - {"head"}
    for name, q in layers.items():
        assert q.dtype == torch.bfloat16
        assert q.codes.equal(quant.quantize(base["base"][f"{name}.weight"], kind).codes)
    assert all(p.equal(plain.get_parameter(name)) for name, p in model.named_parameters())
    assert checkpoint.weight_shapes(model) == checkpoint.weight_shapes(plain)


@pytest.mark.parametrize("kind", KINDS)
def test_training_saving_and_merging_under_quantization_give_the_logits_of_training_time(
    base, capsys, kind
):
    documents = [[*(1 + (7 * i + t) % 60 for t in range(30)), 0] for i in range(12)]
    binidx.write_binidx("x", documents)
    flags = (
        "--load_model base.pth --data_file x --bone_r 32 --ctx_len 32 --micro_bsz 4 "
        f"--lr_init 1e-2 --lr_final 1e-2 --precision fp32 --quant {kind}"
    )
    train.train(train.parse_args(flags.split()))
    model = checkpoint.load_bone(checkpoint.load_model("base.pth", quant=kind), "out/rwkv-0.pth")
    # args.json says how it was trained.
    merge.merge("base.pth", "out/rwkv-0.pth", "tuned.pth")
    assert f"{kind} base" in capsys.readouterr().out
    merged = checkpoint.load_model("tuned.pth")
    plain = checkpoint.load_model("base.pth")
    with torch.no_grad():
        expected, found, untouched = (m(base["idx"]) for m in (model, merged, plain))
    bound = 1e-4 if base["base"]["emb.weight"].dtype == torch.float32 else 2e-2
    assert (found - expected).norm() < bound * (expected - untouched).norm()
    words = rf"trained with --quant {kind} \(its bone.json\), but --quant is none"
    with pytest.raises(ValueError, match=words):
        merge.merge("base.pth", "out/rwkv-0.pth", "again.pth", quant="none")
    assert not os.path.exists("again.pth")
    # A checkpoint travels alone; without its record, the flag takes its place.
    shutil.copy("out/rwkv-0.pth", "moved.pth")
    merge.merge("base.pth", "moved.pth", "alone.pth")
    torch.save(torch.load("moved.pth"), "moved.pth")
    merge.merge("base.pth", "moved.pth", "again.pth", quant=kind)
    assert "note:" not in capsys.readouterr().out
    again = archive.read_checkpoint("again.pth")
    tuned = archive.read_checkpoint("tuned.pth")
    assert all(map(torch.equal, again.values(), tuned.values()))
    alone = archive.read_checkpoint("alone.pth")
    assert all(map(torch.equal, alone.values(), tuned.values()))


def test_arguments_that_are_none_are_refused(base):
    for content in ("{", "[]", '{"quant": "4bit"}'):
        with open("args.json", "w") as f:
            f.write(content)
        with pytest.raises(ValueError, match=r"args.json: not the arguments of a training run"):
            bone_record.trained_quant("ckpt.pth", None)
    # A version without --quant wrote this.
    with open("args.json", "w") as f:
        json.dump({"bone_r": 64}, f)
    assert bone_record.trained_quant("ckpt.pth", "nf4") == "nf4"
    assert bone_record.trained_quant("ckpt.pth", None) == "none"


def test_quantized_training_reaches_the_loss_of_bfloat16(base):
    losses = {}
    first = None
    for kind in ("none", "int8", "nf4"):
        model = adapt.add_bone(checkpoint.load_model("base.pth", torch.bfloat16, quant=kind), 32)
        for name, p in model.named_parameters():
            p.requires_grad_(p.requires_grad or "time" in name or "ln" in name)
        optimizer = train.make_optimizer(model, 2e-3)
        idx = base["idx"]
        mask = base["mask"].float()
        for _ in range(20):
            with torch.autocast("cpu", torch.bfloat16):
                loss, _ = train.loss_fn(model, idx[:, :-1], idx[:, 1:], mask)
            if first is None:
                first = loss.item()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        losses[kind] = loss.item()
    assert losses["none"] < 0.5 < 5 < first
    assert losses["int8"] < 1.01 * losses["none"]
    assert losses["nf4"] < 1.05 * losses["none"]
