"""Read .pth files without executing anything in them, and write files whole or not at all.

One need not read this to understand Bone.
"""

import contextlib
import ctypes
import errno
import glob
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

import psutil
import torch

ABOUT = "about"  # the tensor that makes a .pth the state of a training (run_state.py): what is not numbers, as JSON, in bytes


def check_pickle(content):
    """ValueError where a pickle holds anything but what a dict of tensors is made of. torch.load(weights_only=True) executes nothing either, but
    it knows types that take any amount of memory, and tuples that contain one another, whose hash takes for ever."""
    parts = (
        r"collections OrderedDict|torch Tensor|torch(\.storage)? \w+Storage|torch\.nn\.parameter Parameter|torch\._tensor _rebuild_from_type_v2|"
        r"torch\._utils _rebuild_(tensor_v2|parameter)"
    )
    before, reusable = (
        "",
        set(),
    )  # what may be used again by its number: names and tensors, and nothing that has parts
    for code, argument, _ in pickletools.genops(content):
        if code.name == "GLOBAL" and not re.fullmatch(parts, argument):
            raise ValueError(f"{argument.replace(' ', '.')} is no part of a tensor")
        if code.name in ("BINPUT", "LONG_BINPUT", "PUT") and before in (
            "GLOBAL",
            "BINUNICODE",
            "REDUCE",
        ):
            reusable.add(argument)
        if (
            code.name in ("BINGET", "LONG_BINGET", "GET") and argument not in reusable
        ) or code.name in ("DUP", "MEMOIZE", "STACK_GLOBAL", "INST", "OBJ", "NEWOBJ"):
            raise ValueError("its parts contain one another")
        before = code.name


def read_tensors(path, verify=True):
    """The dict {name: tensor} in a .pth file, memory-mapped (private: writing to a tensor does not change the file). ValueError or OSError,
    in one line, for anything else. Never runs code of a pickle. verify: hold every byte against the file's checksums."""
    size = os.path.getsize(path)  # missing, or not readable: OSError says which
    if not os.path.isfile(path):
        raise ValueError(f"{path}: is no file; a .pth is needed")
    with open(path, "rb") as f:
        if f.read(4) != b"PK\x03\x04":
            raise ValueError(
                f"{path}: not a PyTorch checkpoint"
                + " (a .st is for Ai00)" * str(path).endswith(".st")
                + "; nothing was executed, a .pth as torch.save writes it is needed"
            )
    try:
        with (
            zipfile.ZipFile(path) as archive,
            warnings.catch_warnings(action="ignore"),
        ):  # of the pickle protocol: what matters is whether it loads
            records = archive.infolist()
            if (
                any(record.compress_type for record in records)
                or sum(record.file_size for record in records) > size
            ):
                raise ValueError("it claims to hold more than it does")
            [pickled] = [record for record in records if record.filename.endswith("data.pkl")]
            check_pickle(archive.read(pickled))
            if wrong := verify and archive.testzip():
                raise ValueError(f"the checksum of {wrong} is wrong")
            tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # a damaged file can fail anywhere in the unpickler
        if "is no part of a tensor" in str(error):
            raise ValueError(
                f"{path}: holds more than tensors: {error}; nothing was executed, a .pth of tensors is needed"
            ) from error
        if "unable to mmap" in str(error):
            raise ValueError(
                f"{path}: {size / 1e9:.1f} GB are more than the system will map into its memory, although they need not be there at once; "
                "on Linux, sysctl vm.overcommit_memory=1 allows it"
            ) from error
        why = str(error).partition("\n")[0] if type(error) is ValueError else "it cannot be read"
        raise ValueError(
            f"{path}: a cut or damaged PyTorch checkpoint ({why}); copy or download it again"
        ) from error
    items = tensors.items() if isinstance(tensors, dict) else ()
    if not items or not all(
        isinstance(name, str) and isinstance(t, torch.Tensor) and t.layout == torch.strided
        for name, t in items
    ):
        raise ValueError(f"{path}: not a model checkpoint; a dict of names and tensors is needed")
    tensors = {
        name: torch.Tensor.detach(tensor) for name, tensor in items
    }  # without attributes, which could stand in for methods
    # A few bytes can claim to be a tensor of any size, and a mapped tensor can reach into the next one: every storage must be a record.
    storages = sorted(
        {(t.untyped_storage().data_ptr(), t.untyped_storage().nbytes()) for t in tensors.values()}
    )
    stored = [
        record.file_size
        for record in sorted(records, key=lambda record: record.header_offset)
        if "/data/" in record.filename
    ]
    if [nbytes for _, nbytes in storages] != stored:
        raise ValueError(
            f"{path}: a cut or damaged PyTorch checkpoint (its tensors are not what it holds); copy or download it again"
        )
    for name, tensor in tensors.items():
        if (
            not 0 < tensor.nbytes <= tensor.untyped_storage().nbytes()
            or tensor.is_neg()
            or tensor.is_conj()
        ):
            raise ValueError(
                f"{path}: {name} claims to be {tuple(tensor.shape)}, which the file does not hold"
            )
        tensor.is_mapped = tensor.is_contiguous()
    if (total := sum(tensor.nbytes for tensor in tensors.values())) > size:
        raise ValueError(
            f"{path}: {len(tensors)} tensors that share their content claim {total:,} bytes, of a file of {size:,}; save each with its own"
        )
    return tensors


