"""``linear_token_logp``: log-probs of the labels from hidden states and the head, never holding [N, V]."""

from __future__ import annotations

import torch
from torch import Tensor

from gfast.ops.checks import check_chunk_rows
from gfast.ops.chunks import row_chunks, rows_at_once, valid_rows
from gfast.ops.derivatives import check_literal_labels, differentiable_once, wants_literal
from gfast.ops.head import ChunkedHead, fake_backward
from gfast.ops.linear_inputs import LocalHead, check_map, local_head, unpacked
from gfast.ops.registration import python_op
from gfast.ops.token_logp import capped, fake_logp, stats_dtype, token_logp_reference
from gfast.ops.vocab_parallel import Shard


def linear_token_logp_reference(hidden, weight, labels, bias=None, logit_scale=1.0, softcap=None) -> Tensor:
    """The literal definition: all logits, then log softmax."""
    logits = torch.nn.functional.linear(hidden, weight, bias)
    return token_logp_reference(capped(logits, logit_scale, softcap or 0.0), labels)


@python_op("linear_token_logp_backward", fake_backward)
def _linear_token_logp_backward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    logp: Tensor,
    stats: Tensor,
    coef: Tensor,
    sizes: list[int],
    form: list[float],
    group: str,
    impl: str,
    need: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """dH [N, D], dW [v, D], db [v] (empty if unwanted), of which coef [N] is the gradient of logp."""
    (first, vocab), chunk_rows = sizes[:2], sizes[2:]
    check_chunk_rows("linear_token_logp", chunk_rows)
    shard, order = Shard(first, vocab, group), valid_rows(labels)
    head = ChunkedHead(hidden, weight, bias, labels, rows_at_once(labels, order, chunk_rows), order)
    logp, stats, coef = (head.select(values).contiguous() for values in (logp, stats, coef.to(logp.dtype)))
    head.start_gradients(*need)
    for start, stop in row_chunks(head.rows, head.chunk):
        part, rows = slice(start, stop), head.logits(start, stop)
        shard.logp_rows_grad(rows, head.labels[part], logp[part], stats[part], coef[part], *form, impl)
        head.add_gradients(start, stop, rows)
    return shard.gradients(head)


def _setup(ctx, inputs, output) -> None:
    hidden, weight, bias, labels, *ctx.options = inputs
    ctx.name, (logp, stats) = "linear_token_logp", output
    ctx.mark_non_differentiable(stats)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(hidden, weight, bias, labels, stats, logp)


def _literal(ctx):
    hidden, weight, bias, labels, *_ = ctx.saved_tensors
    _sizes, form, group, impl = ctx.options
    if impl != "reference" or group:
        return None
    return linear_token_logp_reference(hidden, weight, labels, bias, *form), [hidden, weight, bias]


@differentiable_once(_literal)
def _backward(ctx, grad_logp: Tensor | None, _grad_stats: Tensor | None):
    options = (None,) * 5
    if grad_logp is None:
        return None, None, None, *options
    *tensors, stats, logp = ctx.saved_tensors
    need = [bool(flag) for flag in ctx.needs_input_grad[:3]]
    gradients = _linear_token_logp_backward(*tensors, logp, stats, grad_logp, *ctx.options, need)
    cast = [x.to(y.dtype) if wanted else None for x, y, wanted in zip(gradients, tensors[:3], need, strict=True)]
    return (*cast, *options)


