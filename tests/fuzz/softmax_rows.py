"""Calls of the raw operators on rows of logits, each with its definition in fp64 and the error it may have."""

from __future__ import annotations

import torch
from draw import NARROW, ROUNDING, Draw, Raw
from near import EPS, near
from torch import Tensor


def capped(z: Tensor, scale: float, softcap: float) -> Tensor:
    z = z.double() * scale
    return softcap * torch.tanh(z / softcap) if softcap > 0 else z


class Rows:
    """fp64 softmax of rows. ``plain``: those whose log-probs are numbers; what infinite ones give is not asked here."""

    def __init__(self, logits: Tensor, labels: Tensor, scale: float, softcap: float):
        self.valid = labels != -100
        self.scale = abs(scale)
        self.z = capped(logits, scale, softcap)  # [N, V]
        self.at = labels.clamp(min=0)[:, None]
        if not self.z.numel():
            self.valid = torch.zeros_like(self.valid)
            self.logp = self.z.new_zeros(len(labels))
            self.plain, self.slack = ~self.valid, self.logp
            return
        self.logp_all = torch.log_softmax(self.z, -1)
        self.p = self.logp_all.exp()
        logp = self.logp_all.gather(1, self.at)[:, 0]
        self.nan = self.valid & self.z.isnan().any(1)
        self.plain = ~self.valid | (logp.isfinite() & (logits > -torch.inf).any(1))
        self.logp = torch.where(self.valid, logp, 0.0)
        size = self.z.abs().masked_fill(~self.z.isfinite(), 0.0).amax(1)
        linear = (scale * logits.double()).abs().masked_fill(~self.z.isfinite(), 0.0).amax(1)
        # an error of the argument of exp, a few roundings of the entries, is one of the probability relative to it
        self.slack = 24 * EPS * (1 + size + linear + self.logp.abs().masked_fill(~self.logp.isfinite(), 0.0))

    def slope(self, softcap: float) -> Tensor | float:
        return 1 - (self.z / softcap) ** 2 if softcap > 0 else 1.0

    def gradient(self, softcap: float, scale: float) -> Tensor:
        """d logp / d logits [N, V]."""
        delta = torch.zeros_like(self.z).scatter(1, self.at, 1.0) - self.p
        return torch.where(self.valid[:, None], delta * self.slope(softcap) * scale, 0.0)


def _only(rows: Tensor, *values: Tensor) -> list[Tensor]:
    return [x[rows] for x in values]


def _near_gradient(found: Tensor, rows: Rows, expected: Tensor, coef: Tensor, more: Tensor | float = 0.0) -> None:
    """expected = coef * a difference of probabilities: the error of those, and a rounding to the dtype."""
    eps = ROUNDING[found.dtype]
    slack = (
        coef.abs()[:, None] * rows.scale * (8 * rows.slack[:, None] + more)
        + 2 * eps * expected.abs()
        + 2.0**-24 * (found.dtype == torch.float16)
    )
    keep = rows.plain & expected.isfinite().all(1) & (expected.abs() < 6e4).all(1)
    near(*_only(keep, found), *_only(keep, expected), *_only(keep, slack + 1e-37), "out")


def _head(r: Draw):
    n, vocab = r.size(), r.choice((1, 2, 3, 7, 16, 33, 64, 100, 257, 2047, 2049, 4500))
    dtype = r.choice((torch.float32, *NARROW))
    scale = r.choice((1.0, 1.0, 0.5, 2.5))
    return n, vocab, dtype, scale, r.choice((0.0, 0.0, 30.0, 5.0))


def _out(r: Draw, logits: Tensor, chance: float = 0.3) -> Tensor:
    """Memory of its own, or the logits themselves."""
    apart = len(logits) < 2 or logits.stride(0) >= logits.shape[1]
    return logits if apart and r.maybe(chance) else r.guarded(logits.shape, logits.dtype)


def _same(held: tuple, given: tuple) -> bool:
    pairs = zip(held, given, strict=True)
    return all(torch.equal(x.nan_to_num(), y.nan_to_num()) if isinstance(x, Tensor) else x == y for x, y in pairs)


def logp_rows(r: Draw) -> Raw:
    n, vocab, dtype, scale, cap = _head(r)

    def check(before, result, _):
        logits, labels, scale, cap = before
        rows = Rows(logits, labels, scale, cap)
        near(*_only(rows.plain, result[0]), *_only(rows.plain, rows.logp), *_only(rows.plain, rows.slack), "logp")
        if rows.z.numel():
            assert result[0][rows.nan].isnan().all(), "a row with a NaN has a log-prob"

    return Raw("logp_rows", [r.logits(n, vocab, dtype), r.labels(n, vocab), scale, cap], None, check)


