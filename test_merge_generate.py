"""merge.py: the merged model is base + bone, made in little memory and never over its sources.

generate.py: text is whole, and repeatable.
"""

import functools
import json
import os
import pathlib
import pickle
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from types import SimpleNamespace

import pytest
import torch

import adapt
import archive
import binidx
import bone_record
import checkpoint
import cli
import generate
import merge
import rwkv6
import tokenizer
import train

HERE = pathlib.Path(__file__).parent
NAN = float("nan")


def tiny(dtype=torch.float32, n_embd=64, vocab_size=300, n_layer=2):
    """A base model as a dict: initialized, then disturbed, so that no tensor is zero."""
    torch.manual_seed(0)
    model = rwkv6.init_model(n_layer, n_embd, vocab_size)
    return {
        name: (p.detach() + 0.05 * torch.randn_like(p)).to(dtype)
        for name, p in model.named_parameters()
    }


def trained(base, mode="bat", r=16):
    """A checkpoint as training leaves it: bones, time and ln parts, in the dtype of file `base`."""
    torch.manual_seed(1)
    dtype = torch.load(base, weights_only=True)["emb.weight"].dtype
    model = adapt.add_bone(checkpoint.load_model(base), r, mode)
    parts = {
        name: p.detach()
        for name, p in model.named_parameters()
        if name.endswith(".bone") or "time" in name or "ln" in name
    }
    return {name: (p + 0.03 * torch.randn_like(p)).to(dtype) for name, p in parts.items()}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """base.pth and ckpt.pth, small; world.pth and world_ckpt.pth, with the World vocabulary."""
    folder = tmp_path_factory.mktemp("models")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for base, tuned, content in (
        ("base", "ckpt", tiny()),
        ("world", "world_ckpt", tiny(vocab_size=65536, n_layer=1)),
    ):
        torch.save(content, folder / f"{base}.pth")
        torch.save(trained(folder / f"{base}.pth"), folder / f"{tuned}.pth")
    yield folder
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def folder(models, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("base.pth", "ckpt.pth"):
        shutil.copy(models / name, name)
    for name in ("world.pth", "world_ckpt.pth"):
        os.link(models / name, name)


def read(path):
    return torch.load(path, weights_only=True)


def contents():
    return {path: path.read_bytes() for path in pathlib.Path().rglob("*") if path.is_file()}


def refused(capsys, main):
    """The one line on stderr with which main() ends, with exit code 2 and every file as it was."""
    before = contents()
    with pytest.raises(SystemExit) as end:
        cli.run_cli(main)
    error = capsys.readouterr().err
    assert end.value.code == 2
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert contents() == before
    return error


def command(line, **options):
    program, *args = shlex.split(line)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, HERE / program, *args],
        capture_output=True,
        encoding="utf-8",
        env=environment,
        **options,
    )


# ---- merge.py -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "dtype, mode, near",
    [(torch.float32, "bat", 1e-5), (torch.float32, "bone", 1e-5), (torch.bfloat16, "bat", 2e-2)],
)
def test_the_merged_model_is_base_and_bone(capsys, dtype, mode, near):
    torch.save(tiny(dtype), "base.pth")
    torch.save(trained("base.pth", mode), "ckpt.pth")
    merge.merge("base.pth", "ckpt.pth", "tuned.pth")
    base = read("base.pth")
    tensors = read("ckpt.pth")
    tuned = read("tuned.pth")
    assert tuned.keys() == base.keys()
    for name, tensor in tuned.items():
        assert tensor.shape == base[name].shape
        assert tensor.dtype == base[name].dtype
        # Trained parts are taken over, weights with a bone change, the rest is untouched.
        has_bone = name.removesuffix("weight") + "bone" in tensors
        assert has_bone != tensor.equal(tensors.get(name, base[name])), name
    merged = checkpoint.load_model("tuned.pth", torch.float32)
    with_bone = checkpoint.load_bone(checkpoint.load_model("base.pth", torch.float32), "ckpt.pth")
    idx = torch.randint(300, (2, 40))
    expected = with_bone(idx)
    assert (merged(idx) - expected).norm() <= near * expected.norm()
    others = len(tensors) - 16
    words = (
        f"merged 16 weights (Bone {mode}, r 16) and {others} other trained tensors into base.pth"
    )
    assert f"{words}\nwrote tuned.pth" in capsys.readouterr().out


