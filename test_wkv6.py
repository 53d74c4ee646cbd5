"""WKV-6: every form gives the numbers of the float64 loop, in every regime of decay.

And a build that fails never stops a run.
"""

import functools
import math
import os
import pathlib
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import wkv6
from conftest import exhaustive
from wkv6 import CPU_HEAD_SIZES, kernel_problem

NAMES = ("y", "state", "gr", "gk", "gv", "gw", "gu", "gstate")
HERE = pathlib.Path(__file__).parent


def inputs(B, T, H, N, decay=None, seed=0):
    """r, k, v, w, u, state in float64, each a float32 number.

    decay: one value, or None for a mixture from 1e-8 to 1 - 1e-8.
    """
    g = torch.Generator().manual_seed(seed)
    r, k, v = (torch.randn(B, T, H, N, generator=g) for _ in range(3))
    low, high = (math.log(-math.log(d)) for d in (1e-8, 1 - 1e-8))
    w = torch.rand(B, T, H, N, generator=g) * (high - low) + low
    if decay is not None:
        noise = torch.randn(B, T, H, N, generator=g)
        w = torch.full_like(w, math.log(-math.log(decay))) + 0.05 * noise
    u = torch.randn(H, N, generator=g)
    state = torch.randn(B, H, N, N, generator=g)
    return [x.double() for x in (r, k, v, w, u, state)]


def run(tensors, impl, dtype):
    """y, state and the gradients of every input under one fixed random output gradient."""
    wide = torch.promote_types(dtype, torch.float32)
    dtypes = [dtype, dtype, dtype, wide, wide, wide]
    leaves = [x.to(t).requires_grad_() for x, t in zip(tensors, dtypes, strict=True)]
    y, state = wkv6.wkv6(*leaves, impl=impl)
    g = torch.Generator().manual_seed(1)
    gy, gstate = (torch.randn(x.shape, generator=g).to(x) for x in (y, state))
    return [y, state, *torch.autograd.grad([y, state], leaves, [gy, gstate])]


def check(tensors, impl, dtype, bound, exact=None):
    if impl == "compiled" and kernel_problem():
        pytest.skip(kernel_problem())
    if dtype != torch.float32:  # the loop sees the rounded inputs, so that only the form is judged
        tensors = [x.to(dtype).double() if i < 3 else x for i, x in enumerate(tensors)]
    if exact is None:
        exact = run(tensors, "reference", torch.float64)
    found = run(tensors, impl, dtype)
    for name, ours, theirs in zip(NAMES, found, exact, strict=True):
        assert ours.isfinite().all(), name
        error = ((ours.double() - theirs).norm() / theirs.norm().clamp_min(1e-30)).item()
        assert error <= bound, f"{name}: relative error {error:.1e}"


@functools.cache
def float64_loop(T, decay):
    return run(inputs(1, T, 1, 64, decay), "reference", torch.float64)


@pytest.mark.parametrize("decay", [None, 1e-8, 0.5, 0.99, 1 - 1e-8])
@pytest.mark.parametrize("T", [1, 2, 31, 65, 1000, exhaustive(3000)])
@pytest.mark.parametrize("impl", ["reference", "chunked", "compiled"])
def test_all_forms_agree_with_the_float64_loop(impl, T, decay):
    check(inputs(1, T, 1, 64, decay), impl, torch.float32, 1e-5, float64_loop(T, decay))


@pytest.mark.parametrize("N", CPU_HEAD_SIZES)
@pytest.mark.parametrize("impl", ["chunked", "compiled"])
def test_batches_heads_and_head_sizes(impl, N):
    check(inputs(3, 37, 2, N), impl, torch.float32, 1e-5)


# Half a step is 2e-3, and 2.4e-4.
@pytest.mark.parametrize("dtype, bound", [(torch.bfloat16, 4e-3), (torch.float16, 5e-4)])
@pytest.mark.parametrize("impl", ["chunked", "compiled", "auto"])
def test_inputs_of_16_bits_are_accumulated_in_float32(impl, dtype, bound):
    check(inputs(2, 300, 2, 64), impl, dtype, bound)