def logp_rows_grad(r: Draw) -> Raw:
    n, vocab, dtype, scale, cap = _head(r)
    logits, labels = r.logits(n, vocab, dtype), r.labels(n, vocab)
    rows = Rows(logits, labels, scale, cap)
    top = rows.z.amax(1) if rows.z.numel() else rows.z.new_zeros(n)
    total = (rows.z - top[:, None]).exp().sum(1).log() if rows.z.numel() else top
    stats, as_drawn = torch.stack([top, total], 1).float(), labels.clone()
    given = [r.laid_out(x) for x in (rows.logp.float(), stats, r.normal(n))]

    held = (given[0].clone(), given[1].clone(), scale, cap)

    def check(before, _, out):
        logits, labels, logp, stats, coef, scale, cap, _ = before
        if not _same(held, (logp, stats, scale, cap)) or not torch.equal(labels, as_drawn):
            return  # statistics of other rows
        rows = Rows(logits, labels, scale, cap)
        if rows.z.numel():
            _near_gradient(out, rows, coef.double()[:, None] * rows.gradient(cap, scale), coef)

    return Raw("logp_rows_grad", [logits, labels, *given, scale, cap, _out(r, logits)], 7, check)


def weighted_rows(r: Draw) -> Raw:
    n, vocab, dtype, scale, cap = _head(r)
    logits, labels = r.logits(n, vocab, dtype), r.labels(n, vocab)
    beta = r.choice((0.0, 0.0, 0.1, 1.0))
    ref = r.laid_out(-r.normal(n).abs() * 3) if beta or r.maybe(0.3) else None
    numbers = [r.choice((1.0, -1.0)), r.choice((0.0, 1.0, 0.5, 2.0)), r.choice((0.0, 0.0, 1.0)), beta]
    out = _out(r, logits) if r.maybe(0.8) else None

    def check(before, result, out):
        logits, labels, ref, sign, p_pow, q_pow, beta, coef, scale, cap, _ = before
        rows = Rows(logits, labels, scale, cap)
        keep = rows.plain
        near(*_only(keep, result[0]), *_only(keep, rows.logp), *_only(keep, rows.slack), "logp")
        if not rows.z.numel():
            return
        others = rows.logp_all.scatter(1, rows.at, -torch.inf).logsumexp(1)
        log_w = (p_pow * rows.logp if p_pow else 0.0) + (q_pow * others if q_pow else 0.0)
        if beta > 0:
            log_w = (
                log_w + torch.nn.functional.logsigmoid(beta * (rows.logp - ref.double())) + torch.log(torch.tensor(2.0))
            )
        weight = torch.where(rows.valid, sign * torch.exp(log_w + torch.zeros_like(rows.logp)), 0.0)
        unsure = (abs(p_pow) + abs(q_pow) + abs(beta)) * rows.slack + 4 * EPS
        keep = keep & (weight.abs() < 1e30) & (unsure < 0.1)
        keep &= (weight.abs() > 1e-30) | (weight == 0)
        near(*_only(keep, result[1]), *_only(keep, weight), *_only(keep, 2 * unsure * weight.abs() + 1e-37), "weight")
        if out is not None:
            coef = coef.double() * weight
            rows.plain = keep
            _near_gradient(out, rows, coef[:, None] * rows.gradient(cap, scale), coef, 4 * unsure[:, None])

    coef = r.laid_out(r.normal(n)) if r.maybe(0.4) else r.normal()
    return Raw("weighted_rows", [logits, labels, ref, *numbers, coef, scale, cap, out], 10, check)


def _entropy(p: Tensor) -> Tensor:
    return torch.special.entr(p).sum(1)


def stat_rows(r: Draw) -> Raw:
    n, vocab, dtype, scale, cap = _head(r)
    logits, labels = r.logits(n, vocab, dtype), r.labels(n, vocab)
    top = min(r.choice((1, 2, 5, 128)), vocab)

    def check(before, result, _):
        logits, labels, top, sharpness, soft, scale, cap = before
        rows, (stats, values, ids) = Rows(logits, labels, scale, cap), result
        if not rows.z.numel():
            return
        keep = rows.plain & rows.valid & ~rows.z.isnan().any(1)
        size = rows.z.abs().masked_fill(~rows.z.isfinite(), 0.0)
        slack = 8 * EPS * (1 + size.amax(1))
        expected = rows.z.topk(top, 1).values
        near(values[keep], expected[keep], slack[keep, None].expand(-1, top) + 1e-30, "values")
        near(values[keep], rows.z.gather(1, ids)[keep], slack[keep, None].expand(-1, top) + 1e-30, "ids")
        keep &= rows.z.isfinite().all(1)
        near(stats[keep, 3], rows.z.mean(1)[keep], slack[keep], "mean")
        if soft:
            sharp = torch.softmax(rows.z * sharpness, 1)
            wide = (1 + sharpness) * rows.slack * (2 + torch.log(torch.tensor(float(vocab + 1))))
            near(stats[keep, 5], _entropy(sharp)[keep], wide[keep], "entropy")
            near(stats[keep, 0] + stats[keep, 1], rows.z.logsumexp(1)[keep], rows.slack[keep], "log sum")
        assert (stats[~rows.valid] == 0).all() and (values[~rows.valid] == 0).all() and (ids[~rows.valid] == 0).all()

    return Raw("stat_rows", [logits, labels, top, r.choice((1.0, 1.0, 0.5)), r.maybe(0.8), scale, cap], None, check)


