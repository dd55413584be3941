"""``linear_token_kl``: KL(reference || model) from hidden states and two heads, one chunk of both logits at a time.

Heads that are sharded over the vocabulary merge the parts of a row: its KL and the softmax statistics of both.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gfast.ops.backend import select
from gfast.ops.common import IGNORE_INDEX, check_chunk_rows, check_label_range, row_chunks, rows_at_once
from gfast.ops.derivatives import differentiable_once, has_values, wants_literal
from gfast.ops.head import ChunkedHead, check_map, fake_gradients, finished_gradients, valid_rows
from gfast.ops.token_kl import kl_factor, kl_rows, token_kl_reference
from gfast.ops.token_logp import cap_slope, capped, own_labels, stats_dtype
from gfast.ops.vocab_parallel import Shard, check_alike, local_head


def _kl_parts(logits, ref_logits, labels, form, impl) -> tuple[Tensor, Tensor]:
    """KL [n] as if these columns were all there are, and totals [n, 4]: maximum and sum of exps relative to it of the
    logits and of the reference's. ``form``: scale, softcap, ref_scale, ref_softcap."""
    if impl == "cpp":
        return torch.ops.gfast.kl_parts(logits, ref_logits, labels, *form)
    if impl == "triton":
        from gfast.kernels import kl

        totals = torch.empty(logits.shape[0], 4, dtype=torch.float32, device=logits.device)
        one = torch.ones((), dtype=torch.float32, device=logits.device)
        return kl.kl_rows(logits, ref_logits, labels, one, *form, totals=totals), totals
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
        scale, softcap, *ref_form = form
        z, ref_z = capped(logits, scale, softcap), capped(ref_logits, *ref_form)
        top, total, ref_top, ref_total = totals.to(z.dtype)[:, :, None].unbind(1)
        delta = torch.exp(z - top) / total - torch.exp(ref_z - ref_top) / ref_total
        slope = torch.where(torch.isfinite(z), cap_slope(z, scale, softcap), 0.0) if softcap > 0 else scale
        out.copy_(torch.where((labels != IGNORE_INDEX)[:, None], factor * delta * slope, 0.0))


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
    own, _ = own_labels(labels, shard.first, logits.shape[1])
    if logits.shape[1]:
        kl, totals = _kl_parts(logits, ref_logits, own, form, impl)
    else:
        kl, totals = logits.new_zeros(logits.shape[0]), logits.new_tensor([-torch.inf, 0.0] * 2).repeat(len(own), 1)
    state = shard.gathered(torch.cat([kl.double()[None], totals.double().t()]))  # [processes, 5, n]
    kl, totals = merged_kl(state[:, 0], state[:, 1:].transpose(1, 2))
    if out is not None and logits.shape[1]:
        _kl_rows_grad(logits, ref_logits, own, totals, factor, form, out, impl)
    return torch.where(labels != IGNORE_INDEX, kl, 0.0).to(stats_dtype(logits.dtype))


