"""The losses inside a graph that Inductor compiles to C++: what users of `torch.compile` run. The other tests of
tracing compile nothing."""

import functools
import os
import shutil
import sysconfig
from pathlib import Path

import pytest
import torch
from helpers.losses import assert_law_of_draws, problem, run

import gfast
from gfast.objectives import TNPO, WGA
from gfast.ops.linear_unlearn_loss import linear_unlearn_loss_reference
from gfast.ops.unlearn_loss import unlearn_loss_reference


def need_a_compiler():
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        pytest.skip("Inductor needs a C++ compiler: $CXX, else g++")
    if not Path(sysconfig.get_path("include"), "Python.h").is_file():
        pytest.skip("Inductor needs Python's C headers")


def step(unlearn, linear_unlearn, labels, ref, logits, hidden, weight, bias):
    """Both losses [2], each from leaves of its own and between operations that Inductor writes kernels for."""
    direct = unlearn(1.5 * torch.tanh(logits), labels, WGA(0.5), ref_logp=ref)
    linear = linear_unlearn(torch.tanh(hidden), 1.5 * weight, labels, TNPO(0.7), ref_logp=ref, bias=bias)
    return torch.stack([2 * direct.loss, 3 * linear.loss])


@pytest.mark.slow
def test_both_losses_by_the_law():
    need_a_compiler()
    from torch._inductor import config, metrics

    torch._dynamo.reset()
    metrics.reset()
    ours = torch.compile(functools.partial(step, gfast.unlearn_loss, gfast.linear_unlearn_loss), fullgraph=True)
    literal, draws = functools.partial(step, unlearn_loss_reference, linear_unlearn_loss_reference), []
    # A cached graph would stand for an earlier trace of gfast's ops. Compiled C++ may come from the cache: its key is
    # the source.
    with config.patch(fx_graph_cache=False):
        # other values: none may have become part of the graph; another length: a graph with symbols for sizes
        for seed, length in ((0, 11), (1, 11), (2, 14)):
            hidden, weight, bias, labels, ref = problem(seed, T=length, D=16, V=101)
            logits = 3 * torch.randn(4, length, 101, generator=torch.Generator().manual_seed(seed)).double()
            wide = logits, hidden, weight, bias
            narrow = [x.float() for x in wide]
            plain, truth = (run(functools.partial(literal, labels, ref), leaves) for leaves in (narrow, wide))
            found = run(functools.partial(ours, labels, ref.float()), narrow)
            draws.append((found, plain, truth))
    assert_law_of_draws(draws, torch.float32)
    assert metrics.generated_kernel_count > 0
