# SPDX-License-Identifier: Apache-2.0
"""What a model answers to a batch, by its own call, and the log-probs of the labels: the shift and the head."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gfast import hf, sharded, wrappers
from gfast.deferred import DeferredLogits, Head
from gfast.ops.checks import IGNORE_INDEX
from gfast.ops.linear_inputs import as_autocast
from gfast.ops.linear_token_logp import linear_token_logp
from gfast.ops.token_logp import token_logp


def shifted(labels: Tensor) -> Tensor:
    """Labels moved to the positions that score them: [B, T] with -100 in the last column.

    The labels are padded rather than the hidden states cut: a slice of those would be copied.
    """
    return nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)


def unshifted(values: Tensor) -> Tensor:
    """From scoring positions back to label positions [B, T], 0 in the first column."""
    return nn.functional.pad(values[:, :-1], (1, 0))


class ModelOutput(NamedTuple):
    """What a model answers to a batch.

    head: the linear map from `value` to logits, or None.
    value: what the head reads [B, T, D], or the model's own logits [B, T, V] where there is no such map.
    own_terms: what the model adds to its loss beside the cross-entropy, if it was asked for.
    """

    head: Head | None
    value: Tensor
    own_terms: Tensor | None = None


def labels_of(batch: Mapping[str, Any]) -> Tensor:
    """Labels [B, T] of a batch; ValueError where it has none, or they are not like its tokens."""
    if not isinstance(batch, Mapping):
        raise TypeError(
            f"gfast: a batch is a dict of tensors, what a collator makes of items, and this is a {type(batch).__name__}"
        )
    labels = batch.get("labels")
    if labels is None:
        raise ValueError(f"gfast: the batch has no 'labels' (its keys are {sorted(batch)}).")
    if not isinstance(labels, Tensor) or labels.dim() != 2:
        got = f"of shape {tuple(labels.shape)}" if isinstance(labels, Tensor) else f"a {type(labels).__name__}"
        raise ValueError(
            f"gfast: labels must be a tensor [B, T], a row a text, and they are {got}: batches are what a collator "
            f"makes of items"
        )
    tokens = "inputs_embeds" if batch.get("input_ids") is None else "input_ids"
    if batch.get(tokens) is not None and labels.shape != hf.shape_of(batch):
        raise ValueError(
            f"gfast: labels {tuple(labels.shape)} and {tokens} {tuple(hf.shape_of(batch))} must have the same shape; "
            f"gfast shifts them itself."
        )
    return labels


def model_logp(model: nn.Module, batch: Mapping[str, Any], *, impl: str = "auto") -> Tensor:
    r"""Log-probability of every label of a batch: :math:`\log p(s_i \mid s_{<i}; \theta)`.

    Args:
        model: a causal language model of Hugging Face, possibly wrapped (PEFT, DDP, torch.compile). It runs by its own
            call, with everything of the batch but labels.
        batch: what the model takes (input_ids [B, T], attention_mask, pixel_values ...) and labels [B, T] (unshifted,
            -100 ignored), on the model's device.
        impl: as ``linear_token_logp``.

    Returns:
        [B, T], fp32 (fp64 of fp64 models), aligned with labels: entry [b, t] scores labels[b, t]; 0 where ignored and
        at t = 0. Differentiable.

    Raises:
        ValueError: a batch without tokens or labels, labels outside the vocabulary, an input that the model does not
            take, a model that is no causal language model; each by its name.

    Source: arXiv 2502.19301, section 2.

    Example:
        >>> import torch, gfast
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = dict(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
        >>> ids = torch.tensor([[1, 2, 3]])
        >>> gfast.model_logp(LlamaForCausalLM(LlamaConfig(**sizes)), dict(input_ids=ids, labels=ids)).shape
        torch.Size([1, 3])
    """
    labels = shifted(labels_of(batch))

    def logp(module: nn.Module) -> Tensor:
        return unshifted(output_logp(model_output(module, batch), labels, impl=impl))

    return wrappers.inside(model, logp)


def output_logp(output: ModelOutput, labels: Tensor, *, impl: str = "auto") -> Tensor:
    """log p [B, T] of shifted labels."""
    if output.head is None:
        return token_logp(output.value, labels, impl=impl)
    head = output.head
    return head.over(
        output.value, lambda hidden: linear_token_logp(hidden, head.weight, labels, impl=impl, **head.form)
    )


def model_output(model: nn.Module, batch: Mapping[str, Any], own_terms: bool = False) -> ModelOutput:
    """What the model answers to a batch, by its own call."""
    is_own_kind = hf.of_its_own_kind(model)
    if is_own_kind is not None:
        return _own_output(is_own_kind, batch, own_terms)
    logits, terms = hf.answer(model, batch, own_terms=own_terms)
    head = logits.head() if isinstance(logits, DeferredLogits) else None
    if head is None:
        return ModelOutput(None, logits.real() if isinstance(logits, DeferredLogits) else logits, terms)
    if head.gathers is None and sharded.is_freed(head.weight):  # the model's own logits
        hf.log_materialised(model, "FSDP1 frees the head's weight when the head's call ends; FSDP2 can have it again")
        return ModelOutput(None, *hf.answer(model, batch, defer=False, own_terms=own_terms))
    return ModelOutput(head, logits.hidden, terms)


def _own_output(module: nn.Module, batch: Mapping[str, Any], own_terms: bool) -> ModelOutput:
    """Of a model that is not transformers' (`hf.of_its_own_kind`)."""
    if own_terms:
        raise ValueError(
            f"gfast: {type(module).__name__} computes no loss of its own that own_terms could be a part of"
        )
    hidden = hf.own_hidden(module, batch)  # [B, T, D]
    if not hf.plain_head(module):
        hf.log_materialised(module, f"its head is no plain nn.Linear but a {type(module.head).__name__} that is called")
        return ModelOutput(None, module.head(hidden))
    hidden, weight, bias = as_autocast(hidden, module.head.weight, module.head.bias)
    return ModelOutput(Head(weight, bias, module=module.head), hidden)


def form_of(output: ModelOutput) -> tuple[float, float]:
    """Scale and soft cap of the logits, 0 for none."""
    return (1.0, 0.0) if output.head is None else (output.head.logit_scale, output.head.softcap or 0.0)


def logits_of(output: ModelOutput) -> Tensor:
    """Logits [B, T, V]."""
    if output.head is None:
        return output.value
    head = output.head
    z = head.over(output.value, lambda hidden: nn.functional.linear(hidden, head.weight.to(hidden.dtype), head.bias))
    z = z * head.logit_scale
    return z if head.softcap is None else head.softcap * torch.tanh(z / head.softcap)
