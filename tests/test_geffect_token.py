"""Token effects against a backward pass a token and what follows from them."""

from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip("transformers")

from helpers.geffect_models import batches, exact_norms, literal_group, logps, tiny  # noqa: E402
from helpers.geffect_tokens import FAMILIES, TINY, assert_close, data, literal, made, measured, stacked  # noqa: E402
from helpers.marks import slow_when  # noqa: E402

import gfast  # noqa: E402
from gfast.geffect import assign, risk_gradients, token_effect  # noqa: E402
from gfast.geffect.data import Term  # noqa: E402
from gfast.geffect.engines.token import objective_dots  # noqa: E402
from gfast.geffect.request import Options, Request  # noqa: E402
from gfast.objectives import DPO, GA, KL, NLL, NPO, RMU, TNPO, WGA, Mix, SatImp, SimNPO  # noqa: E402


@slow_when(lambda p: p.kind in FAMILIES)
@pytest.mark.parametrize("kind", [*TINY, *FAMILIES])
def test_every_token_in_fp64(kind):
    model, rtol = made(kind)
    forget, retain = data()
    tokens, expected = measured(model, forget, retain)
    assert_close(stacked(tokens), expected, rtol)
    found = [logps(model, batch) for batch in forget]
    assert torch.allclose(torch.cat(tokens.logp), torch.cat([logp[valid] for logp, _, valid in found]), rtol=1e-6)
    labels = torch.cat([batch["labels"][:, 1:][valid] for batch, (_, _, valid) in zip(forget, found, strict=True)])
    assert torch.equal(torch.cat(tokens.labels), labels)
    assert torch.allclose(torch.cat(tokens.ref_logp), torch.cat([ref[valid] for _, ref, valid in found]), rtol=1e-6)
    rows = [row for batch in forget for row in batch["input_ids"]]
    for row, places, ids in zip(rows, tokens.positions, tokens.labels, strict=True):
        assert torch.equal(row[places], ids)
    assert list(tokens.unlearn) == assign(model).names == list(tokens.retain)


@pytest.mark.parametrize("kind", ["llama", "tied_llama", "gpt2"])
@pytest.mark.parametrize("grouping", ["layer", "literal", "kind of module"])
def test_other_groupings(kind, grouping):
    def by_module(name: str) -> str:
        return "norms" if "norm" in name or "ln_" in name else "biases" if name.endswith("bias") else "matrices"

    tied = kind != "llama"
    groups = {"layer": "layer", "literal": lambda name: literal_group(name, 4, tied), "kind of module": by_module}
    model, rtol = made(kind)
    tokens, expected = measured(model, *data(), groups[grouping])
    assert_close(stacked(tokens), expected, rtol)


def test_padding_row_of_an_embedding_that_the_head_shares():
    """Looking it up has no gradient, but the head gives the row one: where the end of a text is the padding token."""
    model, rtol = made("tied_llama")
    model.model.embed_tokens.padding_idx = 5
    forget, retain = data()
    for batch in (*forget, *retain):
        batch["input_ids"][:, 3] = 5
        batch["labels"][:, 3] = 5
    tokens, expected = measured(model, forget, retain)
    assert_close(stacked(tokens), expected, rtol)
    model.model.embed_tokens.scale_grad_by_freq = True
    with pytest.raises(ValueError, match="embed_tokens.*scale_grad_by_freq"):
        token_effect(model, forget=forget, retain=retain)


def test_partly_frozen():
    model, _ = made("tied_llama")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("layers.1.mlp" in name or "layers.2.input_layernorm" in name)
    tokens, expected = measured(model, *data())
    assert list(tokens.unlearn) == ["shallow", "middle"]
    assert_close(stacked(tokens), expected, 1e-9)


@pytest.mark.parametrize("only", ["lm_head", "embed_tokens", "model.norm"])
def test_one_trainable_part(only):
    model, _ = made("llama")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(only in name)
    tokens, expected = measured(model, *data())
    assert_close(stacked(tokens), expected, 1e-9)


