"""Directions: measured once, kept on the device, in host memory or in a file, and refused where they do not belong."""

from __future__ import annotations

import copy
import json
import math
from functools import partial

import pytest
import torch

transformers = pytest.importorskip("transformers")

from helpers.geffect_models import batches, gradient, literal_loss, tiny  # noqa: E402
from test_geffect import count_losses  # noqa: E402

import gfast  # noqa: E402
from gfast.files import read_json  # noqa: E402
from gfast.geffect import Directions, backward  # noqa: E402
from gfast.geffect.storage import HostStore  # noqa: E402
from gfast.objectives import GA, NLL, NPO, WGA, Mix, SimNPO  # noqa: E402

OBJECTIVES = [GA(), WGA(0.7), NPO(0.3), Mix(WGA(0.7), NLL(), gamma=0.6)]


def one_token_changed(batch: dict) -> dict:
    ids = batch["input_ids"].clone()
    ids[0, 1] += 1
    return batch | {"input_ids": ids}


def data() -> dict:
    return dict(forget=batches(1), retain=batches(2))


@pytest.mark.parametrize("storage", ["device", "host", "folder"])
@pytest.mark.parametrize("sizes", [(5,), (2, 3)])
def test_they_are_the_gradients_of_the_risk_wherever_they_lie(tmp_path, storage, sizes):
    model = tiny("tied_llama").eval()
    some = dict(forget=batches(1, sizes=sizes), retain=batches(2, sizes=sizes))
    where = tmp_path / "directions" if storage == "folder" else storage
    with gfast.risk_gradients(model, **some, dtype=torch.float64, storage=where) as directions:
        for side, name in enumerate(("forget", "retain")):
            expected = gradient(model, literal_loss(model, some[name], "nll"))
            assert list(expected) == directions.names
            for key, value in expected.items():
                torch.testing.assert_close(directions.get(side, key), value, rtol=1e-9, atol=1e-12)
        norm = sum((value * value).sum() for value in expected.values())
        assert math.hypot(*directions.norms()["retain"].values()) == pytest.approx(math.sqrt(norm))


@pytest.mark.parametrize("storage", ["host", "folder"])
def test_effects_do_not_depend_on_where_directions_lie(tmp_path, storage):
    model = tiny("gpt2").eval()
    where = tmp_path / "directions" if storage == "folder" else storage
    expected = gfast.g_effect(model, OBJECTIVES, **data())
    assert gfast.g_effect(model, OBJECTIVES, direction_storage=where, **data()) == expected
    single = dict(forget=batches(1, sizes=(5,)), retain=batches(2, sizes=(5,)))
    expected = gfast.g_effect(model, OBJECTIVES, **single)
    assert gfast.g_effect(model, OBJECTIVES, direction_storage=where, **single) == expected


def test_measured_once_they_serve_any_number_of_effects(monkeypatch, tmp_path):
    model = tiny("llama").eval()
    expected = gfast.g_effect(model, OBJECTIVES, **data())
    directions = gfast.risk_gradients(model, **data())
    saved = Directions.load(directions.save(tmp_path / "saved"))
    calls = count_losses(monkeypatch)
    assert gfast.g_effect(model, OBJECTIVES, directions=directions, **data()) == expected
    assert gfast.g_effect(model, OBJECTIVES, directions=saved, **data()) == expected
    assert calls == 4 * ["WGA(alpha=0.7)", "NPO(beta=0.3)"]  # of two batches, each batch's after the other
    assert gfast.g_effect(model, GA(), directions=directions, **data()) == expected[0]


def test_a_folder_given_as_storage_can_be_opened_again(tmp_path):
    model = tiny("llama", dtype=torch.float32).eval()
    gfast.risk_gradients(model, **data(), dtype=torch.bfloat16, storage=tmp_path / "d").close()
    assert sorted(path.name for path in (tmp_path / "d").iterdir()) == [
        "directions.json",
        "retain.safetensors",
        "unlearn.safetensors",
    ]
    opened = Directions.load(tmp_path / "d")
    assert opened.get(0, "lm_head.weight").dtype == torch.bfloat16
    expected = gfast.g_effect(model, WGA(), direction_dtype=torch.bfloat16, **data())
    assert gfast.g_effect(model, WGA(), directions=opened, **data()) == expected


def changed(model):
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.mul_(1.01)
    return model


