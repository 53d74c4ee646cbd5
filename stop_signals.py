"""Ctrl-C and requests to end, answered where nothing is half done.

One need not read this to understand Bone.
"""

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from types import FrameType
from typing import NoReturn

import devices
from cli import settable_signals


class StopNow(KeyboardInterrupt):
    """A second Ctrl-C: stop at once, without saving."""


class StopSignals:
    """Ctrl-C and requests to end, deferred until `check` is called.

    All ranks stop at the same call, whichever of them was told. A second Ctrl-C does not wait.
    """

    # A wrapper may pass on the Ctrl-C that the terminal has sent, too: within so many seconds
    # a second one is the first one again.
    ECHO_SECONDS = 0.2

    def __init__(self) -> None:
        self.number = 0  # of the first signal; 0 while none has come
        self.came_at = 0.0  # when, in seconds of time.monotonic()
        self.stopping: BaseException | None = None  # what was raised to end the run

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Let signals end the block only where `check` is called in it.

        In a thread other than the main one they do what they did: Python has it so.
        """
        before = {}
        for number in settable_signals():
            # One that is ignored stays so: nohup has SIGHUP ignored.
            if callable(signal.getsignal(number)):
                before[number] = signal.signal(number, self._handle)
        try:
            yield
        except OSError as error:
            # What ends the run may end the reader of its output, too: in `train.py | tee log` a
            # Ctrl-C ends both. Then a progress bar fails, before the run stops or as it does.
            if self.stopping:
                raise self.stopping from None
            if self.number and isinstance(error, BrokenPipeError):
                self._stop()
            raise
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def check(self, save_is_due: bool = False) -> bool:
        """End the run here, on all ranks, if any of them was told to.

        Returns whether on any of them a save is due: their clocks differ, and one decides for all.
        """
        number, due = map(int, devices.max_over_ranks([self.number, save_is_due]))
        if number and not self.number:
            # Another rank was told first. What this one is about to be told is the same request.
            time.sleep(0.5)
            self.number = self.number or number
        if number:
            self._stop()
        return bool(due)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.number:
            late = time.monotonic() - self.came_at > self.ECHO_SECONDS
            if number == signal.SIGINT and late:
                self.stopping = StopNow()
                raise self.stopping
            return
        self.number = number
        self.came_at = time.monotonic()
        said = b"\nstopping after this step\n"
        if devices.size() == 1:  # torchrun does not pass on a second Ctrl-C
            said = b"\nstopping after this step; once more stops at once, without saving\n"
        if devices.rank() == 0:
            # The terminal may be closed, or the reader of a pipe be gone.
            with contextlib.suppress(OSError):
                os.write(2, said)

    def _stop(self) -> NoReturn:
        if self.number == signal.SIGINT:
            self.stopping = KeyboardInterrupt()
        else:
            self.stopping = SystemExit(128 + self.number)
        raise self.stopping


@contextlib.contextmanager
def only_ctrl_c() -> Iterator[None]:
    """Let Ctrl-C alone break the block off. (Supervisors send several requests to end.)"""
    before = {}
    for number in settable_signals():
        if number != signal.SIGINT:
            before[number] = signal.signal(number, signal.SIG_IGN)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
