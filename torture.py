"""What nobody does on purpose, many times over: `python torture.py`, or one of its parts, `python torture.py fuzz`, `disk`, `kill`, `long`. Anything
that is lost, wrong or unclear ends it.

fuzz: 2,000 damaged or hostile inputs, see test_fuzz.py.
disk: training on a file system of 3 MB, which fills up and is freed again.
kill: training is killed (SIGKILL) 100 times, merging and converting 50 times each, then resumed or repeated. Training must end with the bits of
the run that was never killed; under a final name there is the right file or none.
long: 1,000 steps on documents many times as long as what goes through the model at once, in bfloat16. No loss or gradient may be NaN or infinite.
"""

import concurrent.futures
import contextlib
import csv
import json
import math
import os
import pathlib
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pydoc_data.topics import topics

import torch

import archive
import corpus
from test_fuzz import TRAIN, fuzz, plain, same
from test_train import bone_of, counting, tiny

HERE = pathlib.Path(__file__).parent


# ---- kill ---------------------------------------------------------------------------------------------------------------------


def python(folder, line, **options):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, *line.replace("HERE", str(HERE)).split()],
        cwd=folder,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        **options,
    )


def killed(process, seconds):
    """Kill a process after so many seconds. Whether it was still there; AssertionError if it had failed."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(seconds)
    process.kill()
    error = process.stderr.read().decode()[-1000:]
    assert process.wait() in (0, -signal.SIGKILL), error
    return process.returncode != 0


def whole(process):
    error = process.stderr.read().decode()[-1000:]
    assert process.wait() == 0, error


def kill_training(folder, kills, r):
    """Returns (kills, complete runs, of which there is one at least, kills that fell into a save)."""
    torch.save(tiny(torch.float32, n_embd=256, vocab_size=2000), folder / "base.pth")
    corpus.write_binidx(folder / "x", counting([r.randrange(20, 60) for _ in range(50)]))
    line = (
        f"HERE/train.py {TRAIN} --bone_r 32 --train_parts time ln emb head --ctx_len 64 --val_file x --epoch_steps 100 --epoch_count 2 --save_steps 1 "
        "--resume auto --proj_dir "
    )
    whole(python(folder, line + "undisturbed"))
    done = runs = saving = 0
    while not runs or done < kills:
        process = python(folder, line + f"{runs}")
        if done < kills and killed(process, r.uniform(1, 9)):
            done += 1
            saving += any(folder.glob(f"{runs}/*.tmp"))
            continue
        whole(process)
        for name in ("rwkv-0.pth", "rwkv-1.pth", "resume-200.pth"):
            a, b = (plain(folder / run / name) for run in (str(runs), "undisturbed"))
            a.pop("about", None), b.pop("about", None)
            assert same(a, b), (runs, name)
        assert (folder / f"{runs}/loss.csv").read_bytes() == (
            folder / "undisturbed/loss.csv"
        ).read_bytes()
        wrong = {*os.listdir(folder / str(runs))} ^ {*os.listdir(folder / "undisturbed")}
        assert not wrong, (runs, wrong)
        shutil.rmtree(folder / str(runs))
        runs += 1
    return done, runs, saving


def kill_writing(folder, kills, r, line, outputs):
    """Kill a program that writes `outputs` again and again: under these names there are the right files, or none. Returns (kills, kills while
    it wrote)."""
    began = time.monotonic()
    whole(python(folder, line))
    seconds = time.monotonic() - began
    expected = {name: (folder / name).read_bytes() for name in outputs}
    done = writing = 0
    while done < kills:
        for name in outputs:
            (folder / name).unlink(missing_ok=True)
        began = time.monotonic()
        if killed(python(folder, line), r.uniform(0.4, 1.05) * seconds):
            done += 1
        else:
            seconds = time.monotonic() - began  # other work beside this one has come or gone
        writing += any(folder.glob("*.tmp"))
        there = [name for name in outputs if (folder / name).exists()]
        assert all((folder / name).read_bytes() == expected[name] for name in there), there
    for name in outputs:
        (folder / name).unlink(missing_ok=True)
    whole(python(folder, line))
    assert all((folder / name).read_bytes() == expected[name] for name in outputs) and not [
        *folder.glob("*.tmp")
    ]
    return done, writing


def kill_merging(folder, kills, r):
    torch.save(tiny(torch.float32, n_embd=1024, vocab_size=16000), folder / "base.pth")
    torch.save(bone_of(folder / "base.pth"), folder / "ckpt.pth")
    return kill_writing(
        folder, kills, r, "HERE/merge.py base.pth ckpt.pth tuned.pth", ["tuned.pth"]
    )


def kill_converting(folder, kills, r):
    text = "".join(
        json.dumps({"text": f"{i} {r.randrange(10**9)} 很好 " * 20}) + "\n" for i in range(40_000)
    )
    (folder / "t.jsonl").write_text(text, encoding="utf-8")
    return kill_writing(folder, kills, r, "HERE/data.py t.jsonl t", ["t.bin", "t.idx"])


def kill(kills=100, seed=0):
    with tempfile.TemporaryDirectory() as name, concurrent.futures.ThreadPoolExecutor() as pool:
        folders = [pathlib.Path(name, job) for job in ("train", "merge", "data")]
        for folder in folders:
            folder.mkdir()
        training = pool.submit(kill_training, folders[0], kills, random.Random(seed))
        done, writing = kill_merging(folders[1], kills // 2, random.Random(seed))
        print(f"merge.py: {done} kills, {writing} while it wrote; never a wrong file", flush=True)
        done, writing = kill_converting(folders[2], kills // 2, random.Random(seed))
        print(f"data.py: {done} kills, {writing} while it wrote; never a wrong file", flush=True)
        done, runs, saving = training.result()
        print(
            f"train.py: {done} kills, {saving} during a save; {runs} runs came to their end, each bit-identical to the undisturbed one",
            flush=True,
        )


# ---- disk ---------------------------------------------------------------------------------------------------------------------


def disk():
    """Needs Linux's `unshare` and `mount`."""
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        torch.save(tiny(torch.float32), folder / "base.pth")
        corpus.write_binidx(folder / "x", counting([20, 33, 40, 9, 25]))
        script = f"""set -e; mkdir small; mount -t tmpfs -o size=3m none small
            {sys.executable} {HERE}/train.py {TRAIN} --epoch_steps 4000 --epoch_count 1 --save_steps 50 --proj_dir small/out > said 2> errors & run=$!
            until ls small/out/resume-*.pth > /dev/null 2>&1; do sleep 0.05; done
            head -c 9m /dev/zero > small/other 2> /dev/null || true
            until grep -q 'could not save' said; do sleep 0.05; done
            sleep 1; ls small/out/resume-*.pth > during; cp $(cat during) during.pth; rm small/other
            until ls small/out/resume-*.pth | grep -vqf during; do sleep 0.05; done
            kill $run; wait $run || echo $? > code; cp small/out/loss.csv ."""
        for user in ([], ["-Ur"]):
            end = subprocess.run(
                ["unshare", *user, "-m", "bash", "-c", script],
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
            and (folder / "code").read_text() == "143\n"
        ), said
        assert all(t.isfinite().all() for t in archive.read_tensors(folder / "during.pth").values())
        steps = [
            int(line.split(",")[0]) for line in (folder / "loss.csv").read_text().splitlines()[1:]
        ]
        assert steps == [*range(len(steps))]
        print(
            f"disk full: {len(said)} saves failed, the state before them stayed whole, training went on and saved again when there was room; no row of loss.csv is missing"
        )


