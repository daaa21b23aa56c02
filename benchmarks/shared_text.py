"""Find the lines of a held-out text that are in the calibration text too, as `packager build` would."""

from __future__ import annotations

import re
from collections.abc import Iterable

# The build compares windows of as many words (packager/inputs/overlap.py), and shorter lines as a whole.
_WINDOW_WORDS = 12
_LINE_WORDS = 5
_WORD = re.compile(r"[^\W_]+")


class CalibrationText:
    """The words of a calibration text."""

    def __init__(self, documents: Iterable[str]) -> None:
        self._windows: set[tuple[str, ...]] = set()
        self._lines: set[tuple[str, ...]] = set()
        for document in documents:
            words = _words(document)
            self._windows.update(zip(*(words[start:] for start in range(_WINDOW_WORDS)), strict=False))
            self._lines.update(tuple(_words(line)) for line in document.split("\n"))

    def shared_lines(self, document: str) -> set[int]:
        """Return the numbers of the lines that have a word of a shared window, or are a line of five words or more."""
        lines = [_words(line) for line in document.split("\n")]
        shared = {
            number for number, words in enumerate(lines) if len(words) >= _LINE_WORDS and tuple(words) in self._lines
        }
        placed = [(word, number) for number, words in enumerate(lines) for word in words]
        for begin in range(len(placed) - _WINDOW_WORDS + 1):
            window = placed[begin : begin + _WINDOW_WORDS]
            if tuple(word for word, _ in window) in self._windows:
                shared.update(number for _, number in window)
        return shared


def _words(text: str) -> list[str]:
    return [word.lower() for word in _WORD.findall(text)]
