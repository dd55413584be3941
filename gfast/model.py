# SPDX-License-Identifier: Apache-2.0
"""Objectives over a Hugging Face model and a Hugging Face batch: the shift, the head and the reference happen here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gfast import peft_models, precision, wrappers
from gfast.deferred import Head
from gfast.hidden_states import layer_hidden
from gfast.model_output import ModelOutput, form_of, labels_of, logits_of, model_output, shifted, unshifted
from gfast.model_state import evaluating
from gfast.objectives import KL, RMU, RR, UNWEIGHTED, Mix, OfLabel, SoftTarget
from gfast.ops.checks import IGNORE_INDEX, check_like_labels
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
from gfast.ops.weights import check_given, check_reference, default_reduction, is_pair, kernel_spec
from gfast.original import REFERENCE_KEYS, check_reference_name, with_reference
from gfast.packed import check_pairs, pair_ids, sequence_ids


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
            else is trained too, or the adapters are not zero when they are first seen, or seen first after weights have
            been loaded into the model (by `load_state_dict`; what is written into them by hand later looks like
            training, and the base stays the original). "base" says that the base is the original, although they are not
            zero. "adapter:NAME": the model with the adapter of that name in place of the active one; it must be frozen
            (TRL keeps a copy named "ref").
        own_terms: this times what the model's own loss is without the cross-entropy of the labels (whatever factor that
            has in it) is added; 1 is its own factor. A loss that has none by PyTorch's function is refused.

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
    check_reference_name(reference)
    if own_terms and (isinstance(objective, (RMU, RR)) or reduction == "none"):
        raise ValueError("gfast: own_terms needs a loss that is one number from the model's logits; compute them apart")
    more = {"ref_logp": ref_logp, "sequence_id": sequence_id, "weight": weight}
    if more := {key: value for key, value in more.items() if value is not None}:
        batch = {**batch, **more}
    asked = dict(reduction=reduction, normalizer=normalizer, impl=impl, reference=reference)
    out, own = loss_and_own_terms(model, batch, objective, own_terms != 0, **asked)
    return out if own is None else out._replace(loss=out.loss + own_terms * own)


def loss_and_own_terms(
    model: nn.Module,
    batch: Mapping[str, Any],
    objective,
    with_own: bool,
    *,
    reduction: str | None = None,
    normalizer: float | Tensor | None = None,
    impl: str = "auto",
    reference: str = "auto",
) -> tuple[LossOutput, Tensor | None]:
    """`model_loss`, and the terms that the model adds to its own loss apart: None where they are not asked for."""
    lacks = check_batch(model, batch, objective, reduction)

    def loss(module: nn.Module) -> tuple[LossOutput, Tensor | None]:
        given = with_reference(module, batch, objective, reference) if lacks else batch
        if isinstance(objective, (RMU, RR)):
            hidden = layer_hidden(module, given, objective.layer)  # [B, T, D]
            more = (given["ref_layer_hidden"],) if isinstance(objective, RR) else ()
            valid = labels_of(batch) != IGNORE_INDEX
            return LossOutput(objective.value(hidden, *more, valid, normalizer), None, None), None
        output = model_output(module, given, own_terms=with_own)
        given = _with_form(module, given, output)
        out = loss_of_output(output, given, objective, reduction=reduction, normalizer=normalizer, impl=impl)
        return out, output.own_terms

    if isinstance(objective, (RMU, RR)):  # whose hooks see nothing of compiled code
        plain = wrappers.uncompiled(model)
        wrappers.refuse_hooks_around(model, plain)
        model = plain
    return wrappers.inside(model, loss)


def _with_form(model: nn.Module, batch: Mapping[str, Any], output: ModelOutput) -> Mapping[str, Any]:
    """A batch whose `ref_hidden` and `ref_head` somebody made, with what the model itself does to the head's product.
    Its own logits do not tell; the code that was compiled does, in a look without gradients. A
    ReferenceCache says it, and needs none.
    """
    if output.head is not None or "ref_head" not in batch or {"ref_head_form", "ref_output"} & batch.keys():
        return batch
    plain = wrappers.measured(model)
    if plain is model:
        return batch
    with torch.no_grad(), evaluating(plain):
        answer = model_output(plain, batch)
    return batch if answer.head is None else {**batch, "ref_head_form": form_of(answer)}


def check_batch(model: nn.Module, batch: Mapping[str, Any], objective, reduction: str | None = None) -> bool:
    """The errors that `model_loss` of a batch would have after its forward pass, before it. Whether the batch lacks
    values of the original model, which the model has then with its adapters off.
    """
    if isinstance(objective, Mix):
        raise TypeError("gfast: the terms of a Mix see different batches: call model_loss once a term and add.")
    labels = labels_of(batch)
    check_pairs(batch, objective)
    if batch.get("weight") is not None:
        check_weighs(objective, "model_loss")
    check_given("model_loss", objective, batch.get("weight"), labels)
    needs = REFERENCE_KEYS & set(getattr(objective, "needs", ()))
    lacking = [key for key in sorted(needs) if batch.get(key) is None]
    if lacking and not peft_models.is_adapted(model):
        _refuse_lack(objective, lacking[0])
    if len(lacking) < len(needs):
        precision.say_other(model, batch)
    if isinstance(objective, RR) and batch.get("ref_layer") is not None:
        other = [layer for layer in batch["ref_layer"].tolist() if layer != objective.layer]
        if other:
            raise ValueError(
                f"gfast: {objective} was given the original's hidden states of layer {other[0]}: build the "
                f"ReferenceCache with layer={objective.layer}"
            )
    if isinstance(objective, UNWEIGHTED):
        if reduction not in (None, known := objective.default_reduction):
            raise ValueError(f"gfast: model_loss: {objective} knows only reduction={known!r}, not {reduction!r}")
        if "ref_logp" in objective.needs and batch.get("ref_logp") is not None:
            check_like_labels("model_loss", "ref_logp", batch["ref_logp"], labels)
    else:
        if batch.get("ref_logp") is not None or not lacking:
            check_reference("model_loss", objective, batch.get("ref_logp"), labels)
    return bool(lacking)


def loss_of_output(
    output: ModelOutput,
    batch: Mapping[str, Any],
    objective,
    *,
    reduction: str | None = None,
    normalizer: float | Tensor | None = None,
    impl: str = "auto",
) -> LossOutput:
    """`model_loss` of an objective of the model's logits, from what `model_output` gives; see `check_batch`."""
    if isinstance(objective, (KL, SoftTarget)):
        return LossOutput(_divergence(output, batch, objective, normalizer, impl), None, None)
    if isinstance(objective, OfLabel):
        return LossOutput(_of_label(output, batch, objective, normalizer, impl), None, None)
    return output_loss(output, batch, objective, reduction=reduction, normalizer=normalizer, impl=impl)


