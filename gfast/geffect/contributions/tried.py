# SPDX-License-Identifier: Apache-2.0
"""What a module computes, found by trying it: its class does not tell where the forward is somebody's own."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from gfast import module_kinds


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


@contextmanager
def _with_weight(module: nn.Module, fill: float | Tensor, dtype: torch.dtype) -> Iterator[None]:
    """The module with another weight and a bias of zero, in `dtype`."""
    parameters = dict(module._parameters)
    try:
        for attribute, parameter in parameters.items():
            if parameter is not None:
                value = torch.zeros_like(parameter, dtype=dtype, requires_grad=False)
                module._parameters[attribute] = value + fill if attribute == "weight" else value
        yield
    finally:
        module._parameters.update(parameters)


def normalized(module: nn.Module, x: Tensor, unit: float) -> Tensor:
    """A norm's x_hat, by the module's own code: what it returns with the weight `unit`, at which it passes x_hat on."""
    x = _wide(x)
    with _with_weight(module, unit, x.dtype):
        out = module.forward(x)
    return out.clone() if out.data_ptr() == x.data_ptr() else _wide(out)


def computes(module: nn.Module, kind: str) -> bool:
    """Does a module whose forward was replaced (as offloading does) still compute what its kind says? Tried once."""
    weight, bias = module.weight, module._parameters.get("bias")
    try:
        with torch.no_grad():
            if kind == "embedding":
                x = torch.ones(1, 2, dtype=torch.int64, device=weight.device)  # ids, or a mask of positions
                ids, scale = module_kinds.embedding_lookup(module, (x,), {})
                expected = weight[ids] * scale
            else:
                matrix = weight if kind == "linear" else weight.t()
                drawn = dict(generator=torch.Generator("cpu").manual_seed(0), dtype=torch.float32, device="cpu")
                x = torch.randn(2, matrix.shape[1], **drawn).to(weight.device, weight.dtype)
                expected = nn.functional.linear(x, matrix, bias)
            out = module.forward(x)
            return bool((out - expected).norm() <= 0.01 * expected.norm())  # twice the rounding of 16 bits
    except (RuntimeError, TypeError, IndexError):
        return False


def norm_unit(module: nn.Module) -> float | None:
    """The weight with which a norm returns x_hat: 1, or 0 where it multiplies by 1 + w; None for something else.

    Tried on two rows: the output must be x_hat * (w + 1 - unit) element by element.
    """
    weight = module._parameters.get("weight")
    if weight is None:
        return None
    drawn = dict(generator=torch.Generator("cpu").manual_seed(0), dtype=torch.float32, device="cpu")
    x = torch.randn(1, 2, *weight.shape, **drawn).to(weight.device)  # as a model's: some unpack their shape
    other = torch.randn(weight.shape, **drawn).to(weight.device)

    def output(fill: float | Tensor) -> Tensor:
        with _with_weight(module, fill, x.dtype):
            return module.forward(x.clone())

    try:
        with torch.no_grad():
            for unit in (1.0, 0.0):
                x_hat = output(unit)
                if not torch.isfinite(x_hat).all() or not x_hat.any():
                    continue
                expected = x_hat * (other + 1.0 - unit)
                if torch.allclose(output(other), expected, rtol=1e-4, atol=1e-5 * math.sqrt(weight.numel())):
                    return unit
    except Exception:
        return None  # not a function of one tensor of the weight's width: somebody's code, which may raise anything
    return None
