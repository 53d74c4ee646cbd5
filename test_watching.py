"""Watching a run, and going on with it: lines and curves, the best checkpoint, args.json."""

import functools
import io
import itertools
import json
import os
import pathlib
import re
import shlex
import shutil
import sys
import types

import numpy as np
import pytest

import binidx
import checkpointer
import devices
import display
import evaluate
import run_log
import stop_signals
import train
from test_options import refused
from test_resume import (
    Killed,
    about,
    curve,
    ended,
    handlers,  # noqa: F401 (a fixture)
    kill_at,
    same,
    signalling,
)
from test_train import (
    base_file,  # noqa: F401 (a fixture)
    column,
    counting,
    folder,  # noqa: F401 (a fixture)
    read,
    run,
)

# ---- what one sees ------------------------------------------------------------------------------

LINE = (
    r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d epoch (\d), step (\d+) of 6: loss (\d\.\d{3}), lr 1\.0e-02, "
    r"[\d,]+ tokens/s, \d\.\d GB(?:, \d+:\d\d:\d\d left)?\n"
)


@pytest.mark.parametrize("seconds, expected", [(0.0, [1, 2, 3, 4, 5, 6]), (1000.0, [1])])
def test_off_a_terminal_there_is_a_dated_line_now_and_then(monkeypatch, capsys, seconds, expected):
    monkeypatch.setattr(display.Display, "SECONDS", seconds)
    run("--epoch_steps 3 --epoch_count 2")
    shown = capsys.readouterr().err
    assert re.fullmatch(f"({LINE})*", shown), shown
    assert [int(step) for _, step, _ in re.findall(LINE, shown)] == expected
    assert shown.count(" left\n") == len(expected) - 1  # after a first step nobody knows
    for epoch, step, loss in re.findall(LINE, shown):
        assert int(epoch) == (int(step) - 1) // 3
        assert float(loss) == pytest.approx(column("loss")[int(step) - 1], abs=1e-3)


def test_a_line_has_the_mean_loss_since_the_last_one(monkeypatch, capsys):
    clock = itertools.count(step=10.0)  # as it is looked at when a step begins, and when it ends
    monkeypatch.setattr(display.time, "perf_counter", lambda: next(clock))
    shown = display.Display()
    plan = types.SimpleNamespace(steps_per_epoch=6, end_step=6)
    losses = [8.0, 1.0, float("nan"), 3.0, 5.0, 6.0]
    with shown.steps(plan, 0, 0) as steps:
        for step in steps:
            speed = shown.show(step, loss=losses[step], lr=1e-4, tokens=50.0, memory_gb=1.0)
            assert speed == 5.0
    lines = capsys.readouterr().err.splitlines()
    means = [re.findall(r"step (\d) .*: loss (\d\.\d{3}), .* 5 tokens/s", line) for line in lines]
    assert means == [[("1", "8.000")], [("3", "1.000")], [("5", "4.000")]]
    assert lines[1].endswith(", 0:01:00 left")  # 3 steps of 20 s


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_on_a_terminal_there_is_a_bar_above_which_others_print(monkeypatch):
    screen = Terminal()
    plain = train.accumulate_gradients

    def step(*arguments, **options):
        print("from within a step", file=sys.stderr)
        print("on stdout")
        return plain(*arguments, **options)

    monkeypatch.setattr(train, "accumulate_gradients", step)
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setattr(sys, "stdout", screen)
    run("--epoch_steps 2 --save_steps 1")
    said = screen.getvalue()
    assert re.search(r"\repoch 0: +100%.* 2/2 .*loss \d\.\d{3}, lr 1\.0e-02, ", said)
    for words in ("from within a step\n", "on stdout\n", "epoch 0: mean loss"):
        # Before them the bar is cleared, or there is a new line.
        assert re.search(rf"[\r\n]{words}", said), words
        assert not re.search(rf"[^\r\n]{words}", said), words
    assert sys.stdout is screen


# ---- loss.csv, TensorBoard, the picture ---------------------------------------------------------


def test_rows_have_norm_speed_and_memory_in_columns_at_the_end():
    run("--val_file x --epoch_steps 3")
    header = "step,loss,lr,val_loss,grad_norm,tokens_per_s,memory_gb"
    assert pathlib.Path("out/loss.csv").read_text().startswith(f"{header}\n0,,,")
    for name in ("grad_norm", "tokens_per_s", "memory_gb"):
        assert len(column(name)) == 3 and min(column(name)) > 0, name
    assert len(column("val_loss")) == 2


