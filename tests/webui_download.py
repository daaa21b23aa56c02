"""What text-generation-webui's download-model.py asks a Hub for, and what it writes.

Rendered from the script of 2026-05-03 (commit 1dcde41, read on 2026-11-30), which is not copied here: the same
addresses in the same order, the same names taken and left, the same folder. Left out are retries, threads, tokens,
adapters and GGUF.
"""

import base64
import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from urllib.request import Request, urlopen

_BRANCH = re.compile(r"[a-zA-Z0-9._-]+")
# A name is taken if it begins like one of these; nothing is asked of its end.
_WEIGHTS = re.compile(r".*\.safetensors")
_TEXT = re.compile(r".*\.(txt|json|py|md)|(tokenizer|ice|spiece).*\.model|.*\.tiktoken")
_MOST_PAGES = 100  # the script has no such limit: it asks until a page is empty


@dataclass(frozen=True, kw_only=True)
class WebuiDownload:
    """A download.

    Attributes:
        folder: the model's, below that of all models.
        files: names that were written.
        digests: sha256 by name, of those files for which the Hub states one.
    """

    folder: Path
    files: tuple[str, ...]
    digests: dict[str, str]

    def checked(self) -> list[str]:
        """Return the names whose content has the stated sha256, as the script's --check compares it."""
        return [
            name
            for name, digest in self.digests.items()
            if hashlib.sha256((self.folder / name).read_bytes()).hexdigest() == digest
        ]


def webui_download(endpoint: str, name: str, models: Path) -> WebuiDownload:
    """Download what "Download model or LoRA" does.

    Args:
        endpoint: of the Hub.
        name: namespace/name, or namespace/name:branch.
        models: the folder of all models.

    Raises:
        ValueError: the script refuses the name of the branch, or the list of files does not end.
    """
    model, _, branch = name.partition(":")
    branch = branch or "main"
    if not _BRANCH.fullmatch(branch):
        raise ValueError(f"invalid branch name {branch}")
    listed = _listed(endpoint, model, branch)
    taken = [each for each in listed if _WEIGHTS.match(str(each["path"])) or _TEXT.match(str(each["path"]))]
    folder = models / ("_".join(model.split("/")[-2:]) + ("" if branch == "main" else f"_{branch}"))
    folder.mkdir(parents=True)
    names, digests = [], {}
    for each in taken:
        path = str(each["path"])
        names.append(path.rsplit("/", 1)[-1])  # folders are not made
        (folder / names[-1]).write_bytes(_get(f"{endpoint}/{model}/resolve/{branch}/{path}"))
        if isinstance(lfs := each.get("lfs"), dict):
            digests[path] = str(lfs["oid"])
    return WebuiDownload(folder=folder, files=tuple(names), digests=digests)


def _listed(endpoint: str, model: str, branch: str) -> list[dict[str, object]]:
    """Return the entries of a branch's first level: page after page, until one is empty."""
    found: list[dict[str, object]] = []
    cursor = ""
    for _ in range(_MOST_PAGES):
        query = f"?cursor={cursor}" if cursor else ""
        page = json.loads(_get(f"{endpoint}/api/models/{model}/tree/{branch}{query}"))
        if not page:
            return found
        found += page
        inner = base64.b64encode(json.dumps({"file_name": page[-1]["path"]}, separators=(",", ":")).encode()) + b":50"
        cursor = base64.b64encode(inner).decode().replace("=", "%3D")
    raise ValueError("the list of files does not end")


def _get(address: str) -> bytes:
    with urlopen(Request(address), timeout=60) as answer:  # noqa: S310 - a server of the tests
        content: bytes = answer.read()
        return content
