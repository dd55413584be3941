"""Everything gfast knows of what other libraries put around a model: PEFT, DDP, FSDP, ZeRO, torch.compile, Accelerate.

A wrapper must change neither what is computed nor what it is called: the model runs by its own outermost call, names of
parameters are compared without prefixes, and what cannot be done through a wrapper is refused by its name.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.nn.modules import module as torch_module

T = TypeVar("T")

_PREFIX = re.compile(r"^(module\.|base_model\.model\.|_forward_module\.)")
_ANYWHERE = re.compile(
    r"(?<![^.])(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|base_layer|modules_to_save\.[^.]+)\."
)
_COMPILED, _FSDP1, _REPLICAS = "_orig_mod", "_fsdp_wrapped_module", "module"
_WRAPPED = (_COMPILED, _FSDP1, "_checkpoint_wrapped_module", _REPLICAS)
# Whose wrappers are looked through. One of somebody's own, with a `module` inside, may compute something else.
_WRAPPERS_OF = frozenset("torch torch_xla deepspeed accelerate apex fairscale gfast".split())

# PEFT's initialisations that take from the base's weights what they put into the adapter, by the beginning of their
# name: with the adapter off the model is not what it was before.
_REWRITES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
# Options that change the base, whatever the initialisation: KaSA cuts its smallest singular values off.
_REWRITING_OPTIONS = ("loftq_config", "kasa_config", "layer_replication")


def unwrap_name(name: str) -> str:
    """The parameter or module name without what PEFT, DDP, FSDP, checkpointing and torch.compile put into it.

    >>> unwrap_name("module.base_model.model.model.layers.0.self_attn.q_proj.base_layer.weight")
    'model.layers.0.self_attn.q_proj.weight'
    """
    name = _ANYWHERE.sub("", name)
    while match := _PREFIX.match(name):
        name = name[match.end() :]
    return name


def unwrap(model: nn.Module) -> nn.Module:
    """The Hugging Face model inside PEFT, DDP, FSDP and torch.compile wrappers.

    Raises ValueError when there is none.
    """
    inner = model
    while not hasattr(type(inner), "base_model_prefix"):
        key = _wrapped_key(inner)
        if key is not None:
            inner = inner._modules[key]
        elif _is_peft(inner):
            _refuse_prompt_learning(inner)
            inner = inner.get_base_model() if hasattr(inner, "get_base_model") else inner.model
        else:
            raise ValueError(
                f"gfast needs a Hugging Face causal language model (possibly wrapped by PEFT, DDP, FSDP or "
                f"torch.compile), and found no transformers model inside {type(model).__name__}. A module of "
                f"your own needs a method hidden(batch) -> [B, T, D], a module head (model_loss), and groups=callable"
            )
    return inner


def measured(model: nn.Module) -> nn.Module:
    """The model without what only distributes or compiles it (DDP, DataParallel, torch.compile): what one process
    measures. Adapters stay.
    """
    while _wrapped_key(model) in (_COMPILED, _REPLICAS):
        model = model._modules[_wrapped_key(model)]
    return model


def inside(model: nn.Module, function: Callable[[nn.Module], T]) -> T:
    """``function(module)`` within the forward of the wrappers that reduce or gather (DDP, FSDP, DeepSpeed).

    They prepare the backward for what their forward returns. So the loss is computed in there, from as many calls of
    the module as it takes, and is all that they see.
    """
    key = _wrapped_key(model)
    if key not in (_FSDP1, _REPLICAS) or isinstance(model, nn.DataParallel):
        return function(model)
    module = model._modules[key]
    places = [table for table in (model._modules, vars(model)) if table.get(key) is module]  # DeepSpeed: in both
    call = _Call(module, function)
    try:
        for table in places:
            table[key] = call
        return model()
    finally:
        for table in places:
            table[key] = module


class _Call(nn.Module):
    """Stands in a wrapper for the module that it holds."""

    def __init__(self, module: nn.Module, function: Callable[[nn.Module], Any]) -> None:
        super().__init__()
        self.module, self.function = module, function

    def forward(self, *_: Any, **__: Any) -> Any:
        return inside(self.module, self.function)


def accepted_by_wrappers(model: nn.Module) -> frozenset[str]:
    """Inputs that wrappers around the Hugging Face model take for themselves, such as PEFT's adapter_names."""
    found: set[str] = set()
    for module in model.modules():
        found |= set(getattr(module, "special_peft_forward_args", ()))
        if hasattr(type(module), "base_model_prefix"):
            break
    return frozenset(found)


