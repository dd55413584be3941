"""What the optimizer's last step did to each parameter, from the state it left: no copy of the weights."""

from __future__ import annotations

import math
import weakref
from typing import Any

import torch
from torch import Tensor, nn

from gfast.geffect.live.losses import refuse
from gfast.geffect.live.processes import here
from gfast.ops.grad_dot import grad_dots

CHUNK = 1 << 20  # numbers at a time: what is made of the state stays in a cache, and calls cost little beside it


class Updates:
    r"""theta_after - theta_before of the last step of Adam, AdamW, or SGD with momentum.

        Adam:   A = - lr m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps)
        AdamW:  A - lr wd (theta_after - A) / (1 - lr wd)
        SGD:    - lr momentum_buffer

    with the rates that the step was taken with. It is what the optimizer added; weights of 16 bits round it.
    """

    def __init__(self, optimizer: Any, names: list[str], parameters: list[nn.Parameter]) -> None:
        optimizer = getattr(optimizer, "optimizer", optimizer)  # Accelerate's wrapper
        self.optimizer, self.parameters = optimizer, parameters
        groups = self._groups()
        missing = [name for name, p in zip(names, parameters, strict=True) if id(p) not in groups]
        kind = type(optimizer)
        if kind not in (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD):
            why = f"it is {kind.__module__}.{kind.__name__}"
        elif missing:
            why = f"it does not have the parameter {missing[0]!r}"
        elif any(group.get("amsgrad") or group.get("nesterov") for group in optimizer.param_groups):
            why = "amsgrad and nesterov steps use what is not kept"
        elif kind is torch.optim.SGD and not all(group["momentum"] for group in optimizer.param_groups):
            why = (
                "SGD without momentum keeps nothing of its last update, which is -lr times the gradient after clipping "
                "and weight decay: effect(of='step') is the effect of that gradient"
            )
        else:
            why = None
        if why is not None:
            raise ValueError(
                f"gfast: the update's effect needs an optimizer of Adam, AdamW or SGD with momentum whose state holds "
                f"its last update: {why}"
            )
        # Rates of the last step, and the other settings of its group then; None: was not in it.
        self._taken: list[tuple[float, float, dict[str, Any]] | None] | None = None
        self._counts: dict[int, float] = {}
        self._skipped: Tensor | None = None  # a GradScaler's flag: a fused optimizer may have taken no step in there
        self._fresh = False  # the counts are still those before that step
        for register, called in (
            (optimizer.register_step_post_hook, self._note),
            (optimizer.register_load_state_dict_post_hook, self._forget),
        ):
            method = weakref.WeakMethod(called)  # the optimizer outlives its monitors
            hook = register(lambda *_, method=method: None if method() is None else method()())
            weakref.finalize(self, hook.remove)

    def _groups(self) -> dict[int, dict[str, Any]]:
        """id of a parameter -> its group, as they are now: load_state_dict makes new ones."""
        return {id(p): group for group in self.optimizer.param_groups for p in group["params"]}

    def _note(self, *_: Any) -> None:
        """After the optimizer's step, whose closure may have made the gradients: the rates and betas it was taken with,
        before a scheduler changes them."""
        self._fresh, groups = True, self._groups()
        self._skipped = getattr(self.optimizer, "found_inf", None)
        rates = {
            id(group): (float(group["lr"]), float(group["weight_decay"]), dict(group)) for group in groups.values()
        }
        self._taken = [None if p.grad is None else rates[id(groups[id(p)])] for p in self.parameters]

    def _forget(self) -> None:
        """A state that was loaded is not what the last step left."""
        self._taken = None

    def begin(self) -> bool:
        """Whether there was a step since the last time; its step counts are read, all at once."""
        if self._taken is None or not self._fresh:
            return self._taken is not None
        self._fresh = False
        if self._skipped is not None and bool(self._skipped):
            self._taken = None
            return False
        states = [self.optimizer.state.get(p, {}) for p in self.parameters]
        counts = [i for i, state in enumerate(states) if isinstance(state.get("step"), Tensor)]
        steps = [here(states[i]["step"]).float().reshape(()) for i in counts]  # fused, each where its parameter is
        steps = torch.stack([step.to(steps[0].device) for step in steps]).tolist() if steps else []
        self._counts = dict(zip(counts, steps, strict=True))
        return True

    def end(self) -> None:
        self._taken = None

    @torch.no_grad()
    def dots(self, index: int, gradients: list[Tensor]) -> Tensor:
        """<gradient, update> of a parameter for each of some gradients, fp64, of this process's shard."""
        if self._taken is None:
            refuse("the optimizer's state was loaded after forget(): load it between steps, not within one")
        taken, parameter = self._taken[index], self.parameters[index]
        out = torch.zeros(len(gradients), dtype=torch.float64, device=here(parameter).device)
        state = self.optimizer.state.get(parameter, {})
        if taken is None or not state or not gradients:
            return out
        rate, decay, group = taken
        flat = [here(g).reshape(-1) for g in gradients]
        weights = here(parameter.detach()).reshape(-1)
        momentum = here(state["momentum_buffer" if "momentum_buffer" in state else "exp_avg"]).reshape(-1)
        if "exp_avg_sq" not in state:
            return -rate * grad_dots([momentum], [[g] for g in flat], [0], 1)[0, : len(flat)]
        square = here(state["exp_avg_sq"]).reshape(-1)
        (beta1, beta2), count = group["betas"], self._counts[index]
        size, root = rate / (1.0 - beta1**count), math.sqrt(1.0 - beta2**count)
        decoupled = isinstance(self.optimizer, torch.optim.AdamW) or group.get("decoupled_weight_decay", False)
        shrink = rate * decay if decoupled else 0.0
        scratch = torch.empty(min(CHUNK, len(momentum)), dtype=momentum.dtype, device=momentum.device)
        parts = [torch.zeros(len(flat), 3 if shrink else 2, dtype=torch.float64, device=out.device)]
        for start in range(0, len(momentum), CHUNK):
            at = slice(start, start + CHUNK)
            direction = scratch[: len(momentum[at])]
            torch.sqrt(square[at], out=direction)
            torch.div(momentum[at], direction.add_(group["eps"] * root), out=direction)
            ys = [[direction] * len(flat), *([[weights[at]] * len(flat)] if shrink else [])]
            parts.append(grad_dots([g[at] for g in flat], ys, range(len(flat)), len(flat)))  # each is read once
        sums = torch.stack(parts).sum(0)  # [gradients, direction (weights) norm]
        out += sums[:, 0] * (-size * root / (1.0 - shrink))
        if shrink:
            out -= sums[:, 1] * (shrink / (1.0 - shrink))
        return out
