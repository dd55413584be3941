"""Run as a script: everything that gfast offers without torch.compile, and who of gfast imports torch's compiler."""

from __future__ import annotations

import builtins
import sys
import tempfile

ENGINES = ("stream", "sample", "token", "gram")
COMPILER = ("torch._dynamo", "torch._inductor")
PASSED_OVER = ("torch", "contextlib", "functools", "importlib")  # who imports is whoever called these
importers: set[str] = set()
plain_import = builtins.__import__


def recording_import(name, *args, **kwargs):
    if name.startswith(COMPILER):
        frame = sys._getframe(1)
        while frame is not None and frame.f_globals.get("__name__", "").split(".")[0] in PASSED_OVER:
            frame = frame.f_back
        importers.add("nobody" if frame is None else frame.f_globals["__name__"])
    return plain_import(name, *args, **kwargs)


def ops() -> None:
    import torch

    import gfast
    from gfast.model_state import uncompiled
    from gfast.objectives import DPO, NPO, TNPO, WGA
    from gfast.ops.row_dot import linear_row_dot

    hidden, weight = torch.randn(2, 4, 8, requires_grad=True), torch.nn.Parameter(torch.randn(16, 8))
    logits = torch.randn(2, 4, 16, requires_grad=True)
    labels, ref = torch.randint(0, 16, (2, 4)), -torch.rand(2, 4)
    for objective in (WGA(), TNPO(), NPO(), DPO(), lambda logp, ref_logp, sequence_id: logp.exp()):
        for reduction in ("token_mean", "none"):
            kind = dict(ref_logp=ref, reduction=reduction)
            gfast.unlearn_loss(logits, labels, objective, **kind).loss.sum().backward()
            gfast.linear_unlearn_loss(hidden, weight, labels, objective, **kind).loss.sum().backward()
        gfast.unlearn_loss(logits * 1, labels, objective, ref_logp=ref, inplace=True).loss.backward()
    gfast.token_logp(logits, labels).sum().backward()
    gfast.linear_token_logp(hidden, weight, labels).sum().backward()
    gfast.token_kl(logits, logits.detach() / 2, labels).backward()
    gfast.linear_token_kl(hidden, weight, hidden.detach() / 2, weight.detach(), labels).backward()
    gfast.grad_dot([logits], [logits], [0], 1)
    linear_row_dot(hidden.detach()[0], hidden.detach()[1], torch.randn(8, 8))
    gfast.empty_cache()
    with uncompiled():
        pass


def models() -> None:
    import gfast
    from gfast.objectives import RMU, WGA
    from helpers.training_tiny import FORGET_ROWS, collator, config, datasets, pairing, tiny_model

    model, (data, mixed) = tiny_model(), pairing()
    forget, retain = ([collator()([part[i] for i in range(2)])] for part in datasets(rows=FORGET_ROWS))
    for objective in (WGA(), RMU(layer=1)):
        gfast.model_loss(model, forget[0], objective).loss.backward()
    gfast.model_logp(model, forget[0])
    for engine in ENGINES:
        gfast.g_effect(model, WGA(), forget=forget, retain=retain, engine=engine)
    gfast.pg_effect(model, forget=forget, retain=retain)
    gfast.token_effect(model, forget=forget, retain=retain)
    gfast.gram_effect(model, forget=forget[0], retain=retain[0])
    with tempfile.TemporaryDirectory() as folder:
        trainer = gfast.UnlearnTrainer(model=model, args=config(folder), train_dataset=data, data_collator=mixed)
        trainer.add_callback(gfast.GEffectCallback(1, forget, retain, WGA()))
        trainer.train()


if __name__ == "__main__":
    builtins.__import__ = recording_import
    {"ops": ops, "models": models}[sys.argv[1]]()
    print([name for name in COMPILER if name in sys.modules])
    print(sorted(importers))
