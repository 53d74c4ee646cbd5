"""RWKV-6 (x060) and RWKV-5 (x052): the model.

A block adds two residual branches to x (B, T, C):

    x = x + att(ln1(x))    time mix: mixes a token with the one before it, then WKV-6 (wkv6.py)
    x = x + ffn(ln2(x))    channel mix: the same mixing, then a gated network with squared ReLU

In RWKV-6 the mixing and the decay depend on the token; in RWKV-5 they are constants per channel.

Parallel and recurrent mode are one function. The state of a block is a tuple of the last token
that the time mix saw (B, C), the state of WKV-6 (B, H, N, N) in float32, and the last token that
the channel mix saw (B, C). Given a state, the model continues from it and returns the next one,
with gradients through both. T = 1 generates; a longer T reads a prompt.

Names, shapes and arithmetic are those of the published checkpoints. Matrices are kept in the
dtype asked for; everything else (time_*, ln*) in float32: it is small and needs the precision.
Source: Peng et al., "Eagle and Finch" (arXiv 2404.05892).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from config import Config, sizes
from formulas import Mixture, SquaredReLU
from initialize import initialize
from quant import matmul_cache_contexts
from wkv6 import wkv6

# The state of a block is three tensors, as above, or None for zeros. The state of a model is one
# for each block, and, with head_qk, the keys and ids of all tokens so far.
BlockState = tuple[Any, Any, Any]
State = list[Any]

# ---- pieces of both mixes ----------------------------------------------------------------------


class Linear(nn.Linear):
    """A matrix product without bias, in the dtype of its weight, or of autocast where it is on."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def reset_parameters(self) -> None:
        if not self.weight.is_meta:  # on the meta device it would import torch._dynamo
            super().reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.to(self.weight.dtype), self.weight)


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape))


def time_shift(x: Tensor, last: Tensor | None) -> Tensor:
    """Return the token before each token of x (B, T, C).

    last: (B, C), the one before the first, or None for zeros.
    """
    if last is None:
        return F.pad(x, (0, 0, 1, -1))
    return torch.cat([last[:, None].to(x.dtype), x[:, :-1]], 1)


# ---- the two mixes -----------------------------------------------------------------------------


