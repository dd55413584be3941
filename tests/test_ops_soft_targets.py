"""soft_target_loss and linear_soft_target_loss: values and gradients by formulas of their own, in fp64."""

import math

import pytest
import torch

import gfast
from gfast.ops.dispatch import kernel
from tests.helpers.losses import DRAWS, IMPLS, assert_law_of_draws, need, problem, run
from tests.helpers.marks import slow_when

INF = math.inf


def target_of(x, labels, beta):
    """q: the label's logit lowered one row at a time."""
    q = x.clone().reshape(-1, x.shape[-1])
    beta = torch.as_tensor(beta, dtype=x.dtype).expand(labels.shape).reshape(-1)
    for i, y in enumerate(labels.reshape(-1).tolist()):
        if y != -100:
            q[i, y] -= beta[i]
    return q.view(x.shape).softmax(-1)


def formula(z, x, labels, beta, kind):
    """The mean over labels of CE(q, p), or of another divergence, by torch's own functions."""
    counted = labels != -100
    q, log_p = target_of(x.detach(), labels, beta)[counted], z.log_softmax(-1)[counted]
    per_token = -torch.where(q > 0, q * log_p, 0.0).sum(-1)
    if kind == "js":
        p = log_p.exp()
        log_m = (0.5 * (p + q)).log()
        per_token = 0.5 * (p * (log_p - log_m) + torch.xlogy(q, q) - torch.xlogy(q, 0.5 * (p + q))).sum(-1)
    if kind == "kl":
        per_token = per_token + torch.xlogy(q, q).sum(-1)
    return per_token.sum() / max(1, int(counted.sum()))


@pytest.mark.parametrize("impl", IMPLS)
@slow_when(lambda p: p.impl == "triton" and p.dtype == torch.bfloat16)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_values_and_gradients(dtype, impl):
    """Both ops and both targets, with scale, soft cap, bias, ignored labels and a beta of each token's own."""
    need("soft_target_loss", impl, "cpu", dtype)
    few = impl == "triton" or dtype == torch.bfloat16
    draws = {}
    for seed in range(2 if few else DRAWS):
        hidden, weight, bias, labels, _ = problem(2 * seed, T=3 if few else 5)
        reference = [x.to(dtype).double() for x in problem(2 * seed + 1, T=3 if few else 5)[:3]]
        hidden, weight, bias = inputs = [x.to(dtype).double() for x in (hidden, weight, bias)]
        own = torch.rand(labels.shape, generator=torch.Generator().manual_seed(seed)) * 8
        own[-1, 0] = INF

        def logits_of(h, w, b):
            return 7 * torch.tanh(0.8 * torch.nn.functional.linear(h, w, b) / 7)

        cases = [(reference, 0.0, "kl"), (reference, own, "cross_entropy"), (None, INF, "cross_entropy")]
        cases += [(reference, 0.0, "js"), (reference, own, "js")]
        for number, (other, beta, kind) in enumerate(cases):
            if impl == "triton" and number in (0, 3):  # interpreted; the same code with a beta
                continue

            def literal(h, w, b):
                x = logits_of(*(t.to(h.dtype) for t in other or (h.detach(), w.detach(), b.detach())))  # noqa: B023
                return formula(logits_of(h, w, b), x, labels, beta, kind)  # noqa: B023

            def from_logits(h, w, b):
                x = None if other is None else logits_of(*(t.to(h.dtype) for t in other))  # noqa: B023
                return gfast.soft_target_loss(logits_of(h, w, b), x, labels, beta=beta, kind=kind, impl=impl)  # noqa: B023

            def linear(h, w, b):
                ref_hidden, ref_weight, ref_bias = other or (None,) * 3  # noqa: B023
                head = dict(bias=b, ref_bias=ref_bias, logit_scale=0.8, softcap=7.0, chunk_rows=5, impl=impl)
                if other is not None:  # noqa: B023
                    ref_hidden, ref_weight, head["ref_bias"] = (x.to(dtype) for x in (ref_hidden, ref_weight, ref_bias))
                return gfast.linear_soft_target_loss(h, w, ref_hidden, ref_weight, labels, beta=beta, kind=kind, **head)  # noqa: B023

            plain, truth = run(literal, [x.to(dtype) for x in inputs]), run(literal, inputs)
            for fn in (from_logits, linear):
                found = run(fn, [x.to(dtype) for x in inputs])
                draws.setdefault((number, fn.__name__), []).append((found, plain, truth))
    for drawn in draws.values():
        if dtype == torch.float64:
            for found, _, truth in drawn:
                torch.testing.assert_close(found, truth, rtol=1e-11, atol=1e-13)
        else:
            assert_law_of_draws(drawn, dtype, impl)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    "vocab, place", [(1, 0), (2, 1), (37, 36), (2049, 2048), (5003, 0), (5003, 2047), (5003, 4100)]
)
def test_what_is_left_of_a_memorised_label(vocab, place, impl):
    """The label's logit lies 40 above the others: what q is made of is far below one rounding of what is taken off."""
    need("soft_target_loss", impl, "cpu", torch.float32)
    if impl == "triton" and (vocab, place) not in ((37, 36), (2049, 2048), (5003, 2047)):
        return  # interpreted
    x = torch.randn(2, vocab, generator=torch.Generator().manual_seed(0))
    x[:, place] += 40.0
    labels, beta = torch.tensor([place, place]), torch.tensor([INF, 45.0])
    z = x.clone().requires_grad_()
    truth, exact = run(lambda z: formula(z, x.double(), labels, beta, "kl"), [x.double()])
    loss = gfast.soft_target_loss(z, x, labels, beta=beta, kind="kl", impl=impl)
    loss.backward()
    if vocab == 1:  # nothing is left without the only entry
        assert loss.isnan() and truth.isnan()
        return
    assert loss.item() == pytest.approx(truth.item(), rel=1e-6)
    torch.testing.assert_close(z.grad.double(), exact, rtol=3e-6, atol=1e-9)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("size", [1e-4, 1e-2, 1.0, 30.0])
