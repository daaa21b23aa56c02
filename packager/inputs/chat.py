"""Render messages in the model's chat template: prompts for the loaders, questions, and the card's prompt template."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from packager.errors import CalibrationError
from packager.recipe.file import RecipeFile


@dataclass(frozen=True, kw_only=True)
class Question:
    """A prompt and its only right answer, as token ids; the answer ends with the token that ends a turn."""

    prompt_ids: tuple[int, ...]
    answer_ids: tuple[int, ...]


def prompt_ids(tokenizer: Any, prompt: str) -> list[int]:
    """Return the token ids of a user's message in the model's chat template, up to where the answer begins."""
    return _chat_ids(tokenizer, [{"role": "user", "content": prompt}], add_generation_prompt=True)


def _chat_ids(tokenizer: Any, messages: Sequence[Mapping[str, str]], **options: bool) -> list[int]:
    return list(tokenizer(_render(tokenizer, messages, **options), add_special_tokens=False)["input_ids"])


def _render(tokenizer: Any, messages: Sequence[Mapping[str, str]], **options: bool) -> str:
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, **options))
    except TemplateError as error:
        roles = ", ".join(message["role"] for message in messages)
        raise CalibrationError(
            "the model's chat template cannot be rendered", why=f"for messages of {roles}: {error}"
        ) from error


def check_prompt_template(recipe_file: RecipeFile, tokenizer: Any) -> None:
    """Compare the card's prompt template with the tokenizer's chat template, if it has one.

    Raises:
        CalibrationError: the templates differ (the 2023 card documented a format that the model was not trained on), or
            the recipe has prompts or questions and there is no chat template.
    """
    recipe = recipe_file.recipe
    if not tokenizer.chat_template:
        if recipe.loaders.prompts or recipe.evaluation.questions:
            raise CalibrationError(
                "the base model has no chat template, so prompts and questions cannot be rendered",
                hint="leave out loaders.prompts and evaluation.questions",
            )
        return
    messages = [{"role": "user", "content": "{prompt}"}]
    if recipe.card.system_prompt is not None:
        messages.insert(0, {"role": "system", "content": recipe.card.system_prompt})
    rendered = _render(tokenizer, messages, add_generation_prompt=True)
    rendered = rendered.removeprefix(tokenizer.bos_token or "").strip()
    given = recipe.card.prompt_template.template.removeprefix(tokenizer.bos_token or "").strip()
    if rendered != given:
        raise CalibrationError(
            "the card's prompt template is not the model's chat template",
            where=str(recipe_file.path),
            why=f"the card has {given!r}, the tokenizer renders {rendered!r}",
            hint="copy the rendered text into card.prompt_template.template",
        )


def read_questions(path: Path, records: Iterable[tuple[int, Any]], tokenizer: Any) -> tuple[Question, ...]:
    """Return questions rendered in the chat template.

    Args:
        path: of the file, for errors.
        records: its line numbers and JSON values, {"prompt": ..., "answer": ...}.
        tokenizer: with a chat template.

    Raises:
        CalibrationError: a line has another form, an answer is empty, or the template renders an answer without its
            prompt before it.
    """
    questions = []
    for number, record in records:
        prompt, answer = (record.get(key) if isinstance(record, dict) else None for key in ("prompt", "answer"))
        if not isinstance(prompt, str) or not isinstance(answer, str):
            raise CalibrationError('a question is not {"prompt": ..., "answer": ...}', where=f"{path}:{number}")
        turn = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
        whole = _chat_ids(tokenizer, turn)
        asked = prompt_ids(tokenizer, prompt)
        if whole[: len(asked)] != asked:
            raise CalibrationError(
                "the chat template does not render an answer after its prompt", where=f"{path}:{number}"
            )
        if not answer.strip() or len(whole) == len(asked):
            raise CalibrationError(
                "the answer of a question is empty",
                where=f"{path}:{number}",
                why=f"the answer {answer!r} is blank, or the chat template leaves it out",
                hint="give an answer, or leave out the question",
            )
        questions.append(Question(prompt_ids=tuple(asked), answer_ids=tuple(whole[len(asked) :])))
    return tuple(questions)
