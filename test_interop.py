"""Files travel: checkpoints to and from RWKV-PEFT, merged models to Ai00, whose engine web-rwkv reads them in `make interop`."""

import os
import pathlib

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
    """What merge_bone.py of RWKV-PEFT does, with its roundings: every tensor of the checkpoint goes in, bones are multiplied out."""
    w = base | tensors
    for name in [
        name for name in w if name.endswith(".weight") and name.removesuffix("weight") + "bone" in w
    ]:
        b = w.pop(name.removesuffix("weight") + "bone")
        r = b.shape[1]
        blocks = w[name].unflatten(1, (-1, r)).unflatten(0, (-1, r)).transpose(1, 2)  # (a, b, r, r)
        w[name] = w[name] + (blocks @ b + b).transpose(1, 2).reshape(w[name].shape)
    assert not any("bone" in name for name in w)
    return w


@pytest.mark.parametrize("version", ["x060", "x052"])
def test_checkpoints_go_both_ways_between_rwkv_peft_and_here(version):
    fixture = read(HERE / "fixtures" / f"{version}_bone.pth")
    for name in ("base", "ckpt"):
        torch.save(fixture[name], f"{name}.pth")
    corpus.write_binidx("x", fixture["idx"].tolist())
    run(f"--bone_r 32 --my_testing {version} --epoch_steps 2")
    ours = read("out/rwkv-0.pth")
    assert {n: (t.shape, t.dtype) for n, t in ours.items()} == {
        n: (t.shape, t.dtype) for n, t in fixture["ckpt"].items()
    }
    run("--bone_r 32 --bone_load ckpt.pth --epoch_steps 2 --epoch_begin 1")  # theirs, trained on
    for path in ("ckpt.pth", "out/rwkv-1.pth"):
        merge.merge("base.pth", path, out := f"tuned_{os.path.basename(path)}")
        tuned, theirs = read(out), merge_of_the_reference(fixture["base"], read(path))
        assert tuned.keys() == theirs.keys() == fixture["base"].keys()
        for name, tensor in tuned.items():
            assert (
                tensor.dtype == theirs[name].dtype
                and (tensor - theirs[name]).float().norm() <= 1e-2 * theirs[name].float().norm()
            ), name
    mode = checkpoint.rank_and_mode(ours, "")
    assert mode == (32, "bat")


@pytest.mark.parametrize("version", ["x060", "x052"])
def test_a_st_file_is_what_the_converter_of_ai00_makes_of_the_merged_model(version, capsys):
    load_file = pytest.importorskip("safetensors.torch").load_file
    fixture = read(HERE / "fixtures" / f"{version}_bone.pth")
    for name in ("base", "ckpt"):
        torch.save(fixture[name], f"{name}.pth")
    fixture["base"]["head.weight"] = fixture["base"]["head.weight"].t().contiguous().t()
    torch.save(fixture["base"], "base.pth")  # one tensor lies transposed in the file
    for out in ("tuned.pth", "tuned.st"):
        merge.merge("base.pth", "ckpt.pth", out)
    expected = {}
    for name, tensor in read("tuned.pth").items():
        name = name.replace("time_faaaa", "time_first").replace("time_maa", "time_mix")
        lies = any(
            low_rank in name
            for low_rank in ("time_mix_w1", "time_mix_w2", "time_decay_w1", "time_decay_w2")
        )
        expected[name] = (tensor.transpose(-2, -1) if lies else tensor).half()
    with pytest.raises(ValueError, match="tuned.st: not a PyTorch checkpoint .a .st is for Ai00.;"):
        checkpoint.load_model("tuned.st")
    found = load_file("tuned.st")
    assert found.keys() == expected.keys() and all(
        found[name].equal(tensor) for name, tensor in expected.items()
    )
    large = fixture["base"] | {"blocks.1.ffn.key.weight": torch.full((448, 128), 7e4)}
    torch.save(large, "base.pth")
    assert "blocks.1.ffn.key.weight reaches" in refused(
        capsys, lambda: merge.merge("base.pth", "ckpt.pth", "other.st")
    )
    assert not [path for path in os.listdir() if path.startswith("other.st")]


@pytest.mark.skipif(
    os.environ.get("LP_NUM_THREADS") != "0",
    reason="make interop sets LP_NUM_THREADS=0, without which web-rwkv is not to be trusted",
)
@pytest.mark.parametrize("version", ["x060", "x052"])
def test_web_rwkv_reads_the_merged_model_and_agrees(version):
    """Its GPU here is a program, Mesa's llvmpipe. It computes in float16, so the model is one whose logits that hardly moves; and it is read by
    prompts of at most 32 tokens: beyond, and with LP_NUM_THREADS other than 0, threads of web-rwkv 0.8.14 write over each other unless
    n_embd is a multiple of 512."""
    web_rwkv_py = pytest.importorskip("web_rwkv_py")
    torch.set_num_threads(1)  # the model below depends on their number
    torch.manual_seed(1)
    base = rwkv6.init_model(
        12, 128, 256, version=version
    )  # 12 layers: web-rwkv halves activations after 6 and 12
    torch.save(
        {name: p.detach() + 0.05 * torch.randn_like(p) for name, p in base.named_parameters()},
        "base.pth",
    )
    tuned = bone.add_bone(checkpoint.load_model("base.pth"), 32)
    trained = {
        name: p
        for name, p in tuned.named_parameters()
        if name.endswith(".bone") or "time" in name or "ln" in name
    }
    torch.save(
        {name: p.detach() + 0.02 * torch.randn_like(p) for name, p in trained.items()}, "ckpt.pth"
    )
    merge.merge("base.pth", "ckpt.pth", "tuned.st")
    models = [
        checkpoint.load_bone(checkpoint.load_model("base.pth"), "ckpt.pth"),
        checkpoint.load_model("base.pth"),
    ]
    judge = web_rwkv_py.Model("tuned.st")
    for n in (1, 5, 17, 32):
        prompt = torch.randint(256, (n,)).tolist()
        judge.clear_state()
        theirs = torch.tensor(judge.run(prompt))
        with torch.no_grad():
            ours, without_bone = (model(torch.tensor([prompt]))[0, -1] for model in models)
        print(
            f"{version}, {n} tokens: {(ours - theirs).abs().max():.4f}, without Bone {(without_bone - theirs).abs().max():.2f}"
        )
        assert (ours - theirs).abs().max() < 0.01 < 0.1 < (without_bone - theirs).abs().max()
