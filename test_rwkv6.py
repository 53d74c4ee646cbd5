"""The model against two independent judges.

They are what the reference implementation computed, and the `rwkv` inference package.
"""

import os

import pytest
import torch

import adapt
import bone
import checkpoint
import rwkv6
from train import loss_fn, make_optimizer
from wkv6 import kernel_problem

FORMS = ["reference", "chunked", "compiled"]


@pytest.fixture(scope="module", params=["x060", "x052"])
def reference(request, tmp_path_factory):
    """The reference's tiny RWKV-6 or RWKV-5.

    A folder with base.pth and ckpt.pth, and the numbers that the reference computed from them.
    """
    folder = tmp_path_factory.mktemp(request.param)
    fixture = torch.load(
        os.path.join(os.path.dirname(__file__), "fixtures", f"{request.param}_bone.pth"),
        weights_only=True,
    )
    for name in ("base", "ckpt"):
        torch.save(fixture[name], folder / f"{name}.pth")
    return folder, fixture


@pytest.fixture(params=FORMS)
def form(request, monkeypatch):
    if request.param == "compiled" and kernel_problem():
        pytest.skip(kernel_problem())
    monkeypatch.setattr(rwkv6.TimeMix, "impl", request.param)


def load(folder, fixture, bone_from="ckpt.pth"):
    """base + Bone in float32, with what the reference trained requiring gradients."""
    model = checkpoint.load_model(folder / "base.pth", torch.float32)
    if bone_from:
        checkpoint.load_bone(model, folder / bone_from)
    else:
        adapt.add_bone(model, fixture["config"]["bone_r"])
    for name, p in model.named_parameters():
        p.requires_grad_(name in fixture["ckpt"])
    return model


def relative(ours, theirs):
    return ((ours.double() - theirs.double()).norm() / theirs.double().norm()).item()


def test_logits_loss_and_gradients_are_the_reference_s(reference, form):
    folder, fixture = reference
    model, idx = load(folder, fixture), fixture["idx"]
    assert (model(idx[:, :-1]) - fixture["logits"]).abs().max() < 1e-4
    for model.grad_cp in (False, True):
        model.zero_grad()
        loss, _ = loss_fn(model, idx[:, :-1], idx[:, 1:], fixture["mask"])
        loss.backward()
        assert abs(loss.item() / fixture["loss"] - 1) < 1e-5
        grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
        assert grads.keys() == fixture["grad_norms"].keys()
        for name, norm in fixture["grad_norms"].items():
            assert grads[name].norm().item() == pytest.approx(norm, rel=1e-4), name
        for name, grad in fixture["grads"].items():
            assert relative(grads[name], grad) < 1e-4, name


def test_merged_weights_are_the_reference_s(reference):
    _, fixture = reference
    for name, merged in fixture["merged"].items():
        b = fixture["ckpt"][name.removesuffix("weight") + "bone"]
        assert (bone.merge_weight(fixture["base"][name].float(), b) - merged).abs().max() < 1e-6


@pytest.mark.parametrize("shares", [(5, 2, 3, 4), (2, 1, 1, 4), (1, 1, 4)])
def test_the_mixture_and_its_gradients_are_those_of_its_formula(shares):
    torch.manual_seed(0)
    x, previous = torch.randn(2, 2, 3, 4, dtype=torch.float64, requires_grad=True).unbind()
    share = torch.randn(shares, dtype=torch.float64, requires_grad=True)
    mixed = rwkv6.Mixture.apply(x, previous, share)
    torch.testing.assert_close(mixed, x + (previous - x) * share)
    assert torch.autograd.gradcheck(rwkv6.Mixture.apply, (x, previous, share))


def test_the_squared_relu_and_its_gradient_are_those_of_its_formula():
    torch.manual_seed(0)
    x = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(rwkv6.SquaredReLU.apply(x), torch.relu(x) ** 2)
    assert torch.autograd.gradcheck(rwkv6.SquaredReLU.apply, (x,))


