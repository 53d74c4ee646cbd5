"""Compile and launch CUDA kernels without a CUDA toolkit, with what PyTorch brings along.

One need not read this to understand Bone. PyTorch's CUDA wheels carry NVRTC, NVIDIA's compiler as a
library. The GPU's driver loads the code that it makes. Both are stable C interfaces, called with
ctypes. (PyTorch's own torch.cuda._compile_kernel is private, and needs the toolkit's headers.)
"""

from __future__ import annotations

import ctypes
import importlib.util
import json
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Cubin(NamedTuple):
    """Machine code of a GPU, and the names in it, mangled, of the kernels that were asked for."""

    code: bytes
    symbols: dict[str, str]

    def save(self, path: pathlib.Path) -> None:
        """Write it to a file: a line of JSON with the names, then the code."""
        path.write_bytes(json.dumps(self.symbols).encode() + b"\n" + self.code)

    @classmethod
    def load(cls, path: pathlib.Path) -> Cubin:
        """Read what `save` has written."""
        symbols, _, code = path.read_bytes().partition(b"\n")
        return cls(code, json.loads(symbols))


# ---- the compiler -----------------------------------------------------------


def compile_kernels(source: str, kernels: Sequence[str], capability: str) -> tuple[Cubin, str]:
    """Compile `kernels`, as "scan<64>", for a compute capability, as "86".

    Returns the code, and the compiler's warnings, or "".
    RuntimeError where there is no NVRTC, or where it cannot compile the source.
    """
    nvrtc = _load_nvrtc()
    program = ctypes.c_void_p()
    text = source.encode()
    _check(nvrtc, nvrtc.nvrtcCreateProgram(ctypes.byref(program), text, b"wkv6.cu", 0, None, None))
    try:
        for kernel in kernels:
            _check(nvrtc, nvrtc.nvrtcAddNameExpression(program, kernel.encode()))
        options = [f"--gpu-architecture=sm_{capability}".encode(), b"--std=c++17"]
        array = (ctypes.c_char_p * len(options))(*options)
        status = nvrtc.nvrtcCompileProgram(program, len(options), array)
        log = _read(nvrtc, program, "ProgramLog").decode().strip("\0\n")
        if status != 0:
            problem = f"NVRTC: {log}" if log else _error(nvrtc, status)
            raise RuntimeError(problem)
        symbols = {kernel: _symbol(nvrtc, program, kernel) for kernel in kernels}
        return Cubin(_read(nvrtc, program, "CUBIN"), symbols), log
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


def _load_nvrtc() -> ctypes.CDLL:
    """Load the NVRTC of PyTorch's CUDA version, or the system's where PyTorch brings none."""
    major = (torch.version.cuda or "*").partition(".")[0]
    if sys.platform == "win32":
        name = f"nvrtc64_{major}0_0.dll"
        builtins = "nvrtc-builtins64_*.dll"
    else:
        name = f"libnvrtc.so.{major}"
        builtins = "libnvrtc-builtins.so.*"
    for folder in _library_folders():
        for library in folder.glob(name):
            # NVRTC looks for its second half by name alone, and finds it if it is loaded already.
            for half in folder.glob(builtins):
                ctypes.CDLL(str(half))
            return ctypes.CDLL(str(library))
    try:
        return ctypes.CDLL(name)
    except OSError as error:
        raise RuntimeError(f"no NVRTC found beside PyTorch ({error})") from None


def _library_folders() -> list[pathlib.Path]:
    """List where PyTorch's CUDA libraries are: in torch/lib, or in NVIDIA's packages."""
    folders = [pathlib.Path(torch.__file__).parent / "lib"]
    nvidia = importlib.util.find_spec("nvidia")
    if nvidia is None or nvidia.submodule_search_locations is None:
        return folders
    for root in nvidia.submodule_search_locations:
        folders += sorted(pathlib.Path(root).glob("*/lib"))
        folders += sorted(pathlib.Path(root).glob("*/bin"))
    return folders


def _read(nvrtc: ctypes.CDLL, program: ctypes.c_void_p, what: str) -> bytes:
    """Get one of the texts that come with a size: "ProgramLog" or "CUBIN"."""
    size = ctypes.c_size_t()
    _check(nvrtc, nvrtc[f"nvrtcGet{what}Size"](program, ctypes.byref(size)))
    text = ctypes.create_string_buffer(size.value)
    _check(nvrtc, nvrtc[f"nvrtcGet{what}"](program, text))
    return text.raw


