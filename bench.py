"""Every speed figure that the README quotes: `python bench.py`, or `python bench.py layer`, `step`, `wkv` alone.

A figure is a ratio. What is compared runs in turn, round after round, in one process; the ratio of each round is taken, and
their median printed: a machine that is shared, or slows down, slows both sides. Absolute times are there for orientation.
"""

import statistics
import sys
import time

import torch
import torch.nn.functional as F

import rwkv6
from bone import BoneLinear, add_bone
from files import run_cli
from train import keep_freed_memory, loss_fn, make_optimizer
from wkv6 import kernel_problem, wkv6

N_EMBD, DIM_FFN, R = 2048, 7168, 64        # RWKV-6 1.6B
VOCAB = 65536 * 2 // 24                    # a head in the same proportion to 2 blocks as the real one is to 24


def in_turn(rounds, **functions):
    """Seconds of each function in each round, after one that is not counted: {name: [seconds]}."""
    times = {name: [] for name in functions}
    for i in range(rounds + 1):
        for name, function in functions.items():
            started = time.perf_counter()
            function()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if i:
                times[name].append(time.perf_counter() - started)
    return times


def row(what, times, a, b, target):
    """Print the ratio a / b, round by round, with its median, and whether it meets `target`: ("<=", 1.15), say."""
    ratio = statistics.median(x / y for x, y in zip(times[a], times[b]))
    sign, bound = target
    met = "met" if (ratio <= bound if sign == "<=" else ratio >= bound) else "NOT MET"
    print(f"{what:<62} {statistics.median(times[a]) * 1e3:8.1f} ms / {statistics.median(times[b]) * 1e3:8.1f} ms = {ratio:5.2f}   ({sign} {bound}: {met})", flush=True)


class BuiltLinear(BoneLinear):
    """The straightforward way: build W' in every step, all in bfloat16."""

    def forward(self, x):
        out_features, in_features = self.weight.shape
        B = self.bone.to(self.weight.dtype)
        blocks = self.weight.view(out_features // self.r, self.r, in_features // self.r, self.r).transpose(1, 2)
        delta = (blocks @ B + B).transpose(1, 2).reshape(out_features, in_features)
        return F.linear(x.to(self.weight.dtype), self.weight + delta)


def layer():
    print(f"\none layer, bat r {R}, bfloat16, forward + backward")
    for out_features in (N_EMBD, DIM_FFN):
        for T in (512, 1024):
            weight = (0.02 * torch.randn(out_features, N_EMBD)).bfloat16()
            x, gy = torch.randn(T, N_EMBD).bfloat16().requires_grad_(), torch.randn(T, out_features).bfloat16()
            bone, built = BoneLinear(weight, R), BuiltLinear(weight, R)
            times = in_turn(15, frozen=lambda: F.linear(x, weight).backward(gy), bone=lambda: bone(x).backward(gy), built=lambda: built(x).backward(gy))
            shape = f"{N_EMBD} -> {out_features}, {T} tokens"
            row(f"{shape}: Bone / the frozen layer", times, "bone", "frozen", ("<=", 1.15))
            row(f"{shape}: building W' / Bone", times, "built", "bone", (">=", 1.5))


def model_2_blocks(kind):
    """Two blocks of the 1.6B model with random weights, fine-tuned by `kind`: bone, built (W') or lora (peft)."""
    torch.manual_seed(0)
    config = rwkv6.Config(2, N_EMBD, VOCAB, DIM_FFN)
    with torch.device("meta"):
        model = rwkv6.RWKV6(config)
    for name, p in list(model.named_parameters()):
        value = torch.randn(p.shape) * 0.02 + (1 if name.endswith("weight") and "ln" in name else -4 if name.endswith("time_decay") else 0)
        rwkv6.put(model, name, value.to(rwkv6.storage_dtype(model, name, torch.bfloat16)))
    if kind == "lora":
        from peft import LoraConfig, inject_adapter_in_model
        model.requires_grad_(False)
        # as many trained parameters as bat: in * r = rank * (in + out)
        inject_adapter_in_model(LoraConfig(r=R // 2, target_modules=["receptance", "key", "value", "gate", "output"], rank_pattern={
            "ffn.key": round(N_EMBD * R / (N_EMBD + DIM_FFN)), "ffn.value": round(DIM_FFN * R / (N_EMBD + DIM_FFN))}), model)
    else:
        add_bone(model, R)
    for module in model.modules():
        if kind == "built" and isinstance(module, BoneLinear):
            module.__class__ = BuiltLinear
    for name, p in model.named_parameters():
        if "time" in name or "ln" in name or "lora" in name:
            p.requires_grad_(True)
    model.grad_cp = True
    return model


