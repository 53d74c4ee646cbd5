"""What a run writes beside its checkpoints: arguments, losses as text, numbers and a picture.

One need not read this to understand Bone.
"""

import contextlib
import csv
import json
import os
import time
from typing import Any

from tqdm import tqdm

import devices
from atomic import atomic_path
from options import Options
from run_state import Progress

COLUMNS = ("step", "loss", "lr", "val_loss")  # of loss.csv


class Log:
    """A run's log, which rank 0 alone writes.

    In proj_dir: args.json, train_log.txt (a line per epoch), loss.csv (a row per step and per
    held-out loss), loss.png, and vocab.json where tokens are characters. With --wandb, losses and
    learning rate go there, too.
    """

    def __init__(
        self, args: Options, vocabulary: list[str] | None, wandb_id: str | None = None
    ) -> None:
        """Write nothing yet, but start wandb: where it fails, it does before the base is loaded.

        wandb_id: of the wandb run that goes on.
        """
        self.args = args
        self.vocabulary = vocabulary
        self.text_path = os.path.join(args.proj_dir, "train_log.txt")
        self.curve_path = os.path.join(args.proj_dir, "loss.csv")
        # What could not be written so far, for each file.
        self.unwritten = {self.text_path: "", self.curve_path: ""}
        self.wandb: Any = None
        if args.wandb and devices.rank() == 0:
            self.wandb = _start_wandb(args, wandb_id)

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
        if self.args.resume and os.path.exists(self.curve_path):
            self._drop_later_rows(progress, resumed)
        beginning = "RESUMED" if resumed else "NEW RUN"
        self.write(self.text_path, f"{beginning} {json.dumps(vars(self.args))}\n")

    def _drop_later_rows(self, progress: Progress, resumed: bool) -> None:
        """Drop the rows of loss.csv that come again: a run may be killed long after its state."""
        # A held-out loss has the step at which it was computed. It does not come again if the
        # epoch before that step is closed.
        epoch_is_closed = resumed and not progress.losses

        def stays(row: dict[str, str]) -> bool:
            # Killed, a run may have left half a row.
            if set(row) != set(COLUMNS) or None in row.values() or not row["step"].isdecimal():
                return False
            step = int(row["step"])
            if row["val_loss"] and epoch_is_closed:
                return step <= progress.step
            return step < progress.step

        with open(self.curve_path, encoding="utf-8") as f:
            rows = list(csv.DictReader(line for line in f if line.endswith("\n")))
        with (
            atomic_path(self.curve_path) as path,
            open(path, "w", encoding="utf-8", newline="") as f,
        ):
            writer = csv.DictWriter(f, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(row for row in rows if stays(row))

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

    def point(
        self,
        step: int,
        *,
        loss: float | None = None,
        lr: float | None = None,
        val_loss: float | None = None,
    ) -> None:
        """Write a row of loss.csv, and tell wandb."""
        values = {"loss": loss, "lr": lr, "val_loss": val_loss}
        cells = ["" if value is None else str(value) for value in values.values()]
        self.write(self.curve_path, ",".join([str(step), *cells]) + "\n")
        # What a resumed run does again, wandb has already.
        if self.wandb and step >= self.wandb.step:
            known = {name: value for name, value in values.items() if value is not None}
            self.wandb.log(known, step=step)

    def close(self) -> str:
        """End the wandb run, and draw. Return what to say of the picture."""
        if self.wandb:
            self.wandb.finish()
        return draw(self.args.proj_dir)


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


def progress_bar(epoch: int, step: int, *, steps_per_epoch: int) -> Any:
    """Return an iterator over the steps of an epoch from `step` on, which rank 0 shows."""
    begin = epoch * steps_per_epoch
    return tqdm(
        range(step, begin + steps_per_epoch),
        initial=step - begin,
        total=steps_per_epoch,
        desc=f"epoch {epoch}",
        unit="step",
        dynamic_ncols=True,
        disable=devices.rank() > 0,
    )


def draw(folder: str) -> str:
    """Draw loss.png in a proj_dir from its loss.csv, where matplotlib is, and room.

    Returns what to say of it.
    """
    if devices.rank():
        return ""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return ""
    picture_path = os.path.join(folder, "loss.png")
    figure = Figure(figsize=(8, 4.5))
    axes = figure.add_subplot(xlabel="step", ylabel="loss (nats per token)")
    try:
        with open(os.path.join(folder, "loss.csv"), encoding="utf-8") as f:
            rows = list(csv.DictReader(f))
        for column, label, style in (
            ("loss", "training loss", "-"),
            ("val_loss", "held-out loss", "o-"),
        ):
            given = [row for row in rows if row[column]]
            if given:
                steps = [int(row["step"]) for row in given]
                losses = [float(row[column]) for row in given]
                axes.plot(steps, losses, style, label=label, linewidth=1)
        axes.legend()
        with atomic_path(picture_path) as path:
            figure.savefig(path, format="png", dpi=120)
    except (OSError, ValueError) as error:
        return f", but no {picture_path} ({error})"
    return f" and {picture_path}"
