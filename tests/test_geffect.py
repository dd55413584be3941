"""g_effect against autograd on the literal formulas, group by group, and the identities it must satisfy."""

from __future__ import annotations

import functools
import math

import pytest
import torch

transformers = pytest.importorskip("transformers")

from helpers.geffect_models import batches, collate, dots, exact_norms, gradient, literal_loss, tiny  # noqa: E402

import gfast  # noqa: E402
from gfast.geffect import GEffect, assign  # noqa: E402
from gfast.model_output import model_output  # noqa: E402
from gfast.objectives import GA, KL, NLL, NPO, RMU, TNPO, WGA, Mix  # noqa: E402

MODELS = ["llama", "tied_llama", "gpt2", "qwen2", "gemma2"]
OBJECTIVES = {
    "ga": GA(),
    "wga": WGA(alpha=0.7),
    "npo": NPO(beta=0.3),
    "tnpo": TNPO(beta=1.5),
    "nll": NLL(),
    "mix": Mix(WGA(alpha=0.7), NLL(), gamma=0.6, alpha=1.7),
}
LAYERS = 4


def truth(model, name, forget, retain):
    """Literal gradients of the objective and of the risk on both sets."""
    risks = [gradient(model, literal_loss(model, data, "nll")) for data in (forget, retain)]
    if name == "mix":
        loss = 0.6 * literal_loss(model, forget, "wga") + 1.7 * literal_loss(model, retain, "nll")
    else:
        loss = literal_loss(model, forget, name)
    return gradient(model, loss), *risks


def assert_groups(actual: dict, expected: dict, rtol: float = 1e-9):
    assert set(actual) == set(expected)
    scale = max(abs(value) for value in expected.values())
    for group, value in expected.items():
        assert actual[group] == pytest.approx(value, rel=rtol, abs=rtol * scale), group


@pytest.mark.parametrize("kind", MODELS)
def test_matches_autograd_in_fp64(kind):
    model = tiny(kind, LAYERS).eval()
    rtol = 1e-5 if kind == "gemma2" else 1e-9  # transformers takes Gemma 2's attention softmax in fp32
    tied = kind in ("tied_llama", "gpt2", "gemma2")
    forget, retain = batches(1), batches(2, rows=4, sizes=(1, 3))
    effects = gfast.g_effect(model, list(OBJECTIVES.values()), forget=forget, retain=retain, norms=True)
    for name, effect in zip(OBJECTIVES, effects, strict=True):
        own, risk_u, risk_r = truth(model, name, forget, retain)
        assert_groups(effect.unlearn, dots(model, risk_u, own, LAYERS, tied), rtol)
        assert_groups(effect.retain, dots(model, risk_r, own, LAYERS, tied), rtol)
        assert_groups(effect.norms["objective"], roots(dots(model, own, own, LAYERS, tied)), rtol)
        assert_groups(effect.norms["unlearn"], roots(dots(model, risk_u, risk_u, LAYERS, tied)), rtol)
        assert_groups(effect.norms["retain"], roots(dots(model, risk_r, risk_r, LAYERS, tied)), rtol)
        assert effect.total("unlearn") == pytest.approx(sum(effect.unlearn.values()))
        cosine = effect.total("retain") / (norm(own) * norm(risk_r))
        assert effect.cosine("retain") == pytest.approx(cosine, rel=rtol)
    assert list(effects[0].unlearn) == assign(model).names


def roots(values: dict) -> dict:
    return {group: math.sqrt(value) for group, value in values.items()}


def norm(grads: dict) -> float:
    return math.sqrt(sum(g.square().sum().item() for g in grads.values()))


