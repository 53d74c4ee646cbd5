"""Compile the C++ and CUDA files beside this one when they are first needed, and keep the result.

You need not read this to understand Bone. What is compiled are the WKV-6 kernels, and how the
memory of CPU tensors is managed. It never stops a run: what fails is said in one line, and the
caller goes on without.

CPU   wkv6_op.cpp and memory_op.cpp, by the C++ compiler. Not on Windows.
GPU   wkv6_cuda.cu, by the first of these that does it:
      nvcc, with wkv6_cuda_op.cpp, where a CUDA toolkit is (ROCm: hipcc). Not on Windows.
      NVRTC, the compiler that PyTorch's CUDA wheels carry. Needs nothing else.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import pathlib
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import filelock
import torch

import nvrtc
import wkv6_gpu

HERE = pathlib.Path(__file__).parent
CPU_SOURCES = (HERE / "wkv6_op.cpp", HERE / "memory_op.cpp")
GPU_SOURCES = (HERE / "wkv6_cuda_op.cpp", HERE / "wkv6_cuda.cu")
# What PyTorch, ctypes and compilers raise where something is missing or does not fit.
ERRORS = (OSError, RuntimeError, ValueError, ImportError, AttributeError, AssertionError)

Flags = dict[str, Any]  # arguments of cpp_extension.load


@functools.cache
def load(device_type: str = "cpu") -> str:
    """Load the operators for a type of device, compiling them first where needed.

    "cpu": wkv6::* and memory::*; "cuda" (ROCm's name too): wkv6::*.
    Returns "" or, in one line, why they cannot be had, after printing that.
    """
    problem = _try_to_load(device_type)
    if problem:
        slower = "which is slower"
        if device_type == "cpu":
            slower += ", and takes more memory than expected"
        print(f"note: {problem}. Going on with the chunked form, {slower}.", file=sys.stderr)
    return problem


def _try_to_load(device_type: str) -> str:
    if device_type not in LOADERS:
        return f"there is no compiled WKV-6 kernel for {device_type}"
    try:
        LOADERS[device_type]()
    except ERRORS as error:
        kernel = _kernel(gpu=device_type != "cpu")
        return f"the compiled {kernel} is not to be had: {_reason(error)}"
    return ""


def _kernel(*, gpu: bool) -> str:
    return "WKV-6 kernel for the GPU" if gpu else "WKV-6 kernel"


def _reason(error: Exception) -> str:
    if isinstance(error, filelock.Timeout):
        return "another process is building it"
    return str(error).partition("\n")[0]


# ---- the ways to a kernel ---------------------------------------------------


def _load_cpu() -> None:
    """Load the CPU's operators, which register themselves."""
    if sys.platform == "win32":
        raise RuntimeError("for CPUs it is not built on Windows")
    flags = {"extra_cflags": _cpu_flags()}
    library = _kept("wkv6_cpu", ".so", CPU_SOURCES, flags)
    _load_library(library, CPU_SOURCES, flags)


def _load_gpu() -> None:
    """Register the GPU's operators, with the launches of a compiler that can be had."""
    wkv6_gpu.register(_find_launch(), "CUDA")


def _find_launch() -> wkv6_gpu.Launch:
    if torch.version.hip and sys.platform == "win32":
        raise RuntimeError("for AMD it is not built on Windows")
    if torch.version.hip:
        return _launch_of_nvcc()
    if sys.platform == "win32":
        return _launch_of_nvrtc()
    # NVRTC's result is there where nvcc was not, or failed: do not let it fail at every start.
    if _cubin_path().exists() and not _gpu_library_path().exists():
        with contextlib.suppress(*ERRORS):
            return _launch_of_nvrtc()
    try:
        return _launch_of_nvcc()
    except ERRORS as error:
        nvcc_problem = _reason(error)
    try:
        launch = _launch_of_nvrtc()
    except ERRORS as error:
        raise RuntimeError(f"{nvcc_problem}; and without it, {_reason(error)}") from error
    if _find_nvcc():
        print(f"note: {nvcc_problem}. Going on with NVRTC.", file=sys.stderr)
    return launch


def _launch_of_nvcc() -> wkv6_gpu.Launch:
    """Return the operator that launches the kernels of a library, which nvcc or hipcc compiles."""
    _load_library(_gpu_library_path(), GPU_SOURCES, _gpu_flags())
    return torch.ops.wkv6.launch.default


def _launch_of_nvrtc() -> wkv6_gpu.Launch:
    """Return a function that launches kernels that NVRTC compiles."""
    launcher = nvrtc.Launcher(nvrtc.load_driver(), _cubin)
    launcher.load(torch.cuda.current_device())  # now, while another way can be found
    return launcher


# A type of device -> a function that registers wkv6::* for it. Tests add one of their own.
LOADERS: dict[str, Callable[[], None]] = {"cpu": _load_cpu, "cuda": _load_gpu}


# ---- what is kept -----------------------------------------------------------


def _kept(name: str, suffix: str, sources: Sequence[pathlib.Path], flags: object) -> pathlib.Path:
    """Return where the compiled sources are kept; another path for every version and machine."""
    from torch.utils import cpp_extension

    texts = [source.read_text(encoding="utf-8") for source in sources]
    versions = (torch.__version__, torch.version.cuda, torch.version.hip, sys.version)
    machine = (platform.machine(), os.environ.get("TORCH_CUDA_ARCH_LIST"))
    key = hashlib.sha256(f"{texts}{flags}{versions}{machine}".encode()).hexdigest()[:16]
    root = os.environ.get("TORCH_EXTENSIONS_DIR") or cpp_extension.get_default_build_root()
    return pathlib.Path(root) / "wkv6" / f"{name}_{key}{suffix}"


def _make_once(path: pathlib.Path, make: Callable[[], None]) -> None:
    """Call `make`, which is to make a file, unless that is there; in one process at a time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():
        return
    # The lock belongs to the living process, and goes with it: one that was killed while building
    # leaves nothing to wait for.
    with filelock.FileLock(path.with_suffix(".lock"), timeout=600):
        if not path.exists():
            make()


def _say_that_it_compiles(*, gpu: bool, compiler: str = "") -> None:
    line = f"compiling the {_kernel(gpu=gpu)}{compiler} (once, less than a minute) ..."
    print(line, file=sys.stderr, flush=True)


# ---- NVRTC ------------------------------------------------------------------


def _capability(gpu: int | None = None) -> str:
    """Return the compute capability of a GPU, or the current one, as "89"."""
    major, minor = torch.cuda.get_device_capability(gpu)
    return f"{major}{minor}"


def _cubin_path(gpu: int | None = None) -> pathlib.Path:
    return _kept("wkv6_nvrtc", ".cubin", [HERE / "wkv6_cuda.cu"], _capability(gpu))


def _cubin(gpu: int) -> nvrtc.Cubin:
    """Return the kernels for a GPU, compiled now or at an earlier start."""
    path = _cubin_path(gpu)

    def compile_and_save() -> None:
        _say_that_it_compiles(gpu=True, compiler=" with NVRTC")
        source = (HERE / "wkv6_cuda.cu").read_text(encoding="utf-8")
        kernels = wkv6_gpu.kernel_names()
        cubin, _warnings = nvrtc.compile_kernels(source, kernels, _capability(gpu))
        whole = path.with_suffix(".new")
        cubin.save(whole)
        os.replace(whole, path)

    _make_once(path, compile_and_save)
    try:
        return nvrtc.Cubin.load(path)
    except (ValueError, KeyError, TypeError):  # damaged: make it anew
        path.unlink()
        _make_once(path, compile_and_save)
        return nvrtc.Cubin.load(path)


# ---- C++ and nvcc -----------------------------------------------------------


def _cpu_flags() -> list[str]:
    """Choose the vector units that PyTorch found here.

    Not -march=native: the cache may be shared by machines.
    """
    units = {
        "AVX512": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"],
        "AVX2": [],
    }
    capability = torch.backends.cpu.get_cpu_capability()
    vectors = []
    if capability in units:
        vectors = [*units[capability], "-mavx2", "-mfma", "-mf16c"]
    else:
        capability = "DEFAULT"
    defines = [f"-DCPU_CAPABILITY={capability}", f"-DCPU_CAPABILITY_{capability}"]
    openmp = ["-fopenmp"] if sys.platform == "linux" else []  # at::parallel_for needs it
    return ["-O3", *defines, *vectors, *openmp]


def _gpu_flags() -> Flags:
    """Choose the card that is there, unless TORCH_CUDA_ARCH_LIST names others.

    hipcc looks itself.
    """
    flags = ["-O3"]
    names_cards = os.environ.get("TORCH_CUDA_ARCH_LIST", "native") not in ("", "native")
    if not torch.version.hip and not names_cards:
        card = _capability()
        flags.append(f"-gencode=arch=compute_{card},code=sm_{card}")
    return {"extra_cflags": ["-O3"], "extra_cuda_cflags": flags}


def _gpu_library_path() -> pathlib.Path:
    return _kept("wkv6_cuda", ".so", GPU_SOURCES, _gpu_flags())


def _load_library(library: pathlib.Path, sources: Sequence[pathlib.Path], flags: Flags) -> None:
    """Load a library of operators, built from its sources now or at an earlier start."""
    _make_once(library, lambda: _build(library, sources, flags))
    torch.ops.load_library(library)


def _build(library: pathlib.Path, sources: Sequence[pathlib.Path], flags: Flags) -> None:
    """Compile the sources into `library`, which appears only when it is whole.

    RuntimeError, with what would mend it, otherwise.
    """
    from torch.utils import cpp_extension

    gpu = sources == GPU_SOURCES
    _check_compilers(gpu=gpu)
    _say_that_it_compiles(gpu=gpu)
    log = library.with_suffix(".log")
    try:
        with tempfile.TemporaryDirectory(dir=library.parent) as folder:
            paths = [str(source) for source in sources]
            if torch.version.hip:  # hipify writes its own beside them
                paths = [shutil.copy(path, folder) for path in paths]
            options = {**flags, "build_directory": folder, "is_python_module": False}
            cpp_extension.load("wkv6", paths, **options)
            [built] = pathlib.Path(folder).glob("*.so")
            os.replace(built, library)
    except (RuntimeError, ValueError, ImportError, subprocess.SubprocessError) as error:
        log.write_text(str(error))
        # What the compiler says first; or the whole, where it is not a compiler that says it.
        words = re.search(r"\b(fatal error|fatal|error) *: .*|^(?!Error building).*", str(error))
        first = f" ({words[0]})" if words else ""
        cuda_home = f"; CUDA_HOME is {cpp_extension.CUDA_HOME}" if gpu else ""
        place = f"all of the compiler's words are in {log}"
        raise RuntimeError(f"the build failed{first}; {place}{cuda_home}") from error


def _check_compilers(*, gpu: bool) -> None:
    """Find ninja and the compilers. RuntimeError, with what would mend it, where one is missing."""
    try:
        import ninja
    except ImportError:
        raise RuntimeError("ninja is missing; pip install ninja") from None
    # For a virtual environment that is not activated.
    os.environ["PATH"] = f"{os.environ.get('PATH', os.defpath)}{os.pathsep}{ninja.BIN_DIR}"
    if gpu and not torch.version.hip:
        _check_nvcc()
    compiler = os.environ.get("CXX", "c++")
    if not shutil.which(compiler):
        advice = "install one (Debian, Ubuntu: apt install g++)"
        raise RuntimeError(f"no C++ compiler ({compiler}) found; {advice}")


def _find_nvcc() -> str | None:
    from torch.utils import cpp_extension

    return shutil.which(os.path.join(cpp_extension.CUDA_HOME or "", "bin", "nvcc"))


def _check_nvcc() -> None:
    """RuntimeError, with what would mend it, unless there is an nvcc of PyTorch's CUDA version."""
    wanted = torch.version.cuda or "?"
    place = "where it is not found, set CUDA_HOME to its folder"
    install = f"install the CUDA toolkit {wanted}, and {place}"
    nvcc = _find_nvcc()
    if not nvcc:
        raise RuntimeError(f"no CUDA compiler (nvcc) found; {install}")
    answer = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    release = re.search(r"release ([\d.]+)", answer)
    found = release[1] if release else "?"
    if found.split(".")[0] != wanted.split(".")[0]:
        raise RuntimeError(f"{nvcc} is of CUDA {found}, PyTorch of {wanted}; {install}")
