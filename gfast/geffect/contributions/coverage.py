"""What an engine cannot see of a parameter's gradient: an error that names the parameter, never a gap.

While a module with parameters of its own is called, constants stand in their place (`layers.Watch`): its hooks tell
what they get. So the graph that a forward leaves leads to a parameter only by another use, be it a product outside of
the module's call or a view that was made before the pass, and what autograd takes for no use is none here either.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction

from gfast import wrappers


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
                    f"or use engine='stream' or 'token', or token_effect(...).samples() for effects of samples, which "
                    f"see every use in the pass"
                )


def refuse_gradient_hooks(model: nn.Module, names: Collection[str], engine: str) -> None:
    """ValueError for hooks that may change a gradient which the engine never has; names: of trainable parameters."""
    instead = "Remove it, or use engine='stream', whose gradients are those of a backward, hooks and all"
    for name, parameter in model.named_parameters():
        if parameter._backward_hooks and name in names:
            raise ValueError(
                f"gfast: a gradient hook on the parameter {name!r} (register_hook; a mask?) may change its gradient, "
                f"and the {engine} engine never has that. {instead}"
            )
    for path, module in model.named_modules() if engine == "token" else ():
        if wrappers.backward_hooks(module):
            raise ValueError(
                f"gfast: a backward hook on the module {path!r} ({type(module).__name__}) may change gradients, and "
                f"the token engine has no backward. {instead}"
            )
