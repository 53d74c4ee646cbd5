"""Damaged and hostile files, many at a time: each is given to a program in a process of its own. It is accepted, and then what comes out is
held against a plain reading of the same file; or it is refused in one line, with exit code 2. Nothing else changes, within 10 s and 1 GB."""

import contextlib
import io
import json
import os
import pathlib
import pickle
import random
import re
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
import zipfile

import numpy as np
import torch
from safetensors.torch import load_file

import bone
import cli
import corpus
import data
import generate
import merge
import tokenizer
import train
import wkv6
from quant import quantize
from test_train import bone_of, counting, tiny

TRAIN = "--load_model base.pth --data_file x --bone_r 16 --ctx_len 32 --micro_bsz 4 --accelerator cpu --grad_cp 0 --lr_init 1e-3 "


# ---- inputs -------------------------------------------------------------------------------------------------------------------


def in_bytes(content, r):
    """Bit flips, cuts, swapped and repeated pieces, hostile numbers; most often in the first or last bytes, where headers are."""
    content, n = bytearray(content), len(content)

    def place():
        return min(
            n - 1,
            r.choice((r.randrange(n), r.randrange(min(n, 64)), max(0, n - 1 - r.randrange(400)))),
        )

    for _ in range(r.choice((1, 1, 1, 2, 5))):
        a, b, size = place(), place(), r.choice((1, 2, 4, 8, 64))
        kind = r.randrange(7)
        if kind <= 1:
            content[a] ^= 1 << r.randrange(8)
        elif kind == 2:
            content[a : a + size] = r.randbytes(size)
        elif kind == 3:
            content[a : a + 8] = struct.pack(
                "<q",
                r.choice((2**60, 2**63 - 1, -1, 0, 2**31, 2**31 - 1, -(2**63), 255, 2**32 + 5)),
            )
        elif kind == 4:
            content[a : a + size], content[b : b + size] = (
                content[b : b + size],
                content[a : a + size],
            )
        elif kind == 5:
            content[a:a] = content[b : b + size]
        else:
            del content[a : a + r.choice((1, size, n))]
        n = len(content)
        if not n:
            break
    return bytes(content)


class Code:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def in_a_dict(tensors, r):
    """One wrong entry, as a program or an attacker would write it; None where the whole is something else than a dict."""
    name, other = r.sample([*tensors], 2)
    tensor = tensors[name]
    if r.random() < 0.05:
        return r.choice(([tensor], None, tensor, Code(), {}, {"a": {"b": tensor}}))
    if r.random() < 0.35:
        new = r.choice(
            (
                f"blocks.{10**12}.att.key.weight",
                "blocks.9.att.key.weight",
                "blocks.-1.x",
                "../../evil",
                "",
                "\0",
                "two\nlines",
                "\x1b[2J",
                "x" * 100_000,
                "emb.bone",
                "blocks.0.ln1.bone",
                "blocks.0.att.key.bone",
                "about",
                other,
                7,
                name + ".bone",
                "weights." + name,
            )
        )
        return (
            {k if k != name else new: v for k, v in tensors.items()}
            if r.random() < 0.6
            else tensors | {new: tensor}
        )
    wrong = r.choice(
        (
            tensors[other],
            tensor.mT if tensor.ndim > 1 else tensor[None],
            tensor.flatten(),
            tensor[..., None],
            tensor.flatten()[:0],
            torch.tensor(1.0),
            tensor.flatten()[:-1],
            *(
                tensor.to(dtype)
                for dtype in (
                    torch.float64,
                    torch.float16,
                    torch.int64,
                    torch.bool,
                    torch.complex64,
                    torch.float8_e4m3fn,
                )
            ),
            torch.ones(1).expand(2**20, 2**20),
            torch.ones(()).expand(tensor.shape),
            torch.empty(tensor.shape, device="meta"),
            torch.ones(2, 2).to_sparse(),
            torch.full_like(tensor, torch.nan) if tensor.is_floating_point() else tensor + 1,
            tensor * 1e30 if tensor.is_floating_point() else ~tensor,
            torch.empty(0, 2**40),
            Code(),
            {"a": 1},
            None,
            "text",
            torch.nn.Parameter(tensor) if tensor.is_floating_point() else tensor,
        )
    )
    return (
        tensors | {name: wrong}
        if r.random() < 0.9
        else {k: v for k, v in tensors.items() if k != name}
    )


