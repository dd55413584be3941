"""Micro benchmarks of every op at small shapes, where launches and Python weigh most.

pytest bench --benchmark-only                                  # all of them, a table a group
pytest bench --benchmark-only --benchmark-autosave             # keep them; later: --benchmark-compare
pytest bench --benchmark-disable                               # run each once, to see that it works

They run on the GPU where there is one. Each result is checked against plain PyTorch before it is timed.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import gfast
from gfast.objectives import DPO, GA, NLL, NPO, TNPO, WGA, SimNPO

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
B, T, D, V = 4, 16, 64, 1000
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
OBJECTIVES = pytest.mark.parametrize(
    "objective",
    [GA(), WGA(alpha=1.0), TNPO(beta=1.0), NPO(beta=0.1), SimNPO(), DPO(), NLL()],
    ids=lambda o: type(o).__name__,
)


def close(found: torch.Tensor, wanted: torch.Tensor, dtype: torch.dtype) -> None:
    torch.testing.assert_close(found.float(), wanted.float(), rtol=1e-4 if dtype == torch.float32 else 3e-2, atol=1e-4)


def waited(step):
    """The step, until the device has done it."""
    if DEVICE == "cpu":
        return step

    def wait():
        result = step()
        torch.cuda.synchronize()
        return result

    return wait


@pytest.fixture
def data():
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(B, T, D, generator=generator)
    weight = torch.randn(V, D, generator=generator) * (2 / D**0.5)
    labels = torch.randint(0, V, (B, T), generator=generator)
    labels[:, :5] = -100
    ref = torch.where(labels != -100, torch.randn(B, T, generator=generator) - 8, 0.0)
    return tuple(t.to(DEVICE) for t in (hidden, weight, labels, ref))


def plain_logp(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return -F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), reduction="none").view(labels.shape)


def backward(loss: torch.Tensor, *leaves: torch.Tensor):
    return loss.detach(), *torch.autograd.grad(loss, leaves)


@pytest.mark.benchmark(group="token_logp")
@DTYPES
def test_token_logp(benchmark, data, dtype):
    hidden, weight, labels, _ = data
    logits = (hidden @ weight.T).to(dtype)
    close(benchmark(waited(lambda: gfast.token_logp(logits, labels))), plain_logp(logits, labels), dtype)


@pytest.mark.benchmark(group="linear_token_logp")
@DTYPES
def test_linear_token_logp(benchmark, data, dtype):
    hidden, weight, labels, _ = (t.to(dtype) if t.is_floating_point() else t for t in data)
    found = benchmark(waited(lambda: gfast.linear_token_logp(hidden, weight, labels)))
    close(found, plain_logp(hidden @ weight.T, labels), dtype)


@pytest.mark.benchmark(group="unlearn_loss, forward and backward")
@DTYPES
@OBJECTIVES
def test_unlearn_loss(benchmark, data, dtype, objective):
    hidden, weight, labels, ref = data
    logits = (hidden @ weight.T).to(dtype).requires_grad_()
    ref = ref if "ref_logp" in objective.needs else None

    def step():
        return backward(gfast.unlearn_loss(logits, labels, objective, ref_logp=ref).loss, logits)

    wanted = gfast.unlearn_loss(logits.detach().double(), labels, objective, ref_logp=ref, impl="reference").loss
    close(benchmark(waited(step))[0], wanted, dtype)


@pytest.mark.benchmark(group="linear_unlearn_loss, forward and backward")
@DTYPES
@OBJECTIVES
def test_linear_unlearn_loss(benchmark, data, dtype, objective):
    hidden, weight, labels, ref = data
    hidden, weight = hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()
    ref = ref if "ref_logp" in objective.needs else None

    def step():
        loss = gfast.linear_unlearn_loss(hidden, weight, labels, objective, ref_logp=ref).loss
        return backward(loss, hidden, weight)

    logits = hidden.detach().double() @ weight.detach().double().T
    wanted = gfast.unlearn_loss(logits, labels, objective, ref_logp=ref, impl="reference").loss
    close(benchmark(waited(step))[0], wanted, dtype)


def plain_kl(logits: torch.Tensor, ref_logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    each = F.kl_div(
        logits.double().log_softmax(-1), ref_logits.double().log_softmax(-1), log_target=True, reduction="none"
    )
    return each.sum(-1)[labels != -100].mean()


@pytest.mark.benchmark(group="token_kl, forward and backward")
@DTYPES
def test_token_kl(benchmark, data, dtype):
    hidden, weight, labels, _ = data
    logits = (hidden @ weight.T).to(dtype).requires_grad_()
    ref_logits = (hidden @ weight.flip(1).T).to(dtype)
    found = benchmark(waited(lambda: backward(gfast.token_kl(logits, ref_logits, labels), logits)))
    close(found[0], plain_kl(logits.detach(), ref_logits, labels), dtype)


@pytest.mark.benchmark(group="linear_token_kl, forward and backward")
@DTYPES
def test_linear_token_kl(benchmark, data, dtype):
    hidden, weight, labels, _ = data
    ref_hidden, ref_weight = hidden.to(dtype), weight.flip(1).to(dtype).contiguous()
    hidden, weight = hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()

    def step():
        return backward(gfast.linear_token_kl(hidden, weight, ref_hidden, ref_weight, labels), hidden, weight)

    wanted = plain_kl(hidden.detach() @ weight.detach().T, ref_hidden @ ref_weight.T, labels)
    close(benchmark(waited(step))[0], wanted, dtype)


@pytest.mark.benchmark(group="grad_dot")
@DTYPES
@pytest.mark.parametrize("tensors", [1, 64, 512])
def test_grad_dot(benchmark, dtype, tensors):
    generator = torch.Generator().manual_seed(0)
    xs, ys = ([torch.randn(257, generator=generator).to(DEVICE, dtype) for _ in range(tensors)] for _ in range(2))
    groups = [index % 5 for index in range(tensors)]
    wanted = torch.zeros(5, dtype=torch.float64)
    for group, x, y in zip(groups, xs, ys, strict=True):
        wanted[group] += float(x.double() @ y.double())
    found = benchmark(waited(lambda: gfast.grad_dot(xs, ys, groups, 5)))
    torch.testing.assert_close(found.cpu(), wanted, rtol=1e-5, atol=1e-4)
