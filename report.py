"""What a run says on the terminal at its beginning and at its end.

One need not read this to understand Bone. --dry_run says the same as the beginning of a run.
"""

import math
import os
import shlex

import torch

import devices
import run_folder
import run_state
import sharding
from build import count_parameters, emulates_bf16, why_no_fla
from cli import path_of
from data_report import are_dialogues, counted, data_lines, percent
from estimate import MemoryCheck, print_parts
from options import Options
from plan import RunPlan, plan_run
from run_log import draw
from savings import print_savings

# ---- the beginning ------------------------------------------------------------------------------


def dry_run(options: Options, check: MemoryCheck, device: torch.device) -> None:
    """Say what a run would do and take, and refuse what it would refuse.

    It writes nothing but the tokens of a .jsonl, which a run finds there. Without data it says how
    much memory the model takes.
    """
    built = check.estimate.built
    if not options.data_file and options.data_type != "dummy":
        print(built.model.config)
        print_memory(options, check, device)
        return
    with devices.rank0_first():
        if devices.rank() == 0:
            run_folder.check_place(options.proj_dir)
    plan = plan_run(options, built)
    if plan.complete:
        print(describe_complete(plan))
        return
    describe(plan, check, device)
    if plan.state:
        print(describe_resumed(plan, plan.state))
    print()
    print_memory(options, check, device)


def print_memory(options: Options, check: MemoryCheck, device: torch.device) -> None:
    """Print the parts of the peak, and what would make it less."""
    print_parts(options, check, device)
    if devices.rank() == 0:
        print_savings(options, check.estimate, device)


def describe(plan: RunPlan, check: MemoryCheck, device: torch.device) -> None:
    """Print what is about to be trained on what, and what it takes."""
    if devices.rank():
        return
    for name, text in [*data_lines(plan), *model_lines(plan, check, device)]:
        print(f"{name:<10} {text}")
    for note in notes(plan, device):
        print(f"note: {note}")


def model_lines(plan: RunPlan, check: MemoryCheck, device: torch.device) -> list[tuple[str, str]]:
    """Return (name, what is said of it) of the model, the memory and the disk."""
    options, built = plan.options, check.estimate.built
    trained, total = count_parameters(built.model)
    where = device.type
    if sharding.ranks(options) > 1:
        where = (
            f"{sharding.ranks(options)} x {device.type}, by {sharding.describe(options.strategy)}"
        )
    precision = f"{options.precision} on {where}"
    if options.load_model:
        how = "not quantized" if options.quant == "none" else f"in {options.quant}"
        precision += f", base {how}"
    free = "nobody knows how much is"
    if math.isfinite(check.free):
        free = f"{check.free / 1e9:,.2f} GB"
    each = " on each rank" if sharding.ranks(options) > 1 else ""
    if device.type == "cpu":
        each += ", beyond PyTorch itself"
    return [
        ("model", f"{options.load_model or 'a new one'}, {built.model.config}"),
        (
            "trained",
            f"{describe_method(options)}: {trained:,} of {total:,} parameters "
            f"({percent(trained, total)})",
        ),
        ("precision", precision),
        ("blocks", describe_blocks(options)),
        (
            "memory",
            f"{check.estimate.total / 1e9:.2f} GB expected at the peak{each}, {free} free on "
            f"{device.type}",
        ),
        ("disk", describe_room(plan.room(built))),
    ]


def describe_blocks(options: Options) -> str:
    """Say how the blocks run, and what of them the backward pass computes again."""
    how = "compiled" if options.compile else "eager"
    again = "all but products"
    if options.grad_cp == 1:
        again = "everything"
    elif options.grad_cp == 0 and not options.compile:
        again = "nothing"
    elif options.grad_cp > 0 and options.compile:
        again = f"all but {1 - options.grad_cp:.0%} of the products"
    return f"{how}; {again} computed again in the backward pass (--grad_cp {options.grad_cp})"


def describe_method(options: Options) -> str:
    """Say which parameters are trained."""
    if not options.load_model:
        return "from scratch"
    bone = f"Bone {options.bone_mode} r {options.bone_r}"
    if options.bone_load:
        bone += f" of {options.bone_load}"
    return ", ".join([bone, *options.train_parts])


