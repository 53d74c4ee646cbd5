"""The C++ files beside this one, compiled when first needed and kept: the WKV-6 kernel, and the memory of CPU tensors.

The build never stops a run, and is never in its way: what fails is said in one line, and the caller goes on without.
"""

import functools
import hashlib
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile

import filelock
import torch

SOURCES = [pathlib.Path(__file__).parent / name for name in ("wkv6_op.cpp", "memory_op.cpp")]


@functools.cache
def load():
    """Load the operators wkv6::* and memory::*, building them first where needed. Returns "" or, in one line, why they cannot be had."""
    from torch.utils import cpp_extension

    flags = _compiler_flags()
    key = hashlib.sha256(f"{[source.read_text() for source in SOURCES]}{torch.__version__}{sys.version}{flags}".encode()).hexdigest()[:16]
    folder = pathlib.Path(os.environ.get("TORCH_EXTENSIONS_DIR") or cpp_extension.get_default_build_root()) / "wkv6"
    library = folder / f"wkv6_{key}.so"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not library.exists():
            # The lock belongs to the living process and goes with it: one that was killed while building leaves nothing to wait for.
            with filelock.FileLock(library.with_suffix(".lock"), timeout=600):
                if not library.exists():
                    _build(flags, library)
        torch.ops.load_library(library)
    except (OSError, RuntimeError) as error:
        reason = "another process is building it" if isinstance(error, filelock.Timeout) else str(error).partition("\n")[0]
        problem = f"the compiled WKV-6 kernel is not to be had: {reason}"
        print(f"note: {problem}. Going on with the chunked form, which is slower, and on a CPU takes more memory than expected.", file=sys.stderr)
        return problem
    return ""


def _compiler_flags():
    """For the vector units that PyTorch itself found here. Not -march=native: the cache may be shared by machines."""
    units = {"AVX512": "-mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx2 -mfma -mf16c", "AVX2": "-mavx2 -mfma -mf16c"}
    capability = found if (found := torch.backends.cpu.get_cpu_capability()) in units else "DEFAULT"
    openmp = ["-fopenmp"] if sys.platform == "linux" else []  # at::parallel_for needs it
    return ["-O3", f"-DCPU_CAPABILITY={capability}", f"-DCPU_CAPABILITY_{capability}", *units.get(capability, "").split(), *openmp]


def _build(flags, library):
    """Compile the sources into `library`, which appears only when it is whole. RuntimeError, with what would mend it, otherwise."""
    from torch.utils import cpp_extension

    try:
        import ninja
    except ImportError:
        raise RuntimeError("ninja is missing; pip install ninja") from None
    compiler = os.environ.get("CXX", "c++")
    if not shutil.which(compiler):
        raise RuntimeError(f"no C++ compiler ({compiler}) found; install one (Debian, Ubuntu: apt install g++)")
    print("compiling the WKV-6 kernel (once, less than a minute) ...", file=sys.stderr, flush=True)
    os.environ["PATH"] = f"{os.environ.get('PATH', os.defpath)}{os.pathsep}{ninja.BIN_DIR}"  # for a venv that is not activated
    log = library.with_suffix(".log")
    try:
        with tempfile.TemporaryDirectory(dir=library.parent) as build:
            cpp_extension.load("wkv6", [str(source) for source in SOURCES], extra_cflags=flags, build_directory=build, is_python_module=False)
            os.replace(next(pathlib.Path(build).glob("*.so")), library)
    except (RuntimeError, ImportError, subprocess.SubprocessError) as error:
        log.write_text(str(error))
        raise RuntimeError(f"the build failed; the compiler's words are in {log}") from error
