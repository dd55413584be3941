"""Several objectives by the sample and gram engines: one forward a batch for all, and what each gives alone."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")

from helpers.geffect_models import batches, small_tiles, tiny  # noqa: E402
from helpers.marks import slow_when  # noqa: E402
from test_geffect_gram_shared import MODELS, ONE, QUICK, TWO, Counts, Saved, full, full_data, unshared  # noqa: E402

import gfast  # noqa: E402
from gfast.geffect.contributions import row_pass  # noqa: E402
from gfast.geffect.contributions.layers import OuterProduct  # noqa: E402
from gfast.geffect.engines import gram, gram_rows  # noqa: E402
from gfast.objectives import DPO, GA, NLL, NPO, WGA, Mix  # noqa: E402

MANY = [Mix(WGA(0.7), NLL(), alpha=0.5), WGA(0.7), NPO(0.3), GA(), NLL(), DPO(0.3)]


def measured(model, objectives, engine, **data):
    own = {}
    if DPO(0.3) in (objectives if isinstance(objectives, list) else [objectives]):
        own = dict(objective_batches=batches(8, rows=6, sizes=(4, 2)))
    return gfast.g_effect(model, objectives, engine=engine, **data, **own)


def assert_alike(model, engine, data, relative=1e-11, some=MANY):
    relative = 0.0 if engine == "sample" else relative  # the same products in the same order
    together = measured(model, some, engine, **data)
    for objective, found in zip(some, together, strict=True):
        expected = measured(model, objective, engine, **data)
        for side in ("unlearn", "retain"):
            one, other = getattr(found, side), getattr(expected, side)
            scale = max(map(abs, other.values()))
            assert one == pytest.approx(other, rel=relative, abs=relative * scale), str(objective)
        assert found.counts == expected.counts and found.objective == expected.objective


@slow_when(lambda p: p.kind not in QUICK)
@pytest.mark.parametrize("engine", ["sample", "gram"])
@pytest.mark.parametrize("kind", MODELS)
def test_objectives_are_what_each_is_alone(kind, engine):
    model = MODELS[kind]()
    # products of rows or of gradients, whatever is cheaper for so many: rounded in another order
    relative = {torch.float64: 1e-11, torch.float32: 1e-6}.get(next(model.parameters()).dtype, 2e-2)
    assert_alike(model, engine, TWO, relative)
    if kind == "llama":
        assert_alike(model, engine, full_data(), relative)


@slow_when(lambda p: p.engine == "sample" and p.way != "tiles")
@pytest.mark.parametrize("way", ["tiles", "own logits", "no shared forward"])
@pytest.mark.parametrize("engine", ["sample", "gram"])
def test_other_ways_to_the_head(engine, way, monkeypatch):
    if way == "tiles":
        small_tiles(monkeypatch)
    elif way == "own logits":
        monkeypatch.setattr(gfast.hf, "output_layer", lambda model: None)
    else:
        monkeypatch.setattr(row_pass, "repeatable", lambda output: False)
    for data in (full_data(), TWO):
        assert_alike(tiny("tied_llama").eval(), engine, data, some=[MANY[0], MANY[2], MANY[-1]])  # of each kind one


def test_one_forward_a_batch(monkeypatch):
    model = tiny("llama").eval()
    counts = Counts(model, monkeypatch)

    def cost(some, engine, data, **options):
        return counts.of(lambda: gfast.g_effect(model, some, engine=engine, **data, **options))

    both = [WGA(0.7), NPO(0.3)]
    for data, forget in ((ONE, 1), (TWO, 2)):
        with gfast.risk_gradients(model, **data) as directions:
            assert cost(both, "sample", data, directions=directions) == (forget, 2 * forget)
            again = lambda d=data, of=directions: cost(both, "sample", d, directions=of)  # noqa: E731
            assert unshared(monkeypatch, again) == (2 * forget, 2 * forget)
    # kept under both, then the risk on the batch itself and on the other one
    assert cost(both, "gram", ONE) == (2, 4)
    assert cost(both, "gram", TWO) == (6, 10)
    assert cost([*both, GA()], "gram", ONE) == (2, 4)  # GA is known to be minus the risk, which needs no backward then
    assert cost([Mix(WGA(0.7), NLL()), NPO(0.3)], "gram", ONE) == (4, 6)  # the second set is kept once more
    assert unshared(monkeypatch, lambda: cost(both, "gram", ONE)) == (4, 4)


@pytest.mark.parametrize("padding", [0, 11], ids=["full", "padded"])
def test_inputs_are_kept_once(padding, monkeypatch):
    """And so are multiplied once with those of another batch, also where rows that are zero are left out."""
    model, batch = tiny("llama").eval(), full(3, 2, 40)
    if padding:
        batch["labels"][0, -padding:], batch["attention_mask"][0, -padding:] = -100, 0
    kept: list[dict[str, list[gram_rows.Rows]]] = []
    cross = gram._Pairs.cross
    monkeypatch.setattr(gram._Pairs, "cross", lambda self, *args: kept.extend(self.kept) or cross(self, *args))
    measured(model, [WGA(0.7), NPO(0.3)], "gram", forget=batch, retain=ONE["retain"])
    first, second = kept
    assert first.keys() == second.keys()
    linear = [name for name, (one, *_) in first.items() if isinstance(one.contribution, OuterProduct)]
    assert len(linear) == 7 * len(model.model.layers)  # the head's are tiles
    for name in linear:
        one, other = first[name][0].contribution, second[name][0].contribution
        assert one.a.data_ptr() == other.a.data_ptr() and one.b.data_ptr() != other.b.data_ptr()
        assert (one.rows < 76) == bool(padding)


def test_rows_of_an_input_serve_others_if_they_are_not_many_more():
    a, b = torch.randn(100, 3), torch.ones(100, 2)
    some = [torch.arange(70), torch.arange(3, 70), torch.arange(40), torch.arange(72), None, torch.arange(95)]
    shares = []
    for every in (False, True):
        selected = gram_rows.Selected(every)
        shares = [selected.of(OuterProduct(a, b), kept) for kept in some]
        assert [None if kept is None else len(kept) for _, kept in shares] == [70, 70, 40, 72, None, None]
        for share, kept in shares:
            assert torch.equal(share.a, a if kept is None else a[kept]) and len(share.b) == len(share.a)
        other, _ = selected.of(OuterProduct(a + 1, b), some[0])
        assert torch.equal(other.a, a[:70] + 1)
        again, _ = selected.of(OuterProduct(a, b), None)
        assert torch.equal(again.a, a)
    shifted = torch.arange(1, 71)  # as many, but not the same
    assert torch.equal(gram_rows.Selected().of(OuterProduct(a, b), shifted)[1], shifted)


def test_the_heads_gradients_are_held_for_no_more_rows_than_its_size(monkeypatch):
    """Of all objectives together; beyond that they are formed tile by tile."""
    model = tiny("llama").eval()
    width = model.lm_head.weight.shape[1]
    count = int((TWO["forget"][0]["labels"][:, 1:] != -100).sum())
    some = [WGA(0.1 * number) for number in range(1, width // count + 2)]
    tiled: list[bool] = []
    original = row_pass._head_of

    def spy(*args):
        tiled.append(original(*args)[1])
        return original(*args)

    monkeypatch.setattr(row_pass, "_head_of", spy)
    for objectives, expected in ((some[:-1], False), (some, True)):
        tiled.clear()
        gfast.g_effect(model, objectives, engine="gram", forget=TWO["forget"][:1], retain=TWO["retain"])
        assert tiled == [expected, False]


@pytest.mark.parametrize("engine", ["sample", "gram"])
def test_which_of_several_objectives_is_not_finite(engine):
    model = tiny("llama", dtype=torch.float32).eval()
    far = [{**batch, "ref_logp": torch.full_like(batch["ref_logp"], torch.nan)} for batch in TWO["forget"]]
    with pytest.raises(ValueError, match=r"the gradient of NPO\(beta=0.3\) on the forget data is not finite"):
        gfast.g_effect(model, [WGA(0.7), NPO(0.3)], engine=engine, forget=far, retain=TWO["retain"])


@pytest.mark.parametrize("engine", ["sample", "gram"])
def test_no_graph_is_held_at_the_next_batch(engine):
    model, alive = tiny("llama").eval(), []
    with gfast.risk_gradients(model, **TWO) as directions, Saved() as saved:
        gfast.hf.decoder(model).register_forward_pre_hook(lambda *args: alive.append(len(saved.alive)))
        options = {} if engine == "gram" else dict(directions=directions)
        gfast.g_effect(model, [WGA(0.7), NPO(0.3)], engine=engine, **TWO, **options)
        # one forward is of a sample by itself
        assert len(alive) == (7 if engine == "gram" else 3) and not any(alive) and not saved.alive