def test_does_not_depend_on_batches_or_padding():
    model = tiny("tied_llama").eval()
    objectives = list(OBJECTIVES.values())
    whole = gfast.g_effect(model, objectives, forget=batches(1, sizes=(5,)), retain=batches(2, sizes=(5,)))
    split = gfast.g_effect(
        model,
        objectives,
        forget=(batch for batch in batches(1, sizes=(1, 2, 1, 1))),
        retain=batches(2, sizes=(1, 1, 1, 1, 1)),
    )
    for one, other in zip(whole, split, strict=True):
        assert_groups(other.unlearn, one.unlearn)
        assert_groups(other.retain, one.retain)
        assert one.counts == other.counts

    rows = [tuple(batches(1, sizes=(5,))[0][key][i] for key in ("input_ids", "labels", "ref_logp")) for i in range(5)]
    lengths = batches(1, sizes=(5,))[0]["attention_mask"].sum(-1)
    rows = [tuple(value[:length] for value in row) for row, length in zip(rows, lengths, strict=True)]
    padded = gfast.g_effect(model, objectives, forget=collate(rows, pad=6), retain=batches(2, sizes=(5,)))
    for one, other in zip(whole, padded, strict=True):
        assert_groups(other.unlearn, one.unlearn)


def test_ga_is_minus_the_squared_risk_gradient_and_takes_two_passes(monkeypatch):
    model = tiny("gpt2").eval()
    calls = count_losses(monkeypatch)
    effect = gfast.g_effect(model, GA(), forget=batches(1), retain=batches(2, sizes=(5,)))
    assert calls == ["NLL()", "NLL()", "NLL()"]  # two forget batches and a retain batch: no pass for GA itself
    for group, value in effect.unlearn.items():
        assert value == pytest.approx(-(effect.norms["unlearn"][group] ** 2), rel=1e-12)
    assert effect.cosine("unlearn") == pytest.approx(-1.0)


@pytest.mark.parametrize("sizes", [(5,), (2, 3)], ids=["one batch", "two batches"])
@pytest.mark.parametrize("engine", ["stream", "sample", "token", "gram"])
def test_risks_come_with_the_passes(engine, sizes, tmp_path):
    """The mean over all tokens whatever the batches, from every way that risk gradients are measured; gram has none."""
    model = tiny("llama").eval()
    data = {"forget": batches(1, sizes=sizes), "retain": batches(2, sizes=sizes)}
    with torch.no_grad():
        expected = {
            "unlearn": float(literal_loss(model, data["forget"], "nll")),
            "retain": float(literal_loss(model, data["retain"], "nll")),
        }
    for objectives in (GA(), WGA(), [WGA(), WGA(alpha=2.0)]):
        effects = gfast.g_effect(model, objectives, engine=engine, **data)
        for effect in effects if isinstance(effects, list) else [effects]:
            assert effect.risks == ({} if engine == "gram" else pytest.approx(expected, rel=1e-12))
            assert GEffect.from_parquet(effect.to_parquet(tmp_path / "e.parquet")).risks == effect.risks
            assert GEffect.from_json(effect.to_json()).risks == effect.risks
    if engine == "stream":
        stored = gfast.risk_gradients(model, storage=tmp_path / "stored", **data)
        opened = type(stored).load(tmp_path / "stored")
        assert gfast.g_effect(model, WGA(), directions=opened, **data).risks == pytest.approx(expected, rel=1e-12)


def test_a_pass_for_each_distinct_term_only(monkeypatch):
    model = tiny("llama").eval()
    calls = count_losses(monkeypatch)
    objectives = [WGA(), Mix(WGA(), NLL(), alpha=2.0), Mix(WGA(), NLL()), GA(), Mix(GA(), NLL()), NLL(), WGA(alpha=2.0)]
    gfast.g_effect(model, objectives, forget=batches(1, sizes=(5,)), retain=batches(2, sizes=(5,)))
    assert calls == ["NLL()", "NLL()", "WGA(alpha=1.0)", "WGA(alpha=2.0)"]


def count_losses(monkeypatch) -> list[str]:
    """The objectives in the order of their evaluation, each after a forward of its own or after a shared one."""
    from gfast.geffect import backward

    calls: list[str] = []

    def counted(original, place, *args, **options):
        calls.append(str(args[place]))
        return original(*args, **options)

    for name, place in (("model_loss", 2), ("output_loss", 2)):
        monkeypatch.setattr(backward, name, functools.partial(counted, getattr(backward, name), place))
    return calls


