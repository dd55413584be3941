"""CPU row kernels against a literal fp64 computation: the error is at most twice plain PyTorch's plus one rounding."""

from __future__ import annotations

import itertools

import pytest
import torch

try:
    from gfast import _C  # noqa: F401
except ImportError as error:
    pytest.skip(f"gfast._C is not built: {error}", allow_module_level=True)

from helpers.cpp_rows import (
    DTYPES,
    EPS,
    NLL,
    WGA,
    case,
    check,
    effective,
    literal,
    literal_kl,
    one,
    ops,
    poisoned,
    weighted,
)

VOCABS = (1, 2, 7, 31, 33, 1000, 32003)
MAPS = ((1.0, 0.0), (0.7, 0.0), (1.0, 5.0), (1.3, 30.0))  # scale, softcap


@pytest.mark.parametrize("scale, softcap", MAPS)
@pytest.mark.parametrize("vocab", VOCABS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_weighted_and_logp(dtype, vocab, scale, softcap):
    z, y = case(33 if vocab < 10000 else 9, vocab, dtype)
    kwargs = dict(WGA, coef=0.25, scale=scale, softcap=softcap)
    truth, plain = literal(z, y, **kwargs), literal(z, y, **kwargs, dtype=torch.float32)
    out = poisoned(z)
    logp, weight = weighted(z, y, out, **kwargs)
    check(logp, plain[0], truth[0])
    check(weight, plain[1], truth[1])
    check(out, plain[2], truth[2])
    assert (out[1] == 0).all() and logp[1] == 0 and weight[1] == 0

    only_logp, stats = ops.logp_rows(z, y, scale, softcap)
    assert torch.equal(only_logp, logp)
    assert torch.equal(weighted(z, y, None, **kwargs)[1], weight)
    valid = y >= 0
    e = effective(z.double(), scale, softcap)
    total = (e - e.amax(1, keepdim=True)).exp().sum(1).log()
    assert torch.allclose(stats[valid, 0].double(), e.amax(1)[valid], rtol=4 * EPS, atol=0)
    assert torch.allclose(stats[valid, 1].double(), total[valid], rtol=4 * EPS, atol=4 * EPS * max(1.0, softcap))

    again = poisoned(z)
    ops.logp_rows_grad(z, y, only_logp, stats, weight * 0.25, scale, softcap, again)
    check(again, plain[2], truth[2])
    assert (again[1] == 0).all()


WEIGHTS = list(itertools.product((0.0, 0.5, 5.0), (0.0, 2.0), (0.0, 0.1, 2.0), (1.0, -1.0)))


@pytest.mark.parametrize("p_pow, q_pow, beta, sign", WEIGHTS)
def test_every_weight(p_pow, q_pow, beta, sign):
    z, y = case(33, 301, torch.float32)
    ref = torch.randn(33, generator=torch.Generator().manual_seed(1)) - 4.0
    kwargs = dict(ref=ref, sign=sign, p_pow=p_pow, q_pow=q_pow, beta=beta, coef=3.0)
    truth, plain = literal(z, y, **kwargs), literal(z, y, **kwargs, dtype=torch.float32)
    out = poisoned(z)
    logp, weight = weighted(z, y, out, **kwargs)
    check(weight, plain[1], truth[1])
    check(out, plain[2], truth[2])


@pytest.mark.parametrize("rows", (0, 1, 3))
@pytest.mark.parametrize("dtype", DTYPES)
def test_row_counts(dtype, rows):
    z, y = case(rows, 100, dtype)
    out = poisoned(z)
    logp, weight = weighted(z, y, out, **WGA)
    assert logp.shape == weight.shape == (rows,) and not out.isnan().any()
    logp, stats = ops.logp_rows(z, y, 1.0, 0.0)
    assert logp.shape == (rows,) and stats.shape == (rows, 2)
    assert ops.kl_rows(z, z.clone(), y, one(), 1.0, 0.0, 1.0, 0.0, None).shape == (rows,)


@pytest.mark.parametrize("vocab", (7, 5003))
@pytest.mark.parametrize("dtype", DTYPES)
def test_in_place_is_identical(dtype, vocab):
    z, y = case(5, vocab, dtype)
    ref = torch.roll(z, 1, 0)
    for call in (
        lambda a, out: weighted(a, y, out, **WGA, softcap=20.0),
        lambda a, out: weighted(a, y, out, **NLL),
        lambda a, out: ops.kl_rows(a, ref, y, one(), 1.0, 0.0, 1.0, 0.0, out),
        lambda a, out: ops.logp_rows_grad(a, y, *ops.logp_rows(a, y, 1.0, 0.0), torch.ones(5), 1.0, 0.0, out),
    ):
        fresh, same = poisoned(z), z.clone()
        call(z, fresh)
        call(same, same)
        assert torch.equal(fresh, same)


@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_rows(dtype):
    wide, y = case(5, 1040, dtype)
    z = wide[:, 3:1004]
    y = y.clamp(max=1000)
    target = torch.full((5, 1100), 7.0, dtype=dtype)
    dense = poisoned(z.contiguous())
    weighted(z, y, target[:, 5:1006], **WGA)
    weighted(z.contiguous(), y, dense, **WGA)
    assert torch.equal(target[:, 5:1006], dense)
    assert (target[:, :5] == 7).all() and (target[:, 1006:] == 7).all()
    row = z[:1].expand(5, -1)  # stride 0 is fine to read
    assert torch.equal(ops.logp_rows(row, y, 1.0, 0.0)[0], ops.logp_rows(row.contiguous(), y, 1.0, 0.0)[0])


@pytest.mark.parametrize("maps", ((1.0, 0.0, 1.0, 0.0), (0.7, 5.0, 1.3, 0.0), (1.0, 0.0, 0.5, 8.0)))
@pytest.mark.parametrize("vocab", VOCABS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_kl(dtype, vocab, maps):
    z, y = case(33 if vocab < 10000 else 9, vocab, dtype)
    r = (z.float() + 0.3 * case(z.shape[0], vocab, torch.float32, seed=9)[0]).to(dtype)
    truth = literal_kl(z, r, y, 0.5, *maps, torch.float64)
    plain = literal_kl(z, r, y, 0.5, *maps, torch.float32)
    out = poisoned(z)
    kl = ops.kl_rows(z, r, y, one(0.5), *maps, out)
    assert torch.equal(kl, ops.kl_rows(z, r, y, one(0.5), *maps, None))
    assert kl[1] == 0 and (out[1] == 0).all()
    if vocab == 1:
        assert (kl == 0).all() and (out == 0).all()
        return
    check(kl, plain[0], truth[0])
    check(out, plain[1], truth[1])


@pytest.mark.parametrize("size", (0, 1, 33, 5000, 300_001))
@pytest.mark.parametrize("dtype", DTYPES)
def test_scale(dtype, size):
    x = torch.randn(size + 1, generator=torch.Generator().manual_seed(size)).to(dtype)
    for factor in (0.37, 0.0, -2.0):
        out = x.clone()
        ops.scale_(out[1:], one(factor))
        assert torch.equal(out[1:], (x[1:].float() * factor).to(dtype)) and out[0] == x[0]
    with pytest.raises(ValueError, match="must be contiguous"):
        ops.scale_(torch.zeros(3, 2).t(), one())
