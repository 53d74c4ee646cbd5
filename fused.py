"""Blocks through PyTorch's compiler (--compile), which fuses their passes over memory.

One need not read this to understand Bone. Between two matrix products a block adds, scales, casts,
norms and regroups. In eager PyTorch each of these operators reads its operands from memory, and
writes its result there. The compiler traces `Block.branches`, forward and backward, and makes one
kernel of each chain of such operators. What is not read and written again is time won.

All blocks are one function of their weights, so it is compiled once for all of them, and for rows
of any length. PyTorch keeps what it has compiled on disk.

The compiler also decides which activations to keep for the backward pass, and which to compute
again, within a budget. --grad_cp sets that budget, in place of torch.utils.checkpoint, which does
the same for eager blocks.
"""

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch._dynamo.config
import torch._functorch.config
import torch._inductor.config
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.eval_frame import remove_from_cache
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor.compile_fx import compile_fx
from torch._inductor.custom_graph_pass import CustomPartitionerFn, get_hash_for_files
from torch._inductor.decomposition import select_decomp_table
from torch.fx import GraphModule
from torch.utils.checkpoint import CheckpointPolicy, checkpoint

import devices
import quant
from loss import Batch
from passes import Passes, accumulate_gradients, chunk_losses
from plan import RunPlan
from rwkv6 import RWKV, Block, BlockState
from training_data import longest_row
from wkv6 import why_no_kernel

# A budget is a share of the activations that the compiler would like to keep. This one holds the
# results of all matrix products. Whatever else the backward pass needs follows from these in a few
# fused passes: a step with a higher budget takes more memory, and is no faster.
BUDGET_OF_PRODUCTS = 0.35

Branches = Callable[[Tensor, BlockState], tuple[Tensor, BlockState]]


# ---- quantized weights -------------------------------------------------------------------------


class KeepNoDequantizedWeight(CustomPartitionerFn):
    """PyTorch's partitioner, which cuts the traced graph into forward and backward pass.

    What it keeps in between may be activations, but no dequantized weight, nor a part of one:
    nothing that is computed from codes, up to the product that such a weight is for.
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
        """Return what tells PyTorch's cache on disk that this file has changed, and all in it."""
        return get_hash_for_files((__file__,))


# ---- sums over tokens --------------------------------------------------------------------------


def sum_of_rows(
    x: Tensor, dim: list[int] | None, keepdim: bool = False, *, dtype: torch.dtype | None = None
) -> Tensor:
    """Stand in for x.sum(dim, keepdim) on a CPU: 16 rows at a time, then those sums.

    The gradient of whatever all tokens share is a sum over the rows of x (..., tokens, C). The
    compiler's loop goes down a few columns at a time, so that each row touches another page of
    memory. Sixteen whole rows stay in the cache, and take a third of the time.
    """
    if x.ndim < 2:
        return NotImplemented
    rows = x.ndim - 2
    dims = {d % x.ndim for d in dim or []}
    # Sizes of a batch are not known when compiling.
    over_tokens = rows in dims and rows + 1 not in dims and isinstance(x.shape[rows], torch.SymInt)
    if dtype or not over_tokens or x.device.type != "cpu" or not x.is_floating_point():
        return NotImplemented  # an ordinary sum
    wide = torch.promote_types(x.dtype, torch.float32)
    # Pad by 16 more, so that there are two groups at least: a size of 1 would be compiled apart.
    x = F.pad(x, (0, 0, 0, 16 + -x.shape[rows] % 16)).unflatten(rows, (-1, 16))
    return x.sum(rows + 1, dtype=wide).sum(dim, keepdim, dtype=wide).to(x.dtype)


def decompositions() -> dict[Any, Callable[..., Any]]:
    """Return how the compiler takes operators apart, {operator: function of simpler ones}."""
    return {**select_decomp_table(), torch.ops.aten.sum.dim_IntList: sum_of_rows}


# ---- compiling ---------------------------------------------------------------------------------


def inductor(graph: GraphModule, inputs: list[Tensor]) -> Any:
    """Compile a graph by PyTorch's own compiler, which makes fused kernels."""
    return compile_fx(graph, inputs, decompositions=decompositions())