def read_checkpoint(path, verify=True):
    """What `read_tensors` reads, where that is floating tensors: a base model, or a Bone checkpoint."""
    checkpoint = read_tensors(path, verify)
    if ABOUT in checkpoint:
        raise ValueError(
            f"{path}: the state of a training, for --resume; a model or a checkpoint (rwkv-N.pth) is needed"
        )
    for name, tensor in checkpoint.items():
        if tensor.dtype not in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
            raise ValueError(
                f"{path}: {name} is {tensor.dtype}; not a model checkpoint, which holds floating numbers"
            )
    return checkpoint


def fingerprint(path):
    """A number that another content of this .pth hardly shares, from the checksums in the archive's directory; 0 for path ""."""
    if not path:
        return 0
    with zipfile.ZipFile(path) as archive:
        checksums = sorted(
            (record.filename.rpartition("/")[2], record.CRC)
            for record in archive.infolist()
            if "/data/" in record.filename
        )
    return zlib.crc32(json.dumps(checksums).encode())


def all_finite(tensor):
    """Whether no number of a tensor is NaN or infinite; takes no memory, as isfinite() does."""
    return all(extreme.isfinite() for extreme in tensor.aminmax())


def release(tensor):
    """Forget what reading a tensor of `read_checkpoint` took of memory; it is read from the file again if need be, so it must not have
    been written to. Any other tensor is left alone, and so is every one where the system is not Linux."""
    if getattr(tensor, "is_mapped", False) and sys.platform == "linux":
        start = tensor.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
        ctypes.CDLL(None).madvise(
            ctypes.c_void_p(start),
            ctypes.c_size_t(tensor.data_ptr() + tensor.nbytes - start),
            mmap.MADV_DONTNEED,
        )


def remove_leftovers(pattern):
    """Remove the temporary files of `atomic_path` for paths that fit `pattern` (of glob), whose process was killed. Its number may be
    that of this process now: in a container it often is."""
    for path in glob.glob(f"{pattern}.*.tmp"):
        pid = path.split(".")[-2]
        if re.fullmatch("[0-9]{1,9}", pid) and (
            int(pid) == os.getpid() or not psutil.pid_exists(int(pid))
        ):
            os.unlink(path)


def sync_folder(folder):
    """What was renamed or removed there stays so, even when the power fails. (Windows has no way to ask for that.)"""
    if os.name == "posix":
        fd = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(fd)
        except OSError as error:
            if error.errno not in (
                errno.EINVAL,
                errno.ENOTSUP,
                errno.EBADF,
            ):  # some network file systems cannot
                raise
        finally:
            os.close(fd)


