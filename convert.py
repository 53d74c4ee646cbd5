"""Convert a .jsonl to binidx files: for train.py, beside itself; by `python data.py`, anywhere.

One need not read this to understand Bone.
"""

import json
import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import DTypeLike
from tqdm import tqdm

from binidx import Binidx, StrPath, without_ending, write_binidx
from cli import Parser
from tokenizer import encode

LINE_OF_A_JSONL = 'each line must look like {"text": "..."}'


def jsonl_to_binidx(
    jsonl: StrPath, prefix: StrPath, ctx_len: int | None = None, *, dtype: DTypeLike = np.uint16
) -> dict[str, Any]:
    """Tokenize a .jsonl, line by line, into prefix.bin and prefix.idx.

    Returns a dict: documents, tokens, longest (tokens of the longest document), skipped (blank
    lines and empty texts), too_long (documents of more than ctx_len + 1 tokens, which training
    cuts; None without ctx_len). Raises ValueError that names the line, if one is wrong.
    """
    lines = _Jsonl(jsonl)
    n, tokens = write_binidx(prefix, lines, dtype)
    sizes = Binidx(prefix).sizes
    too_long = None
    if ctx_len is not None:
        too_long = int((sizes > ctx_len + 1).sum())
    return {
        "documents": n,
        "tokens": tokens,
        "longest": int(sizes.max()),
        "skipped": lines.skipped,
        "too_long": too_long,
    }


class _Jsonl:
    """The documents of a .jsonl as token ids, each ended by token 0; counts what it skips."""

    def __init__(self, path: StrPath) -> None:
        self.path = path
        self.skipped = 0

    def __iter__(self) -> Iterator[list[int]]:
        found = False
        with open(self.path, "rb") as lines, self._progress_bar() as bar:
            for number, line in enumerate(lines, 1):
                tokens = self._tokens_of(line, number)
                bar.update(len(line))
                if tokens:
                    found = True
                    yield [*tokens, 0]
                else:
                    self.skipped += 1
        if not found:
            raise ValueError(f"{self.path}: holds no document; {LINE_OF_A_JSONL}")

    def _progress_bar(self) -> tqdm:
        return tqdm(
            total=os.path.getsize(self.path),
            desc=str(self.path),
            unit="B",
            unit_scale=True,
            disable=None,  # on a terminal only
            leave=False,
        )

    def _tokens_of(self, line: bytes, number: int) -> list[int]:
        """Tokenize the text of a line; [] where it is blank or the text is empty."""
        try:
            # -sig: a byte order mark is left out.
            text = line.decode("utf-8-sig").strip()
            if not text:
                return []
            return encode(json.loads(text)["text"])
        except (KeyError, TypeError) as error:
            raise ValueError(
                f'{self.path}, line {number}: has no "text" that is a string; {LINE_OF_A_JSONL}'
            ) from error
        except (ValueError, RecursionError) as error:
            # JSON counts lines in what it is given: always 1.
            why = str(error).replace("line 1 ", "")
            raise ValueError(
                f"{self.path}, line {number}: not JSON in UTF-8 ({why}); {LINE_OF_A_JSONL}"
            ) from error


# ---- beside itself ---------------------------------------------------------------------------


def convert_beside_itself(jsonl: str) -> None:
    """Convert x.jsonl to x.jsonl.bin and x.jsonl.idx, unless they exist and are newer."""
    if not missing_files(jsonl):
        changed = os.stat(jsonl).st_mtime_ns
        converted = os.stat(jsonl + ".idx").st_mtime_ns
        if changed < converted:
            return
    folder = os.path.dirname(jsonl) or "."
    if not os.access(folder, os.W_OK):
        raise ValueError(
            f"{jsonl}: its tokens are kept beside it, but {folder} is read-only; write them "
            f"elsewhere, by python data.py {jsonl} PREFIX, and use --data_file PREFIX"
        )
    jsonl_to_binidx(jsonl, jsonl)


def missing_files(prefix: str) -> list[str]:
    """List those of prefix.bin and prefix.idx that do not exist."""
    return [path for path in (prefix + ".bin", prefix + ".idx") if not os.path.exists(path)]


# ---- command line ----------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(prog="data.py", description="Tokenize a .jsonl: RWKV World, binidx of uint16.")
    parser.add_argument("jsonl", help='{"text": "..."} on each line, UTF-8; train.py takes it, too')
    parser.add_argument("prefix", nargs="?", help="of .bin and .idx (default: that of the .jsonl)")
    help_of_ctx_len = "also count the documents that training with this --ctx_len would cut"
    parser.add_argument("--ctx_len", type=int, metavar="INT", help=help_of_ctx_len)
    args = parser.parse_args(argv)
    if args.ctx_len is not None and args.ctx_len < 1:
        raise ValueError(f"--ctx_len {args.ctx_len} must be at least 1")
    prefix = without_ending(args.prefix or os.path.splitext(args.jsonl)[0])
    paths = [prefix + ".bin", prefix + ".idx"]
    for path in paths:
        if os.path.exists(path):
            raise ValueError(f"{path}: already there; delete it, or give another prefix")
    summary = jsonl_to_binidx(args.jsonl, prefix, args.ctx_len)
    too_long = summary.pop("too_long")
    if too_long is not None:
        summary[f"too long, cut at --ctx_len {args.ctx_len}"] = too_long
    for path in paths:
        summary[f"bytes in {path}"] = os.path.getsize(path)
    for name, count in summary.items():
        print(f"{count:>15,}  {name}")
