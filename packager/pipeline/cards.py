"""Stage 9, card: README.md, licence files and provenance.json of every variant, from the receipts."""

import os
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path, PurePosixPath
from types import MappingProxyType

from packager.card import render_card
from packager.card.choice import cached_contexts
from packager.card.facts import autogptq_pins
from packager.card.floor import floor_record
from packager.card.plot import PLOT_VERSION, Plot, draw_picture, plot_of
from packager.card.sections import SECTIONS, SplitPage, section_text, split_page
from packager.card.task_scores import leaderboard_files
from packager.errors import CardError, StateError
from packager.pipeline.build_options import Options
from packager.pipeline.build_state import BuildState
from packager.pipeline.card_texts import read_card_texts, read_own_templates
from packager.pipeline.pack import is_packed
from packager.pipeline.prompting import prompting_of
from packager.pipeline.workspace import audit_or_raise
from packager.receipt import (
    AUTOGPTQ_PINS,
    BRANCH_LOCK,
    BRANCH_RECIPE,
    PICTURE_FILES,
    PROVENANCE,
    README,
    Receipt,
    digest_of,
)
from packager.recipe.file import RecipeFile
from packager.recipe.lock_file import lock_text
from packager.system.files import bytes_record, disk_errors, has_record, write_atomic

# The key in a receipt's stages of the figures that its picture shows: while they stay, it is not drawn again.
PICTURE_STAGE = "picture"
MOST_PAGE_BYTES = 1_000_000  # of a card that somebody edited


def render_cards(run: BuildState) -> None:
    """Stage 9: README.md, licence files and provenance.json of every variant; then the whole folder is audited.

    Raises:
        StateError: a file was edited by hand; such a change belongs in the recipe or the templates.
        AuditError: a folder violates the format.
    """
    pages, plot = _pages(run, run.keys)
    pictures = _pictures(run, plot)
    rendered = {
        branch: {README: page.encode(), **pictures, **_licenses(run, branch), **_texts(run, branch)}
        for branch, page in pages.items()
    }
    picture_key = {PICTURE_STAGE: _picture_key(plot)} if plot is not None else {}
    cards = {branch: _with_provenance(run, branch, files, picture_key) for branch, files in rendered.items()}
    refuse_edited_cards(run, {branch: files for branch, (files, _) in cards.items()})
    for branch, (files, receipt) in cards.items():
        _write_card(run, branch, files, receipt)
    audit_or_raise([run.workspace.folder(branch) for branch in cards], run.plan.architecture, complete=True)


def card_page(run: BuildState, branch: str) -> str:
    """Return the README.md of a branch as it is rendered now; write nothing.

    Raises:
        CardError: a variant is not built, or the page cannot be rendered.
    """
    if lacking := [each for each in run.keys if each not in run.receipts]:
        hint = "run packager build first"
        raise CardError(f"the card of {branch} cannot be rendered", why=f"not built: {', '.join(lacking)}", hint=hint)
    pages, _ = _pages(run, [branch])
    return pages[branch]


def _pages(run: BuildState, branches: Iterable[str]) -> tuple[dict[str, str], Plot | None]:
    """Return README.md by branch, and what the picture beside it shows."""
    texts, own = read_card_texts(run.recipe_file), read_own_templates(run.recipe_file)
    present = _present(run)
    provenances = [
        receipt.provenance.model_copy(update={**present, "floor": floor_record(run.recipe, receipt.provenance)})
        for receipt in run.ordered_receipts()
    ]
    contexts = cached_contexts(run.plan.architecture)
    plot = plot_of(provenances, contexts)
    pages = {
        branch: render_card(
            run.recipe,
            texts,
            provenances,
            run.plan.architecture.model_type,
            branch,
            expectations={variant_plan.variant.branch: variant_plan.verdicts for variant_plan in run.plan.variants},
            prompting=prompting_of(run.workspace.folder(branch)),
            contexts=contexts,
            plot=plot,
            own=own,
            runs={made: receipt.runs for made, receipt in run.receipts.items()},
        )
        for branch in branches
    }
    return pages, plot


