"""Files travel: checkpoints to and from RWKV-PEFT, merged models to Ai00.

Ai00's engine, web-rwkv, reads them in `make interop`.
"""

import os
import pathlib
import re

import pytest
import torch

import adapt
import archive
import binidx
import checkpoint
import foreign
import merge
import rwkv6
from test_options import refused
from test_train import base_file, folder, read, run  # noqa: F401 (two are fixtures)

HERE = pathlib.Path(__file__).parent


def merge_of_the_reference(base, tensors):
    """What merge_bone.py of RWKV-PEFT does, with its roundings."""
    w = base | tensors
    for bone_name in [name for name in w if name.endswith(".bone")]:
        name = bone_name.removesuffix("bone") + "weight"
        b = w.pop(bone_name)
        r = b.shape[1]
        blocks = w[name].unflatten(1, (-1, r)).unflatten(0, (-1, r)).transpose(1, 2)  # (a, b, r, r)
        w[name] = w[name] + (blocks @ b + b).transpose(1, 2).reshape(w[name].shape)
    assert not any("bone" in name for name in w)
    return w


def layout(tensors):
    return {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}


@pytest.mark.parametrize("version", ["x060", "x052"])
def test_checkpoints_go_both_ways_between_rwkv_peft_and_here(version):
    fixture = read(HERE / "fixtures" / f"{version}_bone.pth")
    for name in ("base", "ckpt"):
        torch.save(fixture[name], f"{name}.pth")
    binidx.write_binidx("x", fixture["idx"].tolist())
    run(f"--bone_r 32 --my_testing {version} --epoch_steps 2")
    ours = read("out/rwkv-0.pth")
    assert layout(ours) == layout(fixture["ckpt"])
    # Theirs, trained further.
    run("--bone_r 32 --bone_load ckpt.pth --epoch_steps 2 --epoch_begin 1")
    # Under Bone's later name there.
    later = {name.replace(".bone", ".disha"): tensor for name, tensor in read("ckpt.pth").items()}
    torch.save(later, "disha.pth")
    merge.merge("base.pth", "disha.pth", "disha_tuned.pth")
    for path in ("ckpt.pth", "out/rwkv-1.pth"):
        out = f"tuned_{os.path.basename(path)}"
        merge.merge("base.pth", path, out)
        tuned = read(out)
        theirs = merge_of_the_reference(fixture["base"], read(path))
        assert tuned.keys() == theirs.keys() == fixture["base"].keys()
        for name, tensor in tuned.items():
            expected = theirs[name]
            assert tensor.dtype == expected.dtype, name
            assert (tensor - expected).float().norm() <= 1e-2 * expected.float().norm(), name
    assert checkpoint.rank_and_mode(ours, "") == (32, "bat")
    same = read("tuned_ckpt.pth")
    assert all(tensor.equal(same[name]) for name, tensor in read("disha_tuned.pth").items())


def test_bones_under_their_later_name_are_trained_further():
    bones = read(HERE / "fixtures" / "x060_bone.pth")
    torch.save(bones["base"], "base.pth")
    binidx.write_binidx("x", bones["idx"].tolist())
    losses = []
    for suffix in ("bone", "disha"):
        renamed = {name.replace(".bone", f".{suffix}"): t for name, t in bones["ckpt"].items()}
        torch.save(renamed, "ckpt.pth")
        config = """--disha_config '{"mode":"bat","load":"ckpt.pth","r":32}' --peft disha"""
        run(f"{config} --bone_r 32 --epoch_steps 1 --proj_dir {suffix}")
        losses.append(read(f"{suffix}/rwkv-0.pth"))
    assert all(tensor.equal(losses[1][name]) for name, tensor in losses[0].items())
    assert any(name.endswith(".bone") for name in losses[1])


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model.", "_orig_mod.module.model."])
def test_prefixes_of_names_are_left_out_which_is_said_once(prefix, capsys):
    base = read("base.pth")
    path = f"{prefix}pth"
    torch.save({f"{prefix}{name}": tensor for name, tensor in base.items()}, path)
    for _ in range(2):
        weights = dict(checkpoint.load_model(path).named_parameters())
    assert weights.keys() == base.keys()
    printed = capsys.readouterr().out
    assert printed == f"note: {path}: the names' prefix {prefix} is left out\n"
    torch.save(base | {f"{prefix}emb.weight": base["emb.weight"]}, path)
    assert "holds emb.weight twice" in refused(capsys, lambda: checkpoint.load_model(path))


