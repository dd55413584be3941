# SPDX-License-Identifier: Apache-2.0
"""What a GEffectMonitor asks of its calls before it does any work for them."""

from __future__ import annotations

from torch import nn

from gfast.geffect.live.losses import Loss, is_function, refuse, shares_forward
from gfast.geffect.live.merging import Gradients
from gfast.geffect.live.step import LiveStep, Monitored


def check_parameters(model: nn.Module, gradients: Gradients, sharded: bool) -> None:
    """ValueError where the parameters that are trained are not those that the monitor was made with."""
    now = {name: p for name, p in model.named_parameters() if p.requires_grad}
    before = dict(zip(gradients.names, gradients.parameters, strict=True))
    changed = [name for name in {**before, **now} if name not in now or name not in before]
    if not sharded:  # FSDP2 has others in their place between a forward and its backward
        changed += [name for name in before if now.get(name) is not before[name]]
    if changed:
        state = "another one" if changed[0] in now and changed[0] in before else "trained"
        state = "not trained any more, or gone" if changed[0] not in now else state
        refuse(
            f"{changed[0]!r} is {state} since the GEffectMonitor was made: make a new one after parameters are "
            f"frozen, added or replaced"
        )


def check_retain(monitor: Monitored, step: LiveStep, loss: Loss | None, risk: Loss | None, last: bool) -> bool:
    """Whether the risk of a retain() may share the forward of its loss; ValueError for what the step cannot take."""
    several = bool(step.retains) or not last
    if risk is not None and monitor.accumulate == "exact" and several:
        refuse(
            "accumulate='exact' measures the retain losses of all micro-batches, and a risk= beside them on "
            "the first alone: give one retain loss with the risk of all retain data, or accumulate='first'"
        )
    if loss is None and (risk is None or (several and monitor.surgery is None)):
        refuse("retain(None) is a step without a retain loss: one call, with risk= to measure the effect on")
    if step.retains and monitor.surgery is not None and step.retain_loss != (loss is not None):
        refuse("a step has a retain loss in every retain() or in none: this one and those before it differ")
    shared = shares_forward(risk, monitor.processes.sharded)
    if monitor.processes.replicated is not None and risk is not None:
        if shared or not (loss is None or is_function(loss)):
            refuse(
                "DDP reduces the first backward after a forward, which here is the risk's: give both the loss and "
                "risk= as functions that compute them"
            )
    return shared
