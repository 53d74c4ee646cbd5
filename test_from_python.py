"""train() by keywords: from Python, a notebook, a thread, twice in one process."""

import io
import json
import os
import pathlib
import shlex
import signal
import sys
import threading

import pytest
import torch

import cli
import from_python
import merge
import parse_options
import train
from stop_signals import StopSignals, only_ctrl_c
from test_train import (
    DEFAULTS,
    base_file,  # noqa: F401 (a fixture)
    column,
    folder,  # noqa: F401 (a fixture)
    read,
    run,
)

KEYWORDS = {
    "load_model": "base.pth",
    "data_file": pathlib.Path("x"),
    "bone_r": 16,
    "ctx_len": 32,
    "micro_bsz": 4,
    "epoch_steps": 2,
    "lr_init": 1e-2,
    "lr_final": 1e-2,
    "accelerator": "cpu",
    "grad_cp": False,
    "compile": False,
}


@pytest.mark.parametrize(
    "keywords, flags",
    [
        (KEYWORDS, DEFAULTS.replace("--epoch_steps 4", "--epoch_steps 2")),
        ({"train_parts": ["time", "ln", "emb"]}, "--train_parts time ln emb"),
        ({"train_parts": []}, "--train_parts"),
        ({"train_parts": "time ln"}, "--train_parts time ln"),
        ({"fla": True, "resume": True}, "--fla --resume"),
        ({"fla": False, "resume": False}, ""),
        ({"resume": "auto"}, "--resume auto"),
        ({"bone_r": None, "val_file": None}, ""),
        ({"bone_config": {"bone_load": "", "bone_r": 8}}, "--bone_r 8"),
        ({"proj_dir": b"caf\xe9", "layerwise_lr": True}, "--proj_dir caf\udce9"),
        (
            {"loss_mask": "se", "mask_id": {"mask0": "a b", "mask1": "c"}},
            """--loss_mask se --mask_id '{"mask0":"a b","mask1":"c"}'""",
        ),
    ],
)
def test_keywords_are_the_flags(keywords, flags):
    given = {"load_model": "base.pth", "data_file": "x"}
    start = " ".join(f"--{name} {value}" for name, value in given.items())
    expected = parse_options.parse_args(shlex.split(f"{start} {flags}"))
    assert parse_options.parse_keywords(given | keywords) == expected


@pytest.mark.parametrize(
    "keywords, says",
    [
        ({"lr": 1e-4}, "train() takes no lr; did you mean lr_init?"),
        ({"bone_rr": 8}, "train() takes no bone_rr; did you mean bone_r?"),
        ({"xyzzy": 8}, "train() takes no xyzzy; python train.py --help lists all flags"),
        ({"bone_r": 0}, "--bone_r: 0 must be a whole number of at least 1"),
        ({"micro_bsz": 1.5}, "--micro_bsz: 1.5 must be a whole number"),
        ({"micro_bsz": True}, "--micro_bsz: True must be a whole number"),
        ({"lr_init": "fast"}, "--lr_init: fast must be a number"),
        ({"precision": "bf61"}, "--precision: bf61 is unknown; there are bf16"),
        ({"load_model": "gone.pth"}, "--load_model gone.pth: No such file or directory"),
        ({"devices": 2}, "devices=2, num_nodes=1: each device needs a process of its own"),
        ({"data_file": ["x", "y"]}, "data_file=['x', 'y']: one value is needed"),
        ({"fla": 3}, "--fla/--no-fla: ignored explicit argument '3'"),
    ],
)
def test_wrong_keywords_are_refused_in_one_line(keywords, says):
    with pytest.raises(ValueError) as error:
        train.train(**(KEYWORDS | keywords))
    assert str(error.value).startswith(says) and not os.path.exists("out")


def test_a_path_alone_is_no_options():
    with pytest.raises(ValueError, match="takes the flags by name"):
        train.train("base.pth")


def test_train_returns_losses_and_paths_twice_in_one_process_and_leaves_pytorch_as_it_was():
    torch.set_float32_matmul_precision("medium")
    random = torch.get_rng_state()
    first = train.train(**KEYWORDS, val_file="x", epoch_count=2)
    second = train.train(**KEYWORDS, val_file="x", epoch_count=2, proj_dir="other")
    assert torch.get_float32_matmul_precision() == "medium"
    assert torch.get_rng_state().equal(random)
    torch.set_float32_matmul_precision("highest")
    assert [step for step, _ in first.losses] == [0, 1, 2, 3]
    assert [loss for _, loss in first.losses] == column("loss")
    assert [step for step, _ in first.held_out_losses] == [0, 2, 4]
    assert [loss for _, loss in first.held_out_losses] == column("val_loss")
    assert first.checkpoints == ["out/rwkv-0.pth", "out/rwkv-1.pth"]
    assert first.peak_memory > 1e6
    assert (second.losses, second.held_out_losses) == (first.losses, first.held_out_losses)
    ours, theirs = read("out/rwkv-1.pth"), read("other/rwkv-1.pth")
    assert all(ours[name].equal(theirs[name]) for name in ours)


