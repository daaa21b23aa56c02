"""The keys of a section that belong together; one rule for the text as written and for the finished values."""

from collections.abc import Set as AbstractSet

from packager.system.text import has_credentials


def base_model_problem(given: AbstractSet[str]) -> str:
    """Return why these fields together do not name one base model, or ""."""
    if "revision" in given and "path" in given:
        return "give either revision (read from the Hub) or path (a local folder), not both"
    if not given & {"revision", "path"}:
        return "give either revision (read from the Hub) or path (a local folder)"
    return ""


def repository_problem(target: str, layout: str, *, url: str | None) -> str:
    """Return why these fields together do not name one target, or ""; the text contains no secret."""
    if url is not None and has_credentials(url):
        return "the url has credentials in it: leave them out, and set PACKAGER_GIT_TOKEN where you publish"
    has_url = url is not None
    if target == "git" and layout == "repos":
        return "layout repos is for the targets hub and local: target git has one url"
    if has_url == (target == "git"):
        return ""
    return "url belongs to target git" if has_url else "target git needs the url of the remote"


def text_source_problem(given: AbstractSet[str]) -> str:
    """Return why these fields together do not name one text, or ""."""
    if "path" in given and "dataset" in given:
        return "give either path (a local file) or dataset (on the Hub), not both"
    if not given & {"path", "dataset"}:
        return "give either path (a local file) or dataset (on the Hub)"
    if "dataset" in given and not given >= {"revision", "split"}:
        return "a Hub dataset needs its revision and split"
    if "path" in given and given & {"revision", "split", "config"}:
        return "revision, split and config belong to a Hub dataset, not to a local file"
    return ""
