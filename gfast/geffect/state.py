"""A model lent to a measurement and given back exactly as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def measuring(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, no gradients and no foreign gradient hooks inside; everything restored outside, errors included.

    Training flags are set per module without calling train() or eval(), which some modules override with side effects.
    Hooks on accumulated gradients are taken off for the time, because optimizers that step in such a hook would change
    the model. Modules that checkpoint activations keep doing so: they only do it in training mode, and losing it could
    run out of memory; those with dropout of their own are put in evaluation mode all the same.
    """
    modules = [(module, module.training) for module in model.modules()]
    grads = [(parameter, parameter.grad) for parameter in model.parameters()]
    hooks = [(found, dict(found)) for p, _ in grads if (found := getattr(p, "_post_accumulate_grad_hooks", None))]
    try:
        for module, training in modules:
            module.training = training and _checkpoints_without_dropout(module)
        for parameter, _ in grads:
            parameter.grad = None
        for found, _ in hooks:
            found.clear()
        with torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        for found, kept in hooks:
            found.clear()
            found.update(kept)
        for parameter, grad in grads:
            parameter.grad = grad
        for module, training in modules:
            module.training = training


@contextmanager
def uncompiled() -> Iterator[None]:
    """Compiled modules run as the plain code that they were compiled from: hooks and modes see nothing else."""
    if hasattr(torch.compiler, "set_stance"):
        with torch.compiler.set_stance("force_eager"):
            yield
    else:
        yield


def _checkpoints_without_dropout(module: nn.Module) -> bool:
    if not getattr(module, "gradient_checkpointing", False):
        return False
    return not any("drop" in key and isinstance(value, float) and value > 0 for key, value in vars(module).items())