def test_a_resumed_run_returns_all_of_it_and_a_dry_run_nothing():
    train.train(**KEYWORDS)
    result = train.train(**KEYWORDS, epoch_count=2, resume=True)
    assert [step for step, _ in result.losses] == [0, 1, 2, 3]
    nothing = train.train(**KEYWORDS, proj_dir="other", dry_run=True)
    assert (nothing.losses, nothing.checkpoints) == ([], [])


def test_rows_of_an_earlier_run_in_the_folder_are_not_this_one_s():
    pathlib.Path("loss.csv").write_text("step,loss,lr,val_loss\n0,9,1,\n1,8,1,\n0,7,1,\n1,6,1,\n")
    assert from_python.read_column(".", "loss") == [(0, 7.0), (1, 6.0)]
    assert from_python.read_column("nowhere", "loss") == []
    # A finished run does not fail for a file that somebody has spoilt.
    for spoilt in (
        b"step,loss\n0,7\n?,9\n",
        b"step,loss\n0,7\n,5,,,\n",
        b"step,loss\n0,7\n\xff,\0",
    ):
        pathlib.Path("loss.csv").write_bytes(spoilt)
        assert from_python.read_column(".", "loss") in ([(0, 7.0)], [])


def test_options_are_taken_as_before():
    options = train.parse_args(shlex.split(DEFAULTS + "--epoch_steps 1"))
    assert len(train.train(options).losses) == 1
    with pytest.raises(ValueError, match="takes the flags by name"):
        train.train(options, bone_r=8)


def test_a_thread_trains_though_it_may_handle_no_signals():
    handlers = {number: signal.getsignal(number) for number in cli.STOP_SIGNALS}
    results = []
    thread = threading.Thread(target=lambda: results.append(train.train(**KEYWORDS)))
    thread.start()
    thread.join()
    assert len(results[0].losses) == 2
    assert handlers == {number: signal.getsignal(number) for number in cli.STOP_SIGNALS}


def test_what_ends_a_thread_s_run_saves_its_state(monkeypatch):
    def fail(*_, **__):
        raise KeyboardInterrupt

    def body():
        with pytest.raises(KeyboardInterrupt):
            train.train(**KEYWORDS, epoch_count=2)
        with StopSignals().deferred(), only_ctrl_c():
            ends.append("whole")

    ends = []
    monkeypatch.setattr(train, "end_epoch", fail)
    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert ends == ["whole"] and os.path.exists("out/resume-2.pth")


def test_from_a_notebook_it_says_how_to_call_it_again(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["ipykernel_launcher.py", "-f", "kernel.json"])
    assert cli.command_to_resume("out") == "train(resume=True, proj_dir='out')"


def test_output_that_no_encoding_of_the_terminal_has_is_replaced(monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    os.mkdir("词")
    cli.run_cli(lambda: run("--epoch_steps 1 --proj_dir 词"))
    stream.flush()
    assert b"wrote ?/rwkv-0.pth" in stream.buffer.getvalue()
    # A notebook's stdout has no encoding.
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    cli.run_cli(lambda: print("词"))


def test_files_whose_names_are_not_utf_8_are_trained_resumed_and_merged(monkeypatch):
    name = os.fsdecode(b"caf\xe9")
    stream = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    monkeypatch.setattr(sys, "stdout", stream)
    for ending in (".bin", ".idx"):
        os.rename("x" + ending, name + ending)
    os.rename("base.pth", name + ".pth")
    files = {"load_model": name + ".pth", "data_file": name, "proj_dir": name}
    cli.run_cli(lambda: train.train(**(KEYWORDS | files)))
    cli.run_cli(lambda: train.train(**(KEYWORDS | files), epoch_count=2, resume=True))
    merge.merge(name + ".pth", f"{name}/rwkv-1.pth", f"{name}/tuned.pth")
    with open(f"{name}/args.json", encoding="utf-8") as f:
        assert json.load(f)["proj_dir"] == name
