"""From the options to the plan of a run: its data, its steps, and what it writes.

One need not read this to understand Bone. The options pass through `resolve_options`, and then
through `plan_run`. Nothing changes an option after the first of them.
"""

import dataclasses
import math
import os
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch

import checkpoint
import corpus
import data
import devices
import resume_flags
import run_folder
import run_state
import tokenizer
from archive import fingerprint, read_checkpoint, trained_quant
from build import BuiltModel
from loss import Batch, Counts, count_tokens
from options import Options, per_machine

# ---- options ------------------------------------------------------------------------------------


def resolve_options(options: Options) -> Options:
    """Return the options with what base model, Bone checkpoint and data say in place of None.

    ValueError where a flag that was given says otherwise.
    """
    quant = trained_quant(options.bone_load, options.quant)
    if not options.load_model:
        return dataclasses.replace(options, quant=quant, vocab_size=new_vocab_size(options))
    if options.bone_load:
        tensors = read_checkpoint(options.bone_load, verify=False)
        r, mode = checkpoint.rank_and_mode(tensors, options.bone_load)
    else:
        r, mode = options.bone_r or 64, options.bone_mode or "bat"
    base = read_checkpoint(options.load_model, verify=False)
    config = checkpoint.read_config(base, options.load_model)
    of_bone: dict[str, Any] = {"bone_r": r, "bone_mode": mode}
    of_base: dict[str, Any] = {
        "n_layer": config.n_layer,
        "n_embd": config.n_embd,
        "vocab_size": config.vocab_size,
        "my_testing": config.version,
        "pre_ffn": config.pre_ffn,
        "head_qk": config.head_qk,
    }
    for path, found in ((options.bone_load, of_bone), (options.load_model, of_base)):
        for flag, value in found.items():
            check_flag(options, flag, value, path=path)
    return dataclasses.replace(options, quant=quant, **of_bone, **of_base)


def check_flag(options: Options, flag: str, value: Any, *, path: str) -> None:
    """Raise ValueError where a flag was given, and not as the file at `path` has it."""
    given = getattr(options, flag)
    if given is None or (flag == "vocab_size" and given == 0):
        return
    if given != value:
        raise ValueError(
            f"{path}: has {flag} {value}, but --{flag} is {given}; drop --{flag} to use {value}"
        )


def new_vocab_size(options: Options) -> int:
    """Return the vocabulary of a new model: as given, or of its characters; else 0."""
    kind = options.data_type or corpus.guess_data_type(options.data_file)
    if options.vocab_size or kind in ("binidx", "jsonl"):
        return options.vocab_size
    return open_documents(options)[0].vocab_size()


def flags_of_all_ranks(options: Options) -> dict[str, Any]:
    """Return the flags that need to be the same on all ranks, {--name: value}, and their source."""
    takes_flags = resume_flags.takes_flags(options.proj_dir, options.resume)
    same: dict[str, Any] = {"the args.json to go on with in --proj_dir": takes_flags}
    left_out = per_machine()
    same |= {f"--{name}": value for name, value in vars(options).items() if name not in left_out}
    return same


def starts_ranks(options: Options) -> bool:
    """Return whether this process is to start others, one for each device.

    ValueError where WORLD_SIZE, which torchrun sets, contradicts the options.
    """
    wanted = options.devices * options.num_nodes
    started = os.environ.get("WORLD_SIZE")
    if not started:
        return wanted > 1 and not options.dry_run
    if not started.isdecimal():
        raise ValueError(
            f"WORLD_SIZE {started} is not a number of processes; unset it, or start them by "
            "torchrun"
        )
    if wanted > 1 and int(started) != wanted:
        raise ValueError(
            f"--devices {options.devices} --num_nodes {options.num_nodes}, but WORLD_SIZE says "
            f"{started}; with torchrun leave both out, else unset WORLD_SIZE"
        )
    return False


# ---- data ---------------------------------------------------------------------------------------


