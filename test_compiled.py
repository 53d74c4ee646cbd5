"""The ways to a compiled WKV-6 kernel: which is taken, and what is said.

No machine here has a GPU: in its place stands a driver that agrees to everything.
"""

import re
import sys

import pytest
import torch
from torch.utils import cpp_extension

import compiled
import nvrtc
import wkv6
import wkv6_gpu
from test_wkv6 import build

TRY_CUDA = """
import os, types, torch, nvrtc, wkv6
from torch.utils import cpp_extension
cpp_extension.CUDA_HOME = os.environ["CUDA_HOME"]  # which a PyTorch without CUDA does not look for
torch.version.cuda = "13.0"
torch.cuda.get_device_capability = lambda device=None: (8, 9)
nvrtc.load_driver = lambda: nvrtc.ctypes.CDLL("no-such-driver")
class OnGpu(torch.Tensor):
    device = types.SimpleNamespace(type="cuda")
r, k, v, w = (torch.ones(1, 2, 1, 32).as_subclass(OnGpu) for _ in range(4))
y, _ = wkv6.wkv6(r, k, v, w, torch.zeros(1, 32), torch.zeros(1, 1, 32, 32))
print(y.sum().item(), wkv6.kernel_problem("cuda"))
"""
FAKE_NVCC = """#!/bin/sh
[ "$1" = --version ] && echo "Cuda compilation tools, release {release}, V{release}.88" && exit
echo "nvcc fatal   : Unsupported gpu architecture 'compute_89'" >&2
exit 1
"""


@pytest.mark.parametrize(
    "release, environment, words",
    [
        (None, {}, r"no CUDA compiler \(nvcc\) found; install the CUDA toolkit 13.0"),
        ("12.4", {}, r"bin/nvcc is of CUDA 12.4, PyTorch of 13.0; install the CUDA toolkit 13.0"),
        ("13.0", {"CXX": "no-c++"}, r"no C\+\+ compiler \(no-c\+\+\) found; install one"),
        ("13.0", {"TORCH_CUDA_ARCH_LIST": "8.9;sm_90"}, r"the build failed \(Unknown CUDA arch"),
        ("13.0", {}, r"the build failed \(fatal.*\); .* output is in .*\.log; CUDA_HOME is "),
    ],
)
def test_a_gpu_build_that_fails_says_so_in_one_line_and_the_chunked_form_takes_over(
    tmp_path, release, environment, words
):
    if release:
        (tmp_path / "bin").mkdir()
        (tmp_path / "bin/nvcc").write_text(FAKE_NVCC.format(release=release))
        (tmp_path / "bin/nvcc").chmod(0o755)
    process = build(tmp_path / "cache", TRY_CUDA, CUDA_HOME=str(tmp_path), **environment)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0 and "Traceback" not in err, err
    assert out.startswith("1024.0 the compiled WKV-6 kernel for the GPU is unavailable"), err
    [note] = [line for line in err.splitlines() if line.startswith("note: ")]
    assert re.search(words, note) and "no-such-driver" in note
    assert note.endswith("Using the chunked form, which is slower.")


class AgreeingDriver:
    """A GPU's driver whose every call succeeds."""

    def __getattr__(self, name):
        return lambda *arguments: 0


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A machine with a GPU, without nvcc, that keeps nothing yet. Returns what is registered."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", None)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda gpu=None: (8, 9))
    monkeypatch.setattr(nvrtc, "load_driver", AgreeingDriver)
    code = nvrtc.Cubin(b"\n{code}\n", {"scan<64>": "_Z4scan"})
    monkeypatch.setattr(nvrtc, "compile_kernels", lambda *arguments: (code, ""))
    registered = []
    monkeypatch.setattr(wkv6_gpu, "register", lambda *arguments: registered.append(arguments))
    return registered


def install_nvcc(folder, monkeypatch):
    """Install an nvcc that cannot compile anything."""
    nvcc = folder / "bin/nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text(FAKE_NVCC.format(release="13.0"))
    nvcc.chmod(0o755)
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", str(folder))


def start(capsys, device_type="cuda"):
    """Load the kernel as a new process does. Returns the problem, and the lines printed."""
    problem = compiled._try_to_load.__wrapped__(device_type)
    return problem, capsys.readouterr().err.splitlines()


COMPILING = "compiling the WKV-6 kernel for the GPU with NVRTC (once, less than a minute) ..."