@pytest.mark.parametrize("impl", ["chunked", "reference"])
def test_autocast_changes_nothing(impl):
    """Otherwise the chunked form's products would be in bfloat16: 2e-3 off, where it is 1e-7."""
    tensors = [
        x.to(torch.bfloat16 if i < 3 else torch.float32)
        for i, x in enumerate(inputs(1, 100, 2, 64))
    ]
    plain = wkv6.wkv6(*tensors, impl=impl)
    with torch.autocast("cpu", torch.bfloat16):
        inside = wkv6.wkv6(*tensors, impl=impl)
    assert all(map(torch.equal, plain, inside))


@pytest.mark.parametrize("old", [False, True])
def test_fla_s_operator_is_called_by_its_definition(monkeypatch, old):
    """In its place stands the definition that flash-linear-attention documents.

    w is the log of the decay, scale a factor of r. In older releases head_first has to be False.
    """

    # The parameters are those of the operator.
    def chunk_rwkv6_old(r, k, v, w, u, head_first=True, **options):
        assert not head_first
        return chunk_rwkv6(r, k, v, w, u, **options)

    def chunk_rwkv6(r, k, v, w, u, scale, initial_state, output_final_state):  # noqa: PLR0913
        y, state = [], initial_state
        for t in range(r.shape[1]):
            kv = k[:, t, ..., None] * v[:, t, ..., None, :]
            y.append(((state + u[..., None] * kv) * (r[:, t] * scale)[..., None]).sum(-2))
            state = state * w[:, t].exp()[..., None] + kv
        return torch.stack(y, 1), state if output_final_state else None

    operator = chunk_rwkv6_old if old else chunk_rwkv6
    module = SimpleNamespace(chunk_rwkv6=operator)
    monkeypatch.setitem(sys.modules, "fla.ops.rwkv6", module)
    check(inputs(2, 20, 2, 32), "fla", torch.float32, 1e-5)


