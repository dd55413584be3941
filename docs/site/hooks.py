"""From Markdown to the site: the home page is the README, and links that leave docs/ become paths."""

from __future__ import annotations

import html
import re
from pathlib import Path, PurePosixPath

from latex2mathml.converter import convert

ROOT = Path(__file__).resolve().parents[2]
LINK = re.compile(r"(?<!!)\[([^\]]*)\]\((?!https?:|#|mailto:)([^)#]+)(#[^)]*)?\)")


def on_page_markdown(markdown: str, page, config, files) -> str:
    """Links to files of the repository that are no page become their paths: a site holds the pages only."""
    folder = PurePosixPath(page.file.src_uri).parent
    markdown = markdown.replace("{{README}}", _readme())

    def link(match: re.Match) -> str:
        text, target, _ = match.groups()
        if (Path(config.docs_dir) / folder / target).resolve().is_relative_to(config.docs_dir):
            return match.group(0)
        where = (Path(config.docs_dir) / folder / target).resolve()
        return text if text.strip("`").endswith(where.name) else f"{text} (`{where.relative_to(ROOT)}`)"

    return LINK.sub(link, markdown)


def on_page_content(content: str, page, config, files) -> str:
    """Formulas as MathML, which browsers draw by themselves: no script, no other server. A flag, a name or a file stays
    on one line: browsers break after any hyphen, `--` of a flag included, and the theme inside words.
    """

    def formula(match: re.Match) -> str:
        return convert(html.unescape(match[2]), display="block" if match[1] == "[" else "inline")

    content = re.sub(r"<code>(?=(?:--[^<]{1,26}|[^<\s]{1,28})</code>)", '<code class="short">', content)
    return re.sub(
        r'<(?:span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</(?:span|div)>', formula, content, flags=re.S
    )


def _readme() -> str:
    """The README as a page within docs/."""
    return re.sub(
        r"\]\((?!https?:|#)(docs/)?", lambda match: "](" if match[1] else "](../", (ROOT / "README.md").read_text()
    )
