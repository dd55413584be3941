"""Where the parts of a language model are, by place and use instead of by name.

The input embedding and the head are what `get_input_embeddings()` and `get_output_embeddings()` say. The *blocks* are
the one `nn.ModuleList` of composite modules in the text decoder, which is the smallest module that holds the input
embedding and such a list. Anything else (position embeddings, norms, projections, vision towers) counts by when it is
used: the modules between the model and its list of blocks are asked in the text of their `forward` whether they read it
before the blocks or after them. Neither name nor order of registration tells: BART's `layernorm_embedding`, made after
its layers, comes before them, and BigBird-Pegasus's, made likewise, comes after them, as does LFM2's `embedding_norm`.
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections.abc import Iterator
from typing import NamedTuple

from torch import nn


def decoder(model: nn.Module) -> nn.Module:
    """The text decoder: the smallest module that holds the input embedding and the blocks."""
    path = _path(model, _parts(model)[0])
    while len(path) > 1 and path[-2][0].startswith("_"):  # FSDP and torch.compile put themselves around it
        path.pop()
    return path[-1][1]


def blocks(model: nn.Module) -> nn.ModuleList:
    """The list of decoder blocks. Raises ValueError where there is none, or several that could be meant."""
    return model.get_submodule(_parts(model)[1])


def owners(model: nn.Module) -> dict[int, list[str | int]]:
    """id(parameter) -> the distinct places that hold it: "embed", "lm", the index of a block, or L after the blocks.

    A parameter that no place holds is absent.
    """
    owners: dict[int, list[str | int]] = {}

    def claim(parameter: nn.Parameter, place: str | int) -> None:
        places = owners.setdefault(id(parameter), [])
        if place not in places:
            places.append(place)

    where = _parts(model)[1]
    blocks = model.get_submodule(where)
    named = [("embed", model.get_input_embeddings()), *enumerate(blocks), ("lm", model.get_output_embeddings())]
    for place, module in named:
        for parameter in module.parameters() if module is not None else ():
            claim(parameter, place)
    settled = set(owners)
    for towards, module in _path(model, where)[:-1]:
        for name, part in [*module._parameters.items(), *module._modules.items()]:
            if part is None or name == towards:
                continue
            inside = list(part.parameters()) if isinstance(part, nn.Module) else [part]
            rest = [parameter for parameter in inside if id(parameter) not in settled]
            side = _side(type(module), name, towards) if rest else None
            if side == "after" and isinstance(part, nn.Module) and _stacks(part):
                continue  # a second stack of blocks is no final norm
            for parameter in rest if side else ():
                claim(parameter, "embed" if side == "before" else len(blocks))
    return owners


def _parts(model: nn.Module) -> tuple[str, str]:
    """The names of the text decoder and of its list of blocks."""
    embedding = model.get_input_embeddings()
    name = next((name for name, module in model.named_modules() if module is embedding), None)
    if name is None:
        raise ValueError(f"{type(model).__name__}.get_input_embeddings() is no module of the model: {embedding!r:.80}")
    while name:
        name = name.rpartition(".")[0]
        if stacks := _stacks(model.get_submodule(name)):
            break
    else:
        raise ValueError(f"cannot find the decoder blocks of {type(model).__name__}: it has no ModuleList of them")
    if len(stacks) > 1:
        described = ", ".join(f"{'.'.join(filter(None, (name, key)))} ({size})" for key, size in stacks.items())
        raise ValueError(
            f"cannot tell the decoder blocks of {type(model).__name__}: each of {described} is a list of blocks. "
            f"Group parameters by name with groups=callable"
        )
    return name, ".".join(filter(None, (name, next(iter(stacks)))))


def _stacks(module: nn.Module) -> dict[str, int]:
    """The lists of composite modules in a module, by name, with their lengths.

    Lists inside other lists are parts of blocks, and a list inside a model with a configuration of its own (a vision
    tower) is that model's.
    """
    lengths: dict[str, int] = {}

    def look(module: nn.Module, name: str) -> None:
        for key, child in module.named_children():
            inside = f"{name}.{key}" if name else key
            if isinstance(child, nn.ModuleList):
                if any(_is_composite(item) for item in child):
                    lengths[inside] = len(child)
            elif config is None or type(getattr(child, "config", config)) is type(config):
                look(child, inside)

    config = getattr(module, "config", None)
    look(module, "")
    return lengths


def _is_composite(module: nn.Module) -> bool:
    return any(True for child in module.children() for _ in child.parameters())


def _path(model: nn.Module, name: str) -> list[tuple[str | None, nn.Module]]:
    """The modules from the model down to the named one, each with the name of the next."""
    module, path = model, []
    for key in name.split(".") if name else ():
        path.append((key, module))
        module = module._modules[key]
    return [*path, (None, module)]


def _side(cls: type, name: str, towards: str) -> str | None:
    """Does `cls.forward` read the attribute `name` before or after it runs the one that leads to the blocks?

    None where it does neither or both, reads it between the blocks, or has no text to read.
    """
    reads = _reads(cls)
    ways = [(at, read.runs) for at, read in enumerate(reads) if read.name == towards]
    runs = [at for at, run in ways if run] or [at for at, _ in ways]  # len(self.layers) is no run
    uses = [(at, read.loops) for at, read in enumerate(reads) if read.name == name]
    if not runs or not uses or any(towards in loops for _, loops in uses):
        return None
    if all(at < min(runs) for at, _ in uses):
        return "before"
    return "after" if all(at > max(runs) for at, _ in uses) else None


class _Read(NamedTuple):
    """One place in the text of a `forward` that reads an attribute of `self`."""

    name: str
    loops: frozenset[str]  # the attributes that loops around this place run over
    runs: bool  # it is called or looped over here


@functools.cache
def _reads(cls: type) -> list[_Read]:
    """What `cls.forward` reads of `self`, in the order of the text, through the methods that it calls."""
    return list(_reads_of(cls, "forward", cls.__mro__, frozenset(), frozenset()))


def _reads_of(cls: type, method: str, mro: tuple, loops: frozenset, seen: frozenset) -> Iterator[_Read]:
    owner = next((base for base in mro if method in vars(base)), None)
    if owner is None or owner is nn.Module or (owner, method) in seen:
        return
    seen |= {(owner, method)}
    try:
        text = textwrap.dedent(inspect.getsource(inspect.unwrap(vars(owner)[method])))
        function = ast.parse(text).body[0]
    except (OSError, TypeError, SyntaxError):
        return  # no text: nothing is known to be read, and a parameter that this leaves without a place is an error
    if not isinstance(function, ast.FunctionDef):
        return
    this = next((argument.arg for argument in function.args.args), None)

    def visit(node: ast.AST, loops: frozenset, runs: bool = False) -> Iterator[_Read]:
        if isinstance(node, ast.Attribute):
            if isinstance(node.value, ast.Name) and node.value.id == this:
                if callable(getattr(cls, node.attr, None)):
                    yield from _reads_of(cls, node.attr, cls.__mro__, loops, seen)
                else:
                    yield _Read(node.attr, loops, runs)
            elif isinstance(node.value, ast.Call) and getattr(node.value.func, "id", None) == "super":
                after = cls.__mro__[cls.__mro__.index(owner) + 1 :]
                yield from _reads_of(cls, node.attr, after, loops, seen)
            else:
                yield from visit(node.value, loops)
        elif isinstance(node, ast.Call):  # the arguments are computed before the call
            for part in [*node.args, *node.keywords]:
                yield from visit(part, loops)
            yield from visit(node.func, loops, runs=True)
        elif isinstance(node, ast.For):
            over = [read._replace(runs=True) for read in visit(node.iter, loops)]
            yield from over
            for part in [*node.body, *node.orelse]:
                yield from visit(part, loops | {read.name for read in over})
        else:
            for part in ast.iter_child_nodes(node):
                yield from visit(part, loops)

    for statement in function.body:
        yield from visit(statement, loops)
