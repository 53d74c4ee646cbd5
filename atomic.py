"""Write files whole or not at all.

One need not read this to understand Bone.
"""

import contextlib
import errno
import glob
import os
import re
from collections.abc import Iterator

import psutil

StrPath = str | os.PathLike[str]


@contextlib.contextmanager
def atomic_path(path: StrPath) -> Iterator[str]:
    """Give the path of a new, empty file that becomes `path` when the block ends without error.

    What is guaranteed: whenever the process is killed or the power fails, `path` is either what it
    was before or the complete new file, never a part of one. When the block has ended, the new file
    is on the disk. If the block fails, the temporary file is removed. A symbolic link at `path` is
    replaced, not followed. Raises ValueError where `path` cannot be written, before the block runs.
    """
    path = os.fspath(path)
    # With a / at its end, so that a file does not pass for a folder.
    folder = os.path.join(os.path.dirname(path) or ".", "")
    _check_can_be_written(path, folder)
    remove_leftovers(glob.escape(path))
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        # O_EXCL: create it, and never write through a link that somebody put there.
        os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        yield temporary
        # First the content must be on the disk, then the name, then the folder that holds the name.
        with open(temporary, "rb+") as f:
            os.fsync(f.fileno())
        os.replace(temporary, path)
        sync_folder(folder)
    except OSError as error:
        # The error of a full disk does not say which file it is about.
        error.filename = error.filename or path
        raise
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)


def _check_can_be_written(path: str, folder: str) -> None:
    # A link will be replaced, whatever it points at.
    taken = os.path.exists(path) and not os.path.islink(path)
    if taken and os.path.isdir(path):
        why = "it is a folder"
    elif taken and not os.path.isfile(path):  # such as /dev/null
        why = "it is not a file"
    elif not os.path.isdir(folder):
        why = f"there is no folder {folder}"
    elif not os.access(folder, os.W_OK):
        why = f"{folder} is read-only"
    else:
        return
    raise ValueError(f"{path}: cannot be written, as {why}; fix that, or write elsewhere")


def remove_leftovers(pattern: str) -> None:
    """Remove the temporary files of `atomic_path` whose process was killed.

    pattern: of glob, for the paths that were to be written. A leftover may bear the number of this
    process: in a container, a program often has the same number each time.
    """
    for path in glob.glob(f"{pattern}.*.tmp"):
        number = path.split(".")[-2]
        if not re.fullmatch("[0-9]{1,9}", number):
            continue
        pid = int(number)
        if pid == os.getpid() or not psutil.pid_exists(pid):
            os.unlink(path)


def sync_folder(folder: StrPath) -> None:
    """Put on the disk what was renamed or removed in a folder, so that a power failure keeps it.

    Windows has no way to ask for that, and some network file systems have none.
    """
    if os.name != "posix":
        return
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
            raise
    finally:
        os.close(fd)
