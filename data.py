r"""From documents to batches: the rows of a micro batch, and which of their tokens count.

A batch is a function of (seed, i), where i = 0, 1, 2, ... counts micro batches from the start of
training. Imagine an endless stream of documents, one epoch after the other:

    permutation of epoch 0 | permutation of epoch 1 | ...      each shuffled by (seed, epoch)

Micro batch i has places i * micro_bsz to (i + 1) * micro_bsz - 1 of that stream. So a run sees the
same batches wherever it is interrupted and resumed, and on any number of devices.

Two rows, a document of 4 tokens and one of 3, each ended by token 0, make this batch:

    documents   7 8 9 0        idx   7 8 9      targets   8 9    0      mask   1 1 1
                5 6 0                5 6 0                6 0 -100             1 1 0

The model reads idx and predicts targets, the next tokens; mask says which targets count.
"""

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass

from cli import run_cli  # isort: skip

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from binidx import Documents
from convert import main
from host_embedding import HostEmbedding
from tokenizer import token_bytes

Batch = tuple[Tensor, Tensor, Tensor]
Markers = tuple[str, str]  # an answer is what follows the first, up to the second
LossMask = str | Markers  # see `collate`
MARKERS: dict[str, Markers | None] = {"pad": None, "none": None, "qa": ("Assistant:", "User:")}


@dataclass(frozen=True)
class BatchConfig:
    """What says which rows a micro batch has, and which of their tokens count."""

    micro_bsz: int  # B, the number of rows
    ctx_len: int  # how many tokens of a row the model reads at most
    dataload: str = "pad"  # see `rows_of`
    loss_mask: LossMask = "pad"  # see `collate`
    seed: int = 0
    shuffle: bool = True  # if not, each epoch has the documents in the order of the file
    cut: bool = True  # if not, documents longer than ctx_len keep their length

    def __post_init__(self) -> None:
        if self.dataload not in ("pad", "only", "get"):
            raise ValueError(f"--dataload {self.dataload} is unknown; use pad, only or get")
        if isinstance(self.loss_mask, str) and self.loss_mask not in MARKERS:
            raise ValueError(f"--loss_mask {self.loss_mask} is unknown; use pad, none, qa or se")
        if self.dataload == "only" and self.micro_bsz != 1:
            raise ValueError(
                "--dataload only takes one document at a time, but --micro_bsz is "
                f"{self.micro_bsz}; use --dataload only --micro_bsz 1"
            )


def rows_of(documents: Documents, i: int, config: BatchConfig) -> list[int]:
    """Choose the micro_bsz rows of micro batch i, by nothing but the arguments.

    "pad", "only": the numbers of documents, of the stream that the head of this file describes.
    "get": random places, among all tokens, where windows of ctx_len + 1 tokens begin.
    """
    if config.dataload == "get":
        n = len(documents.tokens)
        if n <= config.ctx_len:
            raise ValueError(
                f"{documents.prefix}: {n} tokens, too few for --dataload get; "
                f"use --ctx_len {n - 1} or less"
            )
        # The 1 sets this generator apart from those of the permutations.
        generator = np.random.default_rng([config.seed, i, 1])
        return generator.integers(n - config.ctx_len, size=config.micro_bsz).tolist()
    rows = []
    for place in range(i * config.micro_bsz, (i + 1) * config.micro_bsz):
        epoch, row = divmod(place, len(documents))
        if config.shuffle:
            row = int(_permutation(config.seed, epoch, len(documents))[row])
        rows.append(row)
    return rows


