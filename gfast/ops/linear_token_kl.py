"""``linear_token_kl``: KL(reference || model) from hidden states and two heads, one chunk of both logits at a time.

Heads that are sharded over the vocabulary merge the parts of a row: its KL and the softmax statistics of both.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gfast.ops.checks import IGNORE_INDEX
from gfast.ops.chunks import row_chunks, rows_at_once, valid_rows
from gfast.ops.derivatives import wants_literal
from gfast.ops.dispatch import select
from gfast.ops.gradients import summed_scale, with_gradients
from gfast.ops.head import ChunkedHead, fake_values, sums_are_wide
from gfast.ops.linear_inputs import check_map, local_head, reference_head, unpacked
from gfast.ops.linear_token_logp import check_literal
from gfast.ops.registration import python_op
from gfast.ops.token_kl import kl_factor, kl_rows, token_kl_reference
from gfast.ops.token_logp import capped, finite_slope, local_labels, stats_dtype
from gfast.ops.vocab_parallel import Shard, check_alike


def linear_token_kl_reference(
    hidden, weight, bias, ref_hidden, ref_weight, ref_bias, labels, scale=1.0, softcap=0.0
) -> Tensor:
    """The literal definition per token: all logits of both, then ``token_kl_reference``."""
    z = torch.nn.functional.linear(hidden, weight, bias)
    ref_z = torch.nn.functional.linear(ref_hidden, ref_weight, ref_bias)
    return token_kl_reference(capped(z, scale, softcap), capped(ref_z, scale, softcap), labels)


def _kl_parts(logits, ref_logits, labels, form, impl) -> tuple[Tensor, Tensor]:
    """KL [n] as if these columns were all there are, and totals [n, 4]: maximum and sum of exps relative to it of the
    logits and of the reference's. ``form``: scale, softcap, ref_scale, ref_softcap."""
    if impl == "cpp":
        return torch.ops.gfast.kl_parts(logits, ref_logits, labels, *form)
    if impl == "triton":
        from gfast.kernels import kl

        totals = torch.empty(logits.shape[0], 4, dtype=torch.float32, device=logits.device)
        factor = torch.ones((), dtype=torch.float32, device=logits.device)
        return kl.kl_rows(logits, ref_logits, labels, factor, *form, totals=totals), totals
    z, ref_z = capped(logits, *form[:2]), capped(ref_logits, *form[2:])
    tops = z.amax(-1), ref_z.amax(-1)
    shifts = [torch.where(top == -torch.inf, 0.0, top)[:, None] for top in tops]  # all masked: not -inf - -inf
    sums = [torch.exp(x - shift).sum(-1) for x, shift in zip((z, ref_z), shifts, strict=True)]
    return token_kl_reference(z, ref_z, labels), torch.stack([tops[0], sums[0], tops[1], sums[1]], dim=1)


def _kl_rows_grad(logits, ref_logits, labels, totals, factor, form, out, impl) -> None:
    """``out`` (may be logits) = factor * (p - q) dz/dlogits, where ``totals`` [n, 4] normalise p and q."""
    if impl == "cpp":
        torch.ops.gfast.kl_rows_grad(logits, ref_logits, labels, totals, factor, *form, out)
    elif impl == "triton":
        from gfast.kernels import kl

        kl.kl_rows_grad(logits, ref_logits, labels, totals.float(), factor, *form, out)
    else:
        z, ref_z = capped(logits, *form[:2]), capped(ref_logits, *form[2:])
        top, total, ref_top, ref_total = totals.to(z.dtype)[:, :, None].unbind(1)
        delta = torch.exp(z - top) / total - torch.exp(ref_z - ref_top) / ref_total
        gradient = factor * delta * finite_slope(z, *form[:2])
        out.copy_(torch.where((labels != IGNORE_INDEX)[:, None], gradient, 0.0))


def merged_kl(kl: Tensor, totals: Tensor) -> tuple[Tensor, Tensor]:
    """KL of rows whose parts lie in several shards, by the chain rule, and their totals.

    With P_g, Q_g the probabilities that model and reference give to shard g, and KL_g between the softmaxes inside it:
    KL = sum_g Q_g KL_g + sum_g (Q_g (log Q_g - log P_g) + P_g - Q_g). No term is negative, so a small KL keeps its
    digits, and an error of a total counts in second order.

    Args:
        kl: [shards, n], fp64. totals: [shards, n, 4], fp64 (see ``_kl_parts``); sums of 0 where a shard holds nothing.

    Returns:
        [n] and [n, 4], fp64.
    """
    merged, mass, log_mass = [], [], []
    for top, total in ((totals[..., 0], totals[..., 1]), (totals[..., 2], totals[..., 3])):
        highest = top.amax(0)
        # not -inf - -inf where a shard is all masked
        log_part = torch.where(total == 0, -torch.inf, (top - highest) + torch.log(total))  # [shards, n]
        whole = torch.exp(log_part).sum(0)
        log_mass.append(log_part - torch.log(whole))
        mass.append(torch.exp(log_mass[-1]))
        merged += [highest, whole]
    (p, q), (log_p, log_q) = mass, log_mass
    inside = torch.where(p == 0, torch.inf, kl)
    terms = torch.where(q == 0, p, q * inside + q * (log_q - log_p) + (p - q))
    return terms.sum(0), torch.stack(merged, dim=1)


