"""The rehearsal: train.py, resuming, held-out loss and generate.py, whole, on a GPU or a stand-in.

Where PyTorch sees a GPU of NVIDIA or AMD, it is that one. Elsewhere gpu_standin.py makes a device:
it refuses what a GPU refuses, its autocast is CUDA's, and it counts what a GPU would wait for. It
lives in a process of its own: where it is, it is what torch.accelerator names, which other tests
must not see.
"""

import concurrent.futures
import contextlib
import csv
import ctypes
import functools
import io
import itertools
import json
import multiprocessing
import os
import pathlib
import re
import shutil
import sys
import warnings

import pytest
import torch
from torch.utils._pytree import tree_map_only

import binidx
import memory
import rwkv6
import wkv6
from conftest import exhaustive
from test_train import counting

REAL = torch.cuda.is_available()
if not REAL and (sys.platform != "linux" or not shutil.which(os.environ.get("CXX", "c++"))):
    pytest.skip("the stand-in is built on Linux, with a C++ compiler", allow_module_level=True)

HERE = pathlib.Path(__file__).parent
LR = 2e-3
FLAGS = (
    f"--data_file x --ctx_len 32 --micro_bsz 2 --epoch_steps 4 --lr_init {LR} --lr_final {LR} "
    "--grad_cp 1 --compile 0"
)
BASE = "--load_model base.pth --bone_r 16"
standin_only = pytest.mark.skipif(REAL, reason="says what the stand-in does")


# ---- what runs in the process of the device ----------------------------------------------------


def start():
    """Begin the process."""
    torch.set_num_threads(1)
    if not REAL:
        import gpu_standin  # noqa: F401 (makes the device)

        return
    warnings.simplefilter("always")
    warnings.showwarning = count_warning
    torch.cuda.set_sync_debug_mode("warn")


waits_of_a_gpu = 0


def count_warning(message, *_, **__):
    """Takes the place of warnings.showwarning: counts those of a wait for the GPU."""
    global waits_of_a_gpu
    waits_of_a_gpu += "called a synchronizing" in str(message)


def waits_and_copies():
    """How often the device was waited for, and how often something was copied there without that.

    A real GPU does not tell the latter.
    """
    if REAL:
        return waits_of_a_gpu, 0
    import gpu_standin

    return gpu_standin.waits(), gpu_standin.counts().get("pinned to the device", 0)


def check_counts(counts, flags):
    """A step waits once, for its loss, and copies each micro batch in one piece.

    counts: what `train_here` returns. (Chunks are copied one by one, as often as they are visited.)
    """
    assert [waits for waits, _ in counts] == [1] * 3
    if not REAL and "infctx" not in flags:
        micro_batches = re.findall(r"accumulate_grad_batches (\d)", flags)
        assert [copies for _, copies in counts] == [int(*micro_batches or [1])] * 3


def train_here(folder, flags, true_memory=False):
    """Run train.py in this process.

    true_memory: whether it looks for free memory, which takes longer than the training.
    Returns its output, and (waits, copies) of each step but the last.
    """
    import memory
    import train

    os.chdir(folder)
    marks, plain, output = [], train.accumulate_gradients, io.StringIO()

    def step(*arguments, **options):
        marks.append(waits_and_copies())
        return plain(*arguments, **options)

    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(output):
        patch.setattr(train, "accumulate_gradients", step)
        patch.setitem(sys.modules, "matplotlib.figure", None)
        if not true_memory:
            patch.setattr(
                memory, "expected", lambda *_, **__: {"weights": 0, "optimizer": 0, "workspace": 0}
            )
        train.train(train.parse_args(flags.split()))
    counts = [
        (waits_after - waits, copies_after - copies)
        for (waits, copies), (waits_after, copies_after) in itertools.pairwise(marks)
    ]
    return output.getvalue(), counts


def train_compiled_here(folder, flags):
    """The same with compiled blocks; on a stand-in by `aot_eager`, which makes no kernels of it."""
    import fused
    import settle

    with pytest.MonkeyPatch.context() as patch:
        if not REAL:
            from torch._dynamo.backends.debugging import aot_eager_decomp_partition as aot_eager

            compile_blocks = functools.partial(fused.compile_blocks, compiler=aot_eager)
            patch.setattr(fused, "compile_blocks", compile_blocks)
            patch.setattr(settle, "why_not", lambda *_: "")
        torch._dynamo.reset()  # or all modes together compile more often than one may
        return train_here(folder, f"{flags} --compile 1")


