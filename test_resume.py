"""resume.py: a run that is stopped, however, goes on as if it never had been; a disk that fails, numbers that go wrong, a second run
in the same folder harm nothing."""

import contextlib
import errno
import json
import math
import os
import pathlib
import re
import resource
import shlex
import signal
import subprocess
import sys
import time

import pytest
import torch

import data
import files
import resume
import rwkv6
import train
from test_options import refused
from test_train import DEFAULTS, base_file, column, counting, folder, read, run, tiny  # noqa: F401 (two are fixtures)

RUN = "--epoch_steps 3 --epoch_count 2 --save_steps 2 "     # states after 2, 3, 5 and 6 steps... and checkpoints after 3 and 6


class Killed(BaseException):
    """Stands for SIGKILL: nothing gets a chance to do anything."""


def kill_at(monkeypatch, when):
    """The run ends, as if killed, before the optimizer steps whose number is in `when`."""
    def step(*arguments, plain=train.step, done=[-1]):
        done[0] += 1
        if done[0] in when:
            raise Killed
        return plain(*arguments)
    monkeypatch.setattr(train, "step", step)
    monkeypatch.setattr(resume.Saver, "rescue", contextlib.nullcontext)


def same(a, b):
    return a.keys() == b.keys() and all(map(torch.equal, a.values(), b.values()))


def about(path):
    return json.loads(read(path)["about"].numpy().tobytes())


def curve(proj_dir):
    return pathlib.Path(proj_dir, "loss.csv").read_text()


# ---- exact resume -------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("flags", ["", "--accumulate_grad_batches 2 --micro_bsz 2", "--dataload get", "--precision fp32 --bone_mode bone", "--quant nf4 --loss_mask none",
                                   "--precision fp16 --train_parts time ln emb head --weight_decay 0.1 --warmup_steps 4",
                                   "--load_model '' --n_layer 2 --n_embd 64 --vocab_size 300"], ids=lambda flags: flags[:20] or "plain")
def test_a_run_killed_between_any_steps_and_resumed_is_the_run_that_never_was(monkeypatch, flags):
    data.write_binidx("held", counting([30, 12]))
    flags = RUN + "--lr_final 1e-3 --val_file held " + flags
    run(flags + " --proj_dir whole")
    for n in map(str, range(6)):
        with monkeypatch.context() as patch:
            kill_at(patch, {int(n)})
            with pytest.raises(Killed):
                run(flags + f" --proj_dir {n} --resume auto")
        run(flags + f" --proj_dir {n} --resume auto")
        assert curve(n) == curve("whole")
        for name in ("rwkv-0.pth", "rwkv-1.pth"):
            assert same(read(f"{n}/{name}"), read(f"whole/{name}"))
        last, expected = read(f"{n}/resume-6.pth"), read("whole/resume-6.pth")
        assert {"proj_dir", "resume"} == {k for k, v in about("whole/resume-6.pth")["args"].items() if about(f"{n}/resume-6.pth")["args"][k] != v}
        assert about(f"{n}/resume-6.pth")["progress"] == about("whole/resume-6.pth")["progress"]
        assert same({**last, "about": torch.ones(1)}, {**expected, "about": torch.ones(1)})


def test_a_run_killed_again_and_again_is_the_same_too(monkeypatch):
    run(RUN + "--proj_dir whole")
    for n in range(20):
        with monkeypatch.context() as patch, contextlib.suppress(Killed):
            kill_at(patch, {1})         # always after one step, which is saved
            run(RUN + "--save_steps 1 --resume auto")
            break
    assert n == 5 and curve("out") == curve("whole") and same(read("out/rwkv-1.pth"), read("whole/rwkv-1.pth"))