def test_a_base_that_training_takes_merging_takes():
    """A base with time_maa_* of shape (C,): the model, and the checkpoint, have (1, 1, C)."""
    base = tiny()
    for name, tensor in base.items():
        if "time_maa" in name and tensor.shape[:2] == (1, 1):
            base[name] = tensor.reshape(-1)
    torch.save(base, "base.pth")
    torch.save(trained("base.pth"), "ckpt.pth")
    merge.merge("base.pth", "ckpt.pth", "tuned.pth")
    name = "blocks.1.att.time_maa_x"
    assert read("tuned.pth")[name].flatten().equal(read("ckpt.pth")[name].flatten())


def test_a_merge_cut_short_leaves_what_was_there(monkeypatch):
    before = contents()

    def cut_short(content, file):
        file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", cut_short)
    with pytest.raises(SystemExit) as end:
        cli.run_cli(lambda: merge.merge("base.pth", "ckpt.pth", "tuned.pth"))
    assert end.value.code == 130
    assert contents() == before


def spoil(name, tensor):
    torch.save(read("ckpt.pth") | {name: tensor}, "bad.pth")


@pytest.mark.parametrize(
    "paths, says, prepare",
    [
        ("base.pth ckpt.pth base.pth", "base.pth: would overwrite the base", None),
        ("base.pth ckpt.pth ckpt.pth", "ckpt.pth: would overwrite the checkpoint", None),
        ("base.pth ckpt.pth ./base.pth", "would overwrite the base", None),
        (
            "base.pth ckpt.pth link.pth",
            "would overwrite the base",
            lambda: os.symlink("base.pth", "link.pth"),
        ),
        (
            "base.pth ckpt.pth hard.pth",
            "would overwrite the checkpoint",
            lambda: os.link("ckpt.pth", "hard.pth"),
        ),
        ("gone.pth ckpt.pth tuned.pth", "gone.pth: No such file", None),
        ("base.pth gone.pth tuned.pth", "gone.pth: No such file", None),
        (
            "base.pth ckpt.pth gone/tuned.pth",
            "gone/tuned.pth: cannot be written, as there is no folder gone/;",
            None,
        ),
        (
            "base.pth ckpt.pth taken.pth",
            "taken.pth: cannot be written, as it is a folder;",
            lambda: os.mkdir("taken.pth"),
        ),
        (
            "ckpt.pth base.pth tuned.pth",
            "ckpt.pth: a Bone checkpoint, not a base model; "
            "the order is merge.py base checkpoint output",
            None,
        ),
        ("ckpt.pth ckpt.pth tuned.pth", "the order is merge.py base checkpoint output", None),
        (
            "base.pth base2.pth tuned.pth",
            "base2.pth: holds no tensor named *.bone",
            lambda: shutil.copy("base.pth", "base2.pth"),
        ),
        (
            "base.pth bad.pth tuned.pth",
            "bad.pth: blocks.0.att.key.bone is",
            lambda: spoil("blocks.0.att.key.bone", torch.zeros(8, 16, 16)),
        ),
        (
            "base.pth bad.pth tuned.pth",
            "bad.pth: blocks.7.ln1.bias has no",
            lambda: spoil("blocks.7.ln1.bias", torch.zeros(64)),
        ),
        (
            "base.pth bad.pth tuned.pth",
            "bad.pth: mixes",
            lambda: spoil("blocks.0.att.key.bone", torch.zeros(16, 64)),
        ),
        (
            "base.pth bad.pth tuned.pth",
            "bad.pth: ln_out.bias holds NaN",
            lambda: spoil("ln_out.bias", torch.full((64,), NAN)),
        ),
        (
            "wide.pth ckpt.pth tuned.pth",
            "trained on another model",
            lambda: torch.save(tiny(n_embd=128), "wide.pth"),
        ),
        (
            "base.pth bad.pth tuned.pth",
            "bad.pth: not a PyTorch checkpoint",
            lambda: pathlib.Path("bad.pth").write_text("hello"),
        ),
    ],
)
def test_merging_refuses_what_does_not_belong_together_and_harms_nothing(
    capsys, paths, says, prepare
):
    if prepare:
        prepare()
    assert says in refused(capsys, lambda: merge.merge(*paths.split()))


