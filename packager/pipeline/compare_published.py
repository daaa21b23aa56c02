"""What a publish would change, in words: the built release against the published one, branch by branch.

Reads the small files of a repository, whose content is hostile until checked; downloads no weights and writes nothing.
"""

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

from pydantic import ValidationError

from packager.model.checkpoint import MOST_RECORD_BYTES
from packager.pipeline.build_options import Options
from packager.pipeline.build_state import BuildState
from packager.publish.targets import BranchState, Target, read_local_file
from packager.publish.targets.resolve_target import target_of
from packager.receipt import PROVENANCE, README, UNLISTED_FILES, Provenance, QualityRecord
from packager.recipe.file import RecipeFile
from packager.system.terminal import Terminal
from packager.system.text import printable

DifferenceKind = Literal["same", "changed", "new", "not built", "only published", "unreadable"]
_MOST_TEXT_BYTES: Final = 1_000_000
_MOST_DIFF_LINES: Final = 200
_MOST_SHOWN: Final = 100
# What determines the weights and figures; provenance.json has more, such as each linear's loss.
_SECTIONS: Final = ("parameters", "base_model", "calibration", "evaluation", "versions")
_LEFT_OUT: Final = frozenset({"files", "row_prefix", "mixed"})


@dataclass(frozen=True, kw_only=True)
class ValueChange:
    """A value of the records that differs; None where one side does not have it."""

    key: str
    published: str | None
    built: str | None


@dataclass(frozen=True, kw_only=True)
class BranchDifference:
    """A branch as it is built against the branch as it is published.

    Attributes:
        branch: its name.
        standing: unreadable: the published record cannot be compared.
        why: of what is unreadable.
        weights: whether the weights files differ.
        values: of the records: the parameters, texts and versions that made it.
        loaders: results that differ.
        quality: figures of the published and of the built branch.
        texts: for each small text file that differs the lines of a unified diff.
        files: names of all files that differ.
    """

    branch: str
    standing: DifferenceKind
    why: str = ""
    weights: bool = False
    values: tuple[ValueChange, ...] = ()
    loaders: tuple[ValueChange, ...] = ()
    quality: tuple[QualityRecord | None, QualityRecord | None] = (None, None)
    texts: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    files: tuple[str, ...] = ()


def compare_published(recipe_file: RecipeFile, options: Options, terminal: Terminal) -> tuple[BranchDifference, ...]:
    """Compare every variant with its published branch; branches that the recipe does not have come last.

    Raises:
        PublishError: the target cannot be read.
        StateError: a built folder differs from its receipt.
    """
    run = BuildState(recipe_file, options, terminal)
    run.read_receipts()
    target = target_of(run.recipe, run.workspace.dist, options.environ, terminal.log)
    published = target.read_branches()
    found = [compare_branch(run, target, branch, published.get(branch)) for branch in run.keys]
    others = sorted(published.keys() - run.keys.keys())
    return (*found, *(BranchDifference(branch=name, standing="only published") for name in others))


def compare_branch(
    run: BuildState, target: Target, branch: str, state: BranchState | None, *, texts: bool = True
) -> BranchDifference:
    """Compare a variant with its published branch, None if there is none; without `texts`, no lines of texts."""
    receipt = run.receipts.get(branch)
    if receipt is None:
        return BranchDifference(branch=branch, standing="not built")
    if state is None:
        return BranchDifference(branch=branch, standing="new", quality=(None, receipt.provenance.quality))
    built = receipt.provenance
    files = tuple(_different_files(run.workspace.folder(branch), built, state))
    old = published_record(target, state)
    if isinstance(old, str):
        return BranchDifference(branch=branch, standing="unreadable", why=old, files=files)
    return BranchDifference(
        branch=branch,
        standing="changed" if files else "same",
        weights=old.weights_files != built.weights_files,
        values=tuple(_changes(_facts(old), _facts(built))),
        loaders=tuple(_changes(_loaders(old), _loaders(built))),
        quality=(old.quality, built.quality),
        texts={name: lines for name in files if texts and (lines := _text_diff(run, target, state, branch, name))},
        files=files,
    )


