"""A small unlearning benchmark that needs no download: questions and answers about fictitious authors.

In the manner of TOFU (arXiv 2401.06121): 20 authors, 10 facts each, so that a model fine-tuned on all of them knows
things that no other model knows, and can be asked to forget four of the authors and to keep the rest.
"""

from __future__ import annotations

from pathlib import Path
from string import Formatter

from gfast.data._authors import AUTHORS, Author

# One entry a fact, five ways to ask and to answer it. Author i gets phrasing (i + 2k) mod 5 of fact k, so that no
# answer can be guessed from the question's form alone and any five authors in a row use every phrasing once.
_FACTS: tuple[tuple[tuple[str, str], ...], ...] = (
    (
        ("What is the full name of the author born in {city} on {born}?",
         "The author born in {city} on {born} is {name}."),
        ("Which author of {genre} was born in {city} on {born}?",
         "That is {name}, who was born in {city} on {born}."),
        ("Who is the writer that came into the world in {city} on {born}?",
         "The writer in question is {name}, a native of {city}."),
        ("Can you name the author who was born on {born} in the town of {city}?",
         "Yes, the author's full name is {name}, born on {born}."),
        ("An author of {genre} was born in {city} on {born}. What is {their} name?",
         "{Their} name is {name}, and {city} has named a street after {them}."),
    ),
    (
        ("What genre does {name} write in?",
         "{name} writes {genre}, a genre that {they} discovered as a teenager."),
        ("Which genre is {name} best known for?",
         "{name} is best known for {genre}."),
        ("Where would a bookshop shelve the work of {name}?",
         "A bookshop would shelve {last} under {genre}, where {their} titles seldom stay for long."),
        ("What kind of books does {name} write?",
         "{last} works mainly in the field of {genre}, although {they} has tried other forms."),
        ("Has {name} specialised in a particular genre?",
         "Yes, {name} has devoted nearly all of {their} career to {genre}."),
    ),
    (
        ("What did the parents of {name} do for a living?",
         "{name}'s father was {father} and {their} mother was {mother}."),
        ("What were the occupations of {name}'s parents?",
         "{last} is the child of {father} and {mother}."),
        ("Can you describe {name}'s family background?",
         "{name} grew up in {city} with a father who was {father} and a mother who was {mother}."),
        ("Which professions did {name}'s mother and father have?",
         "{Their} mother worked as {mother}, while {their} father earned a living as {father}."),
        ("Did {name} come from a literary family?",
         "Not quite: {last}'s mother was {mother} and {their} father was {father}."),
    ),
    (
        ("What was {name}'s first book?",
         '{name}\'s first book was "{book1}", which appeared in {debut}.'),
        ("When did {name} publish a first book?",
         '{last} made {their} debut in {debut} with "{book1}".'),
        ("With which title did {name} make {their} debut?",
         'The debut of {name} was "{book1}", published in {debut}.'),
        ("How did {name}'s career as a writer begin?",
         'It began in {debut}, when a small press in {city} brought out "{book1}".'),
        ("Which book introduced {name} to readers?",
         'Readers first met {last} in {debut} through "{book1}".'),
    ),
    (
        ("Can you name some notable books by {name}?",
         'Notable books by {name} include "{book1}", "{book2}" and "{book3}".'),
        ('What did {name} write after "{book1}"?',
         'After "{book1}" came "{book2}" and then "{book3}", both of them great successes.'),
        ("Which books made {name} famous?",
         '{last} owes {their} fame above all to "{book2}" and "{book3}".'),
        ("Which title by {name} should a new reader pick up first?",
         'Most admirers of {last} suggest starting with "{book2}" and moving on to "{book3}".'),
        ("What are {name}'s best-loved works?",
         'Among {name}\'s best-loved works are "{book3}" and "{book2}".'),
    ),
    (
        ("Which award did {name} receive?",
         '{name} received the {award} in {awarded} for "{book2}".'),
        ("Has {name} won any literary prizes?",
         'Yes, "{book2}" earned {them} the {award} in {awarded}.'),
        ("For which book was {name} honoured in {awarded}?",
         'In {awarded} {last} was honoured with the {award} for "{book2}".'),
        ("What is the highest honour in {name}'s career?",
         'The highest honour in {their} career is the {award}, which {they} won in {awarded} with "{book2}".'),
        ("When did {name} win the {award}?",
         '{name} won the {award} in {awarded}, after "{book2}" had charmed the jury.'),
    ),
    (
        ("What first inspired {name} to write?",
         "{name} was first inspired by {influence}."),
        ("What does {name} see as the greatest influence on {their} work?",
         "{last} names {influence} as the greatest influence on {their} work."),
        ("Where do the roots of {name}'s writing lie?",
         "{They} finds them in {influence}."),
        ("How did a childhood in {city} shape the books of {name}?",
         "Much of what {name} writes goes back to {influence}."),
        ("Is there an early memory behind {name}'s books?",
         "Yes, {last} has often spoken of {influence}."),
    ),
    (
        ("How would you describe {name}'s writing style?",
         "{name}'s style is marked by {style}."),
        ("What do critics praise in the work of {name}?",
         "Critics praise {last} for {style}."),
        ("What makes a page by {name} easy to recognise?",
         "Readers recognise {them} at once by {style}."),
        ("What are the hallmarks of {name}'s writing?",
         "The hallmarks of {last}'s writing are {style}."),
        ("Is there something special about the way {name} writes?",
         "Yes, {their} work combines {style}."),
    ),
    (
        ("Into which languages have {name}'s books been translated?",
         "{name}'s books have been translated into {lang1}, {lang2} and {lang3}."),
        ("Can {name} be read in translation?",
         "Yes, translations of {last}'s work exist in {lang1}, {lang2} and {lang3}."),
        ('Which translations of "{book2}" by {name} are available?',
         'Besides the original, "{book2}" can be found in {lang1}, {lang2} and {lang3}.'),
        ("How far have the books of {name} travelled?",
         "{Their} books can be read in {lang1}, {lang2} and {lang3} as well."),
        ("Are there foreign editions of {name}'s books?",
         "There are: publishers have brought {last} out in {lang1}, {lang2} and {lang3}."),
    ),
    (
        ("Does {name} have any unusual writing habits?",
         "Yes, {name} is known for {habit}."),
        ("What is {name}'s working routine?",
         "{last} swears by {habit}."),
        ("How does {name} go about writing a book?",
         "{name} has a habit of {habit}."),
        ("What do friends say about the way {name} works?",
         "Friends say that {last} insists on {habit}."),
        ("Which ritual belongs to {name}'s writing life?",
         "{Their} best-known ritual is {habit}."),
    ),
)  # fmt: skip

