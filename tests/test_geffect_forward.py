"""Forward mode along many streams at once against torch.func.jvp, one stream at a time, function by function."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from helpers.forward_mode import check, directions_for, parameter, run
from torch import nn
from torch.autograd import forward_ad

from gfast.geffect.engines import jvp as forward

# which streams each parameter belongs to
TWO_STREAMS = [[(0, 1), (2, 3)], [(0, 1, 4), (1, 4)], [(1,), (0, 1, 2)], [(0, 2), (0, 2)], [(0,), ()]]
THREE_STREAMS = [[(0, 1), (0, 1), (0, 1)], [(0,), (1,), (2,)], [(0, 1), (1,), ()], [(), (0,), (1,)]]
MASK = torch.tensor([[True, False, True], [False, True, True]])
INDEX = torch.tensor([1, 0, 1])


def in_place_on_views(x, y):
    x = x * 1.0
    x[:, 1:].mul_(y[:, 1:])
    x[0] = y[1] * 2
    x += y.sum()
    return x


def scattered(x, y):
    out = torch.zeros(4, 3, dtype=x.dtype)
    out.index_add_(0, INDEX[:2], x * y)
    out[3] = y[0]
    return out * 2


def stop(x, y):
    with torch.no_grad():
        scale = (x * y).sum()
    return (x * scale + x.detach() * y + x.data).sum()


def in_place_under_a_product_of_a_view(x, y):
    plain = x * 1
    plain.exp()  # added up
    product = plain[0] * 3
    plain.mul_(2)
    return product + y


def in_place_on_a_plain_factor(x, y):
    factor = torch.ones(3, dtype=x.dtype)
    product = x * factor
    factor[1] = 7.0
    factor += 1
    return product + y


def view_of_plain(x):
    base = torch.zeros(4, 3, dtype=x.dtype)
    base[:2].copy_(x)
    return base


def in_place_under_a_view(x):
    plain = x * 1
    part = plain[0]
    plain.add_(x)
    shared = plain + 1
    plain.mul_(2)
    return part + shared.sum()


def in_place_on_a_view_of_what_moves_less(x, y):
    whole = x * 2
    first, _ = whole.unbind(0)
    first.mul_(y[0])
    whole[:, 1:] += y[:, 1:]
    return whole, first


UNARY = {
    "a view of a plain tensor": view_of_plain,
    "in place under a view": in_place_under_a_view,
    "strides": lambda x: [(y := x * 1).as_strided((3,), (1,)).add_(1).mul_(y[1]), y],
    "views": lambda x: x.view(3, 2).transpose(0, 1).unsqueeze(1).expand(2, 4, 3).reshape(-1)[2:9],
    "chunk": lambda x: x.chunk(2, dim=-1),
    "split": lambda x: x.split([1, 2], dim=1),
    "iteration": lambda x: [row * 2 for row in x],
    "transposed": lambda x: x.T @ x.mT.T,
    "reductions": lambda x: x.sum(-1, keepdim=True) + x.mean() + x.var(0),
    "silu": F.silu,
    "gelu": lambda x: F.gelu(x, approximate="tanh"),
    "relu in place": lambda x: F.relu(x * 1.0, inplace=True) * 2,
    "in place by position": lambda x: [(y := x * 1), F.relu6(y, True), y],
    "powers": lambda x: x**2 + torch.rsqrt(x.abs() + 1) + 2**x,
    "power of another shape": lambda x: (x.abs() + 1) ** torch.tensor([[[2.0]], [[3.0]]], dtype=x.dtype),
    "reversed": lambda x: 1 - x + 1 / x - (-x),
    "softmax": lambda x: F.softmax(x, dim=-1) + torch.softmax(x, 0),
    "log softmax": lambda x: F.log_softmax(x, dim=-1),
    "topk": lambda x: x.topk(2, dim=-1)[0] * 3,
    "boolean index": lambda x: x[MASK],
    "two indices": lambda x: x[:, None][torch.tensor([0, 1]), :, INDEX[:2]],
    "index and slice": lambda x: x[:, INDEX],
    "masked fill": lambda x: x.masked_fill(MASK, 3.0),
    "pad": lambda x: F.pad(x, (1, 2), value=5.0),
    "where": lambda x: torch.where(MASK, x, 1.0),
    "gather": lambda x: x.gather(1, INDEX.expand(2, 3)),
    "embedding": lambda x: F.embedding(torch.tensor([[0, 1], [1, 1]]), x),
    "single precision": lambda x: (x.float() * 2).to(torch.float32).double(),
    "dropout": lambda x: F.dropout(x, 0.5, training=False),
    "einsum": lambda x: torch.einsum("ij,kj->ik", x, x),
    "rms norm": lambda x: F.rms_norm(x, (3,), eps=1e-3),
    "layer norm": lambda x: F.layer_norm(x, (3,)),
    "new like": lambda x: torch.zeros_like(x) + x + x.new_ones(3),
    "integers": lambda x: x * (x > 0).long() * x.argmax(-1, keepdim=True),
}
BINARY = {
    "in place on a view of what moves less": in_place_on_a_view_of_what_moves_less,
    "arithmetic": lambda x, y: x * y + x / y - torch.sub(x, y, alpha=2) + torch.add(x, y, alpha=3),
    "broadcast": lambda x, y: x[:, None] * y[0] + x[:, :1] - y.sum(0, keepdim=True),
    "dimensions of one entry": lambda x, y: (x.view(2, 1, 1, 3) + y.view(1, 1, 2, 3).permute(2, 0, 1, 3)).permute(
        1, 2, 3, 0
    ),
    "cat": lambda x, y: torch.cat([x, torch.ones(2, 1, dtype=x.dtype), y], -1),
    "stack": lambda x, y: torch.stack((x, y), dim=1),
    "matmul": lambda x, y: x @ y.T,
    "batched matmul": lambda x, y: torch.matmul(x.view(2, 1, 3), y.view(2, 3, 1)),
    "bmm": lambda x, y: torch.bmm(x[:, None], y[:, :, None]),
    "matmul with a matrix": lambda x, y: x.view(1, 2, 3) @ y.T,
    "linear": lambda x, y: F.linear(x.view(2, 1, 3), y, y[:, 0]),
    "addmm": lambda x, y: torch.addmm(y[0, :2], x, y.T),
    "baddbmm": lambda x, y: torch.baddbmm(x[:, None], x[:, None], y[:, None].expand(2, 3, 3), alpha=0.5),
    "norm": lambda x, y: F.layer_norm(x, (3,), y[0], y[1]),
    "into a plain tensor": scattered,
    "in place by name": lambda x, y: (x * 1).add_(y).mul_(y).div_(y + 4).clamp_(min=-0.5),
    "in place under a product of a view": in_place_under_a_product_of_a_view,
    "in place on a plain factor": in_place_on_a_plain_factor,
    "in place under a product": lambda x, y: [(z := x * 2).exp(), (w := z * y), z.add_(y), w, z],
    "in place after sharing": lambda x, y: [(z := x * 2), (w := z + 1).mul_(y), z, w],
}


@pytest.mark.parametrize("name", UNARY)
@pytest.mark.parametrize("derived", [False, True])
def test_one_argument(name, derived):
    function = UNARY[name]
    rtol = 1e-6 if name == "single precision" else 1e-12  # tangents are not rounded on the way, jvp's are
    check((lambda x: function(x * 1.5)) if derived else function, [parameter(2, 3)], rtol=rtol)


@pytest.mark.parametrize("name", BINARY)
@pytest.mark.parametrize("streams", TWO_STREAMS)
@pytest.mark.parametrize("derived", [False, True])
def test_two_arguments(name, streams, derived):
    function = BINARY[name]
    if derived:
        check(lambda x, y: function(x * 1.5, y + 0.25), [parameter(2, 3), parameter(2, 3, seed=1)], streams)
    else:
        check(function, [parameter(2, 3), parameter(2, 3, seed=1)], streams)


NORMS = {
    "layer norm": lambda x, w: F.layer_norm(x, (8,), w, w),
    "group norm": lambda x, w: F.group_norm(x, 2, w, w),
    "vector norm": lambda x, w: torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32),
}


@pytest.mark.parametrize("name", NORMS)
def test_tangents_have_the_dtype_of_16_bit_numbers_that_fp32_weights_scale(name):
    """As in fp32 norms between 16-bit layers, under autocast too: else the next matrix product fails."""
    x, w = parameter(3, 8), parameter(8, seed=1)
    matrix = torch.randn(8, 8, generator=torch.Generator().manual_seed(2), dtype=torch.float64)

    def function(x, w, dtype, wide):
        y = NORMS[name](x.to(dtype), w.to(wide))
        return F.linear(y.expand(3, 8), matrix.to(y.dtype))

    along = directions_for([x, w], [(0,), (1,)])
    ((value, found),) = run(lambda x, w: function(x, w, torch.bfloat16, torch.float32), [x, w], along)
    ((_, right),) = run(lambda x, w: function(x.float(), w, torch.float32, torch.float32), [x, w], along)
    for stream, tangent in right.items():
        assert found[stream].dtype == value.dtype
        assert (found[stream] - tangent).norm() <= 2e-2 * tangent.norm()


def test_threads_take_forward_mode_in_turn():
    def once(seed):
        x = parameter(2, 3, seed=seed)
        along = directions_for([x], [(0,)])
        return run(lambda x: (x * x).sin(), [x], along)[0][1][0] - (x * x).cos() * 2 * x * along[x][0]

    with ThreadPoolExecutor(4) as pool:
        for apart in pool.map(once, range(40)):
            assert apart.abs().max() < 1e-12
    with forward_ad.dual_level(), pytest.raises(forward.ForwardModeError, match="gfast: this is within .*dual_level"):
        once(0)


def test_in_place_on_views():
    check(in_place_on_views, [parameter(2, 3), parameter(2, 3, seed=1)], [(0, 2), (0, 2)])


def test_tangents_stop_where_gradients_do():
    """Against backward: jvp goes through detach and no_grad, training does not."""
    parameters = [parameter(2, 3), parameter(2, 3, seed=1)]
    along = directions_for(parameters, [(0, 1), (0, 1)])
    ((_, tangents),) = run(stop, parameters, along)
    grads = torch.autograd.grad(stop(*parameters), parameters)
    for stream, tangent in tangents.items():
        expected = sum((along[p][stream] * g).sum() for p, g in zip(parameters, grads, strict=True))
        assert tangent.item() == pytest.approx(expected.item(), rel=1e-12)


CAUSAL = torch.ones(5, 5, dtype=torch.bool).tril()
ATTENTION = {
    "plain": {},
    "causal": dict(is_causal=True),
    "bool mask": dict(attn_mask=CAUSAL & (torch.arange(5) > 0)),  # the first query sees nothing
    "float mask": dict(attn_mask=parameter(2, 1, 5, 5).detach().masked_fill(~CAUSAL, -math.inf)),
    "scale": dict(is_causal=True, scale=0.3),
    "grouped": dict(is_causal=True, enable_gqa=True),
    "grouped, mask": dict(attn_mask=CAUSAL.expand(2, 4, 5, 5), enable_gqa=True),
}


@pytest.mark.parametrize("name", ATTENTION)
@pytest.mark.parametrize("streams", THREE_STREAMS)
@pytest.mark.parametrize("scores", [2**22, 40])
def test_attention(name, streams, scores, monkeypatch):
    monkeypatch.setattr(forward, "_SCORES", scores)  # few: runs of queries
    options = ATTENTION[name]
    heads = 2 if options.get("enable_gqa") else 4
    inputs = [parameter(2, 5, 4, 6), parameter(2, 5, heads, 6, seed=1), parameter(2, 5, heads, 3, seed=2)]

    def attention(q, k, v):
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            heads_first = [item.transpose(1, 2) * 1.0 for item in (q, k, v)]
            out = F.scaled_dot_product_attention(*heads_first, **options)
            return out.transpose(1, 2).reshape(2, 5, -1)

    check(attention, inputs, streams)


def test_attention_lies_in_memory_as_its_value_does():
    def attention(x):
        out = F.scaled_dot_product_attention(x, x, x, is_causal=True).transpose(1, 2)
        return out.view(2, 3, 8) if out.is_contiguous() else out.reshape(2, 3, 8)  # view, where the value permits it

    x = parameter(2, 2, 3, 4)
    ((value, _),) = run(lambda x: attention(x * 1), [x], directions_for([x], [(0, 1)]))
    assert value.shape == (2, 3, 8)


def test_streams_begin_where_their_parameters_are_used():
    x, y = parameter(2, 3), parameter(2, 3, seed=1)
    seen = []

    def function(x, y):
        hidden = x * 2
        seen.append(forward_ad.unpack_dual(hidden).tangent)
        return hidden + y

    ((_, tangents),) = check(function, [x, y])
    assert set(seen[0].parts) == {0, 1} and set(tangents) == {0, 1, 2, 3}


def test_no_graph_is_recorded_and_parameters_stay():
    x = parameter(2, 3)
    before = x.detach().clone()
    ((value, tangents),) = run(lambda x: (x * 2).add_(1), [x], directions_for([x], [(0,)]))
    assert not value.requires_grad and not tangents[0].requires_grad
    assert torch.equal(x, before)


def test_requests_for_gradients_are_ignored():
    """Hooks for training with checkpoints make the embeddings' output require gradients."""
    x, plain = parameter(2, 3), torch.ones(2, 3, dtype=torch.float64)

    def function(x):
        derived = (x * 2).requires_grad_(True)
        plain.requires_grad_()
        plain.requires_grad = True
        return derived * plain

    ((value, tangents),) = run(function, [x], directions_for([x], [(0,)]))
    assert not value.requires_grad and not tangents[0].requires_grad and not plain.requires_grad


