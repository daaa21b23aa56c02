"""Take words that were written by hand on a rendered card into the recipe's files, where the next card has them from.

What counts is who wrote a line. A record lists the digest of the page that packager rendered: if the edited page has it
once its sections are as they were, no other line was touched. Where that is not known, the lines are compared: with the
page of that digest in the branch's history, or with a built folder's card as it is rendered now. The text of an edited
page is anybody's: it is bounded, checked as a section of the recipe is, and never a template.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from packager.card.sections import (
    SECTION_FILES,
    SECTIONS,
    SplitPage,
    differing_lines,
    has_section_marker,
    section_problems,
)
from packager.errors import CardError, PublishError, RecipeError, StateError
from packager.pipeline.build_options import Options
from packager.pipeline.build_state import BuildState
from packager.pipeline.cards import MOST_PAGE_BYTES, card_page, keep_command, read_page, written_sections
from packager.pipeline.compare_published import published_record
from packager.prove.audit.card import words_problems
from packager.publish.branches import BranchContent
from packager.publish.targets import BranchState, Target
from packager.publish.targets.resolve_target import target_of
from packager.receipt import README
from packager.recipe.file import RecipeFile
from packager.system.files import bytes_record, write_atomic
from packager.system.terminal import Terminal
from packager.system.text import printable

PUBLISHED: Final = "published"
_MOST_COMMITS: Final = 50  # of a branch that are searched for the page as packager rendered it
_MOST_LINES: Final = 20


@dataclass(frozen=True, kw_only=True)
class KeptSections:
    """What was kept of an edited card.

    Attributes:
        branch: whose card it is.
        folder: of the recipe's templates, relative to the recipe's folder.
        is_new: whether the recipe does not name the folder yet.
        texts: for each section that changes, its words; "" for one that was emptied.
        unchanged: the sections that are in the recipe's files already.
    """

    branch: str
    folder: str
    is_new: bool
    texts: Mapping[str, str]
    unchanged: tuple[str, ...]

    def path(self, section: str) -> str:
        """Return a section's file, relative to the recipe's folder."""
        return f"{self.folder}/{SECTION_FILES[section]}"


@dataclass(frozen=True, kw_only=True)
class _Edit:
    """An edited page.

    Attributes:
        where: it is.
        page: as it is now.
        before: the words of its sections before; None where that is not known.
        lost: the lines outside of the sections that differ.
    """

    where: str
    page: SplitPage
    before: Mapping[str, str] | None
    lost: Sequence[str] = ()


def keep_sections(
    recipe_file: RecipeFile, options: Options, terminal: Terminal, *, source: str, branch: str, dry_run: bool = False
) -> KeptSections:
    """Write the hand-written sections of an edited card into the recipe's templates folder.

    Args:
        recipe_file: whose card it is.
        options: the output folder of the builds, and what reading the recipe's repository needs.
        terminal: gets the messages.
        source: "published" for the card in the recipe's repository, else the path of a README.md.
        branch: whose card it is.
        dry_run: write nothing.

    Raises:
        RecipeError: the recipe has no such branch.
        PublishError: the branch is not published, or its page as packager rendered it is not found.
        CardError: the page or a section cannot be read, or the page differs outside of its sections.
        StateError: a section's file has other words by now.
    """
    branches = [variant.branch for variant in recipe_file.recipe.expanded_variants()]
    if branch not in branches:
        raise RecipeError(f"the recipe has no branch {branch!r}", hint=f"it has {', '.join(branches)}")
    if source == PUBLISHED:
        edit = _published(recipe_file, options, terminal, branch)
    else:
        edit = _in_file(recipe_file, options, terminal, Path(source), branch)
    if edit.lost:
        raise CardError(
            "the card differs outside of its sections: the next card would not have these lines",
            where=edit.where,
            why="\n       ".join(_shown(edit.lost)),
            hint=f"move the words between the markers of a section ({', '.join(SECTIONS)}), or into the recipe or its "
            "templates, and put the other lines back as packager rendered them",
        )
    kept = _kept(recipe_file, branch, edit)
    if not dry_run:
        _write(recipe_file, kept)
    return kept


def refuse_lost_sections(run: BuildState, target: Target, content: BranchContent, state: BranchState) -> None:
    """Refuse to publish over a card whose sections somebody has written into since packager published it.

    Raises:
        PublishError: words would leave the page, or its sections are damaged.
    """
    stored = state.files.get(README)
    if stored is None or not state.foreign_author or not stored.size_bytes:
        return
    where = f"{README} of {content.branch}"
    data = target.read_bytes(state.commit, README, size=MOST_PAGE_BYTES + 1)
    ours = (content.folder / README).read_bytes()
    try:
        edited = read_page(data, where)
    except CardError as error:
        if not has_section_marker(data):
            return  # a page without sections: the plan lists it among the changed files
        raise PublishError(
            f"the card of {content.branch} was edited in the repository, and its words would be lost",
            where=target.where,
            why=f"{error.where}: {error.what}: {printable(error.why)}",
            hint="repair the page in the repository, or take the edit off it, then publish again",
        ) from error
    new = read_page(ours, where).sections
    changed = [name for name in SECTIONS if edited.sections[name] != new[name]]
    if not changed:
        return
    try:
        before = _edit_of(run.recipe_file, target, content.branch, state, edited).before
    except (PublishError, CardError):
        before = None  # whose words they are is not known: none may be lost
    before = before or dict.fromkeys(SECTIONS, "")
    if lost := [name for name in changed if edited.sections[name] != before[name]]:
        raise PublishError(
            f"the card of {content.branch} was edited in the repository, and its words would be lost",
            where=target.where,
            why=f"{printable(state.foreign_author)} wrote into the section {', '.join(lost)}",
            hint=f"keep them with: {keep_command(run.recipe_file, run.options, PUBLISHED, content.branch)}\n"
            "  then run packager card and publish again; or take the words off the page in the repository",
        )


def _published(recipe_file: RecipeFile, options: Options, terminal: Terminal, branch: str) -> _Edit:
    root = options.local_target or options.dist
    target = target_of(recipe_file.recipe, root, options.environ, terminal.log)
    state = target.read_branches().get(branch)
    if state is None or README not in state.files:
        raise PublishError("there is no card to keep words of", where=target.where, why=f"{branch} has no {README}")
    data = target.read_bytes(state.commit, README, size=MOST_PAGE_BYTES + 1)
    return _edit_of(recipe_file, target, branch, state, read_page(data, f"{README} of {branch} in {target.where}"))


def _edit_of(recipe_file: RecipeFile, target: Target, branch: str, state: BranchState, page: SplitPage) -> _Edit:
    """Compare a published page with the one that the branch's record lists.

    Raises:
        PublishError: the record cannot be read, or the page is not in the branch's latest commits.
        CardError: the page has no sections, as those of earlier versions.
    """
    where = f"{README} of {branch} in {target.where}"
    record = published_record(target, state)
    listed = None if isinstance(record, str) else record.files.get(README)
    if listed is None or listed.size_bytes > MOST_PAGE_BYTES:
        why = record if isinstance(record, str) else f"it lists no {README}"
        raise PublishError("the branch's record does not say which card was rendered", where=target.where, why=why)
    if (before := page.as_rendered(listed, [written_sections(recipe_file)])) is not None:
        return _Edit(where=where, page=page, before=before)
    for commit in _latest(target, branch):
        try:
            data = target.read_bytes(commit, README, size=MOST_PAGE_BYTES)
        except PublishError:
            continue  # a commit without a card
        if bytes_record(data) == listed:
            rendered = read_page(data, f"{README} of {branch} at {commit[:12]}")
            return _Edit(where=where, page=page, before=rendered.sections, lost=differing_lines(rendered, page))
    raise PublishError(
        f"the card of {branch} as packager rendered it is not in the branch's last {_MOST_COMMITS} commits",
        where=target.where,
        hint="copy the words into the recipe's files by hand",
    )


def _latest(target: Target, branch: str) -> Iterator[str]:
    for record in target.history(branch)[:_MOST_COMMITS]:
        yield record.commit


def _in_file(recipe_file: RecipeFile, options: Options, terminal: Terminal, path: Path, branch: str) -> _Edit:
    """Read an edited file of a built folder."""
    try:
        with path.open("rb") as stream:
            data = stream.read(MOST_PAGE_BYTES + 1)
    except OSError as error:
        raise CardError(
            "the card cannot be read",
            where=str(path),
            why=error.strerror or str(error),
            hint=f"name a {README}, or write --keep {PUBLISHED} for the card in the recipe's repository",
        ) from error
    page = read_page(data, str(path))
    run = BuildState(recipe_file, options, terminal)
    run.read_receipts()
    written = written_sections(recipe_file)
    listed = {made: receipt.provenance.files.get(README) for made, receipt in run.receipts.items()}
    before = {made: page.as_rendered(record, [written]) for made, record in listed.items() if record is not None}
    if (found := before.get(branch)) is not None:
        return _Edit(where=str(path), page=page, before=found)
    if of := [made for made, sections in before.items() if sections is not None]:
        raise CardError(f"this is the card of {of[0]}, not of {branch}", where=str(path), hint=f"give --branch {of[0]}")
    rendered = read_page(card_page(run, branch).encode(), f"the card of {branch}")
    return _Edit(where=str(path), page=page, before=None, lost=differing_lines(rendered, page))


def _kept(recipe_file: RecipeFile, branch: str, edit: _Edit) -> KeptSections:
    """Return what changes in the recipe's files.

    Raises:
        CardError: a section cannot be part of a card.
        StateError: a file has other words than the page had before it was edited.
    """
    edited, where, before = edit.page.sections, edit.where, edit.before or dict.fromkeys(SECTIONS, "")
    folder, is_new = recipe_file.recipe.card.templates, recipe_file.recipe.card.templates is None
    if folder is None:
        folder = f"{recipe_file.path.stem}-card"
    # What an earlier run kept may have been edited before the recipe names the folder.
    is_there = not is_new or (recipe_file.folder / folder).exists() or (recipe_file.folder / folder).is_symlink()
    written = written_sections(recipe_file, folder) if is_there else dict.fromkeys(SECTIONS, "")
    texts = {name: edited[name] for name in SECTIONS if edited[name] not in (before[name], written[name])}
    problems = [
        f"{name}, line {problem.line}: {problem.message} ({problem.hint})"
        for name, text in texts.items()
        for problem in [*section_problems(text)] or words_problems(text)
    ]
    if problems:
        raise CardError("a section cannot be part of a card", where=where, why="\n       ".join(problems))
    if conflicts := [name for name in texts if written[name] != before[name]]:
        files = ", ".join(f"{folder}/{SECTION_FILES[name]}" for name in conflicts)
        raise StateError(
            f"the words of {', '.join(conflicts)} were changed in the recipe's files and on the page",
            where=where,
            why=f"{files}: its words are neither those of the page nor those that the page had before",
            hint="put both together in the file and on the page, then run the command again"
            + "; if the page is right, delete the file first" * is_new,
        )
    return KeptSections(
        branch=branch,
        folder=folder,
        is_new=is_new,
        texts=texts,
        unchanged=tuple(name for name in SECTIONS if edited[name] and edited[name] == written[name]),
    )


def _write(recipe_file: RecipeFile, kept: KeptSections) -> None:
    if not kept.texts:
        return
    folder = recipe_file.folder / kept.folder
    if not kept.is_new or folder.exists() or folder.is_symlink():
        folder = recipe_file.resolve(kept.folder)  # raises: it leads out of the recipe's folder
    folder.mkdir(exist_ok=True)
    for name, text in kept.texts.items():
        path = folder / SECTION_FILES[name]
        if text:
            write_atomic(path, f"{text}\n".encode())
        else:
            path.unlink(missing_ok=True)


def _shown(lines: Sequence[str]) -> list[str]:
    more = len(lines) - _MOST_LINES
    return [*(printable(line) for line in lines[:_MOST_LINES]), *([f"and {more} more lines"] if more > 0 else [])]