def generate_here(folder, flags, accelerator):
    """Run generate.py in this process; returns its output."""
    import devices
    import generate

    os.chdir(folder)
    output, find = io.StringIO(), devices.find
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(output):
        patch.setattr(devices, "find", lambda: find(accelerator))
        patch.setattr(sys, "argv", ["generate.py", *flags.split()])
        generate.main()
    return output.getvalue()


def memory_here(folder, flags):
    """Run train.py in this process; returns the bytes at its peak, and those expected, by part."""
    import estimate
    import plan
    import train

    os.chdir(folder)
    options = plan.resolve_options(train.parse_args(flags.split()))
    _, parts = estimate.expected_memory(options, torch.device("gpu"))
    before = torch.accelerator.memory_allocated()
    torch.accelerator.reset_peak_memory_stats()
    train_here(folder, flags)
    return torch.accelerator.max_memory_allocated() - before, parts


def emulate_kernels_here(folder):
    """From here on, WKV-6 on this process's device is wkv6_cuda.cu, run by cuda_on_cpu.h."""
    import compiled
    import test_wkv6_cuda
    import wkv6_gpu

    emulator = test_wkv6_cuda.Emulator(folder)
    emulator.set(chunk=16)
    global launches_so_far
    launches_so_far = ctypes.c_int64.in_dll(emulator.library, "emulator_launches")
    compiled.LOADERS["gpu"] = lambda: wkv6_gpu.register(emulator.launch, "PrivateUse1")
    return wkv6.kernel_problem("gpu")


def emulated_launches_here():
    return launches_so_far.value


def launches_here():
    """What launches.py counts on this process's device: {part: (launches, bytes)}."""
    import launches

    return {part: (n.launches, n.moved) for part, n in launches.table(torch.device("gpu")).items()}


# ---- the tests' own process --------------------------------------------------------------------


def process():
    """A process in which there is a GPU, as an executor."""
    context = multiprocessing.get_context("spawn")
    return concurrent.futures.ProcessPoolExecutor(1, context, initializer=start)


@pytest.fixture(scope="module")
def standin():
    with process() as executor:
        yield executor


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    """A process in which there is a GPU that has our kernels."""
    with process() as executor:
        folder = tmp_path_factory.mktemp("emulator")
        assert executor.submit(emulate_kernels_here, folder).result(timeout=300) == ""
        yield executor


@pytest.fixture(scope="module")
def with_kernels(request):
    """A process in which there is a GPU that has our kernels: a real one, or `emulated`."""
    return request.getfixturevalue("standin" if REAL else "emulated")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """A folder with the data sets x and held, in which the test stands."""
    monkeypatch.chdir(tmp_path)
    binidx.write_binidx("x", counting([20, 33, 40, 9, 25, 30, 33, 12, 28, 33, 31, 18]))
    binidx.write_binidx("held", counting([30, 12, 40]))
    return tmp_path


def write_base(path="base.pth", **options):
    torch.manual_seed(0)
    model = rwkv6.init_model(2, 64, 300, head_size=32, **options)
    weights = {name: p.detach() for name, p in model.named_parameters()}
    torch.save(
        {name: (w + 0.05 * torch.randn_like(w)).bfloat16() for name, w in weights.items()}, path
    )


def losses(folder):
    """All losses of a run, of its steps and held-out ones, in the order in which they came."""
    with open(f"{folder}/loss.csv", encoding="utf-8") as f:
        return torch.tensor([float(row["loss"] or row["val_loss"]) for row in csv.DictReader(f)])


def weights(folder, step=4):
    """All trained weights after a step, in float32, as one tensor."""
    state = torch.load(f"{folder}/resume-{step}.pth")
    return torch.cat([x.flatten() for name, x in state.items() if name.startswith("weights.")])


def check_same(found, expected, near):
    """Two runs are the same but for rounding. near: see below."""
    of_losses, of_weights = near
    torch.testing.assert_close(losses(found), losses(expected), rtol=of_losses, atol=0)
    difference = (weights(found) - weights(expected)).square().mean().sqrt().item()
    assert difference <= of_weights * LR