def as_by_an_earlier_version(proj_dir):
    """Make loss.csv what it was when it had four columns."""
    path = pathlib.Path(proj_dir, "loss.csv")
    lines = path.read_text().splitlines()
    path.write_text("".join(line.rsplit(",", 3)[0] + "\n" for line in lines))


@pytest.mark.parametrize("going_on", ["--resume", "--epoch_begin 1 --bone_load out/rwkv-0.pth"])
def test_a_curve_of_an_earlier_version_is_gone_on_with(going_on):
    run("--epoch_steps 3 --val_file x")
    as_by_an_earlier_version("out")
    before = column("loss"), column("val_loss")
    if going_on == "--resume":
        going_on += " --epoch_count 2"
    run(f"--epoch_steps 3 --val_file x {going_on}")
    assert column("step") == [0, 0, 1, 2, 3] + [3] * ("begin" in going_on) + [3, 4, 5, 6]
    assert (column("loss")[:3], column("val_loss")[:2]) == before
    assert len(column("loss")) == 6 and len(column("grad_norm")) == 3


def test_tensorboard_gets_what_is_in_the_curve_and_hides_what_comes_again(monkeypatch):
    writers = []

    class SummaryWriter:
        def __init__(self, path, purge_step):
            self.path, self.purge_step, self.scalars = path, purge_step, []
            writers.append(self)

        def add_scalar(self, name, value, step):
            self.scalars.append((name, value, step))
            raise OSError("the disk is full")

        def close(self):
            raise OSError("the disk is full")

    fake = types.SimpleNamespace(SummaryWriter=SummaryWriter)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", fake)
    monkeypatch.setattr(train.parse_args.__globals__["importlib"].util, "find_spec", lambda _: True)
    run("--tensorboard --val_file x --epoch_steps 2")
    run("--tensorboard --val_file x --epoch_steps 2 --epoch_count 2 --resume")
    first, second = writers
    assert (first.path, first.purge_step, second.purge_step) == ("out/tensorboard", 0, 2)
    assert [step for name, _, step in first.scalars if name == "val_loss"] == [0, 2]
    # That of step 2 would be hidden with what comes again.
    assert [step for name, _, step in second.scalars if name == "val_loss"] == [2, 4]
    names = {name for name, _, _ in second.scalars}
    assert names == {"loss", "lr", "val_loss", "grad_norm", "tokens_per_s", "memory_gb"} or (
        names == {"loss", "val_loss"}  # an error ends what is told of a step
    )


@pytest.mark.parametrize("found", [False, True])
def test_a_tensorboard_that_is_not_there_or_broken_is_no_run(monkeypatch, capsys, found):
    util = train.parse_args.__globals__["importlib"].util
    monkeypatch.setattr(util, "find_spec", lambda name: found)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    error = refused(capsys, lambda: run("--tensorboard"))
    assert error.startswith("error: --tensorboard: ") and "pip install" in error
    assert not os.path.exists("out")


def test_the_picture_is_drawn_anew_at_every_checkpoint_and_no_error_of_it_ends_a_run(monkeypatch):
    drawn = []

    def draw(proj_dir):
        drawn.append(len(column("loss", proj_dir)))
        return " and a picture"

    with monkeypatch.context() as patch:
        patch.setattr(run_log, "draw", draw)
        run("--epoch_steps 2 --epoch_count 3 --epoch_save 2")
    assert drawn == [4, 6]
    monkeypatch.setitem(sys.modules, "matplotlib.figure", types.SimpleNamespace(Figure=None))
    assert run_log.draw("out").startswith(", but no out/loss.png (")


def test_a_smoothed_loss_is_the_mean_of_its_neighbours():
    losses = [1.0, 2.0, float("nan"), 4.0, 9.0]
    assert run_log.smoothed(losses, 0).tolist()[3:] == [4.0, 9.0]
    assert run_log.smoothed(losses, 1).tolist() == [1.5, 1.5, 3.0, 6.5, 6.5]
    assert np.isnan(run_log.smoothed(losses, 0)[2])
    assert run_log.smoothed(losses, 9).tolist() == [4.0] * 5


