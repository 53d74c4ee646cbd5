"""A run that can be stopped anywhere and goes on exactly: its state, the lock on its folder, the signals that end it.

proj_dir/resume-N.pth is the state after N optimizer steps, a dict of tensors as they are in memory:

    weights.NAME                                 what a checkpoint holds, the trained parameters in float32, whole, on however many devices
    step.NAME, exp_avg.NAME, exp_avg_sq.NAME     Adam's, of each trained parameter
    rng                                          PyTorch's random state
    about                                        the rest, as JSON in bytes (uint8): Progress, gradient scaler, command line, fingerprints

A batch is a function of (seed, step), so the step says where in the data the run is. A step has the same micro batches on any number of devices.
"""

import contextlib
import dataclasses
import glob
import json
import math
import os
import pathlib
import re
import shlex
import shutil
import signal
import sys
import time

import filelock
import torch

import devices
import sharding
from archive import (
    ABOUT,
    all_finite,
    read_tensors,
    release,
    remove_leftovers,
    save_stream,
    trained_quant,
)
from cli import STOPPING, let_go_of_broken_output

# Flags that say what a step computes; with another value a state would mean something else. Paths may differ: contents are compared.
FIXED = (
    "bone_r",
    "bone_mode",
    "train_parts",
    "ctx_len",
    "dataload",
    "data_shuffle",
    "loss_mask",
    "mask_id",
    "epoch_begin",
    "epoch_steps",
    "micro_bsz",
    "accumulate_grad_batches",
    "random_seed",
    "precision",
    "quant",
    "train_type",
    "chunk_ctx",
    "bptt",
)
CHANGEABLE = (
    "epoch_count",
    "lr_init",
    "lr_final",
    "warmup_steps",
    "beta1",
    "beta2",
    "adam_eps",
    "weight_decay",
    "layerwise_lr",
)


HOPELESS = 10  # steps in a row whose loss or gradient is not finite


@dataclasses.dataclass
class Progress:
    """Where a run is."""

    step: int  # optimizer steps since epoch 0, those left out included
    losses: list = dataclasses.field(
        default_factory=list
    )  # of the epoch's steps so far; empty again when its checkpoint is written
    overflows: int = 0  # steps left out as fp16 could not hold the gradient
    bad: int = 0  # steps left out as loss or gradient were not finite
    bad_in_a_row: int = 0

    def count(self, loss, norm, overflow):
        bad = not overflow and not math.isfinite(loss + norm)
        self.overflows, self.bad, self.bad_in_a_row = (
            self.overflows + overflow,
            self.bad + bad,
            self.bad_in_a_row + 1 if bad else 0,
        )
        self.losses.append(loss)
        self.step += 1

    def check(self):
        if self.bad_in_a_row >= HOPELESS:
            self.bad_in_a_row = 0
            raise devices.CollectiveError(
                f"{HOPELESS} steps in a row had a loss or gradient that is not finite; the weights are those from before. Look at the "
                "documents named in the log; or begin anew, or from an earlier state, with a smaller --lr_init, or with --precision fp32"
            )

    def summary(self, steps):
        """The epoch in words. ValueError where none of the run's `steps` was taken."""
        if self.overflows + self.bad == steps:
            raise devices.CollectiveError(
                f"loss or gradient were not finite in each of {steps} steps, so nothing was learnt; use --precision bf16 or fp32"
            )
        finite = [loss for loss in self.losses if math.isfinite(loss)]
        return (
            (f"mean loss {sum(finite) / len(finite):.4f}" if finite else "no loss that is finite")
            + f", {self.overflows} steps so far left out, whose gradient fp16 could not hold"
            * bool(self.overflows)
            + f", {self.bad} steps so far left out, whose loss or gradient was not finite"
            * bool(self.bad)
        )


