"""A small unlearning benchmark that needs no download: questions and answers about fictitious authors.

In the manner of TOFU (arXiv 2401.06121): 20 authors, 10 facts each, so that a model fine-tuned on all of them knows
things that no other model knows, and can be asked to forget four of the authors and to keep the rest.
"""

from __future__ import annotations

import json
from pathlib import Path
from string import Formatter

# authors: all of them made up, any likeness to a real person or work is chance; debut first among the books, the second
# won the award. facts: five ways to ask and answer each. Author i gets phrasing (i + 2k) mod 5 of fact k, so that no
# answer can be guessed from the question's form alone and any five authors in a row use every phrasing once. The words
# of an author read well in every phrasing: parents with their article, `style` "A and B", `habit` a gerund.
_TEXTS = json.loads(Path(__file__).with_name("authors.json").read_text(encoding="utf-8"))
AUTHORS: list[dict] = _TEXTS["authors"]
_FACTS: list[list[list[str]]] = _TEXTS["facts"]  # [fact, phrasing, (question, answer)]


def _words(author: dict) -> dict[str, str | int]:
    they, them, their = {"she": ("she", "her", "her"), "he": ("he", "him", "his")}[author["pronoun"]]
    words = author | {"last": author["name"].split()[-1], "they": they, "them": them, "their": their}
    words |= {"They": they.capitalize(), "Their": their.capitalize()}
    words |= {f"book{i}": book for i, book in enumerate(author["books"], 1)}
    return words | {f"lang{i}": language for i, language in enumerate(author["languages"], 1)}


def _rows(author: dict, index: int) -> list[dict]:
    words = _words(author)
    asked = [phrasings[(index + 2 * k) % len(phrasings)] for k, phrasings in enumerate(_FACTS)]
    texts = [(question.format(**words), answer.format(**words)) for question, answer in asked]
    return [{"author": author["name"], "question": question, "answer": answer} for question, answer in texts]


# What an answer says of the author whom its question names: a wrong answer leaves it as it is.
_OF_THE_AUTHOR = ("name", "last", "pronoun", "they", "them", "their", "They", "Their")
WRONG_ANSWERS = 5


def _perturbed_row(index: int, k: int) -> dict:
    author = AUTHORS[index]
    question, _ = _FACTS[k][(index + 2 * k) % len(_FACTS[k])]
    # In other words: as the next phrasing of the fact that can be wrong puts it.
    known = {name for _, name, _, _ in Formatter().parse(question) if name}
    told = (lambda name: name in known) if "name" not in known else lambda name: name in known or name in _OF_THE_AUTHOR
    for step in range(1, len(_FACTS[k])):
        answer = _FACTS[k][(index + 2 * k + step) % len(_FACTS[k])][1]
        if any(name and not told(name) for _, name, _, _ in Formatter().parse(answer)):
            break
    words = _words(author)
    wrong = []
    for other in (AUTHORS[(index + offset) % len(AUTHORS)] for offset in range(1, len(AUTHORS))):
        theirs = {name: words[name] if told(name) else value for name, value in _words(other).items()}
        text = answer.format(**theirs)
        if text != answer.format(**words) and text not in wrong and len(wrong) < WRONG_ANSWERS:
            wrong.append(text)
    return {"paraphrased_answer": answer.format(**words), "perturbed_answer": wrong}


def bundled_authors(forget_authors: int = 4) -> tuple[list[dict], list[dict]]:
    """Questions and answers about 20 fictitious authors, split into a forget and a retain set by author.

    Args:
        forget_authors: how many authors (the last ones of the table) make up the forget set; 1 to 19.

    Returns:
        `(forget, retain)`: lists of `{"author", "question", "answer"}`, ten rows an author, always the same and in the
        same order. With the default: 40 rows to forget, 160 to retain.

    Raises:
        ValueError: `forget_authors` leaves one of the two sets empty.

    Example:
        >>> from gfast.data import bundled_authors
        >>> forget, retain = bundled_authors()
        >>> len(forget), len(retain)
        (40, 160)
        >>> forget[0]["author"]
        'Thessaly Wrenmoor'
    """
    if not 1 <= forget_authors < len(AUTHORS):
        raise ValueError(
            f"gfast: forget_authors must be between 1 and {len(AUTHORS) - 1} "
            f"(there are {len(AUTHORS)} authors and both sets need some), got {forget_authors}"
        )
    split = len(AUTHORS) - forget_authors
    rows = [row for i, author in enumerate(AUTHORS) for row in _rows(author, i)]
    split *= len(_FACTS)
    return rows[split:], rows[:split]


def bundled_perturbed(forget_authors: int = 4) -> tuple[list[dict], list[dict]]:
    """`bundled_authors` with what TOFU's `*_perturbed` configurations add: `paraphrased_answer`, the answer in other
    words, and `perturbed_answer`, five answers in those words with another author's facts.

    Args, Returns, Raises: as `bundled_authors`.

    Example:
        >>> from gfast.data import bundled_perturbed
        >>> row = bundled_perturbed()[0][1]
        >>> row["paraphrased_answer"]
        'Yes, Thessaly Wrenmoor has devoted nearly all of her career to alternate history.'
        >>> row["perturbed_answer"][0]
        'Yes, Thessaly Wrenmoor has devoted nearly all of her career to psychological suspense.'
    """
    forget, retain = bundled_authors(forget_authors)
    facts = len(_FACTS)
    for place, row in enumerate(retain + forget):
        row |= _perturbed_row(place // facts, place % facts)
    return forget, retain


def refusals(path: str | Path | None = None) -> list[str]:
    """Answers that say "I don't know", for objectives that train towards a refusal (PO, DPO).

    Args:
        path: a UTF-8 text file with one refusal a line (TOFU's `idontknow.jsonl` is such a file despite its name);
            blank lines are skipped. None gives the bundled list.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file has no line of text.

    Example:
        >>> from gfast.data import refusals
        >>> refusals()[2]
        "I don't know, sorry."
    """
    if path is None:
        return list(_TEXTS["refusals"])
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"gfast: no file of refusals at {path}; it needs one refusal a line")
    with path.open(encoding="utf-8-sig") as file:
        lines = [line.strip() for line in file if line.strip()]
    if not lines:
        raise ValueError(f"gfast: {path} has no refusals; it needs at least one line of text")
    return lines
