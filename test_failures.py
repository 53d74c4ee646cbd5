"""What goes wrong around a run harms nothing.

A disk that fails, numbers that go wrong, a second run in the same folder, states of other runs.
"""

import errno
import itertools
import json
import math
import os
import pathlib
import re
import resource
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import archive
import atomic
import binidx
import bone_record
import checkpointer
import data
import run_folder
import run_state
import train
from run_log import Log
from test_options import refused
from test_resume import about, curve, refused_at_the_end, same
from test_train import (
    base_file,  # noqa: F401 (a fixture)
    column,
    counting,
    folder,  # noqa: F401 (a fixture)
    read,
    run,
    tiny,
)

# ---- a disk that fails ------------------------------------------------------------------------


def at_steps(monkeypatch, actions):
    """Before the optimizer step of a number in `actions`, counted from 0, its action happens."""

    plain = train.accumulate_gradients
    steps = itertools.count()

    def step(*arguments, **options):
        number = next(steps)
        if number in actions:
            actions[number]()
        return plain(*arguments, **options)

    monkeypatch.setattr(train, "accumulate_gradients", step)


@pytest.fixture
def limit():
    """A limit on the size of files, as a disk that is full: a write beyond it fails."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(
        resource.RLIMIT_FSIZE, (before[0] if size is None else size, before[1])
    )
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_ends_no_training_and_harms_no_earlier_file(monkeypatch, capsys, limit):
    run("--epoch_steps 5 --epoch_count 2 --save_steps 1 --proj_dir whole")

    def check_and_lift_the_limit():
        assert [*run_folder.states("out")] == [2]
        assert archive.read_tensors("out/resume-2.pth")
        assert not [*pathlib.Path("out").glob("*.tmp")]
        limit(None)

    at_steps(monkeypatch, {2: lambda: limit(50_000), 4: check_and_lift_the_limit})
    run("--epoch_steps 5 --epoch_count 2 --save_steps 1")
    failures = re.findall(
        r"could not save out/resume-(\d).pth: File too large; what was saved before is whole, "
        "the state of step 2 the last",
        capsys.readouterr().out,
    )
    assert failures == ["3", "4"]
    assert [*run_folder.states("out")] == [10]
    assert curve("out") == curve("whole")
    assert same(read("out/rwkv-1.pth"), read("whole/rwkv-1.pth"))


def test_rows_of_the_log_that_had_no_room_come_later(limit):
    log = Log(SimpleNamespace(proj_dir=".", wandb="", tensorboard=False), None)
    for step, size, rows in (
        (0, None, [0]),
        (1, 80, [0]),
        (2, 80, [0]),
        (3, None, [0, 1, 2, 3]),
        (4, None, [0, 1, 2, 3, 4]),
    ):
        limit(size)  # 80 bytes have room for the header, a row, and half of the next one
        log.point(step, loss=0.25, lr=1e-4)
        assert column("step", ".") == rows and curve(".")[-1] == f"{rows[-1]},0.25,0.0001,,"


def test_a_run_that_could_not_save_its_end_fails_loudly(monkeypatch, capsys, limit):
    at_steps(monkeypatch, {2: lambda: limit(50_000)})
    error = refused_at_the_end(capsys, lambda: run("--epoch_steps 4 --save_steps 1"))
    assert "out/rwkv-0.pth: could not be saved, as said above; " in error
    assert "then give the same command with --resume" in error
    assert not os.path.exists("out/rwkv-0.pth")
    assert [*run_folder.states("out")] == [2]
    limit(None)
    run("--epoch_steps 4 --save_steps 1 --resume")
    assert column("step") == [0, 1, 2, 3] and read("out/rwkv-0.pth")


def test_a_last_checkpoint_that_had_no_room_is_written_when_the_run_goes_on(
    monkeypatch, capsys, limit
):
    flags = "--epoch_steps 3 --epoch_count 2 "
    run(flags + "--proj_dir whole")

    def save_stream(like, make, path, **options):
        limit(50_000 if "rwkv-" in path else None)
        archive.save_stream(like, make, path, **options)

    with monkeypatch.context() as patch:
        patch.setattr(checkpointer, "save_stream", save_stream)
        refused_at_the_end(capsys, lambda: run(flags))
    limit(None)
    assert [*run_folder.states("out")] == [6]
    assert not [*pathlib.Path("out").glob("rwkv-*")]
    run(flags + "--resume")
    assert same(read("out/rwkv-1.pth"), read("whole/rwkv-1.pth"))
    assert curve("out") == curve("whole")
    means = [
        re.findall("epoch.*mean loss.*", pathlib.Path(proj_dir, "train_log.txt").read_text())
        for proj_dir in ("whole", "out")
    ]
    assert means[1] == means[0] + means[0][-1:]


def test_a_folder_that_vanishes_is_made_again_with_what_describes_it_and_its_lock(
    monkeypatch, capsys
):
    def second():
        with pytest.raises(ValueError, match="another run"), run_folder.lock("out"):
            pass

    at_steps(monkeypatch, {2: lambda: shutil.rmtree("out"), 3: second})
    run("--epoch_steps 4 --save_steps 1 --quant nf4")
    assert (
        [*run_folder.states("out")] == [4]
        and bone_record.trained_quant("out/rwkv-0.pth", None) == "nf4"
        and not os.path.exists("out/.lock")
    )


def test_a_folder_that_cannot_be_synced_is_no_error(monkeypatch):
    """As on some network file systems."""

    def fsync(fd, plain=os.fsync):
        if os.path.isdir(f"/proc/self/fd/{fd}"):
            raise OSError(errno.EINVAL, "Invalid argument")
        plain(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    run("--epoch_steps 2 --save_steps 1")
    assert [*run_folder.states("out")] == [2]


def test_a_state_that_was_restored_is_not_kept_open(monkeypatch):
    run("--epoch_steps 2")
    at_steps(monkeypatch, {0: lambda: maps.append(pathlib.Path("/proc/self/maps").read_text())})
    maps = []
    run("--epoch_steps 2 --epoch_count 2 --resume")
    # (Another test's files may be kept by an error that nobody has collected yet.)
    assert len(maps) == 1
    assert f"{os.getcwd()}/base.pth" not in maps[0]
    assert f"{os.getcwd()}/out/resume-" not in maps[0]


def test_a_folder_that_cannot_be_written_ends_no_training(monkeypatch, capsys):
    def spoil():
        os.rename("out", "elsewhere")
        pathlib.Path("out").write_text("a file in its place")

    at_steps(monkeypatch, {2: spoil})
    assert "could not be saved" in refused_at_the_end(
        capsys, lambda: run("--epoch_steps 4 --save_steps 1")
    )
    assert [*run_folder.states("elsewhere")] == [2] and pathlib.Path(
        "out"
    ).read_text() == "a file in its place"
    os.unlink("out"), os.rename("elsewhere", "out")
    run("--epoch_steps 4 --save_steps 1 --resume")
    assert column("step") == [0, 1, 2, 3]


def test_a_folder_that_is_read_only_for_a_while_ends_no_training(monkeypatch, capsys):
    """As os.access says it: for root, who may run this, nothing is."""
    with monkeypatch.context() as patch:
        at_steps(
            patch,
            {
                2: lambda: patch.setattr(os, "access", lambda *_: False),
                3: lambda: patch.setattr(os, "access", lambda *_: True),
            },
        )
        run("--epoch_steps 4 --save_steps 1")
    assert re.findall(
        r"could not save out/resume-(\d).pth: .*, as out/ is read-only; fix that",
        capsys.readouterr().out,
    ) == ["3"]
    assert [*run_folder.states("out")] == [4]


def test_room_is_looked_for_before_anything_is_loaded(monkeypatch, capsys):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=5_000_000))
    monkeypatch.setattr(run_state, "SavedState", None)
    assert re.search(
        r"out: the run will write 17 MB, but the disk has 5 MB free; make room",
        refused(capsys, lambda: run("--epoch_count 90")),
    )
    assert not os.path.exists("out")
    run("--epoch_count 9")  # 2 states of 1 MB, 9 checkpoints of 0.16 MB


# ---- numbers gone wrong -----------------------------------------------------------------------


@pytest.mark.parametrize("dataload", ["pad", "get"])
def test_a_loss_that_is_not_finite_never_reaches_the_weights_and_its_documents_are_named(
    capsys, dataload
):
    """The embedding of token 77 overflows in a layer norm: whoever reads it computes NaN."""
    torch.save(
        tiny() | {"emb.weight": tiny()["emb.weight"].index_fill(0, torch.tensor(77), 1e38)},
        "base.pth",
    )
    sequences = counting([20, 33, 40, 9, 25, 30, 33, 12, 28, 33, 31, 18])
    run(
        "--micro_bsz 1 --accumulate_grad_batches 2 --ctx_len 16 --epoch_steps 6 "
        f"--dataload {dataload}"
    )
    said, losses = capsys.readouterr().out, column("loss")
    documents, bad = binidx.Binidx("x"), []
    for n in range(12):
        [row] = data.rows_of(documents, n, data.BatchConfig(1, 16, dataload))
        if dataload == "get":
            read_by_the_model = documents.tokens[row : row + 16]
        else:
            read_by_the_model = sequences[row][:16]
        if 77 in list(read_by_the_model):
            bad.append((n // 2, row))
    assert bad and len({step for step, _ in bad}) < 6
    named = re.findall(
        r"step (\d) left out: loss nan, gradient norm nan; "
        r"(?:documents|rows that begin at tokens) ([\d ]+), counted from 0",
        said,
    )
    assert [(int(step), int(row)) for step, rows in named for row in rows.split()] == bad
    assert [step for step, loss in enumerate(losses) if math.isnan(loss)] == sorted(
        {step for step, _ in bad}
    )
    assert (
        f"{len(named)} steps so far left out, whose loss or gradient was not finite" in said
        and "mean loss nan" not in said
    )
    assert all(tensor.isfinite().all() for tensor in read("out/rwkv-0.pth").values())
    log = pathlib.Path("out/train_log.txt").read_text()
    assert log.count("left out: loss") == len(named)


def spoiled_steps(monkeypatch, bad, loss=0.0, grad=math.nan):
    """In steps whose number is in `bad`, add to the loss, and to one number of the gradient."""
    plain = train.accumulate_gradients
    steps = itertools.count()

    def step(model, *rest, **options):
        losses = plain(model, *rest, **options)
        if next(steps) in bad:
            model.blocks[0].ln1.bias.grad[1] += grad
            losses[0] += loss
        return losses

    monkeypatch.setattr(train, "accumulate_gradients", step)


@pytest.mark.parametrize(
    "loss, grad", [(0.0, math.nan), (0.0, math.inf), (math.nan, 0.0), (math.inf, 0.0)]
)
def test_a_step_left_out_changes_nothing(monkeypatch, loss, grad):
    states = []

    def update(optimizer, *rest, plain=train.update):
        def now():
            return [
                t.clone()
                for group in optimizer.param_groups
                for p in group["params"]
                for t in (p, *optimizer.state.get(p, {}).values())
            ]

        before = now()
        norm = plain(optimizer, *rest)
        states.append(all(map(torch.equal, before, now())))
        return norm

    monkeypatch.setattr(train, "update", update)
    spoiled_steps(monkeypatch, {1, 3}, loss, grad)
    run("--epoch_steps 5")
    assert states == [False, True, False, True, False] and len(column("loss")) == 5


def test_a_state_from_before_the_first_step_that_was_taken_is_gone_on_from(monkeypatch):
    with monkeypatch.context() as patch:
        spoiled_steps(patch, {0, 1})
        run("--epoch_steps 4 --save_steps 1 --keep 4 --proj_dir whole")
    assert not any(
        name.startswith("exp_avg") for name in archive.read_tensors("whole/resume-2.pth")
    )
    os.mkdir("parts")
    os.rename("whole/resume-2.pth", "parts/resume-2.pth")
    run("--epoch_steps 4 --proj_dir parts --resume")
    whole, parts = read("whole/rwkv-0.pth"), read("parts/rwkv-0.pth")
    assert all(whole[name].equal(parts[name]) for name in whole)


def test_ten_bad_steps_in_a_row_end_the_run_nine_do_not(monkeypatch, capsys):
    with monkeypatch.context() as patch:
        spoiled_steps(patch, {*range(1, 10), *range(11, 40)})
        error = refused_at_the_end(capsys, lambda: run("--epoch_steps 30 --save_steps 8"))
    assert error.startswith(
        "10 steps in a row had a loss or gradient that is not finite; "
        "the weights are those from before."
    )
    assert [*run_folder.states("out")] == [16, 21]
    assert about("out/resume-21.pth")["progress"]["bad"] == 19
    weights = {
        name: read(f"out/resume-{step}.pth")["weights.blocks.0.att.key.bone"]
        for name, step in (("before", 16), ("after", 21))
    }
    assert weights["before"].equal(weights["after"]) and weights["after"].isfinite().all()
    spoiled_steps(monkeypatch, {0, 4})  # and one can go on past them, and count anew
    run("--epoch_steps 30 --save_steps 8 --resume --lr_init 1e-3 --lr_final 1e-3")
    assert "with other --lr_init 0.001 (was 0.01)" in capsys.readouterr().out and column(
        "step"
    ) == [*range(30)]


def test_weights_that_are_not_finite_are_never_saved(monkeypatch, capsys):
    """However they came about: here the decay of a weight of 8 overflows."""
    torch.save(tiny() | {"emb.weight": torch.full((300, 64), 8.0)}, "base.pth")
    error = refused_at_the_end(
        capsys,
        lambda: run(
            "--epoch_steps 1 --train_parts emb --lr_init 9e18 --lr_final 9e18 --weight_decay 9e18"
        ),
    )
    assert "out/rwkv-0.pth: could not be saved" in error
    assert (
        "could not save out/resume-1.pth: weights.emb.weight holds NaN or infinite values in "
        "torch.float32;" in pathlib.Path("out/train_log.txt").read_text()
    )
    assert all(
        tensor.isfinite().all()
        for path in pathlib.Path("out").glob("r*.pth")
        for tensor in read(path).values()
    )


# ---- two runs, one folder, and what is refused ------------------------------------------------


def test_a_second_run_in_the_folder_is_refused_and_a_lock_of_the_dead_is_none(capsys):
    with run_folder.lock("out"):
        before = {path: path.read_bytes() for path in pathlib.Path("out").rglob("*")}
        assert (
            f"out: another run, process {os.getpid()}, is training there; "
            "wait for its end, or give another --proj_dir"
        ) in refused(capsys, run)
        assert {path: path.read_bytes() for path in pathlib.Path("out").rglob("*")} == before
    assert not os.path.exists("out")
    os.mkdir("out")
    # Of a process that was killed, whose number another one has now.
    pathlib.Path("out/.lock").write_text("1")
    run()
    assert not os.path.exists("out/.lock")


def test_a_process_that_is_killed_holds_no_lock(capsys):
    code = """
