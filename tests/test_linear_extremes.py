"""linear_unlearn_loss at its edges: logits up to 1e4, probabilities next to 0 and 1, no rows, one, odd vocabularies."""

import math

import pytest
import torch
from helpers.linear_head import DRAWS, rows_problem
from helpers.losses import assert_law_of_draws, label, need, run, squared
from helpers.marks import slow_when

import gfast
from gfast.objectives import GA, NPO, TNPO, WGA, SatImp
from gfast.ops.linear_unlearn_loss import linear_unlearn_loss_reference

IMPLS = ["reference", "cpp"]  # test_triton.py has the edges of its kernels; interpreted, these would take minutes
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def check(draws, objective, impl, chunk_rows=None):
    """Finite, by the law, and returned: each draw's loss and gradients of hidden, weight and bias.

    draws: (hidden, weight, bias) and labels of each."""
    results = []
    for inputs, labels in draws:
        dtype, ref = inputs[0].dtype, torch.linspace(-9, -0.1, len(labels), dtype=torch.float64)

        def ours(h, w, b):
            options = dict(bias=b, ref_logp=ref, chunk_rows=chunk_rows, impl=impl)  # noqa: B023
            return gfast.linear_unlearn_loss(h, w, labels, objective, **options)  # noqa: B023

        def literal(h, w, b):
            return linear_unlearn_loss_reference(h, w, labels, objective, bias=b, ref_logp=ref)  # noqa: B023

        found = run(ours, inputs)
        assert [x.dtype for x in found[1:]] == [dtype] * 3
        assert all(x.isfinite().all() for x in found)
        results.append((found, run(literal, inputs), run(literal, [x.double() for x in inputs])))
    assert_law_of_draws(results, dtype, impl)
    return [found for found, _, _ in results]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("objective", [WGA(0.5), TNPO(0.7), NPO(0.3), squared], ids=label)
