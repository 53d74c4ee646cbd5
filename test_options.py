"""Every flag of the tutorial does what it says, and every option can be given each of its values.

The tutorial's scripts run as they stand, what cannot be is refused, --help and docs/flags.md say
what the options are.
"""

import functools
import importlib
import importlib.util
import itertools
import json
import math
import os
import pathlib
import re
import shlex
import subprocess
import sys
import tomllib

import numpy as np
import pytest
import torch

import binidx
import build
import checkpoint
import cli
import corpus
import data
import generate
import merge
import options
import parse_options
import report
import tokenizer
import train
from flags import default_text
from test_train import (  # noqa: F401 (two are fixtures)
    DEFAULTS,
    arguments,
    base_file,
    bone_of,
    column,
    folder,
    read,
    run,
    tiny,
)

HERE = pathlib.Path(__file__).parent
TUTORIAL = """
--load_model base.pth --proj_dir out --data_file data/lora-test --data_type binidx
--vocab_size 65536 --ctx_len 512 --epoch_steps 500 --epoch_count 5 --epoch_begin 0 --epoch_save 1
--micro_bsz 1 --n_layer 32 --n_embd 2560 --pre_ffn 0 --head_qk 0 --lr_init 2e-5 --lr_final 2e-5
--warmup_steps 0 --beta1 0.9 --beta2 0.99 --adam_eps 1e-8 --accelerator gpu --devices 1
--precision bf16 --strategy deepspeed_stage_1 --grad_cp 1 --my_testing "x060" --dataload pad
--loss_mask pad --peft bone --bone_config '{"bone_load":"","bone_r":64}'"""
SMALL = "--n_layer 2 --n_embd 128 --epoch_steps 1 --accelerator cpu"


def refused(capsys, main):
    with pytest.raises(SystemExit) as end:
        cli.run_cli(main)
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1
    return error


# ---- the tutorial -----------------------------------------------------------------------------


@pytest.fixture
def world():
    """base.pth of SMALL's sizes with RWKV World's vocabulary, and the tutorial's data set."""
    torch.save(tiny(n_embd=128, vocab_size=65536), "base.pth")
    os.mkdir("data")
    binidx.write_binidx(
        "data/lora-test",
        [[*tokenizer.encode(f"User: {i}?\n\nAssistant: {i}!"), 0] for i in range(6)],
    )


def test_the_tutorial_s_command_trains_word_for_word_but_for_the_size(world, capsys):
    """What follows --bone_config stands for another base and another machine, and nothing else."""
    train.train(train.parse_args(shlex.split(f"{TUTORIAL} {SMALL} --quant nf4")))
    assert {path.name for path in pathlib.Path("out").glob("rwkv-*.pth")} == {
        f"rwkv-{epoch}.pth" for epoch in range(5)
    }
    assert column("lr") == [2e-5] * 5 and {
        t.shape for n, t in read("out/rwkv-4.pth").items() if n.endswith("key.bone")
    } == {(2, 64, 64)}
    assert (
        "deepspeed_stage_1 shares out what several devices hold; on one, plain PyTorch stands in"
        in capsys.readouterr().out
    )


def test_the_tutorial_s_gpu_is_asked_for_only_where_there_is_one(world, monkeypatch, capsys):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    assert "--accelerator cpu or leave it out" in refused(
        capsys, lambda: train.parse_args(shlex.split(TUTORIAL))
    )


def test_both_scripts_run_as_they_stand(world):
    """Paths and sizes, which a user edits in them, are given after them."""

    def script(name, flags):
        environment = os.environ | {
            "PATH": f"{os.path.dirname(sys.executable)}{os.pathsep}{os.environ['PATH']}",
            "OMP_NUM_THREADS": "1",
        }
        command = [
            "sh",
            f"scripts/{name}",
            *(
                f"{here}/{word}" if re.search("^(base|out|data|tuned)", word) else word
                for word in flags.split()
            ),
        ]
        end = subprocess.run(
            command, cwd=HERE, env=environment, capture_output=True, encoding="utf-8"
        )
        assert end.returncode == 0, end.stderr

    here = os.getcwd()
    script(
        "run_bone.sh", f"--load_model base.pth --data_file data/lora-test --proj_dir out {SMALL}"
    )
    script(
        "merge_bone.sh", "--base_model base.pth --lora_checkpoint out/rwkv-4.pth --output tuned.pth"
    )
    assert {n: (t.shape, t.dtype) for n, t in read("tuned.pth").items()} == {
        n: (t.shape, t.dtype) for n, t in read("base.pth").items()
    }