def test_npo_and_tnpo_on_the_original_model():
    model = tiny("llama").eval()
    forget, retain = batches(1, sizes=(5,)), batches(2, sizes=(5,))
    with torch.no_grad():
        forget[0]["ref_logp"] = gfast.model_logp(model, forget[0])
    ga, tnpo, npo = gfast.g_effect(model, [GA(), TNPO(), NPO()], forget=forget, retain=retain)
    # weights are 1 there: TNPO is GA, and NPO is GA up to tokens per sequence
    assert_groups(tnpo.unlearn, ga.unlearn, rtol=1e-5)  # ref_logp is fp32
    per_sequence = ga.counts["unlearn"] / 5
    assert_groups(npo.unlearn, {group: per_sequence * value for group, value in ga.unlearn.items()}, rtol=1e-5)


def test_hidden_state_objectives_match_autograd():
    model = tiny("llama").eval()
    forget, retain = batches(1), batches(2, sizes=(5,))
    effect = gfast.g_effect(model, RMU(layer=2, c=3.0), forget=forget, retain=retain)
    total, count = 0.0, 0
    for batch in forget:
        hidden = model(batch["input_ids"], batch["attention_mask"], output_hidden_states=True).hidden_states[2]
        target = 3.0 * torch.rand(16, generator=torch.Generator().manual_seed(0))
        valid = batch["labels"] != -100
        total = total + ((hidden - target).square().mean(-1) * valid).sum()
        count = count + valid.sum()
    own = gradient(model, total / count)
    risk = gradient(model, literal_loss(model, forget, "nll"))
    assert_groups(effect.unlearn, dots(model, risk, own, LAYERS, False), rtol=1e-4)  # RMU itself is fp32
    assert effect.unlearn["lm"] == 0.0 and effect.unlearn["deep"] == 0.0


def test_kl_to_itself_has_no_effect_and_mix_of_two_passes_has_a_norm_on_request():
    model = tiny("llama", dtype=torch.float32).eval()
    forget, retain = batches(1, sizes=(5,)), batches(2, sizes=(5,))
    with torch.no_grad():
        retain[0]["ref_hidden"] = model_output(model, retain[0]).value
        retain[0]["ref_head"] = model.lm_head.weight.detach().clone()
    mix = Mix(WGA(), KL())
    plain, mixed = gfast.g_effect(model, [WGA(), mix], forget=forget, retain=retain)
    assert_groups(mixed.unlearn, plain.unlearn, rtol=1e-4)
    with pytest.raises(ValueError, match="norms=True"):
        mixed.cosine("unlearn")
    mixed = gfast.g_effect(model, mix, forget=forget, retain=retain, norms=True)
    assert_groups(mixed.norms["objective"], plain.norms["objective"], rtol=1e-4)


@pytest.mark.parametrize("layers, expected", [(32, (11, 11, 11)), (5, (2, 2, 2)), (16, (6, 6, 5)), (1, (1, 1, 0))])
def test_paper_groups(layers, expected):
    config = transformers.LlamaConfig(
        vocab_size=5, hidden_size=2, num_attention_heads=1, intermediate_size=2, num_hidden_layers=layers
    )
    model = transformers.LlamaForCausalLM(config)
    found = assign(model)
    units: dict[str, set] = {}
    for name, index in found.index.items():
        unit = int(name.split(".")[2]) if ".layers." in name else layers if ".norm." in name else None
        if unit is not None:
            units.setdefault(found.names[index], set()).add(unit + 1)
    start = 1
    for group, size in zip(("shallow", "middle", "deep"), expected, strict=True):
        assert units.get(group, set()) == set(range(start, start + size))
        start += size
    assert found.names == ["embed", *(group for group in ("shallow", "middle", "deep") if group in units), "lm"]
    by_layer = assign(model, "layer")
    assert by_layer.names == ["embed", *(f"layer_{unit}" for unit in range(1, layers + 2)), "lm"]
    assert set(by_layer.index) == {name for name, _ in model.named_parameters()}