# How far a run may be from that on the CPU, by the rounding of its precision: its losses, as a part
# of them, and its weights, in the mean, as a part of a step of Adam (about the learning rate).
BF16, FP16, FP32 = (2e-3, 0.2), (1e-4, 0.05), (1e-6, 3e-4)
# {a mode of training: (options of the base, None for none; flags; precision)}
MODES = {
    "bat, bf16": ({}, BASE, BF16),
    "bat, fp16": ({}, f"{BASE} --precision fp16", FP16),
    "bat, fp32": ({}, f"{BASE} --precision fp32", FP32),
    "bat, int8": ({}, f"{BASE} --quant int8", BF16),
    "bat, nf4": ({}, f"{BASE} --quant nf4", BF16),
    "bat, nf4, fp16": ({}, f"{BASE} --quant nf4 --precision fp16", FP16),
    "bat, nf4, fp32": ({}, f"{BASE} --quant nf4 --precision fp32", FP32),
    "bone, bf16": ({}, f"{BASE} --bone_mode bone", BF16),
    "bone, fp16, int8": ({}, f"{BASE} --bone_mode bone --precision fp16 --quant int8", FP16),
    "bone, fp32, nf4": ({}, f"{BASE} --bone_mode bone --precision fp32 --quant nf4", FP32),
    "x052, bf16": ({"version": "x052"}, BASE, BF16),
    "x052, fp32, nf4": ({"version": "x052"}, f"{BASE} --precision fp32 --quant nf4", FP32),
    "pre_ffn": ({"pre_ffn": True}, BASE, BF16),
    "head_qk": ({"head_qk": 16}, BASE, BF16),
    "infctx, bf16": ({}, f"{BASE} --train_type infctx --chunk_ctx 12", BF16),
    "infctx, fp32, bptt": (
        {},
        f"{BASE} --train_type infctx --chunk_ctx 12 --bptt 1 --precision fp32",
        FP32,
    ),
    "infctx, fp16, nf4": (
        {},
        f"{BASE} --train_type infctx --chunk_ctx 12 --precision fp16 --quant nf4",
        FP16,
    ),
    "emb and head, bf16": ({}, f"{BASE} --train_parts time ln emb head", BF16),
    "emb and head, fp32": ({}, f"{BASE} --train_parts time ln emb head --precision fp32", FP32),
    "Bone alone, grad_cp 0": ({}, f"{BASE} --train_parts --grad_cp 0", BF16),
    "accumulation": ({}, f"{BASE} --accumulate_grad_batches 3", BF16),
    "accumulation, fp16": ({}, f"{BASE} --accumulate_grad_batches 2 --precision fp16", FP16),
    "fla, which is not there": ({}, f"{BASE} --fla --precision fp32", FP32),
    "moments in 8 bits": ({}, f"{BASE} --optim adamw8bit --weight_decay 0.1", BF16),
    "from scratch": (None, "--n_layer 2 --n_embd 64 --vocab_size 300 --loss_mask none", BF16),
}


@pytest.mark.parametrize("base, flags, near", MODES.values(), ids=MODES.keys())
def test_a_run_on_a_gpu_is_that_on_the_cpu_and_waits_once_a_step(
    standin, folder, base, flags, near
):
    if base is not None:
        write_base(**base)
    for accelerator in ("cpu", "gpu"):
        line = (
            f"{FLAGS} {flags} --val_file held --accelerator {accelerator} --proj_dir {accelerator}"
        )
        said, counts = standin.submit(train_here, folder, line).result(timeout=300)
    assert f" on {'cuda' if REAL else 'gpu'}\n" in said
    check_counts(counts, flags)

    check_same("gpu", "cpu", near)


# One for everyday, the others in the exhaustive tests: tracing a mode takes half a minute. Those
# that are left out differ from one that is here in what is not compiled.
NOT_COMPILED = (
    "x052, fp32, nf4",
    "infctx, fp16, nf4",
    "emb and head, fp32",
    "Bone alone, grad_cp 0",
    "accumulation",
    "fla, which is not there",
)
COMPILED = [
    pytest.param(*mode, id=name) if name == "bat, nf4" else exhaustive(*mode, id=name)
    for name, mode in MODES.items()
    if name not in NOT_COMPILED
]


