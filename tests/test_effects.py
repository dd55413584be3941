"""Results of measurements: what follows from token effects, tables, files, errors."""

from __future__ import annotations

import doctest
import math

import pytest
import torch

from gfast.files import DamagedFile
from gfast.geffect import Effect, EffectHistory, GEffect, GramEffect, SampleEffect, TokenEffect
from gfast.geffect.results import base, effect_history, sample_effect, standard_error
from gfast.objectives import DPO, GA, KL, NLL, NPO, TNPO, WGA, HardMask, Mix, SimNPO

SIZES = (3, 0, 2, 4)
NORMS = {"unlearn": {"embed": 2.0, "deep": 1.5}, "retain": {"embed": 1.0, "deep": 0.25}}
COUNTS = {"unlearn": 9, "retain": 12}


def split(values: torch.Tensor) -> list[torch.Tensor]:
    return list(values.split(list(SIZES)))


def token_effect(with_ref: bool = True) -> TokenEffect:
    rng = torch.Generator().manual_seed(0)

    def random() -> list[torch.Tensor]:
        return split(torch.randn(sum(SIZES), generator=rng, dtype=torch.float64))

    logp, ref = ([-value.abs() for value in random()] for _ in range(2))
    return TokenEffect(
        {"embed": random(), "deep": random()},
        {"embed": random(), "deep": random()},
        logp,
        labels=split(torch.arange(sum(SIZES)) + 100),
        positions=split(torch.arange(sum(SIZES)) % 5 + 1),
        norms=NORMS,
        ref_logp=ref if with_ref else None,
        counts=dict(COUNTS),
    )


def literal(effect: TokenEffect, objective: str, side: str, group: str) -> float:
    """sum over tokens of w_i / Z times the effect, from the formulas alone."""
    total, tokens = 0.0, sum(SIZES)
    present = sum(size > 0 for size in SIZES)
    for s in range(len(SIZES)):
        ratio = sum(effect.logp[s] - effect.ref_logp[s])
        for i in range(SIZES[s]):
            p, p_ref = math.exp(effect.logp[s][i]), math.exp(effect.ref_logp[s][i])
            weight = {
                "ga": 1.0 / tokens,
                "wga": p**0.7 / tokens,
                "tnpo": 2 * p**1.5 / (p**1.5 + p_ref**1.5) / tokens,
                "npo": 2 / (1 + math.exp(-0.3 * ratio)) / present,
                "simnpo": 2 / (1 + math.exp(-0.5 * (sum(effect.logp[s]) / SIZES[s] + 0.2))) / SIZES[s] / present,
            }[objective]
            total += weight * float(getattr(effect, side)[group][s][i])
    return total


@pytest.mark.parametrize(
    ("name", "objective"),
    [
        ("ga", GA()),
        ("wga", WGA(0.7)),
        ("tnpo", TNPO(1.5)),
        ("npo", NPO(0.3)),
        ("simnpo", SimNPO(beta=0.5, delta=0.2)),
    ],
)
def test_effects_of_objectives_are_weighted_sums_of_token_effects(name, objective):
    tokens = token_effect()
    effect = tokens.g_effect(objective)
    for side in ("unlearn", "retain"):
        for group in ("embed", "deep"):
            assert getattr(effect, side)[group] == pytest.approx(literal(tokens, name, side, group), rel=1e-12)
    assert effect.counts == COUNTS | {"objective": 3 if name in ("npo", "simnpo") else 9, "objective_tokens": 9}
    scale = (3 if name in ("npo", "simnpo") else 9) / 9
    assert effect.per_token("retain", "deep") == pytest.approx(effect.retain["deep"] * scale)
    assert effect.per_token("unlearn") == pytest.approx(effect.total("unlearn") * scale)


