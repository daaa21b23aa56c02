"""What a branch's tokenizer does with a prompt, which the card's examples follow."""

from pathlib import Path

from packager.card import Prompting
from packager.model.contract_files import TEMPLATE_FILE
from packager.model.strict_json import parse_json_object
from packager.model.tokenizer_file import affixes
from packager.receipt import TOKENIZER, TOKENIZER_CONFIG
from packager.recipe.file import RecipeFile


def prompting_of(folder: Path) -> Prompting:
    """Return what the tokenizer of a branch's folder does with a prompt, read from its files."""
    config = parse_json_object((folder / TOKENIZER_CONFIG).read_bytes())
    has_template = bool(config.get("chat_template")) or (folder / TEMPLATE_FILE).exists()
    before, _ = affixes(parse_json_object((folder / TOKENIZER).read_bytes()))
    return Prompting(has_template=has_template, before="".join(before))


def prompting_of_base(recipe_file: RecipeFile) -> Prompting | None:
    """Return what the tokenizer of a local base model does; None for a model on the Hub, which is not read."""
    path = recipe_file.recipe.base_model.path
    if path is None:
        return None
    folder = recipe_file.base_folder(path)
    if not all((folder / name).is_file() for name in (TOKENIZER, TOKENIZER_CONFIG)):
        return None
    return prompting_of(folder)
