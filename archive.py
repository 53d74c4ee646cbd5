"""Read .pth files without executing anything in them, and write them tensor by tensor.

One need not read this to understand Bone.
"""

import contextlib
import ctypes
import json
import mmap
import os
import pickletools
import re
import struct
import sys
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import BinaryIO

import torch
from torch import Tensor

import foreign
from atomic import atomic_path
from cli import utf8_name

StrPath = str | os.PathLike[str]

# A .pth with a tensor of this name is the state of a training run (run_state.py). Its bytes are
# JSON: everything of the state that is not a tensor.
ABOUT = "about"

# The names, "module name", that the pickle of a dict of tensors refers to.
NAMES_IN_A_CHECKPOINT = (
    r"collections OrderedDict|torch Tensor|torch(\.storage)? \w+Storage"
    r"|torch\.nn\.parameter Parameter|torch\._tensor _rebuild_from_type_v2"
    r"|torch\._utils _rebuild_(tensor_v2|parameter)"
)

# What a further record of an archive may have, in bytes.
MAX_RECORD_SIZE = 65536


# ---- reading ---------------------------------------------------------------------------------


class Damaged(ValueError):
    """Says in a few words what is wrong with the content of a .pth file."""


class MoreThanTensors(ValueError):
    """Says what a .pth file holds that is not part of a dict of tensors."""


class OtherPickle(ValueError):
    """Says in which form that is not read here the content of a .pth file was pickled."""


def read_tensors(path: StrPath, verify: bool = True) -> dict[str, Tensor]:
    """Map the dict {name: tensor} of a .pth file into memory, without executing any of the file.

    The mapping is private: writing to a tensor does not change the file. verify: verify all
    checksums. Raises ValueError or OSError, in one line, for a file that is anything else.
    """
    with _open_archive(path) as archive:
        record_sizes = _check_archive(archive, path, verify=verify)
        # Warnings are about the pickle protocol. What matters is whether the file loads.
        with warnings.catch_warnings(action="ignore"), utf8_name(path) as name:
            loaded = torch.load(name, map_location="cpu", weights_only=True, mmap=True)
    _check_is_dict_of_tensors(loaded, path)
    # detach() leaves attributes behind. In a hostile file they could stand in for methods.
    tensors = {name: torch.Tensor.detach(tensor) for name, tensor in loaded.items()}
    _check_storages(tensors, record_sizes, path)
    for name, tensor in tensors.items():
        _check_lies_in_its_storage(name, tensor, path)
        # A note for drop_mapped_pages.
        tensor.is_mapped = tensor.is_contiguous()  # type: ignore[attr-defined]
    _check_total_size(tensors, os.path.getsize(path), path)
    return tensors


def read_checkpoint(path: StrPath, verify: bool = True) -> dict[str, Tensor]:
    """Read a base model or a Bone checkpoint, as `read_tensors` does: floating tensors alone.

    Their names are those of RWKV and Bone, see `foreign.plain_names`.
    """
    checkpoint = foreign.plain_names(read_tensors(path, verify), path)
    if ABOUT in checkpoint:
        raise ValueError(
            f"{path}: the state of a training, for --resume; "
            "a model or a checkpoint (rwkv-N.pth) is needed"
        )
    for name, tensor in checkpoint.items():
        if tensor.dtype not in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
            raise ValueError(
                f"{path}: {name} is {tensor.dtype}; "
                "not a model checkpoint, which holds floating numbers"
            )
    return checkpoint


def read_record(path: StrPath, name: str) -> bytes | None:
    """Return what a .pth file holds beside its tensors under a name, verified; None: nothing."""
    with _open_archive(path) as archive:
        found = [r for r in archive.infolist() if r.filename.partition("/")[2] == name]
        if not found:
            return None
        [record, *others] = found
        if others or record.compress_type != zipfile.ZIP_STORED:
            raise Damaged(f"it holds {name} twice, or compressed")
        if record.file_size > MAX_RECORD_SIZE:
            raise Damaged(f"its {name} has {record.file_size:,} bytes")
        return archive.read(record)


