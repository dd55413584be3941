"""Objectives over a Hugging Face model and a Hugging Face batch: the shift, the head and the reference happen here."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gfast import hf, sharded, wrappers
from gfast.deferred import DeferredLogits, Head
from gfast.hidden_states import layer_hidden
from gfast.model_state import evaluating
from gfast.objectives import KL, RMU, RR, UNWEIGHTED, Mix, OfLabel, SoftTarget
from gfast.ops.checks import IGNORE_INDEX, check_like_labels
from gfast.ops.linear_inputs import as_autocast
from gfast.ops.linear_soft_target_loss import linear_soft_target_loss
from gfast.ops.linear_token_kl import linear_token_kl
from gfast.ops.linear_token_logp import linear_token_logp
from gfast.ops.linear_unlearn_loss import linear_unlearn_loss
from gfast.ops.reductions import LossOutput
from gfast.ops.soft_target_loss import soft_target_loss
from gfast.ops.token_kl import kl_factor, token_kl
from gfast.ops.token_logp import token_logp
from gfast.ops.unlearn_loss import unlearn_loss
from gfast.ops.vocab_parallel import is_sharded, rows_like
from gfast.ops.weights import check_given, check_reference, is_pair
from gfast.packed import pair_ids, sequence_ids


def shifted(labels: Tensor) -> Tensor:
    """Labels moved to the positions that score them: [B, T] with -100 in the last column.

    The labels are padded rather than the hidden states cut: a slice of those would be copied.
    """
    return nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)


def _back(values: Tensor) -> Tensor:
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


def _labels(batch: Mapping[str, Any]) -> Tensor:
    labels = batch.get("labels")
    if labels is None:
        raise ValueError(f"gfast: the batch has no 'labels' (its keys are {sorted(batch)}).")
    if not isinstance(labels, Tensor) or labels.dim() != 2:
        found = f"of shape {tuple(labels.shape)}" if isinstance(labels, Tensor) else f"a {type(labels).__name__}"
        raise ValueError(
            f"gfast: labels must be a tensor [B, T], a row a text, and they are {found}: batches are what a collator "
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
        [B, T], fp32, aligned with labels: entry [b, t] scores labels[b, t]; 0 where ignored and at t = 0.
        Differentiable.

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
    labels = shifted(_labels(batch))

    def logp(module: nn.Module) -> Tensor:
        return _back(output_logp(model_output(module, batch), labels, impl=impl))

    return wrappers.inside(model, logp)


def output_logp(output: ModelOutput, labels: Tensor, *, impl: str = "auto") -> Tensor:
    """log p [B, T] of shifted labels."""
    if output.head is None:
        return token_logp(output.value, labels, impl=impl)
    head = output.head
    return head.over(
        output.value, lambda hidden: linear_token_logp(hidden, head.weight, labels, impl=impl, **head.form)
    )


def model_loss(
    model: nn.Module,
    batch: Mapping[str, Any],
    objective,
    *,
    ref_logp: Tensor | None = None,
    sequence_id: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str | None = None,
    normalizer: float | Tensor | None = None,
    impl: str = "auto",
    reference: str = "auto",
    own_terms: float = 0.0,
) -> LossOutput:
    r"""An objective of a model on a batch, without the logits of the whole batch.

    The model runs by its own outermost call, with everything of the batch but labels and what gfast adds. Its head is
    deferred (`gfast.deferred`): where the logits are a linear map of hidden states, scaled or capped, the objective
    goes through ``linear_unlearn_loss`` (KL: ``linear_token_kl``), also where tensor parallelism has sharded the head
    over the vocabulary; every process of its mesh then calls with the same batch, and ref_head is the whole one. Where
    the model does something else with its logits, they are taken as it gives them. Under DDP and FSDP every process
    gets the gradient that these make of all processes' losses: their mean.

    Terms that a model adds to its own loss (the balance of a mixture's experts, AdaLoRA's orthogonality) are no part
    of an objective: they are left out, which is logged once, unless ``own_terms`` asks for them.

    Args:
        model: a causal language model of Hugging Face, possibly wrapped. Or any module whose logits are causal, with a
            method `hidden(batch)` -> [B, T, D] and a module `head` that makes logits [B, T, V] of it; nn.Linear is
            never called.
        batch: what the model takes, and labels [B, T]; what the objective needs besides: ref_logp [B, T] aligned with
            labels, ref_hidden [B, T, D] and ref_head [V, D] (KL, UNDIAL, SHRED, JSD), ref_layer_hidden [B, T, D] (RR);
            DPO takes pairs [2B, T]. `weight` [B, T], aligned with labels: constants that the objective's own token
            weights are multiplied by, as in ``unlearn_loss``; objectives without token weights refuse it. Where rows
            hold several texts, these are the sequences: `position_ids` that start again, `cu_seq_lens_q` [S + 1],
            `seq_idx` or `sequence_id` [B, T] say so (`gfast.packed`).
        objective: any of ``gfast.objectives`` but Mix, whose two terms see different batches; or a callable of weights.
        ref_logp, sequence_id, weight: override the batch's.
        reduction, normalizer, impl: as ``linear_unlearn_loss``; objectives without token weights (KL, RMU, RR, those of
            ``gfast.objectives.soft``) know only their mean over positions and refuse another reduction.
        reference: where the batch lacks values of the original model and the model has PEFT adapters, they are
            computed with the adapters off. "auto" refuses that where the base is not the original: where something
            else is trained too, or the adapters are not zero when they are first seen. "base" says that the base is
            the original, although the adapters are not zero. "adapter:NAME": the model with the adapter of that name in
            place of the active one; it must be frozen (TRL keeps a copy named "ref").
        own_terms: this times what the model adds to the cross-entropy in its own loss is added; 1 is its own factor.

    Returns:
        LossOutput; logp and weight are [B, T] aligned with labels, and None for objectives without token weights.

    Raises:
        ValueError: missing labels or reference data, a base that is not the original, labels outside the vocabulary,
            an input that the model does not take, a model that is no causal language model.
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
    if own_terms and (isinstance(objective, (RMU, RR)) or reduction == "none"):
        raise ValueError("gfast: own_terms needs a loss that is one number from the model's logits; compute them apart")
    if isinstance(objective, Mix):
        raise TypeError("gfast: the terms of a Mix see different batches: call model_loss once a term and add.")
    labels = _labels(batch)
    if ref_logp is not None:
        batch = {**batch, "ref_logp": ref_logp}
    if sequence_id is not None:
        batch = {**batch, "sequence_id": sequence_id}
    if weight is not None:
        batch = {**batch, "weight": weight}
    if batch.get("weight") is not None:
        check_weighs(objective, "model_loss")
    check_given("model_loss", objective, batch.get("weight"), labels)
    # before the forward pass, not after it
    lacking = [key for key in sorted(getattr(objective, "needs", ())) if key in _REFERENCE and batch.get(key) is None]
    if lacking and not wrappers.is_adapted(model):
        _refuse_lack(objective, lacking[0])
    if isinstance(objective, UNWEIGHTED):
        if reduction not in (None, known := objective.default_reduction):
            raise ValueError(f"gfast: model_loss: {objective} knows only reduction={known!r}, not {reduction!r}")
        if "ref_logp" in objective.needs and batch.get("ref_logp") is not None:
            check_like_labels("model_loss", "ref_logp", batch["ref_logp"], labels)
    else:
        if batch.get("ref_logp") is not None or not lacking:
            check_reference("model_loss", objective, batch.get("ref_logp"), labels)

    def loss(module: nn.Module) -> LossOutput:
        given = with_reference(module, batch, objective, reference) if lacking else batch
        if isinstance(objective, (RMU, RR)):
            hidden = layer_hidden(module, given, objective.layer)  # [B, T, D]
            more = (given["ref_layer_hidden"],) if isinstance(objective, RR) else ()
            return LossOutput(objective.value(hidden, *more, labels != IGNORE_INDEX, normalizer), None, None)
        output = model_output(module, given, own_terms=own_terms != 0)
        if isinstance(objective, (KL, SoftTarget)):
            out = LossOutput(_divergence(output, given, objective, normalizer, impl), None, None)
        elif isinstance(objective, OfLabel):
            out = LossOutput(_of_label(output, given, objective, normalizer, impl), None, None)
        else:
            out = output_loss(output, given, objective, reduction=reduction, normalizer=normalizer, impl=impl)
        return out if output.own_terms is None else out._replace(loss=out.loss + own_terms * output.own_terms)

    return wrappers.inside(model, loss)


