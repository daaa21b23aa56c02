"""Whether the pages that a recipe's own templates make will be refused: found by the plan, not after a build.

Before a build nothing is measured. So each page is rendered twice, without measurements and with made-up ones: what is
wrong in both is taken to be wrong in the finished page. What is wrong in one of them may depend on the figures, and is
left to the build; so is an error that an entry can make which neither page has (the version of another package).
"""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Final

from jinja2 import UndefinedError

from packager.card import (
    CANNOT_FILL_IN,
    MALFORMED,
    NOT_INCLUDED,
    NOT_PUBLISHABLE,
    given_names,
    names_read_at,
    own_names,
)
from packager.card.own_templates import OwnTemplates
from packager.errors import CardError
from packager.model.front_matter import split_front_matter
from packager.pipeline.card_texts import read_own_templates
from packager.pipeline.predicted_card import PredictedCards
from packager.prove.audit.card import words_problems

# Mistakes that no figure changes: a name that nothing gives, and a field that our records do not have.
_NO_NAME: Final = re.compile(r"'(\w+)' is undefined")
_NO_FIELD: Final = re.compile(r"'packager\.[\w.]+ object' has no attribute '\w+'")
# Kinds of errors that an entry can make which is in no page of the plan, but may be in the finished one: another
# package's version, a sum over linears of which no made-up one is chosen.
_OF_ENTRIES: Final = (UndefinedError, ArithmeticError, LookupError, ValueError, CardError)
_NONE: Final = "NoneType"
# What the recipe says, which no build changes, and functions of Jinja.
_OF_RECIPE: Final = frozenset(
    ("card", "recipe", "repository", "repository_name", "hub", "main", "noun", "separate", "own_links", "license_files")
)
_FUNCTIONS: Final = frozenset(("range", "dict"))
_FENCES: Final = ("```", "~~~")
_MOST_ALIKE: Final = 10  # problems with one message that are shown: a template that loops makes thousands
_Findings = dict[tuple[str, str], str]  # the hint, by message and line of the page


def template_page_problems(cards: PredictedCards) -> list[str]:
    """Return what the audit of the finished cards will refuse because of the recipe's own templates.

    The pages of all branches are looked at; none of a recipe without templates. What is wrong in the pages of several
    branches is said once.

    Raises:
        CardError: a file cannot be read.
    """
    own = read_own_templates(cards.recipe_file)
    if own is None or not own.texts:
        return []
    problems: dict[tuple[str, str], str] = {}  # by what is wrong and where: texts of errors have lines of the page
    for each in cards.variants:
        for key, line in _problems(cards, own, each.variant.branch).items():
            problems.setdefault(key, line)
    return list(dict.fromkeys(problems.values()))


def _problems(cards: PredictedCards, own: OwnTemplates, branch: str) -> dict[tuple[str, str], str]:
    folder = cards.recipe_file.folder
    try:
        found = _findings(cards.page(branch, own))
    except CardError as error:
        again = _error_of(lambda: cards.made_up_page(branch, own))
        if again is None or not _is_certain(error, again, own, branch):
            return {}
        text = f"{folder / again.where}: card.templates: {again.what}: {again.why} ({again.hint})"
        return {(again.what, again.where): text}
    if not found:
        return {}
    try:
        later = _findings(cards.made_up_page(branch, own))
    except CardError:
        return {}
    usual = _findings(cards.page(branch, None))
    certain = [finding for finding in found if finding in later and finding not in usual]
    counts: Counter[str] = Counter()
    shown = []
    for message, line in certain:
        counts[message] += 1
        if counts[message] <= _MOST_ALIKE:
            shown.append((message, line))
    places = _places(cards, own, branch, shown)
    return {
        each: f"{folder / places.get(each, own.folder)}: card.templates: {each[0]} ({found[each]})" for each in shown
    }


def _findings(page: str) -> _Findings:
    body = split_front_matter(page)[1]
    lines, found = [*body.split("\n"), ""], {}
    for problem in words_problems(body):
        line = lines[problem.line - 1].strip()
        # A block of code is known by its first line.
        line = lines[problem.line].strip() if line.startswith(_FENCES) else line
        found[problem.message, line] = problem.hint
    return found


def _error_of(render: Callable[[], str]) -> CardError | None:
    try:
        render()
    except CardError as error:
        return error
    return None


def _is_certain(error: CardError, again: CardError, own: OwnTemplates, branch: str) -> bool:
    """Return whether the errors of both pages of a branch are one, and that of the finished page."""
    if error.what == again.what == NOT_PUBLISHABLE:
        return not _refused_at(error).isdisjoint(_refused_at(again))
    if (error.what, error.where) != (again.what, again.where):
        return False
    if error.what in (MALFORMED, NOT_INCLUDED) or error.where == f"the card of {branch}":
        return True  # of the page as a whole, or of a template before it is filled in
    if error.why != again.why or type(error.__cause__) is not type(again.__cause__):
        return False
    return not _is_of_an_entry(error, own) or _reads_the_recipe_alone(own, error.where)


def _is_of_an_entry(error: CardError, own: OwnTemplates) -> bool:
    """Return whether an entry that neither page has could make an error, and its presence prevent it."""
    kind = type(error.__cause__)
    if error.what == CANNOT_FILL_IN and kind is UndefinedError:
        if name := _NO_NAME.fullmatch(error.why):
            return name[1] in given_names(own)
        return _NO_FIELD.fullmatch(error.why) is None
    return issubclass(kind, _OF_ENTRIES) or _NONE in error.why


def _reads_the_recipe_alone(own: OwnTemplates, where: str) -> bool:
    read = names_read_at(own, where)
    return read is not None and read <= (_OF_RECIPE | _FUNCTIONS) - own_names(own)


def _refused_at(error: CardError) -> set[str]:
    """Return all places that an error of a page names: the first as its own, each other at the beginning of a line."""
    return {error.where, *(line.strip().partition(": ")[0] for line in error.why.split("\n")[1:])}


def _places(
    cards: PredictedCards, own: OwnTemplates, branch: str, findings: Sequence[tuple[str, str]]
) -> dict[tuple[str, str], str]:
    """Return where findings come from: file and line if one line of the templates is the page's, else the file.

    A finding whose file is not known is left out. The line itself is not shown: it may be a secret. A page is rendered
    once without each template, however many findings there are.
    """
    lines = [
        (f"{own.path(name)}:{number}", each.strip())
        for name, text in own.texts.items()
        for number, each in enumerate(text.splitlines(), start=1)
    ]
    found: dict[tuple[str, str], str] = {}
    for finding in findings:
        places = [place for place, line in lines if line == finding[1]]
        if len(places) == 1:
            found[finding] = places[0]
    for name in own.texts:
        left = [finding for finding in findings if finding not in found]
        if not left:
            break
        others = {other: text for other, text in own.texts.items() if other != name}
        try:
            remaining = _findings(cards.page(branch, replace(own, texts=others)))
        except CardError:
            continue
        found |= {finding: own.path(name) for finding in left if finding not in remaining}
    return found
