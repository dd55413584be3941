"""Forward mode through functions that are not PyTorch's own: right where they say how, else refused by name."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from helpers.forward_mode import check, directions_for, parameter, run
from torch import nn

from gfast.geffect.engines.jvp import ForwardModeError, tangents_along


class Twice(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad


def in_place_on_a_view_of_a_parameter(x):
    x.view(3, 2).mul_(2)


REFUSED = {
    "autograd.Function": (Twice.apply, "Twice"),
    "autograd.Function of a derived tensor": (lambda x: Twice.apply(x * 2), "Twice"),
    "numpy": (lambda x: (x * 2).numpy(), "numpy"),
    "raw memory": (lambda x: (x * 2).data_ptr(), "data_ptr"),
    "out=": (lambda x: torch.mul(x, 2, out=torch.empty(2, 3, dtype=x.dtype)), "out="),
    "a view of a parameter": (in_place_on_a_view_of_a_parameter, "parameter"),
    "a parameter": (lambda x: x.mul_(2), "parameter"),
    "an item of a parameter": (lambda x: x.__setitem__(0, 1.0), "parameter"),
    "a parameter, by position": (lambda x: F.relu6(x, True), "parameter"),
    "no derivative in torch": (lambda x: torch.cdist(x, x * 2), "_cdist_forward"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    function, words = REFUSED[name]
    x = parameter(2, 3)
    before = x.detach().clone()
    with pytest.raises(ForwardModeError, match=rf"{words}.*engine='stream'"):
        run(function, [x], directions_for([x], [(0, 1)]))
    assert torch.equal(x, before)


@torch.library.custom_op("gfast_tests::double", mutates_args=())
def double(x: torch.Tensor) -> torch.Tensor:
    return x * 2


double.register_autograd(lambda ctx, grad: grad * 2)


@pytest.mark.parametrize(
    "call", [double, lambda x: double(x * 3), torch.ops.gfast_tests.double, torch.ops.gfast_tests.double.default]
)
def test_custom_operators_are_refused(call):
    x = parameter(2, 3)
    with pytest.raises(ForwardModeError, match="custom operator gfast_tests.double"):
        run(call, [x], directions_for([x], [(0,)]))


def test_fused_operators_of_gfast_are_refused_and_their_definitions_work():
    from gfast.ops.token_logp import token_logp

    x = parameter(2, 3)
    check(lambda x: token_logp(x * 2, torch.tensor([1, 0]), impl="reference"), [x])
    with pytest.raises(ForwardModeError, match=r"token_logp.*engine='stream'"):
        run(lambda x: token_logp(x.float() * 2, torch.tensor([1, 0])), [x], directions_for([x], [(0,)]))


class WithJvp(Twice):
    @staticmethod
    def jvp(ctx, tangent):
        return 2 * tangent


class Holds(nn.Module):
    """Reads its parameter through an autograd.Function alone, with nothing that moves."""

    def __init__(self, weight):
        super().__init__()
        self.weight = weight

    def forward(self):
        return Twice.apply(self.weight.view(-1)) + 1


def test_autograd_functions_that_say_how_to_go_forward():
    x = parameter(2, 3)
    along = directions_for([x], [(0, 1)])
    ((value, tangents),) = run(lambda x: WithJvp.apply(x * 3), [x], along)
    assert torch.equal(value, 6 * x)
    for stream, tangent in tangents.items():
        assert torch.equal(tangent, 6 * along[x][stream])


def test_errors_name_the_module():
    model = nn.Sequential(nn.Identity(), Holds(parameter(2, 3)))
    given = {model[1].weight: [(0, lambda: torch.ones(2, 3, dtype=torch.float64))]}
    with pytest.raises(ForwardModeError, match=r"in '1' \(Holds\): the torch.autograd.Function 'Twice'"):
        with tangents_along(given, model):
            model[1]()


def test_autograd_functions_work_again_afterwards():
    x = parameter(2, 3)
    with pytest.raises(ForwardModeError):
        run(Twice.apply, [x], directions_for([x], [(0,)]))
    Twice.apply(x).sum().backward()
    assert torch.equal(x.grad, torch.full_like(x, 2.0))