def test_a_jensen_shannon_divergence_keeps_its_digits_near_zero_and_at_its_top(size, impl):
    need("soft_target_loss", impl, "cpu", torch.float32)
    rng = torch.Generator().manual_seed(0)
    x = 2 * torch.randn(3, 301, generator=rng) + 50
    z = (x + size * torch.randn(3, 301, generator=rng)).requires_grad_()
    z.data[0, :5] = -INF  # masked by the model
    x[0, 3:8] = -INF  # and by the original
    labels = torch.tensor([9, -100, 0])
    wide = z.detach().double().requires_grad_()
    log_p, log_q = wide.log_softmax(-1), x.double().log_softmax(-1)
    log_m = torch.logaddexp(log_p, log_q) - math.log(2)
    p, q = log_p.exp(), log_q.exp()
    terms = torch.where(p > 0, p * (log_p - log_m), 0.0) + torch.where(q > 0, q * (log_q - log_m), 0.0)
    exact = 0.5 * terms[[0, 2]].sum() / 2
    with torch.no_grad():
        h = torch.where(p > 0, 0.5 * (log_p - log_m), 0.0)
        gradient = p * (h - (p * h).sum(-1, keepdim=True)) / 2
        gradient[1] = 0
    loss = gfast.soft_target_loss(z, x, labels, kind="js", impl=impl)
    loss.backward()
    assert loss.item() == pytest.approx(exact.item(), rel=1e-4) and loss.item() <= math.log(2)
    alone = gfast.soft_target_loss(z, x, torch.tensor([-100, -100, 0]), kind="js", impl=impl).item()  # without masks
    assert alone == pytest.approx(0.5 * terms[2].sum().item(), rel=1e-4)
    for found, true in zip(z.grad, gradient, strict=True):
        assert (found.double() - true).norm() <= 1e-4 * true.norm() + 1e-9


@pytest.mark.parametrize("impl", ["cpp", "triton"])
@pytest.mark.parametrize("kind", [1, 2])
def test_the_kernel_writes_all_of_its_output_and_may_overwrite_its_input(kind, impl):
    need("soft_target_loss", impl, "cpu", torch.bfloat16)
    z = torch.randn(3, 50, generator=torch.Generator().manual_seed(1)).bfloat16()
    labels, lower, one = torch.tensor([7, -100, 49]), torch.tensor([3.0, INF, INF]), torch.tensor(0.5)
    launch, form = kernel("soft_rows", impl), (0.7, 9.0, 0.7, 9.0)
    out = torch.full_like(z, math.nan)
    value = launch(z, z, labels, lower, one, kind, *form, out)
    assert out.isfinite().all() and (out[1] == 0).all() and value[1] == 0
    same = z.clone()
    assert torch.equal(launch(same, same, labels, lower, one, kind, *form, same), value) and torch.equal(same, out)


def test_probabilities_and_empty_input():
    logits = torch.randn(3, 4, 9, dtype=torch.float64)
    labels = torch.randint(0, 9, (3, 4))
    labels[1] = -100
    q = torch.rand(3, 4, 9, dtype=torch.float64).softmax(-1)
    q[0, 0] = torch.nn.functional.one_hot(torch.tensor(3), 9)
    counted = labels != -100
    truth = -(q * logits.log_softmax(-1))[counted].sum() / counted.sum()
    found = gfast.soft_target_loss(logits, q, labels, probabilities=True)
    assert found.item() == pytest.approx(truth.item(), rel=1e-12)
    narrow = q.float()  # its logarithm has the digits of the logits
    exact = narrow.double() / narrow.double().sum(-1, keepdim=True)
    truth_of_it = -(exact * logits.log_softmax(-1))[counted].sum() / counted.sum()
    found = gfast.soft_target_loss(logits, narrow, labels, probabilities=True)
    assert found.item() == pytest.approx(truth_of_it.item(), rel=1e-13)
    q[1] = 5.0  # what lies where no label counts is nobody's target
    assert gfast.soft_target_loss(logits.float(), q, labels, probabilities=True).item() == pytest.approx(truth.item())
    z = torch.empty(0, 9, requires_grad=True)
    loss = gfast.soft_target_loss(z, None, torch.empty(0, dtype=torch.long), beta=INF)
    loss.backward()
    assert loss == 0 and z.grad.shape == (0, 9)
    h = torch.randn(2, 3, requires_grad=True)
    loss = gfast.linear_soft_target_loss(h, torch.randn(5, 3), None, None, torch.tensor([-100, -100]), beta=INF)
    loss.backward()
    assert loss == 0 and (h.grad == 0).all()