def safetensors(names):
    """Write bad.pth as safetensors of these names."""
    like = {name: torch.empty(1, dtype=torch.float16) for name in names}
    archive.save_safetensors(like, like.get, "bad.pth")


def saved(content, **options):
    torch.save(content, "bad.pth", **options)


ONE = torch.ones(1)
HUGGING_FACE = "the model's .pth is needed, which the BlinkDL and RWKV organisations"


@pytest.mark.parametrize(
    "says, write",
    [
        (
            "bad.pth: not a PyTorch checkpoint (a .st is for Ai00); the .pth that it was made",
            lambda: safetensors(["blocks.0.att.time_mix_x"]),
        ),
        (
            f"bad.pth: not a PyTorch checkpoint (safetensors); {HUGGING_FACE}",
            lambda: safetensors(["rwkv.blocks.0.attention.key.weight"]),
        ),
        (
            "bad.pth: has Hugging Face's names, such as rwkv.blocks.0.attention.key.weight; "
            f"{HUGGING_FACE}",
            lambda: saved({"rwkv.blocks.0.attention.key.weight": ONE}),
        ),
        (
            "bad.pth: has Hugging Face's names, such as model.layers.0.attn.k_proj.weight",
            lambda: saved({"model.layers.0.attn.k_proj.weight": ONE}),
        ),
        (
            "bad.pth: has Ai00's names, such as blocks.0.att.time_mix_w1",
            lambda: saved({"blocks.0.att.time_mix_w1": ONE}),
        ),
        (
            "bad.pth: saved with pickle protocol 4; if you trust its source, save it again in "
            "Python: torch.save(torch.load('bad.pth', weights_only=False), 'new.pth')",
            lambda: saved({"a": ONE}, pickle_protocol=4),
        ),
        (
            "bad.pth: saved with pickle protocol 5",
            lambda: saved({"a": ONE}, pickle_protocol=5),
        ),
        (
            "bad.pth: saved in the form before PyTorch 1.6; save it again in Python: "
            "torch.save(torch.load('bad.pth'), 'new.pth')",
            lambda: saved({"a": ONE}, _use_new_zipfile_serialization=False),
        ),
        (
            "bad.pth: saved in the form before PyTorch 1.6; if you trust its source",
            lambda: saved({"a": ONE}, _use_new_zipfile_serialization=False, pickle_protocol=4),
        ),
        (
            "bad.pth: not a PyTorch checkpoint (a GGUF file, for llama.cpp)",
            lambda: pathlib.Path("bad.pth").write_bytes(b"GGUF\3\0\0\0"),
        ),
        (
            "bad.pth: not a PyTorch checkpoint (a Git LFS pointer); get the file itself",
            lambda: pathlib.Path("bad.pth").write_text("version https://git-lfs.github.com/spec"),
        ),
        (
            "bad.pth: not a PyTorch checkpoint (a web page)",
            lambda: pathlib.Path("bad.pth").write_text("<!DOCTYPE html>"),
        ),
        (
            "bad.pth: head.weight is missing; where the head is the embedding",
            lambda: saved({n: t for n, t in read("base.pth").items() if n != "head.weight"}),
        ),
        (
            "bad.pth: a cut or damaged PyTorch checkpoint (it cannot be read: BadZipFile)",
            lambda: pathlib.Path("bad.pth").write_bytes(b"PK\3\4 and no more"),
        ),
    ],
)
def test_what_another_program_wrote_is_named(capsys, says, write):
    write()
    assert says in refused(capsys, lambda: checkpoint.load_model("bad.pth"))


def test_what_is_said_of_older_files_works():
    tensors = read("base.pth")
    for options in ({"pickle_protocol": 5}, {"_use_new_zipfile_serialization": False}):
        saved(tensors, **options)
        torch.save(torch.load("bad.pth", weights_only="pickle_protocol" not in options), "new.pth")
        again = archive.read_checkpoint("new.pth")
        assert all(tensor.equal(again[name]) for name, tensor in tensors.items())


def test_a_head_that_is_the_embedding_is_read_as_a_head_of_its_own():
    tied = read("base.pth")
    tied["head.weight"] = tied["emb.weight"]
    torch.save(tied, "tied.pth")
    model = checkpoint.load_model("tied.pth")
    assert model.head.weight.equal(model.emb.weight) and model.head.weight is not model.emb.weight


