"""Several devices, here processes on CPUs that talk by gloo.

They compute what one process with all their micro batches does, to the last digits, and none waits
for a dead one. Starting processes takes seconds, so one start does all jobs of its ranks:
`python test_devices.py gradients runs trouble`, run by torchrun.
"""

import contextlib
import dataclasses
import errno
import functools
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
import binidx
import build
import checkpointer
import data
import devices
import estimate
import memory
import passes
import run_state
import sharding
import train
from conftest import exhaustive
from loss import Counts, count_tokens
from passes import Passes
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

OPTIMIZERS = ("adamw", "adamw8bit")
STRATEGIES = ["ddp", *(f"deepspeed_stage_{stage}" for stage in "123")]
SAVING = "--val_file held --epoch_count 2 --save_steps 1 --keep 9 --eval_steps 2"
FLAGS = (
    DEFAULTS.replace("--epoch_steps 4 ", "").replace("--micro_bsz 4", "--micro_bsz 2")
    + "--precision fp32 --random_seed 1 "
)
# A step of these in one process is a step of FLAGS on two.
LIKE_TWO = "--epoch_steps 0 --micro_bsz 2 --accumulate_grad_batches 2 --random_seed 1 "
CPU = torch.device("cpu")
ENVIRONMENT = {"OMP_NUM_THREADS": "1"}


def start(ranks, line, **options):
    """`python LINE` as so many ranks, by torchrun."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return subprocess.run(
        [*command, "--nproc_per_node", str(ranks), *line.split()],
        env=os.environ | ENVIRONMENT | {"PYTHONWARNINGS": "ignore"},
        capture_output=True,
        text=True,
        timeout=300,
        **options,
    )


def folder_of(strategy, optim):
    """The proj_dir of a run of `runs`."""
    return f"{strategy}_{optim}"


def errors_of(end):
    return "\n".join(line for line in end.stderr.splitlines() if re.search("Error|, line ", line))


def without_delays(patch):
    """As if without matplotlib, and without looking for memory: they take longer than training."""
    patch.setitem(sys.modules, "matplotlib.figure", None)
    patch.setattr(
        memory, "expected", lambda *_, **__: {"weights": 0, "optimizer": 0, "workspace": 0}
    )


def parse(flags):
    return train.parse_args((FLAGS + flags).split())


@contextlib.contextmanager
def alone():
    """Within, this rank is a world of one."""
    before = {name: os.environ.pop(name) for name in ("WORLD_SIZE", "RANK")}
    yield
    os.environ |= before


# ---- what the ranks do: gradients --------------------------------------------------------------


def all_batches(args, documents, number, cut):
    """So many micro batches of two documents."""
    mask = args.loss_mask if args.loss_mask != "se" else ("[", "^")
    batches = []
    for first in range(0, 2 * number, 2):
        rows = [documents[i % len(documents)] for i in (first, first + 1)]
        batches.append(data.collate(rows, 32, mask, cut=cut))
    return batches


def step_of_one_process(args, batches, chunks):
    """The losses and gradients of one process with all micro batches."""
    with alone():
        model, *_ = build.build_model(args, CPU)
        model.keep_products = bool(chunks)
        losses = train.accumulate_gradients(model, batches, Passes(**chunks))
        gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
        return [value.item() for value in losses], gradients


def step_of_ranks(args, batches, per_rank, chunks):
    """The model, and this rank's losses, after so many micro batches on each rank."""
    trained_is_shared = sharding.Sharding.of(args.strategy).trained
    make = build.build_sharded_model if trained_is_shared else build.build_model
    model, *_ = make(args, CPU)
    model.keep_products = bool(chunks)
    passes = build.make_passes(args, model, CPU)
    passes = dataclasses.replace(passes, autocast=contextlib.nullcontext(), **chunks)
    compute = passes.engine
    reductions = []

    def count_reductions(state, bucket):
        reductions.append(bucket)
        return allreduce_hook(state, bucket)

    is_ddp = isinstance(compute, DistributedDataParallel)
    if is_ddp:
        compute.register_comm_hook(None, count_reductions)
    mine = batches[devices.rank() :: devices.size()]
    mine += [data.empty_batch()] * (per_rank - len(mine))
    counts = Counts(*devices.sum_over_ranks(count_tokens(mine)))
    losses = train.accumulate_gradients(model, mine, passes, counts=counts)
    # All gradients at once, when a step's last one is there.
    assert len(reductions) == is_ddp
    return model, [value.item() for value in losses]