class Large:
    def __reduce__(self):
        return bytearray, (6 << 30,)


def hostile(path, r):
    """What torch.load(weights_only=True) takes, or fails at in its own way: any amount of memory, hashes without end, attributes in the place of
    methods, memory that is read with its sign changed."""
    tensors = torch.load(path, weights_only=True)
    name = r.choice([*tensors])
    kind = r.randrange(4)
    if kind == 0:
        return torch.save(tensors | {name: Large()}, path)
    if kind == 1:
        nested = ()
        for _ in range(60):
            nested = (nested, nested)
        with zipfile.ZipFile(path, "w") as archive:  # {nested: 1}, which cannot be made here either
            archive.writestr(
                "a/data.pkl", b"\x80\x02}" + pickle.dumps(nested, 2)[2:-1] + b"K\x01s."
            )
            archive.writestr("a/version", "3\n")
        return None
    if kind == 2:
        vars(tensors[name])[r.choice(("detach", "is_contiguous", "is_neg"))] = 1
        return torch.save(tensors, path)
    return torch.save(tensors | {name: torch._neg_view(tensors[name].float())}, path)


def in_a_pth(path, r):
    """Whether only bytes were changed, so that nothing but the original can be right."""
    kind = r.random()
    if kind < 0.4:
        in_a_file(path, r)
        return True
    if kind < 0.45:
        return hostile(path, r)
    if kind < 0.7:
        if r.random() < 0.1:
            return torch.save(
                in_a_dict(torch.load(path, weights_only=True), r),
                path,
                _use_new_zipfile_serialization=False,
            )
        if r.random() < 0.1:
            path.write_bytes(pickle.dumps(Code()))
            return None
        return torch.save(in_a_dict(torch.load(path, weights_only=True), r), path)
    with zipfile.ZipFile(
        path
    ) as archive:  # a damaged record, with the checksum of the damage: what an attacker would do
        records = {info.filename: archive.read(info) for info in archive.infolist()}
    name = r.choice([n for n in records if n.endswith("data.pkl")] * 3 + [*records])
    if records[name]:
        records[name] = in_bytes(records[name], r)
    with zipfile.ZipFile(
        path, "w", r.choice((zipfile.ZIP_STORED,) * 4 + (zipfile.ZIP_DEFLATED,))
    ) as archive:
        for name, content in records.items():
            archive.writestr(name, content)


def in_a_file(path, r):
    path.write_bytes(in_bytes(path.read_bytes(), r))


LINES = (
    b'{"text": 1}',
    b'{"txt": "a"}',
    b"[",
    b"[" * 100_000,
    b'{"text": "\\ud800"}',
    b'{"text": "' + b"x" * 10**6 + b'"}',
    b'{"text": "a"',
    b"\xff\xfe",
    b"null",
    b"[]",
    b'"text"',
    b'{"text": ["a"]}',
    b'{"text": "a"} {"text": "b"}',
    b'{"text": ' + b"9" * 10_000 + b"}",
    b'{"text": "\\u0000"}',
    b"\0",
    b"",
    b"{" * 50_000,
    b'\xef\xbb\xbf{"text": "a"}',
    b'{"text": "a", "text": "b"}',
    b'{"text": NaN}',
    b'{"text": ""}',
)


def in_a_text(path, r):
    lines = path.read_bytes().split(b"\n")
    if r.random() < 0.5:
        return in_a_file(path, r)
    lines[r.randrange(len(lines))] = r.choice(LINES)
    path.write_bytes(b"\n".join(lines))


ARGS = (
    "{}",
    "[]",
    "null",
    '"nf4"',
    '{"quant": null}',
    '{"quant": "fp4"}',
    '{"quant": ["nf4"]}',
    '{"quant": {}}',
    '{"quant": "int8"}',
    '{"quant": "nf4"}',
    "[" * 100_000,
    "",
    '{"quant": 1e999}',
    "\ufeff{}",
    '{"a":' * 50_000,
    '{"0": 1}',
    '{"0": "ab"}',
    '{"0": "a", "1": "a"}',
    '{"quant": ' + "9" * 10_000 + "}",
)


