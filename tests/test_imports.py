"""Imports inside gfast/geffect go downwards, and nowhere in gfast in a circle."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import gfast

ROOT = Path(gfast.__file__).parent
STOREYS = (
    ("results", "groups", "storage", "data", "processes", "answers"),
    ("contributions", "backward", "directions", "request", "combine"),
    ("engines",),
    ("api", "live", "conflict"),
)


def modules() -> dict[str, ast.Module]:
    found = {}
    for path in ROOT.rglob("*.py"):
        name = ".".join(("gfast", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__")
        if not name.startswith("gfast.kernels"):
            found[name] = ast.parse(path.read_text())
    return found


def imported(name: str, tree: ast.Module, known: set[str]) -> set[str]:
    """Modules of gfast that this one imports, inside functions too, but not for type checkers alone."""
    typing = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and getattr(block.test, "id", "") == "TYPE_CHECKING"
        for node in ast.walk(block)
    }
    names = set()
    for node in ast.walk(tree):
        if id(node) in typing:
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                submodule = f"{node.module}.{alias.name}"
                names.add(submodule if submodule in known else node.module)
    return {one for one in names if one in known and one != name}


def storey(name: str) -> int | None:
    parts = name.split(".")
    if parts[:2] != ["gfast", "geffect"] or len(parts) < 3:
        return None
    (level,) = [i for i, members in enumerate(STOREYS) if parts[2] in members]
    return level


def test_imports_go_downwards_and_in_no_circle():
    trees = modules()
    graph = {name: imported(name, tree, set(trees)) for name, tree in trees.items()}
    upwards = [
        f"{name} imports {other}"
        for name, others in graph.items()
        for other in others
        if storey(name) is not None and (other == "gfast.geffect" or (storey(other) or 0) > storey(name))
    ]
    assert not upwards, upwards
    # gfast itself names everything, when it is asked for it
    lazy = {name: others - {"gfast"} for name, others in graph.items() if name != "gfast"}
    assert list(TopologicalSorter(lazy).static_order())  # raises CycleError with the modules of a circle
