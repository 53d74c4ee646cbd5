"""The versions that `make test-versions` takes are those that the requirements name."""

import pathlib
import re

import pytest

import versions

HERE = pathlib.Path(__file__).resolve().parent


def version_in(file, before):
    """Return what stands behind `before` in a requirements file, up to the end of the line."""
    return re.search(rf"^{re.escape(before)}(\S+)$", (HERE / file).read_text(), re.MULTILINE)[1]


def full(version):
    """Return a version with all three of its numbers: 2.11 is 2.11.0."""
    return [*version.split("."), "0"][:3]


def test_the_oldest_is_the_lower_bound_and_the_newest_is_the_pin():
    oldest, *_, newest = versions.VERSIONS
    assert full(oldest) == full(version_in("requirements.txt", "torch>="))
    assert newest == version_in("constraints.txt", "torch==")


def test_a_pin_gives_way_to_what_torch_has_brought_along():
    pins = versions.pins_beside(
        ["torch==2.11.0", "setuptools==81.0.0", "typing_extensions==4.16.0"]
    )
    names = [versions.name_of(pin) for pin in pins]
    assert "numpy" in names and "pyrwkv-tokenizer" in names
    assert "torch" not in names and "setuptools" not in names


def test_the_table_has_a_row_for_a_version_that_could_not_be_installed():
    whole = versions.Row("2.13.0", {"PyTorch": "2.13.0", "build": "CPU", "tests": "7 passed"})
    broken = versions.Row("2.11.0", {"PyTorch": "2.11.0"})
    broken.fail("build", "exit code 1: no such version")
    assert versions.table([broken, whole]).splitlines() == [
        "| PyTorch | build | tests | CPU library | GPU library | fake forward |",
        "| --- | --- | --- | --- | --- | --- |",
        "| 2.11.0 | failed | - | - | - | - |",
        "| 2.13.0 | CPU | 7 passed | - | - | - |",
        "",
        "- 2.11.0, build: exit code 1: no such version",
    ]


def test_a_failing_test_is_named_once_however_many_its_parameters(tmp_path):
    log = tmp_path / "tests.log"
    log.write_text("FAILED test_a.py::f[1] - x\nERROR test_a.py::f[2 b]\nFAILED test_a.py::g\n")
    named = ["`test_a.py::f`: 2 failed", "`test_a.py::g`: 1 failed"]
    assert versions.failed_tests(log) == named


def test_the_reason_is_pip_s_first_error(tmp_path):
    log = tmp_path / "install.log"
    log.write_text("Collecting torch\nERROR: no torch==9.9\nERROR: no matching torch\n[notice]\n")
    assert versions.reason(log) == "ERROR: no torch==9.9"
    log.write_text("Traceback\nOSError: no space\n\n")
    assert versions.reason(log) == "OSError: no space"


@pytest.mark.parametrize(
    "arguments, problem",
    [
        (["2.x"], "2.x is not a version"),
        (["--tests", "test_no.py"], "--tests test_no.py: there is"),
    ],
)
def test_a_typo_is_refused_before_anything_is_installed(monkeypatch, capsys, arguments, problem):
    monkeypatch.setattr("sys.argv", ["versions.py", *arguments])
    monkeypatch.setattr(versions, "check", None)
    with pytest.raises(SystemExit) as ended:
        versions.main()
    assert ended.value.code == 2 and problem in capsys.readouterr().err
