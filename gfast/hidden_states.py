"""One hidden state of a model, by its own call, without storing the others."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gfast import hf, sharded, structure, wrappers
from gfast.deferred import deferred
from gfast.embedding_rows import called
from gfast.model_state import evaluating
from gfast.wrappers import unwrap


class _EnoughComputed(Exception):
    """Ends a forward pass whose wanted hidden state has been captured; never leaves this file."""


def layer_hidden(model: nn.Module, batch: Mapping[str, Any], layer: int) -> Tensor:
    """`hidden_states[layer]` of `output_hidden_states=True`, [B, T, D], storing only that one.

    In most models 0 is the embedding output, `layer` < L the input of block `layer`, L the output of the final norm:
    then blocks after the wanted one are not run, where the model's call may be left early. A model whose states are
    others is asked for all of them, which is looked at once, and again once its blocks have other hooks. Raises
    ValueError for a layer outside [0, L].
    """
    model = wrappers.measured(model)  # hooks see nothing of compiled code
    hf.check_causal(model, batch)
    count = hf.num_layers(model)
    if not isinstance(layer, int) or not 0 <= layer <= count:
        raise ValueError(
            f"layer {layer!r} is no hidden state of this model: use 0 (embeddings) to {count} (final norm)"
        )
    known = _states_by_place.setdefault(model, {})
    if layer not in known or known[layer][0] != _hooks(model):
        with torch.no_grad(), evaluating(model):
            same = _same(_state_at(model, batch, layer), _all_states(model, batch)[layer : layer + 1])
        known[layer] = _hooks(model), same  # transformers' own are there from now on
    # Block inputs are kept by gradient checkpointing in any case, and a hook inside a checkpointed block would see a
    # detached tensor with the re-entrant variant. FSDP has to see among the outputs what is differentiated.
    whole = _is_checkpointing(hf.decoder(model)) or (torch.is_grad_enabled() and wrappers.has_fsdp(model))
    if known[layer][1] and not whole:
        return _state_at(model, batch, layer)
    states = _all_states(model, batch)
    if layer >= len(states):
        raise ValueError(f"{type(unwrap(model)).__name__} has {len(states)} hidden states, so none of layer {layer}")
    if layer == count:  # of a norm that Accelerate gathers together with the head, whose output nobody has here
        sharded.gather_before_backward(states[layer], _groups_beside_blocks(model))
    return states[layer]


def _groups_beside_blocks(model: nn.Module) -> list[nn.Module]:
    """What FSDP2 gathers together, but for blocks and embeddings."""
    blocks = {id(module) for block in structure.blocks(unwrap(model)) for module in block.modules()}
    modules = [module for module in model.modules() if sharded.is_fsdp2(module) and id(module) not in blocks]
    return [module for module in modules if not isinstance(module, nn.Embedding)]


# Of each model and layer: is the hidden state what stands at that place between the blocks, with those hooks on them?
_states_by_place: weakref.WeakKeyDictionary[nn.Module, dict[int, tuple[tuple[int, ...], bool]]]
_states_by_place = weakref.WeakKeyDictionary()


def _hooks(model: nn.Module) -> tuple[int, ...]:
    """By which another look is due: blocks, and hooks that may change what is between them (steering) or comes out."""
    places = (hf.decoder(model), *structure.blocks(unwrap(model)))
    return tuple(key for place in places for key in (id(place), *place._forward_pre_hooks, *place._forward_hooks))


def _all_states(model: nn.Module, batch: Mapping[str, Any]) -> tuple[Tensor, ...]:
    with deferred(model, hf.output_layer(model)):
        out = called(model, hf.inputs(model, batch), output_hidden_states=True)
        return getattr(out, "hidden_states", None) or ()


def _same(hidden: Tensor | None, states: tuple[Tensor, ...]) -> bool:
    return (
        hidden is not None
        and len(states) == 1
        and hidden.shape == states[0].shape
        and torch.allclose(hidden, states[0])
    )


def _state_at(model: nn.Module, batch: Mapping[str, Any], layer: int) -> Tensor | None:
    """The input of block `layer`, or the output of the decoder after the last; None where it is not called."""
    captured: list[Tensor] = []
    blocks = structure.blocks(unwrap(model))
    stop = wrappers.stops_safely(model, blocks)

    def before(module: nn.Module, args: tuple, kwargs: dict) -> None:
        captured.append(args[0] if args else kwargs["hidden_states"])
        if stop:
            raise _EnoughComputed

    def after(module: nn.Module, args: tuple, output: Any) -> None:
        captured.append(output[0] if isinstance(output, tuple) else output.last_hidden_state)
        if stop:
            raise _EnoughComputed

    if layer < len(blocks):
        handle = blocks[layer].register_forward_pre_hook(before, prepend=True, with_kwargs=True)
    else:
        handle = hf.decoder(model).register_forward_hook(after)
    try:
        with deferred(model, hf.output_layer(model)):
            called(model, hf.inputs(model, batch))
    except _EnoughComputed:
        pass
    finally:
        handle.remove()
    return captured[0] if captured else None


def _is_checkpointing(module: nn.Module) -> bool:
    if not torch.is_grad_enabled():
        return False
    return any(child.training and getattr(child, "gradient_checkpointing", False) for child in module.modules())