def stat_rows_grad(r: Draw) -> Raw:
    n, vocab, dtype, scale, cap = _head(r)
    logits, labels = r.logits(n, vocab, dtype), r.labels(n, vocab)
    given = [torch.zeros(n, 6), torch.zeros(n, 1)]
    if n and vocab and torch.isfinite(logits.float()).all():
        with torch.no_grad():
            given = torch.ops.gfast.stat_rows(logits.contiguous(), labels, 1, 1.0, True, scale, cap)[:2]
    count = r.choice((1, 2, 5))
    columns = torch.randint(0, vocab, (n, count), generator=r.torch)
    dense, soft = r.normal(n, 3), r.maybe(0.7)
    args = [logits, labels, given[0], dense, columns, r.normal(n, count), soft, scale, cap, _out(r, logits)]

    def check(before, result, out):
        logits, labels, _, dense, columns, adds, soft, scale, cap, _ = before
        rows = Rows(logits, labels, scale, cap)
        rows.plain = rows.plain & torch.isfinite(logits.float()).all() & rows.z.isfinite().all(1)
        if not rows.z.numel():
            return
        logp, entropy, mean = dense.double()[:, :, None].unbind(1)
        grad = (mean / rows.z.shape[1]).expand_as(rows.z)
        if soft:
            one = torch.zeros_like(rows.z).scatter(1, rows.at, 1.0)
            own = _entropy(rows.p)[:, None]
            grad = grad + logp * (one - rows.p)
            grad = grad - entropy * torch.where(rows.p > 0, rows.p * (rows.logp_all + own), 0.0)
        grad = grad.scatter_add(1, columns, adds.double()) * rows.slope(cap) * scale
        expected = torch.where(rows.valid[:, None], grad, 0.0)
        size = dense.double().abs().sum(1) + adds.double().abs().sum(1)
        _near_gradient(out, rows, expected, size, 24 * rows.slack[:, None])

    return Raw("stat_rows_grad", args, 9, check)


def _kl(before, totals=None):
    logits, ref, labels, (scale, cap, ref_scale, ref_cap) = before
    p, q = Rows(logits, labels, scale, cap), Rows(ref, labels, ref_scale, ref_cap)
    if not p.z.numel():
        return p, p.logp, None, p.slack
    d = torch.where(q.p > 0, q.logp_all - p.logp_all, 0.0)
    kl = torch.where(p.valid, (q.p * d).sum(1), 0.0)
    delta = torch.where(p.valid[:, None], (p.p - q.p) * p.slope(cap) * scale, 0.0)
    finite = (p.z.isfinite() | (p.z == -torch.inf)).all(1) & (q.z.isfinite() | (q.z == -torch.inf)).all(1)
    finite &= (p.z > -torch.inf).any(1) & (q.z > -torch.inf).any(1)
    p.plain = ~p.valid | finite
    p.slack = 2 * (p.slack + q.slack)
    return p, kl, delta, p.slack


def kl_rows(r: Draw) -> Raw:
    n, vocab, dtype, scale, cap = _head(r)
    logits, ref = r.logits(n, vocab, dtype), r.logits(n, vocab, r.choice((dtype, torch.float32)))
    out = _out(r, logits) if r.maybe(0.8) else None

    def check(before, result, out):
        logits, ref, labels, coef, *form, _ = before
        rows, kl, delta, slack = _kl((logits, ref, labels, form))
        keep = rows.plain & kl.isfinite()
        near(*_only(keep, result), *_only(keep, kl), *_only(keep, slack * (1 + kl)), "kl")
        if out is not None and delta is not None:
            rows.plain = keep
            _near_gradient(out, rows, coef.double() * delta, coef.expand(len(kl)))

    args = [logits, ref, r.labels(n, vocab), r.normal(), scale, cap, r.choice((1.0, 2.0)), r.choice((0.0, 20.0)), out]
    return Raw("kl_rows", args, 8, check)


