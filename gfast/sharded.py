"""Models of which a process holds a part: the weights that FSDP2 (``fully_shard``) and ZeRO-3 gather for a call."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, distributed, nn

from gfast.ops.checks import is_wrapped


def is_freed(tensor: Tensor) -> bool:
    """Whether the memory of a tensor that was whole has been taken from it, as FSDP and ZeRO-3 do."""
    with torch._C.DisableTorchFunction():
        if hasattr(tensor, "ds_id"):
            return tensor.numel() < tensor.ds_numel
        plain = type(tensor) in (nn.Parameter, Tensor) and tensor.numel() > 0 and not is_wrapped(tensor)
        return plain and not tensor.untyped_storage().size()


def gathered(group: nn.Module | None, linear: nn.Module, weight: Tensor, hidden: Tensor, compute: Callable) -> Any:
    """``compute(hidden)`` while the weight of an output head, as it was multiplied with, is here, and again in what
    autograd does with the result. FSDP2 and ZeRO-3 take it away when the call that it belongs to ends.

    FSDP2 gathers the group of the weight again, and once more before its backward. ZeRO-3 does so for a call of the
    module, in whose place `compute` stands; also where it still holds the weight, from a call before or for one that it
    expects, as it takes that away before the backward.
    """
    freed = is_freed(weight)
    if group is None and (freed or is_zero3(linear)):
        patched = vars(linear).get("forward")
        linear.forward = compute
        try:
            return linear(hidden)
        finally:
            if patched is None:
                del linear.forward
            else:
                linear.forward = patched
    if freed:
        group.unshard()
    try:
        out = compute(hidden)
    finally:
        if freed:
            group.reshard()
    if group is not None:
        for x in out if isinstance(out, tuple) else (out,):
            gather_before_backward(x, [group])
    return out


def gather_before_backward(x: Tensor, groups: Iterable[nn.Module]) -> None:
    """Before the backward through `x` the groups of FSDP2 are gathered, which it does by itself where `x` is what the
    last module of a group returns.
    """
    if isinstance(x, Tensor) and x.requires_grad:
        for group in groups:
            x.register_hook(lambda _, group=group: group.unshard())


def group_of(model: nn.Module, module: nn.Module) -> nn.Module | None:
    """The innermost module around `module`, or itself, whose parameters FSDP2 gathers together; None without FSDP2."""
    around = [m for m in model.modules() if is_fsdp2(m) and any(child is module for child in m.modules())]
    return around[-1] if around else None


@contextmanager
def whole(parameter: Tensor) -> Iterator[Tensor]:
    """All of a parameter of which this process may hold only a part; every process must ask for it."""
    if hasattr(parameter, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter]):
            yield parameter
    else:
        yield parameter.detach().full_tensor() if hasattr(parameter, "full_tensor") else parameter


def reshard(model: nn.Module) -> None:
    """Every parameter as this process holds it: FSDP2 may have left some gathered after a forward."""
    for module in filter(is_fsdp2, model.modules()):
        module.reshard()


def is_fsdp2(module: nn.Module) -> bool:
    """Whether FSDP2 (``fully_shard``) has made the module the root of a group."""
    return all(callable(getattr(module, name, None)) for name in ("unshard", "reshard", "_get_fsdp_state"))


@contextmanager
def without_hooks(linear: nn.Module) -> Iterator[None]:
    """A module without its hooks: those of a vocabulary-parallel head move its input and output between layouts."""
    with _hooks_off((linear, "_forward_hooks", lambda _: True), (linear, "_forward_pre_hooks", lambda _: True)):
        yield


@contextmanager
def _hooks_off(*chosen: tuple[nn.Module, str, Callable[[Any], bool]]) -> Iterator[None]:
    """Modules without those hooks of a table that a function chooses; order and all put back."""
    tables = [(getattr(module, name), takes) for module, name, takes in chosen]
    before = [dict(table) for table, _ in tables]
    try:
        for table, takes in tables:
            for key in [key for key, hook in table.items() if takes(hook)]:
                del table[key]
        yield
    finally:
        for (table, _), hooks in zip(tables, before, strict=True):
            table.clear()
            table.update(hooks)


def is_zero3(linear: nn.Module) -> bool:
    """Whether ZeRO-3 holds a part of the module's weights; asking does not make it gather them."""
    return any(hasattr(parameter, "ds_id") for parameter in linear._parameters.values())


def refuse_unrun(model: nn.Module) -> None:
    """ValueError for a model whose weights ZeRO-3 has sharded when it was loaded, and that no engine gathers yet."""
    first = next(model.parameters(), None)
    if first is None or not hasattr(first, "ds_id"):
        return
    for module in model.modules():
        if any(map(_by_deepspeed, module._forward_pre_hooks.values())):
            return  # an engine's, which gather what a call needs
    for name, parameter in model.named_parameters():
        if parameter.numel() < getattr(parameter, "ds_numel", 0):
            raise ValueError(
                f"gfast: {name} is sharded by ZeRO-3, and there is no engine yet that would gather it for a call: "
                f"transformers shards what is loaded after arguments with a ZeRO-3 config were made. Load the model "
                f"before these are made (a trainer shards it then), or give the engine of deepspeed.initialize"
            )


