"""The memory of a training step and of a measurement, counted on tensors without data.

A model is built from its configuration on fake tensors, and its decoder runs forward and backward there: what would be
allocated is counted, operation by operation. The head is gfast's: gradients and one chunk of logits. There are no data,
so that attention takes the mask that a batch of texts of several lengths has.
"""

from __future__ import annotations

import contextlib
import copy
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gfast import hf
from gfast.ops import head as op
from gfast.ops.chunks import default_chunk_rows

_FEW = 4  # blocks that stand for a deep model's


@dataclass(frozen=True)
class Work:
    """What is done at a time on one device: rows of texts, tokens each, in a dtype; with activation checkpoints."""

    rows: int
    length: int
    dtype: torch.dtype = torch.bfloat16
    checkpoints: bool = False

    @property
    def tokens(self) -> int:
        return self.rows * self.length


def build_model(config: Any, dtype: torch.dtype) -> nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_config(config, dtype=dtype)


class _Counted(TorchDispatchMode):
    """Bytes of what operations return and is still referenced: now, and at their highest."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.known: weakref.WeakSet[Any] = weakref.WeakSet()
        for x in (*model.parameters(), *model.buffers()):  # what is counted is beside them
            self.known.add(x.untyped_storage())
        self.now = self.highest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in _tensors(out):
            if (storage := x.untyped_storage()) not in self.known:
                self.known.add(storage)
                self.now += storage.nbytes()
                weakref.finalize(storage, self._gone, storage.nbytes()).atexit = False
        self.highest = max(self.highest, self.now)
        return out

    def _gone(self, nbytes: int) -> None:
        self.now -= nbytes


def _tensors(out: Any) -> Iterator[Tensor]:
    """Those with memory: of tangents in several streams each stream's."""
    for x in tree_leaves(out):
        if isinstance(x, Tensor):
            yield from getattr(x, "parts", {0: x}).values()


def step_bytes(
    config: Any,
    work: Work,
    keep_gradients: bool = True,
    device: str = "cuda",
    rank: int = 0,
    training: bool = True,
) -> int:
    """The most that a forward and backward of gfast's losses hold beside weights and optimizer states: activations,
    the head's chunk, gradients (as they come and go, or kept). rank: of LoRA adapters, which alone are trained.
    training: with the model's dropout.

    Memory is highest in the first or in the second half of the backward, and each half's highest is linear in the
    number of blocks.
    """
    return _of_depth(config, lambda some: _halves(some, work, keep_gradients, device, rank, training))


def seeded_bytes(config: Any, work: Work, device: str = "cuda") -> int:
    """What a forward keeps for a backward that forms no gradient of a weight, with the head's part of that backward."""

    def after_forward(some: Any) -> Sequence[int]:
        with _counted_model(some, work.dtype) as (model, counted):
            hidden = _hidden(model, work)
            counted.highest = counted.now
            _head_step(hidden, hf.output_layer(model).weight.detach(), device)
            return [counted.highest]

    return _of_depth(config, after_forward)


def forward_bytes(config: Any, work: Work, device: str = "cuda") -> int:
    """The most that a forward without gradients holds, of which log-probs are taken; in any block it is the same."""
    with torch.no_grad(), _counted_model(_few_blocks(config), work.dtype) as (model, counted):
        hidden = _hidden(model, work)
        of_logits = work.tokens * hf.output_layer(model).weight.shape[0] * hidden.dtype.itemsize
        tile = op._FOLD_BYTES if device == "cpu" else op._GPU_FOLD_BYTES
        return max(counted.highest, counted.now + min(of_logits, tile))


def tangent_bytes(config: Any, work: Work, device: str = "cuda") -> int:
    """The most that a forward holds with tangents along two directions of every parameter, beside the directions.

    It is highest in the last blocks, where every group has tangents: of a deep model a few blocks are measured, as its
    last ones are, and the tangents of all groups before them come in with the embeddings.
    """
    from gfast.geffect.engines.forward_mode import differentiable_forward
    from gfast.geffect.engines.jvp import tangents_along
    from gfast.geffect.groups import assign

    last = config.get_text_config().num_hidden_layers > _FEW
    with _counted_model(_few_blocks(config, 2) if last else config, work.dtype) as (model, counted):
        parameters = dict(model.named_parameters())
        if last:
            units = hf.parameter_units(model)
            deep = len({unit for unit in units.values() if str(unit).startswith("embed")}) + 2  # shallow and middle
            moved = {name: [*range(deep)] if str(unit).startswith("embed") else [deep + (unit == "lm")]
                     for name, unit in units.items()}  # fmt: skip
        else:
            moved = {name: [group] for name, group in assign(model).index.items()}
        along = {}
        for name, groups in moved.items():
            sides = [torch.empty_like(parameters[name]) for _ in range(2)]
            along[parameters[name]] = [
                (2 * group + side, lambda x=x: x) for group in groups for side, x in enumerate(sides)
            ]
        of_directions, counted.highest = counted.now, counted.now
        with differentiable_forward(model), tangents_along(along, model):
            _hidden(model, work)
        return counted.highest - of_directions


