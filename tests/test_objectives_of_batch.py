"""BalDRO, which weighs the texts of a batch against each other: what a batch is, where there are several."""

import logging

import pytest
import torch
from helpers.small_models import batch_of, gradients, tiny
from helpers.training_tiny import config, pairing, tiny_model

import gfast
from gfast.objectives import GA, NLL, BalDRO, BalDROG, Mix

OBJECTIVES = [BalDRO(1.0, 0.7), BalDRO(1.0, -0.7), BalDROG(1.0, 0.5)]


def with_reference(model, batch, seed):
    noise = torch.randn(batch["labels"].shape, generator=torch.Generator().manual_seed(seed))
    return {**batch, "ref_logp": gfast.model_logp(model, batch).detach() + 0.5 * noise}


def weights_by_hand(objective, logp, ref, labels):
    """The derivative of the batch's loss by each text's log-prob."""
    valid = labels != -100
    total, origin = ((x.double() * valid).sum(1) for x in (logp, ref))
    total.requires_grad_()
    value = 2 / objective.beta * torch.log1p(torch.exp(objective.beta * (total - origin)))
    if isinstance(objective, BalDRO):
        loss = -objective.tau * torch.log(torch.exp(-value / objective.tau).mean())
    else:
        known = total.detach() / valid.sum(1)
        loss = value[known.argsort(descending=True)[: max(1, int(len(total) * objective.share))]].mean()
    return torch.autograd.grad(loss, total)[0]


@pytest.mark.parametrize("engine", ["stream", "sample", "token", "gram"])
@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
def test_effects_take_one_batch(objective, engine):
    model = tiny("llama")
    forget, retain = [with_reference(model, batch_of(seed), seed) for seed in (0, 1)], batch_of(seed=5)
    found = gfast.g_effect(model, objective, forget=forget[0], retain=retain, engine=engine)
    labels = torch.nn.functional.pad(forget[0]["labels"][:, 1:], (1, 0), value=-100)
    logp = gfast.model_logp(model, forget[0])
    weight = weights_by_hand(objective, logp.detach(), forget[0]["ref_logp"], labels)
    own = gradients(model, (weight * logp.sum(1)).sum())
    risk = gradients(model, gfast.model_loss(model, retain, NLL()).loss)
    expected = sum(float((a * b).sum()) for a, b in zip(own, risk, strict=True))
    assert found.total("retain") == pytest.approx(expected, rel=1e-4, abs=1e-8)
    for one in (objective, Mix(objective, NLL())):
        with pytest.raises(ValueError, match=r"BalDROG?\(.*weighs the sequences .*forget data is cut into 2 batches"):
            gfast.g_effect(model, one, forget=forget, retain=retain, engine="stream")
    assert gfast.g_effect(model, GA(), forget=forget, retain=retain, engine=engine).total("unlearn") < 0


@pytest.mark.parametrize("rows, steps, said", [(2, 1, False), (2, 3, True), (1, 1, True)])
def test_training_says_that_its_batches_are_micro_batches(tmp_path, caplog, rows, steps, said):
    options = dict(per_device_train_batch_size=rows, gradient_accumulation_steps=steps)
    for objective in (BalDRO(), NLL()):
        caplog.clear()
        data, collate = pairing()
        with caplog.at_level(logging.WARNING, "gfast"):
            arguments = dict(objective=Mix(objective, NLL()), train_dataset=data, data_collator=collate)
            gfast.UnlearnTrainer(tiny_model(), config(tmp_path, **options), **arguments)
        warned = [line for line in caplog.messages if f"a step has {steps} of {rows} rows" in line]
        assert len(warned) == (said and objective == BalDRO())
