"""The report at the start of a run: what it counts is right, and --dry_run says the same.

A dry run refuses what a run would refuse, and writes nothing.
"""

import math
import os
import pathlib
import re
import shlex
import shutil
import types

import numpy as np
import pytest
import torch

import binidx
import data
import data_report
import devices
import estimate
import plan
import report
import tokenizer
import train
from test_options import refused
from test_train import (
    DEFAULTS,
    base_file,  # noqa: F401 (a fixture)
    bone_of,
    folder,  # noqa: F401 (a fixture)
    read,
    run,
    tiny,
)

CPU = torch.device("cpu")
SAMPLE = pathlib.Path(__file__).parent / "fixtures" / "sample.jsonl"  # 25, 22, 4, 19, 13 tokens
NEW = "--load_model '' --n_layer 1 --n_embd 64 "
DIALOGUE = '{"text": "User: 1 + 1?\\n\\nAssistant: 2"}\n'
PLAIN = '{"text": "Hello"}\n'


def contents():
    """All files and folders here, and what is in the files."""
    paths = pathlib.Path().rglob("*")
    return {path: path.read_bytes() if path.is_file() else None for path in paths}


def dry_run(capsys, flags=""):
    """What a dry run says, {name: text}, without the memory's parts; notes are under "note:"."""
    capsys.readouterr()
    run(f"{flags} --dry_run")
    said, _, _ = capsys.readouterr().out.partition("\n\n")
    lines = {}
    name = ""
    for line in said.splitlines():
        if line.startswith("note: "):
            line = line.replace("note: ", f"{'note:':<11}")
        name = line[:10].rstrip() or name
        lines.setdefault(name, []).append(line[11:])
    return {name: "\n".join(texts) for name, texts in lines.items()}


# ---- exact values -------------------------------------------------------------------------------


def test_the_report_of_a_run(capsys):
    """x has 12 documents; that of 40 tokens is cut to 33, of which 32 are targets."""
    said = dry_run(capsys)
    memory, disk = said.pop("memory"), said.pop("disk")
    bones = bone_of("base.pth")
    trained = sum(p.numel() for p in bones.values())
    total = sum(p.numel() for p in tiny().values())
    total += sum(p.numel() for name, p in bones.items() if name.endswith("bone"))
    assert said == {
        "data": "x: 12 documents, 312 tokens, longest 40",
        "cut": "at --ctx_len 32: 1 document, 2.2 % of all tokens are never seen\n"
        "what keeps them: --ctx_len 39, --dataload get, --train_type infctx",
        "loss": "on 94 % of all tokens (--loss_mask pad)",
        "steps": "1 epoch x 4 steps x 4 rows, about 98 tokens a step (a row: up to 32); "
        "1.3 times the data",
        "model": "base.pth, RWKV-6 x060: n_layer 2, n_embd 64, vocab_size 300, head size 64",
        "trained": f"Bone bat r 16, time, ln: {trained:,} of {total:,} parameters (36 %)",
        "precision": "bf16 on cpu, base not quantized",
        "blocks": "eager; nothing computed again in the backward pass (--grad_cp 0)",
    }
    assert re.fullmatch(
        r"0\.\d\d GB expected at the peak, beyond PyTorch itself, [\d,.]+ GB free on cpu", memory
    )
    size = r"[\d,.]+ [MG]B"
    pattern = rf"1 checkpoint of 0.2 MB and 2 states of 1.0 MB at once: 2.1 MB, {size} free"
    assert re.fullmatch(pattern, disk)