def runs_as_written(model: nn.Module, module: nn.Module) -> bool:
    """Whether a module of the model is called by plain Python, once for the whole batch: nothing around it is compiled
    or replicated over devices.
    """
    for parent in model.modules():
        compiled = (
            type(parent).__name__ == "OptimizedModule" or getattr(parent, "_compiled_call_impl", None) is not None
        )
        replicated = isinstance(parent, nn.DataParallel) and len(parent.device_ids) > 1
        if (compiled or replicated) and any(child is module for child in parent.modules()):
            return False
    return True


def backward_hooks(module: nn.Module) -> bool:
    """Whether hooks on a module, or on all there are, are to see the gradients of its calls in a backward."""
    everywhere = (torch_module._global_backward_hooks, torch_module._global_backward_pre_hooks)
    return any((module._backward_hooks, module._backward_pre_hooks, *everywhere))


def watches_backward(model: nn.Module, head: nn.Module) -> bool:
    """Whether a backward hook belongs to the head or to what is put around it (a copy that PEFT keeps, the model)."""
    return any(backward_hooks(one) and any(part is head for part in one.modules()) for one in model.modules())


def stops_safely(model: nn.Module) -> bool:
    """Whether a forward may be left by an exception: PEFT's hooks and FSDP's state would stay behind."""
    peft = any(_is_peft(module) and hasattr(module, "peft_config") for module in _chain(model))
    return not peft and not has_fsdp(model)


def has_fsdp(model: nn.Module) -> bool:
    """Whether FSDP, either version, shards the model or a part of it. It learns from what a forward returns that a
    backward begins.
    """
    return any("FSDP" in type(m).__name__ or type(m).__name__ == "FullyShardedDataParallel" for m in model.modules())


# Sharded, offloaded, quantised


def is_whole(tensor: Tensor) -> bool:
    """A dense floating-point tensor with its data here: no DTensor, no quantised, offloaded or ZeRO-3 weight."""
    plain = type(tensor) in (nn.Parameter, Tensor) and tensor.is_floating_point() and not tensor.is_meta
    return plain and not hasattr(tensor, "ds_id")


def is_vocab_parallel(model: nn.Module, linear: nn.Module) -> bool:
    """A head sharded over the vocabulary by tensor parallelism, torch's or Hugging Face's: every process sees the same
    hidden states, and hooks only move inputs and outputs between layouts.
    """
    weight, bias = linear.weight, linear.bias
    if type(weight.data).__name__ != "DTensor" or has_fsdp(model):
        return False
    mesh, placements = weight.device_mesh, weight.placements
    alike = bias is None or (type(bias.data).__name__ == "DTensor" and bias.placements == placements)
    around = [*linear._forward_hooks.values(), *linear._forward_pre_hooks.values()]
    around += [vars(linear)["forward"]] if "forward" in vars(linear) else []
    return alike and mesh.ndim == 1 and placements[0].is_shard(0) and all(map(_moves_layouts, around))


def _moves_layouts(function: Any) -> bool:
    """A hook of torch's tensor parallelism, or a forward that Hugging Face's puts around the module's own."""
    places = ("torch.distributed.tensor", "transformers.distributed", "transformers.integrations.tensor_parallel")
    return (getattr(function, "__module__", None) or "").startswith(places)


def only_times_backward(hook: Any) -> bool:
    """A gradient hook by which FSDP learns that the backward has begun; it leaves the gradient as it is."""
    function = hook.func if isinstance(hook, functools.partial) else hook
    return (getattr(function, "__module__", None) or "").startswith("torch.distributed.fsdp")


def refuse_offloaded(model: nn.Module) -> None:
    """ValueError for parameters, frozen ones too, whose values are not here while the model is not running."""
    for path, module in model.named_modules():
        hook = getattr(module, "_hf_hook", None)
        for one in getattr(hook, "hooks", (hook,)):
            if getattr(one, "offload", False):
                name = next((n for n, _ in module.named_parameters()), None)
                if name is not None:
                    _refuse_absent(f"{path}.{name}" if path else name, "offloaded by Accelerate (device_map)")
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            _refuse_absent(name, "on the meta device: its values are not in memory")


