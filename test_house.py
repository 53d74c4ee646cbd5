"""The rules that no linter checks: sizes of files and functions, parameters, one way of imports."""

import ast
import os
import pathlib
import subprocess
import sys

import pytest

HERE = pathlib.Path(__file__).parent
LEARN = ("bone", "quant", "wkv6", "rwkv6", "loss", "data", "train", "merge")
FILES = {path.stem: path for path in sorted(HERE.glob("*.py"))}
PRODUCT = {name: path for name, path in FILES.items() if not name.startswith("test_")}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in FILES.items()}
LOOP = ("train", "run")  # the training loop may have ten lines more
# What each file that teaches the method may import, beside torch and the standard library.
MAY_IMPORT = {
    "quant": set(),
    "wkv6": {"compiled"},
    "bone": {"quant"},
    "rwkv6": {"quant", "wkv6", "config", "formulas", "initialize"},  # three parts of the model
    "loss": {"rwkv6"},
}


def functions(name):
    """The functions of a file, those within classes and functions too."""
    return [node for node in ast.walk(TREES[name]) if isinstance(node, ast.FunctionDef)]


def lines_of(node):
    return node.end_lineno - node.lineno + 1


def is_tensor(argument):
    return argument.annotation is not None and "Tensor" in ast.unparse(argument.annotation)


def parameters(function):
    """(Names of positional parameters, names of all) but self, cls and the tensors of a formula."""
    positional = function.args.posonlyargs + function.args.args
    everything = positional + function.args.kwonlyargs
    names = []
    for arguments in (positional, everything):
        counted = [a.arg for a in arguments if not is_tensor(a)]
        names.append([name for name in counted if name not in ("self", "cls", "ctx")])
    return names


@pytest.mark.parametrize("name", FILES)
def test_functions_are_short(name):
    long = {}
    for function in functions(name):
        limit = 60 if (name, function.name) == LOOP else 50
        if lines_of(function) > limit:
            long[function.name] = lines_of(function)
    assert not long


# PyTorch, and who launches a kernel, call these by position.
BY_POSITION = ("forward", "backward", "__torch_dispatch__", "__call__")


@pytest.mark.parametrize("name", PRODUCT)
def test_parameters_are_few_and_those_after_the_third_are_named(name):
    wrong = {}
    for function in functions(name):
        positional, everything = parameters(function)
        by_position = positional[3:] and function.name not in BY_POSITION
        if len(everything) > 6 or by_position:
            wrong[function.name] = everything
    assert not wrong


def test_files_are_short():
    sizes = {
        name: len(path.read_text(encoding="utf-8").splitlines()) for name, path in PRODUCT.items()
    }
    assert sum(sizes[name] for name in LEARN) <= 2000
    assert not {name: n for name, n in sizes.items() if n > (350 if name in LEARN else 450)}


@pytest.mark.parametrize("name", sorted(PRODUCT.keys() - {*LEARN}))
def test_a_file_that_one_need_not_read_says_so(name):
    text = ast.get_docstring(TREES[name])
    assert text and "need not read" in " ".join(text.split()), f"{name}.py: what is it for?"


def imported(name):
    """Modules of this project that a file imports at its top, or within."""
    found = set()
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        if isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.partition(".")[0])
    return found & FILES.keys()


@pytest.mark.parametrize("name", MAY_IMPORT)
def test_a_file_that_teaches_imports_little(name):
    assert imported(name) <= MAY_IMPORT[name]


def test_imports_go_one_way():
    """No file imports, at its top, one that imports it."""
    at_top = {
        name: {
            module
            for node in TREES[name].body
            if isinstance(node, ast.Import | ast.ImportFrom)
            for module in (
                [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module]
            )
            if module in PRODUCT
        }
        for name in PRODUCT
    }
    order = []
    while waiting := at_top.keys() - set(order):
        ready = [name for name in waiting if at_top[name] <= {*order, name}]
        assert ready, f"these import one another: {sorted(waiting)}"
        order += ready


def test_no_name_is_one_of_the_standard_library():
    assert not FILES.keys() & sys.stdlib_module_names


@pytest.mark.parametrize("flag, code", [("--help", 0), ("--bone_rr 3", 2)])
def test_help_and_refused_flags_need_no_torch(flag, code, tmp_path):
    """They are answered before PyTorch is imported, which takes seconds."""
    (tmp_path / "torch.py").write_text("raise RuntimeError('imported')")
    command = [sys.executable, "train.py", *flag.split()]
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    ended = subprocess.run(command, cwd=HERE, env=environment, capture_output=True, text=True)
    assert ended.returncode == code
    assert ("usage" in ended.stdout) or ("did you mean --bone_r" in ended.stderr)
