# SPDX-License-Identifier: Apache-2.0
"""gfast's trainers in open-unlearning: same configs, command line, data and evaluations.

``python -m gfast.integrations.open_unlearning src/train.py --config-name=unlearn.yaml ... trainer=GFastNPO`` runs its
script as it is; or ``import gfast.integrations.open_unlearning as ou; ou.register()`` as one line of that script.
"""

from __future__ import annotations

import importlib
from typing import Any

__all__ = ["CONFIGS", "register"]

# Where the YAML files are, for Hydra: hydra.searchpath=[CONFIGS]
CONFIGS = "pkg://gfast.integrations.open_unlearning.configs"


def register(replace: bool = False) -> list[str]:
    """Put gfast's trainers into open-unlearning's registry, as GFast and the method's name: GFastGradAscent, GFastNPO
    and all others of `gfast.integrations.open_unlearning.trainers.METHODS`.

    They take the arguments of open-unlearning's own, with the same defaults, and `reference`, `reference_path`,
    `geffect_every`, `geffect_samples`, `geffect_live`, `surgery`, `joint_forward` and `weights` (ATWU is
    ``trainer=GFastGradDiff`` with ``+trainer.method_args.weights=atwu``). What open-unlearning makes of its YAML's
    TrainingArguments is made so that every supported version of transformers takes it.

    Args:
        replace: take the stock names too, where open-unlearning has a trainer of that name.

    Returns:
        The names that were registered.

    Raises:
        RuntimeError: transformers older than 4.51, which gfast needs.
        ImportError: open-unlearning's `src` is not on the path.

    Source: open-unlearning, github.com/locuslab/open-unlearning.

    Example:
        >>> from gfast.integrations.open_unlearning import register
        >>> register()[:2]    # doctest: +SKIP
        ['GFastGradAscent', 'GFastGradDiff']
    """
    check_versions()
    try:
        theirs: Any = importlib.import_module("trainer")
        known = theirs.TRAINER_REGISTRY
    except (ImportError, AttributeError) as error:
        raise ImportError(
            "gfast.integrations.open_unlearning needs open-unlearning's src folder on the path, whose trainer package "
            "has a TRAINER_REGISTRY: run `python -m gfast.integrations.open_unlearning src/train.py ...` in its clone "
            f"({error})"
        ) from error
    from gfast.integrations.open_unlearning.arguments import make_load_trainer_args
    from gfast.integrations.open_unlearning.trainers import make_trainers

    made = make_trainers(theirs.FinetuneTrainer)
    names = {f"GFast{name}": cls for name, cls in made.items()}
    if replace:
        names |= {name: cls for name, cls in made.items() if name in known and not getattr(cls, "lacking", False)}
    known.update(names)
    theirs.load_trainer_args = make_load_trainer_args()
    return list(names)


def check_versions() -> None:
    """RuntimeError for a transformers that gfast does not support."""
    import transformers
    from packaging.version import Version

    if Version(transformers.__version__) < Version("4.51"):
        raise RuntimeError(
            f"transformers {transformers.__version__} is installed, as open-unlearning pins it, and gfast needs 4.51 "
            f"or newer: older ones do not tell a trainer how many tokens an optimizer step has. Install "
            f"transformers>=4.51 in an environment of its own (open-unlearning's data, models and evaluations run on "
            f"4.51.3 as they are)"
        )
