# SPDX-License-Identifier: Apache-2.0
"""python -m gfast.integrations.open_unlearning [--replace] src/train.py ...: open-unlearning's script with gfast's
trainers; --replace takes the stock names too.
"""

from __future__ import annotations

import os
import runpy
import sys

from gfast.integrations.open_unlearning import CONFIGS, register


def with_configs(arguments: list[str]) -> list[str]:
    """Hydra's overrides, with the folder of gfast's YAML files in its search path.

    >>> with_configs(["trainer=GFastNPO"])
    ['trainer=GFastNPO', 'hydra.searchpath=[pkg://gfast.integrations.open_unlearning.configs]']
    >>> with_configs(["hydra.searchpath=[file://mine]"])
    ['hydra.searchpath=[file://mine,pkg://gfast.integrations.open_unlearning.configs]']
    """
    name, words = "hydra.searchpath=", []
    for argument in arguments:
        if argument.startswith(name):
            given = argument[len(name) :].strip().removeprefix("[").removesuffix("]").strip()
            argument = f"{name}[{given + ',' if given else ''}{CONFIGS}]"
        words.append(argument)
    return words if any(one.startswith(name) for one in words) else [*words, f"{name}[{CONFIGS}]"]


def main(arguments: list[str]) -> None:
    replace = "--replace" in arguments[:1]
    arguments = arguments[1:] if replace else arguments
    if not arguments or not os.path.isfile(arguments[0]):
        why = f"there is no file {arguments[0]}" if arguments else "no script is given"
        sys.exit(f"{why}; in a clone of open-unlearning: python -m gfast.integrations.open_unlearning src/train.py ...")
    script = arguments[0]
    sys.argv = [script, *with_configs(arguments[1:])]
    sys.path.insert(0, os.path.dirname(os.path.abspath(script)))  # as Python does for a script
    try:
        register(replace)
    except (RuntimeError, ImportError) as error:
        sys.exit(str(error))
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1:])