@pytest.mark.parametrize(
    "message, change",
    [
        ("beta must be >= 0", dict(beta=-1.0)),
        ("beta must be >= 0", dict(beta=math.nan)),
        (r"beta\[1\]", dict(beta=torch.tensor([0.0, -2.0]))),
        ("beta has shape", dict(beta=torch.zeros(3))),
        ("kind must be one of", dict(kind="js2")),
        ("does not match logits", dict(target=torch.zeros(2, 5))),
        ("sum to one.*row 0", dict(target=torch.full((2, 4), 0.3), probabilities=True)),
        ("least entry", dict(target=torch.tensor([[1.5, -0.5, 0, 0]] * 2), probabilities=True)),
        ("needs the target q", dict(target=None, probabilities=True)),
        ("reduction 'none'", dict(reduction="none")),
        ("outside the vocabulary", dict(labels=torch.tensor([4, 1]))),
    ],
)
def test_bad_input(message, change):
    given = dict(target=torch.zeros(2, 4), labels=torch.tensor([1, 2])) | change
    with pytest.raises(ValueError, match=f"gfast: .*{message}"):
        gfast.soft_target_loss(torch.zeros(2, 4), given.pop("target"), given.pop("labels"), **given)


def test_bad_heads():
    h, w, y = torch.zeros(2, 3), torch.zeros(4, 3), torch.tensor([1, 2])
    for other in ((None, w), (h, None)):
        with pytest.raises(ValueError, match="gfast: .* is missing.*its own head"):
            gfast.linear_soft_target_loss(h, w, *other, y)
    with pytest.raises(ValueError, match="ref_bias belongs to the target's head"):
        gfast.linear_soft_target_loss(h, w, None, None, y, ref_bias=torch.zeros(4))
    with pytest.raises(ValueError, match="different vocabularies: 4 and 5"):
        gfast.linear_soft_target_loss(h, w, h, torch.zeros(5, 3), y)
    with pytest.raises(TypeError, match="cast one of them"):
        gfast.soft_target_loss(w, w.double(), torch.tensor([0, 1, 2, 0]))


def test_opcheck_compile_and_derivatives():
    hidden, weight, bias, labels, _ = problem(B=2, T=3, dtype=torch.float32)
    flat, factor, lower = labels.reshape(-1), torch.tensor(0.25), torch.full((6,), 2.0)
    h = hidden.reshape(6, -1)
    rows = h @ weight.T
    for target in (rows * 0.5, None):
        torch.library.opcheck(torch.ops.gfast.soft_target, (rows, target, flat, lower, factor, 1, True, "auto"))
    head, last = [h, weight, bias], ([0, 37, 4, 4], [1.0, 0.0, 1.0, 0.0], "", "auto", [True] * 3)
    for other in (head, []):
        torch.library.opcheck(torch.ops.gfast.linear_soft_target, (head, other, flat, lower, factor, 2, *last))

    def step(h, w, b):
        loss = gfast.linear_soft_target_loss(h, w, hidden * 0.5, weight, labels, bias=b, ref_bias=bias, beta=3.0)
        return loss + gfast.soft_target_loss(torch.nn.functional.linear(h, w, b), None, labels, beta=INF)

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for ours, eager in zip(run(compiled, head_of := (hidden, weight, bias)), run(step, head_of), strict=True):
        torch.testing.assert_close(ours, eager, rtol=1e-5, atol=1e-6)
    z = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    x, y = torch.randn(2, 3, 5, dtype=torch.float64), labels.clamp(max=4)
    options = dict(beta=1.5, impl="reference")
    assert torch.autograd.gradcheck(lambda z: gfast.soft_target_loss(z, x, y, **options), z)
    assert torch.autograd.gradgradcheck(lambda z: gfast.soft_target_loss(z, x, y, **options), z)
    with pytest.raises(RuntimeError, match="second derivative"):
        small = z.detach().float().requires_grad_()
        (grad,) = torch.autograd.grad(gfast.soft_target_loss(small, x.float(), y, beta=1.5), small, create_graph=True)
        grad.sum().backward()