def _symbol(nvrtc: ctypes.CDLL, program: ctypes.c_void_p, kernel: str) -> str:
    """Get the mangled name of a kernel."""
    symbol = ctypes.c_char_p()
    _check(nvrtc, nvrtc.nvrtcGetLoweredName(program, kernel.encode(), ctypes.byref(symbol)))
    return (symbol.value or b"").decode()


def _error(nvrtc: ctypes.CDLL, status: int) -> str:
    nvrtc.nvrtcGetErrorString.restype = ctypes.c_char_p
    return f"NVRTC: {nvrtc.nvrtcGetErrorString(status).decode()}"


def _check(nvrtc: ctypes.CDLL, status: int) -> None:
    if status != 0:
        raise RuntimeError(_error(nvrtc, status))


# ---- the driver -------------------------------------------------------------


def load_driver() -> ctypes.CDLL:
    """Load the GPU's driver. OSError where there is none."""
    return ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")


class Launcher:
    """A function that launches kernels, as wkv6_gpu.Launch has it, by calling the driver.

    cubin_for: a function that returns the Cubin for the GPU of a given index.
    """

    def __init__(self, driver: ctypes.CDLL, cubin_for: Callable[[int], Cubin]) -> None:
        self.driver = driver
        self.cubin_for = cubin_for
        self.modules: dict[int, Module] = {}  # by the index of the GPU

    def load(self, gpu: int) -> Module:
        """Load the kernels on a GPU, once."""
        if gpu not in self.modules:
            self.modules[gpu] = Module(self.driver, gpu, self.cubin_for(gpu))
        return self.modules[gpu]

    def __call__(
        self,
        kernel: str,
        grid: tuple[int, int, int],
        threads: int,
        shared_bytes: int,
        tensors: list[Tensor],
        ints: list[int],
    ) -> None:
        """Launch a kernel on the tensors' GPU, in its current stream."""
        gpu = tensors[0].get_device()
        stream = ctypes.c_void_p(torch.cuda.current_stream(gpu).cuda_stream)
        values = [*(ctypes.c_void_p(x.data_ptr()) for x in tensors), *map(ctypes.c_int, ints)]
        arguments = (ctypes.c_void_p * len(values))(*map(ctypes.addressof, values))
        module = self.load(gpu)
        block = (threads, 1, 1)
        launched = (module.functions[kernel], *grid, *block, shared_bytes, stream, arguments, None)
        module.call("cuLaunchKernel", *launched)


class Module:
    """The kernels of a Cubin, loaded on one GPU."""

    def __init__(self, driver: ctypes.CDLL, gpu: int, cubin: Cubin) -> None:
        self.driver = driver
        # PyTorch's context. A new thread has not entered it yet.
        self.context = ctypes.c_void_p()
        device = ctypes.c_int()
        self._check(driver.cuInit(0))
        self._check(driver.cuDeviceGet(ctypes.byref(device), gpu))
        self._check(driver.cuDevicePrimaryCtxRetain(ctypes.byref(self.context), device))

        module = ctypes.c_void_p()
        self.call("cuModuleLoadData", ctypes.byref(module), cubin.code)
        self.functions = {}
        for kernel, symbol in cubin.symbols.items():
            function = ctypes.c_void_p()
            self.call("cuModuleGetFunction", ctypes.byref(function), module, symbol.encode())
            self.functions[kernel] = function

    def call(self, name: str, *arguments: object) -> None:
        """Call a function of the driver in the GPU's context. RuntimeError where it fails."""
        self._check(self.driver.cuCtxPushCurrent_v2(self.context))
        try:
            self._check(getattr(self.driver, name)(*arguments))
        finally:
            self.driver.cuCtxPopCurrent_v2(ctypes.byref(ctypes.c_void_p()))

    def _check(self, status: int) -> None:
        if status != 0:
            text = ctypes.c_char_p()
            self.driver.cuGetErrorString(status, ctypes.byref(text))
            message = (text.value or b"error").decode()
            raise RuntimeError(f"the GPU's driver: {message}")