def check_shards(model, strategy):
    """What a strategy shares out is shared out, and a rank holds its part alone."""
    shared = sharding.Sharding.of(strategy)
    for name, p in model.named_parameters():
        expected = shared.trained if p.requires_grad else shared.frozen
        assert sharding.is_shared(p) == expected, name
        if expected:
            assert p.to_local().shape[0] <= -(-p.shape[0] // devices.size()), name


def compare(flags, documents, passes=2, **chunks):
    """The largest relative difference of loss and any gradient from those of one process.

    Each rank has `passes` micro batches, the last one of them one less.
    """
    args = resolve_options(parse(flags))
    number = devices.size() * passes - 1
    batches = all_batches(args, documents, number, cut=not chunks)
    expected, expected_gradients = step_of_one_process(args, batches, chunks)
    model, losses = step_of_ranks(args, batches, passes, chunks)
    check_shards(model, args.strategy)
    losses = devices.interleave_ranks(losses)
    assert len(losses) == number + 1 and losses[number] == 0
    differences = [
        abs(found - loss) / sum(expected)
        for found, loss in zip(losses[:number], expected, strict=True)
    ]
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert trained.keys() == expected_gradients.keys()
    for name, p in trained.items():
        gradient = expected_gradients[name]
        difference = sharding.full_tensor(p.grad) - gradient
        differences.append((difference.norm() / gradient.norm()).item())
    return max(differences)


GRADIENT_CASES = [
    ("--grad_cp 1 --quant nf4 --bone_load bones.pth --loss_mask pad", {}),
    ("--train_parts time ln emb head --bone_load bones.pth --loss_mask none", {}),
    ("""--train_parts --loss_mask se --mask_id {"mask0":"^","mask1":"["}""", {}),
    (
        "--grad_cp 1 --bone_mode bone --quant int8 --loss_mask pad",
        {"chunk_ctx": 7, "bptt": 2},
    ),
]


def gradients():
    """Print the differences of all cases, a JSON list in each line."""
    documents = [binidx.Binidx("x")[i] for i in (1, 2, 3, 7, 5)]
    strategies = ("ddp", "deepspeed_stage_2", "deepspeed_stage_3")
    for strategy, (flags, chunks) in itertools.product(strategies, GRADIENT_CASES):
        integers = strategy == "deepspeed_stage_3" and "--quant" in flags
        if integers and not sharding.shares_out_integers():
            with pytest.raises(ValueError, match=r"2\.12 or newer, and this is 2\.11"):
                resolve_options(parse(f"--strategy {strategy} {flags}"))
            continue
        difference = compare(f"--strategy {strategy} {flags}", documents, **chunks)
        if devices.rank() == 0:
            print(json.dumps([strategy, flags, difference]), flush=True)


# ---- what the ranks do: runs -------------------------------------------------------------------


def runs():
    """Train with every strategy and optimizer, each in a folder of its name.

    Where these are there, go on from there with the next strategy.
    """
    next_ones = STRATEGIES[1:] + STRATEGIES[:1]
    for strategy, next_one in zip(STRATEGIES, next_ones, strict=True):
        for optim in OPTIMIZERS:
            proj_dir = folder_of(strategy, optim)
            going_on = os.path.exists(proj_dir)
            devices.max_over_ranks([0])
            flags = f"--strategy {next_one} --resume" if going_on else f"--strategy {strategy}"
            train.train(parse(f"{SAVING} --proj_dir {proj_dir} --optim {optim} {flags}"))


# ---- what the ranks do: trouble ----------------------------------------------------------------


def second_save_fails(strategy):
    """Rank 0 finds the disk full at one save of four."""
    saves = itertools.count(1)
    plain = archive.save_stream

    def full(*arguments, **options):
        if next(saves) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        plain(*arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpointer, "save_stream", full)
        flags = f"--strategy {strategy} --save_steps 1 --keep 9 --proj_dir full_{strategy}"
        train.train(parse(flags))


def no_loss_is_a_number(strategy):
    def step(*arguments, **options):
        return [value * math.nan for value in passes.accumulate_gradients(*arguments, **options)]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "accumulate_gradients", step)
        with pytest.raises(devices.CollectiveError, match="10 steps in a row"):
            train.train(parse(f"--strategy {strategy} --epoch_count 9 --proj_dir bad_{strategy}"))


