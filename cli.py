"""Command lines: the parser, and errors as one line with exit code 2.

One need not read this to understand Bone. It imports neither PyTorch nor NumPy, so that `--help`
and a mistyped flag answer at once.
"""

import argparse
import contextlib
import difflib
import os
import re
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

from needs import program_of_ours  # which first checks what is needed, on old Pythons, too
from words import DASHES, advice

# As in pyproject.toml; a test compares them.
VERSION = "0.2.0"

# The signals that ask a program to end. (Windows has no SIGHUP.)
STOP_SIGNALS = [
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
]


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line, too, and whose flags cannot be abbreviated."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options, allow_abbrev=False)
        self.add_argument("--version", action="version", version=f"rwkv-bone {VERSION}")
        self._given: list[str] = []  # the command line that is read

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        self._given = list(sys.argv[1:] if args is None else args)
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        if message.startswith("argument "):
            # A known flag with a wrong value: the message says which, and what is wrong with it.
            raise ValueError(message.removeprefix("argument "))
        raise ValueError(f"{message}; {self._advice()}")

    def advice(self, word: str) -> str:
        """Say what an unknown flag probably means; "" where nothing is near."""
        flags = [flag.removeprefix("--") for flag in self._option_string_actions]
        without_flag = [action.dest for action in self._actions if not action.option_strings]
        return advice(word, flags, without_flag)

    def _advice(self) -> str:
        """Say what the unknown flags probably mean, or where to find all flags."""
        found = {}
        for word in self._given:
            flag = word.partition("=")[0]
            if re.match(f"[{DASHES}]+[A-Za-z]", flag) and flag not in self._option_string_actions:
                found[flag] = self.advice(flag)
        if not any(found.values()):
            return f"python {shlex.quote(path_of(self.prog))} --help lists all flags"
        if len(found) == 1:
            return "".join(found.values())
        return ", ".join(f"{flag}: {what}" for flag, what in found.items() if what)


def path_of(program: str) -> str:
    """Return how to call a program of this folder from where the user is.

    As this one was called: `python train.py` goes on with merge.py, `python bone/train.py` with
    bone/merge.py. From another program or a notebook it is the whole path.
    """
    here = os.path.dirname(os.path.abspath(__file__))
    folder = os.path.dirname(sys.argv[0])
    if os.path.abspath(folder) != here or not os.path.isfile(sys.argv[0]):
        folder = here
    path = os.path.join(folder, program)
    return path if os.path.exists(path) else program


def command_to_resume(folder: str) -> str:
    """Return what continues the run in a folder, from a shell or from Python."""
    program = sys.argv[0]
    if os.path.basename(program) == "train.py":
        return f"python {shlex.join([program, '--resume', '--proj_dir', folder])}"
    return f"train(resume=True, proj_dir={folder!r})"


def no_such_file(path: str) -> str:
    """Say of a path that is not there what may be wrong with it."""
    folder, name = os.path.split(path)
    text = "No such file or directory"
    if folder and not os.path.isdir(folder):
        return f"{text}; there is no folder {folder}"
    try:
        names = os.listdir(folder or ".")
    except OSError:
        return text
    # All endings look alike: the stems are compared. Of one stem, the same ending is meant.
    stem, ending = os.path.splitext(name)
    names.sort(key=lambda other: (other.endswith(ending), other))
    stems = {os.path.splitext(other)[0]: other for other in names}
    similar = difflib.get_close_matches(stem, stems, 1, cutoff=0.8)
    if similar:
        return f"{text}; did you mean {os.path.join(folder, stems[similar[0]])}?"
    return text


@contextlib.contextmanager
def utf8_name(path: str | os.PathLike[str]) -> Iterator[str | os.PathLike[str]]:
    """Give a name of a file that PyTorch can open: it takes UTF-8 alone, Linux takes any bytes."""
    try:
        os.fspath(path).encode()
    except UnicodeEncodeError:
        with open(path, "rb") as f:
            yield f"/proc/self/fd/{f.fileno()}"
    else:
        yield path


def settable_signals() -> list[signal.Signals]:
    """Return the stop signals, which only the main thread may handle: none in another one."""
    if threading.current_thread() is not threading.main_thread():
        return []
    return STOP_SIGNALS


def one_line(error: BaseException) -> str:
    """Say an error in one printable line of fewer than 1000 characters."""
    text = str(error)
    if isinstance(error, OSError) and error.filename:
        text = f"{error.filename}: {error.strerror}"
        if isinstance(error, FileNotFoundError):
            text = f"{error.filename}: {no_such_file(os.fsdecode(error.filename))}"
    if isinstance(error, _out_of_memory_errors()):
        # The first line says it; what follows is statistics of the allocator.
        text = text.partition("\n")[0]
    # A name that stands in a file may hold any characters, and any number of them.
    text = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
    if len(text) >= 1000:
        text = f"{text[:500]} ... {text[-400:]}"
    return text


def _out_of_memory_errors() -> tuple[type[BaseException], ...]:
    """MemoryError, and PyTorch's own, if the program has imported PyTorch."""
    torch = sys.modules.get("torch")
    return MemoryError, getattr(torch, "OutOfMemoryError", MemoryError)


def _expected_errors() -> tuple[type[BaseException], ...]:
    """The exceptions that say what a user can do, and need no traceback."""
    return OSError, ValueError, *_out_of_memory_errors()


def silence_broken_pipes() -> None:
    """Redirect output to /dev/null where its reader has exited.

    The Ctrl-C that ends a program also ends the `tee` behind it. What is still to be printed then
    must not become an error of its own.
    """
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def replace_unprintable() -> None:
    """Have stdout replace what its encoding cannot say. (stderr writes \\u4f60 by itself.)"""
    # A stream that somebody put there may be no TextIOWrapper.
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")


def end_at_ctrl_c() -> None:
    """Let Ctrl-C end a program of ours without a traceback while run_cli does not handle it.

    That is while PyTorch is imported, and when the work is done. In a user's own script nothing
    changes: there Ctrl-C must reach the training, which saves its state.
    """
    if program_of_ours() and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


end_at_ctrl_c()


def run_cli(main: Callable[[], object]) -> None:
    """Run a program's main(), and end with an exit code instead of a traceback.

    A ValueError, an OSError or lack of memory becomes `error: ...` on stderr and exit code 2.
    Ctrl-C, SIGTERM and SIGHUP end the program through every `finally`, with exit code 128 + the
    signal's number.
    """

    def end(number: int, _frame: object) -> NoReturn:
        raise SystemExit(128 + number)

    replace_unprintable()
    for number in settable_signals():
        # nohup has SIGHUP ignored: keep it so.
        if signal.getsignal(number) == signal.SIG_DFL:
            ctrl_c = number == signal.SIGINT
            signal.signal(number, signal.default_int_handler if ctrl_c else end)
    try:
        main()
        end_at_ctrl_c()
    except KeyboardInterrupt:
        silence_broken_pipes()
        sys.exit(130)
    except _expected_errors() as error:
        text = one_line(error)
        silence_broken_pipes()
        print(f"error: {text}", file=sys.stderr)
        sys.exit(2)
