"""RWKV-6 (x060) and RWKV-5 (x052): the model, loading a checkpoint, and initialization for training from scratch.

A block adds two residual branches to x (B, T, C):

    x = x + att(ln1(x))      time mix: mixes a token with the one before it, then WKV-6 over the whole sequence (wkv6.py)
    x = x + ffn(ln2(x))      channel mix: the same mixing, then a gated two-layer network with squared ReLU

In RWKV-6 the shares of the mixture, and the decay of WKV-6, depend on the token; in RWKV-5 they are learned constants per channel.

Parallel and recurrent mode are one function. The state of a block is (att_shift (B, C), wkv (B, H, N, N) float32,
ffn_shift (B, C)): the last token that each branch saw, and the WKV state. Given a state, the model goes on from it and
returns the next one, with gradients through both; T = 1 is generation, longer T reads a prompt.

Names, shapes and arithmetic are those of the published checkpoints. Matrices are kept in the dtype asked for;
everything else (time_*, ln*) in float32, which is small and wants the precision.
Source: Peng et al., "Eagle and Finch: RWKV with Matrix-Valued States and Dynamic Recurrence" (arXiv 2404.05892).
"""

import dataclasses
import math
import re

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from quant import matmul_cache_contexts
from wkv6 import wkv6


@dataclasses.dataclass
class Config:
    n_layer: int
    n_embd: int
    vocab_size: int
    dim_ffn: int
    head_size: int = 64
    mix_rank: int = 32  # low-rank width of the five data-dependent mixtures
    decay_rank: int = 64  # and of the data-dependent decay
    version: str = "x060"
    pre_ffn: bool = False  # a channel mix in place of the first block's time mix
    head_qk: int = 0  # width of an attention that adds to the logits of earlier tokens

    def __str__(self):
        extras = ", pre_ffn" * self.pre_ffn + f", head_qk {self.head_qk}" * bool(self.head_qk)
        return (
            f"RWKV-{self.version[2]} {self.version}: n_layer {self.n_layer}, n_embd {self.n_embd}, vocab_size {self.vocab_size}, "
            f"head size {self.head_size}{extras}"
        )


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
    return (
        F.pad(x, (0, 0, 1, -1))
        if last is None
        else torch.cat([last[:, None].to(x.dtype), x[:, :-1]], 1)
    )


class Mix(nn.Module):
    """What both mixes have: the constant share of the previous token in each mixture, time_maa_* of x060, 1 - time_mix_* of x052."""

    def __init__(self, c, mixtures):
        super().__init__()
        self.version, self.mixtures = c.version, mixtures
        for name in mixtures:
            setattr(
                self,
                f"time_{'maa' if c.version == 'x060' else 'mix'}_{name}",
                parameter(1, 1, c.n_embd),
            )

    def shares(self):
        """The constant shares of all mixtures, (mixtures, 1, 1, C)."""
        if self.version == "x060":
            return torch.stack([getattr(self, f"time_maa_{name}") for name in self.mixtures])
        return 1 - torch.stack([getattr(self, f"time_mix_{name}") for name in self.mixtures])


class Mixture(torch.autograd.Function):
    """x + (previous - x) * share, for every share.

    x, previous: (B, T, C); shares: (mixtures, B, T, C) or (mixtures, 1, 1, C), or (1, 1, C) for one
    mixture. Returns (mixtures, B, T, C), or (B, T, C). As plain PyTorch it is that line; but this is
    the largest tensor of a block, and autograd would go through it more often than these formulas.
    """

    @staticmethod
    def forward(ctx, x, previous, shares):
        ctx.save_for_backward(x, previous, shares)
        return torch.lerp(x, previous, shares)

    @staticmethod
    def backward(ctx, g):
        x, previous, shares = ctx.saved_tensors
        gprevious = (g * shares).sum_to_size(x.shape)
        gx = g.sum_to_size(x.shape) - gprevious
        gshares = None
        if ctx.needs_input_grad[2]:
            gshares = (g * (previous - x)).sum_to_size(shares.shape)
        return gx, gprevious, gshares