def one_gradient_overflows(strategy):
    """fp16 cannot hold one number of a gradient, which one rank has where these are shared out."""
    steps = itertools.count(1)
    shared = sharding.Sharding.of(strategy).trained

    def step(model, *arguments, **options):
        losses = passes.accumulate_gradients(model, *arguments, **options)
        if next(steps) == 2 and (devices.rank() == 1 or not shared):
            grad = next(p.grad for p in model.parameters() if p.requires_grad)
            local = grad.to_local() if shared else grad
            local.view(-1)[0] = math.inf
        return losses

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "accumulate_gradients", step)
        train.train(parse(f"--precision fp16 --strategy {strategy} --proj_dir half_{strategy}"))


NO_STATE = "rank 1: copied: holds no resume-N.pth to go on from; copy the first machine's folder"
# Else these would come from each one's args.json.
AS_FULL = "--epoch_count 1 --save_steps 1 --keep 9"
# (Flags of rank 0, of rank 1, the error of both.)
DIFFERENCES = [
    (
        "--lr_init 1",
        "--lr_init 2",
        "--lr_init differs: [12].0 on rank [01], [12].0 on rank [01]; all need the same",
    ),
    ("", "--load_model nowhere.pth", "rank 1: --load_model nowhere.pth: No such file or directory"),
    ("", "--load_model other.pth", "the content of --load_model differs"),
    ("", "--data_file held", "the content of --data_file differs"),
    (
        f"--resume {AS_FULL} --proj_dir full_ddp",
        f"--resume {AS_FULL} --proj_dir bad_ddp",
        "the step to go on from in --proj_dir differs: ",
    ),
    (
        "--resume --proj_dir full_ddp",
        "--resume --proj_dir new",
        "the args.json to go on with in --proj_dir differs: (True|False) on rank",
    ),
    (
        "--resume --proj_dir full_ddp",
        "--resume --proj_dir copied",
        NO_STATE,
    ),
]


def what_differs_is_refused():
    if devices.rank():
        torch.save(tiny(torch.float32) | {"head.weight": torch.ones(300, 64)}, "other.pth")
        os.mkdir("copied")
        shutil.copy("full_ddp/args.json", "copied")
    for *flags, says in DIFFERENCES:
        with pytest.raises(devices.CollectiveError, match=says):
            train.train(parse(flags[devices.rank()]))
        devices.max_over_ranks([0])
        assert not os.path.exists("out")


def trouble():
    for strategy in STRATEGIES:
        second_save_fails(strategy)
        no_loss_is_a_number(strategy)
        one_gradient_overflows(strategy)
    what_differs_is_refused()


# ---- tests of what they did --------------------------------------------------------------------


def write_inputs(path):
    """Documents of very different lengths; no two ranks have rows of one width."""
    with contextlib.chdir(path):
        torch.save(tiny(torch.float32), "base.pth")
        bones = {name: t + 0.01 * torch.randn_like(t) for name, t in bone_of("base.pth").items()}
        torch.save(bones, "bones.pth")
        binidx.write_binidx("x", counting([20, 33, 40, 9, 25, 30, 33, 12, 28, 33, 31, 18]))
        binidx.write_binidx("held", counting([30, 12, 40]))