def fingerprint(path: StrPath) -> int:
    """Compute a number that tells apart .pth files of different content; 0 for the path "".

    It is made of the checksums in the archive's directory, so the tensors are not read. A file that
    torch.save writes again has the same number, under whatever name; in another dtype it has not.
    """
    if not path:
        return 0
    with _open_archive(path) as archive:
        records = archive.infolist()
    checksums = [
        (record.filename.rpartition("/")[2], record.CRC)
        for record in records
        if "/data/" in record.filename
    ]
    return zlib.crc32(json.dumps(sorted(checksums)).encode())


def check_pickle(content: bytes) -> None:
    """Raise MoreThanTensors or Damaged, if a pickle holds anything but a dict of tensors.

    torch.load(weights_only=True) executes nothing either. But it accepts types that take any
    amount of memory, and tuples that contain one another, whose hash takes forever.
    """
    previous = ""
    # The numbers of what the pickle may use again: names and tensors, which have no parts.
    reusable = set()
    for opcode, argument, _ in pickletools.genops(content):
        if opcode.name == "PROTO" and argument not in (2, 3):
            raise OtherPickle(f"pickle protocol {argument}")
        if opcode.name == "GLOBAL" and not re.fullmatch(NAMES_IN_A_CHECKPOINT, str(argument)):
            raise MoreThanTensors(f"{str(argument).replace(' ', '.')} is not part of a tensor")
        if opcode.name in ("BINPUT", "LONG_BINPUT", "PUT"):
            if previous in ("GLOBAL", "BINUNICODE", "REDUCE"):
                reusable.add(argument)
        elif opcode.name in ("BINGET", "LONG_BINGET", "GET"):
            if argument not in reusable:
                raise Damaged("its parts contain one another")
        elif opcode.name in ("DUP", "MEMOIZE", "STACK_GLOBAL", "INST", "OBJ", "NEWOBJ"):
            raise Damaged("its parts contain one another")
        previous = opcode.name


@contextlib.contextmanager
def _open_archive(path: StrPath) -> Iterator[zipfile.ZipFile]:
    """Open the archive that a .pth is. Whatever fails in the block becomes a ValueError."""
    size = os.path.getsize(path)  # an OSError, if the file is missing
    if not os.path.isfile(path):
        raise ValueError(f"{path}: is not a file; a .pth is needed")
    foreign.check_is_zip(path)
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    except Exception as error:  # a damaged file can fail anywhere in the unpickler
        raise ValueError(f"{path}: {_why_unreadable(error, path, size)}") from error


def _check_archive(archive: zipfile.ZipFile, path: StrPath, *, verify: bool) -> list[int]:
    """Check sizes, the pickle and (verify) all checksums. Returns the sizes of the data records."""
    records = sorted(archive.infolist(), key=lambda record: record.header_offset)
    compressed = any(record.compress_type != zipfile.ZIP_STORED for record in records)
    claimed = sum(record.file_size for record in records)
    if compressed or claimed > os.path.getsize(path):
        raise Damaged("it claims to hold more than it does")
    pickles = [record for record in records if record.filename.endswith("data.pkl")]
    if len(pickles) != 1:
        raise Damaged(f"it holds {len(pickles)} files data.pkl instead of one")
    check_pickle(archive.read(pickles[0]))
    if verify:
        wrong = archive.testzip()
        if wrong is not None:
            raise Damaged(f"the checksum of {wrong} is wrong")
    return [record.file_size for record in records if "/data/" in record.filename]


