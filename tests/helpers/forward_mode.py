"""Functions along streams by gfast's forward mode, and against torch.func.jvp."""

from __future__ import annotations

import torch
from torch import nn
from torch.autograd import forward_ad

from gfast.geffect.engines.jvp import tangents_along


def parameter(*shape: int, seed: int = 0, positive: bool = False) -> nn.Parameter:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return nn.Parameter(values.abs() + 0.5 if positive else values)


def directions_for(parameters, streams):
    """Random directions: `streams` has the stream ids of each parameter."""
    generator = torch.Generator().manual_seed(9)
    return {
        p: {stream: torch.randn(p.shape, generator=generator, dtype=p.dtype) for stream in some}
        for p, some in zip(parameters, streams, strict=True)
    }


def run(function, parameters, along):
    """Outputs, each with its tangents by stream."""
    given = {p: [(s, lambda tangent=tangent: tangent) for s, tangent in some.items()] for p, some in along.items()}
    with tangents_along(given, nn.Module()):
        out = function(*parameters)
        out = out if isinstance(out, (tuple, list)) else (out,)
        pairs = [forward_ad.unpack_dual(item) for item in out]
        return [(value, {} if tangent is None else tangent.parts) for value, tangent in pairs]


def check(function, parameters, streams=None, rtol=1e-12):
    """Values and tangents of every output."""
    streams = streams or [(2 * i, 2 * i + 1) for i in range(len(parameters))]
    along = directions_for(parameters, streams)
    found = run(function, parameters, along)
    every = sorted(set().union(*map(set, streams)))
    values = tuple(p.detach().clone() for p in parameters)
    for stream in every:
        tangents = tuple(along[p].get(stream, torch.zeros_like(p)).detach() for p in parameters)

        def listed(*inputs):
            out = function(*inputs)
            return tuple(out) if isinstance(out, (tuple, list)) else (out,)

        expected, moved = torch.func.jvp(listed, values, tangents)
        for (item, own), value, tangent in zip(found, expected, moved, strict=True):
            assert torch.allclose(item, value, rtol=rtol, atol=0)
            actual = own.get(stream, torch.zeros_like(tangent))
            assert actual.shape == tangent.shape and actual.dtype == tangent.dtype
            assert (actual - tangent).abs().max() <= rtol * max(tangent.abs().max().item(), 1.0)
    return found