@pytest.mark.parametrize(
    "flags, cut, loss",
    [
        ("--ctx_len 24", None, "on 94 % of all tokens (--loss_mask pad)"),
        (
            "--ctx_len 16 --loss_mask qa",
            "at --ctx_len 16: 3 documents, 18 % of all tokens are never seen\n"
            "what keeps them: --ctx_len 24, --dataload get, --train_type infctx",
            "on 18 % of all tokens (--loss_mask qa)",
        ),
        ("--loss_mask qa", None, "on 34 % of all tokens (--loss_mask qa)"),
        ("--ctx_len 16 --train_type infctx", None, "on 94 % of all tokens (--loss_mask pad)"),
        ("--ctx_len 16 --dataload get", None, "on all tokens (--loss_mask pad)"),
        (
            "--loss_mask none",
            None,
            "on padding too (--loss_mask none): 49 % of what counts are tokens of the data",
        ),
    ],
)
def test_what_is_cut_and_what_counts_of_the_sample(capsys, flags, cut, loss):
    shutil.copy(SAMPLE, "s.jsonl")
    said = dry_run(capsys, f"{NEW} --data_file s.jsonl {flags}")
    assert said["data"] == "s.jsonl: 5 documents, 83 tokens, longest 25"
    assert (said.get("cut"), said["loss"]) == (cut, loss)


def test_held_out_documents_are_cut_even_where_windows_of_the_others_are_read(capsys):
    said = dry_run(capsys, "--ctx_len 19 --val_file x --dataload get")
    assert "cut" not in said
    assert said["held out"] == (
        "x: 12 documents, 312 tokens, longest 40; "
        "cut: 8 documents, 30 % of all tokens are never seen (--ctx_len 39 keeps all)"
    )
    assert "cut" not in dry_run(capsys, "--ctx_len 39 --val_file x")["held out"]


def test_what_a_model_cannot_take_is_not_advised(capsys):
    """No state stands for the earlier tokens that head_qk looks at."""
    said = dry_run(capsys, f"{NEW} --head_qk 8 --vocab_size 300")
    assert said["cut"].endswith("what keeps them: --ctx_len 39, --dataload get")


def test_no_token_of_a_text_is_cut_and_no_dialogue_is_looked_for_in_characters(capsys):
    pathlib.Path("t.txt").write_text("User: a\n\nAssistant: b\n" * 20)
    pathlib.Path("u.txt").write_text("Assistant: b\n\nUser: a\n" * 20)
    said = dry_run(capsys, f"{NEW} --data_file t.txt --val_file u.txt --ctx_len 20")
    assert said["data"] == "t.txt (utf-8): 440 tokens, in 22 pieces"
    assert said["held out"] == "u.txt (utf-8): 440 tokens, in 22 pieces"
    assert said["loss"] == "on 100 % of all tokens (--loss_mask pad)"
    assert {"cut", "note:"}.isdisjoint(said)


@pytest.mark.parametrize(
    "flags, steps",
    [
        ("--devices 2", "1 epoch x 2 steps x 8 rows, about 195 tokens a step"),
        ("--devices 2 --accumulate_grad_batches 2", "1 epoch x 1 step x 16 rows, about 391"),
        ("--micro_bsz 1 --epoch_count 3", "3 epochs x 12 steps x 1 row, about 24 tokens"),
        ("--dataload get", "1 epoch x 3 steps x 4 rows, about 128 tokens a step"),
        ("--loss_mask none", "1 epoch x 3 steps x 4 rows, about 128 tokens a step"),
        ("--epoch_steps 1", "about 98 tokens a step (a row: up to 32); 33 % of the data"),
        ("--epoch_steps 3 --epoch_count 2", "(a row: up to 32); 2.0 times the data"),
        ("--train_type infctx --chunk_ctx 8", "(a row: up to 39, in chunks of 8)"),
    ],
)
def test_the_steps(capsys, flags, steps):
    assert steps in dry_run(capsys, f"--epoch_steps 0 {flags}")["steps"]