def _kl_rows_of(shard: Shard, logits, ref_logits, labels, factor, form, out, impl) -> Tensor:
    """``kl_rows`` over the whole vocabulary from this shard's columns [n, v] of both logits."""
    if not shard.group:
        return kl_rows(logits, ref_logits, labels, factor, *form, out, impl)
    impl = select("sharded_token_kl", impl, logits.device, logits.dtype)
    local, _ = local_labels(labels, shard.first, logits.shape[1])
    if logits.shape[1]:
        kl, totals = _kl_parts(logits, ref_logits, local, form, impl)
    else:
        rows = logits.shape[0]
        kl, totals = logits.new_zeros(rows), logits.new_full((rows, 4), -torch.inf)
        totals[:, 1::2].zero_()  # not from a list: a copy from the host waits, and no CUDA graph can record it
    state = shard.gathered(torch.cat([kl.double()[None], totals.double().t()]))  # [processes, 5, n]
    kl, totals = merged_kl(state[:, 0], state[:, 1:].transpose(1, 2))
    if out is not None and logits.shape[1]:
        _kl_rows_grad(logits, ref_logits, local, totals, factor, form, out, impl)
    return torch.where(labels != IGNORE_INDEX, kl, 0.0).to(stats_dtype(logits.dtype))


@python_op("linear_token_kl", fake_values)
def _linear_token_kl(
    head: list[Tensor | None],
    ref_head: list[Tensor | None],
    labels: Tensor,
    factor: Tensor,
    sizes: list[int],
    form: list[float],
    group: str,
    impl: str,
    need: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """KL [N] and the gradients of factor (0-dim) times its sum: dH [N, D], dW [v, D], db [v] (empty if unwanted).

    Both heads are hidden, weight and bias; for what is no tensor see ``LocalHead.options``.
    """
    hidden = head[0]
    shard, chunk_rows, _ = unpacked("linear_token_kl", hidden, labels, sizes, group, impl)
    order = valid_rows(labels)
    chunk = rows_at_once(labels, order, chunk_rows)
    model, ref = (ChunkedHead(*tensors, labels, chunk, order) for tensors in (head, ref_head))
    kl = hidden.new_empty(model.rows, dtype=stats_dtype(hidden.dtype))
    model.start_gradients(*need)
    wanted, both = any(need), (*form, *form)
    for start, stop in row_chunks(model.rows, model.chunk):
        part, rows, ref_rows = slice(start, stop), model.logits(start, stop), ref.logits(start, stop)
        out = rows if wanted else None
        kl[part] = _kl_rows_of(shard, rows, ref_rows, model.labels[part], factor, both, out, impl)
        if wanted:
            model.add_gradients(start, stop, rows)
    return model.scatter(kl), *shard.gradients(model)


def linear_token_kl(
    hidden: Tensor,
    weight: Tensor,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    ref_bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    reduction: str = "token_mean",
    normalizer: float | Tensor | None = None,
    chunk_rows: int | None = None,
    impl: str = "auto",
) -> Tensor:
    r"""``token_kl`` from hidden states and heads of the model and the reference; no tensor of size [N, V] exists.

    .. math:: L = \frac1N \sum_i \mathrm{KL}(\mathrm{softmax}(W_o h_{o,i} + b_o) \,\|\, \mathrm{softmax}(W h_i + b))

    Args:
        hidden: [..., D]. weight: [V, D]. ref_hidden: [..., D_o]. ref_weight: [V, D_o]. bias, ref_bias: [V] or None.
            DTensors are vocabulary-parallel heads (see ``linear_token_logp``): both or neither, sharded alike. Under
            torch.autocast all are cast as in ``F.linear``.
        labels: [...], int64; only says which positions count.
        logit_scale, softcap: of both heads.
        reduction, normalizer, impl: as ``token_kl``. chunk_rows: rows of logits held at a time, of each head.

    Returns:
        0-dim loss, differentiable with respect to hidden, weight and bias.

    Raises:
        ValueError, TypeError: as ``token_kl``, and heads that do not match their hidden states or each other, also in
        how they are sharded.

    Source: arXiv 2502.19301, appendix.

    Example:
        >>> import torch, gfast
        >>> h, w = torch.zeros(2, 3), torch.ones(4, 3)
        >>> gfast.linear_token_kl(h, w, h, w, torch.tensor([1, -100])).item()
        0.0
    """
    name = "linear_token_kl"
    check_alike(name, weight, ref_weight)
    head = local_head(name, hidden, weight, bias, labels, chunk_rows, buffers=2)
    dtype = head.hidden.dtype
    ref = reference_head(name, head, ref_hidden, ref_weight, ref_bias, labels, chunk_rows)
    flat, factor = kl_factor(name, labels, reduction, normalizer, stats_dtype(dtype))
    form = check_map(name, logit_scale, softcap)

    def literal(*inputs: Tensor | None) -> Tensor:
        return linear_token_kl_reference(*inputs, *ref.inputs, flat, *form).sum() * factor

    if wants_literal(name, impl, *head.inputs):
        check_literal(name, head)
        return literal(*head.inputs)
    need = head.wanted()
    inner, late = summed_scale(factor, dtype, sums_are_wide(head.hidden))
    options = head.options(form, impl)
    kl, *gradients = _linear_token_kl(head.detached(), list(ref.inputs), flat, inner, *options, need)
    if not any(need):
        return kl.sum() * factor
    defined = literal if impl == "reference" and not head.shard.group else None
    return with_gradients(name, kl.sum(), factor, head.inputs, gradients, late, defined)
