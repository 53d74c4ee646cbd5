"""What a run writes beside its checkpoints: its arguments, its losses as text, numbers and a picture, and where wanted all of it to wandb."""

import csv
import json
import os
import time

from files import atomic_path


class Log:
    """In proj_dir: args.json, train_log.txt (a line per epoch), loss.csv (a row per step and held-out loss), loss.png, and vocab.json where
    tokens are characters. With --wandb losses and learning rate go there, too."""

    def __init__(self, args, vocabulary):
        """Nothing is written yet; but wandb, with whom something may be wrong, is asked now, before the base is loaded."""
        self.args, self.vocabulary, self.wandb = args, vocabulary, None
        self.curve, self.picture = (os.path.join(args.proj_dir, name) for name in ("loss.csv", "loss.png"))
        if args.wandb:
            import wandb
            try:
                self.wandb = wandb.init(project=args.wandb, config=vars(args), dir=args.proj_dir, save_code=False)
            except wandb.errors.Error as error:
                raise ValueError(f"--wandb {args.wandb}: {error}".replace("\n", " ") + " Or keep it here: WANDB_MODE=offline") from error

    def open(self):
        os.makedirs(self.args.proj_dir, exist_ok=True)
        contents = {"args.json": vars(self.args)} | ({"vocab.json": dict(enumerate(self.vocabulary))} if self.vocabulary else {})
        for name, content in contents.items():
            with atomic_path(os.path.join(self.args.proj_dir, name)) as path, open(path, "w", encoding="utf-8") as f:
                json.dump(content, f, indent=1, ensure_ascii=False)
        self.text, self.csv = (open(path, "a", buffering=1) for path in (os.path.join(self.args.proj_dir, "train_log.txt"), self.curve))
        self.text.write(f"NEW RUN {json.dumps(vars(self.args))}\n")
        if self.csv.tell() == 0:
            self.csv.write("step,loss,lr,val_loss\n")

    def line(self, text):
        print(text)
        self.text.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")

    def point(self, step, loss="", lr="", val_loss=""):
        self.csv.write(f"{step},{loss},{lr},{val_loss}\n")
        if self.wandb:
            self.wandb.log({name: value for name, value in (("loss", loss), ("lr", lr), ("val_loss", val_loss)) if value != ""}, step=step)
        return val_loss

    def close(self):
        """End the wandb run; draw loss.png, where matplotlib is. Returns what to say of it."""
        if self.wandb:
            self.wandb.finish()
        try:
            from matplotlib.figure import Figure
        except ImportError:
            return ""
        axes = (figure := Figure(figsize=(8, 4.5))).add_subplot(xlabel="step", ylabel="loss (nats per token)")
        with open(self.curve) as f:
            rows = list(csv.DictReader(f))
        for column, label, style in (("loss", "training loss", "-"), ("val_loss", "held-out loss", "o-")):
            if points := [(int(row["step"]), float(row[column])) for row in rows if row[column]]:
                axes.plot(*zip(*points), style, label=label, linewidth=1)
        axes.legend()
        with atomic_path(self.picture) as path:
            figure.savefig(path, format="png", dpi=120)
        return f" and {self.picture}"
