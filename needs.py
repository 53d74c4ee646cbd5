"""Say in one line what is missing, Python or packages; set what PyTorch reads when it starts.

One need not read this to understand Bone. Importing it does that. cli.py does that, and every
program imports cli.py before PyTorch. So Pythons since 3.8 must be able to read this file, and all
of every program up to that import.
"""

import importlib.metadata
import importlib.util
import os
import re
import sys

PYTHON = (3, 11)
# As in requirements.txt; a test compares them. (Without ninja and matplotlib all programs run.)
TORCH = (2, 11)
PACKAGES = ("torch", "numpy", "tqdm", "filelock", "psutil", "pyrwkv_tokenizer")
PROGRAMS = ("train.py", "merge.py", "generate.py", "data.py", "bench.py")
INSTALL = "pip install -r requirements.txt (see the README)"


def problem() -> str:
    """Return in one line what is missing; "" where nothing is."""
    if sys.version_info[:2] < PYTHON:
        wanted = ".".join(map(str, PYTHON))
        found = ".".join(map(str, sys.version_info[:3]))
        return f"this needs Python {wanted} or newer (this is {found}); see the README"
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if "torch" in missing:
        return f"PyTorch is missing: {INSTALL}"
    if missing:
        return f"{', '.join(missing)} missing: {INSTALL}"
    found = torch_version()
    numbers = re.match(r"(\d+)\.(\d+)", found)
    if numbers and tuple(map(int, numbers.groups())) < TORCH:
        wanted = ".".join(map(str, TORCH))
        return f"this needs PyTorch {wanted} or newer (this is {found}): {INSTALL}"
    return ""


def torch_version() -> str:
    """Return the version of PyTorch without importing it; "" where nobody noted it."""
    try:
        return importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return ""


def program_of_ours() -> str:
    """Return the name of the program that runs, such as train.py; "" for a script of a user's."""
    main_file = getattr(sys.modules["__main__"], "__file__", None) or ""
    folder, program = os.path.split(os.path.abspath(main_file))
    is_here = folder == os.path.dirname(os.path.abspath(__file__))
    return program if is_here and program in PROGRAMS else ""


def check() -> None:
    """End the program where something is missing. Whoever imports its files gets an ImportError."""
    what = problem()
    if not what:
        return
    program = program_of_ours()
    if not program:
        raise ImportError(what)
    # train.py answers this before it imports anything.
    only_asks = program == "train.py" and {"-h", "--help", "--version"} & set(sys.argv)
    if not only_asks or sys.version_info[:2] < PYTHON:
        print(f"error: {what}", file=sys.stderr)
        sys.exit(2)


check()

if sys.platform == "linux" and "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
    # Without it, rows of changing lengths leave holes in a GPU's memory, in which the next ones
    # find no room.
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
