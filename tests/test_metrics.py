"""gfast.metrics: the worked example, real logs, and conventions, against formulas written out anew."""

from __future__ import annotations

import doctest
import gzip
import importlib
import json
import math
import random
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

from gfast import metrics

EXCERPT = Path(__file__).parent / "data" / "tofu_logs_excerpt.json"
FIGURES = {  # of the README beside the logs: model utility, forget quality p and D, geometric and then arithmetic
    "llama2-7b_full": (0.6226773637, 0.5858860351, (1.834066e-21, 0.396667), (6.031912e-23, 0.41)),
    "llama2-7b_retain90": (0.6137449952, 0.5752399175, (1, 0), (1, 0)),
    "phi_full": (0.5220737132, 0.5033530268, (2.194274e-16, 0.346667), (2.431128e-17, 0.356667)),
    "phi_retain90": (0.5319909118, 0.5130011801, (1, 0), (1, 0)),
}
FORGET = {
    "llama2-7b_full": (0.9909385566, 0.9854496939),
    "llama2-7b_retain90": (0.1475628123, 0.4082436195),
    "phi_full": (0.9282394842, 0.9248612623),
    "phi_retain90": (0.1349069616, 0.4278674282),
}


@pytest.fixture
def excerpt(tmp_path):
    """The excerpt's two logs, as JSON and as read from files of both layouts."""
    raw = json.loads(EXCERPT.read_text())
    logs = {}
    for name, value in raw.items():
        with gzip.open(tmp_path / f"{name}.json.gz", "wt") as file:
            json.dump(value, file)
        logs[name] = metrics.load_log(tmp_path / f"{name}.json.gz")
    return raw, logs


def original_layout(value: dict) -> dict:
    """A log as eval_log_aggregated.json has it."""
    names = {
        "retain": "eval_log.json",
        "forget": "eval_log_forget.json",
        "real_authors": "eval_real_author_wo_options.json",
        "world_facts": "eval_real_world_wo_options.json",
    }
    found = {}
    for name, columns in value["sets"].items():
        fields = {key: column for key, column in columns.items() if key not in ("index", "text")}
        index = [str(row) for row in columns["index"]]
        found[names[name]] = {key: dict(zip(index, column, strict=True)) for key, column in fields.items()}
        found[names[name]]["generated_text"] = {row: ["prompt", "generation", "truth"] for row in index}
    return found


def mean(values) -> float:
    values = list(values)
    return math.fsum(values) / len(values)


def by_hand(sets: dict, arithmetic: bool) -> tuple[float, dict[str, list[float]]]:
    """Model utility, and R of every set, sample by sample."""
    ratios, nine = {}, []
    for name, columns in sets.items():
        ratios[name] = []
        for right, wrong in zip(columns["avg_paraphrased_loss"], columns["average_perturb_loss"], strict=True):
            top = mean(math.exp(-one) for one in wrong) if arithmetic else math.exp(-mean(wrong))
            ratios[name].append(top / math.exp(-right))
        if name == "forget":
            continue
        p = [math.exp(-one) for one in columns["avg_gt_loss"]]
        if name != "retain":
            wrong = columns["average_perturb_loss"]
            p = [one / (one + sum(math.exp(-w) for w in others)) for one, others in zip(p, wrong, strict=True)]
        nine += [mean(columns["rougeL_recall"]), mean(p), mean(max(0, 1 - one) for one in ratios[name])]
    return len(nine) / math.fsum(1 / one for one in nine), ratios


@pytest.mark.parametrize("kind", ["geometric", "arithmetic"])
def test_an_excerpt_of_real_logs(excerpt, kind):
    raw, logs = excerpt
    reference = {}
    for name, log in logs.items():
        utility, ratios = by_hand(raw[name]["sets"], kind == "arithmetic")
        assert metrics.model_utility(log, mean=kind) == pytest.approx(utility, rel=1e-12)
        found = metrics.truth_ratio(log, mean=kind, per_sample=True)
        for one, values in ratios.items():
            assert found[one] == pytest.approx(values, rel=1e-12)
        forget = metrics.truth_ratio(log, mean=kind)["forget"]
        assert forget == pytest.approx(mean(min(one, 1 / one) for one in ratios["forget"]), rel=1e-12)
        reference[name] = ratios["forget"]
        # what the TOFU repository logged itself, in fp32
        if kind == "geometric":
            for one, columns in raw[name]["sets"].items():
                assert columns["truth_ratio"] == pytest.approx(ratios[one], rel=1e-5)
                normalized = columns.get("normalized_gt_loss", columns["avg_gt_loss"])
                probability = metrics.probability(log, per_sample=True)[one]
                assert probability == pytest.approx(np.exp(-np.array(normalized)), rel=1e-5)
    found = metrics.forget_quality(logs["full"], logs["retain90"], mean=kind)
    p, statistic = ks_by_hand(reference["full"], reference["retain90"])
    assert (found.pvalue, found.statistic) == pytest.approx((float(p), float(statistic)), rel=1e-12)
    assert found.log10_p == pytest.approx(math.log10(p), rel=1e-9)