def test_callable_groups_and_layer_groups_add_up():
    model = tiny("gpt2").eval()
    data = dict(forget=batches(1, sizes=(5,)), retain=batches(2, sizes=(5,)))
    paper = gfast.g_effect(model, WGA(), **data)
    layer = gfast.g_effect(model, WGA(), groups="layer", **data)
    kind = gfast.g_effect(model, WGA(), groups=lambda name: "attention" if ".attn." in name else "rest", **data)
    assert kind.groups == ["rest", "attention"]
    for other in (layer, kind):
        assert other.total("retain") == pytest.approx(paper.total("retain"), rel=1e-12)
    assert layer.unlearn["layer_1"] + layer.unlearn["layer_2"] == pytest.approx(paper.unlearn["shallow"], rel=1e-12)
    with pytest.raises(ValueError, match="returned None"):
        assign(model, lambda name: None)
    with pytest.raises(ValueError, match='"paper", "layer" or a function'):
        assign(model, "thirds")


def test_wrappers_do_not_change_the_result():
    peft = pytest.importorskip("peft")
    data = dict(forget=batches(1), retain=batches(2))
    model = tiny("llama").eval()
    plain = gfast.g_effect(model, WGA(), **data)
    for wrapped in (torch.compile(model), torch.nn.DataParallel(model)):
        assert gfast.g_effect(wrapped, WGA(), **data) == plain
    adapted = peft.get_peft_model(tiny("llama"), peft.LoraConfig(target_modules=["q_proj", "down_proj"], r=2)).double()
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    effect = gfast.g_effect(adapted, Mix(WGA(0.7), NLL()), **data)
    assert effect.groups == ["shallow", "middle"]  # the deep group of four blocks is the final norm
    adapted.eval()
    own = gradient(adapted, literal_loss(adapted, data["forget"], "wga") + literal_loss(adapted, data["retain"], "nll"))
    risk = gradient(adapted, literal_loss(adapted, data["retain"], "nll"))
    assert_groups(effect.retain, dots(adapted, risk, own, LAYERS, False))


def test_frozen_parameters_are_left_out():
    model = tiny("llama").eval()
    model.model.embed_tokens.requires_grad_(False)
    model.lm_head.requires_grad_(False)
    data = dict(forget=batches(1), retain=batches(2))
    effect = gfast.g_effect(model, GA(), **data)
    risk = gradient(model, literal_loss(model, data["forget"], "nll"))
    assert_groups(effect.unlearn, {g: -v for g, v in dots(model, risk, risk, LAYERS, False).items()})
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="no trainable parameter"):
        gfast.g_effect(model, GA(), **data)


def low_and_exact(dtype: torch.dtype):
    """A model, and the same weights in fp64."""
    low, exact = tiny("tied_llama", LAYERS, dtype).eval(), tiny("tied_llama", LAYERS).eval()
    exact.load_state_dict(low.state_dict())
    return low, exact


def low_data(seed: int):
    return batches(seed, sizes=(1, 1, 1, 1, 1)), batches(seed + 1)


@functools.cache
def low_and_exact_truths(dtype: torch.dtype, name: str, seed: int):
    """Plain gradients in a model's dtype and in fp64, whatever the directions are stored in."""
    return [truth(model, name, *low_data(seed)) for model in low_and_exact(dtype)]


