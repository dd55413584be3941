"""What only a GPU shows: engines and training on a device, streams, graphs, host storage, sums in the matrix units."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers")

from helpers.geffect_models import batches, dots, exact_norms, gradient, literal_loss, tiny  # noqa: E402
from helpers.losses import assert_law, problem, run  # noqa: E402
from helpers.training_tiny import collator, config, datasets, pairing, parameters, tiny_model  # noqa: E402

import gfast  # noqa: E402
from gfast.objectives import GA, NPO, WGA, WTNPO  # noqa: E402
from gfast.ops.grad_dot import grad_dots  # noqa: E402
from gfast.ops.linear_unlearn_loss import linear_unlearn_loss_reference  # noqa: E402

DEVICE = "cuda"
pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
LAYERS = 4
OBJECTIVES = {"wga": WGA(alpha=0.7), "npo": NPO(beta=0.3)}  # as literal_loss has them


def moved(data: list[dict]) -> list[dict]:
    return [{key: value.to(DEVICE) for key, value in batch.items()} for batch in data]


def literal(model, data: tuple[list[dict], list[dict]], name: str) -> tuple[dict, dict, dict]:
    """By group: dots of the objective's gradient with the forget and the retain risk's, and products of the norms."""
    some = [(data[0], name), (data[0], "nll"), (data[1], "nll")]
    own, *risks = (
        {key: grad.double() for key, grad in gradient(model, literal_loss(model, *at)).items()} for at in some
    )
    squares, forget = (dots(model, one, one, LAYERS, False) for one in (own, risks[0]))
    norms = {group: math.sqrt(square * forget[group]) for group, square in squares.items()}
    return *(dots(model, risk, own, LAYERS, False) for risk in risks), norms


@pytest.mark.parametrize("engine", ["stream", "sample", "token", "gram"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_engine_against_fp64(engine, dtype):
    """gfast's error is at most twice that of plain autograd in the same dtype, plus one rounding."""
    model = tiny("llama", LAYERS, dtype).eval().to(DEVICE)
    exact = copy.deepcopy(model).double()
    exact_norms(exact)
    data = moved(batches(1)), moved(batches(2, rows=4, sizes=(1, 3)))
    wide = tuple([{k: v.double() if v.is_floating_point() else v for k, v in b.items()} for b in side] for side in data)
    for name, objective in OBJECTIVES.items():
        effect = gfast.g_effect(model, objective, forget=data[0], retain=data[1], engine=engine)
        truth, plain = literal(exact, wide, name), literal(model, data, name)
        for ours, right, theirs in zip((effect.unlearn, effect.retain), truth[:2], plain[:2], strict=True):
            scale = max(truth[2].values())
            allowed = 2 * max(abs(theirs[group] - right[group]) for group in right) + torch.finfo(dtype).eps * scale
            for group, value in right.items():
                assert abs(ours[group] - value) <= allowed, (group, ours[group], value, allowed)


@pytest.mark.parametrize("engine", ["stream", "sample", "token"])
def test_directions_in_host_memory_and_in_a_file_are_the_same(engine, tmp_path):
    model = tiny("llama", LAYERS, torch.float32).eval().to(DEVICE)
    sets = dict(forget=batches(1), retain=batches(2))

    def effect(storage):
        return gfast.g_effect(model, WGA(), **sets, engine=engine, direction_storage=storage)

    on_device = effect("device")
    for storage in ("host", tmp_path):
        found = effect(storage)
        assert found.unlearn == on_device.unlearn and found.retain == on_device.retain


def test_effects_of_samples_tokens_and_pairs_add_up():
    model = tiny("llama", LAYERS, torch.float32).eval().to(DEVICE)
    sets = {side: batches(seed, sizes=(5,))[0] for side, seed in (("forget", 1), ("retain", 2))}
    whole = gfast.g_effect(model, GA(), **sets)
    parts = gfast.pg_effect(model, **sets), gfast.token_effect(model, **sets), gfast.gram_effect(model, **sets)
    for part in (parts[0], parts[1].samples(), parts[2].samples()):
        for side in ("unlearn", "retain"):
            total = part.total(side).sum().item() / int(part.tokens.sum())
            assert total == pytest.approx(whole.total(side), rel=1e-4, abs=1e-6 * abs(whole.total("unlearn")))


