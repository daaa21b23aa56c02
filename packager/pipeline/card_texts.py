"""The markdown files that a recipe's card names: read once, checked before a build starts."""

from packager.card import CardTexts, texts_problems
from packager.card.raw_text import MAX_CHARACTERS
from packager.errors import CardError
from packager.recipe.file import RecipeFile

_FIELDS = ("header", "footer", "original_card")
_MAX_BYTES = 4 * MAX_CHARACTERS  # of UTF-8


def read_card_texts(recipe_file: RecipeFile) -> CardTexts:
    """Return the texts of the files that a recipe's card names.

    Raises:
        CardError: a file cannot be read, or is not UTF-8.
    """
    return CardTexts(**{name: _text(recipe_file, getattr(recipe_file.recipe.card, name)) for name in _FIELDS})


def card_text_problems(recipe_file: RecipeFile) -> list[str]:
    """Return what is wrong with the card's texts, each with its file and line.

    Raises:
        CardError: a file cannot be read, or is not UTF-8.
    """
    card, folder = recipe_file.recipe.card, recipe_file.folder
    return [
        f"{folder / getattr(card, name)}:{problem.line}: card.{name}: {problem.message} ({problem.hint})"
        for name, problem in texts_problems(read_card_texts(recipe_file))
    ]


def _text(recipe_file: RecipeFile, name: str | None) -> str:
    if name is None:
        return ""
    path = recipe_file.resolve(name)
    try:
        with path.open("rb") as stream:
            # A longer file is cut in the middle of a character, perhaps; it is refused by its length.
            data = stream.read(_MAX_BYTES + 1)
        return data.decode("utf-8-sig", "strict" if len(data) <= _MAX_BYTES else "replace")
    except (OSError, UnicodeDecodeError) as error:
        raise CardError("a text of the card cannot be read", where=str(path), why=str(error)) from error
