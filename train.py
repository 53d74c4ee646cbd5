"""Fine-tune an RWKV-6 or RWKV-5 model with Bone, or pretrain a small one from scratch.

    python train.py --load_model base.pth --data_file data.jsonl --bone_r 64
    python train.py --help
    python train.py --resume --proj_dir out

Data flows one way: file -> tokens -> batch -> model -> loss -> gradient -> update -> checkpoint.
A batch is a function of (seed, step). So a run is a function of its options, as args.json has them,
wherever it is interrupted and resumed.

Read from top to bottom: the optimizer, the loop, then how a run is set up and how it ends.
"""

import contextlib
import math
from typing import Any

from cli import run_cli
from parse_options import parse_args

if __name__ == "__main__":
    # Answer --help, and refuse wrong flags, before the seconds that importing PyTorch takes.
    run_cli(parse_args)

import torch
from torch import Tensor, nn

import devices
import memory
import run_folder
import sharding
from build import build_for_training, keep_small_gradients, make_passes
from checkpointer import Checkpointer
from evaluate import evaluate, evaluate_on_the_way, measure
from from_python import by_keywords
from loss import loss_fn  # noqa: F401 (for those who import it from here)
from options import Options
from passes import accumulate_gradients
from plan import RunPlan, flags_of_all_ranks, plan_run, resolve_options, starts_ranks
from report import describe, describe_resumed, dry_run, final_report, report_complete
from run_log import Log
from run_parts import Run
from run_state import Progress
from savings import check_memory
from settle import same_on_all_ranks, settle
from stop_signals import StopSignals

# ---- optimizer ----------------------------------------------------------------------------------


def make_optimizer(
    model: nn.Module,
    lr: float,
    *,
    weight_decay: float = 0.0,
    layerwise_lr: bool = True,
    strategy: str = "auto",
    optim: str = "adamw",
    **adam: Any,
) -> torch.optim.Optimizer:
    """Return Adam over the parameters that require gradients, grouped as RWKV-LM groups them.

    With layerwise_lr, time_decay (not its _w1, _w2) learns at twice the rate, and no time parameter
    decays. Whatever else has two dimensions decays, as in AdamW, by lr * weight_decay.
    optim: adamw, or adamw8bit, whose moments take a byte a number (adamw8bit.py).
    adam: betas and eps, where they are to be others than RWKV-LM's.
    """
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        lr_scale, decay = 1.0, 0.0
        if layerwise_lr and "time_" in name:
            if name.endswith("time_decay"):
                lr_scale = 2.0
        elif p.squeeze().ndim >= 2:
            decay = weight_decay
        new_group = {"params": [], "lr": lr * lr_scale, "lr_scale": lr_scale, "weight_decay": decay}
        groups.setdefault((lr_scale, decay), new_group)["params"].append(p)
    adam = {"betas": (0.9, 0.99), "eps": 1e-8} | adam
    in_8_bits = optim == "adamw8bit"
    return sharding.adamw(list(groups.values()), strategy, in_8_bits=in_8_bits, lr=lr, **adam)


def learning_rate(step: int, plan: RunPlan) -> float:
    """Return the learning rate of optimizer step `step`, as RWKV-LM computes it.

    It goes from lr_init to lr_final in all the steps of the run, counted from epoch 0, whatever the
    run's first step is. From that, the warm-up goes from 0.2 to 1.
    """
    options = plan.options
    lr_init, lr_final, warmup_steps = options.lr_init, options.lr_final, options.warmup_steps
    progress = (step - warmup_steps + 1) / (plan.learning_rate_steps - warmup_steps or 1)
    progress = min(1.0, max(0.0, progress))
    if lr_init == 0 or lr_final == 0:
        lr = lr_init + (lr_final - lr_init) * progress
    else:
        lr = lr_init * math.exp(math.log(lr_final / lr_init) * progress)
    steps_done = step - plan.first_step
    if steps_done < warmup_steps:
        return lr * (0.2 + 0.8 * steps_done / warmup_steps)
    return lr


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give each group of parameters its multiple of a learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]