@pytest.fixture
def inputs(tmp_path):
    write_inputs(tmp_path)


def do_jobs(path, ranks, jobs):
    """Have ranks do their jobs in the proj_dir `path`. Returns what `gradients` printed."""
    end = start(ranks, f"{os.path.abspath(__file__)} {jobs}", cwd=path)
    assert end.returncode == 0, errors_of(end)
    return [json.loads(line) for line in end.stdout.splitlines() if line.startswith('["')]


@pytest.fixture(scope="module")
def on_two(tmp_path_factory):
    """The folder where two ranks have trained, and the differences of their gradients."""
    path = tmp_path_factory.mktemp("on_two")
    write_inputs(path)
    return path, do_jobs(path, 2, "gradients runs")


@pytest.fixture(scope="module")
def trouble_on_two(tmp_path_factory):
    """The folder where two ranks have met trouble."""
    path = tmp_path_factory.mktemp("trouble_on_two")
    write_inputs(path)
    do_jobs(path, 2, "trouble")
    return path


@pytest.fixture(scope="module")
def on_three(on_two, tmp_path_factory):
    """The same for three ranks, which go on with the runs."""
    path = tmp_path_factory.mktemp("on_three")
    write_inputs(path)
    for strategy, optim in itertools.product(STRATEGIES, OPTIMIZERS):
        name = folder_of(strategy, optim)
        killed_in_step_2(on_two[0] / name, path / name)
    return path, do_jobs(path, 3, "gradients runs")


def killed_in_step_2(proj_dir, copy):
    """Make a copy of a run's folder as if it had been killed in step 2."""
    shutil.copytree(proj_dir, copy)
    for name in ("rwkv-0.pth", "rwkv-1.pth", *(f"resume-{n}.pth" for n in (3, 4, 5, 6))):
        os.unlink(f"{copy}/{name}")


@pytest.fixture(scope="module")
def on_one(tmp_path_factory, base_file):  # noqa: F811 (base_file is a fixture)
    """The folder where one process has done the run of two ranks."""
    path = tmp_path_factory.mktemp("on_one")
    write_inputs(path)
    with contextlib.chdir(path), pytest.MonkeyPatch.context() as patch:
        without_delays(patch)
        for optim in OPTIMIZERS:
            line = f"{LIKE_TWO} --precision fp32 {SAVING} --proj_dir {optim} --optim {optim}"
            run(line)
        run(f"{LIKE_TWO} --precision fp16 --proj_dir half")
    return path


def check_run(proj_dir, whole):
    """A run is that of one process: losses, held-out losses, weights and moments.

    Of moments in 8 bits the scales: where rounding moves a number over a border, the code differs.
    """
    for name in ("loss", "val_loss"):
        assert column(name, proj_dir) == pytest.approx(column(name, whole), rel=1e-5), name
    for name in ("rwkv-0.pth", "rwkv-1.pth", "resume-6.pth"):
        found, expected = read(f"{proj_dir}/{name}"), read(f"{whole}/{name}")
        assert found.keys() == expected.keys()
        for key, tensor in expected.items():
            assert (found[key].shape, found[key].dtype) == (tensor.shape, tensor.dtype) or (
                key == "about"
            )
            if key.startswith("exp_avg") and tensor.dtype == torch.uint8:
                neighbours = (found[key].int() - tensor.int()).abs() <= 1
                assert neighbours.float().mean() >= 0.98, (name, key)
            elif key not in ("about", "rng"):
                assert (found[key] - tensor).norm() <= 2e-4 * tensor.norm(), (name, key)
    assert {*os.listdir(proj_dir)} == {*os.listdir(whole)}


@pytest.mark.parametrize("ranks", ["on_two", exhaustive("on_three")])
def test_the_gradient_is_that_of_one_process_with_all_micro_batches(ranks, request):
    _, differences = request.getfixturevalue(ranks)
    assert len(differences) == (12 if sharding.shares_out_integers() else 10)
    for strategy, flags, difference in differences:
        assert difference <= 1e-5, (strategy, flags)


