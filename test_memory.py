"""Memory: what a step takes is known beforehand, a run that cannot fit is refused, and files are read and written as streams."""

import os
import zipfile

import pytest
import torch

import bone
import files
import merge
import memory
import rwkv6
import train

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Stands in a folder with base.pth, of 5 blocks, and ckpt.pth, a Bone checkpoint of it."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    torch.save({name: p.detach().bfloat16() for name, p in rwkv6.init_model(5, 128, 1000).named_parameters()}, "base.pth")
    model = bone.add_bone(rwkv6.load_model("base.pth"), 32)
    torch.save({name: torch.randn_like(p).bfloat16() for name, p in model.named_parameters() if p.requires_grad}, "ckpt.pth")


def arguments(flags=""):
    return train.parse_args(f"--load_model base.pth --data_file x --bone_r 32 --ctx_len 96 --micro_bsz 2 --accelerator cpu {flags}".split())


def pages(kind):
    """Bytes of this process in memory, by /proc: RssAnon, RssFile."""
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) * 1024 for line in f if line.startswith(kind))


@pytest.mark.parametrize("flags", ["", "--quant nf4", "--quant int8 --precision fp32", "--grad_cp 0", "--bone_mode bone --train_parts head emb"])
def test_the_expected_peak_is_what_the_tensors_of_a_real_step_take(flags):
    args = arguments(flags)
    parts = train.expected_memory(args, CPU)[1]
    model, _, _ = train.build_model(args, CPU)
    model.grad_cp = bool(args.grad_cp)
    idx = torch.randint(1000, (2, 96))
    with memory.LiveBytes(memory.tensors(model)) as live:
        with torch.autocast("cpu", torch.bfloat16, enabled=args.precision == "bf16"):
            loss = train.loss_fn(model, idx, idx, torch.ones(2, 96), 192, 192)
        loss.backward()
    assert parts["weights"] == sum(t.nbytes for t in memory.tensors(model))
    assert parts["optimizer"] == 8 * sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert parts["activations, gradients"] + parts["workspace"] == pytest.approx(live.peak, rel=0.03)


def test_live_bytes_counts_a_storage_once_from_its_making_to_its_end():
    x = torch.ones(1000)
    with memory.LiveBytes([x]) as live:
        y = x * 2
        z = y.view(10, 100)
        assert live.now == live.peak == 4000
        del y
        assert live.now == 4000 and z.shape == (10, 100)
        del z
        x.mul_(2)
        assert live.now == 0 and live.peak == 4000


@pytest.mark.parametrize("flags", ["", "--quant nf4"])
def test_a_dry_run_says_what_is_trained_and_what_it_takes_and_writes_nothing(capsys, flags):
    before = set(os.listdir())
    train.train(arguments(f"--dry_run {flags}"))
    said = capsys.readouterr().out
    assert set(os.listdir()) == before                                    # and needs no data
    model, parts = train.expected_memory(arguments(flags), CPU)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert f"{trained:,} parameters" in said and all(part in said for part in (*parts, "expected peak", "free on cpu"))


def test_a_run_that_cannot_fit_is_refused_before_anything_is_loaded_with_the_flag_that_helps_most(monkeypatch, capsys):
    monkeypatch.setattr(memory, "available", lambda device: 10e6)
    monkeypatch.setattr(rwkv6, "load_model", lambda path, dtype, device, quant, load=rwkv6.load_model: load(path, dtype, torch.device("meta"), quant))
    with pytest.raises(ValueError, match=r"would take 0\.\d\d GB, but 0\.01 GB .* --grad_cp 1"):
        train.train(arguments("--grad_cp 0 --ctx_len 512"))
    assert not os.path.exists("out")


def test_from_scratch_and_going_on_are_expected_too():
    parts = train.expected_memory(train.parse_args("--n_layer 1 --n_embd 64 --data_file x --ctx_len 8".split()), CPU)[1]
    assert parts["weights"] * 2 == parts["optimizer"]                     # everything is trained
    assert train.expected_memory(arguments("--bone_load ckpt.pth"), CPU)[1] == train.expected_memory(arguments(), CPU)[1]


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="Linux alone tells what is mapped")
def test_a_tensor_that_was_read_gives_its_pages_back_and_can_be_read_again():
    torch.save({"a": torch.randn(4_000_000), "b": torch.randn(4_000_000)}, "big.pth")
    mapped = files.read_checkpoint("big.pth")
    before = pages("RssFile")
    total = mapped["a"].sum()
    assert pages("RssFile") > before + 15e6
    files.release(mapped["a"])
    assert pages("RssFile") < before + 1e6 and mapped["a"].sum() == total


def test_releasing_a_tensor_that_is_not_mapped_leaves_it_alone():
    tensors = {"a": torch.randn(4_000_000)}
    torch.save(tensors, "old.pth", _use_new_zipfile_serialization=False)
    for tensor in (tensors["a"].clone(), files.read_checkpoint("old.pth")["a"]):
        files.release(tensor)
        assert tensor.equal(tensors["a"])


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="Linux alone tells what is mapped")
def test_loading_gives_back_what_it_has_read():
    torch.save({name: p.detach().bfloat16() for name, p in rwkv6.init_model(4, 256, 20_000).named_parameters()}, "base.pth")
    before = pages("RssFile")
    model = rwkv6.load_model("base.pth")
    assert pages("RssFile") < before + 0.1 * sum(p.nbytes for p in model.parameters())


def test_a_streamed_file_is_what_torch_save_writes():
    tensors = {"a.b": torch.randn(300, 7).bfloat16(), "c": torch.randn(5).double(), "d": torch.randn(1, 1, 3).half(), "e": torch.zeros(0), "f": torch.tensor(1.5)}
    tensors["g"] = tensors["a.b"].t()                                     # not contiguous, and a storage shared with a.b
    files.save_stream(tensors, tensors.get, "x.pth")
    torch.save({name: t.clone(memory_format=torch.contiguous_format) for name, t in tensors.items()}, "y.pth")
    with zipfile.ZipFile("x.pth") as x, zipfile.ZipFile("y.pth") as y:
        assert x.testzip() is None                                        # every checksum is right
        assert [(i.filename.partition("/")[2], i.CRC) for i in x.infolist()][:-1] == [(i.filename.partition("/")[2], i.CRC) for i in y.infolist()][:-1]
    for mmap in (False, True):
        found = torch.load("x.pth", weights_only=True, mmap=mmap)
        assert list(found) == list(tensors) and all(found[name].equal(t) and found[name].dtype == t.dtype for name, t in tensors.items())


def test_merging_holds_one_tensor_at_a_time():
    base, live = files.read_checkpoint("base.pth"), 0
    with memory.LiveBytes([]) as live:
        merge.merge("base.pth", "ckpt.pth", "tuned.pth")
    unread = sum(t.nbytes for t in base.values()) + sum(t.nbytes for t in files.read_checkpoint("ckpt.pth").values())
    layout = sum(t.nbytes for t in base.values())                         # torch.empty, which takes no memory until it is written to
    assert live.peak - unread - layout < 8 * max(t.nbytes for t in base.values())
