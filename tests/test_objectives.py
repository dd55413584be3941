"""Objectives against their formulas, written out again here token by token, and against the identities they must
satisfy."""

import math

import pytest
import torch

import gfast
from gfast.objectives import (
    DPO,
    GA,
    KL,
    MASC,
    NLL,
    NPO,
    PDU,
    PO,
    REGISTRY,
    RMU,
    RR,
    TNPO,
    WGA,
    WTNPO,
    BalDRO,
    BalDROG,
    HardMask,
    JensUn,
    Mix,
    SatImp,
    SimImp,
    SimNPO,
    SimSat,
    SoftMask,
    from_name,
)
from gfast.objectives.registry import parse_objective

B, T, V = 4, 6, 11


def sigmoid(x):
    return 1.0 / (1.0 + math.exp(-x))


@pytest.fixture
def data():
    torch.manual_seed(3)
    logits = torch.randn(B, T, V, dtype=torch.float64)
    labels = torch.randint(0, V, (B, T))
    labels[0, :2] = -100
    labels[2, 4:] = -100
    ref = torch.randn(B, T, dtype=torch.float64) * 0.3 - 2.0
    return logits, labels, torch.where(labels == -100, 0.0, ref)


def table(logits, labels):
    """log p of every valid token as plain floats: {(b, t): logp}."""
    logp = torch.log_softmax(logits, -1)
    return {(b, t): logp[b, t, labels[b, t]].item() for b in range(B) for t in range(T) if labels[b, t].item() != -100}


TOKEN_FORMULAS = {
    GA(): lambda p, o: 1.0,
    WGA(alpha=0.5): lambda p, o: p**0.5,
    SatImp(beta1=2.0, beta2=1.5): lambda p, o: p**2.0 * (1 - p) ** 1.5,
    SimSat(beta=2.5): lambda p, o: p**2.5,
    SimImp(beta=1.5): lambda p, o: (1 - p) ** 1.5,
    TNPO(beta=0.7): lambda p, o: 2 * p**0.7 / (p**0.7 + o**0.7),
    WTNPO(alpha=0.4, beta=2.0): lambda p, o: p**0.4 * 2 * p**2 / (p**2 + o**2),
    NLL(): lambda p, o: -1.0,
    PO(): lambda p, o: -1.0,
}


@pytest.mark.parametrize("objective", TOKEN_FORMULAS, ids=str)
def test_token_weights_and_value(objective, data):
    logits, labels, ref = data
    out = gfast.unlearn_loss(logits, labels, objective, ref_logp=ref)
    logp = table(logits, labels)
    weight = {at: TOKEN_FORMULAS[objective](math.exp(lp), math.exp(ref[at].item())) for at, lp in logp.items()}
    assert out.loss.item() == pytest.approx(sum(weight[at] * lp for at, lp in logp.items()) / len(logp), rel=1e-12)
    for at, expected in weight.items():
        assert out.weight[at].item() == pytest.approx(expected, rel=1e-12)
    assert (out.weight[labels == -100] == 0).all()


def per_sequence(logits, labels, ref):
    logp = table(logits, labels)
    s = [sum(lp for (b, _), lp in logp.items() if b == row) for row in range(B)]
    o = [sum(ref[at].item() for at in logp if at[0] == row) for row in range(B)]
    n = [sum(1 for at in logp if at[0] == row) for row in range(B)]
    return s, o, n


def test_npo(data):
    logits, labels, ref = data
    beta = 0.3
    out = gfast.unlearn_loss(logits, labels, NPO(beta), ref_logp=ref)
    s, o, _ = per_sequence(logits, labels, ref)
    value = [2 / beta * math.log(1 + (math.exp(a) / math.exp(b)) ** beta) for a, b in zip(s, o, strict=True)]
    assert out.loss.item() == pytest.approx(sum(value) / B, rel=1e-10)
    assert out.weight[1, 0].item() == pytest.approx(2 * sigmoid(beta * (s[1] - o[1])), rel=1e-10)


