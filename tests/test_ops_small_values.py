"""Weights and divergences far below what fp32 holds by itself keep their relative accuracy: they are formed in log
space, or by sums without cancellation."""

import math

import pytest
import torch
from helpers.losses import IMPLS, need
from helpers.marks import slow_when

import gfast
from gfast.objectives import WGA, WTNPO, SatImp


def far_labels(gaps, vocab, above, seed=0):
    """Logits [N, V] whose label is `gaps` above (or below) the others, and the label's log p and log(1 - p) in fp64."""
    rng = torch.Generator().manual_seed(seed)
    n = torch.arange(len(gaps))
    logits, labels = torch.randn(len(gaps), vocab, generator=rng), torch.randint(vocab, (len(gaps),), generator=rng)
    logits[n, labels] += gaps if above else -gaps
    z = logits.double()
    odds = torch.logsumexp(z.scatter(1, labels[:, None], -math.inf), -1) - z[n, labels]  # log((1 - p) / p)
    softplus = lambda x: torch.where(x < -30, x.exp(), x.clamp(min=0) + torch.log1p(torch.exp(-x.abs())))  # noqa: E731
    return logits, labels, -softplus(odds), -softplus(-odds)


@slow_when(lambda p: p.impl == "triton")  # interpreted, and of few entries
@pytest.mark.parametrize(
    ("vocab", "impl"), [(61, "triton"), *((vocab, impl) for vocab in (61, 5003) for impl in IMPLS if impl != "triton")]
)
@pytest.mark.parametrize("above", [False, True], ids=["p is small", "1 - p is small"])
def test_powers_keep_their_accuracy(vocab, above, impl):
    need("unlearn_loss", impl, "cpu", torch.float32)
    logits, labels, logp, log_1mp = far_labels(torch.linspace(0, 1000, 81), vocab, above)
    for beta1, beta2 in ((5, 1), (1, 0.05), (0.05, 1), (0.08, 0.08), (0.01, 0.5)):
        for objective, exact in (
            (SatImp(beta1, beta2), torch.exp(beta1 * logp + beta2 * log_1mp)),
            (WGA(beta1), torch.exp(beta1 * logp)),
            # under an original model just as sure: its factor is 1
            (WTNPO(beta1, 1.0), torch.exp(beta1 * logp)),
        ):
            out = gfast.unlearn_loss(logits, labels, objective, ref_logp=logp.float(), impl=impl)
            tolerance = 2e-4 if isinstance(objective, WTNPO) else 1e-5  # log p - ref_logp: 6e-5 are rounding of 1000
            held = exact > torch.finfo(torch.float32).tiny
            error = ((out.weight.double() - exact).abs() / exact)[held]
            assert held.any() and error.max() < tolerance, (objective, error.max())


@pytest.mark.parametrize("impl", IMPLS)
def test_a_label_without_rivals_has_a_power_of_zero(impl):
    """p = 1 exactly: the others are masked, or there are none; and a NaN among the others is not passed over."""
    need("unlearn_loss", impl, "cpu", torch.float32)
    objective = SatImp(1.0, 0.05)
    for vocab in (1, 40, 5003):
        logits = torch.full((2, vocab), -torch.inf)
        logits[:, 0] = 3.0
        label = torch.zeros(2, dtype=torch.long)
        assert gfast.unlearn_loss(logits, label, objective, impl=impl).weight.tolist() == [0, 0]
        if vocab > 1:
            logits[0, -1] = torch.nan
            weight = gfast.unlearn_loss(logits, label, objective, impl=impl).weight
            assert weight[0].isnan() and weight[1] == 0


@pytest.mark.parametrize("impl", IMPLS)
def test_in_place_too(impl):
    """The head's ops write the gradient over the logits that the weights come from."""
    need("linear_unlearn_loss", impl, "cpu", torch.float32)
    logits, labels, logp, log_1mp = far_labels(torch.linspace(0, 900, 31), 301, above=True)
    leaf = torch.eye(31).requires_grad_()  # as hidden states: their products are the logits
    weight = logits.t().contiguous()
    out = gfast.linear_unlearn_loss(leaf, weight, labels, SatImp(0.02, 0.05), impl=impl)
    out.loss.backward()
    exact = torch.exp(0.02 * logp + 0.05 * log_1mp)
    assert ((out.weight.double() - exact).abs() / exact).max() < 1e-5


@slow_when(lambda p: p.impl == "triton" and (p.vocab == 5003 or p.size not in (1e-5, 1e-2)))
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("vocab", [37, 5003])
@pytest.mark.parametrize("size", [1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0])
def test_a_small_kl_keeps_its_accuracy(size, vocab, impl):
    """KL from 1e-11 to 1, and its gradient: where the model has hardly left its reference."""
    need("token_kl", impl, "cpu", torch.float32)
    rng = torch.Generator().manual_seed(0)
    ref = 2 * torch.randn(6, vocab, generator=rng)
    ref[3:] += 50  # logits far from zero
    model = ref + size * torch.randn(6, vocab, generator=rng)
    log_p, log_q = (torch.log_softmax(x.double(), -1) for x in (model, ref))
    d, q = log_q - log_p, log_q.exp()
    exact = (q * (torch.expm1(-d) + d)).sum(-1)  # sum(p - q) = 0 is added: no cancellation in fp64
    labels = torch.zeros(1, dtype=torch.long)
    for i in range(6):
        x = model[i : i + 1].clone().requires_grad_()
        loss = gfast.token_kl(x, ref[i : i + 1], labels, impl=impl)
        loss.backward()
        assert exact[i] > 5e-12 and loss.item() == pytest.approx(exact[i].item(), rel=1e-4), i
        with torch.no_grad():
            assert gfast.token_kl(x, ref[i : i + 1], labels, impl=impl).item() == loss.item()
        gradient = q[i] * torch.expm1(-d[i])
        # what is left is the rounding of the totals, the same share of every q: fp32 holds a d to 1e-7
        assert (x.grad[0].double() - gradient).norm() < 1e-5 * gradient.norm() + 3e-7 * q[i].norm()
