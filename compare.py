"""Bone beside LoRA and full fine-tuning, on what two cores can do in 20 minutes.

    python compare.py          # prints the table, writes compare.png
    python compare.py 1        # the same with other seeds: another base, other held-out dialogues

One need not read this to understand Bone. A small RWKV-6 of characters is pretrained on Python's
help topics. Then it is fine-tuned on English dialogues of chatterbot-corpus, by five methods: Bone
(bat), Bone (shard sharing) and LoRA (scale 1), each with as many trained numbers in a layer, and
with the time_* and ln* parameters beside them, as in train.py; these parameters alone; all weights.

All have the same data, steps, batches and schedule. The learning rate is the one with the least
loss on one part of the held-out dialogues (validation). The same four are tried for each method,
and further ones while the best is the smallest or largest tried. What is reported is the loss on
another part (test), for three seeds of the batches and of LoRA's first values. Steps of all methods
are timed in turn.
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
LEARNING_RATES = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0)
FIRST_TRIED: tuple[float, ...] = LEARNING_RATES[
    3:7
]  # then on towards the best, until it has one on each side
SEEDS = 3
TIMED_STEPS = 20
PASSES = Passes(autocast=torch.autocast("cpu", torch.bfloat16))


# ---- texts -------------------------------------------------------------------------------------


@dataclasses.dataclass
class Texts:
    """Character ids, (n,) int64 each."""

    vocab_size: int
    base: Tensor  # to pretrain on
    train: Tensor  # dialogues to fine-tune on
    validation: Tensor  # held-out dialogues, by which the learning rate is chosen
    test: Tensor  # others, for what is reported


def read_texts(seed: int) -> Texts:
    """Read and split the texts."""
    dialogues = [d for d in demo_data.dialogues() if d.isascii()]
    shuffled = [dialogues[i] for i in torch.randperm(len(dialogues), generator=seeded(seed))]
    tenth = len(shuffled) // 10
    parts = {
        "base": list(topics.values()),
        "train": shuffled[2 * tenth :],
        "validation": shuffled[:tenth],
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
class Run:
    """What came of a training."""

    steps: list[int]  # after which the loss was measured
    test_losses: list[float]
    validation_loss: float  # after the last step


def make_step(model: rwkv6.RWKV, lr: float) -> Callable[[Batch, float], None]:
    """Return step(batch, factor of the learning rate), which trains a model."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr, betas=(0.9, 0.99), weight_decay=0.0, fused=True)

    def step(batch: Batch, factor: float) -> None:
        optimizer.param_groups[0]["lr"] = lr * factor
        accumulate_gradients(model, [batch], PASSES)
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def train(
    model: rwkv6.RWKV, ids: Tensor, *, steps: int, lr: float, seed: int, evaluate: Callable
) -> None:
    """Train; call evaluate(step) now and then."""
    train_step = make_step(model, lr)
    generator = seeded(seed)
    evaluate(0)
    for step in range(steps):
        warmup = min(1.0, (step + 1) / 20)
        train_step(random_batch(ids, generator), warmup * (1 - 0.9 * step / steps))
        if (step + 1) % EVALUATE_EVERY == 0:
            evaluate(step + 1)


def prepare(base: rwkv6.RWKV, method: str, seed: int = 0) -> rwkv6.RWKV:
    """Return a copy of the base, ready to be trained by a method."""
    torch.manual_seed(seed)  # of LoRA's first values
    model = copy.deepcopy(base)
    METHODS[method](model)
    return model


def fine_tune(base: rwkv6.RWKV, texts: Texts, method: str, *, lr: float, seed: int) -> Run:
    """Fine-tune a copy of the base."""
    model = prepare(base, method, seed)
    steps: list[int] = []
    losses: list[float] = []

    def evaluate(step: int) -> None:
        steps.append(step)
        losses.append(loss_on(model, texts.test))

    train(model, texts.train, steps=STEPS, lr=lr, seed=seed, evaluate=evaluate)
    return Run(steps, losses, loss_on(model, texts.validation))


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


def sweep(base: rwkv6.RWKV, texts: Texts, method: str, *, seed: int) -> dict[float, Run]:
    """Return {learning rate: what came of it}, at the best and at its neighbours at least."""
    runs: dict[float, Run] = {}
    to_try = FIRST_TRIED
    while to_try:
        for lr in to_try:
            runs[lr] = fine_tune(base, texts, method, lr=lr, seed=seed)
            print(
                f"{method:<17} learning rate {lr:<6g} "
                f"loss {runs[lr].validation_loss:.4f}, test {runs[lr].test_losses[-1]:.4f}",
                flush=True,
            )
        i = LEARNING_RATES.index(best_rate(runs))
        neighbours = LEARNING_RATES[max(i - 1, 0) : i + 2]
        to_try = tuple(lr for lr in neighbours if lr not in runs)
    return dict(sorted(runs.items()))


