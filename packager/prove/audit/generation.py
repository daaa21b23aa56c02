"""Special token ids against the embedding, and generation_config.json: what transformers refuses is an error.

What transformers takes, although it does not mean what was written, is a warning.
"""

from collections.abc import Mapping

from packager.model.branch_rules import TOKEN_ID_KEYS
from packager.prove.audit.config import plausible_int
from packager.prove.audit.files import JsonObject, as_object
from packager.prove.audit.finding import Findings
from packager.receipt import CONFIG, GENERATION_CONFIG
from packager.system.text import shown

# Sampling parameters that transformers ignores, with a warning, unless do_sample is true: values that mean "unset".
_SAMPLING_DEFAULTS: Mapping[str, float] = {"temperature": 1, "top_p": 1, "top_k": 50, "typical_p": 1, "min_p": 0}


def check_special_ids(documents: Mapping[str, object], findings: Findings) -> None:
    """Check the ids of special tokens in config.json and generation_config.json."""
    config = as_object(documents.get(CONFIG)) or {}
    vocab_size = plausible_int(config.get("vocab_size"))
    for name in (CONFIG, GENERATION_CONFIG):
        if vocab_size and (document := as_object(documents.get(name))) is not None:
            _check_ids(name, document, vocab_size, findings)


def _check_ids(name: str, document: JsonObject, vocab_size: int, findings: Findings) -> None:
    for key in TOKEN_ID_KEYS:
        value = document.get(key)
        for number in value if isinstance(value, list) else [value]:
            found = plausible_int(number, least=-vocab_size)
            if number is None or (found is not None and 0 <= found < vocab_size):
                continue
            message = f"{key} is {shown(number)}, expected a token id below {vocab_size}"
            # Models give their pad_token_id to torch.nn.Embedding, which counts a negative one from the end.
            fatal = found is None or (name == CONFIG and key == "pad_token_id" and found >= vocab_size)
            findings.add("token-id-range" if fatal else "token-id-unknown", f"{name}: {key}", message)


def check_generation(documents: Mapping[str, object], findings: Findings) -> None:
    """Check generation_config.json as transformers does when it opens one, and when it generates with it."""
    document = as_object(documents.get(GENERATION_CONFIG))
    if document is None:
        return
    samples = document.get("do_sample") is True
    for key, expected in _refused_values(document, samples=samples).items():
        message = f"{key} is {shown(document[key])}, expected {expected}"
        findings.add("generation-value", f"{GENERATION_CONFIG}: {key}", message)
    if samples:
        return
    for key, unset in _SAMPLING_DEFAULTS.items():
        if document.get(key) not in (None, unset):
            message = f"{key} is {shown(document[key])}, but do_sample is not true"
            findings.add("generation-sampling", f"{GENERATION_CONFIG}: {key}", message)


def _refused_values(document: JsonObject, *, samples: bool) -> dict[str, str]:
    """Return the keys whose values transformers refuses, and what it expects.

    Source: transformers 5.23, GenerationConfig.validate, and, for the parameters of sampling, which are read only where
    do_sample is true, transformers.generation.logits_process.
    """
    refused: dict[str, str] = {}
    if document.get("do_sample") is not None and not isinstance(document["do_sample"], bool):
        refused["do_sample"] = "true or false"
    if document.get("max_new_tokens") is not None and plausible_int(document["max_new_tokens"]) is None:
        refused["max_new_tokens"] = "a positive whole number"
    if not samples:
        return refused
    if document.get("temperature") is not None and not _is_number(document["temperature"], above=0):
        refused["temperature"] = "a number above 0"
    if document.get("top_p") is not None and not _is_number(document["top_p"], least=0, most=1):
        refused["top_p"] = "a number from 0 to 1"
    if document.get("top_k") is not None and plausible_int(document["top_k"], least=0) is None:
        refused["top_k"] = "a whole number"
    return refused


def _is_number(
    value: object, *, above: float = float("-inf"), least: float = float("-inf"), most: float = float("inf")
) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and above < value and least <= value <= most
