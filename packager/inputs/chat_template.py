"""The digest of a base model's chat template, wherever its tokenizer's files hold it."""

import hashlib
import io
from pathlib import Path

from packager.inputs.source_files import read_small, template_files
from packager.model.branch_rules import Templates
from packager.model.contract_files import TEMPLATE_FILE, template_name
from packager.model.strict_json import parse_json_object
from packager.receipt import TOKENIZER_CONFIG, digest_of


def templates_beside(folder: Path) -> Templates | None:
    """Return what transformers 5 reads of a folder's files of chat templates; None if there are none.

    Returns:
        The text of chat_template.jinja; where there are others beside it, all with their names, as a
        tokenizer_config.json spells them.

    Args:
        folder: whose files were checked before.

    Raises:
        SourceError: a file cannot be read.
    """
    names = template_files(folder)
    if names:
        return [{"name": template_name(name) or "default", "template": _text(folder, name)} for name in names]
    return _text(folder, TEMPLATE_FILE) if (folder / TEMPLATE_FILE).exists() else None


def _text(folder: Path, name: str) -> str:
    with io.TextIOWrapper(io.BytesIO(read_small(folder, name)), encoding="utf-8") as text:  # any line ending
        return text.read()


def chat_template_digest(folder: Path) -> str | None:
    """Return the sha256 of a folder's chat template, None if it has none.

    transformers takes chat_template.jinja where it is there, else the key chat_template of tokenizer_config.json. That
    is a text, or a list of templates with names, of which the digest is that of their canonical JSON; so it is of
    several files.

    Args:
        folder: whose files were checked before.

    Raises:
        SourceError: a file cannot be read.
    """
    beside = templates_beside(folder)
    if isinstance(beside, list):
        return digest_of(beside)
    if beside is not None:
        return hashlib.sha256(read_small(folder, TEMPLATE_FILE)).hexdigest()
    if not (folder / TOKENIZER_CONFIG).exists():
        return None
    template = parse_json_object(read_small(folder, TOKENIZER_CONFIG)).get("chat_template")
    if isinstance(template, str):
        return hashlib.sha256(template.encode()).hexdigest()
    return None if template is None else digest_of(template)
