"""Command lines: the parser, and errors as one line with exit code 2.

One need not read this to understand Bone.
"""

import argparse
import difflib
import os
import re
import signal
import sys

import torch

STOPPING = [
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
]  # what asks a program to end


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line too, with the flag that was probably meant; a flag is never abbreviated."""

    def __init__(self, **options):
        super().__init__(**options, allow_abbrev=False)

    def error(self, message):
        if message.startswith("argument "):  # of a known flag: what is wrong with it
            raise ValueError(message.removeprefix("argument "))
        near = [
            flag
            for word in re.findall(r"--[\w-]+", message)
            for flag in difflib.get_close_matches(word, self._option_string_actions, 1)
        ]
        raise ValueError(
            f"{message}; "
            + (f"did you mean {near[0]}?" if near else f"python {self.prog} --help lists all flags")
        )


def in_words(error):
    return f"{error.filename}: {error.strerror}" if getattr(error, "filename", None) else str(error)


def let_go_of_broken_output():
    """What is still to be written to a pipe whose reader is gone goes nowhere from now on, and is no error: the Ctrl-C that ends a program ends
    the `tee` behind it too."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def run_cli(main):
    """Run a program's main(): a ValueError, OSError or want of memory becomes `error: ...` on stderr and exit code 2; Ctrl-C, or a request to
    end (SIGTERM, SIGHUP), ends it through every `finally`, with exit code 128 + the signal's number."""

    def end(number, _):
        raise SystemExit(128 + number)

    for number in STOPPING[1:]:
        if signal.getsignal(number) == signal.SIG_DFL:  # nohup has SIGHUP ignored
            signal.signal(number, end)
    try:
        main()
    except KeyboardInterrupt:
        let_go_of_broken_output()
        sys.exit(130)
    except (OSError, ValueError, MemoryError, torch.OutOfMemoryError) as error:
        text = (
            in_words(error).partition("\n")[0]
            if isinstance(error, (MemoryError, torch.OutOfMemoryError))
            else in_words(error)
        )
        text = "".join(
            c if c.isprintable() else repr(c)[1:-1] for c in text
        )  # names in a file may hold anything, be of any length
        let_go_of_broken_output()
        print(
            f"error: {text if len(text) < 1000 else text[:500] + ' ... ' + text[-400:]}",
            file=sys.stderr,
        )
        sys.exit(2)
