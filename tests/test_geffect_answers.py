"""A model that answers otherwise from call to call has no effect: said where a pass shows it."""

from __future__ import annotations

import functools

import pytest
import torch
from helpers.training_tiny import collator, datasets, tiny_model

import gfast
from gfast.geffect import retain_conflict
from gfast.objectives import GA, WGA


def batches(data, count):
    return [collator()([data[2 * at], data[2 * at + 1]]) for at in range(count)]


def steered(kind: str):
    """A model, a vector of whose first block's output is added by a flag that a hook turns, a counter, or chance."""
    model, state = tiny_model().eval(), {"calls": 0}
    vector = torch.randn(16, generator=torch.Generator().manual_seed(0))

    def hook(module, args, out):
        state["calls"] += 1
        if kind == "flag":
            return out + vector * (state["calls"] % 2)
        if kind == "counter":
            return out + vector * 0.1 * state["calls"]
        return torch.nn.functional.dropout(out, 0.2, training=True)

    model.model.layers[0].mlp.register_forward_hook(hook)
    return model


MEASURES = {
    **{
        engine: functools.partial(gfast.g_effect, objective=[GA(), WGA(2.0)], engine=engine)
        for engine in ("stream", "sample", "token", "gram")
    },
    "pg_effect": gfast.pg_effect,
    "token_effect": gfast.token_effect,
    "retain_conflict": functools.partial(retain_conflict, tau=1.0),
}


@pytest.mark.parametrize("kind", ["flag", "counter", "dropout"])
@pytest.mark.parametrize("measure", MEASURES)
def test_what_changes_from_call_to_call_is_said(measure, kind):
    model = steered(kind)
    before = [parameter.requires_grad for parameter in model.parameters()]
    forget, retain = batches(datasets()[0], 2), batches(datasets()[1], 1)  # an odd number of calls
    with pytest.raises(ValueError, match="from call to call"):
        MEASURES[measure](model=model, forget=forget, retain=retain)
    assert [parameter.requires_grad for parameter in model.parameters()] == before


@pytest.mark.parametrize("measure", MEASURES)
def test_a_flag_that_stays_as_it_is_for_the_measurement(measure):
    """On for all calls: the model that answers is the one that is measured."""
    model, flag = tiny_model().eval(), {"on": True}
    vector = torch.randn(16, generator=torch.Generator().manual_seed(0))
    model.model.layers[0].mlp.register_forward_hook(lambda module, args, out: out + vector if flag["on"] else out)
    forget, retain = batches(datasets()[0], 2), batches(datasets()[1], 1)
    MEASURES[measure](model=model, forget=forget, retain=retain)
