"""A run that is stopped, however, goes on as if it never had been."""

import concurrent.futures
import contextlib
import errno
import functools
import itertools
import json
import multiprocessing
import os
import pathlib
import re
import shlex
import signal
import subprocess
import sys
import time
import traceback

import pytest
import torch

import archive
import binidx
import checkpointer
import cli
import evaluate
import memory
import run_folder
import stop_signals
import train
from conftest import exhaustive
from test_train import (
    DEFAULTS,
    base_file,  # noqa: F401 (a fixture)
    column,
    counting,
    folder,  # noqa: F401 (a fixture)
    read,
    run,
)

# States after 2, 3, 4 and 6 steps, checkpoints after 3 and 6.
RUN = "--epoch_steps 3 --epoch_count 2 --save_steps 2 "


class Killed(BaseException):
    """Stands for SIGKILL: nothing gets a chance to do anything."""


def kill_at(monkeypatch, when):
    """The run ends, as if killed, before the optimizer steps whose number is in `when`."""

    plain = train.accumulate_gradients
    numbers = itertools.count()

    def step(*arguments, **options):
        if next(numbers) in when:
            raise Killed
        return plain(*arguments, **options)

    monkeypatch.setattr(train, "accumulate_gradients", step)
    monkeypatch.setattr(checkpointer.Checkpointer, "save_on_exit", contextlib.nullcontext)


def same(a, b):
    return a.keys() == b.keys() and all(map(torch.equal, a.values(), b.values()))


def about(path):
    return json.loads(read(path)["about"].numpy().tobytes())


def curve(proj_dir):
    """loss.csv without its last two columns, speed and memory, which are the machine's."""
    lines = pathlib.Path(proj_dir, "loss.csv").read_text().splitlines()
    return [line.rsplit(",", 2)[0] for line in lines]


# ---- exact resume -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags",
    [
        "",
        "--accumulate_grad_batches 2 --micro_bsz 2",
        "--dataload get",
        "--precision fp32 --bone_mode bone",
        "--quant nf4 --loss_mask none",
        "--optim adamw8bit",
        "--precision fp16 --train_parts time ln emb head --weight_decay 0.1 --warmup_steps 4",
        "--load_model '' --n_layer 2 --n_embd 64 --vocab_size 300",
    ],
    ids=lambda flags: flags[:20] or "plain",
)
def test_a_run_killed_between_any_steps_and_resumed_is_the_run_that_never_was(monkeypatch, flags):
    binidx.write_binidx("held", counting([30, 12]))
    flags = RUN + "--lr_final 1e-3 --val_file held " + flags
    run(flags + " --proj_dir whole")
    for n in "012345" if flags.endswith("held ") else "14":
        with monkeypatch.context() as patch:
            kill_at(patch, {int(n)})
            with pytest.raises(Killed):
                run(flags + f" --proj_dir {n} --resume auto")
        run(flags + f" --proj_dir {n} --resume auto")
        assert curve(n) == curve("whole")
        for name in ("rwkv-0.pth", "rwkv-1.pth"):
            assert same(read(f"{n}/{name}"), read(f"whole/{name}"))
        found, expected = about(f"{n}/resume-6.pth"), about("whole/resume-6.pth")
        args = found["args"]
        differ = {name for name, value in expected["args"].items() if args[name] != value}
        assert differ == {"proj_dir", "resume"}
        for name in ("progress", "scaler", "base", "data"):
            assert found[name] == expected[name]
        found, expected = read(f"{n}/resume-6.pth"), read("whole/resume-6.pth")
        del found["about"], expected["about"]
        assert same(found, expected)


def test_a_run_killed_again_and_again_is_the_same_too(monkeypatch, capsys):
    run(RUN + "--proj_dir whole")
    kills = 0
    while not os.path.exists("out/rwkv-1.pth"):
        with monkeypatch.context() as patch, contextlib.suppress(Killed):
            kill_at(patch, {1})  # always after one step, which is saved
            kills += 1
            assert kills < 20
            run(RUN + "--save_steps 1 --resume auto")
            kills -= 1  # it came to its end
    shown = re.findall(r" epoch 1, step (\d) of 6: ", capsys.readouterr().err)
    assert shown[-2:] == ["5", "6"]  # of the last two runs, each after its first step
    assert kills == 5
    assert curve("out") == curve("whole")
    assert same(read("out/rwkv-1.pth"), read("whole/rwkv-1.pth"))


def in_a_child(run_it):
    """The exit code of run_it() in a process of its own."""
    if not (pid := os.fork()):
        try:
            run_it()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


