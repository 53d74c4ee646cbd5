"""Open data of any form as Documents: binidx, jsonl, text and numpy files.

One need not read this to understand Bone.
"""

import codecs
import os
import pathlib
from collections.abc import Iterator

import numpy as np

from binidx import Binidx, Documents, without_ending
from convert import ENDINGS, find_source, has_ending, missing_files, open_converted
from tokenizer import CHARACTERS, Vocabulary

# ---- opening ---------------------------------------------------------------------------------


def open_data(
    path: str,
    vocab_size: int | None = None,
    data_type: str | None = None,
    *,
    ctx_len: int = 512,
    vocabulary: Vocabulary | None = None,
) -> Documents:
    """Open a file as Documents. data_type: a --data_type; None: guess it from the file.

    binidx, jsonl      a prefix of binidx files; or a .jsonl or .json, which is converted beside
                       itself, to x.jsonl.bin and x.jsonl.idx, when it is new or changed
    utf-8, utf-16le    a text, whose tokens are its characters, in pieces of ctx_len + 1
    dummy              a text of sums, without a file
    numpy, uint16      the tokens in a .npy file, or bare little-endian numbers, in such pieces

    With vocab_size, a token outside 0 ... vocab_size - 1 is a ValueError that names its document,
    counted from 0 as in data[i]. vocabulary: of a text; None: the characters that occur in it.
    """
    data_type = data_type or guess_data_type(path)
    if data_type in CHARACTERS:
        data = _open_text(path, data_type, ctx_len, vocabulary=vocabulary)
    elif data_type in ("numpy", "uint16"):
        data = _open_tokens(path, data_type, ctx_len)
    else:
        data = _open_binidx(path)
    if vocab_size is not None:
        _check_tokens(data, vocab_size)
    return data


def hold_out(documents: Documents, share: float, seed: int) -> tuple[Documents, Documents]:
    """Split documents into those to train on and those held out, at least one of each.

    Which they are is a function of the arguments alone, so that a resumed run holds out the same.
    """
    n = len(documents)
    if n < 2:
        raise ValueError(f"{documents.prefix}: holds {n} documents, but --val_split needs two")
    # The 2 sets this generator apart from those of the batches.
    shuffled = np.random.default_rng([seed, 0, 2]).permutation(n)
    count = min(n - 1, max(1, round(share * n)))
    held_out = documents.part(np.sort(shuffled[:count]))
    training = documents.part(np.sort(shuffled[count:]))
    note = f"{documents.prefix}: {count:,} of {n:,} documents are held out (--val_split {share})"
    training.notes = [*documents.notes, note]
    held_out.notes = ()
    held_out.prefix = f"{documents.prefix}, the held-out part"
    return training, held_out


def guess_data_type(path: str) -> str:
    """Guess the --data_type of a file: numpy for .npy, utf-8 for .txt, binidx for all else.

    A .txt whose first bytes say so is utf-16le.
    """
    ending = os.path.splitext(path)[1].lower()
    if ending == ".npy":
        return "numpy"
    if ending != ".txt":
        return "binidx"
    if os.path.exists(path):
        with open(path, "rb") as f:
            if f.read(2) == codecs.BOM_UTF16_LE:
                return "utf-16le"
    return "utf-8"


def _check_tokens(data: Documents, vocab_size: int) -> None:
    limits = np.iinfo(data.tokens.dtype)
    if limits.min >= 0 and limits.max < vocab_size:
        # No token can be outside, such as uint16 in a vocabulary of 65536.
        return
    # Both read the mapped file from end to end, and take no memory.
    for at in (data.tokens.argmin(), data.tokens.argmax()):
        token = data.tokens[at]
        if not 0 <= token < vocab_size:
            i = np.searchsorted(data.pointers, at * data.tokens.itemsize, side="right") - 1
            raise ValueError(
                f"{data.prefix}: document {i} holds token {token}, "
                f"but the model's vocabulary is {vocab_size}"
            )


def _open_binidx(path: str) -> Binidx:
    prefix = without_ending(path)
    source = find_source(prefix)
    if source:
        return open_converted(source)
    missing = missing_files(prefix)
    if missing:
        if os.path.isdir(path):
            example = os.path.join(path, "data.jsonl")
            raise ValueError(f"{path}: a folder; give a file in it, as in --data_file {example}")
        source = prefix if has_ending(prefix) else prefix + ".jsonl"
        raise FileNotFoundError(
            f"{path}: no {' and '.join(missing)}, and no {source}; "
            "give a .jsonl, or the prefix of a .bin and .idx "
            "(a text: --data_type utf-8; bare tokens: uint16)"
        )
    documents = Binidx(prefix)
    documents.notes = [*_notes_on_pair(prefix)]
    return documents


def _notes_on_pair(prefix: str) -> Iterator[str]:
    """Say what is not read beside a pair of binidx files, as somebody may have meant it."""
    if has_ending(prefix):
        yield f"note: {prefix} is not there; the tokens that were kept beside it are used"
        return
    if os.path.isfile(prefix):
        yield f"note: {prefix}.bin is used, and {prefix} beside it is not read"
    for ending in ENDINGS:
        if os.path.exists(prefix + ending):
            yield (
                f"note: {prefix}.bin is used, and {prefix}{ending} beside it is not read; "
                f"--data_file {prefix}{ending} takes that, as it is now"
            )


def _open_text(
    path: str, data_type: str, ctx_len: int, *, vocabulary: Vocabulary | None
) -> Documents:
    """Read a text as Documents of characters. vocabulary: None for those that occur, sorted."""
    try:
        if data_type == "dummy":
            text = _dummy_text()
        else:
            text = pathlib.Path(path).read_text(encoding=data_type).removeprefix("\ufeff")
        if vocabulary is None:
            vocabulary = Vocabulary("".join(sorted(set(text))))
        data = Documents(path or data_type, vocabulary.encode(text, path), ctx_len)
    except UnicodeError as error:
        raise ValueError(
            f"{path}: not {data_type} ({error}); save it as UTF-8, and use --data_type utf-8"
        ) from error
    data.vocabulary = vocabulary
    return data


def _dummy_text() -> str:
    """Make the text of 100,000 sums that RWKV-LM has for trials."""
    text = ""
    for i in range(100_000):
        a = i % 10000
        b = i * i % 10000
        text += f".{a}+{b}={a + b}."
    return text


def _open_tokens(path: str, data_type: str, ctx_len: int) -> Documents:
    """Map one long row of tokens into memory: a .npy file, or bare uint16 numbers."""
    try:
        if data_type == "numpy":
            tokens = np.load(path, mmap_mode="r", allow_pickle=False)
        else:
            tokens = np.memmap(path, "<u2", "r")
        if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
            raise ValueError(f"{tokens.dtype}, {tokens.ndim} dimensions")
    except OSError:
        raise
    except Exception as error:  # a damaged header can fail anywhere in NumPy
        raise ValueError(
            f"{path}: not {data_type}, a row of integers ({error}); another --data_type may fit"
        ) from error
    return Documents(path, tokens, ctx_len)
