"""Text that must not be published: paths and names of the building machine, and secrets.

Vocabularies are searched for secrets only: "/home" and "file://" are ordinary tokens.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence

from packager.prove.audit.files import Listing, read_text
from packager.prove.audit.finding import Findings
from packager.receipt import PROVENANCE, README, TOKENIZER

_TEXT_SUFFIXES = (".md", ".txt", ".json", ".jsonl", ".jinja", ".yaml", ".yml", ".py")
_VOCABULARIES = (TOKENIZER, "vocab.json", "vocab.txt", "merges.txt", "added_tokens.json")
_SHOWN_SECRET = 6

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
# A whole JSON string that is an absolute path, whatever its first folder.
_WHOLE_PATH = re.compile(r"/[\w.+@-]+(?:/[\w.+@-]+)+/?\Z")


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
        if "." in base and not base.lower().endswith(_TEXT_SUFFIXES):
            continue
        for place, text in _strings(listing, name, documents):
            _check_text(place, text, findings, vocabulary=base in _VOCABULARIES)
            if private and base not in _VOCABULARIES and private.search(text):
                findings.add("host-name", place, "it names this machine or its user")


def _strings(listing: Listing, name: str, documents: Mapping[str, object]) -> Iterator[tuple[str, str]]:
    """Yield (location, text): the strings of a JSON file, the lines of another. Damage was reported before."""
    if name in documents and name not in _VOCABULARIES:
        yield from _json_strings(name, documents[name])
        return
    text = read_text(listing, name, Findings())
    for number, line in enumerate((text or "").splitlines(), start=1):
        yield f"{name}:{number}", line


def _json_strings(name: str, document: object) -> Iterator[tuple[str, str]]:
    pending: list[tuple[str, object]] = [("", document)]
    while pending:
        key, value = pending.pop()
        if isinstance(value, dict):
            pending += [(f"{key}.{inner}" if key else inner, item) for inner, item in reversed(value.items())]
            yield from ((f"{name}: {key}" if key else name, inner) for inner in value)
        elif isinstance(value, list):
            pending += [(f"{key}[{number}]", item) for number, item in reversed(list(enumerate(value)))]
        elif isinstance(value, str):
            yield (f"{name}: {key}", value)


def _check_text(place: str, text: str, findings: Findings, *, vocabulary: bool) -> None:
    for secret in _SECRETS.finditer(text):
        findings.add("secret", place, f"a token or password, {secret[0][:_SHOWN_SECRET]}...")
    if vocabulary:
        return
    path = _PATHS.search(text) or (_WHOLE_PATH.match(text) if ": " in place else None)
    if path:
        findings.add("local-path", place, f"a path of the building machine: {json.dumps(path[0])}")
    for host in _HOSTS.finditer(text):
        findings.add("host-name", place, f"a name of a machine or user: {json.dumps(host[0])}")