def _present(run: BuildState) -> dict[str, object]:
    """Return the fields of a record that follow the recipe and may change while the weights stay."""
    none = {} if run.recipe.evaluation.tasks else {"tasks": ()}
    return {"recipe_digest": run.recipe.digest(), "layout": run.recipe.repository.layout, **none}


def _licenses(run: BuildState, branch: str) -> dict[str, bytes]:
    """Return the licence files by name; the base model's are read from it only where the branch lacks them."""
    license_, provenance = run.recipe.card.license, run.receipts[branch].provenance
    found = {PurePosixPath(name).name: run.recipe_file.resolve(name).read_bytes() for name in license_.files}
    for name in license_.base_files:
        path, record = run.workspace.folder(branch) / name, provenance.base_model.files.get(name)
        if record is None or not path.is_file() or not has_record(path, record):
            found[name] = run.source.copied(name)
        else:
            found[name] = path.read_bytes()
    return found


def _texts(run: BuildState, branch: str) -> dict[str, bytes]:
    """Return the recipe, its lock, what pip installs, and scores for leaderboards, by name."""
    from packager.recipe.draft import branch_recipe  # 70 ms

    provenance = run.receipts[branch].provenance
    pins = autogptq_pins(provenance)
    return {
        BRANCH_RECIPE: branch_recipe(run.recipe).encode(),
        BRANCH_LOCK: lock_text(run.recipe_file.lock).encode(),
        **({AUTOGPTQ_PINS: pins.encode()} if pins else {}),
        **leaderboard_files(run.recipe, provenance),
    }


def _pictures(run: BuildState, plot: Plot | None) -> Mapping[str, bytes]:
    """Return the picture's files: those of a branch that has them of the same figures, else drawn now."""
    if plot is None:
        return {}
    key = _picture_key(plot)
    for branch, receipt in run.receipts.items():
        folder, records = run.workspace.folder(branch), receipt.provenance.files
        if receipt.stages.get(PICTURE_STAGE) == key and all(
            name in records and (folder / name).is_file() and has_record(folder / name, records[name])
            for name in PICTURE_FILES
        ):
            return {name: (folder / name).read_bytes() for name in PICTURE_FILES}
    return draw_picture(plot)


def _picture_key(plot: Plot) -> str:
    return digest_of([PLOT_VERSION, asdict(plot)])


def _with_provenance(
    run: BuildState, branch: str, files: dict[str, bytes], done: Mapping[str, str]
) -> tuple[dict[str, bytes], Receipt]:
    """Add provenance.json, and return the next receipt: its provenance also lists provenance.json itself.

    `done` has the keys of what the card stage keeps; keys of before that it does not have are dropped.
    """
    receipt = run.receipts[branch]
    packed = {name: record for name, record in receipt.provenance.files.items() if is_packed(name)}
    records = packed | {name: bytes_record(content) for name, content in files.items()}
    floor = floor_record(run.recipe, receipt.provenance)
    changes = {"files": dict(sorted(records.items())), "floor": floor, **_present(run)}
    if set(run.recipe.card.license.base_files) - receipt.provenance.base_model.files.keys():
        changes["base_model"] = run.source.record  # a licence that the recipe did not name when this was built
    provenance = receipt.provenance.model_copy(update=changes)
    content = provenance.model_dump_json(indent=2).encode() + b"\n"
    records[PROVENANCE] = bytes_record(content)
    listed = provenance.model_copy(update={"files": dict(sorted(records.items()))})
    # The tasks too, of a recipe that names none any more: its record has no scores either.
    dropped = {PICTURE_STAGE} | ({"tasks"} - run.keys[branch].keys())
    stages = {**{name: key for name, key in receipt.stages.items() if name not in dropped}, **done}
    # What a trial left is what the recipe says once every stage has the keys of the recipe alone.
    present = {"provenance": listed, "stages": stages, "trial": run.recipe_file.trial}
    return {**files, PROVENANCE: content}, receipt.model_copy(update=present)