def compile_blocks(model: RWKV, grad_cp: float, compiler: Callable[..., Any] = inductor) -> None:
    """Have the blocks run as compiled code.

    Each is compiled when it first runs; that may raise whatever the compiler raises.

    grad_cp: the share of the results of matrix products that the backward pass computes again, from
    0 to 1. compiler: the backend of torch.compile.
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
            # The table has to be there: it cannot be made while a block is traced.
            quant.nf4_pairs(model.head.weight.device, dtype)
    # Each of these is compiled separately: block 0, whose input needs no gradient; held-out loss; a
    # row's first chunk, and the others; a batch of one row.
    torch._dynamo.config.recompile_limit = 32
    remove_from_cache(Block.branches)  # what an earlier model in this process had compiled
    block: Any
    for block in model.blocks:
        if hasattr(block, "att"):
            branches = torch.compile(block.branches, backend=backend, fullgraph=True, dynamic=True)
            block.branches = with_whole_state(block.branches, branches, model)
        elif grad_cp:
            # A first block without time mix (pre_ffn) is another function, and stays eager.
            options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
            block.branches = functools.partial(checkpoint, block.branches, **options)


def with_whole_state(eager: Branches, compiled: Branches, model: RWKV) -> Branches:
    """Return `compiled` with zeros where a row begins and has no state: one function for both.

    eager: takes single tokens, which would be a function of their own.
    """

    def call(x: Tensor, state: BlockState) -> tuple[Tensor, BlockState]:
        att_last, wkv_state, ffn_last = state
        if att_last is None:
            att_last, ffn_last = x.new_zeros(2, *x[:, 0].shape)
        if wkv_state is None:
            wkv_state = model.empty_wkv_state(x)
        # Any B and any T, even where the first to be seen is as large as C.
        torch._dynamo.maybe_mark_dynamic(x, (0, 1))
        branches = compiled if x.shape[1] > 1 else eager
        return branches(x, (att_last, wkv_state, ffn_last))

    return call


def try_to_compile(model: RWKV, passes: Passes, plan: RunPlan, *, device: torch.device) -> None:
    """Compile the blocks of a run, before its first step; where that fails, say why, and do not.

    WKV-6 has to have its kernel: other forms would be compiled again for each length of rows.
    """
    options = plan.options
    start = time.monotonic()
    problem = why_no_kernel(device.type, model.config.head_size)
    problem = problem or try_compiled(model, passes, plan, device=device)
    # Where one rank cannot, none does.
    failed_somewhere = devices.max_over_ranks([float(problem != "")])[0]
    if failed_somewhere:
        # args.json, the log and the states are to say it, so that a resumed run is the same.
        options.compile, options.grad_cp = 0, 0.5 if options.grad_cp == 0 else 1
        run_eager(model, options.grad_cp)
        print(f"note: the blocks run without being compiled: {problem or 'another rank cannot'}")
    else:
        print(f"compiled in {time.monotonic() - start:.0f} s")


def try_compiled(model: RWKV, passes: Passes, plan: RunPlan, *, device: torch.device) -> str:
    """Compile the blocks, and run once what may run: a step on the longest rows, held-out loss.

    The gradients of that step are compared with those of eager blocks, since wrong ones would stay
    unseen. Returns "", or what went wrong.
    """
    print("compiling the blocks: a minute or two the first time, seconds afterwards")
    options = plan.options
    batch = longest_batch(model, passes, plan)
    passes_of_trial = dataclasses.replace(
        passes,
        # The scale with which a run begins may be too large.
        scaler=torch.amp.GradScaler(
            device.type, init_scale=1024, enabled=passes.scaler.is_enabled()
        ),
        ranks=1,
        max_over_ranks=int,
        engine=None,
        no_gradient_sync=contextlib.nullcontext,
    )
    model.grad_cp = True
    with two_blocks(model):
        expected = block_gradients(model, batch, passes_of_trial)
    try:
        compile_blocks(model, options.grad_cp)
        with two_blocks(model):
            problem = difference(block_gradients(model, batch, passes_of_trial), expected)
            if problem:
                return problem
            if plan.data.held_out:
                # The last batch of held-out rows may be smaller, down to one row.
                for rows in {1, options.micro_bsz}:
                    idx, targets, mask = (x[:rows] for x in batch)
                    chunk_losses(model, (idx, targets, mask), passes_of_trial)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a compiler's faults have no common class
        return f"PyTorch's compiler failed: {first_line(getattr(error, 'inner_exception', error))}"
    return ""


def run_eager(model: RWKV, grad_cp: float) -> None:
    """Take back what compile_blocks did. grad_cp: 1, or 0.5 to keep products."""
    for block in model.blocks:
        vars(block).pop("branches", None)
    model.grad_cp = True
    model.keep_products = grad_cp < 1
    model.zero_grad()


def first_line(error: Exception) -> str:
    if isinstance(error, torch.OutOfMemoryError):
        raise error
    return str(error).strip().partition("\n")[0] or type(error).__name__


def block_gradients(model: RWKV, batch: Batch, passes: Passes) -> dict[str, Tensor]:
    """Return the gradients of the blocks' parameters, {name: gradient}; the model keeps none."""
    accumulate_gradients(model, [batch], passes)
    named = model.blocks.named_parameters()
    gradients = {name: p.grad for name, p in named if p.grad is not None}
    model.zero_grad()
    return gradients


def difference(found: dict[str, Tensor], expected: dict[str, Tensor]) -> str:
    """Name a gradient that differs from the expected one by more than rounding; "" if none does."""
    total = nn.utils.get_total_norm(list(expected.values()))
    for name, gradient in expected.items():
        # Rounding in 16 bits was seen to change a gradient by up to 6 percent.
        tolerance = 0.2 * gradient.norm() + 1e-6 * total
        if name not in found or not (found[name] - gradient).norm() <= tolerance:
            return f"PyTorch's compiler failed: the gradient of blocks.{name} is wrong"
    return ""


@contextlib.contextmanager
def two_blocks(model: RWKV) -> Iterator[None]:
    """Leave the model its first two blocks, and give it all of them back."""
    blocks = model.blocks
    model.blocks = blocks[:2]
    try:
        yield
    finally:
        model.blocks = blocks


def longest_batch(model: RWKV, passes: Passes, plan: RunPlan) -> Batch:
    """Make a batch of the longest rows that a run may have; of chunked rows, three chunks."""
    options = plan.options
    tokens = longest_row(options, plan.data.documents)
    if passes.chunk_ctx:
        tokens = min(tokens, 3 * passes.chunk_ctx)  # the first, another, the last
    # Neighbouring tokens differ: if they were equal, mixing them would have no gradient.
    idx = torch.arange(options.micro_bsz * tokens) % model.config.vocab_size
    idx = idx.view(options.micro_bsz, tokens)
    return idx, idx, torch.ones(idx.shape)
