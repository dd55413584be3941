"""Objectives over a Hugging Face model and a Hugging Face batch: the shift, the head and the reference happen here."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gfast import hf
from gfast.objectives import KL, RMU, RR, Mix
from gfast.ops.common import IGNORE_INDEX, LossOutput
from gfast.ops.linear_token_kl import linear_token_kl
from gfast.ops.linear_token_logp import linear_token_logp
from gfast.ops.linear_unlearn_loss import linear_unlearn_loss
from gfast.ops.token_kl import token_kl
from gfast.ops.token_logp import token_logp
from gfast.ops.unlearn_loss import check_reference, unlearn_loss
from gfast.ops.vocab_parallel import is_sharded, rows_like


def shifted(labels: Tensor) -> Tensor:
    """Labels moved to the positions that score them: [B, T] with -100 in the last column.

    The labels are padded rather than the hidden states cut: a slice of those would be copied.
    """
    return nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)


def _back(values: Tensor) -> Tensor:
    """From scoring positions back to label positions [B, T], 0 in the first column."""
    return nn.functional.pad(values[:, :-1], (1, 0))


def model_logits(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    keys = ("input_ids", "attention_mask", "position_ids")
    return model(**{key: batch[key] for key in keys if batch.get(key) is not None}, use_cache=False).logits


def _labels(batch: Mapping[str, Any]) -> Tensor:
    labels = batch.get("labels")
    if labels is None:
        raise ValueError(f"gfast: the batch has no 'labels' (its keys are {sorted(batch)}).")
    if labels.shape != batch["input_ids"].shape:
        raise ValueError(
            f"gfast: labels {tuple(labels.shape)} and input_ids {tuple(batch['input_ids'].shape)} must have the "
            f"same shape; "
            "gfast shifts them itself."
        )
    return labels


def _head_options(head: hf.Head) -> dict[str, Any]:
    return dict(bias=head.bias, logit_scale=head.logit_scale, softcap=head.softcap)


def model_logp(model: nn.Module, batch: Mapping[str, Any], *, impl: str = "auto") -> Tensor:
    r"""Log-probability of every label of a batch: :math:`\log p(s_i \mid s_{<i}; \theta)`.

    Args:
        model: a causal language model of Hugging Face, possibly wrapped (PEFT, DDP, torch.compile).
        batch: input_ids [B, T], attention_mask [B, T], labels [B, T] (unshifted, -100 ignored), on the model's device.
        impl: as ``linear_token_logp``.

    Returns:
        [B, T], fp32, aligned with labels: entry [b, t] scores labels[b, t]; 0 where ignored and at t = 0.
        Differentiable.

    Raises:
        ValueError: a batch without input_ids or labels, or labels outside the vocabulary.

    Source: arXiv 2502.19301, section 2.

    Example:
        >>> import torch, gfast
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = dict(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
        >>> ids = torch.tensor([[1, 2, 3]])
        >>> gfast.model_logp(LlamaForCausalLM(LlamaConfig(**sizes)), dict(input_ids=ids, labels=ids)).shape
        torch.Size([1, 3])
    """
    labels = shifted(_labels(batch))
    return _back(output_logp(*model_output(model, batch), labels, impl=impl))


def output_logp(head: hf.Head | None, output: Tensor, labels: Tensor, *, impl: str = "auto") -> Tensor:
    """log p [B, T] of shifted labels, from what the head reads [B, T, D], or from logits [B, T, V] where it is None."""
    if head is None:
        return token_logp(output, labels, impl=impl)
    return linear_token_logp(output, head.weight, labels, impl=impl, **_head_options(head))


def model_loss(
    model: nn.Module,
    batch: Mapping[str, Any],
    objective,
    *,
    ref_logp: Tensor | None = None,
    reduction: str | None = None,
    normalizer: float | Tensor | None = None,
    impl: str = "auto",
) -> LossOutput:
    r"""An objective of a model on a batch, without the logits of the whole batch.

    The decoder runs to its final hidden states, the labels are shifted here, and the head goes through
    ``linear_unlearn_loss`` (KL: ``linear_token_kl``), also where tensor parallelism has sharded it over the vocabulary,
    torch's or Hugging Face's; every process of its mesh then calls with the same batch, and ref_head is the whole one.
    A head that is no plain linear map falls back to the model's own logits.

    Args:
        model: a causal language model of Hugging Face, possibly wrapped.
        batch: input_ids, attention_mask, labels [B, T]; what the objective needs besides: ref_logp [B, T] aligned with
            labels, ref_hidden [B, T, D] and ref_head [V, D] (KL), ref_layer_hidden [B, T, D] (RR); DPO takes pairs
            [2B, T].
        objective: any of ``gfast.objectives`` but Mix, whose two terms see different batches; or a callable of weights.
        ref_logp: overrides the batch's.
        reduction, normalizer, impl: as ``linear_unlearn_loss``; KL, RMU and RR know only their mean over positions.

    Returns:
        LossOutput; logp and weight are [B, T] aligned with labels, and None for KL, RMU and RR, which have no token
        weights.

    Raises:
        ValueError: missing labels or reference data, labels outside the vocabulary.
        TypeError: a Mix, or something that is no objective.

    Source: arXiv 2502.19301.

    Example:
        >>> import torch, gfast
        >>> from gfast.objectives import WGA
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = dict(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
        >>> ids = torch.tensor([[1, 2, 3]])
        >>> out = gfast.model_loss(LlamaForCausalLM(LlamaConfig(**sizes)), dict(input_ids=ids, labels=ids), WGA())
        >>> out.loss.backward()
    """
    if isinstance(objective, Mix):
        raise TypeError("gfast: the terms of a Mix see different batches: call model_loss once a term and add.")
    labels = _labels(batch)
    if isinstance(objective, (RMU, RR)):
        valid = labels != IGNORE_INDEX
        hidden = hf.layer_hidden(model, batch, objective.layer)  # [B, T, D]
        if isinstance(objective, RMU):
            return LossOutput(objective.value(hidden, valid, normalizer), None, None)
        return LossOutput(
            objective.value(hidden, _need(batch, "ref_layer_hidden", objective), valid, normalizer), None, None
        )
    if isinstance(objective, KL):
        return LossOutput(_kl(model, batch, shifted(labels), normalizer, impl), None, None)
    if ref_logp is not None:
        batch = {**batch, "ref_logp": ref_logp}
    check_reference("model_loss", objective, batch.get("ref_logp"), labels)  # before the forward pass, not after it
    head, output = model_output(model, batch)
    return output_loss(head, output, batch, objective, reduction=reduction, normalizer=normalizer, impl=impl)


def model_output(model: nn.Module, batch: Mapping[str, Any]) -> tuple[hf.Head | None, Tensor]:
    """The head and what it reads [B, T, D]; None and the model's own logits [B, T, V] where it is no linear map."""
    head = hf.head(model, sharded=True)
    return head, model_logits(model, batch) if head is None else hf.final_hidden(model, batch)


def output_loss(
    head: hf.Head | None, output: Tensor, batch: Mapping[str, Any], objective, **options: Any
) -> LossOutput:
    """`model_loss` of an objective with token weights, from what `model_output` gives; options of
    ``linear_unlearn_loss``.
    """
    labels, reference = _labels(batch), batch.get("ref_logp")
    check_reference("model_loss", objective, reference, labels)
    if reference is not None:
        options["ref_logp"] = nn.functional.pad(reference[:, 1:], (0, 1))
    if head is None:
        out = unlearn_loss(output, shifted(labels), objective, **options)
    else:
        out = linear_unlearn_loss(output, head.weight, shifted(labels), objective, **options, **_head_options(head))
    loss = _back(out.loss) if out.loss.shape == labels.shape else out.loss
    return LossOutput(loss, _back(out.logp), _back(out.weight))


def _need(batch: Mapping[str, Any], key: str, objective) -> Tensor:
    if batch.get(key) is None:
        raise ValueError(
            f"gfast: {objective} needs '{key}' in the batch, computed under the original model; build a "
            f"gfast.ReferenceCache and "
            "give it to the collator."
        )
    return batch[key]


def _kl(model: nn.Module, batch: Mapping[str, Any], target: Tensor, normalizer, impl: str) -> Tensor:
    head = hf.head(model, sharded=True)
    # with adapters the original model is this one with them off
    off = getattr(model, "disable_adapter", None) if batch.get("ref_hidden") is None else None
    original = contextlib.nullcontext() if off is None else off()
    if head is None:
        if off is None:
            raise ValueError(
                "gfast: KL on a model whose head is no plain linear map needs the model with adapters (PEFT), so "
                "that the original's "
                "logits can be computed by switching them off."
            )
        with torch.no_grad(), original:
            ref_logits = model_logits(model, batch)
        return token_kl(model_logits(model, batch), ref_logits, target, normalizer=normalizer, impl=impl)
    if off is not None:
        with torch.no_grad(), original:
            ref_hidden, ref_head = hf.final_hidden(model, batch), hf.head(model, sharded=True)
        ref_weight, ref_bias = ref_head.weight, ref_head.bias
    else:
        ref_hidden = _need(batch, "ref_hidden", KL())
        ref_weight, ref_bias = _need(batch, "ref_head", KL()), batch.get("ref_head_bias")
        if is_sharded(head.weight):  # the batch holds the whole head on every process
            ref_weight, ref_bias = rows_like(ref_weight, head.weight), rows_like(ref_bias, head.weight)
    return linear_token_kl(
        hf.final_hidden(model, batch),
        head.weight,
        ref_hidden,
        ref_weight,
        target,
        ref_bias=ref_bias,
        normalizer=normalizer,
        impl=impl,
        **_head_options(head),
    )
