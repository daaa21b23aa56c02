"""A tokenizer's files, written so that older releases of transformers and tokenizers read them as the newest do."""

import re
from collections.abc import Mapping

# Most files have no pairs: they are not parsed.
_PAIRS = re.compile(rb'"merges"\s*:\s*\[\s*\[')
_CLASS_OF_TRANSFORMERS_5, _CLASS = "TokenizersBackend", "PreTrainedTokenizerFast"  # transformers 5 reads them alike
_VERSION = "#version"  # tokenizers reads no merge from a line that begins with it
# The parts of a tokenizer.json that decide on ids and decoded texts; special tokens are in the config, too.
_PARTS = ("normalizer", "pre_tokenizer", "post_processor", "decoder", "model")
# Classes that replace the post-processor of tokenizer.json in transformers 4: whether they add BOS if nothing says it.
_ADDS_BOS = {
    "LlamaTokenizer": True, "CodeLlamaTokenizer": True, "GemmaTokenizer": True, "CohereTokenizer": True,
    "GPTNeoXTokenizer": False,
}  # fmt: skip
# Keys with which transformers 4 makes a tokenizer of other files, or changes what it reads in tokenizer.json.
_REMADE = ("from_slow", "add_prefix_space")

_Document = Mapping[str, object]


def config_for_all(document: _Document) -> dict[str, object]:
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


def model_with_merges_as_lines(document: _Document) -> dict[str, object] | None:
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


def other_parts(own: _Document, made: _Document) -> dict[str, object]:
    """Return the parts of a tokenizer.json that differ from those of another one: `made`'s, by key.

    Args:
        own: as the tokenizers library writes the file.
        made: as the library writes a tokenizer that a class of transformers built.
    """
    return {key: made.get(key) for key in _PARTS if _compared(key, own) != _compared(key, made)}


def _compared(key: str, document: _Document) -> object:
    """Return a part in a form in which equal ones are equal."""
    part = document.get(key)
    if key == "post_processor" and part is not None and affixes(document) == ((), ()):
        return None
    if key == "model" and isinstance(part, Mapping):
        # An empty text and none are the same.
        return {name: None if value == "" else value for name, value in part.items()}
    return part


def affixes(document: _Document) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the special tokens that a tokenizer.json puts before and after a text."""
    return _affixes(document.get("post_processor"))


def _affixes(processor: object) -> tuple[tuple[str, ...], tuple[str, ...]]:
    if not isinstance(processor, Mapping):
        return (), ()
    before: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    for inner in _items(processor.get("processors")):  # each adds to what the one before it has made
        first, last = _affixes(inner)
        before, after = (*first, *before), (*after, *last)
    names = [_special_token(item) for item in _items(processor.get("single"))]  # "" is the text
    if "" in names:
        text = names.index("")
        before, after = (*names[:text], *before), (*after, *filter(None, names[text:]))
    start, end = (_items(processor.get(key)) for key in ("cls", "sep"))  # of BertProcessing and RobertaProcessing
    if start and end:
        before, after = (str(start[0]), *before), (*after, str(end[0]))
    return before, after


def _special_token(item: object) -> str:
    token = item.get("SpecialToken") if isinstance(item, Mapping) else None
    return str(token.get("id")) if isinstance(token, Mapping) else ""


def _items(value: object) -> list[object]:
    return value if isinstance(value, list) else []


def is_read_otherwise(config: _Document, document: _Document, tokens: Mapping[str, str]) -> bool:
    """Return whether transformers 4 makes something else of a tokenizer.json than what the file says.

    Where tokenizer_config.json names no class, it takes that of the model's family.

    Args:
        config: tokenizer_config.json.
        document: tokenizer.json.
        tokens: the named special tokens.
    """
    name = str(config.get("tokenizer_class") or "").removesuffix("Fast")
    spaces = document.get("pre_tokenizer")
    wanted = config.get("add_prefix_space")
    if not name or config.get("from_slow"):
        return True
    if isinstance(spaces, Mapping) and bool(spaces.get("add_prefix_space", wanted)) != bool(wanted):
        return True
    if name not in _ADDS_BOS:
        return False
    adds_bos, adds_eos = config.get("add_bos_token", _ADDS_BOS[name]), config.get("add_eos_token", False)
    before = (tokens.get("bos_token", ""),) if adds_bos else ()
    after = (tokens.get("eos_token", ""),) if adds_eos else ()
    return (before, after) != affixes(document) or (name == "LlamaTokenizer" and wanted is not None)


def asks_for_a_prefix(config: _Document) -> bool:
    """Return whether a tokenizer_config.json asks for a tokenizer other than the one of tokenizer.json.

    Every release of transformers then builds it anew.
    """
    return any(config.get(key) is not None for key in _REMADE)


def config_of_file(config: _Document, document: _Document, defaults: _Document) -> dict[str, object]:
    """Return a tokenizer_config.json with which every transformers takes a tokenizer.json as it is.

    Args:
        config: the base model's.
        document: tokenizer.json.
        defaults: what the class that the config names adds to the keys that it has.
    """
    content = {key: value for key, value in config.items() if key not in _REMADE}
    content["tokenizer_class"] = _CLASS
    for key, value in defaults.items():
        content.setdefault(key, value)
    spaces = document.get("pre_tokenizer")
    if isinstance(spaces, Mapping) and isinstance(spaces.get("add_prefix_space"), bool):
        content["add_prefix_space"] = spaces["add_prefix_space"]  # where it is missing, transformers 4.57 writes false
    for key, tokens in zip(("add_bos_token", "add_eos_token"), affixes(document), strict=True):
        if key in content:
            content[key] = bool(tokens)  # for runtimes that read it; transformers 5 does not
    return content