def best_rate(runs: dict[float, Run]) -> float:
    return min(runs, key=lambda lr: runs[lr].validation_loss)


@dataclasses.dataclass
class Cost:
    """What training by a method takes."""

    trained: int  # numbers
    step_seconds: float  # median
    peak_bytes: int  # of tensors beside the model's, at the peak of a step


def costs(base: rwkv6.RWKV, ids: Tensor) -> dict[str, Cost]:
    """Measure all methods, step by step in turn, so that none has a quieter machine."""
    models = {method: prepare(base, method) for method in METHODS}
    train_steps = {method: make_step(model, 1e-3) for method, model in models.items()}
    batch = random_batch(ids, seeded(0))
    found = {}
    for method, model in models.items():
        with memory.LiveBytes(memory.tensors(model)) as live:
            accumulate_gradients(model, [batch], PASSES)
        model.zero_grad()
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        moments = 8 * trained
        found[method] = Cost(trained, 0.0, live.peak + moments)
    seconds: dict[str, list[float]] = {method: [] for method in METHODS}
    for _ in range(TIMED_STEPS):
        for method, train_step in train_steps.items():
            start = time.perf_counter()
            train_step(batch, 1.0)
            seconds[method].append(time.perf_counter() - start)
    for method, cost in found.items():
        cost.step_seconds = statistics.median(seconds[method])
    return found


def main(seed: int) -> None:
    """Compare, print the table, draw the picture."""
    print(f"PyTorch {torch.__version__}, {torch.get_num_threads()} threads, seed {seed}")
    texts = read_texts(seed)
    sizes = {name: len(getattr(texts, name)) for name in ("base", "train", "validation", "test")}
    print("characters:", ", ".join(f"{name} {size:,}" for name, size in sizes.items()))
    base = pretrain(texts, seed)
    cost = costs(base, texts.train)
    sweeps, runs = {}, {}
    for method in METHODS:
        sweeps[method] = sweep(base, texts, method, seed=100 * seed)
        lr = best_rate(sweeps[method])
        others = [
            fine_tune(base, texts, method, lr=lr, seed=100 * seed + i) for i in range(1, SEEDS)
        ]
        runs[method] = [sweeps[method][lr], *others]
    print_table(runs, sweeps, cost)
    draw(runs, sweeps, cost)


def print_table(
    runs: dict[str, list[Run]], sweeps: dict[str, dict[float, Run]], cost: dict[str, Cost]
) -> None:
    """Print a row for each method, in Markdown."""
    early_step = STEPS // 5
    print(
        f"\n| | trained | learning rate | test loss, step {early_step} | step {STEPS} "
        "| less LoRA's, seed by seed | ms a step | MB beside the weights |"
        "\n|---|---|---|---|---|---|---|---|"
    )
    lora = [run.test_losses[-1] for run in runs["LoRA"]]
    for method, found in runs.items():
        last = [run.test_losses[-1] for run in found]
        early = statistics.mean(run.test_losses[run.steps.index(early_step)] for run in found)
        differences = ", ".join(f"{a - b:+.3f}" for a, b in zip(last, lora, strict=True))
        print(
            f"| {method} | {cost[method].trained:,} | {best_rate(sweeps[method]):g} | {early:.3f} "
            f"| {statistics.mean(last):.3f} | {differences} "
            f"| {1000 * cost[method].step_seconds:.0f} | {cost[method].peak_bytes / 1e6:.0f} |"
        )


def draw(
    runs: dict[str, list[Run]], sweeps: dict[str, dict[float, Run]], cost: dict[str, Cost]
) -> None:
    """Draw loss over steps, over seconds, and over learning rates."""
    import matplotlib.figure

    figure = matplotlib.figure.Figure(figsize=(13, 4), layout="tight")
    over_steps, over_seconds, over_rates = figure.subplots(1, 3, sharey=True)
    for method, found in runs.items():
        steps = found[0].steps
        seconds = [step * cost[method].step_seconds for step in steps]
        losses = list(zip(*(run.test_losses for run in found), strict=True))
        mean = [statistics.mean(at_step) for at_step in losses]
        for axis, x in ((over_steps, steps), (over_seconds, seconds)):
            [line] = axis.plot(x, mean, label=method)
            axis.fill_between(x, list(map(min, losses)), list(map(max, losses)), alpha=0.2)
        rates = sweeps[method]
        last = [run.validation_loss for run in rates.values()]
        over_rates.semilogx(list(rates), last, "o-", color=line.get_color())
    over_steps.set(xlabel="step", ylabel="loss per character", title="test, mean of 3 seeds")
    over_seconds.set(xlabel="seconds", title="the same over time")
    over_rates.set(xlabel="learning rate", title=f"validation, after {STEPS} steps")
    over_steps.set_ylim(1.2, 2.2)
    over_steps.legend()
    figure.savefig("compare.png", dpi=100)


if __name__ == "__main__":
    run_cli(lambda: main(int(sys.argv[1]) if len(sys.argv) > 1 else 0))
