"""The digest of a base model's chat template, wherever its tokenizer's files hold it."""

import hashlib
import io
from pathlib import Path

from packager.inputs.source_files import read_small
from packager.model.strict_json import parse_json_object
from packager.receipt import TOKENIZER_CONFIG, digest_of

_TEMPLATE = "chat_template.jinja"


def template_beside(folder: Path) -> str | None:
    """Return the text of a folder's chat_template.jinja as transformers reads it, None if there is none.

    Args:
        folder: whose files were checked before.

    Raises:
        SourceError: the file cannot be read.
    """
    if not (folder / _TEMPLATE).exists():
        return None
    with io.TextIOWrapper(io.BytesIO(read_small(folder, _TEMPLATE)), encoding="utf-8") as text:  # any line ending
        return text.read()


def chat_template_digest(folder: Path) -> str | None:
    """Return the sha256 of a folder's chat template, None if it has none.

    transformers takes chat_template.jinja where it is there, else the key chat_template of tokenizer_config.json. That
    is a text, or a list of templates with names, of which the digest is that of their canonical JSON.

    Args:
        folder: whose files were checked before.

    Raises:
        SourceError: a file cannot be read.
    """
    if (folder / _TEMPLATE).exists():
        return hashlib.sha256(read_small(folder, _TEMPLATE)).hexdigest()
    if not (folder / TOKENIZER_CONFIG).exists():
        return None
    template = parse_json_object(read_small(folder, TOKENIZER_CONFIG)).get("chat_template")
    if isinstance(template, str):
        return hashlib.sha256(template.encode()).hexdigest()
    return None if template is None else digest_of(template)
