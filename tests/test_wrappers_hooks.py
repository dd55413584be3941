"""Forward hooks of one's own on a wrapper see the model's calls, and change what it answers."""

from __future__ import annotations

import pytest
import torch
from helpers.training_tiny import collator, datasets, tiny_model
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

import gfast
from gfast.objectives import NLL, NPO, RMU


@pytest.fixture
def wrapped():
    if not distributed.is_available() or not distributed.is_gloo_available():
        pytest.skip("this torch has no gloo")
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        yield DistributedDataParallel(tiny_model())
    finally:
        distributed.destroy_process_group()


def halved(module, args, kwargs, out):
    out.logits = out.logits / 2
    return out


def batch_of_two():
    return collator()([datasets()[0][index] for index in range(2)])


def test_a_hook_that_changes_logits_counts(wrapped):
    batch = batch_of_two()
    wrapped.register_forward_hook(halved, with_kwargs=True)
    plain = {key: batch[key] for key in ("input_ids", "attention_mask")}
    logits = wrapped(**plain).logits
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
    loss = gfast.model_loss(wrapped, batch, NLL()).loss
    torch.testing.assert_close(loss, expected)
    logp = gfast.model_logp(wrapped, batch)
    torch.testing.assert_close(-logp.sum() / (batch["labels"][:, 1:] != -100).sum(), expected)
    assert gfast.model_loss(wrapped, batch, NPO(), ref_logp=logp.detach()).loss.item() == pytest.approx(
        13.8629, rel=1e-4
    )
    found, right = (torch.autograd.grad(one, wrapped.parameters()) for one in (loss, expected))
    for one, other in zip(found, right, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match="forward hook is on the DistributedDataParallel.*LlamaForCausalLM inside"):
        gfast.g_effect(wrapped, NLL(), forget=[batch], retain=[batch])


def test_hooks_are_called_in_their_order_with_what_the_model_is_given(wrapped):
    batch, seen = batch_of_two(), []
    module = wrapped.module

    def note(name):
        def before(of, args, *more):
            seen.append((name, type(of).__name__, sorted(more[0]) if more else None))

        return before

    wrapped.register_forward_pre_hook(note("wrapper, first"), with_kwargs=True)
    wrapped.register_forward_pre_hook(note("wrapper, second"))
    module.register_forward_pre_hook(note("module"), with_kwargs=True)
    module.register_forward_hook(lambda of, *_: seen.append(("module, after", type(of).__name__, None)))
    wrapped.register_forward_hook(lambda of, args, out: seen.append(("wrapper, after", type(of).__name__, type(out))))
    hooks = [dict(one) for one in (module._forward_hooks, module._forward_pre_hooks, wrapped._forward_hooks)]
    gfast.model_loss(wrapped, batch, NLL())
    assert [one[0] for one in seen] == [
        "wrapper, first",
        "wrapper, second",
        "module",
        "module, after",
        "wrapper, after",
    ]
    assert [one[1] for one in seen] == [type(x).__name__ for x in (wrapped, wrapped, module, module, wrapped)]
    assert "input_ids" in seen[0][2] and "Output" in seen[-1][2].__name__
    assert hooks == [dict(one) for one in (module._forward_hooks, module._forward_pre_hooks, wrapped._forward_hooks)]


def test_hooks_on_a_compiled_model_are_not_passed_by():
    model = torch.compile(tiny_model(), backend="eager")
    model.register_forward_hook(halved, with_kwargs=True)
    with pytest.raises(ValueError, match="forward hook is on the OptimizedModule"):
        gfast.model_loss(model, batch_of_two(), RMU(layer=1, seed=0, c=1.0))
