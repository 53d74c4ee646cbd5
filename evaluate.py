"""The held-out loss of a run: before it, on the way, after every epoch; and its best checkpoint.

One need not read this to understand Bone. With --eval_steps the checkpoint whose held-out loss is
the best so far is kept as proj_dir/rwkv-best.pth.
"""

from collections.abc import Callable

import torch
from torch import Tensor

import devices
import run_folder
from loss import count_tokens
from passes import chunk_losses
from run_parts import Run

Check = Callable[[], object]  # called after each batch; it may raise an error to stop the run


def val_loss(run: Run, *, check: Check | None = None) -> float:
    """Return the mean loss over the held-out tokens that count."""
    losses: list[Tensor] = []
    tokens = 0.0
    # Each document is seen once, by one of the ranks.
    for batch in run.plan.data.held_out_batches():
        tokens += count_tokens([batch]).tokens
        losses += chunk_losses(run.model, batch, run.passes)
        if check:
            check()
    # The only wait for the device.
    loss = sum(torch.stack(losses).tolist()) if losses else 0.0
    loss, tokens = devices.sum_over_ranks([loss, tokens])
    return loss / max(tokens, 1.0)


def measure(run: Run, *, check: Check | None = None) -> float:
    """Return the held-out loss, and write it down."""
    loss = val_loss(run, check=check)
    run.log.point(run.progress.step, val_loss=loss)
    return loss


def evaluate(run: Run, *, check: Check | None = None) -> str:
    """Measure the held-out loss, and keep the best checkpoint. Return the loss in words."""
    plan, progress = run.plan, run.progress
    loss = measure(run, check=check)
    text = f"held-out loss {loss:.4f}"
    if not plan.options.eval_steps:
        return text
    if loss < progress.best_loss:
        keep_best(run, loss)
    if progress.best_step == progress.step:
        text += ", the best so far"
    elif progress.best_step:
        text += f", the best {progress.best_loss:.4f} after step {progress.best_step}"
    return text


def keep_best(run: Run, loss: float) -> None:
    """Save the weights as the best checkpoint so far, and count them as that, if it worked."""
    progress, folder = run.progress, run.plan.options.proj_dir
    if not progress.best_step:
        # From now on the name is this run's own: its state says so, should it be killed.
        run.checkpointer.save_state()
    if run.checkpointer.save_checkpoint(run_folder.best_checkpoint(folder), run.save_dtype):
        progress.best_loss, progress.best_step = loss, progress.step
        run.log.draw()


def evaluate_on_the_way(run: Run, *, check: Check | None = None) -> None:
    """Evaluate after every --eval_steps steps, but for the last of an epoch, which end_epoch does.

    A run that was stopped before it could is still to do it when it goes on.
    """
    plan, progress = run.plan, run.progress
    interval = plan.options.eval_steps
    if not interval or progress.step % interval or progress.step % plan.steps_per_epoch == 0:
        return
    if progress.evaluated < progress.step:
        run.log.line(f"step {progress.step}: {evaluate(run, check=check)}")
        progress.evaluated = progress.step
