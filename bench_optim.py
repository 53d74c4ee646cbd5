"""AdamW with moments in 8 bits beside AdamW in float32: `python bench.py optim`.

One need not read this to understand Bone. Two tables: the time of a training step, measured in
turn, and the held-out loss after 200 steps of fine-tuning (as in compare.py), from three seeds.
"""

import copy
import functools
import types
from collections.abc import Sequence

import torch

import bench
import build
import compare
import rwkv6
import sharding
import train
from passes import accumulate_gradients

OPTIMIZERS = ("adamw", "adamw8bit")
STEPS, SEEDS = 200, 3
LEARNING_RATES = (1e-3, 3e-3)
# What decides whether gradients stay in bfloat16.
ONE_RANK = {"precision": "bf16", "train_type": "none", "devices": 1, "num_nodes": 1}


def make_optimizer(model: rwkv6.RWKV, optim: str, lr: float) -> torch.optim.Optimizer:
    """Return an optimizer of the model, as train.py would make it."""
    build.keep_small_gradients(model, types.SimpleNamespace(optim=optim, **ONE_RANK), 1)
    return train.make_optimizer(model, lr, optim=optim)


def speed() -> None:
    """Print how much longer a step takes."""
    for quant in ("nf4", None):
        for tokens in (1024, 512):
            steps = {}
            for optim in OPTIMIZERS:
                model = bench.model_2_blocks("bone", quant)
                optimizer = make_optimizer(model, optim, 1e-6)
                steps[optim] = functools.partial(bench.train_step, model, optimizer, tokens)
            times = bench.in_turn(9, **steps)
            what = f"{quant or 'bf16'}, {tokens} tokens: adamw8bit / adamw"
            bench.row(what, times, "adamw8bit", to="adamw", at_most=1.05)


def loss_after(
    base: rwkv6.RWKV, texts: compare.Texts, optim: str, *, lr: float, seed: int
) -> float:
    """Return the held-out loss of a copy of the base, fine-tuned with Bone."""
    model = compare.prepare(copy.deepcopy(base), "Bone (bat)", seed)
    optimizer = make_optimizer(model, optim, lr)
    generator = compare.seeded(seed)
    for step in range(STEPS):
        train.set_learning_rate(optimizer, lr * min(1, (step + 1) / 20) * (1 - 0.9 * step / STEPS))
        accumulate_gradients(model, [compare.random_batch(texts.train, generator)], compare.PASSES)
        sharding.clip_gradients(optimizer)
        optimizer.step()
        optimizer.zero_grad()
    return compare.loss_on(model, torch.cat([texts.validation, texts.test]))


def quality() -> None:
    """Print the held-out losses with both optimizers."""
    texts = compare.read_texts(0)
    base = compare.pretrain(texts, 0)
    print(f"\nheld-out loss after {STEPS} steps: learning rate, seed, adamw, adamw8bit")
    for lr in LEARNING_RATES:
        for seed in range(SEEDS):
            losses = [loss_after(base, texts, optim, lr=lr, seed=seed) for optim in OPTIMIZERS]
            difference = losses[1] / losses[0] - 1
            met = "met" if abs(difference) <= 0.005 else "NOT MET"
            print(
                f"{lr:<8g}{seed:>3}{losses[0]:9.4f}{losses[1]:9.4f}{difference:+9.2%}  {met}",
                flush=True,
            )


def main(only: Sequence[str]) -> None:
    """Print both tables, or `only` speed or quality."""
    tables = {"speed": speed, "quality": quality}
    for name in only:
        if name not in tables:
            raise ValueError(
                f"{name} is not a part of bench.py optim; its parts are speed, quality"
            )
    for name in only or tables:
        tables[name]()
