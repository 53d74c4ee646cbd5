"""The CUDA kernels of WKV-6, on a machine without a GPU.

Their source is run on the CPU, where cuda_on_cpu.h plays the GPU. And it is compiled for every
architecture in use, by NVRTC, and by nvcc where that is. With a GPU the kernels run there too.
"""

import ctypes
import functools
import math
import multiprocessing.pool
import os
import pathlib
import re
import shutil
import subprocess
import sys
import types

import pytest
import torch
from torch.utils import cpp_extension

import compiled
import nvrtc
import wkv6
import wkv6_gpu
from conftest import exhaustive
from test_wkv6 import NAMES, inputs, run

HERE = pathlib.Path(__file__).parent
SOURCE = (HERE / "wkv6_cuda.cu").read_text()
NVCC = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
ON_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
EMULATED_CU = """
#include "cuda_on_cpu.h"
#include "wkv6_cuda.cu"
namespace wkv6_gpu {
Four shared_memory[emulator::SHARED_LIMIT / sizeof(Four)];
static const bool set = (emulator::shared = reinterpret_cast<char*>(shared_memory), true);
}
extern "C" const int64_t emulator_sizes_of_shared[] = {
    sizeof(wkv6_gpu::Shared<32>), sizeof(wkv6_gpu::Shared<64>)};
"""


class Emulator:
    """wkv6_gpu.py, wkv6_cuda.cu and wkv6_cuda_op.cpp, unchanged, for CPU tensors."""

    def __init__(self, folder):
        (folder / "c10/cuda").mkdir(parents=True)
        for header in ("CUDAException", "CUDAGuard", "CUDAStream"):
            (folder / f"c10/cuda/{header}.h").write_text('#include "cuda_on_cpu.h"\n')
        (folder / "emulated.cpp").write_text(EMULATED_CU)
        sources = [str(folder / "emulated.cpp"), str(HERE / "wkv6_cuda_op.cpp")]
        # -O1: at -O2 GCC 12 vectorizes one of the sums wrongly
        flags = ["-O1", "-U_FORTIFY_SOURCE", "-Wno-unknown-pragmas", "-Dwkv6=wkv6_emulated"]
        with pytest.MonkeyPatch.context() as patch:
            import ninja

            patch.setenv("PATH", f"{os.environ.get('PATH', os.defpath)}{os.pathsep}{ninja.BIN_DIR}")
            cpp_extension.load(
                "emulated",
                sources,
                build_directory=str(folder),
                is_python_module=False,
                extra_cflags=flags,
                extra_include_paths=[str(folder), str(HERE)],
            )
        self.library = ctypes.CDLL(str(folder / "emulated.so"))
        self.launch = self.launch_of_library = torch.ops.wkv6_emulated.launch.default

    def sizes_of_shared(self):
        """The bytes of Shared<N> in wkv6_cuda.cu, by head size."""
        sizes = (ctypes.c_int64 * 2).in_dll(self.library, "emulator_sizes_of_shared")
        return dict(zip((32, 64), sizes, strict=True))

    def set(self, chunk=64, order=0, skipped_barrier=0):
        wkv6_gpu.CHUNK = chunk
        ctypes.c_int.in_dll(self.library, "emulator_order").value = order
        ctypes.c_int.in_dll(self.library, "emulator_skipped_barrier").value = skipped_barrier

    def counted(self, name, *tensors):
        """Run an operator, and count.

        Returns MB loaded, MB stored, the number of blocks of each launch, and the most shared
        memory of one.
        """
        names = ("loaded", "stored", "launches", "shared_bytes")
        counters = [ctypes.c_int64.in_dll(self.library, f"emulator_{what}") for what in names]
        for counter in counters:
            counter.value = 0
        self(name, *tensors)
        loaded, stored, launches, shared_bytes = (counter.value for counter in counters)
        blocks = (ctypes.c_int64 * 16).in_dll(self.library, "emulator_blocks")
        return loaded / 1e6, stored / 1e6, list(blocks)[:launches], shared_bytes

    def __call__(self, name, *tensors):
        """Call wkv6_gpu.forward or backward, with NaN in what it makes before it writes there."""
        function = getattr(wkv6_gpu, name)
        inputs, gradients = wkv6_gpu.Inputs(*tensors[:6]), tensors[6:]
        torch.use_deterministic_algorithms(True)  # under which PyTorch fills what is empty
        try:
            return function(self.launch, inputs, *gradients)
        finally:
            torch.use_deterministic_algorithms(False)

    def run(self, tensors):
        """y, state and the gradients of every input, as test_wkv6.run has them."""
        y, state = self("forward", *tensors)
        g = torch.Generator().manual_seed(1)
        gy, gstate = (torch.randn(x.shape, generator=g).to(x.dtype) for x in (y, state))
        return [y, state, *self("backward", *tensors, gy, gstate)]


