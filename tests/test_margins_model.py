"""ETW, PDU, MASC and TPO over a model: the losses, their effects by hand, and who refuses them by name."""

import pytest
import torch
from helpers.small_models import batch_of, gradients, tiny
from test_token_stats import plain_loss

import gfast
from gfast.model_output import shifted
from gfast.objectives import BST, ETW, MASC, NLL, PDU, TPO, Mix

OBJECTIVES = [ETW(), PDU(), MASC(k=2, rho=0.2, eta=2.0), TPO(floor=2.0), BST(top_k=3)]


def by_hand(model, batch, objective):
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return plain_loss(logits, shifted(batch["labels"]), objective)[0]


@pytest.mark.parametrize("kind", ["llama", "gemma2", "gptj_like"])
@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
def test_model_loss(kind, objective):
    model, batch = tiny(kind), batch_of()
    out, truth = gfast.model_loss(model, batch, objective), by_hand(model, batch, objective)
    torch.testing.assert_close(out.loss, truth, rtol=1e-9, atol=1e-12)
    for ours, exact in zip(gradients(model, out.loss), gradients(model, truth), strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-8, atol=1e-11)
    each = gfast.model_loss(model, batch, objective, reduction="none").loss
    assert each.shape == batch["labels"].shape and (each[:, 0] == 0).all()
    count = 4 if isinstance(objective, TPO) else (shifted(batch["labels"]) != -100).sum()
    torch.testing.assert_close(each.sum() / count, truth, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
def test_the_effect_by_stream_is_that_of_two_gradients(objective):
    model, forget, retain = tiny("llama"), batch_of(), batch_of(seed=1)
    mix = Mix(objective, NLL(), alpha=0.5)
    effect = gfast.g_effect(model, mix, forget=forget, retain=retain, direction_dtype=torch.float64)
    loss = by_hand(model, forget, objective) + 0.5 * gfast.model_loss(model, retain, NLL()).loss
    own = gradients(model, loss)
    for side, batch in (("unlearn", forget), ("retain", retain)):
        risk = gradients(model, gfast.model_loss(model, batch, NLL()).loss)
        dot = sum((a.double() * b.double()).sum() for a, b in zip(own, risk, strict=True))
        assert effect.total(side) == pytest.approx(float(dot), rel=1e-6)


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
@pytest.mark.parametrize("engine", ["sample", "gram"])
def test_weights_by_entropy_in_the_engines_by_rows(engine, kind):
    model, retain = tiny(kind), batch_of(seed=1)
    forget = batch_of()
    forget["weight"] = torch.rand(forget["labels"].shape, generator=torch.Generator().manual_seed(3))
    options = dict(forget=forget, retain=retain)
    truth = gfast.g_effect(model, ETW(), direction_dtype=torch.float64, **options)
    found = gfast.g_effect(model, ETW(), engine=engine, **options)
    for side in ("unlearn", "retain"):
        assert found.total(side) == pytest.approx(truth.total(side), rel=1e-5)


@pytest.mark.parametrize("engine", ["sample", "token", "gram"])
def test_engines_of_token_weights_refuse_by_name(engine):
    refused = [(one, "no token weights") for one in OBJECTIVES[1:]]
    refused += [(ETW(), "weights by entropy")] * (engine == "token")
    for objective, why in refused:
        with pytest.raises(ValueError, match=f"{type(objective).__name__}.*{why}.*{engine} engine.*engine='stream'"):
            gfast.g_effect(tiny("llama"), objective, forget=batch_of(), retain=batch_of(seed=1), engine=engine)
