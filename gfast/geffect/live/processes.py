"""What a process holds of gradients that several processes train on: all of each (DDP), or a shard (FSDP2, ZeRO)."""

from __future__ import annotations

import gc
from collections.abc import Sequence

import torch
from torch import Tensor, distributed, nn

from gfast.geffect.live.zero import Zero, engine_of
from gfast.sharded import is_fsdp2, refuse_replicate


class Processes:
    """How gradients of a model are spread over processes, and what sums over all of them take.

    Attributes:
        replicated: the DistributedDataParallel wrapper, if there is one with several processes.
        zero: what DeepSpeed's engine shares out, if there is one.
        sharded: whether a process holds shards of gradients: parameters are DTensors, or ZeRO's.
    """

    def __init__(self, model: nn.Module, names: Sequence[str], parameters: Sequence[nn.Parameter]) -> None:
        refuse_replicate(model)
        for module in model.modules():
            kind = type(module).__name__
            if kind == "FullyShardedDataParallel":
                raise ValueError(
                    "gfast: a GEffectMonitor reads gradients parameter by parameter, and FSDP1 "
                    "(FullyShardedDataParallel) has them in flat pieces: shard the model with fully_shard (FSDP2)"
                )
        refuse_hooks(model)
        engine = engine_of(model)
        self.zero = None if engine is None else Zero(engine, list(names), list(parameters))
        self.replicated = next(
            (m for m in model.modules() if isinstance(m, nn.parallel.DistributedDataParallel) and _several(m)), None
        )
        meshes, shards = [], []
        for name, parameter in zip(names, parameters, strict=True):
            mesh = getattr(parameter, "device_mesh", None)
            placements = () if mesh is None else parameter.placements
            if any(placement.is_partial() for placement in placements):
                raise ValueError(
                    f"gfast: the parameter {name!r} is a partial sum over processes, which has no gradient"
                )
            if mesh is not None and mesh not in meshes:
                meshes.append(mesh)
            shards.append([placement.is_shard() for placement in placements])
        if len(meshes) > 1:
            raise ValueError(
                f"gfast: the parameters are sharded over {len(meshes)} device meshes, such as those of experts; a "
                f"GEffectMonitor sums over one"
            )
        whole = [name for name, cut in zip(names, shards, strict=True) if not cut]
        if whole and meshes and any(map(is_fsdp2, model.modules())):  # tensor parallelism has them alike everywhere
            raise ValueError(
                f"gfast: FSDP2 shards the model, but not its trainable parameter {whole[0]!r}, whose gradient it does "
                f"not sum over the processes: freeze that with requires_grad_(False), or shard it too"
            )
        self.mesh = meshes[0] if meshes else None
        self.sharded = self.mesh is not None or self.zero is not None
        if self.mesh is None:
            self._groups = [] if self.zero is None else [self.zero.group]
        else:
            self._groups = [self.mesh.get_group(dimension) for dimension in range(self.mesh.ndim)]
        self._shards = shards  # by parameter, for every dimension of the mesh: is it cut along it?

    @property
    def silent(self) -> bool:
        """Whether a backward would leave gradients to each process alone, under DDP.no_sync()."""
        return self.replicated is not None and not self.replicated.require_backward_grad_sync

    def sums(self, table: Tensor) -> Tensor:
        """Rows [P, columns] of dot products of shards, summed over the processes that hold the others."""
        for dimension, group in enumerate(self._groups):
            cut = [self.zero is not None or (bool(shard) and shard[dimension]) for shard in self._shards]
            whole = table.clone()
            distributed.all_reduce(whole, group=group)
            table = torch.where(torch.tensor(cut, device=table.device)[:, None], whole, table)
        return table

    def sums_of(self, rows: Tensor, indices: list[int]) -> Tensor:
        """The same of some parameters' rows."""
        if not self.sharded:
            return rows
        table = rows.new_zeros(len(self._shards), rows.shape[1])
        table[indices] = rows
        return self.sums(table)[indices]

    def mean(self, values: Tensor) -> Tensor:
        """The mean of a tensor over all processes."""
        for group in self._groups if self.replicated is None else [self.replicated.process_group]:
            values = values / distributed.get_world_size(group)
            distributed.all_reduce(values, group=group)
        return values

    def differ(self, values: Tensor) -> bool:
        """Whether the processes of DDP have different values of what should be alike, squared norms of gradients."""
        if self.replicated is None:
            return False
        both = torch.stack([values, -values])
        distributed.all_reduce(both, op=distributed.ReduceOp.MAX, group=self.replicated.process_group)
        return bool((both[0] + both[1] > 1e-6 * values.abs()).any())


def refuse_inner(model: nn.Module) -> None:
    """ValueError for the model inside a DistributedDataParallel that was given without it: its gradients are reduced
    behind the back of whoever reads them.
    """
    if not (distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1):
        return
    kind, inside = nn.parallel.DistributedDataParallel, {id(module) for module in model.modules()}
    wrappers = [wrapper for wrapper in gc.get_objects() if type(wrapper) is kind and id(wrapper) not in inside]
    if any(module is model for wrapper in wrappers for module in wrapper.modules()):
        raise ValueError(
            "gfast: this model is inside a DistributedDataParallel, which reduces its gradients: give GEffectMonitor "
            "that one, and compute losses by calling it"
        )


# Of a sum they give the sum, but for rounding, however often they are called.
_SUMS = ("allreduce_hook", "fp16_compress_hook", "bf16_compress_hook", "mixed_precision_hooks")


def refuse_hooks(model: nn.Module) -> None:
    """ValueError for a communication hook of DDP of which nobody knows that it means gradients."""
    wrappers = [module for module in model.modules() if isinstance(module, nn.parallel.DistributedDataParallel)]
    for hook, _ in (each for wrapper in wrappers for each in getattr(wrapper, "_comm_hooks", ())):
        module, name = getattr(hook, "__module__", ""), getattr(hook, "__qualname__", repr(hook))
        is_torchs = module.startswith("torch.distributed.algorithms.ddp_comm_hooks.")
        if not (is_torchs and (name in _SUMS or module.rpartition(".")[2] in _SUMS)):
            raise ValueError(
                f"gfast: the communication hook {name} of DistributedDataParallel may give another gradient than the "
                f"mean over processes (compressed, with the error carried to the next), and a step with live effects "
                f"reduces twice: leave it out, or take torch's fp16_compress_hook or bf16_compress_hook"
            )


def _several(wrapper: nn.Module) -> bool:
    return distributed.get_world_size(wrapper.process_group) > 1


def here(gradient: Tensor) -> Tensor:
    """What this process holds of a gradient, dense."""
    local = getattr(gradient, "_local_tensor", gradient)
    return local if local.layout == torch.strided else local.to_dense()


def reduce_partial(parameter: Tensor) -> None:
    """The gradient of a parameter spread over processes as that is: of what sequence parallelism has alike in all, such
    as norms, a backward leaves each process its own part of the sum.
    """
    placements = getattr(parameter.grad, "placements", None)
    if placements is not None and placements != parameter.placements:
        parameter.grad = parameter.grad.redistribute(placements=parameter.placements)


def like(parameter: Tensor, value: Tensor) -> Tensor:
    """A tensor where a parameter is, spread over processes as it is; `value` is whole, or this process's shard."""
    value = value.to(parameter.device)
    if not hasattr(parameter, "device_mesh") or hasattr(value, "device_mesh"):
        return value
    from torch.distributed.tensor import DTensor

    mesh, placements = parameter.device_mesh, parameter.placements
    return DTensor.from_local(value, mesh, placements, shape=parameter.shape, stride=parameter.stride())