def output_loss(output: ModelOutput, batch: Mapping[str, Any], objective, **options: Any) -> LossOutput:
    """`model_loss` of an objective with token weights, from what `model_output` gives; options of
    ``linear_unlearn_loss``.
    """
    labels, reference, weight = labels_of(batch), batch.get("ref_logp"), batch.get("weight")
    check_reference("model_loss", objective, reference, labels)
    value, target, pairs = output.value, shifted(labels), is_pair(objective)
    ref, weight = (None if x is None else nn.functional.pad(x[:, 1:], (0, 1)) for x in (reference, weight))
    size = labels.numel() - (labels.shape[0] if labels.numel() % 2 else 0)
    ids = None
    if batch.get("sequence_id") is not None or not _is_of_tokens(objective, options.get("reduction")):
        ids = pair_ids(batch, size) if pairs else sequence_ids(batch)  # which waits for the device
    if ids is not None and pairs and size < labels.numel():  # an odd number: the last column scores nothing
        value, target, ids = value[:, :-1], target[:, :-1], ids[:, :-1]
        ref, weight = (None if x is None else x[:, :-1] for x in (ref, weight))
    options |= dict(ref_logp=ref, sequence_id=ids, weight=weight)
    if output.head is None:
        out = unlearn_loss(value, target, objective, **options)
    else:
        head, of = output.head, (target, objective)
        out = head.over(value, lambda hidden: linear_unlearn_loss(hidden, head.weight, *of, **options, **head.form))
    back = unshifted if target.shape == labels.shape else lambda x: nn.functional.pad(x, (1, 0))
    loss = back(out.loss) if out.loss.shape == target.shape else out.loss
    return LossOutput(loss, *(None if x is None else back(x) for x in (out.logp, out.weight)))


def _is_of_tokens(objective, reduction: str | None) -> bool:
    """Whether the loss is a sum over tokens, whatever texts they are of."""
    spec = kernel_spec(objective)
    return spec is not None and spec.level == "token" and (reduction or default_reduction(objective)) != "sequence_mean"


def check_weighs(objective, name: str) -> None:
    """ValueError for an objective that has no token weights, and so none to be multiplied by a batch's."""
    if isinstance(objective, UNWEIGHTED):
        raise ValueError(
            f"gfast: {name}: the batch has a 'weight', and {objective} has no token weights that it could multiply: "
            f"take it out of the batch."
        )


def _refuse_lack(objective, key: str) -> None:
    if key == "ref_logp" and not isinstance(objective, UNWEIGHTED):
        check_reference("model_loss", objective, None, torch.zeros(0))
    raise ValueError(
        f"gfast: {objective} needs {key!r} in the batch, computed under the original model; build a "
        f"gfast.ReferenceCache and give it to the collator."
    )


def _divergence(output: ModelOutput, batch: Mapping[str, Any], objective, normalizer, impl: str) -> Tensor:
    """KL, or the divergence from a soft target, whose logits are the original's or the model's own."""
    target, head = shifted(labels_of(batch)), output.head
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
        form = batch.get("ref_head_form")
        if form is None and head is None:
            raise ValueError(
                f"gfast: {objective}: this model's own logits are taken (the log says why), and nothing says what the "
                f"original does to the product of ref_hidden and ref_head: give ref_head_form=(scale, soft cap) in the "
                f"batch, (1.0, 0.0) for nothing. A gfast.ReferenceCache holds it"
            )
        scale, softcap = form_of(output) if form is None else form
        ref_head = Head(batch["ref_head"], batch.get("ref_head_bias"), float(scale), float(softcap) or None)
        ref = ModelOutput(ref_head, batch["ref_hidden"])
    if head is None or ref.head is None or form_of(output) != form_of(ref):
        return whole(logits_of(output), logits_of(ref).to(output.value.dtype), target, **options)
    ref_weight, ref_bias = ref.head.weight, ref.head.bias
    if is_sharded(head.weight):  # the batch holds the whole head on every process
        ref_weight, ref_bias = rows_like(ref_weight, head.weight), rows_like(ref_bias, head.weight)
    options |= dict(ref_bias=ref_bias, **head.form)

    def divergence(hidden: Tensor) -> Tensor:
        return ref.head.over(ref.value, lambda its: linear(hidden, head.weight, its, ref_weight, target, **options))

    return head.over(output.value, divergence)


def _of_label(output: ModelOutput, batch: Mapping[str, Any], objective: OfLabel, normalizer, impl: str) -> Tensor:
    """The mean of a function of one token's log-prob a position."""
    labels = shifted(labels_of(batch))
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
