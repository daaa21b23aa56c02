"""The markdown files that a recipe's card names: read once, checked before a build starts."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any, Final

from packager.card import CardTexts, own_template_problems, texts_of_page, texts_problems
from packager.card.own_templates import OwnTemplates
from packager.card.raw_text import MAX_CHARACTERS
from packager.card.sections import SECTION_FILES
from packager.errors import CardError
from packager.prove.audit.card import words_problems
from packager.recipe.file import RecipeFile
from packager.system.files import open_regular

_FIELDS = ("header", "footer", "original_card")
_MAX_BYTES = 4 * MAX_CHARACTERS  # of UTF-8
_MOST_TEMPLATES = 100
# Files, and what the card shows as code.
_NOT_PROSE: Final[Mapping[str, bool | set[str]]] = {
    **dict.fromkeys((*_FIELDS, "templates", "system_prompt", "example_prompt"), True),
    "prompt_template": {"template"},
}
_PROSE: Final = "- "  # no field stands at the beginning of a line


def read_card_texts(recipe_file: RecipeFile) -> CardTexts:
    """Return the texts of the files that a recipe's card names.

    Raises:
        CardError: a file cannot be read, or is not UTF-8.
    """
    return CardTexts(**{name: _text(recipe_file, getattr(recipe_file.recipe.card, name)) for name in _FIELDS})


def read_own_templates(recipe_file: RecipeFile, folder: str | None = None) -> OwnTemplates | None:
    """Return the templates and sections of the folder that a recipe's card names, None if it names none.

    Args:
        recipe_file: the recipe.
        folder: another one in the recipe's folder.

    Raises:
        CardError: a file cannot be read, or there are too many.
    """
    folder = folder or recipe_file.recipe.card.templates
    if folder is None:
        return None
    found = sorted(path.name for path in recipe_file.resolve(folder).iterdir())
    names = [name for name in found if name.endswith(".j2") or (name.startswith("section-") and name.endswith(".md"))]
    if len(names) > _MOST_TEMPLATES:
        raise CardError("there are too many templates", where=folder, why=f"{len(names)}, at most {_MOST_TEMPLATES}")
    texts = {name: _text(recipe_file, f"{folder}/{name}") for name in names}
    section_of = {file: section for section, file in SECTION_FILES.items()}
    return OwnTemplates(
        folder=folder,
        texts=MappingProxyType({name: text for name, text in texts.items() if name.endswith(".j2")}),
        sections=MappingProxyType(
            {section_of.get(name, name): text for name, text in texts.items() if not name.endswith(".j2")}
        ),
    )


def card_text_problems(recipe_file: RecipeFile) -> list[str]:
    """Return what is wrong with the card's texts, each with its file and line.

    Raises:
        CardError: a file cannot be read, or is not UTF-8.
    """
    card, folder, texts = recipe_file.recipe.card, recipe_file.folder, read_card_texts(recipe_file)
    found = list(texts_problems(texts))
    if not found:  # what the audit of the finished card refuses: found here, not after a build
        found = [
            (name, replace(problem, line=problem.line + above))
            for name, body, above in texts_of_page(texts)
            for problem in words_problems(body)
        ]
    return [
        *_field_lines(recipe_file),
        *_template_lines(recipe_file),
        *(
            f"{folder / getattr(card, name)}:{problem.line}: card.{name}: {problem.message} ({problem.hint})"
            for name, problem in found
        ),
    ]


def _field_lines(recipe_file: RecipeFile) -> list[str]:
    """Return the problems of the recipe's own words: fields of the card, and the variants' descriptions."""
    recipe = recipe_file.recipe
    fields = dict(_words(recipe.card.model_dump(mode="json", exclude=dict(_NOT_PROSE)), "card"))
    for number, entry in enumerate(recipe.variants):
        fields[f"variants[{number}].description"] = entry.description or ""
    return [
        f"{recipe_file.path}: {name}: {problem.message} ({problem.hint})"
        for name, text in fields.items()
        for problem in words_problems(f"{_PROSE}{text}")
    ]


def _words(value: Any, name: str) -> Iterator[tuple[str, str]]:
    """Yield the texts in a field, with their places in the recipe."""
    if isinstance(value, str):
        yield name, value
    elif isinstance(value, dict):
        for key, each in value.items():
            yield from _words(each, f"{name}.{key}")
    elif isinstance(value, list):
        for number, each in enumerate(value):
            yield from _words(each, f"{name}[{number}]")


def _template_lines(recipe_file: RecipeFile) -> list[str]:
    own = read_own_templates(recipe_file)
    if own is None:
        return []
    places = [
        (recipe_file.folder / own.path(problem.name), problem.line, problem.message)
        for problem in own_template_problems(own)
    ]
    if not places:  # likewise
        places = [
            (recipe_file.folder / own.path(SECTION_FILES[section]), problem.line, f"{problem.message} ({problem.hint})")
            for section, text in own.sections.items()
            for problem in words_problems(text)
        ]
    return [f"{path}{f':{line}' if line else ''}: card.templates: {message}" for path, line, message in places]


def _text(recipe_file: RecipeFile, name: str | None) -> str:
    if name is None:
        return ""
    path = recipe_file.resolve(name)
    try:
        with open_regular(path) as stream:  # a pipe would never end
            # A longer file is cut in the middle of a character, perhaps; it is refused by its length.
            data = stream.read(_MAX_BYTES + 1)
        return data.decode("utf-8-sig", "strict" if len(data) <= _MAX_BYTES else "replace")
    except (OSError, UnicodeDecodeError) as error:
        raise CardError("a text of the card cannot be read", where=str(path), why=str(error)) from error
