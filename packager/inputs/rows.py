"""Make rows of token ids from samples of texts.

A row is consecutive tokens of a text. It begins with the tokens that the tokenizer puts before a text (<s> for Llama's,
none for GPT-2's), and such tokens are nowhere else in it unless the text or the chat template has them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from packager.errors import CalibrationError
from packager.inputs.chat import encode_texts
from packager.inputs.drawing import drawn_numbers
from packager.inputs.limits import ModelProcess, TextGroup
from packager.inputs.samples import Render, Sample, WantedRows, draw_sample
from packager.receipt import MixedText, TextRecord, digest_of

if TYPE_CHECKING:
    import torch

_PROBE: Final = "The river runs."

Ids = Sequence[int]


@dataclass(frozen=True, kw_only=True)
class TokenRows:
    """Token ids int64 [num_samples, seq_len], and the record of their text."""

    ids: "torch.Tensor"
    record: TextRecord


@dataclass(frozen=True, kw_only=True)
class DrawnRows:
    """The rows of one text, and the sample that they were drawn from."""

    wanted: WantedRows
    sample: Sample
    rows: tuple[tuple[int, ...], ...]
    prefix: tuple[str, ...]


def draw_rows(
    tokenizer: Any, wanted: Sequence[WantedRows], render: Render, process: ModelProcess
) -> tuple[DrawnRows, ...]:
    """Draw samples of texts, tokenize them, and draw rows from all whole rows in them, without repetition.

    If a sample gives too few rows, one of twice the size is drawn, up to the whole text.

    Raises:
        CalibrationError: a text cannot be read or is too short, or the tokenizer fails.
    """
    prefix = _prefix_of(tokenizer, process)
    names = tuple(str(name) for name in tokenizer.convert_ids_to_tokens(list(prefix)))
    drawn: dict[int, DrawnRows] = {}
    factor = 1
    while left := [index for index in range(len(wanted)) if index not in drawn]:
        samples = [draw_sample(wanted[index], factor, render) for index in left]
        groups = [TextGroup(texts=sample.texts, add_special_tokens=False) for sample in samples]
        for index, sample, encoded in zip(left, samples, encode_texts(tokenizer, groups, process), strict=True):
            rows = cut_rows(encoded, prefix, wanted[index])
            if len(rows) >= wanted[index].num_rows:
                numbers = drawn_numbers(wanted[index].num_rows, of=len(rows), seed=wanted[index].seed)
                chosen = tuple(tuple(rows[number]) for number in numbers)
                drawn[index] = DrawnRows(wanted=wanted[index], sample=sample, rows=chosen, prefix=names)
            elif sample.everything:
                raise _too_little(wanted[index], sample, encoded, num_rows=len(rows), num_prefix=len(prefix))
        factor *= 2
    return tuple(drawn[index] for index in range(len(wanted)))


def cut_rows(encoded: Sequence[Ids], prefix: Ids, wanted: WantedRows) -> list[list[int]]:
    """Cut the token ids of a sample into whole rows, each with the prefix.

    Rows of plain text follow each other without a gap, and none is of two stretches. A row of separate documents or of
    conversations begins with one; the next ones follow until it is full, and the rest of the last one is left out,
    unless it is a document of which whole rows are left.
    """
    rows: list[list[int]] = []
    length = wanted.seq_len - len(prefix)
    if wanted.text.documents == "separate":
        return _rows_of_documents(encoded, prefix, wanted.seq_len)
    if wanted.text.messages_field is None:
        for ids in encoded:
            rows += [[*prefix, *ids[begin : begin + length]] for begin in range(0, len(ids) - length + 1, length)]
        return rows
    row: list[int] = []
    for ids in encoded:
        row += ids[len(prefix) :] if list(ids[: len(prefix)]) == list(prefix) else ids
        if len(row) >= length:
            rows.append([*prefix, *row[:length]])
            row = []
    return rows


def _rows_of_documents(encoded: Sequence[Ids], prefix: Ids, seq_len: int) -> list[list[int]]:
    rows: list[list[int]] = []
    row: list[int] = []
    for ids in encoded:
        row += [*prefix, *ids]
        while len(row) >= seq_len:
            rows.append(row[:seq_len])
            rest = [*prefix, *row[seq_len:]]
            row = rest if len(rest) >= seq_len else []
    return rows


def token_rows(drawn: Sequence[DrawnRows]) -> TokenRows:
    """Return the rows of one text, or of several, one after the other."""
    import torch

    ids = torch.tensor([row for text in drawn for row in text.rows], dtype=torch.int64)
    mixed = tuple(_mixed_text(text) for text in drawn)
    first = mixed[0]
    return TokenRows(
        ids=ids,
        record=TextRecord(
            source=" + ".join(text.source for text in mixed),
            revision=first.revision if len(mixed) == 1 else None,
            config=first.config if len(mixed) == 1 else None,
            split=first.split if len(mixed) == 1 else None,
            license=first.license if len(mixed) == 1 else None,
            conversations=all(text.conversations for text in mixed),
            num_samples=ids.shape[0],
            seq_len=ids.shape[1],
            seed=drawn[0].wanted.seed,
            text_sha256=first.text_sha256 if len(mixed) == 1 else digest_of([text.text_sha256 for text in mixed]),
            digest=digest_of(ids.tolist()),
            row_prefix=drawn[0].prefix,
            separate=all(text.wanted.text.documents == "separate" for text in drawn),
            left_out=sum(text.sample.left_out for text in drawn),
            mixed=mixed if len(mixed) > 1 else (),
        ),
    )


def _mixed_text(drawn: DrawnRows) -> MixedText:
    text = drawn.wanted.text
    return MixedText(
        source=text.name, revision=text.revision, config=text.config, split=text.split, license=drawn.wanted.license,
        conversations=text.messages_field is not None, text_sha256=drawn.sample.text_sha256,
        num_samples=len(drawn.rows),
    )  # fmt: skip


def _prefix_of(tokenizer: Any, process: ModelProcess) -> tuple[int, ...]:
    """Return the ids that the tokenizer puts before a text; those that it puts after one belong to no row.

    Raises:
        CalibrationError: it also changes the ids between them.
    """
    groups = [TextGroup(texts=[_PROBE], add_special_tokens=special) for special in (True, False)]
    (whole,), (plain,) = encode_texts(tokenizer, groups, process)
    for begin in range(len(whole) - len(plain) + 1):
        if whole[begin : begin + len(plain)] == plain:
            return tuple(whole[:begin])
    raise CalibrationError(
        "the tokenizer gives a text other tokens if it adds special ones",
        why=f"{_PROBE!r} has the ids {plain[:20]}, and with special tokens {whole[:20]}",
        hint="the post_processor of tokenizer.json may put tokens before and after a text, not change it",
    )


def _too_little(
    wanted: WantedRows, sample: Sample, encoded: Sequence[Ids], *, num_rows: int, num_prefix: int
) -> CalibrationError:
    found = sum(map(len, encoded))
    needed = wanted.num_rows * (wanted.seq_len - num_prefix)
    missing = needed - found
    why = f"{wanted.num_rows} rows of {wanted.seq_len} tokens need {needed}; the text has {found}"
    if wanted.text.messages_field is not None:
        missing = max(missing, (wanted.num_rows - num_rows) * wanted.seq_len)
        why += " in conversations, of which each row takes whole ones but the last"
    if sample.left_out:
        why += f"; {sample.left_out} of its rows have no {wanted.text.column!r}"
    return CalibrationError(
        f"too little text: {missing} tokens are missing",
        where=wanted.where,
        why=why,
        hint=f"give more text, or fewer or shorter rows: it has {num_rows} of this length",
    )
