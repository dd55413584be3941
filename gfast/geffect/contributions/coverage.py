"""Uses of parameters that no hook sees: an error that names the parameter, never a gap.

While a module with parameters of its own is called, constants stand in their place (`layers.Watch`): its hooks tell
what they get. So the graph that a forward leaves leads to a parameter only by another use, be it a product outside of
the module's call or a view that was made before the pass, and what autograd takes for no use is none here either.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor
from torch.autograd.function import BackwardCFunction


def _nodes(output: Tensor) -> Iterator[Any]:
    """The nodes of the graph that an output has left."""
    todo, seen = [output.grad_fn], {None}
    while todo:
        node = todo.pop()
        if node not in seen:
            seen.add(node)
            yield node
            todo.extend(next_node for next_node, _ in node.next_functions)


def repeatable(output: Tensor) -> bool:
    """Whether a second backward through the graph is as good as the first: all of it is PyTorch's own.

    Functions that others wrote may overwrite in their backward what they had saved, as fused activations do.
    """
    return not any(
        isinstance(node, BackwardCFunction) or type(node).__name__ == "CppFunction" for node in _nodes(output)
    )


def check_graph(output: Tensor, names: Mapping[int, str], engine: str) -> None:
    """ValueError if the output's graph leads to a trainable parameter; names: of each, by its id."""
    for reader in _nodes(output):
        for node, _ in reader.next_functions:
            name = names.get(id(getattr(node, "variable", None)))
            if name is not None:
                raise ValueError(
                    f"gfast: the {engine} engine cannot attribute the trainable parameter {name!r}: {reader.name()} "
                    f"reads it outside the call of its own module, or a view or product of it that was made before the "
                    f"pass, where no hook sees what that adds to its gradient. Freeze it with requires_grad_(False), "
                    f"or use engine='stream' or 'token', which see every use in the pass"
                )
