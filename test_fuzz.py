"""Damaged and hostile files, many at a time, each given to a program in a process of its own.

The program accepts the file, and then its output must be what a plain reading of that file gives;
or it refuses the file in one line, with exit code 2. It changes nothing else, and takes at most
10 s and 1 GB.
"""

import contextlib
import dataclasses
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
import warnings
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import ai00
import binidx
import bone
import cli
import corpus
import data
import generate
import merge
import tokenizer
import train
import wkv6
from archive import fingerprint, save_stream
from bone_record import make_records
from conftest import exhaustive
from quant import quantize
from test_train import bone_of, counting, tiny

TRAIN = (
    "--load_model base.pth --data_file x --bone_r 16 --ctx_len 32 --micro_bsz 4 "
    "--accelerator cpu --grad_cp 0 --lr_init 1e-3 "
)


# ---- inputs ----------------------------------------------------------------------------------


HOSTILE_NUMBERS = (2**60, 2**63 - 1, -1, 0, 2**31, 2**31 - 1, -(2**63), 255, 2**32 + 5)


def in_bytes(content, r):
    """Flip bits, cut, swap and repeat pieces, write hostile numbers.

    Most often this is in the first or last bytes, where headers are.
    """
    content = bytearray(content)
    n = len(content)

    def place():
        anywhere = r.randrange(n)
        near_the_start = r.randrange(min(n, 64))
        near_the_end = max(0, n - 1 - r.randrange(400))
        return min(n - 1, r.choice((anywhere, near_the_start, near_the_end)))

    for _ in range(r.choice((1, 1, 1, 2, 5))):
        a, b, size = place(), place(), r.choice((1, 2, 4, 8, 64))
        kind = r.randrange(7)
        if kind <= 1:
            content[a] ^= 1 << r.randrange(8)
        elif kind == 2:
            content[a : a + size] = r.randbytes(size)
        elif kind == 3:
            content[a : a + 8] = struct.pack("<q", r.choice(HOSTILE_NUMBERS))
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
    """Make one entry wrong, as a program or an attacker would; or the whole is not a dict."""
    name, other = r.sample([*tensors], 2)
    tensor = tensors[name]
    if r.random() < 0.05:
        return r.choice(([tensor], None, tensor, Code(), {}, {"a": {"b": tensor}}))
    if r.random() < 0.35:
        new = wrong_name(name, other, r)
        if r.random() < 0.6:
            return {new if key == name else key: value for key, value in tensors.items()}
        return tensors | {new: tensor}
    wrong = wrong_tensor(tensor, tensors[other], r)
    if r.random() < 0.9:
        return tensors | {name: wrong}
    return {key: value for key, value in tensors.items() if key != name}


