"""Blocks through PyTorch's compiler, and what --compile auto and --grad_cp auto decide.

Each mode runs compiled in test_rehearsal.py.
"""

import argparse
import csv
import functools
import itertools
import json
import os
import re
import shlex
import shutil

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.backends.debugging import boxed_nop

import devices
import fused
import memory
import rwkv6
import settle
import train
from adapt import add_bone
from conftest import exhaustive
from loss import Counts, loss_fn
from passes import Passes
from plan import resolve_options
from quant import quantize
from test_train import DEFAULTS, base_file, folder, read, run, true_memory  # noqa: F401 (fixtures)

CPU = torch.device("cpu")
# A backend that traces, decomposes and cuts as Inductor does, with our partitioner, and then runs
# the operators one by one. It needs no C++ compiler.
aot_eager = aot_autograd(
    fw_compiler=boxed_nop,
    bw_compiler=boxed_nop,
    decompositions=fused.decompositions,
    partition_fn=fused.KeepNoDequantizedWeight(),
)
CAN_COMPILE = shutil.which(os.environ.get("CXX", "g++"))
inductor = pytest.mark.skipif(not CAN_COMPILE, reason="PyTorch's compiler needs a C++ compiler")


@pytest.fixture(autouse=True)
def nothing_compiled():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


def model_with_bone(quant=None, dtype=torch.float32):
    torch.manual_seed(0)
    model = rwkv6.init_model(2, 128, 100)
    for name, module in list(model.named_modules()):
        if isinstance(module, rwkv6.Linear) and "." in name:
            weight = torch.nn.init.normal_(module.weight.detach(), std=0.05).to(dtype)
            replacement = quantize(weight, quant) if quant else module
            model.set_submodule(name, replacement)
    add_bone(model, 32)
    for name, p in model.named_parameters():
        p.requires_grad_(any(part in name for part in ("bone", "time", "ln")))
        if name.endswith("bone"):
            torch.nn.init.normal_(p, std=0.02)
    return model