# ---- long ---------------------------------------------------------------------------------------------------------------------


def long():
    """On Python's help topics, character by character, the gradient flowing through 8 chunks, at a learning rate that is rather too high."""
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        (folder / "text.txt").write_text("".join(topics.values()), encoding="utf-8")
        common = "--data_file text.txt --ctx_len 512 --epoch_steps"
        whole(
            python(
                folder,
                f"HERE/train.py {common} 200 --n_layer 2 --n_embd 64 --lr_init 4e-3 --lr_final 4e-4 --grad_cp 0 --proj_dir base",
            )
        )
        whole(
            python(
                folder,
                f"HERE/train.py {common} 1000 --load_model base/rwkv-0.pth --bone_r 32 --train_type infctx --chunk_ctx 64 --lr_init 2e-3 --lr_final 2e-3",
            )
        )
        with open(folder / "out" / "loss.csv") as f:
            losses = [float(row["loss"]) for row in csv.DictReader(f)]
        log = (folder / "out" / "train_log.txt").read_text()
        assert len(losses) == 1000 and all(map(math.isfinite, losses)) and "left out" not in log, (
            log
        )
        first, last = (sum(part) / 200 for part in (losses[:200], losses[-200:]))
        assert last < first
        print(
            f"long: 1,000 steps of infctx in bfloat16, 8 chunks of 64 each, on {len(''.join(topics.values())):,} characters of text: no loss or gradient was "
            f"NaN or infinite; mean loss of the first 200 steps {first:.3f}, of the last {last:.3f}"
        )


def main():
    wanted = sys.argv[1:] or ["fuzz", "disk", "kill", "long"]
    began = time.monotonic()
    if "fuzz" in wanted:
        verdicts = fuzz(2000)
        accepted = sum(verdict["code"] == 0 for verdict in verdicts)
        print(
            f"fuzz: {len(verdicts)} inputs, {accepted} accepted and right, {len(verdicts) - accepted} refused in one line; at most "
            f"{max(verdict['seconds'] for verdict in verdicts):.1f} s and {max(verdict['memory'] for verdict in verdicts):.2f} GB",
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
