"""pg_effect and the sample engine against autograd on the literal formulas, parameter by parameter."""

from __future__ import annotations

import copy

import pytest
import torch

transformers = pytest.importorskip("transformers")

from helpers.geffect_models import batches, gradient, literal_loss, logps, tiny  # noqa: E402
from test_geffect_state import assert_same, snapshot, used_model  # noqa: E402

import gfast  # noqa: E402
from gfast.geffect import sample  # noqa: E402
from gfast.geffect.data import Term  # noqa: E402
from gfast.geffect.measurement import Measurement  # noqa: E402
from gfast.geffect.sample import objective_dots, pg_effect  # noqa: E402
from gfast.objectives import GA, KL, NLL, NPO, RMU, TNPO, WGA, SimNPO  # noqa: E402

KINDS = ["llama", "tied_llama", "gpt2", "qwen2", "gemma2", "gpt_neox", "opt", "phi", "mistral"]


def each(name: str) -> str:
    """Every parameter its own group."""
    return name


def data() -> dict:
    return dict(forget=batches(1), retain=batches(2, rows=4, sizes=(1, 3)))


def row(batch: dict, index: int) -> dict:
    return {key: value[index : index + 1] for key, value in batch.items()}


def literal_samples(model, forget) -> list[dict]:
    """grad log p(s) of every sample, one backward each."""
    return [
        gradient(model, logps(model, row(batch, index))[0].sum())
        for batch in forget
        for index in range(len(batch["labels"]))
    ]


def square(grads: dict) -> float:
    return sum(g.double().square().sum().item() for g in grads.values())


def assert_samples(effect, own: list[dict], risks: list[dict], rtol: float = 1e-9) -> None:
    """Every group is one parameter: errors are relative to the product of the norms of its two gradients."""
    assert len(effect.groups) == len(own[0])
    for side, risk in zip(("unlearn", "retain"), risks, strict=True):
        for group, name in zip(effect.groups, own[0], strict=True):
            for found, grads in zip(getattr(effect, side)[group].tolist(), own, strict=True):
                expected = (grads[name] * risk[name]).sum().item()
                scale = (grads[name].norm() * risk[name].norm()).item()
                # a gradient that is zero in theory, such as a key bias's, is rounding in both
                floor = 1e-6 * (square(grads) * square(risk)) ** 0.5
                assert abs(found - expected) <= rtol * max(scale, floor), (side, group)


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


def lengths(batch: dict) -> list[int]:
    return batch["attention_mask"].sum(1).tolist()


def shift(values: torch.Tensor, length: int) -> torch.Tensor:
    return values.roll(len(values) - length)


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
    measurement = measured(model, [Term(objective, "forget")])
    with measurement.directions() as directions:
        (dots,) = objective_dots(measurement, directions, [Term(objective, "forget")])
    for index, group in enumerate(expected.groups):
        # ref_logp and with it some weights are fp32 in the stream engine
        assert dots[index, 0].item() == pytest.approx(expected.unlearn[group], rel=1e-6, abs=1e-9)
        assert dots[index, 1].item() == pytest.approx(expected.retain[group], rel=1e-6, abs=1e-9)


def measured(model, used=()) -> Measurement:
    return Measurement.of(model, **data(), used=used)


@pytest.mark.parametrize("objective", [KL(), RMU(layer=1)], ids=lambda objective: objective.key)
def test_objectives_without_token_weights_are_refused(objective):
    measurement = measured(tiny("llama"))
    with measurement.directions() as directions, pytest.raises(ValueError, match="no token weights.*engine='stream'"):
        objective_dots(measurement, directions, [Term(objective, "forget")])


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


def lora_model(kind: str = "llama"):
    peft = pytest.importorskip("peft")
    targets = ["c_attn", "c_proj"] if kind == "gpt2" else ["q_proj", "down_proj"]
    config = peft.LoraConfig(target_modules=targets, r=2, fan_in_fan_out=kind == "gpt2")
    model = peft.get_peft_model(tiny(kind), config).double().eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_lora(kind):
    model = lora_model(kind)
    effect = pg_effect(model, groups=each, **data())
    risks = [gradient(model, literal_loss(model, data()[key], "nll")) for key in ("forget", "retain")]
    assert_samples(effect, literal_samples(model, data()["forget"]), risks)


def test_a_module_without_a_rule_is_refused_by_name(monkeypatch):
    monkeypatch.setattr(gfast.geffect.directions, "risk_directions", None)  # nothing may be measured before
    before = snapshot(model := tiny("mixtral"))
    with pytest.raises(ValueError, match=r"layers\.0\.(mlp|block_sparse_moe).*engine='stream' or 'token'"):
        pg_effect(model, **data())
    assert_same(before, snapshot(model))
    own = tiny("llama")
    own.model.layers[1].scale = torch.nn.Parameter(torch.ones(16, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"layers\.1\.scale.*no rule for a LlamaDecoderLayer"):
        pg_effect(own, **data())
    own.model.layers[1].scale.requires_grad_(False)
    pg_effect(own, **data())


def test_mixtral_with_frozen_experts_is_measured():
    model = tiny("mixtral").eval()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("mlp" not in name and "block_sparse_moe" not in name)
    effect = pg_effect(model, groups=each, **data())
    risks = [gradient(model, literal_loss(model, data()[key], "nll")) for key in ("forget", "retain")]
    assert_samples(effect, literal_samples(model, data()["forget"]), risks, 1e-5)  # the router's softmax is fp32


def test_a_norm_that_is_not_linear_in_its_weight_is_refused():
    class SquaredNorm(torch.nn.Module):
        def __init__(self, size):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(size, dtype=torch.float64))

        def forward(self, x):
            return x * torch.rsqrt(x.square().mean(-1, keepdim=True)) * self.weight**2

    model = tiny("llama")
    model.model.norm = SquaredNorm(16)
    with pytest.raises(ValueError, match=r"'model\.norm\.weight'.*no rule for a SquaredNorm"):
        pg_effect(model, **data())


