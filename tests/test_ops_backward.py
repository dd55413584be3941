"""Backwards of the loss ops: upstream gradients, kept graphs, and gradients that overwrite the logits."""

import pytest
import torch
from helpers.losses import ALL, DRAWS, assert_law, assert_law_of_draws, label, need, problem, run, squared
from helpers.marks import slow_when

import gfast
from gfast.objectives import DPO, NPO, TNPO, WGA, WTNPO, BalDRO, SimNPO
from gfast.ops.token_kl import token_kl_reference
from gfast.ops.unlearn_loss import unlearn_loss_reference


def tiny(logp, ref_logp, sequence_id):
    """Weights as of a text that is forgotten."""
    return 1e-6 * torch.exp(0.1 * logp)


@pytest.mark.parametrize("op", ["unlearn_loss", "linear_unlearn_loss", "token_kl", "linear_token_kl"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_no_backward_changes_what_another_returned(op, dtype):
    """Gradients are scaled in place, but only where nobody else holds them."""
    hidden, weight, _, labels, _ = problem(dtype=dtype)
    inputs = (hidden @ weight.T,) if op in ("unlearn_loss", "token_kl") else (hidden, weight)
    inputs = [x.requires_grad_() for x in inputs]
    targets = [x.detach() * 0.5 for x in inputs] if "kl" in op else []
    out = getattr(gfast, op)(*inputs, *targets, labels, *([] if "kl" in op else [WGA()]))
    loss = out if "kl" in op else out.loss
    expected = [x.clone() for x in torch.autograd.grad(loss, inputs, retain_graph=True)]
    results, factors = [], (0.0, 1.0, 0.25, 1.0, -3.0)
    for index, factor in enumerate(factors):
        results.append(torch.autograd.grad(factor * loss, inputs, retain_graph=index + 1 < len(factors)))
    for factor, result in zip(factors, results, strict=True):
        for ours, exact in zip(result, expected, strict=True):
            assert_law([ours], [exact * factor], [exact.double() * factor], dtype, f"factor {factor}")
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, inputs)


def near_original(logp, ref_logp, sequence_id):
    return torch.exp(0.1 * (logp - ref_logp))


@pytest.mark.parametrize("op", ["unlearn_loss", "linear_unlearn_loss"])
@pytest.mark.parametrize("impl", ["reference", "auto"])
@pytest.mark.parametrize("objective", [TNPO(), WTNPO(), NPO(0.3), DPO(0.3), BalDRO(), near_original], ids=label)
def test_a_reference_with_a_graph_is_a_constant(objective, impl, op):
    """Log-probs of the original that nobody detached, perhaps of the very model that is trained."""
    hidden, weight, _, labels, ref = problem(dtype=torch.float32)
    for reduction in ("token_mean", "sequence_mean", "sum", "none"):
        for trained in (True, False):
            found = []
            for with_graph in (True, False):
                h = hidden.clone().requires_grad_(trained)
                original = (ref.float() + 0.1 * h.sum(-1) if trained else ref.float().clone().requires_grad_()) + 0.0
                inputs = (h, weight) if op == "linear_unlearn_loss" else (h @ weight.T,)
                given = original if with_graph else original.detach()
                loss = getattr(gfast, op)(
                    *inputs, labels, objective, ref_logp=given, reduction=reduction, impl=impl
                ).loss
                assert loss.requires_grad == trained
                found.append(torch.autograd.grad(loss.sum(), h)[0] if trained else loss.detach())
            assert torch.equal(*found)


def test_scaling_takes_no_new_memory():
    logits = torch.randn(4, 50).requires_grad_()
    loss = gfast.unlearn_loss(logits, torch.arange(4), WGA()).loss
    memory = loss.grad_fn.saved_tensors[0].data_ptr()
    (loss / 4).backward()
    assert logits.grad.data_ptr() == memory


@slow_when(lambda p: p.impl == "triton" and p.objective not in (WGA(), NPO(0.3)))
@pytest.mark.parametrize("impl", ["reference", "cpp", "triton"])
@pytest.mark.parametrize("objective", [WGA(), TNPO(), NPO(0.3), SimNPO(), DPO(0.3), squared], ids=label)
@pytest.mark.parametrize("flat", [False, True])
def test_in_place_is_the_same(objective, impl, flat):
    need("unlearn_loss", impl, "cpu", torch.float32)
    hidden, weight, _, labels, ref = problem(dtype=torch.float32)
    ids = torch.arange(4)[:, None].expand(4, 7)

    def loss(h, w, inplace):
        logits, arguments = h @ w.T, [labels, ref.float(), ids]
        if flat:  # views are overwritten through their base
            logits, arguments = logits.reshape(28, -1), [x.reshape(-1) for x in arguments]
        if isinstance(objective, DPO):
            arguments[2] = None if not flat else arguments[2] % 2  # one pair
        y, r, s = arguments
        before = logits.data_ptr()
        out = gfast.unlearn_loss(logits, y, objective, ref_logp=r, sequence_id=s, impl=impl, inplace=inplace)
        out = out.loss / 3
        if inplace:
            assert logits.data_ptr() == before and (logits.detach()[y == -100] == 0).all()
        return out

    if flat and isinstance(objective, DPO):
        pytest.skip("pairs are leading dimensions")
    expected = run(lambda h, w: loss(h, w, False), (hidden, weight))
    for ours, exact in zip(run(lambda h, w: loss(h, w, True), (hidden, weight)), expected, strict=True):
        assert torch.equal(ours, exact)


TOKENS, LOSS_SCALE = 16384, 2.0**16  # one micro-batch of a step of so many tokens


# interpreted, each takes seconds: both scopes of a weight, and both places of the gradient
IN_PLACE_ON_TRITON = [WGA(0.5), NPO(0.3), squared]
SCALED = [
    (objective, impl, inplace)
    for objective in (*ALL, WGA(3.0), squared, tiny)
    for impl in ("reference", "cpp", "triton")
    for inplace in (False, True)
    if not inplace or impl != "triton" or objective in IN_PLACE_ON_TRITON
]


@slow_when(lambda p: p.impl == "triton" and (p.objective, p.inplace) not in [(WGA(0.5), False), (NPO(0.3), True)])
@pytest.mark.parametrize(("objective", "impl", "inplace"), SCALED, ids=label)
def test_a_loss_scale_reaches_fp16_gradients(objective, impl, inplace):
    """By the law: rounded to fp16 before the loss scale, most of these gradients would be 0."""
    need("unlearn_loss", impl, "cpu", torch.float16)
    draws = []
    for seed in range(DRAWS):
        hidden, weight, bias, labels, ref = problem(seed, V=333)
        logits = torch.nn.functional.linear(hidden, weight, bias).half()
        mine = dict(ref_logp=ref, reduction="sequence_mean", normalizer=TOKENS, impl=impl, inplace=inplace)

        def ours(z):
            return LOSS_SCALE * gfast.unlearn_loss(z * 1.0, labels, objective, **mine).loss  # noqa: B023

        def literal(z):
            out = unlearn_loss_reference(z, labels, objective, ref_logp=ref, reduction="sum")  # noqa: B023
            return LOSS_SCALE / TOKENS * out.loss

        z = logits.clone().requires_grad_()
        loss = ours(z)
        if seed % 2:
            loss.backward(retain_graph=True)
            z.grad = None
        loss.backward()
        draws.append(([loss.detach(), z.grad], run(literal, (logits,)), run(literal, (logits.double(),))))
    assert_law_of_draws(draws, torch.float16, impl)


@slow_when(lambda p: p.impl == "triton" and p.near == 1.0)
@pytest.mark.parametrize("impl", ["reference", "cpp", "triton"])
@pytest.mark.parametrize("near", [1.0, 1e-2])
def test_a_loss_scale_reaches_fp16_gradients_of_kl(impl, near):
    need("token_kl", impl, "cpu", torch.float16)
    draws = []
    for seed in range(DRAWS):
        hidden, weight, bias, labels, _ = problem(seed, V=333)
        logits = torch.nn.functional.linear(hidden, weight, bias).half()
        reference = (logits + near * torch.randn(logits.shape)).half()

        def ours(z):
            return LOSS_SCALE * gfast.token_kl(z, reference, labels, normalizer=TOKENS, impl=impl)  # noqa: B023

        def literal(z):
            return LOSS_SCALE / TOKENS * token_kl_reference(z, reference.to(z.dtype), labels).sum()  # noqa: B023

        draws.append([run(ours, (logits,)), run(literal, (logits,)), run(literal, (logits.double(),))])
    assert_law_of_draws(draws, torch.float16, impl)


def test_rows_that_are_not_finite_leave_fp16_gradients_of_others():
    """Callables' weights set what gradients are kept at."""
    weights = torch.tensor([torch.inf, 1.0, torch.nan, 0.0])
    logits = torch.zeros(4, 5, dtype=torch.float16, requires_grad=True)
    (gfast.unlearn_loss(logits, torch.arange(4), lambda *_: weights).loss * 4).backward()
    assert logits.grad[1].tolist() == pytest.approx([-0.2, 0.8, -0.2, -0.2, -0.2], rel=1e-3)
    assert not logits.grad[0].isfinite().any() and logits.grad[2].isnan().all() and (logits.grad[3] == 0).all()


def test_overwritten_logits_are_never_read_as_logits():
    hidden, weight, _, labels, _ = problem(dtype=torch.float32)
    hidden.requires_grad_()

    def in_place(logits):
        return gfast.unlearn_loss(logits, labels, WGA(), inplace=True).loss

    logits = hidden @ weight.T
    earlier = (logits * logits).sum()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (in_place(logits) + earlier).backward()
    logits = hidden @ weight.T
    loss = in_place(logits)
    with pytest.raises(RuntimeError, match="used after unlearn_loss"):
        (loss + logits.sum()).backward()
    logits = hidden @ weight.T
    loss = in_place(logits)
    with pytest.raises(RuntimeError, match="used after unlearn_loss"):
        (loss + in_place(logits)).backward()
    logits = hidden @ weight.T
    loss = in_place(logits)
    logits.detach().zero_()
    with pytest.raises(RuntimeError, match="were modified after"):
        loss.backward()
    loss = in_place(hidden @ weight.T)
    (once,) = torch.autograd.grad(loss, hidden, retain_graph=True)
    (twice,) = torch.autograd.grad(2 * loss, hidden)
    torch.testing.assert_close(twice, 2 * once)
    with pytest.raises(RuntimeError, match="a second time"):
        loss.backward()


def test_what_cannot_be_overwritten():
    hidden, weight, _, labels, ref = problem(dtype=torch.float32)
    hidden.requires_grad_()
    logits = hidden @ weight.T
    kept = logits.detach().clone()
    outside = labels.clone()
    outside[2, 1] = 40
    row, leaf = logits[:, :1].expand(-1, 7, -1), kept.clone().requires_grad_()
    for message, call in (
        ("a leaf that requires", lambda: gfast.unlearn_loss(leaf, labels, WGA(), inplace=True)),
        ("lie evenly in memory", lambda: gfast.unlearn_loss(logits[:, :-1], labels[:, 1:], WGA(), inplace=True)),
        ("in memory|do not overlap", lambda: gfast.unlearn_loss(row, labels, WGA(), inplace=True)),
        ("one number", lambda: gfast.unlearn_loss(logits, labels, WGA(), reduction="none", inplace=True)),
        ("outside the vocabulary", lambda: gfast.unlearn_loss(logits, outside, WGA(), inplace=True)),
        ("returned shape", lambda: gfast.unlearn_loss(logits, labels, lambda p, r, s: p[:2], inplace=True)),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    assert torch.equal(logits, kept)
    with torch.no_grad():  # no gradient wanted: nothing is written
        gfast.unlearn_loss(logits, labels, WGA(), inplace=True)
    gfast.unlearn_loss(kept, labels, NPO(), ref_logp=ref, inplace=True)
    assert torch.equal(logits, kept)
    gfast.unlearn_loss(logits, labels, WGA(), inplace=True).loss.backward()  # the refused calls left the graph whole