@pytest.mark.parametrize("flags, rows", [("", "documents"), ("--dataload get", "windows")])
def test_a_sample_says_about_what_all_documents_say(capsys, monkeypatch, flags, rows):
    """Every other document is a dialogue, of whose 12 tokens 2 are an answer and its end."""
    pathlib.Path("d.jsonl").write_text((DIALOGUE + PLAIN) * 40)
    flags += f" {NEW} --data_file d.jsonl --loss_mask qa --ctx_len 16"
    if rows == "documents":
        assert dry_run(capsys, flags)["loss"] == "on 14 % of all tokens (--loss_mask qa)"
    monkeypatch.setattr(data_report, "SAMPLE", 20)
    pattern = rf"on about (\d+) % of all tokens \(--loss_mask qa\), told from 20 {rows}"
    assert 10 <= int(re.fullmatch(pattern, dry_run(capsys, flags)["loss"])[1]) <= 18


@pytest.mark.parametrize(
    "text", ["Assistant: 2", "User: 1 + 1?\n\nAssistant:2", "Q\nAssistant:\n2"]
)
def test_an_answer_is_found_by_the_tokens_of_its_marker(text):
    binidx.write_binidx("d", [[*tokenizer.encode(text), 0]])
    assert data_report.are_dialogues(binidx.Binidx("d"))
    binidx.write_binidx("e", [[*tokenizer.encode("an Assistant: 2, assistant: 3"), 0]])
    assert not data_report.are_dialogues(binidx.Binidx("e"))
    binidx.write_binidx("f", [[1] * data_report.BEGINNING + [*tokenizer.encode(text), 0]])
    assert not data_report.are_dialogues(binidx.Binidx("f"))


@pytest.mark.parametrize("n", [1, 2, 7, 499, 500, 501, 10_000])
def test_a_sample_is_spread_from_the_first_to_the_last(n):
    chosen = data_report.evenly_spread(n)
    assert len(set(chosen)) == len(chosen) == min(n, 500)
    assert (
        chosen[0] == 0 and chosen[-1] == n - 1 and max(np.diff(chosen), default=1) <= n // 500 + 1
    )


@pytest.mark.parametrize("sizes", [[1], [5, 5], [10] * 99 + [1001], [10] * 999 + [1001], [3, 900]])
def test_the_lengths_that_keep_all_and_nearly_all(sizes):
    documents = types.SimpleNamespace(sizes=np.array(sizes, np.int32))
    everything, most = data_report.lengths_that_keep(documents)

    def lost(ctx_len):
        cut = data.BatchConfig(1, ctx_len)
        return data_report.count_cut(documents, cut).tokens

    assert lost(everything) == 0 and (everything == 0 or lost(everything - 1) > 0)
    allowed = 0.01 * sum(sizes)
    assert lost(most) <= allowed and (most == 0 or lost(most - 1) > allowed)


def test_a_length_for_a_few_long_documents_is_not_the_only_advice(capsys):
    binidx.write_binidx("y", [[1] * 49 + [0]] * 500 + [[1] * 200 + [0]])
    advice = dry_run(capsys, "--data_file y")["cut"].splitlines()[1]
    assert advice == (
        "what keeps them: --ctx_len 200 (49 keeps 99 %), --dataload get, --train_type infctx"
    )
    assert "--ctx_len 200, --dataload" in dry_run(capsys, "--data_file y --ctx_len 49")["cut"]
    binidx.write_binidx("z", [[1] * 49 + [0]])
    assert "--ctx_len 49, --dataload" in dry_run(capsys, "--data_file z")["cut"]
    said = dry_run(capsys, f"--data_file y --ctx_len {2**62}")  # beyond the sizes' int32
    assert "cut" not in said


@pytest.mark.parametrize(
    "part, whole, text",
    [
        (0, 5, "0 %"),
        (0, 0, "0 %"),
        (1, 10_000, "under 0.1 %"),
        (1, 1000, "0.1 %"),
        (95, 1000, "9.5 %"),
        (3, 4, "75 %"),
        (4, 4, "100 %"),
    ],
)
def test_shares(part, whole, text):
    assert data_report.percent(part, whole) == text


