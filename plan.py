"""From the options to the plan of a run: its data, its steps, and what it writes.

One need not read this to understand Bone. The options pass through `resolve_options`, and then
through `plan_run`. Nothing changes an option after the first of them.
"""

import dataclasses
import os
from typing import Any

import check_data
import checkpoint
import corpus
import data
import devices
import resume_flags
import run_folder
import run_state
import sharding
from adamw8bit import bytes_of_moments
from archive import fingerprint, read_checkpoint
from bone_record import check_base, trained_quant
from build import BuiltModel
from loss import Counts, count_tokens
from options import Options, per_machine
from parse_options import check_files
from training_data import StepData, TrainingData, open_documents

# ---- options ------------------------------------------------------------------------------------


def resolve_options(options: Options) -> Options:
    """Return the options with what base model, Bone checkpoint and data say in place of None.

    ValueError where a flag that was given says otherwise, or names a file that is not there.
    """
    check_files(options)
    quant = options.quant or "none"
    if not options.load_model:
        return dataclasses.replace(options, quant=quant, vocab_size=new_vocab_size(options))
    if options.bone_load:
        tensors = read_checkpoint(options.bone_load, verify=False)
        r, mode = checkpoint.rank_and_mode(tensors, options.bone_load)
        quant = trained_quant(options.bone_load, options.quant)
    else:
        r, mode = options.bone_r or 64, options.bone_mode or "bat"
    base = read_checkpoint(options.load_model, verify=False)
    config = checkpoint.read_config(base, options.load_model)
    if options.bone_load:
        check_base(options.bone_load, options.load_model, options.other_base)
    of_bone: dict[str, Any] = {"bone_r": r, "bone_mode": mode}
    of_base: dict[str, Any] = {
        "n_layer": config.n_layer,
        "n_embd": config.n_embd,
        "vocab_size": config.vocab_size,
        "my_testing": config.version,
        "pre_ffn": int(config.pre_ffn),
        "head_qk": config.head_qk,
    }
    for path, found in ((options.bone_load, of_bone), (options.load_model, of_base)):
        for flag, value in found.items():
            check_flag(options, flag, value, path=path)
    resolved = dataclasses.replace(options, quant=quant, **of_bone, **of_base)
    sharding.check_quant(resolved)
    return resolved


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

    @property
    def micro_batches_of_rank(self) -> int:
        """The number of micro batches in a step, on each rank."""
        return -(-self.micro_batches_per_step // devices.size())

    def open_epochs(self, progress: run_state.Progress) -> range:
        """Return the epochs from the one that `progress` is in to the last."""
        end = self.options.epoch_begin + self.options.epoch_count
        return range(progress.epochs_closed(self.steps_per_epoch), end)

    def saves_state_after(self, step: int) -> bool:
        """Return whether --save_steps has the state saved after so many steps."""
        return self.options.save_steps > 0 and step % self.options.save_steps == 0

    def load_step(self, step: int) -> StepData:
        """Return this rank's share of a step.

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
        return StepData(micro_batches, Counts(*totals[:2]), totals[2])

    def room(self, built: BuiltModel) -> run_folder.Room:
        """Return what the run is going to write, and the room for it. built: see `plan_run`."""
        paths = self.checkpoint_paths
        if self.options.eval_steps:
            # A new best checkpoint is there before the old one goes.
            best, end = run_folder.best_checkpoint(self.options.proj_dir), self.end_step
            paths = paths | {end + 1: best, end + 2: f"{best}.tmp"}
        return run_folder.room(
            self.options.proj_dir,
            sizes_of_files(built, self.options.optim),
            paths,
            keep=self.options.keep,
            first=self.first_step,
            step=self.state.progress.step if self.state else self.first_step,
        )

    def describe_bad_rows(self, step: int, losses: list[float]) -> str:
        """Name the rows of a step's micro batches whose loss is not finite."""
        first = step * self.micro_batches_per_step
        return check_data.describe_bad_rows(
            self.data.documents, losses, first, config=self.data.batches
        )


def sizes_of_files(built: BuiltModel, optim: str) -> tuple[int, int]:
    """Return the bytes of a checkpoint, and of a state, which holds the optimizer's moments too."""
    checkpoint_size = state_size = 0
    for name, p in built.model.named_parameters():
        if name in built.saved_names:
            checkpoint_size += p.numel() * built.save_dtype[name].itemsize
            state_size += p.nbytes
        if p.requires_grad:
            state_size += bytes_of_moments(p.shape, optim)
    return checkpoint_size, state_size


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
            "the number of held-out documents": len(plan.data.held_out or ()),
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
        micro_batches=options.accumulate_grad_batches * sharding.ranks(options),
    )
    held_out = training_data.held_out
    metadata = {
        "base": fingerprint(options.load_model),
        "data": training_data.documents.fingerprint(),
        "held_out": held_out.fingerprint() if held_out else None,
        "micro_batches": micro_batches,
        "markers": "of lines",  # words are markers only where a line begins, since 0.2
    }
    paths = checkpoint_paths(options, steps)
    changed_flags = []
    if state:
        changed_flags = run_state.check_same_run(state, vars(options), metadata)
        state.forget_best_of_other(metadata["held_out"])
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
        check_best(plan)
    if devices.rank():
        return plan
    return look_at_checkpoints(plan, built)


def check_best(plan: RunPlan) -> None:
    """Refuse a folder whose best checkpoint is not this run's own. Raises ValueError."""
    state = plan.state
    own = False
    if state:
        # Where the state's run had --eval_steps, it has made sure that the name was free.
        own = bool(state.metadata["args"].get("eval_steps") or state.progress.best_step)
        # With other flags the steps after the state do not come again, and their best neither.
        if plan.changed_flags and run_folder.best_is_newer_than(state.path):
            own = False
    run_folder.check_best(plan.options.proj_dir, own=own)


def look_at_checkpoints(plan: RunPlan, built: BuiltModel) -> RunPlan:
    """Return the plan, with what it takes from the checkpoints that are there.

    ValueError if the disk has too little room for those to come.
    """
    complete = missing = False
    if plan.state:
        paths, step = plan.checkpoint_paths, plan.state.progress.step
        written = {number for number, path in paths.items() if os.path.exists(path)}
        at_end = step == plan.end_step and step in written
        complete = at_end or step > plan.end_step
        missing = step in paths.keys() - written and not plan.state.progress.losses
    if not complete:
        run_folder.check_room(plan.options.proj_dir, plan.room(built))
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
