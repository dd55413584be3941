"""gfast.structure on small modules of plain torch: what the text of forward says, and what it refuses to guess."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from gfast import hf, structure, wrappers

SIZE, LAYERS = 4, 3


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Linear(SIZE, SIZE)

    def forward(self, x):
        return x + self.up(x)


class Body(nn.Module):
    """Names and order of registration mislead on purpose: `final_norm` is used first and `embed_norm` last."""

    def __init__(self):
        super().__init__()
        self.embed_norm = nn.LayerNorm(SIZE)
        self.tokens = nn.Embedding(5, SIZE)
        self.things = nn.ModuleList(Block() for _ in range(LAYERS))
        self.positions = nn.Embedding(9, SIZE)
        self.final_norm = nn.LayerNorm(SIZE)
        self.offset = nn.Parameter(torch.zeros(SIZE))

    def begin(self, ids):
        return self.final_norm(self.tokens(ids) + self.positions(torch.arange(ids.shape[1])))

    def forward(self, ids):
        if len(self.things) == 0:
            raise ValueError("no blocks")
        x = self.begin(ids) + self.offset
        for thing in self.things:
            x = thing(x)
        return self.embed_norm(x)


class Model(nn.Module):
    base_model_prefix = "body"

    def __init__(self, body: type[nn.Module] = Body):
        super().__init__()
        self.head = nn.Linear(SIZE, 5, bias=False)
        self.mix = nn.Linear(SIZE, SIZE, bias=False)
        self.body = body()

    def get_input_embeddings(self):
        return self.body.tokens

    def get_output_embeddings(self):
        return self.head

    def forward(self, ids):
        return self.head(self.mix(self.body(ids)))


def units(model: nn.Module) -> dict[str, str | int]:
    return hf.parameter_units(model)


def refused(body: type[nn.Module], name: str) -> None:
    with pytest.raises(ValueError, match=rf"'{name}' .* is in no part"):
        units(Model(body))


def test_use_decides_and_not_name_or_registration():
    found = units(Model())
    assert found["body.final_norm.weight"] == found["body.positions.weight"] == found["body.offset"] == "embed"
    assert found["body.embed_norm.bias"] == found["mix.weight"] == LAYERS
    assert found["head.weight"] == "lm" and found["body.tokens.weight"] == "embed"
    assert [found[f"body.things.{index}.up.bias"] for index in range(LAYERS)] == list(range(LAYERS))
    model = Model()
    assert structure.decoder(model) is model.body and structure.blocks(model) is model.body.things


def test_arguments_are_computed_before_the_call():
    class OneLine(Body):
        def stack(self, x):
            for thing in self.things:
                x = thing(x)
            return x

        def forward(self, ids):
            return self.embed_norm(self.stack(self.begin(ids) + self.offset))

    assert units(Model(OneLine)) == units(Model())


def test_methods_of_parents_are_followed():
    class Child(Body):
        def forward(self, ids):
            return super().forward(ids)

    class Grandchild(Child):
        def begin(self, ids):
            return super().begin(ids)

    assert units(Model(Grandchild)) == units(Model())


def test_what_is_read_between_the_blocks_has_no_place():
    class Between(Body):
        def forward(self, ids):
            x = self.begin(ids) + self.offset
            for thing in self.things:
                x = self.embed_norm(thing(x))
            return x

    refused(Between, "body.embed_norm.weight")


def test_what_is_read_before_and_after_has_no_place():
    class Twice(Body):
        def forward(self, ids):
            return super().forward(ids) + self.offset

    refused(Twice, "body.offset")


def test_a_mention_of_the_blocks_after_them_changes_nothing():
    class Counts(Body):
        def forward(self, ids):
            x = super().forward(ids)
            return x / len(self.things)

    class Ambiguous(Body):
        def forward(self, ids):
            x = super().forward(ids)
            for thing in self.things:
                x = thing(x)
            return x

    assert units(Model(Counts)) == units(Model())
    refused(Ambiguous, "body.embed_norm.weight")


def test_what_is_never_read_has_no_place():
    class Unread(Body):
        def __init__(self):
            super().__init__()
            self.spare = nn.LayerNorm(SIZE)

    refused(Unread, "body.spare.weight")


def test_without_the_text_of_forward_nothing_is_guessed():
    scope = {"Body": Body}
    exec("class Unseen(Body):\n    def forward(self, ids):\n        return self.embed_norm(self.things[0](ids))", scope)
    refused(scope["Unseen"], "body.offset")


def test_a_parameter_shared_by_both_sides_is_named():
    class Shared(Body):
        def __init__(self):
            super().__init__()
            self.embed_norm.weight = self.final_norm.weight

    with pytest.raises(
        ValueError, match=rf"norm.weight' .* is shared by several parts \(({LAYERS}, embed|embed, {LAYERS})\)"
    ):
        units(Model(Shared))


class Tower(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(LAYERS))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def test_a_stack_before_the_blocks_is_embed_and_one_after_them_has_no_place():
    class Sees(Model):
        def __init__(self):
            super().__init__()
            self.tower = Tower()

        def forward(self, ids, picture):
            return self.head(self.mix(self.body(ids + self.tower(picture))))

    class Continues(Sees):
        def forward(self, ids):
            return self.head(self.mix(self.tower(self.body(ids))))

    assert units(Sees())["tower.layers.2.up.weight"] == "embed"
    with pytest.raises(ValueError, match=r"'tower.layers.0.up.weight' .* is in no part"):
        units(Continues())


def test_two_lists_of_blocks_are_named_and_lists_of_plain_layers_are_none():
    class Two(Body):
        def __init__(self):
            super().__init__()
            self.others = nn.ModuleList(Block() for _ in range(2))

    class Plain(Body):
        def __init__(self):
            super().__init__()
            self.maps = nn.ModuleList(nn.Linear(SIZE, SIZE) for _ in range(LAYERS + 1))

        def forward(self, ids):
            return self.maps[0](super().forward(ids))

    with pytest.raises(ValueError, match=r"each of body.things \(3\), body.others \(2\) is a list of blocks"):
        hf.num_layers(Model(Two))
    assert hf.num_layers(Model(Plain)) == LAYERS and units(Model(Plain))["body.maps.3.bias"] == LAYERS


def test_no_list_of_blocks():
    class Flat(Body):
        def __init__(self):
            super().__init__()
            self.things = nn.Sequential(*self.things)

    with pytest.raises(ValueError, match="cannot find the decoder blocks of Model"):
        hf.num_layers(Model(Flat))


def test_compiled_in_place():
    model = Model()
    expected = units(model)
    model.body = torch.compile(model.body)
    assert structure.decoder(model) is model.body
    assert {wrappers.unwrap_name(name): unit for name, unit in units(model).items()} == expected