@contextlib.contextmanager
def atomic_path(path):
    """A new, empty, temporary file in the folder of `path`; renamed to `path` when the block ends well, removed when it does not.
    A symbolic link at `path` is replaced, not followed."""
    path = os.fspath(path)
    folder = os.path.join(
        os.path.dirname(path) or ".", ""
    )  # with a / at its end, as a file is no folder
    taken = (
        os.path.exists(path) and not os.path.isfile(path) and not os.path.islink(path)
    )  # by a folder, or /dev/null
    if taken or not os.access(folder, os.W_OK):
        why = f"{folder} is read-only" if os.path.isdir(folder) else f"there is no folder {folder}"
        why = "it is a folder" if os.path.isdir(path) else "it is no file" if taken else why
        raise ValueError(f"{path}: cannot be written, as {why}; mend that, or write elsewhere")
    remove_leftovers(glob.escape(path))
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        os.close(
            os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
        )  # EXCL: never through a link that lay there
        yield temporary
        with open(temporary, "rb+") as f:
            os.fsync(f.fileno())
        os.replace(temporary, path)
        sync_folder(folder)
    except OSError as error:
        error.filename = (
            error.filename or path
        )  # a full disk does not say which file it has no room for
        raise
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)


def save_stream(like, make, path):
    """Write {name: make(name)}, whole or not at all, holding one tensor at a time. like: {name: tensor}, of their shapes and dtypes.

    torch.save lays the archive out and leaves the tensors' bytes away (skip_data); they and their checksums are then filled in."""
    names = list(like)
    with atomic_path(path) as temporary:
        with (
            torch.serialization.skip_data(),
            open(temporary, "r+b") as f,
        ):  # a file, whose errors have names
            torch.save(
                {name: torch.empty(t.shape, dtype=t.dtype) for name, t in like.items()}, f
            )  # memory that is never touched
        with zipfile.ZipFile(temporary) as archive, open(temporary, "r+b") as f:
            entry = archive.start_dir  # of the directory at the archive's end
            for record in archive.infolist():
                if re.fullmatch(
                    r"[^/]+/data/\d+", record.filename
                ):  # named by number, in the order of the dict
                    tensor = make(names[int(record.filename.rpartition("/")[2])])
                    content = tensor.contiguous().flatten().view(torch.uint8).numpy()
                    checksum = struct.pack("<I", zlib.crc32(content))
                    f.seek(record.header_offset + 26)
                    f.seek(
                        sum(struct.unpack("<HH", f.read(4))), os.SEEK_CUR
                    )  # past the name and the padding
                    f.write(content)
                    f.seek(4, os.SEEK_CUR)  # past the signature of what follows the data
                    f.write(checksum)
                    f.seek(entry + 16)
                    f.write(checksum)
                    release(tensor)
                entry += (
                    46 + len(record.filename.encode()) + len(record.extra) + len(record.comment)
                )


def save_safetensors(like, make, path):
    """Write {name: make(name)}, as save_stream does, in the safetensors format. like: {name: tensor}, of their shapes; all float16.

    The format: the header's length, the header in JSON, which says where each tensor lies, and the tensors. Written out here since the
    safetensors package wants all of them in memory at once."""
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, tensor in like.items():
        header[name] = {
            "dtype": "F16",
            "shape": [*tensor.shape],
            "data_offsets": [end, end := end + 2 * tensor.numel()],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # so that the tensors are aligned
    with atomic_path(path) as temporary, open(temporary, "wb") as f:
        f.write(struct.pack("<Q", len(text)) + text)
        for name in like:
            f.write(make(name).contiguous().numpy())


def trained_quant(path, quant):
    """The quantization that the Bone checkpoint `path` was trained with, by the args.json beside it: `none`, `int8` or `nf4`. `quant`, from
    the command line or None, must not contradict that, and stands in for it where there is no such file, or no checkpoint (path "")."""
    remembered = os.path.join(os.path.dirname(path), "args.json")
    trained = quant or "none"
    if path and os.path.exists(remembered):
        try:
            if not os.path.isfile(remembered):
                raise ValueError("it is no file")
            with open(remembered, encoding="utf-8") as f:
                trained = json.load(f).get("quant", trained)
            if trained not in ("none", "int8", "nf4"):
                raise ValueError(f"quant {trained!r} is unknown")
        except (ValueError, AttributeError, RecursionError) as error:
            raise ValueError(
                f"{remembered}: not the arguments of a training run ({error}); move it away, and give --quant"
            ) from error
    if quant not in (None, trained):
        raise ValueError(
            f"{path}: trained with --quant {trained} ({remembered}), but --quant is {quant}; use {trained}"
        )
    return trained