# ---- the held-out loss on the way, and the best checkpoint --------------------------------------


def as_told(monkeypatch, losses):
    """The held-out losses of a run are these, one after the other."""
    told = iter(losses)
    monkeypatch.setattr(evaluate, "val_loss", lambda run, **_: next(told))


def test_the_best_checkpoint_is_kept_and_its_step_is_in_the_log(monkeypatch, capsys):
    flags = "--val_file x --epoch_steps 5 --epoch_count 2 --save_steps 1 --keep 99 "
    with monkeypatch.context() as patch:
        as_told(patch, [1.0, 3.0, 2.0, float("nan"), 2.5, 2.0, 2.1])
        run(flags + "--eval_steps 2")
    assert column("val_loss")[:3] == [1.0, 3.0, 2.0] and len(column("val_loss")) == 7
    log = pathlib.Path("out/train_log.txt").read_text()
    assert " step 2: held-out loss 3.0000, the best so far\n" in log
    assert " step 4: held-out loss 2.0000, the best so far\n" in log
    assert ", held-out loss nan, the best 2.0000 after step 4\n" in log
    assert " step 8: held-out loss 2.0000, the best 2.0000 after step 4\n" in log
    best, state = read("out/rwkv-best.pth"), read("out/resume-4.pth")
    for name, tensor in best.items():
        assert tensor.equal(state[f"weights.{name}"].to(tensor.dtype)), name
    # The numbers of training do not depend on it.
    run(flags + "--proj_dir plain")
    assert column("loss", "plain") == column("loss")
    assert same(read("plain/rwkv-1.pth"), read("out/rwkv-1.pth"))
    assert not os.path.exists("plain/rwkv-best.pth")


WATCHED = "--epoch_steps 4 --save_steps 3 --val_file held --eval_steps 2 --lr_init 3e-3 "


@pytest.mark.parametrize("save_steps, kills", [(0, (1, 3)), (3, (2, 5))])
def test_a_run_that_is_killed_on_the_way_finds_its_best_again(monkeypatch, save_steps, kills):
    binidx.write_binidx("held", counting([30, 12]))
    flags = WATCHED + f"--save_steps {save_steps} --epoch_count 2 "
    run(flags + "--proj_dir whole")
    for n in kills:
        with monkeypatch.context() as patch:
            kill_at(patch, {n})
            with pytest.raises(Killed):
                run(flags + f"--proj_dir {n} --resume auto")
        run(flags + f"--proj_dir {n} --resume auto")
        assert curve(str(n)) == curve("whole"), n
        for name in ("rwkv-best.pth", "rwkv-1.pth"):
            assert same(read(f"{n}/{name}"), read(f"whole/{name}")), (n, name)
        assert about(f"{n}/resume-8.pth")["progress"] == about("whole/resume-8.pth")["progress"]


@pytest.mark.usefixtures("handlers")
def test_a_run_stopped_before_it_could_evaluate_does_so_when_it_goes_on(monkeypatch):
    run(WATCHED + "--val_file x --proj_dir whole")
    for call, at in (("accumulate_gradients", 2), ("val_loss", 2)):
        stopping = signalling(call, stop_signals.signal.SIGINT, at)
        assert (
            ended(WATCHED + f"--val_file x --proj_dir {call}", monkeypatch, call, stopping) == 130
        )
        assert about(f"{call}/resume-2.pth")["progress"]["evaluated"] == 0
        run(WATCHED + f"--val_file x --proj_dir {call} --resume")
        assert curve(call) == curve("whole")


def test_a_best_checkpoint_of_another_run_is_not_replaced(capsys):
    run("--epoch_steps 2")
    pathlib.Path("out/rwkv-best.pth").write_bytes(pathlib.Path("out/rwkv-0.pth").read_bytes())
    flags = "--epoch_steps 2 --epoch_count 2 --val_file x --eval_steps 1 "
    capsys.readouterr()
    for how in ("--resume", "--epoch_begin 1 --bone_load out/rwkv-0.pth"):
        error = refused(capsys, functools.partial(run, flags + how))
        assert "out/rwkv-best.pth: already there" in error
    os.unlink("out/rwkv-best.pth")
    run(flags + "--resume")
    run(flags + "--resume --epoch_count 3")  # and its own it may
    assert "held-out" in capsys.readouterr().out


