"""Test PyTorch from the oldest to the newest, each in an environment of its own.

One need not read this to understand Bone.

    make test-versions
    python versions.py 2.11.0 --tests test_wkv6.py test_bone.py

Each version is installed with what the tests need. Then come four checks: the WKV-6 library for
the CPU, the one for the GPU, a forward pass on a GPU that does not exist, and the tests. The table
goes to the standard output, in Markdown; the logs lie beside the environments.

An environment with a CUDA build takes 8 GB. It is kept, and made again when the requirements
change. A version that fails does not stop the next one. The exit code is 1 when any check failed.
"""

import argparse
import collections
import dataclasses
import os
import pathlib
import re
import subprocess
import sys
from collections.abc import Sequence

# The oldest is the lower bound in requirements.txt, the newest the one in constraints.txt.
VERSIONS = ("2.11.0", "2.12.0", "2.13.0")

# The GPU library is compiled for these architectures: an RTX 30, and an H100.
ARCHITECTURES = "8.6;9.0"

HERE = pathlib.Path(__file__).resolve().parent
ENVIRONMENTS = HERE / ".venv-versions"
COLUMNS = ("PyTorch", "build", "tests", "CPU library", "GPU library", "fake forward")

TOOLKIT = pathlib.Path("/usr/local/cuda")
INSTALL_SECONDS = 3600
TESTS_SECONDS = 3 * 3600
CHECK_SECONDS = 900


@dataclasses.dataclass
class Row:
    """One line of the table, by column, and the problems listed below it."""

    version: str
    cells: dict[str, str] = dataclasses.field(default_factory=dict)
    problems: list[str] = dataclasses.field(default_factory=list)

    def fail(self, column: str, reason: str) -> None:
        """Note a check that failed, and why."""
        self.cells.setdefault(column, "failed")
        self.problems.append(f"{column}: {reason}")


class CheckError(Exception):
    """A check that failed, and why, in one line."""


# ---- the environments --------------------------------------------------------------------------


def python_of(version: str) -> pathlib.Path:
    """Return the interpreter of a version's environment."""
    return ENVIRONMENTS / version / "bin" / "python"


def lines_of(file: str) -> list[str]:
    """Return the requirements in a file, without comments and references to other files."""
    lines = (HERE / file).read_text().splitlines()
    return [line for line in lines if line and not line.startswith(("#", "-"))]


def name_of(requirement: str) -> str:
    """Return the name of a requirement's package, as pip compares it."""
    name = re.split(r"[^\w.-]", requirement, maxsplit=1)[0]
    return re.sub(r"[-_.]+", "-", name).lower()


def pins_beside(installed: list[str]) -> list[str]:
    """Return the pins of constraints.txt, without torch and what was installed with it.

    Another release of PyTorch may need other versions of its requirements, of setuptools say.
    """
    names = {name_of(requirement) for requirement in installed}
    return [pin for pin in lines_of("constraints.txt") if name_of(pin) not in names]


def install(version: str) -> None:
    """Make the environment of a version, unless it is there. CheckError where pip fails."""
    requirements = lines_of("requirements.txt") + lines_of("requirements-dev.txt")
    requirements = [line for line in requirements if name_of(line) != "torch"]
    folder = ENVIRONMENTS / version
    ready = folder / "ready"
    wanted = "\n".join(requirements + lines_of("constraints.txt"))
    if ready.exists() and ready.read_text() == wanted:
        return

    log = log_of(version, "install")
    run([sys.executable, "-m", "venv", "--clear", str(folder)], log, INSTALL_SECONDS)
    pip = [str(python_of(version)), "-m", "pip", "--disable-pip-version-check"]
    run([*pip, "install", f"torch=={version}"], log, INSTALL_SECONDS)
    installed = run([*pip, "list", "--format=freeze"], log, INSTALL_SECONDS)

    pins = folder / "pins.txt"
    pins.write_text("\n".join(pins_beside(installed.splitlines())))
    command = [*pip, "install", f"torch=={version}", *requirements, "-c", str(pins)]
    run(command, log, INSTALL_SECONDS)
    ready.write_text(wanted)


def log_of(version: str, step: str) -> pathlib.Path:
    """Return the path of a step's log, empty at first."""
    ENVIRONMENTS.mkdir(exist_ok=True)
    log = ENVIRONMENTS / f"{version}-{step}.log"
    log.write_text("")
    return log


