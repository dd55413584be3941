"""Calls of the public functions, losses and gradients, against autograd through the definition in fp64."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from draw import NARROW, ROUNDING, Draw
from near import near
from torch import Tensor

import gfast
from gfast.objectives import GA, NLL, NPO, TNPO, WGA, SatImp
from gfast.ops.row_dot import linear_row_dot

EPS = ROUNDING[torch.float32]


class Public(NamedTuple):
    """A call of a public function with tensors by name, those to differentiate by among them, and its definition."""

    name: str
    call: Any  # tensors -> a scalar or a tensor
    tensors: dict[str, Tensor]
    by: tuple[str, ...]
    expected: Any  # tensors in fp64 -> the same by the definition
    slack: Any  # tensors in fp64 -> error of the result (None: not compared); and of a gradient, of its largest entry


def _logp(z: Tensor, labels: Tensor) -> Tensor:
    picked = torch.log_softmax(z, -1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    return torch.where(labels != -100, picked, 0.0)


def _cap(z: Tensor, scale: float, cap: float | None) -> Tensor:
    z = z * scale
    return cap * torch.tanh(z / cap) if cap else z


def _weighted(objective, x: dict[str, Tensor], logp: Tensor) -> Tensor:
    """sum of w logp over its count, w by the objective's formula: its gradient is the loss's, its value not always."""
    ref, labels = x.get("ref_logp"), x["labels"]
    valid = labels != -100
    detached, one = logp.detach(), torch.ones_like(logp)
    count = valid.sum().clamp(min=1)
    if isinstance(objective, NLL):
        one = -one
    elif isinstance(objective, WGA):
        one = torch.exp(objective.alpha * detached)
    elif isinstance(objective, SatImp):
        one = torch.exp(objective.beta1 * detached) * (-torch.expm1(detached)) ** objective.beta2
    elif isinstance(objective, TNPO):
        one = 2 * torch.sigmoid(objective.beta * (detached - ref))
    elif isinstance(objective, NPO):
        one = 2 * torch.sigmoid(objective.beta * ((detached - ref) * valid).sum(-1, keepdim=True)).expand_as(logp)
        count = valid.any(-1).sum().clamp(min=1)
    return (torch.where(valid, one * x.get("times", 1.0), 0.0) * logp).sum() / count


OBJECTIVES = (GA(), NLL(), WGA(1.0), WGA(0.5), SatImp(1.0, 1.0), TNPO(1.0), NPO(0.1), NPO(1.0))


def _objective(r: Draw, labels: Tensor) -> tuple[Any, dict[str, Tensor]]:
    objective = r.choice(OBJECTIVES)
    more = {}
    if isinstance(objective, TNPO | NPO):
        more["ref_logp"] = -3 * torch.rand(labels.shape, generator=r.torch)
    if r.maybe(0.3):
        more["times"] = r.normal(
            *labels.shape, scale=r.choice((1.0, 1e-3, 30.0)), dtype=r.choice((torch.float64, *NARROW))
        )
    return objective, more


def _given(x: dict[str, Tensor]) -> dict[str, Tensor]:
    """What a loss takes beside the objective."""
    names = {"bias": "bias", "ref_logp": "ref_logp", "times": "weight"}
    return {name: x[key] for key, name in names.items() if key in x}


def _sizes(r: Draw) -> tuple[int, int, int]:
    return r.choice((0, 1, 2, 3)), r.choice((0, 1, 2, 5, 17)), r.choice((1, 2, 7, 33, 100, 300, 2100))


def _rows(r: Draw, *shape: int, dtype: torch.dtype, scale: float = 3.0) -> Tensor:
    x = r.normal(*shape, scale=scale, dtype=dtype)
    kind = r.randrange(4)
    if kind == 0 and len(shape) == 3:
        return x.transpose(0, 1).contiguous().transpose(0, 1)
    if kind == 1:
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    if kind == 2 and shape[0]:
        return x[:1].expand(shape)
    return x


def _labels(r: Draw, b: int, t: int, vocab: int) -> Tensor:
    y = torch.randint(0, vocab, (b, t), generator=r.torch)
    return torch.where(torch.rand(b, t, generator=r.torch) < 0.2, -100, y)


def _unsure(z: Tensor, eps: float, tokens: int = 1) -> float:
    """Error of a log-prob of logits that were rounded to eps."""
    size = float(z.abs().max()) if z.numel() else 0.0
    return (24 * EPS + 4 * eps) * (1 + 2 * size) * tokens


def from_logits(r: Draw) -> Public:
    b, t, vocab = _sizes(r)
    dtype = r.choice((torch.float32, *NARROW))
    labels = _labels(r, b, t, vocab)
    impl = r.choice(("auto", "auto", "cpp", "reference"))
    tensors = {"logits": _rows(r, b, t, vocab, dtype=dtype), "labels": labels}
    which = r.randrange(3)
    if which == 0:
        return Public(
            "token_logp",
            lambda x: gfast.token_logp(x["logits"], x["labels"], impl=impl),
            tensors,
            ("logits",),
            lambda x: _logp(x["logits"], x["labels"]),
            lambda x: (_unsure(x["logits"], 0.0), 8 * _unsure(x["logits"], 0.0) + 2 * ROUNDING[dtype]),
        )
    if which == 1:
        tensors["ref_logits"] = _rows(r, b, t, vocab, dtype=dtype)

        def kl(x):
            log_p, log_q = (torch.log_softmax(x[k], -1) for k in ("logits", "ref_logits"))
            valid = x["labels"] != -100
            return torch.where(valid, (log_q.exp() * (log_q - log_p)).sum(-1), 0.0).sum() / valid.sum().clamp(min=1)

        def kl_slack(x):
            unsure = _unsure(x["logits"], 0.0) + _unsure(x["ref_logits"], 0.0)
            return 20 * unsure, 16 * unsure + 2 * ROUNDING[dtype]

        call = lambda x: gfast.token_kl(x["logits"], x["ref_logits"], x["labels"], impl=impl)  # noqa: E731
        return Public("token_kl", call, tensors, ("logits",), kl, kl_slack)
    objective, more = _objective(r, labels)
    tensors |= more
    sequence = t if isinstance(objective, NPO) else 1
    return Public(
        f"unlearn_loss {objective}",
        lambda x: gfast.unlearn_loss(x["logits"], x["labels"], objective, **_given(x), impl=impl).loss,
        tensors,
        ("logits",),
        lambda x: _weighted(objective, x, _logp(x["logits"], x["labels"])),
        lambda x: (None, 16 * _unsure(x["logits"], 0.0, sequence) + 2 * ROUNDING[dtype]),
    )


def from_hidden(r: Draw) -> Public:
    b, t, vocab = _sizes(r)
    width = r.choice((1, 3, 16, 40))
    dtype = r.choice((torch.float32, torch.float32, *NARROW))
    labels = _labels(r, b, t, vocab)
    size = width**-0.25
    tensors = {"hidden": _rows(r, b, t, width, dtype=dtype, scale=size), "labels": labels}
    tensors["weight"] = _rows(r, vocab, width, dtype=dtype, scale=size)
    if r.maybe(0.4):
        tensors["bias"] = r.normal(vocab, dtype=dtype)
    by = tuple(k for k in ("hidden", "weight", "bias") if k in tensors and r.maybe(0.7)) or ("hidden",)
    scale, cap = r.choice((1.0, 0.5)), r.choice((None, 20.0))
    chunk = r.choice((None, 1, 3))
    settings = dict(logit_scale=scale, softcap=cap, chunk_rows=chunk, impl=r.choice(("auto", "auto", "reference")))

    def logits(x, hidden="hidden", weight="weight", bias="bias"):
        return _cap(torch.nn.functional.linear(x[hidden], x[weight], x.get(bias)), scale, cap)

    def slack(x, tokens=1, more=1.0):
        z = x["hidden"].abs() @ x["weight"].abs().t()  # what roundings of the products are measured in
        unsure = _unsure(z.detach() + 1, ROUNDING[dtype] + width * EPS, tokens)
        return more * unsure, 16 * unsure + 8 * ROUNDING[dtype]

    if r.maybe(0.4):
        return Public(
            "linear_token_logp",
            lambda x: gfast.linear_token_logp(x["hidden"], x["weight"], x["labels"], bias=x.get("bias"), **settings),
            tensors,
            by,
            lambda x: _logp(logits(x), x["labels"]),
            slack,
        )
    objective, more = _objective(r, labels)
    tensors |= more

    def call(x):
        return gfast.linear_unlearn_loss(x["hidden"], x["weight"], x["labels"], objective, **_given(x), **settings).loss

    return Public(
        f"linear_unlearn_loss {objective}",
        call,
        tensors,
        by,
        lambda x: _weighted(objective, x, _logp(logits(x), x["labels"])),
        lambda x: (None, slack(x, t if isinstance(objective, NPO) else 1)[1]),
    )


def dots(r: Draw) -> Public:
    dtypes = (torch.float32, torch.float64, *NARROW)
    n, m, k = r.size(), r.size(), r.size()
    if r.maybe(0.5):
        tensors = {"x": _rows(r, n, m, dtype=r.choice(dtypes)), "y": _rows(r, n, m, dtype=r.choice(dtypes))}
        return Public(
            "grad_dot",
            lambda x: gfast.grad_dot([x["x"], x["y"]], [x["y"], x["x"]], [0, 2], 3),
            tensors,
            (),
            lambda x: torch.stack([(x["x"] * x["y"]).sum(), x["x"].new_zeros(()), (x["x"] * x["y"]).sum()]),
            lambda x: (float((x["x"] * x["y"]).abs().sum()) * 20 * EPS, 0.0),
        )
    tensors = {"a": _rows(r, n, m, dtype=r.choice(dtypes)), "b": _rows(r, n, k, dtype=r.choice(dtypes))}
    tensors["g"] = _rows(r, k, m, dtype=r.choice(dtypes))

    def slack(x):
        size = torch.einsum("no,oi,ni->n", x["b"].abs(), x["g"].abs(), x["a"].abs())
        widest = max((tensors[name].dtype for name in "abg"), key=lambda d: d.itemsize)
        return (float(size.max()) if n else 0.0) * ((m + k + 20) * EPS + 2 * ROUNDING[widest]), 0.0

    return Public(
        "linear_row_dot",
        lambda x: linear_row_dot(x["a"], x["b"], x["g"]),
        tensors,
        (),
        lambda x: torch.einsum("no,oi,ni->n", x["b"], x["g"], x["a"]),
        slack,
    )


KINDS = (from_logits, from_logits, from_hidden, dots)


def spoil(r: Draw, tensors: dict[str, Tensor]) -> str:
    """Something that a public function refuses, or takes and then does right."""
    name = r.choice(sorted(tensors))
    x = tensors[name]
    kind = r.randrange(5)
    if name == "labels" and x.numel() and kind < 3:
        x = x.clone()
        x.view(-1)[r.randrange(x.numel())] = r.choice((-1, -99, -101, 2**31, 2**63 - 1, -(2**63)))
    elif kind == 0:
        x = x.to(r.choice((torch.int32, torch.bool, torch.complex64, torch.float8_e4m3fn)))
    elif kind == 1:
        x = x.to("meta")
    elif kind == 2:
        x = x[..., :0]
    elif kind == 3:
        x = x[1:]
    else:
        x = x[None]
    tensors[name] = x
    return f"{name} = {x.dtype} {tuple(x.shape)} {x.device}"


def run(r: Draw, case: Public, spoiled: bool) -> None:
    leaves = {k: x.detach().requires_grad_(k in case.by and x.is_floating_point()) for k, x in case.tensors.items()}
    wide = {k: (x.double() if x.is_floating_point() else x.long()) for k, x in case.tensors.items()}
    wide = {k: x.detach().clone().requires_grad_(leaves[k].requires_grad) for k, x in wide.items()}
    found = case.call(leaves)
    if any(x.device.type == "meta" for x in leaves.values()):
        assert found.device.type == "meta", "values of tensors that have none"
        return
    assert not any(x.is_complex() for x in case.tensors.values()), "complex numbers were taken"
    expected = case.expected(wide)
    of_value, of_gradient = case.slack({k: x.detach() for k, x in wide.items()})
    if of_value is not None:
        near(found.detach(), expected.detach(), of_value * (1 + expected.detach().abs()), "result")
    if not found.requires_grad:
        assert not expected.requires_grad or not case.by or found.numel() == 0, "the result has no gradient"
        return
    upstream = torch.ones_like(expected) if found.dim() == 0 else r.normal(*found.shape).double()
    found.backward(upstream.to(found.dtype))
    expected.backward(upstream)
    for name in case.by:
        if leaves[name].dtype not in ROUNDING:
            continue  # fp8 is taken by the definition alone, and rounds as it may
        if leaves[name].grad is None:
            assert wide[name].grad is None or not wide[name].grad.any(), f"{name} got no gradient"
            continue
        one = wide[name].grad
        rest = [
            x.detach().abs().max() for k, x in wide.items() if x.is_floating_point() and x.numel() and k != "ref_logp"
        ]
        size = float(upstream.abs().max()) if upstream.numel() else 0.0
        if "hidden" in wide:
            size *= max(1.0, *map(float, rest))
        elif "times" in wide and wide["times"].numel():  # entries are as large as the weights that are given
            size *= max(1.0, float(wide["times"].abs().max()))
        size *= max(1.0, leaves["labels"].numel() ** 0.5) if found.dim() and name != "logits" else 1.0
        near(
            leaves[name].grad,
            one,
            of_gradient * size + 2.0**-23 * (leaves[name].dtype == torch.float16),
            f"grad of {name}",
        )