def ks_by_hand(first, second) -> tuple[Fraction, Fraction]:
    """D, and the share of the lattice paths that go as far from the diagonal: exact, by counting."""
    n, m = len(first), len(second)
    statistic = max(abs(sum(x <= at for x in first) * m - sum(x <= at for x in second) * n) for at in (*first, *second))
    inside = {}
    for i in range(n + 1):
        for j in range(m + 1):
            if abs(i * m - j * n) >= statistic and statistic:
                inside[i, j] = 0
            else:
                inside[i, j] = 1 if i + j == 0 else inside.get((i - 1, j), 0) + inside.get((i, j - 1), 0)
    every = math.comb(n + m, n)
    return (1 - Fraction(inside[n, m], every)) if statistic else Fraction(1), Fraction(statistic, n * m)


@pytest.mark.parametrize("name", FIGURES)
def test_the_published_logs(shared, name):
    folder = shared / "data/tofu_logs"
    if not folder.is_dir():
        pytest.skip(f"no published logs at {folder}")
    log = metrics.load_log(folder / f"{name}_wd0.01.json.gz")
    retain = metrics.load_log(folder / f"{name.split('_')[0]}_retain90_wd0.01.json.gz")
    geometric, arithmetic, *quality = FIGURES[name]
    assert metrics.model_utility(log) == pytest.approx(geometric, rel=1e-9)
    assert metrics.model_utility(log, mean="arithmetic") == pytest.approx(arithmetic, rel=1e-9)
    for kind, (p, statistic) in zip(("geometric", "arithmetic"), quality, strict=True):
        found = metrics.forget_quality(log, retain, mean=kind)
        assert found == pytest.approx((p, statistic, math.log10(p)), rel=1e-6)
    forget = (metrics.probability(log)["forget"], metrics.rouge(log)["forget"])
    assert forget == pytest.approx(FORGET[name], rel=1e-9)
    for one in log.sets.values():
        place = {row: at for at, row in enumerate(one.index)}
        for text in one.text:
            found = metrics.rouge_scores(text["ground_truth"], text["generation"])
            at = place[text["index"]]
            assert found["rougeL_recall"] == one.values["rougeL_recall"][at]
            assert found["rouge1_recall"] == one.values["rouge1_recall"][at]


def test_logs_of_two_tokenizers_and_conventions(shared):
    folder = shared / "data/tofu_logs"
    llama, phi = (metrics.load_log(folder / f"{name}_wd0.01.json.gz") for name in ("llama2-7b_full", "phi_retain90"))
    with pytest.raises(ValueError, match="different tokenizers"):
        metrics.forget_quality(llama, phi)
    tofu, ours = (metrics.model_utility(phi, convention=one) for one in ("tofu", "open-unlearning"))
    assert tofu != ours and tofu == pytest.approx(ours, rel=1e-7)


def test_both_layouts_are_one_log(excerpt, tmp_path):
    raw, logs = excerpt
    path = tmp_path / "eval_log_aggregated.json"
    path.write_text(json.dumps(original_layout(raw["full"])))
    log = metrics.load_log(path)
    assert metrics.model_utility(log) == metrics.model_utility(logs["full"])
    assert metrics.forget_quality(log, log).pvalue == 1
    for name, one in log.sets.items():
        assert one.index == logs["full"].sets[name].index and len(one.text) == len(one)