@pytest.fixture(scope="module")
def emulator(tmp_path_factory):
    if sys.platform == "win32" or not shutil.which(os.environ.get("CXX", "c++")):
        pytest.skip("no C++ compiler to read the kernels with")
    return Emulator(tmp_path_factory.mktemp("emulator"))


@pytest.fixture(
    params=[
        "emulated",
        pytest.param("on a GPU", marks=ON_GPU),
        pytest.param("on a GPU, by NVRTC", marks=ON_GPU),
    ]
)
def kernels(request):
    """A function of tensors and dtype: y, state and the gradients of every input."""
    if request.param == "emulated":
        emulator = request.getfixturevalue("emulator")
        emulator.set()
        return lambda tensors, dtype: emulator.run(converted(tensors, dtype))
    wkv6_gpu.CHUNK = 64
    assert not wkv6.kernel_problem("cuda")
    if request.param == "on a GPU, by NVRTC":
        if torch.version.hip:
            pytest.skip("NVRTC is NVIDIA's")
        wkv6_gpu.register(compiled._launch_of_nvrtc(), "CUDA")
    else:
        wkv6_gpu.register(compiled._find_launch(), "CUDA")
    return lambda tensors, dtype: [
        x.cpu() for x in run([x.cuda() for x in tensors], "compiled", dtype)
    ]


def converted(tensors, dtype):
    return [x.to(dtype if i < 3 else torch.float32) for i, x in enumerate(tensors)]


@functools.cache
def float64_loop(shape, decay, dtype):
    """The inputs as the kernel sees them, and what the loop makes of them."""
    tensors = [x.double() for x in converted(inputs(*shape, decay), dtype)]
    return tensors, run(tensors, "reference", torch.float64)


def check(kernels, shape, decay, dtype, bound):
    tensors, expected = float64_loop(shape, decay, dtype)
    for name, ours, exact in zip(NAMES, kernels(tensors, dtype), expected, strict=True):
        error = ((ours.double() - exact).norm() / exact.norm().clamp_min(1e-30)).item()
        print(f"{name}: {error:.1e}")
        assert error <= bound, f"{name}: relative error {error:.1e}"  # false for NaN


# ---- the numbers ---------------------------------------------------------------------------------


@pytest.mark.parametrize("decay", [None, 1e-8, 0.5, 0.99, 1 - 1e-8])
@pytest.mark.parametrize("T", [1, 2, 15, 16, 17, 64, 65, 300, exhaustive(3000)])
def test_every_output_is_that_of_the_float64_loop(kernels, T, decay):
    check(kernels, (1, T, 1, 64), decay, torch.float32, 1e-5)


def test_decays_of_exactly_0_and_1(kernels):
    tensors = [x.clone() for x in float64_loop((2, 70, 1, 64), None, torch.float32)[0]]
    some = torch.tensor([-200.0, -1.0, 5.0, 80.0], dtype=torch.float64)
    chosen = torch.randint(4, tensors[3].shape, generator=torch.Generator().manual_seed(0))
    tensors[3] = some[chosen]
    found = kernels(tensors, torch.float32)
    expected = run(tensors, "reference", torch.float64)
    for name, ours, exact in zip(NAMES, found, expected, strict=True):
        assert (ours.double() - exact).norm() <= 1e-5 * exact.norm(), name


