# SPDX-License-Identifier: Apache-2.0
"""Training: the trainer, the G-effect callback, the reference cache and the records of a run."""

from __future__ import annotations

import importlib
from typing import Any

_WHERE = {
    "GEffectCallback": "callback",
    "NLLCallback": "trajectory",
    "ReferenceCache": "reference",
    "StopCallback": "stop",
    "UnlearnConfig": "config",
    "UnlearnTrainer": "trainer",
    "read_records": "records",
    "read_run_info": "records",
    "write_record": "records",
    "write_run_info": "records",
}
__all__ = [*_WHERE]


def __getattr__(name: str) -> Any:
    # transformers and pyarrow load when a name is used, so that `import gfast` stays light.
    if name in _WHERE:
        return getattr(importlib.import_module(f"gfast.training.{_WHERE[name]}"), name)
    raise AttributeError(f"module 'gfast.training' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *__all__]
