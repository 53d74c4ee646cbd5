"""Give a new model its first weights, for training from scratch, as RWKV-LM does.

One need not read this to understand Bone.
"""

from __future__ import annotations

import math
import re

import torch
from torch import Tensor, nn

from config import Config

# A new block changes nothing at first.
ZEROS = (
    "att.output",
    "ffn.value",
    "ffn.receptance",
    "ffnPre.value",
    "ffnPre.receptance",
    "head_q",
)
GAINS = {"att.key": 0.1, "att.gate": 0.1, "head_k": 0.1}


@torch.no_grad()
def initialize(model: nn.Module, config: Config) -> None:
    """Fill every parameter of a model in place, in the order in which it has them."""
    head_gain = 0.5 * math.sqrt(max(1, config.vocab_size / config.n_embd))
    gains = {**GAINS, "head": head_gain}
    for name, p in model.named_parameters():
        match = re.fullmatch(r"(?:blocks\.(?P<layer>\d+)\.)?(?P<kind>.+?)(?:\.weight)?", name)
        assert match
        kind = match["kind"]  # such as emb, att.key, att.time_maa_k, ln1.bias
        depth = Depth(int(match["layer"] or 0), config.n_layer)
        if kind in ZEROS or kind.endswith("_w1"):
            nn.init.zeros_(p)
        elif kind.endswith("_w2"):
            nn.init.uniform_(p, -0.01, 0.01)
        elif "time" in kind:
            p.copy_(time_parameter(kind, depth, config.n_embd).view_as(p))
        elif kind == "att.ln_x":
            nn.init.constant_(p, ((1 + depth.layer) / config.n_layer) ** 0.7)
        elif kind == "emb":
            # ln0 follows and makes it large; small steps matter early.
            nn.init.uniform_(p, -1e-4, 1e-4)
        elif p.ndim == 2:
            nn.init.orthogonal_(p, gain=gains.get(kind, 1))


class Depth:
    """Where a layer is in the model.

    up: from 0 for the first to 1 for the last; down: from 1 for the first to 1 / n_layer.
    """

    def __init__(self, layer: int, n_layer: int) -> None:
        self.layer = layer
        self.up = layer / max(1, n_layer - 1)
        self.down = 1 - layer / n_layer


def time_parameter(kind: str, depth: Depth, n_embd: int) -> Tensor:
    """Return the first value, (n_embd), of time_maa_*, time_mix_*, time_decay or time_faaaa."""
    channel = torch.arange(n_embd)
    position = channel / max(1, n_embd - 1)  # from 0 to 1 over the channels
    if kind == "att.time_decay":
        # From slow to fast forgetting over the channels.
        return -6 + 5 * position ** (0.7 + 1.3 * depth.up)
    if kind == "att.time_faaaa":
        zigzag = ((channel + 1) % 3 - 1) * 0.1
        return depth.up * (1 - position) + zigzag
    # The share of the token itself in a mixture. time_mix_* is that, time_maa_* the rest.
    kept = (channel / n_embd) ** mixture_power(kind, depth)
    if kind.endswith("_v"):
        kept = kept + 0.3 * depth.up
    return 1 - kept if "time_maa" in kind else kept


def mixture_power(kind: str, depth: Depth) -> float:
    """Return the exponent of the mixture `kind`: the larger, the more of the previous token."""
    if kind.startswith("ffn"):
        return depth.down**3 if "time_maa" in kind else depth.down
    if kind.endswith(("_r", "_g")):
        return depth.down / 2
    return depth.down