# ---- what a checkpoint says of its training -----------------------------------------------------


def saved(base_path="base.pth", **changes):
    """Write said.pth: ckpt.pth as a run on a base writes it, with its record, but for `changes`."""
    args = {"load_model": base_path, "quant": "none", "bone_r": 16, "bone_mode": "bat"}
    metadata = {"args": args, "base": archive.fingerprint(base_path)}
    records = bone_record.make_records(metadata)
    content = json.loads(records["bone.json"]) | changes
    tensors = read("ckpt.pth")
    records = {"bone.json": json.dumps(content).encode()}
    archive.save_stream(tensors, tensors.get, "said.pth", records=records)


def equal(path, other):
    a, b = read(path), read(other)
    return a.keys() == b.keys() and all(a[name].equal(b[name]) for name in a)


def test_a_checkpoint_travels_alone_and_others_read_it(capsys):
    saved(quant="nf4")
    for options in ({}, {"weights_only": False}, {"mmap": True}):
        assert equal("said.pth", "ckpt.pth")
        assert torch.load("said.pth", **options).keys() == read("ckpt.pth").keys()
    merge.merge("base.pth", "said.pth", "alone.pth")
    assert "nf4 base" in capsys.readouterr().out
    merge.merge("base.pth", "ckpt.pth", "flag.pth", quant="nf4")
    merge.merge("base.pth", "ckpt.pth", "plain.pth")
    assert equal("alone.pth", "flag.pth") and not equal("alone.pth", "plain.pth")
    # args.json may be another run's by now.
    pathlib.Path("args.json").write_text('{"quant": "int8"}')
    merge.merge("base.pth", "said.pth", "beside.pth")
    assert equal("alone.pth", "beside.pth")


def test_without_a_word_on_quantization_it_is_said_once(say, capsys):
    shutil.copy("ckpt.pth", "silent.pth")
    for name in ("a.pth", "b.pth"):
        merge.merge("base.pth", "silent.pth", name)
    printed = capsys.readouterr().out
    assert printed.count("note: silent.pth: does not say whether its base was quantized") == 1
    assert "give --quant" in printed
    merge.merge("base.pth", "ckpt.pth", "c.pth", quant="none")
    saved()
    merge.merge("base.pth", "said.pth", "d.pth")
    assert "note" not in capsys.readouterr().out


def test_a_base_that_is_not_the_one_trained_on_is_refused_unless_one_insists(capsys, say):
    saved()
    merge.merge("base.pth", "said.pth", "tuned.pth")
    converted = {name: tensor.bfloat16() for name, tensor in read("base.pth").items()}
    torch.save(converted, "half.pth")
    words = "said.pth: trained on another base (base.pth): {} has other content"
    for other in ("tuned.pth", "half.pth"):
        merge_again = functools.partial(merge.merge, other, "said.pth", "again.pth")
        error = refused(capsys, merge_again)
        assert words.format(other) in error and "--other_base" in error
    merge.merge("tuned.pth", "said.pth", "again.pth", other_base=True)
    saved("world.pth")
    says = "trained on another base (world.pth)"
    assert says in refused(capsys, lambda: say("base.pth --bone said.pth --prompt a"))
    assert "vocabulary" in refused(capsys, lambda: say("base.pth --bone said.pth --other_base"))


def test_going_on_from_a_checkpoint_asks_for_its_base_and_its_quantization(capsys):
    binidx.write_binidx("x", [[*range(1, 20), 0]] * 4)
    saved("world.pth", quant="nf4")
    flags = "--load_model base.pth --data_file x --bone_load said.pth --accelerator cpu"
    error = refused(capsys, lambda: train.train(train.parse_args(flags.split())))
    assert "said.pth: trained on another base (world.pth): base.pth has" in error
    train.train(train.parse_args(f"{flags} --other_base --precision fp32".split()))
    # The next checkpoint tells of its own base, and what it went on from.
    record = bone_record.read_bone_record("out/rwkv-0.pth")
    assert record == bone_record.BoneRecord("nf4", archive.fingerprint("base.pth"), "base.pth")