KILLED = "--epoch_steps 2 --save_steps 1 --resume auto "


def run_and_die_at(n):
    """Run, and die before the n-th operation on a file."""
    operations = itertools.count(1)

    def dying(plain):
        def operation(*arguments, **options):
            if next(operations) == n:
                os._exit(9)
            return plain(*arguments, **options)

        return operation

    for name in ("open", "fsync", "replace", "unlink"):
        setattr(os, name, dying(getattr(os, name)))
    run(f"{KILLED} --proj_dir {n}")


def die_everywhere():
    """Have runs die before each of their operations on files, and resume them; return how many."""
    torch.set_num_threads(1)
    no_parts = {"weights": 0, "optimizer": 0, "workspace": 0}
    memory.expected = lambda *_, **__: no_parts
    sys.modules["matplotlib.figure"] = None
    run(KILLED + "--proj_dir whole")
    for n in range(1, 100):
        code = in_a_child(functools.partial(run_and_die_at, n))
        assert all(archive.read_tensors(path) for path in pathlib.Path(str(n)).glob("r*.pth"))
        if code == 0:
            return n
        assert code == 9
        run(KILLED + f"--proj_dir {n}")
        assert curve(str(n)) == curve("whole"), n
        assert same(read(f"{n}/rwkv-0.pth"), read("whole/rwkv-0.pth")), n
        assert {*os.listdir(str(n))} == {*os.listdir("whole")}, n
    return 0


@pytest.mark.exhaustive
def test_a_run_that_dies_before_any_operation_on_a_file_leaves_no_wrong_file_and_goes_on():
    # In a fresh process. Where PyTorch has once had threads for a GPU's gradients, as after other
    # tests with a build for CUDA, a forked child cannot train.
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, context) as executor:
        assert executor.submit(die_everywhere).result(timeout=600) > 20


def test_a_file_is_on_disk_before_it_has_its_name_and_a_state_before_the_one_before_it_goes(
    monkeypatch,
):
    events, plain = [], {name: getattr(os, name) for name in ("fsync", "replace", "unlink")}

    def fsync(fd):
        events.append(("fsync", os.path.basename(os.readlink(f"/proc/self/fd/{fd}"))))
        plain["fsync"](fd)

    def replace(old, new):
        events.append(("replace", os.path.basename(new)))
        plain["replace"](old, new)

    def unlink(path, **options):
        plain["unlink"](path, **options)
        events.append(("unlink", os.path.basename(path)))

    for operation in (fsync, replace, unlink):
        monkeypatch.setattr(os, operation.__name__, operation)
    run("--epoch_steps 2 --save_steps 1")
    named = [(n, name) for n, (kind, name) in enumerate(events) if kind == "replace"]
    assert {"resume-1.pth", "resume-2.pth", "rwkv-0.pth", "args.json"} <= {
        name for _, name in named
    }
    for n, name in named:
        assert events[n - 1] == ("fsync", f"{name}.{os.getpid()}.tmp") and events[n + 1] == (
            "fsync",
            "out",
        )
    assert events.index(("unlink", "resume-1.pth")) > events.index(("replace", "resume-2.pth")) + 1


def test_the_last_states_are_kept(monkeypatch):
    run(RUN + "--save_steps 1 --keep 2")
    assert [*run_folder.states("out")] == [5, 6]
    run("--epoch_steps 4 --save_steps 0 --proj_dir other")
    assert [*run_folder.states("other")] == [4]


def test_a_complete_run_says_so_and_a_longer_one_goes_on(capsys):
    run(RUN)
    before = read("out/rwkv-1.pth")
    run(RUN + "--resume")
    assert capsys.readouterr().out.endswith(
        "out: this run is complete, 6 steps; a higher --epoch_count than 2 trains on\n"
    )
    run(RUN + "--epoch_count 3 --resume")
    assert "step 6 of 9, with other --epoch_count 3 (was 2)" in capsys.readouterr().out and column(
        "step"
    ) == [*range(9)]
    assert same(read("out/rwkv-1.pth"), before) and os.path.exists("out/rwkv-2.pth")


def test_the_picture_of_a_run_that_was_killed_over_it_is_drawn_later(monkeypatch):
    run(RUN)  # the tests are without matplotlib
    monkeypatch.delitem(sys.modules, "matplotlib.figure")
    pytest.importorskip("matplotlib.figure")
    run(RUN + "--resume")
    assert pathlib.Path("out/loss.png").read_bytes().startswith(b"\x89PNG")


