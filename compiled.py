"""Compile the C++ and CUDA files beside this one when they are first needed, and keep the result.

One need not read this to understand Bone. What is compiled are the WKV-6 kernels. A failed build
never stops a run: one line says what failed, and the caller goes on with the chunked form.

CPU   wkv6_op.cpp, by the C++ compiler. Not on Windows.
GPU   wkv6_cuda.cu, by the first of these that works:
      nvcc with wkv6_cuda_op.cpp, if there is a CUDA toolkit (ROCm: hipcc). Not on Windows.
      NVRTC, the compiler inside PyTorch's CUDA wheels. Needs nothing else.
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
CPU_SOURCES = (HERE / "wkv6_op.cpp",)
GPU_SOURCES = (HERE / "wkv6_cuda_op.cpp", HERE / "wkv6_cuda.cu")
# What PyTorch, ctypes and compilers raise where something is missing or does not fit.
ERRORS = (OSError, RuntimeError, ValueError, ImportError, AttributeError, AssertionError)

Flags = dict[str, Any]  # arguments of cpp_extension.load


class KernelUnavailable(RuntimeError):
    """There is no compiled kernel for a type of device. The message says why, in one line."""


def load(device_type: str = "cpu") -> None:
    """Load the WKV-6 operators for a type of device, compiling them first where needed.

    Raises KernelUnavailable. Only the first call in a process tries, and prints what went wrong.
    """
    problem = _try_to_load(device_type)
    if problem:
        raise KernelUnavailable(problem)


@functools.cache
def _try_to_load(device_type: str) -> str:
    """Return "", or why the operators are unavailable, after printing that."""
    problem = ""
    if device_type not in LOADERS:
        problem = f"there is no compiled WKV-6 kernel for {device_type}"
    else:
        try:
            LOADERS[device_type]()
        except ERRORS as error:
            kernel = _kernel(gpu=device_type != "cpu")
            problem = f"the compiled {kernel} is unavailable: {_reason(error)}"
    if problem:
        _say(f"note: {problem}. Using the chunked form, which is slower.")
    return problem


def _say(note: str) -> None:
    """Print a note on stderr, once on each machine: by the first of its ranks."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(note, file=sys.stderr)


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
    library = cache_path("wkv6_cpu.so", CPU_SOURCES, flags)
    _load_library(library, CPU_SOURCES, flags)


def _load_gpu() -> None:
    """Register the GPU's operators, launched by what the first compiler that works has made."""
    wkv6_gpu.register(_find_launch(), "CUDA")


def _find_launch() -> wkv6_gpu.Launch:
    if torch.version.hip and sys.platform == "win32":
        raise RuntimeError("for AMD it is not built on Windows")
    if torch.version.hip:
        return _launch_of_nvcc()
    if sys.platform == "win32":
        return _launch_of_nvrtc()
    # NVRTC's result alone is there if nvcc was missing or failed: do not try nvcc at every start.
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
        both = f"{nvcc_problem}; and NVRTC fails, too: {_reason(error)}"
        raise RuntimeError(both) from error
    if _find_nvcc():
        _say(f"note: {nvcc_problem}. Using NVRTC instead.")
    return launch


def _launch_of_nvcc() -> wkv6_gpu.Launch:
    """Return the operator that launches the kernels of a library built by nvcc or hipcc."""
    _load_library(_gpu_library_path(), GPU_SOURCES, _gpu_flags())
    return torch.ops.wkv6.launch.default


def _launch_of_nvrtc() -> wkv6_gpu.Launch:
    """Return a function that launches kernels compiled by NVRTC."""
    launcher = nvrtc.Launcher(nvrtc.load_driver(), _cubin)
    # Now, while another way can still be taken.
    launcher.load(torch.cuda.current_device())
    return launcher


# A type of device -> a function that registers wkv6::* for it. Tests add one of their own.
LOADERS: dict[str, Callable[[], None]] = {"cpu": _load_cpu, "cuda": _load_gpu}


# ---- the cache ---------------------------------------------------------------


def cache_path(name: str, sources: Sequence[pathlib.Path], flags: object) -> pathlib.Path:
    """Return where a compiled file is kept: another path for every source, flag and version.

    name: that of the file, such as "wkv6_cpu.so".
    """
    from torch.utils import cpp_extension

    texts = [source.read_text(encoding="utf-8") for source in sources]
    versions = (torch.__version__, torch.version.cuda, torch.version.hip, sys.version)
    machine = (platform.machine(), os.environ.get("TORCH_CUDA_ARCH_LIST"))
    key = hashlib.sha256(f"{texts}{flags}{versions}{machine}".encode()).hexdigest()[:16]
    root = os.environ.get("TORCH_EXTENSIONS_DIR") or cpp_extension.get_default_build_root()
    stem, suffix = os.path.splitext(name)
    return pathlib.Path(root) / "wkv6" / f"{stem}_{key}{suffix}"


