"""weight=, constants that an objective's own token weights are multiplied by, in the ops: against fp64 formulas.

Over models, in the engines and in training: test_token_weights_model.py.
"""

from __future__ import annotations

import pytest
import torch
from helpers.losses import ALL, IMPLS, need, problem, run, squared
from helpers.marks import slow_when
from helpers.weights import drawn, literal, logp_of

import gfast
from gfast.objectives import DPO, GA, NPO, TNPO, WGA, SimNPO


def check(out, inputs, truth, exact, rtol=1e-9, atol=1e-11):
    """A loss's value, weights and gradients are those of ``literal``."""
    value, surrogate, weight = truth
    torch.testing.assert_close(out.loss.detach().double(), value, rtol=rtol, atol=atol)
    torch.testing.assert_close(out.weight.double(), weight, rtol=rtol, atol=atol)
    for ours, right in zip(torch.autograd.grad(out.loss, inputs), torch.autograd.grad(surrogate, exact), strict=True):
        torch.testing.assert_close(ours.double(), right, rtol=rtol, atol=atol * max(1.0, float(right.abs().max())))


@pytest.mark.parametrize("objective", [*ALL, squared], ids=lambda x: getattr(x, "__name__", str(x)))
def test_fp64_equals_the_formula(objective):
    hidden, head, _, labels, ref = problem()
    w = drawn(labels)
    exact = [x.requires_grad_() for x in (hidden, head)]

    def from_logits(h, v, **options):
        return gfast.unlearn_loss(h @ v.T, labels, objective, ref_logp=ref, weight=w, **options)

    def linear(h, v, **options):
        return gfast.linear_unlearn_loss(h, v, labels, objective, ref_logp=ref, weight=w, **options)

    for reduction in ("token_mean", "sequence_mean", "sum"):
        for loss, options in (
            (from_logits, {}),
            (from_logits, dict(inplace=True)),
            *((linear, dict(chunk_rows=rows)) for rows in (3, 8, 1000)),
        ):
            truth = literal(objective, logp_of(exact[0] @ exact[1].T, labels), ref, labels, w, reduction)
            inputs = [x.detach().clone().requires_grad_() for x in exact]
            check(loss(*inputs, reduction=reduction, **options), inputs, truth, exact)


@slow_when(lambda p: p.impl == "triton" and not isinstance(p.objective, WGA))
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    "objective", [WGA(0.5), TNPO(0.7), NPO(0.3), squared], ids=lambda x: getattr(x, "__name__", str(x))
)
def test_every_backend_equals_the_formula(objective, impl):
    need("unlearn_loss", impl, "cpu", torch.float32)
    hidden, head, _, labels, ref = problem(B=3, T=5, D=4, V=19)
    w = drawn(labels)
    exact = [x.requires_grad_() for x in (hidden, head)]
    inputs = [x.detach().float().requires_grad_() for x in exact]
    given = dict(ref_logp=ref, reduction="token_mean", weight=w.float(), impl=impl)
    for loss in (
        lambda h, v: gfast.unlearn_loss(h @ v.T, labels, objective, **given),
        lambda h, v: gfast.linear_unlearn_loss(h, v, labels, objective, chunk_rows=6, **given),
    ):
        truth = literal(objective, logp_of(exact[0] @ exact[1].T, labels), ref, labels, w, "token_mean")
        check(loss(*inputs), inputs, truth, exact, rtol=3e-5, atol=1e-5)


@pytest.mark.parametrize("size", [1e-6, 1.0, 3e4])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_16_bits_keep_weights_of_any_size(dtype, size):
    """fp16 gradients are kept near the top of their range until the backward: by the largest weight, not by 1."""
    hidden, head, _, labels, _ = problem(dtype=dtype)
    w = size * drawn(labels)
    exact = [x.double().requires_grad_() for x in (hidden, head)]
    logits = (hidden @ head.T).requires_grad_()
    for loss, inputs, right in (
        (lambda z: gfast.unlearn_loss(z, labels, WGA(0.5), weight=w), [logits], [logits.detach().double()]),
        (lambda h, v: gfast.linear_unlearn_loss(h, v, labels, WGA(0.5), weight=w, chunk_rows=6), [hidden, head], exact),
    ):
        inputs, right = ([x.detach().clone().requires_grad_() for x in some] for some in (inputs, right))
        z = right[0] if len(right) == 1 else right[0] @ right[1].T
        surrogate = literal(WGA(0.5), logp_of(z, labels), w, labels, w, "token_mean")[1]
        # what a mixed-precision step does: a loss scale up, and down again in fp32
        scale = 1.0 / size
        ours = torch.autograd.grad(loss(*inputs).loss * scale, inputs)
        for one, other in zip(ours, torch.autograd.grad(surrogate * scale, right), strict=True):
            error = (one.double() - other).norm() / other.norm()
            assert error < 16 * torch.finfo(dtype).eps, error