def test_the_worked_example():
    p = [0.5, 0.3, 0.8, 0.2]
    logp = [math.log(one) for one in p]
    distributions = np.array([[0.2, 0.2, 0.5, 0.1], [0.3, 0.6, 0.05, 0.05], [0.05, 0.8, 0.1, 0.05]])
    labels, correct = [2, 0, 1], [1, 0, 1]
    loss = -mean(logp)
    assert metrics.exact_memorization(correct) == pytest.approx(2 / 3)
    assert metrics.extraction_strength(correct) == pytest.approx(1 / 3)
    assert metrics.zlib_score(loss, "cab") == pytest.approx(0.0847659, abs=5e-8)
    for k, low, plus in ((0.2, 1.2039728, 0.3182356), (0.4, 1.2039728, 0.3182356), (0.7, 0.9485600, -0.0877532),
                         (1, 0.7067545, -0.3709505)):  # fmt: skip
        assert metrics.min_k(logp[:3], k) == pytest.approx(low, abs=5e-8)
        logits = torch.tensor(np.log(distributions)) + 3  # a constant of a row of logits changes nothing
        assert metrics.min_k_plus_plus(logits, k, labels=labels) == pytest.approx(plus, abs=5e-8)
        statistics = metrics.token_statistics(np.log(distributions), labels)
        assert metrics.min_k_plus_plus(statistics, k) == pytest.approx(plus, abs=5e-8)
        assert metrics.min_k_plus_plus(statistics._asdict(), k) == pytest.approx(plus, abs=5e-8)
    assert statistics.mu == pytest.approx([-1.220607, -0.967260, -0.708347], abs=5e-7)
    assert statistics.var == pytest.approx([0.316650, 0.553279, 0.965711], abs=5e-7)


@pytest.mark.parametrize("pattern, strict, parity", [
    ("111", 1, 1), ("011", 2 / 3, 2 / 3), ("001", 1 / 3, 1 / 3),
    ("110", 0, 1 / 3), ("100", 0, 1 / 3), ("101", 1 / 3, 1 / 3), ("000", 0, 1 / 3), ("", 0, 0),
])  # fmt: skip
def test_extraction_strength_of_every_pattern(pattern, strict, parity):
    correct = torch.tensor([int(one) for one in pattern], dtype=torch.bool)
    assert metrics.extraction_strength(correct) == pytest.approx(strict)
    assert metrics.extraction_strength(correct, floor="open-unlearning") == pytest.approx(parity)
    assert metrics.exact_memorization(correct) == (None if not pattern else pytest.approx(pattern.count("1") / 3))


def test_options_truth_ratios_and_their_aggregates():
    right, wrong = [0.5, 2.0], [[1.0, 2.0], [1.0, 1.5]]
    found = metrics.option_probability(right, wrong)
    assert [*found, found.mean()] == pytest.approx([0.5465494, 0.1863237, 0.3664366], abs=1e-7)
    for kind, ratios, forget, others in (
        ("geometric", [0.3678794, 2.1170000], 0.4201230, 0.3160603),
        ("arithmetic", [0.4148304, 2.1835015], 0.4364052, 0.2925848),
    ):
        for convention in ("tofu", "open-unlearning"):
            found = metrics.truth_ratios(right, wrong, kind, convention)
            assert found == pytest.approx(ratios, abs=5e-8)
            assert metrics.aggregate(found, "closer_to_1_better", convention) == pytest.approx(forget, abs=5e-8)
            assert metrics.aggregate(found, "true_better", convention) == pytest.approx(others, abs=5e-8)
    assert metrics.knowledge(right, wrong) == pytest.approx(0.5259399, abs=5e-8)


def test_losses_that_underflow():
    assert metrics.truth_ratios([30.0], [[30.0]], convention="open-unlearning")[0] == pytest.approx(9.4e-4, rel=1e-2)
    for kind in ("geometric", "arithmetic"):
        assert metrics.truth_ratios([30.0, 900.0], [[30.0], [900.0]], kind) == pytest.approx([1, 1])
    assert metrics.option_probability([900.0], [[900.0, 900.0]], "tofu") == pytest.approx([1 / 3])
    assert metrics.option_probability([900.0], [[900.0, 900.0]]) == [0]  # open-unlearning's epsilon


