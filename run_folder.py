"""The folder of a run, --proj_dir: its lock, the states in it, and whether a run may go there.

One need not read this to understand Bone.
"""

import contextlib
import errno
import glob
import os
import pathlib
import re
import shutil
from collections.abc import Iterator
from typing import NamedTuple

import filelock

from atomic import remove_leftovers
from bone_record import check_quant_beside

# ---- states -----------------------------------------------------------------------------------


def states(folder: str, first: int = -1) -> dict[int, str]:
    """Return the states in a folder, {step: path}, the last step last.

    first: where a run began; states of steps up to that one are not its own.
    """
    names = os.listdir(folder) if os.path.isdir(folder) else []
    found = {}
    for name in names:
        match = re.fullmatch(r"resume-([0-9]{1,18})\.pth", name)
        if match and int(match[1]) > first:
            found[int(match[1])] = os.path.join(folder, name)
    return dict(sorted(found.items()))


def delete_old_states(folder: str, keep: int, first: int) -> None:
    """Delete all but the last `keep` states of a run that began at step `first`.

    Errors of the disk are ignored.
    """
    paths = list(states(folder, first).values())
    for path in paths[:-keep]:
        with contextlib.suppress(OSError):
            os.unlink(path)


# ---- may the run go there? --------------------------------------------------------------------


def check_folder(
    folder: str,
    checkpoint_paths: dict[int, str],
    first: int,
    *,
    quant: str | None,
    resumed_from: int | None,
    unchanged: bool,
) -> None:
    """Refuse a folder in which another run has written what this one would write.

    checkpoint_paths: {step: checkpoint after that step}; first: the run's first step;
    resumed_from: step of the state that it goes on from, or None; unchanged: whether it goes on
    with the very same flags. Raises ValueError.
    """
    found = states(folder, first)
    if found and resumed_from is None:
        raise ValueError(
            f"{found[min(found)]}: the state of an earlier run; go on with it by --resume, "
            "give another --proj_dir, or move it away"
        )
    for step, path in checkpoint_paths.items():
        # Checkpoints up to the state are this run's own. So are later ones, which it wrote before
        # it was killed, if going on gives the same numbers again.
        own = resumed_from is not None and (unchanged or step <= resumed_from)
        if os.path.lexists(path) and not own:
            raise ValueError(
                f"{path}: already there, from an earlier run; "
                "give another --proj_dir, or move it away"
            )
    # args.json, which the run writes again, must stay true of the checkpoints that are there.
    for path in glob.glob(os.path.join(glob.escape(folder), "rwkv-*.pth")):
        check_quant_beside(path, quant)


def best_checkpoint(folder: str) -> str:
    """Return the path of the checkpoint whose held-out loss is the best so far: --eval_steps."""
    return os.path.join(folder, "rwkv-best.pth")


def best_is_newer_than(path: str) -> bool:
    """Return whether the best checkpoint, which is beside a file, was written after it."""
    best = best_checkpoint(os.path.dirname(path))
    return os.path.exists(best) and os.stat(best).st_mtime_ns > os.stat(path).st_mtime_ns


def check_best(folder: str, *, own: bool) -> None:
    """Refuse a run that would replace another one's best checkpoint. own: whether it is its own."""
    path = best_checkpoint(folder)
    if os.path.lexists(path) and not own:
        raise ValueError(
            f"{path}: already there, from an earlier run, and --eval_steps would replace it; "
            "give another --proj_dir, or move it away"
        )


class Room(NamedTuple):
    """What a run is going to write, and the room that the disk has for it; sizes in bytes."""

    checkpoints: int
    checkpoint_size: int
    # States that are going to be there at once, beside those that are there now.
    states: int
    state_size: int
    free: int

    @property
    def need(self) -> int:
        """All that will be there at once."""
        return self.checkpoints * self.checkpoint_size + self.states * self.state_size


def room(
    folder: str,
    sizes: tuple[int, int],
    checkpoint_paths: dict[int, str],
    *,
    keep: int,
    first: int,
    step: int,
) -> Room:
    """Return what a run writes after `step`, and the room for it.

    sizes: of a checkpoint, and of a state; checkpoint_paths and first: see check_folder.
    """
    checkpoint_size, state_size = sizes
    checkpoints = 0
    for at, path in checkpoint_paths.items():
        if at >= step and not os.path.exists(path):
            checkpoints += 1
    return Room(
        checkpoints=checkpoints,
        checkpoint_size=checkpoint_size,
        # A new state is there before an old one goes.
        states=max(0, keep + 1 - len(states(folder, first))),
        state_size=state_size,
        free=shutil.disk_usage(existing_part(folder)).free,
    )


