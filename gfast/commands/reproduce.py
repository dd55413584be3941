# SPDX-License-Identifier: Apache-2.0
"""`gfast reproduce`: a study from a recipe. Teach a model, make the retain model, unlearn with every objective and
seed, evaluate; tables, figures and one page.

    gfast reproduce demo                                   # bundled model and data, no download, no GPU
    gfast reproduce llama2-7b-tofu --out study             # the paper's settings (arXiv 2502.19301)
    gfast reproduce demo seeds=[0] unlearn.max_steps=10    # key=value over the recipe
    gfast reproduce demo --plan                            # what there is to do, and the command of each step

A step that is done is not done again; one that was killed goes on. Where the inputs of a finished step have changed
since it ran, it is named with what differs, and nothing runs until `--redo` says so.
"""

from __future__ import annotations

from pathlib import Path

from gfast.commands.parser import Parser


def main(argv: list[str] | None = None) -> int:
    parser = Parser(
        prog="gfast reproduce",
        description="Teach, unlearn with every objective and seed, evaluate: tables, figures and one page.",
        epilog="Recipes: demo, surgery, smollm2-tofu, llama2-7b-tofu, phi-tofu, or a YAML file of your own.",
    )
    parser.add_argument("recipe", help="name of a recipe, or a file that ends with .yaml")
    parser.add_argument("changes", nargs="*", metavar="key=value", help="over the recipe: seeds=[0,1] data.path=tofu")
    parser.add_argument("--out", type=Path, help="folder of the study (default: gfast-RECIPE)")
    parser.add_argument(
        "--redo", action="append", default=[], metavar="STEP",
        help="run this step again, or a folder of steps; changed: all whose inputs changed. What they made is deleted",
    )  # fmt: skip
    parser.add_argument("--plan", action="store_true", help="only say what there is to do")
    options, rest = parser.parse_known_args(argv)  # changes may stand before and after the flags
    parser.refuse_unknown([word for word in rest if word.startswith("-")])
    options.changes += [word for word in rest if not word.startswith("-")]

    from gfast.reproduce.study import study

    return study(options.recipe, options.changes, options.out, options.redo, options.plan)
