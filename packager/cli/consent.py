"""The question before a public change."""

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

import typer

from packager.errors import PublishError

if TYPE_CHECKING:
    from packager.publish.plan import PublishPlan
    from packager.publish.rollback import RollbackPlan


def ask_for_consent(action: str, *, assume_yes: bool) -> "Callable[[PublishPlan | RollbackPlan], None]":
    """Return a callback that asks for confirmation before a public change.

    The callback raises PublishError if the answer is no, or if standard input is not a terminal.

    Args:
        action: what will be done to the branches, e.g. "publish".
        assume_yes: ask nothing.
    """

    def ask(plan: "PublishPlan | RollbackPlan") -> None:
        from packager.system.text import printable

        if assume_yes:
            return
        if not sys.stdin.isatty():
            raise PublishError(
                "nothing was changed: a confirmation is needed, and standard input is not a terminal",
                where=plan.where,
                why="others can see this repository",
                hint="look at the plan with --dry-run, then run again with --yes",
            )
        if not typer.confirm(f"{plan.where}: {action} {printable(', '.join(plan.effects))}?", err=True):
            raise PublishError("nothing was changed: the answer was no", where=plan.where)

    return ask
