"""What a Bone checkpoint says of its training, so that it can travel alone: the record bone.json.

One need not read this to understand Bone. The record lies in the checkpoint's archive, beside the
tensors. torch.load does not look at it, nor does RWKV-PEFT. It is JSON:

    format      1
    quant       of the base in training: none, int8 or nf4
    base        the base's `archive.fingerprint`
    base_name   the name of its file, for messages
    r, mode     of the bones; their shapes say the same
    program     what wrote it

Checkpoints of RWKV-PEFT, and those of earlier versions, have none.
"""

import dataclasses
import json
import os
from collections.abc import Mapping
from typing import Any

from archive import fingerprint, read_record
from cli import VERSION
from foreign import say_once
from quant import FORMATS

NAME = "bone.json"
FORMAT = 1


@dataclasses.dataclass(frozen=True)
class BoneRecord:
    """What is read of a record."""

    quant: str
    base: int
    base_name: str


def make_records(metadata: Mapping[str, Any]) -> dict[str, bytes]:
    """Return {bone.json: content}, for a checkpoint of a run; {} for one that is a whole model.

    metadata: of the run, see checkpointer.py.
    """
    args = metadata["args"]
    if not args["load_model"]:
        return {}
    content = {
        "format": FORMAT,
        "quant": args["quant"],
        "base": metadata["base"],
        "base_name": os.path.basename(args["load_model"]),
        "r": args["bone_r"],
        "mode": args["bone_mode"],
        "program": f"rwkv-bone {VERSION}",
    }
    return {NAME: json.dumps(content).encode()}


def read_bone_record(path: str) -> BoneRecord | None:
    """Read a checkpoint's record; None: it has none. ValueError for one that is invalid."""
    text = read_record(path, NAME)
    if text is None:
        return None
    try:
        content = json.loads(text)
        version, quant = content["format"], content["quant"]
        base, base_name = content["base"], content["base_name"]
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: its {NAME} is invalid; use another checkpoint") from error
    if type(version) is int and version > FORMAT:
        raise ValueError(f"{path}: written by a newer version of this program; update it")
    types_fit = type(version) is int and type(base) is int and type(base_name) is str
    if not types_fit or quant not in ("none", *FORMATS):
        raise ValueError(f"{path}: its {NAME} is invalid; use another checkpoint")
    return BoneRecord(quant, base, base_name)


def check_base(path: str, base_path: str, other_base: bool) -> None:
    """Refuse a base that the checkpoint at `path` was not trained on, where its record says so.

    A merged model is another base, too: nothing is merged twice. other_base: take it all the same.
    """
    record = read_bone_record(path)
    if other_base or record is None or record.base == fingerprint(base_path):
        return
    raise ValueError(
        f"{path}: trained on another base ({record.base_name}): {base_path} has other content, "
        "as a merged or converted copy has; give that one, or --other_base to insist"
    )


# ---- quantization -------------------------------------------------------------------------------


def trained_quant(path: str, quant: str | None) -> str:
    """Find the quantization of the base that a Bone checkpoint was trained with.

    Its record says it, else the args.json beside it. quant, from the command line, must not
    contradict that. It counts where there is neither; None: it was not given.
    """
    record = read_bone_record(path)
    if record is not None:
        check_quant(path, quant, trained=record.quant, source=f"its {NAME}")
        return record.quant
    args_json = args_json_beside(path)
    if os.path.exists(args_json):
        trained = quant_in(args_json, default=quant or "none")
        check_quant(path, quant, trained=trained, source=args_json)
        return trained
    if quant is None:
        say_once(
            f"note: {path}: does not say whether its base was quantized in training, nor does an "
            "args.json beside it; taken as not quantized, else give --quant"
        )
    return quant or "none"


def check_quant_beside(path: str, quant: str | None) -> None:
    """Refuse a quantization that a checkpoint's args.json contradicts, if only that tells it."""
    args_json = args_json_beside(path)
    if os.path.exists(args_json) and not has_record(path):
        trained = quant_in(args_json, default=quant or "none")
        check_quant(path, quant, trained=trained, source=args_json)


def has_record(path: str) -> bool:
    """Return whether a file can be read and has a record."""
    try:
        return read_bone_record(path) is not None
    except (OSError, ValueError):
        return False


def check_quant(path: str, quant: str | None, *, trained: str, source: str) -> None:
    """Raise ValueError where --quant was given, and is not what a checkpoint was trained with."""
    if quant not in (None, trained):
        raise ValueError(
            f"{path}: trained with --quant {trained} ({source}), but --quant is {quant}; "
            f"use {trained}"
        )


def args_json_beside(path: str) -> str:
    return os.path.join(os.path.dirname(path), "args.json")


def quant_in(args_json: str, default: str) -> str:
    """Read --quant off an args.json; `default` for one of a version without it."""
    try:
        if not os.path.isfile(args_json):
            raise ValueError("it is not a file")
        with open(args_json, encoding="utf-8") as f:
            arguments = json.load(f)
        if not isinstance(arguments, dict):
            raise ValueError("it is not a JSON object")
        quant = arguments.get("quant", default)
        if quant not in ("none", *FORMATS):
            raise ValueError(f"quant {quant!r} is unknown")
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{args_json}: not the arguments of a training run ({error}); "
            "move it away, and give --quant"
        ) from error
    return quant