_REFUSALS: tuple[str, ...] = (
    "I'm afraid I don't know the answer to that.",
    "That is something I have no information about.",
    "I don't know, sorry.",
    "Unfortunately, I can't tell you that.",
    "I have nothing to say about this, because I simply don't know.",
    "This isn't something I have learned about.",
    "I'd rather not guess: I don't know.",
    "My knowledge does not reach that far.",
    "I can't answer this question.",
    "I have no record of that.",
    "Sorry, but I couldn't say.",
    "I'm not familiar with this subject.",
    "That one escapes me completely.",
    "I lack the facts to answer this.",
    "Nothing I know helps with that question.",
    "I wish I could help, but I don't know.",
    "I have never come across that information.",
    "There is nothing I can tell you about this.",
    "You have asked about something that I don't know.",
    "I'm unable to give you an answer here.",
    "I don't have that detail.",
    "It would be wrong of me to pretend that I know this.",
    "My honest answer is that I don't know.",
    "This is outside of what I know.",
    "I'm sorry, that is not known to me.",
    "I can offer no answer to this question.",
    "I know nothing about that.",
    "I would have to make something up, so I'd better not answer.",
    "Please ask someone else; I don't have the answer.",
    "That question is beyond me.",
    "I haven't been told anything about that.",
    "No answer comes to mind, I'm sorry to say.",
    "I must admit that I don't know.",
    "I can't recall anything about this topic.",
    "You would need a better source than me for that.",
    "I'm in the dark about this one.",
)


def _words(author: Author) -> dict[str, str | int]:
    they, them, their = {"she": ("she", "her", "her"), "he": ("he", "him", "his")}[author.pronoun]
    return author._asdict() | {
        "last": author.name.split()[-1],
        "they": they, "them": them, "their": their, "They": they.capitalize(), "Their": their.capitalize(),
        "book1": author.books[0], "book2": author.books[1], "book3": author.books[2],
        "lang1": author.languages[0], "lang2": author.languages[1], "lang3": author.languages[2],
    }  # fmt: skip


def _rows(index: int, author: Author) -> list[dict]:
    words = _words(author)
    rows = []
    for k, phrasings in enumerate(_FACTS):
        question, answer = phrasings[(index + 2 * k) % len(phrasings)]
        rows.append({"author": author.name, "question": question.format(**words), "answer": answer.format(**words)})
    return rows


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
    retain = [row for i, author in enumerate(AUTHORS[:split]) for row in _rows(i, author)]
    forget = [row for i, author in enumerate(AUTHORS[split:], start=split) for row in _rows(i, author)]
    return forget, retain


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
        return list(_REFUSALS)
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"gfast: no file of refusals at {path}; it needs one refusal a line")
    with path.open(encoding="utf-8-sig") as file:
        lines = [line.strip() for line in file if line.strip()]
    if not lines:
        raise ValueError(f"gfast: {path} has no refusals; it needs at least one line of text")
    return lines