def test_a_base_that_is_saved_again_is_still_the_one_trained_on():
    saved()
    base = read("base.pth")
    shutil.copy("base.pth", "copy.pth")
    for protocol in (2, 3):
        torch.save(base, "another_archive_name.pth", pickle_protocol=protocol)
        assert archive.fingerprint("another_archive_name.pth") == archive.fingerprint("base.pth")
    # In an archive of another order.
    with zipfile.ZipFile("copy.pth") as old, zipfile.ZipFile("sorted.pth", "w") as new:
        for name in sorted(old.namelist(), reverse=True):
            new.writestr(name.replace("copy/", "x/"), old.read(name))
    # As torch.compile and DistributedDataParallel name its tensors.
    torch.save({f"module._orig_mod.{name}": tensor for name, tensor in base.items()}, "ddp.pth")
    merge.merge("base.pth", "said.pth", "tuned.pth")
    for number, path in enumerate(("another_archive_name.pth", "sorted.pth", "ddp.pth")):
        assert archive.fingerprint(path) == archive.fingerprint("base.pth")
        merge.merge(path, "said.pth", f"tuned{number}.pth")
        assert equal("tuned.pth", f"tuned{number}.pth")


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"format": 2}, "said.pth: written by a newer version of this program"),
        ({"format": "1"}, "said.pth: its bone.json is invalid"),
        ({"quant": "fp4"}, "said.pth: its bone.json is invalid"),
        ({"quant": ["nf4"]}, "said.pth: its bone.json is invalid"),
        ({"base": "1"}, "said.pth: its bone.json is invalid"),
        ({"base_name": None}, "said.pth: its bone.json is invalid"),
        ({"program": "x" * 70_000}, "said.pth: a cut or damaged PyTorch checkpoint (its bone.json"),
    ],
)
def test_a_record_that_no_run_writes_is_refused(capsys, changes, says):
    saved(**changes)
    assert says in refused(capsys, lambda: merge.merge("base.pth", "said.pth", "tuned.pth"))


def test_a_record_that_is_damaged_is_refused(capsys):
    saved()
    content = pathlib.Path("said.pth").read_bytes()
    assert content.count(b'"quant": "none"') == 1
    pathlib.Path("said.pth").write_bytes(content.replace(b'"quant": "none"', b'"quant": "int8"'))
    error = refused(capsys, lambda: merge.merge("base.pth", "said.pth", "tuned.pth"))
    assert "said.pth: a cut or damaged PyTorch checkpoint (the checksum of archive/bone" in error


@pytest.mark.parametrize("name", ["x.gguf", "x.bin", "x", "pth", "x.pth.tmp"])
def test_an_output_of_unknown_ending_is_refused(capsys, name):
    error = refused(capsys, lambda: merge.merge("base.pth", "ckpt.pth", name))
    assert f"{name}: its ending does not say what to write; name it *.pth" in error


@pytest.mark.parametrize("quant, parts", [("none", "time ln emb head"), ("nf4", "time ln")])
def test_nothing_changes_at_a_learning_rate_of_0_whatever_the_dtypes_of_the_base(quant, parts):
    """Each trained tensor is saved, and merged, in its own dtype of the base."""
    base = tiny(torch.bfloat16)
    for name, tensor in tiny().items():
        if "time" in name or "ln" in name or (name == "emb.weight" and "emb" in parts):
            base[name] = tensor
        if name == "blocks.0.ffn.value.weight":
            base[name] = tensor.half()
    torch.save(base, "mixed.pth")
    binidx.write_binidx("x", [[*range(1, 20), 0]] * 4)
    flags = f"--load_model mixed.pth --data_file x --accelerator cpu --train_parts {parts}"
    flags += f" --bone_r 16 --lr_init 0 --lr_final 0 --quant {quant}"
    train.train(train.parse_args(flags.split()))
    for name, tensor in read("out/rwkv-0.pth").items():
        adapted = name.removesuffix("bone") + "weight"
        assert tensor.dtype == base[adapted if adapted in base else name].dtype, name
    merge.merge("mixed.pth", "out/rwkv-0.pth", "tuned.pth")
    for name, tensor in read("tuned.pth").items():
        assert tensor.dtype == base[name].dtype, name
        quantized = quant != "none" and re.search(r"\.(att|ffn)\.\w+\.weight", name)
        assert tensor.equal(base[name]) or quantized, name