def wrong_name(name, other, r):
    return r.choice(
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


def wrong_tensor(tensor, other, r):
    dtypes = (
        torch.float64,
        torch.float16,
        torch.int64,
        torch.bool,
        torch.complex64,
        torch.float8_e4m3fn,
    )
    floating = tensor.is_floating_point()
    return r.choice(
        (
            other,
            tensor.mT if tensor.ndim > 1 else tensor[None],
            tensor.flatten(),
            tensor[..., None],
            tensor.flatten()[:0],
            torch.tensor(1.0),
            tensor.flatten()[:-1],
            *(tensor.to(dtype) for dtype in dtypes),
            torch.ones(1).expand(2**20, 2**20),
            torch.ones(()).expand(tensor.shape),
            torch.empty(tensor.shape, device="meta"),
            torch.ones(2, 2).to_sparse(),
            torch.full_like(tensor, torch.nan) if floating else tensor + 1,
            tensor * 1e30 if floating else ~tensor,
            torch.empty(0, 2**40),
            Code(),
            {"a": 1},
            None,
            "text",
            torch.nn.Parameter(tensor) if floating else tensor,
        )
    )


class Large:
    def __reduce__(self):
        return bytearray, (6 << 30,)


def hostile(path, r):
    """Write what torch.load(weights_only=True) takes, or fails at in its own way.

    That is any amount of memory, hashes without end, attributes in the place of methods, and memory
    that is read with its sign changed.
    """
    tensors = torch.load(path, weights_only=True)
    name = r.choice([*tensors])
    kind = r.randrange(4)
    if kind == 0:
        torch.save(tensors | {name: Large()}, path)
    elif kind == 1:
        nested = ()
        for _ in range(60):
            nested = (nested, nested)
        # {nested: 1}, which cannot be made here either.
        content = b"\x80\x02}" + pickle.dumps(nested, 2)[2:-1] + b"K\x01s."
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("a/data.pkl", content)
            archive.writestr("a/version", "3\n")
    elif kind == 2:
        vars(tensors[name])[r.choice(("detach", "is_contiguous", "is_neg"))] = 1
        torch.save(tensors, path)
    else:
        torch.save(tensors | {name: torch._neg_view(tensors[name].float())}, path)


def in_a_pth(path, r):
    """Return whether only bytes were changed, so that nothing but the original can be right."""
    kind = r.random()
    if kind < 0.4:
        in_a_file(path, r)
        return True
    if kind < 0.45:
        hostile(path, r)
    elif kind < 0.7:
        as_a_program(path, r)
    else:
        in_a_record(path, r)
    return False


def as_a_program(path, r):
    if r.random() < 0.1:
        wrong = in_a_dict(torch.load(path, weights_only=True), r)
        torch.save(wrong, path, _use_new_zipfile_serialization=False)
    elif r.random() < 0.1:
        path.write_bytes(pickle.dumps(Code()))
    else:
        torch.save(in_a_dict(torch.load(path, weights_only=True), r), path)


def in_a_record(path, r):
    """Damage a record and give the checksum of the damage, as an attacker would."""
    with zipfile.ZipFile(path) as archive:
        records = {info.filename: archive.read(info) for info in archive.infolist()}
    name = r.choice([n for n in records if n.endswith(("data.pkl", ".json"))] * 3 + [*records])
    if records[name]:
        records[name] = in_bytes(records[name], r)
    compression = r.choice((zipfile.ZIP_STORED,) * 4 + (zipfile.ZIP_DEFLATED,))
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in records.items():
            archive.writestr(name, content)


RECORDS = (
    b"",
    b"{}",
    b"[]",
    b"null",
    b"[" * 60_000,
    b'{"a":' * 10_000,
    b"\xff\xfe",
    b" " * 70_000,
    b'{"format": 1, "quant": "nf4", "base": BASE, "base_name": "b.pth"}',
    b'{"format": 1, "quant": "none", "base": BASE, "base_name": "b.pth", "more": [1]}',
    b'{"format": 2, "quant": "none", "base": BASE, "base_name": "b.pth"}',
    b'{"format": true, "quant": "none", "base": BASE, "base_name": "b.pth"}',
    b'{"format": 1, "quant": ["nf4"], "base": BASE, "base_name": "b.pth"}',
    b'{"format": 1, "quant": "none", "base": 1e999, "base_name": "b.pth"}',
    b'{"format": 1, "quant": "none", "base": 7, "base_name": "\\u001b[2J"}',
    b'{"format": 1, "quant": "none", "base": 7, "base_name": "' + b"x" * 60_000 + b'"}',
    b'{"format": 1, "quant": "none", "base": ' + b"9" * 10_000 + b', "base_name": ""}',
)


def in_a_bone_record(path, r):
    """Write another record of what a checkpoint says of itself, with its right checksum."""
    with zipfile.ZipFile(path) as archive:
        old = archive.read("archive/bone.json")
    new = r.choice(RECORDS).replace(b"BASE", str(json.loads(old)["base"]).encode())
    if r.random() < 0.2:
        new = in_bytes(old, r)
    if r.random() < 0.1:
        # A second one of the same name.
        with zipfile.ZipFile(path, "a") as archive, warnings.catch_warnings(action="ignore"):
            archive.writestr("archive/bone.json", new)
        return
    tensors = plain(path)
    save_stream(tensors, tensors.get, path, records={"bone.json": new})


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
    if r.random() < 0.5:
        in_a_file(path, r)
        return
    lines = path.read_bytes().split(b"\n")
    lines[r.randrange(len(lines))] = r.choice(LINES)
    path.write_bytes(b"\n".join(lines))


# Of which records and turns are made; what a text may hold, and what may stand in its place.
KEYS = ("text", "messages", "conversations", "instruction", "output", "input", "question", "answer")
KEYS += ("query", "response", "prompt", "completion", "system", "history", "id", "", "two\nlines")
ROLES = ("user", "assistant", "system", "human", "gpt", "User", "tool", "", "bot")
WORDS = (
    "a",
    "很好",
    "\n",
    "\n\n",
    "\r\n",
    "\r",
    " ",
    "\t",
    "User:",
    "\nAssistant:",
    "**",
    "\0",
    "\u2028",
)
FORMS = (
    ("text",),
    ("instruction", "output"),
    ("question", "answer"),
    ("query", "response"),
    ("prompt", "completion"),
    ("messages",),
    ("conversations",),
)


def some_text(r):
    return "".join(r.choices(WORDS, k=r.randrange(6)))


def something_else(r):
    parts = [{"type": "text", "text": some_text(r)}] * r.randrange(3)
    nested = [[some_text(r), some_text(r)]]
    return r.choice((None, 1, 1.5, True, [], {}, ["a"], [[]], parts, nested, [None], "\ud800"))


def some_value(r, chance):
    return something_else(r) if r.random() < chance else some_text(r)


def some_turns(r, chance):
    turns = []
    for _ in range(r.randrange(5)):
        role, content = r.choice((("role", "content"), ("role", "content"), ("from", "value")))
        who = r.choice(ROLES) if r.random() < chance else r.choice(("user", "assistant", "gpt"))
        turn = {role: who, content: some_value(r, chance)}
        if r.random() < chance:
            turn[r.choice((role, content, "name", "role"))] = something_else(r)
        turns.append(turn)
    return turns


def some_record(r, form, chance):
    record = {}
    for key in form:
        is_list = key in ("messages", "conversations")
        record[key] = some_turns(r, chance) if is_list else some_value(r, chance)
    if r.random() < 0.3:
        record[r.choice(("input", "system", "history", "id"))] = some_value(r, 0.5)
    if r.random() < chance:
        key = r.choice(KEYS)
        record.pop(key, None) if r.random() < 0.3 else record.update({key: some_value(r, 0.5)})
    return record if r.random() > chance / 4 else something_else(r)


def invented(path, r):
    """Write records of a form, as lines or as an array; most are right, or nearly."""
    form, chance = r.choice(FORMS), r.choice((0, 0, 0.02, 0.2))
    records = [some_record(r, form, chance) for _ in range(r.randrange(1, 12))]
    if r.random() < 0.3:
        path.write_text(json.dumps(records, indent=r.choice((None, 1))))
    else:
        lines = [json.dumps(record) + r.choice(("\n", "\r\n", "\n\n")) for record in records]
        path.write_bytes("".join(lines).encode())
    if r.random() < 0.1:
        in_a_file(path, r)


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


# ---- programs, and what is right when they accept --------------------------------------------


def plain(path):
    return torch.load(path, weights_only=True)


def main_of(module, line):
    sys.argv = line.split()
    if module is train:
        train.train(train.parse_args())
    else:
        module.main()


def trained_quant(path):
    """What a checkpoint's record says, or args.json."""
    arguments = path.with_name("args.json").read_bytes()
    with zipfile.ZipFile(path) as archive:
        if "archive/bone.json" in archive.namelist():
            arguments = archive.read("archive/bone.json")
    return json.loads(arguments).get("quant", "none")


def merging(checkpoint="run/rwkv-0.pth"):
    main_of(merge, f"merge.py base.pth {checkpoint} tuned.pth")
    base, trained, tuned = plain("base.pth"), plain(checkpoint), plain("tuned.pth")
    kind = trained_quant(pathlib.Path(checkpoint))
    assert base.keys() == tuned.keys()
    for name, weight in base.items():
        b = trained.get(name.removesuffix("weight") + "bone")
        if b is not None:
            start = quantize(weight, kind).dequantize(torch.float32) if kind != "none" else weight
            expected = bone.merge_weight(start.contiguous(), b.contiguous()).to(weight.dtype)
        elif name in trained:
            expected = trained[name].reshape(weight.shape).to(weight.dtype)
        else:
            expected = weight
        assert tuned[name].equal(expected), name
        assert expected.isfinite().all(), name


def merging_without_record():
    merging("old/rwkv-0.pth")


def merging_for_ai00():
    main_of(merge, "merge.py base.pth old/rwkv-0.pth tuned.st")
    tuned = load_file("tuned.st")
    merging_without_record()
    expected = dict(ai00.for_ai00(name, tensor) for name, tensor in plain("tuned.pth").items())
    assert tuned.keys() == expected.keys()
    assert all(tuned[name].equal(tensor.detach()) for name, tensor in expected.items())


def first_loss(flags):
    main_of(train, f"train.py {TRAIN} --epoch_steps 1 {flags}")
    assert all(t.isfinite().all() for t in plain("new/rwkv-0.pth").values())
    return pathlib.Path("new/loss.csv").read_text().splitlines()[1].split(",")[1]


def training():
    loss = first_loss("--proj_dir new")
    documents = [document.tolist() for document in binidx.Binidx("x")]
    original = [document.tolist() for document in binidx.Binidx("original/x")]
    if same(plain("base.pth"), plain("original/base.pth")) and documents == original:
        assert loss == pathlib.Path("original/loss").read_text(), loss


def going_on_from_bones():
    loss = first_loss("--proj_dir new --bone_load run/rwkv-0.pth")
    quant = trained_quant(pathlib.Path("run/rwkv-0.pth"))
    if same(plain("run/rwkv-0.pth"), plain("original/rwkv-0.pth")) and quant == "none":
        assert loss == pathlib.Path("original/bone_loss").read_text(), loss


def resuming():
    main_of(train, f"train.py {TRAIN} --epoch_steps 2 --proj_dir out --keep 9 --resume")
    assert all(t.isfinite().all() for t in plain("out/rwkv-0.pth").values())
    if same(plain("out/resume-1.pth"), plain("original/resume-1.pth")):
        assert same(plain("out/rwkv-0.pth"), plain("original/resumed.pth"))


def reading():
    documents = [document.tolist() for document in corpus.open_data("x", 300)]
    idx = pathlib.Path("x.idx").read_bytes()
    tokens = pathlib.Path("x.bin").read_bytes()
    code, n = struct.unpack_from("<BQ", idx, 17)
    dtype = np.dtype({1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}[code])
    sizes = struct.unpack_from(f"<{n}i", idx, 34)
    starts = struct.unpack_from(f"<{n}q", idx, 34 + 4 * n)
    plainly = [
        np.frombuffer(tokens, dtype, size, start).tolist()
        for size, start in zip(sizes, starts, strict=True)
    ]
    assert documents == plainly
    training()


def reading_npy():
    tokens = corpus.open_data("t.npy", 300).tokens
    assert np.load("t.npy", allow_pickle=False).tolist() == tokens.tolist()


def plain_turn(turn):
    role, content = (
        ("role", "content") if "content" in turn and "role" in turn else ("from", "value")
    )
    text = turn[content]
    if isinstance(text, list):
        text = "\n".join(part["text"] for part in text)
    who = {"s": "System", "u": "User", "h": "User", "a": "Assistant", "g": "Assistant"}
    return who[turn[role].lower()[0]], text


def plain_text(record):
    """The text of a record that is accepted, by a plain reading. KeyError: it should not be."""
    keys = {key for key, value in record.items() if value is not None} or record.keys()
    (form, *_) = [form for form in ORDER if set(form) <= keys]
    if form == ("text",):
        text = record["text"]
        if isinstance(text, list):
            text = "\n".join(part["text"] for part in text)
        return text.replace("\r\n", "\n").replace("\r", "\n")
    turns = [plain_turn({"role": "system", "content": record.get("system") or ""})]
    if len(form) == 1:
        turns += [plain_turn(turn) for turn in record[form[0]]]
    else:
        for question, answer in record.get("history") or []:
            turns += [("User", question), ("Assistant", answer)]
        asked, more, answer = (
            plain_turn({"role": "user", "content": record.get(key) or ""})[1]
            for key in (form[0], "input", form[1])
        )
        if more.strip():
            asked = asked.strip() + "\n" + more.strip()
        turns += [("User", asked), ("Assistant", answer)]
    said = []
    for who, text in turns:
        lines = text.replace("\r\n", "\n").replace("\r", "\n").strip().split("\n")
        if lines != [""]:
            said.append((who, "\n".join(line for line in lines if line.strip())))
    if not any(who == "Assistant" for who, _ in said):
        return ""
    return "\n\n".join(f"{who}: {text}" for who, text in said)


# A record that fits several forms is of the first of them.
ORDER = (("text",), ("messages",), ("conversations",), *FORMS[1:5])


def converting():
    main_of(data, "data.py t.jsonl new")
    content = pathlib.Path("t.jsonl").read_bytes().decode("utf-8-sig")
    if content.lstrip().startswith("["):
        records = json.loads(content)
    else:
        lines = [line.encode().decode("utf-8-sig").strip() for line in content.split("\n")]
        records = [json.loads(line) for line in lines if line]
    texts = [plain_text(record) for record in records]
    documents = [document.tolist() for document in binidx.Binidx("new")]
    assert all(document[-1] == 0 for document in documents)
    written = [tokenizer.decode_bytes(document[:-1]).decode() for document in documents]
    assert written == [text for text in texts if text]


def speaking():
    main_of(
        generate, "generate.py base.pth --bone run/rwkv-0.pth --other_base --prompt bac --length 3"
    )


PROGRAMS = [
    (in_a_pth, "base.pth", merging_without_record),
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
    (invented, "t.jsonl", converting),
    (invented, "t.jsonl", converting),
    (in_a_bone_record, "run/rwkv-0.pth", merging),
    (in_a_bone_record, "run/rwkv-0.pth", going_on_from_bones),
    (in_a_bone_record, "run/rwkv-0.pth", speaking),
    (in_json, "old/args.json", merging_without_record),
    (in_json, "vocab.json", speaking),
]


def same(a, b):
    if a.keys() != b.keys():
        return False
    pairs = zip(a.values(), b.values(), strict=True)
    return all(x.dtype == y.dtype and torch.equal(x, y) for x, y in pairs)


def contents(folder):
    return {
        path: path.read_bytes()
        for path in sorted(pathlib.Path(folder).rglob("*"))
        if path.is_file()
    }


def prepare(folder):
    """Make one right set of inputs, and in `original` what comes of them."""
    with contextlib.chdir(folder):
        os.makedirs("run")
        os.makedirs("old")
        os.makedirs("original")
        torch.save(tiny(torch.float32), "base.pth")
        bones = {name: t + 0.01 * torch.randn_like(t) for name, t in bone_of("base.pth").items()}
        torch.save(bones, "old/rwkv-0.pth")
        args = {"load_model": "base.pth", "quant": "none", "bone_r": 16, "bone_mode": "bat"}
        record = make_records({"args": args, "base": fingerprint("base.pth")})
        save_stream(bones, bones.get, "run/rwkv-0.pth", records=record)
        for folder in ("old", "run"):
            pathlib.Path(folder, "args.json").write_text('{"quant": "none", "bone_r": 16}')
        pathlib.Path("vocab.json").write_text(json.dumps({i: chr(97 + i) for i in range(300)}))
        binidx.write_binidx("x", counting([20, 33, 40, 9, 25]))
        np.save("t.npy", np.arange(200, dtype=np.int32) % 90)
        lines = [json.dumps({"text": f"{i} 很好 and more"}) + "\n" for i in range(8)]
        pathlib.Path("t.jsonl").write_text("".join(lines), encoding="utf-8")
        for flags, name in (("", "loss"), ("--bone_load run/rwkv-0.pth", "bone_loss")):
            pathlib.Path("original", name).write_text(first_loss(f"--proj_dir new {flags}"))
            shutil.rmtree("new")
        main_of(train, f"train.py {TRAIN} --epoch_steps 2 --save_steps 1 --keep 9 --proj_dir out")
        os.rename("out/rwkv-0.pth", "original/resumed.pth")
        os.unlink("out/resume-2.pth")
        for path in ("base.pth", "run/rwkv-0.pth", "out/resume-1.pth", "x.bin", "x.idx"):
            shutil.copy(path, "original")


@dataclasses.dataclass
class Outcome:
    """What a program did."""

    code: int
    printed: str  # on stderr
    traceback: str
    seconds: float
    memory: float  # GB
    before: dict  # {path: content} of all files
    after: dict

    @property
    def error(self):
        """The last line on stderr."""
        return self.printed.replace("\r", "\n").rstrip("\n").rpartition("\n")[2]


def outcome_of(program):
    before = contents(".")
    printed = io.StringIO()
    raised = ""
    # Set the peak that is measured back to what is in use now.
    pathlib.Path("/proc/self/clear_refs").write_text("5")
    in_use = peak()
    began = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(printed):
        try:
            cli.run_cli(program)
            code = 0
        except SystemExit as end:
            code = end.code
        except BaseException:
            code = 1
            raised = traceback.format_exc()
    seconds = time.perf_counter() - began
    memory = (peak() - in_use) / 1e9
    return Outcome(code, printed.getvalue(), raised, seconds, memory, before, contents("."))


def peak():
    status = pathlib.Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s*(\d+) kB", status)[1]) * 1024


def what_is_wrong(outcome, program):
    """Say what a program should not have done; "" if all is well."""
    error = outcome.error
    if pathlib.Path("executed").exists() or outcome.seconds > 10 or outcome.memory > 1:
        return f"executed code, or took {outcome.seconds:.1f} s, {outcome.memory:.2f} GB: {error}"
    if outcome.code not in (0, 2):
        return outcome.traceback or f"exit code {outcome.code}: {outcome.printed[-500:]}"
    if outcome.code == 2:
        one_line = error.startswith("error: ") and len(error) <= 1000
        if not one_line or "Traceback" in outcome.printed:
            return f"exit code 2 without one line: {outcome.printed[-500:]}"
    return wrong_files(outcome, program)


def wrong_files(outcome, program):
    refused = outcome.code == 2
    error = outcome.error
    could_not_save = "could not be saved" in error
    changed = [path for path, old in outcome.before.items() if outcome.after.get(path) != old]
    if changed:
        # Only a run that goes on may write to files that were there: its logs.
        logs = {"args.json", "train_log.txt", "loss.csv", "loss.png"}
        only_logs = {path.name for path in changed} <= logs
        if program is resuming and only_logs and (not refused or could_not_save):
            return ""
        return f"a file was changed: {[*map(str, changed)]}, exit code {outcome.code}: {error}"
    new = outcome.after.keys() - outcome.before.keys()
    if refused and new and "not finite" not in error and not could_not_save:
        return f"refused, but wrote {new}: {error}"
    return ""


def try_one(prepared, folder, seed, *, out):
    """In a child process: give one mutated input to one program, then end the process.

    Writes its verdict to the file descriptor `out`.
    """
    verdict = {"seed": seed, "wrong": "died", "code": None}
    try:
        shutil.copytree(prepared, folder, dirs_exist_ok=True)
        os.chdir(folder)
        r = random.Random(seed)
        mutate, path, program = r.choice(PROGRAMS)
        torch.manual_seed(0)
        only_bytes = mutate(pathlib.Path(path), r)
        outcome = outcome_of(program)
        wrong = what_is_wrong(outcome, program)
        if outcome.code == 0 and only_bytes:
            original = pathlib.Path("original", os.path.basename(path))
            if not same(plain(path), plain(original)):
                wrong = "damage was accepted"
        verdict = {
            "seed": seed,
            "program": program.__name__,
            "path": path,
            "code": outcome.code,
            "wrong": wrong[-3000:],
            "error": outcome.error,
            "seconds": outcome.seconds,
            "memory": outcome.memory,
        }
    except BaseException:
        verdict["wrong"] = traceback.format_exc()[-3000:]
    os.write(out, pickle.dumps(verdict))
    os._exit(0)


def fuzz(count, seed=0):
    """Try `count` inputs. Returns the verdicts; AssertionError at the first that is wrong."""
    torch.set_num_threads(1)
    wkv6.kernel_problem()
    verdicts = []
    running = {}  # {process: (number, where its verdict is read, when it began)}
    with tempfile.TemporaryDirectory() as folder:
        prepared = pathlib.Path(folder, "prepared")
        prepared.mkdir()
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            prepare(prepared)
        numbers = iter(range(count))
        while len(verdicts) < count:
            while len(running) < (os.cpu_count() or 1) and (n := next(numbers, None)) is not None:
                read, write = os.pipe()
                pid = os.fork()
                if pid == 0:
                    try_one(prepared, pathlib.Path(folder, str(n)), f"{seed}-{n}", out=write)
                os.close(write)
                running[pid] = n, read, time.monotonic()
            for pid, (n, read, began) in [*running.items()]:
                # A hang. (10 s of the program's own time are measured inside.)
                if time.monotonic() - began > 30:
                    os.kill(pid, signal.SIGKILL)
                if os.waitpid(pid, os.WNOHANG)[0]:
                    del running[pid]
                    verdict = verdict_of(read, f"{seed}-{n}")
                    assert not verdict["wrong"], verdict
                    verdicts.append(verdict)
                    shutil.rmtree(pathlib.Path(folder, str(n)))
            time.sleep(0.002)
    return verdicts


def verdict_of(read, seed):
    with open(read, "rb") as f:
        content = f.read()
    if not content:
        return {"seed": seed, "wrong": "it hung, or died of a signal"}
    return pickle.loads(content)


@pytest.mark.parametrize("inputs", [60, exhaustive(300)])
def test_damaged_and_hostile_inputs_are_accepted_rightly_or_refused_in_one_line(inputs):
    """A sample of what `make torture` tries."""
    verdicts = fuzz(inputs, seed="sample")
    assert len(verdicts) == inputs
    accepted = sum(verdict["code"] == 0 for verdict in verdicts)
    assert inputs / 12 < accepted < inputs * 11 / 12