def test_standard_errors_are_those_of_a_ratio_over_samples():
    tokens = token_effect()
    effect = tokens.g_effect(WGA(0.7))
    weight = tokens.weights(WGA(0.7))
    parts = [sum(weight[s] * tokens.retain["deep"][s]) / 9 for s in range(4) if SIZES[s]]
    shares = [size for size in SIZES if size]
    whole = sum(parts)
    residuals = [part - whole * share / 9 for part, share in zip(parts, shares, strict=True)]
    expected = math.sqrt(3 / 2 * sum(r * r for r in residuals))
    assert effect.standard_error("retain", "deep") == pytest.approx(expected, rel=1e-12)
    assert effect.standard_error("retain") > 0
    with pytest.raises(ValueError, match="no group 'lm'"):
        effect.standard_error("retain", "lm")
    with pytest.raises(ValueError, match="two or more batches"):
        GEffect("GA()", effect.unlearn, effect.retain, NORMS).standard_error("retain")
    with pytest.raises(ValueError, match="no single count"):
        GEffect("GA()", effect.unlearn, effect.retain, NORMS).per_token("retain")


def test_standard_error_is_the_spread_of_repeated_draws():
    """The formula against simulation: the error of a ratio whose samples are drawn anew many times."""
    rng = torch.Generator().manual_seed(0)
    sizes = torch.randint(1, 20, (4000, 50), generator=rng).double()
    sums = sizes * (1.0 + 0.5 * torch.randn(4000, 50, generator=rng, dtype=torch.float64))
    ratios = sums.sum(1) / sizes.sum(1)
    estimates = [standard_error(sums[k] / sizes[k].sum(), sizes[k]) for k in range(200)]
    assert sum(estimates) / len(estimates) == pytest.approx(float(ratios.std()), rel=0.05)
    assert math.isnan(standard_error(torch.ones(3), torch.tensor([1.0, 0.0, 0.0])))


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        (Mix(GA(), NLL()), "no weighting of the forget set's tokens"),
        (DPO(0.1), "no weighting"),
        (KL(), "no weighting"),
        (NPO(0.1), "without ref_logp"),
    ],
)
def test_objectives_that_token_effects_cannot_give(objective, message):
    with pytest.raises(ValueError, match=message):
        token_effect(with_ref=False).g_effect(objective)


@pytest.mark.parametrize("objective", [GA(), NLL(), WGA(0.0), NPO(0.3), SimNPO(beta=0.5, delta=0.2)], ids=str)
def test_samples_give_objectives_with_one_weight_a_sequence(objective):
    found, expected = samples().g_effect(objective), token_effect().g_effect(objective)
    assert (found.objective, found.risk, found.norms) == (expected.objective, expected.risk, expected.norms)
    assert found.counts == expected.counts
    for side in ("unlearn", "retain"):
        assert getattr(found, side) == pytest.approx(getattr(expected, side), rel=1e-12)
        assert found.errors[side] == pytest.approx(expected.errors[side], rel=1e-12)


def test_samples_refuse_what_they_cannot_weigh():
    for objective in (WGA(0.7), TNPO(1.5), DPO(0.1), KL(), Mix(GA(), NLL()), HardMask()):
        with pytest.raises(ValueError, match="does not weigh whole samples.*token_effect"):
            samples().g_effect(objective)
    with pytest.raises(ValueError, match="needs ref_logp of the samples"):
        token_effect(with_ref=False).samples().g_effect(NPO(0.3))
    with pytest.raises(ValueError, match="needs logp of the samples"):
        gram().samples().g_effect(SimNPO())
    assert gram().samples().g_effect(GA()).counts["objective"] == 10


def test_samples_per_token():
    found = samples()
    for group, values in (("deep", found.retain["deep"]), (None, found.total("retain")), ("total", None)):
        values = found.total("retain") if values is None else values
        expected = [float(value) / size if size else 0.0 for value, size in zip(values, SIZES, strict=True)]
        assert found.per_token("retain", group).tolist() == expected
    with pytest.raises(ValueError, match="no group 'lm'"):
        found.per_token("retain", "lm")
    with pytest.raises(ValueError, match="side must be"):
        found.per_token("forget")