def states(folder, first=-1):
    """Paths of the states in a folder that are of a step after `first`, {step: path}, the last step last."""
    names = os.listdir(folder) if os.path.isdir(folder) else []
    found = {
        int(match[1]): os.path.join(folder, name)
        for name in names
        if (match := re.fullmatch(r"resume-([0-9]{1,18})\.pth", name))
    }
    return {step: found[step] for step in sorted(found) if step > first}


def prune(folder, keep, first):
    """Remove all but the last `keep` states of a run that began at step `first`, as far as the disk allows."""
    for path in [*states(folder, first).values()][:-keep]:
        with contextlib.suppress(OSError):
            os.unlink(path)


class Saver:
    """Saves a run: checkpoints, and states, of which the last `keep` stay. A disk that is full, or gone, ends no training: the log says so, and
    the next save may find it mended. about: {name: what JSON holds}; weights: {name: parameter}, what a checkpoint holds. Of several ranks, rank 0
    writes; where they share out weights or moments (shares, see sharding.py) the others send it theirs, so that all must save at once."""

    def __init__(
        self,
        folder,
        keep,
        first,
        log,
        about,
        progress,
        weights,
        optimizer,
        scaler,
        shares=sharding.Sharding(),
    ):
        self.folder, self.keep, self.first, self.log, self.about, self.progress = (
            folder,
            keep,
            first,
            log,
            about,
            progress,
        )
        self.lock = contextlib.ExitStack()  # of the folder, where that had to be made again
        self.weights, self.optimizer, self.scaler, self.shares = (
            weights,
            getattr(optimizer, "optim", optimizer),
            scaler,
            shares,
        )
        self.saved, self.whole = (
            progress.step,
            True,
        )  # the step that is on disk; whether the weights are those of progress.step

    def attempt(self, path, like, make):
        """Whether {name: make(name)} could be written to `path`. like: see save_stream."""
        names = iter(like)

        def finite(name):
            if not all_finite(tensor := make(next(names))):
                raise ValueError(f"{name} holds NaN or infinite values in {tensor.dtype}")
            return tensor

        def take_part():
            for name in names if self.shares.optimizer_state else ():
                make(name)

        if devices.rank():
            take_part()
            return not self.shares.optimizer_state or not devices.max_over_ranks([0])[0]
        failed = False
        try:
            if not os.path.exists(
                self.folder
            ):  # it vanished, and what describes the checkpoints with it
                self.lock.enter_context(lock(self.folder))
                self.log.describe()
            save_stream(like, finite, path)
        except Exception as error:  # whatever it is, days of training do not end for it
            why = getattr(error, "strerror", None) or str(error).partition("\n")[0].removeprefix(
                f"{path}: "
            )
            last = [*states(self.folder, self.first)][-1:]
            self.log.line(
                f"could not save {path}: {why}; "
                + (
                    f"what was saved before is whole, the state of step {last[0]} the last"
                    if last
                    else "no state of this run is on disk so far"
                )
            )
            take_part()  # the others wait for it
            failed = True
        return not (devices.max_over_ranks([failed])[0] if self.shares.optimizer_state else failed)

    def save_checkpoint(self, path, dtype):
        """Whether the weights could be written to `path`, in `dtype`."""
        like = {
            name: torch.empty(p.shape, dtype=dtype, device="meta")
            for name, p in self.weights.items()
        }
        return self.attempt(
            path,
            like,
            lambda name: sharding.full_tensor(self.weights[name].detach()).to("cpu", dtype),
        )

    def save_state(self, keep=None):
        about = self.about | {
            "progress": dataclasses.asdict(self.progress),
            "scaler": self.scaler.state_dict(),
        }
        rest = {"rng": torch.get_rng_state()}
        rest[ABOUT] = torch.frombuffer(bytearray(json.dumps(about).encode()), dtype=torch.uint8)
        weights, adam, dealt = (
            {f"weights.{name}": p.detach() for name, p in self.weights.items()},
            self.optimizer.state,
            self.shares.optimizer_state and not self.shares.trained,
        )
        moments = {}
        taken = (
            bool(adam) and next(iter(adam.values()))["step"].item() > 0
        )  # the first steps may have been left out
        if devices.max_over_ranks([taken])[0] if dealt else taken:
            nothing = {
                key: torch.zeros(()) for key in ("step", "exp_avg", "exp_avg_sq")
            }  # of a parameter whose moments another rank has
            moments = {
                f"{key}.{name}": tensor.expand(p.shape)
                if p not in adam and key != "step"
                else tensor
                for name, p in self.weights.items()
                if p.requires_grad
                for key, tensor in adam.get(p, nothing).items()
            }
        tensors = weights | moments | rest
        path = os.path.join(self.folder, f"resume-{self.progress.step}.pth")
        self.log.sync()
        if self.attempt(
            path,
            tensors,
            lambda name: (
                sharding.summed_on_cpu(tensors[name])
                if dealt and name in moments
                else sharding.full_tensor(tensors[name]).cpu()
            ),
        ):
            self.saved = self.progress.step
            if not devices.rank():
                prune(self.folder, keep or self.keep, self.first)

    @contextlib.contextmanager
    def changing(self):
        """Around what changes the weights and counts the step: broken off inside, a state would be half of one step and half of the next."""
        self.whole = False
        yield
        self.whole = True

    @contextlib.contextmanager
    def rescue(self):
        """Whatever ends the block, what was trained until then is saved; where it is an error, no earlier state is removed."""
        try:
            yield
        except BaseException as error:
            let_go_of_broken_output()
            end = error
            while end.__context__ and not isinstance(
                end, (KeyboardInterrupt, SystemExit)
            ):  # which a broken pipe may have come after
                end = end.__context__
            stopped = isinstance(end, (KeyboardInterrupt, SystemExit))
            together = stopped or isinstance(
                end, devices.CollectiveError
            )  # of another error the other ranks know nothing, and take no part in saving
            if (
                self.whole
                and self.progress.step != self.saved
                and not getattr(end, "impatient", False)
                and (together or not self.shares.optimizer_state)
            ):
                with only_ctrl_c():
                    self.save_state(None if stopped else 1 << 30)
                    if together:
                        devices.max_over_ranks(
                            [0]
                        )  # the others wait: whoever started the ranks ends all when the first one ends
            if not stopped:
                if self.saved == self.progress.step:
                    self.log.line(f"the state of step {self.saved} was saved")
                raise
            if devices.rank():
                raise end from None
            last, again = (
                [*states(self.folder, self.first)][-1:],
                f"python {shlex.join(sys.argv + ['--resume'] * ('--resume' not in sys.argv))}",
            )
            again = (
                again
                if devices.started_here()
                else "the same command, on each machine, with --resume"
            )
            self.log.line(
                f"stopped at step {self.progress.step}; "
                + (f"to go on from step {last[0]}: {again}" if last else "nothing was saved")
            )
            raise end from None
        finally:
            self.lock.close()


