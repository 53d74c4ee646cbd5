"""Fine-tune an RWKV-6 or RWKV-5 model with Bone, or pretrain a small one from scratch. `python train.py --help` lists every flag.

Data flows one way: file -> tokens -> batch -> model -> loss -> step -> checkpoint. A batch is a function of (seed, step),
so a run is a function of its command line, wherever it is interrupted and resumed.
"""

import contextlib
import functools
import math
import os
import shlex
import sys
import time
import types

import corpus

if sys.platform == "linux" and "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
    # PyTorch reads this when a GPU's first tensor is made. Without it, rows of changing lengths
    # leave holes in the GPU's memory in which the next ones find no room.
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")

import torch
from torch import nn
from tqdm import tqdm

import data
import devices
import memory
import resume
from archive import fingerprint
from build import (
    build_model,
    build_shares,
    check_memory,
    chunk_ctx,
    count,
    emulates_bf16,
    longest_row,
    open_documents,
    precision,
)
from cli import run_cli
from log import Log, draw
from loss import count_tokens, loss_fn, step, val_loss
from options import parse_args

OF_A_MACHINE = (
    "load_model",
    "data_file",
    "val_file",
    "bone_load",
    "proj_dir",
    "devices",
)  # flags that may differ; the contents of the files may not


# ---- optimizer ---------------------------------------------------------------------------------------------------------------


def make_optimizer(
    model, lr, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.0, layerwise_lr=True, strategy="auto"
):
    """Adam over the parameters that require gradients, grouped as RWKV-LM groups them. With layerwise_lr time_decay (not its _w1, _w2)
    learns at twice the rate, and no time parameter decays; otherwise what has two dimensions decays (as in AdamW) by lr * weight_decay."""
    groups = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            apart = layerwise_lr and "time_" in name
            scale = 2.0 if apart and name.endswith("time_decay") else 1.0
            decay = weight_decay if not apart and p.squeeze().ndim >= 2 else 0.0
            groups.setdefault(
                (scale, decay),
                {"params": [], "lr": lr * scale, "lr_scale": scale, "weight_decay": decay},
            )["params"].append(p)
    return devices.optimizer([*groups.values()], strategy, lr=lr, betas=betas, eps=eps, fused=True)


def learning_rate(step, first, total, lr_init, lr_final, warmup_steps):
    """Learning rate of optimizer step `step`, as RWKV-LM computes it: from lr_init to lr_final over `total` steps counted from epoch 0,
    whatever the first step of this run is; from there the warm-up goes from 0.2 to 1."""
    progress = min(1.0, max(0.0, (step - warmup_steps + 1) / (total - warmup_steps or 1)))
    if lr_init == 0 or lr_final == 0:
        lr = lr_init + (lr_final - lr_init) * progress
    else:
        lr = lr_init * math.exp(math.log(lr_final / lr_init) * progress)
    return lr * (0.2 + 0.8 * (step - first) / warmup_steps if step - first < warmup_steps else 1.0)


def describe(args, model, device, plan):
    """Print what is about to be trained on what. model: on the meta device; plan: what `prepare` found."""
    print(
        f"{model.config}\n{f'Bone {args.bone_mode} r {args.bone_r}' if args.load_model else 'from scratch'}: "
        f"{' of '.join(f'{n:,}' for n in count(model))} parameters trained, {args.precision} on "
        f"{f'{devices.size()} x ' * (devices.size() > 1)}{device.type}{f', by {devices.engine(args.strategy)}' * (devices.size() > 1)}\n"
        f"{len(plan.documents):,} documents, {len(plan.documents.tokens):,} tokens; {args.epoch_count} x {plan.steps} steps of "
        f"{args.micro_bsz * plan.N} rows up to {longest_row(args):,} tokens"
        + f", in chunks of {args.chunk_ctx}"
        * (args.train_type == "infctx")
    )
    if args.train_type == "none" and (args.chunk_ctx, args.bptt) != (512, 0):
        print("note: --chunk_ctx and --bptt do nothing without --train_type infctx")
    if args.precision == "bf16" and emulates_bf16(device):
        print(
            "note: this GPU has no bfloat16 of its own, and computes it in float32: --precision fp16 is faster here"
        )
    if "deepspeed" in args.strategy and devices.size() == 1:
        print(
            f"note: {args.strategy} shares out what several devices hold; on one, plain PyTorch stands in for it (--dry_run says the memory)"
        )


