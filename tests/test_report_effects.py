"""The report's figures of samples and tokens."""

import numpy as np
import pytest
import torch
from helpers.report_runs import GA_COURSE, write_run

from gfast.files import write_json
from gfast.geffect import TokenEffect
from gfast.report import build_report
from gfast.report.effects import WEIGHT_RANGES, last_tokens, weighted_samples
from gfast.report.effects import _in as in_range
from gfast.report.figures import drawings
from gfast.report.runs import load_runs
from gfast.report.style import LIGHT
from gfast.training.records import effect_file, token_texts_file, write_record


def effects_of_words(seed: int, scale: float) -> TokenEffect:
    rng = torch.Generator().manual_seed(seed)

    def random() -> list[torch.Tensor]:
        return [torch.randn(len(text), generator=rng, dtype=torch.float64) for text in WORDS]

    sides = ({"embed": random(), "deep": random()} for _ in range(2))
    ref = [-value.abs() for value in random()]
    norms = {side: {"embed": 1.0, "deep": 1.0} for side in ("unlearn", "retain")}
    places = [torch.arange(len(text)) + 4 for text in WORDS]
    return TokenEffect(*sides, [one * scale for one in ref], places, places, norms, ref)


WORDS = [["Her", " name", " is", " <b>Ana</b>", "."], ["No", "\n"], []]


@pytest.fixture
def with_effects(tmp_path):
    """An NPO run with effects of samples and tokens at three steps; at step 0 the model is its own reference."""
    run = write_run(tmp_path / "npo", "NPO(beta=0.1) + KL()", GA_COURSE)
    for step, scale in ((0, 1.0), (5, 20.0), (10, 400.0)):
        tokens = effects_of_words(step, scale)
        tokens.to_parquet(effect_file(run, "token", step))
        tokens.samples().to_parquet(effect_file(run, "sample", step))
    texts = [{"question": f"Who is {i}?", "pieces": pieces} for i, pieces in enumerate(WORDS)]
    write_json(token_texts_file(run), {"samples": texts})
    return run


def test_weights_of_samples_follow_the_objective(with_effects):
    (run,) = load_runs([with_effects])
    found = weighted_samples(run)
    assert [step for step, *_ in found] == [0, 5, 10]
    assert found[0][1].tolist() == [1.0, 1.0]  # NPO on the original model; the answer without a word is left out
    for step, weight, unlearn, _ in found:
        tokens = dict(run.effects("token"))[step]
        for s in range(2):
            ratio = float(tokens.logp[s].sum() - tokens.ref_logp[s].sum())
            assert weight[s] == pytest.approx(2 / (1 + np.exp(-0.1 * ratio)))
            assert unlearn[s] == pytest.approx(float(tokens.total("unlearn")[s].sum()))


def test_answers_that_harm_the_retain_set_most_are_named(with_effects):
    (drawing,) = [one for one in drawings(load_runs([with_effects])) if one.name == "answers"]
    runs = load_runs([with_effects])
    points, bars = drawing.draw(runs, LIGHT).axes
    retain = dict(runs[0].effects("sample"))[10].total("retain")[:2]  # the third has nothing labelled
    assert sorted(points.collections[0].get_offsets()[:, 1]) == pytest.approx(sorted(retain.tolist()))
    assert [bar.get_width() for bar in bars.patches] == pytest.approx(sorted(retain.tolist()))
    first = int(retain.argmin())
    assert [text.get_text() for text in bars.get_yticklabels()] == [f"Who is {s}?" for s in (first, 1 - first)]


@pytest.mark.parametrize("where", ["effects", "log-probs"])
def test_effects_of_a_run_that_diverged_are_those_before(with_effects, tmp_path, where):
    """Of the answers whose numbers are finite, and of the tokens at the last step where all are."""
    tokens = effects_of_words(10, 400.0)
    (tokens.retain["embed"] if where == "effects" else tokens.logp)[0][1] = float("nan")
    tokens.to_parquet(effect_file(with_effects, "token", 10))
    tokens.samples().to_parquet(effect_file(with_effects, "sample", 10))
    (run,) = load_runs([with_effects])
    assert [len(weight) for _, weight, *_ in weighted_samples(run)] == [2, 2, 1]
    assert last_tokens(run)[0] == 5
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gfast.report.html.drawings", lambda runs: drawings(runs)[-3:])
        build_report([with_effects], tmp_path / "out")
    names = {path.stem for path in (tmp_path / "out" / "figures").iterdir()}
    assert names == {"samples", "answers", "tokens"}


def test_answers_measured_without_an_objective(tmp_path, with_effects):
    run = write_run(tmp_path / "ge", "WGA(alpha=1.0)", GA_COURSE)
    for path in (run / "records").iterdir():
        path.unlink()
    effects_of_words(0, 1.0).samples().to_parquet(effect_file(run, "sample", 0))
    rows = [{"quantity": "risk", "side": side, "value": 0.5} for side in ("unlearn", "retain")]
    common = {"run": "ge", "objective": "WGA(alpha=1.0)", "step": 0, "epoch": 0.0}
    write_record(run, [common | row for row in rows])
    write_json(
        token_texts_file(run), {"samples": [{"question": f"Who is {i}?", "pieces": p} for i, p in enumerate(WORDS)]}
    )
    source = build_report([run], tmp_path / "out").read_text()
    assert "effects of answers" in source and "no G-effect recorded" not in source
    assert [path.name for path in (tmp_path / "out" / "figures").iterdir()] == ["answers.png"]


def test_every_weight_falls_into_one_range():
    weights = np.array([0.0, 0.25, 0.6, 0.75, 0.99, 1.0, 1.0001, 2.0])
    assert sum(in_range(weights, limits).astype(int) for limits in WEIGHT_RANGES).tolist() == [1] * 8


def test_figures_of_samples_and_tokens(with_effects, tmp_path):
    names = [drawing.name for drawing in drawings(load_runs([with_effects]))]
    assert names[-3:] == ["samples", "answers", "tokens"]
    page = build_report([with_effects], tmp_path / "report").read_text()
    assert "Tokens: where an objective spends its damage" in page
    tokens = next(drawing for drawing in drawings(load_runs([with_effects])) if drawing.name == "tokens")
    figure = tokens.draw(load_runs([with_effects]), LIGHT)
    written = [text.get_text() for ax in figure.axes for text in ax.texts]
    assert [piece in written for piece in ("Her", "name", "<b>Ana</b>", "⏎", "Who is 0?")] == [True] * 5
    assert "Who is 2?" not in written  # nothing labelled, nothing to show
    sizes = {text.get_text(): text.get_fontsize() for ax in figure.axes for text in ax.texts}
    assert sizes["Her"] == sizes["name"]  # NPO gives every token of an answer the same weight
