"""What nobody does on purpose, many times over.

One need not read this to understand Bone.

`python torture.py` does all of it, `python torture.py fuzz` (or disk, kill, long) a part. Anything
that is lost, wrong or unclear ends it.

fuzz: 2,000 damaged or hostile inputs, see test_fuzz.py.
disk: training on a file system of 3 MB, which fills up and is freed again.
kill: training is killed (SIGKILL) 100 times, merging and converting 50 times each, then resumed or
    repeated. Training must end with the bits of the run that was never killed; under a final name
    there is the right file or none.
long: 1,000 steps on documents many times as long as what goes through the model at once, in
    bfloat16. No loss or gradient may be NaN or infinite.
"""

import concurrent.futures
import contextlib
import csv
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from pydoc_data.topics import topics

import torch

import archive
import binidx
from test_fuzz import TRAIN, fuzz, plain, same
from test_resume import curve
from test_train import bone_of, counting, tiny

HERE = Path(__file__).parent
Process = subprocess.Popen[bytes]


# ---- kill -------------------------------------------------------------------------------------


def start(folder: Path, line: str) -> Process:
    """Start `python LINE` in a folder. HERE in the line is the folder of the programs."""
    return subprocess.Popen(
        [sys.executable, *line.replace("HERE", str(HERE)).split()],
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )


def errors_of(process: Process) -> str:
    """Return the end of what a process says on stderr, until it ends."""
    assert process.stderr is not None
    return process.stderr.read().decode()[-1000:]


def killed(process: Process, seconds: float) -> bool:
    """Kill a process after so many seconds. Return whether it was still there.

    AssertionError if it had failed.
    """
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(seconds)
    process.kill()
    errors = errors_of(process)
    assert process.wait() in (0, -signal.SIGKILL), errors
    return process.returncode != 0


def finish(process: Process) -> None:
    """Wait for a process. AssertionError if it fails."""
    errors = errors_of(process)
    assert process.wait() == 0, errors


def check_same_run(run: Path, expected: Path) -> None:
    """Compare what two runs of 200 steps wrote. AssertionError where it differs."""
    for name in ("rwkv-0.pth", "rwkv-1.pth", "resume-200.pth"):
        ours = plain(run / name)
        theirs = plain(expected / name)
        ours.pop("about", None)
        theirs.pop("about", None)
        assert same(ours, theirs), (run, name)
    assert curve(run) == curve(expected)
    wrong = {*os.listdir(run)} ^ {*os.listdir(expected)}
    assert not wrong, (run, wrong)


def kill_training(folder: Path, kills: int, r: random.Random) -> tuple[int, int, int]:
    """Return kills, complete runs (one at least), and kills that fell into a save."""
    torch.save(tiny(torch.float32, n_embd=256, vocab_size=2000), folder / "base.pth")
    binidx.write_binidx(folder / "x", counting([r.randrange(20, 60) for _ in range(50)]))
    line = (
        f"HERE/train.py {TRAIN} --bone_r 32 --train_parts time ln emb head --ctx_len 64 "
        "--val_file x --epoch_steps 100 --epoch_count 2 --save_steps 1 --resume auto --proj_dir "
    )
    finish(start(folder, line + "undisturbed"))
    done = runs = saving = 0
    while not runs or done < kills:
        process = start(folder, line + str(runs))
        if done < kills and killed(process, r.uniform(1, 9)):
            done += 1
            saving += any(folder.glob(f"{runs}/*.tmp"))
            continue
        finish(process)
        check_same_run(folder / str(runs), folder / "undisturbed")
        shutil.rmtree(folder / str(runs))
        runs += 1
    return done, runs, saving


def kill_writing(
    folder: Path, kills: int, r: random.Random, *, line: str, outputs: list[str]
) -> tuple[int, int]:
    """Kill a program that writes `outputs` again and again. Return kills, and kills in a write.

    Under these names there must always be the right files, or none.
    """
    began = time.monotonic()
    finish(start(folder, line))
    seconds = time.monotonic() - began
    expected = {name: (folder / name).read_bytes() for name in outputs}
    done = writing = 0
    while done < kills:
        for name in outputs:
            (folder / name).unlink(missing_ok=True)
        began = time.monotonic()
        if killed(start(folder, line), r.uniform(0.4, 1.05) * seconds):
            done += 1
        else:
            seconds = time.monotonic() - began  # other work beside this one has come or gone
        writing += any(folder.glob("*.tmp"))
        for name in outputs:
            if (folder / name).exists():
                assert (folder / name).read_bytes() == expected[name], name
    for name in outputs:
        (folder / name).unlink(missing_ok=True)
    finish(start(folder, line))
    for name in outputs:
        assert (folder / name).read_bytes() == expected[name], name
    assert not any(folder.glob("*.tmp"))
    return done, writing


def kill_merging(folder: Path, kills: int, r: random.Random) -> tuple[int, int]:
    """See kill_writing."""
    torch.save(tiny(torch.float32, n_embd=1024, vocab_size=16000), folder / "base.pth")
    torch.save(bone_of(folder / "base.pth"), folder / "ckpt.pth")
    line = "HERE/merge.py base.pth ckpt.pth tuned.pth"
    return kill_writing(folder, kills, r, line=line, outputs=["tuned.pth"])


def kill_converting(folder: Path, kills: int, r: random.Random) -> tuple[int, int]:
    """See kill_writing."""
    with open(folder / "t.jsonl", "w", encoding="utf-8") as f:
        for i in range(40_000):
            f.write(json.dumps({"text": f"{i} {r.randrange(10**9)} 很好 " * 20}) + "\n")
    line = "HERE/data.py t.jsonl t"
    return kill_writing(folder, kills, r, line=line, outputs=["t.bin", "t.idx"])