@contextlib.contextmanager
def _counted_model(config: Any, dtype: torch.dtype) -> Iterator[tuple[nn.Module, _Counted]]:
    """A model without data in evaluation mode, and what is allocated beside it inside."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        model = build_model(config, dtype).eval()
        with _Counted(model) as counted:
            yield model, counted


def _hidden(model: nn.Module, work: Work) -> Tensor:
    ids = torch.zeros(work.rows, work.length, dtype=torch.int64)
    return hf.decoder(model)(input_ids=ids, use_cache=False).last_hidden_state


def _of_depth(config: Any, measure: Callable[[Any], Sequence[int]]) -> int:
    """The largest of what is measured, each linear in the number of blocks: of a deep model with blocks that are alike
    it is measured with 4 and with 6 of them.
    """
    text = config.get_text_config()
    layers, kinds = text.num_hidden_layers, set(getattr(text, "layer_types", None) or ())
    if layers <= 8 or len(kinds) > 1:
        return max(measure(config))
    few, more = (measure(_with_blocks(config, count)) for count in (4, 6))
    return max(y + (y - x) * (layers - 6) // 2 for x, y in zip(few, more, strict=True))


def _few_blocks(config: Any, few: int = _FEW) -> Any:
    """The configuration with `few` blocks, or with as many as it takes to have one of every kind."""
    text = config.get_text_config()
    kinds = list(getattr(text, "layer_types", None) or ())
    count = next((n for n in range(few, len(kinds)) if set(kinds[:n]) == set(kinds)), text.num_hidden_layers)
    return _with_blocks(config, min(count if kinds else few, text.num_hidden_layers))


def _with_blocks(config: Any, count: int) -> Any:
    config = copy.deepcopy(config)
    text = config.get_text_config()
    text.num_hidden_layers = count
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:count]
    return config


def _adapt(model: nn.Module, rank: int) -> None:
    """LoRA over the matrices of the blocks as PEFT has it: in fp32, and computed in that."""

    def added(module: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> Tensor:
        x = given[0].to(module.lora_a.dtype)
        return (output + (x @ module.lora_a @ module.lora_b) * 2.0).to(output.dtype)

    model.requires_grad_(False)
    for block in hf.structure.blocks(hf.unwrap(model)):
        for module in list(block.modules()):
            weight = getattr(module, "weight", None)
            if weight is not None and weight.dim() == 2:
                wide = torch.promote_types(weight.dtype, torch.float32)
                # GPT-2's Conv1D has its inputs first
                rims = weight.shape[::-1] if isinstance(module, nn.Linear) else weight.shape
                module.lora_a = nn.Parameter(torch.empty(rims[0], rank, dtype=wide))
                module.lora_b = nn.Parameter(torch.empty(rank, rims[1], dtype=wide))
                module.register_forward_hook(added)


def _halves(
    config: Any, work: Work, keep_gradients: bool, device: str, rank: int = 0, training: bool = True
) -> tuple[int, int]:
    """The highest of the forward and the backward of the upper half of the blocks, and of that of the lower half."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        model = build_model(config, work.dtype)
        if work.checkpoints:
            # the older name warns since transformers 5.24
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable({"use_reentrant": False, "preserve_rng_state": False})
        if rank:
            _adapt(model, rank)
        model.train(training)
        head, blocks = hf.output_layer(model).weight, hf.structure.blocks(hf.unwrap(model))
        if not keep_gradients:
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
        ids = torch.zeros(work.rows, work.length, dtype=torch.int64)
        upper: list[int] = []
        with _Counted(model) as counted:

            def half(_: Tensor) -> None:
                upper.append(counted.highest)
                counted.highest = counted.now

            def watch(_: nn.Module, __: Any, output: Any) -> None:
                states = output[0] if isinstance(output, tuple) else output
                if not upper and states.requires_grad:
                    states.register_hook(half)

            watched = blocks[len(blocks) // 2].register_forward_hook(watch)
            hidden = hf.decoder(model)(input_ids=ids, use_cache=False).last_hidden_state
            watched.remove()
            grad, head_grad = _head_step(hidden, head, device)
            if keep_gradients:
                head.grad = head_grad if head.grad is None else head.grad
            if model.get_input_embeddings().weight is not head:
                del head_grad  # else it waits for the embeddings' share, which the backward ends with
            hidden.backward(grad)
    return (upper[0] if upper else 0, counted.highest)


def _head_step(hidden: Tensor, weight: Tensor, device: str) -> tuple[Tensor, Tensor | None]:
    """What the fused loss allocates: dH, dW (in fp32 until it is whole; none of a frozen head), a chunk of logits."""
    tokens, (vocab, size) = hidden.shape[0] * hidden.shape[1], weight.shape
    rows = min(default_chunk_rows(vocab, size, torch.device(device)), tokens)
    wide = torch.promote_types(hidden.dtype, torch.float32)
    of_hidden = torch.empty_like(hidden)
    trained = weight.requires_grad
    total = torch.empty(vocab, size, dtype=wide if rows < tokens else weight.dtype) if trained else None
    logits = torch.empty(rows, vocab, dtype=hidden.dtype)
    del logits
    return of_hidden, total.to(weight.dtype) if trained else None