def test_without_nvcc_nvrtc_compiles_and_what_it_made_is_kept(machine, monkeypatch, capsys):
    assert start(capsys) == ("", [COMPILING])
    [(launcher, key)] = machine
    assert isinstance(launcher, nvrtc.Launcher) and key == "CUDA"
    assert launcher.cubin_for(0) == nvrtc.compile_kernels()[0]
    monkeypatch.setattr(nvrtc, "compile_kernels", None)
    assert start(capsys) == ("", [])


def test_another_gpu_or_another_pytorch_compiles_again(machine, monkeypatch, capsys):
    start(capsys)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda gpu=None: (9, 0))
    assert start(capsys) == ("", [COMPILING])
    monkeypatch.setattr(torch, "__version__", "3.0")
    assert start(capsys) == ("", [COMPILING])
    assert start(capsys) == ("", [])


def test_without_nvcc_and_nvrtc_the_chunked_form_takes_over(machine, monkeypatch, capsys):
    def no_nvrtc(*arguments):
        raise RuntimeError("NVRTC: wkv6.cu(1): error: it is not to be\nand more")

    monkeypatch.setattr(nvrtc, "compile_kernels", no_nvrtc)
    problem, (said, note) = start(capsys)
    assert re.search(r"no CUDA compiler \(nvcc\) found; .*: error: it is not to be$", problem)
    assert said == COMPILING
    assert note == f"note: {problem}. Using the chunked form, which is slower."
    assert machine == []
    # Of several ranks on a machine, one says it.
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert start(capsys)[1] == [COMPILING]


def test_where_nvcc_is_it_compiles(machine, tmp_path, monkeypatch, capsys):
    install_nvcc(tmp_path, monkeypatch)
    built = []

    def build_library(library, sources, flags):
        built.append([source.name for source in sources])
        library.write_text("")

    library_s = type("Operators", (), {"launch": type("Launch", (), {"default": "library's"})})
    monkeypatch.setattr(compiled, "_build", build_library)
    monkeypatch.setattr(torch.ops, "load_library", lambda library: None)
    monkeypatch.setattr(torch.ops, "wkv6", library_s)
    assert start(capsys) == start(capsys) == ("", [])
    assert built == [["wkv6_cuda_op.cpp", "wkv6_cuda.cu"]]
    assert machine == [("library's", "CUDA")] * 2


def test_where_nvcc_fails_nvrtc_compiles_and_nvcc_is_not_tried_again(
    machine, tmp_path, monkeypatch, capsys
):
    install_nvcc(tmp_path, monkeypatch)
    problem, lines = start(capsys)
    assert problem == "" and isinstance(machine[0][0], nvrtc.Launcher)
    note = r"note: the build failed \(fatal.*; CUDA_HOME is .*\. Using NVRTC instead\.$"
    assert lines[-2] == COMPILING and re.match(note, lines[-1])
    assert start(capsys) == ("", [])


def test_on_windows_nvrtc_compiles_though_nvcc_is_there(machine, tmp_path, monkeypatch, capsys):
    install_nvcc(tmp_path, monkeypatch)
    monkeypatch.setattr(sys, "platform", "win32")
    assert start(capsys) == ("", [COMPILING])
    assert isinstance(machine[0][0], nvrtc.Launcher)


def test_on_windows_there_is_no_kernel_for_cpus(machine, monkeypatch, capsys):
    monkeypatch.setattr(sys, "platform", "win32")
    problem, [note] = start(capsys, "cpu")
    assert problem == (
        "the compiled WKV-6 kernel is unavailable: for CPUs it is not built on Windows"
    )
    assert note == f"note: {problem}. Using the chunked form, which is slower."


@pytest.mark.parametrize("device_type", ["xpu", "mps", "gpu"])
def test_a_device_without_a_kernel_says_so_in_one_line(device_type, capsys):
    problem, [note] = start(capsys, device_type)
    assert problem == f"there is no compiled WKV-6 kernel for {device_type}"
    assert note == f"note: {problem}. Using the chunked form, which is slower."


def test_load_raises_what_kernel_problem_returns():
    problem = "there is no compiled WKV-6 kernel for xpu"
    with pytest.raises(compiled.KernelUnavailable, match=problem):
        compiled.load("xpu")
    assert wkv6.kernel_problem("xpu") == problem


def test_a_kernel_can_be_registered_for_another_type_of_device(machine, monkeypatch, capsys):
    loaded = []
    monkeypatch.setitem(compiled.LOADERS, "gpu", lambda: loaded.append("gpu"))
    assert start(capsys, "gpu") == ("", []) and loaded == ["gpu"]
