"""Several devices: here processes on CPUs, which talk by gloo. As one process with all their micro batches, to the last digits; none waits for a dead one.

Starting processes takes seconds, so those of one test try everything of their kind: `python test_devices.py gradients`, started once for each rank.
"""

import contextlib
import dataclasses
import errno
import itertools
import json
import math
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

import archive
import build
import corpus
import data
import devices
import estimate
import gradient
import resume
import train
from gradient import Passes
from loss import Counts, count_tokens
from plan import resolve_options
from test_train import (
    DEFAULTS,
    base_file,  # noqa: F401 (a fixture)
    bone_of,
    column,
    counting,
    folder,  # noqa: F401 (a fixture)
    read,
    run,
    tiny,
    true_memory,  # noqa: F401 (a fixture)
)

STRATEGIES = ["ddp", *(f"deepspeed_stage_{stage}" for stage in "123")]
SAVING = "--val_file held --epoch_count 2 --save_steps 1 --keep 9"
FLAGS = (
    DEFAULTS.replace("--epoch_steps 4 ", "").replace("--micro_bsz 4", "--micro_bsz 2")
    + "--precision fp32 --random_seed 1 "
)


def start(ranks, line, **options):
    """`python LINE` as so many ranks, by torchrun."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        str(ranks),
    ]
    return subprocess.run(
        [*command, *line.split()],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        **options,
    )


def errors_of(end):
    return "\n".join(line for line in end.stderr.splitlines() if re.search("Error|, line ", line))


@contextlib.contextmanager
def alone():
    """Within, this rank is a world of one."""
    before = {name: os.environ.pop(name) for name in ("WORLD_SIZE", "RANK")}
    yield
    os.environ |= before


# ---- what the ranks do --------------------------------------------------------------------------------------------------------


def compare(flags, documents, per_rank, **chunks):
    """Largest difference, relative, of loss and any gradient of `per_rank` micro batches on each rank from those of one process with all of them."""
    args, n = resolve_options(train.parse_args((FLAGS + flags).split())), devices.size()
    rows = [
        [documents[i % len(documents)] for i in range(2 * number, 2 * number + 2)]
        for number in range(n * per_rank - 1)
    ]
    batches = [
        data.collate(
            row, 32, args.loss_mask if args.loss_mask != "se" else ("P", "d"), cut=not chunks
        )
        for row in rows
    ]
    with alone():
        model, *_ = build.build_model(args, torch.device("cpu"))
        model.keep_products = bool(chunks)
        expected = [
            value.item() for value in train.accumulate_gradients(model, batches, Passes(**chunks))
        ]
        grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    model, *_ = (
        build.build_sharded_model if devices.shares(args.strategy)[1] else build.build_model
    )(args, torch.device("cpu"))
    model.keep_products = bool(chunks)
    passes, reduced = build.make_passes(args, model, torch.device("cpu")), []
    passes = dataclasses.replace(passes, autocast=contextlib.nullcontext(), **chunks)
    compute = passes.engine
    if isinstance(compute, DistributedDataParallel):
        compute.register_comm_hook(
            None, lambda state, bucket: reduced.append(bucket) or allreduce_hook(state, bucket)
        )
    mine = batches[devices.rank() :: n]
    micro_batches = mine + [data.silent()] * (per_rank - len(mine))
    counts = Counts(*devices.total(count_tokens(micro_batches)))
    found = train.accumulate_gradients(model, micro_batches, passes, counts=counts)
    found = devices.in_turn([value.item() for value in found])
    assert (
        len(found) == n * per_rank and found[n * per_rank - 1] == 0
    )  # the last rank has one micro batch less
    assert len(reduced) == isinstance(
        compute, DistributedDataParallel
    )  # all gradients at once, when a step's last one is there
    shared = {name: p for name, p in model.named_parameters() if devices.is_shared(p)}
    assert shared.keys() == {
        name
        for name, p in model.named_parameters()
        if devices.shares(args.strategy)[2 - p.requires_grad]
    }
    assert all(p.to_local().shape[0] <= -(-p.shape[0] // n) for p in shared.values())
    ours = {name: devices.whole(p.grad) for name, p in model.named_parameters() if p.requires_grad}
    assert ours.keys() == grads.keys()
    return max(
        *(abs(a - b) / sum(expected) for a, b in zip(found, expected)),
        *(((ours[name] - g).norm() / g.norm()).item() for name, g in grads.items()),
    )


def gradients():
    documents = [corpus.Binidx("x")[i] for i in (1, 2, 3, 7, 5)]
    cases = [
        ("--grad_cp 1 --quant nf4 --bone_load bones.pth", "pad", {}),
        ("--train_parts time ln emb head --bone_load bones.pth", "none", {}),
        ("--train_parts", "se", {}),
        ("--grad_cp 1 --bone_mode bone --quant int8", "pad", {"chunk_ctx": 7, "bptt": 2}),
    ]
    for strategy, (flags, loss_mask, chunks) in itertools.product(
        ("ddp", "deepspeed_stage_2", "deepspeed_stage_3"), cases
    ):
        if (
            strategy == "deepspeed_stage_3"
            and "--quant" in flags
            and not devices.shares_out_integers()
        ):
            with pytest.raises(ValueError, match="with PyTorch 2.12 or newer, and this is 2.11"):
                devices.shard(
                    build.build_model(
                        resolve_options(train.parse_args((FLAGS + flags).split())),
                        torch.device("cpu"),
                    )[0],
                    strategy,
                    torch.device("cpu"),
                )
            continue
        mask = f"--loss_mask {loss_mask} " + """--mask_id {"mask0":"d","mask1":"P"}""" * (
            loss_mask == "se"
        )
        difference = compare(f"--strategy {strategy} {mask} {flags}", documents, 2, **chunks)
        if devices.rank() == 0:
            print(json.dumps([strategy, flags, loss_mask, difference]))


def runs():
    """Train with every strategy, each in a folder of its name; or, where these are there, go on from there with the next strategy."""
    sys.modules["matplotlib.figure"] = None  # as if without it, which takes its time
    for strategy, other in zip(STRATEGIES, STRATEGIES[1:] + STRATEGIES[:1]):
        going_on = os.path.exists(strategy)
        devices.most([0])
        train.train(
            train.parse_args(
                f"{FLAGS} {SAVING} --proj_dir {strategy} --strategy {other if going_on else strategy} {'--resume' * going_on}".split()
            )
        )


def trouble():
    """With every strategy: rank 0 finds the disk full at one save of four; no loss is a number; fp16 cannot hold one number of a gradient, which a single
    rank has where gradients are shared out."""
    sys.modules["matplotlib.figure"] = None
    for strategy in STRATEGIES:
        with pytest.MonkeyPatch.context() as patch:

            def full(*arguments, plain=archive.save_stream, saves=itertools.count(1)):
                if next(saves) == 2:
                    raise OSError(errno.ENOSPC, "No space left on device")
                plain(*arguments)

            patch.setattr(resume, "save_stream", full)
            train.train(
                train.parse_args(
                    f"{FLAGS} --strategy {strategy} --save_steps 1 --keep 9 --proj_dir full_{strategy}".split()
                )
            )
        with (
            pytest.MonkeyPatch.context() as patch,
            pytest.raises(devices.Agreed, match="10 steps in a row"),
        ):
            patch.setattr(
                train,
                "accumulate_gradients",
                lambda *arguments, **options: [
                    value * math.nan
                    for value in gradient.accumulate_gradients(*arguments, **options)
                ],
            )
            train.train(
                train.parse_args(
                    f"{FLAGS} --strategy {strategy} --epoch_count 9 --proj_dir bad_{strategy}".split()
                )
            )
        with pytest.MonkeyPatch.context() as patch:

            def overflowing(model, *arguments, steps=itertools.count(1), **options):
                losses, shared = (
                    gradient.accumulate_gradients(model, *arguments, **options),
                    devices.shares(strategy)[1],
                )
                if next(steps) == 2 and (devices.rank() == 1 or not shared):
                    grad = next(p.grad for p in model.parameters() if p.requires_grad)
                    (grad.to_local() if shared else grad).view(-1)[0] = math.inf
                return losses

            patch.setattr(train, "accumulate_gradients", overflowing)
            train.train(
                train.parse_args(
                    f"{FLAGS} --precision fp16 --strategy {strategy} --proj_dir half_{strategy}".split()
                )
            )
    if devices.rank():
        torch.save(tiny(torch.float32) | {"head.weight": torch.ones(300, 64)}, "other.pth")
    for flags, says in (
        (
            ("--lr_init 1", "--lr_init 2"),
            "--lr_init differs: [12].0 on rank [01], [12].0 on rank [01]; all need the same",
        ),
        (("", "--load_model nowhere.pth"), "rank 1: nowhere.pth: No such file or directory"),
        (("", "--load_model other.pth"), "the content of --load_model differs"),
        (("", "--data_file held"), "the content of --data_file differs"),
        (
            ("--resume --proj_dir full_ddp", "--resume --proj_dir bad_ddp"),
            "the step to go on from in --proj_dir differs: ",
        ),
        (
            ("--resume --proj_dir full_ddp", "--resume --proj_dir new"),
            "rank 1: new: holds no resume-N.pth to go on from; copy the first machine's folder",
        ),
    ):
        with pytest.raises(devices.Agreed, match=says):
            train.train(train.parse_args(f"{FLAGS} {flags[devices.rank()]}".split()))
        devices.most([0])
        assert not os.path.exists("out")


# ---- tests --------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def whole_documents():
    """Documents of very different lengths; no two ranks have rows of one width."""
    torch.save(tiny(torch.float32), "base.pth")
    torch.save(
        {name: t + 0.01 * torch.randn_like(t) for name, t in bone_of("base.pth").items()},
        "bones.pth",
    )
    corpus.write_binidx("x", counting([20, 33, 40, 9, 25, 30, 33, 12, 28, 33, 31, 18]))
    corpus.write_binidx("held", counting([30, 12, 40]))


@pytest.mark.parametrize("ranks", [2, 3])
def test_the_gradient_is_that_of_one_process_with_all_micro_batches(whole_documents, ranks):
    end = start(ranks, f"{os.path.abspath(__file__)} gradients")
    assert end.returncode == 0, errors_of(end)
    said = [json.loads(line) for line in end.stdout.splitlines() if line.startswith('["')]
    assert len(said) == (12 if devices.shares_out_integers() else 10)
    for case in said:
        assert case[-1] <= 1e-5, case


def test_a_run_on_two_goes_on_on_one_and_on_three_with_another_strategy(whole_documents):
    """All are the run of one process with as many micro batches in a step: losses, held-out losses, weights and moments."""
    worker, one = (
        f"{os.path.abspath(__file__)} runs",
        f"--epoch_steps 0 --micro_bsz 2 --precision fp32 --random_seed 1 {SAVING}",
    )
    run(f"{one} --accumulate_grad_batches 2 --proj_dir whole")

    def check(proj_dir):
        for name in ("loss", "val_loss"):
            assert column(name, proj_dir) == pytest.approx(column(name, "whole"), rel=1e-5), (
                proj_dir,
                name,
            )
        for name in ("rwkv-0.pth", "rwkv-1.pth", "resume-6.pth"):
            found, expected = read(f"{proj_dir}/{name}"), read(f"whole/{name}")
            assert found.keys() == expected.keys()
            for key, tensor in expected.items():
                assert (
                    key in ("about", "rng") or (found[key] - tensor).norm() <= 2e-4 * tensor.norm()
                ), (proj_dir, name, key)
        assert {*os.listdir(proj_dir)} == {*os.listdir("whole")}

    for ranks in (2, 3):
        end = start(ranks, worker)
        assert end.returncode == 0, errors_of(end)
        for strategy in STRATEGIES:
            check(strategy)
            for name in (
                "rwkv-0.pth",
                "rwkv-1.pth",
                *(f"resume-{n}.pth" for n in (3, 4, 5, 6)),
            ):  # as if killed in step 2
                os.unlink(f"{strategy}/{name}")
            if ranks == 2:
                shutil.copytree(strategy, f"{strategy}_on_1")
                run(f"{one} --proj_dir {strategy}_on_1 --resume")
                check(f"{strategy}_on_1")
            assert (
                "; a step still has 2 micro batches, shared out among 1\n"
                in pathlib.Path(f"{strategy}_on_1", "train_log.txt").read_text()
            )


def test_a_save_that_fails_on_rank_0_and_numbers_that_are_none_are_the_same_to_all_ranks(
    whole_documents,
):
    end = start(2, f"{os.path.abspath(__file__)} trouble")
    assert end.returncode == 0, errors_of(end)
    run(
        "--epoch_steps 0 --micro_bsz 2 --accumulate_grad_batches 2 --random_seed 1 --precision fp16 --proj_dir half"
    )
    for strategy in STRATEGIES:
        assert {*map(str, pathlib.Path(f"full_{strategy}").glob("*.pth"))} == {
            f"full_{strategy}/{name}" for name in ("rwkv-0.pth", "resume-1.pth", "resume-3.pth")
        }
        assert (
            f"could not save full_{strategy}/resume-2.pth: No space left on device"
            in pathlib.Path(f"full_{strategy}/train_log.txt").read_text()
        )
        state = read(f"bad_{strategy}/resume-10.pth")
        assert all(
            state[f"weights.{name}"].equal(p)
            for name, p in read("base.pth").items()
            if "ln" in name
        )
        assert (
            ", 1 steps so far left out, whose gradient fp16 could not hold"
            in pathlib.Path(f"half_{strategy}/train_log.txt").read_text()
        )
        about = resume.State(f"half_{strategy}/resume-3.pth").about
        assert about["scaler"]["scale"] == 2.0**15 and about["progress"]["overflows"] == 1
        losses = column("loss", f"half_{strategy}")
        assert losses[:2] == pytest.approx(
            column("loss", "half")[:2], rel=2e-3
        ) and losses == pytest.approx(column("loss", "half_ddp"), rel=2e-3)


def test_two_machines_train_as_one(whole_documents):
    """Each started by hand, here both on this one."""
    with socket.socket() as s:
        s.bind(("", 0))
        port = s.getsockname()[1]
    line = (
        f"{train.__file__} --load_model base.pth {FLAGS} --num_nodes 2 --strategy deepspeed_stage_3"
    )
    ends = [
        subprocess.Popen(
            [sys.executable, *line.split()],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ
            | {
                "OMP_NUM_THREADS": "1",
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "NODE_RANK": str(node),
            },
        )
        for node in (1, 0)
    ]
    (second, _), (first, _) = said = [process.communicate(timeout=120) for process in ends]
    assert [process.returncode for process in ends] == [0, 0], said
    assert (
        second.startswith("machine 1 of 2")
        and second.count("\n") == 1
        and "by FSDP2, all weights shared out" in first
    )
    run(
        "--epoch_steps 0 --micro_bsz 2 --accumulate_grad_batches 2 --random_seed 1 --precision fp32 --proj_dir whole"
    )
    assert (
        column("loss") == pytest.approx(column("loss", "whole"), rel=1e-5)
        and len(column("loss")) == 3
    )
    assert {*os.listdir("out")} - {"loss.png"} == {*os.listdir("whole")}


def test_who_waits_for_another_machine_says_so_and_can_be_stopped(whole_documents):
    with socket.socket() as s:
        s.bind(("", 0))
        line, where = (
            f"{train.__file__} --load_model base.pth {FLAGS} --num_nodes 2",
            {"MASTER_ADDR": "127.0.0.1", "NODE_RANK": "0", "MASTER_PORT": str(s.getsockname()[1])},
        )
        taken = subprocess.run(
            [sys.executable, *line.split()],
            env=os.environ | where,
            capture_output=True,
            text=True,
            timeout=60,
        )
    assert (
        taken.returncode == 2
        and f"error: port {where['MASTER_PORT']} is taken on this machine; set another MASTER_PORT"
        in taken.stderr
    )
    process = subprocess.Popen(
        [sys.executable, *line.split()],
        env=os.environ | where,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert (
        process.stdout.readline()
        == f"machine 0 of 2, counted from 0: waits until all are at 127.0.0.1:{where['MASTER_PORT']}, the first machine's\n"
    )
    with contextlib.closing(socket.socket()) as s:
        while s.connect_ex(("127.0.0.1", int(where["MASTER_PORT"]))):  # until it does wait
            time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=60)
    assert process.returncode == 130 and said == ("", "")


def test_what_torchrun_starts_says_things_once(whole_documents):
    line = f"{train.__file__} --load_model base.pth {FLAGS}"
    for flags, says in (
        ("", "wrote out/rwkv-0.pth"),
        ("--resume", "out: this run is complete, 3 steps"),
        ("--dry_run", "each of 2 ranks, by DDP:"),
    ):
        end = start(2, f"{line} {flags}")
        assert end.returncode == 0 and end.stdout.count(says) == 1 and "error" not in end.stderr, (
            end.stdout,
            end.stderr,
        )


LONG = FLAGS + "--load_model base.pth --epoch_steps 40000 --save_steps 100000 --devices 2"


def begin(strategy, program=train.__file__):
    """train.py with two ranks, in a process group of its own, after some steps: (process, its ranks)."""
    command = [sys.executable, program, *LONG.split(), "--strategy", strategy]
    process = subprocess.Popen(
        command,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # which a shell's background has ignored
    curve = pathlib.Path("out/loss.csv")
    while process.poll() is None and not (
        curve.exists() and len(curve.read_text().splitlines()) > 4
    ):
        time.sleep(0.05)
    return process, [
        int(pid)
        for pid in pathlib.Path(f"/proc/{process.pid}/task/{process.pid}/children")
        .read_text()
        .split()
    ]


@pytest.mark.skipif(sys.platform != "linux", reason="who started whom is read from /proc")
@pytest.mark.parametrize("strategy, which", [("ddp", 1), ("deepspeed_stage_3", 0)])
def test_the_death_of_a_rank_ends_all_and_is_said(whole_documents, strategy, which):
    process, ranks = begin(strategy)
    os.kill(ranks[which], signal.SIGKILL)
    out, errors = process.communicate(timeout=60)
    said = [
        line for line in errors.splitlines() if line.startswith("error") or "step/s" not in line
    ]
    assert process.returncode == 2 and re.search(
        rf"error: rank {which} of 2 was ended by SIGKILL, and the others with it", errors
    ), errors
    assert errors.count("error: ") == 1 and "Traceback" not in errors, said
    assert bool(list(pathlib.Path("out").glob("resume-*.pth"))) == (
        strategy == "ddp"
    )  # whose rank 0 has all that a state needs
    for pid in ranks:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


@pytest.mark.skipif(sys.platform != "linux", reason="who started whom is read from /proc")
def test_the_death_of_what_started_the_ranks_ends_them_with_all_saved(whole_documents):
    process, _ = begin("deepspeed_stage_2")
    process.kill()
    out, _ = process.communicate(
        timeout=60
    )  # which takes until the ranks, too, hold its pipes no longer
    assert list(pathlib.Path("out").glob("resume-*.pth")) and out.count("stopped at") == 1


@pytest.mark.skipif(sys.platform != "linux", reason="who started whom is read from /proc")
def test_an_error_of_one_rank_ends_all_and_is_said_once(whole_documents):
    pathlib.Path("program.py").write_text(f"""import sys
