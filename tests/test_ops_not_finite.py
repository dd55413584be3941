"""Rows that hold -inf, +inf or NaN: every backend gives NaN where PyTorch does, and numbers where it does."""

import contextlib
import itertools

import pytest
import torch
from helpers.losses import need
from helpers.marks import slow_when

import gfast
from gfast.objectives import GA, NPO, TNPO, WGA, SatImp
from gfast.ops.linear_token_logp import linear_token_logp_reference
from gfast.ops.token_kl import token_kl_reference
from gfast.ops.token_logp import token_logp_reference

IMPLS = ["reference", "cpp", "triton"]
INF, NAN = float("inf"), float("nan")
V = 37  # two vectors and a rest


def rows(dtype):
    """name: a row of logits [V] whose label is 2."""
    found = {}
    for label, other, rest in itertools.product((0.0, -INF, INF, NAN), repeat=3):
        row = torch.full((V,), rest)
        row[2], row[30] = label, other
        found[f"{label} {other} {rest}"] = row
    largest = torch.finfo(dtype).max if dtype == torch.float16 else 3e4
    found["largest"] = torch.full((V,), largest)
    found["largest at the label"] = torch.linspace(-largest, 0, V)
    found["largest at the label"][2] = largest
    return {name: row.to(dtype) for name, row in found.items()}


def same(ours, exact, what):
    """NaN and infinities at the same places, and close numbers elsewhere."""
    torch.testing.assert_close(
        ours.double(), exact.double(), rtol=1e-2, atol=1e-5, equal_nan=True, msg=lambda m: f"{what}: {m}"
    )


@slow_when(lambda p: p.impl == "triton")  # interpreted
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_log_probs_are_nan_where_pytorchs_are(dtype, impl):
    need("token_logp", impl, "cpu", dtype)
    names, z = list(rows(dtype)), torch.stack(list(rows(dtype).values()))[:, None]  # [R, 1, V]: R sequences
    labels, ref = torch.full((len(names), 1), 2), torch.full((len(names), 1), -2.0)
    exact = token_logp_reference(z.double(), labels)
    same(gfast.token_logp(z, labels, impl=impl), exact, names)
    for objective in (GA(), WGA(0.5), SatImp(2.0, 1.0), TNPO(0.7), NPO(0.3)):
        x = z.clone().requires_grad_()
        out = gfast.unlearn_loss(x, labels, objective, ref_logp=ref, impl=impl)
        out.loss.backward()
        same(out.logp, exact, names)
        for name, true, grad in zip(names, exact, x.grad, strict=True):
            assert grad.isnan().any() if true.isnan() else true.isinf() or grad.isfinite().all(), (name, objective)
    if impl == "triton":
        return  # its fold is interpreted for fp16 alone, and slowly
    for row, true in zip(z[:, 0], exact, strict=True):  # a head of one column gives these rows as logits
        hidden, weight = torch.ones(1, 1, dtype=dtype), row[:, None].clone()
        same(gfast.linear_token_logp(hidden, weight, labels[:1, 0], impl=impl), true, row)


@pytest.mark.parametrize("impl", IMPLS)
def test_check_finite_finds_them(impl):
    need("unlearn_loss", impl, "cpu", torch.float32)
    for name, row in rows(torch.float32).items():
        finite = token_logp_reference(row[None].double(), torch.tensor([2])).isfinite()
        with contextlib.nullcontext() if finite else pytest.raises(ValueError, match="not finite"):
            gfast.unlearn_loss(row[None], torch.tensor([2]), GA(), impl=impl, check_finite=True)
            assert finite, name


@pytest.mark.parametrize("impl", IMPLS)
def test_kl_is_nan_where_the_reference_model_is(impl):
    need("token_kl", impl, "cpu", torch.float32)
    model = torch.linspace(-1, 1, V)
    for name, row in rows(torch.float32).items():
        for z, ref in ((model, row), (row, model)):
            labels = torch.tensor([0, -100])
            z, ref = torch.stack([z, model]), torch.stack([ref, model])
            exact = token_kl_reference(z.double(), ref.double(), labels).sum()
            assert (
                exact.isnan() == (~ref.isfinite() & (ref != -INF)).any()
                or not z.isfinite().all()
                or ((ref == -INF).all(1).any())
            )
            same(gfast.token_kl(z, ref, labels, reduction="sum", impl=impl), exact, name)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_masked_entry_that_the_reference_gives_nothing_adds_nothing(impl):
    """q underflows in fp32 where the model has masked the entry: early in the row, late, and below a later maximum."""
    need("token_kl", impl, "cpu", torch.float32)
    for place, size in itertools.product((0, 5, 700), (800, 5000)):
        z, ref = torch.randn(2, 1, size)
        z[0, place], ref[0, place] = -INF, -200.0
        ref[0, -1] = 5.0
        labels = torch.zeros(1, dtype=torch.long)
        exact = token_kl_reference(
            z[:, torch.arange(size) != place].double(), ref[:, torch.arange(size) != place].double(), labels
        )
        found = gfast.token_kl(z, ref, labels, impl=impl)
        assert found.item() == pytest.approx(exact.item(), rel=1e-5)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("size", [V, 5000])
def test_a_softcap_makes_infinite_logits_finite(size, impl):
    """c tanh(-inf / c) = -c: a row of them is uniform, as it is to the model."""
    need("linear_unlearn_loss", impl, "cpu", torch.float32)
    for value in (-INF, INF):
        bias = torch.full((size,), value)
        mixed = torch.zeros(size)
        mixed[3:] = value
        for b in (bias, mixed):
            given = torch.ones(2, 4), torch.ones(size, 4), torch.tensor([2, 7]), b
            exact = linear_token_logp_reference(
                *(x.double() if x.is_floating_point() else x for x in given), softcap=5.0
            )
            assert exact.isfinite().all()
            for objective in (WGA(1.0), NPO(0.1)):
                leaf = given[0].clone().requires_grad_()
                out = gfast.linear_unlearn_loss(
                    leaf, given[1], given[2], objective, bias=b, softcap=5.0, ref_logp=torch.zeros(2), impl=impl
                )
                out.loss.backward()
                same(out.logp, exact, (value, objective))
                assert leaf.grad.isfinite().all()
            same(gfast.linear_token_logp(*given[:3], bias=b, softcap=5.0, impl=impl), exact, value)


@pytest.mark.parametrize("impl", ["reference", "cpp"])
def test_whole_heads_of_nan_do_not_hide(impl):
    need("linear_unlearn_loss", impl, "cpu", torch.float32)
    hidden, weight = torch.randn(3, 4), torch.randn(9, 4)
    bias = torch.zeros(9)
    for value in (-INF, INF, NAN):
        bias[:] = value
        exact = linear_token_logp_reference(hidden, weight, torch.arange(3), bias)
        out = gfast.linear_unlearn_loss(
            hidden.clone().requires_grad_(), weight, torch.arange(3), WGA(1.0), bias=bias, impl=impl
        )
        assert exact.isnan().all() and out.logp.isnan().all() and out.loss.isnan(), value
