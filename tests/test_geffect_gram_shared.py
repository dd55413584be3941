"""Several backwards through one forward: what the gram engine saves, that nothing changes by it, and what is left."""

from __future__ import annotations

import weakref

import pytest
import torch
import torch.nn.functional as F

transformers = pytest.importorskip("transformers")

from helpers.geffect_models import VOCAB, batches, gradient, literal_loss, small_tiles, tiny  # noqa: E402
from helpers.geffect_samples import lora_model  # noqa: E402
from helpers.geffect_state import assert_same, snapshot, used_model  # noqa: E402
from helpers.marks import slow_when  # noqa: E402

import gfast  # noqa: E402
from gfast.geffect.contributions import row_pass  # noqa: E402
from gfast.geffect.data import Term  # noqa: E402
from gfast.geffect.engines import gram  # noqa: E402
from gfast.geffect.engines.sample import objective_dots  # noqa: E402
from gfast.geffect.request import Request  # noqa: E402
from gfast.objectives import DPO, GA, NLL, NPO, WGA, Mix  # noqa: E402

OBJECTIVES = {"ga": GA(), "wga": WGA(0.7), "npo": NPO(0.3)}
ONE = dict(forget=batches(1, sizes=(5,)), retain=batches(2, rows=4, sizes=(4,)))
TWO = dict(forget=batches(1), retain=batches(2, rows=4, sizes=(4,)))


def full(seed: int, rows: int, length: int) -> dict:
    """A batch without padding or ignored labels: so few rows are zero (the last of a sample) that none are left out."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCAB, (rows, length), generator=generator)
    ref = -4.0 + torch.randn(rows, length, generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone(), "ref_logp": ref}


def full_data() -> dict:
    return dict(forget=[full(3, 2, 13)], retain=[full(4, 3, 12), full(5, 1, 14)])


class Counts:
    """Forwards of the decoder and backwards of the seeded passes."""

    def __init__(self, model, monkeypatch) -> None:
        self.forwards = self.backwards = 0
        decoder = gfast.hf.decoder(model)
        decoder.register_forward_hook(self.forward)
        original = row_pass.RowPass._backward

        def backward(*args):
            self.backwards += 1
            original(*args)

        monkeypatch.setattr(row_pass.RowPass, "_backward", backward)

    def forward(self, *args) -> None:
        self.forwards += torch.is_grad_enabled()  # not that of one sample by itself, which tells the order of rows

    def of(self, run) -> tuple[int, int]:
        self.forwards = self.backwards = 0
        run()
        return self.forwards, self.backwards


def by_gram(model, objective=None, **data):
    return gfast.g_effect(model, WGA(0.7) if objective is None else objective, engine="gram", **data)


def assert_equal(found, expected) -> None:
    """Bit for bit."""
    assert found.unlearn == expected.unlearn and found.retain == expected.retain


def unshared(monkeypatch, run):
    """What `run` gives where every backward has a forward of its own."""
    with monkeypatch.context() as patch:
        patch.setattr(row_pass, "repeatable", lambda output: False)
        return run()


@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)
@pytest.mark.parametrize("own_logits", [False, True])
def test_a_batch_that_is_kept_passes_by_without_a_second_forward(objective, own_logits, monkeypatch):
    model = tiny("llama").eval()
    if own_logits:
        monkeypatch.setattr(gfast.hf, "output_layer", lambda model: None)
    counts = Counts(model, monkeypatch)
    known = objective == GA()  # minus the risk: what is kept is multiplied with itself, without a second backward
    assert counts.of(lambda: by_gram(model, objective, **ONE)) == (2, 2 if known else 3)
    assert counts.of(lambda: by_gram(model, objective, **TWO)) == (6, 6 if known else 8)
    found = counts.of(lambda: unshared(monkeypatch, lambda: by_gram(model, objective, **ONE)))
    assert found == ((2, 2) if known else (3, 3))


def test_what_other_measurements_cost(monkeypatch):
    model = tiny("llama").eval()
    counts = Counts(model, monkeypatch)
    assert counts.of(lambda: gfast.gram_effect(model, **ONE)) == (2, 2)
    assert counts.of(lambda: gfast.gram_effect(model, **TWO)) == (5, 5)
    found = counts.of(lambda: by_gram(model, Mix(WGA(0.7), NLL()), **ONE))
    assert found == (4, 5)  # of two terms, one on each set; the second is the risk
    pairs = batches(8, rows=6, sizes=(6,))  # neither set's batch: nothing to share
    assert counts.of(lambda: by_gram(model, DPO(0.3), objective_batches=pairs, **ONE)) == (3, 3)
    same = ONE["forget"]  # one batch on both sides
    assert counts.of(lambda: by_gram(model, forget=same, retain=same)) == (1, 2)
    assert counts.of(lambda: by_gram(model, GA(), forget=same, retain=same)) == (1, 1)
    with Request.of(model, **TWO).directions() as directions:
        for objective in OBJECTIVES.values():
            term = Term(objective, "forget")
            request = Request.of(model, **TWO, used=[term])
            assert counts.of(lambda m=request, t=term: objective_dots(m, directions, [t])) == (2, 2)


@slow_when(lambda p: p.kind != "tied_llama" and p.name != "wga")  # every objective, and every model
@pytest.mark.parametrize("way", ["whole head", "tiles", "own logits"])
@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("kind", ["llama", "tied_llama", "gpt2"])
def test_matches_autograd_in_fp64(kind, name, way, monkeypatch):
    """On full batches: what is kept lies in the memory of the graph's own gradients, which a backward adds to."""
    model, data = tiny(kind).eval(), full_data()
    stream = gfast.g_effect(model, OBJECTIVES[name], **data)
    if way == "tiles":
        small_tiles(monkeypatch)
    elif way == "own logits":
        monkeypatch.setattr(gfast.hf, "output_layer", lambda model: None)
    effect = by_gram(model, OBJECTIVES[name], **data)
    assert_equal(effect, by_gram(model, OBJECTIVES[name], **data))
    own = gradient(model, literal_loss(model, data["forget"], name))
    groups = gfast.geffect.assign(model)
    for side, source in (("unlearn", "forget"), ("retain", "retain")):
        risk = gradient(model, literal_loss(model, data[source], "nll"))
        expected = dict.fromkeys(groups.names, 0.0)
        for parameter, value in own.items():
            expected[groups.names[groups.index[parameter]]] += float((value * risk[parameter]).sum())
        scale = sum(float(x.square().sum()) for x in own.values()) ** 0.5
        scale *= sum(float(x.square().sum()) for x in risk.values()) ** 0.5
        for group, value in expected.items():
            assert getattr(effect, side)[group] == pytest.approx(value, rel=1e-8, abs=1e-9 * scale)
            assert getattr(effect, side)[group] == pytest.approx(getattr(stream, side)[group], rel=1e-6, abs=1e-9)


