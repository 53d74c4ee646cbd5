"""What is said of the data at the start of a run: what of it is cut, and how much of it counts.

One need not read this to understand Bone. What is cut is counted exactly, from the sizes of the
documents, without reading them. How much a mask of answers leaves is told from a sample of them.
"""

import bisect
from typing import NamedTuple

import numpy as np

import binidx
import corpus
import data
from binidx import Documents
from options import Options
from plan import RunPlan
from training_data import TrainingData, longest_row

# Documents in a sample, evenly spread; or windows, the first ones that the run reads.
SAMPLE = 500
# How far a document is searched for an answer, in tokens.
BEGINNING = 1000
# "Assistant" by RWKV World's vocabulary, where no space is before it. (To load the tokenizer for
# it would take 250 MB.)
ASSISTANT = (5585, 41693)


class Cut(NamedTuple):
    """What rows of at most ctx_len tokens leave out of the documents."""

    documents: int  # that are longer
    tokens: int  # that no row holds


# ---- numbers ------------------------------------------------------------------------------------


def percent(part: float, whole: float) -> str:
    """Return a share as text."""
    share = 100 * part / max(whole, 1)
    if 0 < share < 0.1:
        return "under 0.1 %"
    return f"{share:.0f} %" if share >= 10 or share == 0 else f"{share:.1f} %"


