"""Memory: a step's peak is known beforehand, and files are read and written tensor by tensor.

A run that cannot fit is refused.
"""

import os
import re
import shlex
import subprocess
import sys
import zipfile

import pytest
import torch

import adapt
import archive
import bench_memory
import binidx
import build
import checkpoint
import estimate
import host_embedding
import loss
import memory
import rwkv6
import savings
import train
from conftest import exhaustive
from plan import resolve_options

CPU = torch.device("cpu")
linux = pytest.mark.skipif(
    not os.path.exists("/proc/self/status"), reason="only Linux tells what a process holds"
)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Stand in a folder with base.pth, of 5 blocks, and ckpt.pth, a Bone checkpoint of it."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    binidx.write_binidx("x", [[5] * 97, [6] * 97])
    base = rwkv6.init_model(5, 128, 1000)
    torch.save({name: p.detach().bfloat16() for name, p in base.named_parameters()}, "base.pth")
    model = adapt.add_bone(checkpoint.load_model("base.pth"), 32)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    torch.save({name: torch.randn_like(p).bfloat16() for name, p in trained.items()}, "ckpt.pth")


def arguments(flags=""):
    line = "--load_model base.pth --data_file x --bone_r 32 --ctx_len 96 --micro_bsz 2"
    line += " --grad_cp 1 --compile 0"
    return resolve_options(train.parse_args(shlex.split(f"{line} --accelerator cpu {flags}")))


def mapped_bytes():
    """Return the bytes of mapped files that this process has in memory."""
    with open("/proc/self/status") as f:
        return int(re.search(r"RssFile:\s*(\d+) kB", f.read())[1]) * 1024


@pytest.mark.parametrize(
    "flags",
    [
        "",
        "--quant nf4",
        "--quant int8 --precision fp32",
        "--grad_cp 0",
        "--bone_mode bone --train_parts head emb",
        "--accumulate_grad_batches 2",
        "--accumulate_grad_batches 3 --train_parts time ln emb head --quant nf4",
    ],
)
def test_the_expected_peak_is_what_the_tensors_of_a_real_step_take(flags):
    args = arguments(flags)
    parts = estimate.expected_memory(args, CPU)[1]
    model, _, _ = build.build_model(args, CPU)
    model.grad_cp = bool(args.grad_cp)
    idx = torch.randint(1000, (2, 96))
    with memory.LiveBytes(memory.tensors(model)) as live:
        passes = build.make_passes(args, model, CPU)
        micro_batches = [(idx, idx, torch.ones(2, 96))] * args.accumulate_grad_batches
        train.accumulate_gradients(model, micro_batches, passes)
    assert parts["weights"] == sum(t.nbytes for t in memory.tensors(model))
    assert parts["optimizer"] == 8 * sum(p.numel() for p in model.parameters() if p.requires_grad)
    of_the_step = parts["activations, gradients"] + parts["workspace"]
    assert of_the_step == pytest.approx(live.peak, rel=0.03)