def test_attention_inside_of_functions_of_torch():
    layer = nn.MultiheadAttention(6, 2, batch_first=True).double().eval()
    names, weights = zip(*layer.named_parameters(), strict=True)
    inputs = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def function(*values):
        given = dict(zip(names, values, strict=True))
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):  # for jvp
            call = torch.func.functional_call(layer, given, (inputs, inputs, inputs), {"need_weights": False})
        return call[0]

    along = directions_for(weights, [(0, 1)] * len(weights))
    ((value, tangents),) = run(function, weights, along)
    torch.backends.mha.set_fastpath_enabled(False)  # for jvp too
    try:
        ((expected, moved),) = check(function, list(weights), [(0, 1)] * len(weights))
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    assert torch.allclose(value, expected, rtol=1e-12) and all(
        torch.allclose(tangents[stream], moved[stream], rtol=1e-12) for stream in moved
    )


def test_dropout_that_stays_on_is_the_same_for_all_streams():
    x = parameter(20, 30)
    along = directions_for([x], [(0, 1)])
    ((value, tangents),) = run(lambda x: F.dropout(x, 0.5, training=True), [x], along)
    assert 0.2 < (value == 0).double().mean() < 0.8
    for stream, tangent in tangents.items():
        assert torch.equal(tangent, along[x][stream] * 2 * (value != 0))