def quality_lines(published: QualityRecord | None, built: QualityRecord | None) -> list[str]:
    """Return the figures that differ, before and after."""
    if published is None or built is None:
        return []
    figures = {
        "perplexity": (f"{published.perplexity:.4f}", f"{built.perplexity:.4f}"),
        "KL divergence": (f"{published.kl_divergence:#.3g}", f"{built.kl_divergence:#.3g}"),
        "top-1 agreement": (f"{published.top1_agreement:.2%}", f"{built.top1_agreement:.2%}"),
    }
    return [f"{name}: {old} -> {new}" for name, (old, new) in figures.items() if old != new]


def _different_files(folder: Path, built: Provenance, state: BranchState) -> Iterator[str]:
    """Yield the names of files that a publish would add, change or remove, without signatures and git's attributes."""
    for name in sorted((built.files.keys() | state.files.keys()) - (UNLISTED_FILES - {PROVENANCE})):
        new, old = built.files.get(name), state.files.get(name)
        if new is None or old is None or new.size_bytes != old.size_bytes:
            yield name
        elif old.sha256:
            if old.sha256 != new.sha256:
                yield name
        elif not old.holds(read_local_file(folder / name)):
            yield name


def published_record(target: Target, state: BranchState) -> Provenance | str:
    """Return the record of a published branch, or why it cannot be read."""
    file = state.files.get(PROVENANCE)
    if file is None:
        return f"it has no {PROVENANCE}"
    if not 0 < file.size_bytes <= MOST_RECORD_BYTES:
        return f"its {PROVENANCE} has {printable(str(file.size_bytes))[:20]} bytes"
    try:
        return Provenance.model_validate_json(target.read_bytes(state.commit, PROVENANCE)[:MOST_RECORD_BYTES])
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        return printable(f"its {PROVENANCE} is not valid: {'.'.join(map(str, first['loc']))}: {first['msg']}")[:300]


def _facts(record: Provenance) -> dict[str, str]:
    """Return what made a branch, as texts by dotted key."""
    content = record.model_dump(mode="json", include={*_SECTIONS, "made_with", "device"})
    facts: dict[str, str] = {}
    for key, value in content.items():
        inner: Mapping[str, Any] = value if isinstance(value, dict) else {"": value}
        for name, each in inner.items():
            if name not in _LEFT_OUT and each is not None:
                facts[printable(f"{key}.{name}".rstrip("."))] = printable(str(each))
    return facts


def _loaders(record: Provenance) -> dict[str, str]:
    return {printable(each.loader): each.status for each in record.loaders}


def _changes(published: Mapping[str, str], built: Mapping[str, str]) -> Iterator[ValueChange]:
    for key in dict.fromkeys((*built, *published)):
        old, new = published.get(key), built.get(key)
        if old != new:
            yield ValueChange(key=key, published=_short(old), built=_short(new))


def _short(text: str | None) -> str | None:
    return text if text is None or len(text) <= _MOST_SHOWN else f"{text[:_MOST_SHOWN]}…"


def _text_diff(run: BuildState, target: Target, state: BranchState, branch: str, name: str) -> tuple[str, ...]:
    """Return a unified diff of a card or a config; empty of a file that is large, no text, or on one side only."""
    path, stored = run.workspace.folder(branch) / name, state.files.get(name)
    if stored is None or not path.is_file() or not (name == README or name.endswith((".json", ".jinja"))):
        return ()
    if name == PROVENANCE or not 0 < stored.size_bytes <= _MOST_TEXT_BYTES or path.stat().st_size > _MOST_TEXT_BYTES:
        return ()
    try:
        old = target.read_bytes(state.commit, name)[:_MOST_TEXT_BYTES].decode()
        new = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return ()
    lines = difflib.unified_diff(old.splitlines(), new.splitlines(), "published", "built", n=2, lineterm="")
    shown = [printable(line) for line in lines]
    left = len(shown) - _MOST_DIFF_LINES
    return tuple(shown if left <= 0 else [*shown[:_MOST_DIFF_LINES], f"... and {left} more lines"])
