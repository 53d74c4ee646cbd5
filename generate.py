"""Write text with a trained model, or chat with it.

One need not read this to understand Bone.
"""

from __future__ import annotations

import argparse
import codecs
import dataclasses
import math
import os
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

from cli import Parser, run_cli  # isort: skip

import torch
from torch import Tensor

import checkpoint
import devices
import tokenizer
from bone_record import check_base, trained_quant
from quant import FORMATS
from rwkv6 import RWKV

DESCRIPTION = """Write text with an RWKV-6 or RWKV-5 model: a base, a base with a Bone checkpoint,
or a merged model. Without --prompt it chats, in the `User: ... Assistant: ...` form that
fine-tuning data has."""


class WorldVocabulary:
    """RWKV World's tokens, with the methods of a tokenizer.Vocabulary (of characters)."""

    END = tokenizer.END

    def encode(self, text: str) -> list[int]:
        return tokenizer.encode(text)

    def decode_bytes(self, ids: list[int]) -> bytes:
        return tokenizer.decode_bytes(ids)


WORLD = WorldVocabulary()
Vocabulary = WorldVocabulary | tokenizer.Vocabulary


@dataclasses.dataclass(frozen=True)
class Settings:
    """How text is written."""

    length: int  # at most so many tokens
    temperature: float = 1.0  # 0: always the likeliest token
    top_p: float = 1.0  # sample from the likeliest tokens of this probability
    generator: torch.Generator | None = None


class Piece(NamedTuple):
    """A piece of the text, and where the model is."""

    text: str
    state: Any
    unread: list[int]  # the tokens that `state` has yet to read


def sample(logits: Tensor, settings: Settings) -> int:
    """Draw one token id from logits (vocab,).

    The distribution is the softmax at `temperature`, cut to the smallest set of tokens that has a
    probability of at least `top_p`.
    """
    # As good as 0; dividing by less overflows.
    if settings.temperature < 1e-4:
        return int(logits.argmax())
    probability, order = torch.softmax(logits / settings.temperature, -1).sort(descending=True)
    probability[probability.cumsum(-1) - probability >= settings.top_p] = 0
    return int(order[torch.multinomial(probability, 1, generator=settings.generator)])


@torch.no_grad()
def stream(
    model: RWKV,
    state: Any,
    tokens: list[int],
    *,
    settings: Settings,
    stop: str = "",
    vocabulary: Vocabulary = WORLD,
) -> Iterator[Piece]:
    """Read `tokens`, then yield what the model writes, in whole characters.

    It ends after `settings.length` tokens, at the end of the document, or at the text `stop`,
    which is not shown. With RWKV World's vocabulary, the `unread` tokens of the last piece end the
    text in a blank line. ValueError where the model computes NaN or infinite values.
    """
    decoder = codecs.getincrementaldecoder("utf-8")("replace")  # holds back part of a character
    held = ""  # text not shown yet, which may be the beginning of `stop`
    for _ in range(settings.length):
        logits, state = next_logits(model, state, tokens)
        token = sample(logits, settings)
        if token == vocabulary.END:
            tokens = []
            break
        tokens = [token]
        held += decoder.decode(vocabulary.decode_bytes(tokens))
        if stop and stop in held:
            yield Piece(held.partition(stop)[0], state, tokens)
            return
        shown = len(held) - overlap(held, stop)
        yield Piece(held[:shown], state, tokens)
        held = held[shown:]
    if vocabulary is WORLD:
        tokens = tokens + WORLD.encode("\n\n")
    yield Piece(held + decoder.decode(b"", final=True), state, tokens)


def next_logits(model: RWKV, state: Any, tokens: list[int]) -> tuple[Tensor, Any]:
    """Read tokens. Return the logits of the next one, (vocab,) float32 on the CPU, and the state.

    ValueError where a logit is NaN or infinite.
    """
    device = model.emb.weight.device
    in_bfloat16 = model.head.weight.dtype == torch.bfloat16
    with torch.autocast(device.type, torch.bfloat16, enabled=in_bfloat16):
        logits, state = model(torch.tensor([tokens], device=device), state)
    logits = logits[0, -1].float().cpu()
    if not logits.isfinite().all():
        raise ValueError(
            "what the model computes is not finite: its training went wrong, or a file is damaged; "
            "use an earlier checkpoint"
        )
    return logits, state


def overlap(text: str, stop: str) -> int:
    """Return how many characters at the end of `text` may be the beginning of `stop`."""
    return max(n for n in range(len(stop) + 1) if text.endswith(stop[:n]))


