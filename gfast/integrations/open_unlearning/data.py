# SPDX-License-Identifier: Apache-2.0
"""open-unlearning's data sets as gfast takes them: the same item at every access, with an id, collated by lengths."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from gfast.data import Collator, ForgetRetain, ForgetRetainCollator

# Ids of the preferred answers of pairs start here, so that they never meet those of the forget answers.
PREFERRED = 1 << 40


class Items:
    """A data set of open-unlearning's with gfast's items: input_ids, labels, and its `index` as `sample_id`.

    What it draws for an item, such as a refusal in the place of an answer, is the same at every access: a function of
    (seed, index). Items of two answers ("original", "alternate") become pairs where the objective takes them.

    The first `skipped` labels of an item are ignored.

    Errors: ValueError for items that the objective cannot take, by what they hold.
    """

    def __init__(self, data: Any, name: str, seed: int = 0, pairs: bool = False, skipped: int = 0) -> None:
        self.data, self.name, self.seed, self.pairs, self.skipped = data, name, seed, pairs, skipped

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> dict[str, Any]:
        from gfast.data.dataset import seeded

        if not 0 <= index < len(self):
            raise IndexError(index)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seeded(self.seed, index).initial_seed())
            item = self.data[index]
        return self.item(item, index)

    def item(self, item: Mapping[Any, Any], index: int) -> dict[str, Any]:
        """One item, at a position of the data set."""
        if self.pairs:
            if not {"original", "alternate"} <= set(item):
                raise ValueError(
                    f"DPO needs pairs: items of the {self.name} set with an original and an alternate answer, as "
                    f"QAwithIdkDataset and QAwithAlternateDataset give them (experiment=unlearn/tofu/idk); these have "
                    f"{', '.join(map(str, item))}"
                )
            rejected = self._single(item["original"], index)
            preferred = self._single(item["alternate"], index) | {"sample_id": PREFERRED + rejected["sample_id"]}
            return rejected | {f"preferred_{key}": value for key, value in preferred.items()}
        return self._single(item, index)

    def _single(self, item: Mapping[Any, Any], index: int) -> dict[str, Any]:
        lacking = [key for key in ("input_ids", "labels") if key not in item]
        if lacking:
            held = ", ".join(map(str, item))
            hint = (
                "give the one answer to be forgotten"
                if all(isinstance(key, int) for key in item)
                else ("use GFastDPO, or return_original: false" if "original" in item else "it is no data for training")
            )
            raise ValueError(f"an item of the {self.name} set holds {held} and no {lacking[0]}: {hint}")
        labels, ids = (torch.as_tensor(item[key]) for key in ("labels", "input_ids"))
        if labels.shape != ids.shape:
            raise ValueError(
                f"item {index} of the {self.name} set has {len(ids)} input_ids and {len(labels)} labels, as "
                f"predict_with_generate makes it: that is data for evaluation"
            )
        if self.skipped:
            valid = labels != -100
            labels = labels.masked_fill(valid & (valid.cumsum(0) <= self.skipped), -100)
        number = int(item.get("index", -1))
        return {"input_ids": ids, "labels": labels, "sample_id": number if number >= 0 else index}


class Chosen:
    """Some items of a data set, in the order of their indices."""

    def __init__(self, data: Any, indices: Sequence[int]) -> None:
        self.data, self.indices = data, sorted(set(indices))

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Any:
        return self.data[self.indices[index]]


class RetainAnchored(ForgetRetain):
    """Every retain item with one forget item (anchor: retain)."""

    def __init__(self, forget: Any, retain: Any, seed: int = 0) -> None:
        super().__init__(retain, forget, seed)

    def __getitem__(self, index: int) -> dict[str, Any]:
        item = super().__getitem__(index)
        return {"forget": item["retain"], "retain": item["forget"]}


class PlainOrPairs:
    """Collates items of both sides, or of one; evaluation data of open-unlearning's own as well."""

    def __init__(self, tokenizer: Any) -> None:
        self.one = Collator(tokenizer)
        self.both = ForgetRetainCollator(self.one)

    def __call__(self, items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        if "forget" in items[0]:
            return self.both(items)
        evaluated = Items(items, "evaluation")
        return self.one([item if "sample_id" in item else evaluated.item(item, i) for i, item in enumerate(items)])


def paired(data: Any, seed: int, pairs: bool, both: bool, skipped: int = 0) -> tuple[Any, dict[str, Items]]:
    """The training set and its sides, from open-unlearning's ForgetRetainDataset or a plain data set (to be forgotten).

    Partners are a function of (seed, epoch, index), the same for any number of processes. both: the objective has a
    retain term. skipped: first labels of each forget item that are ignored.
    """
    if data is None:
        return None, {}
    forget, retain = (getattr(data, side, None) for side in ("forget", "retain"))
    if forget is None and not hasattr(data, "anchor"):
        side = Items(data, "forget", seed, pairs, skipped)
        return side, {"forget": side}
    if not forget:
        raise ValueError("the training data have no forget set, and nothing would be unlearned")
    sides = {"forget": Items(forget, "forget", seed, pairs, skipped)}
    anchor = getattr(data, "anchor", "forget")
    if retain:
        sides["retain"] = Items(retain, "retain", seed + 1)
    elif both or anchor == "retain":
        raise ValueError(
            "the training data have no retain set, which the retain loss needs; with alpha=0 there is none"
        )
    else:
        return sides["forget"], sides
    kind = {"forget": ForgetRetain, "retain": RetainAnchored}.get(anchor)
    if kind is None:
        raise ValueError(f"anchor is {anchor!r}; it can be forget or retain")
    return kind(sides["forget"], sides["retain"], seed), sides


def drawn(data: Any, sides: Mapping[str, Items], epochs: int) -> Any:
    """The retain items that a training of so many epochs draws."""
    if type(data) is not ForgetRetain:
        return sides["retain"]
    partners: set[int] = set()
    for epoch in range(epochs):
        data.set_epoch(epoch)
        partners.update(data.partners())
    data.set_epoch(0)
    return Chosen(sides["retain"], partners)