@torch.library.custom_op("gfast::linear_token_kl", mutates_args=())
def _linear_token_kl(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    ref_bias: Tensor | None,
    labels: Tensor,
    factor: Tensor,
    first: int,
    vocab: int,
    group: str,
    scale: float,
    softcap: float,
    chunk_rows: list[int],
    impl: str,
    need: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    check_label_range("linear_token_kl", labels, vocab)
    check_chunk_rows("linear_token_kl", chunk_rows)
    select("linear_token_kl", impl, hidden.device, hidden.dtype)  # also where there are no rows
    shard = Shard(first, vocab, group)  # that both weights [v, D] are
    order = valid_rows(labels)
    chunk = rows_at_once(labels, order, chunk_rows)
    head = ChunkedHead(hidden, weight, bias, labels, chunk, order)
    ref = ChunkedHead(ref_hidden, ref_weight, ref_bias, labels, chunk, order)
    kl = hidden.new_empty(head.rows, dtype=stats_dtype(hidden.dtype))
    head.start_gradients(*need)
    wanted = any(need)
    for start, stop in row_chunks(head.rows, head.chunk):
        rows, part = head.logits(start, stop), slice(start, stop)
        out = rows if wanted else None
        form = (scale, softcap, scale, softcap)
        kl[part] = _kl_rows_of(shard, rows, ref.logits(start, stop), head.labels[part], factor, form, out, impl)
        if wanted:
            head.add_gradients(start, stop, rows)
    return head.scatter(kl), *shard.gradients(head)


@_linear_token_kl.register_fake
def _(
    hidden,
    weight,
    bias,
    ref_hidden,
    ref_weight,
    ref_bias,
    labels,
    factor,
    first,
    vocab,
    group,
    scale,
    softcap,
    chunk_rows,
    impl,
    need,
):
    return hidden.new_empty(hidden.shape[0], dtype=stats_dtype(hidden.dtype)), *fake_gradients(
        hidden, weight, tuple(need)
    )


def linear_token_kl_reference(
    hidden, weight, bias, ref_hidden, ref_weight, ref_bias, labels, scale=1.0, softcap=0.0
) -> Tensor:
    """The literal definition per token: all logits of both, then ``token_kl_reference``."""
    z = torch.nn.functional.linear(hidden, weight, bias)
    ref_z = torch.nn.functional.linear(ref_hidden, ref_weight, ref_bias)
    return token_kl_reference(capped(z, scale, softcap), capped(ref_z, scale, softcap), labels)


def _literal(ctx):
    if not ctx.literal:
        return None
    *inputs, factor = ctx.saved_tensors[4:12]
    return linear_token_kl_reference(*inputs, *ctx.form).sum() * factor, inputs[:3]


class _LinearKLLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        hidden,
        weight,
        bias,
        ref_hidden,
        ref_weight,
        ref_bias,
        labels,
        factor,
        shard,
        scale,
        softcap,
        chunk_rows,
        impl,
    ):
        need = [bool(flag) for flag in ctx.needs_input_grad[:3]]
        late = hidden.dtype == torch.float16  # see linear_unlearn_loss
        inner = torch.ones_like(factor) if late else factor
        kl, *grads = torch.ops.gfast.linear_token_kl(
            hidden,
            weight,
            bias,
            ref_hidden,
            ref_weight,
            ref_bias,
            labels,
            inner,
            *shard,
            scale,
            softcap,
            chunk_rows,
            impl,
            need,
        )
        ctx.literal = impl == "reference" and not shard.group
        inputs = (hidden, weight, bias, ref_hidden, ref_weight, ref_bias, labels, factor) if ctx.literal else ()
        ctx.form = scale, softcap
        loss = kl.sum() * factor
        ctx.save_for_backward(factor if late else None, *grads, *inputs, loss)
        ctx.dtypes = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        ctx.set_materialize_grads(False)
        return loss

    @staticmethod
    @differentiable_once("linear_token_kl", _literal)
    def backward(ctx, grad_loss):
        nothing = (None,) * 13
        if grad_loss is None:
            return nothing
        late, *grads = ctx.saved_tensors[:4]
        return (*finished_gradients(ctx, grads, grad_loss, late), *nothing[3:])


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
    ref_hidden, ref_weight = ref_hidden.detach().to(dtype), ref_weight.detach().to(dtype)
    ref_bias = None if ref_bias is None else ref_bias.detach().to(dtype)
    ref = local_head(name, ref_hidden, ref_weight, ref_bias, labels, chunk_rows)
    if ref.shard.vocab != head.shard.vocab:
        raise ValueError(
            f"gfast: {name}: the heads have different vocabularies: {head.shard.vocab} and {ref.shard.vocab}."
        )
    flat, factor = kl_factor(name, labels, reduction, normalizer, stats_dtype(dtype))
    form = check_map(name, logit_scale, softcap)
    if wants_literal(name, impl, *head[:3]):
        if head.shard.group:
            raise RuntimeError(f"gfast: {name}: a vocabulary-parallel head has first derivatives by backward only.")
        if has_values(flat):
            check_label_range(name, flat, head.shard.vocab)
        return linear_token_kl_reference(*head[:3], *ref[:3], flat, *form).sum() * factor
    return _LinearKLLoss.apply(
        head.hidden,
        head.weight,
        head.bias,
        ref.hidden,
        ref.weight,
        ref.bias,
        flat,
        factor,
        head.shard,
        *form,
        head.chunk_rows,
        impl,
    )
