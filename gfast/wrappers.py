"""Everything gfast knows of what other libraries put around a model: DDP, FSDP, ZeRO, torch.compile, Accelerate, PEFT
(whose adapters are in `gfast.peft_models`).

A wrapper must change neither what is computed nor what it is called: the model runs by its own outermost call, names of
parameters are compared without prefixes, and what cannot be done through a wrapper is refused by its name.
"""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, TypeVar

import torch
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
        elif is_peft(inner):
            refuse_prompt_learning(inner)
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


def unreplicated(model: nn.Module) -> nn.Module:
    """The model without DDP around it, which sends buffers at every call and waits for processes that may have fewer to
    make, or none; but not past hooks of somebody's own.
    """
    while type(model) is nn.parallel.DistributedDataParallel:
        if any(map(_foreign, (*model._forward_pre_hooks.values(), *model._forward_hooks.values()))):
            break
        model = model.module
    return model


def uncompiled(model: nn.Module) -> nn.Module:
    """The model without torch.compile around it. Accelerate compiles what DDP has wrapped."""
    while _wrapped_key(model) == _COMPILED:
        model = model._modules[_COMPILED]
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
        with _hooks_within(model, module):
            return model()
    finally:
        for table in places:
            table[key] = module


@contextmanager
def _hooks_within(wrapper: nn.Module, module: nn.Module) -> Iterator[None]:
    """Forward hooks that somebody has put on a wrapper see what its module is given and answers, and may change it, as
    in any other call of the wrapper; they would see the loss.
    """
    handles, tables = [], []
    for table in (wrapper._forward_pre_hooks, wrapper._forward_hooks):
        tables.append((table, table.copy()))
        foreign = {key: hook for key, hook in table.items() if _foreign(hook)}
        for key in foreign:
            del table[key]
        # around the module's own hooks: before what comes before its forward, and after what comes after it
        if table is wrapper._forward_pre_hooks:
            for key, hook in reversed(foreign.items()):
                options = dict(prepend=True, with_kwargs=key in wrapper._forward_pre_hooks_with_kwargs)
                handles.append(module.register_forward_pre_hook(_of(wrapper, hook), **options))
        else:
            for key, hook in foreign.items():
                options = dict(
                    with_kwargs=key in wrapper._forward_hooks_with_kwargs,
                    always_call=key in wrapper._forward_hooks_always_called,
                )
                handles.append(module.register_forward_hook(_of(wrapper, hook), **options))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for table, before in tables:
            table.clear()
            table.update(before)


def _of(wrapper: nn.Module, hook: Callable[..., Any]) -> Callable[..., Any]:
    return lambda _, *rest: hook(wrapper, *rest)


def _foreign(hook: Any) -> bool:
    """Whether a hook is none of the libraries' whose wrappers these are."""
    function = hook.func if isinstance(hook, functools.partial) else hook
    return (getattr(function, "__module__", None) or "").partition(".")[0] not in _WRAPPERS_OF


def refuse_hooks_around(model: nn.Module, inner: nn.Module) -> None:
    """ValueError for hooks on what is around a module that runs alone."""
    for module in chain(model):
        if module is inner:
            return
        if any(
            _foreign(hook) for table in (module._forward_pre_hooks, module._forward_hooks) for hook in table.values()
        ):
            raise ValueError(
                f"gfast: a forward hook is on the {type(module).__name__} around the model, and what is inside runs "
                f"alone, so that the hook would not: register it on the {type(inner).__name__} inside"
            )


class _Call(nn.Module):
    """Stands in a wrapper for the module that it holds."""

    def __init__(self, module: nn.Module, function: Callable[[nn.Module], Any]) -> None:
        super().__init__()
        self.module, self.function = module, function

    def forward(self, *_: Any, **__: Any) -> Any:
        return inside(self.module, self.function)


def accepted_by_wrappers(model: nn.Module) -> frozenset[str]:
    """Inputs that wrappers around the Hugging Face model take for themselves, such as PEFT's adapter_names."""
    names: set[str] = set()
    for module in model.modules():
        names |= set(getattr(module, "special_peft_forward_args", ()))
        if hasattr(type(module), "base_model_prefix"):
            break
    return frozenset(names)


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
    return any(backward_hooks(module) and any(part is head for part in module.modules()) for module in model.modules())


def stops_safely(model: nn.Module, blocks: Sequence[nn.Module]) -> bool:
    """Whether a forward may be left between blocks by an exception. PEFT's hooks and FSDP's state would stay behind,
    and what waits for the end of the call (replicate's reduction, Accelerate's offloading, one's own hook) in vain.
    """
    peft = any(is_peft(module) and hasattr(module, "peft_config") for module in chain(model))
    if peft or has_fsdp(model):
        return False
    within = next((name for name, module in model.named_modules() if module is blocks[0]), "").split(".")
    around = [model.get_submodule(".".join(within[:depth])) for depth in range(len(within))]
    return not any(module._forward_hooks or hasattr(module, "_hf_hook") for module in around)


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


def tensor_parallel_over(model: nn.Module) -> int:
    """How many processes compute every answer of the model together: 1 without tensor parallelism."""
    said = [getattr(module, "tp_size", None) for module in chain(model)]  # Hugging Face's, beside FSDP2 too
    known = next((size for size in said if isinstance(size, int)), None)
    meshes = {p.device_mesh for p in model.parameters() if hasattr(p, "device_mesh")}
    return known or (1 if has_fsdp(model) else max((mesh.size() for mesh in meshes), default=1))


