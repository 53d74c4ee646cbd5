"""From the command line to what is trained: the model with its trained parameters, the data, the precision, and the memory that all of it takes."""

import argparse
import contextlib
import importlib.util
import itertools
import math
import os

import torch

import bone
import checkpoint
import corpus
import devices
import memory
import rwkv6
import tokenizer
from archive import read_checkpoint, trained_quant
from loss import LOGITS, apart, loss_fn, tensors
from quant import Quantized

DTYPES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "tf32": torch.float32,
}  # of frozen matrices, by --precision


def build_model(args, device):
    """The model with exactly the trained parameters requiring gradients, as float32; the names to save, and in which dtype.
    What a --bone_load checkpoint had trained is saved again, even where it is not trained any further: merging needs it."""
    args.quant = trained_quant(args.bone_load, args.quant)
    torch.manual_seed(args.random_seed)
    if not args.load_model:
        with torch.device("meta" if device.type == "meta" else "cpu"):
            model = rwkv6.init_model(
                args.n_layer,
                args.n_embd,
                args.vocab_size or 65536,
                device=device,
                version=args.my_testing or "x060",
                pre_ffn=bool(args.pre_ffn),
                head_qk=args.head_qk or 0,
            )
        trained, save_dtype = dict(model.named_parameters()).keys(), DTYPES[args.precision]
    else:
        loaded = read_checkpoint(args.bone_load) if args.bone_load else {}
        r, mode = (
            checkpoint.rank_and_mode(loaded, args.bone_load)
            if loaded
            else (args.bone_r or 64, args.bone_mode or "bat")
        )
        model = checkpoint.load_model(args.load_model, DTYPES[args.precision], device, args.quant)
        config = vars(model.config) | {"my_testing": model.config.version}
        for flag, value, path in (
            ("bone_r", r, args.bone_load),
            ("bone_mode", mode, args.bone_load),
            *(
                (flag, config[flag], args.load_model)
                for flag in ("n_layer", "n_embd", "vocab_size", "my_testing", "pre_ffn", "head_qk")
            ),
        ):
            given = getattr(args, flag)
            if given not in (None, value) and (flag, given) != ("vocab_size", 0):
                raise ValueError(
                    f"{path}: has {flag} {value}, but --{flag} is {given}; drop --{flag} to use {value}"
                )
            setattr(args, flag, value)
        checkpoint.load_bone(model, args.bone_load) if args.bone_load else bone.add_bone(
            model, r, mode
        )
        for name, p in model.named_parameters():
            if not name.endswith(".bone") and any(part in name for part in args.train_parts):
                p.data = p.data.float()
                p.requires_grad_(True)
        trained = {name for name, p in model.named_parameters() if p.requires_grad} | loaded.keys()
        save_dtype = read_checkpoint(args.load_model, verify=False)["emb.weight"].dtype
    model.grad_cp, model.keep_products = bool(args.grad_cp), args.train_type == "infctx"
    if model.config.head_qk and model.keep_products:
        raise ValueError(
            "--train_type infctx: head_qk looks at every earlier token, so that no state can stand for them; leave infctx out"
        )
    for time_mix in model.modules():
        if args.fla and isinstance(time_mix, rwkv6.TimeMix):
            time_mix.impl = (
                "fla" if device.type != "cpu" and importlib.util.find_spec("fla") else "chunked"
            )
    return model, trained, save_dtype


@torch.no_grad()
def build_shares(args, device):
    """What `build_model` makes, shared out among the ranks; where that is the base, too: made without data, then filled tensor by tensor, so that no
    rank ever holds the whole."""
    if not args.load_model or not devices.shares(args.strategy)[2]:
        model, *_ = built = build_model(args, device)
        devices.shard(model, args.strategy, device)
        return built
    model, *_ = built = build_model(args, torch.device("meta"))
    devices.shard(model, args.strategy, device)
    model.to_empty(device="cpu" if args.strategy.endswith("offload") else device)
    parameters = dict(model.named_parameters())
    loaded = read_checkpoint(args.bone_load) if args.bone_load else {}
    for name in [name for name in parameters if name.endswith(".bone")]:
        parameters[name].zero_()
    for name, tensor in itertools.chain(
        checkpoint.stream(
            args.load_model, model.config, DTYPES[args.precision], device, args.quant
        ),
        loaded.items(),
    ):
        whole = (
            {f"{name}.{key}": buffer for key, buffer in tensor.named_buffers()}
            if isinstance(tensor, Quantized)
            else {name: tensor}
        )
        for key, values in whole.items():
            parameters[key].copy_(devices.part(values.view(parameters[key].shape), parameters[key]))
    return built


