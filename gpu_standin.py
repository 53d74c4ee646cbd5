"""A stand-in for a GPU, for tests and counts: `import gpu_standin` makes PyTorch's device "gpu".

What it does is said in gpu_standin.cpp, which is built when this is first imported (half a minute)
and kept. After the import the device is what torch.accelerator names, so whoever wants the CPU in
the same process must say so. One need not read this to understand Bone.
"""

import importlib.util
import os
import pathlib
import shutil
import tempfile
import types

import ninja
import torch
from torch.utils import cpp_extension

from compiled import cache_path, make_once

NAME = "gpu_standin_library"
SOURCE = pathlib.Path(__file__).with_name("gpu_standin.cpp")
FLAGS = {"extra_cflags": ["-O1"]}
BUSY = ("to the device", "from the device", "synchronizations")  # what the host waits for


def _load():
    library = cache_path(f"{NAME}.so", [SOURCE], FLAGS)
    make_once(library, lambda: _build(library))
    spec = importlib.util.spec_from_file_location(NAME, library)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _build(library):
    compiler = os.environ.get("CXX", "c++")
    if not shutil.which(compiler):
        raise ValueError(
            f"the stand-in for a GPU needs a C++ compiler, and {compiler} was not found; "
            "install one, or run this where a GPU is"
        )
    os.environ["PATH"] = f"{os.environ.get('PATH', os.defpath)}{os.pathsep}{ninja.BIN_DIR}"
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        cpp_extension.load(
            NAME, [str(SOURCE)], **FLAGS, build_directory=folder, is_python_module=False
        )
        os.replace(pathlib.Path(folder, f"{NAME}.so"), library)


def _device_module():
    """What PyTorch asks of the module torch.gpu."""
    module = types.ModuleType("torch.gpu")
    module.get_amp_supported_dtype = lambda: [torch.bfloat16, torch.float16]
    module.is_available = lambda: True
    module.is_initialized = lambda: True
    module.is_bf16_supported = lambda *_: True
    module.device_count = lambda: 1
    module.current_device = lambda: 0
    module.get_device_name = lambda device=0: "a stand-in for a GPU"
    module._is_in_bad_fork = lambda: False
    module.manual_seed_all = lambda seed: None
    module.get_rng_state = lambda device=0: torch.get_rng_state()
    module.set_rng_state = lambda state, device=0: torch.set_rng_state(state)
    return module


torch.utils.rename_privateuse1_backend("gpu")
_library = _load()
torch._register_device_module("gpu", _device_module())
torch.utils.generate_methods_for_privateuse1_backend()


def counts() -> dict[str, int]:
    """Return how often each thing happened since `clear`.

    "launches": operators that would be kernels. "to the device", "from the device": copies that a
    GPU waits for. "pinned to the device": copies that it need not wait for. "synchronizations":
    .item(), bool(tensor), nonzero. Beside them each operator under its own name.
    """
    return _library.counts()


def waits() -> int:
    """Return how often the host waited for the device since `clear`."""
    return sum(counts().get(what, 0) for what in BUSY)


def clear() -> None:
    """Set all counts to zero."""
    _library.clear()