def update(
    optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, loss: Tensor
) -> tuple[Tensor, Tensor]:
    """Take a step of the optimizer, on gradients clipped to a norm of 1, if all is finite.

    loss: tensor (), this rank's. Returns the norm, and the scale of fp16 that the gradients had:
    tensors () on the device, which nothing here waits for. Where loss or norm are not finite on any
    rank, nothing changes but that scale, which is halved.
    """
    scale = scaler.scale(torch.ones_like(loss))
    scaler.unscale_(optimizer)
    norm = sharding.clip_gradients(optimizer).to(loss.device)
    sharding.step_if_finite(optimizer, loss + norm)
    scaler.update()
    optimizer.zero_grad()
    return norm, scale


# ---- the loop -----------------------------------------------------------------------------------


def train_epochs(run: Run) -> list[str]:
    """Train to the end of the last epoch. Return the checkpoints that could not be saved."""
    failed_checkpoints = []
    stop = StopSignals()
    with run.checkpointer.save_on_exit(), stop.deferred():
        for epoch in run.plan.open_epochs(run.progress):
            train_epoch(run, epoch, stop)
            failed_checkpoints += end_epoch(run, epoch, stop)
            stop.check()
    return failed_checkpoints


def train_epoch(run: Run, epoch: int, stop: StopSignals) -> None:
    """Take the steps that are left of an epoch."""
    plan, progress = run.plan, run.progress
    end = (epoch + 1) * plan.steps_per_epoch
    next_data = None
    with run.log.display.steps(plan, epoch, progress.step) as steps:
        for step in steps:
            step_data = next_data or plan.load_step(step)

            # Forward and backward over this rank's share of the step's micro batches. Where no
            # token counts, there is nothing to learn: the L2 wrap alone moves no weights.
            losses: list[Tensor] = []
            if step_data.counts.tokens:
                losses = accumulate_gradients(
                    run.model, step_data.micro_batches, run.passes, counts=step_data.counts
                )

            # While a GPU is still at work, read the next step's data. (An error there costs this
            # step, too: the state that is saved then is the one before it.)
            next_data = plan.load_step(step + 1) if step + 1 < end else None

            # Update, and report.
            if losses:
                take_step(run, step, losses, tokens=step_data.size)
            else:
                progress.count_empty()

            # Stop if asked to. Evaluate and save; after an epoch's last step `end_epoch` does.
            save_is_due = stop.check(run.checkpointer.is_due())
            if progress.step < end:
                evaluate_on_the_way(run, check=stop.check)
                if save_is_due or plan.saves_state_after(progress.step):
                    run.checkpointer.save_state()
                    stop.check()


def take_step(run: Run, step: int, losses: list[Tensor], *, tokens: float) -> None:
    """Update the weights by the gradients of a step; count the step, and write it down.

    losses: of this rank's micro batches, tensors (); tokens: of all ranks', padding included.
    """
    plan, progress, log = run.plan, run.progress, run.log
    lr = learning_rate(step, plan)
    with run.checkpointer.step_in_progress():
        set_learning_rate(run.optimizer, lr)
        # A loss or gradient that is not finite never reaches the weights.
        loss_of_rank = sum(losses[1:], start=losses[0])
        norm_and_scale = update(run.optimizer, run.passes.scaler, loss_of_rank)
        # The step's only wait for the device: from here on, these are numbers.
        *numbers, norm, scale = torch.stack([*losses, *norm_and_scale]).tolist()
        numbers = devices.interleave_ranks(numbers)[: plan.micro_batches_per_step]
        loss = sum(numbers)
        fp16_overflow = scale > 1 and math.isfinite(loss) and not math.isfinite(norm)
        progress.count(loss, norm, fp16_overflow)
    memory_gb = memory.peak(run.device) / 1e9
    log.step(step, loss=loss, lr=lr, grad_norm=norm, tokens=tokens, memory_gb=memory_gb)
    if progress.bad_in_a_row:
        rows = plan.describe_bad_rows(step, numbers)
        log.line(f"step {step} left out: loss {loss}, gradient norm {norm}; {rows}")
        progress.check()


def end_epoch(run: Run, epoch: int, stop: StopSignals) -> list[str]:
    """Measure the held-out loss, save. Return the checkpoint, if it could not be saved."""
    plan, progress = run.plan, run.progress
    summary = f"epoch {epoch}: {progress.summary(plan.end_step - plan.first_step)}"
    if plan.data.held_out:
        summary += f", {evaluate(run, check=stop.check)}"
    run.log.line(summary)

    # An epoch without losses is closed. Losses in a state say that its checkpoint is to be written.
    path = plan.checkpoint_paths.get(progress.step)
    failed_checkpoints = []
    if path is not None and not run.checkpointer.save_checkpoint(path, run.save_dtype):
        failed_checkpoints.append(path)
    else:
        progress.losses.clear()
    if path is not None or plan.saves_state_after(progress.step):
        run.checkpointer.save_state()
    if progress.step < plan.end_step:
        progress.losses.clear()
    if path is not None:
        run.log.draw()
    return failed_checkpoints