def in_json(path, r):
    if r.random() < 0.6:
        in_a_file(path, r)
    else:
        path.write_text(r.choice(ARGS), encoding="utf-8")


# ---- programs, and what is right when they accept ----------------------------------------------------------------------------------


def plain(path):
    return torch.load(path, weights_only=True)


def main_of(module, line):
    sys.argv = line.split()
    module.main() if module is not train else train.train(train.parse_args())


def merging():
    main_of(merge, "merge.py base.pth run/rwkv-0.pth tuned.pth")
    base, trained, tuned = plain("base.pth"), plain("run/rwkv-0.pth"), plain("tuned.pth")
    kind = json.loads(pathlib.Path("run/args.json").read_text(encoding="utf-8")).get(
        "quant", "none"
    )
    assert base.keys() == tuned.keys()
    for name, weight in base.items():
        b = trained.get(name.removesuffix("weight") + "bone")
        if b is not None:
            start = quantize(weight, kind).dequantize(torch.float32) if kind != "none" else weight
            expected = bone.merge_weight(start.contiguous(), b.contiguous()).to(weight.dtype)
        else:
            expected = (
                trained[name].reshape(weight.shape).to(weight.dtype) if name in trained else weight
            )
        assert tuned[name].equal(expected) and expected.isfinite().all(), name


def merging_for_ai00():
    main_of(merge, "merge.py base.pth run/rwkv-0.pth tuned.st")
    tuned = load_file("tuned.st")
    merging()
    expected = dict(merge.for_ai00(name, tensor) for name, tensor in plain("tuned.pth").items())
    assert tuned.keys() == expected.keys() and all(
        tuned[name].equal(tensor.detach()) for name, tensor in expected.items()
    )


def first_loss(flags):
    main_of(train, f"train.py {TRAIN} --epoch_steps 1 {flags}")
    with open("new/loss.csv") as f:
        assert all(t.isfinite().all() for t in plain("new/rwkv-0.pth").values())
        return f.readlines()[1].split(",")[1]


def training():
    loss = first_loss("--proj_dir new")
    documents = [
        [document.tolist() for document in corpus.Binidx(path)] for path in ("x", "original/x")
    ]
    if same(plain("base.pth"), plain("original/base.pth")) and documents[0] == documents[1]:
        assert loss == pathlib.Path("original/loss").read_text(), loss


def going_on_from_bones():
    loss = first_loss("--proj_dir new --bone_load run/rwkv-0.pth")
    if (
        same(plain("run/rwkv-0.pth"), plain("original/rwkv-0.pth"))
        and json.loads(pathlib.Path("run/args.json").read_text())["quant"] == "none"
    ):
        assert loss == pathlib.Path("original/bone_loss").read_text(), loss


def resuming():
    main_of(train, f"train.py {TRAIN} --epoch_steps 2 --proj_dir out --keep 9 --resume")
    assert all(t.isfinite().all() for t in plain("out/rwkv-0.pth").values())
    if same(plain("out/resume-1.pth"), plain("original/resume-1.pth")):
        assert same(plain("out/rwkv-0.pth"), plain("original/resumed.pth"))


def reading():
    documents = [document.tolist() for document in corpus.open_data("x", 300)]
    idx, tokens = pathlib.Path("x.idx").read_bytes(), pathlib.Path("x.bin").read_bytes()
    code, n = struct.unpack_from("<BQ", idx, 17)
    dtype = np.dtype({1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}[code])
    sizes, pointers = (
        struct.unpack_from(f"<{n}i", idx, 34),
        struct.unpack_from(f"<{n}q", idx, 34 + 4 * n),
    )
    assert documents == [
        np.frombuffer(tokens, dtype, size, start).tolist() for size, start in zip(sizes, pointers)
    ]
    training()


def reading_npy():
    tokens = corpus.open_data("t.npy", 300).tokens
    assert np.load("t.npy", allow_pickle=False).tolist() == tokens.tolist()


