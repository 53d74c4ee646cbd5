"""Documents as token ids: binidx, jsonl, text and numpy files.

One need not read this to understand Bone.

A data set is a pair of binidx files (from Megatron-LM), mapped and never read whole: it may be larger than memory. x.bin
holds the tokens of all documents, each ended by token 0, and nothing else; x.idx (little-endian) says where each one lies:

    offset      type             what
    0           9 bytes          magic, MMIDIDX\\0\\0
    9           uint64           version, 1
    17          uint8            type of a token: 1 u8, 2 i8, 3 i16, 4 i32, 5 i64, 8 u16 (6 and 7, floats, are refused)
    18          uint64           n, number of documents
    26          uint64           length of the doc index, n + 1
    34          n * int32        sizes: tokens in each document
    34 +  4n    n * int64        pointers: byte offset of each document in x.bin
    34 + 12n    (n + 1) * int64  doc index: 0, 1, ..., n (Megatron's grouping of sentences, of no use here)
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

import numpy as np
from tqdm import tqdm

from archive import atomic_path
from tokenizer import CHARACTERS, Vocabulary, encode

MAGIC, HEADER = b"MMIDIDX\0\0", struct.Struct("<9sQBQQ")
DTYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
LIKE = 'each line must look like {"text": "..."}'


def jsonl_to_binidx(jsonl, prefix, ctx_len=None, dtype=np.uint16):
    """Tokenize a .jsonl, line by line, into prefix.bin and prefix.idx. ValueError names the line that is wrong.
    Returns a dict: documents, tokens, longest (tokens of the longest document), skipped (blank lines and empty texts),
    too_long (documents of more than ctx_len + 1 tokens, which training cuts; None without ctx_len)."""
    sizes = array("i")  # of every line, with token 0

    def documents(lines):
        for number, line in enumerate(lines, 1):
            size = len(line)
            try:
                line = line.decode("utf-8-sig").strip()  # -sig: without a byte order mark
                tokens = encode(json.loads(line)["text"]) if line else []
            except (KeyError, TypeError) as error:
                raise ValueError(
                    f'{jsonl}, line {number}: has no "text" that is a string; {LIKE}'
                ) from error
            except (ValueError, RecursionError) as error:
                raise ValueError(
                    f"{jsonl}, line {number}: not JSON in UTF-8 ({str(error).replace('line 1 ', '')}); {LIKE}"
                ) from error
            sizes.append(len(tokens) + 1)
            bar.update(size)
            if tokens:
                yield tokens + [0]
        if max(sizes, default=1) == 1:
            raise ValueError(f"{jsonl}: holds no document; {LIKE}")

    bar = tqdm(
        total=os.path.getsize(jsonl),
        desc=str(jsonl),
        unit="B",
        unit_scale=True,
        disable=None,
        leave=False,
    )  # on a terminal only
    with open(jsonl, "rb") as lines, bar:
        n, tokens = write_binidx(prefix, documents(lines), dtype)
    too_long = ctx_len and sum(size > ctx_len + 1 for size in sizes)
    return dict(
        documents=n, tokens=tokens, longest=max(sizes), skipped=len(sizes) - n, too_long=too_long
    )


def _prefix(path):
    return re.sub(r"\.(bin|idx)$", "", os.fspath(path))


class Documents:
    """len(data): documents; data[i]: (size of document i) int64, a copy; data.sizes: (documents) ints; data.tokens: all tokens.
    What this class makes of one long text is pieces of ctx_len + 1 tokens, each beginning with the last one of the piece before."""

    vocabulary = None  # a Vocabulary, where tokens are characters

    def __init__(self, name, tokens, ctx_len):
        if len(tokens) < 2:
            raise ValueError(f"{name}: holds {len(tokens)} tokens; at least 2 are needed")
        starts = np.arange(0, len(tokens) - 1, ctx_len)
        self.prefix, self.tokens = name, tokens
        self.pointers, self.sizes = (
            starts * tokens.itemsize,
            np.minimum(ctx_len + 1, len(tokens) - starts),
        )

    def __len__(self):
        return len(self.sizes)

    def __getitem__(self, i):
        start = self.pointers[i] // self.tokens.itemsize
        return self.tokens[start : start + self.sizes[i]].astype(np.int64)

    def fingerprint(self):
        """A number that other documents hardly share: of all their sizes, and of a million tokens from everywhere among them."""
        checksum = zlib.crc32(np.ascontiguousarray(self.sizes))
        for start in np.linspace(0, max(0, len(self.tokens) - (1 << 14)), 64).astype(np.int64):
            checksum = zlib.crc32(
                np.ascontiguousarray(self.tokens[start : start + (1 << 14)]), checksum
            )
        return checksum

    def vocab_size(self):
        """The smallest vocabulary with which a model can read this."""
        return len(self.vocabulary) if self.vocabulary else int(self.tokens.max()) + 1


class Binidx(Documents):
    """The documents of prefix.bin and prefix.idx, mapped. A damaged pair is a ValueError in one line, before memory is taken."""

    def __init__(self, prefix):
        self.prefix = _prefix(prefix)
        bin_path, idx_path = self.prefix + ".bin", self.prefix + ".idx"
        header = np.fromfile(idx_path, np.uint8, HEADER.size).tobytes()
        magic, version, code, n, doc_count = HEADER.unpack(header.ljust(HEADER.size, b"\0"))
        size, need = os.path.getsize(idx_path), HEADER.size + 12 * n + 8 * doc_count
        if (magic, version, size) != (MAGIC, 1, need) or code not in DTYPES:
            found = f"version {version}, type {code}, {size} of {need} bytes"
            raise ValueError(
                f"{idx_path}: not a whole binidx index of version 1 with integers ({found}); copy or convert it again"
            )
        index, dtype = np.memmap(idx_path, mode="r"), np.dtype(DTYPES[code])
        self.sizes = np.frombuffer(index, np.int32, n, HEADER.size)
        self.pointers = np.frombuffer(index, np.int64, n, HEADER.size + 4 * n)
        wrong = (self.sizes < 0) | (
            self.pointers != (np.cumsum(self.sizes, dtype=np.int64) - self.sizes) * dtype.itemsize
        )
        if wrong.any():
            i = wrong.argmax()
            raise ValueError(
                f"{idx_path}: document {i} cannot have size {self.sizes[i]} and pointer {self.pointers[i]}; convert it again"
            )
        size, need = os.path.getsize(bin_path), int(self.sizes.sum(dtype=np.int64)) * dtype.itemsize
        if need == 0:
            raise ValueError(f"{idx_path}: holds no tokens; convert a .jsonl that has some")
        if size != need:
            raise ValueError(
                f"{bin_path}: {size} bytes, but the index needs {need}; copy or convert both again"
            )
        self.tokens = np.frombuffer(np.memmap(bin_path, mode="r"), dtype)


def write_binidx(prefix, documents, dtype=np.uint16):
    """Write an iterable of documents (sequences of token ids), one at a time, to prefix.bin and prefix.idx, whole or not at all.
    Returns (number of documents, number of tokens). ValueError for a token that dtype cannot hold."""
    prefix, sizes, pointers = _prefix(prefix), array("i"), array("q")
    with (
        atomic_path(prefix + ".idx") as idx_path,
        atomic_path(prefix + ".bin") as bin_path,
        open(bin_path, "wb") as f,
    ):
        for document in documents:
            stored = np.asarray(document, np.int64).astype(dtype)
            if not np.array_equal(stored, document):
                raise ValueError(
                    f"{prefix}.bin: document {len(sizes)} holds a token that {stored.dtype} cannot hold; write int32"
                )
            sizes.append(len(stored))
            pointers.append(f.tell())
            f.write(stored)
        n, code = len(sizes), next(code for code in DTYPES if DTYPES[code] == dtype)
        pathlib.Path(idx_path).write_bytes(
            HEADER.pack(MAGIC, 1, code, n, n + 1)
            + b"".join((sizes, pointers, array("q", range(n + 1))))
        )
        with contextlib.suppress(FileNotFoundError):
            os.unlink(
                prefix + ".idx"
            )  # of an earlier conversion: from here on, until the new one is there, nothing is a pair
    return n, sum(sizes)


def _open_binidx(path):
    def missing():
        return [prefix + end for end in (".bin", ".idx") if not os.path.exists(prefix + end)]

    prefix = _prefix(path)
    jsonl = prefix.removesuffix(".jsonl") + ".jsonl"
    if os.path.exists(jsonl) and (prefix == jsonl or missing()):
        prefix = jsonl
        if missing() or os.stat(jsonl).st_mtime_ns >= os.stat(prefix + ".idx").st_mtime_ns:
            if not os.access(folder := os.path.dirname(jsonl) or ".", os.W_OK):
                raise ValueError(
                    f"{jsonl}: its tokens are kept beside it, but {folder} is read-only; write them elsewhere, by "
                    f"python data.py {jsonl} PREFIX, and use --data_file PREFIX"
                )
            jsonl_to_binidx(jsonl, prefix)
    if missing():
        raise FileNotFoundError(
            f"{path}: no {' and '.join(missing())}, and no {jsonl}; give a .jsonl, or the prefix of a .bin and .idx "
            "(a text: --data_type utf-8; bare tokens: uint16)"
        )
    return Binidx(prefix)


def _open_text(path, kind, ctx_len, vocabulary):
    """The characters of a text as Documents, in the vocabulary given, or in one of those that occur, sorted."""
    try:
        if kind == "dummy":  # 100,000 sums, as in RWKV-LM
            text = "".join(
                f".{a}+{b}={a + b}."
                for a, b in ((i % 10000, i * i % 10000) for i in range(100_000))
            )
        else:
            text = pathlib.Path(path).read_text(encoding=kind).removeprefix("\ufeff")
        vocabulary = vocabulary or Vocabulary("".join(sorted({*text})))
        data = Documents(path or kind, vocabulary.encode(text, path), ctx_len)
    except UnicodeError as error:
        raise ValueError(
            f"{path}: not {kind} ({error}); save it as UTF-8, and use --data_type utf-8"
        ) from error
    data.vocabulary = vocabulary
    return data


def _open_tokens(path, kind, ctx_len):
    """One long row of tokens: a .npy file, or bare uint16 numbers; mapped."""
    try:
        tokens = (
            np.load(path, mmap_mode="r", allow_pickle=False)
            if kind == "numpy"
            else np.memmap(path, "<u2", "r")
        )
        if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
            raise ValueError(f"{tokens.dtype}, {tokens.ndim} dimensions")
    except OSError:
        raise
    except Exception as error:  # a damaged header can fail anywhere in NumPy
        raise ValueError(
            f"{path}: not {kind}, a row of integers ({error}); another --data_type may fit"
        ) from error
    return Documents(path, tokens, ctx_len)


def kind_of(path):
    """The --data_type of a file: numpy for .npy, utf-8 for .txt (utf-16le, where its first bytes say so), and else binidx, as for .jsonl."""
    kind = {".npy": "numpy", ".txt": "utf-8"}.get(os.path.splitext(path)[1].lower(), "binidx")
    if kind == "utf-8" and os.path.exists(path):
        with open(path, "rb") as f:
            kind = "utf-16le" if f.read(2) == codecs.BOM_UTF16_LE else kind
    return kind


def open_data(path, vocab_size=None, kind=None, ctx_len=512, vocabulary=None):
    """The Documents of a file. kind, a --data_type; None: by the name.
    binidx, jsonl        a prefix, or a .jsonl, which is converted beside itself (x.jsonl.bin, x.jsonl.idx) when new or changed
    utf-8, utf-16le      a text, whose tokens are its characters, in pieces of ctx_len + 1; dummy: a text of sums, without a file
    numpy, uint16        the tokens of a .npy file, or of bare little-endian numbers, in such pieces
    With vocab_size, a token outside 0 ... vocab_size - 1 is a ValueError that names its document, counted from 0 as in data[i]."""
    kind = kind or kind_of(path)
    if kind in CHARACTERS:
        data = _open_text(path, kind, ctx_len, vocabulary)
    else:
        data = (
            _open_tokens(path, kind, ctx_len) if kind in ("numpy", "uint16") else _open_binidx(path)
        )
    tokens, limits = data.tokens, np.iinfo(data.tokens.dtype)
    if vocab_size is not None and (
        limits.min < 0 or limits.max >= vocab_size
    ):  # uint16 always fits in 65536
        for at in (
            tokens.argmin(),
            tokens.argmax(),
        ):  # these read the mapped file through, and take no memory
            if not 0 <= tokens[at] < vocab_size:
                i = np.searchsorted(data.pointers, at * tokens.itemsize, side="right") - 1
                raise ValueError(
                    f"{data.prefix}: document {i} holds token {tokens[at]}, but the model's vocabulary is {vocab_size}"
                )
    return data