def count(model):
    """Numbers of trained parameters and of all, the quantized ones included."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return trained, sum(math.prod(shape) for shape in checkpoint.weight_shapes(model).values())


def precision(args, device):
    """The autocast of --precision, and the gradient scaler, which only fp16 needs."""
    dtype = DTYPES[args.precision]
    torch.set_float32_matmul_precision(
        "high" if args.precision == "tf32" else "highest"
    )  # of a GPU's products
    # Bone's small terms rely on sums in float32 inside of a product.
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    half = dtype != torch.float32
    autocast = torch.autocast(device.type, dtype if half else torch.bfloat16, enabled=half)
    return autocast, torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)


def emulates_bf16(device):
    """Whether a GPU has no bfloat16 of its own: CUDA then computes it in float32, at a loss of speed."""
    if device.type != "cuda":
        return False
    return not torch.cuda.is_bf16_supported(including_emulation=False)


def open_documents(args, vocab_size=None):
    """Training and held-out data, None where there is none. What characters mean is said by a vocab.json beside the base or in proj_dir."""
    kind, vocabulary = args.data_type or corpus.kind_of(args.data_file), None
    if kind in tokenizer.CHARACTERS:
        found, here = (
            os.path.join(folder, "vocab.json")
            for folder in (os.path.dirname(args.load_model), args.proj_dir)
        )
        if args.load_model and not os.path.exists(found):
            raise ValueError(
                f"{args.load_model}: has no vocab.json beside it that says which characters it reads. "
                "A World model reads none: write the text as a .jsonl"
            )
        vocabularies = [
            tokenizer.read_vocabulary(path)
            for path in (found, here)
            if os.path.exists(path) and (args.load_model or path == here)
        ]
        if len({*vocabularies}) > 1:
            raise ValueError(f"{here}: has other characters than {found}; give another --proj_dir")
        vocabulary = next(iter(vocabularies), None)
    documents = corpus.open_data(args.data_file, vocab_size, kind, args.ctx_len, vocabulary)
    if documents.vocabulary and vocab_size not in (None, documents.vocab_size()):
        raise ValueError(
            f"{args.data_file or kind}: has {documents.vocab_size()} characters, but the model's vocabulary is {vocab_size}; "
            + (
                "take the vocab.json that it was trained with"
                if args.load_model
                else "drop --vocab_size"
            )
        )
    if kind in tokenizer.CHARACTERS and (kind == "dummy" or not args.data_type):
        kind = "utf-16le" if corpus.kind_of(args.val_file) == "utf-16le" else "utf-8"
    return documents, corpus.open_data(
        args.val_file, vocab_size, kind, args.ctx_len, documents.vocabulary
    ) if args.val_file else None


def chunk_ctx(args):
    """Tokens that go through the model at once; 0: whole rows."""
    return args.chunk_ctx if args.train_type == "infctx" else 0


def ranks(args):
    """How many there are, or will be."""
    return max(devices.size(), args.devices * args.num_nodes)


def longest_row(args):
    """Tokens of the longest row that the model will see. With infctx the data says it, since no document is cut."""
    if args.train_type == "none" or args.dataload == "get" or not args.data_file:
        return args.ctx_len
    longest = int(open_documents(args)[0].sizes.max()) - 1
    return max(longest, args.ctx_len) if args.loss_mask == "none" else max(longest, 1)


def expected_memory(args, device, longest=None):
    """What `build_model` makes on the meta device, and {part: bytes} of what its training takes at the peak, on rows of `longest` tokens."""
    built, (autocast, _), longest, n = (
        build_model(args, torch.device("meta")),
        precision(args, device),
        longest or longest_row(args),
        ranks(args),
    )
    at_once = min(longest, chunk_ctx(args) or longest)
    parts_of_gradients = n if devices.shares(args.strategy, n)[1] else 1
    earlier = (
        args.accumulate_grad_batches > 1 or at_once < longest or n > parts_of_gradients
    )  # DDP keeps their place from step to step

    def outputs(model, tokens):
        idx = torch.zeros(args.micro_bsz, tokens, dtype=torch.int64, device=device)
        mask = torch.ones(idx.shape, device=device)
        with autocast:
            if at_once == longest:
                return [loss_fn(model, idx, idx, mask, 1, idx.numel())]
            with torch.no_grad():
                _, state = model.hidden(idx[:, :1], model.empty_state())
            state = apart(state, requires_grad=True)
            value, after = loss_fn(model, idx, idx, mask, 1, idx.numel(), state)
            return [value, *tensors(after)]

    def parts_of(tokens):
        model, *_ = build_model(args, torch.device("meta"))  # which has other tensors afterwards
        return memory.expected(
            model,
            lambda: outputs(model, tokens),
            device,
            accumulate=earlier,
            gradient_shards=parts_of_gradients,
        )

    few = (
        max(4096, LOGITS // built[0].config.vocab_size) // args.micro_bsz + 1
    )  # from here on memory grows in proportion; to run more takes minutes
    if at_once <= 2 * few:
        parts = parts_of(at_once)
    else:
        parts = {
            part: size + (more - size) / few * (at_once - few)
            for (part, size), more in zip(parts_of(few).items(), parts_of(2 * few).values())
        }
    if at_once < longest:
        chunks = -(-longest // at_once)
        together = min(
            args.bptt or chunks, chunks
        )  # and where there are several groups, the states before and after the group
        parts["states between chunks"] = (together - 2 + 2 * (together < chunks)) * built[
            0
        ].state_bytes(args.micro_bsz)  # one more is in `outputs`
    parts = devices.memory_of_one(parts, built[0], args.strategy, n)
    return built, parts | memory.beside_tensors(parts, device)


def check_memory(args, device):
    """What is trained, and the memory that takes: printed with --dry_run, or where it is not there, which is a ValueError before anything
    is loaded. Returns what `build_model` makes on the meta device."""
    (model, *_), parts = built, _ = expected_memory(args, device)
    need, here = sum(parts.values()), int(os.environ.get("LOCAL_WORLD_SIZE", args.devices))
    free = memory.available(device) / (here if device.type == "cpu" else 1)
    if args.dry_run or need > free:
        print(model.config)
        if (n := ranks(args)) > 1:
            print(f"each of {n} ranks, by {devices.engine(args.strategy)}:")
        trained, total = count(model)
        for what, number in (("trained", trained), ("frozen", total - trained)):
            size = sum(
                t.nbytes for t in memory.tensors(model) if t.requires_grad == (what == "trained")
            )
            print(f"{what:<26}{size / 1e9:8.2f} GB   {number:,} parameters")
        for part, size in [
            *parts.items(),
            ("expected peak", need),
            (f"free on {device.type}: {'it fits' if need <= free else 'too little'}", free),
        ]:
            print(f"{part:<26}{size / 1e9:8.2f} GB")
    if need > free:
        longest = longest_row(args)

        def need_with(name, value):
            with contextlib.suppress(ValueError):  # of a flag that this model cannot take
                return sum(
                    expected_memory(
                        argparse.Namespace(**vars(args) | {name: value}),
                        device,
                        value if name == "ctx_len" else longest,
                    )[1].values()
                )
            return need

        shorter = (
            ("chunk_ctx", -(-args.chunk_ctx // 2))
            if chunk_ctx(args)
            else ("ctx_len", -(-args.ctx_len // 2))
        )
        more = [("train_type", "infctx")] * (args.ctx_len > args.chunk_ctx) + [
            ("strategy", "deepspeed_stage_3")
        ] * (ranks(args) > 1)
        changes = [("grad_cp", 1), ("micro_bsz", 1), shorter, *more] + [("quant", "nf4")] * bool(
            args.load_model
        )
        less, flag = min((need_with(*change), "--{} {}".format(*change)) for change in changes)
        advice = (
            f"what helps most is {flag}, with which it would take {less / 1e9:.2f} GB"
            if less < need
            else "no flag helps: take a smaller model"
        )
        raise ValueError(
            f"training would take {need / 1e9:.2f} GB, but {free / 1e9:.2f} GB are free; {advice}"
        )
    if device.type == "cpu" and need > free / 2:
        memory.give_back_freed()
    return built
