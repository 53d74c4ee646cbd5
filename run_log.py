"""What a run writes beside its checkpoints: arguments, losses as text, numbers and a picture.

One need not read this to understand Bone.
"""

import contextlib
import csv
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

import devices
from atomic import atomic_path
from display import Display
from options import Options
from run_state import Progress

# Of loss.csv. The last three were added later: files of earlier versions are without them.
COLUMNS = ("step", "loss", "lr", "val_loss", "grad_norm", "tokens_per_s", "memory_gb")
FIRST_COLUMNS = COLUMNS[:4]

Row = dict[str, str]


class Log:
    """A run's log, which rank 0 alone writes.

    In proj_dir: args.json, train_log.txt (a line per epoch), loss.csv (a row per step and per
    held-out loss), loss.png, and vocab.json where tokens are characters. What is in loss.csv goes
    to Weights & Biases, too, with --wandb, and to TensorBoard with --tensorboard. `display` shows
    the steps on the screen.
    """

    def __init__(
        self, args: Options, vocabulary: list[str] | None, wandb_id: str | None = None
    ) -> None:
        """Write nothing yet, but start wandb: where it fails, it does before the base is loaded.

        wandb_id: of the wandb run that goes on.
        """
        self.args = args
        self.vocabulary = vocabulary
        self.display = Display()
        # What to say of loss.png; None: there are losses that are not in it.
        self.picture: str | None = None
        self.text_path = os.path.join(args.proj_dir, "train_log.txt")
        self.curve_path = os.path.join(args.proj_dir, "loss.csv")
        # What could not be written so far, for each file.
        self.unwritten = {self.text_path: "", self.curve_path: ""}
        self.wandb: Any = None
        if args.wandb and devices.rank() == 0:
            self.wandb = _start_wandb(args, wandb_id)
        self.tensorboard: Any = None
        if args.tensorboard and devices.rank() == 0:
            # Importing it takes seconds, and may fail.
            self.new_tensorboard = _summary_writer()

    def describe(self) -> None:
        """Write what others need to know of the checkpoints: args.json, vocab.json."""
        contents: dict[str, Any] = {"args.json": vars(self.args)}
        if self.vocabulary:
            contents["vocab.json"] = dict(enumerate(self.vocabulary))
        for name, content in contents.items():
            with (
                atomic_path(os.path.join(self.args.proj_dir, name)) as path,
                # (Of a name that is no UTF-8, JSON's own \\udce9 stands for the byte e9.)
                open(path, "w", encoding="utf-8", errors="backslashreplace") as f,
            ):
                json.dump(content, f, indent=1, ensure_ascii=False)

    def open(self, progress: Progress, resumed: bool) -> None:
        """Begin, at `progress`. resumed: whether that is a state's."""
        if devices.rank():
            return
        self.describe()
        rows = self._rewrite_curve(progress, resumed)
        if self.args.tensorboard:
            folder = os.path.join(self.args.proj_dir, "tensorboard")
            # What was written there from this step on, it does not show.
            self.tensorboard = self.new_tensorboard(folder, purge_step=progress.step)
            for row in rows:
                if resumed and row["step"] == str(progress.step) and row["val_loss"]:
                    self._to_tensorboard(progress.step, {"val_loss": float(row["val_loss"])})
        beginning = "RESUMED" if resumed else "NEW RUN"
        self.write(self.text_path, f"{beginning} {json.dumps(vars(self.args))}\n")

    def _rewrite_curve(self, progress: Progress, resumed: bool) -> list[Row]:
        """Make loss.csv, where it is there, one that can be gone on with: with all columns.

        With --resume, the rows that come again are dropped: a run may be killed long after its
        state. Returns the rows that stay then.
        """
        # A held-out loss has the step at which it was computed. It does not come again if that was
        # done before the state was saved.
        all_done = resumed and (not progress.losses or progress.evaluated == progress.step)

        def stays(row: Row) -> bool:
            # Killed, a run may have left half a row.
            if None in row or None in row.values() or not row["step"].isdecimal():
                return False
            step = int(row["step"])
            if row["val_loss"] and all_done:
                return step <= progress.step
            return step < progress.step

        if not os.path.exists(self.curve_path):
            return []
        with open(self.curve_path, encoding="utf-8", errors="replace") as f:
            lines = [line for line in f if line.endswith("\n") and "\0" not in line]
        columns = tuple(lines[0].rstrip("\n").split(",")) if lines else ()
        rows = list(csv.DictReader(lines))
        if self.args.resume:
            known = columns in (COLUMNS, FIRST_COLUMNS)
            rows = [row for row in rows if known and stays(row)]
        elif columns == FIRST_COLUMNS:
            rows = [row for row in rows if None not in row]
        else:
            return []
        with (
            atomic_path(self.curve_path) as path,
            open(path, "w", encoding="utf-8", newline="") as f,
        ):
            writer = csv.DictWriter(f, COLUMNS, restval="", lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        return rows

    def write(self, path: str, text: str) -> None:
        """Append to a file. Where that fails, as on a full disk, the text comes with the next."""
        if devices.rank():
            return
        self.unwritten[path] += text
        with contextlib.suppress(OSError), open(path, "ab", buffering=0) as f:
            end = f.tell()
            content = self.unwritten[path]
            if path == self.curve_path and end == 0:
                content = ",".join(COLUMNS) + "\n" + content
            in_bytes = content.encode(errors="backslashreplace")
            if f.write(in_bytes) == len(in_bytes):
                self.unwritten[path] = ""
            else:
                f.truncate(end)

    def sync(self) -> None:
        """Have the rows so far on disk: a state that is there goes on from them."""
        with contextlib.suppress(OSError), open(self.curve_path, "rb+") as f:
            os.fsync(f.fileno())

    def line(self, text: str) -> None:
        """Write a line to train_log.txt, and print it."""
        self.write(self.text_path, f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")
        # The terminal may be closed.
        with contextlib.suppress(OSError):
            tqdm.write(text)
            sys.stdout.flush()

    def step(
        self,
        step: int,
        *,
        loss: float,
        lr: float,
        grad_norm: float,
        tokens: float,
        memory_gb: float,
    ) -> None:
        """Write down a step that ends now, and show it. tokens: how many it had."""
        speed = self.display.show(step, loss=loss, lr=lr, tokens=tokens, memory_gb=memory_gb)
        self.point(
            step,
            loss=loss,
            lr=lr,
            grad_norm=grad_norm,
            tokens_per_s=round(speed, 1),
            memory_gb=round(memory_gb, 3),
        )

    def point(self, step: int, **values: float) -> None:
        """Write a row of loss.csv, and tell wandb and TensorBoard. values: {column: number}."""
        cells = [str(values.get(column, "")) for column in COLUMNS[1:]]
        self.write(self.curve_path, ",".join([str(step), *cells]) + "\n")
        self.picture = None
        # What a resumed run does again, wandb has already.
        if self.wandb and step >= self.wandb.step:
            self.wandb.log(values, step=step)
        self._to_tensorboard(step, values)

    def _to_tensorboard(self, step: int, values: dict[str, float]) -> None:
        # Its thread may have found the disk full. No training ends for that.
        if self.tensorboard:
            with contextlib.suppress(Exception):
                for name, value in values.items():
                    self.tensorboard.add_scalar(name, value, step)

    def draw(self) -> None:
        """Draw loss.png, unless it shows all losses so far."""
        if self.picture is None:
            self.picture = draw(self.args.proj_dir)

    def close(self) -> str:
        """End the wandb run, and draw. Return what to say of the picture."""
        if self.wandb:
            self.wandb.finish()
        if self.tensorboard:
            with contextlib.suppress(Exception):
                self.tensorboard.close()
        self.draw()
        return self.picture or ""


def _start_wandb(args: Options, wandb_id: str | None) -> Any:
    """Start a run of wandb, or go on with one.

    It is told arguments and losses, but no code, no git remote, no output.
    """
    import wandb

    try:
        return wandb.init(
            project=args.wandb,
            config=vars(args),
            dir=os.path.abspath(args.proj_dir),
            settings=wandb.Settings(disable_git=True, save_code=False, console="off"),
            id=wandb_id,
            resume="allow",
        )
    except wandb.errors.Error as error:
        why = str(error).replace("\n", " ")
        raise ValueError(
            f"--wandb {args.wandb}: {why} Or keep it here: WANDB_MODE=offline"
        ) from error


def _summary_writer() -> Callable[..., Any]:
    """Return the class that writes what TensorBoard shows."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except Exception as error:  # of a package that does not fit, it may be any
        why = str(error).replace("\n", " ")
        raise ValueError(
            f"--tensorboard: {why}; pip install -U tensorboard, or give --tensorboard 0"
        ) from error
    return SummaryWriter


def smoothed(losses: Sequence[float], reach: int) -> np.ndarray:
    """Return for each loss the mean of those at most `reach` before or after it that are finite."""
    values = np.asarray(losses, dtype=float)
    finite = np.isfinite(values)
    totals = np.cumsum([0.0, *np.where(finite, values, 0.0)])
    counts = np.cumsum([0, *finite])
    places = np.arange(len(values))
    first, end = np.maximum(places - reach, 0), np.minimum(places + reach + 1, len(values))
    number = counts[end] - counts[first]
    return np.where(number > 0, (totals[end] - totals[first]) / np.maximum(number, 1), np.nan)


def draw(folder: str) -> str:
    """Draw loss.png in a proj_dir from its loss.csv, where matplotlib is, and room.

    Returns what to say of it. No error of it ends a run.
    """
    if devices.rank():
        return ""
    picture_path = os.path.join(folder, "loss.png")
    try:
        from matplotlib.figure import Figure

        figure = Figure(figsize=(8, 4.5))
        axes = figure.add_subplot(xlabel="step", ylabel="loss (nats per token)")
        with open(os.path.join(folder, "loss.csv"), encoding="utf-8") as f:
            rows = list(csv.DictReader(f))
        steps, losses = _curve(rows, "loss")
        if steps:
            axes.plot(steps, losses, color="C0", alpha=0.3, linewidth=0.8)
            means = smoothed(losses, reach=len(losses) // 40)
            axes.plot(steps, means, color="C0", linewidth=1.4, label="training loss, smoothed")
        steps, losses = _curve(rows, "val_loss")
        if steps:
            axes.plot(steps, losses, "o-", color="C1", linewidth=1, label="held-out loss")
        axes.legend()
        with atomic_path(picture_path) as path:
            figure.savefig(path, format="png", dpi=120)
    except ImportError:
        return ""
    except Exception as error:
        return f", but no {picture_path} ({error})"
    return f" and {picture_path}"


def _curve(rows: list[Row], column: str) -> tuple[list[int], list[float]]:
    """Return the steps of the rows that have a number in a column, and these numbers."""
    given = [row for row in rows if row[column]]
    return [int(row["step"]) for row in given], [float(row[column]) for row in given]
