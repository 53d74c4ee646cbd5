"""WKV-6, the recurrence at the heart of RWKV-6, in several forms with one interface.

Per batch element and head (head size N, 64 in every published model), with decay
d_t = exp(-exp(w_t)) per key channel and a state S of shape (N key, N value):

    y_t = S_{t-1}^T r_t + ((u * k_t) . r_t) v_t        S_{-1} is the given state, or 0
    S_t = diag(d_t) S_{t-1} + k_t v_t^T

The first three tokens from an empty state. A token is seen with its own bonus u once, and decays
from then on:

    y_0 = (r_0 . u k_0) v_0
    y_1 = (r_1 . u k_1) v_1 + (r_1 . k_0) v_0
    y_2 = (r_2 . u k_2) v_2 + (r_2 . k_1) v_1 + (r_2 . d_1 k_0) v_0

`reference`  The loop, as above. Any device, any dtype; computes in float64. Judges the others.
`chunked`    Matrix products over chunks of the sequence. Plain PyTorch: any device, no compiler.
`compiled`   wkv6_op.cpp; for GPUs wkv6_gpu.py and wkv6_cuda.cu. Compiled when first needed, kept.
`fla`        The Triton operator of flash-linear-attention, if installed. For GPUs; not tested yet.
`auto`       `compiled` if available, else `chunked`, after one line that says why.

The first three are exact and finite for decays from 1e-8 to 1 - 1e-8, and so are the gradients,
which flow into and out of the state. The usual chunked form scales by inverse decays, which
overflow; here a chunk is halved again and again instead.
Source: Peng et al., "Eagle and Finch" (arXiv 2404.05892), section 4.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import compiled

CPU_HEAD_SIZES = (32, 64, 128)  # of the compiled kernels
GPU_HEAD_SIZES = (32, 64)
CHUNK = 64  # tokens of a chunk in the chunked form


def wkv6(  # noqa: PLR0913 (the operands of the formula)
    r: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    u: Tensor,
    state: Tensor | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Run WKV-6 over T tokens.

    r, k, v: (B, T, H, N), one dtype; w: (B, T, H, N), the log of minus the log of the decay;
    u: (H, N), the bonus of the current token; state: (B, H, N, N) float32, or None for zeros.
    Returns y (B, T, H, N) in the dtype of r, and the state after the last token, float32 (float64
    if r is). Gradients flow to every argument. RuntimeError, with the reason, if impl is
    `compiled` and the kernel cannot be built.
    """
    B, _, H, N = r.shape
    device = r.device.type
    if state is None:
        dtype = torch.promote_types(r.dtype, torch.float32)
        state = torch.zeros(B, H, N, N, device=r.device, dtype=dtype)
    if impl == "auto":
        has_kernel = r.dtype != torch.float64 and not why_no_kernel(device, N)
        impl = "compiled" if has_kernel else "chunked"
    if impl == "compiled":
        return _compiled(r, k, v, w, u, state)
    if impl == "fla":
        return _fla(r, k, v, w, u, state)
    form = {"reference": _reference, "chunked": _chunked}[impl]
    # Autocast would compute the products of a float32 state in 16 bits.
    with torch.autocast(device, enabled=False):
        return form(r, k, v, w, u, state)


# ---- plain PyTorch -----------------------------------------------------------------------------