@pytest.mark.parametrize("shape", [(3, 37, 2, 64), (2, 130, 3, 32)])
@pytest.mark.parametrize(
    "dtype, bound",
    [
        (torch.float32, 1e-5),
        (torch.bfloat16, 4e-3),  # half a step is 2e-3
        (torch.float16, 5e-4),  # half a step is 2.4e-4
    ],
)
def test_batches_heads_head_sizes_and_inputs_of_16_bits(kernels, shape, dtype, bound):
    check(kernels, shape, None, dtype, bound)


@pytest.mark.parametrize("chunk", [16, 32, 50, 128, 1024])
@pytest.mark.parametrize("T", [16, 100, 500])
def test_any_chunk_size_will_do(emulator, T, chunk):
    emulator.set(chunk=chunk)

    def kernels(tensors, dtype):
        return emulator.run(converted(tensors, dtype))

    check(kernels, (1, T, 2, 64), 0.9, torch.float32, 1e-5)


@pytest.mark.exhaustive
def test_thousands_of_decays_near_1_do_not_drift(emulator):
    """exp of a chunk's log decay is off by up to 3e-8, always the same way if chunks are alike.

    Without the scan's correction that would be 1.3e-5 after 1875 of them.
    """
    emulator.set(chunk=16)
    g = torch.Generator().manual_seed(0)
    r, k, v = (torch.randn(1, 30000, 1, 64, generator=g) for _ in range(3))
    w = torch.linspace(math.log(1e-7), math.log(1e-4), 64).expand(r.shape).contiguous()
    tensors = [r, k, v, w, torch.zeros(1, 64), torch.randn(1, 1, 64, 64, generator=g)]
    found = emulator("forward", *tensors)
    expected = wkv6.wkv6(*(x.double() for x in tensors), impl="chunked")
    for ours, exact in zip(found, expected, strict=True):
        assert (ours - exact).norm() <= 3e-6 * exact.norm()


@ON_GPU
def test_the_same_bits_in_every_run(kernels):
    tensors, _ = float64_loop((3, 300, 5, 64), None, torch.bfloat16)
    first, second = kernels(tensors, torch.bfloat16), kernels(tensors, torch.bfloat16)
    assert all(map(torch.equal, first, second))


# ---- what a GPU may do that a loop does not ------------------------------------------------------


def outputs(emulator, T=100, **settings):
    emulator.set(**settings)
    try:
        return emulator.run(converted(inputs(2, T, 2, 64), torch.bfloat16))
    except RuntimeError as error:
        return str(error)


def differ(a, b):
    return isinstance(b, str) or not all(map(torch.equal, a, b))


@pytest.mark.parametrize("order", range(1, 6))
def test_threads_warps_and_blocks_may_run_in_any_order(emulator, order):
    assert not differ(outputs(emulator), outputs(emulator, order=order))


BARRIERS = [n for n, line in enumerate(SOURCE.splitlines(), 1) if "__syncthreads()" in line]


@pytest.mark.parametrize("line", BARRIERS)
def test_a_missing_barrier_is_found_out(emulator, line):
    """Every barrier is needed, and the test above would fail without it."""
    right = outputs(emulator)
    assert not differ(right, outputs(emulator))
    found = (outputs(emulator, order=order, skipped_barrier=line) for order in range(6))
    assert any(differ(right, wrong) for wrong in found)