# ---- a run --------------------------------------------------------------------------------------


def set_up(plan: RunPlan, log: Log, device: torch.device) -> Run:
    """Build what the loop works with, and put the saved state, if there is one, into place."""
    options = plan.options
    model, saved_names, save_dtype = build_for_training(options, device)
    keep_small_gradients(model, options, plan.micro_batches_of_rank)
    optimizer = make_optimizer(
        model,
        options.lr_init,
        weight_decay=options.weight_decay,
        layerwise_lr=bool(options.layerwise_lr),
        strategy=options.strategy,
        optim=options.optim,
        betas=(options.beta1, options.beta2),
        eps=options.adam_eps,
    )
    passes = make_passes(options, model, device)
    if options.compile:
        import fused  # which takes seconds

        fused.try_to_compile(model, passes, plan, device=device)
    weights = {name: p for name, p in model.named_parameters() if name in saved_names}
    assert weights.keys() == {*saved_names}
    progress = Progress(plan.first_step)
    if plan.state:
        progress = plan.state.restore(weights, optimizer, passes.scaler)
    checkpointer = Checkpointer(
        folder=options.proj_dir,
        keep=options.keep,
        first=plan.first_step,
        log=log,
        metadata=plan.metadata | {"args": vars(options), "wandb": log.wandb and log.wandb.id},
        progress=progress,
        weights=weights,
        optimizer=optimizer,
        scaler=passes.scaler,
        save_minutes=options.save_minutes,
        shares=sharding.Sharding.of(options.strategy),
    )
    return Run(plan, device, model, passes, optimizer, progress, log, checkpointer, save_dtype)


def begin(run: Run) -> None:
    """Log where the run begins, and measure the held-out loss there."""
    plan, log = run.plan, run.log
    log.open(run.progress, plan.state is not None)
    if plan.state:
        log.line(describe_resumed(plan, plan.state))
        evaluate_on_the_way(run)
    elif plan.data.held_out:
        print(f"held-out loss before training: {measure(run):.4f}")
    if plan.checkpoint_is_missing:
        # It was moved away, but the state has all of it.
        run.checkpointer.save_checkpoint(plan.checkpoint_paths[run.progress.step], run.save_dtype)


@by_keywords
def train(options: Options) -> None:
    """Train as the options say: plan the run, set it up, go through the loop, and report."""
    if starts_ranks(options):
        # They do what follows, and this process ends as they end.
        return devices.launch(options.devices, options.num_nodes)
    device = devices.find(options.accelerator)
    with devices.world(device), contextlib.ExitStack() as held:
        devices.check_same(flags_of_all_ranks(options))
        with devices.rank0_first():
            given = resolve_options(options)
            options, memory_check = settle(given, device)
        options, memory_check = same_on_all_ranks(given, options, memory_check, device=device)
        with devices.rank0_first():
            check_memory(options, memory_check, device)
            if devices.rank() == 0 and not options.dry_run:
                held.enter_context(run_folder.lock(options.proj_dir))
        if options.dry_run:
            return dry_run(options, memory_check, device)
        plan = plan_run(options, memory_check.estimate.built)
        if plan.complete:
            report_complete(plan)
            return None
        describe(plan, memory_check, device)
        with devices.rank0_first():
            wandb_id = plan.state.metadata["wandb"] if plan.state else None
            log = Log(options, plan.data.documents.vocabulary, wandb_id)
        run = set_up(plan, log, device)
        begin(run)
        failed_checkpoints = train_epochs(run)
        picture_note = log.close()
        if devices.rank() == 0:
            peak = memory.peak(device) / 1e9
            final_report(plan, failed_checkpoints, f"{picture_note}; peak memory {peak:.2f} GB")
    return None


def main() -> None:
    """Run the command line. A user's mistake ends in one line, and exit code 2."""
    run_cli(lambda: train(parse_args()))


if __name__ == "__main__":
    devices.exit_process(main)
