"""The words of other tools get the right flag, never the nearest spelling of another one."""

import shlex
import sys

import pytest

import cli
import data
import generate
import merge
import options
import parse_options
import words
from test_options import parser_of, refused

# What RWKV-PEFT's train.py takes at commit 5b8aac9, and what it took since its method was Bone.
RWKV_PEFT = """
LISA PISSA accelerator accumulate_grad_batches adam_eps avg_loss beta1 beta2 bone_config chunk_ctx
ctx_len cuda_cleanup data_file data_shuffle data_type dataload dataset_get datashuffle devices
dim_att dim_ffn dropout ds_bucket_mb emb epoch_begin epoch_count epoch_save epoch_steps fla
fused_kernel grad_cp head_qk head_size_a head_size_divisor layerwise_lr lisa_config lisa_k lisa_r
load_model load_partial lora lora_alpha lora_config lora_dropout lora_load lora_parts lora_r
loss_mask lr_final lr_init magic_prime mask_id micro_bsz my_att_shift my_exit my_exit_tokens
my_ffn_shift my_pile_edecay my_pile_shift my_pile_stage my_pile_version my_pos_emb my_qa_mask
my_random_steps my_sample_len my_testing n_embd n_layer num_nodes optim peft pissa_config pissa_init
pissa_load pre_ffn precision proj_dir quant random_seed sft_field sft_split state_tune strategy
svd_niter tiny_att_dim tiny_att_layer train_parts train_type vocab_size wandb warmup_steps
weight_decay weight_decay_final rwkv_version l2warp_sparse fla_npu compile"""

PROGRAMS = {
    "train.py": parse_options.parse_args,
    "merge.py": merge.main,
    "generate.py": generate.main,
    "data.py": data.main,
}


@pytest.fixture
def parsers(monkeypatch):
    """The parsers of the four programs."""
    found = {}
    for program, main in PROGRAMS.items():
        monkeypatch.setattr(sys, "argv", [program])
        with monkeypatch.context() as patch:
            found[program] = parser_of(main, patch)
    return found


def names_of(parser):
    return {action.dest for action in parser._actions}


def test_every_word_leads_to_a_flag_that_is_there(parsers):
    everywhere = set().union(*map(names_of, parsers.values()))
    for meant in words.MEANS:
        flag, *value = meant.split()
        assert flag in everywhere, meant
        if value:  # which the flag takes
            parsed = parse_options.make_parser().parse_args([f"--{flag}", *value])
            assert getattr(parsed, flag) == value[0]


def test_no_word_means_two_flags_of_one_program(parsers):
    for parser in parsers.values():
        flags = names_of(parser)
        seen = set()
        for meant, others in words.MEANS.items():
            if meant.split()[0] not in flags:
                continue
            for word in others.split():
                assert word not in seen, (word, meant)
                seen.add(word)
        in_table = [word for others in words.NOT_HERE for word in others.split()]
        assert len(in_table) == len(set(in_table))


def test_words_are_written_as_they_are_looked_up():
    for table in (words.MEANS, words.NOT_HERE):
        for others in table.values() if table is words.MEANS else table:
            assert others == others.lower().replace("-", "_")


@pytest.mark.parametrize("name", RWKV_PEFT.split())
def test_every_flag_of_rwkv_peft_is_taken_or_answered(name):
    if name not in options.flags():
        assert parse_options.make_parser().advice(f"--{name}"), name


@pytest.mark.parametrize(
    "line, says",
    [
        ("train.py --lr 1e-4", "unrecognized arguments: --lr 1e-4; did you mean --lr_init?"),
        ("train.py --learning_rate=1", "did you mean --lr_init?"),
        ("train.py --rank 8", "did you mean --bone_r?"),
        ("train.py -r 8", "did you mean --bone_r?"),
        ("train.py --batch_size 2", "did you mean --micro_bsz?"),
        ("train.py --per_device_train_batch_size 2", "did you mean --micro_bsz?"),
        ("train.py --epochs 3", "did you mean --epoch_count?"),
        ("train.py --max_length 3", "did you mean --ctx_len?"),
        ("train.py --output_dir x", "did you mean --proj_dir?"),
        ("train.py --seed 1", "did you mean --random_seed?"),
        ("train.py --gradient_accumulation_steps 2", "did you mean --accumulate_grad_batches?"),
        ("train.py --gradient_checkpointing", "did you mean --grad_cp?"),
        ("train.py --model_name_or_path x", "did you mean --load_model?"),
        ("train.py --train_file x", "did you mean --data_file?"),
        ("train.py --load_in_4bit", "did you mean --quant nf4?"),
        ("train.py --bf16 true", "did you mean --precision bf16?"),
        ("train.py --max_steps 10", "did you mean --epoch_steps?"),
        ("train.py --report_to wandb", "it is not there: --wandb PROJECT logs to Weights & Biases"),
        ("train.py --lora_alpha 16", "it is not there: Bone has no such setting; leave"),
        ("train.py --target_modules q", "it is not needed: Bone adapts every matrix of a block"),
        ("train.py --lr-init 1", "did you mean --lr_init?"),
        ("train.py --Bone_R 1", "did you mean --bone_r?"),
        ("train.py --LR-Init=1", "did you mean --lr_init?"),
        ("train.py \u2014lr_init 1", "did you mean --lr_init?"),
        ("train.py --lr 1 --epochs 2", "--lr: did you mean --lr_init?, --epochs: did you mean"),
        ("train.py --xyzzy 3", "train.py --help lists all flags"),
        ("train.py extra", "unrecognized arguments: extra; "),
        (
            "merge.py --base a --ckpt b --out c",
            "--base: did you mean --base_model?, --ckpt: did you",
        ),
        ("merge.py a b c --device cuda", "it is not needed here, leave it out: merging needs no"),
        ("generate.py --model a.pth", "--model; model is given without a flag"),
        ("generate.py a.pth --max_new_tokens 3", "did you mean --length?"),
        ("generate.py a.pth --random_seed 3", "did you mean --seed?"),
        ("data.py --input a.jsonl --output-prefix b", "--input: jsonl is given without a flag"),
    ],
)
def test_an_unknown_flag_gets_the_right_name(monkeypatch, capsys, line, says):
    monkeypatch.setattr(sys, "argv", shlex.split(line))
    assert says in refused(capsys, PROGRAMS[sys.argv[0]])


@pytest.mark.parametrize("word", ["--lr", "--x", "--foo", "--cache_dir", "--gpu_ids", "--help_me"])
def test_no_flag_is_guessed_where_none_is_near(word):
    nearest = words.advice(word, ["fla", "help", "keep", "ctx_len", "devices", "version"])
    assert nearest == ""


def test_what_is_named_where_a_program_is_called_from_elsewhere(monkeypatch, tmp_path):
    here = cli.__file__.removesuffix("cli.py")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [here + "train.py"])
    assert cli.path_of("merge.py") == here + "merge.py"
    monkeypatch.setattr(sys, "argv", ["notebook.py"])
    assert cli.path_of("merge.py") == here + "merge.py"
    monkeypatch.chdir(here)
    monkeypatch.setattr(sys, "argv", ["train.py"])
    assert cli.path_of("merge.py") == "merge.py"