sys.path.insert(0, {os.path.dirname(train.__file__)!r})
import cli, devices, train

def step(*arguments, plain=train.accumulate_gradients, steps=[], **options):
    steps.append(0)
    if devices.rank() == 1 and len(steps) == 9:
        raise ValueError("this rank alone has met it")
    return plain(*arguments, **options)

train.accumulate_gradients = step
devices.leave(lambda: cli.run_cli(lambda: train.train(train.parse_args())))
""")
    process, _ = begin("deepspeed_stage_2", "program.py")
    out, errors = process.communicate(timeout=60)
    assert (
        process.returncode == 2
        and errors.count("error: ") == 1
        and "error: rank 1: this rank alone has met it\n" in errors
        and "Traceback" not in errors
    ), errors


@pytest.mark.skipif(sys.platform != "linux", reason="who started whom is read from /proc")
@pytest.mark.parametrize(
    "strategy, how, code", [("ddp", signal.SIGINT, 130), ("deepspeed_stage_2", signal.SIGTERM, 143)]
)
def test_ctrl_c_saves_once_on_all_ranks_at_the_same_step(whole_documents, strategy, how, code):
    process, _ = begin(strategy)
    os.killpg(process.pid, how) if how == signal.SIGINT else process.send_signal(
        how
    )  # a terminal's Ctrl-C reaches all
    out, errors = process.communicate(timeout=60)
    [state] = pathlib.Path("out").glob("resume-*.pth")
    step = int(state.name[7:-4])
    assert (
        process.returncode == code
        and out.count("stopped at") == 1
        and f"stopped at step {step}; to go on from step {step}: python " in out
    ), (out, errors)
    assert errors.count("stopping after this step") == 1 and "Traceback" not in errors
    assert len(column("loss")) == step


@pytest.mark.parametrize(
    "flags, says",
    [
        ("--data_file nowhere", "nowhere: no nowhere.bin and nowhere.idx, and no nowhere.jsonl"),
        ("--bone_r 7", "bone_r 7 does not divide"),
    ],
)
def test_what_is_wrong_is_said_once(whole_documents, flags, says):
    command = [sys.executable, train.__file__, *f"{LONG} {flags}".split()]
    end = subprocess.run(
        command,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (
        end.returncode == 2
        and end.stderr.count("error: ") == 1
        and f"error: {says}" in end.stderr
        and "Traceback" not in end.stderr
    ), end.stderr
    assert not os.path.exists("out")


def test_what_cannot_be_started_is_refused(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 1)
    with pytest.raises(ValueError, match="--devices 2, but PyTorch sees 1 GPUs here"):
        train.parse_args((DEFAULTS.replace("--accelerator cpu", "") + "--devices 2").split())
    with pytest.raises(ValueError, match="--num_nodes 2 needs to know where the first machine is"):
        run("--num_nodes 2")
    for where, says in (
        ({"NODE_RANK": "2"}, "which one this is, from 0 to 1"),
        ({"NODE_RANK": "1", "MASTER_PORT": "abc"}, "MASTER_PORT abc is no port"),
    ):
        for name, value in ({"MASTER_ADDR": "127.0.0.1"} | where).items():
            monkeypatch.setenv(name, value)
        with pytest.raises(ValueError, match=says):
            run("--num_nodes 2")
    monkeypatch.setenv("RANK", "1")
    run("--epoch_steps 1")  # a RANK alone makes no world
    assert os.path.exists("out/rwkv-0.pth")
    monkeypatch.setenv("WORLD_SIZE", "four")
    with pytest.raises(ValueError, match="WORLD_SIZE four is no number of processes; unset it"):
        run("")
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(
        ValueError,
        match="--devices 2 --num_nodes 1, but WORLD_SIZE says 4; with torchrun leave both out",
    ):
        run("--devices 2")


def test_a_dry_run_says_what_each_rank_takes(true_memory, capsys):
    said = {}
    for n, strategy in (
        (1, "ddp"),
        (2, "ddp"),
        (2, "deepspeed_stage_1"),
        (2, "deepspeed_stage_3"),
        (8, "deepspeed_stage_3"),
    ):
        flags = f"--grad_cp 1 --ctx_len 8 --micro_bsz 1 --devices {n} --strategy {strategy}"  # so that there is little beside gradients
        built, said[n, strategy] = estimate.expected_memory(
            resolve_options(train.parse_args((DEFAULTS + flags).split())), torch.device("cpu")
        )
    one, ddp, zero, two, eight = said.values()
    assert (
        ddp["weights"] == one["weights"]
        and zero["optimizer"] == ddp["optimizer"] / 2
        and zero["weights"] == one["weights"]
    )
    assert (
        two["weights"] == one["weights"] / 2
        and eight["weights"] == one["weights"] / 8
        and two["gathered weights"] == eight["gathered weights"]
    )
    gradients = 4 * build.count_parameters(built[0])[0]
    assert (
        sum(ddp.values()) - sum(one.values()) > 0.4 * gradients
    )  # which stay in their place from one step to the next
    assert (
        two["activations, gradients"] == one["activations, gradients"] / 2
        and eight["activations, gradients"] == one["activations, gradients"] / 8
    )
    assert two["workspace"] - eight["workspace"] == pytest.approx(
        3 / 8 * (gradients - one["activations, gradients"]), rel=0.01
    )  # those of the first block, and outside
    run("--devices 2 --strategy deepspeed_stage_3 --dry_run")
    assert "each of 2 ranks, by FSDP2, all weights shared out:\n" in capsys.readouterr().out


if __name__ == "__main__":
    torch.distributed.init_process_group("gloo")
    devices.world = lambda *_: contextlib.nullcontext()  # the group is there already
    with (
        contextlib.redirect_stdout(open(os.devnull, "w"))
        if devices.rank()
        else contextlib.nullcontext()
    ):
        {"gradients": gradients, "runs": runs, "trouble": trouble}[sys.argv[1]]()
    torch.distributed.destroy_process_group()