def _refuse_absent(name: str, why: str) -> None:
    raise ValueError(
        f"the parameter {name!r} is {why}. A gradient effect needs every parameter on its device, frozen ones too: "
        f"load the model without offloading (a smaller dtype, another device_map), or on a device with more memory"
    )


def autocast_of(accelerator: Any) -> AbstractContextManager[Any]:
    """Accelerate's mixed precision. Its own `accelerator.autocast()` stays in force after an error in older versions,
    and casts of weights that were cached under it with it.
    """
    from accelerate.utils import get_mixed_precision_context_manager

    return get_mixed_precision_context_manager(accelerator.native_amp, accelerator.autocast_handler)


def refuse_packed(model: nn.Module) -> None:
    """ValueError for 4-bit weights that bitsandbytes has packed for inference: no gradient passes them."""
    for path, module in model.named_modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if getattr(state, "packing_format_for_cpu", False):
            raise ValueError(
                f"the 4-bit weight of {path!r} was packed by bitsandbytes for inference, by a forward in eval mode "
                f"without gradients on this CPU: no gradient passes it any more, nor reaches what is below. "
                f"Load the model again, and set support_avx512bf16_for_cpu = False in its Linear4bit modules first"
            )


# PEFT


def is_adapted(model: nn.Module) -> bool:
    """Whether the model has PEFT adapters that can be switched off."""
    return any(hasattr(module, "peft_config") and hasattr(module, "disable_adapter") for module in _chain(model))


def adapter_prefix(model: nn.Module) -> str | None:
    """What the names of the adapters' own parameters contain; None for a model without adapters."""
    peft = _peft_of(model)
    return None if peft is None else getattr(getattr(peft, "base_model", None), "prefix", None)


def own_loss_of_adapters(model: nn.Module) -> str | None:
    """The term that a PEFT method adds to the loss the model computes from labels, in words; None for most methods."""
    peft = _peft_of(model)
    kinds = {} if peft is None else {str(getattr(c, "peft_type", "")) for c in peft.peft_config.values()}
    return "AdaLoRA's orthogonal regularisation" if any("ADALORA" in kind for kind in kinds) else None


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """The model with its PEFT adapters off, and nothing else changed; as it is if it has none."""
    peft = _peft_of(model)
    if peft is None:
        yield
        return
    # PEFT sets requires_grad of all adapters on the way back, and switches on those that were off before
    flags = [(parameter, parameter.requires_grad) for parameter in peft.parameters()]
    off = [one for one in peft.modules() if _is_peft(one) and getattr(one, "disable_adapters", None) is True]
    try:
        with peft.disable_adapter():
            yield
    finally:
        for one in off:
            one.enable_adapters(False)
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


@contextmanager
def other_adapter(model: nn.Module, name: str) -> Iterator[None]:
    """The model with another of its adapters active, and nothing else changed."""
    peft = _peft_of(model)
    flags = [(parameter, parameter.requires_grad) for parameter in peft.parameters()]
    active = list(peft.active_adapters)
    try:
        peft.base_model.set_adapter(name)
        yield
    finally:
        peft.base_model.set_adapter(active if len(active) > 1 else active[0])
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def check_frozen_adapter(model: nn.Module, name: str) -> None:
    """ValueError unless the model with the adapter of that name stays as it is, whatever is trained."""
    peft = _peft_of(model)
    known = sorted(getattr(peft, "peft_config", None) or {})
    if name not in known:
        raise ValueError(
            f"gfast: reference='adapter:{name}': the model has no adapter of that name, its adapters are {known}"
        )
    if name in peft.active_adapters:
        raise ValueError(
            f"gfast: reference='adapter:{name}': that is the active adapter, which is trained; the reference must be "
            f"another one, such as a frozen copy of it"
        )
    vanishing = {id(parameter) for parameter in _vanishing(peft)}
    for path, parameter in peft.named_parameters():
        if parameter.requires_grad and (name in path.split(".") or id(parameter) not in vanishing):
            raise ValueError(
                f"gfast: reference='adapter:{name}': the parameter {path!r}, a part of the reference, is trained, so "
                f"that it is not the original any more; freeze it with requires_grad_(False)"
            )


