"""Whether the pages that a recipe's own templates make will be refused: found by the plan, not after a build.

Before a build nothing is measured. So each page is rendered twice, without measurements and with made-up ones: what is
wrong in both is taken to be wrong in the finished page. What is wrong in one of them may depend on the figures, and is
left to the build.
"""

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Final

from packager.card import CANNOT_FILL_IN, NOT_PUBLISHABLE, given_names
from packager.card.own_templates import OwnTemplates
from packager.errors import CardError
from packager.model.front_matter import split_front_matter
from packager.pipeline.card_texts import read_own_templates
from packager.pipeline.predicted_card import PredictedCards
from packager.prove.audit.card import words_problems

# Mistakes that no figure changes: a name that nothing gives, and a field that our records do not have.
_NO_NAME: Final = re.compile(r"'(\w+)' is undefined")
_NO_FIELD: Final = re.compile(r"'packager\.[\w.]+ object' has no attribute '\w+'")
_FENCES: Final = ("```", "~~~")
_Findings = dict[tuple[str, str], str]  # the hint, by message and line of the page


def template_page_problems(cards: PredictedCards) -> list[str]:
    """Return what the audit of the finished cards will refuse because of the recipe's own templates.

    The pages of the first and of the last branch are looked at; none of a recipe without templates.

    Raises:
        CardError: a file cannot be read.
    """
    own = read_own_templates(cards.recipe_file)
    if own is None or not own.texts:
        return []
    branches = dict.fromkeys((cards.variants[0].variant.branch, cards.variants[-1].variant.branch))
    return list(dict.fromkeys(line for branch in branches for line in _problems(cards, own, branch)))


def _problems(cards: PredictedCards, own: OwnTemplates, branch: str) -> list[str]:
    folder = cards.recipe_file.folder
    try:
        found = _findings(cards.page(branch, own))
    except CardError as error:
        again = _error_of(lambda: cards.made_up_page(branch, own))
        if again is None or not _is_certain(error, again, own, branch):
            return []
        return [f"{folder / again.where}: card.templates: {again.what}: {again.why} ({again.hint})"]
    if not found:
        return []
    try:
        later = _findings(cards.made_up_page(branch, own))
    except CardError:
        return []
    usual = _findings(cards.page(branch, None))
    return [
        f"{folder / _place(cards, own, branch, (message, line))}: card.templates: {message} ({hint})"
        for (message, line), hint in found.items()
        if (message, line) in later and (message, line) not in usual
    ]


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
    if (error.what, error.where) != (again.what, again.where):
        return False
    if error.what == NOT_PUBLISHABLE or error.where == f"the card of {branch}":
        return True  # of the page as a whole
    if error.what != CANNOT_FILL_IN or error.why != again.why:
        return False
    name = _NO_NAME.fullmatch(error.why)
    return name[1] not in given_names(own) if name else _NO_FIELD.fullmatch(error.why) is not None


def _place(cards: PredictedCards, own: OwnTemplates, branch: str, finding: tuple[str, str]) -> str:
    """Return where a finding comes from: file and line if one line of the templates is the page's, else the file.

    The line itself is not shown: it may be a secret.
    """
    places = [
        f"{own.path(name)}:{number}"
        for name, text in own.texts.items()
        for number, each in enumerate(text.splitlines(), start=1)
        if each.strip() == finding[1]
    ]
    if len(places) == 1:
        return places[0]
    for name in own.texts:
        others = {other: text for other, text in own.texts.items() if other != name}
        try:
            if finding not in _findings(cards.page(branch, replace(own, texts=others))):
                return own.path(name)
        except CardError:
            continue
    return own.folder