def update(optimizer, scaler, lr, loss):
    """Take a step of the optimizer, on gradients clipped to a norm of 1, if loss and norm are finite.

    loss: tensor (), this rank's. Returns the norm and the scale of fp16 that the gradients had,
    tensors () on the device, which nothing here waits for. A step that is not taken changes nothing
    but that scale, which is halved.
    """
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]
    scale = scaler.scale(torch.ones_like(loss))
    scaler.unscale_(optimizer)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    norm = devices.whole(nn.utils.clip_grad_norm_(parameters, 1.0)).to(loss.device)
    devices.step_if_finite(optimizer, loss + norm)
    scaler.update()
    optimizer.zero_grad()
    return norm, scale


# ---- the loop -----------------------------------------------------------------------------------------------------------------


def train(args):
    """A whole run: data and model, then epochs of optimizer steps, with logs, held-out losses, checkpoints and states in proj_dir."""
    started, wanted = os.environ.get("WORLD_SIZE"), args.devices * args.num_nodes
    if started and not started.isdecimal():
        raise ValueError(
            f"WORLD_SIZE {started} is no number of processes; unset it, or start them by torchrun"
        )
    if started and wanted > 1 and int(started) != wanted:
        raise ValueError(
            f"--devices {args.devices} --num_nodes {args.num_nodes}, but WORLD_SIZE says {started}; with torchrun leave both out, else unset WORLD_SIZE"
        )
    if not started and wanted > 1 and not args.dry_run:
        return devices.launch(args.devices, args.num_nodes)
    device = devices.find(args.accelerator)
    if not (args.load_model or args.vocab_size) and (
        args.data_type or corpus.kind_of(args.data_file)
    ) not in ("binidx", "jsonl"):
        args.vocab_size = open_documents(args)[0].vocab_size()
    with devices.world(device, args.strategy), contextlib.ExitStack() as held:
        devices.check_same(
            {f"--{name}": value for name, value in vars(args).items() if name not in OF_A_MACHINE}
        )
        with devices.main_first():
            built = check_memory(args, device)
            if not (args.dry_run or devices.rank()):
                held.enter_context(resume.lock(args.proj_dir))
        if not args.dry_run:
            run(args, device, built)


def open_batches(args, vocab_size):
    """The data as training sees it: documents and held-out ones, loss mask, `rows` (what says which rows a micro batch has, see data.rows_of),
    micro_batch(number), and the function from micro batches in an optimizer step to steps in an epoch."""
    documents, held_out = open_documents(args, vocab_size)
    loss_mask = (
        args.loss_mask if args.loss_mask != "se" else (args.mask_id["mask1"], args.mask_id["mask0"])
    )
    cut = args.train_type != "infctx"
    silent, _ = (
        data.check_mask(d, args.ctx_len, loss_mask, cut) if d else 0 for d in (documents, held_out)
    )
    if silent:
        marker, _ = data.MARKERS.get(loss_mask, loss_mask)
        print(
            f"note: {silent} of the first {min(1000, len(documents))} documents have nothing after {marker}{f' within {args.ctx_len} tokens' * cut} and count for nothing"
        )
    rows = dict(
        micro_bsz=args.micro_bsz,
        ctx_len=args.ctx_len,
        dataload=args.dataload,
        seed=args.random_seed,
        shuffle=bool(args.data_shuffle),
    )
    micro_batch = functools.partial(data.batch, documents, loss_mask=loss_mask, cut=cut, **rows)
    micro_batch(0)  # what cannot be batched is refused here
    once = len(documents) if args.dataload != "get" else len(documents.tokens) / args.ctx_len
    return (
        documents,
        held_out,
        loss_mask,
        rows,
        micro_batch,
        lambda micro_batches: (
            args.epoch_steps or math.ceil(once / (args.micro_bsz * micro_batches))
        ),
    )