def read_vocabulary(options: Options) -> Any:
    """Return the characters that vocab.json lists, beside the base or in proj_dir; None: neither.

    ValueError where a base has none, or where the two differ.
    """
    here = os.path.join(options.proj_dir, "vocab.json")
    paths = [here]
    if options.load_model:
        beside_base = os.path.join(os.path.dirname(options.load_model), "vocab.json")
        if not os.path.exists(beside_base):
            raise ValueError(
                f"{options.load_model}: has no vocab.json beside it that says which characters it "
                "reads. A World model reads none: write the text as a .jsonl"
            )
        paths = [beside_base, here]
    found = [tokenizer.read_vocabulary(path) for path in paths if os.path.exists(path)]
    if not found:
        return None
    if found[0] != found[-1]:
        raise ValueError(f"{here}: has other characters than {paths[0]}; give another --proj_dir")
    return found[0]


def open_documents(options: Options, vocab_size: int | None = None) -> tuple[Any, Any]:
    """Open the training data and the held-out data, which is None without --val_file."""
    kind = options.data_type or corpus.guess_data_type(options.data_file)
    is_text = kind in tokenizer.CHARACTERS
    vocabulary = read_vocabulary(options) if is_text else None
    documents = corpus.open_data(
        options.data_file, vocab_size, kind, ctx_len=options.ctx_len, vocabulary=vocabulary
    )
    if documents.vocabulary and vocab_size not in (None, documents.vocab_size()):
        advice = "drop --vocab_size"
        if options.load_model:
            advice = "take the vocab.json that it was trained with"
        raise ValueError(
            f"{options.data_file or kind}: has {documents.vocab_size()} characters, but the "
            f"model's vocabulary is {vocab_size}; {advice}"
        )
    if not options.val_file:
        return documents, None
    if is_text and (kind == "dummy" or not options.data_type):
        # The encoding of each text is told by its own name.
        kind = "utf-16le" if corpus.guess_data_type(options.val_file) == "utf-16le" else "utf-8"
    vocabulary = documents.vocabulary
    held_out = corpus.open_data(
        options.val_file, vocab_size, kind, ctx_len=options.ctx_len, vocabulary=vocabulary
    )
    return documents, held_out


def longest_row(options: Options, documents: Any = None) -> int:
    """Return how many tokens the longest row has that the model will see.

    With infctx the data says it, since no document is cut.
    """
    if options.train_type == "none" or options.dataload == "get" or not options.data_file:
        return options.ctx_len
    if documents is None:
        documents, _ = open_documents(options)
    longest = int(documents.sizes.max()) - 1
    least = options.ctx_len if options.loss_mask == "none" else 1
    return max(longest, least)


class StepData(NamedTuple):
    """What a rank needs for an optimizer step."""

    micro_batches: Sequence[Batch]  # this rank's, on its device
    counts: Counts  # of all ranks' micro batches
    size: float  # tokens in all of them, padding included


@dataclasses.dataclass(frozen=True)
class TrainingData:
    """The documents of a run, and how micro batches are made of them."""

    documents: Any
    held_out: Any  # documents, or None
    batches: data.BatchConfig  # which rows a micro batch has, and what of them counts
    epoch_steps: int  # steps in an epoch; 0: as many as it takes to see the data once

    @classmethod
    def open(cls, options: Options, vocab_size: int) -> "TrainingData":
        """Open the files. ValueError where they cannot be trained on as the options say."""
        documents, held_out = open_documents(options, vocab_size)
        loss_mask: data.LossMask = options.loss_mask
        if loss_mask == "se":
            loss_mask = options.mask_id["mask1"], options.mask_id["mask0"]
        batches = data.BatchConfig(
            options.micro_bsz,
            options.ctx_len,
            options.dataload,
            seed=options.random_seed,
            shuffle=bool(options.data_shuffle),
            loss_mask=loss_mask,
            cut=options.train_type != "infctx",
        )
        opened = cls(documents, held_out, batches, options.epoch_steps)
        silent = opened.check_mask(documents)
        if held_out:
            opened.check_mask(held_out)
        if silent:
            marker, _ = data.markers_of(loss_mask) or ("", "")
            within = f" within {options.ctx_len} tokens" if batches.cut else ""
            print(
                f"note: {silent} of the first {min(1000, len(documents))} documents have nothing "
                f"after {marker}{within} and count for nothing"
            )
        opened.micro_batch(0)  # what cannot be batched is refused here
        return opened

    def check_mask(self, documents: Any) -> int:
        """Return how many documents have no token that counts; ValueError where none has one."""
        batches = self.batches
        return data.check_mask(documents, batches.ctx_len, batches.loss_mask, cut=batches.cut)

    def micro_batch(self, number: int) -> Batch:
        """Return a micro batch, a function of its number and the options alone."""
        return data.batch(self.documents, number, self.batches)

    def steps_per_epoch(self, micro_batches_per_step: int) -> int:
        """Return how many steps an epoch has."""
        if self.epoch_steps:
            return self.epoch_steps
        rows: float = len(self.documents)
        if self.batches.dataload == "get":
            rows = len(self.documents.tokens) / self.batches.ctx_len
        return math.ceil(rows / (self.batches.micro_bsz * micro_batches_per_step))

    def held_out_batches(self) -> Iterator[Batch]:
        """Yield this rank's batches of the held-out documents, as many as on any other rank."""
        batches, micro_bsz = self.batches, self.batches.micro_bsz
        for start in range(0, len(self.held_out), micro_bsz * devices.size()):
            first = start + micro_bsz * devices.rank()
            numbers = range(first, min(first + micro_bsz, len(self.held_out)))
            documents = [self.held_out[i] for i in numbers]
            if documents:
                yield data.collate(documents, batches.ctx_len, batches.loss_mask, cut=batches.cut)
            else:
                yield data.empty_batch()


