"""What is measured: heads and models of real shapes, batches, modes, and random inputs of a case."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gfast.objectives import BST, ETW, MASC, NLL, NPO, PDU, TNPO, WGA

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

# Losses

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
OBJECTIVES = {"wga": WGA(alpha=1.0), "tnpo": TNPO(beta=1.0), "npo": NPO(beta=0.1), "nll": NLL()}
MARGINS = {"etw": ETW(), "pdu": PDU(), "masc": MASC(rho=0.5, eta=10.0), "bst": BST()}  # in times of WGA
OBJECTIVES |= MARGINS
MATRICES = {"logits": 1, "kl": 2}  # of logits that an op reads
MODES = ("train", "forward", "frozen", "nograd")  # "frozen" is a head without gradient: the linear path alone has it
BATCHES = ("full", "tofu", "long")  # where labels are -100, and how long the sequences are

Step = Callable[[], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Case:
    op: str  # "logits", "linear" or "kl"
    objective: str  # "kl" of that op
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
        return (self.rows, self.width, self.vocab) if self.op == "linear" else (self.rows, self.vocab)

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
    ref_logits: Tensor | None = None  # [B, T, V], of "kl"

    @property
    def valid(self) -> int:
        return int((self.labels != -100).sum())


def make_inputs(case: Case) -> Inputs:
    """Random rows with logits of standard deviation 2 and the labels of the case's batch."""
    rng = torch.Generator(case.device).manual_seed(0)
    dtype, batch = DTYPES[case.dtype], case.layout

    def normal(*shape: int, scale: float) -> Tensor:
        return torch.randn(*shape, generator=rng, device=case.device).mul_(scale).to(dtype)

    ref_logits = normal(*batch, case.vocab, scale=2.0) if case.op == "kl" else None
    if case.op != "linear":
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
    return Inputs(tensors, labels.to(case.device), ref_logp.to(case.device), ref_logits)


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
    if objective in ("pdu", "masc", "bst"):
        return plain_margins(objective, flat, labels.reshape(-1)).sum() / (labels != -100).sum()
    if objective == "nll":
        return F.cross_entropy(flat, labels.reshape(-1))
    nll = F.cross_entropy(flat, labels.reshape(-1), reduction="none").reshape(labels.shape)
    if objective == "etw":
        p = torch.softmax(logits.detach(), -1)
        entropy = torch.where(labels != -100, torch.special.entr(p).sum(-1), 0.0)  # [B, T]
        weight = entropy * (labels != -100).sum(1, keepdim=True) / entropy.sum(1, keepdim=True)
        return -(weight * nll).sum() / (labels != -100).sum()
    return objective_of_nll(objective, nll, labels, ref_logp)


def largest(logits: Tensor, count: int) -> Tensor:
    """[N, count]; of equal ones, which 16 bits have often, the first: amax would share its gradient among them."""
    return torch.sort(logits, dim=-1, descending=True, stable=True).values[:, :count]


def plain_margins(objective: str, logits: Tensor, labels: Tensor) -> Tensor:
    """Values of PDU, MASC or BST, 0 at ignored labels; logits [N, V]."""
    if objective == "pdu":
        return torch.where(labels != -100, (largest(logits, 1)[:, 0] - logits.mean(-1)) ** 2, 0.0)
    masc, bst, target = MARGINS["masc"], MARGINS["bst"], labels.clamp(min=0)[:, None]
    if objective == "bst":
        beliefs, ids = (x[:, : bst.top_k] for x in torch.sort(logits.detach(), dim=-1, descending=True, stable=True))
        log_p = torch.log_softmax(logits, -1)
        believed = (torch.softmax(beliefs, -1) * log_p.gather(1, ids)).sum(-1)
        own = (1 - bst.lambda_bst) * log_p.gather(1, target)[:, 0]
        return torch.where(labels != -100, own + bst.lambda_bst * believed, 0.0)
    rivals = largest(logits.scatter(1, target, -torch.inf), masc.k)
    margin = logits.gather(1, target)[:, 0] - torch.logsumexp(rivals, -1)
    tau = math.log(masc.rho / (1 - masc.rho))
    return torch.where(labels != -100, torch.relu(margin - (tau - masc.eta)) / masc.eta, 0.0)


def plain_kl(logits: Tensor, ref_logits: Tensor, labels: Tensor) -> Tensor:
    """KL(reference || model) in plain PyTorch, the mean over valid tokens; logits [B, T, V]."""
    log_p, log_q = (torch.log_softmax(z, -1) for z in (logits, ref_logits))
    kl = F.kl_div(log_p, log_q, reduction="none", log_target=True).sum(-1)  # [B, T]
    return kl[labels != -100].mean()


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
    """The logits read once, of KL the reference's too, and for a gradient written once."""
    size = case.rows * case.vocab * DTYPES[case.dtype].itemsize
    return size * (MATRICES[case.op] + (case.mode == "train")) if case.op != "linear" else 0


# Models


class Model(NamedTuple):
    """The shape of a Llama."""

    vocab: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    tied: bool


MODELS = {
    "tiny": Model(512, 64, 172, 5, 8, 4, True),
    "smollm2-135m": Model(49152, 576, 1536, 30, 9, 3, True),
    "llama-3.2-1b": Model(128256, 2048, 8192, 16, 32, 8, True),
    "llama-2-7b": Model(32000, 4096, 11008, 32, 32, 32, False),
}
Batch = dict[str, Tensor]


def random_model(name: str, dtype: str = "fp32", device: str = "cpu", layers: int | None = None) -> nn.Module:
    """A Llama of the shape with random weights and no dropout, made on its device; `layers` cuts its depth."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = MODELS[name]
    config = LlamaConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers if layers is None else layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        tie_word_embeddings=shape.tied,
    )
    torch.manual_seed(0)
    with torch.device(device):
        return LlamaForCausalLM(config).to(DTYPES[dtype]).eval()


def answers(vocab: int, rows: int, tokens: int, seed: int, device: str = "cpu") -> Batch:
    """Rows of different lengths, padded to `tokens`; the first third of each is a question without labels.

    At least one row fills the width, as with padding to the longest.
    """
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, vocab, (rows, tokens), generator=generator)
    lengths = torch.randint(max(2, tokens // 2), tokens + 1, (rows, 1), generator=generator)
    lengths[0] = tokens
    position = torch.arange(tokens)
    mask = (position < lengths).long()
    labels = torch.where((position >= lengths // 3) & (mask == 1), ids, -100)
    return {"input_ids": (ids * mask).to(device), "attention_mask": mask.to(device), "labels": labels.to(device)}


def batch_pair(model: str, rows: int, tokens: int, device: str) -> tuple[Batch, Batch]:
    """A forget batch and a retain batch."""
    forget, retain = (answers(MODELS[model].vocab, rows, tokens, seed, device) for seed in (1, 2))
    return forget, retain


def padded(batch: Batch, tokens: int) -> Batch:
    """The batch padded on the right to a fixed width."""
    extra = tokens - batch["input_ids"].shape[1]
    if extra <= 0:
        return batch
    fill = {"input_ids": 0, "attention_mask": 0, "labels": -100}
    return {key: nn.functional.pad(value, (0, extra), value=fill[key]) for key, value in batch.items()}


def rows_of(batch: Batch, start: int, stop: int) -> Batch:
    return {key: value[start:stop] for key, value in batch.items()}
