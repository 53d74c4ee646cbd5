"""train.py learns, and trains what it says and nothing else.

A run is a function of its command line; what cannot be done is refused in one line.
"""

import csv
import json
import math
import os
import pathlib
import re
import shlex
import shutil
import sys
import types
import zipfile

import pytest
import torch
import torch.nn.functional as F

import adapt
import archive
import binidx
import check_data
import checkpoint
import cli
import data
import devices
import evaluate
import memory
import plan
import run_state
import rwkv6
import train
import training_data
from passes import Passes

EXPECTED = memory.expected
DEFAULTS = (
    "--load_model base.pth --data_file x --bone_r 16 --ctx_len 32 --micro_bsz 4 --epoch_steps 4 "
    "--lr_init 1e-2 --lr_final 1e-2 --accelerator cpu --grad_cp 0 --compile 0 "
)


def tiny(dtype=torch.bfloat16, n_embd=64, vocab_size=300):
    """A base model as a dict, disturbed so that no tensor is zero and every gradient flows."""
    torch.manual_seed(0)
    model = rwkv6.init_model(2, n_embd, vocab_size)
    return {
        name: (p.detach() + 0.05 * torch.randn_like(p)).to(dtype)
        for name, p in model.named_parameters()
    }


def bone_of(base, r=16, mode="bat"):
    """A checkpoint of new bones and the time and ln parts of the base in the file `base`."""
    model = adapt.add_bone(checkpoint.load_model(base), r, mode)
    return {
        name: p.detach()
        for name, p in model.named_parameters()
        if name.endswith(".bone") or "time" in name or "ln" in name
    }


def counting(lengths):
    """Documents that count up by 1 from various places: easy to learn, with no token above 259."""
    return [[40 + (17 * i + t) % 220 for t in range(n - 1)] + [0] for i, n in enumerate(lengths)]


