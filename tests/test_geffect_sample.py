"""pg_effect and the sample engine against autograd on the literal formulas, parameter by parameter."""

from __future__ import annotations

import copy

import pytest
import torch

pytest.importorskip("transformers")

from helpers.geffect_models import batches, gradient, literal_loss, logps, tiny  # noqa: E402
from helpers.geffect_samples import (  # noqa: E402
    KINDS,
    assert_samples,
    data,
    each,
    lengths,
    literal_samples,
    lora_model,
    measured,
    shift,
    square,
)

import gfast  # noqa: E402
from gfast.geffect import pg_effect  # noqa: E402
from gfast.geffect.data import Term  # noqa: E402
from gfast.geffect.engines.sample import objective_dots  # noqa: E402
from gfast.objectives import GA, KL, NLL, NPO, RMU, TNPO, WGA, SimNPO  # noqa: E402


@pytest.mark.parametrize("kind", KINDS)
def test_matches_autograd_in_fp64(kind):
    model = tiny(kind).eval()
    effect = pg_effect(model, groups=each, **data())
    risks = [gradient(model, literal_loss(model, data()[key], "nll")) for key in ("forget", "retain")]
    own = literal_samples(model, data()["forget"])
    # transformers take some attention softmaxes in fp32, which autograd of one row and of a batch round differently
    assert_samples(effect, own, risks, 1e-5 if kind in ("gemma2", "opt", "phi") else 1e-9)
    valid = [logps(model, batch) for batch in data()["forget"]]
    torch.testing.assert_close(effect.logp, torch.cat([logp.sum(1) for logp, _, _ in valid]), rtol=1e-6, atol=0)
    torch.testing.assert_close(effect.ref_logp, torch.cat([ref.sum(1) for _, ref, _ in valid]), rtol=1e-6, atol=0)
    assert effect.tokens.tolist() == torch.cat([v.sum(1) for _, _, v in valid]).tolist()
    paper = pg_effect(model, **data())
    assert paper.groups == gfast.geffect.assign(model).names
    torch.testing.assert_close(paper.total("retain"), effect.total("retain"), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt"])
def test_left_padding_changes_nothing(kind):
    model = tiny(kind).eval()
    right = data()["forget"]
    for batch in right:  # nothing scores the first token; after padding on the left, a padding position would
        batch["labels"][:, 0] = -100
    left = [
        {key: torch.stack([shift(v, n) for v, n in zip(batch[key], lengths(batch), strict=True)]) for key in batch}
        for batch in right
    ]
    for batch in left:  # rotary and learned positions count from the first real token
        batch["position_ids"] = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    expected = pg_effect(model, groups=each, forget=right, retain=data()["retain"])
    found = pg_effect(model, groups=each, forget=left, retain=data()["retain"])
    for group in expected.groups:
        torch.testing.assert_close(found.unlearn[group], expected.unlearn[group], rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(found.retain[group], expected.retain[group], rtol=1e-6, atol=1e-9)


def test_does_not_depend_on_batches_or_padding_and_repeats_bit_for_bit():
    model = tiny("gpt2").eval()
    whole = pg_effect(model, forget=batches(1, sizes=(5,)), retain=data()["retain"])
    again = pg_effect(model, forget=batches(1, sizes=(5,)), retain=data()["retain"])
    split = pg_effect(model, forget=batches(1, sizes=(1, 2, 1, 1)), retain=data()["retain"])
    for group in whole.groups:
        assert torch.equal(whole.unlearn[group], again.unlearn[group])
        torch.testing.assert_close(split.unlearn[group], whole.unlearn[group], rtol=1e-9, atol=1e-12)


def test_rows_without_labels_have_no_effect():
    model = tiny("llama").eval()
    forget = batches(1, sizes=(5,))
    forget[0]["labels"][1] = -100
    empty = {key: torch.full_like(value, -100) if key == "labels" else value for key, value in forget[0].items()}
    effect = pg_effect(model, forget=[empty, *forget], retain=data()["retain"])
    assert effect.tokens[:5].tolist() == [0] * 5 and effect.tokens[6] == 0 and effect.logp[6] == 0
    total = effect.total("retain")
    assert (total[:5] == 0).all() and total[6] == 0 and (total[[5, 7, 8, 9]] != 0).all()


def test_samples_add_up_to_g_effect():
    model = tiny("tied_llama").eval()
    samples = pg_effect(model, **data())
    ga = gfast.g_effect(model, GA(), **data())
    for group, value in ga.retain.items():
        assert float(samples.retain[group].sum()) / ga.counts["unlearn"] == pytest.approx(value, rel=1e-9)


@pytest.mark.parametrize("kind", ["tied_llama", "gpt2"])
def test_one_measurement_gives_objectives_with_a_weight_a_sample(kind):
    model, some = tiny(kind).eval(), data()
    some["forget"][0]["labels"][1] = -100  # a row without labels
    for batch in some["forget"]:
        batch["ref_logp"] = batch["ref_logp"].double()
    objectives = [GA(), NPO(0.3), SimNPO(beta=0.5, delta=0.2)]
    directions = gfast.risk_gradients(model, dtype=torch.float64, **some)
    samples, tokens = (f(model, directions=directions, **some) for f in (pg_effect, gfast.token_effect))
    expected = gfast.g_effect(model, objectives, directions=directions, **some)
    for objective, whole in zip(objectives, expected, strict=True):
        found = samples.g_effect(objective)
        others = [whole, tokens.g_effect(objective), tokens.samples().g_effect(objective)]
        for other in others:
            assert found.counts == other.counts and found.groups == other.groups
            for side in ("unlearn", "retain"):
                scale = max(map(abs, getattr(other, side).values()))
                assert getattr(found, side) == pytest.approx(getattr(other, side), rel=1e-9, abs=1e-10 * scale)
        for other in others[1:]:
            for side in ("unlearn", "retain"):
                assert found.errors[side] == pytest.approx(other.errors[side], rel=1e-8)


@pytest.mark.parametrize(
    "objective", [GA(), WGA(0.7), TNPO(1.5), NPO(0.3), SimNPO(), NLL()], ids=lambda objective: objective.key
)
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_objectives_as_the_stream_engine_measures_them(kind, objective):
    model = tiny(kind).eval()
    expected = gfast.g_effect(model, objective, directions=gfast.risk_gradients(model, **data()), **data())
    request = measured(model, [Term(objective, "forget")])
    with request.directions() as directions:
        (dots,) = objective_dots(request, directions, [Term(objective, "forget")])
    for index, group in enumerate(expected.groups):
        # ref_logp and with it some weights are fp32 in the stream engine
        assert dots[index, 0].item() == pytest.approx(expected.unlearn[group], rel=1e-6, abs=1e-9)
        assert dots[index, 1].item() == pytest.approx(expected.retain[group], rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("objective", [KL(), RMU(layer=1)], ids=lambda objective: objective.key)
def test_objectives_without_token_weights_are_refused(objective):
    request = measured(tiny("llama"))
    with request.directions() as directions, pytest.raises(ValueError, match="no token weights.*engine='stream'"):
        objective_dots(request, directions, [Term(objective, "forget")])


def test_frozen_parts():
    model = tiny("gpt2").eval()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("h.2" in name or name.endswith(("h.1.mlp.c_fc.bias", "h.3.ln_1.weight")))
    effect = pg_effect(model, groups=each, **data())
    assert len(effect.groups) == 14
    risks = [gradient(model, literal_loss(model, data()[key], "nll")) for key in ("forget", "retain")]
    assert_samples(effect, literal_samples(model, data()["forget"]), risks)


def test_only_the_head_is_trainable():
    model = tiny("llama").eval().requires_grad_(False)
    model.lm_head.weight.requires_grad_(True)
    effect = pg_effect(model, groups=each, **data())
    risks = [gradient(model, literal_loss(model, data()[key], "nll")) for key in ("forget", "retain")]
    assert_samples(effect, literal_samples(model, data()["forget"]), risks)


def test_a_head_that_hf_does_not_know_goes_through_the_models_own_logits(monkeypatch):
    model = tiny("tied_llama").eval()
    expected = pg_effect(model, groups=each, **data())
    monkeypatch.setattr(gfast.hf, "output_layer", lambda model: None)
    found = pg_effect(model, groups=each, **data())
    for side in ("unlearn", "retain"):
        for group, values in getattr(expected, side).items():
            torch.testing.assert_close(getattr(found, side)[group], values, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_lora(kind):
    model = lora_model(kind)
    effect = pg_effect(model, groups=each, **data())
    risks = [gradient(model, literal_loss(model, data()[key], "nll")) for key in ("forget", "retain")]
    assert_samples(effect, literal_samples(model, data()["forget"]), risks)


def test_mixtral_with_frozen_experts_is_measured():
    model = tiny("mixtral").eval()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("mlp" not in name and "block_sparse_moe" not in name)
    effect = pg_effect(model, groups=each, **data())
    risks = [gradient(model, literal_loss(model, data()[key], "nll")) for key in ("forget", "retain")]
    assert_samples(effect, literal_samples(model, data()["forget"]), risks, 1e-5)  # the router's softmax is fp32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_is_as_good_as_plain_autograd(dtype):
    """The law: at most twice the error of autograd in the same dtype, and a rounding; in norms over all parameters."""
    low = tiny("tied_llama").to(dtype).eval()
    exact = copy.deepcopy(low).double()
    forget, retain = data()["forget"], data()["retain"]
    risk64 = gradient(exact, literal_loss(exact, forget, "nll"))
    truth = [float(sum((g[n] * risk64[n]).sum() for n in g)) for g in literal_samples(exact, forget)]
    own64 = literal_samples(exact, forget)
    plain_risk = gradient(low, literal_loss(low, forget, "nll"))
    plain = [
        float(sum((g[n].double() * plain_risk[n].double()).sum() for n in g)) for g in literal_samples(low, forget)
    ]
    scales = [(square(g) * square(risk64)) ** 0.5 for g in own64]
    effect = pg_effect(low, direction_dtype=dtype, forget=forget, retain=retain).total("unlearn").tolist()
    error = max(abs(a - b) / s for a, b, s in zip(effect, truth, scales, strict=True))
    allowed = max(abs(a - b) / s for a, b, s in zip(plain, truth, scales, strict=True))
    assert error <= 2 * allowed + torch.finfo(dtype).eps


def test_autocast():
    model = tiny("llama", dtype=torch.float32).eval()
    expected = pg_effect(model, **data()).total("unlearn")
    with torch.autocast("cpu", torch.bfloat16):
        found = pg_effect(model, **data()).total("unlearn")
    assert not torch.equal(found, expected)
    torch.testing.assert_close(found, expected, rtol=0.1, atol=0.1 * float(expected.abs().max()))


def test_padding_row_of_an_embedding_has_no_gradient():
    model = tiny("llama").eval()
    model.model.embed_tokens.padding_idx = 5
    forget = data()["forget"]
    forget[0]["input_ids"][0, 1:3] = 5
    retain = data()["retain"]
    effect = pg_effect(model, groups=each, forget=forget, retain=retain)
    risks = [gradient(model, literal_loss(model, part, "nll")) for part in (forget, retain)]
    assert risks[0]["model.embed_tokens.weight"][5].abs().max() == 0
    assert_samples(effect, literal_samples(model, forget), risks)
    model.model.embed_tokens.scale_grad_by_freq = True
    with pytest.raises(ValueError, match="scale_grad_by_freq"):
        pg_effect(model, forget=forget, retain=retain)
