"""The state of a run: what it is, and how a run goes on from it exactly.

One need not read this to understand Bone.

proj_dir/resume-N.pth is the state after N optimizer steps, a dict of tensors as they are in memory:

    weights.NAME                                what a checkpoint holds: the trained parameters,
                                                float32, whole, on however many devices
    step.NAME, exp_avg.NAME, exp_avg_sq.NAME    Adam's, of each trained parameter; with adamw8bit
                                                codes, and exp_avg_scale.NAME, exp_avg_sq_scale.NAME
    rng                                         PyTorch's random state
    about                                       the metadata, as JSON in bytes (uint8): Progress,
                                                gradient scaler, command line, fingerprints

A batch is a function of (seed, step), so the step says where in the data the run is. A step has
the same micro batches on any number of devices.
"""

import dataclasses
import json
import math
import os
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

import devices
import options
import sharding
from adamw8bit import moments_like
from archive import ABOUT, all_finite, drop_mapped_pages, read_tensors
from run_folder import states

MAX_BAD_STEPS_IN_A_ROW = 10


# ---- progress ---------------------------------------------------------------------------------


@dataclasses.dataclass
class Progress:
    """Where a run is. (A state holds it under these names.)"""

    # Optimizer steps since epoch 0, those left out included.
    step: int
    # Loss of each step of the epoch so far, NaN where no token counts. The list is empty again when
    # the epoch is closed: when its checkpoint, if it has one, is written.
    losses: list[float] = dataclasses.field(default_factory=list)
    # Steps left out because fp16 could not hold the gradient.
    overflows: int = 0
    # Steps left out because loss or gradient were not finite.
    bad: int = 0
    bad_in_a_row: int = 0
    # Steps in which no token counts. Nothing is learnt in them.
    empty: int = 0
    # With --eval_steps: the last step, but for an epoch's last, after which the held-out loss was
    # measured; the best held-out loss, whose checkpoint was kept; and the step of that.
    evaluated: int = 0
    best_loss: float = math.inf
    best_step: int = 0

    def count(self, loss: float, norm: float, overflow: bool) -> None:
        """Count a step, by its loss and the norm of its gradient; overflow: in fp16."""
        self.step += 1
        self.losses.append(loss)
        if overflow:
            self.overflows += 1
        if overflow or math.isfinite(loss + norm):
            self.bad_in_a_row = 0
        else:
            self.bad += 1
            self.bad_in_a_row += 1

    def count_empty(self) -> None:
        """Count a step in which no token counts."""
        self.step += 1
        self.losses.append(math.nan)
        self.empty += 1

    def epochs_closed(self, steps_per_epoch: int) -> int:
        """Return how many epochs are closed; the next one is where the run is."""
        if self.losses:
            # The epoch of the last step is still open, even where that was its last one.
            return (self.step - 1) // steps_per_epoch
        return self.step // steps_per_epoch

    def check(self) -> None:
        """Raise an error that all ranks agree on, after too many bad steps in a row."""
        if self.bad_in_a_row >= MAX_BAD_STEPS_IN_A_ROW:
            # A run that is resumed from here may have as many again.
            self.bad_in_a_row = 0
            raise devices.CollectiveError(
                f"{MAX_BAD_STEPS_IN_A_ROW} steps in a row had a loss or gradient that is not "
                "finite; the weights are those from before. Look at the documents named in the "
                "log; or start again, or from an earlier state, with a smaller --lr_init, or "
                "with --precision fp32"
            )

    def summary(self, steps: int) -> str:
        """Describe the epoch. steps: those of the run; an error if none of them was taken."""
        if self.empty == steps:
            raise devices.CollectiveError(
                f"no token counts in any of {steps} steps, so nothing was learnt; look at "
                "--loss_mask, and at --ctx_len, after which documents are cut"
            )
        if self.overflows + self.bad + self.empty == steps:
            raise devices.CollectiveError(
                f"loss or gradient were not finite in each of {steps - self.empty} steps, so "
                "nothing was learnt; use --precision bf16 or fp32"
            )
        finite = [loss for loss in self.losses if math.isfinite(loss)]
        text = "no loss that is finite"
        if finite:
            text = f"mean loss {sum(finite) / len(finite):.4f}"
        if self.overflows:
            text += f", {self.overflows} steps so far left out, whose gradient fp16 could not hold"
        if self.bad:
            text += f", {self.bad} steps so far left out, whose loss or gradient was not finite"
        if self.empty:
            text += f", {self.empty} steps so far in which no token counts"
        return text


# ---- a state that was saved -------------------------------------------------------------------

ADVICE = (
    "move it away, then the one before it is used; or go on from a checkpoint, in another "
    "--proj_dir, by --bone_load rwkv-N.pth --epoch_begin N+1"
)


