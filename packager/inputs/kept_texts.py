"""Keep a build's token ids in a file, so that the next run of the build does not read and tokenize its texts again.

The file names everything that determines the ids, see `origin_of`. It is written as a whole, and read as if others had
written it: a file that is cut short, edited or of other inputs is not used, and the log says why.
"""

import base64
import sys
from array import array
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, Final, Literal, cast

from pydantic import Field, ValidationError

import packager
from packager.errors import MachineError
from packager.inputs.base_model import SourceModel
from packager.inputs.chat import Question
from packager.inputs.rows import TokenRows
from packager.inputs.texts import TextSets, prepare
from packager.model.branch_config import BranchFile
from packager.model.branch_rules import BRANCH_RULES_VERSION
from packager.receipt import TextRecord, digest_of
from packager.recipe import Recipe
from packager.recipe.fields import DRAWING_VERSION
from packager.recipe.file import RecipeFile
from packager.recipe.text_models import TextSource
from packager.records import Record
from packager.system.files import open_regular, sha256_file, write_atomic

# Ids are 4 bytes, of which base64 makes 5.3; what questions, prompts and a tokenizer may take beside the rows.
_BYTES_PER_ID: Final = 6
_OTHER_BYTES: Final = 192 << 20
_LIBRARIES: Final = ("transformers", "tokenizers", "jinja2", "pyarrow")

_TokenIds = tuple[Annotated[int, Field(ge=0, strict=True)], ...]


class _KeptRows(Record):
    """Rows of token ids: what is known of their text, and the ids as base64 of little-endian int32."""

    record: TextRecord
    ids: str


class _KeptQuestion(Record):
    prompt_ids: _TokenIds
    answer_ids: _TokenIds


class _KeptFile(Record):
    """A file of a branch's tokenizer, see `branch_tokenizer`."""

    name: Literal["tokenizer.json", "tokenizer_config.json"]
    text: str
    changes: tuple[str, ...]


class _KeptTexts(Record):
    """The file.

    Attributes:
        origin: of `origin_of`.
        digest: of everything else, as canonical JSON.
    """

    origin: dict[str, str]
    calibration: _KeptRows
    evaluation: _KeptRows
    questions: tuple[_KeptQuestion, ...]
    prompts: tuple[_TokenIds, ...]
    tokenizer_files: tuple[_KeptFile, ...]
    digest: str


def prepare_once(
    recipe_file: RecipeFile, source: SourceModel, path: Path, log: Callable[[str], None]
) -> TextSets:  # fmt: skip
    """Return the texts of a build as token ids: those that an earlier run kept at `path`, or made now and kept there.

    Args:
        recipe_file: of the build.
        source: the base model.
        path: of the file.
        log: gets a line if the file is used, and one with the reason if it cannot be.

    Raises:
        CalibrationError, SourceError: see `prepare`.
    """
    origin = origin_of(recipe_file, source)
    if path.is_symlink() or path.exists():
        try:
            texts = _read(path, origin, recipe_file.recipe, source.architecture.vocab_size)
        except (OSError, ValueError) as error:
            log(f"rows are drawn again: {path.name} {_reason(error)}")
        else:
            log(f"rows are those that an earlier run drew: {path}")
            return texts
    texts = prepare(recipe_file, source)
    try:
        write_atomic(path, _written(origin, texts))
    except (MachineError, OSError) as error:
        log(f"rows are not kept for the next run: {error}")
    return texts


def origin_of(recipe_file: RecipeFile, source: SourceModel) -> dict[str, str]:
    """Return everything that determines a build's token ids, by name: contents, the recipe's keys, the programs."""
    recipe = recipe_file.recipe
    calibration, evaluation = recipe.calibration, recipe.evaluation
    template = {"text": recipe.card.prompt_template.template, "system": recipe.card.system_prompt}
    questions = evaluation.questions
    return {
        "calibration": digest_of(calibration.model_dump(mode="json")),
        "evaluation": digest_of(evaluation.text()),
        "prompts": digest_of([list(recipe.loaders.prompts), template]),
        "text of the calibration": digest_of([_content(text, recipe_file) for text in calibration.texts]),
        "text of the evaluation": _content(evaluation, recipe_file),
        "questions": sha256_file(recipe_file.resolve(questions)) if questions is not None else "",
        # Of the base model; a branch gets them by rules, and the tokenizer is made of those.
        "tokenizer": digest_of(
            {name: source.small[name].sha256 for name in (*source.files.copied, *source.files.templates)}
        ),
        "config.json": digest_of([source.config, source.architecture.vocab_size, BRANCH_RULES_VERSION]),
        "packager": f"{packager.__version__}, drawing {DRAWING_VERSION}",
        **{name: metadata.version(name) for name in _LIBRARIES},
    }


