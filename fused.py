"""Blocks through PyTorch's compiler (--compile), which fuses their passes over memory.

One need not read this to understand Bone. Between two matrix products a block adds, scales, casts,
norms and regroups. In eager PyTorch each of these operators reads its operands from memory, and
writes its result there. The compiler traces `Block.branches`, forward and backward, and makes one
kernel of each chain of such operators. What is not read and written again is time won.

All blocks are one function of their weights, so it is compiled once for all of them, for rows of
any length. PyTorch keeps what it has compiled on disk.

The compiler also decides which activations to keep for the backward pass, and which to compute
again, within a budget. --grad_cp sets that budget, in place of torch.utils.checkpoint, which does
the same for eager blocks.
"""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch._dynamo.config
import torch._functorch.config
import torch._inductor.config
from torch import Tensor, nn
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor.compile_fx import compile_fx
from torch._inductor.custom_graph_pass import CustomPartitionerFn, get_hash_for_files
from torch.fx import GraphModule
from torch.utils.checkpoint import CheckpointPolicy

import devices
import quant
from loss import Batch
from passes import Passes, accumulate_gradients, chunk_losses
from plan import RunPlan
from rwkv6 import RWKV, BlockState
from training_data import longest_row

# A budget is a share of the activations that the compiler would like to keep. This one holds the
# results of all matrix products. Whatever else the backward pass needs follows from these in a few
# fused passes: a step with a higher budget takes more memory, and is no faster.
BUDGET_OF_PRODUCTS = 0.35

Branches = Callable[[Tensor, BlockState], tuple[Tensor, BlockState]]


# ---- quantized weights -------------------------------------------------------------------------

# On a CPU the compiler would make a loop of the look-up in nf4's table that takes three times as
# long. So there dequantizing is one operator, into which it does not look. For GPUs it makes a good
# kernel of it.


@torch.library.custom_op("quant::dequantize", mutates_args=())
def _dequantize(
    codes: Tensor, scale: Tensor, *, kind: str, shape: Sequence[int], dtype: torch.dtype
) -> Tensor:
    return quant.dequantize(codes, scale, kind=kind, shape=shape, dtype=dtype)


@_dequantize.register_fake
def _fake_dequantize(
    codes: Tensor, scale: Tensor, *, kind: str, shape: Sequence[int], dtype: torch.dtype
) -> Tensor:
    return codes.new_empty(shape, dtype=dtype)


class KeepNoDequantizedWeight(CustomPartitionerFn):
    """PyTorch's partitioner, which cuts the traced graph into forward and backward pass.

    What it keeps in between may be activations, but nothing that follows from codes alone.
    """

    products = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)

    def __call__(
        self, gm: GraphModule, joint_inputs: Sequence[object], **options: Any
    ) -> tuple[GraphModule, GraphModule]:
        follows_from_codes = set()
        for node in gm.graph.nodes:
            if node.op == "placeholder":
                value = node.meta["val"]
                if isinstance(value, Tensor) and value.dtype in (torch.int8, torch.uint8):
                    follows_from_codes.add(node)
                continue
            follows = not follows_from_codes.isdisjoint(node.all_input_nodes)
            if follows and node.target not in self.products:
                follows_from_codes.add(node)
                node.meta["recompute"] = CheckpointPolicy.MUST_RECOMPUTE
        return min_cut_rematerialization_partition(gm, joint_inputs, **options)

    def uuid(self) -> Any:
        """Return what tells PyTorch's cache on disk whether this partitioner has changed."""
        return get_hash_for_files((__file__,))


# ---- compiling ---------------------------------------------------------------------------------


def compile_blocks(model: RWKV, grad_cp: float, compiler: Callable[..., Any] = compile_fx) -> None:
    """Have the blocks run as compiled code, which is made when one first runs.

    grad_cp: the share of the results of matrix products that the backward pass computes again, from
    0 to 1. compiler: a backend of torch.compile; by default Inductor, which makes fused kernels.
    RuntimeError, from the run, where the compiler cannot take a block.
    """
    budget = BUDGET_OF_PRODUCTS * (1 - grad_cp)

    def backend(graph: GraphModule, inputs: list[Tensor]) -> Callable:
        with (
            torch._functorch.config.patch(activation_memory_budget=budget),
            # deterministic: kernels are chosen without timing them, and a resumed run has the same.
            torch._inductor.config.patch(
                deterministic=True, custom_partitioner_fn=KeepNoDequantizedWeight()
            ),
        ):
            return compiler(graph, inputs)

    model.grad_cp = False
    if model.head.weight.device.type != "cpu":
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            quant.nf4_pairs(model.head.weight.device, dtype)  # which tracing could not make
    # Block 0 may differ, and so do held-out loss, and a row's first chunk and the others.
    torch._dynamo.config.recompile_limit = 32
    block: Any
    for block in model.blocks:
        # A first block without time mix (pre_ffn) is another function, and stays eager.
        if hasattr(block, "att"):
            branches = torch.compile(block.branches, backend=backend, fullgraph=True, dynamic=True)
            block.branches = with_whole_state(branches, model)


