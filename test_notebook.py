"""learn_bone.ipynb runs and says what is stored in it; the Chinese one has its code and outputs."""

import importlib.util
import pathlib
import re

import pytest

nbformat = pytest.importorskip("nbformat")
pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")

ROOT = pathlib.Path(__file__).parent


def make_notebooks():
    """The module that makes them."""
    path = ROOT / "docs" / "make_notebooks.py"
    spec = importlib.util.spec_from_file_location("make_notebooks", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def stored(name):
    return nbformat.read(ROOT / name, as_version=4)


def printed(notebook):
    """What the cells print, one text for each code cell."""
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    return ["".join(output.get("text", "") for output in cell.outputs) for cell in cells]


def pictures(notebook):
    outputs = [o for cell in notebook.cells for o in cell.get("outputs", ())]
    return sum("image/png" in output.get("data", ()) for output in outputs)


NUMBER = re.compile(r"-?\d+\.\d+|-?\d+")


def test_it_runs_and_says_what_is_stored_in_it():
    module = make_notebooks()
    found, expected = module.run(module.ENGLISH), stored("learn_bone.ipynb")
    assert pictures(found) == pictures(expected) == 2
    for text, expected_text in zip(printed(found), printed(expected), strict=True):
        assert NUMBER.sub("", text) == NUMBER.sub("", expected_text)
        numbers, expected_numbers = (
            list(map(float, NUMBER.findall(t))) for t in (text, expected_text)
        )
        # Other machines round otherwise, which 100 steps of training make larger.
        assert numbers == pytest.approx(expected_numbers, rel=0.05, abs=0.005)


def test_the_chinese_one_has_the_same_code_and_outputs():
    english, chinese = stored("learn_bone.ipynb").cells, stored("learn_bone.zh.ipynb").cells
    assert len(english) <= 20
    for cell, twin in zip(english, chinese, strict=True):
        assert cell.cell_type == twin.cell_type
        if cell.cell_type == "code":
            assert cell == twin
        else:
            # A formula or a name of code that one has, the other has.
            for pattern in (r"\$\$.+?\$\$", r"`[^`]+`"):
                assert {*re.findall(pattern, cell.source)} == {*re.findall(pattern, twin.source)}
