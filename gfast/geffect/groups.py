"""Layer groups: which parameter's gradient counts towards which part of a G-effect."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from gfast import hf
from gfast.wrappers import unwrap_name

_RUNS = ("shallow", "middle", "deep")
_FIXED_ORDER = {"embed": 0, "embed+lm": 1, "shallow": 2, "middle": 3, "deep": 4, "lm": 10**6, "total": 10**7}


@dataclass(frozen=True)
class GroupMap:
    """Group names in order from the model's input to its output, and the group index of every trainable parameter.

    `names` holds only groups that have a trainable parameter; `index` maps names of `model.named_parameters()` to
    positions in `names`, in the model's order.
    """

    names: list[str]
    index: dict[str, int]

    def named(self, values: Tensor) -> dict[str, float]:
        """Values [G] by the groups' names."""
        return dict(zip(self.names, values.tolist(), strict=True))


def assign(model: nn.Module, groups: str | Callable[[str], str] = "paper") -> GroupMap:
    """Put every trainable parameter of `model` into exactly one group.

    With L blocks, units 1 to L are the blocks and unit L + 1 is what comes after them (the final norm). What comes
    before them is embed: position embeddings, embedding norms, vision towers and their projectors.

    Args:
        model: a Hugging Face causal language model, possibly wrapped.
        groups: "paper": embed, shallow, middle, deep, lm, where the three runs are equal: 0-based unit u is in run
            floor(3u / (L + 1)). "layer": embed, layer_1 ... layer_{L+1}, lm. Or a function from a parameter's name,
            without wrapper prefixes, to the name of its group. A matrix shared by embeddings and head is `embed+lm`.

    Returns:
        GroupMap.

    Raises:
        ValueError: no trainable parameter, one that belongs to no part of the model (named), an unknown grouping, or a
            function that returns something else than a non-empty string.

    Source: arXiv 2502.19301, section 3 (for L = 32: units 1-11, 12-22, 23-33).

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=2,
        ...                      num_attention_heads=2)
        >>> assign(LlamaForCausalLM(config)).names
        ['embed', 'shallow', 'middle', 'deep', 'lm']
    """
    if callable(groups):
        named = {name: groups(unwrap_name(name)) for name, p in model.named_parameters() if p.requires_grad}
        for name, group in named.items():
            if not isinstance(group, str) or not group:
                raise ValueError(f"gfast: groups({unwrap_name(name)!r}) returned {group!r}; a group name is needed")
        names = list(dict.fromkeys(named.values()))
    elif groups in ("paper", "layer"):
        count = hf.num_layers(model) + 1
        unit_names = [_RUNS[3 * unit // count] if groups == "paper" else f"layer_{unit + 1}" for unit in range(count)]
        order = ["embed", "embed+lm", *dict.fromkeys(unit_names), "lm"]
        units = hf.parameter_units(model)
        named = {name: unit if isinstance(unit, str) else unit_names[unit] for name, unit in units.items()}
        names = [group for group in order if group in set(named.values())]
    else:
        raise ValueError(
            f'gfast: groups must be "paper", "layer" or a function from parameter name to group, not {groups!r}'
        )
    if "total" in names:
        raise ValueError('gfast: no group can be called "total": results use that name for the sum over groups')
    if not named:
        raise ValueError(
            "gfast: the model has no trainable parameter: a gradient effect needs at least one requires_grad"
        )
    position = {group: index for index, group in enumerate(names)}
    return GroupMap(names, {name: position[group] for name, group in named.items()})


def depth(group: str) -> tuple[float, str]:
    """Sorts names of groups from the model's input to its output, where only the names are known."""
    if group in _FIXED_ORDER:
        return (_FIXED_ORDER[group], group)
    number = re.search(r"\d+", group)
    return (100 + int(number.group()) if number else 99, group)
