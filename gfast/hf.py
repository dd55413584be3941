"""Everything gfast knows about Hugging Face model internals: where the decoder, its blocks and its output head are.

No other file names a model class or a model attribute, and `structure` finds the parts by place and use. Supported
families (transformers 4.51 to 5.x): Llama, Mistral, Mixtral, Qwen2/3 (and MoE), Phi, Phi-3, Gemma 1/2/3 (text), Cohere
1/2, Granite, GPT-2, GPT-Neo, GPT-J, GPT-NeoX, OPT, Bloom, Falcon, StableLM, StarCoder2, OLMo 1/2, SmolLM3. Other
decoders work as far as their parts can be found: a head that is not listed here is never guessed at (`head` returns
None and callers take the model's own logits), and a parameter that cannot be placed is an error that names it. Models
may be wrapped by PEFT, DDP, FSDP or torch.compile.
"""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gfast import structure

_log = logging.getLogger("gfast")

# Families whose logits are output_embeddings(hidden), then optionally scaled, then optionally soft-capped. A family
# that is not in these tables may do something else between hidden states and logits, so it is not taken as plain.
_PLAIN_HEADS = frozenset(
    "llama mistral mixtral qwen2 qwen2_moe qwen3 qwen3_moe phi phi3 phimoe gemma gpt2 gpt_neo gptj gpt_neox "
    "gpt_bigcode opt bloom falcon stablelm starcoder2 olmo olmo2 smollm3".split()
)
_SCALED_HEADS = {
    "cohere": lambda config: config.logit_scale,
    "cohere2": lambda config: config.logit_scale,
    "granite": lambda config: 1.0 / config.logits_scaling,
    "granitemoe": lambda config: 1.0 / config.logits_scaling,
}
_SOFTCAPPED_HEADS = frozenset({"gemma2", "gemma3_text"})

_OFFSET_EMBEDDINGS = frozenset({"OPTLearnedPositionalEmbedding"})
_SCALED_EMBEDDING = "ScaledWordEmbedding"

_WRAPPER_PREFIX = re.compile(r"^(module\.|base_model\.model\.|_forward_module\.)")
_WRAPPER_ANYWHERE = re.compile(
    r"(?<![^.])(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|base_layer|modules_to_save\.[^.]+)\."
)
_WRAPPED_MODULE = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "module")


@dataclass(frozen=True)
class Head:
    """A linear output head: logits = softcap * tanh(z / softcap) with z = logit_scale * (hidden @ weight.T + bias).

    `weight` [V, D], `bias` [V] or None; `softcap` None means no soft cap.
    """

    weight: Tensor
    bias: Tensor | None = None
    logit_scale: float = 1.0
    softcap: float | None = None


class _EnoughComputed(Exception):
    """Ends a forward pass whose wanted hidden state has been captured; never leaves this file."""


def unwrap_name(name: str) -> str:
    """The parameter or module name without what PEFT, DDP, FSDP, checkpointing and torch.compile put into it.

    >>> unwrap_name("module.base_model.model.model.layers.0.self_attn.q_proj.base_layer.weight")
    'model.layers.0.self_attn.q_proj.weight'
    """
    name = _WRAPPER_ANYWHERE.sub("", name)
    while match := _WRAPPER_PREFIX.match(name):
        name = name[match.end() :]
    return name


def unwrap(model: nn.Module) -> nn.Module:
    """The Hugging Face model inside PEFT, DDP, FSDP and torch.compile wrappers.

    Raises ValueError when there is none.
    """
    inner = model
    while not hasattr(type(inner), "base_model_prefix"):
        children = inner._modules
        wrapped = next((key for key in _WRAPPED_MODULE if key in children), None)
        if wrapped is not None:
            inner = children[wrapped]
        elif _is_peft(inner):
            _refuse_prompt_learning(inner)
            inner = inner.get_base_model() if hasattr(inner, "get_base_model") else inner.model
        else:
            raise ValueError(
                f"gfast needs a Hugging Face causal language model (possibly wrapped by PEFT, DDP, FSDP or "
                f"torch.compile), and found no transformers model inside {type(model).__name__}"
            )
    return inner


