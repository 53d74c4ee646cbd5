"""The C++ and CUDA files beside this one, compiled when first needed and kept: the WKV-6 kernels, and the memory of CPU tensors.

The build never stops a run, and is never in its way: what fails is said in one line, and the caller goes on without.
"""

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

import filelock
import torch

import wkv6_gpu

HERE = pathlib.Path(__file__).parent
SOURCES = {"cpu": [HERE / "wkv6_op.cpp", HERE / "memory_op.cpp"], "cuda": [HERE / "wkv6_cuda_op.cpp", HERE / "wkv6_cuda.cu"]}
CHUNKED = {"cpu": "which is slower, and takes more memory than expected", "cuda": "which is slower"}


@functools.cache
def load(device="cpu"):
    """Load the operators for "cpu" (wkv6::*, memory::*) or "cuda" (wkv6::*), building them first where needed.

    Returns "" or, in one line, why they cannot be had, after printing that.
    """
    from torch.utils import cpp_extension

    try:
        flags = {"extra_cflags": _cpu_flags()} if device == "cpu" else {"extra_cflags": ["-O3"], "extra_cuda_cflags": _cuda_flags()}
        versions = torch.__version__, torch.version.cuda, torch.version.hip, sys.version, platform.machine(), os.environ.get("TORCH_CUDA_ARCH_LIST")
        key = hashlib.sha256(f"{[source.read_text() for source in SOURCES[device]]}{flags}{versions}".encode()).hexdigest()[:16]
        folder = pathlib.Path(os.environ.get("TORCH_EXTENSIONS_DIR") or cpp_extension.get_default_build_root()) / "wkv6"
        library = folder / f"wkv6_{device}_{key}.so"
        folder.mkdir(parents=True, exist_ok=True)
        if not library.exists():
            # The lock belongs to the living process and goes with it: one that was killed while building leaves nothing to wait for.
            with filelock.FileLock(library.with_suffix(".lock"), timeout=600):
                if not library.exists():
                    _build(device, flags, library)
        torch.ops.load_library(library)
        if device == "cuda":
            wkv6_gpu.register(torch.ops.wkv6.launch.default)
    except (OSError, RuntimeError, ValueError) as error:
        reason = "another process is building it" if isinstance(error, filelock.Timeout) else str(error).partition("\n")[0]
        problem = f"the compiled WKV-6 kernel{' for the GPU' * (device == 'cuda')} is not to be had: {reason}"
        print(f"note: {problem}. Going on with the chunked form, {CHUNKED[device]}.", file=sys.stderr)
        return problem
    return ""


def _cpu_flags():
    """For the vector units that PyTorch itself found here. Not -march=native: the cache may be shared by machines."""
    units = {"AVX512": "-mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx2 -mfma -mf16c", "AVX2": "-mavx2 -mfma -mf16c"}
    capability = found if (found := torch.backends.cpu.get_cpu_capability()) in units else "DEFAULT"
    openmp = ["-fopenmp"] if sys.platform == "linux" else []  # at::parallel_for needs it
    return ["-O3", f"-DCPU_CAPABILITY={capability}", f"-DCPU_CAPABILITY_{capability}", *units.get(capability, "").split(), *openmp]


def _cuda_flags():
    """For the card that is there, unless TORCH_CUDA_ARCH_LIST names others; hipcc looks itself."""
    if torch.version.hip or os.environ.get("TORCH_CUDA_ARCH_LIST", "native") not in ("", "native"):
        return ["-O3"]
    card = "{}{}".format(*torch.cuda.get_device_capability())
    return ["-O3", f"-gencode=arch=compute_{card},code=sm_{card}"]


def _check_nvcc():
    """RuntimeError, with what would mend it, where nvcc cannot be had or is not that of PyTorch's CUDA."""
    from torch.utils import cpp_extension

    install = f"install the CUDA toolkit {torch.version.cuda}, and where it is not found, set CUDA_HOME to its folder"
    nvcc = os.path.join(cpp_extension.CUDA_HOME or "", "bin", "nvcc")
    if not shutil.which(nvcc):
        raise RuntimeError(f"no CUDA compiler (nvcc) found; {install}")
    found = re.search(r"release ([\d.]+)", subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout)
    if not found or found[1].split(".")[0] != torch.version.cuda.split(".")[0]:
        raise RuntimeError(f"{nvcc} is of CUDA {found[1] if found else '?'}, PyTorch of {torch.version.cuda}; {install}")


def _build(device, flags, library):
    """Compile the sources into `library`, which appears only when it is whole. RuntimeError, with what would mend it, otherwise."""
    from torch.utils import cpp_extension

    try:
        import ninja
    except ImportError:
        raise RuntimeError("ninja is missing; pip install ninja") from None
    compiler = os.environ.get("CXX", "c++")
    if not shutil.which(compiler):
        raise RuntimeError(f"no C++ compiler ({compiler}) found; install one (Debian, Ubuntu: apt install g++)")
    if device == "cuda" and not torch.version.hip:
        _check_nvcc()
    print(f"compiling the WKV-6 kernel{' for the GPU' * (device == 'cuda')} (once, less than a minute) ...", file=sys.stderr, flush=True)
    os.environ["PATH"] = f"{os.environ.get('PATH', os.defpath)}{os.pathsep}{ninja.BIN_DIR}"  # for a venv that is not activated
    log = library.with_suffix(".log")
    try:
        with tempfile.TemporaryDirectory(dir=library.parent) as build:
            sources = [shutil.copy(source, build) if torch.version.hip else str(source) for source in SOURCES[device]]  # hipify writes beside them
            cpp_extension.load("wkv6", sources, **flags, build_directory=build, is_python_module=False)
            [built] = pathlib.Path(build).glob("*.so")
            os.replace(built, library)
    except (RuntimeError, ValueError, ImportError, subprocess.SubprocessError) as error:
        log.write_text(str(error))
        # What the compiler says first; or the whole, where it is not a compiler that says it.
        first = re.search(r"\b(fatal error|fatal|error) *: .*|^(?!Error building).*", str(error))
        raise RuntimeError(f"the build failed{f' ({first[0]})' if first else ''}; all of the compiler's words are in {log}"
                           f"{f'; CUDA_HOME is {cpp_extension.CUDA_HOME}' * (device == 'cuda')}") from error