class State:
    """A state that was saved: path, about (dict), progress, tensors (mapped)."""

    def __init__(self, path):
        advice = (
            "move it away, then the one before it is used; or go on from a checkpoint, in another --proj_dir, by --bone_load rwkv-N.pth "
            "--epoch_begin N+1"
        )
        try:
            self.path, self.tensors = path, read_tensors(path)
        except ValueError as error:
            raise ValueError(f"{str(error).rpartition('; ')[0]}; {advice}") from error
        try:
            self.about = json.loads(self.tensors.pop(ABOUT).numpy().tobytes())
            self.progress = Progress(**self.about["progress"])
            counts = [number for name, number in vars(self.progress).items() if name != "losses"]
            losses, scaler = self.progress.losses, self.about["scaler"]
            for right, what in (
                (all(type(n) is int and n >= 0 for n in counts), "progress"),
                (type(losses) is list and all(type(n) in (int, float) for n in losses), "losses"),
                (
                    all(
                        type(n) in (int, float)
                        and (n > 0 or name == "_growth_tracker")
                        and n < 1e38
                        for name, n in scaler.items()
                    ),
                    "scaler",
                ),
                (
                    all(
                        type(scaler.get(name, 0)) is int and scaler.get(name, 0) < 2**31
                        for name in ("growth_interval", "_growth_tracker")
                    ),
                    "scaler",
                ),
                (
                    type(self.about["args"]) is dict
                    and {"base", "data", "wandb"} <= self.about.keys(),
                    "args",
                ),
                (
                    type(self.about["micro_batches"]) is int
                    and 0 < self.about["micro_batches"] < 2**31,
                    "micro_batches",
                ),
                (
                    os.path.basename(path) == f"resume-{self.progress.step}.pth",
                    f"step {self.progress.step}, in a file of this name,",
                ),
            ):
                if not right:
                    raise ValueError(f"{what} cannot be")
        except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
            raise ValueError(
                f"{path}: not the state of a training ({type(error).__name__}: {error}); {advice}"
            ) from error

    @torch.no_grad()
    def restore(self, weights, optimizer, scaler):
        """Put the state into place. Returns its Progress. ValueError, with the weights as they were, where it does not fit."""
        optimizer = getattr(
            optimizer, "optim", optimizer
        )  # ZeroRedundancyOptimizer's own, of the parameters that are dealt to this rank
        mine = {p for group in optimizer.param_groups for p in group["params"]}
        tensors, trained = self.tensors, [name for name, p in weights.items() if p.requires_grad]
        expected = {f"weights.{name}": (p.shape, p.dtype) for name, p in weights.items()} | {
            "rng": (torch.get_rng_state().shape, torch.uint8)
        }
        if any(
            name.startswith("exp_avg.") for name in tensors
        ):  # there are none before the first step that was taken
            expected |= {
                f"{key}.{name}": (weights[name].shape, weights[name].dtype)
                for name in trained
                for key in ("exp_avg", "exp_avg_sq")
            }
            expected |= {f"step.{name}": (torch.Size(), torch.float32) for name in trained}
        tensors.pop("rng_cuda", None)  # of earlier versions; nothing random happens on a GPU
        for name in sorted(expected.keys() ^ tensors.keys()):
            raise ValueError(
                f"{self.path}: {name} {'is missing' if name in expected else 'has no place in this run'}; it was saved by a run with other parameters"
            )
        for name, tensor in tensors.items():
            least = {"step": 1, "exp_avg_sq": 0}.get(name.partition(".")[0], -math.inf)
            if (
                (tensor.shape, tensor.dtype) != expected[name]
                or not all_finite(tensor)
                or tensor.min() < least
            ):
                raise ValueError(
                    f"{self.path}: {name} is {tuple(tensor.shape)}, {tensor.dtype}; {expected[name]} of finite numbers from {least} on are needed"
                )
            release(tensor)
        try:
            scaler.load_state_dict(self.about["scaler"])
            torch.set_rng_state(tensors["rng"].clone())
        except (KeyError, RuntimeError, TypeError) as error:
            raise ValueError(
                f"{self.path}: its gradient scaler or random state cannot be ({str(error).partition(chr(10))[0]}); move it away"
            ) from error
        for name, p in weights.items():
            p.copy_(sharding.local_shard(tensors[f"weights.{name}"], p))
            if f"step.{name}" in tensors and p in mine:
                parts = {
                    key: tensors[f"{key}.{name}"]
                    if key == "step"
                    else sharding.local_shard(tensors[f"{key}.{name}"], p)
                    for key in ("step", "exp_avg", "exp_avg_sq")
                }
                optimizer.state[p] = {
                    key: tensor.to(p.device, copy=True) for key, tensor in parts.items()
                }
        tensors.clear()  # else the file would stay mapped, and its room on the disk taken when it is removed
        return self.progress


