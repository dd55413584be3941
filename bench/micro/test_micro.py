"""Micro benchmarks of every public function at small shapes, where launches and Python weigh most.

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
from gfast.objectives import DPO, GA, NLL, NPO, TNPO, WGA, WTNPO, SatImp, SimNPO

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
B, T, D, V = 4, 16, 64, 1000
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
OBJECTIVES = pytest.mark.parametrize(
    "objective",
    [GA(), WGA(alpha=1.0), SatImp(), TNPO(beta=1.0), WTNPO(), NPO(beta=0.1), SimNPO(), DPO(), NLL()],
    ids=lambda o: type(o).__name__,
)


def close(value: torch.Tensor, wanted: torch.Tensor, dtype: torch.dtype) -> None:
    torch.testing.assert_close(value.float(), wanted.float(), rtol=1e-4 if dtype == torch.float32 else 3e-2, atol=1e-4)


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
    return -F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(labels.shape)


def backward(loss: torch.Tensor, *leaves: torch.Tensor):
    return loss.detach(), *torch.autograd.grad(loss, leaves)


def leaves_of(op: str, data, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """What the op is of: hidden states and weight, or logits; in the dtype, differentiable."""
    hidden, weight = (t.to(dtype) for t in data[:2])
    leaves = (hidden, weight) if op.startswith("linear") else (hidden @ weight.T,)
    return tuple(t.detach().requires_grad_() for t in leaves)


def wide_logits(leaves: tuple[torch.Tensor, ...]) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Copies of the leaves in fp64, and the logits from them."""
    wide = [t.detach().double().requires_grad_() for t in leaves]
    return wide, wide[0] if len(wide) == 1 else wide[0] @ wide[1].T


@DTYPES
@pytest.mark.parametrize("op", ["token_logp", "linear_token_logp"])
def test_logp(benchmark, data, dtype, op):
    benchmark.group = "log-probs"
    leaves, labels = leaves_of(op, data, dtype), data[2]
    with torch.no_grad():
        values = benchmark(waited(lambda: getattr(gfast, op)(*leaves, labels)))
    close(values, plain_logp(wide_logits(leaves)[1].detach(), labels), dtype)


@DTYPES
@pytest.mark.parametrize("op", ["token_logp", "linear_token_logp"])
def test_logp_gradients(benchmark, data, dtype, op):
    benchmark.group = "log-probs, forward and backward"
    leaves, labels = leaves_of(op, data, dtype), data[2]
    values = benchmark(waited(lambda: backward(getattr(gfast, op)(*leaves, labels).sum(), *leaves)))
    wide, logits = wide_logits(leaves)
    wanted = torch.autograd.grad(plain_logp(logits, labels).sum(), wide)
    for one, exact in zip(values[1:], wanted, strict=True):
        assert (one.double() - exact).norm() <= (1e-5 if dtype == torch.float32 else 3e-2) * exact.norm()


@DTYPES
@OBJECTIVES
@pytest.mark.parametrize("op", ["unlearn_loss", "linear_unlearn_loss", "in place"])
def test_losses(benchmark, data, dtype, objective, op):
    benchmark.group = f"{op}, forward and backward"
    leaves, labels = leaves_of(op, data, dtype), data[2]
    ref = data[3] if "ref_logp" in objective.needs else None

    def step():
        if op == "in place":  # the op overwrites what a layer produced, never a leaf
            loss = gfast.unlearn_loss(leaves[0] * 1, labels, objective, ref_logp=ref, inplace=True)
        else:
            loss = getattr(gfast, op)(*leaves, labels, objective, ref_logp=ref)
        return backward(loss.loss, *leaves)

    logits = wide_logits(leaves)[1].detach()
    wanted = gfast.unlearn_loss(logits, labels, objective, ref_logp=ref, impl="reference").loss
    close(benchmark(waited(step))[0], wanted, dtype)


@DTYPES
@pytest.mark.parametrize("op", ["token_kl", "linear_token_kl"])
def test_kl(benchmark, data, dtype, op):
    benchmark.group = "KL, forward and backward"
    leaves, labels = leaves_of(op, data, dtype), data[2]
    ref = leaves_of(op, (data[0], data[1].flip(1).contiguous()), dtype)
    ref = [t.detach() for t in ref]
    values = benchmark(waited(lambda: backward(getattr(gfast, op)(*leaves, *ref, labels), *leaves)))
    mine, other = (wide_logits(tensors)[1].detach().log_softmax(-1) for tensors in (leaves, ref))
    each = F.kl_div(mine, other, log_target=True, reduction="none").sum(-1)
    close(values[0], each[labels != -100].mean(), dtype)


