"""Builds gfast._C in place: `python setup.py build_ext --inplace` without a look at pyproject.toml.

Its licence is written in a way that setuptools before 77 refuses, and a machine without a network keeps the one it has.
"""

from __future__ import annotations

import os
from pathlib import Path

import setuptools  # noqa: F401 - before distutils, which it stands for

from distutils.core import run_setup  # isort: skip


def main() -> None:
    os.chdir(Path(__file__).resolve().parents[1])
    project = run_setup("setup.py", stop_after="init")  # pyproject.toml is read after that
    project.get_command_obj("build_ext").inplace = True
    project.run_command("build_ext")


if __name__ == "__main__":
    main()
