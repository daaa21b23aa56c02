"""Stage 4, calibrate: read the texts of a build and cut them into rows of token ids.

Calibration rows are drawn with a seed; evaluation rows come from other text.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from packager.errors import CalibrationError
from packager.inputs.base_model import SourceModel
from packager.inputs.chat import (
    AskedQuestion,
    Question,
    card_prompt,
    check_prompt_template,
    encode_texts,
    prompt_chat,
    question_of,
    read_questions,
    render_messages,
)
from packager.inputs.hub_models import hub_errors
from packager.inputs.limits import ModelProcess, TextGroup
from packager.inputs.overlap import check_overlap
from packager.inputs.tokenizer import check_vocabulary, open_tokenizer
from packager.model.strict_json import parse_json
from packager.receipt import TextRecord, digest_of
from packager.recipe import Calibration, Evaluation, TextSource
from packager.recipe.file import RecipeFile

if TYPE_CHECKING:
    import torch

# A token is rarely longer than this many of the words that the overlap check counts.
_WORDS_PER_TOKEN = 4


@dataclass(frozen=True, kw_only=True)
class TokenRows:
    """Token ids int64 [num_samples, seq_len], and the record of their text."""

    ids: "torch.Tensor"
    record: TextRecord


@dataclass(frozen=True, kw_only=True)
class TextSets:
    """All texts of a build as token ids.

    Attributes:
        calibration: rows that the quantizer sees.
        evaluation: held-out rows.
        questions: with their answers.
        prompts: token ids after each of which loaders generate.
    """

    calibration: TokenRows
    evaluation: TokenRows
    questions: tuple[Question, ...]
    prompts: tuple[tuple[int, ...], ...]


def prepare(recipe_file: RecipeFile, source: SourceModel) -> TextSets:
    """Read and tokenize calibration text, evaluation text, questions and prompts, each once.

    Raises:
        CalibrationError: a text cannot be read, is too short or overlaps the other; the tokenizer or the prompt
            template does not fit the model.
        SourceError: the Hub refused a dataset.
    """
    with ModelProcess() as process:
        return _prepare(recipe_file, source, process)


def _prepare(recipe_file: RecipeFile, source: SourceModel, process: ModelProcess) -> TextSets:
    recipe = recipe_file.recipe
    tokenizer = load_tokenizer(source, process)
    check_vocabulary(tokenizer, source.architecture.vocab_size, str(source.folder))
    calibration_texts = read_texts(recipe.calibration, recipe_file)
    evaluation_texts = read_texts(recipe.evaluation, recipe_file)
    check_overlap(
        calibration_texts, evaluation_texts, num_words=_WORDS_PER_TOKEN * recipe.evaluation.num_tokens
    )  # fmt: skip
    asked = _questions(recipe.evaluation, recipe_file)
    check_prompt_template(recipe_file, card_prompt(recipe, tokenizer, process))
    chats = [chat for question in asked for chat in question.chats]
    chats += [prompt_chat(prompt) for prompt in recipe.loaders.prompts]
    rendered = render_messages(tokenizer, chats, process) if chats else []
    calibration_ids, evaluation_ids, rendered_ids = encode_texts(
        tokenizer,
        [
            TextGroup(texts=calibration_texts, add_special_tokens=True),
            TextGroup(texts=evaluation_texts, add_special_tokens=True),
            TextGroup(texts=rendered, add_special_tokens=False),
        ],
        process,
    )
    calibration = make_rows(
        recipe.calibration, calibration_texts, calibration_ids, num_samples=recipe.calibration.num_samples,
        seed=recipe.calibration.seed,
    )  # fmt: skip
    evaluation = make_rows(
        recipe.evaluation, evaluation_texts, evaluation_ids,
        num_samples=max(1, recipe.evaluation.num_tokens // recipe.evaluation.seq_len), seed=None,
    )  # fmt: skip
    pairs = zip(asked, rendered_ids[: 2 * len(asked) : 2], rendered_ids[1 : 2 * len(asked) : 2], strict=True)
    return TextSets(
        calibration=calibration,
        evaluation=evaluation,
        questions=tuple(question_of(*pair) for pair in pairs),
        prompts=tuple(tuple(ids) for ids in rendered_ids[2 * len(asked) :]),
    )


def load_tokenizer(source: SourceModel, process: ModelProcess) -> Any:
    """Return the base model's tokenizer.

    It is made of copies of the files that a branch gets, so that it is the branch's and reads nothing else.

    Args:
        source: the base model.
        process: reads the tokenizer before this process does.

    Raises:
        CalibrationError: see `open_tokenizer`.
        SourceError: one of its files was replaced since it was checked.
    """
    files = {name: source.copied(name) for name in source.files.copied}
    return open_tokenizer(files, source.config, str(source.folder), process)


def read_texts(text: TextSource, recipe_file: RecipeFile) -> list[str]:
    """Return the documents of a text source, in order.

    Raises:
        CalibrationError: the text cannot be read, or a JSONL line lacks the field; names file and line.
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
    """Yield the number and the value of each line; only a newline ends one, since JSON strings may contain U+2028."""
    for number, line in enumerate(_read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            yield number, parse_json(line.encode())
        except ValueError as error:
            raise CalibrationError("a line is not JSON", where=f"{path}:{number}", why=str(error)) from error


def make_rows(
    text: Calibration | Evaluation,
    texts: Sequence[str],
    encoded: Sequence[Sequence[int]],
    *,
    num_samples: int,
    seed: int | None,
) -> TokenRows:
    """Cut the token ids of documents, one after the other, into rows.

    With a seed, rows are drawn from all whole rows of the stream without repetition. Without one, the first rows are
    taken.

    Returns:
        int64 [num_samples, text.seq_len].

    Raises:
        CalibrationError: too little text; the message states how many tokens are missing.
    """
    import torch

    stream: list[int] = []
    for ids in encoded:
        stream.extend(ids)
    needed = num_samples * text.seq_len
    where = text.path or f"{text.dataset} ({text.split})"
    if len(stream) < needed:
        raise CalibrationError(
            f"too little text: {needed - len(stream)} tokens are missing",
            where=where,
            why=f"{num_samples} rows of {text.seq_len} tokens need {needed}; the text has {len(stream)}",
            hint="give more text, or fewer or shorter rows",
        )
    rows = torch.tensor(stream[: len(stream) // text.seq_len * text.seq_len], dtype=torch.int64)
    rows = rows.reshape(-1, text.seq_len)
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
        seq_len=text.seq_len,
        seed=seed,
        text_sha256=texts_digest(texts),
        digest=digest_of(rows.tolist()),
    )
    return TokenRows(ids=rows, record=record)


def texts_digest(texts: Sequence[str]) -> str:
    """Return the sha256 of a list of documents."""
    return digest_of(list(texts))


def _questions(evaluation: Evaluation, recipe_file: RecipeFile) -> tuple[AskedQuestion, ...]:
    if evaluation.questions is None:
        return ()
    path = recipe_file.resolve(evaluation.questions)
    return read_questions(path, _json_lines(path))