def _why_unreadable(error: Exception, path: StrPath, size: int) -> str:
    """Say why a file of `size` bytes could not be loaded, and what to do."""
    if isinstance(error, OtherPickle):
        return f"saved with {error}; {foreign.save_again(path, executing=True)}"
    if isinstance(error, MoreThanTensors):
        advice = "nothing was executed, a .pth of tensors is needed"
        return f"holds more than tensors: {error}; {advice}"
    if "unable to mmap" in str(error):
        return (
            f"{size / 1e9:.1f} GB are more than the system will map into its memory, although "
            "they need not be there at once; on Linux, sysctl vm.overcommit_memory=1 allows it"
        )
    if isinstance(error, MemoryError):
        return "there is too little memory to read it"
    if isinstance(error, Damaged):
        return _damaged(str(error))
    # What a damaged file leads to can be anything, and a fault of this program, too.
    return _damaged(f"it cannot be read: {type(error).__name__}")


def _damaged(why: str) -> str:
    return f"a cut or damaged PyTorch checkpoint ({why}); copy or download it again"


def _check_is_dict_of_tensors(loaded: object, path: StrPath) -> None:
    if isinstance(loaded, dict) and loaded:
        names_are_texts = all(isinstance(name, str) for name in loaded)
        values_are_dense = all(
            isinstance(value, Tensor) and value.layout == torch.strided for value in loaded.values()
        )
        if names_are_texts and values_are_dense:
            return
    raise ValueError(f"{path}: not a model checkpoint; a dict of names and tensors is needed")


def _check_storages(tensors: dict[str, Tensor], record_sizes: list[int], path: StrPath) -> None:
    """Check that the tensors' storages are exactly the archive's data records, in their order.

    A few bytes can claim to be a tensor of any size, and a mapped tensor could reach into the next.
    """
    storages = [tensor.untyped_storage() for tensor in tensors.values()]
    # Tensors may share a storage. Each counts once.
    distinct = {(storage.data_ptr(), storage.nbytes()) for storage in storages}
    sizes = [nbytes for _, nbytes in sorted(distinct)]
    if sizes != record_sizes:
        raise ValueError(f"{path}: {_damaged('its tensors are not what it holds')}")


def _check_lies_in_its_storage(name: str, tensor: Tensor, path: StrPath) -> None:
    fits = 0 < tensor.nbytes <= tensor.untyped_storage().nbytes()
    # Views that change the sign when they are read are never what a file holds.
    if not fits or tensor.is_neg() or tensor.is_conj():
        raise ValueError(
            f"{path}: {name} claims to be {tuple(tensor.shape)}, which the file does not hold"
        )


def _check_total_size(tensors: dict[str, Tensor], size: int, path: StrPath) -> None:
    """Refuse tensors that share storages so that together they claim far more than the file has.

    A head that is the embedding is twice in a dict, and once in the file.
    """
    total = sum(tensor.nbytes for tensor in tensors.values())
    if total > 2 * size:
        raise ValueError(
            f"{path}: {len(tensors)} tensors that share their content claim {total:,} bytes, "
            f"of a file of {size:,}; save each with its own"
        )


def all_finite(tensor: Tensor) -> bool:
    """Return whether a tensor holds no NaN or infinity; takes no memory, as isfinite() would."""
    smallest, largest = tensor.aminmax()
    return bool(smallest.isfinite() and largest.isfinite())


def drop_mapped_pages(tensor: Tensor) -> None:
    """Give back the memory that reading a tensor of `read_tensors` took.

    If the tensor is read again, it is read from the file, so it must not have been written to. Any
    other tensor is left alone; so is every tensor where the system is not Linux.
    """
    if getattr(tensor, "is_mapped", False) and sys.platform == "linux":
        start = tensor.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
        end = tensor.data_ptr() + tensor.nbytes
        libc = ctypes.CDLL(None)
        libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), mmap.MADV_DONTNEED)


# ---- writing ---------------------------------------------------------------------------------


