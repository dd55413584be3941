"""What meets gfast at its border: data, the loss from a model's own logits, and adapters."""

from __future__ import annotations

import pytest
import torch

from helpers.geffect_models import batches, tiny

DATA = dict(forget=batches(1), retain=batches(2))


def literal_nll(model, batch, **inputs) -> torch.Tensor:
    given = {key: value for key, value in batch.items() if key not in ("labels", "ref_logp")}
    logp = model(**given, **inputs).logits[:, :-1].log_softmax(-1)
    labels = batch["labels"][:, 1:]
    picked = logp.gather(2, labels.clamp(min=0)[..., None])[..., 0]
    return -torch.where(labels != -100, picked, 0.0).sum() / (labels != -100).sum()


def adapted(**options):
    peft = pytest.importorskip("peft")
    torch.manual_seed(3)
    options = dict(target_modules=["q_proj", "down_proj"], r=2, task_type="CAUSAL_LM") | options
    return peft.get_peft_model(tiny("llama"), peft.LoraConfig(**options)).eval()