def saved_bytes(model, T):
    """How many bytes of activations block 1 keeps for its backward pass, on a row of T tokens."""
    weights = {t.untyped_storage().data_ptr() for t in memory.tensors(model)}
    saved = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    x = torch.randn(1, T, 128, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model.run_block(model.blocks[1], x, (None, None, None))
    return sum(saved.values())


def loss_and_gradients(model, idx):
    loss, _ = loss_fn(model, idx, idx, torch.ones(idx.shape), counts=Counts(1, 1))
    names, parameters = zip(
        *((n, p) for n, p in model.named_parameters() if p.requires_grad), strict=True
    )
    return loss, dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


@pytest.mark.parametrize(
    "quant, grad_cp",
    [
        ("nf4", 0),
        *(exhaustive(*case) for case in itertools.product((None, "int8"), (0, 1))),
        exhaustive("nf4", 1),
    ],
)
def test_a_compiled_model_has_the_same_loss_and_gradients_for_rows_of_any_length(quant, grad_cp):
    eager, compiled = model_with_bone(quant), model_with_bone(quant)
    fused.compile_blocks(compiled, grad_cp, compiler=aot_eager)
    for T in (128, 33, 7, 1):  # C is 128, and of one token there is no graph
        idx = torch.randint(100, (2, T))
        loss, gradients = loss_and_gradients(compiled, idx)
        expected_loss, expected_gradients = loss_and_gradients(eager, idx)
        torch.testing.assert_close(loss, expected_loss)
        for name, expected in expected_gradients.items():
            assert (gradients[name] - expected).norm() <= 1e-3 * expected.norm(), name
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("quant", [exhaustive(None), "nf4"])
def test_grad_cp_sets_what_is_kept_and_no_dequantized_weight_is(quant):
    T = 64  # so few that the weights are twice as large as the activations
    kept = {}
    for grad_cp in (0, 0.5, 1):
        torch._dynamo.reset()
        model = model_with_bone(quant)
        fused.compile_blocks(model, grad_cp, compiler=aot_eager)
        kept[grad_cp] = saved_bytes(model, T)
    input_bytes = 4 * T * 128
    # 12 products of width C: r, k, v, g, output; key (3.5), receptance and value; and WKV-6's.
    products = 12.5 * input_bytes
    given = input_bytes + 4 * 2 * 64 * 64 + 2 * 4 * 128  # x and the state before it
    assert kept[1] == given
    assert 0.8 * products < kept[0] - kept[1] < 1.3 * products
    assert kept[1] < kept[0.5] < kept[0]


def losses(proj_dir):
    with open(f"{proj_dir}/loss.csv", encoding="utf-8") as f:
        return torch.tensor([float(row["loss"]) for row in csv.DictReader(f)])


@inductor
def test_a_compiled_run_goes_on_exactly_and_says_where_it_changes(capsys):
    flags = "--epoch_steps 3 --quant nf4"
    run(f"{flags} --compile 1 --epoch_count 2 --proj_dir whole")
    run(f"{flags} --compile 1 --proj_dir parts")
    run(f"{flags} --resume --compile 1 --epoch_count 2 --proj_dir parts")
    whole, parts = read("whole/rwkv-1.pth"), read("parts/rwkv-1.pth")
    assert all(whole[name].equal(parts[name]) for name in whole)

    run(f"{flags} --proj_dir eager")
    capsys.readouterr()
    run(f"{flags} --resume --compile 1 --epoch_count 2 --proj_dir eager")
    said = capsys.readouterr().out
    assert "from here on its blocks run compiled" in said and "compiled in" in said
    torch.testing.assert_close(losses("eager"), losses("whole"), rtol=2e-3, atol=0)


# The quickest backends: what was traced, run as it stands by autograd.


def traced(graph, inputs):
    return graph.forward


def broken(graph, inputs):
    raise RuntimeError("no such thing\nas a second line")


def lossy(graph, inputs):
    """Lose gradients, as PyTorch 2.11 did those of an output that was written in place."""
    return lambda *inputs: [x.detach() if x.ndim == 3 else x for x in graph.forward(*inputs)]


@pytest.mark.parametrize("compiler, words", [(broken, "no such thing"), (lossy, "the gradient of")])
def test_where_the_compiler_fails_one_line_says_why_and_the_blocks_run_eager(
    monkeypatch, capsys, compiler, words
):
    compile_blocks = functools.partial(fused.compile_blocks, compiler=compiler)
    monkeypatch.setattr(fused, "compile_blocks", compile_blocks)
    run("--compile 1 --grad_cp 1 --proj_dir failed")
    [note] = [line for line in capsys.readouterr().out.splitlines() if "without being" in line]
    assert words in note
    with open("failed/args.json", encoding="utf-8") as f:
        args = json.load(f)
    assert (args["compile"], args["grad_cp"]) == (0, 1)
    run("--compile 0 --grad_cp 1 --proj_dir eager")
    failed, eager = read("failed/rwkv-0.pth"), read("eager/rwkv-0.pth")
    assert all(failed[name].equal(eager[name]) for name in eager)


def test_without_a_kernel_for_wkv6_nothing_is_compiled(capsys):
    """Its other forms unroll a row's chunks, so that each length would be compiled again."""
    model = rwkv6.init_model(2, 96, 300, head_size=48)
    torch.save({name: p.detach() for name, p in model.named_parameters()}, "heads_of_48.pth")
    run("--compile 1 --load_model heads_of_48.pth")
    said = capsys.readouterr().out
    assert "run without being compiled: the WKV-6 kernel is not made for heads of 48\n" in said
    assert "compiled in" not in said


def test_where_one_rank_cannot_compile_none_does(monkeypatch, capsys):
    compile_blocks = functools.partial(fused.compile_blocks, compiler=traced)
    monkeypatch.setattr(fused, "compile_blocks", compile_blocks)
    model = model_with_bone()
    plan = argparse.Namespace(
        options=settled("--ctx_len 8"), data=argparse.Namespace(held_out=None, documents=None)
    )
    for elsewhere, compiled in ((0, True), (1, False)):
        monkeypatch.setattr(
            devices, "max_over_ranks", lambda numbers, n=elsewhere: [max(*numbers, n)]
        )
        fused.try_to_compile(model, Passes(), plan, device=CPU)
        assert all(("branches" in vars(block)) == compiled for block in model.blocks)
        assert ("another rank cannot" in capsys.readouterr().out) == (not compiled)
        fused.run_eager(model, grad_cp=0.5)


# ---- what is decided ---------------------------------------------------------------------------


def resolved(flags):
    return resolve_options(train.parse_args(shlex.split(f"{DEFAULTS} {flags}")))


def settled(flags, device=CPU):
    return settle.settle(resolved(flags), device)[0]


def test_auto_compiles_where_the_run_is_long_enough(monkeypatch):
    monkeypatch.setattr(settle, "why_not", lambda *_: "")
    assert settled("--compile auto").compile == 0
    assert settled("--compile auto --epoch_steps 10000000").compile == 1
    assert settled("--compile auto --epoch_steps 0 --epoch_count 100000000").compile == 1
    assert settled("--compile 0 --epoch_steps 10000000").compile == 0
    # A GPU gains by each micro batch of each block, however small.
    gpu = torch.device("cuda")
    for steps, worth in ((1_000, False), (20_000, True)):
        options = resolved(f"--compile auto --epoch_steps {steps}")
        assert settle.is_worth_it(options, gpu) == worth


@pytest.mark.parametrize(
    "flags, device, words",
    [
        ("", "mps", "nothing for mps"),
        ("--devices 2 --strategy deepspeed_stage_3", "cpu", "gathers weights"),
        ("", "cpu", r"no C\+\+ compiler \(no-c\+\+\)"),
    ],
)
def test_what_cannot_be_compiled_is_said_in_one_line(monkeypatch, capsys, flags, device, words):
    monkeypatch.setenv("CXX", "no-c++")
    options = resolved(f"--compile 1 {flags}")
    assert settle.settle_compile(options, torch.device(device)) == 0
    [line] = capsys.readouterr().out.splitlines()
    assert line.startswith("note: --compile 1: ")
    assert re.search(words, line)


def test_auto_is_as_fast_as_free_memory_allows(true_memory, monkeypatch):  # noqa: F811
    monkeypatch.setattr(settle, "why_not", lambda *_: "")
    for flags, values in (("--compile 0", (0, 0.5, 1)), ("--compile 1", (0, 0.25, 0.5, 0.75, 1))):
        flags += " --ctx_len 2000 --micro_bsz 8"
        expected = settle.memory_by_grad_cp(settled(flags), CPU)
        needs = {value: expected(value).total for value in values}
        assert list(needs.values()) == sorted(needs.values(), reverse=True)
        for value, need in needs.items():
            monkeypatch.setattr(memory, "available", lambda _, need=need: 2 * need + 1)
            assert settled(f"{flags} --grad_cp auto").grad_cp == value


def test_where_one_rank_cannot_compile_the_others_settle_for_eager_blocks(monkeypatch, capsys):
    monkeypatch.setattr(settle, "why_not", lambda *_: "")
    given = resolved("--compile 1")
    settled_alone = settle.settle(given, CPU)
    assert settled_alone[0].compile == 1
    monkeypatch.setattr(devices, "max_over_ranks", lambda numbers: [max(*numbers, 1)])
    options, _ = settle.same_on_all_ranks(given, *settled_alone, device=CPU)
    assert options.compile == 0
    assert "on another rank" in capsys.readouterr().out


@pytest.mark.parametrize(
    "flags, worth",
    [
        ("--epoch_steps 6000000 --ctx_len 6000", True),
        ("--epoch_steps 1200000 --ctx_len 6000", False),  # documents have 26 tokens, in the mean
        ("--epoch_steps 1200000 --ctx_len 200 --dataload get", True),
        ("--epoch_steps 6000000 --ctx_len 2", False),
    ],
)
def test_the_tokens_that_a_run_sees_say_whether_compiling_is_worth_it(flags, worth):
    assert settle.is_worth_it(resolved(f"--compile auto {flags}"), CPU) == worth


def test_ranks_compute_as_much_again_as_the_one_with_the_least_memory(monkeypatch):
    monkeypatch.setattr(devices, "max_over_ranks", lambda numbers: [1])
    given = resolved("--grad_cp 0")
    options, _ = settle.same_on_all_ranks(given, *settle.settle(given, CPU), device=CPU)
    assert options.grad_cp == 1
