"""The objective and the risk on one forget batch in the stream engine: one forward, two backwards, the same bits."""

from __future__ import annotations

import pytest
import torch

transformers = pytest.importorskip("transformers")

from geffect_models import batches, tiny  # noqa: E402
from test_geffect_gram_shared import MODELS, OBJECTIVES, ONE, TWO, Saved, Spoils, assert_equal, full_data  # noqa: E402

import gfast  # noqa: E402
from gfast.geffect import passes  # noqa: E402
from gfast.objectives import DPO, GA, KL, NLL, NPO, RMU, WGA, Mix  # noqa: E402


def forwards(model, run) -> int:
    """How often the decoder runs."""
    calls: list[None] = []
    handle = gfast.hf.decoder(model).register_forward_hook(lambda *args: calls.append(None))
    try:
        run()
    finally:
        handle.remove()
    return len(calls)


def unshared(monkeypatch, run):
    with monkeypatch.context() as patch:
        patch.setattr(passes, "repeatable", lambda output: False)
        return run()


@pytest.mark.parametrize("own_logits", [False, True])
def test_how_many_forwards_a_measurement_takes(own_logits, monkeypatch):
    model = tiny("llama").eval()
    if own_logits:
        monkeypatch.setattr(gfast.hf, "head", lambda model, **options: None)
    for objective, data, expected in (
        (WGA(0.7), ONE, 2),
        (NPO(0.3), ONE, 2),
        (GA(), ONE, 2),
        (Mix(WGA(0.7), NLL()), ONE, 3),  # the directions are stored first
        (WGA(0.7), TWO, 5),  # the forget risk is complete after its last batch
        (RMU(layer=2), ONE, 2),  # and one to a layer, which is no call of the decoder
        (DPO(0.3), ONE | dict(objective_batches=batches(8, rows=6, sizes=(6,))), 3),  # of a batch of its own
    ):
        assert forwards(model, lambda o=objective, d=data: gfast.g_effect(model, o, **d)) == expected, objective
    assert unshared(monkeypatch, lambda: forwards(model, lambda: gfast.g_effect(model, WGA(0.7), **ONE))) == 3


def test_kl_goes_alone():
    model = tiny("llama").eval()
    with torch.no_grad():
        forget = {**ONE["forget"][0], "ref_hidden": gfast.hf.final_hidden(model, ONE["forget"][0])}
    forget["ref_head"] = model.lm_head.weight.detach().clone()
    assert forwards(model, lambda: gfast.g_effect(model, KL(), forget=forget, retain=ONE["retain"])) == 3


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_a_shared_forward_changes_no_bit(make, monkeypatch):
    model = make()
    data = full_data() | dict(retain=full_data()["retain"][:1])
    for some in (data, ONE):
        for objective in OBJECTIVES.values():
            run = lambda o=objective, d=some: gfast.g_effect(model, o, **d)  # noqa: E731
            found, expected = run(), unshared(monkeypatch, run)
            assert_equal(found, expected)
            assert found.norms == expected.norms and found.risks == expected.risks


def test_a_batch_without_labels():
    model = tiny("llama").eval()
    empty = {**ONE["forget"][0], "labels": torch.full_like(ONE["forget"][0]["labels"], -100)}
    found = gfast.g_effect(model, WGA(0.7), forget=empty, retain=ONE["retain"])
    assert not any(found.unlearn.values()) and not any(found.retain.values())
    assert found.norms["retain"]["deep"] > 0


def test_functions_that_overwrite_what_they_saved_are_run_forward_again():
    model = tiny("llama").eval()
    expected = gfast.g_effect(model, WGA(0.7), **ONE)
    for layer in model.model.layers:
        mlp = layer.mlp
        mlp.forward = lambda x, mlp=mlp: mlp.down_proj(Spoils.apply(mlp.gate_proj(x), mlp.up_proj(x)))
    assert forwards(model, lambda: gfast.g_effect(model, WGA(0.7), **ONE)) == 3
    found = gfast.g_effect(model, WGA(0.7), **ONE)
    assert found.unlearn == pytest.approx(expected.unlearn, rel=1e-8, abs=1e-10)
    assert found.retain == pytest.approx(expected.retain, rel=1e-8, abs=1e-10)


def test_the_graph_is_gone_before_the_next_batch():
    model = tiny("llama").eval()
    alive: list[int] = []
    with Saved() as saved:
        gfast.hf.decoder(model).register_forward_pre_hook(lambda *args: alive.append(len(saved.alive)))
        gfast.g_effect(model, WGA(0.7), **ONE)
    assert alive == [0, 0]
