"""Text that must not be published: paths and names of the building machine, and secrets.

Vocabularies are searched for secrets only: "/home" and "file://" are ordinary tokens.
"""

import json
import re
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

from packager.prove.audit.files import Listing, read_document, read_text
from packager.prove.audit.finding import Findings
from packager.receipt import PROVENANCE, README, TOKENIZER

_TEXT_SUFFIXES = (".md", ".txt", ".json", ".jsonl", ".jinja", ".yaml", ".yml", ".py", ".svg")
_VOCABULARIES = (TOKENIZER, "vocab.json", "vocab.txt", "merges.txt", "added_tokens.json")
_SHOWN_SECRET = 6
# Strings of a JSON file are searched together: three searches for each of a million strings take many seconds.
_BATCH_STRINGS, _BATCH_CHARACTERS = 10_000, 1_000_000

_SECRETS = re.compile(
    r"(?<![A-Za-z0-9])(?:"
    r"hf_[A-Za-z0-9]{20,}|api_org_[A-Za-z0-9]{20,}"  # Hugging Face
    r"|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_[A-Za-z0-9_]{20,}|glpat-[A-Za-z0-9_-]{20,}"  # GitHub, GitLab
    r"|sk-[A-Za-z0-9_-]{32,}|AKIA[0-9A-Z]{16}"  # OpenAI and its like, AWS
    r"|-----BEGIN [A-Z ]{0,20}PRIVATE KEY-----"
    r"|https?://[^\s/:@\"'<>]{1,80}:[^\s/:@\"'<>]{1,80}@"  # a password in an address
    r")"
)
_PATHS = re.compile(
    r"(?<![\w.:/~})$\\-])/(?:home|Users|root|tmp|mnt|workspace|scratch|content|kaggle|private|var)/[\w.+@%-]+"
    r"|\bfile://[^\s\"'`)>\]]+"
    r"|(?<![A-Za-z0-9\\])[C-Z]:(?:\\{1,2}(?:(?:[Uu]sers|[Tt]e?mp)\b|(?![nrtbfuvx])\w)|/[Uu]sers/)"
)
_HOSTS = re.compile(
    r"(?<![\w.-])(?:ip-\d{1,3}(?:-\d{1,3}){3}"
    r"|[A-Za-z0-9-]{1,63}(?:\.[A-Za-z0-9-]{1,63}){0,4}\.(?:internal|lan|corp|intranet))(?![\w.-])"
    r"|(?<![\w.-])(?!git@)[a-z_][a-z0-9_-]{0,31}@[A-Za-z0-9.-]{1,80}:[~/]"
)
# A whole JSON string, or a line of one, that is an absolute path, whatever its first folder.
_WHOLE_PATH = re.compile(r"^/[\w.+@-]+(?:/[\w.+@-]+)+/?$", re.MULTILINE)


def check_privacy(
    listing: Listing,
    documents: Mapping[str, object],
    findings: Findings,
    *,
    private_words: Sequence[str] = (),
    complete: bool,
) -> None:
    """Search all text files for local paths, names of machines or users, and secrets.

    Args:
        listing: the folder.
        documents: its parsed JSON files.
        findings: where to report.
        private_words: this machine's host or user name, if they are distinctive.
        complete: whether README.md and provenance.json are searched.
    """
    words = [re.escape(word) for word in private_words if word]
    private = re.compile(rf"(?<![\w-])(?:{'|'.join(words)})(?![\w-])", re.IGNORECASE) if words else None
    for name in listing.sizes:
        base = name.rpartition("/")[2]
        if not complete and name in (README, PROVENANCE):
            continue
        if not is_text(name):
            continue
        for searched in _searched(listing, name, documents):
            _search(searched, findings, vocabulary=base in _VOCABULARIES)
            if private and base not in _VOCABULARIES:
                for place in dict.fromkeys(searched.place(match.start()) for match in private.finditer(searched.text)):
                    findings.add("host-name", place, "it names this machine or its user")


def search_words(text: str, findings: Findings) -> None:
    """Search words that become part of README.md as it will be searched, but for the names of this machine."""
    _search(_lines(README, text), findings, vocabulary=False)


