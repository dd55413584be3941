# SPDX-License-Identifier: Apache-2.0
"""Whether adapters are zero, so that a model with them is what it is without: looked at with a batch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from gfast import peft_models
from gfast.model_output import model_logp
from gfast.model_state import evaluating
from gfast.ops.checks import IGNORE_INDEX

_ROWS = 16384  # of an embedding at a time


def asked_of(model: nn.Module, batch: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """The adapters that a batch is computed with: those that are active, or one after the other those of its rows."""
    rows = batch.get("adapter_names")
    if rows is None:
        return [peft_models.active_adapters(model)]
    return [(name,) for name in sorted(set(rows) - {"__base__"})]


def difference(model: nn.Module, batch: Mapping[str, Any], names: Sequence[str]) -> tuple[str | None, bool]:
    """By what the model with the adapters of those names differs from the one with them off, in words; None where that
    is nothing, or rounding. And whether all that they can change has been looked at.

    A batch shows what adapters do to its own tokens: rows of embeddings are looked at one by one, adapters that
    begin behind a phrase with texts that begin with it.
    """
    looked_at, whole = _with_phrase(model, _with_labels(batch), names)
    valid = looked_at["labels"][:, 1:] != IGNORE_INDEX
    if not bool(valid.any()):
        return None, False  # nothing is asked of the original, nor seen of the adapters
    rounds = peft_models.round_at_zero(model)
    narrowest = min((p.dtype.itemsize for p in model.parameters() if p.is_floating_point()), default=4)
    rounding = 2e-2 if narrowest < 4 else 1e-4 if narrowest == 4 else 1e-7
    active = tuple(names) == peft_models.active_adapters(model)
    with (
        torch.no_grad(),
        evaluating(model),
        nullcontext() if active else peft_models.other_adapter(model, names[0]),
        _embeddings_watched(model, rounding if rounds else 0.0) as found,
    ):
        adapted = model_logp(model, looked_at)
        with peft_models.adapters_off(model):
            base = model_logp(model, looked_at)
            again = base if rounds or torch.equal(adapted, base) else model_logp(model, looked_at)
    apart = float((adapted - base).abs().sum() / valid.sum())
    # Adapters that are zero add nothing: only where they divide by a norm, or the model never answers the same to the
    # bit, is a small difference no sign of what they have learned.
    if not (apart <= rounding if rounds or not torch.equal(base, again) else apart == 0):
        return f"its log-probs differ by {apart:.3g} a token from", whole
    if not all(found.values()):
        return "its embeddings of some tokens differ from", whole
    return None, whole and None not in found.values() and not peft_models.any_off(model)


def _with_labels(batch: Mapping[str, Any]) -> dict[str, Any]:
    """A batch to look at adapters with: all of its tokens where it has no labels (other processes look too)."""
    ids, mask = batch.get("input_ids"), batch.get("attention_mask")
    batch = {key: value for key, value in batch.items() if key != "adapter_names"}
    if ids is None or bool((batch["labels"][:, 1:] != IGNORE_INDEX).any()):
        return batch
    padding = torch.zeros_like(ids, dtype=torch.bool) if mask is None or mask.shape != ids.shape else mask == 0
    return {**batch, "labels": ids.masked_fill(padding, IGNORE_INDEX)}


def _with_phrase(model: nn.Module, batch: dict[str, Any], names: Sequence[str]) -> tuple[dict[str, Any], bool]:
    """The batch with texts that begin with the phrase behind which adapters begin; whether every such one is in it."""
    phrases, ids = peft_models.invocations(model, names), batch.get("input_ids")
    if not phrases:
        return batch, True
    if len(phrases) > 1 or ids is None or ids.shape[1] <= len(phrases[0]):
        return batch, False
    phrase = phrases[0]
    begun = ids.masked_fill(ids == phrase[-1], 0 if phrase[-1] else 1)  # the last one in a text counts
    begun[:, : len(phrase)] = torch.tensor(phrase, dtype=ids.dtype, device=ids.device)
    return {**batch, "input_ids": begun}, True


@contextmanager
def _embeddings_watched(model: nn.Module, rounding: float) -> Iterator[dict[nn.Module, bool | None]]:
    """Of every embedding that adapters change, whether all of its rows are as they are without them; None while it has
    not been called: within its call its weights are here, whoever shards them.
    """
    found: dict[nn.Module, bool | None] = dict.fromkeys(peft_models.adapted_embeddings(model))
    running: list[nn.Module] = []

    def look(module: nn.Module, _: Any, out: Tensor) -> None:
        if running or found[module] is not None or peft_models.is_off(module):
            return
        running.append(module)
        try:
            rows = torch.arange(peft_models.embedding_rows(module), device=out.device)
            found[module] = all(_alike(model, module, some[None], rounding) for some in rows.split(_ROWS))
        finally:
            running.clear()

    with ExitStack() as hooks:
        for module in found:
            hooks.enter_context(module.register_forward_hook(look))
        yield found


def _alike(model: nn.Module, module: nn.Module, ids: Tensor, rounding: float) -> bool:
    adapted = module.forward(ids)
    with peft_models.adapters_off(model):
        base = module.forward(ids)
    return torch.allclose(adapted, base, rtol=0.0, atol=rounding * float(base.abs().amax()), equal_nan=True)