def load(folder, wanted, begin, steps, micro_batches):
    """The last State in a folder of a run that began at epoch `begin`, and what the run is, (micro batches in a step, steps in an epoch): the
    state's own, since its steps were counted with them, or else `micro_batches`. steps: the function of the one that gives the other.
    Where there is no such state: None for `wanted`, --resume, `auto` or None, else a ValueError."""
    last = [*states(folder).values()][-1:] if wanted else []
    for state in map(State, last):
        counted = state.about["micro_batches"]
        if state.progress.step > begin * steps(counted):
            return state, counted, steps(counted)
    if wanted == "last":
        raise ValueError(
            f"{folder}: holds no resume-N.pth to go on from; "
            + (
                "copy the first machine's folder"
                if devices.rank()
                else "drop --resume to begin anew, or give that run's --proj_dir"
            )
        )
    return None, micro_batches, steps(micro_batches)


def check_same_run(state, args, about):
    """What the command line changes, as flags, against that of the state; ValueError where the run would be another one."""
    now, then = json.loads(json.dumps(vars(args))), state.about["args"]
    for flag in FIXED:
        if flag in ("train_type", "chunk_ctx", "bptt") and {
            now["train_type"],
            then.get("train_type", "none"),
        } == {"none"}:
            continue
        if now[flag] != then.get(flag) and not (
            flag == "train_parts" and sorted(now[flag]) == sorted(then.get(flag) or [])
        ):
            raise ValueError(
                f"{state.path}: saved with --{flag} {then.get(flag)}, but --{flag} is {now[flag]}; use the same, or give another --proj_dir"
            )
    for what, flag in (("base", "load_model"), ("data", "data_file")):
        if about[what] != state.about[what]:
            raise ValueError(
                f"{state.path}: --{flag} {now[flag]} has another content than {then.get(flag)} had when this was saved; give that, or another "
                "--proj_dir"
            )
    return [
        f"--{flag} {now[flag]} (was {json.dumps(then.get(flag))})"
        for flag in CHANGEABLE
        if now[flag] != then.get(flag)
    ]


