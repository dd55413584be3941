"""Models that use their parameters in unusual ways, and input that is wrong: every engine is right, or says what is."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch.nn.utils import prune

transformers = pytest.importorskip("transformers")

from helpers.geffect_models import Rounded, batches, gradient, literal_loss, tiny  # noqa: E402
from helpers.geffect_state import assert_same, snapshot, used_model  # noqa: E402
from helpers.marks import slow_when  # noqa: E402

import gfast  # noqa: E402
from gfast.geffect import ENGINES, backward  # noqa: E402
from gfast.geffect.contributions import row_pass  # noqa: E402
from gfast.objectives import WGA  # noqa: E402

UP = "model.layers.2.mlp.up_proj.weight"
BY_ROWS = ("sample", "gram")
CALLS = {"pg_effect": gfast.pg_effect, "token_effect": gfast.token_effect, "gram_effect": gfast.gram_effect}


def data() -> dict:
    return dict(forget=batches(1), retain=batches(2, rows=4, sizes=(1, 3)))


class Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x @ weight.t()

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        return grad @ weight, grad.flatten(0, 1).t() @ x.flatten(0, 1)


def adds(model, more) -> None:
    """The third block's MLP returns `more` of its input on top."""
    mlp = model.model.layers[2].mlp
    original = mlp.forward
    mlp.forward = lambda x: original(x) + more(mlp, x)[..., :16]


def functional(model):
    adds(model, lambda mlp, x: 3 * F.linear(x, mlp.up_proj.weight))


def transposed(model):
    adds(model, lambda mlp, x: x @ mlp.up_proj.weight.T)


def several_at_once(model):
    adds(model, lambda mlp, x: F.linear(x, torch.cat([mlp.up_proj.weight, mlp.gate_proj.weight])))


def past_the_hooks(model):
    adds(model, lambda mlp, x: mlp.up_proj.forward(x))


def autograd_function(model):
    adds(model, lambda mlp, x: Product.apply(x, mlp.up_proj.weight))


def head_in_the_decoder(model):
    adds(model, lambda mlp, x: model.lm_head(x))


def in_a_hook(model):
    linear = model.model.layers[2].mlp.up_proj
    linear.register_forward_hook(lambda module, args, output: output + F.linear(args[0], module.weight))


def made_before(model):
    view = model.get_parameter(UP).T
    adds(model, lambda mlp, x: x @ view)


def replaced_forward(model):
    linear = model.model.layers[2].mlp.up_proj
    linear.forward = lambda x: 2 * F.linear(x, linear.weight)


def replaced_lookup(model):
    table = model.model.embed_tokens
    table.forward = lambda ids: 2 * F.embedding(ids, table.weight)


def replaced_by_the_same(model):
    linear, table = model.model.layers[2].mlp.up_proj, model.model.embed_tokens
    linear.forward = lambda x: F.linear(x, linear.weight)
    table.forward = lambda ids: F.embedding(ids, table.weight)


def scaled_by_a_hook(model):
    model.model.layers[2].mlp.up_proj.register_forward_hook(lambda module, args, output: 2 * output)
    model.model.embed_tokens.register_forward_hook(lambda module, args, output: 3 * output)


def scaled_backward(model):
    linear = model.model.layers[2].mlp.up_proj
    linear.register_full_backward_pre_hook(lambda module, grads: tuple(2 * grad for grad in grads))


def hooked_tensor(model):
    def hook(module, args, output):
        if output.requires_grad:
            output.register_hook(lambda grad: 2 * grad)

    model.model.layers[2].mlp.up_proj.register_forward_hook(hook)


def masked_gradient(model):
    model.get_parameter(UP).register_hook(lambda grad: 0.5 * grad)


def scaled_backward_of_the_head(model):
    model.lm_head.register_full_backward_hook(lambda module, grads, _: tuple(2 * grad for grad in grads))


def pruned_head(model):
    prune.random_unstructured(model.lm_head, "weight", 0.5)


def without_a_gradient(model):
    adds(model, lambda mlp, x: F.linear(x.to(mlp.up_proj.weight.dtype), mlp.up_proj.weight.detach()))
    with torch.no_grad():
        adds(model, lambda mlp, x: x[..., :1] * mlp.up_proj.weight.data.norm())


