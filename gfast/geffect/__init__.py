"""Gradient effects: what a step on an unlearning objective does to the risk of forget and retain data, by layer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, overload

import torch
from torch import nn

from gfast.geffect.data import Data, risk_terms, terms
from gfast.geffect.groups import GroupMap, assign
from gfast.geffect.results import GEffect
from gfast.objectives import NLL, Objective

ENGINES = ("stream",)
Batches = Mapping[str, Any] | Iterable[Mapping[str, Any]]

__all__ = ["ENGINES", "GEffect", "GroupMap", "assign", "g_effect"]


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
    norms: bool | None = None,
    objective_batches: Batches | None = None,
    progress: bool = False,
) -> GEffect | list[GEffect]:
    r"""The G-effect of unlearning objectives on the risk of forget and retain data, by layer group.

        e(D) = < grad R(D), grad L(D_u) >,    D = D_u (unlearn) and D = D_r (retain)

    summed over the parameters of each group. A descent step on L changes R(D) by -lr * e(D) to first order: wanted are
    a clearly negative e on forget data and one that is not negative on retain data. R and L are means over the whole
    data set (one global count of tokens or sequences), so the result does not depend on how it is cut into batches.

    The risk's gradient on each set is stored (one gradient's size a set); the objective's gradient is dotted with both
    as it appears, parameter by parameter, and freed. One objective on single batches stores one gradient in all.
    Passes over the data: 2 for the directions, and one for each distinct term of the objectives that is not a multiple
    of a direction (GA on forget and NLL on retain data are). The model is measured in evaluation mode and left as
    found, also after an error: gradients, hooks, training flags.

    Args:
        model: a Hugging Face causal language model, on any device, possibly wrapped by PEFT, DDP or torch.compile.
            Frozen parameters are left out. Under DDP each process measures the batches that it is given.
        objective: an objective, or several: they share the directions. `Mix` gives combinations with a retain term.
        forget, retain: one batch, or a list, DataLoader or generator of them (materialised as a list): dicts with
            input_ids, labels [B, T] int64 (-100 ignored, unshifted), attention_mask, and what the objective needs,
            such as ref_logp [B, T].
        groups: "paper", "layer" or a function from parameter name to group; see `assign`.
        risk: R, an objective evaluated on both sets.
        engine: "auto" or "stream".
        direction_dtype: storage of the directions. Sums over batches are made in fp32 whatever it is. bfloat16 halves
            the memory and costs accuracy where the cosine is small.
        norms: the norm of the objective's gradient (for `GEffect.cosine`) comes free with a single batch and for
            multiples of the directions. True gives it always, at the price of holding one more gradient.
        objective_batches: data of objectives whose batches are not the forget set: pairs for DPO, refusals for PO.
        progress: show a bar (needs tqdm).

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
    if direction_dtype not in (torch.float64, torch.float32, torch.bfloat16):
        raise ValueError(f"direction_dtype must be torch.float64, float32 or bfloat16, not {direction_dtype}")
    from gfast.geffect.stream import stream_effects

    several = isinstance(objective, Sequence)
    objectives = list(objective) if several else [objective]
    if not objectives:
        raise ValueError("the list of objectives is empty")
    used = [term for one in objectives for _, term in terms(one)]
    adapters = hasattr(model, "disable_adapter")
    data = Data(forget, retain, objective_batches, [*used, *risk_terms(risk)], adapters)
    group_map = assign(model, groups)
    effects = stream_effects(model, objectives, data, group_map, risk, direction_dtype, bool(norms), progress)
    return effects if several else effects[0]
