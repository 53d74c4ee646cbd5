"""An old Python, and packages that are missing, are told in one line by every program."""

import ast
import pathlib
import re
import subprocess
import sys
import types

import pytest

import needs

HERE = pathlib.Path(__file__).parent
PROGRAMS = ("train.py", "merge.py", "generate.py", "data.py")


@pytest.mark.parametrize("name", [*PROGRAMS, "cli.py", "needs.py"])
def test_an_old_python_can_read_what_comes_before_the_check(name):
    """All of the file, as it is compiled as a whole; and no import that needs more comes first."""
    tree = ast.parse((HERE / name).read_text(encoding="utf-8"), feature_version=(3, 8))
    check = {"cli.py": "needs", "needs.py": None}.get(name, "cli")
    for node in tree.body:
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            modules = [node.module]
        else:
            continue
        if check in modules:
            return
        for module in modules:
            assert module.partition(".")[0] in sys.stdlib_module_names, module
    assert check is None


@pytest.mark.parametrize("version", ["3.8", "3.9", "3.10"])
def test_an_old_python_is_told_what_is_needed(version):
    try:
        found = subprocess.run([f"python{version}", "--version"], capture_output=True, text=True)
    except OSError:
        pytest.skip(f"no Python {version} here")
    if found.returncode:
        pytest.skip(f"no Python {version} here")
    for program in PROGRAMS:
        command = [f"python{version}", "-B", HERE / program, "--help"]
        end = subprocess.run(command, capture_output=True, text=True)
        assert (end.returncode, end.stdout) == (2, "")
        says = rf"error: this needs Python 3.11 or newer \(this is {version}\.\d+\); see .*\n"
        assert re.fullmatch(says, end.stderr)


def test_what_is_missing_is_named(monkeypatch):
    assert needs.problem() == ""
    there = {name: object() for name in needs.PACKAGES}
    monkeypatch.setattr(needs.importlib.util, "find_spec", there.get)
    for found, says in (
        ("2.5.1+cu124", "this needs PyTorch 2.11 or newer (this is 2.5.1+cu124): pip install -r"),
        ("2.11.0", ""),
        ("2.12.0a0+gitdeadbee", ""),
        ("3.0", ""),
        ("", ""),
    ):
        monkeypatch.setattr(needs, "torch_version", lambda found=found: found)
        assert needs.problem().startswith(says) and bool(needs.problem()) == bool(says)
    del there["tqdm"], there["psutil"]
    assert needs.problem().startswith("tqdm, psutil missing: pip install -r requirements.txt")
    del there["torch"]
    assert needs.problem() == "PyTorch is missing: pip install -r requirements.txt (see the README)"
    monkeypatch.setattr(sys, "version_info", (3, 10, 4, "final", 0))
    assert needs.problem() == "this needs Python 3.11 or newer (this is 3.10.4); see the README"


def test_a_program_ends_with_exit_code_2_and_an_import_is_an_error_of_its_own(monkeypatch, capsys):
    monkeypatch.setattr(needs, "problem", lambda: "PyTorch is missing")
    with pytest.raises(ImportError, match="PyTorch is missing"):
        needs.check()

    def started(program, *arguments):
        main = types.SimpleNamespace(__file__=str(HERE / program))
        monkeypatch.setitem(sys.modules, "__main__", main)
        monkeypatch.setattr(sys, "argv", [program, *arguments])
        needs.check()

    started("train.py", "--help")
    for line in (["train.py", "--lr_init", "1"], ["merge.py", "--help"]):
        with pytest.raises(SystemExit) as end:
            started(*line)
        assert end.value.code == 2
        assert capsys.readouterr().err == "error: PyTorch is missing\n"


def test_what_is_needed_is_what_the_requirements_say():
    requirements = (HERE / "requirements.txt").read_text()
    names = re.findall(r"^[\w-]+", requirements, re.MULTILINE)
    assert {name.replace("-", "_") for name in names} - set(needs.PACKAGES) == {
        "ninja",
        "matplotlib",
    }
    assert f"torch>={'.'.join(map(str, needs.TORCH))}\n" in requirements
    project = (HERE / "pyproject.toml").read_text()
    assert f'requires-python = ">={".".join(map(str, needs.PYTHON))}"' in project


def test_a_user_s_script_in_the_folder_keeps_its_ctrl_c(monkeypatch):
    """Its training must hear of Ctrl-C, to save the state."""
    for program, ours in (("train.py", "train.py"), ("mine.py", "")):
        main = types.SimpleNamespace(__file__=str(HERE / program))
        monkeypatch.setitem(sys.modules, "__main__", main)
        assert needs.program_of_ours() == ours
