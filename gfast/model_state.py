# SPDX-License-Identifier: Apache-2.0
"""A model lent to a look or a measurement in the middle of training, and given back exactly as it was."""

from __future__ import annotations

import contextlib
import functools
import inspect
import logging
import random
import sys
from collections.abc import Iterator
from typing import Any

import torch
import torch.utils.checkpoint
from torch import nn

from gfast.rotary import unstretched


@contextlib.contextmanager
def _not_packing(model: nn.Module) -> Iterator[None]:
    """On some CPUs bitsandbytes packs 4-bit weights for good, at a forward in eval mode whose input wants no gradient,
    and has no backward through them any more: not inside.
    """
    flag = "support_avx512bf16_for_cpu"
    packing = [module for module in model.modules() if getattr(module, flag, False)]
    try:
        for module in packing:
            setattr(module, flag, False)
        yield
    finally:
        for module in packing:
            setattr(module, flag, True)


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put `model` in eval mode and put every submodule's own mode back afterwards (`model.train()` would set them
    all).
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with _not_packing(model):
            yield
    finally:
        for module, training in modes:
            module.training = training


@contextlib.contextmanager
def rng_kept() -> Iterator[None]:
    """Put the random states of Python, NumPy, torch and every CUDA device in use back afterwards."""
    import numpy

    python_state, numpy_state, torch_state = random.getstate(), numpy.random.get_state(), torch.get_rng_state()
    # Reading the CUDA state would start CUDA; where it has not been started there is nothing to keep.
    cuda_states = torch.cuda.get_rng_state_all() if torch.cuda.is_available() and torch.cuda.is_initialized() else []
    try:
        yield
    finally:
        random.setstate(python_state)
        numpy.random.set_state(numpy_state)
        torch.set_rng_state(torch_state)
        if cuda_states:
            torch.cuda.set_rng_state_all(cuda_states)


@contextlib.contextmanager
def gradients_kept(model: nn.Module) -> Iterator[None]:
    """Take the gradients away and put the same tensors back afterwards, so that work in between neither sees nor
    changes them.
    """
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    for parameter, _ in gradients:
        parameter.grad = None
    try:
        yield
    finally:
        for parameter, gradient in gradients:
            parameter.grad = gradient


@contextlib.contextmanager
def measuring(model: nn.Module, checkpoints: bool = True) -> Iterator[None]:
    """Evaluation mode, no gradients and no foreign gradient hooks inside; everything restored outside, errors included.

    Training flags are set per module without calling train() or eval(), which some modules override with side effects.
    Hooks on accumulated gradients are taken off for the time, because optimizers that step in such a hook would change
    the model. Modules that checkpoint activations keep doing so: they only do it in training mode, and losing it could
    run out of memory; those with dropout of their own are put in evaluation mode all the same, and with `checkpoints`
    False all, where the inputs of modules are kept in any case. What is checkpointed re-entrantly is not so inside.
    """
    modules = [(module, module.training) for module in model.modules()]
    tables = [table for p in model.parameters() if (table := getattr(p, "_post_accumulate_grad_hooks", None))]
    hooks = [dict(table) for table in tables]
    if any(_foreign(hook) for table in hooks for hook in table.values()):
        _log_hooks(type(model).__name__)
    try:
        for module, training in modules:
            module.training = training and checkpoints and _checkpoints_without_dropout(module)
        for table in tables:
            table.clear()
        with (
            _not_packing(model),
            _not_reentrant(model),
            gradients_kept(model),
            unstretched(model),
            torch.inference_mode(False),
            torch.enable_grad(),
        ):
            yield
    finally:
        for table, before in zip(tables, hooks, strict=True):
            table.clear()
            table.update(before)
        for module, training in modules:
            module.training = training


def _foreign(hook: Any) -> bool:
    return not (getattr(hook, "__module__", None) or "").startswith(("torch.", "gfast."))


@functools.cache
def _log_hooks(model: str) -> None:
    logging.getLogger("gfast").warning(
        "gfast: %s has hooks on accumulated gradients (an optimizer that steps in the backward, a mask), which are off "
        "while effects are measured: those are of the losses' own gradients. A mask by register_hook counts",
        model,
    )


@contextlib.contextmanager
def uncompiled() -> Iterator[None]:
    """Compiled modules run as the plain code that they were compiled from: hooks and modes see nothing else."""
    # nothing is compiled where torch's compiler was never imported, which takes seconds
    if "torch._dynamo" in sys.modules and hasattr(torch.compiler, "set_stance"):
        with torch.compiler.set_stance("force_eager"):
            yield
    else:
        yield


@contextlib.contextmanager
def _not_reentrant(model: nn.Module) -> Iterator[None]:
    """A re-entrant checkpoint gives the parameters in it no gradient where none of its inputs asks for one: below them
    all is frozen (embeddings under adapters), or a batch has inputs_embeds. The other kind is exact there too.
    """
    name, reentrant = "_gradient_checkpointing_func", []
    for module in model.modules():
        function = vars(module).get(name)
        if isinstance(function, functools.partial) and function.keywords.get("use_reentrant") is not False:
            reentrant.append((module, function))
    try:
        for module, function in reentrant:
            # its own, or one around it that takes the same option (transformers' offloading of activations)
            if function.func is torch.utils.checkpoint.checkpoint or "use_reentrant" in function.keywords:
                setattr(module, name, functools.partial(function, use_reentrant=False))
        yield
    finally:
        for module, function in reentrant:
            setattr(module, name, function)


def checkpoints_reentrantly(model: nn.Module) -> bool:
    """Whether a model of transformers runs its blocks in re-entrant checkpoints, as its settings say."""
    functions = (
        getattr(module, "_gradient_checkpointing_func", None)
        for module in model.modules()
        if getattr(module, "gradient_checkpointing", False)
    )
    return any(getattr(function, "keywords", {}).get("use_reentrant", False) for function in functions)


def _checkpoints_without_dropout(module: nn.Module) -> bool:
    """Of a module, whose children's dropout is off: does it checkpoint, and drop nothing by itself?

    What drops by a number of its own, or of the model's settings in a forward that asks whether it is training.
    """
    if not getattr(module, "gradient_checkpointing", False):
        return False
    places, code = [vars(module)], getattr(inspect.unwrap(type(module).forward), "__code__", None)
    if code is None or "training" in code.co_names:
        places.append(vars(getattr(module, "config", module)))
    rates = (value for place in places for key, value in place.items() if "drop" in key)
    return not any(isinstance(value, float) and value > 0 for value in rates)