def test_twenty_steps_of_training_are_the_reference_s(reference):
    folder, fixture = reference
    config, idx = fixture["config"], fixture["idx"]
    model = load(folder, fixture, bone_from=None)
    optimizer = make_optimizer(model, config["lr"], betas=tuple(config["betas"]), eps=config["eps"])
    losses, norms = fixture["traj_losses"], fixture["traj_grad_norms"]
    for expected, expected_norm in zip(losses, norms, strict=True):
        loss, _ = loss_fn(model, idx[:, :-1], idx[:, 1:], fixture["mask"])
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(
            [p for p in model.parameters() if p.requires_grad], config["grad_clip"]
        )
        optimizer.step()
        optimizer.zero_grad()
        assert loss.item() == pytest.approx(expected, rel=1e-4)
        assert norm.item() == pytest.approx(expected_norm, rel=1e-3)
    trained = dict(model.named_parameters())
    for name, final in fixture["traj_final"].items():
        assert relative(trained[name], final) < 1e-3, name


def test_the_rwkv_package_reads_the_merged_model_and_agrees(reference, tmp_path):
    folder, fixture = reference
    import merge

    # A float32 file: while loading a bfloat16 one, the package rounds the normalized embedding.
    base = {name: tensor.float() for name, tensor in fixture["base"].items()}
    torch.save(base, tmp_path / "base.pth")
    merge.merge(tmp_path / "base.pth", folder / "ckpt.pth", tmp_path / "merged.pth")
    os.environ["RWKV_JIT_ON"] = "0"
    os.environ["RWKV_CUDA_ON"] = "0"
    from rwkv.model import RWKV

    judge = RWKV(model=str(tmp_path / "merged"), strategy="cpu fp32")
    ours = checkpoint.load_model(tmp_path / "merged.pth", torch.float32)(fixture["idx"][:1])
    theirs, _ = judge.forward(fixture["idx"][0].tolist(), None, full_output=True)
    assert (ours[0] - theirs).abs().max() < 1e-3


def test_recurrent_mode_is_parallel_mode(reference, form):
    folder, fixture = reference
    model, idx = load(folder, fixture), fixture["idx"]
    state, logits = model.empty_state(), []
    with torch.no_grad():
        for part in idx.split([1, 1, 7, 1, 20, 11], dim=1):  # a token at a time and in pieces
            out, state = model(part, state)
            logits.append(out)
        assert (torch.cat(logits, 1) - model(idx)).abs().max() < 1e-5


def test_gradients_flow_through_a_carried_state(reference):
    folder, fixture = reference
    model, idx = load(folder, fixture), fixture["idx"][:1]
    model(idx).square().mean().backward()
    whole = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    for model.grad_cp in (False, True):
        first, state = model(idx[:, :13], model.empty_state())
        second, _ = model(idx[:, 13:], state)
        model.zero_grad()
        torch.cat([first, second], 1).square().mean().backward()
        for name, grad in whole.items():
            assert relative(dict(model.named_parameters())[name].grad, grad) < 1e-4, name


def test_matrices_keep_the_dtype_of_the_file_and_the_small_rest_is_float32(reference):
    model = checkpoint.load_model(reference[0] / "base.pth")
    assert model.blocks[0].att.key.weight.dtype == model.emb.weight.dtype == torch.bfloat16
    assert model.blocks[0].att.time_decay.dtype == model.blocks[0].ln1.weight.dtype == torch.float32
    idx = reference[1]["idx"]
    expected = load(*reference, bone_from=None)(idx)
    assert (model(idx).float() - expected).abs().max() < 0.1  # without autocast too


def identity(n, scale):
    return scale * torch.eye(n)


def test_the_matrices_of_a_new_model_are_as_rwkv_lm_describes():
    model = rwkv6.init_model(3, 128, 300)
    att, ffn = model.blocks[1].att, model.blocks[1].ffn
    assert model.emb.weight.abs().max() <= 1e-4
    assert ffn.key.weight.shape == (448, 128)
    for zero in (att.output, ffn.value, ffn.receptance):
        assert not zero.weight.any()
    head = model.head.weight  # orthogonal columns of length 0.5 sqrt(vocab / n_embd)
    torch.testing.assert_close(head.T @ head, identity(128, 0.25 * 300 / 128), rtol=0, atol=1e-4)
    key = att.key.weight
    torch.testing.assert_close(key @ key.T, identity(128, 0.01), rtol=0, atol=1e-5)
    assert att.ln_x.weight[0].item() == pytest.approx((2 / 3) ** 0.7)
    assert model(torch.arange(5)[None]).shape == (1, 5, 300)
    for n_layer, n_embd in ((3, 128), (1, 64)):
        model = rwkv6.init_model(n_layer, n_embd, 300)
        assert all(p.isfinite().all() for p in model.parameters())


