"""What a run says on the terminal at its beginning and at its end.

One need not read this to understand Bone.
"""

import os
import shlex

import torch

import devices
import run_folder
import run_state
import sharding
from build import BuiltModel, count_parameters, emulates_bf16
from plan import RunPlan, longest_row
from run_log import draw


def describe(plan: RunPlan, built: BuiltModel, device: torch.device) -> None:
    """Print what is about to be trained on what. built: the model on the meta device."""
    options, documents = plan.options, plan.data.documents
    method = "from scratch"
    if options.load_model:
        method = f"Bone {options.bone_mode} r {options.bone_r}"
    trained, total = count_parameters(built.model)
    where = device.type
    if devices.size() > 1:
        where = f"{devices.size()} x {device.type}, by {sharding.describe(options.strategy)}"
    rows = (
        f"{options.micro_bsz * plan.micro_batches_per_step} rows "
        f"up to {longest_row(options, documents):,} tokens"
    )
    if options.train_type == "infctx":
        rows += f", in chunks of {options.chunk_ctx}"
    lines = [
        str(built.model.config),
        f"{method}: {trained:,} of {total:,} parameters trained, {options.precision} on {where}",
        f"{len(documents):,} documents, {documents.token_count():,} tokens; "
        f"{options.epoch_count} x {plan.steps_per_epoch} steps of {rows}",
    ]
    if options.train_type == "none" and (options.chunk_ctx, options.bptt) != (512, 0):
        lines.append("note: --chunk_ctx and --bptt do nothing without --train_type infctx")
    if options.precision == "bf16" and emulates_bf16(device):
        lines.append(
            "note: this GPU has no bfloat16 of its own, and computes it in float32: "
            "--precision fp16 is faster here"
        )
    if "deepspeed" in options.strategy and devices.size() == 1:
        lines.append(
            f"note: {options.strategy} shares out what several devices hold; on one, plain PyTorch "
            "stands in for it (--dry_run says the memory)"
        )
    print("\n".join(lines))


def report_complete(plan: RunPlan) -> None:
    """Say that nothing is left to be done, and do what the run was killed before."""
    options = plan.options
    if not devices.rank():
        run_folder.delete_old_states(options.proj_dir, options.keep, plan.first_step)
        if not os.path.exists(os.path.join(options.proj_dir, "loss.png")):
            draw(options.proj_dir)
    step = plan.state.progress.step if plan.state else plan.end_step
    epochs = step // plan.steps_per_epoch - options.epoch_begin
    print(
        f"{options.proj_dir}: this run is complete, {step - plan.first_step} steps; "
        f"a higher --epoch_count than {epochs} trains on"
    )


def describe_resumed(plan: RunPlan, state: run_state.SavedState) -> str:
    """Say from where a run goes on, and with which other options."""
    line = f"going on from {state.path}: step {state.progress.step} of {plan.end_step}"
    if plan.changed_flags:
        line += f", with other {', '.join(plan.changed_flags)}"
    if plan.options.accumulate_grad_batches * devices.size() != plan.micro_batches_per_step:
        line += (
            f"; a step still has {plan.micro_batches_per_step} micro batches, shared out among "
            f"{devices.size()}"
        )
    return line


def final_report(plan: RunPlan, failed_checkpoints: list[str], remarks: str) -> None:
    """Say what was written, and what is next. ValueError if the last checkpoint is not there."""
    options, path = plan.options, plan.checkpoint_paths[plan.end_step]
    if not os.path.exists(path):
        advice = "neither could any state"
        if run_folder.states(options.proj_dir, plan.first_step):
            advice = "fix that, then give the same command with --resume"
        raise ValueError(f"{path}: could not be saved, as said above; {advice}")
    if failed_checkpoints:
        print(f"note: {', '.join(failed_checkpoints)} could not be saved, as said above")
    print(f"wrote {path}{remarks}")
    if options.load_model:
        tuned = os.path.join(options.proj_dir, "tuned.pth")
        print(f"next: python {shlex.join(['merge.py', options.load_model, path, tuned])}")
