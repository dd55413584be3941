"""The gradients of a model that DeepSpeed trains (ZeRO-1, 2 and 3): its engine runs the backward, reduces, and keeps a
shard of each in every process.

After every backward the shards are taken from the engine, and the step's are given back before `engine.step()`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gfast.geffect.live.losses import refuse
from gfast.ops.grad_dot import grad_dots

INSTEAD = (
    "Use another stage, DDP, or shard the model with fully_shard (FSDP2; in a Trainer fsdp='full_shard' with "
    "fsdp_config={'fsdp_version': 2})"
)
# Whose shards are known: BF16_Optimizer, MiCS, ZenFlow and SuperOffload keep their gradients elsewhere.
OPTIMIZERS = ("DeepSpeedZeroOptimizer", "DeepSpeedZeroOptimizer_Stage3")
WITHOUT_ZERO = "without ZeRO (stage 0) its engine reduces and frees gradients by itself, and hands none on"
OFFLOADED = (
    "with offload_optimizer ZeRO-1 and 2 take the norm that they clip by within the backward, and nothing public sets "
    "it for another gradient; ZeRO-3 does"
)
ON_DISK = "with offload_optimizer to nvme gradients are on disk"


class Zero:
    """The shards of a DeepSpeedEngine.

    Attributes:
        engine, parameters: those of the model.
        shards: what stands for a parameter where its gradient's shard is looked for: zeros of the shard's size, without
            memory; `.grad` is what this process holds of the gradient, reduced, empty where that is nothing.
        group: the processes that share the parameters out.
    """

    def __init__(self, engine: Any, names: list[str], parameters: list[nn.Parameter]) -> None:
        self.engine, self.optimizer, self.parameters = engine, engine.optimizer, parameters
        if why := _lacking(engine):
            refuse(f"a GEffectMonitor cannot run with this {type(engine).__name__}: {why}. {INSTEAD}")
        self.whole = engine.zero_optimization_stage() < 3  # parameters are, and only gradients are shared out
        linked = "_hp_mapping" if self.whole else "_z3_optimizer"
        missing = [name for name, p in zip(names, parameters, strict=True) if not hasattr(p, linked)]
        if missing:
            refuse(f"{missing[0]!r} is trained, and not by the engine's optimizer: give it that, or freeze it")
        self.group = self.optimizer.dp_process_group
        dtype = self.optimizer.gradient_accumulation_dtype
        self.shards = [torch.zeros((), dtype=dtype, device=p.device).expand(self._size(p)) for p in parameters]
        self._given: int | None = None  # steps that the engine had made when it was given the last gradients

    def begin(self) -> None:
        """Raises ValueError where the last step's gradients still wait in the engine."""
        if self._given == self.engine.global_steps:
            refuse("the engine has made no step since the last retain(): call engine.step() before forget()")

    def backward(self, loss: Tensor, retain_graph: bool = False) -> None:
        """The engine's; shards of this loss's gradients are added to those that are there."""
        self.clear()
        # At a boundary every stage reduces; what adds up over the step's losses are the shards.
        self.engine.set_gradient_accumulation_boundary(True)
        self.engine.backward(loss, retain_graph=retain_graph, scale_wrt_gas=False)
        for shard, parameter in zip(self.shards, self.parameters, strict=True):
            gradient = self._gradient(parameter)
            shard.grad = gradient if shard.grad is None else shard.grad.add_(gradient)

    def clear(self) -> None:
        """No gradients in the engine, so that the next backward's are its own alone."""
        from deepspeed.utils import safe_set_local_grad

        self._given = None
        self.optimizer.zero_grad()
        if self.whole:
            for group in self.optimizer.averaged_gradients:
                self.optimizer.averaged_gradients[group] = None
            return
        for shard, parameter in zip(self.shards, self.parameters, strict=True):
            safe_set_local_grad(parameter, shard)  # of one that the next loss does not reach it would be the last one's

    def give(self) -> None:
        """The engine gets the step's gradients, in the place of its last backward's."""
        from deepspeed.utils import safe_set_local_grad

        for shard, parameter in zip(self.shards, self.parameters, strict=True):
            if self.whole:
                for fragment in self._fragments(parameter):
                    fragment.copy_(shard.grad.view(fragment.shape))
            else:
                safe_set_local_grad(parameter, shard.grad)
            shard.grad = None
        self._given = self.engine.global_steps

    def get_scale(self) -> float:
        """What the engine multiplies losses by, as a GradScaler says it."""
        return float(self.optimizer.scale_if_loss(torch.ones((), requires_grad=True) * 1.0).detach())

    def versions(self) -> list[int]:
        """What is another one once somebody has changed a weight."""
        return [getattr(p, "ds_tensor", p)._version for p in self.parameters]

    def step(self, dropped: bool) -> None:
        """The engine's, for a Trainer, whose own is part of the backward that it does not run. A step that was dropped
        makes none; in fp16 the engine finds it so by itself, and takes another scale.
        """
        if not dropped or self.engine.fp16_enabled():
            self.engine.step()
        else:
            self.clear()

    def _size(self, parameter: nn.Parameter) -> int:
        if not self.whole:
            return parameter.partition_numel()
        return 0 if parameter._hp_mapping is None else parameter._hp_mapping.lp_fragment_address.numel

    def _fragments(self, parameter: nn.Parameter) -> list[Tensor]:
        """What a step of ZeRO-1 and 2 reads: at most one."""
        mapping = parameter._hp_mapping
        return [] if mapping is None else [mapping.get_lp_grad_fragment(parameter._index_in_param_group)]

    def _gradient(self, parameter: nn.Parameter) -> Tensor:
        if self.whole:  # the engine's own tensor, which it lets go of in `clear`
            fragments = [fragment.reshape(-1) for fragment in self._fragments(parameter)]
            return fragments[0] if fragments else self.shards[0].new_zeros(0)
        from deepspeed.utils import safe_get_local_grad

        gradient = safe_get_local_grad(parameter)  # in fp32 the engine's own, which stays
        return gradient.clone() if gradient.dtype == self.shards[0].dtype else gradient.to(self.shards[0].dtype)

    def masters(self) -> list[Tensor]:
        """This process's shards of the fp32 weights."""
        if self.whole:
            mappings = [p._hp_mapping for p in self.parameters]
            return [self.shards[0].new_zeros(0) if m is None else m.get_hp_fragment() for m in mappings]
        from deepspeed.utils import safe_get_local_fp32_param

        return [safe_get_local_fp32_param(p) for p in self.parameters]


