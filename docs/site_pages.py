"""Hooks of mkdocs.yml: the pages beside docs/ (README, SECURITY, CONTRIBUTING, CHANGELOG) are pages of the site, too.

Links between files of the repository become links between pages. A link to a file that is no page (a recipe, a folder)
becomes its name, since the site has no address of the repository.
"""

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PAGES = {
    "README.md": "index.md",
    "SECURITY.md": "security.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
}
LINK = re.compile(r"(?<!!)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^()\s]+)\)")


def on_files(files: Any, config: Any) -> Any:
    """Add the pages beside docs/, and a list of the decisions."""
    from mkdocs.structure.files import File  # tests load this file without mkdocs

    for source, name in PAGES.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        files.append(File.generated(config, name, content=links_of_root(text)))
    files.append(File.generated(config, "decisions/index.md", content=decisions()))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Lead links to the pages beside docs/ to their pages of the site."""
    up = "../" * page.file.src_uri.count("/")
    for source, name in PAGES.items():
        markdown = markdown.replace(f"]({up}../{source}", f"]({up}{name}")
    return markdown


def links_of_root(text: str) -> str:
    """Return a page of the repository's root with links as the site has them."""

    def replaced(match: "re.Match[str]") -> str:
        words, target = match.groups()
        path, hash_, anchor = target.partition("#")
        if "://" in target or not path:
            return match[0]
        if path in PAGES:
            return f"[{words}]({PAGES[path]}{hash_}{anchor})"
        if path.rstrip("/") == "docs/decisions":
            return f"[{words}](decisions/index.md)"
        if path.startswith("docs/") and path.endswith(".md"):
            return f"[{words}]({path.removeprefix('docs/')}{hash_}{anchor})"
        return words

    return LINK.sub(replaced, text.replace("](docs/images/", "](images/"))


def decisions() -> str:
    """Return a list of the decisions with their titles."""
    lines = ["# Decisions", "", "Why things are as they are, in the order in which they were decided.", ""]
    for path in sorted((ROOT / "docs" / "decisions").glob("0*.md")):
        title = path.read_text(encoding="utf-8").partition("\n")[0].removeprefix("# ")
        lines.append(f"- [{title}]({path.name})")
    return "\n".join(lines) + "\n"
