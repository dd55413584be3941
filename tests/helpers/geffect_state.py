"""A model in use, and what must be the same of it before and after a measurement."""

from __future__ import annotations

import torch

from helpers.geffect_models import tiny


def used_model():
    """A model in the middle of something: gradients present, mixed training flags, a frozen part, a user's hook."""
    model = tiny("tied_llama")
    model.train()
    model.model.layers[1].eval()
    model.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
    for index, parameter in enumerate(p for p in model.parameters() if p.requires_grad):
        if index % 2:
            parameter.grad = torch.full_like(parameter, 3.0)
    return model


def snapshot(model) -> tuple:
    return (
        [
            (id(p), id(p.grad), p.requires_grad, p._version, bool(p._post_accumulate_grad_hooks))
            for p in model.parameters()
        ],
        [(module.training, len(module._forward_hooks), len(module._forward_pre_hooks)) for module in model.modules()],
        [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        [p.detach().clone() for p in model.parameters()],
    )


def assert_same(before: tuple, after: tuple) -> None:
    assert before[:2] == after[:2]
    for one, other in zip(before[2] + before[3], after[2] + after[3], strict=True):
        assert one is other or torch.equal(one, other)
