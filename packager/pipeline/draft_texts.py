"""What a recipe says of a local text: the column that is read, and as many rows as the text surely gives."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from statistics import median_low
from typing import Any, Final

from packager.errors import RecipeError
from packager.inputs.text_files import SUFFIXES, TextFile, first_row, kind_of, read_plain, text_rows
from packager.recipe.text_models import Calibration, Evaluation
from packager.system.text import quoted

_BYTES_PER_TOKEN: Final = 6  # more than of any text that a model's tokenizer was made for
_USUAL_BYTES_PER_TOKEN: Final = 4  # of English
# Documents are many and short from these numbers on, of the first ones that are looked at.
_MANY_DOCUMENTS: Final = 32
_DOCUMENTS_PER_ROW: Final = 2
_LOOKED_AT: Final = 1000
_MOST_READ_BYTES: Final = 256_000_000  # a larger file of almost nothing but blanks counts as short


def text_fields(file: Path, folder: Path) -> dict[str, Any]:
    """Return a local text as a recipe in `folder` names it, with the column that its first row has.

    Raises:
        CalibrationError: the file is not of the kind that its name states, or damaged.
        RecipeError: it lies elsewhere, or is of a kind that is not read.
    """
    if not file.resolve().is_relative_to(folder.resolve()):
        raise RecipeError(
            f"the text {quoted(str(file))} is not in the recipe's folder",
            hint=f"copy it into {folder}: a recipe and its texts belong together",
        )
    fields: dict[str, Any] = {"path": file.resolve().relative_to(folder.resolve()).as_posix()}
    kind = kind_of(file.name)
    if not kind:
        raise RecipeError(f"the text {quoted(file.name)} is of no kind that is read", hint=f"use {', '.join(SUFFIXES)}")
    if kind == ".txt":
        return fields
    columns = first_row(TextFile(path=file, shown=str(file)))
    for name, value in columns.items():
        if isinstance(value, list) and value and all(isinstance(turn, Mapping) for turn in value):
            return {**fields, "messages_field": name}
    texts = {name: value for name, value in columns.items() if isinstance(value, str)}
    if not texts:
        shown = ", ".join(map(quoted, columns)) or "none"
        raise RecipeError(f"no column of {quoted(file.name)} is a text", hint=f"its columns are {shown}")
    if "text" in texts:
        return fields
    return {**fields, "text_field": max(texts, key=lambda name: len(texts[name]))}


def rows_of_text(
    file: Path, fields: Mapping[str, Any], lengths: Sequence[int], *, most_tokens: int, wanted: int
) -> tuple[int, int]:
    """Return how many rows of how many tokens a text surely gives: long rows, if there are as many as wanted.

    Args:
        file: the text.
        fields: see `text_fields`.
        lengths: of rows, the longest first.
        most_tokens: that the model takes.
        wanted: how many rows are enough.

    Raises:
        CalibrationError: the file is damaged.
        RecipeError: it does not give one row.
    """
    fitting = [length for length in lengths if length <= most_tokens] or [most_tokens]
    tokens = _content_bytes(file, fields, enough=wanted * fitting[0] * _BYTES_PER_TOKEN) // _BYTES_PER_TOKEN
    length = next((length for length in fitting if tokens >= wanted * length), fitting[-1])
    if tokens < length:
        raise RecipeError(f"the text {quoted(file.name)} is too short", hint=f"it has to have at least {length} tokens")
    return min(wanted, tokens // length), length


def documents_note(texts: Mapping[str, Calibration | Evaluation], folder: Path) -> str:
    """Return a sentence on texts whose many short documents a recipe joins, "" if there are none.

    Args:
        texts: local ones of a recipe, by their section.
        folder: of the recipe.

    Raises:
        CalibrationError: one of the first rows of a file cannot be read.
    """
    short = {section: text.name for section, text in texts.items() if _joins_short_documents(text, folder)}
    if not short:
        return ""
    return (
        f"the documents of {' and '.join(dict.fromkeys(short.values()))} are joined into one text, and most are far "
        f"shorter than a row: if each is a text of its own, write documents: separate under {' and '.join(short)}"
    )


def _joins_short_documents(text: Calibration | Evaluation, folder: Path) -> bool:
    """Return whether a row of a local text will hold parts of several documents, by the first ones of the file."""
    source = TextFile(path=folder / str(text.path), shown=str(text.path))
    if text.documents != "joined" or text.messages_field is not None or source.kind == ".txt":
        return False
    row_bytes, read, sizes = text.seq_len * _USUAL_BYTES_PER_TOKEN, 0, []
    for row in islice(text_rows(source, text.column), _LOOKED_AT):
        if isinstance(row.value, str) and row.value.strip():
            sizes.append(len(row.value.encode("utf-8", "replace")))
            read += sizes[-1]
        if read > _LOOKED_AT * row_bytes:
            break
    return len(sizes) >= _MANY_DOCUMENTS and _DOCUMENTS_PER_ROW * median_low(sizes) <= row_bytes


def _content_bytes(file: Path, fields: Mapping[str, Any], *, enough: int) -> int:
    """Return the bytes of a text without blanks at the ends of lines, unpacked; reads no more than is needed."""
    content = read = 0
    for text in _texts(file, fields):
        content += sum(len(line.strip().encode("utf-8", "replace")) + 1 for line in text.splitlines() if line.strip())
        read += len(text) + 1
        if content >= enough or read > _MOST_READ_BYTES:
            break
    return content


def _texts(file: Path, fields: Mapping[str, Any]) -> Iterator[str]:
    source = TextFile(path=file, shown=str(file))
    if source.kind == ".txt":
        yield from read_plain(source)
        return
    for row in text_rows(source, fields.get("messages_field") or fields.get("text_field") or "text"):
        turns = row.value if isinstance(row.value, list) else [{"": row.value}]
        said = [value for turn in turns if isinstance(turn, Mapping) for value in turn.values()]
        yield "\n".join(value for value in said if isinstance(value, str))