class SquaredReLU(torch.autograd.Function):
    """relu(x)^2, whose gradient is 2 relu(x) g: half of the passes that autograd would make."""

    @staticmethod
    def forward(ctx, x):
        positive = torch.relu(x)
        ctx.save_for_backward(positive)
        return positive * positive

    @staticmethod
    def backward(ctx, g):
        (positive,) = ctx.saved_tensors
        return (g * positive).mul_(2)


class TimeMix(Mix):
    impl = "auto"  # form of WKV-6, see wkv6.py

    def __init__(self, c):
        super().__init__(
            c, "wkvrg" if c.version == "x060" else "kvrg"
        )  # in the order in which time_maa_w1 and time_maa_w2 hold them
        C, H = c.n_embd, c.n_embd // c.head_size
        self.head_size = c.head_size
        if c.version == "x060":
            self.time_maa_x = parameter(1, 1, C)
            self.time_maa_w1 = parameter(C, len(self.mixtures) * c.mix_rank)
            self.time_maa_w2 = parameter(len(self.mixtures), c.mix_rank, C)
            self.time_decay_w1 = parameter(C, c.decay_rank)
            self.time_decay_w2 = parameter(c.decay_rank, C)
        self.time_decay = parameter(*((1, 1, C) if c.version == "x060" else (H, c.head_size)))
        self.time_faaaa = parameter(H, c.head_size)
        self.receptance, self.key, self.value, self.output, self.gate = (
            Linear(C, C) for _ in range(5)
        )
        self.ln_x = nn.GroupNorm(H, C, eps=64e-5)

    def forward(self, x, last, wkv_state):
        B, T, C = x.shape
        before = previous(x, last)
        shares = self.shares()
        if self.version == "x060":  # a part that depends on the token
            low = torch.tanh(
                Mixture.apply(x, before, self.time_maa_x) @ self.time_maa_w1
            )  # (B, T, 5 * rank)
            mix = (
                low.view(B * T, len(shares), -1).transpose(0, 1) @ self.time_maa_w2
            )  # (5, B * T, C)
            shares = shares + mix.view(-1, B, T, C)
        *xw, xk, xv, xr, xg = Mixture.apply(x, before, shares)

        r, k, v, g = self.receptance(xr), self.key(xk), self.value(xv), self.gate(xg)
        w = self.time_decay.view(1, 1, C)  # log(-log(decay)), float32
        w = (
            w + torch.tanh(xw[0] @ self.time_decay_w1) @ self.time_decay_w2
            if xw
            else w.expand(B, T, C)
        )
        r, k, v, w = (a.view(B, T, -1, self.head_size) for a in (r, k, v, w))
        y, wkv_state = wkv6(r, k, v, w, self.time_faaaa, wkv_state, self.impl)
        y = F.layer_norm(y.to(x.dtype), (self.head_size,), eps=self.ln_x.eps).reshape(
            B, T, C
        )  # = self.ln_x, in half the time
        y = torch.addcmul(self.ln_x.bias, y, self.ln_x.weight)
        return self.output(y * F.silu(g)), x[:, -1], wkv_state


class ChannelMix(Mix):
    def __init__(self, c):
        super().__init__(c, "kr")
        self.key = Linear(c.n_embd, c.dim_ffn)
        self.receptance = Linear(c.n_embd, c.n_embd)
        self.value = Linear(c.dim_ffn, c.n_embd)

    def forward(self, x, last):
        xk, xr = Mixture.apply(x, previous(x, last), self.shares())
        k = SquaredReLU.apply(self.key(xk))
        r = torch.sigmoid(self.receptance(xr))
        return r * self.value(k), x[:, -1]


