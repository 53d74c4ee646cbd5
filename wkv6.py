"""WKV-6, the recurrence at the heart of RWKV-6, in three forms with one interface.

Per batch element and head (head size N, 64 in every published model), decay d_t = exp(-exp(w_t)) per key channel:

    y_t = S_{t-1}^T r_t + ((u * k_t) . r_t) v_t          S: (N key, N value); S_{-1} is the given state, or 0
    S_t = diag(d_t) S_{t-1} + k_t v_t^T

For t = 0, 1, 2 from an empty state, which shows that a token is seen with its own bonus u once, and decayed ever after:

    y_0 = (r_0 . u k_0) v_0
    y_1 = (r_1 . u k_1) v_1 + (r_1 . k_0) v_0
    y_2 = (r_2 . u k_2) v_2 + (r_2 . k_1) v_1 + (r_2 . d_1 k_0) v_0

`reference`  the loop, as above. Any device, any dtype; computes in float64. The judge of the others.
`chunked`    matrix products over chunks of the sequence, plain PyTorch: any device, no compiler.
`compiled`   wkv6_op.cpp, and for GPUs wkv6_gpu.py with wkv6_cuda.cu, compiled when first needed and kept.
`fla`        the Triton operator of flash-linear-attention, where that is installed; for a GPU. (Not run here so far.)
`auto`       compiled where it can be had, else chunked, after one line that says why.

The first three are exact and finite for decays from 1e-8 to 1 - 1e-8, in the gradients too, which flow into and out of the state.
Source: Peng et al., "Eagle and Finch" (arXiv 2404.05892), section 4; the chunked form halves a chunk again and again instead
of scaling by inverse decays as usual (those overflow).
"""

import inspect

import torch
import torch.nn.functional as F

import compiled

COMPILED_HEAD_SIZES = {"cpu": (32, 64, 128)}
GPU_HEAD_SIZES = (32, 64)  # of every other device


def wkv6(r, k, v, w, u, state=None, impl="auto"):
    """Run WKV-6 over T tokens.

    r, k, v: (B, T, H, N), one dtype; w: (B, T, H, N), the log of minus the log of the decay; u: (H, N), the bonus of the
    current token; state: (B, H, N, N) float32, or None for zeros. Returns y (B, T, H, N) in the dtype of r, and the
    state after the last token, float32 (float64 where r is). Gradients flow to every argument.
    RuntimeError where impl is `compiled` and the kernel cannot be built, with the reason.
    """
    B, T, H, N = r.shape
    device = r.device.type
    if state is None:
        state = torch.zeros(
            B, H, N, N, device=r.device, dtype=torch.promote_types(r.dtype, torch.float32)
        )
    if impl == "auto":
        head_size_fits = N in COMPILED_HEAD_SIZES.get(device, GPU_HEAD_SIZES)
        fits = head_size_fits and r.dtype != torch.float64
        impl = "compiled" if fits and not kernel_problem(device) else "chunked"
    if impl == "fla":
        from fla.ops.rwkv6 import chunk_rwkv6

        layout = (
            {"head_first": False}
            if "head_first" in inspect.signature(chunk_rwkv6).parameters
            else {}
        )  # of older releases
        y, state = chunk_rwkv6(
            r,
            k,
            v,
            -torch.exp(w.float()),
            u,
            scale=1.0,
            initial_state=state,
            output_final_state=True,
            **layout,
        )
        return y.to(r.dtype), state
    if impl == "compiled":
        if problem := kernel_problem(device):
            raise RuntimeError(problem)
        if r.dtype == torch.float16 and device == "cpu":  # whose kernel does not read it
            y, state = wkv6(r.float(), k.float(), v.float(), w, u, state, impl)
            return y.half(), state
        return torch.ops.wkv6.forward(
            *(x.contiguous() for x in (r, k, v, w.float(), u.float(), state))
        )
    with torch.autocast(
        device, enabled=False
    ):  # which would do the products of a float32 state in 16 bits
        return {"reference": _reference, "chunked": _chunked}[impl](r, k, v, w, u, state)