def model_output(model: nn.Module, batch: Mapping[str, Any], own_terms: bool = False) -> ModelOutput:
    """What the model answers to a batch, by its own call."""
    own = hf.of_its_own_kind(model)
    if own is not None:
        return _own_output(own, batch, own_terms)
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


def output_loss(output: ModelOutput, batch: Mapping[str, Any], objective, **options: Any) -> LossOutput:
    """`model_loss` of an objective with token weights, from what `model_output` gives; options of
    ``linear_unlearn_loss``.
    """
    labels, reference, weight = _labels(batch), batch.get("ref_logp"), batch.get("weight")
    check_reference("model_loss", objective, reference, labels)
    value, target, ids = output.value, shifted(labels), sequence_ids(batch)
    ref, weight = (None if x is None else nn.functional.pad(x[:, 1:], (0, 1)) for x in (reference, weight))
    if ids is not None and is_pair(objective):
        if labels.numel() % 2:  # the last column scores nothing
            value, target, ids = value[:, :-1], target[:, :-1], ids[:, :-1]
            ref, weight = (None if x is None else x[:, :-1] for x in (ref, weight))
        ids = pair_ids(ids, target)
    options |= dict(ref_logp=ref, sequence_id=ids, weight=weight)
    if output.head is None:
        out = unlearn_loss(value, target, objective, **options)
    else:
        head, of = output.head, (target, objective)
        out = head.over(value, lambda hidden: linear_unlearn_loss(hidden, head.weight, *of, **options, **head.form))
    back = _back if target.shape == labels.shape else lambda x: nn.functional.pad(x, (1, 0))
    loss = back(out.loss) if out.loss.shape == target.shape else out.loss
    return LossOutput(loss, *(None if x is None else back(x) for x in (out.logp, out.weight)))


