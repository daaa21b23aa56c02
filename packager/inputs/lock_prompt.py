"""Render the card's prompt for the lock, from the tokenizer's files: `plan` compares it with the recipe."""

from collections.abc import Callable
from pathlib import Path

from packager.errors import CalibrationError
from packager.inputs.branch_tokenizer import branch_tokenizer
from packager.inputs.chat import card_prompt
from packager.inputs.chat_template import templates_beside
from packager.inputs.limits import ModelProcess
from packager.inputs.source_files import copied_names, read_small
from packager.inputs.tokenizer import check_vocabulary
from packager.model.branch_config import branch_file
from packager.model.branch_rules import ModelFacts
from packager.model.lock import Lock
from packager.receipt import TOKENIZER, TOKENIZER_CONFIG
from packager.recipe import Recipe


def with_prompt(
    lock: Lock, recipe: Recipe, folder: Path, where: str, changed: Callable[[str], None], *, partial: bool
) -> Lock:
    """Return a lock that holds the card's prompt.

    Args:
        lock: of the base model, without it.
        recipe: the recipe.
        folder: with the base model's small files, which were checked.
        where: the base model, for messages.
        changed: receives a sentence for each value of the tokenizer's files that a branch gets otherwise.
        partial: the folder may lack the tokenizer; then the lock has no prompt, and the build compares it first.

    Raises:
        CalibrationError: the tokenizer or its chat template cannot be used; see `branch_tokenizer`, `check_vocabulary`
            and `card_prompt`.
        SourceError: a file cannot be read.
    """
    facts = ModelFacts.of(lock.model.config, template=templates_beside(folder))
    files = {name: branch_file(name, read_small(folder, name), facts).data for name in copied_names(folder)}
    if partial and not {TOKENIZER, TOKENIZER_CONFIG} & files.keys():
        return lock
    try:
        with ModelProcess() as process:
            tokenizer = branch_tokenizer(files, lock.model.config, where, process)
            check_vocabulary(tokenizer.opened, lock.model.vocab_size, where)
            prompt = card_prompt(recipe, tokenizer.opened, process)
    except CalibrationError as error:
        error.where = error.where or where  # of the process that renders, which does not know the model
        raise
    for change in tokenizer.changes:
        changed(change)
    return lock.model_copy(update={"prompt": prompt})
