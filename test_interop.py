"""`make interop`: merged models run in web-rwkv, the engine inside Ai00, which reads the .st that merge.py writes.

Its GPU here is a program, Mesa's llvmpipe. The judge computes in float16, so a model is kept whose logits that hardly moves, and it is read
by prompts of at most 32 tokens: beyond, and with LP_NUM_THREADS other than 0 (which the Makefile sets), web-rwkv 0.8.14 lets
threads write over each other unless n_embd is a multiple of 512.
"""

import os

import pytest
import torch

import bone
import merge
import rwkv6

web_rwkv_py = pytest.importorskip("web_rwkv_py", reason="the judge of .st files; make interop installs it")


@pytest.mark.skipif(os.environ.get("LP_NUM_THREADS") != "0", reason="web-rwkv is to be trusted with LP_NUM_THREADS=0; make interop sets it")
@pytest.mark.parametrize("version", ["x060", "x052"])
def test_web_rwkv_reads_the_merged_model_and_agrees(version, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.set_num_threads(1)                                        # the model below depends on their number
    torch.manual_seed(1)
    base = rwkv6.init_model(12, 128, 256, version=version)          # 12 layers: web-rwkv halves activations after 6 and 12
    torch.save({name: p.detach() + 0.05 * torch.randn_like(p) for name, p in base.named_parameters()}, "base.pth")
    tuned = bone.add_bone(rwkv6.load_model("base.pth"), 32)
    trained = {name: p for name, p in tuned.named_parameters() if name.endswith(".bone") or "time" in name or "ln" in name}
    torch.save({name: p.detach() + 0.02 * torch.randn_like(p) for name, p in trained.items()}, "ckpt.pth")
    merge.merge("base.pth", "ckpt.pth", "tuned.st")
    models = [bone.load_bone(rwkv6.load_model("base.pth"), "ckpt.pth"), rwkv6.load_model("base.pth")]
    judge = web_rwkv_py.Model("tuned.st")
    for n in (1, 5, 17, 32):
        prompt = torch.randint(256, (n,)).tolist()
        judge.clear_state()
        theirs = torch.tensor(judge.run(prompt))
        with torch.no_grad():
            ours, without_bone = (model(torch.tensor([prompt]))[0, -1] for model in models)
        print(f"{version}, {n} tokens: {(ours - theirs).abs().max():.4f}, without Bone {(without_bone - theirs).abs().max():.2f}")
        assert (ours - theirs).abs().max() < 0.01 < 0.1 < (without_bone - theirs).abs().max()