def test_a_checkpoint_that_is_gone_is_written_again_from_the_state():
    run(RUN)
    before = read("out/rwkv-1.pth")
    os.unlink("out/rwkv-1.pth")
    run(RUN + "--resume")
    assert same(read("out/rwkv-1.pth"), before)


def test_states_of_the_run_that_this_one_numbers_on_from_are_not_its_own():
    run("--epoch_steps 3")
    run("--epoch_steps 3 --epoch_begin 1 --bone_load out/rwkv-0.pth --resume auto")
    assert [*run_folder.states("out")] == [3, 6] and column("step") == [*range(6)]


def test_the_order_of_train_parts_is_none():
    run("--epoch_steps 2 --train_parts time ln")
    run("--epoch_steps 2 --epoch_count 2 --train_parts ln time --resume")
    assert column("step") == [0, 1, 2, 3]


def test_the_random_state_goes_on_too(monkeypatch):
    drawn = []

    def step(*arguments, plain=train.accumulate_gradients, **options):
        drawn.append(torch.rand(1).item())
        return plain(*arguments, **options)

    monkeypatch.setattr(train, "accumulate_gradients", step)
    run("--epoch_steps 4 --proj_dir whole")
    with monkeypatch.context() as patch:
        kill_at(patch, {2})
        with pytest.raises(Killed):
            run("--epoch_steps 4 --save_steps 1")
    run("--epoch_steps 4 --resume")
    assert drawn[:4] == drawn[4:]


def refused_at_the_end(capsys, main):
    with pytest.raises(SystemExit) as end:
        cli.run_cli(main)
    assert end.value.code == 2
    return capsys.readouterr().err.rpartition("error: ")[2]


# ---- signals ----------------------------------------------------------------------------------


@pytest.fixture
def handlers():
    before = {number: signal.getsignal(number) for number in cli.STOP_SIGNALS}
    for number, handler in (
        (signal.SIGINT, signal.default_int_handler),
        (signal.SIGTERM, signal.SIG_DFL),
        (signal.SIGHUP, signal.SIG_DFL),
    ):
        signal.signal(number, handler)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def home_of(name):
    """The module whose NAME is called in a run."""
    return {"save_stream": checkpointer, "val_loss": evaluate}.get(name, train)


def ended(flags, monkeypatch, name, function):
    """The exit code of a run in which NAME, see home_of, is `function`."""
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr(home_of(name), name, function)
        cli.run_cli(lambda: run(flags))
    return end.value.code


def signalling(name, number, at, times=1, pause=0.0):
    """NAME, see home_of,, during whose call number `at` the signal comes.

    It comes `times` times, a pause (in seconds) in between.
    """
    plain = getattr(home_of(name), name)
    calls = itertools.count(1)

    def function(*arguments, **options):
        if next(calls) == at:
            for n in range(times):
                time.sleep(pause * n)
                signal.raise_signal(number)
        return plain(*arguments, **options)

    return function


@pytest.mark.parametrize(
    "number, code",
    [
        (signal.SIGINT, 130),
        exhaustive(signal.SIGTERM, 143),
        exhaustive(signal.SIGHUP, 129),
    ],
)
@pytest.mark.parametrize(
    "call, step",
    [
        (("accumulate_gradients", 2), 2),
        (("accumulate_gradients", 3), 3),
        (("val_loss", 2), 3),
        (("save_stream", 1), 2),
        (("save_stream", 2), 3),
        (("save_stream", 3), 3),
    ],
)
@pytest.mark.usefixtures("handlers")
def test_a_signal_finishes_the_step_saves_and_says_how_to_go_on(
    monkeypatch, capsys, number, code, call, step
):
    """step 3 ends the epoch: a held-out loss, a checkpoint and a state follow it."""
    name, at = call
    flags = RUN + "--val_file x "
    run(flags + "--proj_dir whole")
    monkeypatch.setattr(sys, "argv", ["train.py", "--some", "flags"])
    assert ended(flags, monkeypatch, name, signalling(name, number, at)) == code
    said = capsys.readouterr()
    assert (
        f"stopped at step {step}; to go on from step {step}: "
        "python train.py --resume --proj_dir out\n"
    ) in said.out
    assert [*run_folder.states("out")][-1] == step
    for name in os.listdir("out"):
        assert not name.endswith(".tmp") and name != ".lock"
    run(flags + "--resume")
    assert curve("out") == curve("whole")
    for n in range(2):
        assert same(read(f"out/rwkv-{n}.pth"), read(f"whole/rwkv-{n}.pth"))


