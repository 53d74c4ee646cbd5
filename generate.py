"""Write text with an RWKV-6 model: a base, a base with a Bone checkpoint, or a merged model.

The prompt is read in parallel, then the model runs as a recurrent network: each token costs the same, however long the text.
Without --prompt it chats, in the `User: ... Assistant: ...` form that fine-tuning data has.
"""

import argparse
import codecs
import math

import torch

import bone
import data
import rwkv6
from files import Parser, run_cli


def sample(logits, temperature, top_p, generator):
    """One token id from logits (vocab,): softmax at `temperature`, cut to the smallest set of at least `top_p`. temperature 0: the likeliest."""
    if temperature < 1e-4:  # as good as 0, and dividing by less overflows
        return int(logits.argmax())
    probability, order = torch.softmax(logits / temperature, -1).sort(descending=True)
    probability[probability.cumsum(-1) - probability >= top_p] = 0
    return int(order[torch.multinomial(probability, 1, generator=generator)])


@torch.no_grad()
def stream(model, state, tokens, length, temperature, top_p, generator, stop=None):
    """Read `tokens`, then yield pieces of text while the model writes: whole characters only, up to `length` tokens, the end of
    the document, or the text `stop`, which is not shown. Returns the state, and the tokens it has yet to read for the text to
    end in a blank line."""
    device = model.emb.weight.device
    decoder = codecs.getincrementaldecoder("utf-8")("replace")  # holds back the bytes of an unfinished character
    held = ""                                                   # what may turn out to be the beginning of `stop`
    for _ in range(length):
        with torch.autocast(device.type, torch.bfloat16, enabled=model.head.weight.dtype == torch.bfloat16):
            logits, state = model(torch.tensor([tokens], device=device), state)
        token = sample(logits[0, -1].float().cpu(), temperature, top_p, generator)
        if token == 0:
            tokens = []
            break
        tokens = [token]
        held += decoder.decode(data.decode_bytes(tokens))
        if stop and stop in held:
            yield held.partition(stop)[0]
            return state, tokens
        keep = next((n for n in range(min(len(stop), len(held)), 0, -1) if held.endswith(stop[:n])), 0) if stop else 0
        yield held[:len(held) - keep]
        held = held[len(held) - keep:]
    yield held + decoder.decode(b"", final=True)
    return state, tokens + data.encode("\n\n")


def show(pieces):
    """Print a stream as it comes; returns the generator's return value."""
    while True:
        try:
            print(next(pieces), end="", flush=True)
        except StopIteration as end:
            print()
            return end.value


def main():
    parser = Parser(prog="generate.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
                                     epilog='example: python generate.py tuned.pth --prompt "User: 你好\\n\\nAssistant:"')
    parser.add_argument("model", help="a complete model (.pth): a base, or one that merge.py wrote")
    parser.add_argument("--bone", metavar="CKPT", help="a Bone checkpoint to use on it without merging")
    parser.add_argument("--prompt", help="text to go on from (\\n is a line break); without it, chat")
    parser.add_argument("--length", type=int, default=200, help="at most this many tokens (default: 200)")
    parser.add_argument("--temperature", type=float, default=1.0, help="0: always the likeliest token; 1: as the model has it (default: 1.0)")
    parser.add_argument("--top_p", type=float, default=0.7, help="sample from the likeliest tokens that together have this probability (default: 0.7)")
    parser.add_argument("--seed", type=int, default=0, help="the same seed writes the same text (default: 0)")
    args = parser.parse_args()
    if not 0 <= args.temperature < math.inf or not 0 < args.top_p <= 1 or args.length < 1:
        raise ValueError(f"--temperature {args.temperature} must be at least 0, --top_p {args.top_p} above 0 and at most 1, --length {args.length} at least 1")

    model = rwkv6.load_model(args.model, device="cuda" if torch.cuda.is_available() else "cpu")
    if args.bone:
        bone.load_bone(model, args.bone)

    def read(text):
        tokens = data.encode(text) or [0]
        if max(tokens) >= model.config.vocab_size:
            raise ValueError(f"the prompt has token {max(tokens)}, but the model's vocabulary is {model.config.vocab_size}; it is not an RWKV World model")
        return tokens

    settings = (args.length, args.temperature, args.top_p, torch.Generator().manual_seed(args.seed))
    if args.prompt is not None:
        prompt = args.prompt.replace("\\n", "\n")
        tokens = read(prompt)
        print(prompt, end="")
        show(stream(model, model.empty_state(), tokens, *settings))
        return
    print("Type a message; an empty line ends the chat.")
    state, unread = model.empty_state(), []
    while True:
        try:
            message = input("User: ").strip()
        except EOFError:
            break
        if not message:
            break
        print("Assistant:", end="")
        state, unread = show(stream(model, state, unread + read(f"User: {message}\n\nAssistant:"), *settings, stop="\n\n"))


if __name__ == "__main__":
    run_cli(main)