def check_weighs(objective, name: str) -> None:
    """ValueError for an objective that has no token weights, and so none to be multiplied by a batch's."""
    if isinstance(objective, UNWEIGHTED):
        raise ValueError(
            f"gfast: {name}: the batch has a 'weight', and {objective} has no token weights that it could multiply: "
            f"take it out of the batch."
        )


# The original model

_REFERENCE = frozenset({"ref_logp", "ref_hidden", "ref_head", "ref_layer_hidden"})
REFERENCES = ("auto", "base", "adapted")
# Models whose adapters were zero when they were first seen, or whose base was said to be the original.
_base_is_original: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def declare_base_original(model: nn.Module) -> None:
    """From now on the base of this model with adapters is the original, although the adapters are not zero: as in a run
    that goes on from a checkpoint.
    """
    _base_is_original.add(wrappers.measured(model))


@contextmanager
def original(model: nn.Module, batch: Mapping[str, Any], reference: str = "auto") -> Iterator[None]:
    """The model as it was before it was trained: with its adapters off, in evaluation mode, without gradients.

    Raises ValueError where that is not provably the original: see `model_loss`. ``batch`` is what adapters are looked
    at with, the first time.
    """
    check_original(model, batch, reference)
    name = adapter_name(reference)
    other = wrappers.adapters_off(model) if name is None else wrappers.other_adapter(model, name)
    with torch.no_grad(), evaluating(model), other:
        yield


def check_reference_name(reference: str) -> None:
    """ValueError for something that names no original model."""
    if reference not in REFERENCES and adapter_name(reference) is None:
        raise ValueError(
            f"gfast: reference must be one of {', '.join(map(repr, REFERENCES))} or 'adapter:NAME', not {reference!r}"
        )


def adapter_name(reference: str) -> str | None:
    """NAME of a reference "adapter:NAME"; None for any other."""
    kind, _, name = str(reference).partition(":")
    return name if kind == "adapter" and name else None


def check_original(model: nn.Module, batch: Mapping[str, Any], reference: str = "auto") -> None:
    """ValueError unless the model with its adapters off is the original, or a frozen adapter of its own makes it."""
    if (name := adapter_name(reference)) is not None:
        wrappers.check_frozen_adapter(model, name)
        return
    check_reference_name(reference)
    if reference == "adapted":
        raise ValueError(
            "gfast: reference='adapted' is the model as it starts, adapters on: its values must be computed before "
            "training. Build them with ReferenceCache.build(model, ..., reference='adapted') and give them with the "
            "batches"
        )
    wrappers.check_base_is_original(model)
    if reference == "base":
        declare_base_original(model)
    if wrappers.measured(model) in _base_is_original:
        return
    with torch.no_grad(), evaluating(model):
        adapted = model_logp(model, batch)
        with wrappers.adapters_off(model):
            base = model_logp(model, batch)
    # adapters that are zero add nothing, but for methods that divide by a norm: those round
    narrowest = min((p.dtype.itemsize for p in model.parameters() if p.is_floating_point()), default=4)
    rounding = 2e-2 if narrowest < 4 else 1e-4 if narrowest == 4 else 1e-7
    apart = float((adapted - base).abs().sum() / (batch["labels"][:, 1:] != IGNORE_INDEX).sum().clamp(min=1))
    if not apart <= rounding:
        raise ValueError(
            f"gfast: this model's adapters are not zero (its log-probs differ by {apart:.3g} a token from those of the "
            f"base), so that it is not clear which is the original: the base, or the model with its adapters as they "
            f"start. Say reference='base' (as for adapters that have been unlearning already), or build the values of "
            f"the model as it starts with ReferenceCache.build(..., reference='adapted') and give them with the batches"
        )
    declare_base_original(model)


