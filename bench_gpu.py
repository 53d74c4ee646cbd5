"""What a person with a GPU should run once: `python bench.py gpu`, at most 8 minutes.

One need not read this to understand Bone. It prints tables, and writes them to a Markdown file,
gpu-report-<card>.md, in the current folder. `python bench.py gpu --standin` rehearses it on
gpu_standin.py, with a tiny model, whose figures mean nothing.

Every job is a process of its own, with a time limit. Whatever happens to it, even a crash of the
driver, the others go on, and what it measured before stays. A job prints the cells of a row with
tabs between them; the process that started it puts them into the table.
"""

import contextlib
import dataclasses
import io
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import time

import psutil
import torch

HERE = pathlib.Path(__file__).parent
SECONDS = 480  # for everything


# ---- what is measured --------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Part:
    """A table of the report.

    jobs: functions of bench_gpu_jobs.py with their arguments; limit: seconds that one may take.
    """

    title: str
    note: str
    columns: str
    jobs: tuple[str, ...]
    limit: int = 90


STEP = (
    "step, ms | tokens/s | GPU busy, ms | W' / Bone | busy | Bone / LoRA | busy | products / busy "
    "| loss"
)
PARTS = (
    Part("The machine", "", "what | found", ("machine",), limit=200),
    Part(
        "Tests of the kernels", "", "test_wkv6_cuda.py on the GPU | result", ("tests",), limit=120
    ),
    Part(
        "WKV-6",
        "32 heads of 64, bfloat16, forward + backward. The copy moves the bytes that the operator "
        "cannot do without. Each ratio is that time / compiled's.",
        "tokens | compiled, ms | chunked, ms | ratio | copy, ms | ratio",
        ("wkv",),
    ),
    Part(
        "One layer",
        "bat, bfloat16, forward + backward, launched as one CUDA graph, so that the GPU alone is "
        "timed. called: Bone's time where the host launches every kernel.",
        "layer | tokens | frozen, ms | Bone, ms | W', ms | Bone / frozen | W' / Bone | called, ms",
        ("layer",),
    ),
    Part(
        "A whole optimizer step, 1.6B",
        "All blocks, random weights, bat, --grad_cp 1. W': with W' built in every step. products: "
        "the matrix products alone that a step cannot do without. busy: the GPU's time alone, "
        "which the profiler counts; the rest of a step the GPU waits for the host.",
        f"base | tokens | {STEP}",
        ("step none", "step nf4", "step int8"),
    ),
    Part(
        "Waits for the GPU in a step",
        "As PyTorch's set_sync_debug_mode counts them.",
        "base | waits | where",
        ("waits none", "waits nf4"),
    ),
    Part(
        "Launches for 512 tokens, 1.6B",
        "Of forward, recomputation and backward, counted by launches.py without running them.",
        "part | launches | GB read and written",
        ("launches",),
    ),
    Part(
        "Peak memory in GB",
        "Two steps of 1024 tokens, micro_bsz 1, bat. allocated: by tensors; reserved: with what "
        "PyTorch's allocator keeps; in use: of the whole card, after them; --dry_run: what "
        "train.py expects; tutorial: that of RWKV-PEFT.",
        "model | allocated | reserved | in use | --dry_run | tutorial",
        (
            *("peak 1.6B none", "peak 1.6B int8", "peak 1.6B nf4"),
            *("peak_of_train none", "peak_of_train nf4"),
            *("peak 3B none", "peak 3B int8", "peak 3B nf4"),
            *("peak 7B none", "peak 7B int8", "peak 7B nf4"),
        ),
        limit=120,
    ),
    Part(
        "WKV-6 beside fla",
        "As above. Triton compiles fla's kernels first, which takes a minute or more.",
        "tokens | compiled, ms | fla, ms | ratio",
        ("wkv_fla",),
        limit=120,
    ),
)
REHEARSED = {
    "step none": ("step none nf4",),
    "waits none": ("waits none",),
    "peak 1.6B none": ("peak tiny nf4", "peak_of_train none"),
}


def rehearsal(part: Part) -> Part:
    """Return the same part with fewer processes, for the stand-in and its tiny model."""
    jobs = next((REHEARSED[job] for job in part.jobs if job in REHEARSED), part.jobs)
    return dataclasses.replace(part, jobs=jobs)


# ---- the report --------------------------------------------------------------------------------