def converting():
    main_of(data, "data.py t.jsonl new")
    lines = [
        line.decode("utf-8-sig").strip()
        for line in pathlib.Path("t.jsonl").read_bytes().split(b"\n")
    ]
    texts = [text for line in lines if line and (text := json.loads(line)["text"])]
    documents = [document.tolist() for document in corpus.Binidx("new")]
    assert (
        all(document[-1] == 0 for document in documents)
        and [tokenizer.decode_bytes(document[:-1]).decode() for document in documents] == texts
    )


def speaking():
    main_of(generate, "generate.py base.pth --bone run/rwkv-0.pth --prompt bac --length 3")


PROGRAMS = [
    (in_a_pth, "base.pth", merging),
    (in_a_pth, "base.pth", merging_for_ai00),
    (in_a_pth, "base.pth", training),
    (in_a_pth, "base.pth", speaking),
    (in_a_pth, "run/rwkv-0.pth", merging),
    (in_a_pth, "run/rwkv-0.pth", merging),
    (in_a_pth, "run/rwkv-0.pth", going_on_from_bones),
    (in_a_pth, "run/rwkv-0.pth", speaking),
    (in_a_pth, "out/resume-1.pth", resuming),
    (in_a_pth, "out/resume-1.pth", resuming),
    (in_a_file, "x.idx", reading),
    (in_a_file, "x.bin", reading),
    (in_a_file, "t.npy", reading_npy),
    (in_a_text, "t.jsonl", converting),
    (in_a_text, "t.jsonl", converting),
    (in_json, "run/args.json", merging),
    (in_json, "vocab.json", speaking),
]


def same(a, b):
    return a.keys() == b.keys() and all(
        x.dtype == y.dtype and torch.equal(x, y) for x, y in zip(a.values(), b.values())
    )


def contents(folder):
    return {
        path: path.read_bytes()
        for path in sorted(pathlib.Path(folder).rglob("*"))
        if path.is_file()
    }


def prepare(folder):
    """One whole and right set of inputs, and what comes of them, in `original`."""
    with contextlib.chdir(folder):
        os.makedirs("run"), os.makedirs("original")
        torch.save(tiny(torch.float32), "base.pth")
        torch.save(
            {name: t + 0.01 * torch.randn_like(t) for name, t in bone_of("base.pth").items()},
            "run/rwkv-0.pth",
        )
        pathlib.Path("run/args.json").write_text('{"quant": "none", "bone_r": 16}')
        pathlib.Path("vocab.json").write_text(json.dumps({i: chr(97 + i) for i in range(300)}))
        corpus.write_binidx("x", counting([20, 33, 40, 9, 25]))
        np.save("t.npy", np.arange(200, dtype=np.int32) % 90)
        pathlib.Path("t.jsonl").write_text(
            "".join(json.dumps({"text": f"{i} 很好 and more"}) + "\n" for i in range(8)),
            encoding="utf-8",
        )
        for flags, name in (("", "loss"), ("--bone_load run/rwkv-0.pth", "bone_loss")):
            pathlib.Path("original", name).write_text(first_loss(f"--proj_dir new {flags}"))
            shutil.rmtree("new")
        main_of(train, f"train.py {TRAIN} --epoch_steps 2 --save_steps 1 --keep 9 --proj_dir out")
        os.rename("out/rwkv-0.pth", "original/resumed.pth"), os.unlink("out/resume-2.pth")
        for path in ("base.pth", "run/rwkv-0.pth", "out/resume-1.pth", "x.bin", "x.idx"):
            shutil.copy(path, "original")