def decoder(model: nn.Module) -> nn.Module:
    """The text decoder without the output head, also through wrappers; its output has `last_hidden_state`."""
    return structure.decoder(unwrap(model))


def num_layers(model: nn.Module) -> int:
    """The number L of decoder blocks. Raises ValueError where they cannot be told."""
    return len(structure.blocks(unwrap(model)))


def head(model: nn.Module, sharded: bool = False) -> Head | None:
    """The output head if it is a plain linear map of the final hidden states (with scale and soft cap), else None.

    None means: use the model's own logits. That is the answer for families this file does not list, for heads replaced
    by an adapter, a quantised layer or a parametrisation, for heads with forward hooks, and for sharded or offloaded
    weights. With ``sharded`` a vocabulary-parallel head (a DTensor sharded on dim 0 by tensor parallelism) is returned
    too: by torch's `parallelize_module`, or by Hugging Face's `tp_plan` where its version keeps the head as a DTensor
    (tried with 5.23; versions that keep a bare local slice and gather in hooks give None). FSDP shards, whose processes
    see different data, never are.
    """
    inner = unwrap(model)
    config = getattr(inner, "config", None)
    family = getattr(config, "model_type", None)
    if family not in _PLAIN_HEADS and family not in _SCALED_HEADS and family not in _SOFTCAPPED_HEADS:
        return None
    linear = inner.get_output_embeddings()
    if type(linear) is not nn.Linear:
        return None
    weight, bias = linear.weight, linear.bias
    parallel = sharded and _is_vocab_parallel(inner, weight, bias)
    hooks = [*linear._forward_hooks.values(), *linear._forward_pre_hooks.values()]
    if any(not (parallel and _is_tensor_parallel_hook(hook)) for hook in hooks):
        return None
    if not parallel and (not _is_plain(weight) or (bias is not None and not _is_plain(bias))):
        return None
    scale = float(_SCALED_HEADS[family](config)) if family in _SCALED_HEADS else 1.0
    softcap = config.final_logit_softcapping if family in _SOFTCAPPED_HEADS else None
    return Head(weight, bias, scale, float(softcap) if softcap else None)


