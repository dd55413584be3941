"""Draws without a generator of their own repeat: see conftest.py."""

import random
import zlib

import numpy
import pytest
import torch


def draws(name: str) -> list[float]:
    number = zlib.crc32(name.encode())
    random_state = random.Random(number), numpy.random.RandomState(number), torch.Generator().manual_seed(number)
    return [random_state[0].random(), random_state[1].rand(), torch.rand((), generator=random_state[2]).item()]


@pytest.fixture(scope="module", params=[0, 1])
def drawn(request):
    return request.param, [random.random(), numpy.random.rand(), torch.rand(()).item()]


@pytest.mark.parametrize("turn", [0, 1])
def test_every_test_and_fixture_has_a_seed_of_its_own(turn, drawn):
    index, values = drawn
    assert values == draws(f"drawn[{index}]")
    found = [random.random(), numpy.random.rand(), torch.rand(()).item()]
    assert found == draws(f"test_seeds.py::test_every_test_and_fixture_has_a_seed_of_its_own[{index}-{turn}]")
