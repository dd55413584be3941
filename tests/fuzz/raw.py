"""Calls of the raw operators, each with its definition in fp64 and the error that its arithmetic may have.

Those on rows of logits are in softmax_rows.py.
"""

from __future__ import annotations

import torch
from draw import NARROW, Draw, Raw
from near import EPS, near
from softmax_rows import (
    fold_rows,
    kl_parts,
    kl_rows,
    kl_rows_grad,
    logp_rows,
    logp_rows_grad,
    soft_rows,
    stat_rows,
    stat_rows_grad,
    weighted_rows,
)
from torch import Tensor


def _product(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """left @ right in fp64, and the sizes that an error is measured in."""
    return left.double() @ right.double(), left.double().abs() @ right.double().abs() * EPS * (left.shape[1] + 4)


def mixed_mm(r: Draw) -> Raw:
    m, n, k = r.size(130), r.size(130), r.size(300, 1030)
    bias = r.normal(n) if r.maybe(0.5) else None

    def check(before, _, out):
        a, b, bias, _ = before
        expected, slack = _product(a, b.t())
        more = 0.0 if bias is None else bias.double()
        near(out, expected + more, slack + 4 * EPS * (expected.abs() + abs(more)) + 1e-30, "out")

    dtype = r.choice((torch.float32, *NARROW))
    return Raw("mixed_mm", [r.matrix(m, k), r.matrix(n, k, dtype), bias, r.guarded((m, n), torch.float32)], 3, check)


def head_grad_hidden(r: Draw) -> Raw:
    n, vocab, width = r.size(), r.size(300, 1030), r.size(130)

    def check(before, _, out):
        grad, weight, _, _ = before
        expected, slack = _product(grad, weight)
        near(out, expected, slack + 1e-30, "out")

    weight = r.matrix(vocab, width, r.choice((torch.float32, *NARROW)))
    out = torch.full((n, width), torch.nan)
    return Raw("head_grad_hidden", [r.matrix(n, vocab), weight, r.choice((1, 2, 32)), out], 3, check)


def head_grad_weight(r: Draw) -> Raw:
    n, vocab, width = r.size(1030), r.size(300), r.size(130)

    def check(before, _, out):
        grad, hidden, _ = before
        expected, slack = _product(grad.t(), hidden)
        near(out, expected, slack + expected.abs() * 2.0**-8 + 1e-30, "out")

    out = torch.full((vocab, width), torch.nan, dtype=torch.bfloat16)
    return Raw("head_grad_weight", [r.matrix(n, vocab), r.matrix(n, width), out], 2, check)


def accumulate(r: Draw) -> Raw:
    shape = (r.size(), r.size())

    def check(before, _, out):
        near(out, before[0] + before[1].float(), 0.0, "total")

    return Raw("accumulate", [r.normal(*shape), r.normal(*shape, dtype=r.choice(NARROW))], 0, check)


def scale_(r: Draw) -> Raw:
    dtype = r.choice((torch.float32, *NARROW))

    def check(before, _, x):
        near(x, (before[0].float() * before[1]).to(x.dtype), 0.0, "x")

    return Raw("scale_", [r.normal(r.size(), r.size(500), dtype=dtype), r.normal()], 0, check)


def used_rows(r: Draw) -> Raw:
    def check(before, result, _):
        assert torch.equal(result, (before[0] != 0).any(1)), "used rows"

    x = r.matrix(r.size(), r.size(), r.choice((torch.float32, torch.float64, *NARROW)), expand=True)
    return Raw("used_rows", [x], None, check)


def _by_samples(x: Tensor, rows: list[int], columns: list[int]) -> Tensor:
    ends = [torch.tensor([0, *counts]).cumsum(0) for counts in (rows, columns)]
    out = x.new_zeros(len(rows), len(columns))
    for i in range(len(rows)):
        for j in range(len(columns)):
            out[i, j] = x[ends[0][i] : ends[0][i + 1], ends[1][j] : ends[1][j + 1]].sum()
    return out


def pair_dots(r: Draw) -> Raw:
    n, m, d_in, d_out = r.size(130, 600), r.size(130), r.size(70) or 1, r.size(70) or 1
    a, b = r.matrix(n, d_in), r.matrix(n, d_out)
    same = r.maybe(0.3)
    c, d = (a, b) if same else (r.matrix(m, d_in), r.matrix(m, d_out))
    rows = r.counts(n)
    columns = rows if same else r.counts(m)
    inputs = torch.full((n * (len(c) + 63),), torch.nan) if r.maybe(0.4) else None

    def check(before, result, _):
        a, b, c, d, rows, columns, same, _, known = before
        if known or (same and not all(torch.equal(u.nan_to_num(), v.nan_to_num()) for u, v in ((a, c), (b, d)))):
            return  # what the caller says is taken on trust
        x, y = a.double() @ c.double().t(), b.double() @ d.double().t()
        size = (a.double().abs() @ c.double().abs().t()) * (b.double().abs() @ d.double().abs().t())
        slack = _by_samples(size, rows, columns) * EPS * (a.shape[1] + b.shape[1] + 40)
        near(result, _by_samples(x * y, rows, columns), slack + 1e-30, "out")

    return Raw("pair_dots", [a, b, c, d, rows, columns, same, inputs, False], 7, check)


def pair_sums(r: Draw) -> Raw:
    n, m = r.size(), r.size(300)
    dtype = r.choice((torch.float32, torch.float64))

    def check(before, result, _):
        x, y, rows, columns = before
        xy = x.double() * y.double()
        near(result, _by_samples(xy, rows, columns), _by_samples(xy.abs(), rows, columns) * 20 * EPS + 1e-30, "out")

    return Raw("pair_sums", [r.matrix(n, m, dtype), r.matrix(n, m, dtype), r.counts(n), r.counts(m)], None, check)


def row_dots(r: Draw) -> Raw:
    n, width, height = r.size(130), r.size(400), r.size(330)

    def check(before, result, _):
        a, b, g = (x.double() for x in before)
        expected = torch.einsum("no,oi,ni->n", b, g, a)
        if not g.numel():  # a sum of nothing, though einsum multiplies the zeros of its first product with infinities
            expected = torch.zeros(n, dtype=torch.float64)
        slack = torch.einsum("no,oi,ni->n", b.abs(), g.abs(), a.abs()) * EPS * (a.shape[1] + b.shape[1] + 20)
        near(result, expected, slack + 1e-30, "out")

    direction = r.matrix(height, width, r.choice((torch.float32, *NARROW)))
    return Raw("row_dots", [r.matrix(n, width), r.matrix(n, height), direction], None, check)


def grad_dots(r: Draw) -> Raw:
    count, dirs, groups = r.choice((1, 2, 5)), r.choice((0, 1, 2, 3)), r.choice((1, 3))
    dtypes = (torch.float32, torch.float64, *NARROW)
    shapes = [(r.size(300), r.size(20000) if r.maybe(0.05) else r.size()) for _ in range(count)]
    xs = [r.matrix(*shape, r.choice(dtypes), expand=True) for shape in shapes]
    ys = [r.matrix(*shape, r.choice(dtypes), expand=True) for _ in range(dirs) for shape in shapes]

    def check(before, result, _):
        xs, ys, where, groups, dirs = before
        expected = torch.zeros(groups, dirs + 1, dtype=torch.float64)
        slack = torch.full_like(expected, 1e-30)
        for t, group in enumerate(where):
            for d in range(dirs + 1):
                terms = xs[t].double() * (ys[d * len(xs) + t] if d < dirs else xs[t]).double()
                expected[group, d] += terms.sum()
                slack[group, d] += terms.abs().sum() * 20 * EPS
        near(result, expected, slack, "out")

    return Raw("grad_dots", [xs, ys, [r.randrange(groups) for _ in xs], groups, dirs], None, check)


def fresh(r: Draw) -> Raw:
    size = [r.size() for _ in range(r.randrange(4))]

    def check(before, result, _):
        assert list(result.shape) == before[0] and result.dtype == before[1] and result.is_contiguous(), "fresh"
        if result.numel() < 1 << 20:  # more may be promised than there is
            result.fill_(1)

    return Raw(r.choice(("fresh", "unpooled")), [size, r.choice((torch.float32, torch.float64, *NARROW))], None, check)


OPS = (
    logp_rows,
    logp_rows_grad,
    weighted_rows,
    stat_rows,
    stat_rows_grad,
    kl_rows,
    kl_parts,
    kl_rows_grad,
    soft_rows,
    fold_rows,
    mixed_mm,
    head_grad_hidden,
    head_grad_weight,
    accumulate,
    scale_,
    used_rows,
    pair_dots,
    pair_sums,
    row_dots,
    grad_dots,
    fresh,
)
