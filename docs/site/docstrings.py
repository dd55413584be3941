"""Docstrings as the pages show them: mathematics of reST roles, names and examples, in Markdown."""

from __future__ import annotations

import re

import griffe

EXAMPLE = re.compile(r"^([ ]*)>>> .*\n?(?:\1(?!\s*$).*\n?)*", re.M)  # to the next blank or dedented line


class Markdown(griffe.Extension):
    def on_object(self, *, obj: griffe.Object, **kwargs) -> None:
        if obj.docstring is not None:
            obj.docstring.value = markdown(obj.docstring.value)


def markdown(text: str) -> str:
    text = re.sub(r":math:`([^`]+)`", lambda match: f"\\({match[1]}\\)", text)
    text = re.sub(
        r"^([ ]*)\.\. math::\s+(.+(?:\n\1[ ]+.+)*)", lambda match: f"{match[1]}\\[{match[2]}\\]", text, flags=re.M
    )
    text = re.sub(r":(?:class|func|meth|mod|attr):`~?([^`]+)`", r"`\1`", text)
    text = re.sub(r": >(=?) ", lambda match: ": ≥ " if match[1] else ": &gt; ", text)  # else a quotation begins
    return EXAMPLE.sub(lambda match: f"{match[1]}```python\n{match[0].rstrip()}\n{match[1]}```\n", text)
