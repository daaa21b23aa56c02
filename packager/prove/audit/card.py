"""README.md and the licence files: front matter, code blocks, commands that no longer work, template leftovers."""

import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence

from packager.card.markdown import CodeBlock, extract_code_blocks, unclosed
from packager.card.raw_text import TextProblem
from packager.model.front_matter import front_matter_fields
from packager.prove.audit.files import JsonObject, Listing, as_object, read_text
from packager.prove.audit.finding import Findings
from packager.prove.audit.privacy import search_words
from packager.receipt import CONFIG, PROVENANCE, README
from packager.recipe.licenses import FILES_BY_LICENSE, HUB_LICENSES, LicenseFiles
from packager.system.python_warnings import without_warnings
from packager.system.text import shown

_PYTHON = frozenset({"python", "py", "python3"})
_SHELL = frozenset({"", "bash", "sh", "shell", "console", "zsh"})
_TEMPLATE = re.compile(r"\{\{|\{%")
_MAX_PYTHON = _MAX_FRONT_MATTER = 100_000
_MAX_CARD = 400_000  # characters; a page of this size can take the parser seconds

_METADATA_KEYS = ("library_name", "pipeline_tag", "language", "tags", "quantized_by", "model_type")

# Commands of 2023 that no longer work, or that were wrong then.
_BAD_COMMANDS: Mapping[str, re.Pattern[str]] = {
    "huggingface-cli is gone, the command is hf": re.compile(r"\bhuggingface-cli\b"),
    "GITHUB_ACTIONS=true is for AutoGPTQ's own CI, not for a reader's shell": re.compile(
        r"\bGITHUB_ACTIONS=true\s+pip3?\b"
    ),
}
_REMOTE_CODE = re.compile(r"\btrust_remote_code\s*=\s*True\b|--trust-remote-code\b")


def check_readme(listing: Listing, documents: Mapping[str, object], findings: Findings) -> None:
    """Check README.md, and the licence files that its licence demands."""
    text = read_text(listing, README, findings) if README in listing.sizes else None
    if text is None:
        return
    if len(text) > _MAX_CARD:
        findings.add("text-damaged", README, f"{len(text)} characters are too many for a model card")
        return
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    end = next((number for number, line in enumerate(lines) if number and line.rstrip() == "---"), 0)
    if lines[0].rstrip() != "---" or not end:
        findings.add("card-front-matter", README, "there is no front matter")
        end = -1
    elif (metadata := _front_matter("\n".join(lines[1:end]), findings)) is not None:
        _check_metadata(metadata, findings)
        _check_origin(metadata, documents, findings)
        _check_license(metadata, listing, findings)
    # The front matter's lines stay, empty, so that line numbers are the file's.
    body = [""] * (end + 1) + lines[end + 1 :]
    _check_body(body, findings, remote_code="auto_map" in (as_object(documents.get(CONFIG)) or {}))


def words_problems(text: str) -> list[TextProblem]:
    """Return what the audit of a finished card will refuse in words that become part of it.

    That includes remote code: no branch has an auto_map, see `branch_rules`.
    """
    findings, text, problems = Findings(), text.replace("\r\n", "\n").replace("\r", "\n"), []
    _check_body(text.split("\n"), findings, remote_code=False)
    search_words(text, findings)
    for finding in findings.collected():
        for where in (finding.where, *finding.also):
            line = where.rpartition(":")[2]
            number = int(line) if line.isdecimal() else 1
            hint = "change the words, or write `code`" if finding.code == "card-template" else finding.hint
            problems.append(TextProblem(line=number, message=finding.message, hint=hint))
    return problems


def _check_body(lines: Sequence[str], findings: Findings, *, remote_code: bool) -> None:
    blocks = extract_code_blocks("\n".join(lines))
    fenced = {number for block in blocks for number in block.lines}
    for block in blocks:
        _check_block(block, findings)
    if problem := unclosed("\n".join(lines)):
        findings.add("card-unclosed", README, f"{problem} is never closed")
    for number, line in enumerate(lines, start=1):
        place = f"{README}:{number}"
        if number not in fenced and _TEMPLATE.search(_without_code(line)):
            findings.add("card-template", place, "a template expression was not rendered")
        for problem, pattern in _BAD_COMMANDS.items():
            if pattern.search(line):
                findings.add("card-command", place, problem)
        if not remote_code and _REMOTE_CODE.search(line):
            findings.add("card-command", place, "this model needs no remote code")