def environment_of(version: str) -> dict[str, str]:
    """Return the environment variables for a version; it has its own cache of compiled files."""
    variables = dict(os.environ)
    variables["TORCH_EXTENSIONS_DIR"] = str(ENVIRONMENTS / version / "extensions")
    variables["TORCH_CUDA_ARCH_LIST"] = ARCHITECTURES
    # If nvcc in the PATH is a link or a script, PyTorch mistakes its folder for the toolkit's.
    if TOOLKIT.exists():
        variables.setdefault("CUDA_HOME", str(TOOLKIT))
    return variables


def run(
    command: list[str],
    log: pathlib.Path,
    seconds: float,
    *,
    variables: dict[str, str] | None = None,
) -> str:
    """Run a command and return its standard output; both of its outputs go to the log, too.

    CheckError where it fails or takes too long, with the line that says why.
    """
    with log.open("a") as file, log.with_suffix(".out").open("w+") as out:
        try:
            process = subprocess.run(
                command, cwd=HERE, env=variables, stdout=out, stderr=file, timeout=seconds
            )
        except subprocess.TimeoutExpired:
            raise CheckError(f"not done after {seconds:.0f} s; {log}") from None
        out.seek(0)
        output = out.read()
        file.write(output)
    if process.returncode != 0:
        raise CheckError(f"exit code {process.returncode}: {reason(log)}; {log}")
    return output


def reason(log: pathlib.Path) -> str:
    """Return the first line of a log that pip calls an error, or else the last line."""
    errors = re.findall(r"^ERROR: .*", log.read_text(), re.MULTILINE)
    return errors[0] if errors else last_line(log)


def last_line(log: pathlib.Path) -> str:
    """Return the last line of a log that is not empty."""
    lines = [line for line in log.read_text().splitlines() if line.strip()]
    return lines[-1].strip() if lines else "it wrote nothing"


# ---- the checks, from outside ------------------------------------------------------------------


def run_tests(version: str, row: Row, tests: list[str]) -> None:
    """Run all tests, or those given, and put their counts and failures into the row."""
    log = log_of(version, "tests")
    command = [str(python_of(version)), "-m", "pytest", "-q", "-n", "2", "-rfE", *tests]
    variables = environment_of(version)
    # The tests of the build set these two themselves.
    variables.pop("TORCH_CUDA_ARCH_LIST")
    variables.pop("CUDA_HOME", None)
    try:
        run(command, log, TESTS_SECONDS, variables=variables)
    except CheckError as error:
        row.problems.append(f"tests: {error}")

    counts = dict.fromkeys(("passed", "failed", "skipped", "error"), 0)
    for number, what in re.findall(r"(\d+) (passed|failed|skipped|error)", last_line(log)):
        counts[what] = int(number)
    failed = counts["failed"] + counts["error"]
    row.cells["tests"] = f"{counts['passed']} passed, {failed} failed, {counts['skipped']} skipped"
    row.problems += failed_tests(log)


def failed_tests(log: pathlib.Path) -> list[str]:
    """Return the tests that failed by a log of pytest's, each function once, with its count."""
    functions = re.findall(r"^(?:FAILED|ERROR) ([^\s\[]+)", log.read_text(), re.MULTILINE)
    counts = collections.Counter(functions)
    return [f"`{function}`: {count} failed" for function, count in counts.items()]


def ask(version: str, step: str, call: str) -> str:
    """Call a function of this file in a version's environment; return the last line it prints.

    CheckError where it fails.
    """
    log = log_of(version, step)
    command = [str(python_of(version)), "-c", f"import versions; versions.{call}"]
    output = run(command, log, CHECK_SECONDS, variables=environment_of(version))
    return output.splitlines()[-1]


def check(version: str, tests: list[str]) -> Row:
    """Make the environment of a version and run all checks in it."""
    row = Row(version, {"PyTorch": version})
    try:
        say(version, f"environment, {ENVIRONMENTS / version}")
        install(version)
        row.cells["build"] = ask(version, "build", "print_build()")
    except CheckError as error:
        row.fail("build", str(error))
        return row

    calls = {"CPU library": "load_library('cpu')"}
    if row.cells["build"].startswith("CUDA"):
        calls["GPU library"] = "load_library('cuda')"
        calls["fake forward"] = "fake_forward()"
    for column, call in calls.items():
        say(version, column)
        try:
            row.cells[column] = ask(version, column.replace(" ", "-"), call)
        except CheckError as error:
            row.fail(column, str(error))

    say(version, "tests")
    run_tests(version, row, tests)
    return row


def say(version: str, what: str) -> None:
    """Print progress to the standard error."""
    print(f"PyTorch {version}: {what} ...", file=sys.stderr, flush=True)


