"""What a loss asks of PyTorch before and after its kernel: on a GPU every operation is a launch, and that takes longer
than a small kernel runs."""

from __future__ import annotations

import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import gfast
from gfast.objectives import GA, TNPO, WGA
from gfast.ops import checks, dispatch
from gfast.ops.labels import label_factor

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
