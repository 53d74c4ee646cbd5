"""From text to batches: jsonl -> tokens -> binidx files -> (idx, targets, mask); or characters, or tokens, of one long text."""

import functools
import math
import os
import re

import numpy as np
import torch

from cli import Parser, run_cli
from corpus import _prefix, jsonl_to_binidx
from tokenizer import token_bytes

MARKERS = {
    "qa": ("Assistant:", "User:")
}  # loss masks that count what follows the first text, up to the second


def qa_mask(tokens, begin="Assistant:", end="User:"):
    """1 where a token counts as a target: in an answer, after `begin`, before the next `end`. (n) ints -> (n) float32.
    Token 0 after an answer counts, and ends it. Markers are looked for in the bytes, as a token may hold a piece of one and more."""
    pieces = [
        b"\xff" if token == 0 else token_bytes().get(token, b"?")
        for token in np.asarray(tokens).tolist()
    ]  # no text holds \xff
    text, begins = b"".join(pieces), np.cumsum([0, *map(len, pieces)])[:-1]
    counts = np.zeros(len(text), bool)
    begin, end = (re.escape(marker.encode()) for marker in (begin, end))
    for answer in re.finditer(
        b"%b(.*?)((?<=\xff)|(?=%b|%b|\\Z))" % (begin, begin, end), text, re.DOTALL
    ):
        counts[answer.start(1) : answer.end(1)] = True
    return np.logical_and.reduceat(counts, begins).astype(
        np.float32
    )  # a token that touches a marker belongs to it


def check_mask(data, ctx_len, loss_mask, cut=True):
    """How many of the first 1000 documents have no token that counts; ValueError where that is all of them."""
    markers = MARKERS.get(loss_mask, loss_mask)
    if markers in ("pad", "none"):
        return 0
    if data.vocabulary:
        raise ValueError(
            f"{data.prefix}: its tokens are characters, in which --loss_mask finds no marker; use pad or none"
        )
    n = min(1000, len(data))
    silent = sum(not collate([data[i]], ctx_len, markers, cut)[2].any() for i in range(n))
    if silent == n:
        begin, end = markers
        raise ValueError(
            f"{data.prefix}: no answer in {n} documents: no {begin}{f' in the first {ctx_len} tokens' * cut}; use --loss_mask pad, or {end} ... {begin} ..."
        )
    return silent


def collate(documents, ctx_len, loss_mask="pad", cut=True):
    """B documents, arrays of token ids -> idx, targets (B, T) int64, -100 where padding begins, and mask (B, T) float32; T <= ctx_len where
    longer documents are cut. loss_mask: "pad", the documents count; "none", the 0s after them too, up to ctx_len; "qa", only the answers;
    or what stands for "Assistant:" and "User:" there, a pair."""
    # Padding cannot reach the tokens before it, as the model is causal, and with a mask it has no cross-entropy of its own: whole
    # columns of it would be computed for nothing. Without a mask it counts, and stays.
    markers = MARKERS.get(loss_mask, loss_mask)
    longest = max(2, *map(len, documents))  # 2: a lone token is an idx too
    limit = ctx_len + 1 if cut else max(ctx_len + 1, longest)
    width = limit if markers == "none" else min(limit, longest)
    rows = torch.full((len(documents), width), 0 if markers == "none" else -100)
    mask = torch.full(rows.shape, float(markers == "none"))
    for row, counts, document in zip(rows, mask, documents):
        n = min(width, len(document))
        row[:n] = torch.from_numpy(document[:n])
        if markers in ("pad", "none"):
            counts[:n] = 1
        else:  # some tokens more are looked at: a marker that the cut goes through is still one
            counts[:n] = torch.from_numpy(
                qa_mask(document[: n + len(markers[0].encode())], *markers)[:n]
            )
    return rows[:, :-1].clamp(min=0), rows[:, 1:].contiguous(), mask[:, 1:].contiguous()


def silent(B=1, device="cpu"):
    """A batch of B rows of one token, of which none counts."""
    return (
        torch.zeros(B, 1, dtype=torch.int64, device=device),
        torch.full((B, 1), -100, device=device),
        torch.zeros(B, 1, device=device),
    )


def to_device(batches, device):
    """Copy batches (idx, targets, mask) of any shapes to `device`, as one piece.

    For a GPU the piece is pinned memory, from which it copies while the host goes on: nobody waits.
    The masks arrive as int64, like the tokens.
    """
    if device.type == "cpu":
        return batches
    numbers = torch.cat([x.flatten().long() for batch in batches for x in batch])
    # (Apple's copy does not keep the pinned memory alive.)
    numbers = numbers.pin_memory().to(device, non_blocking=device.type != "mps")
    pieces = iter(numbers.split([x.numel() for batch in batches for x in batch]))
    return [tuple(next(pieces).view(x.shape) for x in batch) for batch in batches]