@DTYPES
@pytest.mark.parametrize("op", ["soft_target_loss", "linear_soft_target_loss"])
def test_soft_targets(benchmark, data, dtype, op):
    """UNDIAL's: the target is softmax of the reference's logits with 10 taken from the label's."""
    benchmark.group = "soft targets, forward and backward"
    leaves, labels = leaves_of(op, data, dtype), data[2]
    ref = [t.detach() for t in leaves_of(op, (data[0], data[1].flip(1).contiguous()), dtype)]
    values = benchmark(waited(lambda: backward(getattr(gfast, op)(*leaves, *ref, labels, beta=10.0), *leaves)))
    mine, other = (wide_logits(tensors)[1].detach() for tensors in (leaves, ref))
    valid = labels != -100
    target = other - 10 * F.one_hot(labels.clamp(min=0), V)
    each = -(target.softmax(-1) * mine.log_softmax(-1)).sum(-1)
    close(values[0], each[valid].mean(), dtype)


@DTYPES
@pytest.mark.parametrize("op", ["token_stats", "linear_token_stats"])
def test_stats(benchmark, data, dtype, op):
    benchmark.group = "statistics, forward and backward"
    leaves, labels = leaves_of(op, data, dtype), data[2]

    def step():
        stats = getattr(gfast, op)(*leaves, labels)
        return backward(stats.entropy.sum() + stats.top.sum(), *leaves)

    mine, valid = wide_logits(leaves)[1].detach(), labels != -100
    logp = mine.log_softmax(-1)
    close(benchmark(waited(step))[0], (mine.amax(-1) - (logp.exp() * logp).sum(-1))[valid].sum(), dtype)


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
    values = benchmark(waited(lambda: gfast.grad_dot(xs, ys, groups, 5)))
    torch.testing.assert_close(values.cpu(), wanted, rtol=1e-5, atol=1e-4)


@pytest.fixture(scope="module")
def model():
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = dict(hidden_size=D, intermediate_size=2 * D, num_hidden_layers=2, num_attention_heads=4)
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=V, **sizes)).to(DEVICE).eval()


def batch_of(seed: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(0, V, (B, T), generator=torch.Generator().manual_seed(seed))
    labels = ids.clone()
    labels[:, :5] = -100
    return {"input_ids": ids.to(DEVICE), "attention_mask": torch.ones_like(ids).to(DEVICE), "labels": labels.to(DEVICE)}


def model_nll(model, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Token losses [B, T - 1] in plain PyTorch, 0 at ignored labels."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    return -plain_logp(logits, batch["labels"][:, 1:])


@pytest.mark.benchmark(group="a Hugging Face model")
def test_model_loss(benchmark, model):
    batch, parameters = batch_of(1), list(model.parameters())
    values = benchmark(waited(lambda: backward(gfast.model_loss(model, batch, NLL()).loss, *parameters)))
    close(values[0], model_nll(model, batch).detach().sum() / (batch["labels"][:, 1:] != -100).sum(), torch.float32)


@pytest.mark.benchmark(group="a Hugging Face model")
def test_model_logp(benchmark, model):
    batch = batch_of(1)
    with torch.no_grad():
        values = benchmark(waited(lambda: gfast.model_logp(model, batch)))
        close(values.sum(), -model_nll(model, batch).sum(), torch.float32)


def risk_gradient(model, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The gradient of the token-mean NLL, all parameters in a row."""
    risk = model_nll(model, batch).sum() / (batch["labels"][:, 1:] != -100).sum()
    return torch.cat([g.flatten() for g in torch.autograd.grad(risk, list(model.parameters()))]).double()


@pytest.mark.benchmark(group="gradient effects")
@pytest.mark.parametrize("name", ["g_effect", "pg_effect", "token_effect", "gram_effect", "risk_gradients"])
def test_gradient_effects(benchmark, model, name):
    forget, retain = batch_of(1), batch_of(2)
    count = (forget["labels"][:, 1:] != -100).sum()
    function = getattr(gfast, name)
    first = (model, GA()) if name == "g_effect" else (model,)
    values = benchmark(waited(lambda: function(*first, forget=forget, retain=retain)))
    mine, other = risk_gradient(model, forget), risk_gradient(model, retain)
    wanted = -float(mine @ other)  # of GA on the retain risk; the others are its parts
    if name == "risk_gradients":
        values = gfast.g_effect(model, GA(), forget=forget, retain=retain, directions=values)
    if name in ("g_effect", "risk_gradients"):
        total = values.total("retain")
    elif name == "gram_effect":  # of sums: not divided by either number of tokens
        total = sum(float(m.sum()) for m in values.matrix.values()) / float(count) ** 2
    else:
        parts = [torch.cat(list(v)) if isinstance(v, list) else v for v in values.retain.values()]
        total = sum(float(part.sum()) for part in parts) / float(count)
    assert total == pytest.approx(wanted, rel=1e-4)


@pytest.mark.benchmark(group="memory")
def test_empty_cache(benchmark):
    """With a gradient of 16 MiB freed before."""

    def freed():
        logits = torch.zeros(512, 8192, requires_grad=True)
        gfast.unlearn_loss(logits, torch.zeros(512, dtype=torch.int64), GA()).loss.backward()

    benchmark.pedantic(lambda: gfast.empty_cache(), setup=freed, rounds=5)