def refuse_edited_cards(run: BuildState, contents: Mapping[str, Mapping[str, bytes]] = MappingProxyType({})) -> None:
    """Check every file of the cards before any is written.

    Args:
        run: with its receipts read.
        contents: by branch and name, the content to be written; a killed run may have written it already.

    Raises:
        StateError: a file was edited by hand.
    """
    for branch, receipt in run.receipts.items():
        files = contents.get(branch, {})
        for name in sorted(run.card_files(receipt) | files.keys()):
            refuse_edited_card(run, branch, name, files.get(name))


def refuse_edited_card(run: BuildState, branch: str, name: str, content: bytes | None = None) -> None:
    """Refuse to replace a file of the card, unless a receipt (also an announced one) lists it or it holds `content`."""
    path = run.workspace.folder(branch) / name
    if not os.path.lexists(path):
        return
    receipts = (run.workspace.read_receipt(branch), run.workspace.announced(branch))
    known = {receipt.provenance.files.get(name) for receipt in receipts if receipt is not None}
    if content is not None:
        known.add(bytes_record(content))
    if path.is_file() and any(record is not None and has_record(path, record) for record in known):
        return
    command = ""
    if name == README and (page := _edited_page(path)) is not None:
        records = [record for record in known if record is not None]
        before = next(
            filter(None, (page.as_rendered(record, [written_sections(run.recipe_file)]) for record in records)), None
        )
        new = read_page(content, str(path)).sections if content is not None else None
        if before is not None and new is not None and all(page.sections[n] in (before[n], new[n]) for n in SECTIONS):
            return  # its words are in the new card, too
        if before is not None:
            command = keep_command(run.recipe_file, run.options, str(path), branch)
    raise StateError(
        f"{name} was edited by hand",
        where=str(path),
        why="it follows from the recipe, the templates and the receipts, and would be overwritten",
        hint=f"only its sections were edited; keep them with: {command}"
        if command
        else "put the change into the recipe or templates/, then delete the file and run the command again",
    )


def _edited_page(path: Path) -> SplitPage | None:
    """Return an edited card taken apart, None if it cannot be."""
    try:
        with path.open("rb") as stream:
            return read_page(stream.read(MOST_PAGE_BYTES + 1), str(path))
    except (OSError, CardError):
        return None  # the error about the edited file follows


def written_sections(recipe_file: RecipeFile, folder: str | None = None) -> dict[str, str]:
    """Return the words of the sections in the recipe's files, or in another folder's, as a page has them.

    Raises:
        CardError: a file cannot be read.
    """
    own = read_own_templates(recipe_file, folder)
    return {name: section_text(own.sections.get(name, "") if own is not None else "") for name in SECTIONS}


def read_page(data: bytes, where: str) -> SplitPage:
    """Take a page apart that anybody may have written.

    Args:
        data: at most `MOST_PAGE_BYTES`, and one more where there are more.
        where: it is, for errors.

    Raises:
        CardError: it is too large, no UTF-8, or its markers are damaged.
    """
    if len(data) > MOST_PAGE_BYTES:
        raise CardError("the card is too large", where=where, why=f"it has more than {MOST_PAGE_BYTES:,} bytes")
    try:
        return split_page(data.decode("utf-8-sig"), where)
    except UnicodeDecodeError as error:
        raise CardError("the card is not UTF-8", where=where, why=str(error)) from error


def keep_command(recipe_file: RecipeFile, options: Options, source: str, branch: str) -> str:
    """Return the command that keeps the sections of an edited card."""
    dist = ["--dist", str(options.dist)] if options.dist != Path("dist") else []
    return shlex.join(["packager", "card", str(recipe_file.path), "--keep", source, "--branch", branch, *dist])


def _write_card(run: BuildState, branch: str, files: Mapping[str, bytes], receipt: Receipt) -> None:
    folder = run.workspace.folder(branch)
    changed = [name for name, content in files.items() if not _holds(folder / name, content)]
    removed = [name for name in run.card_files(run.receipts[branch]) - files.keys() if (folder / name).exists()]
    if changed or removed:
        run.workspace.announce(receipt)
    with disk_errors(folder):
        for name in changed:
            write_atomic(folder / name, files[name])
        for name in removed:
            (folder / name).unlink()
    run.keep(receipt)


def _holds(path: Path, content: bytes) -> bool:
    return path.is_file() and path.read_bytes() == content
