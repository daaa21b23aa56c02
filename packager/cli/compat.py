"""The command `compat`: which runtimes load a recipe's, a folder's or a repository's branches."""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from packager.cli.options import DIST, DistOption, terminal_of
from packager.cli.publishing import BranchesOption
from packager.errors import AuditError, UsageError

if TYPE_CHECKING:
    from rich.console import Console

    from packager.model.compatibility import VerdictStatus
    from packager.model.rules import RuleFinding
    from packager.pipeline.compat import Compatibility, JudgedBranch
    from packager.system.terminal import Terminal


class CompatFormat(StrEnum):
    """The format of the verdicts."""

    text = "text"
    json = "json"
    markdown = "markdown"


CompatFormatOption = Annotated[
    CompatFormat, typer.Option("--format", help="text for people, json for machines, markdown for a page.")
]
RuntimesOption = Annotated[
    list[str] | None,
    typer.Option("--runtime", metavar="NAME", help="Only this runtime, e.g. vllm; may be given several times."),
]
# In the order in which reasons are printed, with the word before them.
_KINDS = {"refuses": "refused", "unknown": "unknown", "limits": "limit", "note": "note"}
_STATUSES: "Mapping[VerdictStatus, str]" = {
    "loads": "loads",
    "limited": "loads, with a limit",
    "refused": "refused",
    "unknown": "unknown",
}
_STYLES = {"loads": "green", "limited": "yellow", "refused": "red", "unknown": "magenta"}
_NOTHING_RUN = "Predicted by the rules that were read in the runtimes; nothing was run."


def compat_command(
    what: Annotated[
        str,
        typer.Argument(
            metavar="DIR|REPO|RECIPE",
            help="A GPTQ checkpoint folder; a published repository, as in verify-published; or a recipe file.",
        ),
    ],
    branch: BranchesOption = None,
    runtime: RuntimesOption = None,
    dist: DistOption = DIST,
    format: CompatFormatOption = CompatFormat.text,  # noqa: A002 - the option's name
) -> None:
    """Show which runtimes load a checkpoint, and why not.

    Asks the rules on each runtime, by version, about the parameters and shapes of each branch. An answer is one of
    four. loads: no rule is against it. loads, with a limit: it works, and the limit is named. refused: the runtime does
    not load it, or computes something else; the line says what to do. unknown: nobody ran the runtime with such a
    model, or read its code for it.

    Each reason has its source: the project, version and file in which it was read, and the day. All answers are
    predictions: nothing is run. `verify` opens the files of a build, and `verify-published --loaders` those of a
    repository.

    Of a recipe it reads the lock, of a folder the configs and the headers of the weights, of a repository the configs
    of each branch; a clone of one branch is a folder. The folder may be of any program: transformers describes its
    model, if the build extra is installed.

    Exits with 0 whatever the answers are, with 2 if a recipe is wrong, with 7 if a folder or branch is no GPTQ
    checkpoint or its model is not known, with 10 if a repository cannot be read.
    """
    terminal = terminal_of()
    runtimes = known_runtimes(runtime or ())
    found = _found(what, branch or (), dist, terminal)
    if format is CompatFormat.json:
        terminal.result(compat_json(found, runtimes))
    elif format is CompatFormat.markdown:
        terminal.write(compat_markdown(found, runtimes))
    else:
        print_compat(found, runtimes, terminal.out)
    if any(each.problem for each in found.branches):
        raise typer.Exit(AuditError.exit_code)


def known_runtimes(names: Sequence[str]) -> Mapping[str, str]:
    """Return the labels of the runtimes that are shown.

    Raises:
        UsageError: there is no such runtime.
    """
    from packager.model.runtimes import EARLIER_RUNTIMES, RUNTIMES
    from packager.recipe.parsed_recipe import suggestion

    labels = {name: runtime.label for name, runtime in {**RUNTIMES, **EARLIER_RUNTIMES}.items()}
    for name in names:
        if name not in labels:
            hint = suggestion(name, list(labels)) or f"they are {', '.join(labels)}"
            raise UsageError(f"--runtime: there is no runtime {name}", hint=hint)
    return {name: label for name, label in labels.items() if not names or name in names}


def _found(what: str, branches: Sequence[str], dist: Path, terminal: "Terminal") -> "Compatibility":
    from packager.pipeline.compat import (
        compatibility_of_folder,
        compatibility_of_recipe,
        compatibility_of_repository,
    )
    from packager.publish.targets.resolve_target import is_local_repository, resolve_target
    from packager.receipt import CONFIG
    from packager.recipe.file import RecipeFile

    path = Path(what)
    if path.suffix in (".yaml", ".yml"):
        return compatibility_of_recipe(RecipeFile.load(path), branches)
    if (path / CONFIG).is_file() and not is_local_repository(path):
        if branches:
            raise UsageError("--branch is for a recipe or a repository", hint="leave it out: a folder is one branch")
        return compatibility_of_folder(path)
    if path.is_dir() and not any((path / name).exists() for name in (".git", "HEAD")):
        raise AuditError(
            "this is no GPTQ checkpoint", where=what, why=f"there is no {CONFIG} in it, and it is no git repository"
        )
    return compatibility_of_repository(resolve_target(what, dist, os.environ, terminal.log), branches, terminal.log)


@dataclass(frozen=True, kw_only=True)
class VerdictRow:
    """Branches on which the verdict of a runtime is the same.

    Attributes:
        runtime: its label.
        status: the verdict in a word.
        branches: on which it is the verdict.
        everywhere: whether these are all that were judged.
        findings: its reasons.
    """

    runtime: str
    status: "VerdictStatus"
    branches: tuple[str, ...]
    everywhere: bool
    findings: "tuple[RuleFinding, ...]"

    @property
    def names(self) -> str:
        """Return the branches, or "all"."""
        return "all" if self.everywhere else ", ".join(self.branches)