def final_hidden(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """The hidden states the output head reads (after the final norm), [B, T, D]; no logits are computed.

    Only `input_ids`, `attention_mask` and `position_ids` of the batch reach the model.
    """
    return decoder(model)(**_inputs(batch)).last_hidden_state


def depends_on_width(model: nn.Module) -> bool:
    """Whether padding on the right changes what the model computes left of it: rotary embeddings that stretch with the
    longest position of a batch.
    """
    config = getattr(unwrap(model), "config", None)
    found = [config.to_dict()] if hasattr(config, "to_dict") else []
    while found:  # by any name, in the configuration of any part, maybe by kind of layer
        one = found.pop()
        if {one.get("rope_type"), one.get("type")} & {"dynamic", "longrope", "su"}:
            return True
        found += [value for value in one.values() if isinstance(value, Mapping)]
    return False


@contextmanager
def differentiable_forward(model: nn.Module) -> Iterator[None]:
    """Attention and mixtures of experts as plain PyTorch operations inside, as they were outside.

    Attention by SDPA or written out (eager) stays; other kernels (flash, flex) become SDPA, or eager attention where
    the model has no SDPA; experts run one by one. What was switched is logged once.
    """
    inner = unwrap(model)
    attention = "sdpa" if getattr(inner, "_supports_sdpa", False) else "eager"
    switches = (
        ("_attn_implementation", ("sdpa", "eager"), attention),
        ("_experts_implementation", ("eager",), "eager"),
    )
    configs = {id(found): found for m in inner.modules() if (found := getattr(m, "config", None)) is not None}
    changed: list[tuple[Any, str, Any]] = []
    try:
        for config in configs.values():
            for key, fine, instead in switches:
                # the attribute behind the property, whose setter would reach into other configurations
                name = f"{key}_internal" if hasattr(config, f"{key}_internal") else key
                found = getattr(config, name, None)
                if found is not None and found not in fine:
                    changed.append((config, name, found))
                    setattr(config, name, instead)
                    _log_switch(type(inner).__name__, key.strip("_"), str(found), instead)
        yield
    finally:
        for config, name, found in reversed(changed):
            setattr(config, name, found)


@functools.cache
def _log_switch(model: str, what: str, found: str, instead: str) -> None:
    _log.warning("%s: %s %r has no forward mode; %r is used for this measurement", model, what, found, instead)


def layer_hidden(model: nn.Module, batch: Mapping[str, Any], layer: int) -> Tensor:
    """`hidden_states[layer]` of `output_hidden_states=True`, [B, T, D], storing only that one.

    0 is the embedding output, `layer` < L the input of block `layer`, L the output of the final norm. Blocks after the
    wanted one are not run. Raises ValueError for a layer outside [0, L].
    """
    blocks = structure.blocks(unwrap(model))
    if not isinstance(layer, int) or not 0 <= layer <= len(blocks):
        raise ValueError(
            f"layer {layer!r} is no hidden state of this model: use 0 (embeddings) to {len(blocks)} (final norm)"
        )
    if layer == len(blocks):
        return final_hidden(model, batch)
    body = decoder(model)
    if _is_checkpointing(body):
        # Block inputs are kept by gradient checkpointing in any case, and a hook inside a checkpointed block
        # would see a detached tensor with the re-entrant variant.
        return body(**_inputs(batch), output_hidden_states=True).hidden_states[layer]

    captured: list[Tensor] = []
    # FSDP keeps state between a module's pre- and post-forward hooks: there the pass has to run to its end.
    stop = not any("FSDP" in type(module).__name__ for module in unwrap(model).modules())

    def capture(module: nn.Module, args: tuple, kwargs: dict) -> None:
        captured.append(args[0] if args else kwargs["hidden_states"])
        if stop:
            raise _EnoughComputed

    handle = blocks[layer].register_forward_pre_hook(capture, prepend=True, with_kwargs=True)
    try:
        body(**_inputs(batch))
    except _EnoughComputed:
        pass
    finally:
        handle.remove()
    return captured[0]


def parameter_units(model: nn.Module) -> dict[str, str | int]:
    """Every trainable parameter, by its name in `model.named_parameters()`, with the part of the model that owns it.

    The part is "embed" (all that is used before the first block: token and position embeddings, their norms, vision
    towers and what projects their output), the 0-based index of a block, L for what is used after the last block (the
    final norm), "lm" for the output head, or "embed+lm" for a matrix shared by embeddings and head. Adapter parameters
    belong to the module they adapt. Raises ValueError naming the first parameter that has no such place or several.
    """
    inner = unwrap(model)
    owners = structure.owners(inner)
    units: dict[str, str | int] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        places = owners.get(id(parameter), [])
        if len(places) == 1:
            units[name] = places[0]
        elif set(places) == {"embed", "lm"}:
            units[name] = "embed+lm"
        else:
            why = (
                f"is shared by several parts ({', '.join(map(str, places))})"
                if places
                else "is in no part: no forward on the way to the blocks reads it plainly before them or after them"
            )
            raise ValueError(
                f"cannot attribute trainable parameter {name!r} {tuple(parameter.shape)} of {type(inner).__name__}: "
                f"it {why} (embeddings, one of the {num_layers(model)} blocks, the final norm, the output head). "
                f"Freeze it with requires_grad_(False), or group parameters by name with groups=callable"
            )
    return units


def module_kind(module: nn.Module) -> str | None:
    """What a module that owns parameters computes, where it is known for certain; None for anything else.

    "linear": x W^T + bias. "conv1d": x W + bias (GPT-2). "embedding": rows of W, possibly scaled (`embedding_lookup`).
    "norm": a class that is called a norm and owns at most `weight` and `bias`; whether its output is linear in them is
    for the caller to try. Subclasses are listed by name: one that overrides forward may compute something else.
    """
    name = type(module).__name__
    if type(module) is nn.Linear or name == "FalconLinear":
        return "linear"
    if name == "Conv1D" and hasattr(module, "nf"):
        return "conv1d"
    if isinstance(module, nn.Embedding):
        known = type(module) is nn.Embedding or name in _OFFSET_EMBEDDINGS or name.endswith(_SCALED_EMBEDDING)
        return "embedding" if known else None
    if "Norm" in name and set(module._parameters) <= {"weight", "bias"} and not any(True for _ in module.children()):
        return "norm"
    return None


def embedding_lookup(module: nn.Embedding, args: tuple, kwargs: Mapping[str, Any]) -> tuple[Tensor, Tensor | float]:
    """The row ids that a call of an "embedding" module looked up, and the factor on what it returned."""
    if type(module).__name__ in _OFFSET_EMBEDDINGS:
        names = ("attention_mask", "past_key_values_length", "position_ids")
        given = dict(zip(names, args, strict=False)) | dict(kwargs)
        positions = given.get("position_ids")
        if positions is None:
            mask = given["attention_mask"]
            positions = (torch.cumsum(mask, dim=1) * mask - 1).long()[:, given.get("past_key_values_length", 0) :]
        return positions + module.offset, 1.0
    ids = args[0] if args else next(iter(kwargs.values()))
    scale = module.embed_scale if type(module).__name__.endswith(_SCALED_EMBEDDING) else 1.0
    return ids, scale.to(module.weight.dtype) if isinstance(scale, Tensor) else scale


def is_routed(name: str) -> bool:
    """Is a module of this name one of a mixture's experts, which see tokens in an order of their own?"""
    return any(part in ("expert", "experts") for part in name.split("."))


def _inputs(batch: Mapping[str, Any]) -> dict[str, Any]:
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask", "position_ids") if batch.get(key) is not None}
    if "input_ids" not in inputs:
        raise ValueError(f"the batch has no 'input_ids' (its keys are {sorted(batch)})")
    return inputs | {"use_cache": False, "return_dict": True}


def _is_plain(tensor: Tensor) -> bool:
    """A dense floating-point tensor with its data here: no DTensor, no quantised or offloaded weight."""
    return type(tensor) in (nn.Parameter, Tensor) and tensor.is_floating_point() and not tensor.is_meta


def _is_vocab_parallel(model: nn.Module, weight: Tensor, bias: Tensor | None) -> bool:
    """A head sharded over the vocabulary by tensor parallelism: every process sees the same hidden states."""
    if type(weight.data).__name__ != "DTensor" or any("FSDP" in type(module).__name__ for module in model.modules()):
        return False
    mesh, placements = weight.device_mesh, weight.placements
    alike = bias is None or (type(bias.data).__name__ == "DTensor" and bias.placements == placements)
    return alike and mesh.ndim == 1 and placements[0].is_shard(0)


def _is_tensor_parallel_hook(hook: Any) -> bool:
    """torch's tensor parallelism only moves inputs and outputs between layouts in its hooks."""
    return (getattr(hook, "__module__", None) or "").startswith("torch.distributed.tensor")


def _is_checkpointing(module: nn.Module) -> bool:
    if not torch.is_grad_enabled():
        return False
    return any(child.training and getattr(child, "gradient_checkpointing", False) for child in module.modules())


def _is_peft(module: nn.Module) -> bool:
    return any(cls.__module__.split(".")[0] == "peft" for cls in type(module).__mro__)


def _refuse_prompt_learning(model: nn.Module) -> None:
    configs = getattr(model, "peft_config", None)
    for name, config in configs.items() if isinstance(configs, Mapping) else ():
        if getattr(config, "is_prompt_learning", False):
            raise ValueError(
                f"the PEFT adapter {name!r} is a prompt-learning method ({type(config).__name__}), whose virtual "
                f"tokens are no part of the decoder; gfast supports adapters inside the layers (LoRA and its relatives)"
            )