def called_twice():
    model = tiny("llama").eval()
    original = model.model.layers[2].mlp.forward
    model.model.layers[2].mlp.forward = lambda x: original(original(x))
    return model


def frozen_parts():
    model = tiny("tied_llama").eval()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("layers.1" in name or "layers.3.mlp" in name)
    return model


def head_alone():
    model = tiny("llama").eval()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lm_head" in name)
    return model


def checkpointed(reentrant: bool):
    """A module that checkpoints whatever its mode is."""
    model = tiny("llama").eval()
    mlp = model.model.layers[2].mlp
    original = mlp.forward
    mlp.forward = lambda x: torch.utils.checkpoint.checkpoint(original, x, use_reentrant=reentrant)
    return model


MODELS = {
    "llama": lambda: tiny("llama").eval(),
    "tied_llama": lambda: tiny("tied_llama").eval(),
    "gpt2 in fp32": lambda: tiny("gpt2", dtype=torch.float32).eval(),
    "gemma2 in bfloat16": lambda: tiny("gemma2").bfloat16().eval(),
    "llama in float16": lambda: tiny("llama").half().eval(),
    "lora": lora_model,
    "called twice": called_twice,
    "frozen parts": frozen_parts,
    "head alone": head_alone,
    "training": lambda: tiny("llama").train(),
    "checkpointed": lambda: checkpointed(False),
    "checkpointed, reentrant": lambda: checkpointed(True),
}


# in `make test`: one of each kind of arithmetic, of parameters and of graph
QUICK = ("tied_llama", "gpt2 in fp32", "called twice", "frozen parts", "checkpointed, reentrant")
quick_models = slow_when(lambda p: p.make not in [MODELS[name] for name in QUICK])


@quick_models
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_a_shared_forward_changes_no_bit(make, monkeypatch):
    model = make()
    for data in (full_data(), TWO):
        for objective in OBJECTIVES.values():
            found = by_gram(model, objective, **data)
            assert_equal(found, unshared(monkeypatch, lambda o=objective, d=data: by_gram(model, o, **d)))
    if next(model.parameters()).dtype == torch.float64:
        expected = gfast.g_effect(model, objective, **data)
        assert found.unlearn == pytest.approx(expected.unlearn, rel=1e-6, abs=1e-9)
        assert found.retain == pytest.approx(expected.retain, rel=1e-6, abs=1e-9)


