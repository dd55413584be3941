"""Second derivatives, forward mode and torch.func: refused by the fused ops, exact by impl="reference"."""

import pytest
import torch
from helpers.losses import ALL, label, need, problem, squared
from torch.autograd import forward_ad

import gfast
from gfast.objectives import DPO, GA, NLL, NPO, WGA, SimNPO
from gfast.ops.linear_token_kl import linear_token_kl_reference
from gfast.ops.linear_token_logp import linear_token_logp_reference
from gfast.ops.token_kl import token_kl_reference
from gfast.ops.token_logp import token_logp_reference
from gfast.ops.unlearn_loss import unlearn_loss_reference
from gfast.ops.weights import sequence_weights

HIDDEN, HEAD, BIAS, LABELS, REF = problem(V=11)
HIDDEN, HEAD, BIAS = HIDDEN / 2, HEAD / 2, BIAS / 2
FORM = dict(logit_scale=0.7, softcap=5.0)
OBJECTIVES = [*ALL, squared]


def true(logp, objective):
    """The sum that the objective's derivatives are those of, written out."""
    if isinstance(objective, (NPO, DPO, SimNPO)):
        flat = torch.arange(4)[:, None].expand(4, 7).reshape(-1)
        valid = (LABELS != -100).reshape(-1)
        return sequence_weights(objective.spec(), logp.reshape(-1), REF.reshape(-1), valid, flat, 4)[1].sum()
    if isinstance(objective, (GA, NLL)):
        return logp.sum() * (-1 if isinstance(objective, NLL) else 1)
    weight = unlearn_loss_reference(rows_of(logp), LABELS, objective, ref_logp=REF).weight
    return (weight * logp).sum()


def rows_of(logp):
    """Logits of eleven entries whose labels have these log-probs."""
    p = logp.detach().exp().clamp(max=1 - 1e-15)
    z = ((1 - p) / 10).log()[..., None].expand(*p.shape, 11)
    return z.scatter(-1, LABELS.clamp(min=0)[..., None], p.log()[..., None])


def cases(impl, dtype, objective=None):
    """name: (the public op as a scalar function of hidden states, the same by its definition)."""
    objective = objective or WGA(0.5)
    head, bias, labels = HEAD.to(dtype), BIAS.to(dtype), LABELS
    logits = lambda h: torch.nn.functional.linear(h.tanh(), head, bias)  # noqa: E731
    given = dict(ref_logp=REF, reduction="sum", impl=impl)
    capped = lambda h: 5 * torch.tanh(0.7 * logits(h) / 5)  # noqa: E731
    other = lambda h: (h.detach() * 0.3).flip(1)  # noqa: E731

    def seeds(h):
        return torch.linspace(-1, 2, 28, dtype=h.dtype).view(4, 7)

    return {
        "unlearn_loss": (
            lambda h: gfast.unlearn_loss(logits(h), labels, objective, **given).loss,
            lambda h: true(token_logp_reference(logits(h), labels), objective),
        ),
        "unlearn_loss none": (
            lambda h: gfast.unlearn_loss(logits(h), labels, objective, **given | dict(reduction="none")).loss.sum(),
            lambda h: true(token_logp_reference(logits(h), labels), objective),
        ),
        "linear_unlearn_loss": (
            lambda h: (
                gfast.linear_unlearn_loss(
                    h.tanh(), head, labels, objective, bias=bias, chunk_rows=5, **given, **FORM
                ).loss
            ),
            lambda h: true(token_logp_reference(capped(h), labels), objective),
        ),
        "token_logp": (
            lambda h: (seeds(h) * gfast.token_logp(logits(h), labels, impl=impl)).sum(),
            lambda h: (seeds(h) * token_logp_reference(logits(h), labels)).sum(),
        ),
        "linear_token_logp": (
            lambda h: (seeds(h) * gfast.linear_token_logp(h.tanh(), head, labels, bias=bias, impl=impl, **FORM)).sum(),
            lambda h: (seeds(h) * linear_token_logp_reference(h.tanh(), head, labels, bias, **FORM)).sum(),
        ),
        "token_kl": (
            lambda h: gfast.token_kl(logits(h), logits(other(h)), labels, reduction="sum", impl=impl),
            lambda h: token_kl_reference(logits(h), logits(other(h)), labels).sum(),
        ),
        "linear_token_kl": (
            lambda h: gfast.linear_token_kl(
                h.tanh(), head, other(h), head, labels, bias=bias, ref_bias=bias, reduction="sum", impl=impl, **FORM
            ),
            lambda h: linear_token_kl_reference(h.tanh(), head, bias, other(h), head, bias, labels, 0.7, 5.0).sum(),
        ),
    }


