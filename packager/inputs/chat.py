"""Render messages in the model's chat template: prompts for the loaders, questions, and the card's prompt template."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from packager.errors import CalibrationError
from packager.inputs.limits import Chat, ModelProcess, TextGroup
from packager.model.lock import MOST_PROMPT_CHARACTERS, LockedPrompt
from packager.recipe import Recipe
from packager.recipe.file import RecipeFile
from packager.recipe.prompt_template import COPY_PROMPT, prompt_difference


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
        raise CalibrationError(
            "the base model has several chat templates, and none is called default",
            hint="transformers renders none of them either, unless it is named: ask the model's author",
        )
    return process.render_chats(template, tokenizer.special_tokens_map, chats)


def encode_texts(tokenizer: Any, groups: Sequence[TextGroup], process: ModelProcess) -> list[list[list[int]]]:
    """Return the token ids of each text of each group, as the tokenizer of transformers gives them.

    Raises:
        CalibrationError: the tokenizer fails, or needs too much time or memory.
    """
    split = bool(getattr(tokenizer, "split_special_tokens", False))
    return process.encode(tokenizer.backend_tokenizer.to_str(), groups, split_special_tokens=split)


def card_prompt(recipe: Recipe, tokenizer: Any, process: ModelProcess) -> LockedPrompt | None:
    """Render the conversation that the card's prompt template is compared with; None without a chat template.

    Raises:
        CalibrationError: the template cannot be rendered, renders too much, or leaves out the user's message; or there
            is none, and the recipe has prompts or questions.
    """
    if not tokenizer.chat_template:
        if recipe.loaders.prompts or recipe.evaluation.questions:
            raise CalibrationError(
                "the base model has no chat template, so prompts and questions cannot be rendered",
                hint="leave out loaders.prompts and evaluation.questions",
            )
        return None
    system_prompt = recipe.card.system_prompt
    messages = [_user("{prompt}")]
    if system_prompt is not None:
        messages.insert(0, {"role": "system", "content": system_prompt})
    chat = Chat(messages=tuple(messages), add_generation_prompt=True, date="{date}")
    (text,) = render_messages(tokenizer, [chat], process)
    if len(text) > MOST_PROMPT_CHARACTERS:
        raise CalibrationError(
            "the model's chat template renders too much for one message",
            why=f"{len(text)} characters, and {MOST_PROMPT_CHARACTERS} is the most that a card may show",
        )
    if "{prompt}" not in text:
        raise CalibrationError(
            "the model's chat template leaves out the user's message", why=f"for {{prompt}} it renders {text[:200]!r}",
            hint="the template is damaged, or wants messages of another form: ask the model's author",
        )  # fmt: skip
    return LockedPrompt(system_prompt=system_prompt, text=text, added=_added(tokenizer, text, process))


def _added(tokenizer: Any, text: str, process: ModelProcess) -> str:
    """Return the beginning of a rendered text that the tokenizer would put before it by itself, "" if there is none."""
    bos = tokenizer.bos_token
    if not bos or not text.startswith(bos):
        return ""
    ((ids,),) = encode_texts(tokenizer, [TextGroup(texts=["a"], add_special_tokens=True)], process)
    return str(bos) if ids and ids[0] == tokenizer.bos_token_id else ""


def check_prompt_template(recipe_file: RecipeFile, prompt: LockedPrompt | None) -> None:
    """Compare the card's prompt template with `card_prompt`; `plan` compares it with the lock's before.

    Raises:
        CalibrationError: the templates differ.
    """
    given = recipe_file.recipe.card.prompt_template.template
    if prompt is not None and (why := prompt_difference(given, prompt)):
        raise CalibrationError(
            "the card's prompt template is not the model's chat template",
            where=str(recipe_file.path), why=why, hint=COPY_PROMPT,
        )  # fmt: skip


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
