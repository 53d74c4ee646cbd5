"""Bone beside LoRA and full fine-tuning, on what two cores can do in 20 minutes.

    python compare.py          # writes compare.png, prints the table
    python compare.py 1        # the same with other seeds

One need not read this to understand Bone. A small RWKV-6 of characters is pretrained on Python's
help topics. Then it is fine-tuned on English dialogues of chatterbot-corpus, by five methods:
Bone (bat), Bone (shard sharing) and LoRA (scale 1), each with as many trained numbers in its layers
and with the same time_* and ln* parameters beside them. Beside them stand these parameters alone,
and full fine-tuning.

All have the same data, steps, batches and schedule, and the same learning rates are tried for each.
The best is the one with the least loss on one part of the held-out dialogues. What is reported is
the loss on another part, for three seeds (of the batches, and of LoRA's first values).
"""

import copy
import dataclasses
import statistics
import sys
import time
from collections.abc import Callable
from pydoc_data.topics import topics

import torch
from torch import Tensor, nn

import demo_data
import memory
import rwkv6
from adapt import add_bone
from bench import add_lora
from cli import run_cli
from loss import Batch
from passes import Passes, accumulate_gradients, chunk_losses

N_LAYER, N_EMBD, CTX_LEN = 4, 256, 128
BONE_R = 32
PRETRAINING_STEPS, STEPS, ROWS = 1200, 150, 8
EVALUATE_EVERY = 15
LEARNING_RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
SEEDS = 3
PASSES = Passes(autocast=torch.autocast("cpu", torch.bfloat16))


# ---- texts -------------------------------------------------------------------------------------


@dataclasses.dataclass
class Texts:
    """Character ids, (n,) int64 each."""

    vocab_size: int
    base: Tensor  # to pretrain on
    train: Tensor  # dialogues to fine-tune on
    choose: Tensor  # held-out dialogues, which the learning rate is chosen by
    test: Tensor  # others, which are reported


def read_texts(seed: int) -> Texts:
    """Read and split the texts."""
    dialogues = [d for d in demo_data.dialogues() if d.isascii()]
    shuffled = [dialogues[i] for i in torch.randperm(len(dialogues), generator=seeded(seed))]
    tenth = len(shuffled) // 10
    parts = {
        "base": list(topics.values()),
        "train": shuffled[2 * tenth :],
        "choose": shuffled[:tenth],
        "test": shuffled[tenth : 2 * tenth],
    }
    joined = {name: "\n\n\n".join(documents) for name, documents in parts.items()}
    characters = sorted(set("".join(joined.values())))
    number = {character: i for i, character in enumerate(characters)}
    ids = {name: torch.tensor([number[c] for c in text]) for name, text in joined.items()}
    return Texts(len(characters), **ids)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_batch(ids: Tensor, generator: torch.Generator) -> Batch:
    """Return ROWS random windows of a text."""
    starts = torch.randint(len(ids) - CTX_LEN, (ROWS, 1), generator=generator)
    return as_batch(ids[starts + torch.arange(CTX_LEN + 1)])


def as_batch(rows: Tensor) -> Batch:
    idx, targets = rows[:, :-1], rows[:, 1:]
    return idx, targets, torch.ones(idx.shape)


