"""Read one column of a file of texts, row by row: .txt, .jsonl, .csv, .tsv and .parquet.

A file may be of any size: at most one row, or a batch of them, is in memory. What a row holds is not checked here.
"""

import codecs
import difflib
import gzip
import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import IO, Any, Final

from packager.errors import CalibrationError
from packager.model.strict_json import parse_json
from packager.system.text import printable, quoted

MOST_ROW_BYTES: Final = 64 << 20
SUFFIXES: Final = (".txt", ".jsonl", ".json", ".ndjson", ".csv", ".tsv", ".parquet")
_PACKED: Final = ".gz"
_BLOCK: Final = 1 << 20
_BATCH_ROWS: Final = 256
# A column of a parquet file's row group; writers make groups of about 100 MB.
_MOST_COLUMN_BYTES: Final = 2 << 30
_MOST_SHOWN: Final = 20
_UTF16: Final = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


class Missing(Enum):
    """The value of a row that lacks the column."""

    MISSING = "missing"


@dataclass(frozen=True, kw_only=True)
class TextFile:
    """A file of texts, and its name in messages."""

    path: Path
    shown: str

    @property
    def kind(self) -> str:
        """The suffix that states the format, without that of gzip."""
        return kind_of(self.path.name)


@dataclass(frozen=True, kw_only=True)
class TextRow:
    """The value in the wanted column of one row, the row's place for messages, and if it has no value, its columns."""

    value: object
    where: str
    columns: tuple[str, ...] = ()


def kind_of(name: str) -> str:
    """Return the suffix of a file's name that states its format, or "" if it is of none that is read."""
    suffix = Path(name.lower().removesuffix(_PACKED)).suffix
    return suffix if suffix in SUFFIXES and not (suffix == ".parquet" and name.lower().endswith(_PACKED)) else ""


def read_plain(file: TextFile) -> Iterator[str]:
    """Yield a .txt file in blocks; each line ends with a newline alone.

    Raises:
        CalibrationError: it is not UTF-8 text; states the byte.
    """
    with _reading(file), _opened(file) as raw:
        first = raw.peek(2)[:2]  # type: ignore[attr-defined]
        decoder = io.IncrementalNewlineDecoder(codecs.getincrementaldecoder("utf-8-sig")(), translate=True)
        position = 0
        while data := raw.read(_BLOCK):
            if b"\0" in data or first in _UTF16:
                raise CalibrationError(
                    "the text cannot be read", where=file.shown, why="it has NUL bytes: it is binary, or UTF-16",
                    hint="save it as UTF-8",
                )  # fmt: skip
            try:
                text = decoder.decode(data)
            except UnicodeDecodeError as error:
                raise _not_utf8(error, file.shown, f"byte {position + error.start} of the file") from error
            position += len(data)
            yield text
        try:
            yield decoder.decode(b"", final=True)
        except UnicodeDecodeError as error:
            raise _not_utf8(error, file.shown, "the end of the file") from error


def text_rows(file: TextFile, field: str) -> Iterator[TextRow]:
    """Yield the rows of a .jsonl, .csv, .tsv or .parquet file.

    A row without the column has the value `Missing.MISSING`, one with null has None.

    Raises:
        CalibrationError: the file is damaged, or a file with a header has no such column; names the file and the line.
    """
    read = {".csv": _csv_rows, ".tsv": _csv_rows, ".parquet": _parquet_rows}.get(file.kind, _json_rows)
    return read(file, field)


def json_lines(file: TextFile) -> Iterator[tuple[int, Any]]:
    """Yield the number and the value of each line; only a newline ends one, since JSON strings may contain U+2028.

    Raises:
        CalibrationError: a line is not JSON, or longer than 64 MiB; states its number.
    """
    with _reading(file), _opened(file) as stream:
        number = 0
        while line := stream.readline(MOST_ROW_BYTES + 1):
            number += 1
            where = f"{file.shown}:{number}"
            if len(line) > MOST_ROW_BYTES:
                raise CalibrationError(
                    f"a line is longer than {MOST_ROW_BYTES >> 20} MiB", where=where,
                    hint="write a JSON object per line, or a text that is one document as a .txt file",
                )  # fmt: skip
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
            if not line.strip():
                continue
            try:
                yield number, parse_json(line)
            except UnicodeDecodeError as error:
                raise _not_utf8(error, where, f"byte {error.start} of the line") from error
            except ValueError as error:
                raise CalibrationError(
                    "a line is not JSON", where=where, why=str(error), hint="write one JSON object per line"
                ) from error


def first_row(file: TextFile) -> Mapping[str, object]:
    """Return the first row of a .jsonl, .csv, .tsv or .parquet file by column; empty if there is none.

    Raises:
        CalibrationError: the file is damaged, or its first line is not a JSON object.
    """
    if file.kind not in (".csv", ".tsv", ".parquet"):
        number, record = next(json_lines(file), (0, {}))
        if not isinstance(record, dict):
            raise CalibrationError("a line is not a JSON object", where=f"{file.shown}:{number}")
        return record
    with _reading(file):
        return next(_first_of_table(file), {})


