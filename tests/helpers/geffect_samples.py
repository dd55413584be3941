"""Data, models and literal gradients for the engines that measure samples."""

from __future__ import annotations

import pytest
import torch

from gfast.geffect.contributions.head import HeadProduct
from gfast.geffect.engines import gram_products
from gfast.geffect.request import Request
from helpers.geffect_models import batches, gradient, logps, small_tiles, tiny

KINDS = ["llama", "tied_llama", "gpt2", "qwen2", "gemma2", "gpt_neox", "opt", "phi", "mistral"]


def each(name: str) -> str:
    """Every parameter its own group."""
    return name


def data() -> dict:
    return dict(forget=batches(1), retain=batches(2, rows=4, sizes=(1, 3)))


def row(batch: dict, index: int) -> dict:
    return {key: value[index : index + 1] for key, value in batch.items()}


def literal_samples(model, forget) -> list[dict]:
    """grad log p(s) of every sample, one backward each."""
    return [
        gradient(model, logps(model, row(batch, index))[0].sum())
        for batch in forget
        for index in range(len(batch["labels"]))
    ]


def square(grads: dict) -> float:
    return sum(g.double().square().sum().item() for g in grads.values())


def assert_samples(effect, own: list[dict], risks: list[dict], rtol: float = 1e-9) -> None:
    """Every group is one parameter: errors are relative to the product of the norms of its two gradients."""
    assert len(effect.groups) == len(own[0])
    for side, risk in zip(("unlearn", "retain"), risks, strict=True):
        for group, name in zip(effect.groups, own[0], strict=True):
            for found, grads in zip(getattr(effect, side)[group].tolist(), own, strict=True):
                expected = (grads[name] * risk[name]).sum().item()
                scale = (grads[name].norm() * risk[name].norm()).item()
                # a gradient that is zero in theory, such as a key bias's, is rounding in both
                floor = 1e-6 * (square(grads) * square(risk)) ** 0.5
                assert abs(found - expected) <= rtol * max(scale, floor), (side, group)


def lengths(batch: dict) -> list[int]:
    return batch["attention_mask"].sum(1).tolist()


def shift(values: torch.Tensor, length: int) -> torch.Tensor:
    return values.roll(len(values) - length)


def measured(model, used=()) -> Request:
    return Request.of(model, **data(), used=used)


def lora_model(kind: str = "llama"):
    peft = pytest.importorskip("peft")
    targets = ["c_attn", "c_proj"] if kind == "gpt2" else ["q_proj", "down_proj"]
    config = peft.LoraConfig(target_modules=targets, r=2, fan_in_fan_out=kind == "gpt2")
    model = peft.get_peft_model(tiny(kind), config).double().eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def any_gradient(model) -> bool:
    return any(p.grad is not None for p in model.parameters())


WAYS = ["pairs", "gradients", "cheaper", "pairs of tiles", "gradients of tiles"]


def multiplied(way: str, monkeypatch):
    """A fixture's body: how Linears are multiplied, forced one way or the other or by what is cheaper; the head by
    tiles too. Yields the calls."""
    used, kind = [], way.split()[0]
    if kind != "cheaper":
        monkeypatch.setattr(
            gram_products,
            "_gradients_are_cheaper",
            lambda *args: kind == "gradients" or HeadProduct in map(type, (args[0].contribution, args[1].contribution)),
        )
    if "tiles" in way:
        small_tiles(monkeypatch)
    for name in ("_by_pairs", "_by_gradients"):
        original = getattr(gram_products, name)
        monkeypatch.setattr(gram_products, name, lambda *a, f=original, n=name: used.append(n) or f(*a))
    yield used
    if kind != "cheaper":
        assert set(used) <= {"_by_" + kind, "_by_gradients"}  # so is a head whose b is not kept