def test_none_reduction_packed_rows_and_a_normalizer():
    hidden, head, _, labels, ref = problem()
    logits, w = hidden @ head.T, drawn(labels)
    valid = labels != -100
    for objective in (WGA(0.5), NPO(0.3), DPO(0.3)):
        single = gfast.unlearn_loss(logits, labels, objective, ref_logp=ref, weight=w, reduction="sum")
        parts = gfast.unlearn_loss(logits, labels, objective, ref_logp=ref, weight=w, reduction="none")
        torch.testing.assert_close(parts.loss.sum(), single.loss)
        halved = gfast.unlearn_loss(
            logits, labels, objective, ref_logp=ref, weight=w, reduction="sequence_mean", normalizer=2
        )
        torch.testing.assert_close(halved.loss, single.loss / 2)
    ids = torch.arange(4)[:, None].expand_as(labels)
    apart = gfast.unlearn_loss(logits, labels, NPO(0.3), ref_logp=ref, weight=w)
    flat = [x.reshape(1, -1, *x.shape[2:]) for x in (logits, labels, ref, w, ids)]
    packed = gfast.unlearn_loss(
        flat[0], flat[1], NPO(0.3), ref_logp=flat[2], weight=flat[3], sequence_id=flat[4], normalizer=valid.any(1).sum()
    )
    torch.testing.assert_close(packed.loss, apart.loss)
    torch.testing.assert_close(packed.weight.reshape(labels.shape), apart.weight)


@pytest.mark.parametrize("of", [torch.bool, torch.int64, torch.bfloat16], ids=str)
def test_a_mask_leaves_tokens_out(of):
    """0 and 1: the sums without those tokens, over the same count."""
    hidden, head, _, labels, ref = problem()
    mask = torch.rand(labels.shape, generator=torch.Generator().manual_seed(1)) < 0.5
    kept = torch.where(mask, labels, -100)
    for objective in (GA(), TNPO(0.7)):

        def loss(h, v, some, **weight):
            return gfast.linear_unlearn_loss(h, v, some, objective, ref_logp=ref, reduction="sum", **weight)  # noqa: B023

        ours = run(loss, (hidden, head), some=labels, weight=mask.to(of))
        for one, other in zip(ours, run(loss, (hidden, head), some=kept), strict=True):
            torch.testing.assert_close(one, other)


@pytest.mark.parametrize("objective", [NPO(0.3), SimNPO(1.5, 0.2), DPO(0.3)], ids=str)
def test_a_weight_of_texts_has_every_derivative(objective):
    """One weight for all tokens of a text is the text's loss times it, further derivatives included."""
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(4, 3, 5, generator=generator, dtype=torch.float64).requires_grad_()
    labels = torch.randint(0, 5, (4, 3), generator=generator)
    ref = -torch.rand(4, 3, generator=generator, dtype=torch.float64)
    v = torch.tensor([0.5, 2.0, 0.5, 2.0], dtype=torch.float64)
    weight = v[:, None].expand(4, 3)
    plain = gfast.unlearn_loss(logits, labels, objective, ref_logp=ref, reduction="none", impl="reference").loss
    whole = (plain * v[: len(plain)]).sum()
    out = gfast.unlearn_loss(logits, labels, objective, ref_logp=ref, reduction="sum", weight=weight, impl="reference")
    torch.testing.assert_close(out.loss, whole)

    def second(loss):
        (first,) = torch.autograd.grad(loss, logits, create_graph=True)
        return first, torch.autograd.grad(first.sin().sum(), logits)[0]

    for ours, right in zip(second(out.loss), second(whole), strict=True):
        torch.testing.assert_close(ours, right)
    uneven = drawn(labels)
    for reduction in ("sum", "none"):
        loss = gfast.unlearn_loss(
            logits, labels, objective, ref_logp=ref, reduction=reduction, weight=uneven, impl="reference"
        ).loss.sum()
        (first,) = torch.autograd.grad(loss, logits, create_graph=True)
        truth = literal(objective, logp_of(logits, labels), ref, labels, uneven, "sum")
        torch.testing.assert_close(loss.detach(), truth[0])
        torch.testing.assert_close(first, torch.autograd.grad(truth[1], logits)[0])