class Block(nn.Module):
    def __init__(self, c, first):
        super().__init__()
        self.ln1 = nn.LayerNorm(c.n_embd)
        self.ln2 = nn.LayerNorm(c.n_embd)
        if first:
            self.ln0 = nn.LayerNorm(
                c.n_embd
            )  # after the embedding; the published checkpoints keep it in block 0
        if first and c.pre_ffn:
            self.ffnPre = ChannelMix(
                dataclasses.replace(c, version="x052")
            )  # as RWKV-PEFT has it, in x060 too
        else:
            self.att = TimeMix(c)
        self.ffn = ChannelMix(c)

    def forward(self, x, state=(None, None, None)):
        att_last, wkv_state, ffn_last = state
        if hasattr(self, "ln0"):
            x = self.ln0(x)
        if hasattr(self, "ffnPre"):
            y, att_last = self.ffnPre(self.ln1(x), att_last)
        else:
            y, att_last, wkv_state = self.att(self.ln1(x), att_last, wkv_state)
        x = x + y
        y, ffn_last = self.ffn(self.ln2(x), ffn_last)
        return x + y, (att_last, wkv_state, ffn_last)


def own(block_state):
    """The state of a block without the rest of the tensors of which its two last tokens are views."""
    att_last, wkv_state, ffn_last = block_state
    return None if att_last is None else att_last.clone(), wkv_state, ffn_last.clone()


class RWKV(nn.Module):
    """model(idx) -> logits; model(idx, state) -> (logits, state), with model.empty_state() to start from.

    idx: (B, T) int64; logits: (B, T, vocab) in the dtype of the head's product. `grad_cp = True` recomputes each block in
    the backward pass instead of keeping its activations; `keep_products = True` keeps, for that, what its matrix products gave.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.grad_cp = self.keep_products = False
        self.emb = nn.Embedding(config.vocab_size, config.n_embd)
        self.blocks = nn.ModuleList(Block(config, first=i == 0) for i in range(config.n_layer))
        self.ln_out = nn.LayerNorm(config.n_embd)
        self.head = Linear(config.n_embd, config.vocab_size)
        if config.head_qk:
            self.head_q, self.head_k = (Linear(config.n_embd, config.head_qk) for _ in range(2))

    def empty_state(self):
        return [(None, None, None)] * self.config.n_layer + [None] * bool(self.config.head_qk)

    def empty_wkv_state(self, x):
        """WKV-6's state before the first token of x (B, T, C): zeros (B, H, N, N)."""
        B, _, C = x.shape
        N = self.config.head_size
        return torch.zeros(
            B, C // N, N, N, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device
        )

    def state_bytes(self, B):
        """Size of the state of B rows: per block two shifts and WKV-6's matrices, in float32."""
        return 4 * B * self.config.n_layer * self.config.n_embd * (2 + self.config.head_size)

    def hidden(self, idx, state=None):
        """What the head multiplies: (B, T, C) after ln_out; and the new state, where one was given."""
        x = self.emb(idx).to(self.ln_out.weight.dtype)
        new_state = []
        if state is None:
            empty = None, self.empty_wkv_state(x), None  # one for all blocks
            states = [empty] * self.config.n_layer
        else:
            states = state
        for block, s in zip(self.blocks, states):
            if self.grad_cp and torch.is_grad_enabled():
                keep = {"context_fn": matmul_cache_contexts} if self.keep_products else {}
                x, s = checkpoint(
                    block, x, s, use_reentrant=False, preserve_rng_state=False, **keep
                )
            else:
                x, s = block(x, s)
            if state is not None:
                new_state.append(own(s))
        x = self.ln_out(x)
        if self.config.head_qk:
            seen = self.head_k(x), idx  # keys and ids of all tokens so far
            new_state.append(
                tuple(torch.cat(pair, 1) for pair in zip(state[-1], seen))
                if state and state[-1]
                else seen
            )
        return x, new_state

    def forward(self, idx, state=None):
        x, new_state = self.hidden(idx, state)
        logits = self.head(x)
        if self.config.head_qk:  # as in RWKV-LM: the logit of a token seen before grows by q k^T
            keys, tokens = new_state[-1]
            c = (self.head_q(x) @ keys.mT / self.config.head_qk).tril(
                keys.shape[1] - x.shape[1]
            )  # (B, T, S), causal
            logits = logits.scatter_add(2, tokens[:, None].expand_as(c), c)
        return logits if state is None else (logits, new_state)