class Watched(torch.autograd.Function):
    """What it was given; `called` sees its backward, and no hook is needed that engines could refuse."""

    @staticmethod
    def forward(x, called):
        return x.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.called = inputs[1]

    @staticmethod
    def backward(ctx, grad):
        return ctx.called(grad), None

    @staticmethod
    def jvp(ctx, tangent, _):
        return tangent.clone()


def in_a_backward_of(module, called) -> None:
    module.register_forward_hook(lambda module, args, output: Watched.apply(output, called))


def compiled_part(model):
    model.model.layers[2].mlp.compile(backend="eager")


def backward_that_ends(model):
    model.model.layers[0].mlp.register_forward_hook(lambda module, args, output: Rounded.apply(output))


# what the model does -> the engines that refuse it, and what they say
REFUSED = {
    functional: (BY_ROWS, rf"'{UP}': TBackward0 reads it outside the call of its own module.*'stream' or 'token'"),
    transposed: (BY_ROWS, rf"'{UP}': .* reads it outside the call"),
    several_at_once: (BY_ROWS, rf"'{UP}': CatBackward0 reads it outside the call"),
    past_the_hooks: (BY_ROWS, rf"'{UP}': .* reads it outside the call"),
    autograd_function: ((*BY_ROWS, "token"), rf"{UP}.*ProductBackward reads it|'model.layers.2.mlp'.*Product"),
    head_in_the_decoder: ((), ""),
    in_a_hook: (BY_ROWS, rf"'{UP}': .* reads it outside the call"),
    made_before: ((*BY_ROWS, "token"), r"made before the pass.*engine='stream'"),
    replaced_forward: (BY_ROWS, rf"'{UP}'.*forward was replaced.*'stream' or 'token'"),
    replaced_lookup: (BY_ROWS, r"'model.embed_tokens.weight'.*forward was replaced"),
    replaced_by_the_same: ((), ""),
    scaled_by_a_hook: ((), ""),
    scaled_backward: (("token",), r"backward hook on the module 'model.layers.2.mlp.up_proj' .*engine='stream'"),
    scaled_backward_of_the_head: (("token",), r"backward hook on the module 'lm_head' "),
    hooked_tensor: (("token",), r"'model.layers.2.mlp.up_proj' .*register_hook.*engine='stream'"),
    masked_gradient: ((*BY_ROWS, "token"), rf"gradient hook on the parameter '{UP}'.*engine='stream'"),
    pruned_head: (BY_ROWS, "'lm_head.weight_orig': MulBackward0 reads it outside the call"),
    without_a_gradient: ((), ""),
    backward_that_ends: (("token",), "the torch.autograd.Function .Rounded. says how to go backward, not forward"),
    compiled_part: ((), ""),
}


# of those that an engine takes, one that sees each layer's rows stands for the others
@slow_when(lambda p: p.engine == "sample" and p.engine not in REFUSED[p.change][0])
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("change", REFUSED, ids=lambda change: change.__name__)
def test_unusual_uses_are_right_or_refused_by_name(change, engine):
    model = tiny("llama").eval()
    change(model)
    engines, message = REFUSED[change]
    before = snapshot(model)
    if engine in engines:
        with pytest.raises(ValueError, match=message):
            gfast.g_effect(model, WGA(alpha=0.7), engine=engine, **data())
        assert_same(before, snapshot(model))
        return
    effect = gfast.g_effect(model, WGA(alpha=0.7), groups=lambda name: name, engine=engine, **data())
    own = gradient(model, literal_loss(model, data()["forget"], "wga"))
    for side, key in (("unlearn", "forget"), ("retain", "retain")):
        risk = gradient(model, literal_loss(model, data()[key], "nll"))
        scale = sum(float((own[name] * risk[name]).sum().abs()) for name in own)
        for name, found in getattr(effect, side).items():
            assert found == pytest.approx(float((own[name] * risk[name]).sum()), rel=1e-9, abs=1e-9 * scale), name


@pytest.mark.parametrize("engine", ENGINES)
def test_outputs_that_are_changed_in_place(engine):
    """Those of GPT-2's Conv1D are views, whose node is no part of the graph any more then."""
    model = tiny("gpt2").eval()
    model.transformer.h[1].mlp.act = torch.nn.LeakyReLU(0.3, inplace=True)
    model.transformer.h[0].attn.c_proj.register_forward_hook(lambda module, args, output: output.mul_(2))
    effect = gfast.g_effect(model, WGA(alpha=0.7), groups=lambda name: name, engine=engine, **data())
    own, risk = (gradient(model, literal_loss(model, data()["forget"], kind)) for kind in ("wga", "nll"))
    right = {name: float((own[name] * risk[name]).sum()) for name in own}
    assert effect.unlearn == pytest.approx(right, rel=1e-9, abs=1e-9 * sum(map(abs, right.values())))


