"""What would save memory: flags, in the order of what they cost, and the cards that a run fits.

One need not read this to understand Bone.
"""

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

import memory
import sharding
from build import chunk_ctx, keeps_embedding_on_host
from estimate import MemoryCheck, MemoryEstimate, expected_memory, print_parts
from options import Options, fixed
from plan import resolve_options
from run_state import goes_on
from training_data import longest_row

# GB that a card is sold with, and the bytes of it that a desktop and CUDA's context take.
CARDS = (6, 8, 12, 16, 24)
DESKTOP, CONTEXT = 0.5e9, 0.55e9

SHORT_CHUNK = 256


class Saving(NamedTuple):
    """What a run takes with some flags more."""

    flags: dict[str, Any]
    options: Options
    estimate: MemoryEstimate

    def __str__(self) -> str:
        return " ".join(f"--{flag} {value}" for flag, value in self.flags.items())


def check_memory(options: Options, check: MemoryCheck, device: torch.device) -> None:
    """Print what a run takes, and raise ValueError, where it does not fit into memory.

    Where it only just fits, have the CPU's allocator give back what is freed.
    """
    estimate, free = check
    if not check.fits:
        print(estimate.built.model.config)
        print_parts(options, check, device)
        raise ValueError(
            f"training would take {estimate.total / 1e9:.2f} GB, but {free / 1e9:.2f} GB are free; "
            f"{advice(options, estimate, free, device=device)}"
        )
    if device.type == "cpu" and estimate.total > free / 2:
        memory.give_back_freed()


def flags_to_try(options: Options, longest: int) -> Iterator[dict[str, Any]]:
    """Yield flags that may save memory, those first that cost least.

    Most cost nothing but time, and some precision. infctx does not cut documents; --ctx_len cuts
    more of them.
    longest: tokens in the longest row.
    """
    if options.grad_cp < 1:
        yield {"grad_cp": 1}
    if options.micro_bsz > 1:
        # As many documents in a step.
        batches = options.micro_bsz * options.accumulate_grad_batches
        yield {"micro_bsz": 1, "accumulate_grad_batches": batches}
    if options.optim == "adamw":
        yield {"optim": "adamw8bit"}
    if sharding.ranks(options) > 1:
        yield {"strategy": "deepspeed_stage_3"}
    if options.load_model and options.quant == "none":
        yield {"quant": "int8"}
    if options.load_model and options.quant != "nf4":
        yield {"quant": "nf4"}
    at_once = min(longest, chunk_ctx(options) or longest)
    if at_once > SHORT_CHUNK:
        yield {"train_type": "infctx", "chunk_ctx": SHORT_CHUNK}
    if options.train_type == "none" and options.ctx_len > 1:
        yield {"ctx_len": (options.ctx_len + 1) // 2}


def savings(
    options: Options, estimate: MemoryEstimate, device: torch.device
) -> Iterator[tuple[Saving, Saving]]:
    """Yield what some flags save, as (with these alone, with all so far).

    options: settled; estimate: of these.
    """
    so_far = Saving({}, options, estimate)
    unchangeable = fixed() if goes_on(options) else ()
    for flags in flags_to_try(options, longest_row(options)):
        if not flags.keys().isdisjoint(unchangeable):
            continue  # the state was saved with others
        if "ctx_len" in flags and "chunk_ctx" in so_far.flags:
            continue  # chunks of documents that are not cut
        together = so_far.flags | flags
        with contextlib.suppress(ValueError):  # of a flag that this run cannot take
            changed = resolve_options(dataclasses.replace(options, **together))
            found = Saving(together, changed, expected_memory(changed, device))
            if found.estimate.total < so_far.estimate.total:
                so_far = found
                yield found._replace(flags=flags), so_far


def smallest_card(run: Saving, device: torch.device) -> str:
    """Name the smallest card that a run fits. device: the estimate's."""
    need = bytes_on_gpu(run, device)
    for card in CARDS:
        if need <= card * 2**30 - DESKTOP - CONTEXT:
            return f"{card} GB"
    return f"more than {CARDS[-1]} GB"


def bytes_on_gpu(run: Saving, device: torch.device) -> float:
    """Return what a run takes on a GPU, by an estimate for `device`."""
    estimate = run.estimate
    if device.type != "cpu":
        return estimate.total
    gpu = torch.device("cuda")
    beside = memory.beside_tensors(estimate.parts, device).keys() | {"compiler"}
    parts = {part: size for part, size in estimate.parts.items() if part not in beside}
    if keeps_embedding_on_host(estimate.built, run.options, gpu):
        parts["weights"] -= estimate.built.model.emb.weight.nbytes
    return sum((parts | memory.beside_tensors(parts, gpu)).values())


def print_savings(options: Options, estimate: MemoryEstimate, device: torch.device) -> None:
    """Print a table of what saves memory, line by line as it is found."""
    print(f"\n{'what saves memory, line by line':<46}{'GB':>7}   fits a card of")
    print_saving("as it is", Saving({}, options, estimate), device)
    for alone, _ in savings(options, estimate, device):
        print_saving(f"and {alone}", alone, device)
    print(f"(of a card {CONTEXT / 1e9:.2f} GB are CUDA's, and {DESKTOP / 1e9:.1f} a desktop's)")


def print_saving(text: str, found: Saving, device: torch.device) -> None:
    card = smallest_card(found, device)
    print(f"{text:<46}{found.estimate.total / 1e9:7.2f}   {card}", flush=True)


def advice(options: Options, estimate: MemoryEstimate, free: float, *, device: torch.device) -> str:
    """Say with which flags a run that does not fit would fit."""
    best = Saving({}, options, estimate)
    for _, best in savings(options, estimate, device):
        if best.estimate.total <= free:
            return f"with {best} it would take {best.estimate.total / 1e9:.2f} GB"
    smaller = "take a smaller model"
    if options.load_model and not options.bone_load:
        smaller = "take a smaller --bone_r, a shorter --ctx_len or a smaller model"
    if goes_on(options):
        smaller = "to go on, this run needs more memory"
    if not best.flags:
        return f"no flag helps: {smaller}"
    return f"even with {best} it would take {best.estimate.total / 1e9:.2f} GB: {smaller}"
