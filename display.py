"""How training gets on, on the screen: a bar on a terminal, else a dated line now and then.

One need not read this to understand Bone.
"""

import contextlib
import datetime
import math
import sys
import time
from collections.abc import Iterable, Iterator

from tqdm import tqdm
from tqdm.contrib import DummyTqdmFile

import devices
from plan import RunPlan


class Display:
    """Shows the steps of a run, on rank 0, on stderr.

    A log has no use for a bar, which is drawn again and again over itself. Where stderr is no
    terminal, as with `nohup python train.py > log`, there is a line after the first step, and then
    one every SECONDS, if a step is not longer.
    """

    SECONDS = 30.0

    def __init__(self) -> None:
        self.bar: tqdm | None = None
        self.plan: RunPlan | None = None
        self.epoch = 0
        self.step_began = 0.0  # this and all times: in seconds of time.perf_counter()
        # Of the first step that was shown, when it ended. (It takes longer than others.)
        self.first_shown: tuple[int, float] | None = None
        # Since the last line: when that was, losses, tokens and seconds of steps.
        self.last_line = -math.inf
        self.losses: list[float] = []
        self.tokens = 0.0
        self.seconds = 0.0

    @contextlib.contextmanager
    def steps(self, plan: RunPlan, epoch: int, step: int) -> Iterator[Iterable[int]]:
        """Give the steps of an epoch from `step` on, each to be followed by `show`, if it can."""
        self.plan, self.epoch = plan, epoch
        begin = epoch * plan.steps_per_epoch
        bar = tqdm(
            range(step, begin + plan.steps_per_epoch),
            initial=step - begin,
            total=plan.steps_per_epoch,
            desc=f"epoch {epoch}",
            unit="step",
            dynamic_ncols=True,
            disable=True if devices.rank() else None,  # None: on a terminal only
        )
        with contextlib.ExitStack() as stack:
            stack.enter_context(bar)
            self.bar = None if bar.disable else bar
            if self.bar:
                # What others print on this terminal goes above the bar, not into it.
                above = DummyTqdmFile(sys.stderr)
                stack.enter_context(contextlib.redirect_stderr(above))
                if sys.stdout.isatty():
                    stack.enter_context(contextlib.redirect_stdout(above))
            yield self._timed(bar)

    def _timed(self, steps: Iterable[int]) -> Iterator[int]:
        for step in steps:
            self.step_began = time.perf_counter()
            yield step

    def show(self, step: int, *, loss: float, lr: float, tokens: float, memory_gb: float) -> float:
        """Show what a step that ends now has given. Return its tokens per second."""
        now = time.perf_counter()
        seconds = now - self.step_began
        speed = tokens / seconds
        if self.bar:
            self.bar.set_postfix_str(_in_words(loss, lr, speed=speed, memory_gb=memory_gb))
        elif not devices.rank():
            self.losses.append(loss)
            self.tokens += tokens
            self.seconds += seconds
            self.first_shown = self.first_shown or (step, now)
            if now - self.last_line >= self.SECONDS:
                self._line(step, now, lr=lr, memory_gb=memory_gb)
        return speed

    def _line(self, step: int, now: float, *, lr: float, memory_gb: float) -> None:
        """Print a line on the steps since the last one."""
        assert self.plan and self.first_shown
        speed = self.tokens / self.seconds
        finite = [loss for loss in self.losses if math.isfinite(loss)]
        mean = sum(finite) / len(finite) if finite else math.nan
        text = (
            f"{time.strftime('%Y-%m-%d %H:%M:%S')} epoch {self.epoch}, "
            f"step {step + 1:,} of {self.plan.end_step:,}: "
            f"{_in_words(mean, lr, speed=speed, memory_gb=memory_gb)}"
        )
        first_step, first_ended = self.first_shown
        if step > first_step:
            seconds_a_step = (now - first_ended) / (step - first_step)
            left = seconds_a_step * (self.plan.end_step - step - 1)
            text += f", {datetime.timedelta(seconds=round(left))} left"
        # What was said before comes first, in a log that has both. The reader may be gone.
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            print(text, file=sys.stderr, flush=True)
        self.last_line = now
        self.losses, self.tokens, self.seconds = [], 0.0, 0.0


def _in_words(loss: float, lr: float, *, speed: float, memory_gb: float) -> str:
    return f"loss {loss:.3f}, lr {lr:.1e}, {speed:,.0f} tokens/s, {memory_gb:.1f} GB"
