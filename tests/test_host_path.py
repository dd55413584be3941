"""What a loss asks of PyTorch before and after its kernel: on a GPU every operation is a launch, and that takes longer
than a small kernel runs."""

from __future__ import annotations

import functools
import itertools
import sys
from collections.abc import Callable

import pytest
import torch
from helpers.losses import ALL, problem
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import gfast
from gfast.objectives import BST, ETW, GA, MASC, PDU, TNPO, TPO, WGA
from gfast.ops import checks, dispatch
from gfast.ops.labels import label_factor
from gfast.ops.weights import is_pair

VIEWS = ("detach", "view", "_unsafe_view", "reshape", "expand", "t", "empty")  # launch nothing
KERNELS = ("weighted_rows", "label_factor")


class Launches(TorchDispatchMode):
    """Names of the operations that a GPU would launch, kernels of gfast's own among them."""

    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name not in VIEWS:
            self.names.append(name)
        return func(*args, **(kwargs or {}))


def stub(launches: Launches, name: str):
    """A kernel that Triton would launch, which allocates as its launcher does."""

    def label_factor(labels, vocab):
        launches.names.append(name)
        return torch.empty(()), torch.empty((), dtype=torch.bool)

    def weighted_rows(logits, *_):
        launches.names.append(name)
        return torch.empty(logits.shape[0]), torch.empty(logits.shape[0])

    return {"label_factor": label_factor, "weighted_rows": weighted_rows}[name]


@pytest.fixture(params=["cpp", "triton"])
def launches(request, monkeypatch) -> tuple[str, Launches]:
    """The backend, Triton's with its kernels stubbed and a device whose values the host may not read."""
    if reason := dispatch.why_not("unlearn_loss", request.param, "cpu"):
        pytest.skip(reason)
    seen = Launches()
    if request.param == "triton":
        from gfast.kernels import labels, rows

        monkeypatch.setattr(labels, "label_factor", stub(seen, "label_factor"))
        monkeypatch.setattr(rows, "weighted_rows", stub(seen, "weighted_rows"))
        monkeypatch.setattr(checks, "reads_are_free", lambda device: False)
        monkeypatch.setattr(torch, "_assert_async", lambda good, message: seen.names.append("assert"))
    return request.param, seen


@pytest.mark.parametrize("wanted", [True, False])
@pytest.mark.parametrize("objective", [GA(), WGA(), TNPO()], ids=str)
def test_a_loss_launches_six_operations(launches, objective, wanted):
    """Labels looked at once (on a GPU an assertion too), the kernel, and the sum of weight times logp over N."""
    impl, seen = launches
    logits = torch.randn(2, 5, 7, requires_grad=wanted)
    labels, ref = torch.randint(0, 7, (2, 5)), -torch.rand(2, 5)
    with seen:
        gfast.unlearn_loss(logits, labels, objective, ref_logp=ref, impl=impl)
    checked = ["label_factor"] + ["assert"] * (impl == "triton")
    assert seen.names == [*checked, "weighted_rows", "mul", "sum", "mul"]


class NoLook(TorchFunctionMode):
    """Refuses what waits for a GPU: values read back from it, shapes that depend on them, and copies of the host's."""

    WAITS = {"item", "tolist", "__bool__", "__float__", "__int__", "__index__", "cpu", "numpy", "nonzero", "argwhere"}
    WAITS |= {"masked_select", "unique", "unique_consecutive", "_unique2", "bincount", "equal", "allclose"}
    WAITS |= {"tensor", "as_tensor", "new_tensor", "from_numpy"}

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", str(func))
        assert name not in self.WAITS, f"{name} waits for the device, and no CUDA graph can record it"
        if name == "__getitem__":
            parts = args[1] if isinstance(args[1], tuple) else (args[1],)
            masks = [x for x in parts if isinstance(x, list) or (isinstance(x, torch.Tensor) and x.dtype == torch.bool)]
            assert not masks, "an index of True and False, or a list, waits for the device"
        return func(*args, **(kwargs or {}))


