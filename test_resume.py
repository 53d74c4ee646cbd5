"""resume.py: a run that is stopped, however, goes on as if it never had been; a disk that fails, numbers that go wrong, a second run
in the same folder harm nothing."""

import contextlib
import itertools
import json
import math
import os
import pathlib
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch

import data
import files
import resume
import torture
import train
from log import Log
from test_options import refused
from test_train import DEFAULTS, base_file, column, counting, folder, read, run, tiny  # noqa: F401 (two are fixtures)

RUN = "--epoch_steps 3 --epoch_count 2 --save_steps 2 "     # states after 2, 3, 5 and 6 steps... and checkpoints after 3 and 6


class Killed(BaseException):
    """Stands for SIGKILL: nothing gets a chance to do anything."""


def kill_at(monkeypatch, when):
    """The run ends, as if killed, before the optimizer steps whose number is in `when`."""
    def step(*arguments, plain=train.step, done=[-1]):
        done[0] += 1
        if done[0] in when:
            raise Killed
        return plain(*arguments)
    monkeypatch.setattr(train, "step", step)
    monkeypatch.setattr(resume.Saver, "rescue", contextlib.nullcontext)


def same(a, b):
    return a.keys() == b.keys() and all(map(torch.equal, a.values(), b.values()))


def about(path):
    return json.loads(read(path)["about"].numpy().tobytes())


def curve(proj_dir):
    return pathlib.Path(proj_dir, "loss.csv").read_text()


# ---- exact resume -------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("flags", ["", "--accumulate_grad_batches 2 --micro_bsz 2", "--dataload get", "--precision fp32 --bone_mode bone", "--quant nf4 --loss_mask none",
                                   "--precision fp16 --train_parts time ln emb head --weight_decay 0.1 --warmup_steps 4",
                                   "--load_model '' --n_layer 2 --n_embd 64 --vocab_size 300"], ids=lambda flags: flags[:20] or "plain")
def test_a_run_killed_between_any_steps_and_resumed_is_the_run_that_never_was(monkeypatch, flags):
    data.write_binidx("held", counting([30, 12]))
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
        last, expected = read(f"{n}/resume-6.pth"), read("whole/resume-6.pth")
        assert {"proj_dir", "resume"} == {k for k, v in about("whole/resume-6.pth")["args"].items() if about(f"{n}/resume-6.pth")["args"][k] != v}
        assert all(about(f"{n}/resume-6.pth")[name] == about("whole/resume-6.pth")[name] for name in ("progress", "scaler", "base", "data"))
        assert same({**last, "about": torch.ones(1)}, {**expected, "about": torch.ones(1)})


def test_a_run_killed_again_and_again_is_the_same_too(monkeypatch, capsys):
    run(RUN + "--proj_dir whole")
    for n in range(20):
        with monkeypatch.context() as patch, contextlib.suppress(Killed):
            kill_at(patch, {1})         # always after one step, which is saved
            run(RUN + "--save_steps 1 --resume auto")
            break
    assert re.findall(r"(\d)/3 \[[^]]*\]\n", capsys.readouterr().err)[-2:] == ["2", "3"]       # the bars of the last two runs
    assert n == 5 and curve("out") == curve("whole") and same(read("out/rwkv-1.pth"), read("whole/rwkv-1.pth"))


def in_a_child(run_it):
    """The exit code of run_it() in a process of its own."""
    if not (pid := os.fork()):
        try:
            run_it()
            os._exit(0)
        except BaseException:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_a_run_that_dies_before_any_operation_on_a_file_leaves_no_wrong_file_and_goes_on(capfd):
    flags = "--epoch_steps 2 --save_steps 1 --resume auto "
    run(flags + "--proj_dir whole")

    def die_at(n):
        operations = itertools.count(1)
        def dying(plain):
            return lambda *arguments, **options: os._exit(9) if next(operations) == n else plain(*arguments, **options)
        for name in ("open", "fsync", "replace", "unlink"):
            setattr(os, name, dying(getattr(os, name)))
        run(f"{flags} --proj_dir {n}")

    for n in range(1, 100):
        code = in_a_child(lambda: die_at(n))
        assert all(files.read_tensors(path) for path in pathlib.Path(str(n)).glob("r*.pth"))
        if code == 0:
            break
        assert code == 9
        run(flags + f"--proj_dir {n}")
        assert curve(str(n)) == curve("whole") and same(read(f"{n}/rwkv-0.pth"), read("whole/rwkv-0.pth")), n
        assert {*os.listdir(str(n))} == {*os.listdir("whole")}, n
    assert n > 20