def test_rwkv_peft_s_path_of_its_merge_script_works_and_hides_no_module():
    """Of its scripts of both names: merge_disha.py here runs merge_bone.py."""
    flags = "--base_model base.pth --peft_checkpoint ckpt.pth --output tuned.pth"
    end = command(f"merge/merge_disha.py {flags}")
    assert (end.returncode, end.stderr) == (0, "") and os.path.exists("tuned.pth")
    assert pathlib.Path(merge.__file__) == HERE / "merge.py"
    assert not (HERE / "merge" / "__init__.py").exists()


MEASURE = """
import sys, torch, tqdm
import merge
def memory(name):
    for line in open("/proc/self/status"):
        if line.startswith(name):
            return int(line.split()[1]) * 1024
before = memory("VmRSS")
merge.merge("big.pth", "bones.pth", sys.argv[1])
print(memory("VmHWM") - before)
"""


@pytest.mark.exhaustive
@pytest.mark.skipif(
    not os.path.exists("/proc/self/status"), reason="reads the peak memory from /proc"
)
@pytest.mark.parametrize("out", ["tuned.pth", "tuned.st"])
def test_merging_holds_a_tensor_at_a_time_whatever_the_size_of_the_base(out):
    weight = torch.randn(512).repeat(7168, 4).bfloat16()  # 29 MB
    torch.save({f"blocks.{i}.ffn.key.weight": weight + i for i in range(14)}, "big.pth")
    torch.save(
        {f"blocks.{i}.ffn.key.bone": torch.randn(32, 64, 64) * 0.01 for i in range(0, 14, 2)},
        "bones.pth",
    )
    end = subprocess.run(
        [sys.executable, "-c", MEASURE, out],
        capture_output=True,
        encoding="utf-8",
        env=os.environ | {"PYTHONPATH": str(HERE)},
    )
    assert end.returncode == 0, end.stderr
    size = os.path.getsize("big.pth")
    peak = int(end.stdout.splitlines()[-1])
    assert peak < 0.5 * size, f"{peak / 1e9:.2f} GB for a base of {size / 1e9:.2f} GB"
    assert abs(os.path.getsize(out) - size) < 10_000


# ---- generate.py: text from a model --------------------------------------------------------------


class Script:
    """A stand-in for a model that writes given tokens, then ends the document.

    Its state is how many it has written.
    """

    def __init__(self, ids):
        self.ids = [*ids, 0]
        self.read = []
        self.emb = self.head = SimpleNamespace(weight=torch.zeros(1))

    def __call__(self, idx, state):
        self.read += idx[0].tolist()
        logits = torch.zeros(1, idx.shape[1], 65536)
        logits[0, -1, self.ids[state]] = 1
        return logits, state + 1


def in_bytes(text):
    """One token for each byte: byte b is token b + 1."""
    return [b + 1 for b in (text.encode() if isinstance(text, str) else text)]


def pieces(stream):
    """The pieces of text of a stream, and its last state and unread tokens."""
    found = list(stream)
    return [text for text, _, _ in found], found[-1][1:]


def written(ids, length=1000, stop=""):
    settings = generate.Settings(length, temperature=0)
    return pieces(generate.stream(Script(ids), 0, [1], settings=settings, stop=stop))[0]


@pytest.mark.parametrize("text", ["你好,世界", "naïve 🙂🙃 ok", "plain"])
def test_characters_of_many_tokens_are_never_broken(text):
    found = written(in_bytes(text))
    assert [piece for piece in found if piece] == list(text)  # a piece for each character


@pytest.mark.parametrize(
    "content, shown",
    [
        ("你好".encode()[:-1], "你\ufffd"),
        ("🙂".encode()[:2] + b"a", "\ufffda"),
        (b"\x80ok", "\ufffdok"),
        ("你".encode()[:1], "\ufffd"),
    ],
)
def test_broken_characters_are_shown_as_such_and_end_nothing(content, shown):
    assert "".join(written(in_bytes(content))) == shown