def prepare(args, built):
    """What a run needs to know before it begins, as a namespace; ValueError for what is in its way. built: what `build_model` makes on the meta device."""
    documents, held_out, loss_mask, rows, micro_batch, steps_of = open_batches(
        args, built[0].config.vocab_size
    )
    state, N, steps = resume.load(
        args.proj_dir,
        args.resume,
        args.epoch_begin,
        steps_of,
        args.accumulate_grad_batches * devices.size(),
    )
    epochs = range(args.epoch_begin, args.epoch_begin + args.epoch_count)
    paths = {
        (epoch + 1) * steps: os.path.join(args.proj_dir, f"rwkv-{epoch}.pth")
        for epoch in epochs
        if (epoch + 1 - epochs[0]) % (args.epoch_save or len(epochs)) == 0 or epoch == epochs[-1]
    }
    first, last = epochs[0] * steps, epochs.stop * steps
    about = {
        "base": fingerprint(args.load_model),
        "data": documents.fingerprint(),
        "micro_batches": N,
    }
    changes = resume.check_same_run(state, args, about) if state else []
    resume.check_folder(args, paths, first, state and state.progress, not changes)
    complete = gone = False
    if not devices.rank():  # whose folder counts
        complete = bool(state) and (
            state.progress.step > last
            or (state.progress.step == last and os.path.exists(paths[last]))
        )
        gone = (
            bool(state)
            and not state.progress.losses
            and not os.path.exists(paths.get(state.progress.step, args.proj_dir))
        )
        if not complete:
            resume.check_room(args, built, paths, first, state.progress.step if state else first)
    return types.SimpleNamespace(**locals())


def settle(args, built):
    """What `prepare` finds, the same on all ranks, and the log; None where there is nothing left to do, which is said."""
    with devices.main_first():
        plan = prepare(args, built)
        state, first = plan.state, plan.first
        log = (
            None
            if plan.complete
            else Log(args, plan.documents.vocabulary, state and state.about["wandb"])
        )
    devices.check_same(
        {
            "the step to go on from in --proj_dir": state.progress.step if state else first,
            "the content of --load_model": plan.about["base"],
            "the content of --data_file": plan.about["data"],
            "the content of --bone_load": fingerprint(args.bone_load),
            "the number of documents in --val_file": len(plan.held_out or ()),
        }
    )
    plan.complete, plan.gone = devices.most([plan.complete, plan.gone])
    if not plan.complete:
        return plan, log
    if not devices.rank():
        resume.prune(args.proj_dir, args.keep, first)
        if not os.path.exists(os.path.join(args.proj_dir, "loss.png")):
            draw(args.proj_dir)  # it was killed while it did that
    print(
        f"{args.proj_dir}: this run is complete, {state.progress.step - first} steps; a higher --epoch_count than "
        f"{state.progress.step // plan.steps - args.epoch_begin} trains on"
    )
    return None


