"""Token weights from retain conflict: a forget token counts the less, the more its removal harms the retain set."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import RandomSampler

from gfast import packed
from gfast.geffect.data import as_batches
from gfast.ops.checks import IGNORE_INDEX


def conflict_weights(effects: Sequence[Tensor], tau: float = 1.0) -> list[Tensor]:
    r"""Weights from the retain effects of label tokens, one tensor a sample.

    .. math:: v_i = \exp\bigl(-\max(0, -e_i) / (\tau s)\bigr),\quad e_i = \langle \nabla R(D_r), \nabla \log p_i
        \rangle,\quad s = \sqrt{\tfrac1N \sum_i e_i^2}

    A step that lowers log p of token i changes the retain risk by -lr e_i: where e_i >= 0 it does no harm and v is 1;
    where e_i < 0 it raises the risk, and v falls with it, in units of the root mean square s over all N tokens. Weights
    are not renormalised.

    Args:
        effects: real numbers, a tensor a sample: ``gfast.token_effect(...).total("retain")``.
        tau: > 0, temperature; large values give weights of 1, small ones a hard mask of the tokens without conflict.

    Returns:
        fp64 tensors like `effects`, in (0, 1] (or 0 where exp underflows).

    Raises:
        ValueError: a tau that is not positive, effects that are not finite.

    Source: gfast's own formula; retain conflict as the criterion is arXiv 2606.06320's (ATWU), which learns a scorer.

    Example:
        >>> [v.tolist() for v in conflict_weights([torch.tensor([2.0, 0.0]), torch.tensor([-2.0, 0.0])], tau=1.0)]
        [[1.0, 1.0], [0.2431167344342142, 1.0]]
    """
    if not 0 < tau < math.inf:
        raise ValueError(f"gfast: retain_conflict: tau must be positive and finite, not {tau}")
    flat = (
        torch.cat([values.reshape(-1).double() for values in effects]) if len(effects) else torch.zeros(0, device="cpu")
    )
    if not bool(torch.isfinite(flat).all()):
        raise ValueError("gfast: retain_conflict: a token's effect is not finite")
    scale = float(flat.square().mean().sqrt()) if len(flat) else 0.0
    if scale == 0.0:
        return [torch.ones_like(values, dtype=torch.float64) for values in effects]
    return [torch.exp(values.double().clamp(max=0.0) / (tau * scale)) for values in effects]


def retain_conflict(model: nn.Module, *, forget: Any, retain: Any, tau: float = 1.0, **options: Any) -> list[Tensor]:
    r"""Weights of the forget tokens from their conflict with the retain set, as a batch's ``weight``: for any loop.

    Measured by `gfast.token_effect` with all parameters as one group, and turned into weights by `conflict_weights`:
    two passes with gradients for the directions and about five forwards over the forget set. Weights are constants of
    the model as it is: measure them again every so many steps (`gfast unlearn --weights retain_conflict`).

    Args:
        model, forget, retain: as for `gfast.token_effect`; a `weight` in the batches plays no part.
        tau: as for `conflict_weights`.
        options: further arguments of `gfast.token_effect`.

    Returns:
        fp32 [B, T] on the CPU, one for each forget batch: aligned with its labels, 1 where nothing is scored.

    Raises:
        ValueError: as `gfast.token_effect` and `conflict_weights`; a DataLoader of the forget set that shuffles, whose
            batches nobody could draw again to join their weights.

    Source: as `conflict_weights`.

    Example:
        >>> import gfast
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=2,
        ...                      num_attention_heads=2)
        >>> model, ids = LlamaForCausalLM(config), torch.arange(12).view(2, 6)
        >>> batch = {"input_ids": ids, "labels": ids}
        >>> (weight,) = retain_conflict(model, forget=batch, retain=batch)
        >>> loss = gfast.model_loss(model, batch, gfast.objectives.WGA(), weight=weight).loss
    """
    from gfast.geffect.api import token_effect

    if isinstance(getattr(forget, "sampler", None), RandomSampler):
        raise ValueError(
            "gfast: retain_conflict: the forget DataLoader shuffles, and the weights are those of its batches in the "
            "order in which it gave them this once: draw them first, forget=list(loader), and train on these, or give "
            "a loader with shuffle=False"
        )
    forget, retain = (
        [{**batch, "weight": None} for batch in as_batches(side, name)]
        for side, name in ((forget, "forget"), (retain, "retain"))
    )
    effect = token_effect(model, forget=forget, retain=retain, groups=lambda name: "all", **options)
    values = torch.cat(conflict_weights(effect.total("retain"), tau)).float()  # sample by sample
    weights, start = [], 0
    for batch in forget:
        valid = batch["labels"].cpu() != IGNORE_INDEX
        valid[:, 0] = False  # nothing scores the first
        stop = start + int(valid.sum())
        of_batch, texts = values[start:stop], packed.texts(batch)
        if texts is not None:  # in the order of the label tokens
            of_batch = torch.empty_like(of_batch).index_copy_(0, packed.by_text(texts.cpu()[valid])[0], of_batch)
        weights.append(torch.ones_like(valid, dtype=torch.float32).masked_scatter(valid, of_batch))
        start = stop
    return weights