def test_a_file_is_on_disk_before_it_has_its_name_and_a_state_before_the_one_before_it_goes(monkeypatch):
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
    assert {"resume-1.pth", "resume-2.pth", "rwkv-0.pth", "args.json"} <= {name for _, name in named}
    for n, name in named:
        assert events[n - 1] == ("fsync", f"{name}.{os.getpid()}.tmp") and events[n + 1] == ("fsync", "out")
    assert events.index(("unlink", "resume-1.pth")) > events.index(("replace", "resume-2.pth")) + 1


def test_the_last_states_are_kept(monkeypatch):
    run(RUN + "--save_steps 1 --keep 2")
    assert [*resume.states("out")] == [5, 6]
    run("--epoch_steps 4 --save_steps 0 --proj_dir other")
    assert [*resume.states("other")] == [4]


def test_a_complete_run_says_so_and_a_longer_one_goes_on(capsys):
    run(RUN)
    before = read("out/rwkv-1.pth")
    run(RUN + "--resume")
    assert capsys.readouterr().out.endswith("out: this run is complete, 6 steps; a higher --epoch_count than 2 trains on\n")
    run(RUN + "--epoch_count 3 --resume")
    assert "step 6 of 9, with other --epoch_count 3 (was 2)" in capsys.readouterr().out and column("step") == [*range(9)]
    assert same(read("out/rwkv-1.pth"), before) and os.path.exists("out/rwkv-2.pth")


def test_the_random_state_goes_on_too(monkeypatch):
    drawn = []
    def step(*arguments, plain=train.step):
        drawn.append(torch.rand(1).item())
        return plain(*arguments)
    monkeypatch.setattr(train, "step", step)
    run("--epoch_steps 4 --proj_dir whole")
    with monkeypatch.context() as patch:
        kill_at(patch, {2})
        with pytest.raises(Killed):
            run("--epoch_steps 4 --save_steps 1")
    run("--epoch_steps 4 --resume")
    assert drawn[:4] == drawn[4:]


# ---- signals ------------------------------------------------------------------------------------------------------------------

@pytest.fixture
def handlers():
    before = {number: signal.getsignal(number) for number in files.STOPPING}
    for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGTERM, signal.SIG_DFL), (signal.SIGHUP, signal.SIG_DFL)):
        signal.signal(number, handler)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def ended(flags, monkeypatch, name, function):
    """The exit code of a run in which train.NAME or resume.NAME is `function`."""
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr(resume if hasattr(resume, name) else train, name, function)
        files.run_cli(lambda: run(flags))
    return end.value.code


def signalling(name, number, at, times=1):
    """train.NAME or resume.NAME, during whose call number `at` the signal comes, `times` times."""
    plain, calls = getattr(resume if hasattr(resume, name) else train, name), itertools.count(1)
    def function(*arguments, **options):
        for _ in range(times * (next(calls) == at)):
            signal.raise_signal(number)
        return plain(*arguments, **options)
    return function


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
@pytest.mark.parametrize("name, at, step", [("step", 2, 2), ("step", 3, 3), ("val_loss", 2, 3), ("save_stream", 1, 2), ("save_stream", 2, 3), ("save_stream", 3, 3)])
def test_a_signal_finishes_the_step_saves_and_says_how_to_go_on(monkeypatch, capsys, handlers, number, code, name, at, step):
    """step 3 ends the epoch: a held-out loss, a checkpoint and a state follow it."""
    flags = RUN + "--val_file x "
    run(flags + "--proj_dir whole")
    monkeypatch.setattr(sys, "argv", ["train.py", "--some", "flags"])
    assert ended(flags, monkeypatch, name, signalling(name, number, at)) == code
    said = capsys.readouterr()
    assert f"stopped at step {step}; to go on from step {step}: python train.py --some flags --resume\n" in said.out
    assert [*resume.states("out")][-1] == step and not [name for name in os.listdir("out") if name.endswith(".tmp") or name == ".lock"]
    run(flags + "--resume")
    assert curve("out") == curve("whole") and all(same(read(f"out/rwkv-{n}.pth"), read(f"whole/rwkv-{n}.pth")) for n in range(2))