def test_samples_of_a_gram_have_cosines():
    pairs = gram()
    found = pairs.samples()
    total = -pairs.total("unlearn")
    norms = {group: (-matrix).diagonal().sqrt() for group, matrix in pairs.unlearn.items()}
    for group, values in norms.items():
        torch.testing.assert_close(found.sample_norms[group], values)
        expected = found.unlearn[group] / (values * found.norms["unlearn"][group])
        torch.testing.assert_close(found.cosine("unlearn", group), expected)
    # against the definition: R's gradient is minus the mean of those of log p
    risk = math.hypot(*found.norms["unlearn"].values())
    torch.testing.assert_close(found.cosine("unlearn"), -total.sum(1) / 10 / (total.diagonal().sqrt() * risk))
    found.sample_norms["deep"][1] = found.unlearn["deep"][1] = 0.0
    assert found.cosine("unlearn", "deep").isnan().tolist() == [False, True, False]
    with pytest.raises(ValueError, match=r"gradient on that side is not known.*norms\['retain'\].*pg_effect"):
        found.cosine("retain")
    with pytest.raises(ValueError, match=r"gram_effect\(\.\.\.\)\.samples\(\)"):
        samples().cosine("retain")
    with pytest.raises(ValueError, match="no group 'lm'"):
        found.cosine("unlearn", "lm")
    found.norms["retain"] = {"whole": 1.0}  # of other groups
    with pytest.raises(ValueError, match="has the groups whole, not 'embed'"):
        found.cosine("retain", "embed")
    found.norms["retain"] = {"embed": 0.5, "deep": 2.0}
    torch.testing.assert_close(found.cosine("retain", "embed"), found.retain["embed"] / norms["embed"] / 0.5)
    for wrong in ({"whole": norms["embed"]}, {g: values[:2] for g, values in norms.items()}):
        found.sample_norms = wrong
        with pytest.raises(ValueError, match="of other groups or samples: 3 samples by embed, deep"):
            found.rows()


def samples() -> SampleEffect:
    return token_effect().samples()


def gram() -> GramEffect:
    rng = torch.Generator().manual_seed(1)
    half = torch.randn(3, 7, generator=rng, dtype=torch.float64)
    sides = {g: (-half @ half.T, torch.randn(3, 2, generator=rng, dtype=torch.float64)) for g in ("embed", "deep")}
    tokens = {"forget": torch.tensor([3, 5, 2]), "retain": torch.tensor([4, 6])}
    return GramEffect({g: u for g, (u, _) in sides.items()}, {g: r for g, (_, r) in sides.items()}, tokens)


def test_samples_and_totals_are_sums():
    tokens = token_effect()
    found = tokens.samples()
    assert found.tokens.tolist() == list(SIZES)
    for s in range(len(SIZES)):
        assert float(found.unlearn["deep"][s]) == pytest.approx(float(tokens.unlearn["deep"][s].sum()), abs=1e-15)
        assert float(found.logp[s]) == pytest.approx(float(tokens.logp[s].sum()), abs=1e-15)
    torch.testing.assert_close(found.total("retain"), found.retain["embed"] + found.retain["deep"])
    torch.testing.assert_close(tokens.total("unlearn")[3], tokens.unlearn["embed"][3] + tokens.unlearn["deep"][3])


def test_gram_gives_sample_effects_and_cosines():
    pairs = gram()
    assert pairs.matrix is pairs.retain
    found = pairs.samples()
    torch.testing.assert_close(found.retain["deep"], pairs.retain["deep"].sum(1) / 10)
    torch.testing.assert_close(found.unlearn["embed"], pairs.unlearn["embed"].sum(1) / 10)
    assert found.norms["unlearn"]["deep"] == pytest.approx(math.sqrt(-float(pairs.unlearn["deep"].sum())) / 10)
    torch.testing.assert_close(pairs.cosine().diagonal(), torch.ones(3, dtype=torch.float64))


def effects() -> list[Effect]:
    bare = token_effect(with_ref=False)
    objective = token_effect().g_effect(NPO(0.3))
    with_norm = GEffect("GA()", objective.unlearn, objective.retain, NORMS | {"objective": {"embed": 0.0, "deep": 2.0}})
    return [objective, with_norm, samples(), gram().samples(), token_effect(), bare, gram(), history()]


@pytest.mark.parametrize("index", range(8))
def test_parquet_gives_back_the_same_effect(tmp_path, index):
    pytest.importorskip("pyarrow")
    effect = effects()[index]
    path = effect.to_parquet(tmp_path / "effect.parquet")
    again = Effect.from_parquet(path)
    assert type(again) is type(effect)
    assert_same(again.__dict__, effect.__dict__)
    assert_same(type(effect).from_parquet(path).__dict__, effect.__dict__)
    assert [p.name for p in tmp_path.iterdir()] == ["effect.parquet"]


