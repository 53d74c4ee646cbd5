"""Convert a .jsonl or .json to binidx files: for train.py beside itself, by data.py anywhere.

One need not read this to understand Bone. conversations.py says which records are understood.

The tokens of x.jsonl are kept in x.jsonl.bin and x.jsonl.idx. x.jsonl.source.json says of which
content they were made. So a file is converted again when its content is another one, and not when
only its time is, or when it was moved with all that stands beside it.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO

import filelock
import numpy as np
from numpy.typing import DTypeLike
from tqdm import tqdm

from atomic import atomic_path
from binidx import Binidx, StrPath, without_ending, write_binidx
from cli import Parser
from conversations import TEXT, Texts, name_of
from tokenizer import encode

# The way in which files are read. With another number here, all are converted again.
READING = 1
RECORD = ".source.json"
ENDINGS = (".jsonl", ".json", ".ndjson")  # of files of records
LINE_OF_A_JSONL = 'each line must look like {"text": "..."}'


# ---- from records to tokens ------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Conversion:
    """What was made of a file."""

    documents: int
    tokens: int
    skipped: int  # blank lines, empty texts, conversations without an answer
    digest: str  # of the content of the file
    texts: Texts

    def notes(self) -> list[str]:
        """Say what people should know of it: what it is, and what of it is not in the tokens."""
        noun = "document" if self.texts.form == TEXT else "conversation"
        if self.documents != 1:
            noun += "s"
        first = f"{self.documents:,} {noun} ({name_of(self.texts.form)})"
        if self.texts.unused:
            first += f"; not used: {', '.join(sorted(self.texts.unused))}"
        if self.skipped:
            why = "blank or empty"
            if self.texts.form != TEXT:
                why = "blank, empty or without an answer"
            first += f"; {self.skipped:,} skipped, {why}"
        notes = [first]
        if self.texts.line_ends:
            notes.append(f"\\r\\n became \\n in {self.texts.line_ends:,} of them")
        if self.texts.blank_lines:
            notes.append(
                f"blank lines within a turn are left out, in {self.texts.blank_lines:,} of them: "
                "one would end the turn, as RWKV World models know it"
            )
        if self.texts.like_turns:
            notes.append(
                f"in {self.texts.like_turns:,} of them a line within a turn begins with User: or "
                "Assistant:, which --loss_mask qa takes for another turn"
            )
        return notes


def jsonl_to_binidx(path: StrPath, prefix: StrPath, *, dtype: DTypeLike = np.uint16) -> Conversion:
    """Tokenize a .jsonl, line by line, or a .json into prefix.bin and prefix.idx.

    Raises ValueError that names the line, if one is wrong.
    """
    reader = _Reader(path)
    documents, tokens = write_binidx(prefix, reader, dtype)
    skipped = reader.blank + reader.texts.empty
    return Conversion(documents, tokens, skipped, reader.hash.hexdigest(), reader.texts)


class _Reader:
    """The documents of a .jsonl or .json as token ids, each ended by token 0."""

    def __init__(self, path: StrPath) -> None:
        self.path = path
        self.texts = Texts()
        self.blank = 0  # lines
        self.hash = new_hash()

    def __iter__(self) -> Iterator[list[int]]:
        found = False
        with open(self.path, "rb") as f, self._progress_bar() as bar:
            pieces = self._array(f) if first_byte(f) == b"[" else self._lines(f)
            for place, piece, size in pieces:
                tokens = self._tokens_of(place, piece)
                bar.update(size)
                if tokens:
                    found = True
                    yield [*tokens, 0]
        if not found and self.texts.form not in ((), TEXT):
            raise ValueError(
                f"{self.path}: holds no conversation with an answer, but "
                f"{self.texts.empty} without; look at {name_of(self.texts.form)}"
            )
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

    def _lines(self, f: BinaryIO) -> Iterator[tuple[str, bytes, float]]:
        """Yield the place of each line, the line and its size in bytes."""
        for number, line in enumerate(f, 1):
            self.hash.update(line)
            yield f"line {number}", line, len(line)

    def _array(self, f: BinaryIO) -> Iterator[tuple[str, Any, float]]:
        """Yield the same of each record of a JSON array.

        The array is read whole, and takes several times the file's size of memory. Up to a few GB
        that is no burden; as lines, a file may have any size.
        """
        content = f.read()
        self.hash.update(content)
        size = len(content)
        try:
            records = json.loads(content.decode("utf-8-sig"))
        except (ValueError, RecursionError) as error:
            raise ValueError(
                f"{self.path}: begins with [, but is not one JSON array in UTF-8 ({error}); write "
                "one record per line, without brackets and commas around them, or one whole array"
            ) from error
        del content
        for number, record in enumerate(records, 1):
            yield f"record {number}", record, size / len(records)

    def _tokens_of(self, place: str, piece: Any) -> list[int]:
        """Tokenize the text of a line, or of a record; [] where there is none."""
        try:
            if isinstance(piece, bytes):
                # -sig: a byte order mark is left out.
                line = piece.decode("utf-8-sig").strip()
                if not line:
                    self.blank += 1
                    return []
                piece = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise self._not_json(place, piece, error) from error
        try:
            return encode(self.texts.text_of(piece))
        except UnicodeError as error:
            raise self._not_json(place, piece, error) from error
        except ValueError as error:
            raise ValueError(f"{self.path}, {place}: {error}") from error

    def _not_json(self, place: str, piece: Any, error: Exception) -> ValueError:
        # JSON counts lines in what it is given: always 1.
        why = str(error).replace("line 1 ", "")
        advice = LINE_OF_A_JSONL
        if isinstance(error, UnicodeDecodeError):
            advice = "save it as UTF-8 (of GBK: iconv -f GBK -t UTF-8 old.jsonl > new.jsonl)"
        elif "Extra data" in why:
            advice = "one record per line, with nothing after it, not even a comma"
        elif isinstance(piece, bytes) and not piece.endswith(b"\n"):
            advice += "; the file ends here, and may be cut off"
        return ValueError(f"{self.path}, {place}: not JSON in UTF-8 ({why}); {advice}")


def first_byte(f: BinaryIO) -> bytes:
    """Return a file's first byte after white space and a byte order mark; b"" where it has none."""
    beginning = f.read(1 << 12)
    f.seek(0)
    return beginning.removeprefix(b"\xef\xbb\xbf").lstrip()[:1]


