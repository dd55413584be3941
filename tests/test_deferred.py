"""Deferred logits: what a model does to them is followed or computed, and is what it would be without them."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gfast.deferred import DeferredLogits, deferred


class Model(nn.Module):
    """A head, and what is done to its logits."""

    def __init__(self, after=lambda logits: logits, bias=True):
        super().__init__()
        self.lm_head = nn.Linear(6, 11, bias=bias)
        self.after = after

    def forward(self, hidden):
        return self.after(self.lm_head(hidden))


def hidden_states() -> torch.Tensor:
    return torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(0), requires_grad=True)


def run(model: Model, hidden: torch.Tensor):
    with deferred(model, model.lm_head):
        return model(hidden)


def divided_in_place(z):
    z /= 3.0
    return z


def capped(z):
    return 5.0 * torch.tanh(z / 5.0)


def capped_in_place(z):
    z = z / 5.0
    z = z.tanh()
    z *= 5.0
    return z


def scaled_without_the_result(z):
    z.mul_(0.25)
    return z


# what a model does -> the scale and the soft cap that this amounts to
FOLLOWED = {
    "nothing": (lambda z: z, 1.0, None),
    "times a number": (lambda z: z * 0.3, 0.3, None),
    "a number times": (lambda z: 2 * z, 2.0, None),
    "divided": (lambda z: z / 4, 0.25, None),
    "divided in place": (divided_in_place, 1 / 3, None),
    "in place, result unused": (scaled_without_the_result, 0.25, None),
    "several": (lambda z: torch.mul(z.div(2.0), 3.0), 1.5, None),
    "capped": (capped, 1.0, 5.0),
    "capped in place": (capped_in_place, 1.0, 5.0),
    "scaled, then capped": (lambda z: capped(z * 0.5), 0.5, 5.0),
    "capped, then scaled": (lambda z: capped(z) * 2.0, 2.0, 10.0),
    "tanh alone": (torch.tanh, 1.0, 1.0),
    "wider": (lambda z: z.float().contiguous().to(torch.float64), 1.0, None),
    "where it is": (lambda z: z.to(z.device), 1.0, None),
}


@pytest.mark.parametrize("after, scale, softcap", FOLLOWED.values(), ids=FOLLOWED)
def test_what_is_followed_stays_deferred(after, scale, softcap):
    model, hidden = Model(after), hidden_states()
    expected = model(hidden)
    out = run(model, hidden)
    assert isinstance(out, DeferredLogits) and out.computed is None
    assert out.shape == expected.shape and out.dtype == expected.dtype and out.device == expected.device
    assert out.dim() == 3 and out.size(-1) == 11 and len(out) == 2 and out.requires_grad and out.is_floating_point()
    head = out.head()
    assert head.weight is model.lm_head.weight and head.bias is model.lm_head.bias and head.module is model.lm_head
    assert head.logit_scale == pytest.approx(scale) and head.softcap == (softcap and pytest.approx(softcap))
    z = head.logit_scale * F.linear(out.hidden, head.weight, head.bias)
    z = z if softcap is None else head.softcap * torch.tanh(z / head.softcap)
    torch.testing.assert_close(z.to(expected.dtype), expected)
    assert torch.equal(out.real(), expected)  # to the bit: the same operations in the same order
    assert out.head() is None


def masked(z):
    z[..., 3] = -torch.inf
    return z


def filled(z):
    z.masked_fill_(torch.arange(11) > 7, -1e4)
    return z


def looked_at(z):
    z.argmax(-1)
    return z


def tanh_in_place(z):
    torch.tanh_(z)
    return z


def hooked(z):
    z.register_hook(lambda grad: 3 * grad)
    return z


def part_in_place(z):
    z[:, 1:].mul_(2.0)
    return z


def whole_in_place(z):
    part = z[:, 1:]
    z.mul_(2.0)
    return part


def copy_in_place(z):
    copy = z.to(z.dtype, copy=True)
    copy.mul_(2.0)
    return z + copy


COMPUTED = {
    "a part of the sequence": lambda z: (z * 2.0)[:, 1:],
    "a part of the batch": lambda z: z[:1],
    "a part changed in place": part_in_place,
    "a part of what changes in place": whole_in_place,
    "a copy changed in place": copy_in_place,
    "bias added": lambda z: z + torch.arange(11.0),
    "scaled by a parameter": lambda z: z * torch.tensor(2.0, requires_grad=True),
    "set": masked,
    "filled in place": filled,
    "looked at": looked_at,
    "tanh in place": tanh_in_place,
    "a part of the vocabulary": lambda z: z[..., :7],
    "one token": lambda z: z[:, -1:, 2:],
    "normalised": lambda z: z.log_softmax(-1),
    "twice capped": lambda z: capped(z).tanh().exp(),
    "reshaped": lambda z: z.view(10, 11)[None],
    "stacked": lambda z: torch.stack([z, z])[1],
    "narrower": lambda z: z.to(torch.bfloat16),
    "given to a list": lambda z: torch.cat([z, z], 1)[:, :5],
    "with alpha": lambda z: torch.sub(z, 1.0, alpha=2),
    "gradient hook": hooked,
    "detached": lambda z: z.detach() + 0 * z,
    "rounded division": lambda z: torch.div(z, 2.0, rounding_mode="floor"),
    "followed and computed": lambda z: ((z * 2.0) + 1.0) / 3.0,
}


@pytest.mark.parametrize("after", COMPUTED.values(), ids=COMPUTED)
def test_whatever_else_is_computed_as_without_them(after):
    model = Model(after)
    plain, ours = hidden_states(), hidden_states()
    expected = model(plain)
    out = run(model, ours)
    out = out.real() if isinstance(out, DeferredLogits) else out
    assert torch.equal(out, expected)
    expected.float()[expected.isfinite()].sum().backward()
    gradients = [plain.grad, *(p.grad.clone() for p in model.parameters())]
    model.zero_grad()
    out.float()[out.isfinite()].sum().backward()
    for found, right in zip([ours.grad, *(p.grad for p in model.parameters())], gradients, strict=True):
        assert torch.equal(found, right)


@pytest.mark.parametrize("factor", [0.0, -2.0, float("inf"), float("nan")])
def test_maps_that_no_op_takes_are_no_head(factor):
    model = Model(lambda z: z * factor)
    out = run(model, hidden_states())
    assert out.head() is None
    assert torch.equal(out.real().isnan(), model(hidden_states()).isnan())


def test_two_caps_are_no_head():
    assert run(Model(lambda z: capped(capped(z))), hidden_states()).head() is None


def test_what_is_computed_once_stays():
    model = Model(lambda z: z * 2.0)
    out = run(model, hidden_states())
    first = out + 0.0
    out += 1.0
    assert torch.equal(out, first + 1.0)
    out = run(model, hidden_states())
    out[0, 0, 0] = 7.0
    assert out.computed is not None and float(out[0, 0, 0]) == 7.0


def test_hooks_of_the_head_see_and_change_its_logits():
    model, seen = Model(), []
    model.lm_head.register_forward_hook(lambda module, args, out: 2.0 * out)
    model.lm_head.register_forward_pre_hook(lambda module, args: (args[0] + 1.0,))
    model.lm_head.register_forward_hook(lambda module, args, out: seen.append(out.shape))
    hidden = hidden_states()
    out = run(model, hidden)
    assert out.head().logit_scale == 2.0 and seen == [(2, 5, 11)]
    assert torch.equal(out.real(), model(hidden))


@pytest.mark.parametrize("kind", ["subclass", "replaced forward", "no linear layer", "none", "compiled around it"])
def test_other_heads_are_left_alone(kind):
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model, hidden = Model(), hidden_states()
    linear = model.lm_head
    if kind == "subclass":
        linear = model.lm_head = Doubled(6, 11)
    elif kind == "replaced forward":
        model.lm_head.forward = lambda x: 3 * F.linear(x, linear.weight)
    elif kind == "no linear layer":
        linear = model.lm_head = nn.Sequential(nn.Linear(6, 11))
    elif kind == "none":
        linear = None
    else:
        model.compile(backend="eager")
    before = vars(model.lm_head).get("forward")
    with deferred(model, linear):
        out = model(hidden)
    assert type(out) is torch.Tensor and vars(model.lm_head).get("forward") is before
    assert torch.equal(out, model(hidden))


def test_the_head_is_given_back_after_an_error():
    def fail(z):
        raise RuntimeError("no")

    model = Model(fail)
    with pytest.raises(RuntimeError, match="no"):
        run(model, hidden_states())
    assert "forward" not in vars(model.lm_head)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_the_dtype_is_that_of_the_product(dtype):
    model, hidden = Model(lambda z: z.float()), hidden_states()
    with torch.autocast("cpu", dtype):
        expected, out = model(hidden), run(model, hidden)
    assert out.computed is None and out.hidden.dtype == out.weight.dtype == dtype and out.dtype == torch.float32
    assert torch.equal(out.real(), expected)


@pytest.mark.parametrize("off", ["re-entrant checkpoint", "no_grad"])
def test_a_head_that_is_called_where_gradients_are_off(off):
    """What it reads has no graph there: gradients are those of the real logits, or there are none."""

    class Around(Model):
        def forward(self, hidden):
            if off == "no_grad":
                with torch.no_grad():
                    return super().forward(hidden)
            return torch.utils.checkpoint.checkpoint(super().forward, hidden, use_reentrant=True)

    model, hidden, expected = Around(), hidden_states(), hidden_states()
    found, plain = run(model, hidden), model(expected)
    assert found.requires_grad == plain.requires_grad and not isinstance(found, DeferredLogits)
    if plain.requires_grad:
        found.square().sum().backward()
        weight, model.lm_head.weight.grad = model.lm_head.weight.grad, None
        plain.square().sum().backward()
        assert weight.equal(model.lm_head.weight.grad) and hidden.grad.equal(expected.grad)


def test_threads_that_call_one_model_defer_their_own_calls():
    model, hidden = Model(), torch.ones(2, 6)
    entered, go_on = threading.Event(), threading.Event()

    def longer():
        with deferred(model, model.lm_head):
            entered.set()
            assert go_on.wait(60)
            return model(hidden)

    with ThreadPoolExecutor(2) as pool:
        with deferred(model, model.lm_head):
            other = pool.submit(longer)
            assert entered.wait(60)
            here, plain = model(hidden), pool.submit(model, hidden).result()
        go_on.set()
        there = other.result()
    assert type(here) is type(there) is DeferredLogits
    assert type(plain) is torch.Tensor and torch.equal(plain, here.real())
    assert "forward" not in vars(model.lm_head)
