"""Who computes a loss: gfast, what trainers write, torch.compile, other projects' fused heads, and the floors.

A provider makes a step for a case, or None where it does not apply. ``why_not`` says why one cannot run here.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from cases import MARGINS, MATRICES, OBJECTIVES, Case, Inputs, Step, objective_of_nll, plain_kl, plain_loss, step_of
from torch import Tensor

import gfast


@dataclass(frozen=True)
class Provider:
    make: Callable[[Case, Inputs], Step | None]
    packages: tuple[str, ...] = ()  # must be importable
    gpu_only: bool = False
    compiles: bool = False  # in its first call
    ours: bool = False  # a wrong result is a bug of this repository: never timed
    floor: bool = False  # computes no loss

    def why_not(self, device: str) -> str | None:
        if any(importlib.util.find_spec(package) is None for package in self.packages):
            return "not installed"
        return "needs a GPU" if self.gpu_only and device != "cuda" else None


def _logits(case: Case, leaves: tuple[Tensor, ...]) -> Tensor:
    return F.linear(*leaves) if case.op == "linear" else leaves[0]


def plain(case: Case, inputs: Inputs, upcast: bool = False, compiled: bool = False) -> Step:
    def loss(*leaves: Tensor) -> Tensor:
        logits = _logits(case, leaves)
        logits = logits.float() if upcast else logits
        if inputs.ref_logits is not None:
            return plain_kl(logits, inputs.ref_logits.to(logits.dtype), inputs.labels)
        return plain_loss(case.objective, logits, inputs.labels, inputs.ref_logp)

    return step_of(case, inputs, torch.compile(loss, dynamic=False) if compiled else loss)


def open_unlearning(case: Case, inputs: Inputs) -> Step | None:
    if case.objective not in ("wga", "npo"):
        return None

    def loss(*leaves: Tensor) -> Tensor:
        logits = _logits(case, leaves)
        F.cross_entropy(logits.float().reshape(-1, logits.shape[-1]), inputs.labels.reshape(-1))
        return plain_loss(case.objective, logits, inputs.labels, inputs.ref_logp)

    return step_of(case, inputs, loss)


def _reference(case: Case, inputs: Inputs) -> Tensor | None:
    return inputs.ref_logp if "ref_logp" in OBJECTIVES[case.objective].needs else None


def gfast_loss(case: Case, inputs: Inputs, weight: Tensor | None = None) -> Step:
    if inputs.ref_logits is not None:
        return step_of(case, inputs, lambda logits: gfast.token_kl(logits, inputs.ref_logits, inputs.labels))
    objective, ref = OBJECTIVES[case.objective], _reference(case, inputs)
    op = gfast.unlearn_loss if case.op == "logits" else gfast.linear_unlearn_loss
    given = dict(ref_logp=ref, weight=weight)
    return step_of(case, inputs, lambda *leaves: op(*leaves, inputs.labels, objective, **given).loss)


def gfast_wga(case: Case, inputs: Inputs) -> Step | None:
    """WGA beside an objective whose law is a multiple of its time."""
    return gfast_loss(replace(case, objective="wga"), inputs) if case.objective in MARGINS else None


def gfast_weighted(case: Case, inputs: Inputs) -> Step | None:
    """Weights of one a token, so that the numbers to come out are the plain loss's."""
    return None if case.op == "kl" else gfast_loss(case, inputs, torch.ones_like(inputs.ref_logp))


class _Produced(torch.autograd.Function):
    """Stands for the head that makes the logits: its output is no leaf, so it may be overwritten."""

    @staticmethod
    def forward(ctx, logits):
        return logits.detach()

    @staticmethod
    def backward(ctx, grad):
        return grad


def gfast_inplace(case: Case, inputs: Inputs) -> Step | None:
    if case.op != "logits" or case.mode != "train":
        return None
    # its own logits: each call leaves the gradient in them, which the next call takes for logits (as slow or fast)
    own = Inputs((inputs.tensors[0].clone(),), inputs.labels, inputs.ref_logp)
    objective, ref = OBJECTIVES[case.objective], _reference(case, inputs)

    def loss(leaf: Tensor) -> Tensor:
        return gfast.unlearn_loss(_Produced.apply(leaf), own.labels, objective, ref_logp=ref, inplace=True).loss

    return step_of(case, own, loss)