def test_what_does_not_fit_the_kernels_is_refused(emulator):
    r, k, v, w, u, state = converted(inputs(1, 5, 2, 64), torch.bfloat16)
    narrow = [x[..., :48].contiguous() for x in (r, k, v, w, u)]
    for bad, words in (
        ([r, k[:, :4], v, w, u, state], "one shape"),
        ([r, k, v, w, u[:1], state], "u must be"),
        ([r, k, v, w.double(), u, state], "float32"),
        ([r, k.float(), v, w, u, state], "one dtype"),
        ([r.double(), k.double(), v.double(), w, u, state], "float64"),
        ([r.mT.contiguous().mT, k, v, w, u, state], "contiguous"),
        ([r, k.to("meta"), v, w, u, state], "meta"),
        ([r, k, v, w, u, torch.zeros(8193)[1:].view(state.shape)], "aligned"),
        ([*(x[:, :0] for x in (r, k, v, w)), u, state], "empty"),
        ([*narrow, state[..., :48, :48].contiguous()], "head size 48"),
    ):
        with pytest.raises(RuntimeError, match=f"wkv6: .*{words}"):
            emulator("forward", *bad)


# ---- the launches --------------------------------------------------------------------------------

ARCHITECTURES = (75, 80, 86, 89, 90, 120)


@functools.cache
def cubin(capability):
    """What NVRTC makes of the source, and what it says; skips where there is no NVRTC."""
    try:
        nvrtc._load_nvrtc()
    except RuntimeError as error:
        pytest.skip(str(error))
    return nvrtc.compile_kernels(SOURCE, wkv6_gpu.kernel_names(), str(capability))


@pytest.fixture
def nvrtc_launch(emulator, monkeypatch):
    """The launches of nvrtc.py, with the emulator in the place of the GPU's driver."""
    current = types.SimpleNamespace(cuda_stream=0)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda gpu: current)
    return nvrtc.Launcher(emulator.library, lambda gpu: cubin(86)[0])


@pytest.mark.parametrize(
    "capability", [arch if arch == 90 else exhaustive(arch) for arch in ARCHITECTURES]
)
def test_nvrtc_compiles_every_kernel_without_a_warning_or_a_header_file(capability):
    (code, symbols), words = cubin(capability)
    assert words == ""
    assert list(symbols) == wkv6_gpu.kernel_names()
    for symbol in symbols.values():
        assert symbol.encode() in code


@pytest.mark.parametrize("N", wkv6_gpu.HEAD_SIZES)
@pytest.mark.parametrize("dtype", wkv6_gpu.SCALARS)
def test_the_launches_of_nvrtc_and_of_the_library_give_the_same_bits(
    emulator, nvrtc_launch, monkeypatch, dtype, N
):
    emulator.set()
    tensors = converted(inputs(2, 100, 3, N), dtype)
    expected = emulator.run(tensors)
    monkeypatch.setattr(emulator, "launch", nvrtc_launch)
    assert not differ(expected, emulator.run(tensors))
    assert ctypes.c_int.in_dll(emulator.library, "emulator_contexts").value == 0


def test_a_launch_that_fails_says_so(emulator, nvrtc_launch):
    tensor = torch.zeros(4)
    for launch in (emulator.launch, nvrtc_launch):
        with pytest.raises(RuntimeError, match="no such grid"):
            launch("scan<64>", (1, 70000, 1), 128, 0, [tensor] * 4, [1, 0])
    assert ctypes.c_int.in_dll(emulator.library, "emulator_contexts").value == 0
    with pytest.raises(RuntimeError, match="no kernel scan<48>"):
        emulator.launch("scan<48>", (1, 1, 1), 128, 0, [tensor] * 4, [1, 0])


def test_every_kernel_is_launched_and_no_other(emulator, monkeypatch):
    emulator.set()
    launched = set()

    def launch(kernel, *arguments):
        launched.add(kernel)
        emulator.launch_of_library(kernel, *arguments)

    monkeypatch.setattr(emulator, "launch", launch)
    for dtype in wkv6_gpu.SCALARS:
        for N in wkv6_gpu.HEAD_SIZES:
            emulator.run(converted(inputs(1, 2, 1, N), dtype))
    assert sorted(launched) == sorted(wkv6_gpu.kernel_names())