def check_folder(args, paths, first, progress, same):
    """ValueError where proj_dir cannot take this run, from step `first`: what it would write is there, of another run.
    paths: {step: checkpoint after that step}; progress: of the state to go on from, or None; same: whether it is the same run exactly."""
    for path in () if progress else states(args.proj_dir, first).values():
        raise ValueError(
            f"{path}: the state of an earlier run; go on with it by --resume, give another --proj_dir, or move it away"
        )
    for step, path in paths.items():
        if os.path.lexists(path) and not (progress and (same or step <= progress.step)):
            raise ValueError(
                f"{path}: already there, from an earlier run; give another --proj_dir, or move it away"
            )
    for path in glob.glob(os.path.join(glob.escape(args.proj_dir), "rwkv-*.pth")):
        trained_quant(
            path, args.quant
        )  # args.json, which is written anew, must stay true of what is there


def check_room(args, built, paths, first, step):
    """ValueError where the disk has no room for the checkpoints and states to come after `step`, of a run that began at `first`."""
    model, names, dtype = built
    numbers = sum(p.numel() for name, p in model.named_parameters() if name in names)
    to_come = [path for at, path in paths.items() if at >= step and not os.path.exists(path)]
    # A state holds, in float32, weights and Adam's two moments; the new one is there before the old one goes.
    need = numbers * (
        dtype.itemsize * len(to_come)
        + 12 * max(0, args.keep + 1 - len(states(args.proj_dir, first)))
    )
    free = shutil.disk_usage(args.proj_dir).free
    if need > free:
        raise ValueError(
            f"{args.proj_dir}: the run will write {need / 1e6:,.0f} MB, but the disk has {free / 1e6:,.0f} MB free; make room, give another "
            "--proj_dir, or save less by --epoch_save"
        )