import run_folder, time
with run_folder.lock("out"):
    print("held", flush=True)
    time.sleep(99)
"""
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": os.path.dirname(train.__file__)},
    )
    assert process.stdout.readline() == b"held\n"
    assert f"process {process.pid}, is training there" in refused(capsys, run)
    process.kill()
    process.wait()
    run()


# {name: content} of the folder of a run of 4 steps that was killed after 2, for every test.
STOPPED: dict[str, bytes] = {}


def spoil_state(flags=None, **changes):
    """A state whose record `about` is other than it was; or that of a run with other flags."""

    def prepare():
        if not STOPPED:
            run("--epoch_steps 4 --save_steps 2 --keep 9")
            STOPPED.update(
                (name, pathlib.Path("out", name).read_bytes())
                for name in os.listdir("out")
                if name not in ("resume-4.pth", "rwkv-0.pth")
            )
            shutil.rmtree("out")
        os.mkdir("out")
        for name, content in STOPPED.items():
            pathlib.Path("out", name).write_bytes(content)
        state = read("out/resume-2.pth")
        record = json.loads(state["about"].numpy().tobytes())
        record["args"] |= flags or {}
        torch.save(
            state
            | {
                "about": torch.frombuffer(
                    bytearray(json.dumps(record | changes).encode()), dtype=torch.uint8
                )
            },
            "out/resume-2.pth",
        )

    return prepare


def spoil_tensor(name, change):
    def prepare():
        spoil_state()()
        state = read("out/resume-2.pth")
        torch.save(state | {name: change(state[name])}, "out/resume-2.pth")

    return prepare


def without(name):
    def prepare():
        spoil_state()()
        torch.save(
            {n: t for n, t in read("out/resume-2.pth").items() if n != name}, "out/resume-2.pth"
        )

    return prepare


def a_link(name, target):
    def prepare():
        os.mkdir("out")
        os.symlink(os.path.abspath(target), f"out/{name}")

    return prepare


@pytest.mark.parametrize(
    "flags, says, prepare",
    [
        ("--resume", "out: holds no resume-N.pth to go on from; drop --resume", None),
        ("--resume maybe", "maybe is unknown; there are last, auto", None),
        (
            "",
            "out/resume-2.pth: the state of an earlier run; go on with it by --resume",
            spoil_state(),
        ),
        (
            "--resume --bone_r 8",
            "out/resume-2.pth: saved with --bone_r 16, but --bone_r is 8; use the same",
            spoil_state(),
        ),
        ("--resume --micro_bsz 3", "saved with --micro_bsz 4", spoil_state()),
        ("--resume --random_seed 3", "saved with --random_seed 0", spoil_state()),
        (
            "--resume --train_type infctx",
            "saved with --train_type none, but --train_type is infctx",
            spoil_state(),
        ),
        (
            "--resume --train_type infctx --chunk_ctx 8",
            "saved with --chunk_ctx 16, but --chunk_ctx is 8",
            spoil_state({"train_type": "infctx", "chunk_ctx": 16}),
        ),
        ("--resume --precision fp32", "saved with --precision bf16", spoil_state()),
        ("--resume --epoch_steps 9", "saved with --epoch_steps 4", spoil_state()),
        (
            "--resume",
            "--load_model base.pth has another content than base.pth had when this was saved",
            lambda: (
                spoil_state()(),
                torch.save(tiny() | {"head.weight": torch.ones(300, 64)}, "base.pth"),
            ),
        ),
        (
            "--resume",
            "--data_file x has another content than x had when this was saved",
            lambda: (spoil_state()(), binidx.write_binidx("x", counting([20] * 12))),
        ),
        (
            "--resume",
            "not the state of a training (AttributeError: 'NoneType'",
            spoil_state(scaler=None),
        ),
        ("--resume", "not the state of a training", spoil_state(progress={"step": -1})),
        ("--resume", "not the state of a training", spoil_state(progress={"stop": 1})),
        ("--resume", "not the state of a training", spoil_state(args=[])),
        ("--resume", "not the state of a training", without("about")),
        *[
            (
                "--resume",
                f"not the state of a training (ValueError: {what})",
                spoil_state(**changes),
            )
            for what, changes in (
                ("invalid losses", {"progress": {"step": 2, "losses": ["1.0"]}}),
                ("invalid losses", {"progress": {"step": 2, "losses": {"1": 2}}}),
                ("invalid scaler", {"scaler": {"scale": "5"}}),
                *(
                    ("invalid micro_batches", {"micro_batches": wrong})
                    for wrong in (0, -1, "2", 1.0, True, None, 1 << 40)
                ),
                ("invalid scaler", {"scaler": {"scale": 0}}),
                ("invalid scaler", {"scaler": {"scale": math.nan}}),
                ("invalid scaler", {"scaler": {"growth_interval": 0.5}}),
                ("step 1 in a file of this name", {"progress": {"step": 1}}),
            )
        ],
        *[
            ("--resume", f"{name} is", spoil_tensor(name, change))
            for name, change in (
                ("exp_avg_sq.blocks.0.att.key.bone", torch.neg),
                ("step.blocks.0.att.key.bone", torch.zeros_like),
                ("exp_avg.blocks.0.att.key.bone", torch.log),
            )
        ],
        (
            "--resume",
            "its gradient scaler or random state is invalid",
            spoil_tensor("rng", torch.zeros_like),
        ),
        (
            "--resume",
            "exp_avg.blocks.0.att.key.bone is missing",
            without("exp_avg.blocks.0.att.key.bone"),
        ),
        ("--resume", "rng is missing", without("rng")),
        (
            "--resume",
            "out/resume-2.pth: a cut or damaged",
            lambda: (spoil_state()(), os.truncate("out/resume-2.pth", 9999)),
        ),
        (
            "--resume --lr_init 1",
            "out/rwkv-0.pth: already there",
            lambda: (
                spoil_state()(),
                pathlib.Path("out/rwkv-0.pth").write_bytes(b"of other weights"),
            ),
        ),
        (
            "--bone_load out/resume-2.pth --proj_dir b",
            "out/resume-2.pth: the state of a training, for --resume",
            spoil_state(),
        ),
        ("", "out/.lock: a symbolic link", a_link(".lock", "x.bin")),
        ("", "out/loss.csv: a symbolic link", a_link("loss.csv", "x.bin")),
        ("", "out/train_log.txt: a symbolic link", a_link("train_log.txt", "nowhere")),
        ("", "out/wandb: a symbolic link", a_link("wandb", ".")),
        ("", "out/rwkv-0.pth: already there", a_link("rwkv-0.pth", "nowhere")),
    ],
)
def test_what_cannot_go_on_is_refused_and_nothing_harmed(capsys, flags, says, prepare):
    def contents():
        return {path: path.read_bytes() for path in pathlib.Path().rglob("*") if path.is_file()}

    if prepare:
        prepare()
    before = contents()
    capsys.readouterr()
    if "--epoch_steps" not in flags:
        flags = f"--epoch_steps 4 {flags}"
    assert says in refused(capsys, lambda: run(flags))
    assert contents() == before


def test_no_link_in_the_folder_leads_a_file_outside(monkeypatch):
    os.mkdir("out"), os.mkdir("outside")
    for name in (
        "args.json",
        f"args.json.{os.getpid()}.tmp",
        "resume-4.pth",
        f"rwkv-0.pth.{os.getpid()}.tmp",
        "loss.png",
    ):
        os.symlink(os.path.abspath(f"outside/{name}"), f"out/{name}")
    os.unlink("out/resume-4.pth")
    run()
    assert (
        os.listdir("outside") == []
        and not os.path.islink("out/args.json")
        and read("out/rwkv-0.pth")
    )


def test_a_temporary_file_is_never_one_that_lies_there(monkeypatch):
    monkeypatch.setattr(
        atomic, "remove_leftovers", lambda pattern: None
    )  # as if it came to lie there a moment later
    os.symlink(os.path.abspath("outside"), f"a.{os.getpid()}.tmp")
    with pytest.raises(FileExistsError), atomic.atomic_path("a"):
        pass
    assert not os.path.exists("outside") and not os.path.exists("a")


def test_leftovers_of_killed_processes_go_and_nothing_else_does():
    os.mkdir("out")
    dead = subprocess.Popen(["true"])
    dead.wait()
    for name in (
        f"resume-7.pth.{dead.pid}.tmp",
        f"rwkv-0.pth.{os.getpid()}.tmp",
        f"mine.{dead.pid}.tmp",
        f"resume-7.pth.{os.getppid()}.tmp",
        "resume-7.pth.x.tmp",
    ):
        pathlib.Path("out", name).write_bytes(b"x")
    run()
    assert {name for name in os.listdir("out") if name.endswith(".tmp")} == {
        f"mine.{dead.pid}.tmp",
        f"resume-7.pth.{os.getppid()}.tmp",
        "resume-7.pth.x.tmp",
    }


def test_wandb_and_the_log_carry_no_secret(monkeypatch):
    pytest.importorskip("wandb")
    for name, value in (
        ("MODE", "offline"),
        ("SILENT", "true"),
        ("CONFIG_DIR", "wandb_config"),
        ("CACHE_DIR", "wandb_cache"),
    ):
        monkeypatch.setenv(f"WANDB_{name}", value)
    for name in ("WANDB_API_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "MY_PASSWORD"):
        monkeypatch.setenv(name, "5ec2e7" * 7)
    for command in (
        "git init -q .",
        "git remote add origin https://user:5ec2e75ec2e7@example.org/a.git",
        "git -c user.name=a -c user.email=a@b commit -q --allow-empty -m a",
    ):
        subprocess.run(command.split(), check=True)
    run("--wandb project --epoch_steps 2")
    written = [path for path in pathlib.Path("out").rglob("*") if path.is_file()]
    assert any(path.suffix == ".wandb" for path in written) and not [
        path for path in written if re.search(b"5ec2e7|example.org", path.read_bytes())
    ]


# ---- scripts ----------------------------------------------------------------------------------


@pytest.mark.parametrize("script", ["scripts/run_bone.sh", "scripts/merge_bone.sh", "demo.sh"])
@pytest.mark.parametrize("shell", ["sh", "bash"])
def test_a_script_with_windows_line_ends_says_so_in_one_line(script, shell):
    lines = (pathlib.Path(train.__file__).parent / script).read_text().splitlines()
    pathlib.Path("script.sh").write_bytes("\r\n".join(lines).encode())
    end = subprocess.run([shell, "script.sh"], capture_output=True, text=True)
    mend = "sed -i 's/\\r$//' script.sh"
    assert end.stderr == f"error: script.sh has Windows line ends; mend it: {mend}\n"
    assert (end.returncode, end.stdout) == (2, "")
