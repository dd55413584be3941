"""The objective and the risk on one forget batch in the stream engine: one forward, two backwards, the same bits."""

from __future__ import annotations

import pytest
import torch
from torch.nn.modules.module import register_module_forward_pre_hook

transformers = pytest.importorskip("transformers")

from helpers.geffect_models import batches, tiny  # noqa: E402
from test_geffect_gram_shared import MODELS, OBJECTIVES, ONE, TWO, Saved, Spoils, assert_equal, full_data, quick_models  # noqa: E402

import gfast  # noqa: E402
from gfast.geffect import backward, directions  # noqa: E402
from gfast.hidden_states import layer_hidden  # noqa: E402
from gfast.model_output import model_output  # noqa: E402
from gfast.objectives import DPO, GA, KL, NLL, NPO, RMU, TNPO, WGA, Mix, SatImp  # noqa: E402
from gfast.ops.grad_dot import dots_of_each  # noqa: E402


def forwards(model, run) -> int:
    """How often the decoder begins to run."""
    calls, decoder = [], gfast.hf.decoder(model)
    handle = register_module_forward_pre_hook(lambda module, args: calls.append(module) if module is decoder else None)
    try:
        run()
    finally:
        handle.remove()
    return len(calls)


def unshared(monkeypatch, run):
    with monkeypatch.context() as patch:
        patch.setattr(backward, "repeatable", lambda output: False)
        return run()


@pytest.mark.parametrize("own_logits", [False, True])
def test_how_many_forwards_a_measurement_takes(own_logits, monkeypatch):
    model = tiny("llama").eval()
    if own_logits:
        monkeypatch.setattr(gfast.hf, "output_layer", lambda model: None)
    layer_hidden(model, ONE["forget"][0], 2)  # once a model: is that the hidden state of transformers?
    for objective, data, expected in (
        (WGA(0.7), ONE, 2),
        (NPO(0.3), ONE, 2),
        (GA(), ONE, 2),
        (Mix(WGA(0.7), NLL()), ONE, 3),  # the directions are stored first
        (WGA(0.7), TWO, 5),  # the forget risk is complete after its last batch
        (RMU(layer=2), ONE, 3),  # one of them to a layer
        (DPO(0.3), ONE | dict(objective_batches=batches(8, rows=6, sizes=(6,))), 3),  # of a batch of its own
    ):
        assert forwards(model, lambda o=objective, d=data: gfast.g_effect(model, o, **d)) == expected, objective
    assert unshared(monkeypatch, lambda: forwards(model, lambda: gfast.g_effect(model, WGA(0.7), **ONE))) == 3


def test_several_objectives_share_the_forward_of_every_batch(monkeypatch):
    """The directions take a forward a batch, and all objectives together one more of each of theirs, but for RMU."""
    model = tiny("llama").eval()
    layer_hidden(model, ONE["forget"][0], 2)
    some = [WGA(0.7), NPO(0.3), GA(), TNPO(1.5), RMU(layer=2), SatImp(1.0, 0.5)]  # GA follows; RMU stops at its layer
    measure = lambda d, **options: gfast.g_effect(model, some, **d, **options)  # noqa: E731
    for data, batches_of_forget in ((ONE, 1), (TWO, 2)):
        expected = 3 * batches_of_forget + 1  # RMU's go to its layer
        assert forwards(model, lambda d=data: measure(d)) == expected
        alone = unshared(monkeypatch, lambda d=data: forwards(model, lambda: measure(d)))
        assert alone == expected + 3 * batches_of_forget
        assert forwards(model, lambda d=data: measure(d, norms=True)) == (expected if data is ONE else alone)


