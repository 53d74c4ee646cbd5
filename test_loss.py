"""The loss against its plainest form: whole logits, whole batches."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import binidx
import build
import checkpoint
import data
from loss import HeadLoss, largest_of_rows, loss_fn
from passes import accumulate_gradients
from test_train import arguments, base_file, folder  # noqa: F401 (two are fixtures)


@pytest.mark.parametrize(
    "M, vocab_size, dtype, near",
    [
        (300, 40_000, torch.float64, 1e-12),
        (300, 40_000, torch.float32, 2e-5),
        (7, 50, torch.float32, 2e-5),
    ],
)
def test_head_loss_in_chunks_is_the_loss_on_whole_logits(M, vocab_size, dtype, near):
    torch.manual_seed(0)
    x = torch.randn(M, 24, dtype=dtype, requires_grad=True)
    head = torch.randn(vocab_size, 24, dtype=dtype, requires_grad=True)
    targets = torch.randint(vocab_size, (M,))
    weight = (torch.rand(M, dtype=dtype) - 0.3).clamp(0) / M
    l2 = torch.full((M,), 0.01, dtype=dtype)

    logits = x @ head.t()
    loss = F.cross_entropy(logits, targets, reduction="none") @ weight
    # The gradient of this adds 0.01 * the largest logit: the L2 wrap.
    l2_wrap = 0.01 / 2 * (logits.max(-1).values ** 2).sum()
    expected = torch.autograd.grad(loss + l2_wrap, [x, head])

    ours = HeadLoss.apply(x, head, targets, weight, l2, dtype)
    assert ours.item() == pytest.approx(loss.item(), rel=near)
    for grad, e in zip(torch.autograd.grad(ours, [x, head]), expected, strict=True):
        assert (grad - e).norm() <= near * e.norm()


@pytest.mark.parametrize("width", [1, 7, 256, 300, 1024])
def test_the_largest_of_a_row_is_the_first_of_equals(width):
    # Numbers from 0 to 4: there are ties in every row, within and across blocks.
    x = torch.randint(5, (50, width), generator=torch.Generator().manual_seed(0)).bfloat16()
    assert all(map(torch.equal, largest_of_rows(x), x.max(-1, keepdim=True)))


def test_a_frozen_head_gets_no_gradient_and_no_token_that_counts_is_no_loss():
    model = checkpoint.load_model("base.pth", torch.float32)
    ones = torch.ones(2, 5, dtype=torch.int64)
    model.head.requires_grad_(False)
    loss, _ = loss_fn(model, ones, ones, torch.zeros(2, 5))
    loss.backward()
    assert loss.item() == 0 and model.head.weight.grad is None
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


def test_a_held_out_loss_makes_no_gradient_of_a_trained_head():
    model = checkpoint.load_model("base.pth", torch.float32)
    ones = torch.ones(2, 5, dtype=torch.int64)
    batch = (ones, ones, torch.ones(2, 5))

    def products_with_the_logits() -> int:
        with FlopCounterMode(display=False) as counter:
            loss_fn(model, *batch)
        model_alone = FlopCounterMode(display=False)
        with model_alone:
            model.hidden(ones)
        flops = counter.get_total_flops() - model_alone.get_total_flops()
        return flops // (2 * ones.numel() * model.head.weight.numel())

    assert products_with_the_logits() == 3  # logits, and the gradients of x and of the head
    with torch.no_grad():
        assert products_with_the_logits() == 1


@pytest.mark.parametrize("loss_mask", ["pad", "none"])
def test_four_micro_batches_of_one_row_are_one_of_four(loss_mask):
    """Each is padded to its own length, or to ctx_len. Mask and L2 wrap see no difference."""
    model, *_ = build.build_model(arguments("--precision fp32"), torch.device("cpu"))
    # 32, 8, 29 and 11 tokens count.
    documents = [binidx.Binidx("x")[i] for i in (1, 3, 5, 7)]
    losses, grads = [], []
    for rows in ([documents], [[document] for document in documents]):
        model.zero_grad()
        micro_batches = [data.collate(row, 32, loss_mask) for row in rows]
        losses.append(sum(accumulate_gradients(model, micro_batches)).item())
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        grads.append({name: p.grad.clone() for name, p in trained.items()})
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    for name, grad in grads[0].items():
        assert (grad - grads[1][name]).norm() <= 1e-5 * grad.norm(), name