def stepped(model):
    """After one step of a size as in fine-tuning."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1e-5 * torch.randn_like(parameter).sign())
    return model


@pytest.mark.parametrize(
    ("other", "options", "message"),
    [
        (lambda model: changed(copy.deepcopy(model)), {}, "1 of .* have changed, first 'model.layers.1.mlp.up_proj"),
        (stepped, {}, "measured at other weights"),
        (lambda model: tiny("gpt2").eval(), {}, "another model or grouping .parameter '"),
        (lambda model: model, dict(groups="layer"), "the groups differ"),
        (lambda model: model, dict(risk=SimNPO(0.5, 0.2)), "of the risk NLL"),
        (lambda model: model, dict(forget=batches(5)), "measured on other data"),
        (lambda model: model, dict(retain=[one_token_changed(b) for b in batches(2)]), "other retain data: .* tokens"),
    ],
)
def test_directions_of_something_else_are_refused(monkeypatch, other, options, message):
    model = tiny("llama").eval()
    directions = gfast.risk_gradients(model, **data())
    monkeypatch.setattr(backward, "model_loss", None)  # before any work
    with pytest.raises(ValueError, match=message):
        gfast.g_effect(other(model), WGA(), directions=directions, **(data() | options))


def test_directions_of_other_frozen_weights_are_refused(tmp_path):
    """As of the adapters of one base, put on another."""
    model = tiny("llama").eval()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("q_proj" in name)
    directions = gfast.risk_gradients(model, **data())
    saved = Directions.load(directions.save(tmp_path / "saved"))
    expected = gfast.g_effect(model, WGA(), **data())
    for one in (directions, saved):
        assert gfast.g_effect(model, WGA(), directions=one, **data()).retain == pytest.approx(expected.retain, rel=1e-9)
        other = changed(copy.deepcopy(model))
        with pytest.raises(ValueError, match="1 of 35 frozen parameters have changed, first 'model.layers.1.mlp.up_pr"):
            gfast.g_effect(other, WGA(), directions=one, **data())
        other.lm_head.bias = torch.nn.Parameter(torch.zeros(61, dtype=torch.float64), requires_grad=False)
        with pytest.raises(ValueError, match="2 of 36 frozen parameters have changed"):
            gfast.g_effect(other, WGA(), directions=one, **data())


def test_data_is_known_again_in_another_order_batched_and_padded_otherwise():
    model = tiny("llama").eval()
    sets = dict(forget=batches(1, sizes=(5,)), retain=batches(2, sizes=(5,)))
    directions = gfast.risk_gradients(model, **sets)
    expected = gfast.g_effect(model, WGA(), directions=directions, **sets)

    def otherwise(batch: dict) -> list[dict]:
        padding = {"input_ids": 0, "attention_mask": 0, "labels": -100}
        wide = {key: torch.nn.functional.pad(batch[key], (0, 3), value=fill) for key, fill in padding.items()}
        order = torch.tensor([3, 0, 4, 1, 2])
        return [{key: value[rows] for key, value in wide.items()} for rows in order.split(2)]

    other = {source: otherwise(sets[source][0]) for source in sets}
    found = gfast.g_effect(model, WGA(), directions=directions, **other)
    assert found.total("retain") == pytest.approx(expected.total("retain"), rel=1e-6)
    unmasked = [{key: batch[key] for key in ("input_ids", "labels")} for batch in otherwise(sets["forget"][0])]
    gfast.g_effect(model, WGA(), directions=directions, **(other | {"forget": unmasked}))


def test_damaged_folders_are_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no directions"):
        Directions.load(tmp_path)
    folder = gfast.risk_gradients(tiny("llama").eval(), **data()).save(tmp_path / "d")
    whole = (folder / "retain.safetensors").read_bytes()
    (folder / "retain.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="retain.safetensors is damaged: .*measure the directions again"):
        Directions.load(folder)
    (folder / "retain.safetensors").write_bytes(whole)
    text = read_json(folder / "directions.json")
    (folder / "directions.json").write_text(json.dumps(text | {"format": "other"}))
    with pytest.raises(ValueError, match="format is 'other'"):
        Directions.load(folder)


def test_host_directions_are_copied_one_ahead_in_the_order_of_the_last_pass(monkeypatch):
    """The order of copies, with a stand-in for the device: what follows is on its way before it is asked for."""
    store = HostStore(3, torch.float32, torch.device("cpu"))
    store.kept = [torch.full((2,), float(i)) for i in range(3)]
    copies = []
    monkeypatch.setattr(HostStore, "_copy", lambda self, i: copies.append(i) or self.kept[i].clone())
    stream = type("Stream", (), {"wait_stream": lambda self, other: None})()
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda self, stream: None)
    store.device = torch.device("cuda")
    for order in ((2, 0, 1), (2, 0, 1), (2, 1, 0)):
        for index in order:
            assert torch.equal(store.get(index), store.kept[index])
    # first pass: each when asked for; second: each one step before; third: one guess was wrong
    assert copies[:3] == [2, 0, 1]
    assert copies[3:6] == [2, 0, 1]
    assert len(copies) <= 12


def test_standard_errors_and_counts_over_batches():
    model = tiny("llama").eval()
    forget = batches(1, rows=6, sizes=(2, 1, 3))
    effects = gfast.g_effect(model, OBJECTIVES, forget=forget, retain=batches(2))
    ga, wga, npo, mix = effects
    assert ga.errors == {} and mix.errors == {}
    risk = gradient(model, literal_loss(model, batches(2), "nll"))
    tokens = [int((batch["labels"][:, 1:] != -100).sum()) for batch in forget]
    parts = []
    for batch, count in zip(forget, tokens, strict=True):
        own = gradient(model, literal_loss(model, [batch], "wga"))
        parts.append(sum(float((own[n] * risk[n]).sum()) for n in own) * count / sum(tokens))
    whole = sum(parts)
    assert wga.total("retain") == pytest.approx(whole, rel=1e-9)
    residuals = [part - whole * count / sum(tokens) for part, count in zip(parts, tokens, strict=True)]
    expected = math.sqrt(3 / 2 * sum(r * r for r in residuals))
    assert wga.standard_error("retain") == pytest.approx(expected, rel=1e-9)
    assert npo.standard_error("unlearn", "deep") > 0
    assert wga.counts["objective"] == wga.counts["objective_tokens"] == sum(tokens) and npo.counts["objective"] == 6
    assert npo.per_token("retain") == pytest.approx(npo.total("retain") * 6 / sum(tokens))
    assert "objective" not in mix.counts
    rows = {(row["quantity"], row["side"], row["group"]): row["value"] for row in wga.rows()}
    assert rows["standard_error", "retain", "total"] == wga.standard_error("retain")


def test_how_to_keep_directions_is_not_said_of_those_that_are_given():
    model = tiny("llama")
    directions = gfast.risk_gradients(model, **data())
    for options in (dict(direction_dtype=torch.bfloat16), dict(direction_storage="host")):
        for measure in (partial(gfast.g_effect, model, GA()), partial(gfast.pg_effect, model)):
            with pytest.raises(ValueError, match="say how directions are kept that are measured now"):
                measure(directions=directions, **options, **data())
