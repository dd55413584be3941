"""Gradient effects: what a step on an unlearning objective does to the risk of forget and retain data, by layer."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, overload

import torch
from torch import nn

from gfast.geffect.data import terms
from gfast.geffect.directions import Directions
from gfast.geffect.effects import SampleEffect, TokenEffect
from gfast.geffect.gram import gram_effect
from gfast.geffect.groups import GroupMap, assign
from gfast.geffect.history import EffectHistory
from gfast.geffect.measurement import Measurement
from gfast.geffect.pairs import GramEffect
from gfast.geffect.results import Effect, GEffect
from gfast.geffect.sample import pg_effect
from gfast.geffect.token import token_effect
from gfast.objectives import NLL, Objective

ENGINES = ("stream", "sample", "token", "gram")
Batches = Mapping[str, Any] | Iterable[Mapping[str, Any]]

__all__ = [
    "ENGINES",
    "Directions",
    "Effect",
    "EffectHistory",
    "GEffect",
    "GramEffect",
    "GroupMap",
    "SampleEffect",
    "TokenEffect",
    "assign",
    "g_effect",
    "gram_effect",
    "pg_effect",
    "risk_gradients",
    "token_effect",
]


@overload
def g_effect(
    model: nn.Module, objective: Objective, *, forget: Batches, retain: Batches, **options: Any
) -> GEffect: ...
@overload
def g_effect(
    model: nn.Module, objective: Sequence[Objective], *, forget: Batches, retain: Batches, **options: Any
) -> list[GEffect]: ...
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
        model: a Hugging Face causal language model, on any device, possibly wrapped by PEFT, DDP or torch.compile.
            Frozen parameters are left out. Under DDP each process measures the batches that it is given.
        objective: an objective, or several: they share directions and forwards. `Mix` combines one with a retain term.
        forget, retain: one batch, or a list, DataLoader or generator of them (materialised as a list): dicts with
            input_ids, labels [B, T] int64 (-100 ignored, unshifted), attention_mask, and what the objective needs,
            such as ref_logp [B, T]. Columns on the right that no row's attention_mask or labels need are cut off.
        groups: "paper", "layer" or a function from parameter name to group; see `assign`.
        risk: R, an objective evaluated on both sets.
        engine: "stream" ("auto" takes it): gradients are dotted as they appear. "sample": no weight gradient ever
            exists. "token": forward mode, all objectives with token weights from one pass. "gram": no directions
            either, for micro-batches. They agree; the last three take objectives with token weights only.
        direction_dtype: dtype of the stored directions. Sums over batches are made in fp32 whatever it is. bfloat16
            halves the memory and costs accuracy where the cosine is small.
        direction_storage: "device", "host" (pinned host memory, copied ahead of use) or a folder for memory-mapped
            safetensors files.
        directions: what `risk_gradients` returned for this model and data: saves their two passes.
        norms: the norm of the objective's gradient (for `GEffect.cosine`) comes free with a single batch and for
            multiples of the directions. True gives it always, at the price of holding one more gradient.
        objective_batches: data of objectives whose batches are not the forget set: pairs for DPO, refusals for PO.
        loss_scale: what losses are multiplied by before the backward and gradients divided by after it; None is 1, and
            1024 where fp16 is at work.
        progress: show a bar (needs tqdm).
        reference: what the original of a model with adapters is, for a KL without ref_hidden in its batches: "auto" or
            "base", as for `gfast.model_loss`.

    Returns:
        GEffect, or a list of them for a list of objectives.

    Raises:
        ValueError: before any work for an empty set, a malformed batch, data that an objective needs and a batch lacks,
            an unknown engine or grouping, a parameter that no group takes, sharded parameters; later for a loss or a
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
        raise ValueError(f'there is no engine {engine!r}; choose "auto" or one of {", ".join(map(repr, ENGINES))}')
    if norms and engine not in ("auto", "stream"):
        raise ValueError(f"only the stream engine can measure the objective's norm; {engine!r} never has its gradient")
    several = isinstance(objective, Sequence)
    objectives = list(objective) if several else [objective]
    if not objectives:
        raise ValueError("the list of objectives is empty")
    used = [term for one in objectives for _, term in terms(one)]
    measurement = Measurement.of(
        model,
        forget,
        retain,
        used=used,
        groups=groups,
        risk=risk,
        direction_dtype=direction_dtype,
        direction_storage=direction_storage,
        directions=directions,
        objective_batches=objective_batches,
        loss_scale=loss_scale,
        progress=progress,
        reference=reference,
    )
    if engine in ("auto", "stream"):
        from gfast.geffect.stream import stream_effects

        effects = stream_effects(measurement, objectives, bool(norms))
    else:
        from gfast.geffect.engines import engine_effects

        effects = engine_effects(engine, measurement, objectives)
    return effects if several else effects[0]


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
) -> Directions:
    r"""The gradients of the risk on both sets, measured once for any number of effects of the same model.

        G(D) = grad R(D),    D = forget set and D = retain set

    Args:
        model, forget, retain, groups, risk, loss_scale, progress: as for `g_effect`.
        dtype: torch.float32, float64 or bfloat16: what they are stored in; sums over batches are made in fp32.
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
    measurement = Measurement.of(
        model,
        forget,
        retain,
        groups=groups,
        risk=risk,
        direction_dtype=dtype,
        direction_storage=storage,
        loss_scale=loss_scale,
        progress=progress,
    )
    return measurement.measure_directions()