@pytest.fixture(scope="module")
def base_file(tmp_path_factory):
    """base.pth, and PyTorch on one thread.

    Models this small gain nothing from a second one: on a busy machine the two wait for each other.
    """
    threads = torch.get_num_threads()
    path = tmp_path_factory.mktemp("base") / "base.pth"
    torch.set_num_threads(1)
    torch.save(tiny(), path)
    yield path
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def folder(base_file, tmp_path, monkeypatch):
    """Every test stands in a folder with base.pth and the data set x, 12 documents.

    matplotlib is as if not installed, and memory is not looked for: both take longer than training.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        memory, "expected", lambda *_, **__: {"weights": 0, "optimizer": 0, "workspace": 0}
    )
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    shutil.copy(base_file, "base.pth")
    binidx.write_binidx("x", counting([20, 33, 40, 9, 25, 30, 33, 12, 28, 33, 31, 18]))


@pytest.fixture
def true_memory(folder, monkeypatch):
    monkeypatch.setattr(memory, "expected", EXPECTED)


def arguments(flags=""):
    """The resolved options of a run."""
    return plan.resolve_options(train.parse_args(shlex.split(DEFAULTS + flags)))


def run(flags=""):
    train.train(train.parse_args(shlex.split(DEFAULTS + flags)))


def read(path):
    return torch.load(path, weights_only=True)


def column(name, proj_dir="out"):
    with open(f"{proj_dir}/loss.csv") as f:
        return [float(row[name]) for row in csv.DictReader(f) if row[name]]


# ---- what a run does ----------------------------------------------------------------------------


@pytest.mark.parametrize("mode, matplotlib", [("bat", True), ("bone", False)])
def test_training_lowers_the_loss_and_writes_its_files(monkeypatch, capsys, mode, matplotlib):
    if matplotlib:
        monkeypatch.delitem(sys.modules, "matplotlib.figure")
        pytest.importorskip("matplotlib.figure")
    run(f"--epoch_steps 24 --bone_mode {mode}")
    losses, tensors, new = column("loss"), read("out/rwkv-0.pth"), bone_of("base.pth", 16, mode)
    assert len(losses) == 24 and losses[-1] < 0.75 * losses[0]
    assert set(os.listdir("out")) == {
        "rwkv-0.pth",
        "resume-24.pth",
        "args.json",
        "train_log.txt",
        "loss.csv",
    } | ({"loss.png"} if matplotlib else set())
    assert json.loads(pathlib.Path("out/args.json").read_text())["bone_r"] == 16
    assert "epoch 0: mean loss" in pathlib.Path("out/train_log.txt").read_text()
    assert type(tensors) is dict and {n: t.shape for n, t in tensors.items()} == {
        n: t.shape for n, t in new.items()
    }
    assert all(t.dtype == torch.bfloat16 and not t.equal(new[name]) for name, t in tensors.items())
    wrote, follow = capsys.readouterr().out.splitlines()[-2:]
    assert re.fullmatch(
        r"wrote out/rwkv-0.pth%s; peak memory \d+\.\d\d GB" % (" and out/loss.png" * matplotlib),
        wrote,
    )
    merge_py = pathlib.Path(train.__file__).with_name("merge.py")
    assert follow == f"next: python {merge_py} base.pth out/rwkv-0.pth out/tuned.pth"


@pytest.mark.parametrize(
    "flags, expected",
    [
        ("", {"bone", "time", "ln"}),
        ("--train_parts", {"bone"}),
        ("--train_parts time", {"bone", "time"}),
        ("--train_parts emb head", {"bone", "emb", "head"}),
        ("""--train_parts '["time",' '"ln"]'""", {"bone", "time", "ln"}),
    ],
)
def test_train_parts_says_what_is_trained_and_the_rest_stays_to_the_bit(
    monkeypatch, flags, expected
):
    models, plain = [], train.build_for_training

    def build_for_training(options, device):
        built = plain(options, device)
        models.append(built.model)
        return built

    monkeypatch.setattr(train, "build_for_training", build_for_training)
    run(flags)
    tensors, base = read("out/rwkv-0.pth"), read("base.pth")
    for name, p in models[-1].named_parameters():
        kinds = (
            {"bone"}
            if name.endswith(".bone")
            else {kind for kind in ("time", "ln", "emb", "head") if kind in name}
        )
        assert (name in tensors) == bool(kinds & expected), name
        assert name.endswith(".bone") or (name in tensors) == (
            not p.equal(base[name].to(p.dtype))
        ), name


def test_a_run_is_a_function_of_its_command_line():
    for proj_dir, flags in (("a", ""), ("b", ""), ("c", "--grad_cp 1"), ("d", "--random_seed 2")):
        run(f"--proj_dir {proj_dir} {flags}")
    assert column("loss", "a") == column("loss", "b") and all(
        map(torch.equal, read("a/rwkv-0.pth").values(), read("b/rwkv-0.pth").values())
    )
    assert column("loss", "c") == pytest.approx(
        column("loss", "a"), rel=1e-4
    )  # recomputed activations are the same activations
    assert column("loss", "d") != column("loss", "a")


@pytest.mark.parametrize(
    "dtype, precision, near",
    [(torch.float32, "fp32", 1e-5), (torch.bfloat16, "fp32", 1e-5), (torch.float32, "bf16", 2e-2)],
)
def test_the_first_loss_is_that_of_the_base_and_checkpoints_have_its_dtype(dtype, precision, near):
    torch.save(tiny(dtype), "base.pth")
    run(f"--precision {precision}")
    idx, targets, mask = data.batch(binidx.Binidx("x"), 0, data.BatchConfig(4, 32))
    losses = F.cross_entropy(
        checkpoint.load_model("base.pth", torch.float32)(idx).flatten(0, 1),
        targets.flatten(),
        reduction="none",
    )
    assert column("loss")[0] == pytest.approx(
        (losses @ mask.flatten() / mask.sum()).item(), rel=near
    )
    assert {tensor.dtype for tensor in read("out/rwkv-0.pth").values()} == {dtype}


def test_held_out_loss_is_the_mean_over_its_tokens_before_and_after(capsys):
    binidx.write_binidx("held", counting([30, 12, 40]))
    run("--val_file held --epoch_count 2 --epoch_steps 8")
    before, middle, after = column("val_loss")
    assert after < middle < before
    said = capsys.readouterr().out
    assert re.search(f"before training: {before:.4f}\n(.|\n)*, held-out loss {after:.4f}\n", said)

    a_run = types.SimpleNamespace(
        model=checkpoint.load_model("base.pth", torch.float32),
        passes=Passes(),
        device=torch.device("cpu"),
    )
    found = []
    for micro_bsz in (1, 2, 3):
        options = arguments(f"--val_file held --micro_bsz {micro_bsz}")
        a_run.plan = types.SimpleNamespace(data=training_data.TrainingData.open(options, 300))
        found.append(evaluate.val_loss(a_run))
    assert found == pytest.approx(found[:1] * 3, rel=1e-5)
    assert found[0] == pytest.approx(before, rel=2e-2)


def test_held_out_data_that_is_trained_on_is_said(capsys):
    run("--val_file x --epoch_steps 1")
    assert "note: --val_file holds the same as --data_file" in capsys.readouterr().out


def test_a_part_that_is_held_out_is_measured_and_never_trained_on(capsys):
    run("--val_split 0.25 --epoch_steps 4")
    said = capsys.readouterr().out
    assert "x: 3 of 12 documents are held out (--val_split 0.25)\n" in said
    sizes = binidx.Binidx("x").sizes
    parts = training_data.TrainingData.open(arguments("--val_split 0.25 --micro_bsz 1"), 300)
    held_out = parts.held_out.numbers.tolist()
    # Each document has a first token of its own.
    whole = [document[0] for document in binidx.Binidx("x")]
    trained = {parts.micro_batch(i)[0][0, 0].item() for i in range(3 * 9)}
    assert {whole.index(token) for token in trained} == set(range(12)) - set(held_out)
    tokens = sum(sizes) - sum(sizes[held_out])
    assert f"9 documents, {tokens} tokens, " in said
    measured = [idx[0, 0].item() for idx, _, _ in parts.held_out_batches()]
    assert [whole.index(token) for token in measured] == held_out
    assert len(column("val_loss")) == 2
    # A loss that is not finite is named by the document's number in the file.
    text = check_data.describe_bad_rows(parts.documents, [math.nan], 0, config=parts.batches)
    (row,) = data.rows_of(parts.documents, 0, parts.batches)
    assert text == f"documents {parts.documents.numbers[row]}, counted from 0"
    with pytest.raises(ValueError, match=r"saved with --val_split 0\.25, but --val_split is 0\.5;"):
        run("--val_split 0.5 --epoch_steps 8 --resume")
    # A state of before it came has no such flag.
    now, then = {"val_split": 0.0, "train_type": "none"}, {"train_type": "none"}
    assert run_state._means_the_same("val_split", now, then)
    assert not run_state._means_the_same("val_split", {**now, "val_split": 0.1}, then)


def test_the_form_of_conversations_is_said_each_time(capsys):
    record = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    save(json.dumps([record] * 3).encode(), "c.json")
    save(json.dumps([record] * 2).encode(), "v.json")
    flags = "--load_model '' --n_layer 1 --n_embd 64 --data_file c.json --val_file v.json "
    for proj_dir in "ab":
        run(f"{flags} --loss_mask qa --epoch_steps 1 --proj_dir {proj_dir}")
        said = capsys.readouterr().out
        assert said.count("c.json: 3 conversations (messages)\n") == 1
        assert said.count("v.json: 2 conversations (messages)\n") == 1
        assert 0 < column("loss", proj_dir)[0] < 20


@pytest.mark.parametrize(
    "flags, steps",
    [
        ("", 3),
        ("--accumulate_grad_batches 2", 2),
        ("--micro_bsz 5 --loss_mask none", 3),
        ("--dataload only --micro_bsz 1", 12),
        ("--dataload get", 3),
        ("--dataload get --ctx_len 8 --micro_bsz 4", 10),
    ],
)
def test_an_epoch_is_the_data_once(flags, steps):
    run("--epoch_steps 0 " + flags)  # 12 documents, 312 tokens
    assert len(column("loss")) == steps and all(0 < loss < 20 for loss in column("loss"))


@pytest.mark.parametrize(
    "flags, saved",
    [
        ("--epoch_count 3 --epoch_save 2", {1, 2}),
        ("--epoch_count 2 --epoch_save 9", {1}),
        ("--epoch_begin 5 --epoch_count 2", {5, 6}),
    ],
)
def test_checkpoints_are_named_by_epoch(flags, saved):
    run("--epoch_steps 1 " + flags)
    assert {path.name for path in pathlib.Path("out").glob("rwkv-*.pth")} == {
        f"rwkv-{epoch}.pth" for epoch in saved
    }


def test_bone_load_goes_on_where_the_checkpoint_ended():
    torch.save(tiny(torch.float32), "base.pth")
    run("--precision fp32 --epoch_count 2 --proj_dir whole")
    run("--precision fp32 --proj_dir half")
    flags = (
        DEFAULTS.replace("--bone_r 16 ", "")
        + "--precision fp32 --epoch_begin 1 --bone_load half/rwkv-0.pth --proj_dir half"
    )
    train.train(train.parse_args(flags.split()))  # rank and mode are the checkpoint's
    assert column("loss", "half")[:5] == pytest.approx(
        column("loss", "whole")[:5], rel=1e-5
    ) and column("step", "half") == list(range(8))


def test_training_goes_on_over_the_quantized_base_of_the_checkpoint():
    run("--quant nf4")
    run("--bone_load out/rwkv-0.pth --epoch_begin 1")
    for proj_dir in ("out", "other"):
        run(f"--bone_load out/rwkv-0.pth --epoch_begin 2 --proj_dir {proj_dir}")
        with open(f"{proj_dir}/args.json") as f:
            assert json.load(f)["quant"] == "nf4"


def test_data_that_is_not_there_is_found_out_before_the_base_is_loaded(monkeypatch):
    found, load = [], checkpoint.load_model
    monkeypatch.setattr(
        checkpoint,
        "load_model",
        lambda path, dtype, device, **rest: (
            found.append(device.type) or load(path, dtype, device, **rest)
        ),
    )
    for flags in ("--data_file gone", "--val_file gone"):
        with pytest.raises(ValueError, match=f"{flags}: No such file"):
            run(flags)
    assert not found


def test_what_a_loaded_checkpoint_trained_is_in_the_next_checkpoint():
    run("--proj_dir first --train_parts time ln emb")
    run("--proj_dir second --bone_load first/rwkv-0.pth --train_parts ln --lr_init 0 --lr_final 0")
    first, second = read("first/rwkv-0.pth"), read("second/rwkv-0.pth")
    assert second.keys() == first.keys() and all(second[name].equal(first[name]) for name in first)


def test_pretraining_saves_a_complete_model():
    run("--load_model '' --n_layer 2 --n_embd 64 --vocab_size 300 --epoch_steps 20")
    assert (
        checkpoint.load_model("out/rwkv-0.pth").config == rwkv6.init_model(2, 64, 300).config
        and column("loss")[-1] < 0.9 * column("loss")[0]
    )


# ---- steps in which nothing counts --------------------------------------------------------------

ANSWER = [[1 + b for b in f"User: {i}\n\nAssistant: {i}{i}".encode()] + [0] for i in range(3)]
NO_ANSWER = [[1 + b for b in b"no marker at all"] + [0]] * 2
IN_ORDER = "--data_file qa --loss_mask qa --data_shuffle 0 --micro_bsz 1 "


def test_a_step_in_which_nothing_counts_changes_nothing_and_is_counted(monkeypatch):
    binidx.write_binidx("qa", [ANSWER[0], *NO_ANSWER, *ANSWER[1:]])
    run(IN_ORDER + "--epoch_steps 5 --save_steps 1 --keep 9 --weight_decay 0.1")
    states = [read(f"out/resume-{n}.pth") for n in range(1, 6)]
    abouts = [json.loads(state.pop("about").numpy().tobytes()) for state in states]
    assert all(tensor.equal(states[2][name]) for name, tensor in states[0].items())
    assert states[0]["step.blocks.0.att.key.bone"] == 1
    assert states[4]["step.blocks.0.att.key.bone"] == 3
    assert not states[3]["weights.blocks.0.att.key.bone"].equal(
        states[2]["weights.blocks.0.att.key.bone"]
    )
    assert [about["progress"]["empty"] for about in abouts] == [0, 1, 2, 2, 2]
    assert column("step") == [0, 3, 4] and min(column("loss")) > 0
    mean = sum(column("loss")) / 3
    log = pathlib.Path("out/train_log.txt").read_text()
    assert f"mean loss {mean:.4f}, 2 steps so far in which no token counts\n" in log

    # Gone on from the midst of these steps, it is the same run.
    os.mkdir("parts")
    shutil.copy("out/resume-2.pth", "parts")
    run(IN_ORDER + "--epoch_steps 5 --save_steps 1 --weight_decay 0.1 --proj_dir parts --resume")
    whole, parts = read("out/rwkv-0.pth"), read("parts/rwkv-0.pth")
    assert all(tensor.equal(parts[name]) for name, tensor in whole.items())
    assert f"mean loss {mean:.4f}, 2 steps" in pathlib.Path("parts/train_log.txt").read_text()


def test_a_step_whose_tokens_are_another_rank_s_is_taken(monkeypatch):
    """All ranks know the counts of all, and go the same way."""
    binidx.write_binidx("qa", [ANSWER[0], *NO_ANSWER])
    monkeypatch.setattr(devices, "sum_over_ranks", lambda numbers: [n + 7 for n in numbers])
    run(IN_ORDER + "--epoch_steps 3")
    assert column("step") == [0, 1, 2]


def test_a_run_in_which_nothing_counts_is_no_success():
    binidx.write_binidx("qa", [*NO_ANSWER, ANSWER[0]])
    with pytest.raises(ValueError, match="no token counts in any of 2 steps, so nothing was learn"):
        run(IN_ORDER + "--epoch_steps 2")
    assert not os.path.exists("out/rwkv-0.pth")


def test_a_state_from_before_these_steps_were_counted_is_gone_on_from():
    run("--epoch_steps 4 --save_steps 2 --keep 2")
    state = read("out/resume-2.pth")
    about = json.loads(state["about"].numpy().tobytes())
    names = ("step", "losses", "overflows", "bad", "bad_in_a_row")
    about["progress"] = {name: about["progress"][name] for name in names}
    in_bytes = bytearray(json.dumps(about).encode())
    os.mkdir("parts")
    about_tensor = torch.frombuffer(in_bytes, dtype=torch.uint8)
    torch.save(state | {"about": about_tensor}, "parts/resume-2.pth")
    run("--epoch_steps 4 --proj_dir parts --resume")
    whole, parts = read("out/rwkv-0.pth"), read("parts/rwkv-0.pth")
    assert all(tensor.equal(parts[name]) for name, tensor in whole.items())


# ---- optimizer, learning rate -------------------------------------------------------------------


def reference_learning_rate(global_step, epochs, lr_init, lr_final, warmup_steps):
    """As RWKV-PEFT has it: global_step counts from the run's beginning, real_step from epoch 0.

    epochs: (epoch_begin, epoch_count, epoch_steps).
    """
    epoch_begin, epoch_count, epoch_steps = epochs
    real_step = global_step + epoch_begin * epoch_steps
    if lr_final == lr_init:
        lr = lr_init
    else:
        assert epoch_count * epoch_steps != warmup_steps  # where the reference divides by zero
        progress = (real_step - warmup_steps + 1) / (epoch_count * epoch_steps - warmup_steps)
        progress = min(1, max(0, progress))
        lr = (
            lr_init + (lr_final - lr_init) * progress
            if 0 in (lr_final, lr_init)
            else lr_init * math.exp(math.log(lr_final / lr_init) * progress)
        )
    return lr * (0.2 + 0.8 * global_step / warmup_steps) if global_step < warmup_steps else lr


@pytest.mark.parametrize("warmup_steps", [-1, 0, 1, 7, 35])
@pytest.mark.parametrize(
    "lr_init, lr_final", [(1e-3, 1e-3), (1e-2, 1e-4), (1e-3, 0), (0, 1e-3), (1e-5, 1e-3)]
)
@pytest.mark.parametrize("epoch_begin, epoch_count", [(0, 1), (0, 3), (1, 3), (3, 2)])
def test_the_learning_rate_of_every_step_is_the_reference_s(
    epoch_begin, epoch_count, lr_init, lr_final, warmup_steps
):
    options = types.SimpleNamespace(lr_init=lr_init, lr_final=lr_final, warmup_steps=warmup_steps)
    the_plan = types.SimpleNamespace(
        first_step=epoch_begin * 10, learning_rate_steps=epoch_count * 10, options=options
    )
    for n in range(epoch_count * 10):
        ours = train.learning_rate(epoch_begin * 10 + n, the_plan)
        assert ours == pytest.approx(
            reference_learning_rate(
                n, (epoch_begin, epoch_count, 10), lr_init, lr_final, warmup_steps
            ),
            rel=1e-9,
        ), n


def test_a_run_follows_the_curve():
    flags = "--epoch_begin 1 --epoch_count 3 --epoch_steps 4 "
    run(flags + "--lr_init 1e-2 --lr_final 1e-3 --warmup_steps 2")
    assert column("lr") == pytest.approx(
        [reference_learning_rate(n, (1, 3, 4), 1e-2, 1e-3, 2) for n in range(12)], rel=1e-6
    )


@pytest.mark.parametrize("version", ["x060", "x052"])
@pytest.mark.parametrize("layerwise_lr, weight_decay", [(1, 0.0), (1, 0.1), (0, 0.0), (0, 0.1)])
def test_parameters_are_grouped_as_the_reference_groups_them(version, layerwise_lr, weight_decay):
    model = adapt.add_bone(rwkv6.init_model(2, 64, 300, version=version), 16).requires_grad_(True)
    names = {p: name for name, p in model.named_parameters()}
    found = {
        names[p]: (group["lr"], group["lr_scale"], group["weight_decay"])
        for group in train.make_optimizer(
            model, 1e-3, weight_decay=weight_decay, layerwise_lr=layerwise_lr
        ).param_groups
        for p in group["params"]
    }
    for p, name in names.items():
        if layerwise_lr and "time_" in name:
            scale, decay = (
                2.0 if name in ("blocks.0.att.time_decay", "blocks.1.att.time_decay") else 1.0,
                0.0,
            )
        else:
            scale, decay = 1.0, weight_decay if len([n for n in p.shape if n > 1]) >= 2 else 0.0
        assert found[name] == (1e-3 * scale, scale, decay), name


# ---- what is refused ----------------------------------------------------------------------------


class Code:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def save(content, path="bad.pth"):
    pathlib.Path(path).write_bytes(content) if isinstance(content, bytes) else torch.save(
        content, path
    )


def a_flipped_bit():
    content = bytearray(pathlib.Path("base.pth").read_bytes())
    content[len(content) // 2] ^= 1
    save(bytes(content))


def repacked(method=zipfile.ZIP_STORED, **changes):
    """Write bad.pth: base.pth with other contents of the records that are named in `changes`."""
    with zipfile.ZipFile("base.pth") as base, zipfile.ZipFile("bad.pth", "w", method) as bad:
        for name in base.namelist():
            bad.writestr(name, changes.get(name.rpartition("/")[2], base.read(name)))


def compressed():
    repacked(zipfile.ZIP_DEFLATED)


def reaching_into_the_next():
    repacked(**{"3": b"shorter than the tensor"})


def test_attributes_of_a_tensor_in_a_file_are_left_there():
    tensor = torch.ones(2)
    tensor.detach = tensor.note = 1
    save({"a": tensor, "b": torch.nn.Parameter(torch.ones(3))})
    read_again = archive.read_checkpoint("bad.pth")
    assert (
        read_again["a"].equal(torch.ones(2))
        and {*vars(read_again["a"])} == {"is_mapped"}
        and not read_again["b"].requires_grad
    )


def of_an_nf4_run():
    os.mkdir("old")
    save(bone_of("base.pth"), "old/rwkv-0.pth")
    save(b'{"quant": "nf4"}', "old/args.json")


BASE, BONES, ONE = "--load_model bad.pth", "--bone_load bad.pth", torch.ones(1)


@pytest.mark.parametrize(
    "flags, says, prepare",
    [
        ("--load_model gone.pth", "gone.pth: No such file", None),
        (BASE, "bad.pth: not a PyTorch checkpoint", lambda: save(b"")),
        (
            BASE,
            "bad.pth: not a PyTorch checkpoint",
            lambda: save(b"version https://git-lfs.github.com/spec/v1\n"),
        ),
        (
            BASE,
            "bad.pth: a cut or damaged",
            lambda: save(pathlib.Path("base.pth").read_bytes()[:20_000]),
        ),
        (BASE, "nothing was executed", lambda: save({"emb.weight": Code()})),
        (BASE, "bad.pth: not a model checkpoint", lambda: save([1, 2])),
        (BASE, "bad.pth: a cut or damaged PyTorch checkpoint (the checksum of", a_flipped_bit),
        (
            BASE,
            "bad.pth: a cut or damaged PyTorch checkpoint (it claims to hold more than it does)",
            compressed,
        ),
        (
            BASE,
            "bad.pth: head.weight claims to be (1099511627776, 64), which the file does not hold",
            lambda: save(tiny() | {"head.weight": torch.ones(1, 64).expand(2**40, 64)}),
        ),
        (
            BASE,
            "tensors that share their content claim",
            lambda: save(tiny() | dict.fromkeys(map(str, range(500)), tiny()["head.weight"])),
        ),
        (
            BASE,
            "bad.pth: a cut or damaged PyTorch checkpoint (its tensors are not what it holds)",
            reaching_into_the_next,
        ),
        (
            BASE,
            "bad.pth: saved in the form before PyTorch 1.6; save it again",
            lambda: torch.save(tiny(), "bad.pth", _use_new_zipfile_serialization=False),
        ),
        (
            BASE,
            "1000000000 blocks",
            lambda: save(tiny() | {"blocks.999999999.att.time_maa_x": ONE}),
        ),
        (
            BASE,
            "bad.pth: two\\nlines is torch.int64",
            lambda: save(tiny() | {"two\nlines": torch.ones(1, dtype=torch.int64)}),
        ),
        (BASE, "bad.pth: an RWKV-4", lambda: save({"blocks.0.att.time_mix_k": ONE})),
        (
            BASE,
            "bad.pth: an RWKV-5",
            lambda: save({"blocks.0.att.time_mix_k": ONE, "blocks.0.att.ln_x.weight": ONE}),
        ),
        (
            BASE,
            "bad.pth: an RWKV-7",
            lambda: save({"blocks.0.att.r_k": ONE, "blocks.0.att.x_r": ONE}),
        ),
        (BASE, "bad.pth: not an RWKV-6", lambda: save({"anything": ONE})),
        (BASE, "bad.pth: a Bone checkpoint", lambda: save(bone_of("base.pth"))),
        (
            BASE,
            "bad.pth: head.weight is missing",
            lambda: save({n: t for n, t in tiny().items() if n != "head.weight"}),
        ),
        (
            BASE,
            "bad.pth: head.weight is (300, 60)",
            lambda: save(tiny() | {"head.weight": torch.ones(300, 60)}),
        ),
        (
            BASE,
            "bad.pth: head.weight holds NaN",
            lambda: save(tiny() | {"head.weight": torch.full((300, 64), float("nan"))}),
        ),
        (BONES + " --bone_r 16", "bad.pth: has bone_r 32", lambda: save(bone_of("base.pth", 32))),
        (
            BONES + " --bone_mode bat",
            "bad.pth: has bone_mode bone",
            lambda: save(bone_of("base.pth", 16, "bone")),
        ),
        (
            BONES,
            "trained on another model",
            lambda: (save(tiny(n_embd=128)), save(bone_of("bad.pth"))),
        ),
        (BONES, "bad.pth: holds no tensor named *.bone", lambda: save(tiny())),
        (
            BONES,
            "bad.pth: blocks.0.att.key.bone holds NaN",
            lambda: save(
                bone_of("base.pth")
                | {"blocks.0.att.key.bone": torch.full((4, 16, 16), float("nan"))}
            ),
        ),
        ("--data_file gone", "gone", None),
        ("--val_file gone", "gone", None),
        ("--val_file x --val_split 0.1", "--val_split and --val_file: give one of them", None),
        ("--val_split 0.1 --dataload get", "--val_split holds out documents, but", None),
        ("--val_split 1", "--val_split: 1 must be a number of at least 0, and below 1", None),
        ("--data_file ''", "--data_file is missing", None),
        ("", "x.bin: ", lambda: os.truncate("x.bin", 600)),
        ("", "x.idx: ", lambda: os.truncate("x.idx", 200)),
        (
            "",
            "document 1 holds token 300, but the model's vocabulary is 300",
            lambda: binidx.write_binidx("x", [[1, 2], [3, 300, 0]]),
        ),
        ("--data_file t.jsonl", "t.jsonl: holds no document", lambda: save(b"\n", "t.jsonl")),
        (
            "--data_file t.jsonl",
            "t.jsonl, line 2: not JSON",
            lambda: save(b'{"text": "a"}\noops\n', "t.jsonl"),
        ),
        (
            "--data_file t.jsonl",
            "t.jsonl, line 3: has the keys prompt; known are text; messages; conversations;",
            lambda: save(b'{"text": "a"}\n\n{"prompt": "b"}\n', "t.jsonl"),
        ),
        ("--loss_mask qa", "x: no answer", None),
        (
            "--data_file qa --loss_mask qa --val_file x",
            "x: no answer",
            lambda: binidx.write_binidx("qa", [[1 + b for b in b"User: a\n\nAssistant: b"]]),
        ),
        ("--dataload only", "--micro_bsz 1", None),
        ("--dataload get --ctx_len 400", "--ctx_len 311", None),
        ("--n_layer 3", "base.pth: has n_layer 2, but --n_layer is 3", None),
        ("--n_embd 128", "base.pth: has n_embd 64, but --n_embd is 128", None),
        (
            "--bone_r 24",
            "24 does not divide blocks.0.att.receptance (64 x 64); this model takes [8, 16, 32]",
            None,
        ),
        ("--load_model ''", "--load_model is missing", None),
        ("--load_model '' --n_layer 2 --n_embd 60", "n_embd 60 must be a multiple", None),
        ("--train_parts foo", "--train_parts foo is unknown: time, ln, emb and head", None),
        ("--accelerator gpu", "use --accelerator cpu", None),
        ("--proj_dir base.pth", "base.pth", None),
        (
            "--proj_dir old",
            "old/rwkv-0.pth: already there",
            lambda: (os.mkdir("old"), save(b"of an earlier run", "old/rwkv-0.pth")),
        ),
        (
            "--bone_load old/rwkv-0.pth --quant int8",
            "old/rwkv-0.pth: trained with --quant nf4 (old/args.json), "
            "but --quant is int8; use nf4",
            of_an_nf4_run,
        ),
        (
            "--proj_dir old --epoch_begin 1",
            "old/rwkv-0.pth: trained with --quant nf4 (old/args.json), "
            "but --quant is none; use nf4",
            of_an_nf4_run,
        ),
        *[
            (flag, flag.replace(" ", ": ") + " must be a ", None)
            for flag in (
                "--bone_r 0",
                "--micro_bsz 0",
                "--epoch_count 0",
                "--epoch_steps -1",
                "--lr_init -1",
                "--lr_init nan",
                "--lr_init inf",
                "--lr_final nan",
                "--warmup_steps -2",
                "--ctx_len 0",
            )
        ],
        ("--beta2 1.5", "beta", None),
    ],
)
def test_what_cannot_work_is_refused_in_one_line_that_names_it(
    monkeypatch, capsys, flags, says, prepare
):
    def contents():
        return {path: path.read_bytes() for path in pathlib.Path().rglob("*") if path.is_file()}

    prepare and prepare()
    before = contents()
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    with pytest.raises(SystemExit) as end:
        cli.run_cli(lambda: run(flags))
    error = capsys.readouterr().err
    assert (
        end.value.code == 2
        and error.startswith("error: ")
        and error.count("\n") == 1
        and says in error
    )
    assert (
        contents() == before and not os.path.isdir("out") and not os.path.isdir("executed")
    )  # nothing written, nothing harmed


@pytest.mark.parametrize(
    "flags, says",
    [
        ("--lr_inti 1e-4", "did you mean --lr_init?"),
        ("--micro_bsz two", "--micro_bsz"),
        ("--bone_mode lora", "--bone_mode"),
    ],
)
def test_a_mistyped_flag_is_no_run(capsys, flags, says):
    with pytest.raises(SystemExit) as end:
        cli.run_cli(lambda: run(flags))
    error = capsys.readouterr().err
    assert (
        end.value.code == 2
        and error.startswith("error: ")
        and error.count("\n") == 1
        and says in error
        and not os.path.exists("out")
    )


def test_help_is_a_page_in_groups(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as end:
        train.parse_args(["--help"])
    page = capsys.readouterr().out
    assert end.value.code == 0 and max(map(len, page.splitlines())) <= 80
    assert all(
        f"\n{title}:\n" in page
        for title in ("model", "Bone", "data", "training", "optimizer (Adam)", "machine")
    )
