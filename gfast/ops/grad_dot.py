"""Dot products of lists of tensors, by group: reference, launcher, registration, public functions.

The last step of every gradient effect: <grad R, grad L> summed over the parameters of each group, in one launch over
hundreds of tensors, each read once.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import torch
from torch import Tensor

from gfast.ops.dispatch import select

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def grad_dots_reference(
    xs: Sequence[Tensor], directions: Sequence[Sequence[Tensor]], groups: Sequence[int], num_groups: int
) -> Tensor:
    """The definition, in fp64 throughout: column d is sum x*y_d, the last column sum x*x. [num_groups, num_dirs + 1]"""
    device = xs[0].device if len(xs) else torch.device("cpu")
    out = torch.zeros(num_groups, len(directions) + 1, dtype=torch.float64, device=device)
    for t, group in enumerate(groups):
        x = xs[t].detach().double()
        for d, direction in enumerate(directions):
            out[group, d] += (x * direction[t].detach().double()).sum()
        out[group, -1] += (x * x).sum()
    return out


def _check(xs: list[Tensor], directions: Sequence[Sequence[Tensor]], groups: list[int], num_groups: int) -> None:
    """What the compiled op checks for itself, in a hundredth of the time."""
    if len(groups) != len(xs):
        raise ValueError(f"gfast: grad_dot: got {len(groups)} group indices for {len(xs)} tensors.")
    if num_groups < 0:
        raise ValueError(f"gfast: grad_dot: num_groups must not be negative, got {num_groups}.")
    for t, x in enumerate(xs):
        if not 0 <= groups[t] < num_groups:
            raise ValueError(f"gfast: grad_dot: groups[{t}] = {groups[t]} is outside [0, {num_groups}).")
        named = [(f"xs[{t}]", x), *((f"direction {d}'s tensor {t}", ys[t]) for d, ys in enumerate(directions))]
        for what, y in named:
            if y.layout != torch.strided:
                problem = f"is not a strided tensor ({y.layout}); make it dense first"
            elif y.dtype not in DTYPES:
                problem = f"has dtype {y.dtype}; take one of {', '.join(map(str, DTYPES))}"
            elif y.shape != x.shape:
                problem = f"has shape {tuple(y.shape)} but xs[{t}] has {tuple(x.shape)}"
            elif y.device != xs[0].device:
                problem = f"is on {y.device} but xs[0] is on {xs[0].device}"
            else:
                continue
            raise ValueError(f"gfast: grad_dot: {what} {problem}.")


def _choose(impl: str, device: str) -> str:
    """The backend, decided while torch.compile traces."""
    return select("grad_dot", impl, device)


_choose._dynamo_marked_constant = True  # torch.compiler.assume_constant_result without its import of the compiler


def grad_dots(
    xs: Sequence[Tensor],
    directions: Sequence[Sequence[Tensor]],
    groups: Sequence[int],
    num_groups: int,
    *,
    impl: str = "auto",
) -> Tensor:
    """``grad_dot`` of ``xs`` with several lists of tensors at once, each shaped like ``xs``; x is read once.

    Returns:
        float64 [num_groups, num_dirs + 1] on the tensors' device: the dots, then sum x*x. Not differentiable.
    """
    xs, groups = list(xs), list(map(int, groups))
    for d, direction in enumerate(directions):
        if len(direction) != len(xs):
            raise ValueError(f"gfast: grad_dot: direction {d} has {len(direction)} tensors but xs has {len(xs)}.")
    chosen = _choose(impl, xs[0].device.type if xs else "cpu")
    with torch.no_grad():
        if chosen == "reference" or not xs:  # the dispatcher finds no device in an empty list
            _check(xs, directions, groups, num_groups)
            return grad_dots_reference(xs, directions, groups, num_groups)
        ys = list(chain.from_iterable(directions))
        return torch.ops.gfast.grad_dots(xs, ys, groups, num_groups, len(directions))


def dots_of_each(xs: Sequence[Tensor], directions: Sequence[Sequence[Tensor]]) -> Tensor:
    """``grad_dots`` of every tensor by itself, [len(xs), num_dirs + 1] on the first one's device. Those of a model that
    lies on several devices are dotted where they are."""
    devices = dict.fromkeys(x.device for x in xs)
    if len(devices) < 2:
        return grad_dots(xs, directions, range(len(xs)), len(xs))
    out = torch.empty(len(xs), len(directions) + 1, dtype=torch.float64, device=xs[0].device)
    for device in devices:
        there = [i for i, x in enumerate(xs) if x.device == device]
        lists = [[tensors[i] for i in there] for tensors in (xs, *directions)]
        out[there] = grad_dots(lists[0], lists[1:], range(len(there)), len(there)).to(out.device)
    return out


def grad_dot(
    xs: Sequence[Tensor], ys: Sequence[Tensor], groups: Sequence[int], num_groups: int, *, impl: str = "auto"
) -> Tensor:
    """Dot product of two lists of tensors, by group.

        out[g] = sum over t with groups[t] = g of <xs[t], ys[t]>

    With gradients as lists this is the G-effect by layer group. Products are fp32
    (fp64 where an operand is fp64), sums are fp64 in an order that depends on the shapes alone, so the result is the
    same bit for bit in every run and for every number of threads.

    Args:
        xs: T tensors of any shapes, float32, bfloat16, float16 or float64 (mixed), on one device.
        ys: T tensors of the same shapes; dtypes may differ from those of ``xs``.
        groups: T group indices in [0, num_groups).
        num_groups: length of the result; a group without tensors is 0.
        impl: "auto", "reference", "cpp" (CPU) or "cuda"; an explicit choice that is unavailable raises.

    Returns:
        float64 [num_groups] on the tensors' device. Not differentiable.

    Raises:
        ValueError: lengths, shapes, dtypes or devices that do not fit, or a group index out of range.

    Source: arXiv 2502.19301, Definition 1.

    Example:
        >>> import torch, gfast
        >>> xs = [torch.ones(2, 3), torch.ones(4)]
        >>> gfast.grad_dot(xs, [torch.full((2, 3), 2.0), torch.ones(4)], groups=[0, 1], num_groups=2)
        tensor([12.,  4.], dtype=torch.float64)
    """
    return grad_dots(xs, [ys], groups, num_groups, impl=impl)[:, 0]
