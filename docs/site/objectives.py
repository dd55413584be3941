"""The table of docs/objectives.md and its figure, from the objectives' docstrings and weights.

python docs/site/objectives.py          writes both; tests/test_docs.py asks whether the table is current
"""

from __future__ import annotations

import inspect
import re
from dataclasses import MISSING, fields
from pathlib import Path

import torch

from gfast.objectives import REGISTRY, Objective
from gfast.ops.weights import WeightSpec, spec_of, token_weights

PAGE = Path(__file__).resolve().parents[1] / "objectives.md"
FIGURE = PAGE.with_name("objectives") / "weights.png"
MARKS = "<!-- objectives: python docs/site/objectives.py -->\n", "<!-- end -->\n"
GRADIENT = {"token": "one weight a token", "sequence": "one weight a sequence", "pair": "± one weight a pair"}
REFERENCE = 0.9  # p_o in the figure


def table() -> str:
    """Rows of all objectives, in the registry's order."""
    head = "| objective and its defaults | what it descends, or its weight | gradient | needs | source | elsewhere |\n"
    return head + "|---|---|---|---|---|---|\n" + "".join(map(_row, REGISTRY.values()))


def page() -> str:
    """The page with the table as it should be."""
    before, rest = PAGE.read_text().split(MARKS[0])
    return before + MARKS[0] + table() + MARKS[1] + rest.split(MARKS[1])[1]


def _row(cls: type[Objective]) -> str:
    paragraphs = [" ".join(part.split()) for part in inspect.getdoc(cls).split("\n\n")]
    source = next((part.removeprefix("Source: ") for part in paragraphs if part.startswith("Source: ")), "")
    source, _, elsewhere = source.partition(". ")
    cells = (
        f"`{_signature(cls)}`",
        _markdown(paragraphs[0]),
        cls.gradient or GRADIENT.get(_level(cls), "its own"),
        ", ".join(f"`{need}`" for need in sorted(cls.needs)) or "–",
        _linked(source.rstrip(".")),
        _linked(elsewhere.rstrip(".")) or "–",
    )
    return "| " + " | ".join(cells) + " |\n"


def _signature(cls: type[Objective]) -> str:
    def shown(default: object) -> str:
        return f"{default:g}" if isinstance(default, float) else repr(default)

    names = [f.name if f.default is MISSING else f"{f.name}={shown(f.default)}" for f in fields(cls)]
    return f"{cls.__name__}({', '.join(names)})"


def _level(cls: type[Objective]) -> str:
    required = {f.name: 1 for f in fields(cls) if f.default is MISSING}
    try:
        spec = spec_of(cls(**required))
    except (TypeError, ValueError):
        return ""
    return "" if spec is None else spec.level


def _markdown(text: str) -> str:
    """A docstring's formulas and names as a page has them; a bar would end the cell."""
    text = re.sub(r":math:`(.+?)`", lambda m: "$" + m[1].replace(r"\|", r"\Vert ").replace("|", r"\vert ") + "$", text)
    return text.replace("``", "`")


def _linked(text: str) -> str:
    text = re.sub(r"arXiv (\d{4}\.\d{5})", r"[arXiv \1](https://arxiv.org/abs/\1)", text)
    text = re.sub(r"(?<![/\w])(github\.com/[\w/-]+)", r"[\1](https://\1)", text)
    return _markdown(text)


def figure() -> None:
    """Weight against p of objectives whose weight is a token's own, by their defaults."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    p = torch.linspace(1e-4, 1 - 1e-4, 800, dtype=torch.float64)
    drawn: dict[WeightSpec, list[str]] = {}
    for cls in REGISTRY.values():
        if _level(cls) == "token" and "weight" not in cls.needs:
            spec = spec_of(cls())
            drawn.setdefault(spec, []).append(_signature(cls))
    fig, ax = plt.subplots(figsize=(7, 4.2))
    for spec, names in drawn.items():
        ref = torch.full_like(p, REFERENCE).log()
        ax.plot(p, token_weights(spec, p.log(), ref), label=", ".join(names))
    ax.set(xlabel="probability p of the label", ylabel="weight of its log p's gradient", xlim=(0, 1))
    ax.axhline(0, color="0.8", lw=0.8, zorder=0)
    ax.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5), title=f"TNPO, WTNPO: p_o = {REFERENCE}")
    FIGURE.parent.mkdir(exist_ok=True)
    fig.savefig(FIGURE, dpi=150, bbox_inches="tight")
    plt.close(fig)


if __name__ == "__main__":
    PAGE.write_text(page())
    figure()