# ---- the plan -----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class RunPlan:
    """What a run will do, known before its weights are loaded."""

    options: Options  # resolved, see `resolve_options`
    data: TrainingData
    state: run_state.SavedState | None  # saved by an earlier run, to go on from
    micro_batches_per_step: int  # of all ranks together
    steps_per_epoch: int
    checkpoint_paths: dict[int, str]  # by the number of steps after which each is written
    metadata: dict[str, Any]  # of a state: what the run trains on
    changed_flags: list[str]  # in words, those that the state was saved with other values of
    complete: bool  # whether nothing is left to be done
    checkpoint_is_missing: bool  # that of the epoch with which the state ends

    @property
    def first_step(self) -> int:
        """The number of the run's first step, counted from epoch 0."""
        return self.options.epoch_begin * self.steps_per_epoch

    @property
    def end_step(self) -> int:
        """The number of the first step after the run, counted from epoch 0."""
        return self.first_step + self.options.epoch_count * self.steps_per_epoch

    @property
    def learning_rate_steps(self) -> int:
        """The number of steps, from epoch 0, over which the learning rate changes."""
        return self.options.epoch_count * self.steps_per_epoch

    def open_epochs(self, progress: run_state.Progress) -> range:
        """Return the epochs from the one that `progress` is in to the last."""
        end = self.options.epoch_begin + self.options.epoch_count
        return range(progress.epochs_closed(self.steps_per_epoch), end)

    def saves_state_after(self, step: int) -> bool:
        """Return whether --save_steps has the state saved after so many steps."""
        return self.options.save_steps > 0 and step % self.options.save_steps == 0

    def load_step(self, step: int, device: torch.device) -> StepData:
        """Return this rank's share of a step, on its device.

        Every rank gets as many micro batches. Where they do not come out even, some get an empty
        one, which does not count.
        """
        all_ranks = range(self.micro_batches_per_step)
        my_micro_batches = all_ranks[devices.rank() :: devices.size()]
        first = step * self.micro_batches_per_step
        micro_batches = [self.data.micro_batch(first + n) for n in my_micro_batches]
        if len(micro_batches) < len(all_ranks[:: devices.size()]):
            micro_batches.append(data.empty_batch())
        size = sum(idx.numel() for idx, _, _ in micro_batches)
        totals = devices.sum_over_ranks([*count_tokens(micro_batches), size])
        return StepData(data.to_device(micro_batches, device), Counts(*totals[:2]), totals[2])

    def describe_bad_rows(self, step: int, losses: list[float]) -> str:
        """Name the rows of a step's micro batches whose loss is not finite."""
        first = step * self.micro_batches_per_step
        return data.describe_bad_rows(self.data.documents, losses, first, config=self.data.batches)


