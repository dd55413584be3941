"""What the benchmarks measure by and what they refuse: wrong results, memory, slow calls, approximations."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from types import SimpleNamespace

import pytest

BENCH = Path(__file__).resolve().parents[1] / "bench"


@pytest.fixture
def losses(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    import losses

    return losses


def test_wrong_losses_are_reported_and_not_timed(losses, monkeypatch):
    from dataclasses import replace

    import harness

    def off_by(name: str, factor: float) -> None:
        provider = losses.PROVIDERS[name]

        def make(case, inputs):
            step = provider.make(case, inputs)
            return lambda: tuple(factor * value for value in step())

        monkeypatch.setitem(losses.PROVIDERS, name, replace(provider, make=make))

    def broken(case, inputs):
        raise RuntimeError("no kernel")

    off_by("gfast", 1.001)
    off_by("eager", 1.001)
    off_by("open_unlearning", 2.0)
    monkeypatch.setitem(losses.PROVIDERS, "upcast", replace(losses.PROVIDERS["upcast"], make=broken))
    case = losses.Case("logits", "wga", "tiny", 32, 512, 64, "fp32", "train", "full", "cpu")
    args = argparse.Namespace(repetitions=1, budget=1.0, peer_budget=None, no_memory=True)
    names = ["gfast", "eager", "open_unlearning", "upcast", "floor"]
    rows = {row["provider"]: row for row in losses.bench(case, names, args)}
    assert "not timed" in rows["gfast"]["wrong"] and "median_ms" not in rows["gfast"]
    assert "unequal" in rows["eager"] and rows["eager"]["median_ms"] > 0  # a peer that rounds is shown, and marked
    assert "not timed" in rows["open_unlearning"]["wrong"] and "median_ms" not in rows["open_unlearning"]
    assert rows["upcast"]["failed"] == "RuntimeError: no kernel"
    printed = "\n".join(harness.line(name, row) for name, row in rows.items())
    assert "WRONG" in printed and "UNEQUAL" in printed and "FAILED" in printed


def test_memory_is_measured_in_a_fresh_process(losses):
    case = losses.Case("logits", "wga", "tiny", 32, 4096, 512, "fp32", "train", "full", "cpu")
    size = losses.peak_mb(case, "fresh_copy", lambda: None)
    assert size is None or 7.5 <= size <= 12  # MiB: a copy of 512 x 4096 in fp32 is 8


def linear_case(losses, rows: int = 64, dtype: str = "fp32", mode: str = "train", batch: str = "full"):
    return losses.Case("linear", "wga", "tiny", 32, 512, rows, dtype, mode, batch, "cpu")


def allowed(losses, **case) -> tuple[int, int]:
    """Bytes, and rows with a label."""
    case = linear_case(losses, **case)
    inputs = losses.make_inputs(case)
    return losses.allowed_bytes(case, inputs), inputs.valid


def test_memory_allowed_is_the_gradients_and_one_chunk(losses, monkeypatch):
    from gfast.ops import head

    d_hidden, d_weight, logits = 64 * 32 * 4, 512 * 32 * 4, 64 * 512 * 4
    for mode in ("train", "forward"):
        assert allowed(losses, mode=mode)[0] == d_hidden + d_weight + logits
    assert allowed(losses, mode="frozen")[0] == d_hidden + logits
    size, valid = allowed(losses, mode="frozen", batch="tofu")
    assert 0 < valid < 64 and size == d_hidden + valid * (512 + 2 * 32) * 4  # copies of the rows and of their dH
    assert allowed(losses, mode="nograd")[0] == logits + 64 * 3 * (4 + 8)
    # 600 rows of logits are held in three chunks
    assert allowed(losses, rows=600)[0] == 600 * 32 * 4 + d_weight + 256 * 512 * 4
    monkeypatch.setattr(head, "_native", lambda dtype: True)
    tile = head._TILE_BYTES  # of the chunks' products that are added to dW in fp32
    assert allowed(losses, rows=600, dtype="bf16")[0] == 600 * 32 * 2 + 512 * 32 * (2 + 4) + 256 * 512 * 2 + tile
    assert allowed(losses, dtype="bf16")[0] == (d_hidden + d_weight + logits) // 2
    monkeypatch.setattr(head, "_native", lambda dtype: False)
    rows, tile = 2 * 64 * 32 * 4, 64 * 32 * 4  # H and dH in fp32; of W, and of the product that becomes dW
    monkeypatch.setattr(head, "_multiplies_mixed", lambda: False)
    assert allowed(losses, dtype="bf16")[0] == d_hidden // 2 + d_weight // 2 + logits + rows + 2 * tile
    monkeypatch.setattr(head, "_multiplies_mixed", lambda: True)
    monkeypatch.setattr("memory.sum_parts", lambda *shape: 7)
    sums = 7 * 64 * 32 * 4  # of dH, by parts of the vocabulary
    assert allowed(losses, dtype="bf16")[0] == d_hidden // 2 + d_weight // 2 + logits + rows + sums


def test_memory_of_scoring_does_not_grow_with_the_logits(losses):
    from gfast.ops.dispatch import compiled
    from gfast.ops.head import _FOLD_BYTES

    if not compiled("fold_rows"):
        pytest.skip("no kernel folds tiles of logits")
    case = losses.replace(linear_case(losses, rows=1024, mode="nograd"), vocab=8192)
    assert losses.allowed_bytes(case, losses.make_inputs(case)) == _FOLD_BYTES + 1024 * 3 * (4 + 8)


def test_memory_is_judged_where_it_was_measured(losses, monkeypatch):
    from harness import line
    from laws import checks

    args = argparse.Namespace(repetitions=1, budget=0.1, peer_budget=None, no_memory=False)

    def rows(size: float | None, mode: str = "train") -> list[dict]:
        monkeypatch.setattr(losses, "peak_mb", lambda *_: size)
        return losses.bench(linear_case(losses, mode=mode), ["gfast", "eager", "floor"], args)

    def verdicts(found: list[dict]) -> dict[str, bool]:
        data = json.loads(json.dumps({"rows": found}))
        return {check.law: check.met for check in checks("losses", data) if check.law.startswith("memory")}

    needed = allowed(losses)[0] / 2**20
    met, missed = rows(needed), rows(1.2 * needed)
    assert {row["provider"] for row in met if "of_memory" in row} == {"gfast"}
    assert verdicts(met) == {"memory": True} and verdicts(missed) == {"memory": False}
    assert any("memory 1.20 of 1.10: MISSED" in line("", row) for row in missed)
    assert verdicts(rows(0.0, "nograd")) == {"memory_nograd": True}
    assert verdicts(rows(None)) == {}  # the system could not say
    earlier = [{key: value for key, value in row.items() if key != "of_memory"} for row in missed]
    assert verdicts(earlier) == {} and not any("memory" in line("", row) for row in earlier)


def test_results_say_which_peers_they_were_measured_with(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    import machine

    listed = {line for file in BENCH.glob("requirements*.txt") for line in file.read_text().splitlines()}
    assert set(machine.PEERS) <= listed
    versions = {"trl": "1.2.3", "triton": "4.5.6"}

    def version(name: str) -> str:
        if name not in versions:
            raise machine.metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(machine.metadata, "version", version)
    found = machine.environment()
    assert found["triton"] == "4.5.6" and found["peers"] == {"trl": "1.2.3"}


def test_a_measurement_of_memory_that_fails_says_why(losses):
    from harness import peak_in_fresh_process

    with pytest.raises(RuntimeError, match="measuring memory failed: KeyError"):
        peak_in_fresh_process(losses.measure, "{}", ["peers_losses"])


def test_slow_steps_are_called_once(losses, monkeypatch):
    import harness

    calls = {"slow": 0, "fast": 0}
    now = 0.0

    def step(name: str, seconds: float) -> None:
        nonlocal now
        calls[name] += 1
        now += seconds

    # a clock of our own: on a busy machine a sleep of a millisecond may last a tenth of a second
    monkeypatch.setattr(harness, "time", SimpleNamespace(perf_counter=lambda: now))
    steps = {"slow": lambda: step("slow", 0.2), "fast": lambda: step("fast", 0.001)}
    times = harness.interleaved(steps, repetitions=5, budget_s=0.1)
    assert calls == {"slow": 1, "fast": 3 + 5}
    assert times["slow"]["repetitions"] == 1 and times["slow"]["median_ms"] == pytest.approx(200)
    assert times["fast"]["repetitions"] == 5 and times["fast"]["median_ms"] == pytest.approx(1)


def test_units_are_timed_beside_what_they_measure(losses):
    from harness import interleaved, of_floor

    calls: list[str] = []
    steps = {name: lambda name=name: calls.append(name) for name in ("unit", "other", "a", "b", "slow")}
    beside = {"a": ["unit"], "b": ["unit", "other"]}
    times = interleaved(steps, repetitions=2, warmup=1, beside=beside)
    once = ["unit", "a", "unit", "other", "b", "slow"]
    assert calls == ["unit", "other", "a", "b", "slow"] + 2 * once
    assert [times[name]["repetitions"] for name in steps] == [4, 2, 2, 2, 2]
    assert {unit: len(ms) for unit, ms in times["b"]["beside_ms"].items()} == {"unit": 2, "other": 2}
    assert "beside_ms" not in times["slow"] and times["unit"]["name"] == "unit"
    unit = {"name": "unit", "rounds_ms": [9.0, 9.0], "median_ms": 9.0}
    row = {"rounds_ms": [4.0, 12.0], "median_ms": 8.0, "beside_ms": {"unit": [2.0, 3.0]}}
    assert of_floor(row, (1, unit)) == 3.0

    first = {"a": 100.0}  # called once before, too slow for a turn: its unit has turns all the same
    times = interleaved({"unit": lambda: None, "a": lambda: None}, repetitions=5, beside={"a": ["unit"]}, first=first)
    assert times["a"]["repetitions"] == 1 and times["unit"]["repetitions"] == 3


def test_floors_are_those_of_the_same_round(losses):
    from harness import of_floor, summary

    one, other, unused = summary([1.0, 2.0, 30.0, 4.0]), summary([1.0, 1.0, 10.0]), summary([1.0])
    # rounds of 2 + 1, 4 + 1 and 60 + 10: a disturbed round has both sides of its ratio disturbed
    assert of_floor(summary([6.0, 10.0, 140.0]), (2, one), (1, other), (0, unused)) == 2.0
    assert of_floor(summary([8.0, 6.0]), (1, one)) == 5.5
    assert of_floor(summary([9.0]), (1, one)) == 3.0  # called once, in no round: against the median


@pytest.fixture
def geffect(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    import geffect

    return geffect


def test_wrong_effects_are_reported_and_not_timed(geffect, monkeypatch):
    from dataclasses import replace

    def off_by(name: str, factor: float) -> None:
        provider = geffect.PROVIDERS[name]

        def wrong(model, forget, retain):
            found = provider.run(model, forget, retain)
            return {s: {group: factor * value for group, value in groups.items()} for s, groups in found.items()}

        monkeypatch.setitem(geffect.PROVIDERS, name, replace(provider, run=wrong))

    off_by("g_effect(WGA)", 1.001)
    off_by("clone loop, WGA", 1.001)
    off_by("sample loop", -1.0)
    settings = {"shape": "tiny", "dtype": "fp32", "batch": 2, "tokens": 10, "layers": 1, "device": "cpu"}
    notes = geffect.checked(settings, ["g_effect(GA)", "g_effect(WGA)", "clone loop, WGA", "sample loop"])
    assert "wrong" not in notes["g_effect(GA)"]
    assert "not timed" in notes["g_effect(WGA)"]["wrong"]
    assert "unequal" in notes["clone loop, WGA"] and "wrong" not in notes["clone loop, WGA"]
    assert "wrong" in notes["sample loop"]


def test_effects_of_another_shape_are_wrong(geffect):
    import torch
    import truth

    settings = {"shape": "tiny", "dtype": "fp32", "batch": 2, "tokens": 10, "layers": 1, "device": "cpu"}
    exact = truth.Truth(*geffect.setup(settings))
    some = {"total": torch.zeros(3, dtype=torch.float64)}
    assert truth.error(exact, {"unlearn": some, "retain": some}, "sample") == float("inf")


MICRO_BATCHES = "published way, micro-batches"


def tiny(rows: int) -> dict:
    return {"shape": "tiny", "dtype": "fp32", "batch": rows, "tokens": 10, "layers": 2, "device": "cpu"}


def test_one_micro_batch_of_the_published_way_is_exact(geffect):
    from peers_effects import MICRO_BATCH
    from truth import Truth

    batches = geffect.setup(tiny(MICRO_BATCH))
    found, truth = geffect.PROVIDERS[MICRO_BATCHES].run(*batches), Truth(*batches)
    for side in ("unlearn", "retain"):
        exact, _ = truth.table("effect", side)[0]["total"]
        assert float(found[side]["total"]) == pytest.approx(exact, rel=1e-4)
    note = geffect.checked(tiny(MICRO_BATCH), [MICRO_BATCHES])[MICRO_BATCHES]
    assert note["off_by"] < 1e-4 and note["error"] < 1e-5


def test_several_micro_batches_of_the_published_way_are_moving_averages(geffect):
    import torch
    from cases import rows_of
    from peers_effects import MICRO_BATCH
    from truth import Truth

    def gradient(batch, weighted: bool):
        """Flat, of the mean NLL or of minus the mean of p NLL, p detached."""
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
        kept = batch["labels"][:, 1:] != -100
        nll = -logits.log_softmax(-1).gather(-1, batch["input_ids"][:, 1:, None])[..., 0][kept]
        loss = -((-nll).exp().detach() * nll).mean() if weighted else nll.mean()
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))]).double()

    model, forget, retain = geffect.setup(tiny(3 * MICRO_BATCH))
    pairs = {"objective": (forget, True), "unlearn": (forget, False), "retain": (retain, False)}
    average = {}
    for key, (batch, weighted) in pairs.items():
        first, second, third = (
            gradient(rows_of(batch, i * MICRO_BATCH, (i + 1) * MICRO_BATCH), weighted) for i in range(3)
        )
        average[key] = 0.36 * first + 0.24 * second + 0.4 * third
    found, truth = geffect.PROVIDERS[MICRO_BATCHES].run(model, forget, retain), Truth(model, forget, retain)
    for side in ("unlearn", "retain"):
        value = float(found[side]["total"])
        assert value == pytest.approx(float(average["objective"] @ average[side]), rel=1e-4)
        exact, _ = truth.table("effect", side)[0]["total"]
        assert abs(value / exact - 1) > 1e-2
    assert all(p.grad is None for p in model.parameters())


def test_an_approximation_is_shown_with_its_error(geffect, monkeypatch):
    from dataclasses import replace

    import harness
    import laws
    import pictures

    names = ["g_effect(WGA)", "published way", MICRO_BATCHES]
    args = argparse.Namespace(repetitions=1, budget=1.0, no_memory=True)
    rows = geffect.bench(tiny(4), names, args)
    ours, published, approximate = rows[-3:]
    assert "unequal" not in ours and "unequal" not in published and "off_by" not in published
    assert approximate["median_ms"] > 0 and approximate["off_by"] > 1e-2
    assert "UNEQUAL: off by" in harness.line("", approximate)
    assert pictures.marked("", approximate) == f" ≠ {approximate['off_by']:.0%} off"
    data = json.loads(json.dumps({"settings": tiny(4), "rows": rows}))
    found = list(laws.checks("geffect", data))
    assert {check.law for check in found} == {"g_effect", "ahead_time"}
    assert not [check.case for check in found if MICRO_BATCHES in check.case]  # what is not the same numbers is no law

    provider = geffect.PROVIDERS[MICRO_BATCHES]

    def far(model, forget, retain):  # beyond what is refused of others
        found = provider.run(model, forget, retain)
        return {side: {"total": 100 * groups["total"]} for side, groups in found.items()}

    monkeypatch.setitem(geffect.PROVIDERS, MICRO_BATCHES, replace(provider, run=far))
    note = geffect.checked(tiny(4), [MICRO_BATCHES])[MICRO_BATCHES]
    assert "wrong" not in note and note["off_by"] > 10 and "unequal" in note


def test_laws_of_trainers_processes_and_the_host(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    import laws

    case = {"method": "NPO", "law": 0.6, "step_ratio": 0.5, "memory_ratio": 0.7, "joint_step_ratio": 0.4}
    found = {(one.law, one.case): one.met for one in laws.checks("trainer", {"cases": [case]})}
    joint = "NPO, both sides in one call"  # whose memory was not measured: no check of it
    assert found == {("trainer", "NPO"): True, ("trainer_memory", "NPO"): False, ("trainer", joint): True}
    rows = [{"blocks": 4, "ratio": 1.0}, {"blocks": 4, "ratio": 0.6, "law": 0.55, "holds": False}]
    assert [(one.value, one.met) for one in laws.checks("sharded", {"rows": rows})] == [(0.6, False)]
    calls = {"unlearn_loss, triton": 61.0, "unlearn_loss, cpp": 20.0, "grad_dot, 291 tensors": 299.0}
    host = {"environment": {"name": "cpu-x"}, "rows": [{"provider": p, "us_a_call": us} for p, us in calls.items()]}
    assert {one.law: one.met for one in laws.checks("host", host)} == {"host": False, "host_dots": True}
    rows = [{"shape": "small", "every": every, "of_plain_step": 1.5} for every in (None, 1, 5)]
    settings = {"dtype": "fp32", "batch": 8, "tokens": 72}
    assert [one.law for one in laws.checks("overhead", {"rows": rows, "settings": settings})] == ["every_fifth"]
    assert not list(laws.checks("overhead", {"rows": rows, "settings": settings | {"batch": 4}}))