def try_one(prepared, folder, seed, out):
    """In a child process: one mutated input, one program. Writes its verdict to the file descriptor `out`; ends the process."""
    verdict = dict(seed=seed, wrong="died", code=None)
    try:
        shutil.copytree(prepared, folder, dirs_exist_ok=True)
        os.chdir(folder)
        r = random.Random(seed)
        mutate, path, program = r.choice(PROGRAMS)
        torch.manual_seed(0)
        original = (
            pathlib.Path("original", os.path.basename(path))
            if mutate(pathlib.Path(path), r)
            else None
        )
        before, said, errors = contents("."), io.StringIO(), io.StringIO()
        pathlib.Path("/proc/self/clear_refs").write_text("5")
        start, began, wrong = peak(), time.perf_counter(), ""
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(errors):
            try:
                cli.run_cli(program)
                code = 0
            except SystemExit as end:
                code = end.code
            except BaseException:
                code, wrong = 1, traceback.format_exc()
        seconds, memory = time.perf_counter() - began, (peak() - start) / 1e9
        error = errors.getvalue().replace("\r", "\n").rstrip("\n").rpartition("\n")[2]
        after = contents(".")
        if code == 0 and original and not same(plain(path), plain(original)):
            wrong = "damage was accepted"
        elif code == 2 and (
            not error.startswith("error: ") or len(error) > 1000 or "Traceback" in errors.getvalue()
        ):
            wrong = f"exit code 2 without one line: {errors.getvalue()[-500:]}"
        elif code not in (0, 2):
            wrong = wrong or f"exit code {code}: {errors.getvalue()[-500:]}"
        elif any(after.get(path) != content for path, content in before.items()):
            changed = {path.name for path, content in before.items() if after.get(path) != content}
            if (
                program is not resuming
                or not changed <= {"args.json", "train_log.txt", "loss.csv", "loss.png"}
                or (code == 2 and "could not be saved" not in error)
            ):
                wrong = f"a file was changed: {[str(path) for path, content in before.items() if after.get(path) != content]}, exit code {code}: {error}"
        elif (
            code == 2
            and after.keys() != before.keys()
            and "not finite" not in error
            and "could not be saved" not in error
        ):
            wrong = f"refused, but wrote {after.keys() - before.keys()}: {error}"
        if pathlib.Path("executed").exists() or seconds > 10 or memory > 1:
            wrong = f"executed code, or took {seconds:.1f} s, {memory:.2f} GB: {error}"
        verdict = dict(
            seed=seed,
            program=program.__name__,
            path=path,
            code=code,
            wrong=wrong[-3000:],
            error=error,
            seconds=seconds,
            memory=memory,
        )
    except BaseException:
        verdict["wrong"] = traceback.format_exc()[-3000:]
    os.write(out, pickle.dumps(verdict))
    os._exit(0)


def peak():
    return (
        int(re.search(r"VmHWM:\s*(\d+) kB", pathlib.Path("/proc/self/status").read_text())[1])
        * 1024
    )


def fuzz(count, seed=0):
    """Try `count` inputs. Returns the verdicts; AssertionError at the first that is wrong."""
    torch.set_num_threads(1)
    wkv6.kernel_problem()
    verdicts, running = [], {}
    with tempfile.TemporaryDirectory() as folder:
        prepared = pathlib.Path(folder, "prepared")
        prepared.mkdir()
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            prepare(prepared)
        numbers = iter(range(count))
        while len(verdicts) < count:
            while len(running) < (os.cpu_count() or 1) and (n := next(numbers, None)) is not None:
                read, write = os.pipe()
                if not (pid := os.fork()):
                    try_one(prepared, pathlib.Path(folder, str(n)), f"{seed}-{n}", write)
                os.close(write)
                running[pid] = n, read, time.monotonic()
            for pid, (n, read, began) in [*running.items()]:
                if (
                    time.monotonic() - began > 30
                ):  # a hang; 10 s of its own time are measured inside
                    os.kill(pid, signal.SIGKILL)
                if os.waitpid(pid, os.WNOHANG)[0]:
                    del running[pid]
                    with open(read, "rb") as f:
                        content = f.read()
                    verdict = (
                        pickle.loads(content)
                        if content
                        else dict(seed=f"{seed}-{n}", wrong="it hung, or died of a signal")
                    )
                    assert not verdict["wrong"], verdict
                    verdicts.append(verdict)
                    shutil.rmtree(pathlib.Path(folder, str(n)))
            time.sleep(0.002)
    return verdicts


def test_damaged_and_hostile_inputs_are_accepted_rightly_or_refused_in_one_line():
    """A sample of what `make torture` tries."""
    verdicts = fuzz(120, seed="sample")
    assert len(verdicts) == 120 and 10 < sum(verdict["code"] == 0 for verdict in verdicts) < 110