def test_a_block_gets_the_shared_memory_that_it_uses(emulator):
    assert emulator.sizes_of_shared() == {N: wkv6_gpu.shared_bytes(N) for N in wkv6_gpu.HEAD_SIZES}


def test_the_operators_can_be_had_for_other_devices(emulator):
    """Registered for PrivateUse1, and once more, they are called with its dispatch key."""
    emulator.set()
    tensors = converted(inputs(1, 20, 2, 32), torch.bfloat16)
    key = torch._C.DispatchKeySet(torch._C.DispatchKey.PrivateUse1)
    for _ in range(2):
        wkv6_gpu.register(emulator.launch, "PrivateUse1")
        y, state = torch.ops.wkv6.forward.default.redispatch(key, *tensors)
        gradients = torch.ops.wkv6.backward.default.redispatch(key, *tensors, y, state)
    expected = emulator("forward", *tensors)
    assert not differ(
        [*expected, *emulator("backward", *tensors, *expected)], [y, state, *gradients]
    )


def test_autocast_changes_nothing(emulator):
    expected = outputs(emulator)
    with torch.autocast("cpu", torch.bfloat16):
        assert not differ(expected, outputs(emulator))


# ---- what NVRTC has no header files for ----------------------------------------------------------

CONVERT = r"""
#include <cstring>
#define __device__
static unsigned __float_as_uint(float x) { unsigned y; std::memcpy(&y, &x, 4); return y; }
static float __uint_as_float(unsigned x) { float y; std::memcpy(&y, &x, 4); return y; }
@types@
extern "C" void narrow(const float* x, bfloat16* y, int n) {
  for (int i = 0; i < n; i++) y[i] = bfloat16(x[i]);
}
extern "C" void widen(const bfloat16* x, float* y, int n) {
  for (int i = 0; i < n; i++) y[i] = x[i];
}
"""


def test_bfloat16_under_nvrtc_is_that_of_pytorch(emulator, tmp_path):
    """Every bfloat16; and the floats near each, at its ties, and beyond the largest; and NaN."""
    own_types = SOURCE.partition("#ifdef __CUDACC_RTC__")[2].partition("struct float16")[0]
    own_types = own_types.partition("\n")[2]
    (tmp_path / "convert.cpp").write_text(CONVERT.replace("@types@", own_types))
    library, compiler = tmp_path / "convert.so", os.environ.get("CXX", "c++")
    flags = ["-shared", "-fPIC", "-O1", "-Dint64_t=other_int64_t"]
    subprocess.run([compiler, *flags, tmp_path / "convert.cpp", "-o", library], check=True)
    convert = ctypes.CDLL(str(library))

    def call(name, x, dtype):
        y = torch.empty(x.shape, dtype=dtype)
        pointers = [ctypes.c_void_p(x.data_ptr()), ctypes.c_void_p(y.data_ptr())]
        getattr(convert, name)(*pointers, x.numel())
        return y

    every = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int16)
    widened = call("widen", every.view(torch.bfloat16), torch.float32)
    assert torch.equal(widened.view(torch.int32), every.int() << 16)

    low_halves = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], dtype=torch.int32)
    floats = ((every.int() << 16)[:, None] + low_halves).flatten().view(torch.float32)
    ours, expected = call("narrow", floats, torch.bfloat16), floats.bfloat16()
    numbers = ~floats.isnan()
    assert torch.equal(ours[numbers].view(torch.int16), expected[numbers].view(torch.int16))
    assert ours[~numbers].isnan().all() and numbers.sum() < len(floats)


def test_float16_under_nvrtc_is_converted_by_the_gpu_s_own_instructions():
    """To the nearest, ties to even: .rn. That each converts the right way the assembler sees to."""
    own_types = SOURCE.partition("#ifdef __CUDACC_RTC__")[2].partition("#else")[0]
    statements = re.findall(r'asm\("(.*?);', own_types)
    assert statements == ["cvt.rn.f16.f32 %0, %1", "cvt.f32.f16 %0, %1"]


# ---- what the head comment says ------------------------------------------------------------------