def merge_main(monkeypatch, line):
    monkeypatch.setattr(sys, "argv", ["merge.py", *shlex.split(line)])
    merge.main()


def test_merging_takes_the_tutorial_s_flags_and_plain_order(monkeypatch, capsys):
    run("--quant nf4 --epoch_steps 1 --epoch_begin 4")
    merge_main(
        monkeypatch,
        "--base_model base.pth --lora_checkpoint out/rwkv-4.pth --output tuned.pth --quant nf4",
    )
    for line in (
        "base.pth out/rwkv-4.pth plain.pth",
        "out/rwkv-4.pth mixed.pth --base_model base.pth",
        "base.pth out/rwkv-4.pth --quant nf4 between.pth",
    ):
        merge_main(monkeypatch, line)
        merged = read(re.search("(plain|mixed|between).pth", line)[0])
        assert all(tensor.equal(merged[name]) for name, tensor in read("tuned.pth").items())
    capsys.readouterr()
    for line in (
        "base.pth out/rwkv-4.pth",
        "base.pth out/rwkv-4.pth a.pth b.pth",
        "--output a.pth",
    ):
        refusal = refused(capsys, functools.partial(merge_main, monkeypatch, line))
        assert "three files are needed" in refusal
    assert "did you mean --lora_checkpoint?" in refused(
        capsys, lambda: merge_main(monkeypatch, "--lora_chekpoint a")
    )
    line = "--base_model base.pth --peft_checkpoint out/rwkv-4.pth --output later.pth"
    merge_main(monkeypatch, line)
    assert all(tensor.equal(read("later.pth")[name]) for name, tensor in merged.items())


# ---- every value of every option --------------------------------------------------------------

NEW = "--load_model '' --n_layer 2 --n_embd 64 "
WITH = {  # what a value needs beside it
    ("my_testing", "x052"): NEW,
    ("pre_ffn", 1): NEW,
    ("bone_mode", "bat"): "--bone_r 32",
    ("dataload", "only"): "--micro_bsz 1",
    ("loss_mask", "qa"): "--data_file qa",
    ("loss_mask", "se"): '--data_file qa --mask_id \'{"mask0":"Use","mask1":"Assist"}\'',
    ("data_type", "jsonl"): NEW + "--data_file t.jsonl",
    ("data_type", "utf-8"): NEW + "--data_file t",
    ("data_type", "dummy"): NEW,
    ("data_type", "utf-16le"): NEW + "--data_file t16",
    ("data_type", "numpy"): "--data_file t.npy",
    ("data_type", "uint16"): "--data_file t.raw",
}
OTHER = {  # values of options that have no list of choices
    "load_model": ["base.pth"],
    "n_layer": [2],
    "n_embd": [64],
    "vocab_size": [0, 300],
    "head_qk": [0, "16 " + NEW],
    "bone_r": [8],
    "bone_load": ["ckpt.pth", "''"],
    "bone_config": [
        """'{"bone_load":"","bone_r":32}'""",
        """'{"bone_mode":"bone","bone_load":"","bone_r":24}'""",
    ],
    "disha_config": ["""'{"mode":"bone","load":"","r":24}' --peft disha"""],
    "other_base": ["--bone_load ckpt.pth"],
    "train_parts": ["", "'[\"time\",' '\"ln\"]'", "[time, ln]", "\"['time', 'ln']\"", "emb head"],
    "data_file": ["x", "x.bin"],
    "val_file": ["x"],
    "val_split": [0, 0.3],
    "ctx_len": [16],
    "mask_id": ['\'{"mask0":"0","mask1":"1"}\''],
    "proj_dir": ["out"],
    "epoch_count": [1],
    "epoch_begin": [3],
    "epoch_steps": [2],
    "epoch_save": [0, 5],
    "micro_bsz": [2],
    "accumulate_grad_batches": [2],
    "random_seed": [7],
    "lr_init": [1e-3],
    "lr_final": [0],
    "warmup_steps": [2, -1],
    "beta1": [0.8],
    "beta2": [0.999],
    "adam_eps": [1e-6],
    "weight_decay": [0.1],
    "devices": [1],
    "num_nodes": [1],
    "grad_cp": ["auto", 0, 0.5, 1],
    "fla": [""],
    "save_steps": [0, 1],
    "keep": [2],
    "resume": ["auto"],
    "chunk_ctx": ["7 --train_type infctx"],
    "eval_steps": ["1 --val_file x"],
    "save_minutes": ["0.000001"],
    "tensorboard": [0],
    "bptt": ["2 --train_type infctx --chunk_ctx 7"],
}
# Tested below, and in test_train.py; --resume without a value in test_resume.py.
APART = {"wandb", "dry_run"}
VALUES = [
    (name, value)
    for name, about in options.flags().items()
    for value in OTHER.get(name, about.choices)
    if (name, value) != ("accelerator", "gpu")
]