def test_the_mixtures_and_decays_of_a_new_model_are_as_rwkv_lm_describes():
    i = torch.arange(128) / 128
    block = rwkv6.init_model(3, 128, 300).blocks[1]
    for name, kept in {"x": i ** (2 / 3), "v": i ** (2 / 3) + 0.15, "g": i ** (1 / 3)}.items():
        torch.testing.assert_close(getattr(block.att, f"time_maa_{name}")[0, 0], 1 - kept)
    torch.testing.assert_close(block.ffn.time_maa_k[0, 0], 1 - i ** (8 / 27))
    decay = block.att.time_decay
    assert decay[0, 0, 0] == -6
    assert decay[0, 0, -1] == -1

    old = rwkv6.init_model(3, 128, 300, version="x052").blocks[1]
    torch.testing.assert_close(old.att.time_mix_v[0, 0], i ** (2 / 3) + 0.15)
    torch.testing.assert_close(old.ffn.time_mix_r[0, 0], i ** (2 / 3))
    assert old.att.time_decay.shape == (2, 64)
    assert old.att.time_decay.flatten().equal(decay.flatten())

    extras = rwkv6.init_model(3, 128, 300, pre_ffn=True, head_qk=16)
    torch.testing.assert_close(extras.blocks[0].ffnPre.time_mix_k[0, 0], i)
    head_k = extras.head_k.weight
    torch.testing.assert_close(head_k @ head_k.T, identity(16, 0.01), rtol=0, atol=1e-5)
    assert not extras.head_q.weight.any()
    assert not extras.blocks[0].ffnPre.value.weight.any()


@pytest.fixture
def with_extras():
    """A model with pre_ffn and head_qk, its parameters disturbed: in a new one both do nothing."""
    torch.manual_seed(0)
    model = rwkv6.init_model(2, 64, 30, pre_ffn=True, head_qk=16)
    for p in model.parameters():
        p.data += 0.1 * torch.randn_like(p)
    return model


def test_pre_ffn_and_head_qk_are_what_rwkv_lm_defines(with_extras, tmp_path):
    model, idx = with_extras, torch.randint(30, (2, 9))
    block = model.blocks[0]
    x = block.ln0(model.emb(idx))
    h = block.ln1(x)  # a channel mix in place of the time mix, of RWKV-5 in RWKV-6 too
    before = torch.nn.functional.pad(h, (0, 0, 1, -1))
    pre = block.ffnPre
    k, r = (h * mix + before * (1 - mix) for mix in (pre.time_mix_k, pre.time_mix_r))
    x = x + torch.sigmoid(pre.receptance(r)) * pre.value(torch.relu(pre.key(k)) ** 2)
    x, _ = model.blocks[1](x + block.ffn(block.ln2(x), None)[0], (None, None, None))
    x = model.ln_out(x)
    c = (model.head_q(x) @ model.head_k(x).mT / 16).masked_fill(torch.ones(9, 9).tril() == 0, 0)
    expected = model.head(x) + c @ torch.nn.functional.one_hot(idx, 30).float()
    assert (model(idx) - expected).abs().max() < 1e-5
    assert c.abs().max() > 0.1

    # RWKV-PEFT saves a copy_mask too.
    tensors = {**dict(model.named_parameters()), "copy_mask": torch.ones(9, 9).tril()}
    torch.save(tensors, tmp_path / "extras.pth")
    loaded = checkpoint.load_model(tmp_path / "extras.pth")
    assert loaded.config == model.config
    assert "pre_ffn, head_qk 16" in str(model.config)
    assert loaded(idx).equal(model(idx))
    with pytest.raises(ValueError, match="at least 2"):
        rwkv6.init_model(1, 64, 30, pre_ffn=True)


