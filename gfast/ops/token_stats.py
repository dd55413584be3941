"""``token_stats``: what the model predicts at each label token: entropy, largest logits, mean, margin to the label."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from gfast.ops.checks import IGNORE_INDEX, check_rows
from gfast.ops.derivatives import check_literal_labels, differentiable_once, differentiated, wants_literal
from gfast.ops.dispatch import kernel, select
from gfast.ops.labels import label_factor
from gfast.ops.memory import fresh
from gfast.ops.registration import python_op
from gfast.ops.token_logp import capped, finite_slope, stats_dtype, unit_stride

TOP, LOG_TOTAL, GAP, MEAN, LABEL, ENTROPY = range(6)  # columns of a row's statistics, see ``_stat_rows_reference``
MOST_TOP = 128  # rows.h's kMostTop


class TokenStats(NamedTuple):
    """What a row of logits z says, each field of the shape of the labels, 0 where ignored.

    Attributes:
        logp: log p of the label.
        entropy: of the softmax, -sum_j p_j log p_j.
        top, second: the largest logit and the next (equal to it in a tie; -inf where there is one logit only).
        mean: of the logits.
        margin: logit of the label minus the largest of the others.
    """

    logp: Tensor
    entropy: Tensor
    top: Tensor
    second: Tensor
    mean: Tensor
    margin: Tensor


class RowStats(NamedTuple):
    """The same of rows [N], and more: ``values`` and ``ids`` [N, k] are the k largest logits and their columns,
    ``label`` is the label's logit. Of equal logits the first column comes first."""

    logp: Tensor
    entropy: Tensor
    mean: Tensor
    label: Tensor
    values: Tensor
    ids: Tensor

    def rivals(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Values and columns [N, k - 1] of the largest logits but the label's [N]."""
        columns = torch.arange(self.ids.shape[1], device=labels.device)
        is_label = self.ids == labels[:, None]  # [N, k]
        at = torch.where(is_label.any(1), is_label.int().argmax(1), self.ids.shape[1] - 1)  # which one is left out
        others = columns[:-1] + (columns[:-1] >= at[:, None])
        return self.values.gather(1, others), self.ids.gather(1, others)

    def token_stats(self, labels: Tensor) -> TokenStats:
        """The public fields, from the two largest logits, of labels [...]."""
        flat, values = labels.reshape(-1), self.values
        rival = torch.where(self.ids[:, 0] == flat, values[:, 1], values[:, 0])
        margin = torch.where(flat != IGNORE_INDEX, self.label - rival, 0.0)
        second = torch.where(flat != IGNORE_INDEX, values[:, 1], 0.0)  # -inf where there is none
        fields = self.logp, self.entropy, values[:, 0], second, self.mean, margin
        return TokenStats(*(x.reshape(labels.shape) for x in fields))


def row_stats_reference(logits: Tensor, labels: Tensor, top: int, temperature: float = 1.0) -> RowStats:
    """The literal definition for rows [N, V], differentiable by autograd; the entropy of softmax(z / temperature)."""
    z = capped(logits, 1.0, 0.0)
    log_p = torch.log_softmax(z, dim=-1)
    sharp = torch.log_softmax(z / temperature, dim=-1)
    p = sharp.exp()
    entropy = -(p * torch.where(p == 0, 0.0, sharp)).sum(-1)
    values, ids = torch.sort(z.detach(), dim=-1, descending=True, stable=True)
    ids = ids[:, :top]
    bad, target = z.isnan().any(-1), labels.clamp(min=0)[:, None]
    values = torch.where(bad[:, None], torch.nan, z.gather(1, ids))
    label = torch.where(bad, torch.nan, z.gather(1, target)[:, 0])
    rows = log_p.gather(1, target)[:, 0], entropy, z.mean(-1), label
    valid = labels != IGNORE_INDEX
    rows = [torch.where(valid, x, 0.0) for x in rows]
    return RowStats(*rows, torch.where(valid[:, None], values, 0.0), torch.where(valid[:, None], ids, 0))


def _stat_rows_reference(logits, labels, top, sharpness, soft, scale, softcap) -> tuple[Tensor, Tensor, Tensor]:
    """Statistics [N, 6]: maximum; log of the sum of exps relative to it; mean of its distance under the softmax; mean;
    the label's logit; entropy of softmax(sharpness z). Largest values and their columns, [N, top]."""
    z = capped(logits, scale, softcap)  # [N, V]
    valid = (labels != IGNORE_INDEX)[:, None]
    values, ids = torch.sort(z, dim=-1, descending=True, stable=True)
    values, ids = values[:, :top], ids[:, :top]
    bad = torch.zeros_like(z[:, :1]).masked_fill_(z.isnan().any(-1, keepdim=True), torch.nan)

    def softmax_sums(x: Tensor) -> tuple[Tensor, Tensor]:  # of x <= 0, the maximum's 0 left out
        e = torch.exp(x).scatter(1, ids[:, :1], 0.0)
        others = e.sum(-1)
        return torch.log1p(others), -torch.where(e == 0, 0.0, e * x).sum(-1) / (1 + others)

    distance = z - values[:, :1]
    log_total, gap = softmax_sums(distance) if soft else (torch.zeros_like(values[:, 0]),) * 2
    entropy = sum(softmax_sums(distance * sharpness)) if soft else log_total
    label = z.gather(1, labels.clamp(min=0)[:, None])[:, 0]
    stats = torch.stack([values[:, 0], log_total, gap, z.mean(-1), label, entropy], dim=1)
    return torch.where(valid, stats + bad, 0.0), torch.where(valid, values + bad, 0.0), torch.where(valid, ids, 0)


def _stat_rows_grad_reference(logits, labels, stats, dense, columns, adds, soft, scale, softcap, out) -> None:
    z = capped(logits, scale, softcap)  # [N, V]
    valid, target = (labels != IGNORE_INDEX)[:, None], labels.clamp(min=0)[:, None]
    top, log_total, gap = (stats[:, k, None] for k in (TOP, LOG_TOTAL, GAP))
    logp, entropy, mean = (dense[:, k, None] for k in range(3))
    grad = (mean / z.shape[1]).expand_as(z)
    if soft:
        x = z - top
        p = torch.exp(x - log_total)
        # the label's entry is 1 - p, formed before any rounding
        from_logp = (-p).scatter(1, target, -torch.expm1((stats[:, LABEL, None] - top) - log_total))
        grad = grad + logp * from_logp - entropy * torch.where(p == 0, 0.0, p * (x + gap))
    grad = grad.scatter_add(1, columns, adds)
    out.copy_(torch.where(valid, grad * finite_slope(z, scale, softcap), 0.0))


def stat_rows(
    logits: Tensor, labels: Tensor, top: int, sharpness: float, soft: bool, scale: float, softcap: float, impl: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Statistics [N, 6], largest values [N, top] and their columns of logits [N, V], see ``_stat_rows_reference``;
    without ``soft`` those that take exps are 0. ``impl`` is one that serves them."""
    launch = _stat_rows_reference if impl == "reference" or not logits.shape[0] else kernel("stat_rows", impl)
    return launch(logits, labels, top, sharpness, soft, scale, softcap)


def stat_rows_grad(
    logits, labels, stats, dense, columns, adds, soft: bool, scale: float, softcap: float, out, impl: str
) -> None:
    """out [N, V] (may be logits) = the gradient of sum_i dense_i0 logp_i + dense_i1 entropy_i + dense_i2 mean_i + sum_k
    adds_ik z_i,columns_ik, from what ``stat_rows`` gives; dense [N, 3], columns and adds [N, c]. Without ``soft`` the
    first two are 0."""
    if logits.shape[0]:
        launch = _stat_rows_grad_reference if impl == "reference" else kernel("stat_rows_grad", impl)
        launch(logits, labels, stats, dense, columns, adds, soft, scale, softcap, out)


def rows_of_stats(stats: Tensor, values: Tensor, ids: Tensor) -> RowStats:
    """What ``stat_rows`` gives, by name."""
    top, log_total, _, mean, label, entropy = stats.unbind(1)
    return RowStats((label - top) - log_total, entropy, mean, label, values, ids)


def fake_row_stats(rows: Tensor, top: int) -> tuple[Tensor, ...]:
    """The fields of ``RowStats`` and the statistics [N, 6] of logits or hidden states [N, ...] for tracing."""
    dtype, count = stats_dtype(rows.dtype), rows.shape[0]
    per_row = [rows.new_empty(count, dtype=dtype) for _ in range(4)]
    ids = rows.new_empty((count, top), dtype=torch.int64)
    return *per_row, rows.new_empty((count, top), dtype=dtype), ids, rows.new_empty((count, 6), dtype=dtype)


def _fake_stats(logits, labels, top, soft, impl):
    return fake_row_stats(logits, top)


def _fake_gradient(logits, *_):
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


@python_op("token_stats_backward", _fake_gradient)
def _row_stats_gradient(
    logits: Tensor, labels: Tensor, stats: Tensor, dense: Tensor, columns: Tensor, adds: Tensor, soft: bool, impl: str
) -> Tensor:
    """``stat_rows_grad`` in memory of its own."""
    impl = select("token_stats", impl, logits.device, logits.dtype)
    out = fresh(tuple(logits.shape), logits.dtype, logits.device)
    stat_rows_grad(unit_stride(logits), labels, stats, dense, columns, adds, soft, 1.0, 0.0, out, impl)
    return out


def factors(grads, labels: Tensor, ids: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """dense [N, 3], columns and adds [N, k + 1] of ``stat_rows_grad`` from the gradients of logp, entropy, mean, label
    and values, None where there is none."""
    rows, top = ids.shape
    zero = torch.zeros(rows, dtype=dtype, device=labels.device)
    logp, entropy, mean, label = (zero if x is None else x.to(dtype) for x in grads[:4])
    values = zero[:, None].expand(rows, top) if grads[4] is None else grads[4].to(dtype)
    columns = torch.cat([ids, labels.clamp(min=0)[:, None]], dim=1)
    return torch.stack([logp, entropy, mean], dim=1), columns, torch.cat([values, label[:, None]], dim=1)


def _setup(ctx, inputs, output) -> None:
    logits, labels, ctx.top, _soft, ctx.impl = inputs
    ctx.name, (logp, *_, ids, stats) = "token_stats", output
    ctx.mark_non_differentiable(ids, stats)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(logits, labels, ids, stats, logp)


def any_given(grads) -> bool:
    return any(x is not None for x in grads)


def row_stats_backward(once: Callable, literal: Callable) -> Callable:
    """The backward of an op that gives the fields of ``RowStats``. Recorded, it must refuse or be the definition's,
    whichever of the outputs the gradient comes from.

    Args:
        once: the backward that is not recorded, of ctx and the gradients.
        literal: of ctx, ``RowStats`` by the definition and the inputs they are a function of.
    """

    @differentiable_once()
    def refusing(ctx, _any, *grads):
        return once(ctx, *grads)

    def backward(ctx, *grads):
        if torch.compiler.is_compiling() or not torch.is_grad_enabled() or not any_given(grads[:5]):
            return once(ctx, *grads)
        if ctx.impl != "reference":
            return refusing(ctx, next(x for x in grads[:5] if x is not None), *grads)
        stats, inputs = literal(ctx)
        pairs = zip(stats[:5], grads[:5], strict=True)
        outputs, given = zip(*((x, g) for x, g in pairs if g is not None), strict=True)
        return differentiated(outputs, inputs, given, ctx.needs_input_grad)

    return backward


def _backward_once(ctx, *grads):
    rest = (None,) * 4
    if not any_given(grads[:5]):
        return None, *rest
    logits, labels, ids, stats, _ = ctx.saved_tensors
    given = factors(grads, labels, ids, stats.dtype)
    return _row_stats_gradient(logits, labels, stats, *given, any_given(grads[:2]), ctx.impl), *rest


def _literal(ctx):
    logits, labels, *_ = ctx.saved_tensors
    return row_stats_reference(logits, labels, ctx.top), [logits]


@python_op("token_stats", _fake_stats, _setup, row_stats_backward(_backward_once, _literal))
def _row_stats(
    logits: Tensor, labels: Tensor, top: int, soft: bool, impl: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The fields of ``RowStats`` and the statistics [N, 6], of logits [N, V] of any strides."""
    chosen = select("token_stats", impl, logits.device, logits.dtype)
    label_factor("token_stats", labels, logits.shape[1], stats_dtype(logits.dtype), chosen)
    stats, values, ids = stat_rows(unit_stride(logits), labels, top, 1.0, soft, 1.0, 0.0, chosen)
    return *(x.clone() for x in rows_of_stats(stats, values, ids)[:4]), values, ids, stats


def row_stats(logits: Tensor, labels: Tensor, top: int, soft: bool, impl: str) -> RowStats:
    """``RowStats`` of logits [N, V], differentiable; fields that take exps are wrong without ``soft``."""
    return RowStats(*_row_stats(logits, labels, top, soft, impl)[:6])


def padded(stats: RowStats, top: int) -> RowStats:
    """With -inf for largest logits that a vocabulary of fewer does not have."""
    lacking = top - stats.values.shape[1]
    if not lacking:
        return stats
    pad = torch.nn.functional.pad
    return stats._replace(values=pad(stats.values, (0, lacking), value=-torch.inf), ids=pad(stats.ids, (0, lacking)))


def token_stats(logits: Tensor, labels: Tensor, *, impl: str = "auto") -> TokenStats:
    r"""What the model predicts where each label is scored, in one read of the logits.

    .. math:: H_i = -\sum_j p_{ij} \log p_{ij}, \quad \mathrm{top}_i = \max_j z_{ij}, \quad \mathrm{mean}_i = \frac1V
    \sum_j z_{ij}, \quad \mathrm{margin}_i = z_{i, y_i} - \max_{j \neq y_i} z_{ij}

    Args:
        logits: [..., V], fp32, bf16, fp16 (fp64: reference); ``logits[..., i, :]`` scores ``labels[..., i]``.
        labels: [...], int64; -100 is ignored.
        impl: "auto", "reference", "cpp" or "triton". Second derivatives, forward mode and torch.func's transforms take
            "reference"; elsewhere they raise RuntimeError.

    Returns:
        TokenStats(logp, entropy, top, second, mean, margin), fp32 (fp64 for fp64 logits) of the shape of labels, 0
        where ignored, each differentiable with respect to logits: the backward reads them once more, whatever is asked
        for. Of equal logits the first column is the larger one, and gets the gradient. A row with a NaN gives NaN.

    Raises:
        ValueError: a label outside [0, V) that is not -100; shapes or devices that do not match; an unavailable
            ``impl``.
        TypeError: logits that are not floating point or labels that are not integers.

    Source: the statistics of arXiv 2604.17785 (entropy), 2506.05314 (top and mean), 2606.02920 (margin).

    Example:
        >>> import torch, gfast
        >>> stats = gfast.token_stats(torch.tensor([[2.0, 0.0, -2.0]]), torch.tensor([1]))
        >>> round(stats.entropy.item(), 4), stats.top.item(), stats.margin.item()
        (0.4411, 2.0, -2.0)
    """
    name = "token_stats"
    check_rows(name, logits, labels)
    vocab = logits.shape[-1]
    rows, flat, top = logits.reshape(-1, vocab), labels.reshape(-1).long(), min(2, vocab)
    if wants_literal(name, impl, logits):
        check_literal_labels(name, flat, vocab)
        stats = row_stats_reference(rows, flat, top)
    else:
        stats = row_stats(rows, flat, top, True, impl)
    return padded(stats, 2).token_stats(labels)