def describe_room(room: run_folder.Room) -> str:
    """Say what will be on the disk."""
    parts = []
    for number, noun, size in (
        (room.checkpoints, "checkpoint", room.checkpoint_size),
        (room.states, "state", room.state_size),
    ):
        if number:
            parts.append(f"{counted(number, noun)} of {size_text(size)}")
    return (
        f"{' and '.join(parts) or 'nothing more'} at once: {size_text(room.need)}, "
        f"{size_text(room.free)} free"
    )


def size_text(size: float) -> str:
    """Return a number of bytes as text."""
    if size >= 1e9:
        return f"{size / 1e9:,.2f} GB"
    return f"{size / 1e6:,.0f} MB" if size >= 1e7 else f"{size / 1e6:.1f} MB"


def notes(plan: RunPlan, device: torch.device) -> list[str]:
    """Return what may not be what the user wanted."""
    options = plan.options
    lines = []
    if options.loss_mask in ("pad", "none") and are_dialogues(plan.data.documents):
        lines.append(
            "most documents have User: and Assistant: in them; consider --loss_mask qa, with which "
            "only the answers count"
        )
    if options.train_type == "none" and (options.chunk_ctx, options.bptt) != (512, 0):
        lines.append("--chunk_ctx and --bptt do nothing without --train_type infctx")
    if options.precision == "bf16" and emulates_bf16(device):
        lines.append(
            "this GPU has no bfloat16 of its own, and computes it in float32: --precision fp16 is "
            "faster here"
        )
    if options.fla and why_no_fla(options):
        lines.append(
            "--fla is for the operator of flash-linear-attention, which "
            f"{why_no_fla(options)}; the WKV-6 kernel of this project is used"
        )
    if "deepspeed" in options.strategy and sharding.ranks(options) == 1:
        lines.append(
            f"{options.strategy} shares out what several devices hold; on one, plain PyTorch "
            "stands in for it (--dry_run says the memory)"
        )
    return lines


def describe_resumed(plan: RunPlan, state: run_state.SavedState) -> str:
    """Say from where a run goes on, and with which other options."""
    line = f"going on from {state.path}: step {state.progress.step} of {plan.end_step}"
    if plan.changed_flags:
        line += f", with other {', '.join(plan.changed_flags)}"
    if plan.options.compile != state.metadata["args"].get("compile", 0):
        line += f"; from here on its blocks run {'compiled' if plan.options.compile else 'eager'}"
    held_out = plan.metadata["held_out"]
    if plan.options.eval_steps and state.metadata.get("held_out", held_out) != held_out:
        line += "; the held-out data is another, so the best loss counts anew"
    if plan.options.loss_mask in ("qa", "se") and "markers" not in state.metadata:
        line += "; from here on markers count only at the beginning of a line"
    n = sharding.ranks(plan.options)
    if plan.options.accumulate_grad_batches * n != plan.micro_batches_per_step:
        line += (
            f"; a step still has {plan.micro_batches_per_step} micro batches, shared out among {n}"
        )
    return line


# ---- the end ------------------------------------------------------------------------------------


def report_complete(plan: RunPlan) -> None:
    """Say that nothing is left to be done, and do what the run was killed before."""
    options = plan.options
    if not devices.rank():
        run_folder.delete_old_states(options.proj_dir, options.keep, plan.first_step)
        if not os.path.exists(os.path.join(options.proj_dir, "loss.png")):
            draw(options.proj_dir)
    print(describe_complete(plan))


def describe_complete(plan: RunPlan) -> str:
    """Say that nothing is left to be done."""
    step = plan.state.progress.step if plan.state else plan.end_step
    epochs = step // plan.steps_per_epoch - plan.options.epoch_begin
    return (
        f"{plan.options.proj_dir}: this run is complete, {step - plan.first_step} steps; "
        f"a higher --epoch_count than {epochs} trains on"
    )


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
        arguments = [path_of("merge.py"), options.load_model, path, tuned]
        print(f"next: python {shlex.join(arguments)}")
