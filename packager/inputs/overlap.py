"""Find evaluation text that is also calibration text: quality measured on such text proves nothing.

Both texts become words, so line breaks, case, punctuation and the division into documents do not matter. Windows of 12
words are compared; GPT-3's decontamination used 13 (arXiv 2005.14165, appendix C).
"""

import re
import unicodedata
from collections.abc import Iterator, Sequence

from packager.errors import CalibrationError

_WINDOW_WORDS = 12
# Web pages share single lines (a licence, a cookie notice), which is no leak. 50 words in a row are a copy (the
# threshold of arXiv 2107.06499), and so are short documents or lines with as many words together.
_LEAK_WORDS = 50
# Pieces under 12 words have no window and are compared whole. Honest splits share headings such as "See also", so a
# shared piece counts if it has as many characters as this, or if half of the evaluation's words are in shared pieces.
_LEAK_CHARACTERS = 64
# Each character of scripts without spaces counts as a word: Thai, Lao, Burmese, Khmer, Japanese, Chinese.
_NO_SPACES = r"\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff"
_WORD = re.compile(rf"[{_NO_SPACES}]|[^\W_{_NO_SPACES}]+")

Words = list[str]
Window = tuple[str, ...]


def check_overlap(calibration: Sequence[str], evaluation: Sequence[str], *, where: str = "") -> None:
    """Refuse evaluation text that is also calibration text.

    The texts overlap if 50 consecutive words of an evaluation document are in a calibration document, or if whole
    short pieces with 50 words together are: documents, or the lines of a text that is a single document. Of pieces
    under 12 words, those count that have 64 characters, or all if they hold half of the evaluation's words.

    Args:
        calibration: documents.
        evaluation: documents.
        where: the evaluation text, for the message.

    Raises:
        CalibrationError: the texts overlap.
    """
    documents = [_words(text) for text in evaluation]
    found = _shared(calibration, documents)
    run = max((run for document in documents for run in _runs(document, found)), key=len, default=[])
    lines = documents if len(evaluation) > 1 else [_words(line) for text in evaluation for line in text.split("\n")]
    pieces = list(dict.fromkeys(tuple(line) for line in lines if line in list(_runs(line, found))))
    if len(run) < _LEAK_WORDS and sum(map(len, pieces)) >= _LEAK_WORDS:
        pieces = _contained(pieces, calibration)  # before, the windows of a piece may be from several documents
    pieces += _shared_short(calibration, lines)
    words = max(len(run), sum(map(len, pieces)))
    if words >= _LEAK_WORDS:
        raise CalibrationError(
            "the evaluation text overlaps the calibration text",
            where=where,
            why=f"{words} of its words are in both, for example {' '.join([*pieces, run][0])[:60]!r}",
            hint="evaluate on another split: quality measured on the calibration text proves nothing",
        )


def _contained(pieces: Sequence[Window], calibration: Sequence[str]) -> list[Window]:
    """Return the pieces whose words stand one after the other in a calibration document."""
    texts = [f" {' '.join(_words(text))} " for text in calibration]
    return [piece for piece in pieces if any(f" {' '.join(piece)} " in text for text in texts)]


def _shared_short(calibration: Sequence[str], lines: Sequence[Words]) -> list[Window]:
    """Return the pieces under 12 words that are a whole document or line of the calibration text, if they count."""
    known = {tuple(line) for line in lines if 0 < len(line) < _WINDOW_WORDS}
    found: set[Window] = set()
    if known:
        for text in calibration:
            found |= known.intersection(tuple(_words(piece)) for piece in (text, *text.split("\n")))
    num_shared = sum(len(line) for line in lines if tuple(line) in found)
    most = 2 * num_shared >= sum(map(len, lines))
    return sorted(piece for piece in found if most or len(" ".join(piece)) >= _LEAK_CHARACTERS)


def _words(text: str) -> Words:
    return _WORD.findall(unicodedata.normalize("NFC", text.casefold()))


def _windows(words: Words) -> Iterator[Window]:
    return zip(*(words[start:] for start in range(_WINDOW_WORDS)), strict=False)


def _shared(calibration: Sequence[str], evaluation: Sequence[Words]) -> set[Window]:
    """Return the windows that both have. The evaluation's are kept in memory: that text is the smaller one."""
    known = {window for words in evaluation for window in _windows(words)}
    found: set[Window] = set()
    for text in calibration:
        found |= known.intersection(_windows(_words(text)))
    return found


def _runs(words: Words, found: set[Window]) -> Iterator[Words]:
    """Yield the longest stretches of a document whose windows are all shared."""
    begin: int | None = None
    number = -1
    for number, window in enumerate(_windows(words)):
        if window in found:
            begin = number if begin is None else begin
        elif begin is not None:
            yield words[begin : number + _WINDOW_WORDS - 1]
            begin = None
    if begin is not None:
        yield words[begin : number + _WINDOW_WORDS]