def test_simnpo(data):
    logits, labels, ref = data
    beta, delta = 1.7, 0.4
    out = gfast.unlearn_loss(logits, labels, SimNPO(beta, delta))
    s, _, n = per_sequence(logits, labels, ref)
    value = [-2 / beta * math.log(sigmoid(beta * (-a / k - delta))) for a, k in zip(s, n, strict=True)]
    assert out.loss.item() == pytest.approx(sum(value) / B, rel=1e-10)
    expected = 2 * sigmoid(-beta * (-s[0] / n[0] - delta)) / n[0]
    assert out.weight[0, 3].item() == pytest.approx(expected, rel=1e-10)


def test_dpo(data):
    logits, labels, ref = data
    beta = 0.3
    out = gfast.unlearn_loss(logits, labels, DPO(beta), ref_logp=ref)
    s, o, _ = per_sequence(logits, labels, ref)
    d = [a - b for a, b in zip(s, o, strict=True)]
    value = [-2 / beta * math.log(sigmoid(beta * (d[k + 2] - d[k]))) for k in range(2)]
    assert out.loss.item() == pytest.approx(sum(value) / 2, rel=1e-10)
    assert out.weight[1, 0].item() == pytest.approx(2 * sigmoid(beta * (d[1] - d[3])), rel=1e-10)
    assert out.weight[3, 0].item() == pytest.approx(-2 * sigmoid(beta * (d[1] - d[3])), rel=1e-10)