NAMES = list(cases("auto", torch.float32))


def second(function, hidden):
    hidden = hidden.clone().requires_grad_()
    (grad,) = torch.autograd.grad(function(hidden), hidden, create_graph=True)
    return torch.autograd.grad(grad.square().sum(), hidden)[0]


def forward(function, hidden):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(function(forward_ad.make_dual(hidden, hidden.cos()))).tangent


TRANSFORMS = {
    "forward_ad": forward,
    "jvp": lambda f, h: torch.func.jvp(f, (h,), (h.cos(),))[1],
    "grad": lambda f, h: torch.func.grad(f)(h),
    "hessian": lambda f, h: torch.func.jvp(torch.func.grad(f), (h,), (h.cos(),))[1],
    "vmap": lambda f, h: torch.func.vmap(torch.func.grad(f))(torch.stack([h, 2 * h])),
}


@pytest.mark.parametrize("impl", ["auto", "cpp", "triton"])
@pytest.mark.parametrize("name", NAMES)
def test_fused_ops_refuse_what_they_cannot_differentiate(name, impl):
    if impl != "auto":
        need(name.split()[0], impl, "cpu", torch.float32)
    function = cases(impl, torch.float32)[name][0]
    with pytest.raises(RuntimeError, match='no second derivative.*impl="reference"'):
        second(function, HIDDEN.float())
    for transform in TRANSFORMS.values():
        with pytest.raises(RuntimeError, match='cannot be used in .*impl="reference"'):
            transform(function, HIDDEN.float())


@pytest.mark.parametrize("objective", OBJECTIVES, ids=label)
@pytest.mark.parametrize("name", NAMES[:3])
def test_losses_by_reference_have_every_derivative(name, objective):
    ours, exact = cases("reference", torch.float64, objective)[name]
    torch.testing.assert_close(second(ours, HIDDEN), second(exact, HIDDEN), rtol=1e-9, atol=1e-10)
    for how in ("jvp", "grad", "hessian"):
        found, expected = (TRANSFORMS[how](f, HIDDEN) for f in (ours, exact))
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", NAMES)
def test_ops_by_reference_have_every_derivative(name):
    ours, exact = cases("reference", torch.float64, NPO(0.3))[name]
    torch.testing.assert_close(second(ours, HIDDEN), second(exact, HIDDEN), rtol=1e-9, atol=1e-10)
    for transform in TRANSFORMS.values():
        torch.testing.assert_close(transform(ours, HIDDEN), transform(exact, HIDDEN), rtol=1e-9, atol=1e-10)


def test_second_derivatives_reach_the_head_and_the_upstream_gradient():
    inputs = [x.clone().requires_grad_() for x in (HIDDEN, HEAD, BIAS)]
    upstream = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)

    def both(loss):
        grads = torch.autograd.grad(loss, inputs, upstream, create_graph=True)
        return torch.autograd.grad(sum(x.pow(3).sum() for x in grads), [*inputs, upstream])

    def ours(impl):
        options = dict(bias=inputs[2], impl=impl, reduction="sum")
        return both(gfast.linear_unlearn_loss(inputs[0], inputs[1], LABELS, GA(), **options).loss)

    expected = both(linear_token_logp_reference(*inputs[:2], LABELS, inputs[2]).sum())
    for found, exact in zip(ours("reference"), expected, strict=True):
        torch.testing.assert_close(found, exact, rtol=1e-9, atol=1e-10)
    with pytest.raises(RuntimeError, match="no second derivative"):
        ours("auto")


def test_first_derivatives_do_not_mind_being_recorded():
    for name, (function, _) in cases("auto", torch.float32).items():
        hidden = HIDDEN.float().requires_grad_()
        loss = function(hidden)
        recorded, plain = (torch.autograd.grad(loss, hidden, create_graph=c)[0] for c in (True, False))
        assert torch.equal(recorded, plain), name
    logits = torch.randn(2, 3, 5, requires_grad=True)
    overwritten = gfast.unlearn_loss(logits * 1, torch.ones(2, 3, dtype=torch.long), GA(), inplace=True).loss
    (grad,) = torch.autograd.grad(overwritten, logits, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(grad.square().sum(), logits)


def test_labels_are_checked_where_they_can_be():
    for impl, options in (("reference", {}), ("reference", dict(reduction="none"))):
        f = lambda z: gfast.unlearn_loss(z, torch.tensor([9]), GA(), impl=impl, **options).loss.sum()  # noqa: B023, E731
        with pytest.raises(ValueError, match="outside the vocabulary"):
            torch.func.grad(f)(torch.zeros(1, 3))