def test_a_dry_run_refuses_what_this_pytorch_cannot_share_out(inputs, monkeypatch):
    monkeypatch.setattr(sharding, "shares_out_integers", lambda: False)
    flags = f"--load_model base.pth {FLAGS} --quant nf4 --devices 2 --dry_run"
    with pytest.raises(ValueError, match=r"quantized base with PyTorch 2\.12 or newer"):
        train.train(train.parse_args(f"{flags} --strategy deepspeed_stage_3".split()))
    train.train(train.parse_args(f"{flags} --strategy deepspeed_stage_2".split()))


@pytest.mark.parametrize("optim", OPTIMIZERS)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_run_on_two_is_that_of_one_process_which_can_go_on_with_it(
    on_two, on_one, strategy, optim, monkeypatch
):
    folder = on_two[0] / folder_of(strategy, optim)  # noqa: F811
    together = []  # micro batches whose gradients one rank adds up, expected and in training

    def keep_small_gradients(model, options, micro_batches):
        together.extend([run_state.micro_batches_of_rank(options), micro_batches])

    monkeypatch.setattr(train, "keep_small_gradients", keep_small_gradients)
    check_run(folder, on_one / optim)
    copy = f"{strategy}_on_1"
    killed_in_step_2(folder, copy)
    write_inputs(".")
    run(
        f"--epoch_steps 0 --micro_bsz 2 --precision fp32 --random_seed 1 {SAVING} "
        f"--proj_dir {copy} --optim {optim} --resume"
    )
    check_run(copy, on_one / optim)
    assert together == [2, 2]
    log = pathlib.Path(copy, "train_log.txt").read_text()
    assert "; a step still has 2 micro batches, shared out among 1\n" in log


@pytest.mark.exhaustive
@pytest.mark.parametrize("optim", OPTIMIZERS)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_run_on_two_goes_on_on_three_with_another_strategy(on_three, on_one, strategy, optim):
    proj_dir = on_three[0] / folder_of(strategy, optim)
    check_run(proj_dir, on_one / optim)
    log = (proj_dir / "train_log.txt").read_text()
    assert "; a step still has 2 micro batches, shared out among 3\n" in log


@pytest.mark.exhaustive
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_save_that_fails_on_rank_0_fails_on_all(trouble_on_two, strategy):
    proj_dir = trouble_on_two / f"full_{strategy}"
    assert {path.name for path in proj_dir.glob("*.pth")} == {
        *("rwkv-0.pth", "resume-1.pth", "resume-3.pth")
    }
    log = (proj_dir / "train_log.txt").read_text()
    assert f"could not save full_{strategy}/resume-2.pth: No space left on device" in log


@pytest.mark.exhaustive
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_losses_that_are_not_finite_change_no_weight_on_any_rank(trouble_on_two, strategy):
    state = read(trouble_on_two / f"bad_{strategy}/resume-10.pth")
    base = read(trouble_on_two / "base.pth")
    for name in (name for name in base if "ln" in name):
        assert state[f"weights.{name}"].equal(base[name]), name


@pytest.mark.exhaustive
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_all_ranks_leave_out_a_step_that_overflows_on_one(trouble_on_two, on_one, strategy):
    proj_dir = trouble_on_two / f"half_{strategy}"
    log = (proj_dir / "train_log.txt").read_text()
    assert ", 1 steps so far left out, whose gradient fp16 could not hold" in log
    metadata = run_state.SavedState(f"{proj_dir}/resume-3.pth").metadata
    assert metadata["scaler"]["scale"] == 2.0**15 and metadata["progress"]["overflows"] == 1
    losses = column("loss", proj_dir)
    assert losses[:2] == pytest.approx(column("loss", on_one / "half")[:2], rel=2e-3)
    assert losses == pytest.approx(column("loss", trouble_on_two / "half_ddp"), rel=2e-3)


