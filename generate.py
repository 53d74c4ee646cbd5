"""Write text with an RWKV-6 or RWKV-5 model: a base, a base with a Bone checkpoint, or a merged model. Without --prompt it chats, in the
`User: ... Assistant: ...` form that fine-tuning data has."""

import codecs
import contextlib
import os
import sys

import torch

import checkpoint
import devices
import tokenizer
from archive import trained_quant
from cli import Parser, run_cli
from quant import FORMATS


def sample(logits, temperature, top_p, generator):
    """One token id from logits (vocab,): softmax at `temperature`, cut to the smallest set of at least `top_p`; at 0 the likeliest."""
    if temperature < 1e-4:  # as good as 0, and dividing by less overflows
        return int(logits.argmax())
    probability, order = torch.softmax(logits / temperature, -1).sort(descending=True)
    probability[probability.cumsum(-1) - probability >= top_p] = 0
    return int(order[torch.multinomial(probability, 1, generator=generator)])


@torch.no_grad()
def stream(model, state, tokens, length, temperature, top_p, generator, stop="", vocabulary=tokenizer):
    """Read `tokens`, then yield (text, state, unread) while the model writes: whole characters only, up to `length` tokens, the end of
    the document, or the text `stop`, which is not shown. The last `unread` are the tokens that the last state has yet to read for
    the text to end in a blank line. vocabulary: what the tokens are, RWKV World's in tokenizer, or a tokenizer.Vocabulary."""
    device = model.emb.weight.device
    decoder, held = (
        codecs.getincrementaldecoder("utf-8")("replace"),
        "",
    )  # these hold back part of a character, and part of `stop`
    for _ in range(length):
        with torch.autocast(
            device.type, torch.bfloat16, enabled=model.head.weight.dtype == torch.bfloat16
        ):
            logits, state = model(torch.tensor([tokens], device=device), state)
        if not (logits := logits[0, -1].float().cpu()).isfinite().all():
            raise ValueError(
                "what the model computes is not finite: its training went wrong, or a file is damaged; use an earlier checkpoint"
            )
        token = sample(logits, temperature, top_p, generator)
        tokens = [token] if token != vocabulary.END else []
        if not tokens:
            break
        held += decoder.decode(vocabulary.decode_bytes(tokens))
        if stop and stop in held:
            yield held.partition(stop)[0], state, tokens
            return
        shown = len(held) - max(n for n in range(len(stop) + 1) if held.endswith(stop[:n]))
        yield held[:shown], state, tokens
        held = held[shown:]
    yield (
        held + decoder.decode(b"", final=True),
        state,
        tokens + (tokenizer.encode("\n\n") if vocabulary is tokenizer else []),
    )


def main():
    parser = Parser(description=__doc__)
    parser.add_argument("model", help="a complete model (.pth): a base, or one that merge.py wrote")
    parser.add_argument(
        "--bone", metavar="CKPT", help="a Bone checkpoint to use on it without merging"
    )
    parser.add_argument(
        "--quant",
        choices=("none", *FORMATS),
        help="keep the matrices in few bits (default: as args.json beside CKPT says)",
    )
    parser.add_argument(
        "--prompt", help="text to go on from (\\n is a line break); without it, chat"
    )
    parser.add_argument(
        "--length", type=int, default=200, help="at most this many tokens (default: 200)"
    )
    parser.add_argument(
        "--temperature",
        type=float,
        default=1.0,
        help="0: always the likeliest token; 1: as the model has it (default: 1.0)",
    )
    parser.add_argument(
        "--top_p",
        type=float,
        default=0.7,
        help="sample from the likeliest tokens of this probability (default: 0.7)",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="the same seed writes the same text (default: 0)"
    )
    args = parser.parse_args()
    for flag, fits, need in (
        ("temperature", 0 <= args.temperature < float("inf"), "at least 0"),
        ("length", args.length > 0, "at least 1"),
        ("top_p", 0 < args.top_p <= 1, "above 0, at most 1"),
        ("seed", -(2**63) <= args.seed < 2**64, "of 64 bits"),
    ):
        if not fits:
            raise ValueError(f"--{flag} {getattr(args, flag)} must be {need}")

    quant = trained_quant(args.bone or "", args.quant)
    model = checkpoint.load_model(args.model, device=devices.find(), quant=quant)
    if args.bone:
        checkpoint.load_bone(model, args.bone)
    vocabulary, characters = tokenizer, os.path.join(os.path.dirname(args.model), "vocab.json")
    if model.config.vocab_size < 65530:
        if not os.path.exists(characters):
            raise ValueError(
                f"{args.model}: its vocabulary of {model.config.vocab_size} is not that of RWKV World, and no {characters} says what it is"
            )
        if args.prompt is None:
            raise ValueError(f"{args.model}: a model of characters cannot chat; use --prompt")
        vocabulary = tokenizer.read_vocabulary(characters, model.config.vocab_size)

    settings = (args.length, args.temperature, args.top_p, torch.Generator().manual_seed(args.seed))
    state, unread = model.empty_state(), []
    if args.prompt is not None:
        prompt = args.prompt.replace("\\n", "\n")
        tokens = [*vocabulary.encode(prompt)] or [0]
        print(prompt, end="")
        for text, *_ in stream(model, state, tokens, *settings, vocabulary=vocabulary):
            print(text, end="", flush=True)
        print()
        return
    print("Type a message; an empty line ends the chat.")
    sys.stdin.reconfigure(errors="replace")  # a byte that is not UTF-8 ends nothing
    with contextlib.suppress(EOFError):
        while message := input("User: ").strip():
            print("Assistant:", end="")
            tokens = unread + tokenizer.encode(f"User: {message}\n\nAssistant:")
            for text, state, unread in stream(model, state, tokens, *settings, stop="\n\n"):
                print(text, end="", flush=True)
            print()


if __name__ == "__main__":
    run_cli(main)