@pytest.mark.parametrize("kind", ["tied_llama", "gpt2"])
def test_several_objectives_are_what_each_is_alone(kind):
    model = tiny(kind).eval()
    some = [Mix(WGA(0.7), NLL(), alpha=0.5), WGA(0.7), NPO(0.3), RMU(layer=2), GA(), DPO(0.3), NLL()]
    own = dict(objective_batches=batches(8, rows=6, sizes=(4, 2)))
    with gfast.risk_gradients(model, **TWO) as directions:
        for norms in (False, True):
            options = dict(directions=directions, norms=norms)
            together = gfast.g_effect(model, some, **TWO, **own, **options)
            for objective, found in zip(some, together, strict=True):
                mine = own if isinstance(objective, DPO) else {}
                expected = gfast.g_effect(model, objective, **TWO, **mine, **options)
                assert_equal(found, expected)
                assert found.norms == expected.norms and found.risks == expected.risks
                assert found.errors == expected.errors and found.counts == expected.counts


def test_which_of_several_objectives_is_not_finite():
    model = tiny("llama", dtype=torch.float32).eval()
    far = [{**batch, "ref_logp": torch.full_like(batch["ref_logp"], -3e38)} for batch in TWO["forget"]]
    with pytest.raises(ValueError, match=r"NPO\(beta=0.3\) is inf on batch 0 of the forget data"):
        gfast.g_effect(model, [WGA(0.7), NPO(0.3), SatImp(1.0, 0.5)], forget=far, retain=TWO["retain"])


def test_kl_goes_alone():
    model = tiny("llama").eval()
    with torch.no_grad():
        forget = {**ONE["forget"][0], "ref_hidden": model_output(model, ONE["forget"][0]).value}
    forget["ref_head"] = model.lm_head.weight.detach().clone()
    assert forwards(model, lambda: gfast.g_effect(model, KL(), forget=forget, retain=ONE["retain"])) == 3


@quick_models
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


@pytest.mark.parametrize("objective", [GA(), WGA(0.3), [WGA(0.7), NLL()]], ids=str)
def test_gradients_that_come_in_parts_are_measured_whole(objective):
    """Re-entrant checkpointing runs a backward for every use of a module: of a shared one each adds a part."""
    model = tiny("llama").eval()
    for layer in model.model.layers[2:]:
        layer.mlp = model.model.layers[1].mlp
    options = dict(norms=True, risk=WGA(0.3), groups=lambda name: name)
    expected = gfast.g_effect(model, objective, **ONE, **options)
    shared, original = model.model.layers[1].mlp, model.model.layers[1].mlp.forward
    shared.forward = lambda x: torch.utils.checkpoint.checkpoint(original, x, use_reentrant=True)
    found = gfast.g_effect(model, objective, **ONE, **options)
    for one, other in zip(expected, found, strict=True) if isinstance(found, list) else [(expected, found)]:
        for side in ("unlearn", "retain"):
            assert getattr(other, side) == pytest.approx(getattr(one, side), rel=1e-9)
            assert other.norms[side] == pytest.approx(one.norms[side], rel=1e-9)


@pytest.mark.parametrize("data", [ONE, TWO], ids=["one batch", "two batches"])
@pytest.mark.parametrize("objective", [GA(), WGA(0.7)], ids=str)
def test_small_gradients_are_dotted_together(objective, data, monkeypatch):
    """In fewer calls, with the same bits, and never more of them waiting than a sixteenth of the largest."""
    model = tiny("llama")
    parameters = list(model.parameters())
    most = max(p.numel() * p.element_size() for p in parameters) / 16
    calls: list[int] = []

    weights = {p.data_ptr() for p in parameters}

    def counted(xs, *args):
        if xs[0].data_ptr() in weights:  # what tells them from those of another model
            return dots_of_each(xs, *args)
        assert len(xs) == 1 or sum(x.numel() * x.element_size() for x in xs) <= most
        calls.append(len(xs))
        return dots_of_each(xs, *args)

    monkeypatch.setattr(directions, "dots_of_each", counted)

    def measured():
        calls.clear()
        return gfast.g_effect(model, objective, **data, engine="stream")

    together, few = measured(), len(calls)
    monkeypatch.setattr(directions, "GATHERED", 0)
    alone = measured()
    assert together.unlearn == alone.unlearn and together.retain == alone.retain
    assert few < len(calls)