def _reference(
    r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """Run the loop, in float64."""
    y_dtype, state_dtype = r.dtype, state.dtype
    r, k, v, w, u, S = (x.double() for x in (r, k, v, w, u, state))
    d = torch.exp(-torch.exp(w))
    y = []
    for t in range(r.shape[1]):
        kv = k[:, t, :, :, None] * v[:, t, :, None, :]  # (B, H, N, N)
        y.append(torch.einsum("bhi,bhij->bhj", r[:, t], S + u[..., None] * kv))
        S = d[:, t, :, :, None] * S + kv
    return torch.stack(y, 1).to(y_dtype), S.to(state_dtype)


def _sum_before(x: Tensor) -> Tensor:
    """Sum the rows before each row, along dim -2, by adding only: x_0 + ... + x_{t-1}."""
    return F.pad(x[..., :-1, :], (0, 0, 1, 0)).cumsum(-2)


def _sum_after(x: Tensor) -> Tensor:
    """Sum the rows after each row, along dim -2, by adding only: x_{t+1} + ... + x_{T-1}."""
    return _sum_before(x.flip(-2)).flip(-2)


def _chunked(
    r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """Run matrix products over chunks, with nothing that overflows.

    Token t sees an earlier token s through the decays of s+1 .. t-1. Their product is
    exp(sum of log d from s+1 to a border) * exp(sum of log d from the border to t-1), with a border
    between s and t. Both exponents are sums of logs <= 0: nothing overflows, nothing is divided,
    and nothing cancels. Inside a chunk the border is the middle of the smallest block of
    2, 4, 8, ... tokens that has s in its left half and t in its right. All pairs of one block size
    are one batched matrix product. From chunk to chunk the state carries the rest.
    """
    T = r.shape[1]
    y_dtype, state_dtype = r.dtype, state.dtype
    dtype = torch.promote_types(r.dtype, torch.float32)
    chunk = min(CHUNK, 1 << (T - 1).bit_length())

    def cut(x: Tensor) -> Tensor:
        """Cut (B, T, H, N) into (B, H, chunks, chunk, N), with zeros at the end."""
        x = F.pad(x.to(dtype).transpose(1, 2), (0, 0, 0, -T % chunk))
        return x.unflatten(2, (-1, chunk))

    log_d = cut(-torch.exp(w.to(dtype)))  # 0 in the padding, which is decay 1
    r, k, v, S = cut(r), cut(k), cut(v), state.to(dtype)

    # Each token's view of itself, then of the tokens before it in its chunk.
    y = (r * k * u.to(dtype)[:, None, None]).sum(-1, keepdim=True) * v
    half = 1
    while half < chunk:
        y = y + _right_sees_left(r, k, v, log_d, half)
        half *= 2

    # What each chunk adds to the state, how far it decays it, and the state where each begins.
    kv = (k * torch.exp(_sum_after(log_d))).mT @ v  # (B, H, chunks, N, N)
    decay = torch.exp(log_d.sum(-2))[..., None]  # (B, H, chunks, N, 1)
    states = []
    for decay_c, kv_c in zip(decay.unbind(2), kv.unbind(2), strict=True):
        states.append(S)
        S = decay_c * S + kv_c

    # Each token's view of the chunks before its own.
    y = y + (r * torch.exp(_sum_before(log_d))) @ torch.stack(states, 2)
    y = y.flatten(2, 3)[:, :, :T].transpose(1, 2)  # (B, T, H, N)
    return y.to(y_dtype), S.to(state_dtype)


def _right_sees_left(r: Tensor, k: Tensor, v: Tensor, log_d: Tensor, half: int) -> Tensor:
    """Return what the right half of each block of 2 * half tokens sees in its left half.

    r, k, v, log_d and the result: (B, H, chunks, chunk, N).
    """

    def halves(x: Tensor) -> tuple[Tensor, ...]:
        return x.unflatten(3, (-1, 2, half)).unbind(4)  # (B, H, chunks, blocks, half, N) each

    _, r_right = halves(r)
    k_left, _ = halves(k)
    v_left, _ = halves(v)
    log_d_left, log_d_right = halves(log_d)
    queries = r_right * torch.exp(_sum_before(log_d_right))
    keys = k_left * torch.exp(_sum_after(log_d_left))
    seen = queries @ keys.mT @ v_left
    return F.pad(seen, (0, 0, half, 0)).reshape(r.shape)  # zeros for the left half


# ---- flash-linear-attention --------------------------------------------------------------------


def _fla(
    r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    from fla.ops.rwkv6 import chunk_rwkv6

    options: dict[str, Any] = {"scale": 1.0, "initial_state": state, "output_final_state": True}
    if "head_first" in inspect.signature(chunk_rwkv6).parameters:  # older releases
        options["head_first"] = False
    log_d = -torch.exp(w.float())
    y, state = chunk_rwkv6(r, k, v, log_d, u, **options)
    return y.to(r.dtype), state


# ---- the compiled kernel -----------------------------------------------------------------------

LIBRARY = torch.library.Library("wkv6", "DEF")
LIBRARY.define(
    "forward(Tensor r, Tensor k, Tensor v, Tensor w, Tensor u, Tensor state) -> (Tensor, Tensor)"
)
LIBRARY.define(
    "backward(Tensor r, Tensor k, Tensor v, Tensor w, Tensor u, Tensor state, Tensor gy,"
    " Tensor gstate) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)


@torch.library.register_fake("wkv6::forward")
def _fake_forward(*inputs: Tensor) -> tuple[Tensor, Tensor]:
    r, *_, state = inputs
    return torch.empty_like(r), torch.empty_like(state)


@torch.library.register_fake("wkv6::backward")
def _fake_backward(*tensors):
    inputs = tensors[:6]  # gy and gstate follow
    return tuple(torch.empty_like(x) for x in inputs)


def _save_inputs(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward(ctx, gy, gstate):
    gradients = gy.contiguous(), gstate.contiguous()
    return torch.ops.wkv6.backward(*ctx.saved_tensors, *gradients)


torch.library.register_autograd("wkv6::forward", _backward, setup_context=_save_inputs)


def _compiled(
    r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    problem = kernel_problem(r.device.type)
    if problem:
        raise RuntimeError(problem)
    y_dtype = r.dtype
    if y_dtype == torch.float16 and r.device.type == "cpu":  # which the CPU's kernel does not read
        r, k, v = r.float(), k.float(), v.float()
    tensors = (x.contiguous() for x in (r, k, v, w.float(), u.float(), state))
    y, state = torch.ops.wkv6.forward(*tensors)
    return y.to(y_dtype), state


def why_no_kernel(device: str, head_size: int) -> str:
    """Return why heads of a size run without the compiled kernel; "" where it is there for them."""
    if head_size not in (CPU_HEAD_SIZES if device == "cpu" else GPU_HEAD_SIZES):
        return f"the WKV-6 kernel is not made for heads of {head_size}"
    return kernel_problem(device)


def kernel_problem(device: str = "cpu") -> str:
    """Load the compiled kernel for a type of device, compiling it first where needed.

    Returns "" or, in one line, why it is unavailable.
    """
    try:
        compiled.load(device)
    except compiled.KernelUnavailable as error:
        return str(error)
    return ""


# torch.compile calls it while it traces, and takes the answer for a constant. This line is what
# torch.compiler.assume_constant_result does, without its import of torch._dynamo: a second and
# 100 MB at every start.
kernel_problem._dynamo_marked_constant = True  # type: ignore[attr-defined]