def verdict_rows(found: "Compatibility", runtimes: Mapping[str, str]) -> tuple[VerdictRow, ...]:
    """Return the verdicts, a row for each runtime and each different answer of it.

    Args:
        found: the verdicts.
        runtimes: the labels of those that are shown.
    """
    judged = [branch for branch in found.branches if not branch.problem]
    rows = []
    for name, label in runtimes.items():
        groups: dict[tuple[VerdictStatus, tuple[RuleFinding, ...]], list[str]] = {}
        for branch in judged:
            for verdict in branch.verdicts:
                if verdict.loader == name:
                    groups.setdefault((verdict.status, verdict.findings), []).append(branch.branch)
        rows += [
            VerdictRow(
                runtime=label,
                status=status,
                branches=tuple(names),
                everywhere=len(names) == len(judged),
                findings=findings,
            )
            for (status, findings), names in groups.items()
        ]
    return tuple(rows)


def print_compat(found: "Compatibility", runtimes: Mapping[str, str], console: "Console") -> None:
    """Print a table of verdicts, then each reason with what to do and its source."""
    from rich.text import Text

    from packager.cli.tables import add_row, new_table, print_line
    from packager.system.text import printable

    for branch in found.branches:
        print_line(console, printable(f"{branch.branch}: {_described(branch)}"))
    rows = verdict_rows(found, runtimes)
    table = new_table(("Runtime", "Verdict", "Branches"), title="Expected to load", folding=("Branches",))
    for row in rows:
        add_row(table, row.runtime, Text(_STATUSES[row.status], _STYLES[row.status]), printable(row.names))
    console.print(table)
    for kind, word in _KINDS.items():
        for (label, finding), names in _reasons(rows).items():
            if finding.kind == kind:
                num_judged = sum(not branch.problem for branch in found.branches)
                of = "" if len(names) == num_judged else f" for {', '.join(names)}"
                print_line(console, printable(f"{word}: {label}{of}: {finding.says}"))
                for line in _below(finding):
                    print_line(console, printable(f"  {line}"), "dim")
    print_line(console, _NOTHING_RUN)


def _reasons(rows: Sequence[VerdictRow]) -> "Mapping[tuple[str, RuleFinding], list[str]]":
    """Return each reason of a runtime, by its label, with the branches that it is about."""
    found: dict[tuple[str, RuleFinding], list[str]] = {}
    for row in rows:
        for finding in row.findings:
            found.setdefault((row.runtime, finding), []).extend(row.branches)
    return found


def _below(finding: "RuleFinding") -> Iterator[str]:
    if finding.advice:
        yield f"do: {finding.advice}"
    yield f"read in: {finding.source}"


def _described(branch: "JudgedBranch") -> str:
    """Return the parameters that rules ask for, or why the branch cannot be judged."""
    if branch.variant is None:
        return f"cannot be judged: {branch.problem}"
    from packager.system.text import joined_by_and

    variant = branch.variant
    size = "whole rows" if variant.group_size == -1 else f"group size {variant.group_size}"
    order = f"desc_act {str(variant.desc_act).lower()}"  # false in static order too: runtimes see no difference
    bits = joined_by_and(variant.all_bits)
    return f"{branch.model}, {bits} bits, {size}, {order}, {'' if variant.sym else 'a'}symmetric"


def compat_json(found: "Compatibility", runtimes: Mapping[str, str]) -> dict[str, object]:
    """Return the verdicts as JSON values: of each branch, one per runtime, with every reason and its source."""
    return {
        "where": found.where,
        "branches": [
            {
                "branch": branch.branch,
                "model_class": branch.model,
                "parameters": _parameters(branch),
                "problem": branch.problem,
                "runtimes": [
                    {
                        "runtime": verdict.loader,
                        "label": runtimes[verdict.loader],
                        "verdict": verdict.status,
                        "findings": [asdict(finding) for finding in verdict.findings],
                    }
                    for verdict in branch.verdicts
                    if verdict.loader in runtimes
                ],
            }
            for branch in found.branches
        ],
    }


def _parameters(branch: "JudgedBranch") -> dict[str, object] | None:
    if branch.variant is None:
        return None
    keys = ("bits", *(["other_bits"] if branch.variant.other_bits else []), "group_size", "desc_act", "sym")
    return {key: getattr(branch.variant, key) for key in keys}


def compat_markdown(found: "Compatibility", runtimes: Mapping[str, str]) -> str:
    """Return the verdicts as a table of Markdown, with the sources below it."""
    from packager.card.markdown import inline
    from packager.system.text import printable

    def text(words: str) -> str:
        return inline(printable(words))

    sources: dict[str, int] = {}
    lines = [f"## Runtimes for {text(found.where)}", ""]
    lines += [f"- {text(branch.branch)}: {text(_described(branch))}" for branch in found.branches]
    lines += [
        "",
        "| runtime | verdict | branches | why | what to do | source |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in verdict_rows(found, runtimes):
        numbers = [sources.setdefault(str(finding.source), len(sources) + 1) for finding in row.findings]
        cells = (
            row.runtime,
            _STATUSES[row.status],
            row.names,
            "; ".join(finding.says for finding in row.findings),
            "; ".join(dict.fromkeys(finding.advice for finding in row.findings if finding.advice)),
            ", ".join(str(number) for number in dict.fromkeys(numbers)),
        )
        lines.append(f"| {' | '.join(map(text, cells))} |")
    lines += ["", _NOTHING_RUN, ""]
    lines += [f"{number}. {text(source)}" for source, number in sources.items()]
    return "\n".join(lines) + "\n"