def kill(kills: int = 100, seed: int = 0) -> None:
    """Kill training, merging and converting. AssertionError where that does harm."""
    with tempfile.TemporaryDirectory() as name, concurrent.futures.ThreadPoolExecutor() as pool:
        folders = [Path(name, job) for job in ("train", "merge", "data")]
        for folder in folders:
            folder.mkdir()
        training = pool.submit(kill_training, folders[0], kills, random.Random(seed))
        done, writing = kill_merging(folders[1], kills // 2, random.Random(seed))
        print(f"merge.py: {done} kills, {writing} while it wrote; never a wrong file", flush=True)
        done, writing = kill_converting(folders[2], kills // 2, random.Random(seed))
        print(f"data.py: {done} kills, {writing} while it wrote; never a wrong file", flush=True)
        done, runs, saving = training.result()
        print(
            f"train.py: {done} kills, {saving} during a save; {runs} runs came to their end, "
            "each bit-identical to the undisturbed one",
            flush=True,
        )


# ---- disk -------------------------------------------------------------------------------------


# Train, fill the disk until saves fail, free it until they succeed, ask training to end.
DISK_SCRIPT = f"""set -e
mkdir small
mount -t tmpfs -o size=3m none small
{sys.executable} {HERE}/train.py {TRAIN} --epoch_steps 4000 --epoch_count 1 --save_steps 50 \\
    --proj_dir small/out > said 2> errors &
run=$!
until ls small/out/resume-*.pth > /dev/null 2>&1; do sleep 0.05; done
head -c 9m /dev/zero > small/other 2> /dev/null || true
until grep -q 'could not save' said; do sleep 0.05; done
sleep 1
ls small/out/resume-*.pth > during
cp $(cat during) during.pth
rm small/other
until ls small/out/resume-*.pth | grep -vqf during; do sleep 0.05; done
kill $run
wait $run || echo $? > code
cp small/out/loss.csv .
"""


def disk() -> None:
    """Fill the disk under a run. Needs Linux's `unshare` and `mount`."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        torch.save(tiny(torch.float32), folder / "base.pth")
        binidx.write_binidx(folder / "x", counting([20, 33, 40, 9, 25]))
        for user in ([], ["-Ur"]):
            end = subprocess.run(
                ["unshare", *user, "-m", "bash", "-c", DISK_SCRIPT],
                cwd=folder,
                env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"},
                capture_output=True,
                text=True,
                timeout=300,
            )
            if end.returncode == 0:
                break
        assert end.returncode == 0, end.stderr
        said = re.findall("could not save .*", (folder / "said").read_text())
        assert (
            "No space left on device; what was saved before is whole, the state of step" in said[0]
        ), said
        assert (folder / "code").read_text() == "143\n"
        for tensor in archive.read_tensors(folder / "during.pth").values():
            assert tensor.isfinite().all()
        steps = [
            int(line.split(",")[0]) for line in (folder / "loss.csv").read_text().splitlines()[1:]
        ]
        assert steps == [*range(len(steps))]
        print(
            f"disk full: {len(said)} saves failed, the state before them stayed whole, training "
            "went on and saved again when there was room; no row of loss.csv is missing"
        )


# ---- long -------------------------------------------------------------------------------------


def long() -> None:
    """Train on Python's help topics, character by character, in 8 chunks of a long document.

    The gradient flows through all of them, at a learning rate that is rather too high.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        text = "".join(topics.values())
        (folder / "text.txt").write_text(text, encoding="utf-8")
        common = "HERE/train.py --data_file text.txt --ctx_len 512"
        base = (
            f"{common} --epoch_steps 200 --n_layer 2 --n_embd 64 --lr_init 4e-3 --lr_final 4e-4 "
            "--grad_cp 0 --proj_dir base"
        )
        tuned = (
            f"{common} --epoch_steps 1000 --load_model base/rwkv-0.pth --bone_r 32 "
            "--train_type infctx --chunk_ctx 64 --lr_init 2e-3 --lr_final 2e-3"
        )
        finish(start(folder, base))
        finish(start(folder, tuned))
        with open(folder / "out" / "loss.csv") as f:
            losses = [float(row["loss"]) for row in csv.DictReader(f)]
        log = (folder / "out" / "train_log.txt").read_text()
        assert len(losses) == 1000 and all(map(math.isfinite, losses)), log
        assert "left out" not in log, log
        first = sum(losses[:200]) / 200
        last = sum(losses[-200:]) / 200
        assert last < first
        print(
            "long: 1,000 steps of infctx in bfloat16, 8 chunks of 64 each, on "
            f"{len(text):,} characters of text: no loss or gradient was NaN or infinite; "
            f"mean loss of the first 200 steps {first:.3f}, of the last {last:.3f}"
        )


def main() -> None:
    """Do the parts that are named on the command line, or all."""
    wanted = sys.argv[1:] or ["fuzz", "disk", "kill", "long"]
    began = time.monotonic()
    if "fuzz" in wanted:
        verdicts = fuzz(2000)
        accepted = sum(verdict["code"] == 0 for verdict in verdicts)
        seconds = max(verdict["seconds"] for verdict in verdicts)
        memory = max(verdict["memory"] for verdict in verdicts)
        print(
            f"fuzz: {len(verdicts)} inputs, {accepted} accepted and right, "
            f"{len(verdicts) - accepted} refused in one line; "
            f"at most {seconds:.1f} s and {memory:.2f} GB",
            flush=True,
        )
    if "disk" in wanted:
        disk()
    if "kill" in wanted:
        kill()
    if "long" in wanted:
        long()
    print(f"{(time.monotonic() - began) / 60:.0f} minutes")


if __name__ == "__main__":
    main()
