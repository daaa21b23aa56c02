"""Stage 4, calibrate: text becomes seeded rows of token ids, for quantizing and, from other text, for evaluating."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from packager.errors import CalibrationError
from packager.inputs.base_model import SourceModel, hub_errors
from packager.receipt import TOKENIZER, TOKENIZER_CONFIG, TOKENIZER_MODEL, TextRecord, digest_of
from packager.recipe import Calibration, Evaluation, TextSource
from packager.recipe.file import RecipeFile

if TYPE_CHECKING:
    import torch

# Shorter pieces (headings, blank lines) repeat in any corpus; a repeated piece of this length is a leak.
_LEAK_CHARACTERS = 64


@dataclass(frozen=True, kw_only=True)
class TokenRows:
    """Token ids int64 [num_samples, seq_len], and where they came from."""

    ids: "torch.Tensor"
    record: TextRecord


@dataclass(frozen=True, kw_only=True)
class Question:
    """A prompt with the one right answer, as token ids; the answer ends with the token that ends a turn."""

    prompt_ids: tuple[int, ...]
    answer_ids: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class TextSets:
    """Everything that is text in a build."""

    calibration: TokenRows
    evaluation: TokenRows
    questions: tuple[Question, ...]
    prompts: tuple[tuple[int, ...], ...]


def prepare(recipe_file: RecipeFile, source: SourceModel) -> TextSets:
    """Read and tokenize calibration text, evaluation text, questions and prompts, each once.

    Raises:
        CalibrationError: unreadable, too little text, overlapping splits, or a tokenizer that does not fit the model.
    """
    recipe = recipe_file.recipe
    tokenizer = load_tokenizer(source)
    _check_vocabulary(tokenizer, source)
    calibration_texts = read_texts(recipe.calibration, recipe_file)
    evaluation_texts = read_texts(recipe.evaluation, recipe_file)
    _check_overlap(calibration_texts, evaluation_texts)
    check_prompt_template(recipe_file, tokenizer)
    calibration = make_rows(
        recipe.calibration, calibration_texts, tokenizer, num_samples=recipe.calibration.num_samples,
        seed=recipe.calibration.seed,
    )  # fmt: skip
    evaluation = make_rows(
        recipe.evaluation, evaluation_texts, tokenizer,
        num_samples=max(1, recipe.evaluation.num_tokens // recipe.evaluation.seq_len), seed=None,
    )  # fmt: skip
    return TextSets(
        calibration=calibration,
        evaluation=evaluation,
        questions=_read_questions(recipe.evaluation, recipe_file, tokenizer),
        prompts=tuple(tuple(prompt_ids(tokenizer, prompt)) for prompt in recipe.loaders.prompts),
    )


def load_tokenizer(source: SourceModel) -> Any:
    """Return the base model's tokenizer.

    Raises:
        CalibrationError: there is none, or it cannot be read.
    """
    from transformers import AutoTokenizer

    files = source.record.files
    if TOKENIZER_CONFIG not in files or not {TOKENIZER, TOKENIZER_MODEL} & files.keys():
        raise CalibrationError(
            "the base model has no tokenizer",
            where=str(source.folder),
            why="a branch needs tokenizer_config.json, and tokenizer.json or tokenizer.model",
            hint="take the tokenizer files from the same revision as the weights",
        )
    try:
        return AutoTokenizer.from_pretrained(source.folder, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises plain Exception for a damaged tokenizer.json
        raise CalibrationError(
            "the base model's tokenizer cannot be read", where=str(source.folder), why=str(error)
        ) from error


def read_texts(text: TextSource, recipe_file: RecipeFile) -> list[str]:
    """Return the documents of a text source, in order.

    Raises:
        CalibrationError: not readable; a JSONL line without the field (names file and line).
        SourceError: the Hub refused.
    """
    if text.path is not None:
        return _read_file(recipe_file.resolve(text.path), text.text_field)
    import datasets

    with hub_errors(f"the dataset {text.dataset}"):
        try:
            rows = datasets.load_dataset(text.dataset, text.config, revision=text.revision, split=text.split)
        except (ValueError, datasets.exceptions.DatasetsError) as error:
            raise CalibrationError("the dataset cannot be read", where=str(text.dataset), why=str(error)) from error
    if text.text_field not in rows.column_names:
        raise CalibrationError(
            f"the dataset has no column {text.text_field!r}",
            where=str(text.dataset),
            why=f"its columns are {', '.join(rows.column_names)}",
            hint="set text_field",
        )
    return [str(value) for value in rows[text.text_field]]


def _read_file(path: Path, field: str) -> list[str]:
    if path.suffix != ".jsonl":
        return [_read_text(path)]
    texts = []
    for number, record in _json_lines(path):
        if not isinstance(record, dict) or not isinstance(record.get(field), str):
            raise CalibrationError(f"a line has no text {field!r}", where=f"{path}:{number}", hint="set text_field")
        texts.append(record[field])
    return texts


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CalibrationError("the text cannot be read", where=str(path), why=str(error)) from error


def _json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    """Yield the number and the value of each line; U+2028 and its like may stand inside a JSON string."""
    for number, line in enumerate(_read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            yield number, json.loads(line)
        except ValueError as error:
            raise CalibrationError("a line is not JSON", where=f"{path}:{number}", why=str(error)) from error


def make_rows(
    text: TextSource, texts: Sequence[str], tokenizer: Any, *, num_samples: int, seed: int | None
) -> TokenRows:
    """Tokenize documents one after the other and cut the stream into rows.

    With a seed, rows are drawn from all whole rows of the stream without repetition; without one, the first rows are
    taken.

    Raises:
        CalibrationError: too little text; says how many tokens are missing.
    """
    import torch

    seq_len = text.seq_len if isinstance(text, Calibration | Evaluation) else 0
    stream: list[int] = []
    encoded = tokenizer(list(texts), add_special_tokens=True, verbose=False)["input_ids"] if texts else []
    for ids in encoded:
        stream.extend(ids)
    needed = num_samples * seq_len
    where = text.path or f"{text.dataset} ({text.split})"
    if len(stream) < needed:
        raise CalibrationError(
            f"too little text: {needed - len(stream)} tokens are missing",
            where=where,
            why=f"{num_samples} rows of {seq_len} tokens need {needed}; the text has {len(stream)}",
            hint="give more text, or fewer or shorter rows",
        )
    rows = torch.tensor(stream[: len(stream) // seq_len * seq_len], dtype=torch.int64).reshape(-1, seq_len)
    if seed is not None:
        generator = torch.Generator().manual_seed(seed)
        rows = rows[torch.randperm(rows.shape[0], generator=generator)[:num_samples]]
    rows = rows[:num_samples].contiguous()
    record = TextRecord(
        source=text.dataset or Path(str(text.path)).name,
        revision=text.revision,
        config=text.config,
        split=text.split,
        num_samples=num_samples,
        seq_len=seq_len,
        seed=seed,
        text_sha256=texts_digest(texts),
        digest=digest_of(rows.tolist()),
    )
    return TokenRows(ids=rows, record=record)


def texts_digest(texts: Sequence[str]) -> str:
    """Return the sha256 of a list of documents."""
    return digest_of(list(texts))


def _check_overlap(calibration: Sequence[str], evaluation: Sequence[str]) -> None:
    seen = set(_long_pieces(calibration))
    shared = [piece for piece in _long_pieces(evaluation) if piece in seen]
    if shared:
        raise CalibrationError(
            "the evaluation text overlaps the calibration text",
            why=f"{len(shared)} of its documents or lines are in both, the first begins {shared[0][:40]!r}",
            hint="evaluate on another split: what was calibrated on measures nothing",
        )


def _long_pieces(texts: Sequence[str]) -> Iterator[str]:
    """Yield the documents, or the lines of a single one; web pages share single lines, which is no leak."""
    pieces = texts if len(texts) > 1 else [line for text in texts for line in text.split("\n")]
    return (piece.strip() for piece in pieces if len(piece.strip()) >= _LEAK_CHARACTERS)


def prompt_ids(tokenizer: Any, prompt: str) -> list[int]:
    """Return the token ids of a user's message in the model's own chat template, ready for an answer."""
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
    """Compare the card's prompt template with the tokenizer's chat template, where it has one.

    Raises:
        CalibrationError: they differ (the 2023 card taught a format the model had never seen), or prompts and questions
            are asked for and there is no chat template.
    """
    recipe = recipe_file.recipe
    if not tokenizer.chat_template:
        if recipe.loaders.prompts or recipe.evaluation.questions:
            raise CalibrationError(
                "the base model has no chat template, so prompts and questions cannot be asked",
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
            why=f"the card says {given!r}, the tokenizer renders {rendered!r}",
            hint="copy the rendered text into card.prompt_template.template",
        )


def _read_questions(evaluation: Evaluation, recipe_file: RecipeFile, tokenizer: Any) -> tuple[Question, ...]:
    if evaluation.questions is None:
        return ()
    path = recipe_file.resolve(evaluation.questions)
    questions = []
    for number, record in _json_lines(path):
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
        questions.append(Question(prompt_ids=tuple(asked), answer_ids=tuple(whole[len(asked) :])))
    return tuple(questions)


def _check_vocabulary(tokenizer: Any, source: SourceModel) -> None:
    largest = max(tokenizer.get_vocab().values(), default=-1)
    if largest >= source.architecture.vocab_size:
        raise CalibrationError(
            "the tokenizer does not fit the model's vocabulary",
            where=str(source.folder),
            why=f"its largest token id is {largest}, the embedding has {source.architecture.vocab_size} rows",
            hint="take the tokenizer files from the same revision as the weights",
        )
