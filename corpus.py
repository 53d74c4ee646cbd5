"""Documents as token ids: binidx, jsonl, text and numpy files.

One need not read this to understand Bone.

A data set is a pair of binidx files (a format of Megatron-LM). They are mapped into memory and
never read whole, so a data set may be larger than memory. x.bin holds the tokens of all documents,
each ended by token 0, and nothing else. x.idx (little-endian) says where each document lies:

    offset     type             what
    0          9 bytes          magic, MMIDIDX\\0\\0
    9          uint64           version, 1
    17         uint8            type of a token: 1 u8, 2 i8, 3 i16, 4 i32, 5 i64, 8 u16
                                (6 and 7, floats, are refused)
    18         uint64           n, number of documents
    26         uint64           length of the doc index, n + 1
    34         n * int32        sizes: tokens in each document
    34 +  4n   n * int64        pointers: byte offset of each document in x.bin
    34 + 12n   (n + 1) * int64  doc index: 0, 1, ..., n (Megatron's grouping of sentences, not used)
"""

import codecs
import contextlib
import json
import os
import pathlib
import re
import struct
import zlib
from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import DTypeLike
from tqdm import tqdm

from atomic import atomic_path
from tokenizer import CHARACTERS, Vocabulary, encode

StrPath = str | os.PathLike[str]

# The beginning of x.idx: magic, version, type of a token, documents, length of the doc index.
MAGIC = b"MMIDIDX\0\0"
HEADER = struct.Struct("<9sQBQQ")
DTYPES: dict[int, DTypeLike] = {
    1: np.uint8,
    2: np.int8,
    3: np.int16,
    4: np.int32,
    5: np.int64,
    8: np.uint16,
}

LINE_OF_A_JSONL = 'each line must look like {"text": "..."}'


# ---- documents -------------------------------------------------------------------------------


