"""RWKV-6 (x060): the model, loading a checkpoint, and initialization for training from scratch.

A block adds two residual branches to x (B, T, C):

    x = x + att(ln1(x))      time mix: mixes a token with the one before it, then WKV-6 over the whole sequence (wkv6.py)
    x = x + ffn(ln2(x))      channel mix: the same mixing, then a gated two-layer network with squared ReLU

Parallel and recurrent mode are one function. The state of a block is (att_shift (B, C), wkv (B, H, N, N) float32,
ffn_shift (B, C)): the last token that each branch saw, and the WKV state. Given a state, the model goes on from it and
returns the next one, with gradients through both; T = 1 is generation, longer T reads a prompt.

Names, shapes and arithmetic are those of the published x060 checkpoints. Matrices are kept in the dtype asked for;
everything else (time_*, ln*) in float32, which is small and wants the precision.
Source: Peng et al., "Eagle and Finch: RWKV with Matrix-Valued States and Dynamic Recurrence" (arXiv 2404.05892).
"""

import dataclasses
import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from files import read_checkpoint, release
from quant import PIECE, quantize
from wkv6 import wkv6

MIX = "wkvrg"  # the five mixtures of a time mix, in the order in which time_maa_w1 and time_maa_w2 hold them


@dataclasses.dataclass
class Config:
    n_layer: int
    n_embd: int
    vocab_size: int
    dim_ffn: int
    head_size: int = 64
    mix_rank: int = 32      # low-rank width of the five data-dependent mixtures
    decay_rank: int = 64    # and of the data-dependent decay

    def __str__(self):
        return f"RWKV-6 x060: n_layer {self.n_layer}, n_embd {self.n_embd}, vocab_size {self.vocab_size}, head size {self.head_size}"


class Linear(nn.Linear):
    """A bias-free matrix product in the dtype of its weight, whatever x is (autocast decides where it is on)."""

    def __init__(self, in_features, out_features):
        super().__init__(in_features, out_features, bias=False)

    def forward(self, x):
        return F.linear(x.to(self.weight.dtype), self.weight)


def parameter(*shape):
    return nn.Parameter(torch.empty(shape))


def previous(x, last):
    """x (B, T, C) moved on by one token; `last` (B, C) or None for zeros comes first."""
    return F.pad(x, (0, 0, 1, -1)) if last is None else torch.cat([last[:, None].to(x.dtype), x[:, :-1]], 1)