def save_stream(
    like: Mapping[str, Tensor],
    make: Callable[[str], Tensor],
    path: StrPath,
    *,
    records: Mapping[str, bytes] | None = None,
) -> None:
    """Write the .pth {name: make(name)}, whole or not at all, holding one tensor at a time.

    like: {name: tensor} of the shapes and dtypes that `make` returns; its values are not read.
    `make` is called once for each name, in that order. records: {name: content} of what the archive
    holds beside the tensors, for `read_record`. What is guaranteed of `path`: see `atomic_path`. If
    `make` raises, nothing is written.
    """
    names = list(like)
    with atomic_path(path) as temporary:
        _lay_out(like, temporary)
        _add_records(records or {}, temporary)
        with zipfile.ZipFile(temporary) as archive, open(temporary, "r+b") as f:
            # Where this record's entry in the directory at the archive's end begins.
            entry = archive.start_dir
            for record in archive.infolist():
                # torch.save numbers the tensors in the order of the dict: archive/data/0, ...
                if re.fullmatch(r"[^/]+/data/\d+", record.filename):
                    number = int(record.filename.rpartition("/")[2])
                    tensor = make(names[number])
                    _fill_in(f, tensor, record, entry=entry)
                    drop_mapped_pages(tensor)
                entry += 46 + len(record.filename.encode()) + len(record.extra)
                entry += len(record.comment)


def _lay_out(like: Mapping[str, Tensor], path: str) -> None:
    """Let torch.save write the archive, without the tensors' bytes and their checksums."""
    # Memory that is never touched, so that the system never provides it.
    empty = {name: torch.empty(t.shape, dtype=t.dtype) for name, t in like.items()}
    # Into a file object: its errors say what is wrong, those of PyTorch's own writer do not.
    with torch.serialization.skip_data(), open(path, "r+b") as f:
        torch.save(empty, f)


def _add_records(records: Mapping[str, bytes], path: str) -> None:
    """Add records to an archive, in its folder: PyTorch refuses an archive with any outside."""
    with zipfile.ZipFile(path, "a") as archive:
        folder, _, _ = archive.namelist()[0].partition("/")
        for name, content in records.items():
            # A ZipInfo has a fixed date, so that the same content makes the same file.
            archive.writestr(zipfile.ZipInfo(f"{folder}/{name}"), content)


def _bytes_of(tensor: Tensor) -> memoryview:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().data


def _fill_in(f: BinaryIO, tensor: Tensor, record: zipfile.ZipInfo, *, entry: int) -> None:
    """Write a tensor's bytes into its record, and their checksum to where a zip file has it."""
    content = _bytes_of(tensor)
    checksum = struct.pack("<I", zlib.crc32(content))
    # The record: a header, which ends with the lengths of name and padding, then these, then data.
    f.seek(record.header_offset + 26)
    name_length, padding_length = struct.unpack("<HH", f.read(4))
    f.seek(name_length + padding_length, os.SEEK_CUR)
    f.write(content)
    # After the data: a signature of 4 bytes, then the checksum.
    f.seek(4, os.SEEK_CUR)
    f.write(checksum)
    # The record's entry in the directory has the checksum, too.
    f.seek(entry + 16)
    f.write(checksum)


def save_safetensors(
    like: Mapping[str, Tensor], make: Callable[[str], Tensor], path: StrPath
) -> None:
    """Write {name: make(name)}, as `save_stream` does, in the safetensors format.

    like: {name: tensor} of the shapes that `make` returns; all tensors are float16.

    The format: the header's length, the header in JSON, which says where each tensor lies, and the
    tensors. The safetensors package would want all tensors in memory at once.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, tensor in like.items():
        end = start + 2 * tensor.numel()
        header[name] = {"dtype": "F16", "shape": [*tensor.shape], "data_offsets": [start, end]}
        start = end
    text = json.dumps(header).encode()
    # Spaces at the end, so that the tensors begin at a multiple of 8 bytes.
    text += b" " * (-len(text) % 8)
    with atomic_path(path) as temporary, open(temporary, "wb") as f:
        f.write(struct.pack("<Q", len(text)) + text)
        for name in like:
            f.write(_bytes_of(make(name)))