@pytest.mark.parametrize("call", CALLS)
def test_the_public_functions_refuse_them_too(call):
    model = tiny("llama").eval()
    functional(model)
    if call == "token_effect":  # sees every use
        assert torch.isfinite(gfast.token_effect(model, **data()).total("unlearn")[0]).all()
        return
    with pytest.raises(ValueError, match=rf"'{UP}': .* reads it outside the call.*'stream' or 'token'"):
        CALLS[call](model, **data())


@slow_when(lambda p: p.error is KeyboardInterrupt and p.engine != "stream")
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("where", ["forward", "backward"])
def test_model_is_left_as_found_when_the_model_itself_fails(engine, error, where):
    """In the middle of a forward, or of a backward, of each pass in turn: flags, hooks, gradients, modes are back."""
    model = used_model()
    if engine == "gram":  # frozen parts and all
        model.model.layers[3].mlp.gate_proj.weight.requires_grad_(False)
    calls, fails_at = [], [0]

    def count(*args):
        calls.append(1)
        if len(calls) == fails_at[0]:
            raise error("stop")
        return args[0] if where == "backward" else None

    mlp = model.model.layers[2].mlp
    if where == "forward":
        mlp.register_forward_pre_hook(count)
    else:
        in_a_backward_of(mlp, count)
    before = snapshot(model)
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks)) for m in model.modules()]
    gfast.g_effect(model, WGA(), engine=engine, **data())
    total, calls[:] = len(calls), []
    assert total >= 3
    for fails_at[0] in (1, total // 2 + 1, total):
        calls.clear()
        with pytest.raises(error, match="stop"):
            gfast.g_effect(model, WGA(), engine=engine, **data())
        assert_same(before, snapshot(model))
        assert hooks == [
            (len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks)) for m in model.modules()
        ]
        assert torch.is_grad_enabled() and not torch.overrides._get_current_function_mode_stack()
        assert model.config._attn_implementation == "sdpa"
    calls.clear()
    fails_at[0] = 0
    assert gfast.g_effect(model, WGA(), engine=engine, **data()).total("unlearn") < 0


@pytest.mark.parametrize("engine", ENGINES)
def test_gradients_that_are_not_finite_are_named_by_every_engine(engine):
    model = tiny("llama").eval()
    in_a_backward_of(model.model.layers[1].mlp, lambda grad: grad * torch.nan)
    said = r"gradient of .* is not finite in \d+ of \d+ parameters, first in 'model\..*': check the model's weights"
    with pytest.raises(ValueError, match=said):
        gfast.g_effect(model, WGA(), engine=engine, **data())


@pytest.mark.parametrize("engine", [engine for engine in ENGINES if engine != "gram"])
def test_directions_of_another_model_or_dtype_are_refused_by_every_engine(monkeypatch, engine):
    model = tiny("llama", dtype=torch.float32).eval()
    directions = gfast.risk_gradients(model, **data())
    monkeypatch.setattr(backward, "model_loss", None)  # before any work
    monkeypatch.setattr(row_pass, "logp_rows", None)
    options = dict(engine=engine, directions=directions) | data()
    with pytest.raises(ValueError, match="measured at other weights"):
        gfast.g_effect(copy.deepcopy(model).bfloat16(), WGA(), **options)
    with pytest.raises(ValueError, match="another model or grouping"):
        gfast.g_effect(tiny("gpt2"), WGA(), **options)
    with pytest.raises(ValueError, match="measured on other data"):
        gfast.g_effect(model, WGA(), **(options | dict(forget=batches(5))))


@pytest.mark.parametrize("engine", ENGINES)
def test_data_is_read_and_not_written(engine):
    """Batches serve one engine after the other: they come out as they went in, and generators are read once."""
    model, some = tiny("llama").eval(), data()
    before = copy.deepcopy(some)
    found = gfast.g_effect(model, WGA(), engine=engine, **{key: iter(value) for key, value in some.items()})
    assert found == gfast.g_effect(model, WGA(), engine=engine, **some)
    for key, value in before.items():
        for one, other in zip(value, some[key], strict=True):
            assert list(one) == list(other) and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("engine", ENGINES)