@pytest.mark.parametrize(
    "tokens, stop, shown",
    [
        (["hi", "\n", "\n", "User: x"], "\n\n", "hi"),  # across the border of two tokens
        (["hi\n", "\nUser: x"], "\n\n", "hi"),
        (["hi", "\n\n", "x"], "\n\n", "hi"),
        (["a\nb"], "\n\n", "a\nb"),
        (["a", "\n"], "\n\n", "a\n"),
        (["aab", "c"], "abc", "a"),
        (["a\n", "b\n", "\n", "c"], "\n\n", "a\nb"),
        (["a\n\nb"], "", "a\n\nb"),
    ],
)
def test_the_stop_text_is_not_shown_and_nothing_else_is_lost(tokens, stop, shown):
    ids = [i for token in tokens for i in tokenizer.encode(token)]
    assert "".join(written(ids, stop=stop)) == shown
    assert "".join(written(in_bytes("".join(tokens)), stop=stop)) == shown


def test_the_end_of_the_document_or_the_length_ends_the_text():
    assert "".join(written([*in_bytes("ab"), 0, *in_bytes("cd")])) == "ab"
    assert "".join(written(in_bytes("abcd"), length=3)) == "abc"


def test_greedy_text_is_what_the_model_finds_likeliest_and_its_state_lets_it_go_on():
    model = checkpoint.load_model("base.pth")
    prompt = tokenizer.encode("\n\n") + in_bytes("User: hi")
    ids = []
    for _ in range(12):
        ids.append(int(model(torch.tensor([prompt + ids]))[0, -1].argmax()))
    assert 0 not in ids
    settings = generate.Settings(length=12, temperature=0)
    stream = generate.stream(model, model.empty_state(), prompt, settings=settings)
    found, (state, unread) = pieces(stream)
    assert "".join(found) == tokenizer.decode_bytes(ids).decode(errors="replace")
    logits, _ = model(torch.tensor([unread + in_bytes("and")]), state)
    whole = model(torch.tensor([prompt + ids + tokenizer.encode("\n\n") + in_bytes("and")]))
    torch.testing.assert_close(logits[0, -1], whole[0, -1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "text, stop",
    [("hi\n\n", "\n\n"), ("hi", "\n\n"), ("hi", "")],
    ids=["by the stop text", "by the document's end", "without stop"],
)
def test_a_chat_turn_ends_in_one_blank_line_however_it_ended(text, stop):
    script = Script(in_bytes(text))
    settings = generate.Settings(length=100, temperature=0)
    stream = generate.stream(script, 0, in_bytes("User: x"), settings=settings, stop=stop)
    _, (_, unread) = pieces(stream)
    read = script.read + unread
    assert tokenizer.decode_bytes(read).decode() == "User: xhi\n\n" and 0 not in read


@pytest.mark.parametrize(
    "temperature, top_p, expected",
    [
        (1.0, 1.0, [0.5, 0.25, 0.125, 0.125]),
        (1.0, 0.7, [2 / 3, 1 / 3, 0, 0]),
        (1.0, 0.5, [1, 0, 0, 0]),
        (1.0, 0.01, [1, 0, 0, 0]),
        (0.5, 1.0, [16 / 22, 4 / 22, 1 / 22, 1 / 22]),
        (0, 1.0, [1, 0, 0, 0]),
    ],
)
def test_sampling_has_the_distribution_asked_for(temperature, top_p, expected):
    logits = torch.tensor([0.5, 0.25, 0.125, 0.125]).log()[[2, 0, 3, 1]]
    generator = torch.Generator().manual_seed(0)
    settings = generate.Settings(1, temperature, top_p, generator)
    tokens = torch.tensor([generate.sample(logits, settings) for _ in range(3000)])
    found = (torch.bincount(tokens, minlength=4) / 3000)[[1, 3, 0, 2]]
    assert found == pytest.approx(torch.tensor(expected), abs=0.03)
    assert not found[torch.tensor(expected) == 0].any()


# ---- generate.py and the whole way at the command line -------------------------------------------


@pytest.fixture
def say(monkeypatch, capsys):
    """generate.py in this process: flags -> what it prints."""

    def main(flags):
        monkeypatch.setattr(sys, "argv", ["generate.py", *shlex.split(flags)])
        monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
        generate.main()
        return capsys.readouterr().out

    return main


def test_the_seed_decides_the_text_and_at_temperature_0_there_is_no_choice(say):
    prompt = "world.pth --prompt 'Hello\\n' --length 12 "
    text = say(prompt + "--seed 1")
    assert text.startswith("Hello\n")
    assert text == say(prompt + "--seed 1") != say(prompt + "--seed 2")
    assert say(prompt + "--temperature 0 --seed 1") == say(prompt + "--temperature 0 --seed 2")


@pytest.mark.parametrize("quant", ["none", "int8", "nf4"])
def test_a_model_writes_the_same_with_the_bone_beside_it_and_merged_into_it(say, capsys, quant):
    merge.merge("world.pth", "world_ckpt.pth", "tuned.pth", quant=quant)
    capsys.readouterr()
    ways = (
        f"world.pth --bone world_ckpt.pth --quant {quant}",
        "tuned.pth",
        f"world.pth --quant {quant}",
    )
    apart, tuned, base = (say(f"{way} --prompt 你好 --length 12 --temperature 0") for way in ways)
    assert apart == tuned != base


def test_the_arguments_of_a_run_in_the_current_folder_are_not_those_of_a_complete_model(say):
    pathlib.Path("args.json").write_text('{"quant": "nf4"}')
    text = say("world.pth --prompt Hello --length 12 --temperature 0")
    assert text == say("world.pth --prompt Hello --length 12 --temperature 0 --quant none")


@pytest.mark.parametrize("quant", ["none", "int8", "nf4"])
def test_rwkv_5_trains_merges_and_writes(say, capsys, quant):
    torch.manual_seed(0)
    model = rwkv6.init_model(2, 64, 65536, version="x052")
    torch.save(
        {name: p.detach() + 0.05 * torch.randn_like(p) for name, p in model.named_parameters()},
        "old.pth",
    )
    binidx.write_binidx("x", [[*tokenizer.encode("one two three"), 0]] * 4)
    flags = "--load_model old.pth --data_file x --bone_r 32 --precision fp32 --accelerator cpu"
    train.train(train.parse_args(f"{flags} --lr_init 1e-2 --quant {quant}".split()))
    merge.merge("old.pth", "out/rwkv-0.pth", "tuned.pth")
    capsys.readouterr()
    ways = ("old.pth --bone out/rwkv-0.pth", "tuned.pth", f"old.pth --quant {quant}")
    apart, tuned, base = (say(f"{way} --prompt 你好 --length 12 --temperature 0") for way in ways)
    assert apart == tuned != base


def test_a_model_of_characters_writes_characters_and_any_of_them_may_be_the_first(say, capsys):
    torch.manual_seed(0)
    model = rwkv6.init_model(1, 64, 3)
    model.head.weight.data.zero_()  # the likeliest is always the first
    torch.save(dict(model.named_parameters()), "chars.pth")
    for vocabulary, says in (
        (None, "and no vocab.json says what it is"),
        ({"0": "é", "1": "a"}, "vocab.json: not a vocabulary of 3 characters"),
        ({"0": "é", "1": "a", "2": "é"}, "not a vocabulary"),
        ([1], "not a vocabulary"),
    ):
        if vocabulary:
            pathlib.Path("vocab.json").write_text(json.dumps(vocabulary))
        assert says in refused(capsys, lambda: say("chars.pth --prompt a"))
    pathlib.Path("vocab.json").write_text(json.dumps({"0": "é", "1": "a", "2": "词"}))
    assert say("chars.pth --prompt 词a --length 4 --temperature 0") == "词aéééé\n"
    assert "the text has the character 'b'" in refused(capsys, lambda: say("chars.pth --prompt ab"))
    assert "cannot chat; use --prompt" in refused(capsys, lambda: say("chars.pth"))


def test_what_training_says_comes_next_works_for_characters_too(say, capsys, monkeypatch):
    pathlib.Path("t.txt").write_text("many words " * 20)
    for flags in (
        "--n_layer 1 --n_embd 64 --proj_dir base",
        "--load_model base/rwkv-0.pth --bone_r 32",
    ):
        flags += " --data_file t.txt --epoch_steps 1 --ctx_len 16 --accelerator cpu"
        train.train(train.parse_args(flags.split()))
    command_line = capsys.readouterr().out.splitlines()[-1].removeprefix("next: python ")
    monkeypatch.setattr(sys, "argv", command_line.split())
    merge.main()
    capsys.readouterr()
    assert say("out/tuned.pth --prompt many --length 3").startswith("many")


@pytest.mark.parametrize(
    "flags, says",
    [
        ("gone.pth --prompt a", "gone.pth: No such file"),
        ("ckpt.pth --prompt a", "ckpt.pth: a Bone checkpoint"),
        ("world.pth --bone world.pth --prompt a", "world.pth: holds no tensor named *.bone"),
        (
            "world.pth --bone run/ckpt.pth --quant int8 --prompt a",
            "run/ckpt.pth: trained with --quant nf4 (run/args.json), but --quant is int8",
        ),
        ("world.pth --bone ckpt.pth --prompt a", "another model"),
        ("world.pth --bone nan.pth --prompt a", "nan.pth: ln_out.bias holds NaN"),
        ("base.pth --prompt hello", "base.pth: its vocabulary of 300 "),
        *[
            (f"world.pth --prompt a {flag}", flag)
            for flag in (
                "--temperature -1",
                "--temperature nan",
                "--top_p 0",
                "--top_p nan",
                "--length 0",
                f"--seed {2**64}",
                f"--seed {-(2**63) - 1}",
            )
        ],
    ],
)
def test_generating_refuses_what_cannot_work(capsys, say, flags, says):
    torch.save(read("world_ckpt.pth") | {"ln_out.bias": torch.full((64,), NAN)}, "nan.pth")
    pathlib.Path("run").mkdir()
    shutil.copy("world_ckpt.pth", "run/ckpt.pth")
    pathlib.Path("run/args.json").write_text('{"quant": "nf4"}')
    assert says in refused(capsys, lambda: say(flags))


def test_a_chat_goes_on_until_an_empty_line():
    end = command("generate.py world.pth --length 3", input="hello\nagain\n\nnot read\n")
    assert end.returncode == 0
    assert end.stdout.count("User: ") == 3
    assert end.stdout.count("Assistant:") == 2
    assert "Traceback" not in end.stderr


def test_a_chat_survives_bytes_that_are_not_utf8():
    text = "caf\udce9\nagain\n\n"  # \udce9: the byte e9
    end = command("generate.py world.pth --length 3", input=text, errors="surrogateescape")
    # A CUDA build of PyTorch says so where there is no GPU.
    ignored = "No CUDA runtime is found"
    complaints = [line for line in end.stderr.splitlines() if ignored not in line]
    assert end.returncode == 0
    assert end.stdout.count("Assistant:") == 2
    assert not complaints


def test_from_text_to_a_tuned_model_that_writes():
    texts = [f"User: {i}?\n\nAssistant: 你好 {i}!" for i in range(6)]
    lines = [json.dumps({"text": text}) + "\n" for text in texts]
    pathlib.Path("t.jsonl").write_text("".join(lines))
    flags = "--proj_dir 'my run' --bone_r 32 --micro_bsz 3 --loss_mask qa"
    tuned = command(f"train.py --load_model world.pth --data_file t.jsonl {flags}")
    assert tuned.returncode == 0 and " of 2: loss " in tuned.stderr, tuned.stderr
    # What it says comes next can be typed as it stands.
    merged = command(tuned.stdout.splitlines()[-1].removeprefix("next: python "))
    assert merged.returncode == 0 and "tuned.pth" in merged.stdout, merged.stderr
    said = command("generate.py 'my run/tuned.pth' --prompt 'User: 3?\\n\\nAssistant:' --length 5")
    assert said.returncode == 0 and said.stdout.startswith("User: 3?\n\nAssistant:"), said.stderr


@pytest.mark.parametrize(
    "line, says",
    [
        (
            "train.py --load_model gone.pth --data_file x",
            "--load_model gone.pth: No such file or directory",
        ),
        (
            "merge.py code.pth ckpt.pth out.pth",
            "code.pth: not a PyTorch checkpoint; nothing was executed, "
            "a .pth as torch.save writes it is needed",
        ),
    ],
)
def test_an_error_is_one_line_and_no_traceback(line, says):
    pathlib.Path("code.pth").write_bytes(pickle.dumps(os.getcwd))
    end = command(line)
    assert (end.returncode, end.stdout, end.stderr) == (2, "", f"error: {says}\n")