# ---- the checks, inside a version's environment ------------------------------------------------


def print_build() -> None:
    """Print what the PyTorch of this environment was built for."""
    import torch

    print(f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU")


def load_library(device: str) -> None:
    """Compile and load the WKV-6 library for a kind of device, or exit with the reason."""
    import torch

    import compiled
    import wkv6  # noqa: F401 (declares the operators)
    import wkv6_gpu

    if device == "cuda":
        # `compiled.load` asks for the GPU that is there. nvcc alone is told the architectures.
        wkv6_gpu.register(compiled._launch_of_nvcc(), "CUDA")
    else:
        compiled.load(device)
    for name in ("wkv6::forward", "wkv6::backward"):
        if not torch._C._dispatch_has_kernel_for_dispatch_key(name, device.upper()):
            sys.exit(f"{name} has no kernel for {device}")
    architectures = os.environ["TORCH_CUDA_ARCH_LIST"].replace(".", "").split(";")
    names = " and ".join(f"sm_{architecture}" for architecture in architectures)
    print("loaded" if device == "cpu" else f"loaded, for {names}")


def fake_forward() -> None:
    """Send GPU tensors that have no data through every kind of model. An exception where one fails.

    Without a GPU PyTorch refuses autocast by its usual name, so it is switched on from below.
    """
    import itertools
    import tempfile

    import torch

    import compiled
    import rwkv6

    # Shapes need no kernels: pretend that the GPU's are loaded.
    compiled.LOADERS["cuda"] = lambda: None
    with tempfile.TemporaryDirectory() as folder:
        base = os.path.join(folder, "base.pth")
        torch.save(rwkv6.init_model(2, 128, 300).state_dict(), base)
        torch.set_autocast_enabled("cuda", True)
        torch.set_autocast_dtype("cuda", torch.bfloat16)
        kinds = itertools.product(("bat", "bone"), ("none", "int8", "nf4"), ("compiled", "chunked"))
        count = 0
        for mode, quant, form in kinds:
            print(f"mode {mode}, quant {quant}, WKV-6 {form}")
            fake_forward_of(base, mode=mode, quant=quant, form=form)
            count += 1
    print(f"{count} of {count}")


def fake_forward_of(base: str, *, mode: str, quant: str, form: str) -> None:
    """Send GPU tensors without data through one kind of model, in autocast's bfloat16."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    import adapt
    import checkpoint
    import rwkv6

    model = checkpoint.load_model(base, torch.bfloat16, "meta", quant=quant)
    adapt.add_bone(model, 32, mode)
    for module in model.modules():
        if isinstance(module, rwkv6.TimeMix):
            module.impl = form
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device="cuda")
        idx = torch.zeros(2, 40, dtype=torch.int64, device="cuda")
        logits = model(idx)
    assert logits.device.type == "cuda", logits.device
    assert logits.dtype == torch.bfloat16, logits.dtype
    assert logits.shape == (2, 40, 300), logits.shape


# ---- the table ---------------------------------------------------------------------------------


def markdown_row(cells: Sequence[str]) -> str:
    """Return one row of a Markdown table."""
    return f"| {' | '.join(cells)} |"


def table(rows: list[Row]) -> str:
    """Return the results as a table in Markdown, what failed below it."""
    lines = [markdown_row(COLUMNS), markdown_row(["---"] * len(COLUMNS))]
    for row in rows:
        lines.append(markdown_row([row.cells.get(column, "-") for column in COLUMNS]))
    problems = [f"- {row.version}, {problem}" for row in rows for problem in row.problems]
    if problems:
        lines += ["", *problems]
    return "\n".join(lines)


def main() -> None:
    """Check the versions of the command line, print the table, exit with 1 if any check failed."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("versions", nargs="*", default=VERSIONS, metavar="VERSION")
    parser.add_argument("--tests", nargs="*", default=[], metavar="FILE", help="not all tests")
    args = parser.parse_args()
    for version in args.versions:
        if not re.fullmatch(r"\d+\.\d+\.\d+", version):
            parser.error(f"{version} is not a version of PyTorch; give it as {VERSIONS[0]}")
    for test in args.tests:
        if not (HERE / test.partition("::")[0]).exists():
            parser.error(f"--tests {test}: there is no such file in {HERE}")
    rows = [check(version, args.tests) for version in args.versions]
    print(table(rows))
    if any(row.problems for row in rows):
        sys.exit(1)


if __name__ == "__main__":
    main()