def every_op() -> dict[str, Callable[[str], object]]:
    """Name -> a call of every op with all that it may be given, and its backward."""
    hidden, weight, bias, labels, ref = problem(dtype=torch.float32)
    ref, given = ref.float(), torch.rand_like(ref).float()
    ids, target = torch.arange(4)[:, None].expand(4, 7).contiguous(), torch.randn(4, 7, 37)
    calls: dict[str, Callable[[str], object]] = {}

    def add(name: str, op, *tensors: torch.Tensor, **options) -> None:
        def call(impl: str) -> None:
            leaves = [x.detach().clone().requires_grad_() for x in tensors]
            out = op(*leaves, impl=impl, **options)
            out = getattr(out, "entropy", getattr(out, "loss", out))
            out.backward(torch.ones_like(out))

        calls[name] = call

    logits = torch.randn(4, 7, 37)
    objectives = [*ALL, ETW(), PDU(), MASC(rho=0.5, eta=10.0), TPO(), BST()]
    for objective, reduction in itertools.product(objectives, [None, "sequence_mean", "none"]):
        common = dict(labels=labels, objective=objective, reduction=reduction, ref_logp=ref)
        for more in ({}, dict(weight=given), dict(sequence_id=ids)):
            if "sequence_id" in more and is_pair(objective):
                continue
            name = f"{objective} {reduction} {' '.join(more)}"
            add(f"unlearn_loss {name}", gfast.unlearn_loss, logits, **common, **more)
            more |= dict(chunk_rows=9)
            add(f"linear_unlearn_loss {name}", gfast.linear_unlearn_loss, hidden, weight, **common, **more)
    scored = dict(labels=labels)
    add("unlearn_loss normalizer", gfast.unlearn_loss, logits, objective=GA(), normalizer=3.0, **scored)
    add("token_logp", gfast.token_logp, logits, **scored)
    add("token_kl", gfast.token_kl, logits, ref_logits=target, **scored)
    add("token_stats", gfast.token_stats, logits, **scored)
    head = dict(bias=bias, softcap=30.0, **scored)
    add("linear_token_logp", gfast.linear_token_logp, hidden, weight, **head)
    add("linear_token_stats", gfast.linear_token_stats, hidden, weight, **head)
    both = dict(ref_hidden=hidden, ref_weight=weight, chunk_rows=9, **scored)
    add("linear_token_kl", gfast.linear_token_kl, hidden, weight, **both)
    for kind in ("kl", "cross_entropy", "js"):
        soft = dict(beta=2.0, kind=kind, **scored)
        add(f"soft_target_loss {kind}", gfast.soft_target_loss, logits, target=target, **soft)
        add(f"soft_target_loss {kind}, own", gfast.soft_target_loss, logits, target=None, **soft)
        both = dict(ref_hidden=hidden, ref_weight=weight, chunk_rows=9, **soft)
        add(f"linear_soft_target_loss {kind}", gfast.linear_soft_target_loss, hidden, weight, **both)

    def over_its_logits(z: torch.Tensor, **options):
        return gfast.unlearn_loss(z * 1, inplace=True, **options)

    add("unlearn_loss in place", over_its_logits, logits, objective=WGA(), **scored)
    return calls


@pytest.mark.parametrize("impl", ["cpp", "triton"])
def test_no_op_waits_for_the_device_where_a_graph_records(impl, monkeypatch):
    """What a CUDA graph cannot record, looked for where there is no GPU: kernels of Triton's are stubbed."""
    if reason := dispatch.why_not("unlearn_loss", impl, "cpu"):
        pytest.skip(reason)
    monkeypatch.setattr(checks, "reads_are_free", lambda device: False)
    monkeypatch.setattr(checks, "may_wait", lambda device: False)
    monkeypatch.setattr(torch, "_assert_async", lambda good, message: None)
    if impl == "triton":
        from triton.runtime.interpreter import InterpretedFunction

        monkeypatch.setattr(InterpretedFunction, "__getitem__", lambda self, grid: lambda *args, **options: None)
    for op, call in every_op().items():
        call = functools.partial(call, impl)
        with NoLook():
            try:
                call()
            except AssertionError as problem:
                raise AssertionError(f"{op}: {problem}") from problem


def test_python_does_not_grow_with_the_rows():
    if reason := dispatch.why_not("unlearn_loss", "cpp", "cpu"):
        pytest.skip(reason)

    def calls(rows: int) -> int:
        logits, labels, seen = torch.randn(rows, 7, requires_grad=True), torch.randint(0, 7, (rows,)), []
        gfast.unlearn_loss(logits, labels, WGA())  # what is decided once is decided
        sys.setprofile(lambda frame, event, arg: seen.append(event) if event in ("call", "c_call") else None)
        try:
            gfast.unlearn_loss(logits, labels, WGA())
        finally:
            sys.setprofile(None)
        return len(seen)

    assert calls(3) == calls(3000)


@pytest.mark.parametrize("impl", ["reference", "cpp", "triton"])
def test_one_over_the_labels_that_count(impl):
    if reason := dispatch.why_not("unlearn_loss", impl, "cpu"):
        pytest.skip(reason)
    generator = torch.Generator().manual_seed(0)
    for count in (0, 1, 7, 4096, 5001):
        labels = torch.randint(0, 9, (count,), generator=generator)
        labels[torch.rand(count, generator=generator) < 0.3] = -100
        for some in (labels, torch.full_like(labels, -100), labels.repeat_interleave(2)[::2]):
            found = label_factor("op", some, 9, torch.float32, impl)
            one = torch.ones((), dtype=torch.float32)
            assert found.dtype == torch.float32 and found.shape == ()
            assert torch.equal(found, one / (some != -100).sum().clamp(min=1))
        for bad in (9, -1, -99, -101, 2**62, -(2**63)):
            for where in {0, count // 2, count - 1} if count else ():
                wrong = labels.clone()
                wrong[where] = bad
                with pytest.raises(ValueError, match=rf"op: labels\[{where}\] \(flattened\) = {bad} is outside"):
                    label_factor("op", wrong, 9, torch.float32, impl)