def make_once(path: pathlib.Path, make: Callable[[], None]) -> None:
    """Call `make`, which writes `path`, unless that exists; in one process at a time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():
        return
    # The system drops the lock of a process that dies, so a killed build blocks nobody.
    with filelock.FileLock(path.with_suffix(".lock"), timeout=600):
        if not path.exists():
            make()


def _announce_build(*, gpu: bool, compiler: str = "") -> None:
    line = f"compiling the {_kernel(gpu=gpu)}{compiler} (once, less than a minute) ..."
    print(line, file=sys.stderr, flush=True)


# ---- NVRTC ------------------------------------------------------------------


def _capability(gpu: int | None = None) -> str:
    """Return the compute capability of a GPU, or the current one, as "89"."""
    major, minor = torch.cuda.get_device_capability(gpu)
    return f"{major}{minor}"


def _cubin_path(gpu: int | None = None) -> pathlib.Path:
    return cache_path("wkv6_nvrtc.cubin", [HERE / "wkv6_cuda.cu"], _capability(gpu))


def _cubin(gpu: int) -> nvrtc.Cubin:
    """Return the kernels for a GPU, compiled now or at an earlier start."""
    path = _cubin_path(gpu)

    def compile_and_save() -> None:
        _announce_build(gpu=True, compiler=" with NVRTC")
        source = (HERE / "wkv6_cuda.cu").read_text(encoding="utf-8")
        kernels = wkv6_gpu.kernel_names()
        cubin, _warnings = nvrtc.compile_kernels(source, kernels, _capability(gpu))
        whole = path.with_suffix(".new")
        cubin.save(whole)
        os.replace(whole, path)

    make_once(path, compile_and_save)
    try:
        return nvrtc.Cubin.load(path)
    except (ValueError, KeyError, TypeError):  # damaged: compile again
        path.unlink()
        make_once(path, compile_and_save)
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
    # at::parallel_for needs OpenMP.
    openmp = ["-fopenmp"] if sys.platform == "linux" else []
    return ["-O3", *defines, *vectors, *openmp]


def _gpu_flags() -> Flags:
    """Choose this machine's card, unless TORCH_CUDA_ARCH_LIST names others.

    hipcc finds the card by itself.
    """
    flags = ["-O3"]
    names_cards = os.environ.get("TORCH_CUDA_ARCH_LIST", "native") not in ("", "native")
    if not torch.version.hip and not names_cards:
        card = _capability()
        flags.append(f"-gencode=arch=compute_{card},code=sm_{card}")
    return {"extra_cflags": ["-O3"], "extra_cuda_cflags": flags}


def _gpu_library_path() -> pathlib.Path:
    return cache_path("wkv6_cuda.so", GPU_SOURCES, _gpu_flags())


def _load_library(library: pathlib.Path, sources: Sequence[pathlib.Path], flags: Flags) -> None:
    """Load a library of operators, built from its sources now or at an earlier start."""
    make_once(library, lambda: _build(library, sources, flags))
    torch.ops.load_library(library)


def _build(library: pathlib.Path, sources: Sequence[pathlib.Path], flags: Flags) -> None:
    """Compile the sources into `library`, which appears only when it is complete.

    Raises RuntimeError, which says what to do.
    """
    from torch.utils import cpp_extension

    gpu = sources == GPU_SOURCES
    _check_compilers(gpu=gpu)
    _announce_build(gpu=gpu)
    log = library.with_suffix(".log")
    try:
        with tempfile.TemporaryDirectory(dir=library.parent) as folder:
            paths = [str(source) for source in sources]
            if torch.version.hip:
                # hipify writes its own files beside the sources.
                paths = [shutil.copy(path, folder) for path in paths]
            options = {**flags, "build_directory": folder, "is_python_module": False}
            cpp_extension.load("wkv6", paths, **options)
            [built] = pathlib.Path(folder).glob("*.so")
            os.replace(built, library)
    except (RuntimeError, ValueError, ImportError, subprocess.SubprocessError) as error:
        log.write_text(str(error))
        # The compiler's first error; or, if no compiler speaks, the message's first line.
        words = re.search(r"\b(fatal error|fatal|error) *: .*|^(?!Error building).*", str(error))
        first = f" ({words[0]})" if words else ""
        cuda_home = f"; CUDA_HOME is {cpp_extension.CUDA_HOME}" if gpu else ""
        place = f"the compiler's full output is in {log}"
        raise RuntimeError(f"the build failed{first}; {place}{cuda_home}") from error


def _check_compilers(*, gpu: bool) -> None:
    """Raise RuntimeError, which says what to do, if ninja or a compiler is missing."""
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
    """Raise RuntimeError, which says what to do, unless nvcc is of PyTorch's CUDA version."""
    wanted = torch.version.cuda or "?"
    place = "if it is not found, set CUDA_HOME to its folder"
    install = f"install the CUDA toolkit {wanted}, and {place}"
    nvcc = _find_nvcc()
    if not nvcc:
        raise RuntimeError(f"no CUDA compiler (nvcc) found; {install}")
    answer = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    release = re.search(r"release ([\d.]+)", answer)
    found = release[1] if release else "?"
    if found.split(".")[0] != wanted.split(".")[0]:
        raise RuntimeError(f"{nvcc} is of CUDA {found}, PyTorch of {wanted}; {install}")