@pytest.mark.parametrize(
    "texts, flags, found",
    [
        (DIALOGUE * 2 + PLAIN, "", True),
        (DIALOGUE * 2 + PLAIN, "--loss_mask none", True),
        (DIALOGUE * 2 + PLAIN, "--loss_mask qa", False),
        (DIALOGUE + PLAIN, "", False),
        (PLAIN, "", False),
    ],
)
def test_dialogues_without_a_mask_are_noted(capsys, texts, flags, found):
    pathlib.Path("d.jsonl").write_text(texts)
    note = dry_run(capsys, f"{NEW} --data_file d.jsonl {flags}").get("note:", "")
    assert ("consider --loss_mask qa" in note) == found


@pytest.mark.parametrize(("optim", "mb"), [("adamw", (1.0, 1.1)), ("adamw8bit", (0.6, 0.8))])
def test_the_sizes_of_checkpoints_and_states_are_those_of_the_files(capsys, optim, mb):
    run(f"--epoch_count 2 --epoch_save 1 --keep 2 --optim {optim}")
    flags = f"--epoch_count 3 --keep 2 --optim {optim} --resume"
    options = plan.resolve_options(train.parse_args(shlex.split(f"{DEFAULTS} {flags}")))
    built = estimate.expected_memory(options, CPU).built
    room = plan.plan_run(options, built).room(built)
    assert room.checkpoint_size == sum(t.nbytes for t in read("out/rwkv-1.pth").values())
    numbers = {
        name: t.nbytes
        for name, t in read("out/resume-8.pth").items()
        if name.startswith(("weights.", "exp_avg"))
    }
    assert room.state_size == sum(numbers.values())
    # The third checkpoint, and a state before one of the two that are there goes.
    assert (room.checkpoints, room.states) == (1, 1)
    assert room.need == room.checkpoint_size + room.state_size
    state, both = mb
    said = dry_run(capsys, flags)["disk"]
    assert said.startswith(f"1 checkpoint of 0.2 MB and 1 state of {state} MB at once: {both} MB")


@pytest.mark.parametrize(
    "flags, name, text",
    [
        ("--quant nf4", "precision", "bf16 on cpu, base in nf4"),
        ("--grad_cp 1", "blocks", "eager; everything computed again in the backward pass"),
        ("--grad_cp 0.3", "blocks", "eager; all but products computed again"),
        ("--devices 2 --precision fp32", "precision", "fp32 on 2 x cpu, by DDP, base not"),
        ("--train_parts", "trained", "Bone bat r 16: 21,504 of"),
        ("--bone_mode bone --train_parts emb", "trained", "Bone bone r 16, emb: 40,704 of"),
        (NEW, "trained", "from scratch: 8,471,808 of 8,471,808 parameters (100 %)"),
        (NEW, "model", "a new one, RWKV-6 x060: n_layer 1, n_embd 64, vocab_size 65536,"),
        (NEW, "precision", "bf16 on cpu"),
    ],
)
def test_the_model(capsys, flags, name, text):
    assert dry_run(capsys, flags)[name].startswith(text)


def test_where_nobody_knows_what_is_free_the_report_says_so(capsys, monkeypatch):
    monkeypatch.setattr(estimate.memory, "available", lambda device: math.inf)
    said = dry_run(capsys)["memory"]
    assert said.endswith("at the peak, beyond PyTorch itself, nobody knows how much is free on cpu")


# ---- a dry run and a run ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags",
    ["--val_file x", "--loss_mask none --quant nf4", "--train_type infctx --chunk_ctx 16 --bptt 1"],
)
def test_a_dry_run_says_what_a_run_says_first(capsys, flags):
    def said():
        return re.sub(r"[\d,.]+ [MG]B free", "... free", capsys.readouterr().out)

    run(f"{flags} --dry_run")
    start_report, blank, _ = said().partition("\n\n")
    run(flags)
    assert blank and said().startswith(f"{start_report}\n")