class Halved(torch.nn.Module):
    def forward(self, x):
        return x * 0.5 + 0.1 * x.tanh()


@pytest.mark.parametrize("part", ["weight", "bias", "tied"])
def test_a_head_that_is_made_of_other_parameters(part):
    """A parametrisation's own parameters move the logits; `head.weight` is none."""
    model, _ = made("llama")
    if part == "bias":
        model.lm_head.bias = torch.nn.Parameter(0.1 * torch.ones(len(model.lm_head.weight), dtype=torch.float64))
    name = "bias" if part == "bias" else "weight"
    torch.nn.utils.parametrize.register_parametrization(model.lm_head, name, Halved())
    if part == "tied":
        model.lm_head.parametrizations.weight.original = model.model.embed_tokens.weight
    tokens, expected = measured(model, *data(), lambda name: name.partition(".layers")[0])
    assert_close(stacked(tokens), expected, 1e-9)


@pytest.mark.parametrize("target", [["q_proj", "down_proj"], ["v_proj", "lm_head", "embed_tokens"]])
def test_adapters(target):
    peft = pytest.importorskip("peft")
    base, _ = made("llama")
    model = peft.get_peft_model(base, peft.LoraConfig(r=3, target_modules=target, task_type="CAUSAL_LM")).double()
    exact_norms(model)
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora" in name:
                parameter.add_(0.2 * torch.randn_like(parameter))
    model.eval()
    tokens, expected = measured(model, *data())
    assert_close(stacked(tokens), expected, 1e-9)


def test_a_wrapped_model_gives_the_same():
    model, _ = made("gpt2")
    forget, retain = data()
    plain = token_effect(model, forget=forget, retain=retain, direction_dtype=torch.float64)
    compiled = token_effect(torch.compile(model), forget=forget, retain=retain, direction_dtype=torch.float64)
    assert torch.equal(stacked(plain), stacked(compiled))
    directions = risk_gradients(model, forget=forget, retain=retain, dtype=torch.float64)
    for block in model.transformer.h:
        block.compile()
    assert torch.equal(
        stacked(plain), stacked(token_effect(model, forget=forget, retain=retain, directions=directions))
    )


def test_both_padding_sides_and_any_batches():
    model, _ = made("qwen2")
    retain = batches(2, rows=4, sizes=(4,))
    right = batches(1, sizes=(5,))
    split = batches(1, sizes=(1, 3, 1))
    right[0]["labels"][:, 0] = -100  # nothing scores it; further right the padding would
    lengths = right[0]["attention_mask"].sum(1).tolist()
    left = {
        key: torch.stack([row.roll(len(row) - n) for row, n in zip(value, lengths, strict=True)])
        for key, value in right[0].items()
    }
    left["position_ids"] = (left["attention_mask"].cumsum(1) - 1).clamp(min=0)
    directions = risk_gradients(model, forget=right, retain=retain, dtype=torch.float64)
    found = [
        token_effect(model, forget=forget, retain=retain, directions=directions) for forget in (right, split, [left])
    ]
    for other in found[1:]:
        assert_close(stacked(other), stacked(found[0]), 1e-9)


def test_rows_without_labels():
    model, _ = made("llama")
    forget, retain = data()
    forget[0]["labels"][1] = -100
    tokens, expected = measured(model, forget, retain)
    assert_close(stacked(tokens), expected, 1e-9)
    assert len(tokens.logp[1]) == 0 and len(tokens.logp) == 5
    assert tokens.samples().tokens[1] == 0


GRID = [
    GA(),
    *[WGA(alpha=alpha) for alpha in (0.3, 1.0, 2.0)],
    SatImp(beta1=2.0, beta2=0.5),
    *[TNPO(beta=beta) for beta in (0.5, 2.0)],
    *[NPO(beta=beta) for beta in (0.1, 0.5)],
    *[SimNPO(beta=beta, delta=0.2) for beta in (1.0, 4.5)],
]


