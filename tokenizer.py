"""Text to token ids and back: the RWKV World tokenizer, and vocabularies of characters.

One need not read this to understand Bone.
"""

import ast
import functools
import json
import pathlib
import re

import numpy as np
from pyrwkv_tokenizer import RWKVTokenizer

_tokenizer = functools.cache(RWKVTokenizer)

END = 0  # the token that ends a document


CHARACTERS = ("utf-8", "utf-16le", "dummy")  # kinds of data whose tokens are characters


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