def run(args, device, built):
    """What `train` does when it holds the lock of proj_dir. built: what `build_model` makes on the meta device."""
    if not (settled := settle(args, built)):
        return
    plan, log = settled
    state, first, last, N, steps, epochs, paths = (
        plan.state,
        plan.first,
        plan.last,
        plan.N,
        plan.steps,
        plan.epochs,
        plan.paths,
    )
    shares = devices.shares(args.strategy)
    if device.type == "cpu" and shares[2]:
        memory.give_back_freed()
    model, saved_names, save_dtype = (
        build_shares(args, device) if shares[1] else build_model(args, device)
    )
    optimizer = make_optimizer(
        model,
        args.lr_init,
        (args.beta1, args.beta2),
        args.adam_eps,
        args.weight_decay,
        args.layerwise_lr,
        args.strategy,
    )
    compute = devices.wrap(model, loss_fn, args.strategy)
    autocast, scaler = precision(args, device)
    held_out_loss = functools.partial(
        val_loss,
        model,
        plan.held_out,
        args.micro_bsz,
        args.ctx_len,
        plan.loss_mask,
        autocast,
        args.train_type != "infctx",
        chunk_ctx(args),
        device,
    )
    weights = {name: p for name, p in model.named_parameters() if name in saved_names}
    progress = state.restore(weights, optimizer, scaler) if state else resume.Progress(first)
    saver = resume.Saver(
        args.proj_dir,
        args.keep,
        first,
        log,
        plan.about | {"args": vars(args), "wandb": log.wandb and log.wandb.id},
        progress,
        weights,
        optimizer,
        scaler,
        shares,
    )
    mine = range(devices.rank(), N, devices.size())  # this rank's micro batches of a step,
    silent = [data.silent()] * (
        len(range(0, N, devices.size())) - len(mine)
    )  # and what stands for one that only others have

    def step_data(i):
        """This rank's micro batches of step i, on the device; the counts of all ranks' ones; and their size in tokens."""
        micro = [plan.micro_batch(i * N + n) for n in mine] + silent
        tokens = devices.total([sum(idx.numel() for idx, _, _ in micro)])[0]
        return data.to_device(micro, device), count_tokens(micro), tokens

    describe(args, built[0], device, plan)
    log.open(progress, bool(state))
    if state:
        log.line(
            f"going on from {state.path}: step {progress.step} of {last}"
            + f", with other {', '.join(plan.changes)}" * bool(plan.changes)
            + f"; a step still has {N} micro batches, shared out among {devices.size()}"
            * (args.accumulate_grad_batches * devices.size() != N)
        )
    elif plan.held_out:
        print(f"held-out loss before training: {log.point(first, val_loss=held_out_loss()):.4f}")
    if plan.gone:
        saver.save_checkpoint(
            paths[progress.step], save_dtype
        )  # it was moved away, but the state has it

    missing = []
    with saver.rescue(), resume.unbroken() as check:
        for epoch in range((progress.step - bool(progress.losses)) // steps, epochs.stop):
            with tqdm(
                total=steps,
                initial=progress.step - epoch * steps,
                desc=f"epoch {epoch}",
                unit="step",
                dynamic_ncols=True,
                disable=devices.rank() > 0,
            ) as bar:
                prepared = None
                while (i := progress.step) < (epoch + 1) * steps:
                    started = time.perf_counter()
                    lr = learning_rate(
                        i,
                        first,
                        args.epoch_count * steps,
                        args.lr_init,
                        args.lr_final,
                        args.warmup_steps,
                    )
                    micro, counts, tokens = prepared or step_data(i)
                    losses = step(
                        model,
                        micro,
                        autocast,
                        scaler,
                        chunk_ctx(args),
                        args.bptt,
                        compute=compute,
                        counts=counts,
                    )
                    # While a GPU is still at it, the host prepares the next step. (An error there
                    # costs this step, too: the state that is saved then is the one before it.)
                    prepared = step_data(i + 1) if i + 1 < (epoch + 1) * steps else None

                    with saver.changing():
                        norm, scale = update(optimizer, scaler, lr, sum(losses))
                        # The step's only wait for the device.
                        *losses, norm, scale = torch.stack([*losses, norm, scale]).tolist()
                        losses = devices.in_turn(losses)[:N]
                        loss = sum(losses)
                        overflow = scale > 1 and math.isfinite(loss) and not math.isfinite(norm)
                        progress.count(loss, norm, overflow)
                    log.point(i, loss=loss, lr=lr)
                    if progress.bad_in_a_row:
                        log.line(
                            f"step {i} left out: loss {loss}, gradient norm {norm}; {data.suspects(plan.documents, losses, i * N, plan.rows)}"
                        )
                        progress.check()
                    check()
                    speed = tokens / (time.perf_counter() - started)
                    bar.set_postfix_str(
                        f"loss {loss:.3f}, lr {lr:.1e}, {speed:,.0f} tokens/s, {memory.peak(device) / 1e9:.1f} GB"
                    )
                    bar.update()
                    if (
                        args.save_steps
                        and progress.step % args.save_steps == 0
                        and progress.step < (epoch + 1) * steps
                    ):
                        saver.save_state()
                        check()
            log.line(
                f"epoch {epoch}: {progress.summary(last - first)}"
                + (
                    f", held-out loss {log.point(progress.step, val_loss=held_out_loss(check=check)):.4f}"
                    if plan.held_out
                    else ""
                )
            )
            if progress.step not in paths or saver.save_checkpoint(
                paths[progress.step], save_dtype
            ):
                progress.losses.clear()
            else:
                missing.append(paths[progress.step])
            if progress.step in paths or (args.save_steps and progress.step % args.save_steps == 0):
                saver.save_state()
            if progress.step < last:
                progress.losses.clear()
            check()
    said = log.close()
    if not devices.rank():
        conclude(
            args,
            paths[last],
            first,
            missing,
            f"{said}; peak memory {memory.peak(device) / 1e9:.2f} GB",
        )


def conclude(args, last, first, missing, said):
    """Say what was written, and what is next. ValueError where that is not the last checkpoint. missing: checkpoints that could not be saved."""
    if not os.path.exists(last):
        raise ValueError(
            f"{last}: could not be saved, as said above; "
            + (
                "mend that, then give the same command with --resume"
                if resume.states(args.proj_dir, first)
                else "neither could any state"
            )
        )
    if missing:
        print(f"note: {', '.join(missing)} could not be saved, as said above")
    print(f"wrote {last}{said}")
    if args.load_model:
        print(
            f"next: python {shlex.join(['merge.py', args.load_model, last, os.path.join(args.proj_dir, 'tuned.pth')])}"
        )


if __name__ == "__main__":
    devices.leave(lambda: run_cli(lambda: train(parse_args())))