@functools.lru_cache(maxsize=2)  # a micro batch lies in one epoch, or on the border of two
def _permutation(seed: int, epoch: int, n: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(n)


def batch(documents: Documents, i: int, config: BatchConfig) -> Batch:
    """Make micro batch i, of the rows that `rows_of` chooses; see `collate`."""
    rows = rows_of(documents, i, config)
    loss_mask, ctx_len = config.loss_mask, config.ctx_len
    if config.dataload == "get":
        size = ctx_len + 1 + margin_of(loss_mask)
        windows = [documents.window(start, size) for start in rows]
        mid_line = [not begins_line(documents, start) for start in rows]
        return collate(windows, ctx_len, loss_mask, mid_line=mid_line)
    if config.dataload == "only" and loss_mask == "none":
        loss_mask = "pad"  # a single document has no padding that could count
    return collate([documents[row] for row in rows], ctx_len, loss_mask, cut=config.cut)


def collate(
    documents: Sequence[np.ndarray],
    ctx_len: int,
    loss_mask: LossMask = "pad",
    *,
    cut: bool = True,
    mid_line: Sequence[bool] | None = None,
) -> Batch:
    """Make a batch of B documents, which are arrays of token ids.

    Returns idx, targets (B, T) int64, the latter -100 in the padding, and mask (B, T) float32. T is
    at most ctx_len, if longer documents are `cut`. loss_mask says what counts:

    "pad"   the tokens of the documents
    "none"  all: rows are padded with token 0 up to ctx_len, and the padding counts, too
    "qa"    the answers: what follows "Assistant:", up to "User:"; see `qa_mask`
    a pair  the same with two other markers

    mid_line: whether each document begins in the middle of a line, as windows do; None: none does.
    """
    # A row has at least 2 tokens, so that the model reads a single token, though nothing follows.
    longest = max(2, *map(len, documents))
    limit = ctx_len + 1 if cut else max(ctx_len + 1, longest)
    if loss_mask == "none":
        rows = torch.zeros(len(documents), limit, dtype=torch.int64)
        mask = torch.ones(rows.shape)
    else:
        # Padding is left out where all rows have it: no token before it can see it.
        rows = torch.full((len(documents), min(limit, longest)), -100)
        mask = torch.zeros(rows.shape)
    markers, margin = markers_of(loss_mask), margin_of(loss_mask)
    for i, document in enumerate(documents):
        n = min(rows.shape[1], len(document))
        rows[i, :n] = torch.from_numpy(document[:n])
        if markers is None:
            mask[i, :n] = 1
        else:
            begins_inside = mid_line is not None and mid_line[i]
            answers = qa_mask(document[: n + margin], *markers, mid_line=begins_inside)
            mask[i, :n] = torch.from_numpy(answers[:n])
    return rows[:, :-1].clamp(min=0), rows[:, 1:].contiguous(), mask[:, 1:].contiguous()


def empty_batch(B: int = 1, device: torch.device | str = "cpu") -> Batch:
    """Make a batch of B rows of one token, none of which counts."""
    idx = torch.zeros(B, 1, dtype=torch.int64, device=device)
    return idx, torch.full_like(idx, -100), torch.zeros(B, 1, device=device)


def to_device(batch: Batch, device: torch.device, embedding: HostEmbedding | None = None) -> Batch:
    """Copy a batch to a device, all in one piece; its mask becomes int64, too.

    embedding: of a model that keeps it on the host. The rows of the batch's ids are sent then, in
    place of the ids.
    """
    if device.type == "cpu":
        return batch
    idx, targets, mask = batch
    first = embedding.rows(idx) if embedding else idx
    tensors = (first.contiguous().view(torch.int64), targets, mask.long())
    numbers = torch.cat([tensor.flatten() for tensor in tensors])
    # From pinned memory a GPU copies while the host goes on. (Apple's does not keep it alive.)
    numbers = numbers.pin_memory().to(device, non_blocking=device.type != "mps")
    pieces = numbers.split([tensor.numel() for tensor in tensors])
    return pieces[0].view(first.dtype).view(first.shape), *(x.view(mask.shape) for x in pieces[1:])


def markers_of(loss_mask: LossMask) -> Markers | None:
    """Look up the two markers of a mask of answers; None for "pad" and "none"."""
    return MARKERS[loss_mask] if isinstance(loss_mask, str) else loss_mask


def margin_of(loss_mask: LossMask) -> int:
    """Return how many tokens more show a marker that begins before the cut, and ends after it."""
    markers = markers_of(loss_mask) or ()
    # A token has at least a byte. The 5 are three spaces and ** before the marker.
    return max((len(marker.encode()) + 5 for marker in markers), default=0)


def pattern_of(marker: str) -> bytes:
    """Return the regular expression of a marker.

    A marker that begins with a letter or a digit counts only where a text or a line begins. Up to
    three spaces may be before it, and ** before, or around it. Others, such as <|user|>, [/INST] or
    one that begins with white space, count anywhere, as they are.
    """
    literal = re.escape(marker.encode())
    if not marker[0].isalnum():
        return literal
    return rb"(?<=[\n\r\xff]) {0,3}(?:\*\*%b\*\*|(?:\*\*)?%b)" % (literal, literal)


def begins_line(documents: Documents, start: int) -> bool:
    """Return whether a text or a line begins at token `start`."""
    if start == 0:
        return True
    before = int(documents.tokens[start - 1])
    return before == 0 or token_bytes().get(before, b"").rstrip(b" ").endswith((b"\n", b"\r"))


def qa_mask(
    tokens: ArrayLike, begin: str = "Assistant:", end: str = "User:", *, mid_line: bool = False
) -> np.ndarray:
    """Mark the tokens of answers, after `begin` and before `end`: (n) ints -> (n) float32.

    Words are markers only where a line begins, see `pattern_of`. mid_line: tokens begin within one.
    Markers are looked for in bytes, as a token may hold part of a marker and more; it then does not
    count. Token 0, the end of a document, ends an answer and counts, so that models learn to stop.
    """
    # The byte \xff stands for token 0. No text holds it.
    table = token_bytes()
    pieces = [b"\xff" if t == 0 else table.get(t, b"?") for t in np.asarray(tokens).tolist()]
    before = b"?" if mid_line else b"\xff"
    text = before + b"".join(pieces)
    starts = np.cumsum([len(before), *map(len, pieces)])[:-1]

    # An answer reaches through the next token 0, or to the next marker, or to the end of the text.
    first, second = pattern_of(begin), pattern_of(end)
    pattern = b"%b(.*?)((?<=\xff)|(?=%b|%b|\\Z))" % (first, first, second)
    in_answer = np.zeros(len(text), bool)
    for answer in re.finditer(pattern, text, re.DOTALL):
        in_answer[answer.start(1) : answer.end(1)] = True
    # A token counts if all of its bytes do.
    return np.logical_and.reduceat(in_answer, starts).astype(np.float32)


if __name__ == "__main__":
    run_cli(main)
