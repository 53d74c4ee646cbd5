"""Text to token ids and back: the RWKV World tokenizer, and vocabularies of characters.

One need not read this to understand Bone.
"""

import ast
import functools
import json
import os
import pathlib
import re
from collections.abc import Iterable

import numpy as np
import pyrwkv_tokenizer

StrPath = str | os.PathLike[str]

# The token that ends a document.
END = 0

# Values of --data_type whose tokens are characters.
CHARACTERS = ("utf-8", "utf-16le", "dummy")

# The tokenizer is made once, when it is first needed.
_tokenizer = functools.cache(pyrwkv_tokenizer.RWKVTokenizer)


def encode(text: str) -> list[int]:
    """Tokenize a text with the RWKV World vocabulary, without an end-of-document token."""
    return _tokenizer().encode(text)


def forget_tokenizer() -> None:
    """Give back the memory of the tokenizer, 250 MB. It is made again when it is needed."""
    _tokenizer.cache_clear()


@functools.cache
def token_bytes() -> dict[int, bytes]:
    """Map each token id from 1 to 65529 to its bytes. (The ids from 65530 on are not used.)"""
    # The tokenizer would say where it is, and take 250 MB for that.
    path = pathlib.Path(pyrwkv_tokenizer.__file__).with_name("rwkv_vocab_v20230424.txt")
    vocabulary = path.read_text(encoding="utf-8")
    table = {}
    # A line is an id, a Python literal and its length in bytes: 261 '\n\n' 2.
    for number, literal in re.findall(r"^(\d+) (.+) \d+$", vocabulary, re.MULTILINE):
        token = ast.literal_eval(literal)
        # Tokens that are not UTF-8 stand there as bytes: b'\xff'.
        if isinstance(token, str):
            token = token.encode()
        table[int(number)] = token
    return table


def decode_bytes(ids: Iterable[int]) -> bytes:
    """Join the bytes of token ids; an id without an entry, such as 0, gives none.

    These are bytes and not a text, because a token may end in the middle of a character.
    """
    return b"".join(token_bytes().get(i, b"") for i in ids)


class Vocabulary(str):
    """A vocabulary of characters, used in place of RWKV World's.

    It is a string that holds each character once: the id of a character is its place there.
    `encode`, `decode_bytes` and END stand for the functions and the constant above.
    """

    END = None  # No token ends a document.

    # (It replaces str.encode, which nothing may call on a Vocabulary.)
    def encode(  # type: ignore[override]
        self, text: str, where: StrPath = "the text"
    ) -> np.ndarray:
        """Look up the characters of a text: (characters) int32. ValueError: one is not there."""
        ids = np.full(0x110000, -1, np.int32)  # for each code point of Unicode
        ids[[ord(character) for character in self]] = range(len(self))
        tokens = ids[np.frombuffer(text.encode("utf-32-le"), np.uint32)]
        unknown = tokens < 0
        if unknown.any():
            raise ValueError(
                f"{where} has the character {text[unknown.argmax()]!r}, which is not in "
                "vocab.json; leave it out, or train a new model on this text in another folder"
            )
        return tokens

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Join the characters of ids, in UTF-8."""
        return "".join(self[i] for i in ids).encode()


def read_vocabulary(path: StrPath, size: int | None = None) -> Vocabulary:
    """Read the Vocabulary in a vocab.json, {"0": "a", "1": "b", ...}.

    Raises ValueError for anything else, or if it does not have `size` characters.
    """
    try:
        characters = _characters_in(path, size)
    except (ValueError, RecursionError) as error:
        wanted = f"a vocabulary of {size} characters" if size else "a vocabulary of characters"
        raise ValueError(
            f'{path}: not {wanted}, {{"0": "a", "1": "b", ...}} ({error}); '
            "copy it from where the model was trained"
        ) from error
    return Vocabulary("".join(characters))


def _characters_in(path: StrPath, size: int | None) -> list[str]:
    entries = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
    if not isinstance(entries, dict) or not entries:
        raise ValueError("it is not a JSON object with entries")
    size = size or len(entries)
    ids = [str(i) for i in range(size)]
    if entries.keys() != set(ids):
        raise ValueError(f"its ids are not 0 to {size - 1}")
    characters = [entries[i] for i in ids]
    single = all(isinstance(character, str) and len(character) == 1 for character in characters)
    if not single or len(set(characters)) < size:
        raise ValueError("each id must have one character, and each character one id")
    return characters
