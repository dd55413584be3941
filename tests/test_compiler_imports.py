"""Nothing of gfast imports torch's compiler, which takes seconds, unless something is compiled."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
ALLOWED = {
    "gfast.model_state",  # sets the compiler's stance where somebody else has imported it
    "gfast.geffect.engines.jvp",  # PyTorch's forward derivatives of some functions are Python that imports it
}


def found(what: str) -> tuple[list[str], set[str]]:
    """Which of the compiler's packages a process holds that has done ``what``, and who imported them."""
    path = os.pathsep.join([str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])])
    run = subprocess.run(
        [sys.executable, TESTS / "helpers/compiler_imports.py", what],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert run.returncode == 0, run.stderr[-4000:]
    held, importers = map(ast.literal_eval, run.stdout.splitlines()[-2:])
    return held, set(importers)


def test_no_op_imports_the_compiler():
    held, importers = found("ops")
    assert held == [] and importers == set()


@pytest.mark.slow
def test_models_engines_and_the_trainer_import_no_more_of_it_than_transformers_does():
    """transformers imports it itself, with PreTrainedModel, and every optimizer of PyTorch does when it is made."""
    _, importers = found("models")
    assert {name for name in importers if name.split(".")[0] == "gfast"} <= ALLOWED
    assert "transformers.modeling_utils" in importers or "transformers.masking_utils" in importers  # the record works