def test_eval_steps_needs_held_out_data(capsys):
    assert "--eval_steps 5 measures a held-out loss" in refused(
        capsys, lambda: run("--eval_steps 5")
    )


def test_a_best_checkpoint_that_cannot_be_saved_is_none(monkeypatch, capsys):
    plain = checkpointer.save_stream

    def save_stream(like, make, path, **rest):
        if "best" in path and len(column("loss")) < 3:
            raise OSError(28, "No space left on device")
        plain(like, make, path, **rest)

    monkeypatch.setattr(checkpointer, "save_stream", save_stream)
    as_told(monkeypatch, [9.0, 3.0, 5.0, 6.0, 7.0])
    run("--val_file x --epoch_steps 4 --eval_steps 1")
    log = pathlib.Path("out/train_log.txt").read_text()
    assert "could not save out/rwkv-best.pth: No space left on device" in log
    assert "step 3: held-out loss 6.0000, the best so far" in log
    assert "held-out loss 7.0000, the best 6.0000 after step 3" in log


# ---- a state every so many minutes --------------------------------------------------------------


def test_a_state_is_saved_when_so_many_minutes_have_passed(monkeypatch):
    minutes = itertools.count()  # a step takes one
    now = [0.0]
    plain = train.accumulate_gradients

    def step(*arguments, **options):
        now[0] = 60.0 * next(minutes)
        return plain(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(train, "accumulate_gradients", step)
        clock = types.SimpleNamespace(monotonic=lambda: now[0])
        patch.setattr(checkpointer, "time", clock)
        run("--epoch_steps 9 --save_steps 0 --keep 99 --save_minutes 2.5")
    saved = sorted(int(path.stem[7:]) for path in pathlib.Path("out").glob("resume-*.pth"))
    assert saved == [4, 7, 9]  # when 3 minutes have passed, and 6; and at the end
    run("--epoch_steps 9 --proj_dir plain")
    assert same(read("plain/rwkv-0.pth"), read("out/rwkv-0.pth"))


def test_one_rank_s_clock_decides_for_all(monkeypatch):
    stop = stop_signals.StopSignals()
    assert (stop.check(False), stop.check(True)) == (False, True)
    monkeypatch.setattr(devices, "max_over_ranks", lambda numbers: [numbers[0], 1.0])
    assert stop.check(False) is True


# ---- going on from the folder alone -------------------------------------------------------------


def go_on(flags):
    train.train(train.parse_args(shlex.split(flags)))


def test_resume_and_the_folder_are_enough():
    flags = """--epoch_steps 3 --epoch_count 2 --lr_final 1e-3 --weight_decay 0.1 --grad_cp 1
    --train_parts ln --loss_mask se --data_file qa --mask_id '{"mask0":"a","mask1":"b"}' """
    binidx.write_binidx("qa", [[1 + byte for byte in b"a\nb xyz"] + [0]] * 5)
    run(flags + "--save_steps 3 --keep 9")
    shutil.copytree("out", "whole")
    for name in ("resume-6.pth", "rwkv-0.pth", "rwkv-1.pth"):
        os.unlink(f"out/{name}")
    before = json.loads(pathlib.Path("out/args.json").read_text())
    go_on("--resume")
    assert same(read("out/rwkv-1.pth"), read("whole/rwkv-1.pth"))
    assert json.loads(pathlib.Path("out/args.json").read_text()) == before | {"resume": "last"}
    go_on("--resume auto --epoch_count 3")
    assert len(column("loss")) == 9


def test_what_is_given_wins_and_is_checked(capsys):
    run("--epoch_steps 2")
    capsys.readouterr()
    assert "saved with --bone_r 16, but --bone_r is 32" in refused(
        capsys, lambda: go_on("--resume --bone_r 32")
    )
    args = train.parse_args(["--resume", "--lr_init", "1", "--train_parts", "ln"])
    assert (args.lr_init, args.lr_final, args.train_parts) == (1, 1e-2, ["ln"])
    args = train.parse_args(["--resume", "--devices", "1", "--accelerator", "auto"])
    assert (args.accelerator, args.micro_bsz, args.n_layer) == ("auto", 4, None)


def test_auto_without_a_state_takes_nothing_from_an_earlier_run(capsys):
    run("--epoch_steps 2")
    capsys.readouterr()
    os.unlink("out/resume-2.pth")
    args = train.parse_args(shlex.split("--resume auto --load_model base.pth --data_file x"))
    assert args.ctx_len == 512
    assert "--data_file is missing" in refused(capsys, lambda: train.parse_args(["--resume=auto"]))


def test_args_of_earlier_and_later_versions_are_taken():
    run("--epoch_steps 2")
    path = pathlib.Path("out/args.json")
    args = json.loads(path.read_text())
    for name in ("eval_steps", "save_minutes", "tensorboard", "chunk_ctx", "quant"):
        del args[name]
    path.write_text(json.dumps(args | {"a_flag_of_tomorrow": [1, {}], "bone_config": {}}))
    go_on("--resume --epoch_count 2")
    assert len(column("loss")) == 4


@pytest.mark.parametrize(
    "content, says",
    [
        ("", "not the arguments of a training run"),
        ("[1]", "it is not a JSON object"),
        ("[" * 100_000, "not the arguments of a training run"),
        ('{"bone_r": "many"}', "bone_r: many must be a whole number of at least 1"),
        ('{"bone_r": [16]}', "bone_r: [16] must be a whole number of at least 1"),
        ('{"bone_r": 16.5}', "bone_r: 16.5 must be a whole number of at least 1"),
        ('{"lr_init": NaN}', "lr_init: NaN must be a number of at least 0"),
        ('{"precision": null}', "precision: null is unknown; there are bf16"),
        ('{"data_file": 3}', "data_file: 3 is not what --data_file takes"),
        ('{"train_parts": ["ln", 3]}', 'train_parts: ["ln", 3] is not what --train_parts takes'),
        ('{"fla": "yes"}', "fla: yes is not what --fla takes"),
        ('{"mask_id": {"mask9": "x"}}', "mask_id: {"),
        ('{"data_file": "gone"}', "gone: not found here; out/args.json names it"),
    ],
)
def test_damaged_args_are_refused_in_one_line(capsys, content, says):
    os.mkdir("out")
    pathlib.Path("out/args.json").write_text(content)
    error = refused(capsys, lambda: train.parse_args(["--resume"]))
    assert says in error and "out/args.json" in error


def test_a_folder_without_args_says_so(capsys):
    assert "typo/args.json: not there, so --resume needs all flags" in refused(
        capsys, lambda: train.parse_args(shlex.split("--resume --proj_dir typo"))
    )


def test_torchrun_says_how_many_devices_there_are(monkeypatch):
    run("--epoch_steps 2")
    path = pathlib.Path("out/args.json")
    path.write_text(path.read_text().replace('"devices": 1', '"devices": 2'))
    for started, expected in (("", 2), ("2", 2), ("3", 1)):
        monkeypatch.setenv("WORLD_SIZE", started)
        assert train.parse_args(["--resume"]).devices == expected


def test_a_best_loss_on_other_held_out_data_does_not_count(capsys):
    run("--val_file x --epoch_steps 2 --eval_steps 1")
    binidx.write_binidx("other", counting([30, 12, 40]))
    run("--val_file other --epoch_steps 2 --eval_steps 1 --epoch_count 2 --resume")
    assert "the held-out data is another, so the best loss counts anew" in capsys.readouterr().out
    log = pathlib.Path("out/train_log.txt").read_text()
    assert re.search(r"step 3: held-out loss \S+, the best so far", log)


def test_a_best_checkpoint_from_after_the_state_is_not_replaced_with_other_flags(capsys):
    run("--val_file x --epoch_steps 4 --eval_steps 1 --save_steps 2 --keep 9")
    for name in ("resume-4.pth", "rwkv-0.pth"):
        os.unlink(f"out/{name}")
    later = os.stat("out/resume-2.pth").st_mtime_ns + 10**9
    os.utime("out/rwkv-best.pth", ns=(later, later))
    capsys.readouterr()
    error = refused(capsys, lambda: run("--resume --lr_init 1e-5"))
    assert "out/rwkv-best.pth: already there" in error
    run("--resume")  # with the same flags the same best comes again


def test_auto_takes_no_flags_of_the_run_before_this_one():
    run("--epoch_steps 2 --weight_decay 0.1")
    flags = "--epoch_steps 2 --bone_load out/rwkv-0.pth --epoch_begin 1 --resume auto"
    run(flags)
    with open("out/args.json") as f:
        assert json.load(f)["weight_decay"] == 0
