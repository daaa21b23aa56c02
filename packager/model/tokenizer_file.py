"""A tokenizer's files, written so that older releases of transformers and tokenizers read them as the newest do."""

import re
from collections.abc import Mapping

# Most files have no pairs: they are not parsed.
_PAIRS = re.compile(rb'"merges"\s*:\s*\[\s*\[')
_CLASS_OF_TRANSFORMERS_5, _CLASS = "TokenizersBackend", "PreTrainedTokenizerFast"  # transformers 5 reads them alike
_VERSION = "#version"  # tokenizers reads no merge from a line that begins with it


def config_for_all(document: Mapping[str, object]) -> dict[str, object]:
    """Return what must be changed in a tokenizer_config.json so that transformers 4 reads it as 5 does.

    The class of 5 has another name in 4. Where the file gives no value, 4 adds token_type_ids, which decoders refuse,
    and takes spaces out of decoded texts, which 5 does not (no file that 4 wrote lacks that value).
    """
    changes: dict[str, object] = {}
    if document.get("tokenizer_class") == _CLASS_OF_TRANSFORMERS_5:
        changes["tokenizer_class"] = _CLASS
    if document.get("tokenizer_class") in (_CLASS_OF_TRANSFORMERS_5, _CLASS) and "model_input_names" not in document:
        changes["model_input_names"] = ["input_ids", "attention_mask"]
    if "backend" in document and "clean_up_tokenization_spaces" not in document:
        changes["clean_up_tokenization_spaces"] = False
    return changes


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