def counted(number: int, noun: str) -> str:
    """Return a number of things as text: 1 document, 2,000 documents."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def row_sizes(documents: Documents, batches: data.BatchConfig) -> np.ndarray:
    """Return how many tokens of each document a row holds, (documents) ints."""
    if not batches.cut:
        return documents.sizes
    # No number beyond the largest size: the sizes of a binidx are int32.
    limit = min(batches.ctx_len + 1, int(documents.sizes.max()))
    return np.minimum(documents.sizes, limit)


def count_cut(documents: Documents, batches: data.BatchConfig) -> Cut:
    """Return what is cut, from the sizes alone."""
    lost = documents.sizes - row_sizes(documents, batches)
    return Cut(int((lost > 0).sum()), int(lost.sum(dtype=np.int64)))


def lengths_that_keep(documents: Documents) -> tuple[int, int]:
    """Return the smallest --ctx_len that loses no token, and the one that loses at most 1 %."""
    longest = int(documents.sizes.max())

    def tokens_within(size: int) -> int:
        return int(np.minimum(documents.sizes, size).sum(dtype=np.int64))

    most = 0.99 * tokens_within(longest)
    return longest - 1, bisect.bisect_left(range(longest), most, key=tokens_within) - 1


def count_targets(documents: Documents, batches: data.BatchConfig) -> int:
    """Return how many tokens of the documents are targets: all that rows hold but the first."""
    return int(np.maximum(row_sizes(documents, batches) - 1, 0).sum(dtype=np.int64))


def tokens_of_rows(training: TrainingData) -> float:
    """Return the mean number of tokens in a row; padding is one of them where it counts."""
    batches = training.batches
    if batches.dataload == "get":
        return batches.ctx_len
    targets = row_sizes(training.documents, batches) - 1
    return float(np.maximum(targets, batches.ctx_len if pads(batches) else 1).mean())


def pads(batches: data.BatchConfig) -> bool:
    """Return whether padding counts."""
    return batches.loss_mask == "none" and batches.dataload == "pad"


def evenly_spread(n: int) -> np.ndarray:
    """Return SAMPLE numbers from 0 to n - 1; all of them, if there are no more."""
    return np.linspace(0, n - 1, min(SAMPLE, n)).astype(np.int64)


def sampled_answers(training: TrainingData) -> tuple[float, int, int]:
    """Return how many tokens of a sample count by a mask of answers, of how many, in how many rows.

    The sample is one of documents; of windows, where --dataload get has the rows be these.
    """
    documents, batches = training.documents, training.batches
    counting, tokens, rows = 0.0, 0, 0
    if batches.dataload == "get":
        for number in range(-(-SAMPLE // batches.micro_bsz)):
            _, _, mask = training.micro_batch(number)
            counting += mask.sum().item()
            tokens += mask.numel()
            rows += len(mask)
        return counting, tokens, rows
    for i in evenly_spread(len(documents)):
        document = documents[i]
        _, _, mask = data.collate([document], batches.ctx_len, batches.loss_mask, cut=batches.cut)
        counting += mask.sum().item()
        tokens += len(document)
        rows += 1
    return counting, tokens, rows


def are_dialogues(documents: Documents) -> bool:
    """Return whether most documents, of a sample, have an answer that --loss_mask qa would find."""
    if documents.vocabulary:
        return False
    sample = evenly_spread(len(documents))
    with_answer = 0
    for i in sample:
        start = documents.pointers[i] // documents.tokens.itemsize
        tokens = documents.window(start, min(documents.sizes[i], BEGINNING))
        found = (tokens[:-1] == ASSISTANT[0]) & (tokens[1:] == ASSISTANT[1])
        with_answer += bool(found.any())
    return 2 * with_answer > len(sample)


# ---- lines --------------------------------------------------------------------------------------


def describe_documents(documents: Documents, kind: str) -> str:
    """Say what a file holds. kind: of a text or a row of tokens, its --data_type."""
    tokens = counted(documents.token_count(), "token")
    if not isinstance(documents, binidx.Binidx):
        return f"{documents.prefix} ({kind}): {tokens}, in {counted(len(documents), 'piece')}"
    return (
        f"{documents.prefix}: {counted(len(documents), 'document')}, {tokens}, "
        f"longest {documents.sizes.max():,}"
    )


def data_lines(plan: RunPlan) -> list[tuple[str, str]]:
    """Return (name, what is said of it) of the data and the steps of a run."""
    options, batches = plan.options, plan.data.batches
    documents, held_out = plan.data.documents, plan.data.held_out
    kind = options.data_type or corpus.guess_data_type(options.data_file)
    lines = [("data", describe_documents(documents, kind))]
    # Windows of --dataload get go through all tokens. Held-out documents are cut even there.
    cut = Cut(0, 0) if batches.dataload == "get" else count_cut(documents, batches)
    if cut.documents:
        lines += [
            ("cut", f"at --ctx_len {options.ctx_len}: {describe_cut(documents, cut)}"),
            ("", f"what keeps them: {', '.join(ways_to_keep(options, documents))}"),
        ]
    if held_out:
        kind = options.data_type or corpus.guess_data_type(options.val_file)
        text = describe_documents(held_out, kind)
        cut = count_cut(held_out, batches)
        if cut.documents:
            everything, _ = lengths_that_keep(held_out)
            text += f"; cut: {describe_cut(held_out, cut)} (--ctx_len {everything} keeps all)"
        lines.append(("held out", text))
    lines.append(("loss", describe_share(options, plan.data)))
    lines.append(("steps", describe_steps(plan)))
    return lines


def describe_cut(documents: Documents, cut: Cut) -> str:
    """Say how much is cut."""
    share = percent(cut.tokens, documents.token_count())
    return f"{counted(cut.documents, 'document')}, {share} of all tokens are never seen"


def ways_to_keep(options: Options, documents: Documents) -> list[str]:
    """Return the flags with which nothing is cut, the --ctx_len first.

    Where that is for a few long documents, it says what is enough for nearly all.
    """
    everything, most = lengths_that_keep(documents)
    length = f"--ctx_len {everything}"
    if options.ctx_len < most <= everything / 2:
        length += f" ({most} keeps 99 %)"
    ways = [length, "--dataload get"]
    if not options.head_qk:
        ways.append("--train_type infctx")
    return ways


def describe_share(options: Options, training: TrainingData) -> str:
    """Say which share of the tokens counts in the loss."""
    documents, batches = training.documents, training.batches
    by = f"(--loss_mask {options.loss_mask})"
    if data.markers_of(batches.loss_mask):
        counting, tokens, n = sampled_answers(training)
        share = percent(counting, tokens)
        if batches.dataload == "get":
            return f"on about {share} of all tokens {by}, told from {counted(n, 'window')}"
        if n < len(documents):
            return f"on about {share} of all tokens {by}, told from {counted(n, 'document')}"
        return f"on {share} of all tokens {by}"
    if batches.dataload == "get":
        return f"on all tokens {by}"
    targets = count_targets(documents, batches)
    if pads(batches):
        share = percent(targets, tokens_of_rows(training) * len(documents))
        return f"on padding too {by}: {share} of what counts are tokens of the data"
    return f"on {percent(targets, documents.token_count())} of all tokens {by}"


def describe_steps(plan: RunPlan) -> str:
    """Say how long the training is."""
    options = plan.options
    rows = options.micro_bsz * plan.micro_batches_per_step
    text = (
        f"{counted(options.epoch_count, 'epoch')} x {counted(plan.steps_per_epoch, 'step')} x "
        f"{counted(rows, 'row')}, about {rows * tokens_of_rows(plan.data):,.0f} tokens a step "
        f"(a row: up to {longest_row(options, plan.data.documents):,}"
    )
    if options.train_type == "infctx":
        text += f", in chunks of {options.chunk_ctx:,}"
    text += ")"
    if options.epoch_steps:
        times = options.epoch_count * plan.steps_per_epoch * rows / plan.data.rows
        text += (
            f"; {times:,.1f} times the data" if times >= 1 else f"; {percent(times, 1)} of the data"
        )
    return text
