"""ATWU's scorer beside a training: its formula in plain PyTorch, any split of a step, checkpoints, refusals."""

from __future__ import annotations

import pytest
import torch
from helpers.training_tiny import config, pairing, parameters, tiny_model
from safetensors.torch import load_file

from gfast.training.scorer import ATWU, FILE
from gfast.training.trainer import UnlearnTrainer

NUMBERS = (
    "beta=0.2,every=2,lr=0.5,momentum=0.8,weight_decay=0.01,max_norm=0.4,entropy=0.7,population=2,l2=0.1,budget=0.3"
)


def trained(folder, data=None, resume=None, **options):
    """A trainer whose training is over, and the batches that it was given."""
    seen = []
    model = tiny_model().double()
    data, collate = pairing() if data is None else data

    class Seeing(UnlearnTrainer):
        def training_step(self, model, inputs, *args, **kwargs):
            seen.append(inputs)
            return super().training_step(model, inputs, *args, **kwargs)

    defaults = dict(optim="sgd", retain_term="nll", weights=f"atwu:{NUMBERS}", max_steps=4, learning_rate=0.3)
    args = config(folder, **{**defaults, **options})
    trainer = Seeing(model, args, train_dataset=data, data_collator=collate)
    trainer.train(resume_from_checkpoint=resume)
    return trainer, seen


def by_hand(batches, beta=0.2, every=2, lr=0.5, momentum=0.8, decay=0.01, norm=0.4, steps=(0.7, 2.0, 0.1, 0.3)):
    """Model and scorer [D + 1] after gradient ascent with the scorer's weights and NLL on the retain side."""
    entropy, population, l2, budget = steps
    model = tiny_model().double()
    phi = torch.zeros(17, dtype=torch.float64)  # 16 hidden units and the bias
    velocity = None
    for step, batch in enumerate(batches):
        losses = []
        for side in ("forget", "retain"):
            part = batch[side]
            out = model(part["input_ids"], attention_mask=part["attention_mask"], output_hidden_states=True)
            logp = out.logits[:, :-1].log_softmax(-1)
            label = part["labels"][:, 1:]
            scored = label != -100
            logp = logp.gather(-1, label.clamp(min=0)[..., None])[..., 0]  # [B, T - 1]
            if side == "retain":
                losses.append(-logp[scored].mean())
                continue
            hidden = out.hidden_states[-1][:, 1:].detach()  # of the token that is scored
            with torch.no_grad():
                g = (hidden @ phi[:16] + phi[16]).sigmoid()
                weight = g * torch.exp(beta * g * logp)
            losses.append((weight * logp)[scored].sum() / scored.sum())
            before = phi.clone().requires_grad_()
            g = (hidden @ before[:16] + before[16]).sigmoid()
            loss = ((1 - g) * -logp.detach())[scored].mean()
            loss = loss - entropy * (g * g.log() + (1 - g) * (1 - g).log())[scored].mean()
            for row, mask in zip(g, scored, strict=True):
                hard = (row[mask] > 0.5).double()
                share = (hard + row[mask] - row[mask].detach()).mean()
                loss = loss + population * (share - budget) ** 2 / len(g)
            loss = loss + l2 * (before**2).sum()
        model.zero_grad()
        sum(losses).backward()
        with torch.no_grad():
            for p in model.parameters():
                p -= 0.3 * p.grad
        if (step + 1) % every == 0:
            (grad,) = torch.autograd.grad(loss, before)
            grad = grad * min(1.0, norm / (float(grad.norm()) + 1e-6)) + decay * phi
            velocity = grad if velocity is None else momentum * velocity + grad
            phi = phi - lr * velocity
    return model, phi


def scorer_of(trainer):
    weights = trainer.token_weights
    return torch.cat([weights.phi.detach(), weights.bias.detach()])


def same(model, other):
    for (name, one), two in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-11, msg=lambda text, n=name: f"{n}: {text}")


def test_it_is_the_formula(tmp_path):
    trainer, seen = trained(tmp_path)
    model, phi = by_hand(seen)
    same(trainer.model, model)
    torch.testing.assert_close(scorer_of(trainer), phi, rtol=1e-9, atol=1e-12)
    assert float(phi.abs().max()) > 0.1 and trainer.token_weights._optimizer.state  # it has learned
    saved = load_file(tmp_path / FILE)
    assert torch.equal(torch.cat([saved["phi"], saved["bias"]]), scorer_of(trainer))


