"""`python bench.py gpu` on a stand-in for a GPU, with a tiny model; and with parts that fail."""

import os
import pathlib
import shutil
import sys
import time
import warnings

import pytest
import torch

import bench_gpu
import bench_gpu_jobs
import bench_gpu_race
import bench_memory
import estimate
import memory
import train
from plan import resolve_options

HERE = pathlib.Path(__file__).parent
compiler = pytest.mark.skipif(
    sys.platform == "win32" or not shutil.which(os.environ.get("CXX", "c++")),
    reason="no C++ compiler to build the stand-in with",
)
SCRIPTS = {
    "crashes": "print('first', 'measured', sep='\\t', flush=True); import os; os.abort()",
    "raises": "raise RuntimeError('out of luck')",
    "hangs": "print('before', 'the end', sep='\\t', flush=True); import time; time.sleep(60)",
}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return tmp_path


@pytest.fixture
def scripts(monkeypatch):
    """Make jobs of SCRIPTS run those."""
    plain = bench_gpu.command

    def command(job, standin):
        return [sys.executable, "-c", SCRIPTS[job]] if job in SCRIPTS else plain(job, standin)

    monkeypatch.setattr(bench_gpu, "command", command)


def part(*jobs, limit=20):
    return bench_gpu.Part(jobs[0], "", "what | found", jobs, limit)


def tables(report):
    """{title: rows, each a list of cells} of a report's file."""
    found = {}
    for section in report.read_text(encoding="utf-8").split("\n## ")[1:]:
        lines = [line for line in section.splitlines() if line.startswith("| ")][2:]
        found[section.partition("\n")[0]] = [
            [cell.strip() for cell in line.strip("|").split("|")] for line in lines
        ]
    return found


@pytest.mark.exhaustive
@compiler
def test_every_part_has_its_figures_and_one_that_fails_leaves_the_others(
    folder, scripts, monkeypatch
):
    first, *rest = bench_gpu.PARTS
    monkeypatch.setattr(bench_gpu, "PARTS", (first, part("crashes"), *rest))
    bench_gpu.main(["--standin"])

    found = tables(folder / "gpu-report-a-stand-in-for-a-GPU.md")
    assert found.keys() == {p.title for p in bench_gpu.PARTS}
    assert found["The machine"][0] == ["card", "a stand-in for a GPU"]
    assert "no compiled WKV-6 kernel" in str(found["The machine"])
    assert found["crashes"][0] == ["first", "measured"]
    assert found["crashes"][1][1].startswith("failed, exit code ")
    assert "skipped" in str(found["Tests of the kernels"])
    assert "not available" in str(found["Waits for the GPU in a step"])
    for title, rows in found.items():
        assert rows and (title == "crashes" or "exit code" not in str(rows)), title

    check_figures(found)


def check_figures(found):
    """Figures stand where they should."""
    [[_, compiled, chunked, _, copied, _]] = found["WKV-6"]
    assert compiled == "not there" and float(chunked) > 0 and float(copied) > 0
    [[_, _, *times]] = found["One layer"]
    assert all(float(figure) > 0 for figure in times)
    steps = found["A whole optimizer step, 1.6B"]
    assert [row[0] for row in steps] == ["none", "nf4"]
    for _, _, ms, speed, busy, built, built_busy, lora, lora_busy, products, loss in steps:
        assert min(float(ms), float(speed), float(built)) > 0
        assert {busy, built_busy, lora_busy, products} == {"?"}  # only a profiler of GPUs can tell
        assert lora in ("-", "no peft") or float(lora) > 0
        assert abs(float(loss) - 5.55) < 0.1  # of 256 tokens, none of which is likelier
    peaks = {name: cells for name, *cells in found["Peak memory in GB"]}
    assert peaks.keys() == {"tiny nf4", "tiny none, train.py"}
    for allocated, _, _, expected, _ in peaks.values():
        of_tensors = float(expected) - memory.GPU_PROGRAM / 1e9
        assert float(allocated) == pytest.approx(of_tensors, abs=6e-3)  # train.py says 0.01 GB


def test_a_job_that_raises_or_hangs_says_so_and_what_it_found_stays(folder, scripts):
    report = bench_gpu.Report()
    now = time.monotonic()
    for jobs, deadline in ((part("raises", "hangs", limit=2), now + 60), (part("crashes"), now)):
        bench_gpu.run_part(report, jobs, str(folder), standin=True, deadline=deadline)

    found = tables(folder / "gpu-report-unknown.md")
    assert found["raises"] == [
        ["raises", "failed, exit code 1: RuntimeError: out of luck"],
        ["before", "the end"],
        ["hangs", "stopped after 2 s"],
    ]
    assert found["crashes"] == [["crashes", "left out: no time"]]
    assert "Traceback" in (folder / "gpu-report-unknown.md").read_text()


def test_without_a_gpu_it_is_one_line(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"sees no GPU here; .*--standin"):
        bench_gpu.main([])
    with pytest.raises(ValueError, match="takes no --fast"):
        bench_gpu.main(["--fast"])


@pytest.mark.parametrize("kind", ["none", "nf4"])
def test_the_expected_memory_is_that_of_dry_run(folder, kind):
    cpu = torch.device("cpu")
    setup = bench_gpu_jobs.Setup(cpu, bench_gpu_jobs.TINY)
    flags = bench_memory.prepare_run(".", setup.sizes.config("tiny"), 32, r=setup.sizes.r)
    options = resolve_options(train.parse_args([*flags, "--quant", kind]))
    _, parts = estimate.expected_memory(options, cpu)
    expected = bench_gpu_jobs.expected_bytes(setup, "tiny", kind, tokens=32)
    assert expected == sum(parts.values())


def test_waits_are_counted_by_pytorch_s_warnings():
    modes = []

    def run():
        warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        warnings.warn("something else", stacklevel=1)

    [place] = bench_gpu_race.synchronizations(run, modes.append)
    assert place.startswith("test_bench_gpu.py:") and modes == ["warn", "default"]


def test_every_job_is_there():
    names = {job.split()[0] for part in bench_gpu.PARTS for job in part.jobs}
    assert names == bench_gpu_jobs.JOBS.keys()
