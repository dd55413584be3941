"""Objectives as their papers write them, over a model in fp64, with nothing of gfast's in it: for trainers' tests."""

from __future__ import annotations

import torch
from torch.nn.functional import logsigmoid
from transformers import Trainer, TrainerCallback

# transformers 4 logs four decimals of the loss
LOGGED = 0.0 if hasattr(Trainer, "_track_num_input_tokens") else 5.1e-5


def label_logp(model, batch):
    """log p [B, T - 1] of the labels, 0 where ignored, and which are valid."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1].double()
    labels = batch["labels"][:, 1:]
    logp = torch.log_softmax(logits, -1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    return torch.where(labels != -100, logp, 0.0), labels != -100


def token_sum(weights):
    """Loss and count of an objective of detached token weights."""

    def loss(logp, ref, valid):
        weight = weights(logp.exp(), None if ref is None else ref.exp()).detach()
        return (weight * logp)[valid].sum(), int(valid.sum())

    return loss


def sequences(value):
    """Loss and count of an objective of sums of log-probs over texts (rows), and their lengths."""

    def loss(logp, ref, valid):
        present = valid.any(1)
        return value(logp.sum(1), None if ref is None else ref.sum(1), valid.sum(1))[present].sum(), int(present.sum())

    return loss


def dpo(beta):
    def loss(logp, ref, valid):
        ratio = (logp - ref).sum(1)
        rejected, preferred = ratio.chunk(2)
        return (-2 / beta * logsigmoid(beta * (preferred - rejected))).sum(), len(rejected)

    return loss


LITERAL = {
    "GA()": token_sum(lambda p, o: torch.ones_like(p)),
    "NLL()": token_sum(lambda p, o: -torch.ones_like(p)),
    "WGA(alpha=1.0)": token_sum(lambda p, o: p),
    "SatImp(beta1=5.0, beta2=1.0)": token_sum(lambda p, o: p**5 * (1 - p)),
    "SimSat(beta=5.0)": token_sum(lambda p, o: p**5),
    "SimImp(beta=5.0)": token_sum(lambda p, o: (1 - p) ** 5),
    "TNPO(beta=1.0)": token_sum(lambda p, o: 2 * p / (p + o)),
    "WTNPO(alpha=1.0, beta=1.0)": token_sum(lambda p, o: p * 2 * p / (p + o)),
    "NPO(beta=0.1)": sequences(lambda s, o, n: -2 / 0.1 * logsigmoid(-0.1 * (s - o))),
    "NPO(beta=1.0)": sequences(lambda s, o, n: -2 * logsigmoid(-(s - o))),
    "SimNPO(beta=4.5, delta=0.0)": sequences(lambda s, o, n: -2 / 4.5 * logsigmoid(4.5 * (-s / n))),
    "SimNPO(beta=1.0, delta=0.0)": sequences(lambda s, o, n: -2 * logsigmoid(-s / n)),
    "DPO(beta=0.1)": dpo(0.1),
    "DPO(beta=1.0)": dpo(1.0),
}


def literal(objective, model, batches, original=None):
    """The loss of all batches as one: the sum of their terms over one count."""
    total, count = 0.0, 0
    for batch in batches:
        logp, valid = label_logp(model, batch)
        ref = None
        if original is not None:
            with torch.no_grad():
                ref, _ = label_logp(original, batch)
        if type(objective).__name__ == "PDU":
            z = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1][valid]
            one, n = ((z.double().amax(-1) - z.double().mean(-1)) ** 2).sum(), len(z)
        else:
            one, n = LITERAL[str(objective)](logp, ref, valid)
        total, count = total + one, count + n
    return total / max(count, 1)


def gradients(model):
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


class FirstGradient(TrainerCallback):
    """The gradient that the first optimizer step of a training takes."""

    def __init__(self):
        self.found = {}

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.found = self.found or gradients(getattr(model, "module", model))


def assert_same(found, expected, tolerance=1e-4):
    """Gradients by name: the largest difference, by the largest entry of each parameter's."""
    assert found.keys() == expected.keys()
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    for name, gradient in expected.items():
        scale = max(float(gradient.abs().max()), 1e-3 * largest)
        assert float((found[name].double() - gradient.double()).abs().max()) <= tolerance * scale, name