# ---- checkpoints --------------------------------------------------------------------------------------------------------------


def storage_dtype(model, name, dtype):
    """`dtype` for the matrices of the embedding, the head and the linear layers; at least float32 for the small rest."""
    module = model.get_submodule(name.rpartition(".")[0])
    return (
        dtype
        if isinstance(module, (nn.Linear, nn.Embedding))
        else torch.promote_types(dtype, torch.float32)
    )


def sizes(n_layer, n_embd, vocab_size, head_size=64, **options):
    """The Config that the published models of this depth and width have. options: version, pre_ffn, head_qk."""
    big = n_embd >= 4096
    return Config(
        n_layer,
        n_embd,
        vocab_size,
        int(3.5 * n_embd) // 32 * 32,
        head_size,
        64 if big else 32,
        128 if big else 64,
        **options,
    )


@torch.no_grad()
def init_model(n_layer, n_embd, vocab_size, head_size=64, device="cpu", **options):
    """A new float32 model, initialized as the comments and code of RWKV-LM have it. ValueError for sizes that do not fit."""
    config = sizes(n_layer, n_embd, vocab_size, head_size, **options)
    if (
        not 1 <= min(n_layer, n_embd, vocab_size) <= max(n_layer, n_embd, vocab_size) < 2**31
        or n_embd % head_size
    ):
        raise ValueError(
            f"n_embd {n_embd} must be a multiple of the head size {head_size}, and n_layer {n_layer} and vocab_size {vocab_size} from 1 to 2^31"
        )
    if config.pre_ffn and n_layer < 2:
        raise ValueError(
            "pre_ffn takes the place of the first block's time mix; n_layer must be at least 2"
        )
    model = RWKV(config)
    channel = torch.arange(n_embd) / n_embd  # 0 .. 1 over the channels
    last = torch.arange(n_embd) / max(1, n_embd - 1)  # the same, with 1 included
    gains = {
        "att.key": 0.1,
        "att.gate": 0.1,
        "head": 0.5 * math.sqrt(max(1, vocab_size / n_embd)),
        "head_k": 0.1,
    }
    zeros = (
        "att.output",
        "ffn.value",
        "ffn.receptance",
        "ffnPre.value",
        "ffnPre.receptance",
        "head_q",
    )  # a new block changes nothing at first
    for name, p in model.named_parameters():
        layer, kind = re.fullmatch(r"(?:blocks\.(\d+)\.)?(.+?)(?:\.weight)?", name).groups()
        i = int(layer or 0)
        up, down = (
            i / max(1, n_layer - 1),
            1 - i / n_layer,
        )  # 0 .. 1 and 1 .. almost 0 over the layers
        if kind.endswith("_w1") or kind in zeros:
            nn.init.zeros_(p)
        elif kind.endswith("_w2"):
            nn.init.uniform_(p, -0.01, 0.01)
        elif mixture := re.search("time_(maa|mix)_(.)$", kind):
            power = down / 2 if mixture[2] in "rg" else down
            if kind.startswith("ffn"):
                power = down**3 if mixture[1] == "maa" else down
            kept = channel**power + (0.3 * up if mixture[2] == "v" else 0)
            p.copy_(kept if mixture[1] == "mix" else 1 - kept)
        elif kind == "att.time_decay":
            p.copy_(
                (-6 + 5 * last ** (0.7 + 1.3 * up)).view_as(p)
            )  # from slow to fast forgetting over the channels
        elif kind == "att.time_faaaa":
            p.copy_((up * (1 - last) + ((torch.arange(n_embd) + 1) % 3 - 1) * 0.1).view_as(p))
        elif kind == "att.ln_x":
            nn.init.constant_(p, ((1 + i) / n_layer) ** 0.7)
        elif kind == "emb":
            nn.init.uniform_(
                p, -1e-4, 1e-4
            )  # ln0 follows and makes it large; small steps matter early
        elif p.ndim == 2:
            nn.init.orthogonal_(p, gain=gains.get(kind, 1))
    return model.to(device)
