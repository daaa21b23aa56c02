"""The message of a branch's commit: what changed against the branch as it was, why, and the quality before and after.

Values of the published record are those of anybody who could write to the repository: each is one printable, indented
line of limited length, so none can look like a trailer of ours.
"""

from collections.abc import Sequence
from typing import Final

from packager.pipeline.build_state import BuildState
from packager.pipeline.compare_published import BranchDifference, ValueChange, compare_branch, quality_lines
from packager.publish.branches import BranchContent
from packager.publish.targets import BranchState, Target
from packager.receipt import BRANCH_LOCK, BRANCH_RECIPE, PROVENANCE, README, SAFETENSORS, Provenance
from packager.system.text import printable

_MOST_TITLE: Final = 100  # hosts cut longer ones in lists
_MOST_LINE: Final = 300
_MOST_LINES: Final = 20  # of each part


class CommitMessages:
    """Returns the message of each branch's commit.

    Args:
        run: the build.
        target: what is published to; the record of each branch that changes is read.
    """

    def __init__(self, run: BuildState, target: Target) -> None:
        self._run, self._target = run, target
        self._known: dict[tuple[str, str], str] = {}

    def __call__(self, content: BranchContent, state: BranchState | None) -> str:
        """Return the message of a commit that gives a branch this content.

        A branch without a record gets the message of a new one: a publish that was killed may have made it, empty.

        Raises:
            PublishError: the published record cannot be read from the target.
        """
        key = (content.branch, state.commit if state and PROVENANCE in state.files else "")
        if key not in self._known:
            self._known[key] = self._message(content, state if key[1] else None)
        return self._known[key]

    def _message(self, content: BranchContent, state: BranchState | None) -> str:
        built = self._run.receipts[content.branch].provenance
        if state is None:
            return message_text(content.message, _first_lines(built))
        found = compare_branch(self._run, self._target, content.branch, state, texts=False)
        return message_text(f"{content.branch}: {change_title(found)}", change_lines_of(found, built.made_with))


def message_text(title: str, lines: Sequence[str]) -> str:
    """Return a message with a title and lines, each of a limited length."""
    return "\n".join([_cut(title, _MOST_TITLE), "", *(_cut(line, _MOST_LINE) for line in lines)])


def change_title(found: BranchDifference) -> str:
    """Return what changed in a few words: the weights with the first reason, the card, the other files."""
    if found.standing == "unreadable":
        return "replaces files whose record cannot be read"
    records = (PROVENANCE, BRANCH_RECIPE, BRANCH_LOCK)
    others = [name for name in found.files if not name.endswith(SAFETENSORS) and name not in (README, *records)]
    parts = ["other weights"] if found.weights else []
    parts += ["card"] if README in found.files else []
    if others:
        parts.append(others[0] if len(others) == 1 else f"{len(others)} other files")
    if not parts:
        parts = ["records"] if found.files else ["signatures"]
    title = parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
    if not found.weights:
        return f"{title}; the same weights"
    more = f", and {len(found.values) - 1} more" if len(found.values) > 1 else ""
    return f"{title} ({_change(found.values[0])}{more})" if found.values else title


def change_lines_of(found: BranchDifference, made_with: str) -> list[str]:
    """Return the reasons, the quality before and after, the loaders and the files, as lines."""
    if found.standing == "unreadable":
        return [f"  {found.why}", f"Made with: {made_with}"]
    quality = [f"  {line}" for line in quality_lines(*found.quality)]
    if found.weights and not quality and all(found.quality):
        quality = ["  the same figures"]
    return [
        *_part("Changed in the records", [f"  {_change(change)}" for change in found.values]),
        *_part("Quality", quality),
        *_part("Loaders", [f"  {_change(change)}" for change in found.loaders]),
        *_part("Files", [f"  {printable(name)}" for name in found.files]),
        f"Made with: {made_with}",
    ]


def _first_lines(built: Provenance) -> list[str]:
    """Return the parameters, the quality and the loaders' results of a new branch."""
    figures = []
    if quality := built.quality:
        figures = [
            f"  perplexity: {quality.perplexity:.4f} (fp16 {quality.base_perplexity:.4f})",
            f"  KL divergence: {quality.kl_divergence:#.3g}",
            f"  top-1 agreement: {quality.top1_agreement:.2%}",
        ]
    return [
        *_part("Parameters", [f"  {key}: {value}" for key, value in built.parameters.items()]),
        *_part("Quality", figures),
        *_part("Loaders", [f"  {record.loader}: {record.status}" for record in built.loaders]),
    ]


def _part(heading: str, lines: Sequence[str]) -> list[str]:
    """Return a heading with its lines, and how many are left out; nothing without lines."""
    left = len(lines) - _MOST_LINES
    shown = [*lines[:_MOST_LINES], *([f"  and {left} more"] if left > 0 else [])]
    return [f"{heading}:", *shown] if lines else []


def _change(change: ValueChange) -> str:
    return f"{change.key}: {change.published or 'nothing'} -> {change.built or 'nothing'}"


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"
