"""Draw a sample of a text: enough of it for the wanted rows of tokens, and no more.

Plain documents are one text, with an empty line between two, as the usual scripts for GPTQ and perplexity join them
(GPTQ's own; transformers' guide "Perplexity of fixed-length models"), unless the recipe calls them separate.
Conversations are rendered in the model's chat template. A text that is not larger than the sample is the sample.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from packager.errors import CalibrationError
from packager.inputs.conversations import conversation, is_conversation, kind_of_value, size_of
from packager.inputs.drawing import draw, pieces, stretches
from packager.inputs.limits import Chat
from packager.inputs.text_files import Missing, TextFile, TextRow, no_column, read_plain, text_rows
from packager.recipe.text_models import TextSource

SEPARATOR: Final = "\n\n"
# English has 4 to 5 characters per token. A piece of 16 gives three rows and a rest, which is lost.
_CHARACTERS_PER_TOKEN: Final = 7
_PIECE_PER_TOKEN: Final = 16

Render = Callable[[Sequence[Chat]], Sequence[str]]


@dataclass(frozen=True, kw_only=True)
class WantedRows:
    """The rows of token ids to draw from one text.

    Attributes:
        text: as the recipe names it.
        files: that hold it.
        license: that the dataset's page states.
        num_rows: how many.
        seq_len: tokens of a row.
        seed: of the draw.
    """

    text: TextSource
    files: tuple[TextFile, ...]
    license: str | None
    num_rows: int
    seq_len: int
    seed: int

    @property
    def where(self) -> str:
        """The text, for messages."""
        return self.text.path or f"{self.text.dataset} ({self.text.split})"


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A part of a text.

    Attributes:
        texts: stretches of plain text, documents or conversations; in the text's order.
        everything: whether this is the whole text.
        left_out: rows of the files that hold no text.
        text_sha256: of the whole text.
    """

    texts: tuple[str, ...]
    everything: bool
    left_out: int
    text_sha256: str


def draw_sample(wanted: WantedRows, factor: int, render: Render) -> Sample:
    """Draw a sample that is `factor` times as large as rows of usual text need.

    Args:
        wanted: the rows that are to be cut from it.
        factor: 1, or more if such a sample gave too few rows.
        render: renders conversations in the model's chat template.

    Raises:
        CalibrationError: the text cannot be read, or a row holds something else than text; names the file and the row.
    """
    reader = _Reader(wanted)
    least = factor * wanted.num_rows * wanted.seq_len * _CHARACTERS_PER_TOKEN
    texts: Sequence[str]
    if wanted.text.messages_field is not None:
        chats = draw(reader.conversations(), size_of, least=least, seed=wanted.seed)
        texts, everything = render([chat for _, chat in chats.units]), chats.everything
    elif wanted.text.documents == "separate":
        documents = draw(reader.documents(), len, least=least, seed=wanted.seed)
        texts, everything = [document for _, document in documents.units], documents.everything
    else:
        found = draw(pieces(reader.blocks(), _PIECE_PER_TOKEN * wanted.seq_len), len, least=least, seed=wanted.seed)
        texts, everything = stretches(found), found.everything
    _check_not_blank(texts, wanted)
    return Sample(
        texts=tuple(texts), everything=everything, left_out=reader.left_out, text_sha256=reader.digest.hexdigest()
    )


def _check_not_blank(texts: Sequence[str], wanted: WantedRows) -> None:
    size = sum(map(len, texts))
    blank = size - sum(len("".join(text.split())) for text in texts)
    if 2 * blank > size:
        raise CalibrationError(
            "the text is mostly blank", where=wanted.where,
            why=f"{blank} of the {size} characters that were drawn are spaces and line breaks",
            hint="set text_field to the column that holds the text, or give another text",
        )  # fmt: skip


class _Reader:
    """Reads a text once: counts the rows that hold none, and computes its digest.

    Attributes:
        left_out: how many rows are null, lack the column, or are conversations without a message.
        digest: sha256 of what was read.
    """

    def __init__(self, wanted: WantedRows) -> None:
        self._wanted = wanted
        self.left_out = 0
        self.digest = hashlib.sha256()

    def blocks(self) -> Iterator[str]:
        """Yield the documents with a separator between two, in blocks."""
        for number, block in enumerate(self._documents()):
            for part in block if number == 0 else self._after_separator(block):
                self.digest.update(part.encode())
                yield part

    def documents(self) -> Iterator[str]:
        """Yield the documents that are not empty."""
        for document in map("".join, self._documents()):
            if document:
                self.digest.update(json.dumps(document).encode())
                yield document

    def conversations(self) -> Iterator[Chat]:
        """Yield the conversations that have a message."""
        for row in self._rows():
            chat = conversation(row.value, row.where)
            if not chat.messages:
                self.left_out += 1
                continue
            self.digest.update(json.dumps([dict(message) for message in chat.messages]).encode())
            yield chat

    @staticmethod
    def _after_separator(block: Iterator[str]) -> Iterator[str]:
        yield SEPARATOR
        yield from block

    def _documents(self) -> Iterator[Iterator[str]]:
        """Yield each document: a .txt file in blocks, or a row."""
        plain = [file for file in self._wanted.files if file.kind == ".txt"]
        for file in plain:
            yield read_plain(file)
        if len(plain) < len(self._wanted.files):
            for row in self._rows():
                yield iter([_text_of(row)])

    def _rows(self) -> Iterator[TextRow]:
        """Yield the rows that have a value.

        Raises:
            CalibrationError: no row has one.
        """
        found, lacking = False, None
        for file in self._wanted.files:
            if file.kind == ".txt":
                if self._wanted.text.messages_field is not None:
                    raise CalibrationError(
                        "a .txt file holds no conversations", where=file.shown, hint="give a .jsonl file"
                    )
                continue
            for row in text_rows(file, self._wanted.text.column):
                if row.value is None or row.value is Missing.MISSING:
                    self.left_out += 1
                    lacking = lacking or row
                    continue
                found = True
                yield row
        if lacking is not None and not found:
            if lacking.value is Missing.MISSING:
                raise no_column(self._wanted.text.column, lacking.columns, lacking.where)
            raise CalibrationError(
                f"the column {self._wanted.text.column!r} is null in every row", where=self._wanted.where,
                hint="set text_field or messages_field to a column with a value",
            )  # fmt: skip


def _text_of(row: TextRow) -> str:
    if isinstance(row.value, str):
        return row.value
    chat = is_conversation(row.value)
    raise CalibrationError(
        "a row has no text", where=row.where,
        why=f"its value is {'a list of messages' if chat else kind_of_value(row.value)}",
        hint="write messages_field in the place of text_field" if chat else "set text_field to a column of text",
    )  # fmt: skip