@pytest.mark.exhaustive
@pytest.mark.parametrize("name, value", VALUES)
def test_every_value_of_every_option_trains(name, value):
    binidx.write_binidx("qa", [[1 + b for b in b"User: a\n\nAssistant: b"] + [0]])
    pathlib.Path("t.jsonl").write_text('{"text": "one"}\n{"text": "two, three"}\n')
    for path, encoding in (("t", "utf-8"), ("t16", "utf-16le")):
        pathlib.Path(path).write_text("many words, 很多词\n" * 20, encoding=encoding)
    np.save("t.npy", np.arange(100) % 90)
    (np.arange(100) % 90).astype("<u2").tofile("t.raw")
    torch.save(bone_of("base.pth"), "ckpt.pth")
    flags = f"--epoch_steps 2 --{name} {value} {WITH.get((name, value), '')}"
    args = train.parse_args(
        shlex.split(
            (DEFAULTS.replace("--bone_r 16 ", "") if "config" in name else DEFAULTS) + flags
        )
    )
    train.train(args)
    losses = column("loss")
    assert len(losses) == 2 and all(0 < loss < 20 for loss in losses)
    last = f"out/rwkv-{args.epoch_begin}.pth"
    assert all(tensor.isfinite().all() for tensor in read(last).values())
    if args.load_model:
        merge.merge("base.pth", last, "tuned.pth")
    assert checkpoint.load_model("tuned.pth" if args.load_model else last).config.version == (
        args.my_testing or "x060"
    )


def test_no_option_is_left_out():
    assert {name for name, _ in VALUES} | APART == options.flags().keys()


@pytest.mark.exhaustive
@pytest.mark.parametrize("quant", ["none", "int8", "nf4"])
@pytest.mark.parametrize(
    "parts",
    [
        " ".join(parts)
        for n in range(5)
        for parts in itertools.combinations(["time", "ln", "emb", "head"], n)
    ],
)
def test_each_quantization_with_each_set_of_parts_trains_saves_resumes_and_merges(quant, parts):
    run(f"--epoch_steps 1 --quant {quant} --train_parts {parts}")
    run(f"--epoch_steps 1 --epoch_begin 1 --bone_load out/rwkv-0.pth --train_parts {parts}")
    first, second = read("out/rwkv-0.pth"), read("out/rwkv-1.pth")
    merge.merge("base.pth", "out/rwkv-1.pth", "tuned.pth")
    base, tuned = read("base.pth"), read("tuned.pth")
    assert (
        first.keys()
        == second.keys()
        == {n for n in bone_of("base.pth") if n.endswith(".bone")}
        | {n for n in base if any(part in n for part in parts.split())}
    )
    for name, tensor in tuned.items():
        adapted = name.removesuffix("weight") + "bone" in second
        assert tensor.equal(second.get(name, base[name])) or adapted, name
        assert not tensor.equal(base[name]) or (not adapted and name not in second), name