@contextlib.contextmanager
def lock(folder):
    """Make a folder where it is missing, and hold its lock. ValueError where another living process does; when one dies, the system lets go of
    its lock. A folder that was made, and is still empty at the end, is removed."""
    if os.path.exists(folder) and not os.path.isdir(folder):
        raise ValueError(
            f"--proj_dir {folder} is a file; give a folder, which is made where it is missing"
        )
    path, made = (
        pathlib.Path(folder, ".lock"),
        [p for p in (pathlib.Path(folder), *pathlib.Path(folder).parents) if not p.exists()],
    )
    for name in (".lock", "train_log.txt", "loss.csv", "wandb"):
        if os.path.islink(link := os.path.join(folder, name)):
            raise ValueError(
                f"{link}: a symbolic link, through which this run would write elsewhere; remove it"
            )
        if os.path.exists(link) and not (os.path.isdir if name == "wandb" else os.path.isfile)(
            link
        ):
            raise ValueError(
                f"{link}: is no {'folder' if name == 'wandb' else 'file'}, as this run needs it; move it away"
            )
    held = filelock.FileLock(path)
    try:
        os.makedirs(folder, exist_ok=True)
        held.acquire(timeout=0)
    except filelock.Timeout as error:
        raise ValueError(
            f"{folder}: another run, process {path.read_text() or 'unknown'}, is training there; wait for its end, or give another --proj_dir"
        ) from error
    except OSError as error:
        raise ValueError(
            f"--proj_dir {folder} cannot be written ({error.strerror}); give another"
        ) from error
    try:
        soft = isinstance(
            held, filelock.SoftFileLock
        )  # where the file system knows no locks: the file itself is one, with its own content
        soft or path.write_text(str(os.getpid()))
        for name in ("resume-*.pth", "rwkv-*.pth"):
            remove_leftovers(os.path.join(glob.escape(folder), name))
        yield
    finally:
        with contextlib.suppress(OSError):
            soft or path.unlink()  # while it is held: who opened it meanwhile sees that it has no name any more
        held.release()
        for empty in made:
            with contextlib.suppress(OSError):
                empty.rmdir()


@contextlib.contextmanager
def only_ctrl_c():
    """Requests to end, of which supervisors send several, do not break this block off; Ctrl-C does."""
    before = {
        number: signal.signal(number, signal.SIG_IGN)
        for number in STOPPING
        if number != signal.SIGINT
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def unbroken():
    """Ctrl-C and a request to end break nothing off in this block, but what it yields, a function: where that is called, it ends, on all ranks at the
    same step. A second Ctrl-C does not wait, and its KeyboardInterrupt has `impatient` set; but one that a wrapper passes on beside the terminal's,
    at the same moment, is none."""
    caught, since = [], 0

    def handle(number, frame):
        nonlocal since
        if caught and number == signal.SIGINT and time.monotonic() - since > 0.2:
            end = KeyboardInterrupt()
            end.impatient = True
            raise end
        since = since if caught else time.monotonic()
        caught.append(number)
        if len(caught) > 1 or devices.rank():
            return
        said = b"\nstopping after this step\n"
        if devices.size() == 1:  # torchrun passes on no second Ctrl-C
            said = b"\nstopping after this step; once more stops at once, without saving\n"
        with contextlib.suppress(
            OSError
        ):  # of a terminal that is closed, a pipe whose reader the same Ctrl-C ended
            os.write(2, said)

    def check():
        if number := int(devices.max_over_ranks([caught[0] if caught else 0])[0]):
            if not caught:
                time.sleep(
                    0.5
                )  # another rank was told first: what this one is about to be told is not a second time
            if number not in before:  # which this one has ignored
                raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)
            before[number](number, None)

    before = {
        number: signal.signal(number, handle)
        for number in STOPPING
        if callable(signal.getsignal(number))
    }
    try:
        yield check
    except BrokenPipeError:
        if caught:  # the same Ctrl-C has ended the reader of what is said here
            before[caught[0]](caught[0], None)
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