class TimeMix(nn.Module):
    def __init__(self, c):
        super().__init__()
        C = c.n_embd
        self.head_size = c.head_size
        for name in "x" + MIX:
            setattr(self, f"time_maa_{name}", parameter(1, 1, C))
        self.time_maa_w1 = parameter(C, len(MIX) * c.mix_rank)
        self.time_maa_w2 = parameter(len(MIX), c.mix_rank, C)
        self.time_decay = parameter(1, 1, C)
        self.time_decay_w1 = parameter(C, c.decay_rank)
        self.time_decay_w2 = parameter(c.decay_rank, C)
        self.time_faaaa = parameter(C // c.head_size, c.head_size)
        self.receptance, self.key, self.value, self.output, self.gate = (Linear(C, C) for _ in range(5))
        self.ln_x = nn.GroupNorm(C // c.head_size, C, eps=64e-5)

    def forward(self, x, last, wkv_state):
        B, T, C = x.shape
        dx = previous(x, last) - x
        # How much of the previous token goes into each mixture: a learned part per channel, and one that depends on the token.
        low = torch.tanh((x + dx * self.time_maa_x) @ self.time_maa_w1)                # (B, T, 5 * rank)
        mix = low.view(B * T, len(MIX), -1).transpose(0, 1) @ self.time_maa_w2                    # (5, B * T, C)
        xw, xk, xv, xr, xg = (x + dx * (getattr(self, f"time_maa_{name}") + m.view(B, T, C)) for name, m in zip(MIX, mix))

        r, k, v, g = self.receptance(xr), self.key(xk), self.value(xv), self.gate(xg)
        w = self.time_decay + torch.tanh(xw @ self.time_decay_w1) @ self.time_decay_w2            # log(-log(decay)), float32
        r, k, v, w = (a.view(B, T, -1, self.head_size) for a in (r, k, v, w))
        y, wkv_state = wkv6(r, k, v, w, self.time_faaaa, wkv_state)
        y = F.layer_norm(y.to(x.dtype), (self.head_size,), eps=self.ln_x.eps).reshape(B, T, C)    # = self.ln_x, in half the time
        y = y * self.ln_x.weight + self.ln_x.bias
        return self.output(y * F.silu(g)), x[:, -1].clone(), wkv_state  # a clone, since a view would keep all of x


class ChannelMix(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.time_maa_k = parameter(1, 1, c.n_embd)
        self.time_maa_r = parameter(1, 1, c.n_embd)
        self.key = Linear(c.n_embd, c.dim_ffn)
        self.receptance = Linear(c.n_embd, c.n_embd)
        self.value = Linear(c.dim_ffn, c.n_embd)

    def forward(self, x, last):
        dx = previous(x, last) - x
        k = torch.relu(self.key(x + dx * self.time_maa_k))
        r = torch.sigmoid(self.receptance(x + dx * self.time_maa_r))
        return r * self.value(k * k), x[:, -1].clone()


class Block(nn.Module):
    def __init__(self, c, first):
        super().__init__()
        self.ln1 = nn.LayerNorm(c.n_embd)
        self.ln2 = nn.LayerNorm(c.n_embd)
        if first:
            self.ln0 = nn.LayerNorm(c.n_embd)  # after the embedding; the published checkpoints keep it in block 0
        self.att = TimeMix(c)
        self.ffn = ChannelMix(c)

    def forward(self, x, state=(None, None, None)):
        att_last, wkv_state, ffn_last = state
        if hasattr(self, "ln0"):
            x = self.ln0(x)
        y, att_last, wkv_state = self.att(self.ln1(x), att_last, wkv_state)
        x = x + y
        y, ffn_last = self.ffn(self.ln2(x), ffn_last)
        return x + y, (att_last, wkv_state, ffn_last)


class RWKV6(nn.Module):
    """model(idx) -> logits; model(idx, state) -> (logits, state), with model.empty_state() to start from.

    idx: (B, T) int64; logits: (B, T, vocab) in the dtype of the head's product. `grad_cp = True` recomputes each block in
    the backward pass instead of keeping its activations.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.grad_cp = False
        self.emb = nn.Embedding(config.vocab_size, config.n_embd)
        self.blocks = nn.ModuleList(Block(config, first=i == 0) for i in range(config.n_layer))
        self.ln_out = nn.LayerNorm(config.n_embd)
        self.head = Linear(config.n_embd, config.vocab_size)

    def empty_state(self):
        return [(None, None, None)] * self.config.n_layer

    def hidden(self, idx, state=None):
        """What the head multiplies: (B, T, C) after ln_out, and the new state."""
        x = self.emb(idx).to(self.ln_out.weight.dtype)
        new_state = []
        for block, s in zip(self.blocks, state or self.empty_state()):
            if self.grad_cp and torch.is_grad_enabled():
                x, s = checkpoint(block, x, s, use_reentrant=False, preserve_rng_state=False)
            else:
                x, s = block(x, s)
            new_state.append(s)
        return self.ln_out(x), new_state

    def forward(self, idx, state=None):
        x, new_state = self.hidden(idx, state)
        logits = self.head(x)
        return logits if state is None else (logits, new_state)


# ---- checkpoints --------------------------------------------------------------------------------------------------------------

def config_of(checkpoint, path):
    """Read the sizes off a checkpoint's tensors. ValueError, naming the version, for anything but RWKV-6 x060."""
    names = checkpoint.keys()
    if any(name.endswith(".bone") for name in names):
        raise ValueError(f"{path}: a Bone checkpoint, not a base model; give the base here")
    if "blocks.0.att.r_k" in names or "blocks.0.att.x_r" in names:
        raise ValueError(f"{path}: an RWKV-7 checkpoint; only RWKV-6 (x060) is supported here")
    if "blocks.0.att.time_maa_x" not in names:
        if "blocks.0.att.time_mix_k" in names:
            version = 4 if "blocks.0.att.ln_x.weight" not in names else 5
            raise ValueError(f"{path}: an RWKV-{version} checkpoint; only RWKV-6 (x060) is supported here")
        raise ValueError(f"{path}: not an RWKV-6 checkpoint; it has no blocks.0.att.time_maa_x")
    try:
        vocab_size, n_embd = checkpoint["emb.weight"].shape
        return Config(
            n_layer=1 + max(int(name.split(".")[1]) for name in names if name.startswith("blocks.")),
            n_embd=n_embd, vocab_size=vocab_size, dim_ffn=checkpoint["blocks.0.ffn.key.weight"].shape[0],
            head_size=checkpoint["blocks.0.att.time_faaaa"].shape[1], mix_rank=checkpoint["blocks.0.att.time_maa_w2"].shape[1],
            decay_rank=checkpoint["blocks.0.att.time_decay_w1"].shape[1])
    except (KeyError, IndexError, ValueError) as error:
        raise ValueError(f"{path}: not a complete RWKV-6 checkpoint ({error})") from error


def load_model(path, dtype=None, device="cpu", quant="none"):
    """Load a published .pth. dtype: of the matrices; None keeps the checkpoint's. quant: `none`, `int8` or `nf4`, of the blocks' matrices.

    The file is mapped; a tensor is placed, then its pages are given back, so memory is never more than the model's and one tensor's.
    Returns an RWKV6. ValueError for a missing, misshapen or non-finite tensor. On the meta device, sizes are all that is looked at.
    """
    checkpoint = read_checkpoint(path)
    config = config_of(checkpoint, path)
    with torch.device("meta"):
        model = RWKV6(config)
    expected = dict(model.named_parameters())
    for name in expected.keys() ^ checkpoint.keys():
        raise ValueError(f"{path}: {name} is {'missing' if name in expected else 'not part of RWKV-6 x060'}")
    for name, meta in expected.items():
        tensor = checkpoint.pop(name)
        if tensor.shape != meta.shape and tensor.squeeze().shape != meta.squeeze().shape:
            raise ValueError(f"{path}: {name} is {tuple(tensor.shape)}, but the other tensors ask for {tuple(meta.shape)}")
        if torch.device(device).type != "meta" and not all(piece.sum(dtype=torch.float32).isfinite() for piece in tensor.flatten().split(PIECE)):
            raise ValueError(f"{path}: {name} holds NaN or infinite values; the file is damaged or its training went wrong")
        module, kept = name.rpartition(".")[0], storage_dtype(model, name, dtype or tensor.dtype)
        if quant != "none" and name.startswith("blocks.") and isinstance(model.get_submodule(module), nn.Linear):
            try:
                model.set_submodule(module, quantize(tensor.to(device), quant, kept))
            except ValueError as error:
                raise ValueError(f"{path}: {name}: {error}") from error
        else:
            put(model, name, tensor.view(meta.shape).to(device, kept, copy=True))
        release(tensor)
    return model


def storage_dtype(model, name, dtype):
    """`dtype` for the matrices of the embedding, the head and the linear layers; at least float32 for the small rest."""
    module = model.get_submodule(name.rpartition(".")[0])
    return dtype if isinstance(module, (nn.Linear, nn.Embedding)) else torch.promote_types(dtype, torch.float32)


def put(model, name, tensor):
    module, _, child = name.rpartition(".")
    setattr(model.get_submodule(module), child, nn.Parameter(tensor))


def sizes(n_layer, n_embd, vocab_size, head_size=64):
    """The Config that the published models of this depth and width have."""
    big = n_embd >= 4096
    return Config(n_layer, n_embd, vocab_size, int(3.5 * n_embd) // 32 * 32, head_size, 64 if big else 32, 128 if big else 64)


@torch.no_grad()
def init_model(n_layer, n_embd, vocab_size, head_size=64, device="cpu"):
    """A new float32 model, initialized as the comments and code of RWKV-LM have it. ValueError for sizes that do not fit."""
    if min(n_layer, n_embd, vocab_size) < 1 or n_embd % head_size:
        raise ValueError(f"n_embd {n_embd} must be a multiple of the head size {head_size}, and n_layer {n_layer} and vocab_size {vocab_size} at least 1")
    model = RWKV6(sizes(n_layer, n_embd, vocab_size, head_size))
    channel = torch.arange(n_embd) / n_embd                      # 0 .. 1 over the channels
    last = torch.arange(n_embd) / max(1, n_embd - 1)             # the same, with 1 included
    nn.init.uniform_(model.emb.weight, -1e-4, 1e-4)              # ln0 follows and makes it large; small steps matter early
    nn.init.orthogonal_(model.head.weight, gain=0.5 * math.sqrt(max(1, vocab_size / n_embd)))
    for i, block in enumerate(model.blocks):
        up, down = i / max(1, n_layer - 1), 1 - i / n_layer      # 0 .. 1 and 1 .. almost 0 over the layers
        att, ffn = block.att, block.ffn
        for name, kept in {"x": channel**down, "w": channel**down, "k": channel**down, "v": channel**down + 0.3 * up,
                           "r": channel ** (down / 2), "g": channel ** (down / 2)}.items():
            getattr(att, f"time_maa_{name}").copy_(1 - kept)
        ffn.time_maa_k.copy_(1 - channel ** (down**3))
        ffn.time_maa_r.copy_(1 - channel ** (down**3))
        nn.init.zeros_(att.time_maa_w1)
        nn.init.uniform_(att.time_maa_w2, -0.01, 0.01)
        nn.init.zeros_(att.time_decay_w1)
        nn.init.uniform_(att.time_decay_w2, -0.01, 0.01)
        att.time_decay.copy_(-6 + 5 * last ** (0.7 + 1.3 * up))  # from slow to fast forgetting over the channels
        zigzag = ((torch.arange(n_embd) + 1) % 3 - 1) * 0.1
        att.time_faaaa.copy_((up * (1 - last) + zigzag).view_as(att.time_faaaa))
        nn.init.constant_(att.ln_x.weight, ((1 + i) / n_layer) ** 0.7)
        for linear, gain in ((att.receptance, 1), (att.key, 0.1), (att.value, 1), (att.gate, 0.1), (ffn.key, 1)):
            nn.init.orthogonal_(linear.weight, gain=gain)
        for linear in (att.output, ffn.value, ffn.receptance):   # a new block changes nothing at first
            nn.init.zeros_(linear.weight)
    return model.to(device)
