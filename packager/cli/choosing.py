"""The command `choose`: which branch of a published repository to take."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from packager.cli.options import DIST, Device, DistOption, Format, FormatOption, options_of, read_size, terminal_of
from packager.cli.publishing import RepositoryAddress
from packager.errors import UsageError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from packager.card.choice import Candidate, Choice, Opened
    from packager.publish.published.variants import PublishedVariant, PublishedVariants

_CONTEXT = 4096


VramOption = Annotated[
    int | None,
    typer.Option(
        "--vram",
        metavar="SIZE",
        parser=read_size,
        help="All memory of the graphics card, such as 12GB; without it, every branch fits.",
        show_default="any",
    ),
]
RuntimeOption = Annotated[
    str, typer.Option("--runtime", metavar="NAME", help="Only branches that this runtime opens, such as vllm.")
]
CpuOption = Annotated[
    bool, typer.Option("--cpu", help="Only branches that were proven on a CPU: for a machine without a GPU.")
]
ContextOption = Annotated[
    int, typer.Option("--context", metavar="TOKENS", min=1, help="Length of the texts: their cache takes memory.")
]


def choose_command(
    repository: RepositoryAddress,
    vram: VramOption = None,
    runtime: RuntimeOption = "",
    cpu: CpuOption = False,
    context: ContextOption = _CONTEXT,
    dist: DistOption = DIST,
    format: FormatOption = Format.text,  # noqa: A002
) -> None:
    """Say which branch of a published repository to take.

    Of the branches that fit and that the runtime opens, it names the closest one to the fp16 model; of those that the
    held-out text does not tell apart, the smallest. It is the answer of the repository's card, for any size of memory
    and any runtime: from provenance.json and config.json of each branch, which are downloaded, and nothing else.

    A branch takes its weights, the cache of --context tokens, and 1 GB for the runtime; GB is 10^9 bytes. "proven" says
    that the runtime opened these files and computed the right thing; "expected" says that its own checks, read from its
    source, accept them. What is not known is said, and never taken for a yes.

    Exits with 0 also where no branch can be taken: then `branch` in the JSON is null, and `reason` says why. Exits with
    10 if the repository cannot be read. The figures are those of the records; verify-published compares the files with
    them.

    Examples: packager choose hub:somebody/Model-GPTQ --vram 12GB --runtime vllm; packager choose dist/hub/models/demo/x
    --cpu; packager choose somebody/Model-GPTQ --vram 24GiB --context 32768 --format json
    """
    from packager.card.choice import Candidate, choose_branch, context_of
    from packager.publish.published.variants import published_variants
    from packager.publish.targets.resolve_target import resolve_target

    name = _runtime(runtime)
    if cpu and vram is not None:
        raise UsageError("--cpu and --vram are of different machines", hint="give one of them")
    terminal, environ = terminal_of(), options_of(dist, Device.cpu, None).environ
    found = published_variants(resolve_target(repository, dist, environ, terminal.log), terminal.log)
    candidates = [
        Candidate(
            receipt=variant.provenance,
            context=context_of(variant.architecture, context) if variant.architecture else None,
            opened=_opened(variant, name, on_cpu=cpu),
        )
        for variant in found.variants
    ]
    longest = max((candidate.context.tokens for candidate in candidates if candidate.context), default=context)
    if longest < context != _CONTEXT:
        terminal.log(f"the model takes {longest:,} tokens at most: the memory shown is for these, not for {context:,}")
    choice = choose_branch(candidates, vram)
    if format is Format.json:
        asked: dict[str, object] = {"vram_bytes": vram, "runtime": name or None, "cpu": cpu, "context_tokens": context}
        terminal.result(_json(found, candidates, choice, asked, vram))
    else:
        print_choice(found, candidates, choice, vram, terminal.out)


def _runtime(word: str) -> str:
    """Return the name of a runtime, "" for none.

    Raises:
        UsageError: there is no such runtime.
    """
    from packager.model.runtimes import OTHER_LOADER, RUNTIMES
    from packager.recipe.parsed_recipe import suggestion

    if word.startswith(OTHER_LOADER):
        return word  # records say whether it opened a branch
    name = word.casefold()
    if name and name not in RUNTIMES:
        raise UsageError(f"--runtime: there is no runtime {word[:40]!r} here", hint=suggestion(name, tuple(RUNTIMES)))
    return name


def _opened(variant: "PublishedVariant", runtime: str, *, on_cpu: bool) -> "Opened":
    from packager.card.choice import Opened, opened_by, opened_on_cpu

    if on_cpu:
        return opened_on_cpu(variant.provenance, runtime)
    return opened_by(variant.provenance, variant.verdicts, runtime) if runtime else Opened()


def _json(
    found: "PublishedVariants",
    candidates: "Sequence[Candidate]",
    choice: "Choice",
    asked: dict[str, object],
    vram: int | None,
) -> dict[str, object]:
    from dataclasses import asdict

    rows = []
    for variant, candidate in zip(found.variants, candidates, strict=True):
        quality = variant.provenance.quality
        errors = quality.errors if quality is not None else None
        rows.append(
            {
                "branch": variant.provenance.branch,
                "revision": variant.branch,
                "commit": variant.commit,
                "weights_bytes": variant.provenance.weights_bytes,
                "context_tokens": candidate.context.tokens if candidate.context else None,
                "device_bytes": candidate.device_bytes,
                "fits": candidate.fits(vram),
                "opened": candidate.opened.opening,
                "opened_reason": candidate.opened.reason,
                "kl_divergence": quality.kl_divergence if quality is not None else None,
                "kl_divergence_error": errors.kl_divergence if errors is not None else None,
            }
        )
    return {
        "where": found.where,
        "asked": asked,
        "branch": choice.branch or None,
        "revision": next((row["revision"] for row in rows if row["branch"] == choice.branch), None),
        "reason": choice.reason,
        "branches": rows,
        "findings": [asdict(finding) for finding in found.findings],
    }


def print_choice(
    found: "PublishedVariants",
    candidates: "Sequence[Candidate]",
    choice: "Choice",
    vram: int | None,
    console: "Console",
) -> None:
    """Print a row per branch, what keeps others out, and the branch to take with the reason."""
    from packager.cli.tables import finding_line, fits, print_line
    from packager.system.text import printable

    if candidates:
        table = _table(found, candidates, vram, reasons=True)
        wide = fits(table, console)
        console.print(table if wide else _table(found, candidates, vram, reasons=False))
        for candidate in () if wide else candidates:
            if candidate.opened.reason:
                branch, opened = candidate.receipt.branch, candidate.opened
                print_line(console, printable(f"{branch}: {opened.opening}: {opened.reason}"))
    for finding in found.findings:
        where = f"{printable(finding.branch)}: {finding.file}" if finding.file else printable(finding.branch)
        print_line(console, finding_line(finding.severity, finding.rule, where, finding.message, finding.hint))
    left = {finding.branch for finding in found.findings if finding.severity == "error"}
    if left:
        print_line(console, f"not considered: {', '.join(map(printable, sorted(left)))}", style="yellow")
    taken = f"take {printable(choice.branch)}" if choice.branch else "none"
    print_line(console, f"{taken}: {choice.reason}", style="bold")


def _table(
    found: "PublishedVariants", candidates: "Sequence[Candidate]", vram: int | None, *, reasons: bool
) -> "Table":
    from packager.card.numbers import measured, short_size
    from packager.cli.tables import add_row, new_table
    from packager.system.text import printable

    tokens = sorted({candidate.context.tokens for candidate in candidates if candidate.context})
    memory = f"VRAM at\n{', '.join(f'{number:,}' for number in tokens)}" if tokens else "VRAM"
    asks_runtime = any(candidate.opened.opening != "any" for candidate in candidates)
    columns = ["Branch", "Size", memory, *(["Fits"] if vram is not None else ()), "KL\ndivergence"]
    columns += ["Opens"] if asks_runtime else []
    table = new_table(columns, title=printable(found.where), numbers=("Size", memory), folding=("Branch",))
    for candidate in candidates:
        receipt, fits = candidate.receipt, candidate.fits(vram)
        quality = receipt.quality
        error = quality.errors.kl_divergence if quality is not None and quality.errors is not None else None
        cells = [
            printable(receipt.branch),
            short_size(receipt.weights_bytes),
            "not known" if candidate.device_bytes is None else short_size(candidate.device_bytes),
            *([{True: "yes", False: "no", None: "not known"}[fits]] if vram is not None else ()),
            "not measured" if quality is None else measured(quality.kl_divergence, error),
        ]
        reason = printable(candidate.opened.reason) if reasons else ""
        cells += [": ".join(filter(None, (candidate.opened.opening, reason)))] if asks_runtime else []
        add_row(table, *cells)
    return table
