"""What each file of a model that is copied into a branch holds, and how large it may be (docs/reference/format.md)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from packager.model.strict_json import parse_json_object
from packager.receipt import CONFIG, GENERATION_CONFIG, TOKENIZER, TOKENIZER_CONFIG, TOKENIZER_MODEL

MOST_LICENSE_BYTES = 1_000_000
TEMPLATE_FILE = "chat_template.jinja"
# Named templates beside the default one, as transformers 5 saves them; a branch has them in tokenizer_config.json.
TEMPLATE_FOLDER = "additional_chat_templates"
_WIRE_VARINT, _WIRE_64, _WIRE_BYTES, _WIRE_32 = 0, 1, 2, 5
_MAX_VARINT_BYTES = 10
_MODEL_PROTO_FIELDS = 5  # pieces, trainer_spec, normalizer_spec, self_test_data, denormalizer_spec
_MOST_EXTENSIONS = 200  # field numbers from here on are for other programs
# Keys with which a tokenizer_config.json may name a file, which transformers 4 opens in the place of the usual one.
# transformers 5 does not (PreTrainedTokenizerBase._from_pretrained), so a branch and our own reading are without them.
TOKENIZER_FILE_KEYS = ("tokenizer_file", "vocab_file", "merges_file", "spm_file")
# Keys of tokenizer_config.json and config.json with which every transformers opens another file than the usual one.
_OTHER_FILES = ("fast_tokenizer_files", "configuration_files")


@dataclass(frozen=True, kw_only=True)
class ContentRule:
    """What a file holds: a JSON object, UTF-8 text, or a sentencepiece model; and its largest size."""

    kind: Literal["json", "text", "sentencepiece"]
    most_bytes: int


# The largest that are known: tokenizer.json 33 MB and tokenizer_config.json 1.2 MB (Gemma 3), tokenizer.model 4.7 MB.
CONTENT_RULES: Mapping[str, ContentRule] = {
    CONFIG: ContentRule(kind="json", most_bytes=1 << 20),
    GENERATION_CONFIG: ContentRule(kind="json", most_bytes=1 << 20),
    TOKENIZER: ContentRule(kind="json", most_bytes=64_000_000),
    TOKENIZER_CONFIG: ContentRule(kind="json", most_bytes=16_000_000),
    TOKENIZER_MODEL: ContentRule(kind="sentencepiece", most_bytes=64_000_000),
    "special_tokens_map.json": ContentRule(kind="json", most_bytes=1 << 20),
    "added_tokens.json": ContentRule(kind="json", most_bytes=16_000_000),
    "vocab.json": ContentRule(kind="json", most_bytes=32_000_000),
    "merges.txt": ContentRule(kind="text", most_bytes=32_000_000),
    TEMPLATE_FILE: ContentRule(kind="text", most_bytes=1_000_000),
}


def content_rule(name: str) -> ContentRule | None:
    """Return the rule of a file of a base model; None for a licence, which is text."""
    return CONTENT_RULES[TEMPLATE_FILE] if template_name(name) else CONTENT_RULES.get(name)


def template_name(name: str) -> str:
    """Return the name of the chat template in a file of TEMPLATE_FOLDER; "" for any other file."""
    folder, _, file = name.partition("/")
    return (
        file.removesuffix(".jinja") if folder == TEMPLATE_FOLDER and file.endswith(".jinja") and "/" not in file else ""
    )


def check_content(name: str, data: bytes) -> None:
    """Check the content of a file that has a rule.

    Raises:
        ValueError: it is not what a file of this name holds; the text is a sentence about the content.
    """
    rule = content_rule(name)
    kind = rule.kind if rule else "text"
    if kind == "json":
        value = parse_json_object(data)
        for key in (*_OTHER_FILES, *(() if name == TOKENIZER_CONFIG else TOKENIZER_FILE_KEYS)):
            if names_other_file(value.get(key)):
                raise ValueError(f"its key {key} names another file, which would be read in the place of the usual one")
    elif kind == "text":
        check_text(data)
    elif problem := _sentencepiece_problem(data):
        raise ValueError(f"it is not a sentencepiece model: {problem}")


def names_other_file(value: object) -> bool:
    """Return whether a key's value opens another file than the usual one; null and the usual name do not."""
    return value is not None and not (isinstance(value, str) and value in CONTENT_RULES)


def check_text(data: bytes) -> None:
    """Raise ValueError unless `data` is UTF-8 text without NUL characters."""
    if b"\0" in data:
        raise ValueError("it holds a NUL character, so it is not text")
    try:
        data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"it is not UTF-8 text: {error.reason} at byte {error.start}") from error


def _sentencepiece_problem(data: bytes) -> str:
    """Return why `data` is not a ModelProto, or "".

    Its outermost fields are read: https://github.com/google/sentencepiece/blob/master/src/sentencepiece_model.proto
    """
    position, pieces = 0, 0
    while position < len(data):
        tag, position = _varint(data, position)
        field, wire = tag >> 3, tag & 7
        known = 1 <= field <= _MODEL_PROTO_FIELDS and wire == _WIRE_BYTES
        if not known and field < _MOST_EXTENSIONS:
            return "it has a field that such a model does not have"
        if wire == _WIRE_BYTES:
            size, position = _varint(data, position)
            position += size
        elif wire in (_WIRE_64, _WIRE_32):
            position += 8 if wire == _WIRE_64 else 4
        elif wire == _WIRE_VARINT:
            _, position = _varint(data, position)
        else:
            return "it has a field of an unknown kind"
        pieces += field == 1
    if position != len(data):
        return "it ends inside a field"
    return "" if pieces else "it has no pieces"


def _varint(data: bytes, position: int) -> tuple[int, int]:
    """Return a protobuf integer and the position after it; a position beyond the data where it ends too early."""
    value = 0
    for count in range(_MAX_VARINT_BYTES):
        if position + count >= len(data):
            break
        byte = data[position + count]
        value |= (byte & 0x7F) << (7 * count)
        if byte < 0x80:
            return value, position + count + 1
    return 0, len(data) + 1