def foreign_hooks(linear: nn.Module) -> bool:
    """Whether others than DeepSpeed have put hooks on a module."""
    hooks = [*linear._forward_hooks.values(), *linear._forward_pre_hooks.values()]
    return not all(map(_by_deepspeed, hooks))


@contextmanager
def ungathered(model: nn.Module, linear: nn.Module) -> Iterator[None]:
    """A call of the model in which ZeRO-3 does not gather a head, and does not look at the logits: its hook on outputs
    makes that the backward gathers a module's own weights, of which those around the head have none.
    """

    def looks(hook: Any) -> bool:
        return _by_deepspeed(hook) and getattr(hook, "__name__", "") == "_pre_backward_module_hook"

    tables = [(linear, "_forward_hooks", _by_deepspeed), (linear, "_forward_pre_hooks", _by_deepspeed)]
    around = (m for m in model.modules() if m is not linear and any(child is linear for child in m.modules()))
    tables += [(module, "_forward_hooks", looks) for module in around if not any(module._parameters.values())]
    with _hooks_off(*tables):
        yield


def _by_deepspeed(hook: Any) -> bool:
    return (getattr(hook, "__module__", None) or "").startswith("deepspeed.")


def check_shards(model: nn.Module, engine: str) -> int:
    """How many processes hold each shard of a model that FSDP2 shards in the way that the stream engine can measure:
    every trainable parameter over all processes, or over groups of them that are copies of each other (HSDP). 0 for a
    model that is not sharded.

    Raises:
        ValueError: any other way that parameters are sharded over processes, and engines that need whole weights.
    """
    refuse_replicate(model)
    instead = "measure the model before it is sharded, or replicated (DDP)"
    if any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules()):
        raise ValueError(
            f"gfast: FSDP1 (FullyShardedDataParallel) flattens the parameters of this model into shards, in which the "
            f"{engine} engine cannot tell one from another: shard it with FSDP2 (fully_shard), or {instead}"
        )
    groups = [module for module in model.modules() if is_fsdp2(module)]
    reshard(model)
    sharded, plain, copies = None, None, 0
    for name, parameter in model.named_parameters():
        if hasattr(parameter, "ds_id"):
            raise ValueError(
                f"gfast: the parameter {name!r} is sharded by ZeRO-3, which the {engine} engine has no rule for: shard "
                f"the model with FSDP2 (fully_shard), or {instead}"
            )
        if hasattr(parameter, "device_mesh"):
            sharded = sharded or name
            mesh, ways = parameter.device_mesh, parameter.placements
            cut = [size for size, way in zip(mesh.shape, ways, strict=True) if way.is_shard()]
            known = len(cut) == 1 and all(way.is_shard() or way.is_replicate() for way in ways)
            held = mesh.size() // cut[0] if known else 0
            if not groups or held not in (copies or held, 0) or not held or mesh.size() != distributed.get_world_size():
                raise ValueError(
                    f"gfast: the parameter {name!r} is sharded as {ways} over {mesh} (tensor parallelism, or not like "
                    f"the others), which the {engine} engine has no rule for; it has one for FSDP2 over all processes, "
                    f"with or without copies. Or {instead}"
                )
            copies = held
        elif parameter.requires_grad:
            plain = plain or name
    if sharded is None:
        return 0
    if engine not in ("auto", "stream"):
        raise ValueError(
            f"gfast: the {engine} engine reads whole weights and directions, and FSDP2 shards {sharded!r} over the "
            f"processes: use engine='stream', which dots shards, or {instead}"
        )
    if plain is not None:
        raise ValueError(
            f"gfast: FSDP2 shards {sharded!r} but not the trainable parameter {plain!r}, whose gradient it does not "
            f"sum over the processes: freeze that with requires_grad_(False), or shard it too"
        )
    for group in groups:
        state = group._get_fsdp_state()
        some = getattr(state, "_fsdp_param_groups", None) or [getattr(state, "_fsdp_param_group", None)]
        for shard in filter(None, some):
            whole = shard.reduce_grads and shard.all_reduce_grads
            if not whole or shard.gradient_divide_factor is not None:
                raise ValueError(
                    f"gfast: the {engine} engine needs FSDP2 to give the mean of the processes' gradients, and this "
                    f"model was told otherwise: set_requires_gradient_sync(True), and no set_gradient_divide_factor"
                )
    return copies


def refuse_replicate(model: nn.Module) -> None:
    """ValueError for torch.distributed's `replicate`, which reduces the gradients of every call of the module: none can
    be had of a process's own batches.
    """
    place = "torch.distributed._composable.replicate"
    for path, module in model.named_modules():
        if any(cls.__module__ == place for cls in type(module).__mro__):
            raise ValueError(
                f"gfast: replicate() makes every backward of {path or type(module).__name__!r} one of all processes, "
                f"and a measurement needs those of its own: use DistributedDataParallel, or measure the model before"
            )


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process holds."""
    return tensor.to_local() if hasattr(tensor, "device_mesh") else tensor
