"""Save a run: write its checkpoints and states whole, on one rank, whatever happens.

One need not read this to understand Bone.
"""

import contextlib
import dataclasses
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

import devices
import sharding
from adamw8bit import moments_like
from archive import ABOUT, all_finite, save_stream
from bone_record import make_records
from cli import command_to_resume, silence_broken_pipes
from run_folder import delete_old_states, lock, states
from run_log import Log
from run_state import Progress, own_optimizer
from stop_signals import StopNow, only_ctrl_c


@dataclasses.dataclass(kw_only=True)
class Checkpointer:
    """Save a run: its checkpoints, and its states.

    A disk that is full, or gone, ends no training: the log says so, and the next save may find
    it in order again. Of several ranks, rank 0 writes, and all come to every save.
    """

    folder: str
    # How many states stay.
    keep: int
    # The run's first step.
    first: int
    log: Log
    # What a state says of its run, as JSON holds it.
    metadata: dict[str, Any]
    progress: Progress
    # What a checkpoint holds.
    weights: dict[str, torch.nn.Parameter]
    optimizer: Any
    scaler: torch.amp.GradScaler
    # After so many minutes a new state is due; 0: never.
    save_minutes: float = 0.0
    # What the ranks share out.
    shares: sharding.Sharding = dataclasses.field(default_factory=sharding.Sharding)

    def __post_init__(self) -> None:
        self.optimizer = own_optimizer(self.optimizer)
        # The step whose state is on disk.
        self.saved = self.progress.step
        # When the last save of a state began, in seconds of time.monotonic().
        self.saved_at = time.monotonic()
        # Whether the weights are those of progress.step.
        self.weights_consistent = True
        # Of the folder, where that had to be made again.
        self.lock = contextlib.ExitStack()

    def is_due(self) -> bool:
        """Return whether a state is due by this rank's clock, as --save_minutes has it."""
        minutes = (time.monotonic() - self.saved_at) / 60
        return 0 < self.save_minutes <= minutes

    def save_checkpoint(self, path: str, dtype: Mapping[str, torch.dtype]) -> bool:
        """Write the weights to `path`, each in its dtype. Return whether that worked."""
        like = {}
        for name, p in self.weights.items():
            like[name] = torch.empty(p.shape, dtype=dtype[name], device="meta")

        def gather(name: str) -> Tensor:
            return sharding.full_tensor(self.weights[name].detach()).to("cpu", dtype[name])

        return self._gather_and_write(path, like, gather, records=make_records(self.metadata))

    def save_state(self, *, delete_old: bool = True, alone: bool = False) -> None:
        """Write the state of this step, then delete old ones.

        alone: no other rank comes to this save.
        """
        self.saved_at = time.monotonic()
        metadata = self.metadata | {
            "progress": dataclasses.asdict(self.progress),
            "scaler": self.scaler.state_dict(),
        }
        in_bytes = bytearray(json.dumps(metadata).encode())
        moments = self._moments()
        tensors = {f"weights.{name}": p.detach() for name, p in self.weights.items()}
        tensors |= moments
        tensors["rng"] = torch.get_rng_state()
        tensors[ABOUT] = torch.frombuffer(in_bytes, dtype=torch.uint8)

        def gather(name: str) -> Tensor:
            if self._moments_are_dealt() and name in moments:
                return sharding.summed_on_cpu(tensors[name])
            return sharding.full_tensor(tensors[name]).cpu()

        path = os.path.join(self.folder, f"resume-{self.progress.step}.pth")
        self.log.sync()
        if self._gather_and_write(path, tensors, gather, alone=alone):
            self.saved = self.progress.step
            if delete_old and devices.rank() == 0:
                delete_old_states(self.folder, self.keep, self.first)

    @contextlib.contextmanager
    def step_in_progress(self) -> Iterator[None]:
        """Mark what changes the weights and counts the step.

        Broken off inside, a state would be half of one step and half of the next: none is saved.
        """
        self.weights_consistent = False
        yield
        self.weights_consistent = True

    @contextlib.contextmanager
    def save_on_exit(self) -> Iterator[None]:
        """Save what was trained when anything ends the block; an error deletes no old state."""
        try:
            yield
        except BaseException as error:
            silence_broken_pipes()
            self._save_after(error)
            if not isinstance(error, (KeyboardInterrupt, SystemExit)):
                if self.saved == self.progress.step:
                    self.log.line(f"the state of step {self.saved} was saved")
            elif devices.rank() == 0:
                self._say_how_to_go_on()
            raise
        finally:
            self.lock.close()

    def _save_after(self, error: BaseException) -> None:
        """Save the state after the error that ends the run, unless it is saved already."""
        if self.progress.step == self.saved or not self.weights_consistent:
            return
        if isinstance(error, StopNow):
            return
        stopped = isinstance(error, (KeyboardInterrupt, SystemExit))
        # Of another error the other ranks know nothing, and do not come to this save.
        together = stopped or isinstance(error, devices.CollectiveError)
        if not together and self.shares.optimizer_state:
            return
        with only_ctrl_c():
            self.save_state(delete_old=stopped, alone=not together)
            if together:
                # Whoever started the ranks ends all of them when the first one ends.
                devices.max_over_ranks([0])

    def _say_how_to_go_on(self) -> None:
        found = states(self.folder, self.first)
        if not found:
            advice = "nothing was saved"
        elif devices.started_here():
            advice = f"to go on from step {max(found)}: {command_to_resume(self.folder)}"
        else:
            advice = (
                f"to go on from step {max(found)}: the same command, on each machine, with --resume"
            )
        self.log.line(f"stopped at step {self.progress.step}; {advice}")

    def _moments_are_dealt(self) -> bool:
        """Return whether each parameter's moments are on one rank, while all have its weights."""
        return self.shares.optimizer_state and not self.shares.trained

    def _moments(self) -> dict[str, Tensor]:
        """Return Adam's tensors, {key.NAME: tensor}; none before the first step that was taken.

        Zeros stand for moments that another rank has: the sum over all ranks is what is saved.
        """
        adam = self.optimizer.state
        # The first steps may have been left out: then Adam has tensors, of step 0.
        taken = bool(adam) and next(iter(adam.values()))["step"].item() > 0
        if self._moments_are_dealt():
            taken = bool(devices.max_over_ranks([taken])[0])
        if not taken:
            return {}
        moments = {}
        for name, p in self.weights.items():
            if not p.requires_grad:
                continue
            for key, like in moments_like(self.optimizer, p).items():
                if p in adam:
                    moments[f"{key}.{name}"] = adam[p][key]
                else:
                    # As large, but without memory of its own. (Of codes, too: where no rank has
                    # any, their scale is 0.)
                    zero = torch.zeros((), dtype=like.dtype)
                    moments[f"{key}.{name}"] = zero.expand(like.shape)
        return moments

    def _gather_and_write(
        self,
        path: str,
        like: dict[str, Tensor],
        gather: Callable[[str], Tensor],
        *,
        alone: bool = False,
        records: Mapping[str, bytes] | None = None,
    ) -> bool:
        """Write {name: gather(name)} to `path`. Return whether rank 0 could, on all ranks.

        like: {name: tensor} of their shapes and dtypes; alone: see save_state; records: see
        save_stream.

        Invariant: where ranks share out the tensors, every rank calls gather(name) once for each
        name, in the same order, whatever becomes of the disk. For gather is a collective: it
        waits for all ranks, and makes the whole tensor on each. Rank 0 writes it before it
        gathers the next one; the others drop it.
        """
        not_gathered = list(like)

        def gather_next(name: str) -> Tensor:
            not_gathered.remove(name)
            tensor = gather(name)
            if not all_finite(tensor):
                raise ValueError(f"{name} holds NaN or infinite values in {tensor.dtype}")
            return tensor

        failed = False
        if devices.rank() == 0:
            try:
                self._make_folder_again()
                save_stream(like, gather_next, path, records=records)
            except Exception as error:  # whatever it is, days of training do not end for it
                failed = True
                self._log_failure(path, error)
        if self.shares.optimizer_state:
            # All names on the other ranks; on rank 0 what a disk that failed has left.
            for name in not_gathered:
                gather(name)
        if not alone:
            failed = bool(devices.max_over_ranks([failed])[0])
        return not failed

    def _make_folder_again(self) -> None:
        """If the folder has vanished, make it, with its lock and what describes its checkpoints."""
        if not os.path.exists(self.folder):
            self.lock.enter_context(lock(self.folder))
            self.log.describe()

    def _log_failure(self, path: str, error: Exception) -> None:
        why = getattr(error, "strerror", None)
        if not why:
            first_line, _, _ = str(error).partition("\n")
            why = first_line.removeprefix(f"{path}: ")
        found = states(self.folder, self.first)
        if found:
            left = f"what was saved before is whole, the state of step {max(found)} the last"
        else:
            left = "no state of this run is on disk so far"
        self.log.line(f"could not save {path}: {why}; {left}")
