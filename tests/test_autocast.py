"""Inside torch.autocast: losses from logits compute as outside, those from a head cast as F.linear does."""

import pytest
import torch
from helpers.losses import label, need, problem, run, squared

import gfast
from gfast.objectives import NPO, WGA
from gfast.ops import head

IMPLS = ["reference", "cpp"]  # Triton kernels call nothing that autocast knows
REAL = [torch.float32, torch.bfloat16]


def assert_same_inside(loss, inputs, narrow=None):
    """Under autocast the loss is what it is outside, of the inputs cast to ``narrow``, bit for bit; gradients have the
    dtype of the inputs. The backward runs after it, as in trainers, or under it too."""

    def forward_only(*leaves):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return loss(*leaves)

    expected = run(loss, [x.to(narrow or x.dtype) for x in inputs])
    found = [run(forward_only, inputs)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found.append(run(loss, inputs))
    for value, *grads in found:
        assert value.dtype == expected[0].dtype and torch.equal(value, expected[0])
        for x, ours, exact in zip(inputs, grads, expected[1:], strict=True):
            assert ours.dtype == x.dtype and torch.equal(ours, exact.to(x.dtype))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", REAL, ids=str)
@pytest.mark.parametrize("reduction", ["token_mean", "none"])
@pytest.mark.parametrize("objective", [WGA(0.5), NPO(0.3), squared], ids=label)
def test_unlearn_loss_computes_as_outside(objective, reduction, dtype, impl):
    need("unlearn_loss", impl, "cpu", dtype)
    hidden, weight, _, labels, ref = problem()
    logits = (hidden @ weight.T).to(dtype)

    def loss(z):
        return gfast.unlearn_loss(z, labels, objective, ref_logp=ref, reduction=reduction, impl=impl)

    assert_same_inside(loss, [logits])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", REAL, ids=str)
def test_token_logp_and_token_kl_compute_as_outside(dtype, impl):
    need("token_kl", impl, "cpu", dtype)
    hidden, weight, _, labels, _ = problem()
    logits = (hidden @ weight.T).to(dtype)
    for loss in (
        lambda z: gfast.token_kl(z, logits * 0.5, labels, impl=impl),
        lambda z: gfast.token_logp(z, labels, impl=impl),
    ):
        assert_same_inside(loss, [logits])


def linear_losses(impl):
    """Each op that takes a head as (hidden, weight, bias) -> loss, in several chunks."""
    _, _, _, labels, ref = problem()
    ref_hidden, ref_weight, ref_bias, *_ = problem(seed=1, dtype=torch.float32)
    options = dict(chunk_rows=5, impl=impl)

    def unlearn(objective, reduction):
        return lambda h, w, b: gfast.linear_unlearn_loss(
            h, w, labels, objective, bias=b, ref_logp=ref, reduction=reduction, **options
        )

    def kl(h, w, b):
        return gfast.linear_token_kl(h, w, ref_hidden, ref_weight, labels, bias=b, ref_bias=ref_bias, **options)

    def logp(h, w, b):
        return gfast.linear_token_logp(h, w, labels, bias=b, **options)

    cases = (WGA(), "token_mean"), (NPO(0.3), "sum"), (squared, None), (WGA(), "none")
    return [*(unlearn(*case) for case in cases), kl, logp]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("native", [True, False], ids=["16-bit products", "fp32 products"])
@pytest.mark.parametrize("dtype", [*REAL, torch.float16], ids=str)
def test_heads_are_cast_like_linear_layers(dtype, native, impl, monkeypatch):
    need("linear_unlearn_loss", impl, "cpu", dtype)
    # Autocast is on while an op's own products run: those in fp32, where a processor has none of 16 bits, stay so.
    monkeypatch.setattr(head, "_native", lambda dtype: native)
    monkeypatch.setattr(head, "_multiplies_mixed", lambda: False)
    inputs = problem(dtype=dtype)[:3]
    for loss in linear_losses(impl):
        assert_same_inside(loss, inputs, torch.bfloat16)


def test_fp64_stays_fp64():
    """As in F.linear: what is in fp64 is wanted in fp64."""
    inputs = problem(dtype=torch.float64)[:3]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.nn.functional.linear(*inputs).dtype == torch.float64
    for loss in linear_losses("reference"):
        assert_same_inside(loss, inputs)