def _first_of_table(file: TextFile) -> Iterator[dict[str, object]]:
    if file.kind == ".parquet":
        from pyarrow.parquet import ParquetFile

        with ParquetFile(file.path, pre_buffer=False) as table:
            for batch in table.iter_batches(batch_size=1):
                yield from batch.to_pylist()
        return
    from pyarrow import csv

    delimiter = "\t" if file.kind == ".tsv" else ","
    with _opened(file) as stream:
        parse = csv.ParseOptions(delimiter=delimiter, newlines_in_values=True)
        with csv.open_csv(stream, csv.ReadOptions(block_size=MOST_ROW_BYTES // 4), parse) as table:
            for batch in table:
                yield from batch.slice(0, 1).to_pylist()


def no_column(field: str, columns: Sequence[str], where: str) -> CalibrationError:
    """Return the error for a column that is not there.

    Args:
        field: the column.
        columns: those that are there.
        where: the file.
    """
    close = difflib.get_close_matches(field, columns, n=1)
    shown = ", ".join(quoted(name) for name in columns[:_MOST_SHOWN])
    return CalibrationError(
        f"the text has no column {quoted(field)}",
        where=where,
        why=f"its columns are {shown}" if columns else "it has no columns",
        hint=f"did you mean {quoted(close[0])}?" if close else "set text_field or messages_field",
    )


def _json_rows(file: TextFile, field: str) -> Iterator[TextRow]:
    for number, record in json_lines(file):
        where = f"{file.shown}:{number}"
        if not isinstance(record, dict):
            raise CalibrationError(
                "a line is not a JSON object", where=where, hint=f"write one with the key {quoted(field)}"
            )
        value = record.get(field, Missing.MISSING)
        yield TextRow(value=value, where=where, columns=tuple(record) if value is Missing.MISSING else ())


def _parquet_rows(file: TextFile, field: str) -> Iterator[TextRow]:
    from pyarrow.parquet import ParquetFile

    number = 0
    with _reading(file), ParquetFile(file.path, pre_buffer=False) as table:
        _check_column(field, table.schema_arrow.names, file)
        paths = [table.schema.column(index).path for index in range(len(table.schema))]
        wanted = [index for index, path in enumerate(paths) if path.split(".")[0] == field]
        for group in range(table.num_row_groups):
            chunks = table.metadata.row_group(group)
            if any(chunks.column(index).total_uncompressed_size > _MOST_COLUMN_BYTES for index in wanted):
                raise CalibrationError(
                    f"a row group is larger than {_MOST_COLUMN_BYTES >> 30} GiB", where=file.shown,
                    hint="write the file with smaller row groups",
                )  # fmt: skip
            for batch in table.iter_batches(batch_size=_BATCH_ROWS, row_groups=[group], columns=[field]):
                for value in batch.column(0).to_pylist():
                    number += 1
                    yield TextRow(value=value, where=f"{file.shown} row {number}")


def _csv_rows(file: TextFile, field: str) -> Iterator[TextRow]:
    import pyarrow
    from pyarrow import csv

    number = 0
    delimiter = "\t" if file.kind == ".tsv" else ","
    with _reading(file), _opened(file) as stream:
        read = csv.ReadOptions(block_size=MOST_ROW_BYTES // 4)
        parse = csv.ParseOptions(delimiter=delimiter, newlines_in_values=True)
        convert = csv.ConvertOptions(column_types={field: pyarrow.string()})
        with csv.open_csv(stream, read, parse, convert) as table:
            _check_column(field, table.schema.names, file)
            for batch in table:
                for value in batch.column(table.schema.get_field_index(field)).to_pylist():
                    number += 1
                    yield TextRow(value=value, where=f"{file.shown} row {number}")


def _check_column(field: str, columns: Sequence[str], file: TextFile) -> None:
    if field not in columns:
        raise no_column(field, columns, file.shown)


@contextmanager
def _opened(file: TextFile) -> Iterator[IO[bytes]]:
    with gzip.open(file.path) if file.path.name.lower().endswith(_PACKED) else file.path.open("rb") as stream:
        yield io.BufferedReader(stream) if isinstance(stream, gzip.GzipFile) else stream


@contextmanager
def _reading(file: TextFile) -> Iterator[None]:
    """Translate what the readers of files raise.

    Raises:
        CalibrationError: instead.
    """
    try:
        yield
    except UnicodeDecodeError as error:
        raise _not_utf8(error, file.shown, "a value") from error
    except (OSError, EOFError, ValueError, KeyError, NotImplementedError) as error:  # pyarrow's own are among them
        why = printable(str(error).splitlines()[0])[:300] if str(error) else type(error).__name__
        raise CalibrationError(
            "the text cannot be read", where=file.shown, why=why, hint="make the file again: it is damaged or cut short"
        ) from error


def _not_utf8(error: UnicodeDecodeError, where: str, place: str) -> CalibrationError:
    byte = error.object[error.start]
    return CalibrationError(
        "the text cannot be read", where=where, why=f"it is not UTF-8: can't decode byte {byte:#04x} at {place}",
        hint="save it as UTF-8",
    )  # fmt: skip