def check_room(folder: str, found: Room) -> None:
    """Refuse a run whose checkpoints and states the disk has no room for. Raises ValueError."""
    if found.need > found.free:
        raise ValueError(
            f"{folder}: the run will write {found.need / 1e6:,.0f} MB, but the disk has "
            f"{found.free / 1e6:,.0f} MB free; make room, give another --proj_dir, or save less "
            "by --epoch_save"
        )


def existing_part(folder: str) -> pathlib.Path:
    """Return a folder, or the nearest one above it that is there."""
    path = pathlib.Path(folder).absolute()
    while not path.exists():
        path = path.parent
    return path


def check_place(folder: str) -> None:
    """Refuse a folder that a run could not make or write into; make and write nothing.

    Raises ValueError.
    """
    _check_names(folder)
    path = existing_part(folder)
    if not path.is_dir():
        raise _cannot_be_written(folder, os.strerror(errno.ENOTDIR))
    if not os.access(path, os.W_OK | os.X_OK):
        raise _cannot_be_written(folder, os.strerror(errno.EACCES))


def _cannot_be_written(folder: str, why: str | None) -> ValueError:
    return ValueError(f"--proj_dir {folder} cannot be written ({why}); give another")


# ---- the lock ---------------------------------------------------------------------------------


def _check_names(folder: str) -> None:
    """Refuse a folder in which the run would write elsewhere, through a link, or not at all."""
    if os.path.exists(folder) and not os.path.isdir(folder):
        raise ValueError(
            f"--proj_dir {folder} is a file; give a folder, which is made where it is missing"
        )
    for name in (".lock", "train_log.txt", "loss.csv", "wandb", "tensorboard"):
        path = os.path.join(folder, name)
        if os.path.islink(path):
            raise ValueError(
                f"{path}: a symbolic link, through which this run would write elsewhere; remove it"
            )
        if name in ("wandb", "tensorboard"):
            kind, fits = "folder", os.path.isdir(path)
        else:
            kind, fits = "file", os.path.isfile(path)
        if os.path.exists(path) and not fits:
            raise ValueError(f"{path}: is not a {kind}, which this run needs there; move it away")


def _acquire(folder: str) -> filelock.BaseFileLock:
    """Make a folder where it is missing, and take its lock, or raise ValueError."""
    path = pathlib.Path(folder, ".lock")
    held = filelock.FileLock(path)
    try:
        os.makedirs(folder, exist_ok=True)
        held.acquire(timeout=0)
    except filelock.Timeout as error:
        raise ValueError(
            f"{folder}: another run, process {path.read_text() or 'unknown'}, is training there; "
            "wait for its end, or give another --proj_dir"
        ) from error
    except OSError as error:
        raise _cannot_be_written(folder, error.strerror) from error
    return held


@contextlib.contextmanager
def lock(folder: str) -> Iterator[None]:
    """Make a folder where it is missing, and hold its lock.

    Temporary files of runs that were killed are removed. A folder that was made, and is still
    empty at the end, is removed. When a process dies, the system lets go of its lock. Raises
    ValueError where another living process holds it.
    """
    _check_names(folder)
    path = pathlib.Path(folder, ".lock")
    made = [parent for parent in path.parents if not parent.exists()]
    held = _acquire(folder)
    # Where the file system knows no locks, the file itself is the lock, and its content the lock's.
    soft = isinstance(held, filelock.SoftFileLock)
    try:
        if not soft:
            path.write_text(str(os.getpid()))
        for pattern in ("resume-*.pth", "rwkv-*.pth"):
            remove_leftovers(os.path.join(glob.escape(folder), pattern))
        yield
    finally:
        if not soft:
            # While it is held: who opened it meanwhile sees that it has no name any more.
            with contextlib.suppress(OSError):
                path.unlink()
        held.release()
        for parent in made:
            with contextlib.suppress(OSError):
                parent.rmdir()
