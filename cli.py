"""Command lines: the parser, and errors as one line with exit code 2.

One need not read this to understand Bone. It imports neither PyTorch nor NumPy, so that `--help`
and a mistyped flag answer at once.
"""

import argparse
import difflib
import os
import re
import signal
import sys
from collections.abc import Callable
from typing import Any, NoReturn

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

    def error(self, message: str) -> NoReturn:
        if message.startswith("argument "):
            # A known flag with a wrong value: the message says which, and what is wrong with it.
            raise ValueError(message.removeprefix("argument "))
        raise ValueError(f"{message}; {self._advice(message)}")

    def _advice(self, message: str) -> str:
        """Name the flag that was probably meant, or where to find all flags."""
        flags = self._option_string_actions.items()
        known = [flag for flag, action in flags if action.help != argparse.SUPPRESS]
        for word in re.findall(r"--[\w-]+", message):
            similar = difflib.get_close_matches(word, known, 1)
            if similar:
                return f"did you mean {similar[0]}?"
        return f"python {self.prog} --help lists all flags"


def one_line(error: BaseException) -> str:
    """Say an error in one printable line of fewer than 1000 characters."""
    text = str(error)
    if isinstance(error, OSError) and error.filename:
        text = f"{error.filename}: {error.strerror}"
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


def run_cli(main: Callable[[], object]) -> None:
    """Run a program's main(), and end with an exit code instead of a traceback.

    A ValueError, an OSError or lack of memory becomes `error: ...` on stderr and exit code 2.
    Ctrl-C, SIGTERM and SIGHUP end the program through every `finally`, with exit code 128 + the
    signal's number.
    """

    def end(number: int, _frame: object) -> NoReturn:
        raise SystemExit(128 + number)

    for number in STOP_SIGNALS:
        # Python turns SIGINT into KeyboardInterrupt itself. nohup has SIGHUP ignored: keep it so.
        if number != signal.SIGINT and signal.getsignal(number) == signal.SIG_DFL:
            signal.signal(number, end)
    try:
        main()
    except KeyboardInterrupt:
        silence_broken_pipes()
        sys.exit(130)
    except _expected_errors() as error:
        text = one_line(error)
        silence_broken_pipes()
        print(f"error: {text}", file=sys.stderr)
        sys.exit(2)