@pytest.mark.parametrize(
    "flags", ["--grad_cp 0 --micro_bsz 1", exhaustive("--accumulate_grad_batches 2 --bone_r 64")]
)
def test_of_long_rows_two_lengths_are_run_and_say_what_the_longer_one_takes(monkeypatch, flags):
    args = arguments(f"{flags} --ctx_len 9000 --loss_mask none")
    lengths = []

    def noted_loss(model, idx, *rest, **options):
        lengths.append(idx.shape[1])
        return loss.loss_fn(model, idx, *rest, **options)

    monkeypatch.setattr(loss, "LOGITS", 2048 * 1000)
    monkeypatch.setattr(estimate, "loss_fn", noted_loss)
    monkeypatch.setattr(estimate, "LOGITS", 1 << 30)
    exact = estimate.expected_memory(args, CPU)[1]
    assert {*lengths} == {9000}
    lengths.clear()
    monkeypatch.setattr(estimate, "LOGITS", 0)
    assert estimate.expected_memory(args, CPU)[1] == pytest.approx(exact, rel=0.01)
    assert max(lengths) == 2 * (4096 // args.micro_bsz + 1)


def test_rows_are_expected_as_long_as_the_longest_document():
    """Of training or held out; and no longer than ctx_len."""
    binidx.write_binidx("held", [[5] * 200])
    peak = {}
    for flags in (
        "--ctx_len 96",
        "--ctx_len 4096",
        "--ctx_len 4096 --loss_mask none",
        "--ctx_len 4096 --val_file held",
        "--ctx_len 199 --loss_mask none",
    ):
        peak[flags] = estimate.expected_memory(arguments(flags), CPU).total
    assert peak["--ctx_len 4096"] == peak["--ctx_len 96"]
    assert peak["--ctx_len 4096 --val_file held"] == peak["--ctx_len 199 --loss_mask none"]
    assert peak["--ctx_len 4096 --loss_mask none"] > peak["--ctx_len 4096 --val_file held"]


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
    train.train(arguments(f"--dry_run --data_file '' {flags}"))  # it needs no data
    said = capsys.readouterr().out
    assert set(os.listdir()) == before
    (model, *_), parts = estimate.expected_memory(arguments(flags), CPU)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert f"{trained:,} parameters" in said
    for part in (*parts, "expected peak", "free on cpu: it fits"):
        assert part in said


def test_a_run_that_cannot_fit_is_refused_before_anything_is_loaded_with_the_flag_that_helps_most(
    monkeypatch, capsys
):
    load = checkpoint.load_model
    devices = []

    def noted_load(path, dtype, device, **rest):
        devices.append(device.type)
        return load(path, dtype, device, **rest)

    monkeypatch.setattr(memory, "available", lambda device: 10e6)
    monkeypatch.setattr(checkpoint, "load_model", noted_load)
    with pytest.raises(ValueError, match=r"would take 0\.\d\d GB, but 0\.01 GB .* --grad_cp 1"):
        train.train(arguments("--grad_cp 0 --ctx_len 512"))
    assert {*devices} == {"meta"}
    assert not os.path.exists("out")
    assert "free on cpu: too little" in capsys.readouterr().out
    with pytest.raises(ValueError, match="no flag helps: take a smaller --bone_r, a shorter"):
        train.train(arguments("--ctx_len 1 --micro_bsz 1 --quant nf4 --optim adamw8bit"))


def test_freed_memory_is_given_back_where_less_than_twice_the_need_is_free(monkeypatch):
    expected = estimate.expected_memory(arguments(), CPU)
    calls = []
    monkeypatch.setattr(memory, "give_back_freed", lambda: calls.append("given back"))
    check = estimate.MemoryCheck(expected, free=2.1 * expected.total)
    savings.check_memory(arguments(), check, CPU)
    assert calls == []
    check = estimate.MemoryCheck(expected, free=1.9 * expected.total)
    savings.check_memory(arguments(), check, CPU)
    assert calls == ["given back"]


def test_from_scratch_and_going_on_are_expected_too():
    flags = "--n_layer 1 --n_embd 64 --data_file x --ctx_len 8 --grad_cp 1 --compile 0"
    from_scratch = train.parse_args(shlex.split(flags))
    parts = estimate.expected_memory(from_scratch, CPU)[1]
    assert parts["weights"] * 2 == parts["optimizer"]  # everything is trained
    going_on = estimate.expected_memory(arguments("--bone_load ckpt.pth"), CPU)[1]
    assert going_on == estimate.expected_memory(arguments(), CPU)[1]


@linux
def test_a_tensor_that_was_read_gives_its_pages_back_and_can_be_read_again():
    torch.save({"a": torch.randn(4_000_000), "b": torch.randn(4_000_000)}, "big.pth")
    mapped = archive.read_checkpoint("big.pth")
    before = mapped_bytes()
    total = mapped["a"].sum()
    assert mapped_bytes() > before + 15e6
    archive.drop_mapped_pages(mapped["a"])
    assert mapped_bytes() < before + 1e6
    assert mapped["a"].sum() == total


def test_releasing_a_tensor_that_is_not_mapped_leaves_it_alone():
    tensors = {"a": torch.randn(4_000_000)}
    torch.save(tensors, "a.pth")
    for tensor in (tensors["a"].clone(), archive.read_checkpoint("a.pth")["a"] + 0):
        archive.drop_mapped_pages(tensor)
        assert tensor.equal(tensors["a"])


@linux
@pytest.mark.parametrize("quant", ["none", "nf4"])
@pytest.mark.parametrize(
    "dtype", [exhaustive(torch.float32), exhaustive(torch.float16), torch.bfloat16]
)
def test_loading_takes_the_model_and_one_tensor_of_the_file(dtype, quant):
    bench_memory.random_checkpoint(rwkv6.sizes(2, 512, 65536), "base.pth")
    base = archive.read_checkpoint("base.pth")
    torch.save({name: tensor.to(dtype) for name, tensor in base.items()}, "base.pth.2")
    load = f"""
import torch, checkpoint, memory
cpu = torch.device("cpu")
before = memory.peak(cpu)
model = checkpoint.load_model("base.pth.2", torch.bfloat16, quant="{quant}")
print(memory.peak(cpu) - before, sum(t.nbytes for t in memory.tensors(model)))
"""
    environment = os.environ | {"PYTHONPATH": os.path.dirname(__file__)}
    said = subprocess.check_output([sys.executable, "-c", load], text=True, env=environment)
    peak, final = map(int, said.split())
    assert peak < final + 65536 * 512 * dtype.itemsize + 40e6


def test_a_streamed_file_is_what_torch_save_writes():
    tensors = {
        "a.b": torch.randn(300, 7).bfloat16(),
        "c": torch.randn(5).double(),
        "d": torch.randn(1, 1, 3).half(),
        "e": torch.zeros(0),
        "f": torch.tensor(1.5),
    }
    tensors["g"] = tensors["a.b"].t()  # not contiguous, and a storage shared with a.b
    archive.save_stream(tensors, tensors.get, "x.pth")
    contiguous = torch.contiguous_format
    copies = {name: t.clone(memory_format=contiguous) for name, t in tensors.items()}
    torch.save(copies, "y.pth")
    assert records("x.pth") == records("y.pth")
    for mmap in (False, True):
        found = torch.load("x.pth", weights_only=True, mmap=mmap)
        assert list(found) == list(tensors)
        for name, tensor in tensors.items():
            assert found[name].equal(tensor) and found[name].dtype == tensor.dtype


def records(path):
    """Return names, without the folder, and checksums of a zip's records, without the last."""
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None  # every checksum is right
        return [(i.filename.partition("/")[2], i.CRC) for i in archive.infolist()][:-1]


@pytest.mark.exhaustive
@pytest.mark.parametrize("quant", ["none", "nf4"])
def test_the_peak_of_a_whole_run_is_the_expected_one(tmp_path, quant):
    config = rwkv6.sizes(4, 1024, 4096)
    measured, parts = bench_memory.measure(tmp_path, config, 512, flags=f"--quant {quant}")
    # In GB. The program takes 0.14 to 0.2, and 0.2 is expected.
    expected = sum(parts.values())
    assert expected - 0.09 < measured < expected + 0.03


@pytest.mark.parametrize(
    ("flags", "stays"),
    [
        ("", True),
        ("--optim adamw8bit --quant nf4", True),
        ("--strategy deepspeed_stage_2 --devices 2", True),
        ("--strategy deepspeed_stage_3 --devices 2", False),
        ("--train_parts time ln emb", False),
        # What the checkpoint has trained is saved again.
        ("--bone_load with_emb.pth", False),
    ],
)
def test_a_gpu_leaves_the_embedding_to_its_host(flags, stays):
    with_emb = torch.load("ckpt.pth") | {"emb.weight": torch.load("base.pth")["emb.weight"]}
    torch.save(with_emb, "with_emb.pth")
    options = arguments(flags)
    counts = []
    for device in ("cpu", "cuda"):
        built = build.build_model(options, torch.device("meta"), for_device=torch.device(device))
        on_host = isinstance(built.model.emb, host_embedding.HostEmbedding)
        assert on_host == (stays and device == "cuda")
        counts.append(build.count_parameters(built.model))
        names = {name for name, _ in built.model.named_parameters()}
        assert ("emb.weight" in names) == (not on_host)
    assert counts[0] == counts[1]


# ---- what saves memory -------------------------------------------------------------------------


def test_a_dry_run_says_what_saves_memory_in_the_order_of_what_it_costs(capsys):
    binidx.write_binidx("x", [[5] * 600, [6] * 97])
    line = "--grad_cp 0 --compile 0 --micro_bsz 4 --ctx_len 512 --dry_run --proj_dir none"
    train.train(arguments(line))
    table = capsys.readouterr().out.split("what saves memory")[1].splitlines()[1:-1]
    rows = [re.fullmatch(r"(.*?) +(\d+\.\d\d)   6 GB", row).groups() for row in table]
    assert [flags for flags, _ in rows] == [
        "as it is",
        "and --grad_cp 1",
        "and --micro_bsz 1 --accumulate_grad_batches 4",
        "and --optim adamw8bit",
        "and --quant int8",
        "and --quant nf4",
        "and --train_type infctx --chunk_ctx 256",
    ]
    sizes = [float(size) for _, size in rows]
    assert sizes == sorted(sizes, reverse=True)


def test_a_run_that_goes_on_is_not_advised_what_it_cannot_change(capsys, monkeypatch):
    flags = "--grad_cp 0 --compile 0 --micro_bsz 4 --epoch_steps 1"
    train.train(arguments(flags))
    train.train(arguments(f"{flags} --epoch_count 2 --resume --dry_run"))
    table = capsys.readouterr().out.split("what saves memory")[1]
    assert "and --grad_cp 1 " in table and table.count("\nand ") == 1
    monkeypatch.setattr(memory, "available", lambda _: 1e7)
    with pytest.raises(ValueError, match=r"even with --grad_cp 1 .* this run needs more memory"):
        train.train(arguments(f"{flags} --epoch_count 2 --resume"))


def test_each_line_is_what_a_run_with_all_flags_so_far_would_take():
    binidx.write_binidx("x", [[5] * 3000, [6] * 97])  # infctx would not cut it
    options = arguments("--micro_bsz 4 --ctx_len 512")
    before = estimate.expected_memory(options, CPU)
    for alone, together in savings.savings(options, before, CPU):
        assert alone.flags.items() <= together.flags.items()
        assert together.estimate.total < before.total
        again = estimate.expected_memory(arguments(f"--micro_bsz 4 --ctx_len 512 {together}"), CPU)
        assert together.flags.items() <= vars(together.options).items()
        assert again.total == together.estimate.total
        before = together.estimate


@pytest.mark.parametrize(
    ("size", "card"), [(4.5e9, "6 GB"), (5.5e9, "8 GB"), (9e9, "12 GB"), (40e9, "more than 24 GB")]
)
def test_a_card_has_room_for_a_desktop_and_cuda_too(size, card):
    options = arguments()
    built = build.build_model(options, torch.device("meta"))
    on_gpu = estimate.MemoryEstimate(built, {"weights": size})
    run = savings.Saving({}, options, on_gpu)
    assert savings.smallest_card(run, torch.device("cuda")) == card
    # On a CPU the embedding is among the weights, and the program is another.
    parts = {"weights": size + built.model.emb.weight.nbytes, "program": 1e9, "compiler": 2e9}
    beside = memory.beside_tensors({"weights": size, "optimizer": 0}, torch.device("cuda"))
    on_cpu = estimate.MemoryEstimate(built, parts | {"optimizer": 0})
    need = savings.bytes_on_gpu(savings.Saving({}, options, on_cpu), CPU)
    assert need == pytest.approx(size + sum(beside.values()))