def refuse_inner_adapters(model: nn.Module) -> None:
    """ValueError for adapters that transformers put into a model, with no PeftModel to switch them off."""
    if not is_adapted(model) and any(getattr(module, "_hf_peft_config_loaded", False) for module in _chain(model)):
        raise ValueError(
            "gfast: the adapters of this model are transformers' own (add_adapter, load_adapter or from_pretrained of "
            "an adapter), which gfast does not switch off, so that its base is not at hand: load the base, and the "
            "adapters by peft.PeftModel.from_pretrained(base, ...); or take the model as it is, reference='adapted'"
        )


def check_base_is_original(model: nn.Module) -> None:
    """ValueError unless the model with its adapters off is, whatever has been trained, the base as it was loaded.

    Every trainable parameter must vanish with the adapters, and their initialisation must have left the base alone.
    """
    peft = _peft_of(model)
    if peft is None:
        return
    _refuse_prompt_learning(peft)
    advice = (
        "compute the original's values once, before training (ReferenceCache.build(..., reference='adapted')), and "
        "give them with the batches"
    )
    for name, config in peft.peft_config.items():
        if (how := _rewrite_of_base(config)) is not None:
            raise ValueError(
                f"the adapter {name!r} was initialised by {how!r}, which rewrote the base: the model with adapters off "
                f"is not the original. {advice[0].upper()}{advice[1:]}, or use init_lora_weights=True without {how}"
            )
    vanishing = {id(parameter) for parameter in _vanishing(peft)}
    left = [name for name, p in peft.named_parameters() if p.requires_grad and id(p) not in vanishing]
    if left:
        more = f" and {len(left) - 1} more" if len(left) > 1 else ""
        raise ValueError(
            f"with adapters off the trainable parameter {left[0]!r}{more} of the base stays, so that the model is not "
            f"the original any more once it is trained. Freeze it (bias='none', no trained norms or embeddings beside "
            f"the adapters), or {advice}"
        )


def _rewrite_of_base(config: Any) -> str | None:
    """The option of an adapter that has changed weights or layers of the base; None where it is as it was loaded."""
    start = getattr(config, "init_lora_weights", None)
    if isinstance(start, str) and start.lower().startswith(_REWRITES_BASE):
        return start
    return next((key for key in _REWRITING_OPTIONS if getattr(config, key, None)), None)


def _vanishing(peft: nn.Module) -> Iterator[nn.Parameter]:
    """Parameters that nothing reads while the adapters are off."""
    for module in peft.modules():
        # a copy in the place of a module of the base, or an adapter around one
        of_base = getattr(module, "original_module", None)
        of_base = getattr(module, "base_layer", None) if of_base is None else of_base
        if _is_peft(module) and isinstance(of_base, nn.Module):
            kept = {id(parameter) for parameter in of_base.parameters()}
            yield from (parameter for parameter in module.parameters() if id(parameter) not in kept)


def active_module(module: nn.Module | None) -> nn.Module | None:
    """The module that is called where PEFT has put a trained copy in the place of one (``modules_to_save``)."""
    copies = getattr(module, "modules_to_save", None)
    if not isinstance(copies, nn.ModuleDict):
        return module
    active = [name for name in getattr(module, "active_adapters", ()) if name in copies]
    off = getattr(module, "disable_adapters", False) or not active
    return module.original_module if off else copies[active[0]]


def _chain(model: nn.Module) -> Iterator[nn.Module]:
    """The model, and what it wraps down to the Hugging Face model."""
    while True:
        yield model
        key = _wrapped_key(model)
        if key is not None:
            model = model._modules[key]
        elif _is_peft(model) and isinstance(getattr(model, "base_model", None), nn.Module) and not _is_hf(model):
            model = model.base_model
        else:
            return


def _peft_of(model: nn.Module) -> nn.Module | None:
    return next((m for m in _chain(model) if hasattr(m, "peft_config") and hasattr(m, "disable_adapter")), None)


def _wrapped_key(module: nn.Module) -> str | None:
    own = type(module).__mro__[: type(module).__mro__.index(nn.Module)]
    if _is_hf(module) or not any(cls.__module__.split(".")[0] in _WRAPPERS_OF for cls in own):
        return None
    return next((key for key in _WRAPPED if key in module._modules), None)


def _is_hf(module: nn.Module) -> bool:
    return hasattr(type(module), "base_model_prefix")


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