def test_a_second_signal_does_not_wait(monkeypatch, capsys, handlers):
    run(RUN + "--proj_dir whole")
    assert ended(RUN, monkeypatch, "step", signalling("step", signal.SIGINT, 6, times=2)) == 130
    assert [*resume.states("out")] == [4] and column("step") == [0, 1, 2, 3, 4] and "to go on from step 4" in capsys.readouterr().out
    run(RUN + "--resume")
    assert curve("out") == curve("whole") and same(read("out/rwkv-1.pth"), read("whole/rwkv-1.pth"))


def test_a_signal_while_nothing_is_trained_yet_saves_nothing(monkeypatch, capsys, handlers):
    assert ended("--val_file x", monkeypatch, "val_loss", signalling("val_loss", signal.SIGTERM, 1)) == 143
    assert not resume.states("out")


def test_a_real_process_is_stopped_and_goes_on(handlers):
    command = [sys.executable, str(pathlib.Path(train.__file__)), *shlex.split(DEFAULTS + "--epoch_steps 100000 --proj_dir out --resume auto")]
    for resumed in (False, True):
        written = os.path.getsize("out/loss.csv") if resumed else 0
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
                                   preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))      # a shell may have it ignored
        while not os.path.exists("out/loss.csv") or os.path.getsize("out/loss.csv") < written + 200:      # a few steps more
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        said, _ = process.communicate(timeout=60)
        assert process.returncode == 130 and "--resume" in said
        assert column("step") == [*range([*resume.states("out")][-1])]


def test_whatever_ends_a_run_its_steps_are_saved(monkeypatch, capsys):
    def step(*arguments, plain=train.step, steps=itertools.count(1)):
        if next(steps) == 2:
            raise torch.OutOfMemoryError("no memory")
        return plain(*arguments)
    monkeypatch.setattr(train, "step", step)
    assert refused_at_the_end(capsys, lambda: run("--epoch_steps 4")) == "no memory\n" and [*resume.states("out")] == [1]
    run("--epoch_steps 4 --resume")
    assert column("step") == [0, 1, 2, 3]


def test_half_a_step_is_not_saved(monkeypatch):
    def update(*arguments, plain=train.update, steps=itertools.count(1)):
        result = plain(*arguments)
        if next(steps) == 2:
            raise RuntimeError("after the weights have changed, before the step is counted")
        return result
    monkeypatch.setattr(train, "update", update)
    with pytest.raises(RuntimeError):
        run("--epoch_steps 4 --save_steps 0")
    assert not resume.states("out")


# ---- a disk that fails --------------------------------------------------------------------------------------------------------

def at_steps(monkeypatch, actions):
    """Before the optimizer step of a number in `actions`, counted from 0, its action happens."""
    def step(*arguments, plain=train.step, steps=itertools.count()):
        actions.get(next(steps), lambda: None)()
        return plain(*arguments)
    monkeypatch.setattr(train, "step", step)


