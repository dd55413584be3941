"""The engines against each other and against the literal gradients, for every family of models."""

from __future__ import annotations

import functools

import pytest
import torch

transformers = pytest.importorskip("transformers")

from helpers.geffect_models import batches, gradient, literal_loss, small_tiles, tiny  # noqa: E402

import gfast  # noqa: E402
from gfast.geffect import ENGINES  # noqa: E402
from gfast.objectives import DPO, GA, KL, NLL, NPO, TNPO, WGA, Mix, SimNPO  # noqa: E402

LAYERS = 3
FAMILIES = "llama tied_llama qwen2 qwen3 mistral phi gemma2 gemma3 granite gpt2 gpt_neox opt mixtral".split()
OBJECTIVES = {
    "ga": GA(),
    "wga": WGA(alpha=0.7),
    "npo": NPO(beta=0.3),
    "tnpo": TNPO(beta=1.5),
}
OTHERS = [SimNPO(beta=0.5, delta=0.2), Mix(WGA(alpha=0.7), NLL(), gamma=0.6, alpha=1.7)]
# A mixture's experts see tokens in an order of their own: no rule by rows.
REFUSED = {("sample", "mixtral"), ("gram", "mixtral")}
MODELS: dict[str, torch.nn.Module] = {}


def model_of(kind: str) -> torch.nn.Module:
    if kind not in MODELS:
        MODELS[kind] = tiny(kind, LAYERS).eval()
    return MODELS[kind]


def data() -> dict:
    return dict(forget=batches(1), retain=batches(2, rows=4, sizes=(1, 3)))


@functools.cache
def gradients_of(kind: str) -> tuple[list[dict], dict[str, dict]]:
    """Both risks' literal gradients, and every objective's."""
    model, some = model_of(kind), data()
    risks = [gradient(model, literal_loss(model, some[side], "nll")) for side in ("forget", "retain")]
    return risks, {name: gradient(model, literal_loss(model, some["forget"], name)) for name in OBJECTIVES}


def close(found: dict, expected: dict, scale: float, rtol: float) -> None:
    assert list(found) == list(expected)
    for group, value in expected.items():
        assert found[group] == pytest.approx(value, rel=rtol, abs=rtol * scale), group


@pytest.mark.parametrize("engine", [*ENGINES, "gram by tiles"])
@pytest.mark.parametrize("kind", FAMILIES)
def test_every_engine_gives_the_literal_g_effect(kind, engine, monkeypatch):
    model = model_of(kind)
    some = data()
    if engine == "gram by tiles":  # as for batches with more tokens than half the hidden size
        engine = "gram"
        small_tiles(monkeypatch)
    if (engine, kind) in REFUSED:
        with pytest.raises(ValueError, match=r"cannot attribute .*(mlp|block_sparse_moe).*engine='stream'"):
            gfast.g_effect(model, WGA(), engine=engine, **some)
        return
    # these take attention's softmax or a norm in fp32 whatever the model's dtype is
    rtol = 1e-5 if kind in ("gemma2", "gemma3", "mixtral") else 1e-8
    effects = gfast.g_effect(model, list(OBJECTIVES.values()), engine=engine, **some)
    risks, owns = gradients_of(kind)
    names = gfast.geffect.assign(model)
    for own, effect in zip(owns.values(), effects, strict=True):
        for side, risk in zip(("unlearn", "retain"), risks, strict=True):
            expected = dict.fromkeys(names.names, 0.0)
            for parameter, value in own.items():
                expected[names.names[names.index[parameter]]] += float((value * risk[parameter]).sum())
            scale = sum(float((x * x).sum()) for x in own.values()) ** 0.5
            scale *= sum(float((x * x).sum()) for x in risk.values()) ** 0.5
            close(getattr(effect, side), expected, scale, rtol)


@pytest.mark.parametrize("engine", [engine for engine in ENGINES if engine != "stream"])
@pytest.mark.parametrize("groups", ["layer", lambda name: "norms" if "norm" in name else "rest"])
def test_engines_agree_on_other_objectives_and_groups(engine, groups):
    model = model_of("tied_llama")
    expected = gfast.g_effect(model, OTHERS, groups=groups, **data())
    found = gfast.g_effect(model, OTHERS, groups=groups, engine=engine, **data())
    for one, other in zip(found, expected, strict=True):
        scale = max(abs(value) for value in (*other.unlearn.values(), *other.retain.values()))
        close(one.unlearn, other.unlearn, scale, 1e-8)
        close(one.retain, other.retain, scale, 1e-8)
        assert one.counts == other.counts


@pytest.mark.parametrize("engine", [engine for engine in ENGINES if engine != "stream"])
def test_engines_agree_on_pairs_and_lora(engine):
    peft = pytest.importorskip("peft")
    pairs = batches(8, rows=6, sizes=(4, 2))
    model = model_of("llama")
    expected = gfast.g_effect(model, DPO(0.3), objective_batches=pairs, **data())
    found = gfast.g_effect(model, DPO(0.3), objective_batches=pairs, engine=engine, **data())
    close(found.unlearn, expected.unlearn, max(map(abs, expected.unlearn.values())), 1e-8)

    adapted = peft.get_peft_model(tiny("llama", LAYERS), peft.LoraConfig(r=2, target_modules="all-linear")).eval()
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
    expected = gfast.g_effect(adapted, NPO(0.3), **data())
    found = gfast.g_effect(adapted, NPO(0.3), engine=engine, **data())
    close(found.retain, expected.retain, max(map(abs, expected.retain.values())), 1e-8)


@pytest.mark.parametrize("engine", [engine for engine in ENGINES if engine != "stream"])
def test_what_an_engine_cannot_do_says_so(engine):
    model = model_of("llama")
    with pytest.raises(ValueError, match="only the stream engine can measure the objective's norm"):
        gfast.g_effect(model, WGA(), engine=engine, norms=True, **data())
    hidden = [batch | {"ref_hidden": torch.zeros(*batch["labels"].shape, 16), "ref_head": torch.zeros(61, 16)}
              for batch in data()["retain"]]  # fmt: skip
    with pytest.raises(ValueError, match="KL.*stream"):
        gfast.g_effect(model, Mix(WGA(), KL()), engine=engine, forget=data()["forget"], retain=hidden)