@pytest.mark.parametrize("impl", ["reference", "chunked", "compiled"])
def test_a_sequence_in_two_pieces_is_the_sequence(impl):
    if impl == "compiled" and kernel_problem():
        pytest.skip(kernel_problem())
    *rkvw, u, state = (x.float() for x in inputs(2, 50, 2, 64))
    whole, last = wkv6.wkv6(*rkvw, u, state, impl=impl)
    first, middle = wkv6.wkv6(*(x[:, :23] for x in rkvw), u, state, impl=impl)
    second, end = wkv6.wkv6(*(x[:, 23:] for x in rkvw), u, middle, impl=impl)
    torch.testing.assert_close(torch.cat([first, second], 1), whole, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(end, last, rtol=1e-4, atol=1e-4)


def test_the_formula_of_the_docstring():
    r, k, v, w, u, _ = (x[..., :1, :] if x.ndim == 4 else x for x in inputs(1, 3, 1, 8, 0.5))
    d = torch.exp(-torch.exp(w))
    (r0, r1, r2), (k0, k1, k2), (v0, v1, v2), (_, d1, _) = (x[0, :, 0] for x in (r, k, v, d))
    u = u[0]
    expected = torch.stack(
        [
            (r0 @ (u * k0)) * v0,
            (r1 @ (u * k1)) * v1 + (r1 @ k0) * v0,
            (r2 @ (u * k2)) * v2 + (r2 @ k1) * v1 + (r2 @ (d1 * k0)) * v0,
        ]
    )
    for impl in ("reference", "chunked"):
        torch.testing.assert_close(wkv6.wkv6(r, k, v, w, u[None], impl=impl)[0][0, :, 0], expected)


def test_gradcheck_of_the_reference():
    leaves = [x.requires_grad_() for x in inputs(1, 4, 2, 3, 0.7)]
    assert torch.autograd.gradcheck(lambda *x: wkv6.wkv6(*x, impl="reference"), leaves)


def test_opcheck_of_the_compiled_operators():
    if kernel_problem():
        pytest.skip(kernel_problem())
    for dtype in (torch.float32, torch.bfloat16):
        r, k, v, w, u, state = (x.float() for x in inputs(1, 5, 2, 32, 0.9))
        r, k, v = (x.to(dtype).requires_grad_() for x in (r, k, v))
        for x in (w, u, state):
            x.requires_grad_()
        torch.library.opcheck(torch.ops.wkv6.forward.default, (r, k, v, w, u, state))
        without_graph = tuple(x.detach() for x in (r, k, v, w, u, state, r, state))
        torch.library.opcheck(torch.ops.wkv6.backward.default, without_graph)


@pytest.mark.parametrize("impl", ["chunked", "compiled", "auto"])
def test_torch_compile_takes_it_whole(impl):
    if impl == "compiled" and kernel_problem():
        pytest.skip(kernel_problem())
    leaves = [x.float().requires_grad_() for x in inputs(1, 20, 1, 64, 0.9)]

    def plain(*tensors):
        return wkv6.wkv6(*tensors, impl=impl)[0].sin().sum()

    compiled = torch.compile(plain, fullgraph=True, backend="aot_eager")
    found = torch.autograd.grad(compiled(*leaves), leaves)
    expected = torch.autograd.grad(plain(*leaves), leaves)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_importing_the_model_does_not_import_the_compiler():
    """torch._dynamo takes a second and 100 MB at every start."""
    script = "import sys, rwkv6; sys.exit('torch._dynamo' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], cwd=HERE).returncode == 0


def test_wrong_shapes_are_refused():
    if kernel_problem():
        pytest.skip(kernel_problem())
    r, k, v, w, u, state = (x.float() for x in inputs(1, 5, 2, 32))
    for bad in (
        [r, k[:, :4], v, w, u, state],
        [r, k, v, w, u[:1], state],
        [r, k, v, w, u, state.double()],
        [r, k.bfloat16(), v, w, u, state],
    ):
        with pytest.raises(RuntimeError, match="wkv6"):
            wkv6.wkv6(*bad, impl="compiled")


# ---- the build -----------------------------------------------------------------------------------

TRY = """
import torch, wkv6
r = torch.zeros(1, 2, 1, 32)
wkv6.wkv6(r, r, r, r, torch.zeros(1, 32))
print(wkv6.kernel_problem() or 'compiled')
"""


def build(tmp_path, script=TRY, **environment):
    """Run one WKV in a fresh process with an empty kernel cache."""
    env = {**os.environ, "TORCH_EXTENSIONS_DIR": str(tmp_path), **environment}
    return subprocess.Popen(
        [sys.executable, "-c", script],
        cwd=HERE,
        env=env,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


@pytest.mark.parametrize("trouble", ["no compiler", "broken compiler", "folder is a file"])
def test_a_build_that_fails_says_so_in_one_line_and_the_chunked_form_takes_over(tmp_path, trouble):
    environment = {}
    if trouble == "no compiler":
        environment = {"CXX": "no-such-compiler"}
    elif trouble == "broken compiler":
        fake = tmp_path / "fake-c++"
        fake.write_text("#!/bin/sh\necho broken >&2\nexit 1\n")
        fake.chmod(0o755)
        environment = {"CXX": str(fake)}
    else:
        (tmp_path / "wkv6").write_text("")
    process = build(tmp_path, **environment)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0 and "is unavailable" in out
    # PyTorch may warn, too.
    notes = [line for line in err.splitlines() if line.startswith("note: ")]
    assert len(notes) == 1 and "chunked form" in notes[0], err
    assert "Traceback" not in err


def test_missing_ninja_says_so(tmp_path):
    (tmp_path / "ninja.py").write_text("raise ImportError('no ninja here')")
    process = build(tmp_path / "cache", PYTHONPATH=str(tmp_path))
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0 and "pip install ninja" in err


@pytest.mark.exhaustive
def test_a_second_process_waits_and_a_killed_build_leaves_nothing_to_wait_for(tmp_path):
    if kernel_problem():
        pytest.skip(kernel_problem())
    import time

    killed = build(tmp_path)
    while not list(tmp_path.glob("wkv6/tmp*/build.ninja")):
        assert killed.poll() is None
        time.sleep(0.1)
    killed.kill()
    first, second = build(tmp_path), build(tmp_path)
    for process in (first, second):
        out, err = process.communicate(timeout=300)
        assert out.strip().endswith("compiled"), err
    assert len(list(tmp_path.glob("wkv6/*.so"))) == 1