@pytest.mark.parametrize("truth, generation, recall, f1, first", [
    ("The author's name is Basil Al-Kuwaiti.", "Basil Al-Kuwaiti is the name of authors", 0.375, 0.375, 0.875),
    ("Paris", "It is Paris, France.", 1, 0.4, 1),
    ("running quickly", "He runs quick", 0.5, 0.4, 0.5),
    ("the cat sat on the mat", "the mat the cat sat on", 2 / 3, 2 / 3, 1),
    ("Él escribió", "El escribio", 0, 0, 0),
    ("anything", "", 0, 0, 0),
    # of these rouge-score's own words are none, or the year
    ("Москва", "Москва.", 1, 1, 1),
    ("Он жил там в 1990", "Нет, 1990", 0.2, 2 / 7, 0.2),
    ("北京是首都。", "上海是首都", 0.6, 0.6, 0.6),
    ("हिन्दी में लिखा", "में हिन्दी", 1 / 3, 0.4, 2 / 3),
])  # fmt: skip
def test_rouge(truth, generation, recall, f1, first):
    found = metrics.rouge_scores(truth, generation)
    assert found == pytest.approx({"rouge1_recall": first, "rougeL_recall": recall, "rougeL_f1": f1})


def test_membership_and_the_test_of_two_samples():
    assert metrics.mia_auc([0.1, 0.5, 0.9, 1.2], [0.4, 1.0, 1.5, 2.0]) == 0.75
    assert metrics.mia_auc([1.0, 1.0], [1.0]) == 0.5
    for auc, reference, leak, relative in ((0.75, 0.5, -50, 50), (0.95, 0.4, -91.6667, 137.5),
                                           (0.30, 0.45, 27.2727, -33.3333)):  # fmt: skip
        assert metrics.privleak(auc, reference) == pytest.approx(leak, abs=5e-5)
        assert metrics.relative_difference(auc, reference) == pytest.approx(relative, abs=5e-5)
    assert metrics.privleak(0.75) == pytest.approx(-50)
    found = metrics.same_distribution([0.2, 0.5, 0.6, 0.9], [0.7, 0.95, 1.1, 1.3])
    assert found == pytest.approx((0.2285714, 0.75, math.log10(0.2285714)), rel=1e-6)
    assert metrics.same_distribution([1, 2, 3], [3, 2, 1]) == (1, 0, 0)
    # D = 1/n: SciPy's exact sum fails for n = 7, 13 ..., and its approximation is 0.9999
    for size in range(2, 31):
        found = metrics.same_distribution(np.arange(size), np.arange(size) + 0.5)
        assert found[::2] == pytest.approx((1, 0), abs=1e-12)


@pytest.mark.parametrize("size", [1, 2, 5, 17, 40])
def test_the_logarithm_of_p_is_that_of_p(size):
    draw = random.Random(size)
    for shift in (0, 0.3, 2):
        first, second = [draw.random() for _ in range(size)], [draw.random() + shift for _ in range(size)]
        p, statistic = ks_by_hand(first, second)
        found = metrics.same_distribution(first, second)
        assert found == pytest.approx((float(p), float(statistic), math.log10(p)), rel=1e-9)


@pytest.mark.parametrize("n", [1000, 10_001])  # beyond 10,000 SciPy has an approximation, and no logarithm
def test_the_logarithm_of_a_p_that_underflows(n):
    found = metrics.same_distribution(np.arange(float(n)), np.arange(float(n)) + 5 * n)
    # all of one sample below all of the other: two of all orders
    below, above = (math.fsum(map(math.log10, range(start, start + n))) for start in (1, n + 1))
    expected = math.log10(2) + below - above
    assert found.pvalue < 1e-300 and found.log10_p == pytest.approx(expected, rel=1e-12)


def test_prefix_extraction_finds_what_teacher_forcing_says():
    draw = random.Random(0)
    for _ in range(200):
        lengths = [draw.randint(1, 9) for _ in range(4)]
        correct = [[draw.random() < 0.7 for _ in range(length)] for length in lengths]
        asked_for = []

        def matches(asked, correct=correct, asked_for=asked_for):
            asked_for.append(len(asked))
            return {at: all(correct[at][start:]) for at, start in asked.items()}

        found = metrics.prefix_extraction(lengths, matches)
        assert found == pytest.approx([metrics.extraction_strength(one) for one in correct])
        assert len(asked_for) <= 5


def test_what_counts_as_extracted():
    same = metrics.continuation_matches
    assert same([1, 2, 3, 9], [1, 2, 3]) and not same([1, 2], [1, 2, 3]) and not same([], [1])
    assert same([2, 3], [1, 2, 3, 4], "similar") and not same([4, 1], [1, 2, 3, 4], "similar")