def kl_parts(r: Draw) -> Raw:
    case = kl_rows(r)
    args = case.args[:3] + case.args[4:8]

    def check(before, result, _):
        logits, ref, labels, *form = before
        rows, kl, _, slack = _kl((logits, ref, labels, form))
        keep = rows.plain & kl.isfinite()
        near(*_only(keep, result[0]), *_only(keep, kl), *_only(keep, slack * (1 + kl)), "kl")

    return Raw("kl_parts", args, None, check)


def kl_rows_grad(r: Draw) -> Raw:
    case = kl_rows(r)
    logits, ref, labels, coef, *form, out = case.args
    n = len(logits)
    totals = torch.ones(n, 4, dtype=torch.float64)
    for k, z in enumerate((capped(logits, *form[:2]), capped(ref, *form[2:]))):
        if z.numel():
            top = z.amax(1).float().double()
            totals[:, 2 * k], totals[:, 2 * k + 1] = top, (z - top[:, None]).exp().sum(1)
    out = r.guarded(logits.shape, logits.dtype) if out is None else out

    held = (totals.clone(), *form)

    def check(before, _, out):
        logits, ref, labels, totals, coef, *form, _ = before
        if not _same(held, (totals, *form)):
            return  # totals of other rows
        rows, kl, delta, _ = _kl((logits, ref, labels, form))
        if delta is not None:
            rows.plain &= kl.isfinite()
            _near_gradient(out, rows, coef.double() * delta, coef.expand(len(kl)))

    return Raw("kl_rows_grad", [logits, ref, labels, totals, coef, *form, out], 9, check)


def soft_rows(r: Draw) -> Raw:
    case = kl_rows(r)
    logits, ref, labels, coef, *form, out = case.args
    lower = torch.tensor([r.choice((0.0, 1.0, 30.0, torch.inf)) for _ in range(len(logits))])
    kind = r.randrange(3)

    def check(before, result, out):
        logits, ref, labels, lower, coef, kind, *form, _ = before
        rows, q = Rows(logits, labels, *form[:2]), Rows(ref, labels, *form[2:])
        if not rows.z.numel():
            return
        taken = torch.where(rows.valid, lower.double(), 0.0)[:, None]
        z = q.z.scatter(1, rows.at, q.z.gather(1, rows.at) - taken)
        log_p, log_q = rows.logp_all, z.log_softmax(1)
        p, q_p = rows.p, log_q.exp()
        d = torch.where(q_p > 0, log_q - log_p, 0.0)
        delta = p - q_p
        value = (q_p * d).sum(1)
        if kind == 1:
            value = -torch.where(q_p > 0, q_p * log_p, 0.0).sum(1)
        if kind == 2:
            log_m = torch.logaddexp(log_p, log_q) - torch.log(torch.tensor(2.0, dtype=torch.float64))
            of_p = torch.where(p > 0, p * (log_p - log_m), 0.0)
            value = 0.5 * (of_p + torch.where(q_p > 0, q_p * (log_q - log_m), 0.0)).sum(1)
            delta = 0.5 * (of_p - p * of_p.sum(1, keepdim=True))
        value = torch.where(rows.valid, value, 0.0)
        finite = [(x.isfinite() | (x == -torch.inf)).all(1) & (x > -torch.inf).any(1) for x in (rows.z, z)]
        keep = (~rows.valid | (finite[0] & finite[1])) & value.isfinite()
        rows.slack = 2 * (rows.slack + q.slack)
        near(*_only(keep, result), *_only(keep, value), *_only(keep, rows.slack * (1 + value)), "value")
        if out is not None:
            rows.plain = keep
            delta = torch.where(rows.valid[:, None], delta * rows.slope(form[1]) * form[0], 0.0)
            _near_gradient(out, rows, coef.double() * delta, coef.expand(len(value)))

    return Raw("soft_rows", [logits, ref, labels, lower, coef, kind, *form, out], 10, check)


def fold_rows(r: Draw) -> Raw:
    n, vocab, dtype, scale, cap = _head(r)
    logits, labels = r.logits(n, vocab, dtype), r.labels(n, vocab).contiguous()
    state = torch.zeros(3, n, dtype=torch.float64)
    state[0] = -torch.inf

    def check(before, _, state):
        logits, labels, first, scale, cap, _ = before
        own = torch.where((labels >= first) & (labels < first + logits.shape[1]), labels - first, -100)
        rows = Rows(logits, own, scale, cap)
        if not rows.z.numel():
            return
        keep = rows.plain & rows.valid
        found = state[2] - torch.logaddexp(state[0] + state[1].log(), state[2])
        near(*_only(keep, found), *_only(keep, rows.logp), *_only(keep, rows.slack), "logp of state")

    return Raw("fold_rows", [logits, labels, 0, scale, cap, state], 5, check)
