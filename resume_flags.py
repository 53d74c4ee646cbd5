"""The flags of a run that goes on: what is not given comes from the args.json of its folder.

One need not read this to understand Bone. So `python train.py --resume --proj_dir out` is enough.
PyTorch is not imported here.
"""

import argparse
import json
import os
import re
from typing import Any

from flags import Flag, one_of
from options import Options, flags

# What a run that goes on does not take from args.json: where it is, and how it is started.
OF_A_START = ("proj_dir", "resume", "dry_run")
# What the base model says, if there is one: a message about these is of no use to whoever gives
# another base.
OF_THE_BASE = ("n_layer", "n_embd", "vocab_size", "my_testing", "pre_ffn", "head_qk")
PATHS = ("load_model", "bone_load", "data_file", "val_file")


def takes_flags(folder: str, resume: str | None) -> bool:
    """Return whether a run goes on with the flags of its folder's args.json."""
    if resume is None or (resume == "auto" and not _holds_a_state(folder)):
        return False
    return os.path.exists(os.path.join(folder, "args.json"))


def flags_of_earlier_run(given: dict[str, Any]) -> dict[str, Any]:
    """Return the flags of the run to go on with, but for those that are given: {name: value}.

    given: the flags of the command line. There are none without --resume, and none with `auto`
    where there is no state yet. Raises ValueError for an args.json that no run has written.
    """
    folder = given.get("proj_dir", Options().proj_dir)
    resume = given.get("resume")
    path = os.path.join(folder, "args.json")
    if not takes_flags(folder, resume):
        if resume == "last" and "data_file" not in given and "data_type" not in given:
            advice = "give its --proj_dir"
            if os.environ.get("NODE_RANK", "0") != "0":
                advice = "copy the first machine's folder"
            raise ValueError(
                f"{path}: not there, so --resume needs all flags of that run; or {advice}"
            )
        return {}
    saved = _read(path)
    begin = given.get("epoch_begin", saved.get("epoch_begin"))
    if resume == "auto" and begin != saved.get("epoch_begin"):
        return {}  # the states are those of the run before this one
    found = {}
    for name in vars(Options()):
        if name in saved and name not in given and name not in OF_A_START:
            found[name] = _checked(saved[name], name, flags()[name], path=path)
    if given.get("load_model", found.get("load_model")):
        found = {name: value for name, value in found.items() if name not in OF_THE_BASE}
    if os.environ.get("WORLD_SIZE"):
        _leave_out_other_devices(found)
    _look_for_files(found, path)
    return found


def _holds_a_state(folder: str) -> bool:
    names = os.listdir(folder) if os.path.isdir(folder) else []
    return any(re.fullmatch(r"resume-[0-9]{1,18}\.pth", name) for name in names)


def _read(path: str) -> dict[str, Any]:
    try:
        with open(path, encoding="utf-8") as f:
            saved = json.load(f)
        if not isinstance(saved, dict):
            raise ValueError("it is not a JSON object")
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{path}: not the arguments of a training run ({error}); "
            "move it away, and give all flags of that run"
        ) from error
    return saved


def _checked(value: Any, name: str, about: Flag, *, path: str) -> Any:
    """Return a value of args.json as the command line would give it. ValueError where it cannot."""
    try:
        return _parsed(value, name, about)
    except argparse.ArgumentTypeError as error:
        raise ValueError(f"{path}: {name}: {error}; give --{name}") from error


def _parsed(value: Any, name: str, about: Flag) -> Any:
    default = about.default
    if value is None and default is None:
        return None
    if about.choices and isinstance(value, bool):
        # pre_ffn, as a base model says it.
        value = int(value)
    text = value if isinstance(value, str) else json.dumps(value)
    wrong_kind = argparse.ArgumentTypeError(f"{text} is not what --{name} takes")
    if isinstance(default, bool | list):
        words = value if isinstance(value, list) else []
        if type(value) is not type(default) or not all(isinstance(word, str) for word in words):
            raise wrong_kind
        return value
    parse = one_of(about.choices, about.refused) if about.choices else about.parse
    parsed = parse(text)
    if isinstance(parsed, str) and not isinstance(value, str):
        raise wrong_kind
    return parsed


def _leave_out_other_devices(found: dict[str, Any]) -> None:
    """Leave out how many devices there were, where torchrun says that now there are others."""
    number = found.get("devices", 1) * found.get("num_nodes", 1)
    if os.environ["WORLD_SIZE"] != str(number):
        found.pop("devices", None)
        found.pop("num_nodes", None)


def _look_for_files(found: dict[str, Any], path: str) -> None:
    """Raise ValueError for a file that is not where it was when seen from here."""
    for name in PATHS:
        file = found.get(name)
        # Data may be named by what its files have in common: x for x.bin and x.idx, or x.jsonl.
        if file and not any(os.path.exists(file + ending) for ending in ("", ".bin", ".jsonl")):
            raise ValueError(
                f"{file}: not found here; {path} names it as it was where the run was started: "
                f"start it there, or give --{name}"
            )