@pytest.mark.parametrize("numbers", [[7] * 5 + [7] * 4 + [2] * 3, [2, 2, 2, 2, 0, 0, 0, 2, 2, 0, 0, 0]])
def test_texts_that_are_numbered_in_any_order(numbers):
    """Packed texts whose numbers fall, or that go on behind another: samples, tokens and weights are their own."""
    model, _ = made("llama")
    ids = torch.randint(3, 60, (2, 12), generator=torch.Generator().manual_seed(3))
    texts = torch.stack([torch.tensor(numbers), torch.tensor([5] * 9 + [4] * 3)])
    mask = (texts[:, None, :, None] == texts[:, None, None]) & torch.ones(12, 12, dtype=torch.bool).tril()
    forget = dict(input_ids=ids, labels=ids, attention_mask=mask, sequence_id=texts)
    forget["position_ids"] = torch.arange(12).expand(2, 12)
    again = torch.nn.functional.pad(texts[:, 1:] != texts[:, :-1], (1, 0), value=True)
    forget["labels"] = torch.where(again, -100, ids)  # what stands before is of another text
    sides = dict(forget=forget, retain=data()[1])
    tokens, samples = token_effect(model, **sides), gfast.pg_effect(model, **sides)
    known = texts[forget["labels"] != -100]
    in_turn = list(dict.fromkeys(known.tolist()))
    rows = [forget["labels"][forget["labels"] != -100][known == number] for number in in_turn]
    assert [one.tolist() for one in tokens.labels] == [row.tolist() for row in rows]
    assert torch.allclose(tokens.samples().logp, samples.logp, rtol=1e-6)
    assert torch.allclose(tokens.samples().total("retain"), samples.total("retain"), rtol=1e-4)
    (weight,) = gfast.geffect.retain_conflict(model, **sides)
    expected = gfast.geffect.conflict_weights(tokens.total("retain"))
    found = [weight[forget["labels"] != -100][known == number] for number in in_turn]
    assert torch.allclose(torch.cat(found).double(), torch.cat(expected), rtol=1e-4)
    with pytest.raises(ValueError, match="the first token of a text in the packed rows of batch 0 has a label"):
        gfast.pg_effect(model, forget={**forget, "labels": ids}, retain=sides["retain"])
    for objective in (SimNPO(beta=1.0), NPO(beta=1.0)):
        if objective.needs:
            tokens.ref_logp = [torch.full_like(one, -3.0) for one in tokens.logp]
            forget["ref_logp"] = torch.where(forget["labels"] == -100, 0.0, -3.0)
        effect = gfast.g_effect(model, objective, **sides)
        assert tokens.g_effect(objective).total("retain") == pytest.approx(effect.total("retain"), rel=1e-4)


def test_one_measurement_gives_every_objective():
    model, _ = made("tied_llama")
    forget, retain = data()
    tokens = token_effect(model, forget=forget, retain=retain, direction_dtype=torch.float64)
    expected = gfast.g_effect(model, GRID, forget=forget, retain=retain, direction_dtype=torch.float64, engine="stream")
    for objective, effect in zip(GRID, expected, strict=True):
        found = tokens.g_effect(objective)
        for side in ("unlearn", "retain"):
            scale = max(abs(value) for value in getattr(effect, side).values())
            for group, value in getattr(effect, side).items():
                assert getattr(found, side)[group] == pytest.approx(value, abs=1e-9 * scale), (objective, side, group)


def dots_of(model, used, forget, retain, objective_batches=None):
    """[G, 2] of every term."""
    request = Request.of(model, forget, retain, Options(dtype=torch.float64), used, objective_batches)
    with request.directions() as directions:
        return objective_dots(request, directions, used)


def assert_dots(dots, effect):
    expected = torch.tensor([list(effect.unlearn.values()), list(effect.retain.values())], dtype=torch.float64).t()
    assert (dots - expected).abs().max() < 1e-9 * expected.abs().max()