def own_optimizer(optimizer: Any) -> torch.optim.Optimizer:
    """Return the optimizer in a ZeroRedundancyOptimizer, of the parameters dealt to this rank.

    Any other optimizer is returned as it is.
    """
    return getattr(optimizer, "optim", optimizer)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _check_metadata(metadata: dict[str, Any], progress: Progress, path: str) -> None:
    """Refuse metadata that no run can have written.

    Raises ValueError, or whatever else values of a wrong type lead to.
    """
    for name, count in vars(progress).items():
        if name not in ("losses", "best_loss"):
            _require(type(count) is int and count >= 0, "invalid progress")
    _require(type(progress.best_loss) in (int, float), "invalid best_loss")
    _require(type(progress.losses) is list, "invalid losses")
    for loss in progress.losses:
        _require(type(loss) in (int, float), "invalid losses")
    scaler = metadata["scaler"]
    for name, value in scaler.items():
        _require(type(value) in (int, float), "invalid scaler")
        _require(value > 0 or name == "_growth_tracker", "invalid scaler")
        _require(value < 1e38, "invalid scaler")
    for name in ("growth_interval", "_growth_tracker"):
        value = scaler.get(name, 0)
        _require(type(value) is int and value < 2**31, "invalid scaler")
    _require(type(metadata["args"]) is dict, "invalid args")
    for name in ("base", "data", "wandb"):
        _require(name in metadata, f"no {name}")
    micro_batches = metadata["micro_batches"]
    _require(type(micro_batches) is int and 0 < micro_batches < 2**31, "invalid micro_batches")
    _require(
        os.path.basename(path) == f"resume-{progress.step}.pth",
        f"step {progress.step} in a file of this name",
    )


class SavedState:
    """A state that was saved: its path, metadata, progress and tensors (mapped).

    verify: verify the checksums of the tensors.
    """

    def __init__(self, path: str, *, verify: bool = True) -> None:
        self.path = path
        try:
            self.tensors = read_tensors(path, verify)
        except ValueError as error:
            what, _, _ = str(error).rpartition("; ")
            raise ValueError(f"{what}; {ADVICE}") from error
        try:
            self.metadata = json.loads(self.tensors.pop(ABOUT).numpy().tobytes())
            self.progress = Progress(**self.metadata["progress"])
            _check_metadata(self.metadata, self.progress, path)
        except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
            raise ValueError(
                f"{path}: not the state of a training ({type(error).__name__}: {error}); {ADVICE}"
            ) from error

    def forget_best_of_other(self, held_out: int | None) -> None:
        """Forget the best held-out loss, if it is of other data. held_out: their fingerprint."""
        if self.metadata.get("held_out", held_out) != held_out:
            self.progress.best_loss, self.progress.best_step = math.inf, 0

    @torch.no_grad()
    def restore(
        self,
        weights: dict[str, torch.nn.Parameter],
        optimizer: Any,
        scaler: torch.amp.GradScaler,
    ) -> Progress:
        """Put the state into place. Return its Progress.

        Raises ValueError, with the weights as they were, where it does not fit.
        """
        optimizer = own_optimizer(optimizer)
        self._check_tensors(weights, optimizer)
        try:
            scaler.load_state_dict(self.metadata["scaler"])
            torch.set_rng_state(self.tensors["rng"].clone())
        except (KeyError, RuntimeError, TypeError) as error:
            first_line, _, _ = str(error).partition("\n")
            raise ValueError(
                f"{self.path}: its gradient scaler or random state is invalid ({first_line}); "
                "move it away"
            ) from error
        mine = {p for group in optimizer.param_groups for p in group["params"]}
        for name, p in weights.items():
            p.copy_(sharding.local_shard(self.tensors[f"weights.{name}"], p))
            if p in mine and f"step.{name}" in self.tensors:
                optimizer.state[p] = self._moments_of(name, p, moments_like(optimizer, p))
        # Otherwise the file would stay mapped, and its room on the disk taken when it is deleted.
        self.tensors.clear()
        return self.progress

    def _moments_of(
        self, name: str, p: torch.nn.Parameter, keys: Iterable[str]
    ) -> dict[str, Tensor]:
        """Return what Adam holds of a parameter, on its device, and this rank's part of it."""
        adam = {}
        for key in keys:
            tensor = self.tensors[f"{key}.{name}"]
            if key != "step":
                tensor = sharding.local_shard(tensor, p)
            adam[key] = tensor.to(p.device, copy=True)
        return adam

    def _check_tensors(
        self, weights: dict[str, torch.nn.Parameter], optimizer: torch.optim.Optimizer
    ) -> None:
        """Refuse tensors that are not those of a run with these weights."""
        # Earlier versions saved this, too; nothing random happens on a GPU.
        self.tensors.pop("rng_cuda", None)
        expected = self._expected(weights, optimizer)
        wrong_names = sorted(expected.keys() ^ self.tensors.keys())
        if wrong_names:
            name = wrong_names[0]
            what = "is missing" if name in expected else "has no place in this run"
            raise ValueError(
                f"{self.path}: {name} {what}; it was saved by a run with other parameters"
            )
        at_least = {"step": 1, "exp_avg_sq": 0, "exp_avg_scale": 0, "exp_avg_sq_scale": 0}
        for name, tensor in self.tensors.items():
            key, _, _ = name.partition(".")
            least = at_least.get(key, -math.inf)
            fits = (tensor.shape, tensor.dtype) == expected[name]
            if not fits or not all_finite(tensor) or tensor.min() < least:
                raise ValueError(
                    f"{self.path}: {name} is {tuple(tensor.shape)}, {tensor.dtype}; "
                    f"{expected[name]} of finite numbers from {least} on are needed"
                )
            drop_mapped_pages(tensor)

    def _expected(
        self, weights: dict[str, torch.nn.Parameter], optimizer: torch.optim.Optimizer
    ) -> dict[str, tuple[torch.Size, torch.dtype]]:
        """Return {name: (shape, dtype)} of the tensors that the state must hold."""
        expected = {"rng": (torch.get_rng_state().shape, torch.uint8)}
        # Before the first step that was taken there are no moments.
        has_moments = any(name.startswith("exp_avg.") for name in self.tensors)
        for name, p in weights.items():
            expected[f"weights.{name}"] = (p.shape, p.dtype)
            if has_moments and p.requires_grad:
                for key, moment in moments_like(optimizer, p).items():
                    expected[f"{key}.{name}"] = (moment.shape, moment.dtype)
        return expected