def test_a_module_that_is_not_called_is_refused():
    model = tiny("llama")
    model.model.layers[0].mlp.spare = torch.nn.Linear(2, 2).double()
    with pytest.raises(ValueError, match=r"'model\.layers\.0\.mlp\.spare' owns trainable.*not called"):
        pg_effect(model, **data())


def test_samples_that_do_not_add_up_to_their_set_are_noticed():
    model = tiny("llama").eval()
    directions = gfast.risk_gradients(model, **data())
    for kept in directions.stores[0].kept:
        kept.mul_(1.5)
    with pytest.raises(ValueError, match="do not add up.*'embed'.*token_effect"):
        pg_effect(model, directions=directions, **data())


def test_rows_that_belong_to_no_sample_are_refused():
    model = tiny("llama").eval()
    layer = model.model.layers[0].mlp
    original = layer.forward
    layer.forward = lambda x: original(x.transpose(0, 1)).transpose(0, 1)
    with pytest.raises(ValueError, match=r"'model\.layers\.0\.mlp\.down_proj'.*cannot be told apart"):
        pg_effect(model, **data())


def test_an_input_changed_in_place_is_refused():
    model = tiny("llama").eval()
    layer = model.model.layers[3].mlp
    original = layer.forward

    def forward(x):
        out = original(x)
        x.mul_(1.0)
        return out

    layer.forward = forward
    # autograd itself notices it in the directions' passes: only the pass with frozen parameters is asked
    directions = gfast.risk_gradients(tiny("llama"), **data())
    with pytest.raises(ValueError, match=r"layers\.3\.mlp\.\w+_proj.*changed in place"):
        pg_effect(model, directions=directions, **data())


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("fails_at", [None, 0, 7, 60])
def test_model_is_left_as_found(monkeypatch, error, fails_at):
    model = used_model()
    before = snapshot(model)
    calls = []
    original = sample.share_dots

    def failing(*args):
        calls.append(1)
        if fails_at is not None and len(calls) > fails_at:
            raise error("stop")
        return original(*args)

    monkeypatch.setattr(sample, "share_dots", failing)
    if fails_at is None:
        pg_effect(model, **data())
        assert calls
    else:
        with pytest.raises(error, match="stop"):
            pg_effect(model, **data())
    assert_same(before, snapshot(model))
    assert all(not module._backward_hooks for module in model.modules())


def test_parameters_and_norms_are_put_back():
    model = tiny("gemma2")
    parameters = [id(p) for p in model.parameters()]
    pg_effect(model, **data())
    assert parameters == [id(p) for p in model.parameters()]
    assert all(
        isinstance(p, torch.nn.Parameter) for m in model.modules() for p in m._parameters.values() if p is not None
    )


def test_no_weight_gradient_ever_exists(monkeypatch):
    model = tiny("llama").eval()
    directions = gfast.risk_gradients(model, **data())
    seen = []
    original = sample.share_dots
    monkeypatch.setattr(sample, "share_dots", lambda *a: seen.append(any_trainable(model)) or original(*a))
    pg_effect(model, directions=directions, **data())
    assert seen and not any(seen)


def any_trainable(model) -> bool:
    return any(p.requires_grad or p.grad is not None for p in model.parameters())


def test_gradient_checkpointing_is_measured_all_the_same():
    model = tiny("llama")
    expected = pg_effect(model, **data())
    model.train()
    model.gradient_checkpointing_enable()
    found = pg_effect(model, **data())
    for group, values in expected.unlearn.items():
        torch.testing.assert_close(found.unlearn[group], values, rtol=1e-9, atol=1e-12)
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_works_where_gradients_are_off(mode):
    model = tiny("llama").eval()
    expected = pg_effect(model, **data())
    with mode():
        found = pg_effect(model, **data())
    assert torch.equal(found.total("unlearn"), expected.total("unlearn"))


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


def test_gradients_that_are_not_finite_are_named():
    model = tiny("llama").eval()
    directions = gfast.risk_gradients(model, **data())
    direction = directions.get(0, "model.layers.2.mlp.up_proj.weight")
    direction.fill_(torch.inf)
    with pytest.raises(ValueError, match=r"log p is not finite in 1 of \d+ parameters, .*layers\.2\.mlp\.up_proj"):
        pg_effect(model, directions=directions, **data())


def test_labels_outside_the_vocabulary_and_other_bad_input(monkeypatch):
    model = tiny("llama")
    wrong = data() | dict(forget=[dict(batches(1)[0])])
    wrong["forget"][0]["labels"] = wrong["forget"][0]["labels"].clone()
    wrong["forget"][0]["labels"][0, 3] = 61
    with pytest.raises(ValueError, match="outside the vocabulary"):
        pg_effect(model, **wrong)
    with pytest.raises(ValueError, match="forget= holds no batch"):
        pg_effect(model, forget=[], retain=data()["retain"])
    with pytest.raises(ValueError, match="direction_dtype"):
        pg_effect(model, direction_dtype=torch.float16, **data())


def test_wrappers_do_not_change_the_result():
    model = tiny("llama").eval()
    expected = pg_effect(model, **data()).total("retain")
    for wrapped in (torch.compile(model), torch.nn.DataParallel(model)):
        assert torch.equal(pg_effect(wrapped, **data()).total("retain"), expected)


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


def test_progress_bar(capsys):
    pytest.importorskip("tqdm")
    pg_effect(tiny("llama"), progress=True, **data())
    assert "sample effects" in capsys.readouterr().err