# ---- several machines --------------------------------------------------------------------------


def free_port():
    with socket.socket() as s:
        s.bind(("", 0))
        return s.getsockname()[1]


def start_machine(node, port, flags=""):
    """train.py on one of two machines, which are both this one."""
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "NODE_RANK": str(node)}
    line = f"{train.__file__} --load_model base.pth {FLAGS} --num_nodes 2 {flags}"
    return subprocess.Popen(
        [sys.executable, *line.split()],
        env=os.environ | ENVIRONMENT | where,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )


@pytest.mark.exhaustive
def test_two_machines_train_as_one(inputs):
    port = free_port()
    machines = [start_machine(node, port, "--strategy deepspeed_stage_3") for node in (1, 0)]
    said = [machine.communicate(timeout=120) for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], said
    (second, _), (first, _) = said
    assert second.startswith("machine 1 of 2") and second.count("\n") == 1
    assert "by FSDP2, all weights shared out" in first
    run(f"{LIKE_TWO} --precision fp32 --proj_dir whole")
    assert column("loss") == pytest.approx(column("loss", "whole"), rel=1e-5)
    assert len(column("loss")) == 3
    assert {*os.listdir("out")} - {"loss.png"} == {*os.listdir("whole")}


def test_who_waits_for_another_machine_says_so_and_can_be_stopped(inputs):
    port = free_port()
    machine = start_machine(0, port)
    where = f"127.0.0.1:{port}"
    expected = (
        f"machine 0 of 2, counted from 0: waits until all are at {where}, the first machine's"
    )
    assert machine.stdout.readline() == f"{expected}\n"
    with contextlib.closing(socket.socket()) as s:
        while s.connect_ex(("127.0.0.1", port)):  # until it does wait
            time.sleep(0.1)
    machine.send_signal(signal.SIGINT)
    assert machine.communicate(timeout=60) == ("", "")
    assert machine.returncode == -signal.SIGINT  # 130 to a shell


def test_a_port_that_is_taken_is_refused(inputs):
    with socket.socket() as s:
        s.bind(("", 0))
        port = s.getsockname()[1]
        machine = start_machine(0, port)
        _, errors = machine.communicate(timeout=60)
    assert machine.returncode == 2
    assert f"error: port {port} is taken on this machine; set another MASTER_PORT" in errors


# ---- one machine: what is said, and how it ends ------------------------------------------------

LONG = FLAGS + "--load_model base.pth --epoch_steps 40000 --save_steps 100000 --devices 2"
reads_proc = pytest.mark.skipif(
    sys.platform != "linux", reason="who started whom is read from /proc"
)


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    "flags, says",
    [
        ("", "wrote out/rwkv-0.pth"),
        ("--dry_run", "each of 2 ranks, by DDP:"),
    ],
)
def test_what_torchrun_starts_says_things_once(inputs, flags, says):
    end = start(2, f"{train.__file__} --load_model base.pth {FLAGS} {flags}")
    assert end.returncode == 0, end.stderr
    assert end.stdout.count(says) == 1 and "error" not in end.stderr


@pytest.mark.exhaustive
def test_a_run_that_is_complete_says_so_once(on_two, monkeypatch):
    monkeypatch.chdir(on_two[0])
    proj_dir = folder_of("ddp", "adamw")
    line = f"{train.__file__} --load_model base.pth {FLAGS} {SAVING} --proj_dir {proj_dir} --resume"
    end = start(2, line)
    assert end.returncode == 0, end.stderr
    assert end.stdout.count(f"{proj_dir}: this run is complete, 6 steps") == 1


def begin(strategy, program=train.__file__):
    """train.py with two ranks, in a process group of its own, after some steps.

    Returns (process, the numbers of its ranks' processes).
    """
    process = subprocess.Popen(
        [sys.executable, program, *LONG.split(), "--strategy", strategy],
        env=os.environ | ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # A shell's background has it ignored.
        preexec_fn=functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )
    curve = pathlib.Path("out/loss.csv")
    while process.poll() is None:
        if curve.exists() and len(curve.read_text().splitlines()) > 4:
            break
        time.sleep(0.05)
    children = pathlib.Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
    return process, [int(pid) for pid in children.split()]


