"""From text to batches: jsonl -> tokens -> binidx files -> (idx, targets, mask); or characters, or tokens, of one long text.

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

import ast
import codecs
import contextlib
import functools
import json
import math
import os
import pathlib
import re
import struct
import zlib
from array import array

import numpy as np
import torch
from pyrwkv_tokenizer import RWKVTokenizer
from tqdm import tqdm

from files import Parser, atomic_path, run_cli

MAGIC, HEADER = b"MMIDIDX\0\0", struct.Struct("<9sQBQQ")
DTYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
LIKE = 'each line must look like {"text": "..."}'
END = 0  # the token that ends a document
CHARACTERS = ("utf-8", "utf-16le", "dummy")  # kinds of data whose tokens are characters
MARKERS = {
    "qa": ("Assistant:", "User:")
}  # loss masks that count what follows the first text, up to the second
_tokenizer = functools.cache(RWKVTokenizer)


def encode(text):
    """The token ids of a text in the RWKV World vocabulary: list of int, without an end-of-document token."""
    return _tokenizer().encode(text)


@functools.cache
def token_bytes():
    """The bytes of each token id from 1 on, {id: bytes}; those from 65530 on have none."""
    vocabulary = pathlib.Path(_tokenizer().vocab_filepath).read_text(encoding="utf-8")
    lines = re.findall(
        r"^(\d+) (.+) \d+$", vocabulary, re.MULTILINE
    )  # 261 '\n\n' 2, or b'\xff' where it is not UTF-8
    return {
        int(i): ast.literal_eval(literal)
        if literal[0] == "b"
        else ast.literal_eval(literal).encode()
        for i, literal in lines
    }


def decode_bytes(ids):
    """The bytes of token ids; a character may be cut at either end. An id without an entry, as 0, gives none."""
    return b"".join(token_bytes().get(i, b"") for i in ids)


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


class Vocabulary(str):
    """Characters as tokens, in the place of RWKV World's: an id is a place in this string, which has each character once."""

    END = None

    def encode(self, text, where="the text"):
        ids = np.full(0x110000, -1, np.int32)
        ids[list(map(ord, self))] = range(len(self))
        tokens = ids[np.frombuffer(text.encode("utf-32-le"), np.uint32)]
        if (tokens < 0).any():
            raise ValueError(
                f"{where} has the character {text[(tokens < 0).argmax()]!r}, which is not in vocab.json; leave it out, or train a new "
                "model on this text in another folder"
            )
        return tokens

    def decode_bytes(self, ids):
        return "".join(self[i] for i in ids).encode()


def read_vocabulary(path, size=None):
    """The Vocabulary of a vocab.json, {"0": "a", "1": "b", ...}. ValueError for anything else, or where it has not `size` characters."""
    try:
        vocabulary = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
        characters = [vocabulary[str(i)] for i in range(size or len(vocabulary))]
        if {*map(len, characters)} != {1} or len({*characters}) < len(vocabulary):
            raise ValueError("each id has one character, and each character one id")
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        need = f"of {size} characters" if size else "of characters"
        raise ValueError(
            f'{path}: not a vocabulary {need}, {{"0": "a", "1": "b", ...}} ({error}); copy it from where the model was trained'
        ) from error
    return Vocabulary("".join(characters))


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
    if (
        dataload not in ("pad", "only", "get")
        or (isinstance(loss_mask, str)
        and loss_mask not in ("pad", "none", *MARKERS))
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
