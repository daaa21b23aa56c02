"""tokenizer.json so that older releases of the tokenizers library read it, too."""

import re
from collections.abc import Mapping

# Most files have no pairs: they are not parsed.
_PAIRS = re.compile(rb'"merges"\s*:\s*\[\s*\[')
_VERSION = "#version"  # tokenizers reads no merge from a line that begins with it


def may_have_pairs(data: bytes) -> bool:
    """Return whether a tokenizer.json may spell its merges as pairs."""
    return _PAIRS.search(data) is not None


def model_with_merges_as_lines(document: Mapping[str, object]) -> dict[str, object] | None:
    """Return a tokenizer's `model` with each pair of `merges` as a text, "a b".

    None where they are none of pairs, or where a token of a pair has a space: then only the pair says which two it is.
    Source: tokenizers 0.19.1 and 0.23, models/bpe/serialization.rs; 0.20 is the first that reads and writes pairs.
    """
    model = document.get("model")
    merges = model.get("merges") if isinstance(model, Mapping) else None
    if not isinstance(model, Mapping) or not isinstance(merges, list) or not merges:
        return None
    lines: list[str] = []
    for pair in merges:
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(token, str) for token in pair):
            return None
        line = " ".join(pair)
        if line.count(" ") != 1 or line.startswith(_VERSION):
            return None
        lines.append(line)
    return {**model, "merges": lines}