class TimeMix(nn.Module):
    """Mix tokens over time. RWKV-6 and RWKV-5 differ in `mix`."""

    impl = "auto"  # form of WKV-6, see wkv6.py
    time_faaaa: nn.Parameter  # u of WKV-6, (H, N)

    def __init__(self, c: Config) -> None:
        super().__init__()
        C = c.n_embd
        self.head_size = c.head_size
        self.receptance = Linear(C, C)
        self.key = Linear(C, C)
        self.value = Linear(C, C)
        self.output = Linear(C, C)
        self.gate = Linear(C, C)
        self.ln_x = nn.GroupNorm(C // c.head_size, C, eps=64e-5)

    def mix(self, x: Tensor, previous: Tensor) -> tuple[Tensor, ...]:
        """Return xr, xk, xv, xg and w, the log of minus the log of the decay; each (B, T, C)."""
        raise NotImplementedError

    def forward(
        self, x: Tensor, last: Tensor | None, wkv_state: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return y (B, T, C), the last token of x, and the new state of WKV-6."""
        B, T, C = x.shape
        N = self.head_size
        xr, xk, xv, xg, w = self.mix(x, time_shift(x, last))
        r = self.receptance(xr).view(B, T, -1, N)  # (B, T, H, N), as k, v and w
        k = self.key(xk).view(B, T, -1, N)
        v = self.value(xv).view(B, T, -1, N)
        g = self.gate(xg)  # (B, T, C)
        w = w.view(B, T, -1, N)
        y, wkv_state = wkv6(r, k, v, w, self.time_faaaa, wkv_state, self.impl)

        # self.ln_x(y), in half the time: a group is a head.
        y = F.layer_norm(y.to(x.dtype), (N,), eps=self.ln_x.eps).reshape(B, T, C)
        y = torch.addcmul(self.ln_x.bias, y, self.ln_x.weight)
        return self.output(y * F.silu(g)), x[:, -1], wkv_state


class TimeMix6(TimeMix):
    """RWKV-6: mixing and decay are a constant plus a low-rank function of the token."""

    def __init__(self, c: Config) -> None:
        super().__init__(c)
        C = c.n_embd
        self.time_maa_w = parameter(1, 1, C)
        self.time_maa_k = parameter(1, 1, C)
        self.time_maa_v = parameter(1, 1, C)
        self.time_maa_r = parameter(1, 1, C)
        self.time_maa_g = parameter(1, 1, C)
        self.time_maa_x = parameter(1, 1, C)
        self.time_maa_w1 = parameter(C, 5 * c.mix_rank)
        self.time_maa_w2 = parameter(5, c.mix_rank, C)
        self.time_decay_w1 = parameter(C, c.decay_rank)
        self.time_decay_w2 = parameter(c.decay_rank, C)
        self.time_decay = parameter(1, 1, C)
        self.time_faaaa = parameter(C // c.head_size, c.head_size)

    def mix(self, x: Tensor, previous: Tensor) -> tuple[Tensor, ...]:
        B, T, C = x.shape
        # How much of the previous token goes into each mixture. First what depends on the token:
        xxx = Mixture.apply(x, previous, self.time_maa_x)  # x + (previous - x) * time_maa_x
        xxx = torch.tanh(xxx @ self.time_maa_w1)  # (B, T, 5 * mix_rank)
        xxx = xxx.view(B * T, 5, -1).transpose(0, 1)  # (5, B * T, mix_rank)
        by_token = (xxx @ self.time_maa_w2).view(5, B, T, C)
        # Then the constant part, (5, 1, 1, C).
        constant = torch.stack(
            [self.time_maa_w, self.time_maa_k, self.time_maa_v, self.time_maa_r, self.time_maa_g]
        )
        xw, xk, xv, xr, xg = Mixture.apply(x, previous, constant + by_token).unbind()
        w = self.time_decay + torch.tanh(xw @ self.time_decay_w1) @ self.time_decay_w2
        return xr, xk, xv, xg, w


class TimeMix5(TimeMix):
    """RWKV-5: mixing and decay are constants. time_mix_* is the share of the token itself."""

    def __init__(self, c: Config) -> None:
        super().__init__(c)
        C, N = c.n_embd, c.head_size
        self.time_mix_k = parameter(1, 1, C)
        self.time_mix_v = parameter(1, 1, C)
        self.time_mix_r = parameter(1, 1, C)
        self.time_mix_g = parameter(1, 1, C)
        self.time_decay = parameter(C // N, N)
        self.time_faaaa = parameter(C // N, N)

    def mix(self, x: Tensor, previous: Tensor) -> tuple[Tensor, ...]:
        kept = torch.stack([self.time_mix_k, self.time_mix_v, self.time_mix_r, self.time_mix_g])
        xk, xv, xr, xg = Mixture.apply(x, previous, 1 - kept).unbind()
        w = self.time_decay.view(1, 1, -1).expand(x.shape)
        return xr, xk, xv, xg, w


class ChannelMix(nn.Module):
    """Mix channels: r * value(relu(key)^2), with r a gate between 0 and 1."""

    def __init__(self, c: Config, version: str) -> None:
        super().__init__()
        C = c.n_embd
        self.version = version
        if version == "x060":
            self.time_maa_k = parameter(1, 1, C)
            self.time_maa_r = parameter(1, 1, C)
        else:
            self.time_mix_k = parameter(1, 1, C)
            self.time_mix_r = parameter(1, 1, C)
        self.key = Linear(C, c.dim_ffn)
        self.receptance = Linear(C, C)
        self.value = Linear(c.dim_ffn, C)

    def forward(self, x: Tensor, last: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return y (B, T, C) and the last token of x."""
        if self.version == "x060":
            mix = torch.stack([self.time_maa_k, self.time_maa_r])  # (2, 1, 1, C)
        else:
            mix = 1 - torch.stack([self.time_mix_k, self.time_mix_r])
        xk, xr = Mixture.apply(x, time_shift(x, last), mix).unbind()
        k = SquaredReLU.apply(self.key(xk))
        r = torch.sigmoid(self.receptance(xr))
        return r * self.value(k), x[:, -1]


# ---- the model ---------------------------------------------------------------------------------


class Block(nn.Module):
    """Both residual branches, each behind its LayerNorm."""

    def __init__(self, c: Config, *, first: bool) -> None:
        super().__init__()
        self.ln1 = nn.LayerNorm(c.n_embd)
        self.ln2 = nn.LayerNorm(c.n_embd)
        if first:
            # The norm after the embedding: published checkpoints keep it in block 0.
            self.ln0 = nn.LayerNorm(c.n_embd)
        if first and c.pre_ffn:
            # RWKV-PEFT gives it RWKV-5's mixing, in RWKV-6 too.
            self.ffnPre = ChannelMix(c, "x052")
        else:
            self.att: TimeMix = TimeMix6(c) if c.version == "x060" else TimeMix5(c)
        self.ffn = ChannelMix(c, c.version)

    def forward(self, x: Tensor, state: BlockState) -> tuple[Tensor, BlockState]:
        """Return x (B, T, C) and the new state of the block."""
        return self.branches(self.ln0(x) if hasattr(self, "ln0") else x, state)

    def branches(self, x: Tensor, state: BlockState) -> tuple[Tensor, BlockState]:
        """The same without ln0: one function of x and the weights, in all blocks (fused.py)."""
        att_last, wkv_state, ffn_last = state
        if hasattr(self, "ffnPre"):
            y, att_last = self.ffnPre(self.ln1(x), att_last)
        else:
            y, att_last, wkv_state = self.att(self.ln1(x), att_last, wkv_state)
        x = x + y
        y, ffn_last = self.ffn(self.ln2(x), ffn_last)
        return x + y, (att_last, wkv_state, ffn_last)


def copy_last_tokens(state: BlockState) -> BlockState:
    """Copy the last tokens in a block's state: as views they keep whole tensors in memory."""
    att_last, wkv_state, ffn_last = state
    return att_last.clone(), wkv_state, ffn_last.clone()


class RWKV(nn.Module):
    """model(idx) -> logits; model(idx, state) -> (logits, state), from model.empty_state() on.

    idx: (B, T) int64; logits: (B, T, vocab) in the dtype of the head's product. `grad_cp = True`
    recomputes each block in the backward pass instead of keeping its activations;
    `keep_products = True` then still keeps the results of its products with frozen matrices.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.grad_cp = False
        self.keep_products = False
        emb = torch.empty(config.vocab_size, config.n_embd)
        if not emb.is_meta:  # as in Linear.reset_parameters
            emb.normal_()
        self.emb = nn.Embedding.from_pretrained(emb, freeze=False)
        self.blocks = nn.ModuleList(Block(config, first=i == 0) for i in range(config.n_layer))
        self.ln_out = nn.LayerNorm(config.n_embd)
        self.head = Linear(config.n_embd, config.vocab_size)
        if config.head_qk:
            self.head_q = Linear(config.n_embd, config.head_qk)
            self.head_k = Linear(config.n_embd, config.head_qk)

    def empty_state(self) -> State:
        """Return the state before the first token."""
        state: State = [(None, None, None)] * self.config.n_layer
        if self.config.head_qk:
            state.append(None)
        return state

    def empty_wkv_state(self, x: Tensor) -> Tensor:
        """Return WKV-6's state before the first token of x (B, T, C): zeros (B, H, N, N)."""
        B, _, C = x.shape
        N = self.config.head_size
        dtype = torch.promote_types(x.dtype, torch.float32)
        return torch.zeros(B, C // N, N, N, dtype=dtype, device=x.device)

    def state_bytes(self, B: int) -> int:
        """Return the bytes of B rows' state: WKV-6's matrices and 2 tokens a block, in float32."""
        return 4 * B * self.config.n_layer * self.config.n_embd * (2 + self.config.head_size)

    def run_block(
        self, block: nn.Module, x: Tensor, state: BlockState
    ) -> tuple[Tensor, BlockState]:
        """Run a block, without keeping its activations where grad_cp is set."""
        if not self.grad_cp or not torch.is_grad_enabled():
            return block(x, state)
        options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
        if self.keep_products:
            options["context_fn"] = matmul_cache_contexts
        return checkpoint(block, x, state, **options)

    def hidden(self, idx: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Return what the head multiplies, (B, T, C), and the new state, where one was given."""
        x = self.emb(idx).to(self.ln_out.weight.dtype)
        block_states = state
        if block_states is None:
            last = x.new_zeros(2, *x[:, 0].shape)  # made once, as the rest; no block writes to it
            block_states = [(last[0], self.empty_wkv_state(x), last[1])] * self.config.n_layer
        new_state: State = []
        for block, block_state in zip(self.blocks, block_states, strict=False):
            x, block_state = self.run_block(block, x, block_state)
            if state is not None:
                new_state.append(copy_last_tokens(block_state))
        x = self.ln_out(x)
        if self.config.head_qk:
            keys = self.head_k(x)
            if state is not None and state[-1] is not None:
                keys = torch.cat([state[-1][0], keys], 1)
                idx = torch.cat([state[-1][1], idx], 1)
            new_state.append((keys, idx))
        return x, new_state

    def forward(self, idx: Tensor, state: State | None = None) -> Tensor | tuple[Tensor, State]:
        x, new_state = self.hidden(idx, state)
        logits = self.head(x)
        if self.config.head_qk:
            # As in RWKV-LM: q k^T of each earlier token (and of this one) is added to its logit.
            keys, tokens = new_state[-1]
            scores = self.head_q(x) @ keys.mT / self.config.head_qk
            scores = scores.tril(keys.shape[1] - x.shape[1])  # (B, T, S), causal
            logits = logits.scatter_add(2, tokens[:, None].expand_as(scores), scores)
        if state is None:
            return logits
        return logits, new_state


def storage_dtype(model: RWKV, name: str, dtype: torch.dtype) -> torch.dtype:
    """Return the dtype to keep a parameter in: `dtype` for matrices, else at least float32."""
    module = model.get_submodule(name.rpartition(".")[0])
    if isinstance(module, (nn.Linear, nn.Embedding)):
        return dtype
    return torch.promote_types(dtype, torch.float32)


def init_model(
    n_layer: int,
    n_embd: int,
    vocab_size: int,
    *,
    head_size: int = 64,
    device: torch.device | str = "cpu",
    **options: Any,  # those of `sizes`
) -> RWKV:
    """Return a new float32 model, initialized as in RWKV-LM. ValueError: sizes do not fit."""
    config = sizes(n_layer, n_embd, vocab_size, head_size=head_size, **options)
    model = RWKV(config)
    initialize(model, config)
    return model.to(device)
