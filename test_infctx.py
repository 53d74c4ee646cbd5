"""--train_type infctx: rows of any length, chunk by chunk, with the gradient of the whole row."""

import pytest
import torch

import binidx
import bone
import build
import data
import estimate
import loss
import memory
import quant
import rwkv6
import train
from conftest import exhaustive
from passes import Passes, detach_state, state_tensors
from test_train import (  # noqa: F401 (three are fixtures)
    arguments,
    base_file,
    column,
    counting,
    folder,
    run,
    true_memory,
)


def gradients(model, batch, **chunks):
    """Loss and {name: gradient} of a micro batch."""
    model.zero_grad()
    value = sum(train.accumulate_gradients(model, [batch], Passes(**chunks))).item()
    return value, {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def check_same(found, expected, near=1e-5):
    assert found[0] == pytest.approx(expected[0], rel=near)
    for name, grad in expected[1].items():
        assert (found[1][name] - grad).norm() <= near * grad.norm() and grad.norm() > 0, name


def trained(flags="", version="x060"):
    """A model ready for training in float32, its bones no longer zero, on version x060 or x052."""
    if version == "x052":
        torch.manual_seed(0)
        parameters = rwkv6.init_model(2, 64, 300, version="x052").named_parameters()
        base = {name: p.detach() + 0.05 * torch.randn_like(p) for name, p in parameters}
        torch.save(base, "base.pth")
    model, *_ = build.build_model(arguments(f"--precision fp32 {flags}"), torch.device("cpu"))
    torch.manual_seed(1)
    for name, p in model.named_parameters():
        if name.endswith(".bone"):
            p.data += 0.02 * torch.randn_like(p)
    return model


@pytest.mark.parametrize("loss_mask", ["pad", "none", "se"])
@pytest.mark.parametrize(
    "flags, version",
    [
        ("", "x060"),
        ("--bone_mode bone", "x060"),
        ("--quant nf4", "x060"),
        ("--quant int8 --bone_mode bone", "x060"),
        ("--train_parts time ln emb head", "x060"),
        ("--train_parts", "x060"),
        ("--train_parts time", "x060"),
        ("", "x052"),
        ("--quant int8", "x052"),
    ],
)
def test_loss_and_every_gradient_are_those_of_the_whole_row(flags, version, loss_mask):
    model = trained(flags, version)
    # 33, 40, 9 and 12 tokens; the ids are bytes + 1.
    documents = [binidx.Binidx("x")[i] for i in (1, 2, 3, 7)]
    batch = data.collate(documents, 32, ("[", "^") if loss_mask == "se" else loss_mask)
    assert batch[2].sum() > 0
    expected = gradients(model, batch)
    for grad_cp, chunk in ((1, 1), (1, 5), (1, 16), (0, 7), (1, 31), (1, 100)):
        model.grad_cp, model.keep_products = bool(grad_cp), True
        check_same(gradients(model, batch, chunk_ctx=chunk), expected)


def test_bptt_cuts_the_gradient_between_groups_of_chunks():
    model = trained()
    batch = data.collate([binidx.Binidx("x")[i] for i in (1, 2)], 32, "pad")
    found = gradients(model, batch, chunk_ctx=5, bptt=3)
    model.zero_grad()
    # The definition, as one graph.
    state, total = model.empty_state(), 0.0
    chunks = zip(*(x.split(5, 1) for x in batch), strict=True)
    for i, (idx, targets, mask) in enumerate(chunks):
        state = detach_state(state) if i % 3 == 0 else state
        counts = loss.Counts(batch[2].sum().item(), 64)
        value, state = loss.loss_fn(model, idx, targets, mask, counts=counts, state=state)
        total += value
    total.backward()
    cut = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    check_same(found, (total.item(), cut))
    whole = gradients(model, batch)[1]
    assert any((cut[name] - whole[name]).norm() > 1e-3 * whole[name].norm() for name in cut)


def test_a_run_cuts_no_document_and_lets_no_state_into_the_next():
    """Rows as whole documents, each from an empty state, train as the plain path does.

    The plain path has a ctx_len that is wide enough for them.
    """
    flags = (
        "--precision fp32 --val_file x --epoch_steps 6 --accumulate_grad_batches 2 --micro_bsz 2"
    )
    run(f"{flags} --proj_dir a --ctx_len 64")
    run(f"{flags} --proj_dir b --ctx_len 8 --train_type infctx --chunk_ctx 7")
    for name in ("loss", "val_loss"):
        assert column(name, "b") == pytest.approx(column(name, "a"), rel=2e-5), name
    assert max(binidx.Binidx("x").sizes) == 40


def test_a_document_longer_than_ctx_len_counts_to_its_end_where_markers_do_too():
    x = [binidx.Binidx("x")[2]]  # 40 tokens, counting from 74
    assert data.collate(x, 8, "pad", cut=False)[0].shape == (1, 39)
    assert data.collate(x, 8, "pad")[0].shape == (1, 8)
    # After 97 there are 98 to 112, and the end.
    assert data.collate(x, 8, ("`", "~"), cut=False)[2].sum() == 16
    assert data.collate(x, 8, ("`", "~"))[2].sum() == 0
    short = [binidx.Binidx("x")[3]]
    assert data.collate(short + x, 16, "none", cut=False)[0].shape == (2, 39)
    assert data.collate(short, 16, "none", cut=False)[0].shape == (1, 16)


@pytest.mark.parametrize("flags", ["", "--quant nf4"])
def test_recomputing_a_block_repeats_no_product(monkeypatch, flags):
    """Count how often each weight is multiplied.

    Once without a graph for each chunk but the last, once with one, and once in the backward pass.
    """
    model = trained(flags)
    batch = data.collate([binidx.Binidx("x")[1]], 32, "pad")
    made = []
    for module in (bone, quant):
        monkeypatch.setattr(
            module,
            "to_dense",
            lambda weight, dtype, plain=quant.to_dense: (
                made.append(id(weight)) or plain(weight, dtype)
            ),
        )
    layers = sum(isinstance(m, bone.BoneLinear) for m in model.modules())
    counts, found = {}, {}
    for keep in (False, True):
        model.grad_cp, model.keep_products = True, keep
        made.clear()
        found[keep] = gradients(model, batch, chunk_ctx=8)
        counts[keep] = len(made) / layers
    assert counts == {False: 3 + 4 * 3, True: 3 + 4 * 2}
    check_same(found[True], found[False])


@pytest.mark.parametrize("grad_cp", [0, 1])
def test_memory_does_not_grow_with_the_row_but_by_the_states_and_all_of_it_is_freed(grad_cp):
    model, peaks = trained(), []
    model.grad_cp, model.keep_products = bool(grad_cp), True
    for chunks in (2, 3, 12, 22):
        idx = torch.randint(300, (2, 16 * chunks))
        model.zero_grad()
        with memory.LiveBytes([idx, *memory.tensors(model)]) as live:
            train.accumulate_gradients(
                model, [(idx, idx, torch.ones(idx.shape))], Passes(chunk_ctx=16)
            )
            storages = [p.grad.untyped_storage() for p in model.parameters() if p.grad is not None]
            assert live.now == sum(
                {storage.data_ptr(): storage.nbytes() for storage in storages}.values()
            )
            peaks.append(live.peak)
    with memory.LiveBytes(memory.tensors(model)) as live:  # and so it is where nothing goes back
        loss.loss_fn(
            model,
            torch.ones(1, 16, dtype=torch.int64),
            torch.ones(1, 16, dtype=torch.int64),
            torch.ones(1, 16),
        )
        assert live.now == 0
    state = model.state_bytes(2)
    assert (
        sum(x.nbytes for x in state_tensors(model.hidden(idx[:, :1], model.empty_state())[1]))
        == state
    )
    assert peaks[3] - peaks[2] <= 10 * state + 3 * 8 * 2 * 160  # and idx, targets, mask themselves
    assert peaks[3] - peaks[2] >= 10 * state


@pytest.mark.parametrize(
    "flags",
    [
        "",
        "--train_parts",
        exhaustive("--quant nf4 --bptt 2"),
        exhaustive("--grad_cp 0 --precision fp32"),
        exhaustive("--bone_mode bone --train_parts emb"),
    ],
)
@pytest.mark.usefixtures("true_memory")
def test_the_expected_peak_is_what_the_tensors_of_a_real_step_take(flags):
    infctx = "--train_type infctx --chunk_ctx 32 --ctx_len 8 --grad_cp 1"
    args = arguments(f"{infctx} --micro_bsz 2 --bone_r 32 {flags}")
    parameters = rwkv6.init_model(5, 128, 300).named_parameters()
    torch.save({name: p.detach().bfloat16() for name, p in parameters}, "base.pth")
    binidx.write_binidx("x", counting([100, 300]))
    parts = estimate.expected_memory(args, torch.device("cpu"))[1]
    model, *_ = build.build_model(args, torch.device("cpu"))
    idx = torch.randint(300, (2, 299))
    with memory.LiveBytes([idx, *memory.tensors(model)]) as live:
        passes = build.make_passes(args, model, torch.device("cpu"))
        train.accumulate_gradients(model, [(idx, idx, torch.ones(idx.shape))], passes)
    assert parts["states between chunks"] == (2 if args.bptt else 8) * model.state_bytes(2)
    assert sum(
        parts[name] for name in ("activations, gradients", "workspace", "states between chunks")
    ) == pytest.approx(live.peak, rel=0.03)


def test_what_infctx_cannot_do_is_refused():
    parameters = rwkv6.init_model(2, 64, 300, head_qk=16).named_parameters()
    torch.save({name: p.detach() for name, p in parameters}, "base.pth")
    problem = "--train_type infctx: head_qk looks at every earlier token, .*; leave infctx out"
    with pytest.raises(ValueError, match=problem):
        run("--train_type infctx")
    problem = "--train_type: state would train initial states; RWKV-PEFT"
    with pytest.raises(ValueError, match=problem):
        run("--train_type state")


@pytest.mark.usefixtures("true_memory")
def test_what_is_too_large_is_advised_infctx(monkeypatch):
    binidx.write_binidx("x", [[5] * 20_001])
    monkeypatch.setattr(memory, "available", lambda device: 0.05e9)
    advice = r"with --.* --train_type infctx --chunk_ctx 256.* it would take 0.\d\d GB"
    with pytest.raises(ValueError, match=advice):
        run("--ctx_len 20000 --micro_bsz 1 --grad_cp 1")
