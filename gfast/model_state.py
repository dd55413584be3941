# SPDX-License-Identifier: Apache-2.0
"""Looking at a model in the middle of training without changing what training does next."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator

import torch
from torch import nn


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put `model` in eval mode and put every submodule's own mode back afterwards (`model.train()` would set them
    all).
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
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
    kept = [(parameter, parameter.grad) for parameter in model.parameters()]
    for parameter, _ in kept:
        parameter.grad = None
    try:
        yield
    finally:
        for parameter, gradient in kept:
            parameter.grad = gradient