@pytest.mark.exhaustive
@reads_proc
@pytest.mark.parametrize(
    "strategy, which",
    [("ddp", 1), ("deepspeed_stage_3", 0)],
)
def test_the_death_of_a_rank_ends_all_and_is_said(inputs, strategy, which):
    process, ranks = begin(strategy)
    os.kill(ranks[which], signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 2
    says = f"error: rank {which} of 2 was ended by SIGKILL, and the others with it"
    assert says in errors and errors.count("error: ") == 1 and "Traceback" not in errors, errors
    # With ddp rank 0 has all that a state needs.
    assert bool(list(pathlib.Path("out").glob("resume-*.pth"))) == (strategy == "ddp")
    for pid in ranks:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


PROGRAM = f"""
import sys
sys.path.insert(0, {os.path.dirname(train.__file__)!r})
import cli, devices, train

def step(*arguments, plain=train.accumulate_gradients, steps=[], **options):
    steps.append(0)
    if devices.rank() == 1 and len(steps) == 9:
        raise ValueError("this rank alone has met it")
    return plain(*arguments, **options)

train.accumulate_gradients = step
devices.exit_process(lambda: cli.run_cli(lambda: train.train(train.parse_args())))
"""


@reads_proc
def test_an_error_of_one_rank_ends_all_and_is_said_once(inputs):
    pathlib.Path("program.py").write_text(PROGRAM)
    process, _ = begin("deepspeed_stage_2", "program.py")
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "error: rank 1: this rank alone has met it\n" in errors
    assert errors.count("error: ") == 1 and "Traceback" not in errors, errors


@reads_proc
@pytest.mark.parametrize(
    "strategy, how, code",
    [
        ("deepspeed_stage_2", signal.SIGINT, 130),
        exhaustive("ddp", signal.SIGTERM, 143),
    ],
)
def test_ctrl_c_saves_once_on_all_ranks_at_the_same_step(inputs, strategy, how, code):
    process, _ = begin(strategy)
    if how == signal.SIGINT:  # a terminal's Ctrl-C reaches its whole process group
        os.killpg(process.pid, how)
    else:
        process.send_signal(how)
    out, errors = process.communicate(timeout=60)
    assert process.returncode == code
    [state] = pathlib.Path("out").glob("resume-*.pth")
    step = int(state.name[7:-4])
    assert f"stopped at step {step}; to go on from step {step}: python " in out, (out, errors)
    assert out.count("stopped at") == 1 and errors.count("stopping after this step") == 1
    assert "Traceback" not in errors and "Signal" not in errors, errors
    assert len(column("loss")) == step


def test_what_is_wrong_is_said_once(inputs):
    """Here what only the ranks find out, since they read the base."""
    end = subprocess.run(
        [sys.executable, train.__file__, *LONG.split(), "--bone_r", "7"],
        env=os.environ | ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert end.returncode == 2
    assert end.stderr.startswith("error: bone_r 7 does not divide") and end.stderr.count("\n") == 1
    assert not os.path.exists("out")


def test_what_cannot_be_started_is_refused(monkeypatch):
    def must_not_start(*_):
        pytest.fail("ranks were started")

    monkeypatch.setattr(devices, "launch", must_not_start)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 1)
    with pytest.raises(ValueError, match="--devices 2, but PyTorch sees 1 GPUs here"):
        train.parse_args((DEFAULTS.replace("--accelerator cpu", "") + "--devices 2").split())
    with pytest.raises(ValueError, match="--num_nodes 2 needs to know where the first machine is"):
        run("--num_nodes 2")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("NODE_RANK", "2")
    with pytest.raises(ValueError, match="which one this is, from 0 to 1"):
        run("--num_nodes 2")
    monkeypatch.setenv("NODE_RANK", "1")
    monkeypatch.setenv("MASTER_PORT", "abc")
    with pytest.raises(ValueError, match="MASTER_PORT abc is not a port"):
        run("--num_nodes 2")


def test_what_the_environment_says_of_ranks_is_checked(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    run("--epoch_steps 1")  # a RANK alone makes no world
    assert os.path.exists("out/rwkv-0.pth")
    monkeypatch.setenv("WORLD_SIZE", "four")
    with pytest.raises(ValueError, match="WORLD_SIZE four is not a number of processes; unset it"):
        run("")
    monkeypatch.setenv("WORLD_SIZE", "4")
    says = "--devices 2 --num_nodes 1, but WORLD_SIZE says 4; with torchrun leave both out"
    with pytest.raises(ValueError, match=says):
        run("--devices 2")
    says = "WORLD_SIZE is set, but not LOCAL_RANK, MASTER_ADDR, MASTER_PORT; unset it, or start"
    with pytest.raises(ValueError, match=says):
        run("")
    with socket.socket() as s:
        s.bind(("", 0))
        where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(s.getsockname()[1])}
        for name, value in (where | {"RANK": "0", "LOCAL_RANK": "0"}).items():
            monkeypatch.setenv(name, value)
        with pytest.raises(ValueError, match=f"port {where['MASTER_PORT']} is taken"):
            run("")


# ---- memory ------------------------------------------------------------------------------------


def expected_memory(ranks, strategy):
    """What each of so many ranks takes, of a step that has little beside gradients."""
    flags = f"--grad_cp 1 --ctx_len 8 --micro_bsz 1 --devices {ranks} --strategy {strategy}"
    return estimate.expected_memory(
        resolve_options(train.parse_args((DEFAULTS + flags).split())), CPU
    )


def test_a_dry_run_says_what_each_rank_takes(true_memory, capsys):  # noqa: F811 (a fixture)
    built, one = expected_memory(1, "ddp")
    _, ddp = expected_memory(2, "ddp")
    _, zero = expected_memory(2, "deepspeed_stage_1")
    _, two = expected_memory(2, "deepspeed_stage_3")
    _, eight = expected_memory(8, "deepspeed_stage_3")
    assert ddp["weights"] == zero["weights"] == one["weights"]
    assert zero["optimizer"] == ddp["optimizer"] / 2
    assert two["weights"] == one["weights"] / 2
    assert eight["weights"] == one["weights"] / 8
    assert two["gathered weights"] == eight["gathered weights"]
    # DDP's gradients stay in their place from one step to the next.
    gradients = 4 * build.count_parameters(built[0])[0]
    assert sum(ddp.values()) - sum(one.values()) > 0.4 * gradients
    of_one = one["activations, gradients"]
    assert two["activations, gradients"] == of_one / 2
    assert eight["activations, gradients"] == of_one / 8
    # The gradients of the first block, and outside of the blocks.
    difference = two["workspace"] - eight["workspace"]
    assert difference == pytest.approx(3 / 8 * (gradients - of_one), rel=0.01)
    run("--devices 2 --strategy deepspeed_stage_3 --dry_run")
    assert "each of 2 ranks, by FSDP2, all weights shared out:\n" in capsys.readouterr().out


if __name__ == "__main__":
    patch = pytest.MonkeyPatch()
    without_delays(patch)
    torch.distributed.init_process_group("gloo")
    # The group is there already.
    patch.setattr(devices, "world", contextlib.nullcontext)
    with contextlib.ExitStack() as silence:
        if devices.rank():
            nowhere = silence.enter_context(open(os.devnull, "w"))
            silence.enter_context(contextlib.redirect_stdout(nowhere))
        for name in sys.argv[1:]:
            began = time.perf_counter()
            {"gradients": gradients, "runs": runs, "trouble": trouble}[name]()
            print(name, round(time.perf_counter() - began, 1), "s")
    torch.distributed.destroy_process_group()
