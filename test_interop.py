"""Files travel: checkpoints to and from RWKV-PEFT, merged models to Ai00.

Ai00's engine, web-rwkv, reads them in `make interop`.
"""

import os
import pathlib
import re

import pytest
import torch

import bone
import checkpoint
import corpus
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
    corpus.write_binidx("x", fixture["idx"].tolist())
    run(f"--bone_r 32 --my_testing {version} --epoch_steps 2")
    ours = read("out/rwkv-0.pth")
    assert layout(ours) == layout(fixture["ckpt"])
    # Theirs, trained further.
    run("--bone_r 32 --bone_load ckpt.pth --epoch_steps 2 --epoch_begin 1")
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
    words = r"tuned.st: not a PyTorch checkpoint .a .st is for Ai00.;"
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
    tuned = bone.add_bone(checkpoint.load_model("base.pth"), 32)
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