def plan_run(options: Options, built: BuiltModel) -> RunPlan:
    """Return the plan of a run, the same on all ranks. ValueError for what is in its way.

    built: the model on the meta device.
    """
    with devices.rank0_first():
        plan = plan_of_one_rank(options, built)
    step = plan.state.progress.step if plan.state else plan.first_step
    devices.check_same(
        {
            "the step to go on from in --proj_dir": step,
            "the content of --load_model": plan.metadata["base"],
            "the content of --data_file": plan.metadata["data"],
            "the content of --bone_load": fingerprint(options.bone_load),
            "the number of documents in --val_file": len(plan.data.held_out or ()),
        }
    )
    complete, missing = devices.max_over_ranks([plan.complete, plan.checkpoint_is_missing])
    return dataclasses.replace(plan, complete=bool(complete), checkpoint_is_missing=bool(missing))


def plan_of_one_rank(options: Options, built: BuiltModel) -> RunPlan:
    """Return the plan as this rank sees it. What is in proj_dir is looked at by rank 0 alone."""
    training_data = TrainingData.open(options, built.model.config.vocab_size)
    state, micro_batches, steps = run_state.load(
        options.proj_dir,
        options.resume,
        options.epoch_begin,
        steps_per_epoch=training_data.steps_per_epoch,
        micro_batches=options.accumulate_grad_batches * devices.size(),
    )
    metadata = {
        "base": fingerprint(options.load_model),
        "data": training_data.documents.fingerprint(),
        "micro_batches": micro_batches,
    }
    paths = checkpoint_paths(options, steps)
    changed_flags = []
    if state:
        changed_flags = run_state.check_same_run(state, vars(options), metadata)
    plan = RunPlan(
        options=options,
        data=training_data,
        state=state,
        micro_batches_per_step=micro_batches,
        steps_per_epoch=steps,
        checkpoint_paths=paths,
        metadata=metadata,
        changed_flags=changed_flags,
        complete=False,
        checkpoint_is_missing=False,
    )
    run_folder.check_folder(
        options.proj_dir,
        paths,
        plan.first_step,
        quant=options.quant,
        resumed_from=state.progress.step if state else None,
        unchanged=not changed_flags,
    )
    if options.eval_steps:
        # Where the state's run had this flag, it has made sure that the name was free.
        own = state and (state.metadata["args"].get("eval_steps") or state.progress.best_step)
        run_folder.check_best(options.proj_dir, own=bool(own))
    if devices.rank():
        return plan
    return look_at_checkpoints(plan, built)


def look_at_checkpoints(plan: RunPlan, built: BuiltModel) -> RunPlan:
    """Return the plan, with what it takes from the checkpoints that are there.

    ValueError if the disk has too little room for those to come.
    """
    complete = missing = False
    paths, step = plan.checkpoint_paths, plan.first_step
    if plan.state:
        step = plan.state.progress.step
        written = {number for number, path in paths.items() if os.path.exists(path)}
        at_end = step == plan.end_step and step in written
        complete = at_end or step > plan.end_step
        missing = step in paths.keys() - written and not plan.state.progress.losses
    if plan.options.eval_steps:
        # A new best checkpoint is there before the old one goes.
        best, end = run_folder.best_checkpoint(plan.options.proj_dir), plan.end_step
        paths = paths | {end + 1: best, end + 2: f"{best}.tmp"}
    if not complete:
        run_folder.check_room(
            plan.options.proj_dir,
            built,
            paths,
            keep=plan.options.keep,
            first=plan.first_step,
            step=step,
        )
    return dataclasses.replace(plan, complete=complete, checkpoint_is_missing=missing)


def checkpoint_paths(options: Options, steps_per_epoch: int) -> dict[int, str]:
    """Return {number of steps: path} of the checkpoints that a run will write."""
    paths = {}
    interval = options.epoch_save or options.epoch_count
    for number in range(1, options.epoch_count + 1):
        if number % interval == 0 or number == options.epoch_count:
            epochs_done = options.epoch_begin + number
            path = os.path.join(options.proj_dir, f"rwkv-{epochs_done - 1}.pth")
            paths[epochs_done * steps_per_epoch] = path
    return paths