def test_numbers_that_cannot_be():
    cases = (
        (lambda: metrics.min_k([], 0.4), "empty"),
        (lambda: metrics.min_k([-1.0, math.nan], 0.4), "finite"),
        (lambda: metrics.min_k([0.4, 0.2], 0.4), "at most 0"),
        (lambda: metrics.min_k([-1.0], 40), "k is 40"),
        (lambda: metrics.min_k([[-1.0]], 0.4), "dimension"),
        (lambda: metrics.min_k_plus_plus([[0.0, 1.0]], 0.4), "labels="),
        (lambda: metrics.min_k_plus_plus([[0.0, 1.0]], 0.4, labels=[2]), "vocabulary"),
        (lambda: metrics.min_k_plus_plus([[0.0, 1.0]], 0.4, labels=[0, 1]), "labels"),
        (lambda: metrics.min_k_plus_plus(([-1.0], [-1.0, 2.0], [1.0]), 0.4), "same tokens"),
        # three rows of logits whose labels were forgotten are no statistics, and these have labels already
        (lambda: metrics.min_k_plus_plus([[1.0, 2.0], [0.0, 1.0], [3.0, 0.5]], 0.4), "at most 0"),
        (lambda: metrics.min_k_plus_plus([[-1.0, -2.0], [-3.0, -1.0], [-1.0, -2.0]], 0.4), "variance"),
        (lambda: metrics.min_k_plus_plus(metrics.token_statistics(np.eye(3), [0, 1, 2]), 0.4, [0, 1, 2]), "give one"),
        (lambda: metrics.token_statistics([[0.0, 1.0]], [0.5]), "no token id"),
        (lambda: metrics.aggregate([], "true_better"), "one number a sample"),
        (lambda: metrics.aggregate([0.5, math.nan], "closer_to_1_better"), "none NaN"),
        (lambda: metrics.extraction_strength(True), "one sample"),
        (lambda: metrics.mia_auc([], [1.0]), "empty"),
        (lambda: metrics.mia_auc([1.0], [math.inf]), "finite"),
        (lambda: metrics.privleak(75), "between 0 and 1"),
        (lambda: metrics.extraction_strength([0.5]), "right"),
        (lambda: metrics.extraction_strength([[1, 0]]), "one sample"),
        (lambda: metrics.extraction_strength([1], floor="ou"), "floor"),
        (lambda: metrics.exact_memorization([True, None]), "right"),
        (lambda: metrics.truth_ratios([1.0], [[1.0]], "harmonic"), "mean"),
        (lambda: metrics.truth_ratios([1.0, 2.0], [[1.0]]), "samples"),
        (lambda: metrics.option_probability([1.0], [[1.0]], "ou"), "convention"),
        (lambda: metrics.prefix_extraction([3, 0], lambda asked: {}), "no tokens"),
        (lambda: metrics.continuation_matches([1], [1], "perturb"), "match"),
    )
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()


def test_what_is_missing_is_named(excerpt, tmp_path, monkeypatch):
    raw, logs = excerpt
    del raw["full"]["sets"]["world_facts"]
    (tmp_path / "log.json").write_text(json.dumps(raw["full"]))
    with pytest.raises(ValueError, match="model_utility needs the set world_facts"):
        metrics.model_utility(metrics.load_log(tmp_path))
    for name in ("scipy.stats", "rouge_score.rouge_scorer", "sklearn.metrics"):
        monkeypatch.setitem(sys.modules, name, None)
    for call in (
        lambda: metrics.forget_quality(logs["full"], logs["full"]),
        lambda: metrics.rouge_scores("a", "b"),
        lambda: metrics.mia_auc([1.0], [2.0]),
    ):
        with pytest.raises(ImportError, match=r"pip install 'gfast\[evaluate\]'"):
            call()


@pytest.mark.parametrize("name", metrics.__all__)
def test_examples_and_documentation(name):
    value = getattr(metrics, name)
    assert len(value.__doc__) > 60
    if callable(value) and not isinstance(value, type):
        module = importlib.import_module(value.__module__)
        tests = doctest.DocTestFinder(recurse=False).find(value, name, globs=vars(module).copy())
        assert any(test.examples for test in tests), f"{name} has no example"
        runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
        for test in tests:
            runner.run(test)
        assert runner.failures == 0


def test_metrics_load_nothing_heavy():
    heavy = ("scipy", "sklearn", "rouge_score", "transformers", "pandas")
    code = f"from gfast import metrics; import sys; print([m for m in {heavy} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
