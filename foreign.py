"""Files and names of other programs: take what can be taken, and say what anything else is.

One need not read this to understand Bone.
"""

import functools
import os
import re

from torch import Tensor

StrPath = str | os.PathLike[str]

WHERE = (
    "the model's .pth is needed, which the BlinkDL and RWKV organisations on Hugging Face or "
    "ModelScope have"
)
BEFORE_AI00 = "the .pth that it was made from is needed"

# What a file begins with that is none of PyTorch's.
BEGINNINGS = {
    b"GGUF": ("a GGUF file, for llama.cpp", WHERE),
    b"version https://git-lfs": ("a Git LFS pointer", "get the file itself by git lfs pull"),
    b"<": ("a web page", "download the file itself"),
}

# By torch.save before PyTorch 1.6, after a few bytes that depend on the pickle protocol.
BEFORE_1_6 = b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."


def save_again(path: StrPath, *, executing: bool) -> str:
    """Say how a .pth of another form becomes one that is read here.

    executing: whether PyTorch cannot load it without executing what is in it.
    """
    how = f"torch.save(torch.load({str(path)!r}), 'new.pth')"
    if executing:
        how = f"torch.save(torch.load({str(path)!r}, weights_only=False), 'new.pth')"
        return f"if you trust its source, save it again in Python: {how}"
    return f"save it again in Python: {how}"


def check_is_zip(path: StrPath) -> None:
    """Raise ValueError for a file that is no zip archive, as a .pth is; say what it is instead."""
    with open(path, "rb") as f:
        start = f.read(2**16)
    if start.startswith(b"PK\x03\x04"):
        return
    if not start:
        raise ValueError(f"{path}: not a PyTorch checkpoint (it is empty); download it again")
    if BEFORE_1_6 in start[:32]:
        again = save_again(path, executing=start[1] > 3)
        raise ValueError(f"{path}: saved in the form before PyTorch 1.6; {again}")
    for beginning, (kind, advice) in BEGINNINGS.items():
        if start.startswith(beginning):
            raise ValueError(f"{path}: not a PyTorch checkpoint ({kind}); {advice}")
    # safetensors: the length of a header, which is JSON and has the tensors' names.
    if start[8:9] == b"{":
        kind, advice = "safetensors", WHERE
        if b'"blocks.0.' in start:
            kind, advice = "a .st is for Ai00", BEFORE_AI00
        raise ValueError(f"{path}: not a PyTorch checkpoint ({kind}); {advice}")
    raise ValueError(
        f"{path}: not a PyTorch checkpoint; "
        "nothing was executed, a .pth as torch.save writes it is needed"
    )


# ---- names --------------------------------------------------------------------------------------

# What torch.compile, DistributedDataParallel and Lightning write before names.
PREFIX = re.compile(r"^(?:(?:_orig_mod|module|model)\.)+|(?<=\.)_orig_mod\.")
HUGGING_FACE = re.compile(r"(rwkv|layers|embeddings|lm_head)\.|.*\.(attention|attn|feed_forward)\.")


def plain_names(tensors: dict[str, Tensor], path: StrPath) -> dict[str, Tensor]:
    """Return a checkpoint's tensors under the names of RWKV and Bone.

    Prefixes are left out. `.disha`, RWKV-PEFT's later name, becomes `.bone`: shapes and formula are
    the same. ValueError for Hugging Face's and Ai00's names, and where two tensors get one name.
    """
    plain: dict[str, Tensor] = {}
    prefixes = set()
    for name, tensor in tensors.items():
        prefixes.update(PREFIX.findall(name))
        new = re.sub(r"\.disha$", ".bone", PREFIX.sub("", name))
        if new in plain:
            raise ValueError(f"{path}: holds {new} twice, once with a prefix or as .disha")
        if HUGGING_FACE.match(new):
            raise ValueError(f"{path}: has Hugging Face's names, such as {name}; {WHERE}")
        if new.endswith(".att.time_mix_w1"):
            raise ValueError(f"{path}: has Ai00's names, such as {name}; {BEFORE_AI00}")
        plain[new] = tensor
    if prefixes:
        say_once(f"note: {path}: the names' prefix {min(prefixes)} is left out")
    return plain


@functools.cache
def say_once(text: str) -> None:
    """Print a line, unless it was printed before: a file is opened more than once."""
    print(text)
