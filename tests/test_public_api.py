"""Public names: they load, their docstrings are complete, their examples run, and importing gfast stays light."""

import doctest
import importlib
import inspect
import subprocess
import sys

import pytest

import gfast
from gfast import objectives

OPS = [name for name in gfast.__all__ if inspect.isfunction(getattr(gfast, name))]
CLASSES = [name for name in gfast.__all__ if name not in OPS]


@pytest.mark.parametrize("name", gfast.__all__)
def test_every_public_name_is_documented(name):
    text = inspect.getdoc(getattr(gfast, name)) or ""
    assert len(text) > 80, f"gfast.{name} has no docstring worth the name"
    if name in OPS:
        for part in ("Args:", "Returns:", "Raises:", "Source:", "Example:"):
            assert part in text, f"gfast.{name}: the docstring has no {part!r} section"


@pytest.mark.parametrize("name", [*OPS, *(f"objectives.{cls.__name__}" for cls in objectives.REGISTRY.values())])
def test_the_examples_run(name):
    value = gfast
    for part in name.split("."):
        value = getattr(value, part) if part != "objectives" else objectives
    module = importlib.import_module(value.__module__)
    tests = doctest.DocTestFinder(recurse=False).find(value, name, globs=vars(module).copy())
    assert any(test.examples for test in tests), f"{name} has no runnable example"
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
    for test in tests:
        runner.run(test)
    assert runner.failures == 0


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'unlearn'"):
        gfast.unlearn  # noqa: B018


def test_importing_gfast_loads_torch_and_nothing_heavier():
    heavy = ("transformers", "datasets", "pandas", "matplotlib", "triton", "gfast._C", "pyarrow")
    code = f"import gfast, sys; print([m for m in {heavy} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]", f"import gfast also imported {out.stdout}"


def test_parts_are_there_by_their_full_names():
    """As the pages write them, in a process that has imported gfast alone."""
    names = "geffect.EffectHistory", "geffect.Effect", "geffect.retain_conflict", "metrics.load_log", "deferred"
    names = ", ".join(f"gfast.{name}" for name in (*names, "data.PreferenceDataset", "training.NLLCallback"))
    subprocess.run([sys.executable, "-c", f"import gfast; {names}"], check=True)
