"""``linear_soft_target_loss``: ``soft_target_loss`` from hidden states and heads, one chunk of logits at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from gfast.ops.chunks import row_chunks, rows_at_once, valid_rows
from gfast.ops.derivatives import wants_literal
from gfast.ops.gradients import summed_scale, with_gradients
from gfast.ops.head import ChunkedHead, fake_values, sums_are_wide
from gfast.ops.linear_inputs import check_map, local_head, reference_head, unpacked
from gfast.ops.linear_token_logp import check_literal
from gfast.ops.registration import python_op
from gfast.ops.soft_target_loss import kind_number, lowering, soft_rows, soft_target_reference
from gfast.ops.token_kl import kl_factor
from gfast.ops.token_logp import capped, stats_dtype
from gfast.ops.vocab_parallel import is_sharded


def linear_soft_target_reference(
    hidden, weight, bias, ref_head, labels, beta, kind, scale=1.0, softcap=0.0, ref_scale=1.0, ref_softcap=0.0
) -> Tensor:
    """The literal definition per token: all logits of both, then ``soft_target_reference``. ``ref_head``: hidden,
    weight and bias of the target, or None."""
    z = capped(torch.nn.functional.linear(hidden, weight, bias), scale, softcap)
    if ref_head is None:
        return soft_target_reference(z, z.detach(), labels, beta, kind)
    target = capped(torch.nn.functional.linear(*ref_head), ref_scale, ref_softcap)
    return soft_target_reference(z, target, labels, beta, kind)


@python_op("linear_soft_target", fake_values)
def _linear_soft_target(
    head: list[Tensor | None],
    ref_head: list[Tensor | None],
    labels: Tensor,
    lower: Tensor,
    factor: Tensor,
    kind: int,
    sizes: list[int],
    form: list[float],
    group: str,
    impl: str,
    need: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Divergence [N] and the gradients of factor (0-dim) times its sum: dH [N, D], dW [V, D], db [V] (empty if
    unwanted).

    ``ref_head`` is empty where the target is made of the model's own logits. ``form``: scale and softcap of the logits,
    then of the target's; for what else is no tensor see ``LocalHead.options``.
    """
    hidden = head[0]
    shard, chunk_rows, _ = unpacked("linear_soft_target_loss", hidden, labels, sizes, group, impl)
    order = valid_rows(labels)
    chunk = rows_at_once(labels, order, chunk_rows)
    model = ChunkedHead(*head, labels, chunk, order)
    ref = ChunkedHead(*ref_head, labels, chunk, order) if ref_head else None
    lower = model.select(lower)
    value = hidden.new_empty(model.rows, dtype=stats_dtype(hidden.dtype))
    model.start_gradients(*need)
    wanted = any(need)
    for start, stop in row_chunks(model.rows, model.chunk):
        part, rows = slice(start, stop), model.logits(start, stop)
        target = rows if ref is None else ref.logits(start, stop)
        out = rows if wanted else None
        value[part] = soft_rows(rows, target, model.labels[part], lower[part], factor, kind, form, out, impl)
        if wanted:
            model.add_gradients(start, stop, rows)
    return model.scatter(value), *shard.gradients(model)


def linear_soft_target_loss(
    hidden: Tensor,
    weight: Tensor,
    ref_hidden: Tensor | None,
    ref_weight: Tensor | None,
    labels: Tensor,
    *,
    beta: float | Tensor = 0.0,
    kind: str = "cross_entropy",
    bias: Tensor | None = None,
    ref_bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    reduction: str = "token_mean",
    normalizer: float | Tensor | None = None,
    chunk_rows: int | None = None,
    impl: str = "auto",
) -> Tensor:
    r"""``soft_target_loss`` from hidden states and the heads of the model and of the target's; no tensor of size [N, V]
    exists.

    .. math:: L = -\frac1N \sum_i \sum_v q_{iv} \log \mathrm{softmax}(W h_i + b)_v, \quad q_i =
        \mathrm{softmax}(W_o h_{o,i} + b_o - \beta_i e_{y_i})

    Args:
        hidden: [..., D]. weight: [V, D]. bias: [V] or None.
        ref_hidden: [..., D_o]. ref_weight: [V, D_o]. ref_bias: [V] or None. Without ref_hidden and ref_weight (None
            both) the target is made of the model's own logits, detached, which costs no second product.
        labels, beta, kind, reduction, normalizer, impl: as ``soft_target_loss``.
        logit_scale, softcap: of both heads. chunk_rows: rows of logits held at a time, of each head.

    Returns:
        0-dim loss, differentiable with respect to hidden, weight and bias.

    Raises:
        ValueError, TypeError: as ``soft_target_loss``; one of ref_hidden and ref_weight without the other, heads that
        do not match their hidden states or each other, a head that is sharded over the vocabulary.

    Source: arXiv 2402.10052 (UNDIAL), 2503.01224 (CE-U), 2605.07482 (SHRED), 2509.02820 (JensUn).

    Example:
        >>> import torch, gfast
        >>> h, w = torch.zeros(2, 3), torch.ones(4, 3)
        >>> loss = gfast.linear_soft_target_loss(h, w, h, w, torch.tensor([1, -100]), beta=10.0)
        >>> round(loss.item(), 4)
        1.3863
    """
    name = "linear_soft_target_loss"
    number = kind_number(name, kind)
    if (ref_hidden is None) != (ref_weight is None):
        lacking = "ref_hidden" if ref_hidden is None else "ref_weight"
        raise ValueError(
            f"gfast: {name}: {lacking} is missing: the target's logits are ref_hidden times its own head ref_weight. "
            f"Give both, or neither for a target of the model's own logits."
        )
    if ref_weight is None and ref_bias is not None:
        raise ValueError(f"gfast: {name}: ref_bias belongs to the target's head, and there is no ref_weight.")
    if is_sharded(weight) or is_sharded(ref_weight):
        raise ValueError(
            f"gfast: {name}: the head is sharded over the vocabulary, and a target whose label is lowered in one shard "
            f"is not merged over several yet; give the whole head (DTensor.full_tensor())."
        )
    head = local_head(name, hidden, weight, bias, labels, chunk_rows, buffers=1 if ref_weight is None else 2)
    dtype, ref_inputs = head.hidden.dtype, []
    if ref_weight is not None:
        ref_inputs = list(reference_head(name, head, ref_hidden, ref_weight, ref_bias, labels, chunk_rows).inputs)
    wide = stats_dtype(dtype)
    flat, factor = kl_factor(name, labels, reduction, normalizer, wide)
    lower = lowering(name, beta, labels, wide)
    form = check_map(name, logit_scale, softcap)

    def literal(*inputs: Tensor | None) -> Tensor:
        goal = ref_inputs or None
        return linear_soft_target_reference(*inputs, goal, flat, lower, kind, *form, *form).sum() * factor

    if wants_literal(name, impl, *head.inputs):
        check_literal(name, head)
        return literal(*head.inputs)
    need = head.wanted()
    inner, late = summed_scale(factor, dtype, sums_are_wide(head.hidden))
    options = head.options((*form, *form), impl)
    arguments = (flat, lower, inner, number, *options, need)
    value, *gradients = _linear_soft_target(head.detached(), ref_inputs, *arguments)
    if not any(need):
        return value.sum() * factor
    defined = literal if impl == "reference" else None
    return with_gradients(name, value.sum(), factor, head.inputs, gradients, late, defined)