def test_a_dry_run_says_from_where_a_run_goes_on_and_leaves_all_states(capsys):
    run("--epoch_steps 8 --save_steps 2 --keep 3")
    before = contents()
    capsys.readouterr()
    flags = "--epoch_steps 8 --save_steps 2 --resume"
    run(f"{flags} --dry_run")
    says = "out: this run is complete, 8 steps; a higher --epoch_count than 1 trains on\n"
    assert capsys.readouterr().out == says
    run(f"{flags} --epoch_count 2 --lr_init 1e-3 --devices 2 --dry_run")
    line = (
        "\ngoing on from out/resume-8.pth: step 8 of 16, with other --epoch_count 2 (was 1), "
        "--lr_init 0.001 (was 0.01); a step still has 1 micro batches, shared out among 2\n"
    )
    assert line in capsys.readouterr().out
    assert contents() == before


def test_a_dry_run_writes_nothing_but_the_tokens_of_a_jsonl(capsys):
    before = contents()
    run("--dry_run --val_file x --proj_dir a/b/c")
    assert contents() == before
    shutil.copy(SAMPLE, "s.jsonl")
    before = contents()
    run(f"{NEW} --dry_run --data_file s.jsonl")
    tokens = {pathlib.Path(f"s.jsonl.{ending}") for ending in ("bin", "idx", "source.json")}
    assert contents().keys() - before.keys() == tokens


def test_a_dry_run_in_the_folder_of_a_run_neither_locks_it_nor_cleans_it():
    pathlib.Path("out").mkdir()
    pathlib.Path("out/rwkv-0.pth.tmp-123-").write_bytes(b"of a run that may be alive")
    pathlib.Path("out/.lock").write_text("1")
    before = contents()
    run("--dry_run")
    assert contents() == before


@pytest.mark.parametrize(
    "flags, earlier, says",
    [
        ("--data_file gone", None, "--data_file gone: No such file or directory"),
        ("--val_file gone", None, "--val_file gone: No such file or directory"),
        ("--data_file x.bin --data_type uint16 --vocab_size 200", None, "vocab_size 300, but --"),
        ("--data_file n --data_type uint16", None, "n: document 9 holds token 300, but the"),
        ("--dataload get --ctx_len 400", None, "312 tokens, too few for --dataload get"),
        ("--loss_mask qa", None, "x: no answer in 12 documents"),
        ("--proj_dir x.bin", None, "--proj_dir x.bin is a file"),
        ("--proj_dir x.bin/a", None, "x.bin/a cannot be written (Not a directory); give another"),
        ("--resume", None, "out: holds no resume-N.pth to go on from"),
        ("", "", "out/resume-4.pth: the state of an earlier run"),
        ("--epoch_begin 1 --epoch_steps 4", "--epoch_begin 1", "out/resume-8.pth: the state of"),
        ("--resume --bone_r 32", "", "saved with --bone_r 16, but --bone_r is 32"),
    ],
)
def test_a_dry_run_refuses_what_a_run_refuses_in_the_same_line(capsys, flags, earlier, says):
    np.arange(301, dtype="<u2").tofile("n")
    if earlier is not None:
        run(earlier)
        capsys.readouterr()
    before = contents()
    error = refused(capsys, lambda: run(f"{flags} --dry_run"))
    assert says in error and contents() == before
    assert refused(capsys, lambda: run(flags)) == error


def test_a_dry_run_refuses_a_folder_that_cannot_be_made_and_a_disk_that_is_full(
    capsys, monkeypatch
):
    usage = types.SimpleNamespace(free=1_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    error = refused(capsys, lambda: run("--dry_run --proj_dir a/b"))
    assert "a/b: the run will write 2 MB, but the disk has 1 MB free" in error
    monkeypatch.setattr(os, "access", lambda path, mode: not os.path.samefile(path, "."))
    error = refused(capsys, lambda: run("--dry_run --proj_dir a/b"))
    assert "--proj_dir a/b cannot be written (Permission denied); give another" in error


def test_rank_0_alone_reports(capsys, monkeypatch):
    monkeypatch.setattr(devices, "rank", lambda: 1)
    report.describe(None, None, CPU)
    assert capsys.readouterr().out == ""