@pytest.mark.parametrize(
    "flags, says",
    [
        (
            "--peft lora",
            "lora is another method than Bone; RWKV-PEFT (github.com/JL-er/RWKV-PEFT) has it",
        ),
        ("--peft pissa", "RWKV-PEFT"),
        ("--peft state", "RWKV-PEFT"),
        ("--peft bnoe", "bnoe is unknown; there are bone"),
        ("--data_type wds_img", "take no images"),
        ("--my_testing x070", "RWKV-7"),
        ("--my_testing x052", "base.pth: has my_testing x060, but --my_testing is x052"),
        ("--quant fp4", "nf4"),
        ("--vocab_size 500", "base.pth: has vocab_size 300, but --vocab_size is 500"),
        ("--head_qk 8", "has head_qk 0, but --head_qk is 8"),
        ("--pre_ffn 1", "has pre_ffn 0, but --pre_ffn is 1; drop --pre_ffn to use 0"),
        ("--num_nodes 2", "--num_nodes 2 needs to know where the first machine is"),
        ("--num_nodes 9000000000000000000", "needs to know where the first machine is"),
        ("--lora_config '{}'", "did you mean --bone_config?"),
        ("--lr_schedule cos", "it is not there: the rate goes from --lr_init to --lr_final"),
        ("--op fla", "it is not needed here, leave it out: the fastest form of WKV-6"),
        (
            """--disha_config '{"mode":"mode","load":"","r":64}'""",
            "--bone_mode: mode is unknown; there are bat, bone",
        ),
        ("--ctxlen 5", "did you mean --ctx_len?"),
        ("--mirco_bsz 1", "did you mean --micro_bsz?"),
        (
            "--bone_config '{\"bone_r\":0}'",
            "--bone_r: 0 must be a whole number of at least 1, and below 2^63",
        ),
        (
            "--bone_config {bone_r:64}",
            "--bone_config: {bone_r:64} is not JSON such as '{",
        ),
        (
            "--bone_config '{\"lora_r\":8}'",
            '{"lora_r":8} is not JSON such as '
            """'{"bone_load":...,"bone_r":...,"bone_mode":...}'""",
        ),
        ("--loss_mask se", "--loss_mask se needs --mask_id: what follows mask1 counts"),
        ('--loss_mask se --mask_id \'{"mask0":"a"}\'', "--mask_id needs two texts"),
        ('--loss_mask se --mask_id \'{"mask0":1,"mask1":2}\'', "--mask_id needs two texts"),
        ("--ctx_len 1.5", "--ctx_len: 1.5 must be a whole number of at least 1, and below 2^63"),
        ("--beta1 1", "--beta1: 1 must be a number of at least 0, and below 1"),
        ("--load_model bas.pth", "--load_model bas.pth: No such file or directory; did you mean"),
        ("--bone_load no/b.pth", "--bone_load no/b.pth: No such file or directory; there is no"),
        ("--val_file held", "--val_file held: No such file or directory"),
        (
            "--data_file lattin.txt",
            "--data_file lattin.txt: No such file or directory; did you mean latin.txt?",
        ),
        ("--n_layer 2 --vocab_size 3000000000 --n_embd 64 --load_model ''", "2^31"),
        (
            "--data_file t.txt",
            "base.pth: has no vocab.json beside it that says which characters it reads",
        ),
        ("--data_type numpy", "x: No such file"),
        ("--data_file t.txt --data_type numpy", "t.txt: not numpy"),
        ("--data_file table.npy", "table.npy: not numpy, a row of integers (float64, 2 dim"),
        ("--data_file odd --data_type uint16", "odd: not uint16, a row of integers"),
        ("--data_file latin.txt " + NEW, "latin.txt: not utf-8"),
        ("--data_file one.txt " + NEW, "one.txt: holds 1 tokens"),
        ("--data_file t.txt --loss_mask qa " + NEW, "t.txt: its tokens are characters"),
        ("--val_file latin.txt --data_file t.txt " + NEW, "latin.txt: not utf-8"),
        (
            "--val_file other.txt --data_file t.txt " + NEW,
            "other.txt has the character 'z', which is not in",
        ),
        (
            "--precision fp16 --load_model large.pth",
            "large.pth: head.weight reaches 70000, but float16 ends at 65504; use --precision bf16",
        ),
        (
            "--data_file t.txt --vocab_size 300 " + NEW,
            "t.txt: has 5 characters, but the model's vocabulary is 300; drop --vocab_size",
        ),
        (
            "--data_file t.txt --load_model run2/base.pth",
            "t.txt: has 5 characters, but the model's vocabulary is 300; take the vocab.json",
        ),
        (
            "--data_file t.txt --load_model run2/base.pth --proj_dir run3",
            "run3/vocab.json: has other characters than run2/vocab.json",
        ),
        ("--data_type dummy --proj_dir run " + NEW, "run/vocab.json: not a vocabulary"),
        ("--pre_ffn 1 --load_model '' --n_layer 1 --n_embd 64", "at least 2"),
    ],
)
def test_what_cannot_be_is_refused_with_what_to_do(capsys, flags, says):
    pathlib.Path("t.txt").write_text("a text")
    pathlib.Path("one.txt").write_text("a")
    pathlib.Path("odd").write_bytes(b"odd")
    pathlib.Path("other.txt").write_text("a taxz")
    pathlib.Path("latin.txt").write_bytes("é".encode("latin-1") * 5)
    np.save("table.npy", np.ones((3, 3)))
    torch.save(tiny(torch.float32) | {"head.weight": torch.full((300, 64), 7e4)}, "large.pth")
    for run_dir, content in (
        ("run", {"0": "ab"}),
        ("run2", dict(enumerate("a tex"))),
        ("run3", dict(enumerate("xet a"))),
    ):
        os.mkdir(run_dir)
        pathlib.Path(run_dir, "vocab.json").write_text(json.dumps(content))
    os.link("base.pth", "run2/base.pth")
    before = {path: path.read_bytes() for path in pathlib.Path().rglob("*") if path.is_file()}
    defaults = DEFAULTS.replace("--bone_r 16 ", "" if "bone_config" in flags else "--bone_r 16 ")
    assert says in refused(
        capsys, lambda: train.train(train.parse_args(shlex.split(defaults + flags)))
    )
    assert before == {
        path: path.read_bytes() for path in pathlib.Path().rglob("*") if path.is_file()
    }