def test_pre_ffn_and_head_qk_in_recurrent_mode_and_in_the_loss(with_extras):
    model, idx = with_extras, torch.randint(30, (2, 9))
    state, logits = model.empty_state(), []
    for part in idx.split([3, 1, 5], dim=1):
        out, state = model(part, state)
        logits.append(out)
    assert (torch.cat(logits, 1) - model(idx)).abs().max() < 1e-5
    targets, mask = torch.randint(30, (2, 9)), torch.rand(2, 9).round()
    logits = model(idx)
    losses = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), targets.flatten(), reduction="none"
    )
    plain = losses @ mask.flatten() / mask.sum()
    wrapped = plain + 0.5e-4 / 18 * logits.max(-1).values.square().sum()
    ours, _ = loss_fn(model, idx, targets, mask)
    assert ours.item() == pytest.approx(plain.item(), rel=1e-5)
    parameters = list(model.parameters())
    found = torch.autograd.grad(ours, parameters)
    expected = torch.autograd.grad(wrapped, parameters)
    for a, e in zip(found, expected, strict=True):
        assert (a - e).norm() <= 1e-4 * e.norm()


# ---- checkpoints that are not for us -------------------------------------------------------------


def refused(tmp_path, tensors, words):
    torch.save(tensors, tmp_path / "x.pth")
    with pytest.raises(ValueError, match=words) as error:
        checkpoint.load_model(tmp_path / "x.pth")
    assert "\n" not in str(error.value) and "x.pth" in str(error.value)


@pytest.mark.parametrize(
    "names, words",
    [
        (["blocks.0.att.time_mix_k", "blocks.0.att.time_first"], "an RWKV-4"),
        (["blocks.0.att.time_mix_k", "blocks.0.att.ln_x.weight"], "an RWKV-5.0 or 5.1"),
        (["blocks.0.att.r_k", "blocks.0.att.x_r"], "an RWKV-7"),
        (["blocks.0.att.key.bone"], "a Bone checkpoint"),
        (["model.layers.0.mlp.weight"], "has Hugging Face's names"),
        (["blocks.0.att.time_maa_x"], "not a complete x060"),
        (["blocks.0.att.time_mix_g"], "not a complete x052"),
    ],
)
def test_other_checkpoints_are_named_for_what_they_are(tmp_path, names, words):
    refused(tmp_path, {name: torch.ones(4, 4) for name in names}, words)


def test_missing_misshapen_and_nan_tensors_are_named(reference, tmp_path):
    base = reference[1]["base"]
    name = "blocks.1.att.gate.weight"
    refused(tmp_path, {k: v for k, v in base.items() if k != name}, f"{name} is missing")
    refused(tmp_path, {**base, "blocks.1.extra": torch.ones(2)}, "blocks.1.extra is not part of")
    refused(tmp_path, {**base, name: torch.ones(128, 64)}, f"{name} is .128, 64.")
    refused(tmp_path, {**base, name: torch.full((128, 128), float("nan"))}, f"{name} holds NaN")
    refused(
        tmp_path, {**base, name: torch.full((128, 128), float("inf"))}, f"{name} holds NaN or inf"
    )


class Evil:
    def __reduce__(self):
        return os.system, ("touch executed",)


def test_a_pickle_with_code_is_refused_and_not_executed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused(tmp_path, {"emb.weight": Evil()}, "nothing was executed")
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04 but no zip", b"\x80\x02]q\x00."])
def test_files_that_are_no_checkpoints_are_refused(tmp_path, content):
    (tmp_path / "x.pth").write_bytes(content)
    with pytest.raises(ValueError, match="checkpoint"):
        checkpoint.load_model(tmp_path / "x.pth")


def test_a_cut_checkpoint_is_refused(reference, tmp_path):
    whole = (reference[0] / "base.pth").read_bytes()
    for size in (len(whole) // 2, len(whole) - 10):
        (tmp_path / "x.pth").write_bytes(whole[:size])
        with pytest.raises(ValueError, match="cut or damaged"):
            checkpoint.load_model(tmp_path / "x.pth")
    with pytest.raises(FileNotFoundError):
        checkpoint.load_model(tmp_path / "none.pth")