@pytest.mark.exhaustive
@pytest.mark.parametrize("heads, model", [(32, "1.6B"), (64, "7B")])
def test_the_counts_of_the_head_comment(emulator, heads, model):
    emulator.set()
    tensors = converted(inputs(1, 1024, heads, 64, 0.9), torch.bfloat16)
    for name, more in (("forward", []), ("backward", [tensors[2], tensors[5]])):
        row = rf"// +{model} +{name} +(\d+) +([\d.]+) +([\d.]+)"
        blocks, loaded, stored = re.search(row, SOURCE).groups()
        mb_loaded, mb_stored, launched, shared_bytes = emulator.counted(name, *tensors, *more)
        assert f"{mb_loaded:.1f} {mb_stored:.1f}" == f"{loaded} {stored}"
        assert {launched[0], *launched[2::2], launched[-1]} == {int(blocks)}
        assert min(launched) >= 256
        assert shared_bytes <= 48 << 10


# ---- nvcc ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ptxas(tmp_path_factory):
    """{(architecture, kernel): (registers, bytes of stack, of spills)}, without a warning."""
    if not NVCC:
        pytest.skip("no nvcc here: the kernels were read as C++, but not compiled for a GPU")
    folder = tmp_path_factory.mktemp("nvcc")
    supported = subprocess.check_output([NVCC, "--list-gpu-arch"], text=True)
    architectures = [arch for arch in ARCHITECTURES if f"compute_{arch}\n" in supported]
    assert architectures
    with multiprocessing.pool.ThreadPool(os.cpu_count()) as pool:
        reports = pool.starmap(nvcc_report, [(arch, folder) for arch in architectures])
    table = {}
    for arch, report in zip(architectures, reports, strict=True):
        for kernel, numbers in kernels_of_report(report):
            table[arch, kernel] = numbers
    return table


def nvcc_report(arch, folder):
    """Compile for an architecture. Returns what ptxas says of each kernel."""
    command = [
        NVCC,
        "-std=c++17",
        "-O3",
        "-Werror=all-warnings",
        "-Xptxas=-v",
        "-Xcompiler=-Wall,-Wno-unknown-pragmas",
        *cpp_extension.COMMON_NVCC_FLAGS,
        *(f"-I{path}" for path in cpp_extension.include_paths()),
        f"-gencode=arch=compute_{arch},code=sm_{arch}",
        *("-c", "wkv6_cuda.cu", "-o", str(folder / f"{arch}.o")),
    ]
    process = subprocess.run(command, cwd=HERE, text=True, stderr=subprocess.PIPE)
    assert process.returncode == 0, process.stderr
    assert "warning" not in process.stderr, process.stderr
    return process.stderr


def kernels_of_report(report):
    """Yield ((kernel, dtype, N), (registers, bytes of stack, of spills))."""
    names = "chunk_states|scan|along_values|along_keys"
    kernel = re.compile(rf"({names})I(?:(?:N3c10\d)?(f|BFloat16|Half)E?)?.*?Li(\d+)E")
    memory = re.compile(
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
    )
    registers = re.compile(r"Used (\d+) registers")
    for part in report.split("Compiling entry function")[1:]:
        stack, stores, loads = map(int, memory.search(part).groups())
        numbers = (int(registers.search(part)[1]), stack, stores + loads)
        yield kernel.search(part).groups(), numbers


@pytest.mark.exhaustive
def test_ptxas_keeps_everything_in_registers(ptxas):
    for (arch, (kernel, dtype, N)), (registers, stack, spills) in ptxas.items():
        print(
            f"sm_{arch:<4} {kernel:<13} {dtype or '':<9} N {N}   {registers:3} registers   "
            f"{stack} bytes of stack, {spills} of spills"
        )
        assert stack == spills == 0, (arch, kernel, dtype, N)
    # Two head sizes; three kernels for three dtypes, and the scan.
    assert len(ptxas) == len({arch for arch, _ in ptxas}) * 2 * (3 * 3 + 1)