def test_a_shared_forward_changes_no_bit_under_autocast(monkeypatch):
    model = tiny("tied_llama", dtype=torch.float32).eval()
    for objective in OBJECTIVES.values():
        with torch.autocast("cpu", torch.bfloat16):
            found = by_gram(model, objective, **full_data())
            assert_equal(found, unshared(monkeypatch, lambda o=objective: by_gram(model, o, **full_data())))


class Spoils(torch.autograd.Function):
    """silu(a) * b as fused kernels do it: the backward writes the gradients over what was saved, unseen by autograd."""

    @staticmethod
    def forward(ctx, a, b):
        ctx.save_for_backward(a, b)
        return F.silu(a) * b

    @staticmethod
    def backward(ctx, grad):
        a, b = (x.data for x in ctx.saved_tensors)
        sigmoid = a.sigmoid()
        da = grad * b * sigmoid * (1 + a * (1 - sigmoid))
        db = grad * F.silu(a)
        return a.copy_(da), b.copy_(db)


def test_functions_that_overwrite_what_they_saved_are_run_forward_again(monkeypatch):
    model = tiny("llama").eval()
    expected = gfast.g_effect(model, WGA(0.7), **full_data())
    for layer in model.model.layers:
        mlp = layer.mlp
        mlp.forward = lambda x, mlp=mlp: mlp.down_proj(Spoils.apply(mlp.gate_proj(x), mlp.up_proj(x)))
    found = by_gram(model, **full_data())
    assert found.unlearn == pytest.approx(expected.unlearn, rel=1e-8, abs=1e-10)
    assert found.retain == pytest.approx(expected.retain, rel=1e-8, abs=1e-10)
    counts = Counts(model, monkeypatch)
    assert counts.of(lambda: by_gram(model, **ONE)) == (3, 3)


class Saved:
    """A context: `alive` has every tensor that some graph still holds for its backward."""

    def __init__(self) -> None:
        self.alive: weakref.WeakSet[Saved.Box] = weakref.WeakSet()
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self.pack, lambda box: box.tensor)

    class Box:
        def __init__(self, tensor: torch.Tensor) -> None:
            self.tensor = tensor.detach()  # a node that saved its own output would hold itself

    def pack(self, tensor: torch.Tensor) -> Saved.Box:
        box = Saved.Box(tensor)
        self.alive.add(box)
        return box

    def __enter__(self) -> Saved:
        self.hooks.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self.hooks.__exit__(*error)


@pytest.mark.parametrize("own_logits", [False, True])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_graph_is_gone_before_the_next_forward(kind, own_logits, monkeypatch):
    model = tiny(kind).eval()
    if own_logits:
        monkeypatch.setattr(gfast.hf, "output_layer", lambda model: None)
    before, after = [], []
    with Saved() as saved:
        decoder = gfast.hf.decoder(model)
        seen = torch.is_grad_enabled  # one forward of a sample by itself leaves no graph
        decoder.register_forward_pre_hook(lambda *args: before.append(len(saved.alive)) if seen() else None)
        decoder.register_forward_hook(lambda *args: after.append(len(saved.alive)) if seen() else None)
        by_gram(model, NPO(0.3), **TWO)
        assert len(before) == 6 and not any(before) and all(after) and not saved.alive


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("own_logits", [False, True])
@pytest.mark.parametrize("backward", ["first", "second"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_graph_is_gone_after_an_exception(kind, backward, own_logits, error, monkeypatch):
    """While its traceback still is there, as it is in a notebook."""
    model = used_model() if kind == "llama" else tiny(kind)
    before = snapshot(model)
    if own_logits:
        monkeypatch.setattr(gfast.hf, "output_layer", lambda model: None)
    name = "rows_of" if backward == "first" else "products"  # as shares are kept, and as they are multiplied
    alive, original = [], getattr(gram, name)
    with Saved() as saved:

        def failing(*args):
            alive.append(len(saved.alive))
            if len(alive) > 12:
                raise error("stop")
            return original(*args)

        monkeypatch.setattr(gram, name, failing)
        with pytest.raises(error, match="stop") as caught:
            by_gram(model, **ONE)
        assert min(alive) > 0 and caught.traceback
        assert not saved.alive
    assert_same(before, snapshot(model))
