"""Render messages in the model's chat template: prompts for the loaders, questions, and the card's prompt template."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from packager.errors import CalibrationError
from packager.inputs.limits import Chat, ModelProcess, TextGroup
from packager.recipe.file import RecipeFile

_MAX_SHOWN = 3000  # characters of a rendered template


@dataclass(frozen=True, kw_only=True)
class Question:
    """A prompt and its only right answer, as token ids; the answer ends with the token that ends a turn."""

    prompt_ids: tuple[int, ...]
    answer_ids: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class AskedQuestion:
    """A prompt and its answer as a file states them, and the place in that file."""

    prompt: str
    answer: str
    where: str

    @property
    def chats(self) -> tuple[Chat, Chat]:
        """The prompt alone, up to where the answer begins, and the whole turn."""
        turn = (_user(self.prompt), {"role": "assistant", "content": self.answer})
        return prompt_chat(self.prompt), Chat(messages=turn)


def _user(content: str) -> Mapping[str, str]:
    return {"role": "user", "content": content}


def prompt_chat(prompt: str) -> Chat:
    """Return the conversation of a user's message, up to where the answer begins."""
    return Chat(messages=(_user(prompt),), add_generation_prompt=True)


def prompt_ids(tokenizer: Any, prompt: str) -> list[int]:
    """Return the token ids of a user's message in the model's chat template, up to where the answer begins."""
    with ModelProcess() as process:
        texts = render_messages(tokenizer, [prompt_chat(prompt)], process)
        ((ids,),) = encode_texts(tokenizer, [TextGroup(texts=texts, add_special_tokens=False)], process)
    return ids


def render_messages(tokenizer: Any, chats: Sequence[Chat], process: ModelProcess) -> list[str]:
    """Render conversations in a tokenizer's chat template.

    Raises:
        CalibrationError: the template cannot be rendered within the limits, or there are several and none is chosen.
    """
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    if not isinstance(template, str):
        raise CalibrationError("the base model has several chat templates, and none is called default")
    return process.render_chats(template, tokenizer.special_tokens_map, chats)


def encode_texts(tokenizer: Any, groups: Sequence[TextGroup], process: ModelProcess) -> list[list[list[int]]]:
    """Return the token ids of each text of each group, as the tokenizer of transformers gives them.

    Raises:
        CalibrationError: the tokenizer fails, or needs too much time or memory.
    """
    split = bool(getattr(tokenizer, "split_special_tokens", False))
    return process.encode(tokenizer.backend_tokenizer.to_str(), groups, split_special_tokens=split)


def card_chat(recipe_file: RecipeFile) -> Chat:
    """Return the conversation that the card's prompt template is compared with."""
    messages = [_user("{prompt}")]
    if recipe_file.recipe.card.system_prompt is not None:
        messages.insert(0, {"role": "system", "content": recipe_file.recipe.card.system_prompt})
    return Chat(messages=tuple(messages), add_generation_prompt=True)


def check_has_template(recipe_file: RecipeFile, tokenizer: Any) -> None:
    """Raise CalibrationError if the recipe has prompts or questions and the model has no chat template."""
    recipe = recipe_file.recipe
    if not tokenizer.chat_template and (recipe.loaders.prompts or recipe.evaluation.questions):
        raise CalibrationError(
            "the base model has no chat template, so prompts and questions cannot be rendered",
            hint="leave out loaders.prompts and evaluation.questions",
        )


def check_prompt_template(recipe_file: RecipeFile, tokenizer: Any, rendered: str) -> None:
    """Compare the card's prompt template with `card_chat` as the tokenizer's chat template renders it.

    Raises:
        CalibrationError: the templates differ (the 2023 card documented a format that the model was not trained on).
    """
    bos = tokenizer.bos_token or ""
    rendered = rendered.removeprefix(bos).strip()
    given = recipe_file.recipe.card.prompt_template.template.removeprefix(bos).strip()
    if rendered != given:
        raise CalibrationError(
            "the card's prompt template is not the model's chat template",
            where=str(recipe_file.path),
            why=f"the card has {given!r}, the tokenizer renders {rendered[:_MAX_SHOWN]!r}",
            hint="copy the rendered text into card.prompt_template.template",
        )


def read_questions(path: Path, records: Iterable[tuple[int, Any]]) -> tuple[AskedQuestion, ...]:
    """Return the questions of a file.

    Args:
        path: of the file, for errors.
        records: its line numbers and JSON values, {"prompt": ..., "answer": ...}.

    Raises:
        CalibrationError: a line has another form.
    """
    questions = []
    for number, record in records:
        prompt, answer = (record.get(key) if isinstance(record, dict) else None for key in ("prompt", "answer"))
        if not isinstance(prompt, str) or not isinstance(answer, str):
            raise CalibrationError('a question is not {"prompt": ..., "answer": ...}', where=f"{path}:{number}")
        questions.append(AskedQuestion(prompt=prompt, answer=answer, where=f"{path}:{number}"))
    return tuple(questions)


def question_of(question: AskedQuestion, asked: Sequence[int], whole: Sequence[int]) -> Question:
    """Return a question as token ids.

    Args:
        question: as it was read.
        asked: the ids of its first conversation, the prompt.
        whole: the ids of its second, the whole turn.

    Raises:
        CalibrationError: the template renders an answer without its prompt before it, or the answer is empty.
    """
    if list(whole[: len(asked)]) != list(asked):
        raise CalibrationError("the chat template does not render an answer after its prompt", where=question.where)
    if not question.answer.strip() or len(whole) == len(asked):
        raise CalibrationError(
            "the answer of a question is empty",
            where=question.where,
            why=f"the answer {question.answer!r} is blank, or the chat template leaves it out",
            hint="give an answer, or leave out the question",
        )
    return Question(prompt_ids=tuple(asked), answer_ids=tuple(whole[len(asked) :]))
