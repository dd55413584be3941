"""Objectives against a target over the vocabulary, through model_loss and engines, by formulas of their own."""

import math

import pytest
import torch
from helpers.small_models import batch_of, gradients, tiny

import gfast
from gfast.model_output import model_output, shifted
from gfast.objectives import CEU, GA, JSD, SHRED, UNDIAL, JensUn, Mix, Unilogit
from gfast.objectives.registry import parse_objective

OBJECTIVES = [UNDIAL(3.0), CEU(), SHRED(0.4), JSD(), Unilogit(), JensUn((3, 5))]
# Two texts in each of two rows, with prompts.
PACKED = {"input_ids": torch.arange(1, 25).view(2, 12), "labels": torch.arange(1, 25).view(2, 12).clone()}
PACKED["labels"][:, [0, 1, 6, 7]] = -100
PACKED["position_ids"] = torch.tensor([[0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4, 5]]).expand(2, 12)


def logits_of(model, batch):
    given = {key: batch[key] for key in ("input_ids", "attention_mask", "position_ids") if key in batch}
    return model(**given, use_cache=False).logits


def formula(objective, z, x, labels, texts):
    """One token after the other. z: the model's logits [B, T, V]; x: the original's; labels, texts [B, T]: scored."""
    total, V = 0.0, z.shape[-1]
    where = [(b, t) for b, t in (labels != -100).nonzero().tolist()]
    by_text = {}
    for b, t in where:
        by_text.setdefault(int(texts[b, t]), []).append((b, t))
    for b, t in where:
        y, p = int(labels[b, t]), z[b, t].softmax(-1)
        own = p.detach()
        if objective.key in ("undial", "jsd"):
            q = x[b, t].clone()
            q[y] -= objective.beta if objective.key == "undial" else 0.0
            q = q.softmax(-1)
        if objective.key == "shred":
            group = by_text[int(texts[b, t])]
            low = sorted(group, key=lambda bt: x[bt].log_softmax(-1)[labels[bt]].item())
            q = x[b, t].softmax(-1)
            if (b, t) in low[: math.ceil(objective.share * len(group))]:
                q[y] = 0
                q = q / q.sum()
        if objective.key == "ceu":
            q = own.clone()
            q[y] = 0
            q = q / q.sum()
        if objective.key == "unilogit":
            q = own * (1 - 1 / V) / (1 - own[y])
            q[y] = 1 / V
            total = total + (p * (p / q).log()).sum()
        elif objective.key in ("jsd", "jensun"):
            if objective.key == "jensun":
                place = by_text[int(texts[b, t])].index((b, t))
                q = torch.nn.functional.one_hot(torch.tensor(objective.target_ids[place % 2]), V).to(p.dtype)
            m = (p + q) / 2
            total = total + 0.5 * (
                (p * (p / m).log()).sum() + torch.where(q > 0, q * (q.clamp(min=1e-300) / m).log(), 0.0).sum()
            )
        elif objective.key == "shred":
            total = total + (torch.xlogy(q, q) - q * p.log()).sum()
        else:
            total = total - (q * p.log()).sum()
    return total / len(where)


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
def test_model_loss(objective, packed, kind):
    original, moved = tiny(kind), tiny(kind)
    batch = PACKED if packed else batch_of()
    if packed and kind == "gemma2":
        return
    with torch.no_grad():
        for p in moved.parameters():
            p += 0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())).to(p)
        x = logits_of(original, batch)
    labels = shifted(batch["labels"])
    texts = torch.arange(len(labels))[:, None].expand(labels.shape)
    if packed:  # the position that scores belongs to the text of its label
        texts = texts * 2 + (torch.arange(12) >= 5)
    truth = formula(objective, logits_of(moved, batch), x, labels, texts)
    with torch.no_grad():
        ref_logp = gfast.model_logp(original, batch)
        given = {"ref_logp": ref_logp, "ref_hidden": model_output(original, batch).value}
    given["ref_head"] = original.lm_head.weight.detach()
    out = gfast.model_loss(moved, {**batch, **{key: given[key] for key in objective.needs}}, objective)
    assert out.logp is None and out.weight is None
    torch.testing.assert_close(out.loss, truth, rtol=1e-9, atol=1e-12)
    for ours, exact in zip(gradients(moved, out.loss), gradients(moved, truth), strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-7, atol=1e-11)
    if not packed and objective.needs:
        with pytest.raises(ValueError, match=f"{type(objective).__name__}.*needs 'ref_h.*ReferenceCache"):
            gfast.model_loss(moved, batch, objective)