@functools.lru_cache(maxsize=2)  # a batch lies in one epoch or on the border of two
def _permutation(seed, epoch, n):
    return np.random.default_rng([seed, epoch]).permutation(n)


def rows_of(data, step, micro_bsz, ctx_len, dataload="pad", seed=0, shuffle=True):
    """What micro batch number `step` consists of, a function of nothing but the arguments: micro_bsz ints.
    "pad", "only": documents, the next ones of an endless stream in which each epoch is a permutation of all (without shuffle, their order).
    "get": random places in the whole token stream, where windows of ctx_len + 1 tokens begin."""
    if dataload == "get":
        n = len(data.tokens) - ctx_len  # places; the last token of a window is a target only
        if n < 1:
            raise ValueError(
                f"{data.prefix}: {len(data.tokens)} tokens, too few for --dataload get; use --ctx_len {len(data.tokens) - 1} or less"
            )
        return (
            np.random.default_rng([seed, step, 1]).integers(n, size=micro_bsz).tolist()
        )  # the 1: apart from the permutations
    places = [divmod(step * micro_bsz + b, len(data)) for b in range(micro_bsz)]
    return [int(_permutation(seed, epoch, len(data))[i]) if shuffle else i for epoch, i in places]


def suspects(documents, losses, first, rows):
    """In words, the rows of a step's micro batches, from number `first` on, whose loss is not finite; of all of them where each loss is."""
    bad = [n for n, loss in enumerate(losses) if not math.isfinite(loss)] or range(len(losses))
    numbers = " ".join(str(row) for n in bad for row in rows_of(documents, first + n, **rows))
    return f"{'rows that begin at tokens' if rows['dataload'] == 'get' else 'documents'} {numbers}, counted from 0"


def batch(
    data, step, micro_bsz, ctx_len, dataload="pad", loss_mask="pad", seed=0, shuffle=True, cut=True
):
    """Micro batch number `step`, the rows that `rows_of` names: idx, targets (B, T) int64 and mask (B, T) float32. B = micro_bsz, 1 for
    "only"; T is ctx_len for "get"."""
    if dataload not in ("pad", "only", "get") or (
        isinstance(loss_mask, str) and loss_mask not in ("pad", "none", *MARKERS)
    ):
        raise ValueError(
            f"--dataload {dataload} --loss_mask {loss_mask}: there are pad, only, get and pad, none, qa, se"
        )
    if dataload == "only" and micro_bsz != 1:
        raise ValueError(
            f"--dataload only takes one document at a time, but --micro_bsz is {micro_bsz}; use --dataload only --micro_bsz 1"
        )
    loss_mask = (
        "pad" if (dataload, loss_mask) == ("only", "none") else loss_mask
    )  # the same, where nothing is padded
    rows = rows_of(data, step, micro_bsz, ctx_len, dataload, seed, shuffle)
    documents = [
        data.tokens[start : start + ctx_len + 1].astype(np.int64)
        if dataload == "get"
        else data[start]
        for start in rows
    ]
    return collate(documents, ctx_len, loss_mask, cut)


def main(argv=None):
    parser = Parser(
        prog="data.py", description="Tokenize a .jsonl into binidx files (RWKV World, uint16)."
    )
    parser.add_argument(
        "jsonl",
        help='{"text": "..."} on each line, UTF-8; train.py takes such a file as it is, too',
    )
    parser.add_argument(
        "prefix",
        nargs="?",
        help="of the .bin and .idx to write (default: the .jsonl's name without .jsonl)",
    )
    parser.add_argument(
        "--ctx_len",
        type=int,
        metavar="INT",
        help="also count the documents that training with this --ctx_len would cut",
    )
    args = parser.parse_args(argv)
    if args.ctx_len is not None and args.ctx_len < 1:
        raise ValueError(f"--ctx_len {args.ctx_len} must be at least 1")
    prefix = _prefix(args.prefix or os.path.splitext(args.jsonl)[0])
    for path in filter(os.path.exists, (prefix + ".bin", prefix + ".idx")):
        raise ValueError(f"{path}: already there; delete it, or give another prefix")
    summary = jsonl_to_binidx(args.jsonl, prefix, args.ctx_len)
    summary |= {
        f"bytes in {prefix}{end}": os.path.getsize(prefix + end) for end in (".bin", ".idx")
    }
    for name, count in summary.items():
        if count is not None:
            print(
                f"{count:>15,}  {name.replace('too_long', f'too long, cut at --ctx_len {args.ctx_len}')}"
            )


if __name__ == "__main__":
    run_cli(main)
