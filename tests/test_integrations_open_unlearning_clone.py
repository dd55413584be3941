"""gfast's trainers beside those of a clone of open-unlearning: the same arguments, losses and gradients."""

from __future__ import annotations

import pytest
import yaml
from helpers import open_unlearning as ou
from helpers.literal_losses import LOGGED, assert_same, gradients
from helpers.training_tiny import TOKENIZER, copied, tiny_model
from test_integrations_open_unlearning import items, logged

from gfast.model_output import shifted

pytestmark = pytest.mark.skipif(ou.clone() is None, reason="set GFAST_OPEN_UNLEARNING to a clone of open-unlearning")


def test_the_stock_yaml_has_arguments_that_the_trainers_take():
    registry, found = ou.registered(), set()
    for file in (ou.clone() / "configs" / "trainer").glob("*.yaml"):
        config = yaml.safe_load(file.read_text())
        made = registry.get(f"GFast{config['handler']}")
        if made is not None and not getattr(made, "lacking", False):
            assert set(config.get("method_args") or ()) <= set(made.__doc__.replace("=", " ").split()), file
            found.add(config["handler"])
    assert found >= {"NPO", "PDU", "UNDIAL", "CEU"}


@pytest.mark.parametrize("name", ["GradAscent", "GradDiff", "NPO", "DPO", "SimNPO", "WGA", "SatImp", "CEU", "PDU"])
def test_a_batch_costs_what_it_costs_in_open_unlearning(tmp_path, name):
    """Four rows with labels at once, where nothing of theirs goes wrong: their loss and gradient, and ours."""
    start = tiny_model(seed=1)
    ours = ou.trained(name, tmp_path, copied(start), max_steps=1)
    model = copied(start)
    left = {"ignore_first_n_answer_tokens": 0} if name == "CEU" else {}  # our items have lost that label already
    theirs = ou.registered()[name](model=model, args=ou.arguments(tmp_path), processing_class=TOKENIZER, **left)
    ours.train_dataset.set_epoch(0)
    batch = getattr(ours.data_collator, "collator", ours.data_collator)(items(ours.train_dataset))
    for side in batch.values():
        side.pop("sample_id")
    if name == "DPO":
        halves = {key: value.chunk(2) for key, value in batch["forget"].items()}
        batch["forget"] = {
            which: {key: value[i] for key, value in halves.items()} for i, which in enumerate(("original", "alternate"))
        }
    if name == "PDU":  # its margins are those of the places that hold the labels, one after those that predict them
        batch["forget"]["labels"] = shifted(batch["forget"]["labels"])
    loss = theirs.compute_loss(model, batch)
    loss.backward()
    assert logged(ours)[0] == pytest.approx(loss.item(), rel=1e-5, abs=LOGGED)
    assert_same(ours.first.found, gradients(model), 1e-3)