def with_whole_state(branches: Branches, model: RWKV) -> Branches:
    """Give `branches` zeros where a row begins and has no state: that would be another function."""

    def call(x: Tensor, state: BlockState) -> tuple[Tensor, BlockState]:
        att_last, wkv_state, ffn_last = state
        if att_last is None:
            att_last, ffn_last = x.new_zeros(2, *x[:, 0].shape)
        if wkv_state is None:
            wkv_state = model.empty_wkv_state(x)
        return branches(x, (att_last, wkv_state, ffn_last))

    return call


def try_to_compile(model: RWKV, passes: Passes, plan: RunPlan, *, device: torch.device) -> None:
    """Compile the blocks of a run, before its first step; where that fails, say why, and do not.

    What may run is run once: a step on the longest rows, and the held-out loss. The norm of that
    step's gradients is compared with the eager blocks', since a wrong one would stay unseen.
    """
    options = plan.options
    if devices.rank() == 0:
        print("compiling the blocks, once: a minute or two, and seconds when it was done before")
    start = time.monotonic()
    batch = longest_batch(model, passes, plan, device=device)
    alone = dataclasses.replace(
        passes, ranks=1, max_over_ranks=int, engine=None, no_gradient_sync=contextlib.nullcontext
    )

    def gradient_norm() -> float:
        accumulate_gradients(model, [batch], alone)
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        model.zero_grad()
        return nn.utils.get_total_norm(gradients).item()

    model.grad_cp = True
    problem = ""
    try:
        with two_blocks(model):
            expected = gradient_norm()
        compile_blocks(model, options.grad_cp)
        with two_blocks(model):
            norm = gradient_norm()
            if plan.data.held_out:
                chunk_losses(model, batch, alone)
        # Rounding otherwise, in 16 bits, changes it by some percent.
        if not 0.8 * expected <= norm <= 1.25 * expected:
            problem = f"it gave a gradient norm of {norm:.3g}, and eager blocks {expected:.3g}"
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        cause = getattr(error, "inner_exception", error)
        problem = str(cause).strip().partition("\n")[0] or type(cause).__name__
    # Where one rank cannot, none does.
    somewhere = devices.max_over_ranks([float(problem != "")])[0]
    if somewhere:
        run_eager(model, options.grad_cp)
    if devices.rank() == 0:
        if somewhere:
            problem = problem or "on another rank"
            print(f"note: PyTorch's compiler failed, so the blocks run without: {problem}")
        else:
            print(f"compiled in {time.monotonic() - start:.0f} s")


def run_eager(model: RWKV, grad_cp: float) -> None:
    """Take back what compile_blocks did, in no more memory than compiled blocks would take."""
    for block in model.blocks:
        vars(block).pop("branches", None)
    model.grad_cp = True
    model.keep_products = grad_cp == 0
    model.zero_grad()


@contextlib.contextmanager
def two_blocks(model: RWKV) -> Iterator[None]:
    """Leave the model its first two blocks, and give it all of them back."""
    blocks = model.blocks
    model.blocks = blocks[:2]
    try:
        yield
    finally:
        model.blocks = blocks


def longest_batch(model: RWKV, passes: Passes, plan: RunPlan, *, device: torch.device) -> Batch:
    """Make a batch of the longest rows that a run may have; of chunked rows, three chunks."""
    options = plan.options
    tokens = longest_row(options, plan.data.documents)
    if passes.chunk_ctx:
        tokens = min(tokens, 3 * passes.chunk_ctx)  # the first, another, the last
    # Each differs from the one before it, or mixing the two would have no gradient.
    idx = torch.arange(options.micro_bsz * tokens, device=device) % model.config.vocab_size
    idx = idx.view(options.micro_bsz, tokens)
    return idx, idx, torch.ones(idx.shape, device=device)
