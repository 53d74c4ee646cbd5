"""What a run writes beside its checkpoints: its arguments, its losses as text, numbers and a picture, and where wanted all of it to wandb."""

import contextlib
import csv
import json
import os
import re
import time

from tqdm import tqdm

import devices
from archive import atomic_path


class Log:
    """Written by rank 0 alone. In proj_dir: args.json, train_log.txt (a line per epoch), loss.csv (a row per step and held-out loss), loss.png, and vocab.json where
    tokens are characters. With --wandb losses and learning rate go there, too."""

    def __init__(self, args, vocabulary, wandb_id=None):
        """Nothing is written yet; but wandb, with whom something may be wrong, is asked now, before the base is loaded. It is told
        arguments and losses, no code, no git remote, no output. wandb_id: of the run that goes on."""
        self.args, self.vocabulary, self.wandb = args, vocabulary, None
        self.text, self.curve = (
            os.path.join(args.proj_dir, name) for name in ("train_log.txt", "loss.csv")
        )
        self.unwritten = {self.text: "", self.curve: ""}
        if args.wandb and not devices.rank():
            import wandb

            settings = wandb.Settings(disable_git=True, save_code=False, console="off")
            try:
                self.wandb = wandb.init(
                    project=args.wandb,
                    config=vars(args),
                    dir=os.path.abspath(args.proj_dir),
                    settings=settings,
                    id=wandb_id,
                    resume="allow",
                )
            except wandb.errors.Error as error:
                raise ValueError(
                    f"--wandb {args.wandb}: {error}".replace("\n", " ")
                    + " Or keep it here: WANDB_MODE=offline"
                ) from error

    def describe(self):
        """Write what others need to know of the checkpoints: args.json, vocab.json."""
        contents = {"args.json": vars(self.args)} | (
            {"vocab.json": dict(enumerate(self.vocabulary))} if self.vocabulary else {}
        )
        for name, content in contents.items():
            with (
                atomic_path(os.path.join(self.args.proj_dir, name)) as path,
                open(path, "w", encoding="utf-8") as f,
            ):
                json.dump(content, f, indent=1, ensure_ascii=False)

    def open(self, progress, resumed):
        """Begin, at `progress`. A run that is resumed wrote rows of later steps, perhaps, before it was killed: they come again."""
        if devices.rank():
            return
        self.describe()
        if self.args.resume and os.path.exists(self.curve):

            def known(row):
                step, val_loss = (
                    re.fullmatch(r"(\d+),[^,]*,[^,]*,([^,]*)\n", row) or re.match("()()", "")
                ).groups()
                return step and int(step) < progress.step + bool(
                    resumed and val_loss and not progress.losses
                )

            with open(self.curve, encoding="utf-8") as f:
                header, *rows = f.readlines() or [""]
            with atomic_path(self.curve) as path, open(path, "w", encoding="utf-8") as f:
                f.writelines([header, *filter(known, rows)])
        self.write(
            self.text, f"{'RESUMED' if resumed else 'NEW RUN'} {json.dumps(vars(self.args))}\n"
        )

    def write(self, path, text):
        """Append to a file. Where that fails, as on a full disk, the text is kept, and comes with the next one."""
        if devices.rank():
            return
        self.unwritten[path] += text
        try:
            with open(path, "ab", buffering=0) as f:
                end = f.tell()
                header = "step,loss,lr,val_loss\n" * (path == self.curve and end == 0)
                content = (header + self.unwritten[path]).encode()
                if f.write(content) < len(content):
                    f.truncate(end)
                else:
                    self.unwritten[path] = ""
        except OSError:
            pass

    def sync(self):
        """Have the rows so far on disk: a state that is there goes on from them."""
        with contextlib.suppress(OSError), open(self.curve, "rb+") as f:
            os.fsync(f.fileno())

    def line(self, text):
        self.write(self.text, f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")
        with contextlib.suppress(OSError):  # of a terminal that is closed
            tqdm.write(text)

    def point(self, step, loss="", lr="", val_loss=""):
        self.write(self.curve, f"{step},{loss},{lr},{val_loss}\n")
        if self.wandb and step >= self.wandb.step:  # what a resumed run does again, it has already
            self.wandb.log(
                {
                    name: value
                    for name, value in (("loss", loss), ("lr", lr), ("val_loss", val_loss))
                    if value != ""
                },
                step=step,
            )
        return val_loss

    def close(self):
        """End the wandb run, and draw. Returns what to say of the picture."""
        if self.wandb:
            self.wandb.finish()
        return draw(self.args.proj_dir)


def draw(folder):
    """Draw loss.png in a proj_dir from its loss.csv, where matplotlib is, and room. Returns what to say of it."""
    curve, picture = (os.path.join(folder, name) for name in ("loss.csv", "loss.png"))
    if devices.rank():
        return ""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return ""
    axes = (figure := Figure(figsize=(8, 4.5))).add_subplot(
        xlabel="step", ylabel="loss (nats per token)"
    )
    try:
        with open(curve, encoding="utf-8") as f:
            rows = list(csv.DictReader(f))
        for column, label, style in (
            ("loss", "training loss", "-"),
            ("val_loss", "held-out loss", "o-"),
        ):
            if points := [(int(row["step"]), float(row[column])) for row in rows if row[column]]:
                axes.plot(*zip(*points), style, label=label, linewidth=1)
        axes.legend()
        with atomic_path(picture) as path:
            figure.savefig(path, format="png", dpi=120)
    except (OSError, ValueError) as error:
        return f", but no {picture} ({error})"
    return f" and {picture}"