# ---- --help, --version and docs/flags.md -----------------------------------------------------


@pytest.mark.parametrize("line", ["--help", "--version", "--mirco_bsz 1", "--peft lora", ""])
def test_the_command_line_is_answered_before_pytorch_is_imported(line):
    """Importing it takes seconds, on a machine that has just started."""
    code = (
        "import sys, cli, parse_options\n"
        "try: cli.run_cli(parse_options.parse_args)\n"
        "finally: print({'torch', 'numpy', 'psutil'} & sys.modules.keys())"
    )
    command = [sys.executable, "-c", code, *line.split()]
    end = subprocess.run(command, cwd=HERE, capture_output=True, encoding="utf-8")
    assert end.stdout.endswith("set()\n")
    assert end.returncode == (0 if line in ("--help", "--version") else 2)


def parser_of(main, monkeypatch):
    """The parser that a program makes."""
    parsers = []
    for name in ("parse_args", "parse_intermixed_args"):
        monkeypatch.setattr(
            cli.Parser, name, lambda parser, argv=None: sys.exit(parsers.append(parser))
        )
    with pytest.raises(SystemExit):
        main()
    return parsers[0]


@pytest.mark.parametrize("main", [parse_options.parse_args, merge.main, generate.main])
def test_help_says_every_default(monkeypatch, main):
    defaults = {name: about.default for name, about in options.flags().items()}
    for action in parser_of(main, monkeypatch)._actions:
        default = defaults.get(action.dest) if main is parse_options.parse_args else action.default
        if action.dest not in ("help", "version") and default_text(default) not in ("", "[]"):
            assert f"(default: {default_text(default)})" in action.help


@pytest.mark.parametrize("main", [parse_options.parse_args, merge.main, generate.main, data.main])
def test_every_program_says_the_version_of_the_project(monkeypatch, capsys, main):
    project = tomllib.loads((HERE / "pyproject.toml").read_text())["project"]
    monkeypatch.setattr(sys, "argv", ["program", "--version"])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 0
    assert capsys.readouterr().out == f"{project['name']} {project['version']}\n"


@pytest.fixture
def make_flags(monkeypatch):
    monkeypatch.syspath_prepend(HERE / "docs")
    return importlib.import_module("make_flags")


def test_every_flag_has_a_chinese_text(make_flags):
    assert make_flags.CHINESE_HELP.keys() == options.flags().keys()


@pytest.mark.parametrize("name", ["ENGLISH", "CHINESE"])
def test_the_pages_of_flags_are_those_of_the_options(make_flags, name):
    language = getattr(make_flags, name)
    assert language.path.read_text(encoding="utf-8") == make_flags.page(language), (
        f"{language.path} is out of date: make docs"
    )


# ---- what single options do -------------------------------------------------------------------


def test_characters_have_the_ids_of_vocab_json_which_is_kept():
    pathlib.Path("t.txt").write_text("cab, 词 cab\n" * 30)
    run(NEW + "--data_file t.txt --epoch_steps 1")
    vocabulary = json.loads(pathlib.Path("out/vocab.json").read_text())
    assert (
        vocabulary == {str(i): c for i, c in enumerate(sorted("\n ,abc词"))}
        and checkpoint.load_model("out/rwkv-0.pth").config.vocab_size == 7
    )
    # Fewer characters; the vocabulary of the folder, and of the base, stays.
    pathlib.Path("t.txt").write_text("bc\n" * 30)
    run(NEW + "--data_file t.txt --epoch_steps 1 --epoch_begin 1")
    run("--load_model out/rwkv-0.pth --data_file t.txt --proj_dir tuned --epoch_steps 1")
    for proj_dir in ("out", "tuned"):
        assert json.loads(pathlib.Path(proj_dir, "vocab.json").read_text()) == vocabulary
    assert corpus.open_data("t.txt", vocabulary=tokenizer.read_vocabulary("out/vocab.json"))[
        0
    ].tolist()[:3] == [4, 5, 0]
    assert read("tuned/rwkv-0.pth").keys() == bone_of("base.pth").keys()


