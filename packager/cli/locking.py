"""The command `lock`."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from packager.cli.options import Format, FormatOption, terminal_of

if TYPE_CHECKING:
    from rich.console import Console

    from packager.model.lock import LockedKind
    from packager.pipeline.lock_recipes import LockResult

_MOST_MODULES = 6


def lock_command(
    recipes: Annotated[list[Path], typer.Argument(metavar="RECIPE", help="The recipes whose locks are made.")],
    copy: Annotated[
        Path | None,
        typer.Option(
            "--from",
            metavar="FOLDER",
            exists=True,
            file_okay=False,
            help="Describe this copy of the model (config.json, and the weights if they are there), not the Hub's.",
        ),
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Write nothing; exit with 1 if a lock is not what would be written.")
    ] = False,
    format: FormatOption = Format.text,  # noqa: A002 - the option's name
) -> None:
    """Write down what the base model says of itself.

    Writes <recipe>.lock.json, which plan and build need: commits, files with their digests, tensors, blocks, and the
    linears that are quantized. Reads config.json, small files and the headers of the weights, never the weights. Needs
    the build extra, and the network for a base model or a dataset on the Hub. The recipe is not changed. With --from
    the recipe names the commit, and the lock holds no digests of files. Exits with 3 if the model cannot be quantized:
    the error names the module that stands in the way.
    """
    from packager.pipeline.lock_recipes import lock_recipes
    from packager.pipeline.many_recipes import recipes_among

    terminal = terminal_of()
    recipes = recipes_among(recipes, (), terminal.log)
    results = []
    for result in lock_recipes(recipes, terminal.log, copy=copy, check=check):
        results.append(result)
        if format is Format.text:
            print_lock(result, terminal.out)
    if format is Format.json:
        terminal.result({"locks": [_lock_json(result) for result in results]})
    if not all(result.is_current for result in results):
        raise typer.Exit(1)


def print_lock(result: "LockResult", console: "Console") -> None:
    """Print what a lock says of the base model, and where the file differs."""
    from packager.cli.tables import counted, print_line
    from packager.system.text import format_bytes, printable

    lock, facts = result.lock, _facts(result)
    print_line(console, f"{result.path}: {result.status}", "" if result.is_current else "bold red")
    base = lock.base_model
    named = f" ({printable(base.requested)})" if base.requested else ""
    place = f"{base.revision}{named}" if base.revision else "local folder"
    print_line(console, f"  base model     {printable(base.id)}, {place}")
    for key, commit in lock.datasets.items():
        print_line(console, f"  dataset        {printable(key)}, {commit}")
    print_line(console, f"  model          {facts['model_class']}, {counted(facts['blocks'], 'block')}")
    for kind in lock.model.kinds:
        for line in _kind_lines(kind):
            print_line(console, f"  {printable(line)}")
    print_line(console, f"  tensors        {facts['tensors']:,}, {format_bytes(facts['tensor_bytes'])}")
    files = facts["files"]
    pinned = counted(files, "file") if files else "no digests of files"
    print_line(console, f"  pinned         {pinned}, chat template {(lock.chat_template_sha256 or 'none')[:12]}")
    for change in result.changes:
        print_line(console, f"  not as the base model has it: {printable(change)}")
    for line in result.diff:
        print_line(console, printable(line))


def _kind_lines(kind: "LockedKind") -> Iterable[str]:
    from packager.cli.tables import counted

    linears = sum(len(group.linears) for group in kind.groups if group.experts is None)
    quantized = f"{counted(linears, 'linear')} quantized in {counted(len(kind.groups), 'group')}"
    yield f"blocks {kind.blocks:<8}{quantized}"
    for group in kind.groups:
        if group.experts is not None:
            names = ", ".join(linear.module.rpartition(".")[2] for linear in group.linears)
            yield f"  {names} of {counted(group.experts.count, 'expert')}"
    for reason, modules in _by_reason(kind.left).items():
        more = f" and {len(modules) - _MOST_MODULES} more" if len(modules) > _MOST_MODULES else ""
        yield f"  not quantized: {', '.join(modules[:_MOST_MODULES])}{more}: {reason}"


def _by_reason(left: Mapping[str, str]) -> dict[str, list[str]]:
    reasons: dict[str, list[str]] = {}
    for module, reason in left.items():
        reasons.setdefault(reason, []).append(module)
    return reasons


def _facts(result: "LockResult") -> dict[str, Any]:
    """Return what the text and the JSON show of a lock."""
    from packager.model.architecture import architecture_of

    lock = result.lock
    architecture = architecture_of(lock.model, result.path.name)
    return {
        "model_class": lock.model.model_class,
        "blocks": architecture.num_blocks,
        "tensors": len(architecture.base_tree),
        "tensor_bytes": architecture.base_bytes,
        "files": len(lock.base_model.files),
    }


def _lock_json(result: "LockResult") -> dict[str, Any]:
    lock = result.lock
    return {
        "recipe": str(result.recipe),
        "lock": str(result.path),
        "status": result.status,
        "base_model": lock.base_model.model_dump(include={"id", "requested", "revision"}),
        "datasets": lock.datasets,
        "chat_template_sha256": lock.chat_template_sha256,
        **_facts(result),
        "kinds": [
            {
                "blocks": kind.blocks,
                "linears": [linear.module for group in kind.groups for linear in group.linears],
                "left": _by_reason(kind.left),
            }
            for kind in lock.model.kinds
        ],
        "changes": list(result.changes),
        "diff": list(result.diff),
    }