@pytest.mark.parametrize(
    "options",
    [
        {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2},
        {"joint_forward": True},
        {"geffect_live_unlearn": True},
        {"surgery": "pcgrad:tensor", "retain_term": "none"},
    ],
    ids=str,
)
def test_other_ways_through_a_step_are_the_same(tmp_path, options):
    more = {key: value for key, value in options.items() if key in ("surgery", "retain_term")}
    one, other = trained(tmp_path / "one", **more)[0], trained(tmp_path / "other", **options)[0]
    same(other.model, one.model)
    torch.testing.assert_close(scorer_of(other), scorer_of(one), rtol=1e-9, atol=1e-12)


def test_a_run_goes_on_with_its_scorer(tmp_path):
    options = dict(max_steps=5, save_strategy="steps", save_steps=2)
    whole = trained(tmp_path / "whole", **options)[0]
    again = trained(tmp_path / "whole", resume=str(tmp_path / "whole" / "checkpoint-2"), **options)[0]
    for name, value in parameters(whole.model).items():
        assert torch.equal(value, parameters(again.model)[name]), name
    assert torch.equal(scorer_of(whole), scorer_of(again))
    with pytest.raises(ValueError, match="has no scorer.safetensors"):
        again.token_weights.load(str(tmp_path))


def test_texts_of_a_packed_row_are_texts(tmp_path):
    """Their shares are each one's own, and their weights those of rows."""
    data, collate = pairing()
    batch = collate([data[0], data[1]])["forget"]
    trainer = UnlearnTrainer(
        tiny_model().double(), config(tmp_path, weights="atwu:every=1"), train_dataset=data, data_collator=collate
    )
    from gfast.model_output import model_output

    lengths = batch["attention_mask"].sum(1).tolist()
    row = {
        key: torch.cat([x[:n] for x, n in zip(batch[key], lengths, strict=True)])[None]
        for key in ("input_ids", "labels")
    }
    row["position_ids"] = torch.cat([torch.arange(n) for n in lengths])[None]
    answer = model_output(trainer.model, batch)
    of_row = torch.cat([x[:n] for x, n in zip(answer.value, lengths, strict=True)])[None]
    sums, weights = [], []
    for given, answered in ((batch, answer), (row, answer._replace(value=of_row))):
        trainer.token_weights.load(None)
        weight = trainer.token_weights.of(given, answered)
        weights.append(weight[given["labels"] != -100])
        sums.append(trainer.token_weights._sums)
    torch.testing.assert_close(weights[1], weights[0], rtol=1e-9, atol=0)
    torch.testing.assert_close(sums[1], sums[0], rtol=1e-9, atol=1e-12)
    assert sums[0][-1] == 2


@pytest.mark.parametrize(
    "options, said",
    [
        ({"weights": "atwu:beta"}, "'beta' should read name=number"),
        ({"weights": "atwu:betta=1"}, "has no betta; it takes beta, every"),
        ({"weights": "atwu:every=0"}, "every is 0"),
        ({"weights": "atwu:budget=1.5"}, "budget is 1.5"),
        ({"weights": "atwu:lr=0"}, "lr is 0"),
        ({"weights": "atwu", "weights_every": 5}, "weights_every is 5, and has no effect"),
        ({"weights": "retain_conflict:beta=1"}, "weights is 'retain_conflict:beta=1'"),
        ({"weights": "atwu", "own_loss_terms": True}, "own_loss_terms takes one of its own"),
        ({"weights": "atwu", "objective": "UNDIAL"}, "over the forget answers' own tokens"),
        ({"weights": "atwu", "objective": "SoftMask"}, "over the forget answers' own tokens"),
    ],
)
def test_what_it_cannot_do_is_said(tmp_path, options, said):
    data, collate = pairing()
    with pytest.raises(ValueError, match=said):
        UnlearnTrainer(tiny_model(), config(tmp_path, **options), train_dataset=data, data_collator=collate)


def test_a_model_without_hidden_states_at_its_head_is_refused(tmp_path):
    model = tiny_model()
    model.lm_head.register_forward_hook(lambda module, given, output: output + 1.0)
    data, collate = pairing()
    trainer = UnlearnTrainer(model, config(tmp_path, weights="atwu"), train_dataset=data, data_collator=collate)
    with pytest.raises(ValueError, match="computes its logits in another way"):
        trainer.train()


def test_weights_of_the_data_are_not_overwritten(tmp_path):
    data, collate = pairing()

    def weighed(items):
        batch = collate(items)
        batch["forget"]["weight"] = torch.ones(batch["forget"]["labels"].shape)
        return batch

    trainer = UnlearnTrainer(tiny_model(), config(tmp_path, weights="atwu"), train_dataset=data, data_collator=weighed)
    with pytest.raises(ValueError, match="the data has a 'weight' too"):
        trainer.train()


def test_numbers_are_read_from_words():
    assert ATWU.parse("") == ATWU() and ATWU.parse("beta=2, every=5") == ATWU(beta=2, every=5)