def assert_same(a, b) -> None:
    if isinstance(b, dict):
        assert list(a) == list(b)
        for key in b:
            assert_same(a[key], b[key])
    elif isinstance(b, list):
        assert len(a) == len(b)
        for one, other in zip(a, b, strict=True):
            assert_same(one, other)
    elif isinstance(b, torch.Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b)
    elif isinstance(b, GEffect):
        assert_same(a.__dict__, b.__dict__)
    else:
        assert a == b


def history() -> EffectHistory:
    """Steps that differ in what is known of them: all, no norm of the objective, neither errors nor risks."""

    def at(step: int, **more) -> GEffect:
        sides = ({"embed": step / 3, "deep": -1.0 - step}, {"embed": 0.1 * step, "deep": 1e-300})
        return GEffect("GA()", *sides, **more)

    both = {side: {"embed": 0.1, "deep": 1 / 3, "total": 0.7} for side in ("unlearn", "retain")}
    own = NORMS | {"objective": {"embed": 0.0, "deep": 2 / 7}}
    return EffectHistory.of(
        {
            0: at(0, norms=own, counts=COUNTS | {"objective": 9}, errors=both, risks={"unlearn": 2.1, "retain": 1 / 3}),
            7: at(7, norms=NORMS, counts=COUNTS | {"objective": 8}, risks={"unlearn": 2.2, "retain": 1e-30}),
            9: at(9, norms={}, counts=COUNTS),
        }
    )


def test_histories_are_effects():
    found = history()
    assert found.groups == ["embed", "deep"] and found.objective == "GA()" and found.risk == "NLL()"
    assert found.unlearn == {"embed": [0.0, 7 / 3, 3.0], "deep": [-1.0, -8.0, -10.0]}
    assert found.total("unlearn") == found.values("unlearn") == found.values("unlearn", "total")
    assert found.retain["deep"] == found.values("retain", "deep") == [1e-300] * 3
    assert found.counts == COUNTS  # the objective's differs
    assert found.norms["retain"]["deep"][:2] == [0.25, 0.25] and math.isnan(found.norms["retain"]["deep"][2])
    assert found.norms["objective"]["deep"][0] == 2 / 7 and math.isnan(found.norms["objective"]["deep"][1])
    assert repr(found) == "EffectHistory(GA() at steps 0, 7, 9; embed, deep; risk NLL())"
    with pytest.raises(ValueError, match="no group 'lm'"):
        found.cumulative("unlearn", "lm")
    pytest.importorskip("pandas")
    frame = found.to_frame()
    assert list(frame.columns) == ["objective", "step", "quantity", "side", "group", "value"]
    assert set(frame["objective"]) == {"GA()"} and set(frame["step"]) == {0, 7, 9}


def test_cumulative_rows_of_a_file_are_not_read(tmp_path):
    pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = history().to_parquet(tmp_path / "history.parquet")
    table = parquet.read_table(path)
    derived = [quantity in ("cumulative", "cosine") for quantity in table["quantity"].to_pylist()]
    assert sum(derived) == 24  # 18 and, at the first step alone, 6
    few = table.filter([not one for one in derived])
    parquet.write_table(few, path)
    with pytest.raises(DamagedFile, match="take the metadata gfast_sha256 out of it"):
        EffectHistory.from_parquet(path)
    metadata = {name: value for name, value in few.schema.metadata.items() if name != b"gfast_sha256"}
    parquet.write_table(few.replace_schema_metadata(metadata), path)
    again = EffectHistory.from_parquet(path)
    assert again == history() and again.cumulative("unlearn") == history().cumulative("unlearn")
    with pytest.raises(ValueError, match="holds a history effect"):
        GEffect.from_parquet(path)


@pytest.mark.parametrize("module", [sample_effect, effect_history, base])
def test_examples_run(module):
    found = doctest.testmod(module)
    assert found.attempted > 0 and found.failed == 0