def is_text(name: str) -> bool:
    """Return whether a file of this name is searched: a text, or a file without a suffix, such as LICENSE."""
    base = name.rpartition("/")[2].lower()
    return "." not in base or base.endswith(_TEXT_SUFFIXES)


class _Key(NamedTuple):
    """A position in a JSON document: its key or index, and the position of the object or list that holds it."""

    outer: "_Key | None"
    key: str | int

    def __str__(self) -> str:
        """Return the keys from the outermost on, as `a.b[2]`."""
        parts: list[str] = []
        at: _Key | None = self
        while at is not None:
            parts.append(f"[{at.key}]" if isinstance(at.key, int) else f".{at.key}")
            at = at.outer
        return "".join(reversed(parts)).removeprefix(".")


@dataclass(frozen=True, kw_only=True)
class _Searched:
    """Lines that are searched at once: the text of a file, or strings of a JSON file, each ended by a newline.

    Attributes:
        name: the file's.
        text: the lines.
        keys: for strings their positions, else empty.
        ends: for strings the offset at which each ends, else of each line.
    """

    name: str
    text: str
    keys: Sequence[_Key | None]
    ends: Sequence[int]

    def place(self, offset: int) -> str:
        """Return where the character at an offset is."""
        number = bisect_left(self.ends, offset)
        if not self.keys:
            return f"{self.name}:{number + 1}"
        key = self.keys[number]
        return self.name if key is None else f"{self.name}: {key}"


def _searched(listing: Listing, name: str, documents: Mapping[str, object]) -> Iterator[_Searched]:
    """Yield what is to be searched of a file. Damage was reported before."""
    if name.endswith(".json") and name not in _VOCABULARIES:
        document = documents[name] if name in documents else _document(listing, name)
        yield from _batches(name, _json_strings(document))
    elif text := read_text(listing, name, Findings()):
        yield _lines(name, text)


def _lines(name: str, text: str) -> _Searched:
    return _Searched(name=name, text=text, keys=(), ends=[match.start() for match in re.finditer("\n", text)])


def _document(listing: Listing, name: str) -> object:
    document = read_document(listing, name, Findings())
    # A damaged file is searched as a whole.
    return document.value if document else read_text(listing, name, Findings())


def _batches(name: str, strings: Iterator[tuple[_Key | None, str]]) -> Iterator[_Searched]:
    left = True
    while left:
        keys: list[_Key | None] = []
        texts: list[str] = []
        ends: list[int] = []
        size = 0
        for key, text in islice(strings, _BATCH_STRINGS):
            size += len(text) + 1
            keys.append(key)
            texts.append(text)
            ends.append(size - 1)
            if size > _BATCH_CHARACTERS:
                break
        left = bool(texts)
        if texts:
            yield _Searched(name=name, text="\n".join(texts), keys=keys, ends=ends)


def _json_strings(document: object) -> Iterator[tuple[_Key | None, str]]:
    """Yield every string of a document, keys included, and where it is."""
    pending: list[tuple[_Key | None, object]] = [(None, document)]
    while pending:
        key, value = pending.pop()
        if isinstance(value, dict):
            pending += [(_Key(key, inner), item) for inner, item in reversed(value.items())]
            yield from ((key, inner) for inner in value)
        elif isinstance(value, list):
            pending += [(_Key(key, number), item) for number, item in reversed(list(enumerate(value)))]
        elif isinstance(value, str):
            yield key, value


def _search(searched: _Searched, findings: Findings, *, vocabulary: bool) -> None:
    text = searched.text
    for secret in _SECRETS.finditer(text):
        findings.add("secret", searched.place(secret.start()), f"a token or password, {secret[0][:_SHOWN_SECRET]}...")
    if vocabulary:
        return
    paths = {searched.place(match.start()): match[0] for match in reversed(list(_PATHS.finditer(text)))}
    if searched.keys:
        for match in _WHOLE_PATH.finditer(text):
            paths.setdefault(searched.place(match.start()), match[0])
    for place, path in reversed(paths.items()):
        findings.add("local-path", place, f"a path of the building machine: {json.dumps(path)}")
    for host in _HOSTS.finditer(text):
        message = f"a name of a machine or user: {json.dumps(host[0])}"
        findings.add("host-name", searched.place(host.start()), message)
