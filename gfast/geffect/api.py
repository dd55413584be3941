"""The five measurements: effects of objectives, samples, label tokens and pairs of samples, and the directions that the
first three are taken along."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, overload

import torch
from torch import nn

from gfast.geffect.combine import Measured, finished, jobs_of, planned
from gfast.geffect.data import terms
from gfast.geffect.directions import Directions
from gfast.geffect.engines import gram, sample, stream, token
from gfast.geffect.request import Options, Request
from gfast.geffect.results import GEffect, GramEffect, SampleEffect, TokenEffect
from gfast.objectives import NLL, Objective, as_objective

ENGINES = ("stream", "sample", "token", "gram")
Batches = Mapping[str, Any] | Iterable[Mapping[str, Any]]


@overload
def g_effect(
    model: nn.Module, objective: Objective, *, forget: Batches, retain: Batches, **options: Any
) -> GEffect: ...
@overload
def g_effect(
    model: nn.Module, objective: Sequence[Objective], *, forget: Batches, retain: Batches, **options: Any
) -> list[GEffect]: ...
@torch.inference_mode(False)
def g_effect(
    model: nn.Module,
    objective: Objective | Sequence[Objective],
    *,
    forget: Batches,
    retain: Batches,
    groups: str | Callable[[str], str] = "paper",
    risk: Objective = NLL(),  # noqa: B008 - frozen
    engine: str = "auto",
    direction_dtype: torch.dtype = torch.float32,
    direction_storage: str | os.PathLike[str] = "device",
    directions: Directions | None = None,
    norms: bool | None = None,
    objective_batches: Batches | None = None,
    loss_scale: float | None = None,
    progress: bool = False,
    reference: str = "auto",
    processes: str = "auto",
) -> GEffect | list[GEffect]:
    r"""The G-effect of unlearning objectives on the risk of forget and retain data, by layer group.

        e(D) = < grad R(D), grad L(D_u) >,    D = D_u (unlearn) and D = D_r (retain)

    summed over the parameters of each group. A descent step on L changes R(D) by -lr * e(D) to first order: wanted are
    a clearly negative e on forget data and one that is not negative on retain data. R and L are means over the whole
    data set (one global count of tokens or sequences), so the result does not depend on how it is cut into batches.

    The risk's gradient on each set is stored (one gradient's size a set); the objective's gradient is dotted with both
    as it appears, parameter by parameter, and freed. One objective on single batches stores one gradient in all, and
    shares the forward of its batch with the risk on it, if the model is made of PyTorch's own functions: the
    activations of that forward are held for two backwards. Several objectives share the forward of each batch likewise,
    by every engine, unless norms of theirs are to be accumulated over batches.
    Passes over the data: 2 for the directions, and one for each distinct term of the objectives that is not a multiple
    of a direction (GA on forget and NLL on retain data are). The model is measured in evaluation mode and left as
    found, also after an error: gradients, hooks, training flags.

    Args:
        model: a Hugging Face causal language model, on any device, possibly wrapped by PEFT, DDP, FSDP2 or
            torch.compile. Frozen parameters are left out.
        objective: an objective, or several: they share directions and forwards. `Mix` combines one with a retain term.
            A function (logp, ref_logp, sequence_id) -> weights is one too: see `objectives.Weights`.
        forget, retain: one batch, or a list, DataLoader or generator of them (materialised as a list): dicts with
            input_ids, labels [B, T] int64 (-100 ignored, unshifted), attention_mask, and what the objective needs,
            such as ref_logp [B, T]. A `weight` [B, T] multiplies the objective's token weights, as in
            `gfast.model_loss`, and never the risk's. Columns on the right that no row's attention_mask or labels need
            are cut off.
        groups: "paper", "layer" or a function from parameter name to group; see `assign`.
        risk: R, an objective evaluated on both sets.
        engine: "stream" ("auto" takes it): gradients are dotted as they appear. "sample": no weight gradient ever
            exists. "token": forward mode, all objectives with token weights from one pass. "gram": no directions
            either, for micro-batches. They agree; the last three take objectives with token weights only.
        direction_dtype: dtype of the stored directions, at most: gradients of fewer bits keep theirs. Sums over batches
            are made in fp32 (of fp64 models in fp64) whatever it is. bfloat16 halves the memory and costs accuracy
            where the cosine is small.
        direction_storage: "device", "host" (pinned host memory, copied ahead of use) or a folder for memory-mapped
            safetensors files.
        directions: what `risk_gradients` returned for this model and data: saves their two passes. How they are kept
            is said there; gram has no use for any.
        norms: the norm of the objective's gradient (for `GEffect.cosine`) comes free with a single batch and for
            multiples of the directions. True gives it always, at the price of holding one more gradient.
        objective_batches: data of objectives whose batches are not the forget set: pairs for DPO, refusals for PO;
            refused where no objective takes them.
        loss_scale: what losses are multiplied by before the backward and gradients divided by after it; None is 1, and
            1024 where fp16 is at work.
        progress: show a bar on stderr, or a line every half minute where that is a file.
        reference: what the original of a model with adapters is, for a KL without ref_hidden in its batches: "auto" or
            "base", as for `gfast.model_loss`.
        processes: "all": the processes of torch.distributed measure together; every one is given the same batches, of
            which gfast takes a share in each, and all get the effect of the whole set. "own": each measures what it is
            given. "auto" is "all" where FSDP2 shards the model over all processes (`fully_shard`), which has no other
            way, else "own". There directions are shards too, only the stream engine can measure, and several batches
            count as one for `errors`: those that run at a time.

    Returns:
        GEffect, or a list of them for a list of objectives.

    Raises:
        ValueError: before any work for an empty set, a malformed batch, data that an objective needs and a batch lacks,
            an unknown engine or grouping, a parameter that no group takes, parameters that are sharded in a way that
            the engine has no rule for, processes with different batches; later for a loss or a
            gradient that is not finite, naming the parameter.

    Source: arXiv 2502.19301, Definition 1.

    Example:
        >>> import torch, gfast
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=2,
        ...                      num_attention_heads=2)
        >>> ids = torch.arange(12).view(2, 6)
        >>> batch = {"input_ids": ids, "labels": ids}
        >>> effect = gfast.g_effect(LlamaForCausalLM(config), gfast.objectives.GA(), forget=batch, retain=batch)
        >>> effect.total("unlearn") < 0
        True
    """
    if engine not in ("auto", *ENGINES):
        raise ValueError(
            f'gfast: there is no engine {engine!r}; choose "auto" or one of {", ".join(map(repr, ENGINES))}'
        )
    if norms and engine not in ("auto", "stream"):
        raise ValueError(
            f"gfast: only the stream engine can measure the objective's norm; {engine!r} never has its gradient"
        )
    several = isinstance(objective, Sequence) and not isinstance(objective, str)
    objectives = [as_objective(each) for each in (objective if several else [objective])]
    if not objectives:
        raise ValueError("gfast: the list of objectives is empty")
    used = [term for each in objectives for _, term in terms(each)]
    options = Options(
        groups, risk, direction_dtype, direction_storage, directions, loss_scale, progress, reference, processes, engine
    )
    request = Request.of(model, forget, retain, options, used, objective_batches)
    if engine in ("auto", "stream"):
        effects = stream.stream_effects(request, objectives, bool(norms))
    else:
        effects = _effects_by(engine, request, objectives)
    return effects if several else effects[0]


def _effects_by(engine: str, request: Request, objectives: Sequence[Objective]) -> list[GEffect]:
    """G-effects by the engine "sample", "token" or "gram": each dots every term's gradient with the risks' in its own
    way."""
    directed = engine != "gram"  # without directions nothing follows from them: GA and NLL are measured like all others
    plans = planned(objectives, request.risk if directed else None, False, request.data.weighted)
    jobs = jobs_of(plans)
    terms = [term for ((_, term),) in jobs]  # without norms every job is one term
    if directed:
        with request.directions() as directions:
            dots = {"sample": sample, "token": token}[engine].objective_dots(request, directions, terms)
            products, risks = directions.gram, directions.risks
    else:
        dots = gram.objective_dots(request, terms)
        products = torch.zeros(len(request.groups.names), 2, 2, dtype=torch.float64, device="cpu")
        risks = {}
    measured = {job: Measured(values, None) for job, values in zip(jobs, dots, strict=True)}
    effects = finished(plans, request, products, measured, risks)
    if not directed:
        for effect in effects:
            effect.norms = {}  # of the zeros in the place of the directions' products
    return effects


@torch.inference_mode(False)
def pg_effect(
    model: nn.Module,
    *,
    forget: Any,
    retain: Any,
    groups: str | Callable[[str], str] = "paper",
    risk: Objective = NLL(),  # noqa: B008 - frozen
    direction_dtype: torch.dtype = torch.float32,
    direction_storage: str | os.PathLike[str] = "device",
    directions: Directions | None = None,
    loss_scale: float | None = None,
    progress: bool = False,
    processes: str = "auto",
) -> SampleEffect:
    r"""The effect of each forget sample on the risk of forget and retain data, by layer group.

        e(D, s) = < grad R(D), grad log p(s; theta) >,    log p(s) = sum of the log-probs of its labelled tokens

    A step that lowers log p(s) by gradient descent on it changes R(D) by -lr * e(D, s) to first order: e on forget
    data is negative for samples whose removal removes others, and e on retain data not negative for those that can be
    removed without harm.

    Two passes with gradients give the directions grad R(D); then one pass over the forget set with parameters frozen
    gives all samples, all groups and both sides. The model is measured in evaluation mode, without gradient
    checkpointing, and left as found, also after an error.

    Args:
        model: a Hugging Face causal language model, possibly wrapped by PEFT, DDP or torch.compile. Its trainable
            parameters must belong to Linears (or GPT-2's Conv1D), embeddings and norms.
        forget, retain, groups, risk, direction_dtype, direction_storage, directions, progress: as for `g_effect`. With
            bfloat16 directions a bfloat16 model multiplies in bfloat16, with float32 ones in float32.
        loss_scale: as for `g_effect`, in the directions' passes and in that of the samples.
        processes: as for `g_effect`; with "all" each measures a share of the forget batches.

    Returns:
        SampleEffect: samples are the rows of the forget batches in order, or the texts of rows that hold several, as
        they begin (whatever their `sequence_id`); one without labels has effect 0.

    Raises:
        ValueError: as `g_effect`; before any work for a trainable parameter whose module has no rule (experts of a
            mixture, fused parameters), naming both; later for a module that was not called, or called with rows that
            belong to no sample, for a parameter that is used anywhere else than in a call of its module, and for a
            gradient that is not finite, naming the parameter.

    Source: arXiv 2502.19301, Definition 1, for single samples.

    Example:
        >>> import torch
        >>> from gfast.geffect import pg_effect
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=2,
        ...                      num_attention_heads=2)
        >>> ids = torch.arange(12).view(2, 6)
        >>> batch = {"input_ids": ids, "labels": ids}
        >>> samples = pg_effect(LlamaForCausalLM(config), forget=batch, retain=batch)
        >>> samples.total("unlearn").shape
        torch.Size([2])
    """
    fixed = dict(processes=processes, engine="sample")
    options = Options(groups, risk, direction_dtype, direction_storage, directions, loss_scale, progress, **fixed)
    return sample.sample_effects(Request.of(model, forget, retain, options))


@torch.inference_mode(False)
def token_effect(
    model: nn.Module,
    *,
    forget: Any,
    retain: Any,
    groups: str | Callable[[str], str] = "paper",
    risk: Objective = NLL(),  # noqa: B008 - frozen
    direction_dtype: torch.dtype = torch.float32,
    direction_storage: str | os.PathLike[str] = "device",
    directions: Directions | None = None,
    loss_scale: float | None = None,
    progress: bool = False,
    processes: str = "auto",
) -> TokenEffect:
    r"""The effect of each label token's log-probability on the risk of forget and retain data, by layer group.

        e(D, i) = < grad R(D), grad log p(s_i | s_<i; theta) >

    The G-effect of every objective with token weights is a weighted sum of these, so one measurement serves every
    objective and every setting of its hyper-parameters: `TokenEffect.g_effect(objective)`.

    Two passes with gradients give the directions grad R(D); then one forward pass over the forget set carries their
    derivatives along, by group and side, and keeps no activations. Its cost is one forward, and for each side one more
    and one for every group that is alive in a layer: about 9 for the groups of the paper, L + 6 for groups="layer".
    Every kind of module is covered as long as it is made of PyTorch operations; hooks on gradients are refused by name,
    because there is no backward that they could change. The model is measured in evaluation mode and left as found,
    also after an error.

    Args:
        model: a Hugging Face causal language model, possibly wrapped by PEFT, DDP or torch.compile. Attention kernels
            that are neither SDPA nor eager, and fused experts, give way to plain operations for the pass (logged).
        forget, retain, groups, risk, direction_dtype, direction_storage, directions, progress: as for `g_effect`.
            Tangents have the model's dtype, and directions are rounded to it where they are used.
        loss_scale: as for `g_effect`, in the directions' passes and for the gradients d log p / d logits.
        processes: as for `pg_effect`.

    Returns:
        TokenEffect: samples are the rows of the forget batches in order, tokens their labels in order; ref_logp is
        there if every batch has it.

    Raises:
        ValueError: as `g_effect`; later for an operation that has no forward derivative (an autograd.Function, a custom
            kernel), naming the module, and for effects that are not finite.

    Source: arXiv 2502.19301, Definition 1, for single tokens.

    Example:
        >>> import torch
        >>> from gfast.geffect import token_effect
        >>> from gfast.objectives import NPO, WGA
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=2,
        ...                      num_attention_heads=2)
        >>> ids = torch.arange(12).view(2, 6)
        >>> batch = {"input_ids": ids, "labels": ids}
        >>> tokens = token_effect(LlamaForCausalLM(config), forget=batch, retain=batch)
        >>> [len(one) for one in tokens.total("unlearn")]
        [5, 5]
        >>> grid = [tokens.g_effect(WGA(alpha=alpha)) for alpha in (0.0, 0.5, 1.0)]
    """
    fixed = dict(processes=processes, engine="token")
    options = Options(groups, risk, direction_dtype, direction_storage, directions, loss_scale, progress, **fixed)
    return token.token_effects(Request.of(model, forget, retain, options))


@torch.inference_mode(False)
def gram_effect(
    model: nn.Module,
    *,
    forget: Any,
    retain: Any,
    groups: str | Callable[[str], str] = "paper",
    loss_scale: float | None = None,
    progress: bool = False,
    processes: str = "auto",
) -> GramEffect:
    r"""Dot products of the gradients of forget samples with those of forget and retain samples, by layer group.

        entry i, j = < grad NLL(s_j), grad log p(s_i) >,    both summed over the labelled tokens of the sample

    A step that lowers log p(s_i) changes the NLL of s_j by -lr times the entry, to first order. Nothing of a
    parameter's size is formed or stored: two passes without weight gradients, and products between rows. Made for
    batches of some hundred to a few thousand tokens; memory holds one forget batch's activations twice. The output
    head's gradients [n, V] of n labelled tokens are held where n is at most the hidden size, else formed a tile of
    the vocabulary at a time, which costs up to one more product with the head a batch.

    Args:
        model: as for `pg_effect`: its trainable parameters must belong to Linears (or GPT-2's Conv1D), embeddings and
            norms. It is measured in evaluation mode and left as found, also after an error.
        forget, retain: as for `g_effect`. Every pair of a forget and another batch costs a pass.
        groups, loss_scale, progress, processes: as for `pg_effect`.

    Returns:
        GramEffect: `unlearn` group -> fp64 [S_f, S_f] and `retain` group -> [S_f, S_r].

    Raises:
        ValueError: as `pg_effect`.

    Source: arXiv 2502.19301, Definition 1, between single samples.

    Example:
        >>> import torch
        >>> from gfast.geffect import gram_effect
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=2,
        ...                      num_attention_heads=2)
        >>> ids = torch.arange(12).view(2, 6)
        >>> gram = gram_effect(LlamaForCausalLM(config), forget={"input_ids": ids, "labels": ids},
        ...                    retain={"input_ids": ids[:1], "labels": ids[:1]})
        >>> gram.total("retain").shape
        torch.Size([2, 1])
    """
    options = Options(groups, loss_scale=loss_scale, progress=progress, processes=processes, engine="gram")
    return gram.gram_effects(Request.of(model, forget, retain, options))


@torch.inference_mode(False)
def risk_gradients(
    model: nn.Module,
    *,
    forget: Batches,
    retain: Batches,
    groups: str | Callable[[str], str] = "paper",
    risk: Objective = NLL(),  # noqa: B008 - frozen
    dtype: torch.dtype = torch.float32,
    storage: str | os.PathLike[str] = "device",
    loss_scale: float | None = None,
    progress: bool = False,
    processes: str = "auto",
) -> Directions:
    r"""The gradients of the risk on both sets, measured once for any number of effects of the same model.

        G(D) = grad R(D),    D = forget set and D = retain set

    Args:
        model, forget, retain, groups, risk, loss_scale, progress, processes: as for `g_effect`.
        dtype: torch.float32, float64 or bfloat16: what they are stored in, at most, as `g_effect`'s direction_dtype.
        storage: "device", "host" (pinned memory, copied ahead of use) or a folder for memory-mapped safetensors files,
            which stay there and can be opened again with `Directions.load`.

    Returns:
        Directions, to be given to `g_effect`, `pg_effect` and `token_effect` as `directions=`.

    Raises:
        ValueError: as `g_effect`; OSError where the folder cannot be written.

    Source: arXiv 2502.19301, Definition 1.

    Example:
        >>> import torch, gfast
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=2,
        ...                      num_attention_heads=2)
        >>> model, ids = LlamaForCausalLM(config), torch.arange(12).view(2, 6)
        >>> data = dict(forget={"input_ids": ids, "labels": ids}, retain={"input_ids": ids, "labels": ids})
        >>> directions = gfast.risk_gradients(model, **data)
        >>> effect = gfast.g_effect(model, gfast.objectives.WGA(), directions=directions, **data)
        >>> directions.get(0, "lm_head.weight").shape
        torch.Size([32, 16])
    """
    options = Options(groups, risk, dtype, storage, loss_scale=loss_scale, progress=progress, processes=processes)
    return Request.of(model, forget, retain, options).measure_directions()