# ---- the command line --------------------------------------------------------------------------


def parse_args() -> argparse.Namespace:
    """Read the flags. ValueError, in one line, for one that does not fit."""
    parser = Parser(description=DESCRIPTION)
    add = parser.add_argument
    add("model", help="a complete model (.pth): a base, or one that merge.py wrote")
    add("--bone", metavar="CKPT", help="a Bone checkpoint to use on it without merging")
    add("--other_base", action="store_true", help="use CKPT on a base it was not trained on")
    add(
        "--quant",
        choices=("none", *FORMATS),
        help="keep the matrices in few bits (default: as CKPT was trained)",
    )
    add("--prompt", help="text to go on from (\\n is a line break); without it, chat")
    add("--length", type=int, default=200, help="at most this many tokens (default: 200)")
    add(
        "--temperature",
        type=float,
        default=1.0,
        help="0: always the likeliest token; 1: as the model has it (default: 1.0)",
    )
    add(
        "--top_p",
        type=float,
        default=0.7,
        help="sample from the likeliest tokens of this probability (default: 0.7)",
    )
    add("--seed", type=int, default=0, help="the same seed writes the same text (default: 0)")
    args = parser.parse_args()
    if not 0 <= args.temperature < math.inf:
        raise ValueError(f"--temperature {args.temperature} must be at least 0")
    if args.length < 1:
        raise ValueError(f"--length {args.length} must be at least 1")
    if not 0 < args.top_p <= 1:
        raise ValueError(f"--top_p {args.top_p} must be above 0, at most 1")
    if not -(2**63) <= args.seed < 2**64:
        raise ValueError(f"--seed {args.seed} must be of 64 bits")
    return args


def find_vocabulary(args: argparse.Namespace, vocab_size: int) -> Vocabulary:
    """Return RWKV World's vocabulary or, for a model of characters, that of its vocab.json."""
    if vocab_size >= 65530:
        return WORLD
    path = os.path.join(os.path.dirname(args.model), "vocab.json")
    if not os.path.exists(path):
        raise ValueError(
            f"{args.model}: its vocabulary of {vocab_size} is not that of RWKV World, "
            f"and no {path} says what it is"
        )
    if args.prompt is None:
        raise ValueError(f"{args.model}: a model of characters cannot chat; use --prompt")
    return tokenizer.read_vocabulary(path, vocab_size)


def continue_text(model: RWKV, prompt: str, settings: Settings, *, vocabulary: Vocabulary) -> None:
    """Print the prompt and what the model writes after it."""
    tokens = [*vocabulary.encode(prompt)] or [0]
    print(prompt, end="")
    pieces = stream(model, model.empty_state(), tokens, settings=settings, vocabulary=vocabulary)
    for piece in pieces:
        print(piece.text, end="", flush=True)
    print()


def chat(model: RWKV, settings: Settings) -> None:
    """Answer messages until an empty line or the end of the input."""
    print("Type a message; an empty line ends the chat.")
    # Let no byte end the chat because it is not UTF-8.
    sys.stdin.reconfigure(errors="replace")  # type: ignore[union-attr]
    state: Any = model.empty_state()
    unread: list[int] = []
    while True:
        try:
            message = input("User: ").strip()
        except EOFError:
            return
        if not message:
            return
        print("Assistant:", end="")
        tokens = unread + tokenizer.encode(f"User: {message}\n\nAssistant:")
        for piece in stream(model, state, tokens, settings=settings, stop="\n\n"):
            print(piece.text, end="", flush=True)
        state, unread = piece.state, piece.unread
        print()


def main() -> None:
    args = parse_args()
    quant = args.quant or "none"
    if args.bone:
        quant = trained_quant(args.bone, args.quant)
        check_base(args.bone, args.model, args.other_base)
    model = checkpoint.load_model(args.model, device=devices.find(), quant=quant)
    if args.bone:
        checkpoint.load_bone(model, args.bone)
    vocabulary = find_vocabulary(args, model.config.vocab_size)
    generator = torch.Generator().manual_seed(args.seed)
    settings = Settings(
        length=args.length,
        temperature=args.temperature,
        top_p=args.top_p,
        generator=generator,
    )
    if args.prompt is None:
        chat(model, settings)
    else:
        prompt = args.prompt.replace("\\n", "\n")
        continue_text(model, prompt, settings, vocabulary=vocabulary)


if __name__ == "__main__":
    run_cli(main)