def test_a_second_signal_does_not_wait(monkeypatch, capsys, handlers):
    run(RUN + "--proj_dir whole")
    twice = signalling("accumulate_gradients", signal.SIGINT, 6, times=2, pause=0.3)
    assert ended(RUN, monkeypatch, "accumulate_gradients", twice) == 130
    assert [*run_folder.states("out")] == [4]
    assert column("step") == [0, 1, 2, 3, 4]
    assert "to go on from step 4" in capsys.readouterr().out
    run(RUN + "--resume")
    assert curve("out") == curve("whole")
    assert same(read("out/rwkv-1.pth"), read("whole/rwkv-1.pth"))


@pytest.mark.parametrize(
    "number, pause", [(signal.SIGINT, 0.0), (signal.SIGTERM, 0.3), (signal.SIGHUP, 0.0)]
)
def test_a_signal_that_comes_twice_at_once_and_a_request_repeated_are_no_impatience(
    monkeypatch, handlers, number, pause
):
    twice = signalling("accumulate_gradients", number, 5, times=2, pause=pause)
    assert ended(RUN, monkeypatch, "accumulate_gradients", twice) == 128 + number
    assert [*run_folder.states("out")] == [5]


def test_a_ctrl_c_that_ends_the_reader_of_the_output_too_saves_and_exits_with_130(handlers):
    """As with `python train.py ... 2>&1 | tee log`."""
    command = [
        sys.executable,
        str(pathlib.Path(train.__file__)),
        *shlex.split(DEFAULTS + "--epoch_steps 100000 --save_steps 0"),
    ]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    while not os.path.exists("out/loss.csv") or len(column("step")) < 3:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    process.stdout.close()
    assert process.wait(timeout=60) == 130
    [step] = run_folder.states("out")
    assert column("step") == [*range(step)]


@pytest.mark.parametrize("pause, expected", [(0.0, KeyboardInterrupt), (0.3, stop_signals.StopNow)])
@pytest.mark.usefixtures("handlers")
def test_an_output_that_fails_over_a_stop_does_not_hide_it(pause, expected):
    """As a progress bar does whose file is on a full disk."""
    stop = stop_signals.StopSignals()
    with pytest.raises(KeyboardInterrupt) as end, stop.deferred():
        try:
            signal.raise_signal(signal.SIGINT)
            time.sleep(pause)
            signal.raise_signal(signal.SIGINT)
            stop.check()
        finally:
            raise OSError(errno.ENOSPC, "No space left on device")
    assert type(end.value) is expected


def test_a_signal_while_nothing_is_trained_yet_saves_nothing(monkeypatch, capsys, handlers):
    assert (
        ended("--val_file x", monkeypatch, "val_loss", signalling("val_loss", signal.SIGTERM, 1))
        == 143
    )
    assert not run_folder.states("out")


def test_a_real_process_is_stopped_and_goes_on(handlers):
    command = [
        sys.executable,
        str(pathlib.Path(train.__file__)),
        *shlex.split(DEFAULTS + "--epoch_steps 100000 --proj_dir out --resume auto"),
    ]
    for resumed in (False, True):
        written = os.path.getsize("out/loss.csv") if resumed else 0
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )  # a shell may have it ignored
        while (
            not os.path.exists("out/loss.csv") or os.path.getsize("out/loss.csv") < written + 200
        ):  # a few steps more
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        said, _ = process.communicate(timeout=60)
        assert process.returncode == 130 and "--resume" in said
        assert column("step") == [*range([*run_folder.states("out")][-1])]


def test_whatever_ends_a_run_its_steps_are_saved(monkeypatch, capsys):
    plain = train.accumulate_gradients
    steps = itertools.count(1)

    def step(*arguments, **options):
        if next(steps) == 2:
            raise torch.OutOfMemoryError("no memory")
        return plain(*arguments, **options)

    monkeypatch.setattr(train, "accumulate_gradients", step)
    assert refused_at_the_end(capsys, lambda: run("--epoch_steps 4")) == "no memory\n"
    assert [*run_folder.states("out")] == [1]
    run("--epoch_steps 4 --resume")
    assert column("step") == [0, 1, 2, 3]


def test_half_a_step_is_not_saved(monkeypatch):
    plain = train.update
    steps = itertools.count(1)

    def update(*arguments, **options):
        result = plain(*arguments, **options)
        if next(steps) == 2:
            raise RuntimeError("after the weights have changed, before the step is counted")
        return result

    monkeypatch.setattr(train, "update", update)
    with pytest.raises(RuntimeError):
        run("--epoch_steps 4 --save_steps 0")
    assert not run_folder.states("out")