@pytest.mark.parametrize("base, flags, near", COMPILED)
def test_a_compiled_run_on_a_gpu_is_the_eager_one(with_kernels, folder, base, flags, near):
    if base is not None:
        write_base(**base)
    line = f"{FLAGS} {flags} --val_file held --accelerator gpu"
    with_kernels.submit(train_here, folder, f"{line} --proj_dir eager").result(timeout=300)
    compiled = f"{line} --grad_cp 0.5 --proj_dir compiled"
    said, counts = with_kernels.submit(train_compiled_here, folder, compiled).result(timeout=600)
    assert "compiled in" in said and "failed" not in said
    check_counts(counts, flags)
    check_same("compiled", "eager", near)


@standin_only
@pytest.mark.parametrize(
    "flags, near",
    [
        ("--precision fp32 --train_type infctx --chunk_ctx 20", FP32),
        ("--precision fp16", FP16),
        ("", BF16),
    ],
)
def test_a_run_on_a_gpu_with_our_kernels_is_that_on_the_cpu(emulated, folder, flags, near):
    """Binding, kernels, autograd and training meet here as on a card."""
    write_base()
    launched = emulated.submit(emulated_launches_here).result()
    for accelerator in ("cpu", "gpu"):
        line = f"{FLAGS} {BASE} {flags} --accelerator {accelerator} --proj_dir {accelerator}"
        _, counts = emulated.submit(train_here, folder, line).result(timeout=300)
    check_counts(counts, flags)
    assert emulated.submit(emulated_launches_here).result() > launched
    check_same("gpu", "cpu", near)


@pytest.mark.parametrize("flags", ["", "--precision fp16 --quant nf4", "--train_type infctx"])
def test_a_run_on_a_gpu_goes_on_exactly(standin, folder, flags):
    write_base()
    flags = f"{FLAGS} {BASE} {flags} --accelerator gpu"
    for more in (
        "--proj_dir whole --epoch_count 2",
        "--proj_dir parts",
        "--proj_dir parts --resume --epoch_count 2",
    ):
        standin.submit(train_here, folder, f"{flags} {more}").result(timeout=300)
    assert weights("whole", 8).equal(weights("parts", 8))
    assert losses("whole").equal(losses("parts"))


def test_what_is_not_finite_is_left_out_on_a_gpu(standin, folder):
    """Weights of a base that overflow in fp16's products: every step is left out, and said so."""
    write_base()
    base = torch.load("base.pth")
    base["head.weight"] *= 1e4
    torch.save(base, "base.pth")
    line = f"{FLAGS} {BASE} --precision fp16 --accelerator gpu"
    with pytest.raises(ValueError, match="not finite in each of 4 steps"):
        standin.submit(train_here, folder, line).result(timeout=300)
    assert not os.path.exists("out/rwkv-0.pth")


@standin_only
@pytest.mark.parametrize(
    "flags", ["--grad_cp 0", exhaustive("--quant nf4 --accumulate_grad_batches 2")]
)
def test_the_expected_memory_is_that_of_the_tensors_and_a_margin(standin, folder, flags):
    torch.manual_seed(0)
    model = rwkv6.init_model(4, 128, 2000)
    torch.save({name: p.detach().bfloat16() for name, p in model.named_parameters()}, "base.pth")
    binidx.write_binidx("x", counting([200] * 12))
    line = f"{FLAGS} {BASE} --bone_r 32 --ctx_len 128 {flags} --accelerator gpu"
    peak, parts = standin.submit(memory_here, folder, line).result(timeout=300)
    allocator, program = parts.pop("allocator"), parts.pop("program")
    assert peak == pytest.approx(sum(parts.values()), rel=0.05)
    stays = parts["weights"] + parts["optimizer"]
    assert program == memory.GPU_PROGRAM
    assert allocator == pytest.approx(0.01 * stays + 0.2 * (sum(parts.values()) - stays))


def test_generate_writes_the_same_text(standin, folder):
    write_base()
    with open("vocab.json", "w") as f:
        json.dump({i: chr(0x4E00 + i) for i in range(300)}, f)
    standin.submit(train_here, folder, f"{FLAGS} {BASE} --accelerator gpu").result(timeout=300)
    flags = "base.pth --bone out/rwkv-0.pth --prompt 一丁七 --length 20 --temperature 0"
    texts = [
        standin.submit(generate_here, folder, flags, accelerator).result(timeout=300)
        for accelerator in ("cpu", "gpu")
    ]
    assert texts[0] == texts[1] and len(texts[0]) == 24


