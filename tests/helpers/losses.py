"""Small problems for the loss ops, objectives to try, and the law that relative errors are asked to keep."""

import pytest
import torch

from gfast.objectives import DPO, GA, NLL, NPO, TNPO, WGA, WTNPO, SatImp, SimNPO
from gfast.ops.dispatch import why_not

DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
ALL = [GA(), WGA(0.5), SatImp(2.0, 1.0), TNPO(0.7), WTNPO(0.5, 1.0), NLL(), NPO(0.3), SimNPO(1.5, 0.2), DPO(0.3)]
IMPLS = ["reference", "cpp", "triton"]
DRAWS = 6  # see assert_law_of_draws: enough for the mean of some 20 tokens


def squared(logp, ref_logp, sequence_id):
    return torch.exp(2 * logp)


def label(objective) -> str:
    """A test's id, the same in every process: `str` of a function holds its address, and pytest-xdist then gives up."""
    return getattr(objective, "__name__", None) or str(objective)


def need(op, impl, device, dtype=None):
    reason = why_not(op, impl, device, dtype)
    if reason:
        pytest.skip(reason)


def problem(seed=0, B=4, T=7, D=8, V=37, dtype=torch.float64, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(B, T, D, generator=generator, dtype=torch.float64)
    weight = torch.randn(V, D, generator=generator, dtype=torch.float64)
    bias = torch.randn(V, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, V, (B, T), generator=generator)
    labels[0, :3] = -100
    labels[-1, 2:] = -100
    ref = torch.randn(B, T, generator=generator, dtype=torch.float64) - 4
    return [x.to(device, dtype) for x in (hidden, weight, bias)] + [labels.to(device), ref.to(device)]


def run(fn, inputs, **kwargs):
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    out = fn(*inputs, **kwargs)
    loss = out.loss if isinstance(out, tuple) else out
    loss.sum().backward()
    return [loss.detach()] + [x.grad for x in inputs]


def assert_law(ours, torchs, truth, dtype, what=""):
    """gfast's error (2-norm) is at most twice plain PyTorch's in the same dtype, plus one rounding."""
    assert_law_of_draws([(ours, torchs, truth)], dtype, what)


def assert_law_of_draws(draws, dtype, what=""):
    """The law for relative errors' root mean square over (ours, torchs, truth) of several draws of one problem.

    The error of one number is chance, PyTorch's too: it may be 0. So is that of a gradient whose few rows share one
    weight. Over draws both are what they are as a rule, whatever order a machine's library sums in."""
    for index, outputs in enumerate(zip(*(zip(*draw, strict=True) for draw in draws), strict=True)):
        errors = []  # [draws, 3]: gfast's, PyTorch's and one rounding, each by the size of the truth
        for a, b, exact in outputs:
            exact = exact.double()
            size = exact.norm() or 1.0
            rounding = torch.finfo(dtype).eps * exact.norm()
            errors.append(
                [float(e / size) for e in ((a.double() - exact).norm(), (b.double() - exact).norm(), rounding)]
            )
        error, theirs, rounding = torch.tensor(errors, dtype=torch.float64).square().mean(0).sqrt().tolist()
        assert error <= 2 * theirs + rounding, f"{what} output {index}: error {error:.3e}, PyTorch's {theirs:.3e}"
