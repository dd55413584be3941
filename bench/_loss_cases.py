"""What the loss benchmarks measure: heads of real models, batches, modes, and the inputs of a case."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from gfast.objectives import NLL, NPO, TNPO, WGA

HEADS = {  # name: (D, V)
    "tiny": (32, 512),
    "small": (1024, 32000),
    "smollm2-135m": (576, 49152),
    "llama-3.2-1b": (2048, 128256),
    "phi-1.5": (2048, 51200),
    "gemma-2-2b": (2304, 256000),
    "llama-2-7b": (4096, 32000),
    "llama-3.1-8b": (4096, 128256),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
OBJECTIVES = {"wga": WGA(alpha=1.0), "tnpo": TNPO(beta=1.0), "npo": NPO(beta=0.1), "nll": NLL()}
MODES = {  # what is timed; "frozen" is a head that needs no gradient, so only the linear path has it
    "train": "forward and backward",
    "forward": "forward of a loss that will be differentiated",
    "frozen": "forward and backward, the head frozen (no dW)",
    "nograd": "no gradient wanted",
}
BATCHES = {  # where labels are -100
    "full": "8 sequences, every label valid",
    "tofu": "short answers: 64 positions a sequence, about 60% of them prompt or padding, ignored",
    "long": "sequences of up to 2048 positions, every label valid",
}

Step = Callable[[], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Case:
    op: str  # "logits" or "linear"
    objective: str
    head: str
    width: int
    vocab: int
    rows: int
    dtype: str
    mode: str
    batch: str
    device: str

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.rows, self.vocab) if self.op == "logits" else (self.rows, self.width, self.vocab)

    @property
    def layout(self) -> tuple[int, int]:
        """Sequences and positions of each."""
        length = {"full": max(1, self.rows // 8), "tofu": 64, "long": min(self.rows, 2048)}[self.batch]
        if self.rows % length:
            raise ValueError(f"{self.rows} rows cannot be cut into sequences of {length} positions ({self.batch})")
        return self.rows // length, length


@dataclass
class Inputs:
    tensors: tuple[Tensor, ...]  # (logits [B, T, V],) or (hidden [B, T, D], weight [V, D])
    labels: Tensor  # [B, T]
    ref_logp: Tensor  # [B, T], 0 at ignored labels

    @property
    def valid(self) -> int:
        return int((self.labels != -100).sum())


def make_inputs(case: Case) -> Inputs:
    """Random rows with logits of standard deviation 2 and the labels of the case's batch."""
    rng = torch.Generator(case.device).manual_seed(0)
    dtype, batch = DTYPES[case.dtype], case.layout

    def normal(*shape: int, scale: float) -> Tensor:
        return torch.randn(*shape, generator=rng, device=case.device).mul_(scale).to(dtype)

    if case.op == "logits":
        tensors = (normal(*batch, case.vocab, scale=2.0),)
    else:
        tensors = (normal(*batch, case.width, scale=1.0), normal(case.vocab, case.width, scale=2 / case.width**0.5))
    rng = torch.Generator().manual_seed(1)
    labels = torch.randint(0, case.vocab, batch, generator=rng)
    if case.batch == "tofu":
        position, length = torch.arange(batch[1]), (batch[0], 1)
        start = torch.randint(8, 32, length, generator=rng)
        stop = start + torch.randint(12, 40, length, generator=rng)
        labels[(position < start) | (position >= stop)] = -100
    ref_logp = torch.where(labels != -100, torch.randn(batch, generator=rng) - 10, 0.0)
    return Inputs(tensors, labels.to(case.device), ref_logp.to(case.device))


def objective_of_nll(objective: str, nll: Tensor, labels: Tensor, ref_logp: Tensor) -> Tensor:
    """The objective from its formula, from differentiable token losses [B, T] that are 0 at ignored labels."""
    count = (labels != -100).sum()
    if objective == "nll":
        return nll.sum() / count
    if objective == "npo":
        beta = OBJECTIVES["npo"].beta
        return -2 / beta * F.logsigmoid(beta * (nll.sum(1) + ref_logp.sum(1))).mean()
    if objective == "wga":
        weight = torch.exp(-nll.detach()) ** OBJECTIVES["wga"].alpha
    else:
        weight = 2 * torch.sigmoid(OBJECTIVES["tnpo"].beta * (-nll.detach() - ref_logp))
    return -(weight * nll).sum() / count


def plain_loss(objective: str, logits: Tensor, labels: Tensor, ref_logp: Tensor) -> Tensor:
    """The objective in plain PyTorch; logits [B, T, V]."""
    flat = logits.reshape(-1, logits.shape[-1])
    if objective == "nll":
        return F.cross_entropy(flat, labels.reshape(-1))
    nll = F.cross_entropy(flat, labels.reshape(-1), reduction="none").reshape(labels.shape)
    return objective_of_nll(objective, nll, labels, ref_logp)


def step_of(case: Case, inputs: Inputs, loss: Callable[..., Tensor]) -> Step:
    """``loss`` of the logits, or of hidden and weight, in the case's mode: (loss, *gradients that the mode wants)."""
    if case.mode == "nograd":

        def nograd() -> tuple[Tensor, ...]:
            with torch.no_grad():
                return (loss(*inputs.tensors),)

        return nograd
    wanted = [t.detach().requires_grad_() for t in inputs.tensors]
    leaves = list(wanted)
    if case.mode == "frozen":
        leaves[1] = inputs.tensors[1]
        wanted = wanted[:1]
    if case.mode == "forward":
        return lambda: (loss(*leaves).detach(),)

    def step() -> tuple[Tensor, ...]:
        value = loss(*leaves)
        return value.detach(), *torch.autograd.grad(value, wanted)

    return step


def flops(case: Case, valid: int) -> int:
    """Of the matrix products that the mode needs, over the rows with a label; gfast and the floor do no others."""
    products = {"train": 3, "forward": 1, "frozen": 2, "nograd": 1}[case.mode]
    return 2 * products * valid * case.width * case.vocab if case.op == "linear" else 0


def bytes_moved(case: Case) -> int:
    """The logits read once, and for a gradient written once."""
    size = case.rows * case.vocab * DTYPES[case.dtype].itemsize
    return size * (2 if case.mode == "train" else 1) if case.op == "logits" else 0