@pytest.fixture
def limit():
    """A limit on the size of files, as a disk that is full: a write beyond it fails."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (before[0] if size is None else size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_ends_no_training_and_harms_no_earlier_file(monkeypatch, capsys, limit):
    run("--epoch_steps 5 --epoch_count 2 --save_steps 1 --proj_dir whole")
    at_steps(monkeypatch, {2: lambda: limit(50_000), 4: lambda: check_then(lambda: limit(None))})
    def check_then(action):
        assert [*resume.states("out")] == [2] and files.read_tensors("out/resume-2.pth") and not [*pathlib.Path("out").glob("*.tmp")]
        action()
    run("--epoch_steps 5 --epoch_count 2 --save_steps 1")
    said = capsys.readouterr().out
    assert [int(step) for step in re.findall(r"could not save out/resume-(\d).pth: File too large; what was saved before is whole, the state of step 2 the last", said)] == [3, 4]
    assert [*resume.states("out")] == [10] and curve("out") == curve("whole") and same(read("out/rwkv-1.pth"), read("whole/rwkv-1.pth"))


def test_rows_of_the_log_that_had_no_room_come_later(limit):
    log = Log(SimpleNamespace(proj_dir=".", wandb=""), None)
    for step, size, rows in ((0, None, [0]), (1, 45, [0]), (2, 45, [0]), (3, None, [0, 1, 2, 3]), (4, None, [0, 1, 2, 3, 4])):
        limit(size)                                             # 45 bytes have room for the header, a row, and half of the next one
        log.point(step, loss=0.25, lr=1e-4)
        assert column("step", ".") == rows and curve(".").endswith(f"{rows[-1]},0.25,0.0001,\n")


def test_a_run_that_could_not_save_its_end_fails_loudly(monkeypatch, capsys, limit):
    at_steps(monkeypatch, {2: lambda: limit(50_000)})
    error = refused_at_the_end(capsys, lambda: run("--epoch_steps 4 --save_steps 1"))
    assert "out/rwkv-0.pth: could not be saved, as said above; mend that, then give the same command with --resume" in error
    assert os.listdir("out").count("rwkv-0.pth") == 0 and [*resume.states("out")] == [2]
    limit(None)
    run("--epoch_steps 4 --save_steps 1 --resume")
    assert column("step") == [0, 1, 2, 3] and read("out/rwkv-0.pth")


def refused_at_the_end(capsys, main):
    with pytest.raises(SystemExit) as end:
        files.run_cli(main)
    assert end.value.code == 2
    return capsys.readouterr().err.rpartition("error: ")[2]


def test_a_last_checkpoint_that_had_no_room_is_written_when_the_run_goes_on(monkeypatch, capsys, limit):
    flags = "--epoch_steps 3 --epoch_count 2 "
    run(flags + "--proj_dir whole")
    def attempt(self, path, *rest, plain=resume.Saver.attempt):
        limit(50_000 if "rwkv-" in path else None)
        return plain(self, path, *rest)
    with monkeypatch.context() as patch:
        patch.setattr(resume.Saver, "attempt", attempt)
        refused_at_the_end(capsys, lambda: run(flags))
    limit(None)
    assert [*resume.states("out")] == [6] and not [*pathlib.Path("out").glob("rwkv-*")]
    run(flags + "--resume")
    assert same(read("out/rwkv-1.pth"), read("whole/rwkv-1.pth")) and curve("out") == curve("whole")
    means = [re.findall("epoch.*mean loss.*", pathlib.Path(folder, "train_log.txt").read_text()) for folder in ("whole", "out")]
    assert means[1] == means[0] + means[0][-1:]


def test_a_folder_that_vanishes_is_made_again(monkeypatch):
    at_steps(monkeypatch, {2: lambda: shutil.rmtree("out")})
    run("--epoch_steps 4 --save_steps 1")
    assert [*resume.states("out")] == [4] and read("out/rwkv-0.pth")


def test_a_folder_that_cannot_be_written_ends_no_training(monkeypatch, capsys):
    def spoil():
        os.rename("out", "elsewhere")
        pathlib.Path("out").write_text("a file in its place")
    at_steps(monkeypatch, {2: spoil})
    assert "could not be saved" in refused_at_the_end(capsys, lambda: run("--epoch_steps 4 --save_steps 1"))
    assert [*resume.states("elsewhere")] == [2] and pathlib.Path("out").read_text() == "a file in its place"
    os.unlink("out"), os.rename("elsewhere", "out")
    run("--epoch_steps 4 --save_steps 1 --resume")
    assert column("step") == [0, 1, 2, 3]


def test_a_folder_that_is_read_only_for_a_while_ends_no_training(monkeypatch, capsys):
    """As os.access says it: for root, who may run this, nothing is."""
    with monkeypatch.context() as patch:
        at_steps(patch, {2: lambda: patch.setattr(os, "access", lambda *_: False), 3: lambda: patch.setattr(os, "access", lambda *_: True)})
        run("--epoch_steps 4 --save_steps 1")
    assert re.findall(r"could not save out/resume-(\d).pth: .*, as out/ is read-only; mend that", capsys.readouterr().out) == ["3"]
    assert [*resume.states("out")] == [4]


def test_room_is_looked_for_before_anything_is_loaded(monkeypatch, capsys):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=5_000_000))
    monkeypatch.setattr(resume, "State", None)
    assert re.search(r"out: the run will write 17 MB, but the disk has 5 MB free; make room", refused(capsys, lambda: run("--epoch_count 90")))
    assert not os.path.exists("out")
    run("--epoch_count 9")                                      # 2 states of 1 MB, 9 checkpoints of 0.16 MB


# ---- numbers gone wrong ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("dataload", ["pad", "get"])
def test_a_loss_that_is_not_finite_never_reaches_the_weights_and_its_documents_are_named(capsys, dataload):
    """The embedding of token 77 is such that it overflows in a layer norm: whoever reads it computes NaN."""
    torch.save(tiny() | {"emb.weight": tiny()["emb.weight"].index_fill(0, torch.tensor(77), 1e38)}, "base.pth")
    sequences = counting([20, 33, 40, 9, 25, 30, 33, 12, 28, 33, 31, 18])
    run(f"--micro_bsz 1 --accumulate_grad_batches 2 --ctx_len 16 --dataload {dataload} --epoch_steps 6")
    said, losses = capsys.readouterr().out, column("loss")
    documents, bad = data.Binidx("x"), []
    for n in range(12):
        [row] = data.rows_of(documents, n, 1, 16, dataload)
        read_by_the_model = documents.tokens[row:row + 16] if dataload == "get" else sequences[row][:16]
        bad += [(n // 2, row)] * (77 in list(read_by_the_model))
    assert bad and len({step for step, _ in bad}) < 6
    named = re.findall(r"step (\d) left out: loss nan, gradient norm nan; (?:documents|rows that begin at tokens) ([\d ]+), counted from 0", said)
    assert [(int(step), int(row)) for step, rows in named for row in rows.split()] == bad
    assert [step for step, loss in enumerate(losses) if math.isnan(loss)] == sorted({step for step, _ in bad})
    assert f"{len(named)} steps so far left out, whose loss or gradient was not finite" in said and "mean loss nan" not in said
    assert all(tensor.isfinite().all() for tensor in read("out/rwkv-0.pth").values()) and open("out/train_log.txt").read().count("left out: loss") == len(named)


def spoiled_steps(monkeypatch, bad, loss=0.0, grad=math.nan):
    """To the loss of steps whose number is in `bad`, and to one number of the gradient, this is added."""
    def step(model, *rest, plain=train.step, steps=itertools.count()):
        losses = plain(model, *rest)
        if next(steps) in bad:
            model.blocks[0].ln1.bias.grad[1] += grad
            losses[0] += loss
        return losses
    monkeypatch.setattr(train, "step", step)


@pytest.mark.parametrize("loss, grad", [(0.0, math.nan), (0.0, math.inf), (math.nan, 0.0), (math.inf, 0.0)])
def test_a_step_left_out_changes_nothing(monkeypatch, loss, grad):
    states = []
    def update(optimizer, *rest, plain=train.update):
        def now():
            return [t.clone() for p in sum((group["params"] for group in optimizer.param_groups), []) for t in (p, *optimizer.state.get(p, {}).values())]
        before = now()
        norm = plain(optimizer, *rest)
        states.append(all(map(torch.equal, before, now())))
        return norm
    monkeypatch.setattr(train, "update", update)
    spoiled_steps(monkeypatch, {1, 3}, loss, grad)
    run("--epoch_steps 5")
    assert states == [False, True, False, True, False] and len(column("loss")) == 5


def test_ten_bad_steps_in_a_row_end_the_run_nine_do_not(monkeypatch, capsys):
    with monkeypatch.context() as patch:
        spoiled_steps(patch, {*range(1, 10), *range(11, 40)})
        error = refused_at_the_end(capsys, lambda: run("--epoch_steps 30 --save_steps 8"))
    assert error.startswith("10 steps in a row had a loss or gradient that is not finite; the weights are those from before.")
    assert [*resume.states("out")] == [16, 21] and about("out/resume-21.pth")["progress"]["bad"] == 19
    weights = {name: read(f"out/resume-{step}.pth")["weights.blocks.0.att.key.bone"] for name, step in (("before", 16), ("after", 21))}
    assert weights["before"].equal(weights["after"]) and weights["after"].isfinite().all()
    spoiled_steps(monkeypatch, {0, 4})                                                  # and one can go on past them, and count anew
    run("--epoch_steps 30 --save_steps 8 --resume --lr_init 1e-3 --lr_final 1e-3")
    assert "with other --lr_init 0.001 (was 0.01)" in capsys.readouterr().out and column("step") == [*range(30)]


def test_weights_that_are_not_finite_are_never_saved(monkeypatch, capsys):
    """However they came about: here the decay of a weight of 8 overflows."""
    torch.save(tiny() | {"emb.weight": torch.full((300, 64), 8.0)}, "base.pth")
    error = refused_at_the_end(capsys, lambda: run("--epoch_steps 1 --train_parts emb --lr_init 9e18 --lr_final 9e18 --weight_decay 9e18"))
    assert "out/rwkv-0.pth: could not be saved" in error
    assert "could not save out/resume-1.pth: weights.emb.weight holds NaN or infinite values in torch.float32;" in pathlib.Path("out/train_log.txt").read_text()
    assert all(tensor.isfinite().all() for path in pathlib.Path("out").glob("r*.pth") for tensor in read(path).values())


# ---- two runs, one folder, and what is refused ------------------------------------------------------------------------------------

def test_a_second_run_in_the_folder_is_refused_and_a_lock_of_the_dead_is_none(capsys):
    with resume.lock("out"):
        before = {path: path.read_bytes() for path in pathlib.Path("out").rglob("*")}
        assert f"out: another run, process {os.getpid()}, is training there; wait for its end, or give another --proj_dir" in refused(capsys, run)
        assert {path: path.read_bytes() for path in pathlib.Path("out").rglob("*")} == before
    assert not os.path.exists("out")
    os.mkdir("out")
    pathlib.Path("out/.lock").write_text("1")                   # of a process that was killed, whose number another one has now
    run()
    assert not os.path.exists("out/.lock")


def test_a_process_that_is_killed_holds_no_lock(capsys):
    code = "import resume, time\nwith resume.lock('out'):\n    print('held', flush=True)\n    time.sleep(99)"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": os.path.dirname(train.__file__)})
    assert process.stdout.readline() == b"held\n" and f"process {process.pid}, is training there" in refused(capsys, run)
    process.kill(), process.wait()
    run()


def spoil_state(**changes):
    """A state whose record `about` is other than it was."""
    def prepare():
        run("--epoch_steps 4 --save_steps 2 --keep 9")
        os.unlink("out/resume-4.pth"), os.unlink("out/rwkv-0.pth")
        state = read("out/resume-2.pth")
        record = json.loads(state["about"].numpy().tobytes())
        torch.save(state | {"about": torch.frombuffer(bytearray(json.dumps(record | changes).encode()), dtype=torch.uint8)}, "out/resume-2.pth")
    return prepare


def without(name):
    def prepare():
        spoil_state()()
        torch.save({n: t for n, t in read("out/resume-2.pth").items() if n != name}, "out/resume-2.pth")
    return prepare


def a_link(name, target):
    def prepare():
        os.mkdir("out")
        os.symlink(os.path.abspath(target), f"out/{name}")
    return prepare


@pytest.mark.parametrize("flags, says, prepare", [
    ("--resume", "out: holds no resume-N.pth to go on from; drop --resume", None),
    ("--resume maybe", "maybe is unknown; there are last, auto", None),
    ("", "out/resume-2.pth: the state of an earlier run; go on with it by --resume", spoil_state()),
    ("--resume --bone_r 8", "out/resume-2.pth: saved with --bone_r 16, but --bone_r is 8; use the same", spoil_state()),
    ("--resume --micro_bsz 3", "saved with --micro_bsz 4", spoil_state()), ("--resume --random_seed 3", "saved with --random_seed 0", spoil_state()),
    ("--resume --precision fp32", "saved with --precision bf16", spoil_state()), ("--resume --epoch_steps 9", "saved with --epoch_steps 4", spoil_state()),
    ("--resume", "--load_model base.pth has another content than base.pth had when this was saved", lambda: (spoil_state()(), torch.save(tiny() | {"head.weight": torch.ones(300, 64)}, "base.pth"))),
    ("--resume", "--data_file x has another content than x had when this was saved", lambda: (spoil_state()(), data.write_binidx("x", counting([20] * 12)))),
    ("--resume", "not the state of a training (AttributeError: 'NoneType'", spoil_state(scaler=None)),
    ("--resume", "not the state of a training", spoil_state(progress={"step": -1})), ("--resume", "not the state of a training", spoil_state(progress={"stop": 1})),
    ("--resume", "not the state of a training", spoil_state(args=[])), ("--resume", "not the state of a training", without("about")),
    ("--resume", "exp_avg.blocks.0.att.key.bone is missing", without("exp_avg.blocks.0.att.key.bone")), ("--resume", "rng is missing", without("rng")),
    ("--resume", "out/resume-2.pth: a cut or damaged", lambda: (spoil_state()(), os.truncate("out/resume-2.pth", 9999))),
    ("--resume --lr_init 1", "out/rwkv-0.pth: already there", lambda: (spoil_state()(), pathlib.Path("out/rwkv-0.pth").write_bytes(b"of other weights"))),
    ("--bone_load out/resume-2.pth --proj_dir b", "out/resume-2.pth: the state of an unfinished training, for --resume", spoil_state()),
    ("", "out/.lock: a symbolic link", a_link(".lock", "x.bin")), ("", "out/loss.csv: a symbolic link", a_link("loss.csv", "x.bin")),
    ("", "out/train_log.txt: a symbolic link", a_link("train_log.txt", "nowhere")), ("", "out/wandb: a symbolic link", a_link("wandb", ".")),
    ("", "out/rwkv-0.pth: already there", a_link("rwkv-0.pth", "nowhere")),
])
def test_what_cannot_go_on_is_refused_and_nothing_harmed(capsys, flags, says, prepare):
    def contents():
        return {path: path.read_bytes() for path in pathlib.Path().rglob("*") if path.is_file()}
    prepare and prepare()
    before = contents()
    capsys.readouterr()
    assert says in refused(capsys, lambda: run(("--epoch_steps 4 " if "--epoch_steps" not in flags else "") + flags)) and contents() == before


def test_no_link_in_the_folder_leads_a_file_outside(monkeypatch):
    os.mkdir("out"), os.mkdir("outside")
    for name in ("args.json", f"args.json.{os.getpid()}.tmp", "resume-4.pth", f"rwkv-0.pth.{os.getpid()}.tmp", "loss.png"):
        os.symlink(os.path.abspath(f"outside/{name}"), f"out/{name}")
    os.unlink("out/resume-4.pth")
    run()
    assert os.listdir("outside") == [] and not os.path.islink("out/args.json") and read("out/rwkv-0.pth")


def test_a_temporary_file_is_never_one_that_lies_there(monkeypatch):
    monkeypatch.setattr(files, "remove_leftovers", lambda pattern: None)    # as if it came to lie there a moment later
    os.symlink(os.path.abspath("outside"), f"a.{os.getpid()}.tmp")
    with pytest.raises(FileExistsError), files.atomic_path("a"):
        pass
    assert not os.path.exists("outside") and not os.path.exists("a")


def test_leftovers_of_killed_processes_go_and_nothing_else_does():
    os.mkdir("out")
    dead = subprocess.Popen(["true"])
    dead.wait()
    for name in (f"resume-7.pth.{dead.pid}.tmp", f"rwkv-0.pth.{os.getpid()}.tmp", f"mine.{dead.pid}.tmp", f"resume-7.pth.{os.getppid()}.tmp", "resume-7.pth.x.tmp"):
        pathlib.Path("out", name).write_bytes(b"x")
    run()
    assert {name for name in os.listdir("out") if name.endswith(".tmp")} == {f"mine.{dead.pid}.tmp", f"resume-7.pth.{os.getppid()}.tmp", "resume-7.pth.x.tmp"}


def test_wandb_and_the_log_carry_no_secret(monkeypatch):
    pytest.importorskip("wandb")
    for name, value in (("MODE", "offline"), ("SILENT", "true"), ("CONFIG_DIR", "wandb_config"), ("CACHE_DIR", "wandb_cache")):
        monkeypatch.setenv(f"WANDB_{name}", value)
    for name in ("WANDB_API_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "MY_PASSWORD"):
        monkeypatch.setenv(name, "5ec2e7" * 7)
    git = "git -c user.name=a -c user.email=a@b"
    subprocess.run(f"git init -q . && git remote add origin https://user:5ec2e75ec2e7@example.org/a.git && {git} commit -q --allow-empty -m a", shell=True, check=True)
    run("--wandb project --epoch_steps 2")
    written = [path for path in pathlib.Path("out").rglob("*") if path.is_file()]
    assert any(path.suffix == ".wandb" for path in written) and not [path for path in written if re.search(b"5ec2e7|example.org", path.read_bytes())]


# ---- a stranger's files -------------------------------------------------------------------------------------------------------

def test_damaged_and_hostile_inputs_are_accepted_rightly_or_refused_in_one_line():
    """A sample of what `make torture` tries."""
    verdicts = torture.fuzz(120, seed="sample")
    assert len(verdicts) == 120 and 10 < sum(verdict["code"] == 0 for verdict in verdicts) < 110