@python_op("linear_token_logp", fake_logp, _setup, _backward)
def _linear_token_logp(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    sizes: list[int],
    form: list[float],
    group: str,
    impl: str,
) -> tuple[Tensor, Tensor]:
    """logp [N] and statistics [N, 2]; for what is no tensor see ``LocalHead.options``."""
    shard, chunk_rows, chosen = unpacked("linear_token_logp", hidden, labels, sizes, group, impl)
    head = ChunkedHead(hidden, weight, bias, labels, chunk_rows[0], valid_rows(labels))
    if chosen != "reference":
        logp, stats = shard.fold(head, *form, chosen)
        return head.scatter(logp), head.scatter(stats)
    dtype = stats_dtype(hidden.dtype)
    logp, stats = hidden.new_empty(head.rows, dtype=dtype), hidden.new_empty((head.rows, 2), dtype=dtype)
    for start, stop in row_chunks(head.rows, head.chunk):
        part = slice(start, stop)
        logp[part], stats[part] = shard.logp_rows(head.logits(start, stop), head.labels[part], *form, impl)
    return head.scatter(logp), head.scatter(stats)


def flat_logp(head: LocalHead, form: tuple[float, float], impl: str) -> Tensor:
    """``linear_token_logp`` [N] of checked arguments."""
    return _linear_token_logp(*head.inputs, head.labels, *head.options(form, impl))[0]


def literal_of_head(name: str, head: LocalHead, form: tuple[float, float]) -> Tensor:
    """``flat_logp`` by the literal definition, for torch.func and forward mode."""
    check_literal(name, head)
    hidden, weight, bias = head.inputs
    return linear_token_logp_reference(hidden, weight, head.labels, bias, *form)


def check_literal(name: str, head: LocalHead) -> None:
    """Whether a head can be differentiated by its literal definition; and its labels, where they can be looked at."""
    if head.shard.group:
        raise RuntimeError(f"gfast: {name}: a vocabulary-parallel head has first derivatives by backward only.")
    check_literal_labels(name, head.labels, head.shard.vocab)


def linear_token_logp(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    chunk_rows: int | None = None,
    impl: str = "auto",
) -> Tensor:
    r"""Log-probability of each label from hidden states and the output head; no tensor of size [N, V] exists.

    .. math:: z_i = \mathrm{cap}(\text{logit\_scale} (W h_i + b)), \quad \mathrm{logp}_i = z_{i, y_i} - \log \sum_j
    e^{z_{ij}}

    Args:
        hidden: [..., D], fp32, bf16 or fp16 (fp64: reference); ``hidden[..., i, :]`` scores ``labels[..., i]``.
        weight: [V, D], same dtype. bias: [V] or None. A DTensor sharded on dim 0 of a mesh with one dimension is a
            vocabulary-parallel head: every process of the mesh calls with the same hidden states and labels (hidden
            may be a DTensor), and gets the same log-probs; gradients of weight and bias stay with their rows. Under
            torch.autocast hidden, weight and bias are cast as in ``F.linear``.
        labels: [...], int64; rows labelled -100 cost nothing.
        logit_scale, softcap: as in Cohere, Granite and Gemma 2: softcap * tanh(scale * z / softcap).
        chunk_rows: rows of logits held at a time where whole rows are needed: in the backward, and in the forward where
            no kernel folds tiles of the vocabulary; None chooses by device and head.
        impl: "auto", "reference", "cpp" or "triton". Derivatives other than the first, backward, as in ``token_logp``.

    Returns:
        [...], fp32 (fp64 for fp64 inputs), 0 where ignored; differentiable with respect to hidden, weight and bias
        (the backward recomputes the logits chunk by chunk).

    Raises:
        ValueError, TypeError: labels outside the vocabulary, mismatched shapes, dtypes or devices, an unavailable
        ``impl``.

    Source: arXiv 2502.19301, section 2.

    Example:
        >>> import torch, gfast
        >>> gfast.linear_token_logp(torch.zeros(2, 3), torch.ones(4, 3), torch.tensor([1, -100])).exp()
        tensor([0.2500, 1.0000])
    """
    name = "linear_token_logp"
    head = local_head(name, hidden, weight, bias, labels, chunk_rows)
    form = check_map(name, logit_scale, softcap)
    literal = wants_literal(name, impl, *head.inputs)
    logp = literal_of_head(name, head, form) if literal else flat_logp(head, form, impl)
    return logp.reshape(labels.shape)