def _front_matter(text: str, findings: Findings) -> JsonObject | None:
    try:
        return front_matter_fields(text, most_characters=_MAX_FRONT_MATTER)
    except ValueError as error:
        findings.add("card-front-matter", README, f"the front matter {error}")
        return None


def _check_metadata(metadata: JsonObject, findings: Findings) -> None:
    models = metadata.get("base_model")
    named = models if isinstance(models, list) else [models]
    if not named or not all(isinstance(name, str) and name.count("/") == 1 for name in named):
        findings.add("card-base-model", README, "base_model does not name a repository")
    if metadata.get("base_model_relation") != "quantized":
        relation = metadata.get("base_model_relation")
        findings.add("card-relation", README, f"base_model_relation is {shown(relation)}")
    for key in _METADATA_KEYS:
        if not metadata.get(key):
            findings.add("card-metadata", f"{README}: {key}", f"{key} is missing")
    tags = metadata.get("tags")
    if tags and not (isinstance(tags, list) and "gptq" in tags):
        findings.add("card-metadata", f"{README}: tags", "the tag gptq is missing")
    if metadata.get("datasets"):
        findings.add("card-datasets", f"{README}: datasets", "datasets are named")


def _check_origin(metadata: JsonObject, documents: Mapping[str, object], findings: Findings) -> None:
    """Compare base_model with the model that provenance.json names."""
    provenance = as_object(documents.get(PROVENANCE)) or {}
    recorded = (as_object(provenance.get("base_model")) or {}).get("id")
    models = metadata.get("base_model")
    named = models if isinstance(models, list) else [models]
    if models and isinstance(recorded, str) and recorded not in named:
        findings.add("card-base-model", README, f"base_model is not {shown(recorded)}, as provenance.json has it")


def _check_license(metadata: JsonObject, listing: Listing, findings: Findings) -> None:
    license_id = metadata.get("license")
    if not isinstance(license_id, str) or not license_id:
        findings.add("card-license", README, f"license is {shown(license_id)}")
        return
    if license_id not in (*HUB_LICENSES, "other"):
        findings.add("card-license", README, f"the Hub knows no license {shown(license_id)}")
    if license_id == "other" and not metadata.get("license_name"):
        findings.add("card-license-name", README, "license is other, without license_name")
    if license_id in FILES_BY_LICENSE:
        _check_license_files(license_id, FILES_BY_LICENSE[license_id], listing, findings)


def _check_license_files(license_id: str, demanded: LicenseFiles, listing: Listing, findings: Findings) -> None:
    names = [name for name in (*listing.sizes, *sorted(listing.unread)) if "/" not in name]
    for name in demanded.missing(names):
        findings.add("license-file-missing", name, f"{license_id} demands a file of this name")
    for name in names:
        if not name.lower().startswith("notice") or name not in listing.sizes:
            continue
        text = read_text(listing, name, findings)
        if text is not None and not demanded.has_notice(text):
            findings.add("license-notice", name, f"it lacks the sentence: {demanded.notice}")


def _check_block(block: CodeBlock, findings: Findings) -> None:
    language = block.language.lower()
    if language in _PYTHON and (problem := _python_problem(block.text)):
        findings.add("card-python", f"{README}:{block.line}", problem)
    elif language in _SHELL:
        for number, line in enumerate(block.text.split("\n"), start=block.line + 1):
            if line.count("`") % 2:
                findings.add("card-command", f"{README}:{number}", "a stray backtick in a command")


def _python_problem(text: str) -> str:
    """Return why a block of Python does not compile, or ""."""
    if len(text) > _MAX_PYTHON:
        return "it is too long for an example"
    code = textwrap.dedent(text)
    with without_warnings():
        try:
            compile(code, README, "exec", dont_inherit=True)
        except SyntaxError as error:
            return f"line {error.lineno} of this block: {error.msg}"
        except (ValueError, OverflowError, RecursionError, MemoryError) as error:
            return f"Python cannot read it: {error}"
    return ""


def _without_code(line: str) -> str:
    """Return a line of prose without its inline code; an indented line is code as a whole."""
    return "" if line.startswith(("    ", "\t")) else "".join(_prose_parts(line))


def _prose_parts(line: str) -> Iterator[str]:
    """Yield what lies outside code spans: a span ends at the next run of as many backticks, if there is one."""
    parts = re.findall(r"`+|[^`]+", line)
    last = {part: position for position, part in enumerate(parts)}
    position = 0
    while position < len(parts):
        part = parts[position]
        if part[0] == "`" and last[part] > position:
            position = parts.index(part, position + 1)
        else:
            yield part
        position += 1