def test_files_that_are_something_else_are_refused(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = samples().to_parquet(tmp_path / "samples.parquet")
    with pytest.raises(ValueError, match="holds a sample effect, not a token one"):
        TokenEffect.from_parquet(path)
    (tmp_path / "text.parquet").write_text("hello")
    with pytest.raises(ValueError, match="text.parquet is damaged"):
        Effect.from_parquet(tmp_path / "text.parquet")
    parquet.write_table(pyarrow.table({"a": [1]}), tmp_path / "other.parquet")
    with pytest.raises(ValueError, match="no effect written by gfast"):
        Effect.from_parquet(tmp_path / "other.parquet")


def test_frames_are_tidy():
    pytest.importorskip("pandas")
    frame = token_effect().to_frame()
    assert list(frame.columns) == ["quantity", "side", "group", "sample", "token", "value"]
    one = frame[(frame["quantity"] == "token_effect") & (frame["side"] == "retain") & (frame["group"] == "total")]
    assert len(one) == sum(SIZES)
    assert list(samples().to_frame().columns) == ["quantity", "side", "group", "sample", "value"]
    assert list(gram().to_frame().columns) == ["quantity", "side", "group", "sample", "other", "value"]
    assert "embed, deep" in repr(samples()).replace("2 groups: ", "")


def test_histories_add_up_over_steps(tmp_path):
    pytest.importorskip("pyarrow")
    from gfast.training.records import read_records, write_record

    def at(scale: float) -> GEffect:
        sides = ({"embed": scale, "deep": 2 * scale}, {"embed": -scale, "deep": 0.5})
        return GEffect("GA()", *sides, NORMS | {"objective": {"embed": 1.0, "deep": 2.0}})

    effects = {0: at(-1.0), 4: at(-2.0), 5: at(3.0)}
    history = EffectHistory.of(dict(reversed(effects.items())))
    assert history.steps == [0, 4, 5]
    assert history.values("unlearn") == [-3.0, -6.0, 9.0]
    assert history.cumulative("unlearn") == [0.0, -12.0, -18.0]
    assert history.cumulative("retain", "deep", learning_rate=0.1) == pytest.approx([0.0, 0.2, 0.25])
    for step, effect in effects.items():
        common = {"run": "a", "objective": effect.objective, "step": step, "epoch": 0.0}
        other = [{"quantity": "loss", "value": 1.0}, {"quantity": "risk", "side": "retain", "value": 2.0 + step}]
        write_record(tmp_path, [common | row for row in [*effect.rows(), *other]])
    records = read_records(tmp_path)
    again = EffectHistory.from_records(records)
    assert again.steps == history.steps
    assert [effect.unlearn for effect in again.effects] == [effect.unlearn for effect in history.effects]
    assert again.effects[0].groups == ["embed", "deep"]  # from input to output, not by name as in the file
    assert again.cumulative("retain") == history.cumulative("retain")
    assert [effect.risks for effect in again.effects] == [{"retain": 2.0}, {"retain": 6.0}, {"retain": 7.0}]
    named = EffectHistory.from_records(records, risk="KL()")  # the recorded risk is the NLL, not this one
    assert named.risk == "KL()" and not any(effect.risks for effect in named.effects)
    frame = again.to_frame()
    rows = frame[(frame["quantity"] == "cumulative") & (frame["side"] == "unlearn") & (frame["group"] == "total")]
    assert rows["value"].tolist() == [0.0, -12.0, -18.0]
    with pytest.raises(ValueError, match="no objective"):
        EffectHistory.from_records(records[records["quantity"] == "loss"])
    (own,) = records["objective"].unique()
    both = [*records.to_dict("records"), *records.assign(objective="other", value=0.0).to_dict("records")]
    assert EffectHistory.from_records(both, objective=own).effects == again.effects
    with pytest.raises(ValueError, match="choose one with objective="):
        EffectHistory.from_records(both)
    # A step without a label on either side recorded norms alone: it was not measured.
    norm = {"objective": own, "step": 9, "quantity": "objective_norm", "side": "", "group": "deep", "value": 1.0}
    assert EffectHistory.from_records([*records.to_dict("records"), norm]).steps == [0, 4, 5]
    infinite = GEffect("GA()", {"a": math.inf, "b": -math.inf}, {"a": math.inf, "b": 1.0}, {})
    assert math.isnan(infinite.total("unlearn")) and infinite.total("retain") == math.inf
    other = GEffect("NPO(beta=1.0)", effects[0].unlearn, effects[0].retain, NORMS)
    with pytest.raises(ValueError, match="of one objective, and these"):
        EffectHistory.of({0: effects[0], 1: other})