@standin_only
def test_few_launches(standin):
    """Counted in the same way, commit dff4abc had 392 in a block, 648 more for nf4, 424 outside."""
    counts = standin.submit(launches_here).result(timeout=300)
    launches = {part: n for part, (n, _) in counts.items()}
    assert launches["a block, bf16"] <= 0.8 * 392
    assert launches["the same, nf4: more"] <= 100
    assert launches["the same, int8: more"] <= 48
    assert launches["outside the blocks"] <= 120
    assert counts["a block, bf16"][1] <= 0.9 * 2.89e9


# ---- the rehearsal can fail --------------------------------------------------------------------

FOREIGN = "Expected all tensors to be on the same device"


def mix_devices():
    return torch.ones(3, device=torch.accelerator.current_accelerator()) + torch.ones(3)


def test_a_gpu_refuses_tensors_of_the_cpu(standin):
    with pytest.raises(RuntimeError, match=FOREIGN):
        standin.submit(mix_devices).result(timeout=60)


def goes_on_with_a_state_dict():
    """Load a state dict that lies on the CPU, as torch.load(..., map_location="cpu") has it."""
    from adamw8bit import AdamW8bit

    device = torch.device("cuda" if REAL else "gpu")
    parameters = [torch.nn.Parameter(torch.ones(s, device=device)) for s in ((64, 64), (64,))]
    state_dict = None
    for _ in range(2):
        optimizer = AdamW8bit(parameters)
        if state_dict:
            optimizer.load_state_dict(tree_map_only(torch.Tensor, torch.Tensor.cpu, state_dict))
        for p in parameters:
            p.grad = torch.ones_like(p)
        optimizer.step()
        state_dict = optimizer.state_dict()
    return [state["step"].item() for state in state_dict["state"].values()]


def test_a_state_dict_of_the_cpu_is_loaded(standin):
    assert standin.submit(goes_on_with_a_state_dict).result(timeout=60) == [2, 2]


def hidden_waits():
    """How often the host waits in operators that do not look like it."""
    import gpu_standin

    x, found = torch.arange(6.0, device="gpu"), []
    for run in (
        lambda: x[x > 2],
        lambda: x.index_put_((x > 2,), x[0]),
        lambda: x.unique(),
        lambda: x.repeat_interleave(x.int()),
        lambda: x.nonzero(),
        lambda: x[x.int()] + x.index_select(0, x.int()),
    ):
        gpu_standin.clear()
        run()
        found.append(gpu_standin.counts().get("synchronizations", 0) > 0)
    return found


@standin_only
def test_waits_that_do_not_look_like_it_are_counted(standin):
    assert standin.submit(hidden_waits).result(timeout=60) == [True] * 5 + [False]


@pytest.fixture
def mutate(folder, monkeypatch):
    """A function that changes the source of a module for processes that begin after it."""

    def change(module, *replacements):
        source = (HERE / f"{module}.py").read_text()
        for old, new in replacements:
            assert old in source
            source = source.replace(old, new)
        pathlib.Path(f"{module}.py").write_text(source)
        monkeypatch.syspath_prepend(folder)

    return change


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    "module, old, new, error",
    [
        # CUDA's autocast sends a sum to float32, which a product in place then refuses.
        ("bone", ".sum(1, dtype=x.dtype)", ".sum(1)", "must have the same dtype"),
        ("quant", "(NF4, NF4).to(device, dtype)", "(NF4, NF4).to(dtype)", FOREIGN),
    ],
)
def test_what_only_a_gpu_would_refuse_is_found(folder, mutate, module, old, new, error):
    guard = "torch.autocast(device, enabled=False)"
    mutate(module, (old, new), (guard, "__import__('contextlib').nullcontext()"))
    write_base()
    line = f"{FLAGS} {BASE} --quant nf4 --accelerator"
    with process() as executor:
        executor.submit(train_here, folder, f"{line} cpu --proj_dir cpu").result(timeout=300)
        with pytest.raises(RuntimeError, match=error):
            executor.submit(train_here, folder, f"{line} gpu").result(timeout=300)


@pytest.mark.exhaustive
def test_a_wait_too_many_is_found(folder, mutate):
    mutate("train", ("(optimizer, loss + norm)", "(optimizer, loss + norm + loss.item())"))
    write_base()
    with process() as executor:
        line = f"{FLAGS} {BASE} --accelerator gpu"
        _, counts = executor.submit(train_here, folder, line).result(timeout=300)
    assert [waits for waits, _ in counts] == [2] * 3