# ---- beside itself ---------------------------------------------------------------------------


def open_converted(path: str) -> Binidx:
    """Open the tokens of a .jsonl or .json, beside it. Make them where they are not of its content.

    The record is removed before the tokens are touched, and written after them. So a conversion
    that was killed passes for none. Of several processes, on one machine or on several that share
    the folder, one converts and the others wait.
    """
    # x.bin and x.idx beside a file x are somebody's own. Its tokens are in x.tokens.bin and .idx.
    prefix = path if has_ending(path) else path + ".tokens"
    documents = _open_tokens_of(path, prefix)
    if documents is not None:
        return documents
    _check_folder(path)
    with _lock(prefix + ".lock"):
        documents = _open_tokens_of(path, prefix)  # another process may have made them
        if documents is None:
            _convert_beside_itself(path, prefix)
            documents = _open_tokens_of(path, prefix)
    if documents is None:
        raise ValueError(f"{path}: changes while it is read; wait until it is complete")
    return documents


def _open_tokens_of(path: str, prefix: str) -> Binidx | None:
    """Open the tokens beside a file; None where they are missing, damaged or of another content.

    The whole file is read for that, which takes a small part of the time of tokenizing it. No time
    of a file can tell: mv, cp -p, rsync -a, unzip and links bring old ones.
    """
    try:
        record = json.loads(pathlib.Path(prefix + RECORD).read_text(encoding="utf-8"))
        documents = Binidx(prefix)
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or not isinstance(record.get("notes"), list):
        return None
    made_of = (record.get("reading"), record.get("tokens"))
    if made_of != (READING, documents.fingerprint()) or record.get("source") != digest_of(path):
        return None
    documents.notes = [f"{path}: {note}" for note in record["notes"]]
    return documents


@contextlib.contextmanager
def _lock(path: str) -> Iterator[None]:
    """Hold a lock, whose file is removed at the end."""
    with filelock.FileLock(path):
        try:
            yield
        finally:
            # Whoever waits for it sees that the file has no name any more, and makes another.
            with contextlib.suppress(OSError):
                os.unlink(path)


def _check_folder(path: str) -> None:
    folder = os.path.dirname(path) or "."
    if not os.access(folder, os.W_OK):
        raise ValueError(
            f"{path}: its tokens are kept beside it, but {folder} is read-only; write them "
            f"elsewhere, by python data.py {path} PREFIX, and use --data_file PREFIX"
        )