@pytest.mark.parametrize("n, V", [(0, 33), (1, 1), (5, 1), (1, 33), (1, 4099), (7, 4099)])
def test_few_rows_and_odd_vocabularies(n, V, objective, dtype, impl):
    need("linear_unlearn_loss", impl, "cpu", dtype)
    draws = []
    for seed in range(DRAWS if n else 1):
        *inputs, labels = rows_problem(n, 24, V, dtype, seed)
        labels[n // 2 :] = V - 1  # the last entry, in whatever is left over behind whole vectors
        draws.append((inputs, labels))
    for loss, *grads in check(draws, objective, impl, chunk_rows=3):
        if n == 0:
            assert loss == 0
        if n == 0 or V == 1:  # p is 1 whatever the logit is
            assert all((grad == 0).all() for grad in grads)


@slow_when(lambda p: p.rows not in (1, 7))
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("rows", [1, 2, 3, 5, 7, 15])
def test_a_chunk_of_few_rows_is_summed_as_exactly_as_many(rows, impl):
    """Long sums, over the vocabulary and over the width: the errors are held against the product of all rows at once,
    as a library sums it that has too few of them to fill its registers."""
    need("linear_unlearn_loss", impl, "cpu", torch.float32)
    for width, vocab in ((16, 32768), (8192, 256)):
        results = []
        for seed in range(DRAWS // 4):
            hidden, weight, _, labels = rows_problem(32, width, vocab, torch.float32, seed)

            def ours(h, w):
                return gfast.linear_unlearn_loss(h, w, labels, WGA(0.5), chunk_rows=rows, impl=impl)  # noqa: B023

            def literal(h, w):
                return linear_unlearn_loss_reference(h, w, labels, WGA(0.5))  # noqa: B023

            inputs = hidden, weight
            results.append([run(ours, inputs), run(literal, inputs), run(literal, [x.double() for x in inputs])])
        assert_law_of_draws(results, torch.float32, f"{impl} {width}")


def whole_logits(n, D, V):
    """hidden, weight, bias and logits: multiples of 32, to beyond 1e4, which fp32 sums exactly in any order. A tie is
    a tie for everyone: random logits of this size would leave the errors to chance, in the one row that nearly ties."""
    g = torch.Generator().manual_seed(0)
    hidden = torch.randint(-4, 5, (n, D), generator=g).double() * 8
    weight = torch.randint(-4, 5, (V, D), generator=g).double() * 4
    bias = torch.randint(-4, 5, (V,), generator=g).double() * 32
    return hidden, weight, bias, hidden @ weight.T + bias


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("objective", [GA(), WGA(0.5), SatImp(2.0, 1.0), TNPO(0.7), NPO(0.3), squared], ids=label)
def test_logits_of_1e4(objective, dtype, impl):
    need("linear_unlearn_loss", impl, "cpu", dtype)
    *inputs, logits = whole_logits(9, 200, 700)
    assert logits.abs().max() > 1e4
    labels = torch.randint(0, 700, (9,), generator=torch.Generator().manual_seed(1))
    labels[:3] = logits[:3].argmax(1)  # p is 1 to every digit
    labels[3:6] = logits[3:6].argmin(1)  # log p is -2e4, p is 0
    check([([x.to(dtype) for x in inputs], labels)], objective, impl, chunk_rows=4)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("objective, power", [(GA(), 0), (WGA(1.0), 1), (squared, 2)], ids=["GA", "WGA", "callable"])
@pytest.mark.parametrize("target", [30.0, 12.0, -30.0])
def test_the_target_entry_keeps_its_relative_accuracy(target, objective, power, dtype, impl):
    """As in test_ops_losses.py, on the way into dH and dW: the law says nothing where plain PyTorch's 1 - p is 0."""
    need("linear_unlearn_loss", impl, "cpu", dtype)
    labels = torch.tensor([7, 0, 49])
    hidden, weight = torch.eye(3, dtype=torch.float64), torch.zeros(50, 3, dtype=torch.float64)
    weight[labels, torch.arange(3)] = target  # the label's logit; all others are 0
    others = 49 * math.exp(-target)  # relative to the label; log1p and 1 - p from it keep every digit
    logp = -math.log1p(others)
    rows = torch.full((3, 50), -math.exp(-target) / (1 + others), dtype=torch.float64)  # d logp / d logits
    rows[torch.arange(3), labels] = others / (1 + others)
    rows *= math.exp(power * logp)
    exact = 3 * math.exp(power * logp) * logp, rows @ weight, rows.t()

    def ours(h, w):
        return gfast.linear_unlearn_loss(h, w, labels, objective, reduction="sum", chunk_rows=2, impl=impl)

    # Half an epsilon for the gradient of the logits and for dH each, beside the accuracy in fp32; exp turns the
    # rounding of power * logp into a relative one.
    eps = torch.finfo(torch.float32).eps
    rtol = 2e-6 + power * abs(logp) * eps + (torch.finfo(dtype).eps if dtype != torch.float32 else 0)
    found = run(ours, (hidden.to(dtype), weight.to(dtype)))
    assert found[0].item() == pytest.approx(exact[0], rel=2e-6 + power * abs(logp) * eps)
    for value, true in zip(found[1:], exact[1:], strict=True):
        torch.testing.assert_close(value.double(), true, rtol=rtol, atol=0)


@pytest.mark.parametrize("reduction", ["sequence_mean", "none"])
@pytest.mark.parametrize("impl", IMPLS)
def test_a_value_far_below_its_gradient_keeps_its_digits(impl, reduction):
    """NPO of a text that is far from the original's: its value is a small part of the sum that carries the gradient."""
    need("linear_unlearn_loss", impl, "cpu", torch.float32)
    hidden, weight, _, labels = rows_problem(64, 16, 300, torch.float32)
    labels = labels.clamp(min=0)[None]  # one sequence
    exact = (hidden.double() @ weight.double().t()).log_softmax(-1).gather(1, labels[0, :, None])[:, 0]  # [64]
    errors = {False: [], True: []}
    for shift in torch.arange(1.0, 3.0, 0.125):
        ref = (exact + shift).float()[None]
        value = 20 * torch.nn.functional.softplus(0.1 * (exact.sum() - ref.double().sum()))
        options = dict(ref_logp=ref, reduction=reduction, impl=impl)
        for differentiated, found in errors.items():
            h = hidden.clone().requires_grad_(differentiated)
            loss = gfast.linear_unlearn_loss(h[None], weight, labels, NPO(beta=0.1), **options).loss.detach().sum()
            found.append(float(loss.double() / value - 1))
    for found in errors.values():
        # 64 log-probs of about 8 are rounded on their own: their sum is off by 8 roundings or so, times beta
        assert torch.tensor(found).square().mean().sqrt() < 0.1 * 8 * 8 * torch.finfo(torch.float32).eps / 2


@pytest.mark.parametrize(
    "objective, scale",
    [
        (WGA(2.5), 65536.0),
        (NPO(0.3), 65536.0),
        (lambda logp, *_: 1e-5 * logp.exp(), 65536.0),
        (lambda logp, *_: 1e8 * logp.exp(), 1e-3),
    ],
    ids=["small weights", "a weight a sequence", "small weights given", "large weights given"],
)
@pytest.mark.parametrize("chunk_rows", [4, 16])
def test_fp16_products_lose_nothing_that_a_loss_scale_keeps(objective, scale, chunk_rows, monkeypatch):
    """As a GPU multiplies: what goes into the products is fp16, their sums are fp32. Beside plain PyTorch with a loss
    scale."""

    def accumulate(total, left, right, first):
        total.copy_(left.float().t() @ right.float() + (0 if first else total))

    monkeypatch.setattr("gfast.ops.head._native", lambda dtype: True)
    monkeypatch.setattr("gfast.ops.head._accumulate_product", accumulate)
    monkeypatch.setattr("gfast.ops.linear_unlearn_loss.sums_are_wide", lambda hidden: True)
    hidden, weight, bias, labels = rows_problem(16, 32, 2000, torch.float16)
    ref = torch.full((16,), -9.0, dtype=torch.float64)

    def ours(h, w, b):
        options = dict(bias=b, ref_logp=ref[None], chunk_rows=chunk_rows, impl="cpp")
        return gfast.linear_unlearn_loss(h[None], w, labels[None], objective, **options)

    def literal(h, w, b):
        return linear_unlearn_loss_reference(h[None], w, labels[None], objective, bias=b, ref_logp=ref[None])

    def gradients(op, dtype):
        leaves = [x.detach().to(dtype).requires_grad_() for x in (hidden, weight, bias)]
        return torch.autograd.grad(scale * op(*leaves).loss.double(), leaves)

    need("linear_unlearn_loss", "cpp", "cpu", torch.float16)
    exact = gradients(literal, torch.float64)
    for found, plain, right in zip(
        gradients(ours, torch.float16), gradients(literal, torch.float16), exact, strict=True
    ):
        error, allowed = ((x.double() - right).norm() / right.norm() for x in (found, plain))
        assert error <= 2 * allowed + torch.finfo(torch.float16).eps
