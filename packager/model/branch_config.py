"""The configs of a branch are ours: a base model is pinned, so its configs are changed on the way into a branch.

config.json, generation_config.json, tokenizer_config.json and tokenizer.json get there after the rules of
`branch_rules`. Decision 19. No torch here: `plan` must stay fast.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from packager.model.branch_rules import (
    BRANCH_RULES,
    DROPPED,
    NORMALIZED_FILES,
    BranchRule,
    Document,
    ModelFacts,
    int_value,
)
from packager.model.config_values import shortened
from packager.model.strict_json import parse_json_object
from packager.model.tokenizer_file import may_have_pairs
from packager.receipt import TOKENIZER, TOKENIZER_CONFIG
from packager.system.text import printable


@dataclass(frozen=True, kw_only=True)
class NormalizedDocument:
    """A config as a branch gets it.

    Attributes:
        content: the document.
        changes: a sentence for each key that differs from the base model's.
    """

    content: dict[str, object]
    changes: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class BranchFile:
    """A file as a branch gets it, and a sentence for each value that differs from the base model's."""

    data: bytes
    changes: tuple[str, ...] = ()


def normalized(name: str, document: Document, facts: ModelFacts) -> NormalizedDocument:
    """Return a config as a branch gets it; a document without anything to change is returned as it is.

    Args:
        name: one of NORMALIZED_FILES.
        document: the base model's.
        facts: of the model.
    """
    changes: list[str] = []
    rules = [rule for rule in BRANCH_RULES if name in rule.files]
    content = _normalized_object(name, document, facts, rules, changes)
    return NormalizedDocument(content=content, changes=tuple(map(printable, changes)))


def branch_file(name: str, data: bytes, facts: ModelFacts) -> BranchFile:
    """Return a file as a branch gets it: the same bytes, unless a rule changes one of its values.

    Args:
        name: of any file that is copied into a branch.
        data: the base model's, which was checked by `contract_files`.
        facts: of the model.
    """
    if name not in NORMALIZED_FILES or (name == TOKENIZER and not may_have_pairs(data)):
        return BranchFile(data=data)
    found = normalized(name, parse_json_object(data), facts)
    if not found.changes:
        return BranchFile(data=data)
    # Escapes for the characters of a vocabulary would make a large file larger.
    return BranchFile(data=json_bytes(found.content, ascii_only=name != TOKENIZER), changes=found.changes)


def json_bytes(content: Document, *, ascii_only: bool = True) -> bytes:
    """Return a config as it is written to a branch."""
    return (json.dumps(content, indent=2, ensure_ascii=ascii_only) + "\n").encode()


def _normalized_object(
    place: str, document: Document, facts: ModelFacts, rules: Iterable[BranchRule], changes: list[str]
) -> dict[str, object]:
    """Apply rules to an object and to the objects inside it; what was changed is added to `changes`."""
    content = dict(document)
    for rule in rules:
        for key, value in rule.changes(content, facts).items():
            if value is DROPPED:
                del content[key]
                changes.append(f"{place}: {key} is dropped: {rule.reason}")
            elif place == TOKENIZER:  # its values are too large to be shown
                changes.append(f"{place}: {key} is written anew: {rule.reason}")
                content[key] = value
            else:
                before = shortened(content[key]) if key in content else "absent"
                changes.append(f"{place}: {key} is {shortened(value)} and was {before}: {rule.reason}")
                content[key] = value
    if place not in (TOKENIZER_CONFIG, TOKENIZER):  # the objects inside are tokens
        for key, value in content.items():
            if isinstance(value, Mapping) and key != "quantization_config":
                inner = replace(facts, vocab_size=int_value(value.get("vocab_size")))
                own = [rule for rule in rules if rule.everywhere or key.endswith("_config")]
                content[key] = _normalized_object(f"{place}: {key}", value, inner, own, changes)
    return content
