"""Models that are not transformers': a module with hidden(batch) and head goes through losses and gradient effects."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn

import gfast
from gfast import hf
from gfast.objectives import GA, KL, NPO, RMU, WGA

V, D = 23, 8


class Decoder(nn.Module):
    """As torchtune lays its models out: embeddings, layers, a norm, an output projection; tokens by another name."""

    def __init__(self, head=None):
        super().__init__()
        self.tok_embeddings, self.layers = nn.Embedding(V, D), nn.ModuleList(nn.Linear(D, D) for _ in range(2))
        self.norm, self.head = nn.LayerNorm(D), head or nn.Linear(D, V, bias=False)

    def hidden(self, batch):
        assert not {"labels", "ref_logp", "sample_id"} & set(batch)
        x = self.tok_embeddings(batch["input_ids"])
        for layer in self.layers:
            x = x + torch.tanh(layer(x).cumsum(1))
        return self.norm(x)

    def forward(self, batch):
        return self.head(self.hidden(batch))


def batch(seed=0):
    ids = torch.randint(0, V, (3, 7), generator=torch.Generator().manual_seed(seed))
    labels = ids.clone()
    labels[:, :2] = -100
    return {"input_ids": ids, "labels": labels}


def plain_wga(model, one):
    logp = torch.log_softmax(model({"input_ids": one["input_ids"]})[:, :-1].double(), -1)
    target = one["labels"][:, 1:]
    logp = logp.gather(-1, target.clamp(min=0)[..., None])[..., 0][target != -100]
    return (logp.exp().detach() * logp).mean()


def by_name(name):
    return "head" if name.startswith("head") else "body"


@pytest.mark.parametrize("head", ["linear", "sequential", "hooked", "hooked backward"])
def test_a_loss_is_that_of_its_own_logits(head, caplog):
    torch.manual_seed(0)
    hf._log_materialised.cache_clear()
    model = Decoder(nn.Sequential(nn.Linear(D, V), nn.Tanh()) if head == "sequential" else None)
    if head == "hooked":
        model.head.register_forward_hook(lambda module, args, out: out * 2)
    if head == "hooked backward":
        model.head.register_full_backward_hook(lambda module, grads, _: (2 * grads[0],))
    with caplog.at_level(logging.WARNING, "gfast"):
        loss = gfast.model_loss(model, batch(), WGA(1.0)).loss
    assert bool(caplog.records) == (head != "linear")
    found = torch.autograd.grad(loss, list(model.parameters()))
    expected = plain_wga(model, batch())
    wanted = torch.autograd.grad(expected, list(model.parameters()))
    torch.testing.assert_close(loss.double(), expected)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_the_original_is_given_as_for_other_models():
    torch.manual_seed(0)
    model, one = Decoder(), batch()
    with torch.no_grad():
        ref = gfast.model_logp(model, one)
    assert gfast.model_loss(model, one, NPO(0.1), ref_logp=ref).loss.item() == pytest.approx(13.8629, rel=1e-4)
    with torch.no_grad():
        given = {"ref_hidden": model.hidden({"input_ids": one["input_ids"]}), "ref_head": model.head.weight}
    assert gfast.model_loss(model, {**one, **given}, KL()).loss.item() == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("engine", ["stream", "token"])
def test_an_effect_is_the_dot_product_of_gradients(engine):
    torch.manual_seed(0)
    model, forget, retain = Decoder(), batch(1), batch(2)
    found = gfast.g_effect(model, GA(), forget=[forget], retain=[retain], groups=by_name, engine=engine)

    def gradient(one):
        logp = torch.log_softmax(model({"input_ids": one["input_ids"]})[:, :-1], -1)
        target = one["labels"][:, 1:]
        nll = -logp.gather(-1, target.clamp(min=0)[..., None])[..., 0][target != -100].mean()
        return dict(
            zip(dict(model.named_parameters()), torch.autograd.grad(nll, list(model.parameters())), strict=True)
        )

    own, other = gradient(forget), gradient(retain)
    for group in ("head", "body"):
        dot = sum(float((own[n].double() * other[n].double()).sum()) for n in own if by_name(n) == group)
        assert found.retain[group] == pytest.approx(-dot, rel=1e-4)


def test_what_such_a_model_does_not_say_is_refused():
    model, one = Decoder(), batch()
    with pytest.raises(ValueError, match="hidden\\(batch\\) -> \\[B, T, D\\], a module head"):
        gfast.model_loss(nn.Linear(2, 2), one, GA())
    with pytest.raises(ValueError, match="groups=callable"):
        gfast.g_effect(model, GA(), forget=[one], retain=[one])
    with pytest.raises(ValueError, match="found no transformers model inside Decoder"):
        gfast.model_loss(model, one, RMU(layer=1))
    with pytest.raises(ValueError, match="computes no loss of its own"):
        gfast.model_loss(model, one, GA(), own_terms=1.0)

    class Short(Decoder):
        def hidden(self, batch):
            return super().hidden(batch)[:, 1:]

    with pytest.raises(ValueError, match=r"Short.hidden\(batch\) must give hidden states .* it gave \(3, 6, 8\)"):
        gfast.model_loss(Short(), one, GA())
