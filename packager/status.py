"""What is built, measured, proven and published, read from `dist/`: the table that ends a release."""

from collections.abc import Sequence
from dataclasses import dataclass

from rich import box
from rich.console import Console
from rich.table import Table

from packager.build_state import STAGES, Build, Options
from packager.errors import StateError
from packager.progress import Terminal
from packager.receipt import LoaderRecord, Receipt
from packager.recipe.file import RecipeFile
from packager.targets.local import LocalTarget

_MARKS = {"passed": "ok", "failed": "FAILED", "not run": "not run"}


@dataclass(frozen=True, kw_only=True)
class BranchStatus:
    """One variant's state; `problem` says why its folder cannot be used, if somebody edited it."""

    branch: str
    receipt: Receipt | None
    stages_missing: tuple[str, ...]
    commit: str
    problem: str


def read_status(recipe_file: RecipeFile, options: Options) -> tuple[BranchStatus, ...]:
    """Return every variant's state, in the recipe's order; nothing is changed."""
    run = Build(recipe_file, options, Terminal(quiet=True))
    problem = ""
    try:
        run.read_receipts()
    except StateError as error:
        problem = str(error)
    missing = {stage: {plan.variant.branch for plan in run.missing(stage)} for stage in STAGES}
    published = LocalTarget(run.workspace.hub, recipe_file.recipe.repository.id).read_branches()
    return tuple(
        BranchStatus(
            branch=branch,
            receipt=run.receipts.get(branch),
            stages_missing=tuple(stage for stage in STAGES if branch in missing[stage]),
            commit=published[branch].commit if branch in published else "",
            problem=problem,
        )
        for branch in (plan.variant.branch for plan in run.plan.variants)
    )


def status_json(recipe_file: RecipeFile, options: Options) -> dict[str, object]:
    """Return the state of every variant as values that `json` can write."""
    return {
        "repository": recipe_file.recipe.repository.id,
        "branches": [
            {
                "branch": status.branch,
                "commit": status.commit or None,
                "stages_missing": list(status.stages_missing),
                "problem": status.problem or None,
                "receipt": status.receipt.model_dump(mode="json") if status.receipt else None,
            }
            for status in read_status(recipe_file, options)
        ],
    }


def print_status(recipe_file: RecipeFile, options: Options, console: Console) -> None:
    """Print the table: branch, size, quality, loaders, commit, seconds."""
    table = _table("Branch", "Size", "Perplexity", "KL", "Loaders", "Commit", "Seconds")
    statuses = read_status(recipe_file, options)
    for status in statuses:
        if status.receipt is None:
            table.add_row(status.branch, "", "", "", "not built", status.commit[:12], "")
            continue
        provenance, quality = status.receipt.provenance, status.receipt.provenance.quality
        table.add_row(
            status.branch,
            _size(provenance.weights_bytes),
            f"{quality.perplexity:.4f}" if quality else "not measured",
            f"{quality.kl_divergence:.5f}" if quality else "",
            _loaders(provenance.loaders) or "not verified",
            status.commit[:12] or "not published",
            f"{sum(status.receipt.seconds.values()):.1f}",
        )
    console.print(f"{recipe_file.recipe.repository.id}", highlight=False, markup=False)
    console.print(table)
    for problem in sorted({status.problem for status in statuses if status.problem}):
        console.print(problem, highlight=False, markup=False)
    for reason in _reasons(statuses):
        console.print(reason, highlight=False, markup=False)


def print_loaders(receipts: Sequence[Receipt], console: Console) -> None:
    """Print one row per branch and loader."""
    table = _table("Branch", "Loader", "Status", "Device", "Kernel", "Relative error", "Top-1", "Generated")
    for receipt in receipts:
        for record in receipt.provenance.loaders:
            measured = record.relative_error is not None
            table.add_row(
                receipt.provenance.branch,
                record.loader,
                _MARKS[record.status],
                f"{record.device} {record.dtype}",
                record.kernel,
                f"{record.relative_error:.5f}" if measured else "",
                f"{record.top1_agreement:.3f}" if measured else "",
                f"{record.tokens_equal}/{record.tokens_generated}" if measured else "",
            )
    console.print(table)
    for receipt in receipts:
        for record in receipt.provenance.loaders:
            if record.reason:
                console.print(
                    f"{receipt.provenance.branch}: {record.loader} {record.status}: {record.reason}",
                    highlight=False,
                    markup=False,
                )


def _table(*columns: str) -> Table:
    table = Table(box=box.SIMPLE, pad_edge=False)
    right = {"Size", "Perplexity", "KL", "Seconds", "Relative error", "Top-1", "Generated"}
    for column in columns:
        table.add_column(
            column, justify="right" if column in right else "left", no_wrap=column not in {"Loaders", "Kernel"}
        )
    return table


def _size(size_bytes: int) -> str:
    return f"{size_bytes / 1e9:.2f} GB" if size_bytes >= 1e8 else f"{size_bytes / 1e6:.2f} MB"


def _loaders(records: Sequence[LoaderRecord]) -> str:
    return ", ".join(f"{record.loader} {_MARKS[record.status]}" for record in records)


def _reasons(statuses: Sequence[BranchStatus]) -> list[str]:
    """Return why loaders did not run or failed, each reason once."""
    found: dict[str, None] = {}
    for status in statuses:
        for record in status.receipt.provenance.loaders if status.receipt else ():
            if record.reason:
                found[f"{record.loader} {record.status}: {record.reason}"] = None
    return list(found)