class Documents:
    """A data set in memory or mapped: a row of tokens, and where each document lies in it.

    len(data)     the number of documents
    data[i]       the tokens of document i, (its size) int64, a copy
    data.sizes    the size of each document, (documents) ints
    data.tokens   the tokens of all documents, (tokens) of any integer type
    data.prefix   the name for messages

    This class itself makes documents of one long text: pieces of ctx_len + 1 tokens, each of which
    begins with the last token of the piece before. So every token but the first is a target once.
    """

    # The Vocabulary, where tokens are characters.
    vocabulary: Vocabulary | None = None

    def __init__(self, name: str, tokens: np.ndarray, ctx_len: int) -> None:
        if len(tokens) < 2:
            raise ValueError(f"{name}: holds {len(tokens)} tokens; at least 2 are needed")
        starts = np.arange(0, len(tokens) - 1, ctx_len)
        self.prefix = name
        self.tokens = tokens
        self.sizes = np.minimum(ctx_len + 1, len(tokens) - starts)
        # Where each document begins, in bytes, as in x.idx.
        self.pointers = starts * tokens.itemsize

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, i: int) -> np.ndarray:
        return self.window(self.pointers[i] // self.tokens.itemsize, self.sizes[i])

    def window(self, start: int, size: int) -> np.ndarray:
        """Copy tokens `start` and the next ones of the data, whatever document they belong to."""
        return self.tokens[start : start + size].astype(np.int64)

    def fingerprint(self) -> int:
        """Compute a number that tells apart different data.

        It is a checksum of all sizes, and of a million tokens from 64 places, so it is quick.
        """
        length = 1 << 14
        checksum = zlib.crc32(np.ascontiguousarray(self.sizes).data)
        last = max(0, len(self.tokens) - length)
        for start in np.linspace(0, last, 64).astype(np.int64):
            piece = np.ascontiguousarray(self.tokens[start : start + length])
            checksum = zlib.crc32(piece.data, checksum)
        return checksum

    def vocab_size(self) -> int:
        """Return the size of the smallest vocabulary with which a model can read this."""
        if self.vocabulary:
            return len(self.vocabulary)
        return int(self.tokens.max()) + 1


class Binidx(Documents):
    """The documents of prefix.bin and prefix.idx, mapped into memory.

    Raises ValueError, in one line, for a damaged pair, before any memory is taken.
    """

    def __init__(self, prefix: StrPath) -> None:
        self.prefix = without_ending(prefix)
        dtype = self._map_index(self.prefix + ".idx")
        self._map_tokens(self.prefix + ".bin", dtype)

    def _map_index(self, path: str) -> np.dtype:
        """Map sizes and pointers, and check that they are those of documents without gaps."""
        header = np.fromfile(path, np.uint8, HEADER.size).tobytes()
        header = header.ljust(HEADER.size, b"\0")
        magic, version, code, n, doc_count = HEADER.unpack(header)
        size = os.path.getsize(path)
        need = HEADER.size + 12 * n + 8 * doc_count
        if magic != MAGIC or version != 1 or code not in DTYPES or size != need:
            found = f"version {version}, type {code}, {size} of {need} bytes"
            raise ValueError(
                f"{path}: not a whole binidx index of version 1 with integers ({found}); "
                "copy or convert it again"
            )
        dtype = np.dtype(DTYPES[code])
        index = np.memmap(path, mode="r")
        self.sizes = np.frombuffer(index, np.int32, n, HEADER.size)
        self.pointers = np.frombuffer(index, np.int64, n, HEADER.size + 4 * n)
        starts = np.cumsum(self.sizes, dtype=np.int64) - self.sizes
        wrong = (self.sizes < 0) | (self.pointers != starts * dtype.itemsize)
        if wrong.any():
            i = wrong.argmax()
            raise ValueError(
                f"{path}: document {i} cannot have size {self.sizes[i]} and pointer "
                f"{self.pointers[i]}; convert it again"
            )
        if not self.sizes.any():
            raise ValueError(f"{path}: holds no tokens; convert a .jsonl that has some")
        return dtype

    def _map_tokens(self, path: str, dtype: np.dtype) -> None:
        size = os.path.getsize(path)
        need = int(self.sizes.sum(dtype=np.int64)) * dtype.itemsize
        if size != need:
            raise ValueError(
                f"{path}: {size} bytes, but the index needs {need}; copy or convert both again"
            )
        self.tokens = np.frombuffer(np.memmap(path, mode="r"), dtype)


def without_ending(path: StrPath) -> str:
    """Strip .bin or .idx from a path, to get the prefix of a pair of binidx files."""
    return re.sub(r"\.(bin|idx)$", "", os.fspath(path))


# ---- writing binidx --------------------------------------------------------------------------


def write_binidx(
    prefix: StrPath, documents: Iterable[Sequence[int]], dtype: DTypeLike = np.uint16
) -> tuple[int, int]:
    """Write documents of token ids, one at a time, to prefix.bin and prefix.idx.

    Both are written whole or not at all. Returns the numbers of documents and of tokens. Raises
    ValueError for a token that dtype cannot hold.
    """
    prefix = without_ending(prefix)
    sizes = array("i")
    pointers = array("q")
    # The block's end renames .bin to its place first, then .idx.
    with (
        atomic_path(prefix + ".idx") as idx_path,
        atomic_path(prefix + ".bin") as bin_path,
        open(bin_path, "wb") as f,
    ):
        for document in documents:
            stored = np.asarray(document, np.int64).astype(dtype)
            if not np.array_equal(stored, document):
                raise ValueError(
                    f"{prefix}.bin: document {len(sizes)} holds a token that {stored.dtype} "
                    "cannot hold; write int32"
                )
            sizes.append(len(stored))
            pointers.append(f.tell())
            f.write(stored.data)
        n = len(sizes)
        codes = {np.dtype(known): code for code, known in DTYPES.items()}
        with open(idx_path, "wb") as idx:
            idx.write(HEADER.pack(MAGIC, 1, codes[np.dtype(dtype)], n, n + 1))
            for column in (sizes, pointers, array("q", range(n + 1))):
                idx.write(column)
        # Remove the .idx of an earlier conversion: it must not stand beside the new .bin, with
        # which it might pass for a pair.
        with contextlib.suppress(FileNotFoundError):
            os.unlink(prefix + ".idx")
    return n, sum(sizes)


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

    binidx, jsonl      a prefix of binidx files; or a .jsonl, which is converted beside itself, to
                       x.jsonl.bin and x.jsonl.idx, when it is new or changed
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
    jsonl = prefix
    if not prefix.endswith(".jsonl"):
        jsonl = prefix + ".jsonl"
    if os.path.exists(jsonl) and (prefix == jsonl or _missing_files(prefix)):
        prefix = jsonl
        _convert_beside_itself(jsonl)
    missing = _missing_files(prefix)
    if missing:
        raise FileNotFoundError(
            f"{path}: no {' and '.join(missing)}, and no {jsonl}; "
            "give a .jsonl, or the prefix of a .bin and .idx "
            "(a text: --data_type utf-8; bare tokens: uint16)"
        )
    return Binidx(prefix)


def _missing_files(prefix: str) -> list[str]:
    """List those of prefix.bin and prefix.idx that do not exist."""
    return [path for path in (prefix + ".bin", prefix + ".idx") if not os.path.exists(path)]


def _convert_beside_itself(jsonl: str) -> None:
    """Convert x.jsonl to x.jsonl.bin and x.jsonl.idx, unless they exist and are newer."""
    if not _missing_files(jsonl):
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