def with_reference(model: nn.Module, batch: Mapping[str, Any], objective, reference: str = "auto") -> dict[str, Any]:
    """The batch with the values of the original model that the objective needs and the batch lacks, from the model
    with its adapters off.
    """
    given = dict(batch)
    lacking = {key for key in objective.needs & _REFERENCE if given.get(key) is None}
    if not lacking:
        return given
    with original(model, batch, reference):
        if "ref_logp" in lacking:
            given["ref_logp"] = model_logp(model, batch).float()  # [B, T]
        if "ref_layer_hidden" in lacking:
            given["ref_layer_hidden"] = layer_hidden(model, batch, objective.layer)  # [B, T, D]
        if lacking & {"ref_hidden", "ref_head"}:
            given["ref_output"] = model_output(model, batch)
    return given


def _refuse_lack(objective, key: str) -> None:
    if key == "ref_logp" and not isinstance(objective, UNWEIGHTED):
        check_reference("model_loss", objective, None, torch.zeros(0))
    raise ValueError(
        f"gfast: {objective} needs {key!r} in the batch, computed under the original model; build a "
        f"gfast.ReferenceCache and give it to the collator."
    )


def _divergence(output: ModelOutput, batch: Mapping[str, Any], objective, normalizer, impl: str) -> Tensor:
    """KL, or the divergence from a soft target, whose logits are the original's or the model's own."""
    target, head = shifted(_labels(batch)), output.head
    options: dict[str, Any] = dict(normalizer=normalizer, impl=impl)
    whole, linear = token_kl, linear_token_kl
    if isinstance(objective, SoftTarget):
        whole, linear = soft_target_loss, linear_soft_target_loss
        ref_logp = batch.get("ref_logp")
        ref_logp = None if ref_logp is None else nn.functional.pad(ref_logp[:, 1:], (0, 1))
        options |= dict(kind=objective.kind, beta=objective.lowering(target, ref_logp, sequence_ids(batch)))
        if objective.own:
            if head is None:
                return whole(output.value, None, target, **options)
            return head.over(
                output.value,
                lambda hidden: linear(hidden, head.weight, None, None, target, **options, **head.form),
            )
    ref = batch.get("ref_output")
    if ref is None:
        scale, softcap = batch.get("ref_head_form", _form_of(output))
        ref_head = Head(batch["ref_head"], batch.get("ref_head_bias"), float(scale), float(softcap) or None)
        ref = ModelOutput(ref_head, batch["ref_hidden"])
    if head is None or ref.head is None or _form_of(output) != _form_of(ref):
        return whole(_logits(output), _logits(ref).to(output.value.dtype), target, **options)
    ref_weight, ref_bias = ref.head.weight, ref.head.bias
    if is_sharded(head.weight):  # the batch holds the whole head on every process
        ref_weight, ref_bias = rows_like(ref_weight, head.weight), rows_like(ref_bias, head.weight)
    options |= dict(ref_bias=ref_bias, **head.form)

    def divergence(hidden: Tensor) -> Tensor:
        return ref.head.over(ref.value, lambda its: linear(hidden, head.weight, its, ref_weight, target, **options))

    return head.over(output.value, divergence)


def _of_label(output: ModelOutput, batch: Mapping[str, Any], objective: OfLabel, normalizer, impl: str) -> Tensor:
    """The mean of a function of one token's log-prob a position."""
    labels = shifted(_labels(batch))
    target, head = objective.target(labels, sequence_ids(batch)), output.head
    if head is None:
        objective.check(vocab := output.value.shape[-1])
        logp = token_logp(output.value, target, impl=impl)
    else:
        rows = []  # of the weight, which may be here only while the head is called

        def of_head(hidden: Tensor) -> Tensor:
            rows.append(head.weight.shape[0])
            objective.check(rows[-1])
            return linear_token_logp(hidden, head.weight, target, impl=impl, **head.form)

        logp, vocab = head.over(output.value, of_head), rows[-1]
    values = torch.where(target == IGNORE_INDEX, 0.0, objective.value(logp, vocab))
    return values.sum() * kl_factor("model_loss", labels, "token_mean", normalizer, values.dtype)[1]


def _form_of(output: ModelOutput) -> tuple[float, float]:
    """Scale and soft cap of the logits, 0 for none."""
    return (1.0, 0.0) if output.head is None else (output.head.logit_scale, output.head.softcap or 0.0)


def _logits(output: ModelOutput) -> Tensor:
    if output.head is None:
        return output.value
    head = output.head
    z = head.over(output.value, lambda hidden: nn.functional.linear(hidden, head.weight.to(hidden.dtype), head.bias))
    z = z * head.logit_scale
    return z if head.softcap is None else head.softcap * torch.tanh(z / head.softcap)