def load(
    folder: str,
    wanted: str | None,
    begin: int,
    *,
    steps_per_epoch: Callable[[int], int],
    micro_batches: int,
) -> tuple[SavedState | None, int, int]:
    """Return the last state in a folder, the micro batches in a step, and the steps in an epoch.

    wanted: --resume, `last`, `auto` or None; begin: the run's first epoch, whose earlier states
    are another run's; steps_per_epoch: that number as a function of the micro batches in a step.
    The steps of a state were counted with its own micro batches in a step, so these stay;
    without a state they are `micro_batches`.

    Without a state there is None, or, for `last`, a ValueError.
    """
    found = states(folder) if wanted else {}
    if found:
        state = SavedState(found[max(found)])
        counted = state.metadata["micro_batches"]
        if state.progress.step > begin * steps_per_epoch(counted):
            return state, counted, steps_per_epoch(counted)
    if wanted == "last":
        if devices.rank():
            advice = "copy the first machine's folder"
        else:
            advice = "drop --resume to start again, or give that run's --proj_dir"
        raise ValueError(f"{folder}: holds no resume-N.pth to go on from; {advice}")
    return None, micro_batches, steps_per_epoch(micro_batches)


def goes_on(options: Any) -> bool:
    """Return whether a run has a state to go on from, as far as its folder tells."""
    return bool(options.resume and states(options.proj_dir))


def micro_batches_of_rank(options: Any) -> int:
    """Return how many micro batches of a step each rank has: of a state's, if there is one."""
    n = sharding.ranks(options)
    micro_batches = options.accumulate_grad_batches * n
    if goes_on(options):
        found = states(options.proj_dir)
        micro_batches = SavedState(found[max(found)], verify=False).metadata["micro_batches"]
    return -(-micro_batches // n)


# ---- the same run? ----------------------------------------------------------------------------


def _means_the_same(flag: str, now: dict[str, Any], then: dict[str, Any]) -> bool:
    """Return whether a flag's value is what it was, or means the same."""
    # --chunk_ctx and --bptt do nothing without --train_type infctx.
    in_chunks = now["train_type"] != "none" or then.get("train_type", "none") != "none"
    if flag in ("train_type", "chunk_ctx", "bptt") and not in_chunks:
        return True
    if flag == "train_parts":
        return sorted(now[flag]) == sorted(then.get(flag) or [])
    # A state that was saved before such a flag came has none.
    before = {"val_split": 0, "optim": "adamw"}
    return now[flag] == then.get(flag, before.get(flag))


def check_same_run(state: SavedState, flags: dict[str, Any], metadata: dict[str, Any]) -> list[str]:
    """Refuse a state of another run. Return, as text, the changed flags that may change.

    flags: those of the command line; metadata: what this run would write into its states.
    Raises ValueError.
    """
    # As they are when JSON has held them: tuples are lists.
    now = json.loads(json.dumps(flags))
    then = state.metadata["args"]
    for flag in options.fixed():
        if not _means_the_same(flag, now, then):
            raise ValueError(
                f"{state.path}: saved with --{flag} {then.get(flag)}, but --{flag} is {now[flag]}; "
                "use the same, or give another --proj_dir"
            )
    for what, flag in (("base", "load_model"), ("data", "data_file")):
        if metadata[what] != state.metadata[what]:
            raise ValueError(
                f"{state.path}: --{flag} {now[flag]} has another content than {then.get(flag)} had "
                "when this was saved; give that, or another --proj_dir"
            )
    changes = []
    for flag in options.changeable():
        if now[flag] != then.get(flag):
            changes.append(f"--{flag} {now[flag]} (was {json.dumps(then.get(flag))})")
    return changes