def test_held_out_text_may_be_encoded_otherwise():
    pathlib.Path("t.txt").write_text("abcd " * 30)
    pathlib.Path("h.txt").write_text("\ufeff" + "dcba " * 30, encoding="utf-16le")
    for proj_dir, training, held_out in (("a", "t.txt", "h.txt"), ("b", "h.txt", "t.txt")):
        run(
            f"{NEW} --data_file {training} --val_file {held_out} "
            f"--epoch_steps 1 --proj_dir {proj_dir}"
        )
        assert len(column("val_loss", proj_dir)) == 2


@pytest.mark.parametrize(
    "flags, expected",
    [
        ("x", 65536),
        ("t.jsonl", 65536),
        ("n.npy", 91),
        ("n.raw --data_type uint16", 91),
        ("t.txt", 4),
        ("n.npy --vocab_size 100", 100),
    ],
)
def test_the_vocabulary_of_a_new_model_is_found_from_the_data(capsys, flags, expected):
    np.save("n.npy", np.arange(91))
    np.arange(91).astype("<u2").tofile("n.raw")
    pathlib.Path("t.txt").write_text("abacad")
    pathlib.Path("t.jsonl").write_text('{"text": "abc"}\n')
    run(f"{NEW} --dry_run --data_file {flags}")
    assert f"vocab_size {expected}," in capsys.readouterr().out


def test_the_order_of_the_file_does_not_depend_on_the_seed():
    for proj_dir, flags in (
        ("a", "--data_shuffle 0"),
        ("b", "--data_shuffle 0 --random_seed 1"),
        ("c", "--random_seed 1"),
    ):
        run(f"{flags} --proj_dir {proj_dir}")
    assert column("loss", "a") == column("loss", "b") != column("loss", "c")


def test_layerwise_lr_is_what_makes_time_decay_learn_at_twice_the_rate():
    torch.save(tiny(torch.float32), "base.pth")
    base, moved = read("base.pth")["blocks.0.att.time_decay"], []
    for switch in (0, 1):
        run(f"--precision fp32 --epoch_steps 1 --layerwise_lr {switch} --proj_dir {switch}")
        moved.append(read(f"{switch}/rwkv-0.pth")["blocks.0.att.time_decay"] - base)
    torch.testing.assert_close(moved[1], 2 * moved[0])


def test_qa_is_se_with_the_markers_of_a_dialogue():
    binidx.write_binidx(
        "qa",
        [
            [1 + b for b in f"User: {i}\n\nAssistant: b{i}\n\nUser: c".encode()] + [0]
            for i in range(4)
        ],
    )
    for proj_dir, flags in (
        ("qa", "qa"),
        ("se", """se --mask_id '{"mask0":"User:","mask1":"Assistant:"}'"""),
        ("swapped", """se --mask_id '{"mask1":"User:","mask0":"Assistant:"}'"""),
    ):
        run(f"--data_file qa --ctx_len 64 --proj_dir {proj_dir} --loss_mask {flags}")
    assert column("loss", "qa") == column("loss", "se") != column("loss", "swapped")


@pytest.mark.parametrize(
    "flags, marker",
    [("qa", "Assistant:"), ("""se --mask_id '{"mask0":"User:","mask1":"<a>"}'""", "<a>")],
)
def test_a_run_says_how_many_documents_lack_which_marker(capsys, flags, marker):
    binidx.write_binidx(
        "qa",
        [[1 + b for b in text.encode()] + [0] for text in ("Assistant: <a> b", "none", "nor here")],
    )
    run(f"--data_file qa --loss_mask {flags} --epoch_steps 1")
    assert (
        f"note: 2 of the first 3 documents have nothing after {marker} within 32 tokens"
        in capsys.readouterr().out
    )


