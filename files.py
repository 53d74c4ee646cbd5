"""What every program here shares with the file system and the shell.

Reading a .pth file never executes anything and maps it instead of copying it; what is written appears under its name only
when it is complete; and whatever a user got wrong ends in one line on stderr and exit code 2.
"""

import argparse
import contextlib
import difflib
import os
import pickle
import sys
import warnings

import torch


def read_checkpoint(path):
    """The dict {name: tensor} in a .pth file, memory-mapped (private: writing to a tensor does not change the file).

    ValueError or OSError, in one line, for anything that is not a plain dict of floating tensors. Never runs code of a pickle.
    """
    with open(path, "rb") as f:  # missing, a folder, not readable: OSError says which
        is_zip = f.read(4) == b"PK\x03\x04"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the pickle protocol: what matters is whether it loads
            checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except Exception as error:  # a damaged file can fail anywhere in the unpickler
        if isinstance(error, pickle.UnpicklingError) and "unsupported global" in str(error).lower():
            what = "holds more than tensors (code that would run on loading); refused, nothing was executed"
        else:
            what = "a cut or damaged PyTorch checkpoint; download or copy it again" if is_zip else "not a PyTorch checkpoint; a .pth of tensors is needed (nothing in it was executed)"
        raise ValueError(f"{path}: {what}") from error
    if not isinstance(checkpoint, dict) or not checkpoint or not all(
            isinstance(k, str) and isinstance(v, torch.Tensor) and v.is_floating_point() for k, v in checkpoint.items()):
        raise ValueError(f"{path}: not a model checkpoint; a dict of names and floating tensors is needed")
    return checkpoint


@contextlib.contextmanager
def atomic_path(path):
    """A temporary path in the folder of `path`; renamed to `path` when the block ends well, removed when it does not."""
    folder, name = os.path.split(os.path.abspath(path))
    if os.path.isdir(path) or not os.access(folder, os.W_OK):
        raise ValueError(f"{path}: cannot be written, {'it is a folder' if os.path.isdir(path) else f'the folder {folder} is missing or read-only'}")
    temporary = os.path.join(folder, f".{name}.{os.getpid()}")
    try:
        yield temporary
        with open(temporary, "rb+") as f:
            os.fsync(f.fileno())
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)


def save_checkpoint(checkpoint, path):
    """Write a dict of tensors to `path`, whole or not at all."""
    with atomic_path(path) as temporary:
        torch.save(checkpoint, temporary)


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line too, with the flag that was probably meant."""

    def error(self, message):
        flags = [flag for action in self._actions for flag in action.option_strings]
        near = [match for word in message.split() if word.startswith("--") for match in difflib.get_close_matches(word, flags, 1) if match != word]
        raise ValueError(f"{message}; " + (f"did you mean {near[0]}?" if near else f"python {self.prog} --help lists what can be given"))


def run_cli(main):
    """Run a program's main(): a ValueError or OSError becomes `error: ...` on stderr and exit code 2, Ctrl-C exit code 130."""
    try:
        main()
    except OSError as error:
        message = f"{error.filename}: {error.strerror}" if error.filename else str(error)
    except ValueError as error:
        message = str(error)
    except KeyboardInterrupt:
        sys.exit(130)
    else:
        return
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)