def test_engine_shares_one_measurement_of_a_set(monkeypatch):
    from gfast.geffect.engines import token

    counted = []
    original = token.measure_tokens
    monkeypatch.setattr(token, "measure_tokens", lambda *args: counted.append(1) or original(*args))
    model, _ = made("llama")
    forget, retain = data()
    found = dots_of(model, [Term(objective, "forget") for objective in GRID], forget, retain)
    assert len(counted) == 1
    expected = gfast.g_effect(model, GRID, forget=forget, retain=retain, direction_dtype=torch.float64, engine="stream")
    for dots, effect in zip(found, expected, strict=True):
        assert_dots(dots, effect)


def test_engine_on_pairs_and_on_retain_data():
    model, _ = made("llama")
    forget, retain = data()
    pairs = batches(5, rows=4, sizes=(4,))
    terms = [Term(NLL(), "retain"), Term(DPO(beta=0.4), "objective")]
    found = dots_of(model, terms, forget, retain, pairs)
    options = dict(forget=forget, retain=retain, objective_batches=pairs, direction_dtype=torch.float64)
    objectives = [Mix(GA(), NLL(), gamma=0.0), DPO(beta=0.4)]
    for dots, effect in zip(found, gfast.g_effect(model, objectives, **options), strict=True):
        assert_dots(dots, effect)


@pytest.mark.parametrize("objective", [KL(), RMU(layer=1)])
def test_engine_refuses_what_has_no_token_weights(objective):
    model, _ = made("llama")
    forget, retain = data()
    with pytest.raises(ValueError, match=r"no token weights.*engine='stream'"):
        objective_dots(Request.of(model, forget, retain), None, [Term(objective, "retain")])


def test_sums_are_the_risk_gradients_squares():
    """Summed over all tokens, -e / N is the squared norm of the forget risk's gradient in every group."""
    model, _ = made("gpt2")
    forget, retain = data()
    tokens = token_effect(model, forget=forget, retain=retain, direction_dtype=torch.float64)
    for group, values in tokens.unlearn.items():
        square = -torch.cat(values).sum().item() / tokens.counts["unlearn"]
        assert math.sqrt(square) == pytest.approx(tokens.norms["unlearn"][group], rel=1e-9)


@slow_when(lambda p: p.kind != "llama" and p.dtype != torch.bfloat16)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, "autocast"])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2"])
def test_error_is_at_most_twice_autograds(kind, dtype):
    narrow = torch.bfloat16 if dtype == "autocast" else dtype
    stored = torch.float32 if dtype == "autocast" else dtype
    model, exact = tiny(kind, dtype=stored).eval(), tiny(kind, dtype=stored).eval().double()
    exact_norms(exact)
    forget, retain = data()
    groups = assign(model)
    with risk_gradients(exact, forget=forget, retain=retain, dtype=torch.float64) as directions:
        truth = literal(exact, forget, directions, groups)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "autocast"):
            plain = literal(model, forget, directions, groups)
            found = stacked(token_effect(model, forget=forget, retain=retain, directions=directions))
    scale = truth.square().mean(-1).sqrt()  # [2, G]
    error, allowed = ((x - truth).square().mean(-1).sqrt() / scale for x in (found, plain))
    assert (error <= 2 * allowed + torch.finfo(narrow).eps).all(), (error, allowed)


def test_small_directions_survive_half_precision():
    """2^-30 times the directions give 2^-30 times the effects, bit for bit, far below what float16 can hold."""
    model = tiny("llama", dtype=torch.float16).eval()
    forget, retain = data()
    with risk_gradients(model, forget=forget, retain=retain) as directions:
        whole = stacked(token_effect(model, forget=forget, retain=retain, directions=directions))
        for store in directions.stores:
            store.kept = [None if kept is None else kept * 2.0**-30 for kept in store.kept]
        directions.gram *= 2.0**-60
        small = stacked(token_effect(model, forget=forget, retain=retain, directions=directions))
    assert torch.equal(small, whole * 2.0**-30) and (whole != 0).any()