def train_step(model, T):
    """A function that runs one whole optimizer step on T random tokens."""
    optimizer = make_optimizer(model, 1e-6)
    idx, mask = torch.randint(VOCAB, (1, T + 1)), torch.ones(1, T)

    def run():
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_fn(model, idx[:, :-1], idx[:, 1:], mask)
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return run


def products(model, T):
    """A function that runs only the matrix products a step cannot do without: W x twice (once recomputed) and W^T gy in the
    blocks, once each in the head."""
    weights = [m.weight for m in model.modules() if isinstance(m, BoneLinear)]
    x = {n: torch.randn(T, n).bfloat16() for n in (N_EMBD, DIM_FFN, VOCAB)}

    @torch.no_grad()
    def run():
        for times, matrices in ((2, weights), (1, [model.head.weight])):
            for W in matrices:
                for _ in range(times):
                    F.linear(x[W.shape[1]], W)
                x[W.shape[0]] @ W
    return run


def wkv_inputs(T, H=32, N=64):
    r, k, v = (torch.randn(1, T, H, N).bfloat16().requires_grad_() for _ in range(3))
    return r, k, v, (torch.randn(1, T, H, N) - 4).requires_grad_(), torch.randn(H, N).requires_grad_()


def wkv_function(T, impl, forwards=1):
    inputs, gy = wkv_inputs(T), torch.randn(1, T, 32, 64).bfloat16()

    def run():
        for _ in range(forwards):
            y, _ = wkv6(*inputs, impl=impl)
        y.backward(gy)
    return run


def step():
    bone, built, lora = (model_2_blocks(kind) for kind in ("bone", "built", "lora"))
    trained = [sum(p.numel() for name, p in m.named_parameters() if "bone" in name or "lora" in name) for m in (bone, built, lora)]
    print(f"\nwhole training step, 2 blocks of the 1.6B model, vocabulary {VOCAB}, grad_cp; adapters: bat {trained[0]:,}, LoRA {trained[2]:,} parameters")
    for T in (512, 1024):
        times = in_turn(5, bone=train_step(bone, T), built=train_step(built, T), lora=train_step(lora, T), products=products(bone, T),
                        wkv=wkv_function(T, "auto", forwards=2))
        times["wkv"] = [2 * t for t in times["wkv"]]                            # two blocks
        row(f"{T} tokens: building W' / Bone", times, "built", "bone", (">=", 1.4))
        row(f"{T} tokens: Bone / LoRA", times, "bone", "lora", ("<=", 1.0))
        row(f"{T} tokens: necessary products / the step (arithmetic achieved)", times, "products", "bone", (">=", 0.75))
        row(f"{T} tokens: WKV-6 / the step", times, "wkv", "bone", ("<=", 0.1))


def wkv():
    print("\nWKV-6, 32 heads of 64, bfloat16, forward + backward")
    if kernel_problem():
        return
    for T in (512, 1024):
        times = in_turn(5, compiled=wkv_function(T, "compiled"), chunked=wkv_function(T, "chunked"))
        row(f"{T} tokens: chunked / compiled", times, "chunked", "compiled", (">=", 1))
    times = in_turn(1, compiled=wkv_function(512, "compiled"), loop=wkv_function(512, "reference"))
    row("512 tokens: the loop / compiled", times, "loop", "compiled", (">=", 1))


def main():
    parts = {"layer": layer, "step": step, "wkv": wkv}
    if unknown := set(sys.argv[1:]) - set(parts):
        raise ValueError(f"{unknown.pop()} is no part of the benchmark: layer, step and wkv are")
    keep_freed_memory()
    print(f"PyTorch {torch.__version__}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}; medians over rounds run in turn")
    for name in sys.argv[1:] or parts:
        parts[name]()


if __name__ == "__main__":
    run_cli(main)
