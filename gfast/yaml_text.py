# SPDX-License-Identifier: Apache-2.0
"""YAML that people write: a name that is given twice is an error, where PyYAML takes the last one without a word."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def read_yaml(text: str) -> Any:
    """The values of a YAML text. yaml.YAMLError for one that is none, or that gives a name twice in one mapping.

    >>> read_yaml("seeds: [0, 1]")
    {'seeds': [0, 1]}
    """
    import yaml  # seconds of a command's start, which errors of its flags do without

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            seen: set[str] = set()
            for key, _ in node.value:
                if isinstance(key, yaml.ScalarNode) and key.value in seen:
                    where = f"line {key.start_mark.line + 1}"
                    raise yaml.YAMLError(f"{key.value} is given twice ({where}): leave one out")
                if isinstance(key, yaml.ScalarNode):
                    seen.add(key.value)
            return super().construct_mapping(node, deep)

    return yaml.load(text, Loader)  # noqa: S506 - a SafeLoader


def read_yaml_file(path: Path) -> Any:
    """The values of a YAML file; ValueError, naming it, for one that is none."""
    import yaml

    try:
        return read_yaml(path.read_text(encoding="utf-8-sig"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from error