def test_full_graph_compile():
    hidden, head, _, labels, ref = problem(dtype=torch.float32)
    ref, w = ref.float(), drawn(labels).float()

    def step(h, v, w):
        out = gfast.linear_unlearn_loss(h, v, labels, NPO(0.3), ref_logp=ref, weight=w)
        return out.loss + gfast.unlearn_loss(h @ v.T, labels, WGA(), weight=w).loss

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for ours, eager in zip(
        run(lambda h, v: compiled(h, v, w), (hidden, head)),
        run(lambda h, v: step(h, v, w), (hidden, head)),
        strict=True,
    ):
        torch.testing.assert_close(ours, eager, rtol=1e-5, atol=1e-6)


def test_opcheck_and_vmap():
    hidden, head, _, labels, _ = problem(B=2, T=3, dtype=torch.float32)
    rows, flat, w = (hidden @ head.T).reshape(6, -1), labels.reshape(-1), torch.randn(6)
    numbers, one = WGA().spec().numbers(), torch.tensor(0.25)
    torch.library.opcheck(torch.ops.gfast.unlearn_rows, (rows, flat, None, numbers, one, True, "auto", w))
    last = ([0, 37, 4, 4], [1.0, 0.0], "", "auto", [True, True, False])
    given = ([hidden.reshape(6, -1), head, None], flat, [None, None, None, w], one, "token", numbers, [2, 3], *last)
    torch.library.opcheck(torch.ops.gfast.linear_unlearn, given)

    def loss(z, y, v):
        return gfast.unlearn_loss(z, y, GA(), weight=v, reduction="sum", impl="reference").loss

    v = torch.randn(2, 3)
    z = hidden @ head.T
    torch.testing.assert_close(
        torch.func.vmap(loss)(z, labels, v), torch.stack([loss(*x) for x in zip(z, labels, v, strict=True)])
    )


@pytest.mark.parametrize(
    "wrong, error, message",
    [
        (lambda w: w[:, :2], ValueError, r"weight has shape \(2, 2\) but labels \(2, 3\)"),
        (lambda w: w.fill_(torch.inf), ValueError, r"weights are not finite, first weight\[0, 1\] = inf"),
        (
            lambda w: w.index_fill_(1, torch.tensor(2), torch.nan),
            ValueError,
            r"2 of 6 weights are not finite.*\[0, 2\]",
        ),
        (lambda w: w.requires_grad_(), ValueError, r"weight requires grad.*weight.detach\(\)"),
        (lambda w: w.to(torch.complex64), TypeError, "weight must be real numbers"),
        (lambda w: w.to("meta"), ValueError, "weight is on meta but labels on cpu"),
        (lambda w: w.tolist(), TypeError, "weight must be a tensor like labels, not a list"),
    ],
)
def test_bad_weights_are_errors_before_any_work(wrong, error, message):
    labels = torch.tensor([[-100, 1, 2], [0, -100, 1]])
    logits, hidden, head = torch.zeros(2, 3, 4), torch.zeros(2, 3, 5), torch.zeros(4, 5)

    class Refuses(torch.nn.Module):
        def hidden(self, batch):
            raise AssertionError("the model ran")

        head = torch.nn.Linear(5, 4)

    for call in (
        lambda w: gfast.unlearn_loss(logits, labels, GA(), weight=w),
        lambda w: gfast.linear_unlearn_loss(hidden, head, labels, GA(), weight=w),
        lambda w: gfast.model_loss(Refuses(), {"input_ids": labels, "labels": labels}, GA(), weight=w),
        lambda w: gfast.model_loss(Refuses(), {"input_ids": labels, "labels": labels, "weight": w}, GA()),
    ):
        with pytest.raises(error, match=message):
            call(wrong(torch.ones(2, 3)))


# over a model