def test_bad_labels_are_named_by_every_engine(engine):
    wrong = data()
    wrong["forget"][1]["labels"][0, 3] = 61
    model = used_model()
    before = snapshot(model)
    with pytest.raises(ValueError, match="outside the vocabulary"):
        gfast.g_effect(model, WGA(), engine=engine, **wrong)
    assert_same(before, snapshot(model))


# ---------------------------------------------------------------------------------------------------- loss scale


def half_model():
    """An fp16 model, and the same weights in fp64."""
    low = tiny("llama").half().eval()
    exact = tiny("llama").eval()
    exact.load_state_dict(low.state_dict())
    return low, exact


@pytest.mark.parametrize("engine", ["sample", "gram"])
def test_small_weights_do_not_underflow_in_fp16(engine):
    low, exact = half_model()
    small = WGA(alpha=4.2)  # at p of about 1/61 its weights are below fp16's smallest number, 6e-8, at many tokens
    truth = gfast.g_effect(exact, small, **data()).total("unlearn")
    found = gfast.g_effect(low, small, engine=engine, **data()).total("unlearn")
    lost = gfast.g_effect(low, small, engine=engine, loss_scale=1.0, **data()).total("unlearn")
    error, without = abs(found / truth - 1), abs(lost / truth - 1)
    assert error < 0.05 and without > 0.4, (error, without)


@pytest.mark.parametrize("call", CALLS)
def test_small_gradients_of_samples_do_not_underflow_in_fp16(call):
    """Labels of which the model is sure: their b, 1 - p, is below what fp16 can hold."""
    low, exact = half_model()
    ids = torch.arange(3, 11).repeat(3, 1)
    batch = {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}
    for model in (low, exact):
        # each token is told by its own direction of the embedding, and the head knows what follows it
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "layers" in name:
                    parameter.mul_(0.0 if name.endswith(("o_proj.weight", "down_proj.weight")) else 1.0)
            model.model.embed_tokens.weight.zero_()[torch.arange(3, 11), torch.arange(8)] = 1.0
            model.lm_head.weight.zero_()[torch.arange(4, 11), torch.arange(7)] = 5.5
            model.model.norm.weight.fill_(1.0)
    some = dict(forget=batch, retain=batch)
    along = {}
    if call != "gram_effect":
        along["directions"] = gfast.risk_gradients(exact, **some, dtype=torch.float64)
    truth = CALLS[call](exact, **some, **along)
    if along:
        along["directions"].squares = torch.stack([p.detach().double().square().sum() for p in low.parameters()])

    def error(loss_scale: float | None) -> float:
        effect = CALLS[call](low, **some, **along, loss_scale=loss_scale)
        found, expected = (float(sum(one.sum() for one in value.total("unlearn"))) for value in (effect, truth))
        return abs(found / expected - 1)

    assert error(None) < 0.05
    if call == "pg_effect":  # it notices
        with pytest.raises(ValueError, match="do not add up"):
            error(1.0)
    elif call == "gram_effect":  # token_effect needs none on a CPU that multiplies fp16 in fp32
        assert error(1.0) > 0.3


@pytest.mark.parametrize("engine", ENGINES)
def test_loss_scale_changes_nothing_else(engine):
    model = tiny("tied_llama").eval()
    expected = gfast.g_effect(model, WGA(), engine=engine, **data())
    found = gfast.g_effect(model, WGA(), engine=engine, loss_scale=2.0**12, **data())
    for side in ("unlearn", "retain"):
        assert getattr(found, side) == pytest.approx(getattr(expected, side), rel=1e-12)
    with pytest.raises(ValueError, match="loss_scale must be positive"):
        gfast.g_effect(model, WGA(), engine=engine, loss_scale=-1.0, **data())
    low = tiny("llama").half().eval()
    with pytest.raises(ValueError, match=r"not finite.*loss scale.*try loss_scale=1.0"):
        gfast.g_effect(low, WGA(), engine=engine, loss_scale=1e9, **data())


def test_loss_scale_of_the_public_functions_is_checked():
    for call in (*CALLS.values(), gfast.risk_gradients):
        with pytest.raises(ValueError, match="loss_scale must be positive"):
            call(tiny("llama"), loss_scale=0.0, **data())