def _convert_beside_itself(path: str, prefix: str) -> None:
    if not missing_files(prefix):
        print(f"{path}: tokenizing it again, as the tokens beside it may be of another content")
    with contextlib.suppress(FileNotFoundError):
        os.unlink(prefix + RECORD)
    conversion = jsonl_to_binidx(path, prefix)
    record = {
        "reading": READING,
        "tokens": Binidx(prefix).fingerprint(),
        "source": conversion.digest,
        "notes": conversion.notes(),
    }
    with atomic_path(prefix + RECORD) as temporary:
        pathlib.Path(temporary).write_text(json.dumps(record, indent=1), encoding="utf-8")


def new_hash() -> Any:
    """Return the hash by which contents are compared."""
    return hashlib.blake2b(digest_size=16)


def digest_of(path: StrPath) -> str:
    """Return the hash of a file's content, in hexadecimal digits."""
    found = os.stat(path)
    # A start asks several times. No program can set back ctime, the time of the last change.
    unchanged = (found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)
    return _digest(os.fspath(path), unchanged)


@functools.lru_cache
def _digest(path: str, unchanged: tuple[int, ...]) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, new_hash).hexdigest()


def missing_files(prefix: str) -> list[str]:
    """List those of prefix.bin and prefix.idx that do not exist."""
    return [path for path in (prefix + ".bin", prefix + ".idx") if not os.path.exists(path)]


# ---- which file? -----------------------------------------------------------------------------


def has_ending(path: str) -> bool:
    """Return whether a file's name says that it holds JSON records."""
    return path.lower().endswith(ENDINGS)


def find_source(prefix: str) -> str:
    """Return the .jsonl or .json that a --data_file means; "" where it means binidx files."""
    if has_ending(prefix) and os.path.lexists(prefix):
        return prefix
    if not missing_files(prefix):
        return ""
    if os.path.isfile(prefix):
        check_holds_records(prefix)
        return prefix
    if not has_ending(prefix):
        for ending in ENDINGS:
            if os.path.lexists(prefix + ending):
                return prefix + ending
    return ""


def check_holds_records(path: str) -> None:
    """Raise ValueError, which says what a file seems to be, unless it may hold JSON records."""
    with open(path, "rb") as f:
        if first_byte(f) in (b"{", b"["):
            return
        beginning = f.read(1 << 12)
    seems, advice = what_it_seems(path, beginning)
    raise ValueError(f"{path}: is there, but seems to be {seems}; {advice}")


def what_it_seems(path: str, beginning: bytes) -> tuple[str, str]:
    """Say what a file seems to be, and what to do with it."""
    ending = os.path.splitext(path)[1].lower()
    tables = {
        ".csv": "csv",
        ".tsv": "csv",
        ".xls": "excel",
        ".xlsx": "excel",
        ".parquet": "parquet",
    }
    if beginning.startswith(b"PAR1"):
        ending = ".parquet"
    if ending in tables:
        program = (
            f"import pandas; pandas.read_{tables[ending]}({path!r}).to_json('data.jsonl', "
            "orient='records', lines=True, force_ascii=False)"
        )
        return "a table", f'make a .jsonl of it: pip install pandas; python -c "{program}"'
    if ending in (".pth", ".pt", ".st", ".safetensors"):
        return "a model", "give texts or conversations here, and the model as --load_model"
    if beginning.startswith((b"PK\3\4", b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")):
        return "compressed", "unpack it, and give the file that is in it"
    if beginning.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "text in UTF-16", "save it as UTF-8"
    if b"\0" in beginning:
        return "no text", "a row of tokens needs --data_type uint16"
    return (
        "plain text",
        'write it as a .jsonl, {"text": "..."} on each line; or --data_type utf-8, for a model '
        "of characters",
    )


# ---- command line ----------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(
        prog="data.py", description="Tokenize a .jsonl or .json: RWKV World, binidx of uint16."
    )
    help_of_file = 'texts or conversations, UTF-8, such as {"text": "..."} on each line'
    parser.add_argument("jsonl", help=f"{help_of_file}; train.py takes it, too")
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
    if not has_ending(args.jsonl):
        check_holds_records(args.jsonl)
    conversion = jsonl_to_binidx(args.jsonl, prefix)
    sizes = Binidx(prefix).sizes
    summary = {
        "documents": conversion.documents,
        "tokens": conversion.tokens,
        "longest": int(sizes.max()),
        "skipped": conversion.skipped,
    }
    if args.ctx_len is not None:
        cut = int((sizes > args.ctx_len + 1).sum())
        summary[f"too long, cut at --ctx_len {args.ctx_len}"] = cut
    for path in paths:
        summary[f"bytes in {path}"] = os.path.getsize(path)
    for note in conversion.notes():
        print(f"{args.jsonl}: {note}")
    for name, count in summary.items():
        print(f"{count:>15,}  {name}")