def gfast_triton(case: Case, inputs: Inputs) -> Step | None:
    """Triton's kernel, where "auto" takes the CUDA one."""
    if case.op != "logits":
        return None
    objective, ref = OBJECTIVES[case.objective], _reference(case, inputs)

    def loss(logits: Tensor) -> Tensor:
        return gfast.unlearn_loss(logits, inputs.labels, objective, ref_logp=ref, impl="triton").loss

    return step_of(case, inputs, loss)


def gfast_logp(case: Case, inputs: Inputs) -> Step | None:
    if case.mode != "nograd" or case.objective != "nll":
        return None
    op = gfast.token_logp if case.op == "logits" else gfast.linear_token_logp
    count = inputs.valid
    return step_of(case, inputs, lambda *leaves: -op(*leaves, inputs.labels).sum() / count)


def floor(case: Case, inputs: Inputs) -> Step:
    """No loss can do less: move the logits' bytes, or multiply as often as the mode needs."""
    if case.op != "linear":
        # a copy of as many bytes as are read and written; half of them are read
        rows = inputs.tensors[0].flatten(0, 1)  # [N, V]
        if inputs.ref_logits is not None:
            rows = torch.cat([rows, inputs.ref_logits.flatten(0, 1)])
        rows = rows[: max(1, (MATRICES[case.op] + (case.mode == "train")) * case.rows // 2)]
        out = torch.empty_like(rows)
        return lambda: (out.copy_(rows),)
    hidden = inputs.tensors[0].flatten(0, 1)[inputs.labels.flatten() != -100]
    native = _products(case.mode, hidden, inputs.tensors[1])
    # Many CPUs multiply bf16 more slowly than fp32: the floor is the faster, its operands converted beforehand.
    if case.device == "cuda" or case.dtype == "fp32":
        return native
    wide = _products(case.mode, hidden.float(), inputs.tensors[1].float())
    seconds = []
    for step in (native, wide):
        step()
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    return native if seconds[0] < seconds[1] else wide


def _products(mode: str, hidden: Tensor, weight: Tensor) -> Step:
    """Logits, and where the mode wants them dH and dW, into memory that exists."""
    logits = hidden @ weight.T
    d_hidden = torch.empty_like(hidden) if mode in ("train", "frozen") else None
    d_weight = torch.empty_like(weight) if mode == "train" else None

    def step() -> tuple[Tensor, ...]:
        torch.mm(hidden, weight.T, out=logits)
        if d_hidden is not None:
            torch.mm(logits, weight, out=d_hidden)
        if d_weight is not None:
            torch.mm(logits.T, hidden, out=d_weight)
        return (logits,)

    return step


def fresh_copy(case: Case, inputs: Inputs) -> Step | None:
    return (lambda: (inputs.tensors[0].clone(),)) if case.op == "logits" and case.mode == "train" else None


def torch_chunked(case: Case, inputs: Inputs, large: bool = False) -> Step | None:
    if (case.op, case.objective) != ("linear", "nll") or not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        return None
    chosen = {"chunking_method": None, "acc_policy": "accurate"} if large else {}
    if large:
        chosen["batch_chunk_size"] = min(case.rows, 256 if case.device == "cpu" else 4096)
    options, labels = torch.nn.LinearCrossEntropyOptions(**chosen), inputs.labels.flatten()

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        return F.linear_cross_entropy(hidden.flatten(0, 1), weight, labels, options=options)

    return step_of(case, inputs, loss)


def liger(case: Case, inputs: Inputs) -> Step | None:
    if case.op != "linear" or case.objective not in ("nll", "wga"):
        return None
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    wga = case.objective == "wga"
    module, labels = LigerFusedLinearCrossEntropyLoss(use_token_scaling=wga), inputs.labels.flatten()
    sign = -1.0 if wga else 1.0
    return step_of(case, inputs, lambda hidden, weight: sign * module(weight, hidden.flatten(0, 1), labels))


def liger_cute(case: Case, inputs: Inputs) -> Step | None:
    """Its kernels for Hopper: of NLL the fused head with its gradient, else a token's NLL."""
    if case.op != "linear":
        return None
    from liger_kernel.ops.cutedsl.ops.fused_linear_cross_entropy_sm90 import liger_fused_linear_cross_entropy_sm90
    from liger_kernel.ops.cutedsl.ops.fused_scaled_cross_entropy_sm90 import LigerFusedScaledCrossEntropySM90Function

    labels = inputs.labels.flatten()

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        rows = hidden.flatten(0, 1)
        if case.objective == "nll":
            return liger_fused_linear_cross_entropy_sm90(rows, weight, labels)
        nll = LigerFusedScaledCrossEntropySM90Function.apply(rows, weight, labels).view(inputs.labels.shape)
        return objective_of_nll(case.objective, nll, inputs.labels, inputs.ref_logp)

    return step_of(case, inputs, loss)


def quack(case: Case, inputs: Inputs) -> Step | None:
    if (case.op, case.objective) != ("linear", "nll"):
        return None
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    labels = inputs.labels.flatten()
    return step_of(
        case, inputs, lambda hidden, weight: chunked_linear_cross_entropy(hidden.flatten(0, 1), weight, labels)
    )


def cce(case: Case, inputs: Inputs, **options: object) -> Step | None:
    if case.op != "linear":
        return None
    from cut_cross_entropy import linear_cross_entropy

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        if case.objective == "nll":
            return linear_cross_entropy(hidden, weight, inputs.labels, **options)
        nll = linear_cross_entropy(hidden, weight, inputs.labels, reduction="none", **options)
        return objective_of_nll(case.objective, nll, inputs.labels, inputs.ref_logp)

    return step_of(case, inputs, loss)


def trl(case: Case, inputs: Inputs) -> Step | None:
    if case.op != "linear":
        return None
    from trl.kernels import ChunkedLogProbFunction

    mask = inputs.labels != -100
    targets = inputs.labels[mask]

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        kept = hidden[mask]  # [n, D], as its head does on a GPU
        logp = ChunkedLogProbFunction.apply(kept, weight, None, targets, 1.0, TRL_TILE, None, 1.0, ())[0]
        nll = torch.zeros(mask.shape, dtype=logp.dtype, device=logp.device).masked_scatter(mask, -logp)
        return objective_of_nll(case.objective, nll, inputs.labels, inputs.ref_logp)

    return step_of(case, inputs, loss)


TRL_TILE = 32768  # vocabulary entries a tile, TRL's own choice

PROVIDERS: dict[str, Provider] = {  # README.md says what each does
    "gfast": Provider(gfast_loss, ours=True),
    "gfast_weighted": Provider(gfast_weighted, ours=True),
    "gfast_inplace": Provider(gfast_inplace, ours=True),
    "gfast_logp": Provider(gfast_logp, ours=True),
    "gfast_triton": Provider(gfast_triton, ("triton",), ours=True, gpu_only=True),
    "wga": Provider(gfast_wga, floor=True),
    "floor": Provider(floor, floor=True),
    "fresh_copy": Provider(fresh_copy, floor=True),
    "open_unlearning": Provider(open_unlearning),
    "eager": Provider(plain),
    "upcast": Provider(partial(plain, upcast=True)),
    "compile": Provider(partial(plain, compiled=True), compiles=True),
    "torch_chunked": Provider(torch_chunked),
    "torch_chunked_rows": Provider(partial(torch_chunked, large=True)),
    "liger": Provider(liger, ("liger_kernel",), gpu_only=True),
    "liger_cute": Provider(liger_cute, ("liger_kernel", "cutlass"), gpu_only=True, compiles=True),
    "quack": Provider(quack, ("quack", "cutlass"), gpu_only=True, compiles=True),
    "cce": Provider(cce, ("cut_cross_entropy",), gpu_only=True),
    "cce_exact": Provider(partial(cce, filter_eps=None), ("cut_cross_entropy",), gpu_only=True),
    "cce_torch": Provider(partial(cce, impl="torch_compile"), ("cut_cross_entropy",), compiles=True),
    "trl": Provider(trl, ("trl",)),
}