def test_weight_decay_shrinks_what_it_is_for():
    flags = "--lr_init 1e-3 --lr_final 1e-3 --train_parts emb --epoch_steps 1 "
    run(flags + "--weight_decay 100 --proj_dir decayed")
    run(flags + "--proj_dir plain")
    decayed, plain, base = (
        read(path)["emb.weight"].float()
        for path in ("decayed/rwkv-0.pth", "plain/rwkv-0.pth", "base.pth")
    )
    assert (plain - decayed - 0.1 * base).norm() < 0.01 * base.norm()  # 1 - lr * weight_decay


def test_fp16_scales_the_gradient_and_leaves_out_a_step_that_overflows(monkeypatch):
    """Gradients are those of float32 to the precision of fp16, where most would be 0 if unscaled.

    An infinite one halves the scale of 2^16, and nothing else changes in that step.
    """
    run("--precision fp16 --epoch_steps 4 --proj_dir half")
    run("--precision fp32 --epoch_steps 4 --proj_dir whole")
    assert column("loss", "half") == pytest.approx(column("loss", "whole"), rel=1e-3)
    scales, before = [], []

    def step(model, micro, passes, plain=train.accumulate_gradients, **options):
        loss = plain(model, micro, passes, **options)
        scales.append(passes.scaler.get_scale())
        before.append(model.blocks[0].ln1.bias.clone())
        if len(scales) == 2:
            model.blocks[1].ln1.bias.grad[3] = math.inf
        return loss

    monkeypatch.setattr(train, "accumulate_gradients", step)
    run("--precision fp16 --epoch_steps 4")
    assert (
        scales == [65536, 65536, 32768, 32768]
        and before[1].equal(before[2])
        and not before[2].equal(before[3])
    )


@pytest.mark.parametrize(
    "precision, products, dtype",
    [
        ("fp32", "highest", torch.float32),
        ("tf32", "high", torch.float32),
        ("bf16", "highest", torch.bfloat16),
        ("fp16", "highest", torch.float16),
    ],
)
def test_precision_is_that_of_products_and_of_a_new_model_s_file(precision, products, dtype):
    run(f"{NEW} --epoch_steps 1 --precision {precision}")
    assert torch.get_float32_matmul_precision() == products and {
        tensor.dtype for tensor in read("out/rwkv-0.pth").values()
    } == {dtype}
    torch.set_float32_matmul_precision("highest")
    model, *_ = build.build_model(arguments(f"--precision {precision}"), torch.device("cpu"))
    assert (
        model.blocks[0].att.key.weight.dtype == model.head.weight.dtype == dtype
        and model.blocks[0].att.key.bone.dtype == torch.float32
    )


@pytest.mark.parametrize("flag", ["--pre_ffn 0", "--head_qk 0"])
def test_what_a_base_has_is_not_taken_from_it_by_a_flag(flag):
    run(NEW + "--pre_ffn 1 --head_qk 16 --epoch_steps 1 --proj_dir base")
    with pytest.raises(ValueError, match=f"has .*, but {flag.replace(' ', ' is ')}"):
        run(f"--load_model base/rwkv-0.pth {flag}")
    run("--load_model base/rwkv-0.pth")  # and Bone is trained on such a base, too
    merge.merge("base/rwkv-0.pth", "out/rwkv-0.pth", "tuned.pth")
    assert (
        checkpoint.load_model("tuned.pth").config == checkpoint.load_model("base/rwkv-0.pth").config
    )


def test_a_gradient_in_fp16_is_that_of_fp32():
    grads = []
    for precision in ("fp32", "fp16"):
        args = arguments(f"--precision {precision}")
        model, *_ = build.build_model(args, torch.device("cpu"))
        passes = build.make_passes(args, model, torch.device("cpu"))
        batch = data.batch(binidx.Binidx("x"), 0, data.BatchConfig(4, 32))
        train.accumulate_gradients(model, [batch], passes)
        grads.append(
            {
                name: p.grad / passes.scaler.get_scale()
                for name, p in model.named_parameters()
                if p.requires_grad
            }
        )
    for name, grad in grads[0].items():
        assert (grad - grads[1][name]).norm() <= 2e-2 * grad.norm(), name


def test_sums_inside_a_product_of_16_bits_are_in_float32_on_a_gpu_too():
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = True
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = True
    build.precision(arguments(), torch.device("cpu"))
    assert not torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction
    assert not torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction


