"""Describe a model: its version and its sizes, read by rwkv6.py.

One need not read this to understand Bone.
"""

from __future__ import annotations

import dataclasses
from typing import Any


@dataclasses.dataclass
class Config:
    """The version of a model and its sizes."""

    n_layer: int
    n_embd: int
    vocab_size: int
    dim_ffn: int
    head_size: int = 64
    # RWKV-6: low-rank widths of the mixing, and of the decay, that depend on the token.
    mix_rank: int = 32
    decay_rank: int = 64
    version: str = "x060"
    # A channel mix in place of the first block's time mix.
    pre_ffn: bool = False
    # Width of an attention that adds to the logits of earlier tokens; 0: there is none.
    head_qk: int = 0

    def __str__(self) -> str:
        text = (
            f"RWKV-{self.version[2]} {self.version}: n_layer {self.n_layer}, "
            f"n_embd {self.n_embd}, vocab_size {self.vocab_size}, head size {self.head_size}"
        )
        if self.pre_ffn:
            text += ", pre_ffn"
        if self.head_qk:
            text += f", head_qk {self.head_qk}"
        return text


def sizes(
    n_layer: int, n_embd: int, vocab_size: int, *, head_size: int = 64, **options: Any
) -> Config:
    """Return the Config of a published model of this depth and width.

    options: version, pre_ffn, head_qk. ValueError for sizes that do not fit.
    """
    numbers = (n_layer, n_embd, vocab_size)
    if min(numbers) < 1 or max(numbers) >= 2**31 or n_embd % head_size != 0:
        raise ValueError(
            f"n_embd {n_embd} must be a multiple of the head size {head_size}, "
            f"and n_layer {n_layer} and vocab_size {vocab_size} from 1 to 2^31"
        )
    large = n_embd >= 4096
    config = Config(
        n_layer=n_layer,
        n_embd=n_embd,
        vocab_size=vocab_size,
        dim_ffn=int(3.5 * n_embd) // 32 * 32,
        head_size=head_size,
        mix_rank=64 if large else 32,
        decay_rank=128 if large else 64,
        **options,
    )
    if config.pre_ffn and n_layer < 2:
        raise ValueError(
            "pre_ffn takes the place of the first block's time mix; n_layer must be at least 2"
        )
    return config
