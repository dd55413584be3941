"""pg_effect refuses by name what it cannot measure, and leaves the model as it was."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")

from helpers.geffect_models import batches, tiny  # noqa: E402
from helpers.geffect_samples import any_gradient, data  # noqa: E402
from helpers.geffect_state import assert_same, snapshot, used_model  # noqa: E402

import gfast  # noqa: E402
from gfast.geffect import pg_effect  # noqa: E402
from gfast.geffect.engines import sample  # noqa: E402


def test_a_module_without_a_rule_is_refused_by_name(monkeypatch):
    before = snapshot(model := tiny("mixtral"))
    own = tiny("llama")
    own.model.layers[1].scale = torch.nn.Parameter(torch.ones(16, dtype=torch.float64))
    with monkeypatch.context() as nothing_is_measured_before:
        nothing_is_measured_before.setattr(gfast.geffect.request, "collect", None)
        with pytest.raises(ValueError, match=r"layers\.0\.(mlp|block_sparse_moe).*engine='stream' or 'token'"):
            pg_effect(model, **data())
        with pytest.raises(ValueError, match=r"layers\.1\.scale.*no rule for a LlamaDecoderLayer"):
            pg_effect(own, **data())
    assert_same(before, snapshot(model))
    own.model.layers[1].scale.requires_grad_(False)
    pg_effect(own, **data())


class OwnNorm(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(16, dtype=torch.float64))

    def forward(self, x):
        _, length, size = x.shape
        return self.times(x * torch.rsqrt(x.square().sum(-1, keepdim=True) / size))

    def times(self, x):
        return x * self.weight


def test_a_norm_that_is_not_linear_in_its_weight_is_refused():
    class SquaredNorm(OwnNorm):
        def times(self, x):
            return x * self.weight**2

    class ParticularNorm(OwnNorm):
        def times(self, x):
            if len(x) == 1:
                raise KeyError("a batch of one")
            return x * self.weight

    for norm in (SquaredNorm, ParticularNorm):
        model = tiny("llama")
        model.model.norm = norm()
        with pytest.raises(ValueError, match=rf"'model\.norm\.weight'.*no rule for a {norm.__name__}"):
            pg_effect(model, **data())
    model.model.norm = OwnNorm()
    samples, tokens = (call(model, **data()).total("retain") for call in (pg_effect, gfast.token_effect))
    torch.testing.assert_close(samples, torch.stack([one.sum() for one in tokens]), rtol=1e-9, atol=1e-9)


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


def sequence_first(x, original):
    return original(x.transpose(0, 1)).transpose(0, 1)


def flattened_by_position(x, original):
    turned = x.transpose(0, 1)
    return original(turned.reshape(-1, x.shape[-1])).view(turned.shape).transpose(0, 1)


def called_by_name(mlp):
    def forward(x):
        turned = x.transpose(0, 1)
        return mlp.down_proj(input=mlp.act_fn(mlp.gate_proj(input=turned)) * mlp.up_proj(input=turned)).transpose(0, 1)

    return forward


@pytest.mark.parametrize("call", [pg_effect, gfast.gram_effect])
@pytest.mark.parametrize("turned", [sequence_first, flattened_by_position, called_by_name])
def test_rows_in_another_order_are_refused(turned, call):
    """As many samples as tokens: no shape tells the order."""
    model = tiny("llama").eval()
    layer = model.model.layers[1].mlp
    original = layer.forward
    layer.forward = called_by_name(layer) if turned is called_by_name else lambda x: turned(x, original)
    ids = torch.randint(3, 50, (5, 5), generator=torch.Generator().manual_seed(0))
    shared = {"position_ids": torch.arange(5)[None]}  # one row for all samples
    sides = dict(
        forget=[{"input_ids": ids, "labels": ids, **shared}],
        retain=[{"input_ids": ids + 1, "labels": ids + 1, **shared}],
    )
    with pytest.raises(ValueError, match=r"'model\.layers\.1\.mlp\.(up|gate)_proj'.*one after the other.*'stream'"):
        call(model, **sides)
    del layer.forward
    call(model, **sides)
    assert not any(module._forward_pre_hooks for module in model.modules())


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
    original = sample.contribution_dots

    def failing(*args):
        calls.append(1)
        if fails_at is not None and len(calls) > fails_at:
            raise error("stop")
        return original(*args)

    monkeypatch.setattr(sample, "contribution_dots", failing)
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
    original = sample.contribution_dots
    monkeypatch.setattr(sample, "contribution_dots", lambda *a: seen.append(any_gradient(model)) or original(*a))
    pg_effect(model, directions=directions, **data())
    assert seen and not any(seen)


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


def test_progress_bar(capsys):
    pytest.importorskip("tqdm")
    pg_effect(tiny("llama"), progress=True, **data())
    assert "sample effects" in capsys.readouterr().err
