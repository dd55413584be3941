"""gram_effect and the gram engine against gradients of single samples, parameter by parameter."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

transformers = pytest.importorskip("transformers")

from helpers.geffect_models import batches, gradient, logps, tiny  # noqa: E402
from helpers.geffect_samples import (  # noqa: E402
    KINDS,
    WAYS,
    any_gradient,
    data,
    each,
    literal_samples,
    lora_model,
    measured,
    multiplied,
    shift,
    square,
)
from helpers.geffect_state import assert_same, snapshot, used_model  # noqa: E402
from helpers.marks import slow_when  # noqa: E402

import gfast  # noqa: E402
from gfast.geffect import gram_effect, pg_effect  # noqa: E402
from gfast.geffect.contributions import row_pass  # noqa: E402
from gfast.geffect.data import Term  # noqa: E402
from gfast.geffect.engines import gram, gram_products  # noqa: E402
from gfast.geffect.engines.gram import objective_dots as gram_dots  # noqa: E402
from gfast.objectives import GA, KL, NLL, NPO, RMU, TNPO, WGA, SimNPO  # noqa: E402


def assert_gram(effect, forget: list[dict], retain: list[dict], rtol: float = 1e-9) -> None:
    """Every group is one parameter; errors are relative to the product of the norms of the two gradients."""
    assert len(effect.groups) == len(forget[0])
    for side, others in (("unlearn", forget), ("retain", retain)):
        for group, name in zip(effect.groups, forget[0], strict=True):
            found = getattr(effect, side)[group]
            assert found.shape == (len(forget), len(others)) and found.dtype == torch.float64
            for i, x in enumerate(forget):
                for j, y in enumerate(others):
                    scale = (x[name].norm() * y[name].norm()).item()
                    floor = 1e-6 * (square(x) * square(y)) ** 0.5  # a gradient that is zero in theory is rounding
                    expected = -(x[name] * y[name]).sum().item()
                    assert abs(found[i, j].item() - expected) <= rtol * max(scale, floor), (side, group, i, j)


@pytest.fixture(params=WAYS)
def way(request, monkeypatch):
    yield from multiplied(request.param, monkeypatch)


# every way of one model, and two of every model
@slow_when(lambda p: p.kind != "tied_llama" and p.way not in ("pairs", "gradients of tiles"))
@pytest.mark.parametrize("kind", ["llama", "tied_llama", "gpt2"])
def test_matches_autograd_in_fp64_every_way(kind, way):
    model = tiny(kind).eval()
    forget, retain = literal_samples(model, data()["forget"]), literal_samples(model, data()["retain"])
    assert_gram(gram_effect(model, groups=each, **data()), forget, retain)
    assert way  # the calls


@slow_when(lambda p: p.kind not in ("gemma2", "phi"))  # the sample engine is asked about each, by the same rules
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("llama", "tied_llama", "gpt2")])
def test_matches_autograd_in_fp64(kind):
    model = tiny(kind).eval()
    effect = gram_effect(model, groups=each, **data())
    forget, retain = literal_samples(model, data()["forget"]), literal_samples(model, data()["retain"])
    # transformers take some attention softmaxes in fp32, which autograd of one row and of a batch round differently
    assert_gram(effect, forget, retain, 1e-5 if kind in ("gemma2", "opt", "phi") else 1e-9)
    assert effect.tokens["forget"].tolist() == [4, 4, 6, 8, 7]
    assert gram_effect(model, **data()).groups == gfast.geffect.assign(model).names


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_lora(kind):
    model = lora_model(kind)
    forget, retain = literal_samples(model, data()["forget"]), literal_samples(model, data()["retain"])
    assert_gram(gram_effect(model, groups=each, **data()), forget, retain)


def test_frozen_parts_and_a_head_that_hf_does_not_know(monkeypatch):
    model = tiny("tied_llama").eval()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("layers.1" in name or "embed" in name)
    monkeypatch.setattr(gfast.hf, "output_layer", lambda model: None)
    forget, retain = literal_samples(model, data()["forget"]), literal_samples(model, data()["retain"])
    assert_gram(gram_effect(model, groups=each, **data()), forget, retain)


def test_a_module_called_twice_adds_up():
    model = tiny("llama").eval()
    model.model.layers[1].mlp.up_proj = model.model.layers[0].mlp.up_proj
    layer = model.model.layers[2]
    original = layer.mlp.forward
    layer.mlp.forward = lambda x: original(original(x))
    forget, retain = literal_samples(model, data()["forget"]), literal_samples(model, data()["retain"])
    assert_gram(gram_effect(model, groups=each, **data()), forget, retain)
    samples = pg_effect(model, groups=each, **data())
    risk = sum(x["model.layers.2.mlp.up_proj.weight"] for x in forget) / -29
    expected = [(x["model.layers.2.mlp.up_proj.weight"] * risk).sum() for x in forget]
    found = samples.unlearn["model.layers.2.mlp.up_proj.weight"]
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-9, atol=0)


def test_does_not_depend_on_batches_or_padding_side():
    model = tiny("gpt2").eval()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("wte" in name or "h.1" in name or "ln_f" in name)

    def effect(sizes, retain_sizes=(5,), left=False):
        sets = [batches(1, sizes=sizes), batches(2, sizes=retain_sizes)]
        for batch in (batch for one in sets for batch in one):
            batch["labels"][:, 0] = -100
            if left:
                lengths = batch["attention_mask"].sum(1).tolist()
                for key in batch:
                    batch[key] = torch.stack([shift(v, n) for v, n in zip(batch[key], lengths, strict=True)])
                batch["position_ids"] = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
        return gram_effect(model, forget=sets[0], retain=sets[1])

    whole = effect((5,))
    assert torch.equal(whole.unlearn["shallow"], effect((5,)).unlearn["shallow"])
    for other in (effect((2, 1, 2)), effect((1, 1, 1, 1, 1), (2, 3)), effect((2, 3), left=True)):
        for side in ("unlearn", "retain"):
            for group, values in getattr(whole, side).items():
                torch.testing.assert_close(getattr(other, side)[group], values, rtol=1e-8, atol=1e-9)


def test_sums_are_the_effects_of_samples_and_its_own_side_is_a_gram_matrix():
    model = tiny("llama").eval()
    found, expected = gram_effect(model, **data()).samples(), pg_effect(model, **data())
    for side in ("unlearn", "retain"):
        for group, values in getattr(expected, side).items():
            torch.testing.assert_close(getattr(found, side)[group], values, rtol=1e-9, atol=1e-9)
    own = gram_effect(model, **data()).total("unlearn")
    torch.testing.assert_close(own, own.t(), rtol=1e-12, atol=0)
    assert torch.linalg.eigvalsh(-own).min() > 0


def test_samples_have_the_cosines_of_the_literal_gradients():
    model = tiny("llama").eval()
    samples = gram_effect(model, groups=each, **data()).samples()
    samples.norms["retain"] = pg_effect(model, groups=each, direction_dtype=torch.float64, **data()).norms["retain"]
    forget = literal_samples(model, data()["forget"])
    risks = {}
    for side, some in (("unlearn", forget), ("retain", literal_samples(model, data()["retain"]))):
        risks[side] = {name: -sum(one[name] for one in some) for name in forget[0]}  # a cosine has no scale
    names = dict(zip(samples.groups, forget[0], strict=True))
    for side, risk in risks.items():
        for group, name in names.items():
            for s, one in enumerate(forget):
                expected = (one[name] * risk[name]).sum() / (one[name].norm() * risk[name].norm())
                assert samples.cosine(side, group)[s].item() == pytest.approx(expected.item(), rel=1e-7, abs=1e-9)
        for s, one in enumerate(forget):
            expected = sum((one[name] * risk[name]).sum() for name in risk) / (square(one) * square(risk)) ** 0.5
            assert samples.cosine(side)[s].item() == pytest.approx(float(expected), rel=1e-7, abs=1e-9)


def test_rows_without_labels_are_zero():
    model = tiny("llama").eval()
    forget, retain = data()["forget"], data()["retain"]
    forget[1]["labels"][0] = -100
    retain[0]["labels"][:] = -100
    effect = gram_effect(model, forget=forget, retain=retain)
    total = effect.total("retain")
    assert (total[:, 0] == 0).all() and (total[2] == 0).all()
    assert (total[[0, 1, 3, 4], 1:] != 0).all()
    assert (effect.total("unlearn")[2] == 0).all()


@pytest.mark.parametrize(
    "objective", [GA(), WGA(0.7), TNPO(1.5), NPO(0.3), SimNPO(), NLL()], ids=lambda objective: objective.key
)
@pytest.mark.parametrize("kind", ["tied_llama", "gpt2"])
def test_objectives_as_the_stream_engine_measures_them(kind, objective):
    model = tiny(kind).eval()
    expected = gfast.g_effect(model, objective, **data())
    (dots,) = gram_dots(measured(model, [Term(objective, "forget")]), [Term(objective, "forget")])
    for index, group in enumerate(expected.groups):
        # ref_logp and with it some weights are fp32 in the stream engine
        assert dots[index, 0].item() == pytest.approx(expected.unlearn[group], rel=1e-6, abs=1e-9)
        assert dots[index, 1].item() == pytest.approx(expected.retain[group], rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("objective", [KL(), RMU(layer=1)], ids=lambda objective: objective.key)
def test_objectives_without_token_weights_are_refused(objective):
    with pytest.raises(ValueError, match="no token weights, and the gram engine.*engine='stream'"):
        gram_dots(measured(tiny("llama")), [Term(objective, "forget")])


def test_a_module_without_a_rule_is_refused_by_name():
    before = snapshot(model := tiny("mixtral"))
    with pytest.raises(ValueError, match=r"gram engine.*layers\.0\.(mlp|block_sparse_moe).*engine='stream'"):
        gram_effect(model, **data())
    assert_same(before, snapshot(model))


def test_a_module_that_is_not_called_is_refused():
    model = tiny("llama")
    model.model.layers[0].mlp.spare = torch.nn.Linear(2, 2).double()
    with pytest.raises(ValueError, match=r"'model\.layers\.0\.mlp\.spare' owns trainable.*not called"):
        gram_effect(model, **data())


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("fails_at", [None, 0, 50, 200])
def test_model_is_left_as_found(monkeypatch, error, fails_at):
    model = used_model()
    before = snapshot(model)
    calls = []
    original = gram.rows_of

    def failing(*args):
        calls.append(any_gradient(model))
        if fails_at is not None and len(calls) > fails_at:
            raise error("stop")
        return original(*args)

    monkeypatch.setattr(gram, "rows_of", failing)
    if fails_at is None:
        gram_effect(model, **data())
        assert len(calls) > 200 and not any(calls)  # no weight gradient ever exists
    else:
        with pytest.raises(error, match="stop"):
            gram_effect(model, **data())
    assert_same(before, snapshot(model))


def test_gradients_that_are_not_finite_are_named():
    model = tiny("llama", dtype=torch.float32).eval()
    with torch.no_grad():
        model.model.layers[3].mlp.down_proj.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"the gradient of log p is not finite in \d+ of \d+ parameters, first in 'm"):
        gram_effect(model, **data())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_is_as_good_as_plain_autograd(dtype, way):
    """The law: at most twice the error of autograd in the same dtype, and a rounding; over all parameters."""
    low = tiny("tied_llama").to(dtype).eval()
    exact = copy.deepcopy(low).double()
    truth, plain = literal_samples(exact, data()["forget"]), literal_samples(low, data()["forget"])
    found = gram_effect(low, **data()).total("unlearn")
    error = allowed = 0.0
    for i in range(5):
        for j in range(5):
            scale = (square(truth[i]) * square(truth[j])) ** 0.5
            expected = float(sum((truth[i][n] * truth[j][n]).sum() for n in truth[i]))
            other = float(sum((plain[i][n].double() * plain[j][n].double()).sum() for n in plain[i]))
            error = max(error, abs(-found[i, j].item() - expected) / scale)
            allowed = max(allowed, abs(other - expected) / scale)
    assert error <= 2 * allowed + torch.finfo(dtype).eps


def test_long_batches_never_hold_the_heads_gradient_whole(monkeypatch):
    """No tensor is as large as the b [n, V] of a batch with more rows than the hidden size; a short one has it."""
    config = transformers.LlamaConfig(
        vocab_size=997, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2
    )
    model = transformers.LlamaForCausalLM(config).eval()
    ids = torch.randint(0, 997, (1, 41), generator=torch.Generator().manual_seed(0))
    long, short = ({"input_ids": x, "labels": x} for x in (ids, ids[:, :9]))
    sizes: list[int] = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            known = {storage_of(x) for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
            made = [x for x in pytree.tree_leaves(out) if isinstance(x, torch.Tensor)]
            sizes.extend(x.numel() for x in made if 997 in x.shape and storage_of(x) not in known)
            return out

    def storage_of(x: torch.Tensor) -> int:
        return x.untyped_storage().data_ptr()

    def largest(batch) -> int:
        sizes.clear()
        with Sizes():
            gram_effect(model, forget=batch, retain=batch)
        return max(sizes)

    expected = gram_effect(model, forget=long, retain=short).total("retain")
    assert largest(short) == 8 * 997  # at most the hidden size
    monkeypatch.setattr(row_pass, "default_chunk_rows", lambda *args: 10)
    for name, value in (("_MIN_TILE", 16), ("_TILES", 0.01)):
        monkeypatch.setattr(gram_products, name, value)
    whole = 16 * 997  # the head's own size
    assert largest(long) <= 10 * 997 < whole / 1.5
    found = gram_effect(model, forget=long, retain=short).total("retain")
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=0)


def test_progress_bar_and_bad_input(capsys):
    pytest.importorskip("tqdm")
    gram_effect(tiny("llama"), progress=True, **data())
    assert "gram" in capsys.readouterr().err
    with pytest.raises(ValueError, match="retain= holds no batch"):
        gram_effect(tiny("llama"), forget=data()["forget"], retain=[])


def test_gradients_of_one_sample_agree_with_its_logp():
    """The literal helper itself: gradients of the literal log-prob of a row alone and within its batch."""
    model = tiny("llama").eval()
    batch = data()["forget"][0]
    whole = gradient(model, logps(model, batch)[0][1].sum())
    alone = literal_samples(model, [batch])[1]
    for name in whole:
        torch.testing.assert_close(whole[name], alone[name], rtol=1e-9, atol=1e-12)