def test_gradients_are_those_of_one_label_where_they_are_said_to_be():
    """CE-U: that of -log(1 - p); Unilogit and JensUn: their weights; also of labels that are certain or impossible."""
    z = torch.randn(4, 9, dtype=torch.float64)
    z[1, 2] += 30
    z[2, 2] -= 300
    labels = torch.tensor([2, 2, 2, -100])
    z.requires_grad_()
    others = z[:3, torch.arange(9) != 2].logsumexp(-1) - z[:3].logsumexp(-1)  # log(1 - p), with all its digits
    (expected,) = torch.autograd.grad(-others.sum(), z, retain_graph=True)
    (found,) = torch.autograd.grad(gfast.soft_target_loss(z, None, labels, beta=math.inf, reduction="sum"), z)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-13)
    logp = torch.tensor([-2.0, -1e-9, -0.0, -300.0], dtype=torch.float32, requires_grad=True)
    p = logp.detach().double().exp()
    rest = -torch.expm1(logp.detach().double())
    for objective, weight in (
        (Unilogit(), p * (p.log() - rest.log() + math.log(8))),
        (JensUn((1,)), 0.5 * p * (p.log() - torch.log1p(p))),
    ):
        value = objective.value(logp, 9)
        (found,) = torch.autograd.grad(value.sum(), logp)
        assert value.isfinite().all() and found.isfinite().all()
        torch.testing.assert_close(found[[0, 1, 3]].double(), weight[[0, 1, 3]], rtol=1e-5, atol=1e-30)


def test_the_stream_engine_measures_them_and_the_others_refuse_by_name():
    model, batch = tiny("llama").eval(), batch_of()
    with torch.no_grad():
        given = dict(ref_logp=gfast.model_logp(model, batch) - 1, ref_hidden=model_output(model, batch).value)
    batch = batch | given | {"ref_head": model.lm_head.weight.detach().clone()}
    effects = gfast.g_effect(model, OBJECTIVES, forget=batch, retain=batch, groups="layer")
    names = dict(model.named_parameters())
    (risk,) = [torch.autograd.grad(gfast.model_loss(model, batch, gfast.objectives.NLL()).loss, list(names.values()))]
    for objective, effect in zip(OBJECTIVES, effects, strict=True):
        grads = torch.autograd.grad(gfast.model_loss(model, batch, objective).loss, list(names.values()))
        total = sum((a * b).sum() for a, b in zip(risk, grads, strict=True)).item()
        assert effect.total("unlearn") == pytest.approx(total, rel=1e-4, abs=1e-9)
        for engine in ("sample", "token", "gram"):
            with pytest.raises((ValueError, TypeError), match=f"{type(objective).__name__}.*"):
                gfast.g_effect(model, objective, forget=batch, retain=batch, engine=engine)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: UNDIAL(-1.0), "beta must be >= 0"),
        (lambda: UNDIAL(math.inf), "beta must be a finite number"),
        (lambda: SHRED(0.0), "share must be in"),
        (lambda: SHRED(1.5), "share must be in"),
        (lambda: JensUn(()), "target_ids must be token ids"),
        (lambda: JensUn((1, -2)), "target_ids must be token ids"),
        (lambda: gfast.unlearn_loss(torch.zeros(2, 3), torch.tensor([0, 1]), CEU()), "soft_target_loss"),
    ],
)
def test_bad_parameters(make, message):
    with pytest.raises((ValueError, TypeError), match=f"gfast: .*{message}"):
        make()


def test_tokens_of_a_target_cross_the_command_line():
    assert (
        parse_objective("JensUn:target_ids=(2822,4623)")
        == JensUn((2822, 4623))
        == parse_objective(str(JensUn((2822, 4623))))
    )
    assert str(Mix(GA(), JSD())) == "GA() + JSD()"
    with pytest.raises(ValueError, match="JensUn needs a value for target_ids"):
        parse_objective("jensun")


@pytest.mark.parametrize("kind", ["llama", "gptj_like"])
def test_the_tokens_of_a_refusal_are_the_models(kind):
    for ids in ((61,), (3,) * 20 + (70,)):  # also those that no text is long enough for
        with pytest.raises(ValueError, match=r"JensUn\(.*target_ids must be token ids of the model, below 61"):
            gfast.model_loss(tiny(kind), batch_of(), JensUn(ids))
