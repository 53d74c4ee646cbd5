"""Documents as token ids, and the binidx files that hold them.

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

import contextlib
import copy
import os
import re
import struct
import zlib
from array import array
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import DTypeLike

from atomic import atomic_path
from tokenizer import Vocabulary

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


# ---- documents -------------------------------------------------------------------------------


class Documents:
    """A data set in memory or mapped: a row of tokens, and where each document lies in it.

    len(data)     the number of documents
    data[i]       the tokens of document i, (its size) int64, a copy
    data.sizes    the size of each document, (documents) ints
    data.tokens   the tokens of all documents, (tokens) of any integer type
    data.prefix   the name for messages
    data.notes    lines to be said of it when a run begins
    data.numbers  of a part of a data set: the number of each document in the whole; else None

    This class itself makes documents of one long text: pieces of ctx_len + 1 tokens, each of which
    begins with the last token of the piece before. So every token but the first is a target once.
    """

    # The Vocabulary, where tokens are characters.
    vocabulary: Vocabulary | None = None
    notes: Sequence[str] = ()
    numbers: np.ndarray | None = None

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

    def part(self, numbers: np.ndarray) -> "Documents":
        """Return the documents of these numbers as a data set. No token is copied."""
        part = copy.copy(self)
        part.numbers = numbers
        part.sizes = self.sizes[numbers]
        part.pointers = self.pointers[numbers]
        return part

    def token_count(self) -> int:
        """Return how many tokens the documents have; those of a part are fewer than data.tokens."""
        if self.numbers is None:
            return len(self.tokens)
        return int(self.sizes.sum(dtype=np.int64))

    def fingerprint(self) -> int:
        """Compute a number that tells apart different data.

        It is a checksum of all sizes, and of a million tokens from 64 places, so it is quick.
        """
        length = 1 << 14
        checksum = zlib.crc32(np.ascontiguousarray(self.sizes).data)
        if self.numbers is not None:
            checksum = zlib.crc32(self.numbers.data, checksum)
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