@pytest.mark.parametrize("objective", [NPO(0.3), SimNPO(1.7, 0.4), DPO(0.3)], ids=str)
def test_the_gradient_is_that_of_the_value(objective, data):
    """Sequence objectives report a value whose own gradient is the weighted sum: autograd of the formula must agree."""
    logits, labels, ref = data
    ours = logits.clone().requires_grad_()
    gfast.unlearn_loss(ours, labels, objective, ref_logp=ref).loss.backward()
    truth = logits.clone().requires_grad_()
    logp = torch.log_softmax(truth, -1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    mask = (labels != -100).double()
    s, o, n = (logp * mask).sum(1), (ref * mask).sum(1), mask.sum(1)
    softplus = torch.nn.functional.softplus
    if isinstance(objective, NPO):
        value = 2 / objective.beta * softplus(objective.beta * (s - o))
    elif isinstance(objective, SimNPO):
        value = 2 / objective.beta * softplus(objective.beta * (s / n + objective.delta))
    else:
        d = s - o
        value = 2 / objective.beta * softplus(objective.beta * (d[:2] - d[2:]))
    value.mean().backward()
    torch.testing.assert_close(ours.grad, truth.grad, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    "beta, value", [(0.1, 13.862943611198906), (1.0, 1.3862943611198906), (2.0, 0.6931471805599453)]
)
def test_npo_on_the_original_model(beta, value, data):
    logits, labels, _ = data
    ref = gfast.token_logp(logits, labels)
    out = gfast.unlearn_loss(logits, labels, NPO(beta), ref_logp=ref)
    assert out.loss.item() == pytest.approx(value, rel=1e-12)
    torch.testing.assert_close(out.weight, (labels != -100).double())
    tnpo = gfast.unlearn_loss(logits, labels, TNPO(beta), ref_logp=ref)
    torch.testing.assert_close(tnpo.weight, (labels != -100).double())


def test_wga_zero_is_ga_and_ga_is_minus_nll(data):
    logits, labels, _ = data
    ga = gfast.unlearn_loss(logits, labels, GA()).loss
    assert gfast.unlearn_loss(logits, labels, WGA(alpha=0.0)).loss == ga
    assert gfast.unlearn_loss(logits, labels, NLL()).loss == -ga


def test_hidden_objectives():
    torch.manual_seed(0)
    hidden, valid = torch.randn(2, 3, 5), torch.tensor([[True, True, False], [True, False, False]])
    rmu = RMU(layer=1, c=3.0, seed=7)
    u = rmu.direction(5)
    assert torch.equal(u, RMU(layer=2, seed=7).direction(5)) and (u >= 0).all() and (u < 1).all()
    rows = [hidden[0, 0], hidden[0, 1], hidden[1, 0]]
    expected = sum(((h - 3.0 * u) ** 2).sum() / 5 for h in rows) / 3
    torch.testing.assert_close(rmu.value(hidden, valid), expected)
    other = torch.randn(2, 3, 5)
    others = [other[0, 0], other[0, 1], other[1, 0]]
    expected = sum(((h - g) ** 2).sum() / 5 for h, g in zip(rows, others, strict=True)) / 3
    torch.testing.assert_close(RR(layer=1).value(hidden, other, valid), expected)
    assert RR(layer=1).value(hidden, other, torch.zeros_like(valid)) == 0


def test_counts():
    labels = torch.tensor([[1, -100], [-100, -100], [3, 4], [5, -100]])
    assert GA().count(labels) == 4
    assert NPO().count(labels) == 3
    assert DPO().count(labels) == 2
    assert DPO().count(torch.tensor([[-100], [1], [-100], [-100]])) == 1


@pytest.mark.parametrize("objective", [HardMask(), SoftMask()], ids=str)
def test_masks(objective, data):
    logits, labels, _ = data
    generator = torch.Generator().manual_seed(1)
    v = torch.rand(B, T, generator=generator, dtype=torch.float64)
    v = (v > 0.5).double() if isinstance(objective, HardMask) else v
    out = gfast.unlearn_loss(logits, labels, objective, weight=v)
    logp = table(logits, labels)
    assert out.loss.item() == pytest.approx(sum(v[at].item() * lp for at, lp in logp.items()) / len(logp), rel=1e-12)
    assert out.weight.tolist() == torch.where(labels == -100, 0, v).tolist()
    with pytest.raises(ValueError, match=r"unlearn_loss: .*Mask\(\) needs weight"):
        gfast.unlearn_loss(logits, labels, objective)
    for wrong in [1.5, -0.5] + [0.5] * isinstance(objective, HardMask):
        with pytest.raises(ValueError, match=rf"takes weights v .*, and weight\[1, 2\] is {wrong}"):
            gfast.unlearn_loss(
                logits, labels, objective, weight=v.index_put((torch.tensor(1), torch.tensor(2)), v.new_tensor(wrong))
            )


@pytest.mark.parametrize(
    "objective", [BalDRO(0.3, 1.5), BalDRO(0.3, -0.8), BalDROG(0.3, 0.5), BalDROG(0.3, 0.1)], ids=str
)
def test_weights_over_samples(objective, data):
    """The gradient is that of the papers' value, over the sequences that have a label; one of four has none here."""
    logits, labels, ref = data
    labels, ref = labels.clone(), ref.clone()
    labels[3], ref[3] = -100, 0.0
    z = logits.clone().requires_grad_()
    picked = torch.log_softmax(z, -1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    logp = torch.where(labels == -100, 0.0, picked)
    kept = labels[:3] != -100
    value = 2 / 0.3 * torch.log(1 + torch.exp(0.3 * (logp - ref).sum(1)))[:3]
    if isinstance(objective, BalDRO):
        whole = -objective.tau * torch.log(torch.exp(-value / objective.tau).mean())
    else:
        known = logp.sum(1)[:3] / kept.sum(1)
        whole = value[known.argsort(descending=True)[: max(1, int(3 * objective.share))]].mean()
    (expected,) = torch.autograd.grad(whole, z)
    out = gfast.unlearn_loss(z, labels, objective, ref_logp=ref)
    torch.testing.assert_close(torch.autograd.grad(out.loss, z)[0], expected)
    assert out.loss.item() == pytest.approx(whole.item(), rel=1e-12)
    hidden, head = z.detach(), torch.eye(V, dtype=torch.float64)
    linear = gfast.linear_unlearn_loss(hidden.requires_grad_(), head, labels, objective, ref_logp=ref, chunk_rows=4)
    torch.testing.assert_close(torch.autograd.grad(linear.loss, hidden)[0], expected)
    assert linear.loss.item() == pytest.approx(whole.item(), rel=1e-12)
    with pytest.raises(ValueError, match="needs ref_logp"):
        gfast.unlearn_loss(z, labels, objective)
    for impl in ("auto", "reference"):  # nothing to forget is 0, never NaN
        out = gfast.unlearn_loss(z, torch.full_like(labels, -100), objective, ref_logp=torch.zeros_like(ref), impl=impl)
        assert out.loss == 0 and not out.weight.any() and not torch.autograd.grad(out.loss, z)[0].any()


def test_registry_and_names():
    assert from_name("WGA", alpha=0.5) == WGA(alpha=0.5)
    names = "ga wga satimp tnpo wtnpo npo simnpo dpo po nll kl rmu rr simsat simimp baldro baldrog hardmask softmask "
    names += "undial ceu shred unilogit jensun jsd"
    names += " etw pdu masc tpo"
    for name in names.split():
        assert REGISTRY[name].key == name == REGISTRY[name].__name__.lower()
    with pytest.raises(ValueError, match="choose one of"):
        from_name("wgo")
    with pytest.raises(ValueError, match="WGA has no parameter beta; it takes alpha"):
        from_name("wga", beta=1.0)


def test_mix():
    mix = Mix(NPO(), KL(), gamma=0.5, alpha=2.0)
    assert mix.needs == {"ref_logp", "ref_hidden", "ref_head"}
    assert str(mix) == "0.5 NPO(beta=0.1) + 2 KL()"
    with pytest.raises(ValueError, match="plain objectives"):
        Mix(mix)


@pytest.mark.parametrize(
    "bad",
    [
        lambda: WGA(alpha=-1),
        lambda: NPO(beta=0),
        lambda: TNPO(beta=-1),
        lambda: SatImp(beta1=-0.1),
        lambda: DPO(0),
        lambda: SimSat(-1),
        lambda: SimImp(-1),
        lambda: BalDRO(tau=0),
        lambda: BalDRO(beta=0),
        lambda: BalDROG(share=0),
        lambda: MASC(k=2.5),
        lambda: RMU(layer=1.5),
        lambda: RMU(layer=True),
        lambda: BalDRO(beta=True),
        lambda: JensUn((3, True)),
        lambda: PDU(primal_dual="false"),
        lambda: PDU(primal_dual=1),
        lambda: parse_objective("PDU:primal_dual=no"),
    ],
)
def test_bad_parameters(bad):
    with pytest.raises(ValueError, match="must (not )?be"):
        bad()


def test_words_of_yes_and_no():
    for word in ("false", "False", "FALSE"):
        assert parse_objective(f"PDU:primal_dual={word}") == PDU()
    assert parse_objective("PDU:primal_dual=true").primal_dual is True


def test_objectives_that_are_no_weights(data):
    logits, labels, _ = data
    with pytest.raises(TypeError, match="token_kl"):
        gfast.unlearn_loss(logits, labels, KL())
    with pytest.raises(TypeError, match="instance"):
        gfast.unlearn_loss(logits, labels, WGA)


def test_hidden_states_of_the_original_are_constants():
    hidden = torch.randn(1, 2, 3, requires_grad=True)
    found = []
    for original in (2 * hidden, 2 * hidden.detach()):
        loss = RR(layer=1).value(hidden, original, torch.ones(1, 2, dtype=torch.bool))
        found.append(torch.autograd.grad(loss, hidden)[0])
    assert torch.equal(*found)
