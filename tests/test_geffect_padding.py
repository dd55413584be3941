"""Padding to a fixed width: engines measure as if it were not there, and in as little time."""

import pytest
import torch

from gfast import g_effect, gram_effect, pg_effect, token_effect
from gfast.geffect.data import trimmed
from gfast.objectives import TNPO

transformers = pytest.importorskip("transformers")
WIDTH = 40


def batch(rows: int, tokens: int, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 32, (rows, tokens), generator=generator)
    mask = (torch.arange(tokens) < torch.tensor([[tokens], [tokens - 4]]).repeat(rows, 1)[:rows]).long()
    labels = torch.where(mask == 1, ids, -100)
    return {"input_ids": ids * mask, "attention_mask": mask, "labels": labels, "ref_logp": -torch.rand(rows, tokens)}


def padded(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    fill = {"labels": -100}
    extra = WIDTH - batch["labels"].shape[1]
    return {k: torch.nn.functional.pad(v, (0, extra), value=fill.get(k, 0)) for k, v in batch.items()}


def model(**options):
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, **options
    )
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config)


def measured(way: str, network, **data):
    if way == "gram_effect":
        return gram_effect(network, **data)
    if way in ("pg_effect", "token_effect"):
        return (pg_effect if way == "pg_effect" else token_effect)(network, **data)
    return g_effect(network, TNPO(), engine=way, **data)


@pytest.mark.parametrize("way", ["stream", "sample", "gram", "token", "gram_effect", "pg_effect", "token_effect"])
def test_no_bit_and_no_column_more(way):
    network, forget, retain = model(), batch(3, 12, 0), batch(2, 9, 1)
    expected = measured(way, network, forget=forget, retain=retain).rows()
    widths = set()
    handle = network.model.embed_tokens.register_forward_hook(lambda module, args, out: widths.add(out.shape[1]))
    found = measured(way, network, forget=padded(forget), retain=padded(retain)).rows()
    handle.remove()
    assert found == expected and widths == {12, 9}


def test_what_is_cut():
    whole = batch(3, 12, 0) | {"ref_hidden": torch.zeros(3, 12, 5), "name": "x"}
    wide = padded({k: v for k, v in whole.items() if k in batch(1, 5, 0)})
    wide |= {"ref_hidden": torch.zeros(3, WIDTH, 5), "position_ids": torch.arange(WIDTH)[None], "name": "x"}
    wide["sample_id"] = torch.arange(3)
    found = trimmed(wide)
    assert {k: tuple(v.shape) for k, v in found.items() if isinstance(v, torch.Tensor)} == {
        **dict.fromkeys(("input_ids", "attention_mask", "labels", "ref_logp"), (3, 12)),
        "ref_hidden": (3, 12, 5),
        "position_ids": (1, 12),
        "sample_id": (3,),
    }
    assert all(torch.equal(found[k], whole[k]) for k in ("input_ids", "labels", "ref_logp")) and found["name"] == "x"
    wide["labels"][1, 20] = 3  # a label where nothing is attended to
    assert trimmed(wide)["labels"].shape == (3, 21)


def test_what_is_left_alone():
    wide = padded(batch(3, 12, 0))
    for change in (
        {"attention_mask": None},
        {"attention_mask": torch.ones(3, 1, WIDTH, WIDTH)},
        {"position_ids": torch.zeros(3, 3, WIDTH, dtype=torch.int64)},
        {"attention_mask": wide["attention_mask"].flip(1)},  # padding on the left moves positions
        {"attention_mask": torch.zeros_like(wide["attention_mask"]), "labels": torch.full((3, WIDTH), -100)},
    ):
        assert trimmed(wide | change)["labels"].shape[1] == WIDTH


def test_rotary_embeddings_that_stretch_with_the_width():
    """With NTK scaling the padding changes the model's answers: it stays."""
    parameters = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
    name = "rope_parameters" if hasattr(model().config, "rope_parameters") else "rope_scaling"
    network = model(max_position_embeddings=8, **{name: parameters})
    wide = padded(batch(2, 12, 0))
    widths = set()
    network.model.embed_tokens.register_forward_hook(lambda module, args, out: widths.add(out.shape[1]))
    gram_effect(network, forget=wide, retain=wide)
    assert widths == {WIDTH}