def _content(text: TextSource, recipe_file: RecipeFile) -> str:
    """Return the digest of a local file; a dataset's commit, which the recipe or its lock gives, identifies it."""
    return sha256_file(recipe_file.resolve(text.path)) if text.path is not None else f"{text.dataset}@{text.revision}"


def _written(origin: dict[str, str], texts: TextSets) -> bytes:
    kept = _KeptTexts(
        origin=origin,
        calibration=_kept_rows(texts.calibration),
        evaluation=_kept_rows(texts.evaluation),
        questions=tuple(
            _KeptQuestion(prompt_ids=question.prompt_ids, answer_ids=question.answer_ids)
            for question in texts.questions
        ),
        prompts=texts.prompts,
        tokenizer_files=tuple(
            _KeptFile(name=cast(Any, name), text=file.data.decode(), changes=file.changes)
            for name, file in texts.tokenizer_files.items()
        ),
        digest="",
    )
    return kept.model_copy(update={"digest": _digest(kept)}).model_dump_json().encode()


def _digest(kept: _KeptTexts) -> str:
    return digest_of(kept.model_dump(mode="json", exclude={"digest"}))


def _kept_rows(rows: TokenRows) -> _KeptRows:
    ids = array("i", rows.ids.flatten().tolist())
    return _KeptRows(record=rows.record, ids=base64.b64encode(_little_endian(ids).tobytes()).decode())


def _little_endian(ids: "array[int]") -> "array[int]":
    if sys.byteorder == "big":
        ids.byteswap()
    return ids


def _read(path: Path, origin: dict[str, str], recipe: Recipe, vocab_size: int) -> TextSets:
    """Return the texts of a file.

    Raises:
        OSError: it cannot be read.
        ValueError: it is damaged, or of another origin; says what is wrong with it.
    """
    calibration, evaluation = recipe.calibration, recipe.evaluation
    num_ids = calibration.num_samples * calibration.seq_len + evaluation.num_rows * evaluation.seq_len
    most = _BYTES_PER_ID * num_ids + _OTHER_BYTES
    with open_regular(path) as stream:
        data = stream.read(most + 1)
    if len(data) > most:
        raise ValueError("is larger than what it should hold")
    kept = _KeptTexts.model_validate_json(data)
    if differ := [name for name in origin if origin[name] != kept.origin.get(name)]:
        raise ValueError(f"is of other inputs: {', '.join(differ)}")
    if _digest(kept) != kept.digest:
        raise ValueError("does not have the digest that it states")
    questions = tuple(
        Question(prompt_ids=question.prompt_ids, answer_ids=question.answer_ids) for question in kept.questions
    )
    for ids in (*kept.prompts, *(part for each in questions for part in (each.prompt_ids, each.answer_ids))):
        _check_ids(ids, vocab_size)
    return TextSets(
        calibration=_rows_of(kept.calibration, calibration.num_samples, calibration.seq_len, vocab_size),
        evaluation=_rows_of(kept.evaluation, evaluation.num_rows, evaluation.seq_len, vocab_size),
        questions=questions,
        prompts=kept.prompts,
        tokenizer_files={
            file.name: BranchFile(data=file.text.encode(), changes=file.changes) for file in kept.tokenizer_files
        },
    )


def _rows_of(kept: _KeptRows, num_rows: int, seq_len: int, vocab_size: int) -> TokenRows:
    """Return kept rows.

    Raises:
        ValueError: they are not as many, not of this length, or not those of their record.
    """
    import torch

    ids = array("i")
    ids.frombytes(base64.b64decode(kept.ids, validate=True))
    if len(ids) != num_rows * seq_len:
        raise ValueError(f"holds {len(ids)} ids where {num_rows} rows of {seq_len} are wanted")
    listed = _little_endian(ids).tolist()
    _check_ids(listed, vocab_size)
    rows = torch.tensor(listed, dtype=torch.int64).view(num_rows, seq_len)
    record = kept.record
    if (record.num_samples, record.seq_len, record.digest) != (num_rows, seq_len, digest_of(rows.tolist())):
        raise ValueError("holds other rows than it states")
    return TokenRows(ids=rows, record=record)


def _check_ids(ids: Sequence[int], vocab_size: int) -> None:
    if ids and not 0 <= min(ids) <= max(ids) < vocab_size:
        raise ValueError(f"holds a token id that is not one of the {vocab_size} of the model")


def _reason(error: OSError | ValueError) -> str:
    if isinstance(error, ValidationError):
        return f"is damaged: {error.errors(include_url=False, include_input=False)[0]['msg']}"
    if isinstance(error, OSError):
        return f"cannot be read: {error.strerror or error}"
    return str(error)
