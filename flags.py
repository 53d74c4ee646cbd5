"""Declare the flags of a program as the fields of a dataclass.

One need not read this to understand Bone. options.py declares those of train.py, for example

    ctx_len: int = flag(512, "longest row in tokens", parse=number(int, 1), resume=FIXED)
"""

import argparse
import copy
import dataclasses
import json
from collections.abc import Callable
from typing import Any

# What a resumed run may do with a flag. Where a flag says neither, its value is not compared: it
# names a file or a folder, says how the run is computed or saved, or is checked otherwise.
FIXED = "fixed"  # another value is refused: a state would mean something else
CHANGEABLE = "changeable"  # another value is taken, and the log says so


@dataclasses.dataclass(frozen=True)
class Flag:
    """What --help, the command line, resuming and docs/flags.md need to know of a flag.

    default: False for a flag without a value, a list for one with any number of them, None for
    what is found later, as `help` says.
    """

    default: Any
    help: str
    # From the text on the command line to the value; a flag with choices needs none.
    parse: Callable[[str], Any] = str
    choices: tuple = ()
    # {a value that RWKV-PEFT takes, and we do not: why}
    refused: dict[str, str] = dataclasses.field(default_factory=dict)
    # What the flag means without a value; None where it needs one.
    bare: Any = None
    # FIXED, CHANGEABLE, or "" for not compared.
    resume: str = ""
    # Whether ranks on several machines may differ in it.
    per_machine: bool = False
    # Of the group that begins with this flag in --help.
    heading: str = ""


def flag(default: Any, help: str, **rest: Any) -> Any:
    """Return a dataclass field that is a flag. rest: see Flag."""
    return dataclasses.field(
        default_factory=lambda: copy.copy(default),
        metadata={"flag": Flag(default, help, **rest)},
    )


def number(kind: type, least: float, below: float = 2**63) -> Callable[[str], Any]:
    """Return a parser of numbers, int or float, from `least` on and below `below`."""
    noun = "whole number" if kind is int else "number"
    limit = "2^63" if below == 2**63 else below

    def parse(text: str) -> Any:
        error = argparse.ArgumentTypeError(
            f"{text} must be a {noun} of at least {least}, and below {limit}"
        )
        try:
            value = kind(text)
        except ValueError:
            raise error from None
        if not least <= value < below:
            raise error
        return value

    parse.__name__ = kind.__name__
    return parse


def json_object(*keys: str) -> Callable[[str], dict]:
    """Return a parser of JSON objects that have some of these keys and no others."""
    example = ",".join(f'"{key}":...' for key in keys)
    escaped = example.replace('"', '\\"')

    def parse(text: str) -> dict:
        error = argparse.ArgumentTypeError(
            f"{text} is not JSON such as '{{{example}}}'; Windows' cmd.exe takes no single quotes: "
            f'there write "{{{escaped}}}"'
        )
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            raise error from None
        if not isinstance(value, dict) or not value.keys() <= set(keys):
            raise error
        return value

    parse.__name__ = "json"
    return parse


def one_of(values: tuple, refused: dict[str, str]) -> Callable[[str], Any]:
    """Return a parser of the given values. refused: {another value: why it is not taken}."""
    by_text = {str(value): value for value in values}
    unknown = f"is unknown; there are {', '.join(by_text)}"

    def parse(text: str) -> Any:
        if text not in by_text:
            raise argparse.ArgumentTypeError(f"{text} {refused.get(text, unknown)}")
        return by_text[text]

    return parse


def default_text(default: Any) -> str:
    """Return a default as one would type it; "" for what is off or found later."""
    if default is None or default is False:
        return ""
    if isinstance(default, list):
        return " ".join(default)
    if isinstance(default, dict):
        return json.dumps(default, separators=(",", ":"))
    return str(default)


def value_name(about: Flag) -> str:
    """Return what --help shows in place of a flag's value."""
    if isinstance(about.default, list):
        return "NAME"
    if not about.choices:
        return about.parse.__name__.upper()
    braced = "{" + ",".join(map(str, about.choices)) + "}"
    return braced if len(braced) < 60 else "NAME"


def add_flag(parser: argparse._ActionsContainer, name: str, about: Flag) -> None:
    """Add a flag to a parser, or to a group of one."""
    help_text = about.help
    if default_text(about.default):
        help_text += f" (default: {default_text(about.default)})"
    if about.default is False:
        parser.add_argument(f"--{name}", action=argparse.BooleanOptionalAction, help=help_text)
        return
    rest: dict[str, Any] = {}
    if isinstance(about.default, list):
        rest = {"nargs": "*"}
    elif about.bare is not None:
        rest = {"nargs": "?", "const": about.bare}
    parse = one_of(about.choices, about.refused) if about.choices else about.parse
    parser.add_argument(f"--{name}", type=parse, metavar=value_name(about), help=help_text, **rest)