@pytest.mark.parametrize("version", ["x060", "x052"])
def test_a_st_file_is_what_the_converter_of_ai00_makes_of_the_merged_model(version, capsys):
    load_file = pytest.importorskip("safetensors.torch").load_file
    fixture = read(HERE / "fixtures" / f"{version}_bone.pth")
    for name in ("base", "ckpt"):
        torch.save(fixture[name], f"{name}.pth")
    # One tensor lies transposed in the file.
    fixture["base"]["head.weight"] = fixture["base"]["head.weight"].t().contiguous().t()
    torch.save(fixture["base"], "base.pth")
    for out in ("tuned.pth", "tuned.st"):
        merge.merge("base.pth", "ckpt.pth", out)
    expected = {}
    for name, tensor in read("tuned.pth").items():
        name = name.replace("time_faaaa", "time_first").replace("time_maa", "time_mix")
        if re.search("time_(mix|decay)_w[12]", name):
            tensor = tensor.transpose(-2, -1)
        expected[name] = tensor.half()
    found = load_file("tuned.st")
    assert found.keys() == expected.keys()
    assert all(found[name].equal(tensor) for name, tensor in expected.items())
    words = r"tuned.st: not a PyTorch checkpoint \(a .st is for Ai00\); the .pth that it was made"
    with pytest.raises(ValueError, match=words):
        checkpoint.load_model("tuned.st")
    large = fixture["base"] | {"blocks.1.ffn.key.weight": torch.full((448, 128), 7e4)}
    torch.save(large, "base.pth")
    error = refused(capsys, lambda: merge.merge("base.pth", "ckpt.pth", "other.st"))
    assert "blocks.1.ffn.key.weight reaches" in error
    assert not [path for path in os.listdir() if path.startswith("other.st")]


def disturbed(parameters, size):
    return {name: p.detach() + size * torch.randn_like(p) for name, p in parameters.items()}


@pytest.mark.skipif(
    os.environ.get("LP_NUM_THREADS") != "0",
    reason="web-rwkv cannot be trusted without LP_NUM_THREADS=0, which make interop sets",
)
@pytest.mark.parametrize("version", ["x060", "x052"])
def test_web_rwkv_reads_the_merged_model_and_agrees(version):
    """The GPU of web-rwkv is a software driver here, Mesa's llvmpipe.

    It computes in float16, so the model's logits must hardly depend on that. Prompts have at most
    32 tokens: beyond that, or with LP_NUM_THREADS other than 0, threads of web-rwkv 0.8.14 write
    over each other unless n_embd is a multiple of 512.
    """
    web_rwkv_py = pytest.importorskip("web_rwkv_py")
    # The model below depends on the number of threads.
    torch.set_num_threads(1)
    torch.manual_seed(1)
    # 12 layers, as web-rwkv halves the activations after 6 and 12.
    base = rwkv6.init_model(12, 128, 256, version=version)
    torch.save(disturbed(dict(base.named_parameters()), 0.05), "base.pth")
    tuned = adapt.add_bone(checkpoint.load_model("base.pth"), 32)
    trained = {
        name: p
        for name, p in tuned.named_parameters()
        if name.endswith(".bone") or "time" in name or "ln" in name
    }
    torch.save(disturbed(trained, 0.02), "ckpt.pth")
    merge.merge("base.pth", "ckpt.pth", "tuned.st")
    with_bone = checkpoint.load_bone(checkpoint.load_model("base.pth"), "ckpt.pth")
    without_bone = checkpoint.load_model("base.pth")
    judge = web_rwkv_py.Model("tuned.st")
    for n in (1, 5, 17, 32):
        prompt = torch.randint(256, (n,)).tolist()
        judge.clear_state()
        theirs = torch.tensor(judge.run(prompt))
        with torch.no_grad():
            ours = with_bone(torch.tensor([prompt]))[0, -1]
            base_alone = without_bone(torch.tensor([prompt]))[0, -1]
        error = (ours - theirs).abs().max()
        change = (base_alone - theirs).abs().max()
        print(f"{version}, {n} tokens: {error:.4f}, without Bone {change:.2f}")
        assert error < 0.01
        assert change > 0.1


def test_an_empty_file_is_said_to_be_empty():
    pathlib.Path("empty.pth").touch()
    with pytest.raises(ValueError, match=r"^empty\.pth: .* \(it is empty\); download it again$"):
        foreign.check_is_zip("empty.pth")