@pytest.mark.parametrize("direction_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_low_precision_by_the_law(dtype, direction_dtype):
    """By group and in total: at most twice the error of fp64 dot products of plain gradients in the model's dtype."""
    low, _ = low_and_exact(dtype)
    names, errors = ("ga", "wga", "tnpo", "npo"), []
    for seed in (1, 3, 5):
        forget, retain = low_data(seed)
        objectives = [OBJECTIVES[name] for name in names]
        effects = gfast.g_effect(low, objectives, forget=forget, retain=retain, direction_dtype=direction_dtype)
        for name, effect in zip(names, effects, strict=True):
            (plain_own, *plain_risks), (own, *risks) = low_and_exact_truths(dtype, name, seed)
            for found, risk, plain_risk in zip((effect.unlearn, effect.retain), risks, plain_risks, strict=True):
                stored = {key: grad.to(direction_dtype) for key, grad in plain_risk.items()}
                expected = by_group(risk, own)
                # relative to the norms: a dot product near 0 is as hard as any other
                scale = (by_group(risk, risk) * by_group(own, own)).sqrt()
                ours = with_total(found)
                errors.append(torch.stack([ours - expected, by_group(stored, plain_own) - expected]) / scale)
    # One dot product's two errors are both chance, and their ratio can be anything: each group's are taken together,
    # over 3 seeds, 4 objectives and both sides.
    error, theirs = torch.stack(errors).square().mean(0).sqrt()  # [groups + 1]
    # Where plain gradients are stored and multiplied in fp64, gfast rounds each stored entry and each product to fp32,
    # also those of a bf16 model: half an epsilon each, at most one of the norms' product in the sum.
    assert (error <= 2 * theirs + torch.finfo(torch.float32).eps).all(), (error, theirs)


def by_group(x: dict, y: dict) -> torch.Tensor:
    """Dot products in fp64 by group and in total."""
    x, y = ({name: grad.double() for name, grad in grads.items()} for grads in (x, y))
    return with_total(dots(None, x, y, LAYERS, tied=True))


def with_total(groups: dict) -> torch.Tensor:
    values = [groups[group] for group in ("embed+lm", "shallow", "middle", "deep")]
    return torch.tensor([*values, sum(values)], dtype=torch.float64)


def test_bf16_gradients_of_many_batches_are_summed_in_fp32():
    model = tiny("llama").to(torch.bfloat16).eval()
    data = batches(1, rows=1, sizes=(1,))
    once = gfast.g_effect(model, GA(), forget=data, retain=data)
    # 300 copies of one batch have the same mean; a bf16 sum would stop growing at about 256
    many = gfast.g_effect(model, GA(), forget=data * 300, retain=data)
    assert many.total("unlearn") == pytest.approx(once.total("unlearn"), rel=0.02)


def test_repeats_bit_for_bit():
    model = tiny("llama", dtype=torch.float32).eval()
    data = dict(forget=batches(1), retain=batches(2))
    assert gfast.g_effect(model, WGA(), **data) == gfast.g_effect(model, WGA(), **data)


def test_result_round_trip_frame_and_text():
    data = dict(forget=batches(1, sizes=(5,)), retain=batches(2))
    effect = gfast.g_effect(tiny("llama"), WGA(), **data)
    assert GEffect.from_json(effect.to_json()) == effect
    with pytest.raises(ValueError, match="unknown keys .'extra'"):
        GEffect.from_dict(effect.to_dict() | {"extra": 1})
    text = repr(effect)
    assert len(text.splitlines()) == 4 and "WGA(alpha=1.0)" in text and "shallow" in text and "total" in text
    with pytest.raises(ValueError, match="side must be"):
        effect.total("forget")
    with pytest.raises(ValueError, match="no group 'head'"):
        effect.cosine("retain", "head")
    pytest.importorskip("pandas")
    frame = effect.to_frame()
    assert list(frame.columns) == ["objective", "quantity", "side", "group", "value"]
    assert set(frame["quantity"]) == {"g_effect", "risk_norm", "objective_norm", "cosine"}
    rows = frame[(frame["quantity"] == "g_effect") & (frame["side"] == "retain")].set_index("group")["value"]
    assert rows["total"] == effect.total("retain") and rows["deep"] == effect.retain["deep"]


def test_real_model(shared):
    folder = shared / "models" / "stories260k"
    if not folder.is_dir():
        pytest.skip(f"no model at {folder}")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.float64).eval()
    exact_norms(model)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))

    def encode(*texts):
        ids = [torch.tensor(tokenizer(text)["input_ids"]) for text in texts]
        return collate([(one, one.clone(), torch.zeros(len(one))) for one in ids], with_ref=False)

    forget = encode("Once upon a time, there was a little girl named Lily.", "Tom had a red ball.")
    retain = encode("The cat sat on the mat and was happy.")
    ga, mix = gfast.g_effect(model, [GA(), Mix(WGA(0.7), NLL())], forget=forget, retain=retain)
    risk_u, risk_r = (gradient(model, literal_loss(model, [data], "nll")) for data in (forget, retain))
    own = gradient(model, literal_loss(model, [forget], "wga") + literal_loss(model, [retain], "nll"))
    assert ga.groups == ["embed+lm", "shallow", "middle", "deep"]
    assert_groups(ga.unlearn, {g: -v for g, v in dots(model, risk_u, risk_u, 5, True).items()})
    assert_groups(mix.retain, dots(model, risk_r, own, 5, True))
    assert ga.total("retain") < 0 < mix.total("retain")
