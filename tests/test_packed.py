"""Several texts in a row: which are pairs, and masks that number them."""

from __future__ import annotations

import pytest
import torch
from helpers.geffect_models import VOCAB, tiny

import gfast
from gfast.objectives import DPO, GA, NPO, SimNPO

LENGTHS = (5, 7, 6, 4, 8, 5)  # of three forget answers and then the three preferred ones
MODEL = tiny("llama").double()


def texts(lost=()):
    """(ids, labels, reference log-probs) of each; those that are lost have no label."""
    draw = torch.Generator().manual_seed(0)
    for number, length in enumerate(LENGTHS):
        ids = torch.randint(1, VOCAB, (length,), generator=draw)
        labels = torch.full_like(ids, -100) if number in lost else torch.cat([ids.new_full((2,), -100), ids[2:]])
        yield ids, labels, -torch.rand(length, generator=draw, dtype=torch.float64)


def packed(rows, lost=(), width=None):
    """The texts one after another in rows, each padded on the right to one width."""
    columns = {"input_ids": 0, "labels": -100, "ref_logp": 0, "position_ids": 0, "attention_mask": 0}
    found = {key: [] for key in columns}
    each = list(texts(lost))
    width = width or max(sum(LENGTHS[i] for i in row) for row in rows)
    for row in rows:
        ids, labels, ref = (torch.cat([each[i][k] for i in row]) for k in range(3))
        places = torch.cat([torch.arange(LENGTHS[i]) for i in row])
        for (key, pad), value in zip(columns.items(), (ids, labels, ref, places, torch.ones_like(ids)), strict=True):
            found[key].append(torch.nn.functional.pad(value, (0, width - len(value)), value=pad))
    batch = {key: torch.stack(value) for key, value in found.items()}
    numbers = [torch.cat([torch.full((LENGTHS[i],), i + 1) for i in row]) for row in rows]
    numbers = torch.stack([torch.nn.functional.pad(n, (0, width - len(n))) for n in numbers])
    sees = numbers[:, :, None] == numbers[:, None, :]
    batch["attention_mask"] = sees.tril()[:, None]  # [B, 1, T, T]
    return batch, numbers


def apart(lost=()):
    """Every text a row of its own."""
    return packed([[i] for i in range(len(LENGTHS))], lost)[0]


def value(batch, objective):
    return float(gfast.model_loss(MODEL, batch, objective).loss.detach())


@pytest.mark.parametrize("lost", [(), (1, 4), (2, 5), (0, 3)])
@pytest.mark.parametrize("rows", [[[0, 1, 2, 3, 4, 5]], [[0, 1], [2, 3], [4, 5]], [[0, 1, 2], [3, 4, 5]]], ids=len)
@pytest.mark.parametrize("width", [None, 41])
def test_pairs_keep_their_places_without_labels(lost, rows, width):
    """A pair that lost its labels is left out, and the others stay pairs."""
    expected = value(apart(lost), DPO(0.5))
    assert value(packed(rows, lost, width)[0], DPO(0.5)) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("lost", [(0, 5), (1, 3), (2, 4, 0, 5)])
@pytest.mark.parametrize("rows", [[[0, 1, 2, 3, 4, 5]], [[0, 1], [2, 3], [4, 5]]], ids=len)
def test_answers_to_different_questions_are_no_pair(lost, rows):
    """As many answers on both sides, but not the same ones: they were paired in their order."""
    with pytest.raises(ValueError, match="one half has no label"):
        value(packed(rows, lost)[0], DPO(0.5))


def test_a_text_too_few_is_no_pair():
    with pytest.raises(ValueError, match="an even number of texts"):
        value(packed([[0, 1, 2, 3, 4]])[0], DPO(0.5))


@pytest.mark.parametrize("objective", [NPO(0.5), SimNPO(1.0), GA()], ids=str)
def test_masks_that_number_texts(objective):
    """A mask [B, T] of 1, 2, ... says where texts begin, as one of ones does not."""
    batch, numbers = packed([[0, 1, 2], [3, 4, 5]], width=20)
    batch["position_ids"] = torch.arange(20).expand(2, -1)
    batch["attention_mask"] = numbers.clamp(max=1)
    named = {**batch, "sequence_id": numbers}
    assert value({**batch, "attention_mask": numbers}, objective) == pytest.approx(value(named, objective), rel=1e-10)
    if objective != GA():
        assert value(batch, objective) != pytest.approx(value(named, objective), rel=1e-3)


def test_numbers_that_begin_anew_in_every_row_are_named():
    """Texts of two rows would be one: a model sees none across rows."""
    batch, numbers = packed([[0, 1, 2], [3, 4, 5]])
    anew = torch.where(numbers > 3, numbers - 3, numbers)
    with pytest.raises(ValueError, match="a text in row 0 and one in row 1 alike"):
        value({**batch, "sequence_id": anew}, NPO(0.5))
    named = torch.where(batch["labels"] != -100, numbers, 0)  # prompts and padding have a number of their own
    for objective in (NPO(0.5), DPO(0.5)):
        assert value({**batch, "sequence_id": named}, objective) == pytest.approx(value(batch, objective), rel=1e-10)


@pytest.mark.parametrize("engine", ["sample", "gram", "token"])
@pytest.mark.parametrize("width", [35, 40])
@pytest.mark.parametrize("lost", [(1,), (0, 4), (2, 5)])
def test_effects_of_pairs_keep_their_places_without_labels(lost, width, engine):
    """Also of an odd number of tokens, and over the number of pairs that are scored."""
    forget, retain = apart(), apart((0, 1, 2))
    effects = [
        gfast.g_effect(MODEL, DPO(0.5), forget=forget, retain=retain, objective_batches=pairs, engine=engine)
        for pairs in (packed([range(6)], lost, width)[0], apart(lost))
    ]
    for side in ("unlearn", "retain"):
        found, expected = (effect.total(side) for effect in effects)
        assert found == pytest.approx(expected, rel=1e-6)


def test_pairs_that_are_counted():
    for lost, pairs in (((), 3), ((1,), 3), ((0, 4), 3), ((1, 4), 2), ((0, 1, 3), 2)):
        for batch in (packed([range(6)], lost)[0], packed([[0, 1, 2], [3, 4, 5]], lost)[0], apart(lost)):
            assert gfast.packed.count(DPO(), batch) == pairs


def test_rows_of_pairs_stay_rows_whatever_their_positions():
    """Padding on the left has positions of its own, and a row of one token has nothing that is scored."""
    ids = torch.tensor([[5, 6, 7], [0, 0, 8], [9, 10, 11], [12, 13, 14], [15, 16, 17], [0, 0, 18]])
    mask = (ids > 0).long()
    labels = torch.where(mask.cumsum(1) > 1, ids, -100)
    ref = torch.linspace(-6, -1, ids.numel(), dtype=torch.float64).view(ids.shape)
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels, "ref_logp": ref}
    positions = (mask.cumsum(1) - 1).masked_fill(mask == 0, 1)
    expected = gfast.model_loss(MODEL, batch, DPO(0.5))
    found = gfast.model_loss(MODEL, {**batch, "position_ids": positions}, DPO(0.5))
    torch.testing.assert_close(found.logp, expected.logp, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found.loss, expected.loss, rtol=1e-9, atol=1e-12)