def _moves_layouts(function: Any) -> bool:
    """A hook of torch's tensor parallelism, or a forward that Hugging Face's puts around the module's own."""
    places = ("torch.distributed.tensor", "transformers.distributed", "transformers.integrations.tensor_parallel")
    return (getattr(function, "__module__", None) or "").startswith(places)


def only_times_backward(hook: Any) -> bool:
    """A gradient hook by which FSDP learns that the backward has begun; it leaves the gradient as it is."""
    function = hook.func if isinstance(hook, functools.partial) else hook
    return (getattr(function, "__module__", None) or "").startswith("torch.distributed.fsdp")


_ALL_HERE = "A gradient effect needs every parameter on its device, frozen ones too"


def refuse_offloaded(model: nn.Module, needs: str = _ALL_HERE) -> None:
    """ValueError for parameters, frozen ones too, whose values are not here while the model is not running."""
    for path, module in model.named_modules():
        hook = getattr(module, "_hf_hook", None)
        for inner in getattr(hook, "hooks", (hook,)):
            if getattr(inner, "offload", False):
                name = next((n for n, _ in module.named_parameters()), None)
                if name is not None:
                    _refuse_absent(f"{path}.{name}" if path else name, "offloaded by Accelerate (device_map)", needs)
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            _refuse_absent(name, "on the meta device: its values are not in memory", needs)


def _refuse_absent(name: str, why: str, needs: str) -> None:
    raise ValueError(
        f"the parameter {name!r} is {why}. {needs}: load the model without offloading (a smaller dtype, another "
        f"device_map), or on a device with more memory"
    )


def autocast_of(accelerator: Any) -> AbstractContextManager[Any]:
    """Accelerate's mixed precision. Its own `accelerator.autocast()` stays in force after an error in older versions,
    and casts of weights that were cached under it with it.
    """
    from accelerate.utils import get_mixed_precision_context_manager

    return get_mixed_precision_context_manager(accelerator.native_amp, accelerator.autocast_handler)


def _accelerated(model: nn.Module) -> list[tuple[nn.Module, Any]]:
    """Modules around whose forward Accelerate has put its mixed precision, with that forward."""
    forwards = ((module, vars(module).get("forward")) for module in chain(model))
    return [one for one in forwards if type(getattr(one[1], "__wrapped__", None)).__name__ == "ConvertOutputsToFp32"]


def accelerated_dtype(model: nn.Module) -> torch.dtype | None:
    """Of the autocast that Accelerate has put around the model's forward; None where it has not."""
    for _, forward in _accelerated(model):
        inside = getattr(forward.__wrapped__, "model_forward", None)
        held = [cell.cell_contents for cell in getattr(inside, "__closure__", None) or ()]
        for autocast in (one for one in held if isinstance(one, torch.autocast)):
            return autocast.fast_dtype
    return None


@contextmanager
def own_precision(model: nn.Module) -> Iterator[None]:
    """The model without the mixed precision that Accelerate has put around its forward: as it is saved, and as it
    computes when it is loaded again. FSDP's stays, which casts the weights themselves.
    """
    around = _accelerated(model)
    if around and has_fsdp(model):
        _log_once(
            "what is measured along this training is in FSDP's mixed precision, and differs by its rounding from what "
            "the saved model gives"
        )
        around = []
    elif around and any(p.dtype == torch.float32 for p in model.parameters()):
        _log_once(
            "what is measured along this training is of the model as it is saved, in its own float32 and not in the "
            "training's 16 bits, and takes as long as that. Load the model in 16 bits to measure in them"
        )
    try:
        for module, _ in around:
            original = module._original_forward
            if getattr(original, "__func__", original) is type(module).forward:
                del module.forward
            else:
                module.forward = original
        yield
    finally:
        for module, forward in around:
            module.forward = forward


@functools.cache
def _log_once(text: str) -> None:
    logging.getLogger("gfast").warning("gfast: %s", text)


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


def chain(model: nn.Module) -> Iterator[nn.Module]:
    """The model, and what it wraps down to the Hugging Face model."""
    while True:
        yield model
        key = _wrapped_key(model)
        if key is not None:
            model = model._modules[key]
        elif is_peft(model) and isinstance(getattr(model, "base_model", None), nn.Module) and not _is_hf(model):
            model = model.base_model
        else:
            return


def _wrapped_key(module: nn.Module) -> str | None:
    classes = type(module).__mro__[: type(module).__mro__.index(nn.Module)]
    if _is_hf(module) or not any(cls.__module__.split(".")[0] in _WRAPPERS_OF for cls in classes):
        return None
    return next((key for key in _WRAPPED if key in module._modules), None)


def _is_hf(module: nn.Module) -> bool:
    return hasattr(type(module), "base_model_prefix")


def is_peft(module: nn.Module) -> bool:
    """Whether a module is one of PEFT's own."""
    return any(cls.__module__.split(".")[0] == "peft" for cls in type(module).__mro__)


def refuse_prompt_learning(model: nn.Module) -> None:
    """ValueError for adapters that are tokens in front of the text."""
    configs = getattr(model, "peft_config", None)
    for name, config in configs.items() if isinstance(configs, Mapping) else ():
        if getattr(config, "is_prompt_learning", False):
            raise ValueError(
                f"the PEFT adapter {name!r} is a prompt-learning method ({type(config).__name__}), whose virtual "
                f"tokens are no part of the decoder; gfast supports adapters inside the layers (LoRA and its relatives)"
            )
