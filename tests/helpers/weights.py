"""Weights given to tokens, and the objectives' formulas with them."""

from __future__ import annotations

import torch

from gfast.objectives import DPO, GA, NLL, NPO, TNPO, WGA, WTNPO, SatImp
from helpers.losses import squared

sigmoid, softplus = torch.sigmoid, torch.nn.functional.softplus


def drawn(labels, seed=7):
    """Weights of both signs, some of them 0; what stands at ignored labels must not matter."""
    w = torch.randn(labels.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    w[:, 1::4] = 0
    return torch.where(labels == -100, torch.nan, w)


def literal(objective, logp, ref, labels, w, reduction):
    """Value, a function of logp whose gradient is the loss's, and the weights; a text is a row [B, T]."""
    valid = labels != -100
    w, logp, ref = (torch.where(valid, x.double(), 0.0) for x in (w, logp, ref))
    p, old, length = logp.detach().exp(), ref.exp(), valid.sum(1).clamp(min=1)
    value = None
    if isinstance(objective, WTNPO):
        own = p**objective.alpha * 2 * p**objective.beta / (p**objective.beta + old**objective.beta)
    elif isinstance(objective, TNPO):
        own = 2 * p**objective.beta / (p**objective.beta + old**objective.beta)
    elif isinstance(objective, WGA):
        own = p**objective.alpha
    elif isinstance(objective, SatImp):
        own = p**objective.beta1 * (1 - p) ** objective.beta2
    elif objective is squared:
        own = p**2
    elif isinstance(objective, (GA, NLL)):
        own = torch.full_like(p, 1.0 if isinstance(objective, GA) else -1.0)
    else:
        s, o, b = logp.detach().sum(1), ref.sum(1), objective.beta
        if isinstance(objective, DPO):
            half = len(labels) // 2
            x = b * ((s - o)[:half] - (s - o)[half:])
            own = torch.cat([2 * sigmoid(x), -2 * sigmoid(x)])[:, None].expand_as(p)
            sums, length = (y[:half] + y[half:] for y in (w.sum(1), valid.sum(1)))
            value = 2 / b * softplus(x) * sums / length
        elif isinstance(objective, NPO):
            x = b * (s - o)
            own, value = (2 * sigmoid(x))[:, None].expand_as(p), 2 / b * softplus(x) * w.sum(1) / length
        else:
            x = b * (s / length + objective.delta)
            own = (2 * sigmoid(x) / length)[:, None].expand_as(p)
            value = 2 / b * softplus(x) * w.sum(1) / length
    weight = torch.where(valid, own, 0.0) * w
    texts = valid.any(1)
    if isinstance(objective, DPO):
        texts = texts[: len(texts) // 2] | texts[len(texts) // 2 :]
    z = {"token_mean": valid.sum(), "sequence_mean": texts.sum(), "sum": 1}[reduction]
    value = (weight * logp.detach()).sum() if value is None else value.sum()
    return value / z, (weight * logp).sum() / z, weight


def logp_of(logits, labels):
    return torch.log_softmax(logits, -1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
