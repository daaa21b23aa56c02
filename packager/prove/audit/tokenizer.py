"""The tokenizer against the embedding, and the chat template."""

import re
from collections.abc import Iterator, Mapping

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from packager.model.contract_files import CONTENT_RULES, TEMPLATE_FILE
from packager.prove.audit.config import plausible_int
from packager.prove.audit.files import JsonObject, Listing, as_object, read_text
from packager.prove.audit.finding import Findings
from packager.receipt import CONFIG, TOKENIZER, TOKENIZER_CONFIG
from packager.system.text import shown

# transformers marks the assistant's words with this tag; it is the only one that jinja2 does not know.
_GENERATION_TAG = re.compile(r"\{%[-+]?\s*(?:end)?generation\s*[-+]?%\}")


def check_tokenizer(listing: Listing, documents: Mapping[str, object], findings: Findings) -> None:
    """Check that every token id has a row in the embedding, and that there is a usable chat template."""
    config = as_object(documents.get(CONFIG)) or {}
    vocab_size = plausible_int(config.get("vocab_size"))
    tokenizer = as_object(documents.get(TOKENIZER))
    tokenizer_config = as_object(documents.get(TOKENIZER_CONFIG))
    if tokenizer is not None:
        _check_ids(TOKENIZER, _tokenizer_ids(tokenizer), vocab_size, findings)
    if (added := as_object(documents.get("added_tokens.json"))) is not None:
        _check_ids("added_tokens.json", iter(added.values()), vocab_size, findings)
    if tokenizer_config is not None:
        decoder = as_object(tokenizer_config.get("added_tokens_decoder")) or {}
        _check_ids(TOKENIZER_CONFIG, map(_number, decoder), vocab_size, findings)
        _check_template(listing, tokenizer_config, findings)


def _tokenizer_ids(tokenizer: JsonObject) -> Iterator[object]:
    """Yield every token id of a tokenizer.json, and None for what should be one and is not."""
    model = as_object(tokenizer.get("model")) or {}
    vocab = model.get("vocab")
    if isinstance(vocab, dict):
        yield from vocab.values()
    elif isinstance(vocab, list):  # Unigram: [token, score] in the order of the ids
        yield len(vocab) - 1 if vocab else None
    else:
        yield None
    added = tokenizer.get("added_tokens") or []
    for token in added if isinstance(added, list) else [None]:
        yield (as_object(token) or {}).get("id")


def _number(key: str) -> object:
    """Return a JSON key as a number if it spells a token id, any other key unchanged."""
    return int(key) if re.fullmatch("[0-9]{1,10}", key) else key


def _check_ids(name: str, ids: Iterator[object], vocab_size: int | None, findings: Findings) -> None:
    valid: list[int] = []
    for value in ids:
        number = plausible_int(value, least=0)
        if number is None:
            findings.add("tokenizer-damaged", name, f"a token has the id {shown(value)}")
        else:
            valid.append(number)
    highest = max(valid, default=-1)
    if vocab_size is not None and highest >= vocab_size:
        findings.add("tokenizer-vocab", name, f"the highest token id is {highest}, vocab_size is {vocab_size}")


def _check_template(listing: Listing, tokenizer_config: JsonObject, findings: Findings) -> None:
    value = tokenizer_config.get("chat_template")
    if value is None and not listing.has(TEMPLATE_FILE):
        findings.add("chat-template-missing", TOKENIZER_CONFIG, "there is no chat_template")
    templates = _templates(value, findings)
    if TEMPLATE_FILE in listing.sizes and (text := read_text(listing, TEMPLATE_FILE, findings)) is not None:
        templates = {place: template for place, template in templates.items() if template != text}  # read once
        templates[TEMPLATE_FILE] = text
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    left = CONTENT_RULES[TEMPLATE_FILE].most_bytes
    for place, template in templates.items():
        left -= len(template)
        if left < 0:
            findings.add("chat-template-invalid", place, "the chat templates have too many characters")
            break
        try:
            environment.parse(_GENERATION_TAG.sub("", template))
        except (TemplateError, ValueError) as error:
            findings.add("chat-template-invalid", place, f"jinja2 cannot read it: {error}")
        except RecursionError:
            findings.add("chat-template-invalid", place, "it is nested too deeply")


def _templates(value: object, findings: Findings) -> dict[str, str]:
    """Return the templates in tokenizer_config.json by location: one string, or a list of named ones."""
    place = f"{TOKENIZER_CONFIG}: chat_template"
    if value is None:
        return {}
    if isinstance(value, str):
        return {place: value}
    named = [as_object(entry) or {} for entry in value] if isinstance(value, list) else []
    templates = [entry.get("template") for entry in named]
    if not templates or not all(isinstance(template, str) for template in templates):
        findings.add("chat-template-invalid", place, "it is neither a string nor a list of named templates")
    return {f"{place}[{number}]": text for number, text in enumerate(templates) if isinstance(text, str)}