def loss_on(model: rwkv6.RWKV, ids: Tensor) -> float:
    """Return the mean loss per character of a text, read in rows."""
    rows = ids[: (len(ids) - 1) // CTX_LEN * CTX_LEN + 1].unfold(0, CTX_LEN + 1, CTX_LEN)
    [loss] = chunk_losses(model, as_batch(rows), PASSES)
    return loss.item() / rows[:, 1:].numel()


# ---- the methods -------------------------------------------------------------------------------


def with_bone(mode: str) -> Callable[[rwkv6.RWKV], None]:
    return lambda model: train_these(add_bone(model, BONE_R, mode), "bone")


def with_lora(model: rwkv6.RWKV) -> None:
    from peft.tuners.lora import LoraLayer

    add_lora(model, BONE_R)  # of as many numbers
    for module in model.modules():
        if isinstance(module, LoraLayer):  # alpha / rank would differ between layers
            module.scaling = dict.fromkeys(module.scaling, 1.0)
    train_these(model, "lora")


def train_these(model: nn.Module, adapter: str) -> None:
    """Let adapters and the time_* and ln* parameters be trained, as train.py does."""
    for name, p in model.named_parameters():
        p.requires_grad_(any(part in name for part in (adapter, "time", "ln")))


METHODS: dict[str, Callable[[rwkv6.RWKV], None]] = {
    "Bone (bat)": with_bone("bat"),
    "Bone (shard)": with_bone("bone"),
    "LoRA": with_lora,
    "time and ln alone": lambda model: train_these(model, "time"),
    "all weights": lambda model: None,
}


# ---- training ----------------------------------------------------------------------------------


@dataclasses.dataclass
class Trained:
    """What came of a training."""

    steps: list[int]  # after which the loss was measured
    losses: list[float]  # on the text that is reported
    choose: float  # the last on the text that the learning rate is chosen by
    step_seconds: float  # median
    peak: float  # bytes of tensors beyond the model's, at the peak of a step
    trained: int  # numbers


def train(
    model: rwkv6.RWKV, ids: Tensor, *, steps: int, lr: float, seed: int, evaluate: Callable
) -> tuple[float, float]:
    """Train; call evaluate(step) now and then. Return seconds of a step, bytes at its peak."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    generator = seeded(seed)
    seconds = []
    evaluate(0)
    with memory.LiveBytes(memory.tensors(model)) as live:
        accumulate_gradients(model, [random_batch(ids, seeded(seed))], PASSES)
    model.zero_grad()
    for step in range(steps):
        start = time.perf_counter()
        warmup = min(1.0, (step + 1) / 20)
        optimizer.param_groups[0]["lr"] = lr * warmup * (1 - 0.9 * step / steps)
        accumulate_gradients(model, [random_batch(ids, generator)], PASSES)
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - start)
        if (step + 1) % EVALUATE_EVERY == 0:
            evaluate(step + 1)
    return statistics.median(seconds), live.peak


def fine_tune(base: rwkv6.RWKV, texts: Texts, method: str, *, lr: float, seed: int) -> Trained:
    """Fine-tune a copy of the base."""
    torch.manual_seed(seed)  # of LoRA's first values
    model = copy.deepcopy(base)
    METHODS[method](model)
    steps: list[int] = []
    losses: list[float] = []

    def evaluate(step: int) -> None:
        steps.append(step)
        losses.append(loss_on(model, texts.test))

    seconds, peak = train(model, texts.train, steps=STEPS, lr=lr, seed=seed, evaluate=evaluate)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    choose = loss_on(model, texts.choose)
    return Trained(steps, losses, choose, seconds, peak + 8 * trained, trained)


def pretrain(texts: Texts, seed: int) -> rwkv6.RWKV:
    """Return a model that has learnt to write like Python's help topics."""
    torch.manual_seed(seed)
    model = rwkv6.init_model(N_LAYER, N_EMBD, texts.vocab_size)
    start = time.perf_counter()

    def evaluate(step: int) -> None:
        if step in (0, PRETRAINING_STEPS):
            print(
                f"pretraining, step {step}: loss {loss_on(model, texts.base[:20_000]):.3f} on its "
                f"text, {loss_on(model, texts.test):.3f} on dialogues, "
                f"{time.perf_counter() - start:.0f} s",
                flush=True,
            )

    train(model, texts.base, steps=PRETRAINING_STEPS, lr=2e-3, seed=seed, evaluate=evaluate)
    return model


# ---- the comparison ----------------------------------------------------------------------------


def sweep(
    base: rwkv6.RWKV, texts: Texts, method: str, *, seed: int
) -> tuple[dict[float, Trained], float]:
    """Return {learning rate: what came of it}, and the best."""
    found = {}
    for lr in LEARNING_RATES:
        found[lr] = fine_tune(base, texts, method, lr=lr, seed=seed)
        print(
            f"{method:<14} lr {lr:<8g} loss {found[lr].choose:.4f}, reported part "
            f"{found[lr].losses[-1]:.4f}, {1000 * found[lr].step_seconds:.0f} ms a step",
            flush=True,
        )
    return found, min(found, key=lambda lr: found[lr].choose)


def main(seed: int) -> None:
    """Compare, print the table, draw the picture."""
    print(f"PyTorch {torch.__version__}, {torch.get_num_threads()} threads")
    texts = read_texts(seed)
    sizes = {name: len(getattr(texts, name)) for name in ("base", "train", "choose", "test")}
    print("characters:", ", ".join(f"{name} {size:,}" for name, size in sizes.items()))
    base = pretrain(texts, seed)
    sweeps, chosen, runs = {}, {}, {}
    for method in METHODS:
        sweeps[method], chosen[method] = sweep(base, texts, method, seed=100 * seed)
        more = [
            fine_tune(base, texts, method, lr=chosen[method], seed=100 * seed + i)
            for i in range(1, SEEDS)
        ]
        runs[method] = [sweeps[method][chosen[method]], *more]
    print_table(runs, chosen)
    draw(runs, sweeps)


def print_table(runs: dict[str, list[Trained]], chosen: dict[str, float]) -> None:
    """Print a row for each method, in Markdown."""
    early_step = STEPS // 5
    titles = f"trained | learning rate | loss, step {early_step} | loss, step {STEPS} (3 seeds)"
    print(f"\n| | {titles} | ms a step | MB beside the weights |\n|---|---|---|---|---|---|---|")
    for method, found in runs.items():
        last = [run.losses[-1] for run in found]
        early = statistics.mean(run.losses[run.steps.index(early_step)] for run in found)
        spread = ", ".join(f"{loss:.3f}" for loss in sorted(last))
        ms = 1000 * statistics.median(run.step_seconds for run in found)
        print(
            f"| {method} | {found[0].trained:,} | {chosen[method]:g} | {early:.3f} | "
            f"{statistics.mean(last):.3f} ({spread}) | {ms:.0f} | {found[0].peak / 1e6:.0f} |"
        )


def draw(runs: dict[str, list[Trained]], sweeps: dict[str, dict[float, Trained]]) -> None:
    """Draw loss over steps, over seconds, and over learning rates."""
    import matplotlib.figure

    figure = matplotlib.figure.Figure(figsize=(13, 4), layout="tight")
    over_steps, over_seconds, over_rates = figure.subplots(1, 3)
    for method, found in runs.items():
        steps = found[0].steps
        seconds = [step * found[0].step_seconds for step in steps]
        losses = list(zip(*(run.losses for run in found), strict=True))
        mean = [statistics.mean(at_step) for at_step in losses]
        for axis, x in ((over_steps, steps), (over_seconds, seconds)):
            [line] = axis.plot(x, mean, label=method)
            axis.fill_between(x, list(map(min, losses)), list(map(max, losses)), alpha=0.2)
        rates = sweeps[method]
        over_rates.semilogx(
            list(rates), [run.choose for run in rates.values()], "o-", color=line.get_color()
        )
    over_steps.set(
        xlabel="step", ylabel="loss on held-out dialogues", title="mean, range of 3 seeds"
    )
    over_seconds.set(xlabel="seconds", title="the same over time")
    over_rates.set(xlabel="learning rate", title="last loss, to choose the learning rate by")
    over_steps.legend()
    figure.savefig("compare.png", dpi=100)


if __name__ == "__main__":
    run_cli(lambda: main(int(sys.argv[1]) if len(sys.argv) > 1 else 0))
