"""Rows and a head to multiply them with, and a mode that sees what the bodies of gfast's own ops call."""

import contextlib

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from gfast.ops import linear_token_kl, linear_token_logp, linear_unlearn_loss

DRAWS = 16  # few sequences decide the error: see assert_law_of_draws
BODIES = {
    torch.ops.gfast.linear_token_logp.default: linear_token_logp._linear_token_logp,
    torch.ops.gfast.linear_token_logp_backward.default: linear_token_logp._linear_token_logp_backward,
    torch.ops.gfast.linear_unlearn.default: linear_unlearn_loss._linear_unlearn,
    torch.ops.gfast.linear_token_kl.default: linear_token_kl._linear_token_kl,
}


class Inside(TorchDispatchMode):
    """Runs the bodies of gfast's own ops under this mode's eyes, so that what they call is seen."""

    def __init__(self, watch=lambda func, out: None):
        super().__init__()
        self.watch = watch

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in BODIES:
            with self:
                return BODIES[func].registered._init_fn(*args, **(kwargs or {}))
        out = func(*args, **(kwargs or {}))
        self.watch(func, out)
        return out


def rows_problem(n, D, V, dtype, seed=0):
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, D, generator=g).to(dtype)
    weight = (torch.randn(V, D, generator=g) * 2 / D**0.5).to(dtype)
    bias = torch.randn(V, generator=g).to(dtype)
    labels = torch.randint(0, V, (n,), generator=g)
    return hidden, weight, bias, labels


@contextlib.contextmanager
def largest_tensors(*known):
    """dtype -> entries of the largest tensor of that dtype that an op returned, not counting those already known."""
    seen, known = {}, {x.data_ptr() for x in known}

    def watch(func, out):
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() not in known:
                seen[x.dtype] = max(seen.get(x.dtype, 0), x.untyped_storage().nbytes() // x.itemsize)

    with Inside(watch):
        yield seen