def _reference(r, k, v, w, u, state):
    dtypes = r.dtype, state.dtype
    r, k, v, w, u, S = (x.double() for x in (r, k, v, w, u, state))
    d = torch.exp(-torch.exp(w))
    y = []
    for t in range(r.shape[1]):
        kv = k[:, t, :, :, None] * v[:, t, :, None, :]  # (B, H, N, N)
        y.append(torch.einsum("bhi,bhij->bhj", r[:, t], S + u[..., None] * kv))
        S = d[:, t, :, :, None] * S + kv
    return torch.stack(y, 1).to(dtypes[0]), S.to(dtypes[1])


def _before(x):
    """Sum of the rows before each row, along dim -2, by adding only: y_t = x_0 + ... + x_{t-1}."""
    return F.pad(x[..., :-1, :], (0, 0, 1, 0)).cumsum(-2)


def _after(x):
    """The same of the rows after each row: y_t = x_{t+1} + ... + x_{T-1}."""
    return _before(x.flip(-2)).flip(-2)


def _chunked(r, k, v, w, u, state, chunk=64):
    """Token t sees an earlier token s through the decays of s+1 .. t-1. That product is written as exp(before t) * exp(after s),
    taken from a border between s and t: both exponents are sums of logs <= 0, so nothing overflows, nothing is divided, and
    nothing cancels. Inside a chunk the border is the middle of the smallest half-half split that has s left and t right;
    all pairs of one split size are one batched matrix product. From chunk to chunk the state carries the rest."""
    T, dtypes = r.shape[1], (r.dtype, state.dtype)
    compute = torch.promote_types(r.dtype, torch.float32)
    chunk = min(chunk, 1 << (T - 1).bit_length())

    def cut(x):  # (B, T, H, N) -> (B, H, chunks, chunk, N), zeros at the end
        return F.pad(x.to(compute).transpose(1, 2), (0, 0, 0, -T % chunk)).unflatten(2, (-1, chunk))

    log_d = cut(-torch.exp(w.to(compute)))  # 0, that is decay 1, in the padding
    r, k, v, S = cut(r), cut(k), cut(v), state.to(compute)

    y = (r * k * u.to(compute)[:, None, None]).sum(-1, keepdim=True) * v
    half = 1
    while half < chunk:
        (_, r2), (k1, _), (v1, _), (log_d1, log_d2) = (
            x.unflatten(3, (-1, 2, half)).unbind(4) for x in (r, k, v, log_d)
        )
        seen = (r2 * torch.exp(_before(log_d2))) @ (
            k1 * torch.exp(_after(log_d1))
        ).mT  # (..., half, half)
        y = y + F.pad(seen @ v1, (0, 0, half, 0)).reshape(y.shape)
        half *= 2

    kv = (k * torch.exp(_after(log_d))).mT @ v  # what each chunk adds to the state
    decay = torch.exp(log_d.sum(-2))[..., None]
    states = []
    for decay_c, kv_c in zip(decay.unbind(2), kv.unbind(2)):
        states.append(S)
        S = decay_c * S + kv_c
    y = y + (r * torch.exp(_before(log_d))) @ torch.stack(states, 2)
    return y.flatten(2, 3)[:, :, :T].transpose(1, 2).to(dtypes[0]), S.to(dtypes[1])


# ---- the compiled kernel -------------------------------------------------------------------------------------------------------

LIBRARY = torch.library.Library("wkv6", "DEF")
LIBRARY.define(
    "forward(Tensor r, Tensor k, Tensor v, Tensor w, Tensor u, Tensor state) -> (Tensor, Tensor)"
)
LIBRARY.define(
    "backward(Tensor r, Tensor k, Tensor v, Tensor w, Tensor u, Tensor state, Tensor gy, Tensor gstate)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
torch.library.register_fake(
    "wkv6::forward", lambda r, k, v, w, u, state: (torch.empty_like(r), torch.empty_like(state))
)
torch.library.register_fake(
    "wkv6::backward", lambda *inputs: tuple(torch.empty_like(x) for x in inputs[:6])
)
torch.library.register_autograd(
    "wkv6::forward",
    lambda ctx, gy, gstate: torch.ops.wkv6.backward(
        *ctx.saved_tensors, gy.contiguous(), gstate.contiguous()
    ),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


@torch.compiler.assume_constant_result
def kernel_problem(device="cpu"):
    """Load the compiled kernel for a type of device, compiling it first where needed.

    Returns "" or, in one line, why it is unavailable.
    """
    try:
        compiled.load(device)
    except compiled.KernelUnavailable as error:
        return str(error)
    return ""
