"""Losses of the statistics of rows: fp16 gradients of large factors, and weights within a sequence."""

import pytest
import torch
from helpers.losses import problem, run
from test_token_stats import linear_of

import gfast
from gfast.objectives import ETW, MASC, PDU, TPO
from gfast.ops import stat_loss


@pytest.mark.parametrize("given", [None, 1e-3, 100.0])
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("objective", [PDU(), MASC(rho=0.2, eta=1e-3, k=3), MASC(rho=0.2, beta=1e3, k=3)], ids=str)
def test_gradients_of_fp16_that_are_large_stay_within_its_range(objective, inplace, given):
    """Factors of a row far above those that fp16 gradients leave room for; they are finite where fp16 is."""
    _, _, _, labels, _ = problem(V=33)
    logits = (300 * torch.randn(4, 7, 33, generator=torch.Generator().manual_seed(1))).half()
    weight = None if given is None else torch.full((4, 7), given)
    z, wide = logits.clone().requires_grad_(), logits.double().requires_grad_()
    gfast.unlearn_loss(z * 1, labels.clamp(max=32), objective, weight=weight, inplace=inplace).loss.backward()
    gfast.unlearn_loss(wide, labels.clamp(max=32), objective, weight=weight).loss.backward()
    assert z.grad.isfinite().all() and wide.grad.abs().max() < 65504
    torch.testing.assert_close(z.grad.double(), wide.grad, rtol=2e-3, atol=1e-6 * float(wide.grad.abs().max()))


@pytest.mark.parametrize("inplace", [None, False, True])
def test_one_token_with_all_the_entropy_of_a_long_text_in_fp16(inplace):
    logits = torch.zeros(1, 600, 33, dtype=torch.half)
    logits[..., 0], logits[0, 5, 0] = 30.0, 0.0
    labels = torch.zeros(1, 600, dtype=torch.long).index_fill(1, torch.tensor([5]), 3)
    z, wide = logits.clone().requires_grad_(), logits.double().requires_grad_()
    if inplace is None:
        out = gfast.linear_unlearn_loss(z, torch.eye(33, dtype=torch.half), labels, ETW())
    else:
        out = gfast.unlearn_loss(z * 1, labels, ETW(), inplace=inplace)
    out.loss.backward()
    gfast.unlearn_loss(wide, labels, ETW()).loss.backward()
    assert out.weight.max() > 599
    torch.testing.assert_close(z.grad.double(), wide.grad, rtol=2e-3, atol=1e-6)


def test_what_a_head_makes_room_for():
    """Gradients of all rows of a head are kept at one scale, which no weight of a text may overflow."""
    labels = torch.zeros(2, 600, dtype=torch.long)
    factor, half = torch.ones(()), torch.float16
    for objective, largest in ((ETW(), 600.0), (MASC(eta=1e-3), 1e3), (TPO(), 2.0)):
        terms = stat_loss.Terms.of("unlearn_loss", objective, labels, None, None)
        kept = stat_loss.StatTerms(objective.stat_spec(), terms).kept(factor, summed=True)
        scale, late = stat_loss.kept_scale(factor, half, *kept)
        assert largest * scale <= 2.0**15 and scale * late == 1


@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_weights_that_are_given_to_tpo(reduction, impl):
    """The mean over a sequence times its value; the gradient of each label's logit times its own."""
    hidden, weight, bias, labels, _ = problem()
    given, objective = torch.randn(4, 7, generator=torch.Generator().manual_seed(2)).double(), TPO(beta=0.5, floor=1.0)
    valid, safe = labels != -100, labels.clamp(min=0)

    def truth(h, w, b):
        own = torch.where(valid, linear_of(h, w, b).gather(-1, safe[..., None])[..., 0], 0.0)
        size = valid.sum(1)
        x = 0.5 * (1.0 - own.sum(1) / size)
        value = ((given * valid).sum(1) / size * (2 / 0.5) * torch.log1p(torch.exp(-x))).sum()
        surrogate = ((2 * torch.sigmoid(-x) / size).detach()[:, None] * given * own).sum()
        return value.detach() + surrogate - surrogate.detach()

    options = dict(weight=given, reduction=reduction, impl=impl)
    rows = lambda h, w, b: gfast.unlearn_loss(linear_of(h, w, b), labels, objective, **options).loss.sum()  # noqa: E731
    head = lambda h, w, b: gfast.linear_unlearn_loss(h, w, labels, objective, bias=b, **options).loss.sum()  # noqa: E731
    inputs = hidden, weight, bias
    for fn in (rows, head):
        for x, exact in zip(run(fn, inputs), run(truth, inputs), strict=True):
            torch.testing.assert_close(x, exact, rtol=1e-10, atol=1e-12)
        if impl == "reference":
            found = torch.func.grad(fn, (0, 1, 2))(*inputs)
            for x, exact in zip(found, torch.func.grad(truth, (0, 1, 2))(*inputs), strict=True):
                torch.testing.assert_close(x, exact, rtol=1e-10, atol=1e-12)