class Report:
    """The tables, printed and written to a file as they come."""

    def __init__(self) -> None:
        self.card = "unknown"
        self.lines: list[str] = []

    def add(self, *lines: str) -> None:
        for line in lines:
            print(line, flush=True)
        self.lines += lines

    def path(self) -> pathlib.Path:
        card = re.sub(r"[^\w.-]+", "-", self.card)
        return pathlib.Path(f"gpu-report-{card}.md")

    def save(self) -> None:
        self.path().write_text("\n".join([*self.lines, ""]), encoding="utf-8")

    def begin(self, part: Part) -> None:
        """Add the head of a table."""
        self.add("", f"## {part.title}", "")
        if part.note:
            self.add(part.note, "")
        columns = part.columns.split(" | ")
        self.widths = [max(len(column), 20 if i == 0 else 8) for i, column in enumerate(columns)]
        self.row(columns)
        self.row(["-" * width for width in self.widths])

    def row(self, cells: list[str]) -> None:
        """Add a row to the table; what it lacks to the right stays empty."""
        cells = [cell.replace("|", "/") for cell in cells]
        cells += [""] * (len(self.widths) - len(cells))
        padded = [cell.ljust(width) for cell, width in zip(cells, self.widths, strict=False)]
        self.add(f"| {' | '.join(padded)} |")


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Rows of the table; why there are no more, or ""; the last lines of stderr."""

    rows: list[list[str]]
    problem: str
    tail: str


def command(job: str, standin: bool) -> list[str]:
    """Return the command line of a job's process."""
    switch = ["--standin"] if standin else []
    return [sys.executable, str(HERE / "bench_gpu_jobs.py"), *switch, *job.split()]


def run_job(arguments: list[str], folder: str, seconds: float) -> Outcome:
    """Run a process in `folder`, at most so long, and read what it printed."""
    environment = os.environ | {"PYTHONUTF8": "1", "PYTHONUNBUFFERED": "1"}
    with open(f"{folder}/stdout", "w+b") as out, open(f"{folder}/stderr", "w+b") as err:
        process = subprocess.Popen(arguments, stdout=out, stderr=err, cwd=folder, env=environment)
        try:
            code = process.wait(seconds)
            problem = ""
        except subprocess.TimeoutExpired:
            code = 0
            problem = f"stopped after {seconds:.0f} s"
        finally:
            end_with_children(process)
        said, complaints = (read_back(file) for file in (out, err))
    if code:
        last = complaints.rstrip().rpartition("\n")[2].strip()
        problem = f"failed, exit code {code}: {last[:300]}"
    rows = [line.split("\t") for line in said.splitlines() if "\t" in line]
    shown = problem or "Traceback" in complaints
    tail = complaints.splitlines()[-20:] if shown else []
    return Outcome(rows, problem, "\n".join(tail))


def read_back(file: io.BufferedRandom) -> str:
    file.seek(0)
    return file.read().decode("utf-8", "replace")


def end_with_children(process: subprocess.Popen) -> None:
    """Kill a process that has not ended, and those that it started, compilers say."""
    with contextlib.suppress(psutil.NoSuchProcess):
        for child in psutil.Process(process.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
    if process.poll() is None:
        process.kill()
        process.wait()


def run_part(report: Report, part: Part, folder: str, *, standin: bool, deadline: float) -> None:
    """Run the jobs of a part, one after the other, and add what they found."""
    report.begin(part)
    began = time.monotonic()
    tails = []
    for job in part.jobs:
        left = deadline - time.monotonic()
        if left < 1:
            report.row([job, "left out: no time"])
            continue
        outcome = run_job(command(job, standin), folder, min(left, part.limit))
        if job == "machine" and outcome.rows:
            report.card = outcome.rows[0][1]
        for cells in outcome.rows:
            report.row(cells)
        if outcome.problem:
            report.row([job, outcome.problem])
        tails.append(outcome.tail)
        report.save()
    report.add("", f"({time.monotonic() - began:.0f} s)")
    for tail in filter(None, tails):
        report.add("", "```", tail, "```")
    report.save()


def main(arguments: list[str]) -> None:
    """Measure everything and write the report. ValueError where there is no GPU."""
    for argument in arguments:
        if argument != "--standin":
            raise ValueError(f"bench.py gpu takes no {argument}; --standin rehearses it")
    standin = "--standin" in arguments
    if not standin and not torch.accelerator.is_available():
        raise ValueError(
            "PyTorch sees no GPU here; `python bench.py gpu --standin` rehearses the report on a "
            "stand-in for one, for which a C++ compiler is needed"
        )
    compiler = os.environ.get("CXX", "c++")
    if standin and not shutil.which(compiler):
        raise ValueError(f"--standin needs a C++ compiler, and {compiler} was not found")
    report = Report()
    title = "# Bone for RWKV-6 on a GPU"
    if standin:
        title += ", rehearsed without one"
    report.add(title)
    deadline = time.monotonic() + SECONDS
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        for part in PARTS:
            part = rehearsal(part) if standin else part
            run_part(report, part, folder, standin=standin, deadline=deadline)
    what_next = "its figures mean nothing" if standin else "please send it to us as an issue"
    print(f"\nwrote {report.path()}; {what_next}")