@pytest.mark.parametrize("inplace", [False, True], ids=["fresh", "in place"])
@pytest.mark.parametrize("vocab", [1000, 50257, 128256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_rows_held_on_the_chip_by_the_law(dtype, vocab, inplace):
    if why := gfast.ops.dispatch.why_not("unlearn_loss", "cuda", DEVICE, dtype):
        pytest.skip(why)
    logits = torch.randn(300, vocab, device=DEVICE).mul(3).to(dtype)
    labels = torch.randint(vocab, (300,), device=DEVICE)
    labels[:4] = torch.tensor([-100, 0, vocab - 1, vocab // 2])
    ref = -3 * torch.rand(300, device=DEVICE)

    def loss(z, impl="reference", **options):
        return gfast.unlearn_loss(z, labels, WTNPO(), ref_logp=ref, impl=impl, **options)

    def ours(z):
        return loss(z * 1 if inplace else z, "cuda", inplace=inplace)

    assert_law(run(ours, (logits,)), run(loss, (logits,)), run(loss, (logits.double(),)), dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_chunks_of_the_head_add_up_in_fp32(dtype):
    """Several chunks of 16-bit rows: dW is summed by the matrix units, in fp32."""
    hidden, weight, bias, labels, ref = problem(T=100, D=64, V=1001, dtype=dtype, device=DEVICE)
    wide = [x.double() for x in (hidden, weight, bias)]

    def plain(h, w, b):
        return linear_unlearn_loss_reference(h, w, labels, WGA(), ref_logp=ref, bias=b)

    def ours(h, w, b):
        return gfast.linear_unlearn_loss(h, w, labels, WGA(), ref_logp=ref, bias=b, chunk_rows=64)

    assert_law(run(ours, (hidden, weight, bias)), run(plain, (hidden, weight, bias)), run(plain, wide), dtype)


def cases() -> dict[str, tuple]:
    """Name -> (function of tensors, the tensors): everything that gfast launches itself."""
    hidden, weight, _, labels, _ = problem(T=64, D=64, V=1000, dtype=torch.bfloat16, device=DEVICE)
    logits = (hidden @ weight.T).requires_grad_()
    leaves = [x.requires_grad_() for x in (hidden, weight)]
    xs = [torch.randn(1000 + i, device=DEVICE) for i in range(291)]  # parameters of a model of 7B

    def loss_and_gradients(op, *tensors):
        out = op(*tensors, labels, WGA()).loss
        return out.detach(), *torch.autograd.grad(out, tensors)

    return {
        "unlearn_loss": (lambda z: loss_and_gradients(gfast.unlearn_loss, z), [logits]),
        "linear_unlearn_loss": (lambda h, w: loss_and_gradients(gfast.linear_unlearn_loss, h, w), leaves),
        "token_kl": (lambda z: (gfast.token_kl(z, z.detach() * 0.5, labels).detach(),), [logits]),
        "linear_token_logp": (lambda h, w: (gfast.linear_token_logp(h, w, labels).detach(),), leaves),
        "grad_dots": (lambda *some: (grad_dots(list(some), [list(some)], [0] * len(some), 1),), xs),
    }


def close(found, expected) -> bool:
    """As close as 16-bit rows in products of another shape are; far closer than rows of zeros or of other values."""
    return all(
        (a.double() - b.double()).norm() <= 1e-2 * b.double().norm() for a, b in zip(found, expected, strict=True)
    )


CASES = ["unlearn_loss", "linear_unlearn_loss", "token_kl", "linear_token_logp", "grad_dots"]


@pytest.mark.parametrize("name", CASES)
def test_work_goes_to_the_current_stream(name):
    """The inputs arrive late, on a stream of their own: a kernel on another stream would read what was there before."""
    function, tensors = cases()[name]
    expected = [x.clone() for x in function(*tensors)]
    values = [x.detach().clone() for x in tensors]
    with torch.no_grad():
        for x in tensors:
            x.zero_()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        with torch.no_grad():
            for x, value in zip(tensors, values, strict=True):
                x.copy_(value)
        found = function(*tensors)
    torch.cuda.synchronize()
    assert close(found, expected)


@pytest.mark.parametrize("name", CASES)
def test_a_graph_replays_it_with_new_values(name):
    function, tensors = cases()[name]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            function(*tensors)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        found = function(*tensors)
    with torch.no_grad():
        for x in tensors:
            x.mul_(0.5)
    graph.replay()
    torch.cuda.synchronize()
    assert close(found, function(*tensors))


def test_a_graph_refuses_a_table_of_tensors_that_would_not_live_as_long():
    xs = [torch.ones(8, device=DEVICE) for _ in range(600)]
    grad_dots(xs, [], [0] * 600, 1)
    if gfast.ops.dispatch.why_not("grad_dot", "cuda", DEVICE):
        pytest.skip("the CUDA kernel is not built")
    with pytest.raises(RuntimeError, match="CUDA graph"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        grad_dots(xs, [], [0] * 600, 1, impl="cuda")


def cuda_dots(*args) -> torch.Tensor:
    if why := gfast.ops.dispatch.why_not("grad_dot", "cuda", DEVICE):
        pytest.skip(why)
    return grad_dots(*args, impl="cuda")


def test_group_dots_of_many_tensors_are_one_launch():
    xs = [torch.randn(1000 + 700 * i, device=DEVICE) for i in range(291)]
    groups = [i % 5 for i in range(291)]
    cuda_dots(xs, [xs], groups, 5)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        cuda_dots(xs, [xs], groups, 5)
        torch.cuda.synchronize()
    names = [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    kernels = [name for name in names if not name.startswith(("Memcpy", "Memset"))]
    assert len(kernels) == 1 and "chunk_dots" in kernels[0]


def test_group_dots_on_several_streams_at_once():
    """The blocks of a launch count who came last: launches of other streams must not be counted with them."""
    streams = [torch.cuda.Stream() for _ in range(4)]
    xs = [[torch.randn(3_000_000, device=DEVICE) for _ in range(6 + k)] for k in range(4)]
    groups = [[i // (k + 1) for i in range(6 + k)] for k in range(4)]
    expected = [cuda_dots(x, [x], g, 12).cpu() for x, g in zip(xs, groups, strict=True)]
    torch.cuda.synchronize()
    found: list[list[torch.Tensor]] = [[] for _ in range(4)]
    for _ in range(20):
        for k, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                found[k].append(cuda_dots(xs[k], [xs[k]], groups[k], 12))
    torch.cuda.synchronize()
    for one, same in zip(expected, found, strict=True):
        assert all(torch.equal(one, other.cpu()) for other in same)
        assert (one[max(one.nonzero()[:, 0]) + 1 :] == 0).all()


def test_a_loss_from_logits_never_waits_for_the_device():
    function, tensors = cases()["unlearn_loss"]
    function(*tensors)
    torch.cuda.set_sync_debug_mode("error")
    try:
        function(*tensors)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_training_goes_as_on_the_cpu(tmp_path: Path):
    ends = {}
    for device in ("cpu", DEVICE):
        model, (data, collate) = tiny_model(), pairing()
        forget, retain = (gfast.data.batches(side, collator(), 4) for side in datasets())
        args = config(
            tmp_path / device, objective="WGA", retain_term="nll", max_steps=3, optim="sgd", use_cpu=device == "cpu"
        )
        measure = gfast.GEffectCallback(1, forget, retain, WGA())
        trainer = gfast.UnlearnTrainer(model, args, train_dataset=data, data_collator=collate, callbacks=[measure])
        trainer.train()
        assert next(model.parameters()).device.type == device
        ends[device] = parameters(model)
    for name, value in ends["cpu"].items():
        torch.testing.assert_close(ends[DEVICE][name].cpu(), value, rtol=1e-3, atol=1e-5)