class MasterUpdates:
    """What the engine's last step did to each shard of the fp32 weights, whatever its optimizer, from their copy."""

    def __init__(self, zero: Zero) -> None:
        self.zero = zero
        self._kept: list[Tensor] = []  # the shards before the step, then what it added to them
        self._steps: int | None = None
        self._subtracted = False

    def _taken(self) -> int:
        return self.zero.engine.global_steps - self.zero.engine.skipped_steps

    def begin(self) -> bool:
        """Whether there was a step since the last time, and one only."""
        steps = self._taken()
        if self._subtracted or self._steps is None or steps != self._steps + 1:
            return self._subtracted and steps == self._steps
        for before, now in zip(self._kept, self.zero.masters(), strict=True):
            before.neg_().add_(now)
        self._steps, self._subtracted = steps, True
        return True

    def end(self) -> None:
        self._kept = [weights.detach().clone() for weights in self.zero.masters()]
        self._steps, self._subtracted = self._taken(), False

    def dots(self, index: int, gradients: list[Tensor]) -> Tensor:
        """<gradient, update> of a parameter for each of some gradients, fp64, of this process's shard."""
        update = self._kept[index].reshape(-1)
        if not gradients:
            return torch.zeros(0, dtype=torch.float64, device=update.device)
        return grad_dots([update], [[g.reshape(-1)] for g in gradients], [0], 1)[0, : len(gradients)]


def engine_of(model: nn.Module) -> Any:
    """The DeepSpeedEngine in a model, or None. ValueError for a model that is inside one."""
    for module in model.modules():
        if any(kind.__name__ == "DeepSpeedEngine" for kind in type(module).__mro__):
            return module
    for name, parameter in model.named_parameters():
        if hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping"):
            refuse(
                f"{name!r} is sharded by DeepSpeed (ZeRO): give GEffectMonitor the engine of deepspeed.initialize, and "
                f"compute losses by calling it"
            )
    return None


def check_config(config: Mapping[str, Any]) -> None:
    """ValueError for a DeepSpeed config whose engine would be refused, before there is one."""
    zero = config.get("zero_optimization") or {}
    stage, device = zero.get("stage", 0), (zero.get("offload_optimizer") or {}).get("device", "none")
    why = WITHOUT_ZERO if stage == 0 else OFFLOADED if stage < 3 and device != "none" else None
    why = ON_DISK if stage == 3 and device == "nvme" else why
    if why is not None:
        refuse(f"live effects and surgery cannot run with this DeepSpeed config: {why}. {INSTEAD}")


def _lacking(engine: Any) -> str | None:
    """Why the shards of an engine's gradients are not to be had, or not to be given back."""
    optimizer, stage = engine.optimizer, engine.zero_optimization_stage()
    kind, inner = type(optimizer).__name__, type(getattr(optimizer, "optimizer", None)).__name__
    if stage == 0:
        return WITHOUT_ZERO
    if kind not in OPTIMIZERS or type(engine).__name__ != "DeepSpeedEngine":
        return (
            f"a {type(engine).__name__} with a {kind} keeps gradients where its public functions do not reach (with "
            f"bf16, ZeRO-1 and data_types.grad_accum_dtype fp32 take ZeRO-2)"
        )
    if "muon" in inner.lower():
        return f"{inner} makes its updates of the gradients within the backward"
    if stage < 3 and optimizer.round_robin_gradients:
        return "with round_robin_gradients what its public functions give of gradients is that of other parameters"
    if stage < 3 and optimizer.cpu_offload:
        return OFFLOADED
    if stage == 3 and optimizer.swap_optimizer:
        return ON_DISK
    if stage == 3 and getattr(optimizer, "zenflow", False):
        return "ZenFlow applies gradients in parts"
    if engine.has_moe_layers:
        return "experts are shared out over other processes than the rest of the model"
    if engine.mp_world_size > 1 or getattr(engine, "autotp_size", lambda: 0)() > 1:
        return "tensor parallelism cuts the parameters too, and its engine does not say which"
    if not getattr(engine, "managed_gradient_accumulation", lambda: True)():
        return "with managed_gradient_accumulation=false its step makes the gradients anew"
    if getattr(engine, "is_deepcompile_active", lambda: False)():
        return "DeepCompile reduces gradients in what it compiles"
    return None