def test_a_card_that_only_emulates_bf16_is_told_so(monkeypatch, capsys):
    run()
    assert "no bfloat16 of its own" not in capsys.readouterr().out
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation: including_emulation
    )
    assert build.emulates_bf16(torch.device("cuda")) and not build.emulates_bf16(
        torch.device("cpu")
    )
    monkeypatch.setattr(report, "emulates_bf16", lambda device: True)
    run("--proj_dir other")
    assert "--precision fp16 is faster here" in capsys.readouterr().out
    run("--proj_dir third --precision fp16")
    assert "--precision fp16 is faster here" not in capsys.readouterr().out


def test_a_run_whose_every_step_overflows_is_no_success(monkeypatch, capsys):
    def step(model, *rest, plain=train.accumulate_gradients, **options):
        loss = plain(model, *rest, **options)
        model.blocks[1].ln1.bias.grad[3] = math.inf
        return loss

    monkeypatch.setattr(train, "accumulate_gradients", step)
    with pytest.raises(ValueError, match="loss or gradient were not finite in each of 3 steps"):
        run("--precision fp16 --epoch_steps 3")
    assert not os.path.exists("out/rwkv-0.pth")


def test_a_flag_of_its_own_wins_over_bone_config():
    config = """--bone_config '{"bone_load":"","bone_r":64,"bone_mode":"bone"}' """
    args = train.parse_args(
        shlex.split(
            "--load_model base.pth --data_file x " + config + "--bone_r 8 --bone_load ckpt.pth"
        )
    )
    assert (args.bone_r, args.bone_mode, args.bone_load) == (8, "bone", "ckpt.pth")
    config = """--bone_config '{"bone_load":"other.pth","bone_r":null}' """
    for flags, expected in (("--bone_load ''", ""), ("", "other.pth")):
        args = train.parse_args(
            shlex.split("--load_model base.pth --data_file x " + config + flags)
        )
        assert (args.bone_r, args.bone_load) == (None, expected)


def impls(flags, device="cpu"):
    model, *_ = build.build_model(arguments(flags), torch.device(device))
    return {block.att.impl for block in model.blocks}


def test_fla_is_taken_on_a_gpu_where_it_is_installed_alone(monkeypatch):
    """Elsewhere the run takes the same kernel as without the flag, not a slower one."""
    fla = {"fla": object()}
    monkeypatch.setattr(importlib.util, "find_spec", fla.get)
    assert impls("--fla") == impls("") == {"auto"}
    # On the meta device stands what the memory is estimated of.
    gpu = torch.device("cuda")
    monkeypatch.setattr(build.devices, "find", lambda accelerator: gpu)
    assert impls("--fla", "meta") == {"fla"}
    fla.clear()
    assert impls("--fla", "meta") == {"auto"}
    assert "pip install flash-linear-attention" in build.why_no_fla(arguments())


def test_a_run_with_fla_but_without_a_gpu_says_so_once_and_is_the_same(capsys):
    run("--epoch_steps 1 --proj_dir plain")
    assert "--fla" not in capsys.readouterr().out
    run("--epoch_steps 1 --fla")
    assert capsys.readouterr().out.count("note: --fla is for the operator of") == 1
    assert column("loss") == column("loss", "plain")


def test_wandb_gets_losses_and_learning_rate(monkeypatch, capsys):
    wandb = pytest.importorskip("wandb")
    for name, value in (
        ("MODE", "offline"),
        ("SILENT", "true"),
        ("CONFIG_DIR", "wandb_config"),
        ("CACHE_DIR", "wandb_cache"),
    ):
        monkeypatch.setenv(f"WANDB_{name}", value)
    run("--wandb project --val_file x --epoch_steps 2")
    [log] = pathlib.Path("out/wandb").glob("offline-run-*/*.wandb")
    content = log.read_bytes()
    for word in (b"project", b"loss", b"lr", b"val_loss", b"bone_r"):
        assert re.search(rb"[^_]\b%b\b" % word, content), (word, content)

    def nobody_logged_in(**_):
        raise wandb.errors.UsageError("No API key configured.\nUse `wandb login` to log in.")

    monkeypatch.setattr(wandb, "init", nobody_logged_in)
    capsys.readouterr()
    assert "--wandb project: No API key configured. Use `wandb login`" in refused(
        capsys, lambda: run("--wandb project --proj_dir other")
    )
    assert not os.path.exists("other")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    capsys.readouterr()
    assert "wandb is not installed; pip install wandb, or drop --wandb" in refused(
        capsys, lambda: run("--wandb project --proj_dir other")
    )
