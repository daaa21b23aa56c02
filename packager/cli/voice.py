"""What all commands have in common: the options for output, and the form of an error as text and as JSON."""

import functools
import inspect
import itertools
from collections.abc import Callable, Sequence
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from packager.cli.options import VOICE, Color, QuietOption, terminal_of

if TYPE_CHECKING:
    from packager.errors import PackagerError


class LogFormat(StrEnum):
    """The format of the log."""

    text = "text"
    json = "json"


VerboseOption = Annotated[
    bool, typer.Option("--verbose", "-v", help="Print the time of each message, and where an error was raised.")
]
ColorOption = Annotated[
    Color, typer.Option("--color", help="auto: on a terminal, unless NO_COLOR is set.", show_choices=True)
]
LogFormatOption = Annotated[
    LogFormat, typer.Option("--log-format", help="json: the log as events on standard error, one JSON object a line.")
]
_COMMON: Final[dict[str, tuple[Any, object]]] = {
    "quiet": (QuietOption, False),
    "verbose": (VerboseOption, False),
    "color": (ColorOption, Color.auto),
}
_EVENTS: Final[dict[str, tuple[Any, object]]] = {"log_format": (LogFormatOption, LogFormat.text)}


def begin(arguments: Sequence[str]) -> None:
    """Forget the command before, and read from the words of this one whether it answers in JSON."""
    pairs = list(itertools.pairwise([*arguments, ""]))
    VOICE.begin(as_json=("--format", "json") in pairs or "--format=json" in arguments)


def spoken(command: Callable[..., None], *, with_events: bool) -> Callable[..., None]:
    """Return a command with the options that all commands have, which set how `terminal_of` writes.

    Args:
        command: gets its own arguments.
        with_events: it also has --log-format.
    """
    signature = inspect.signature(command, eval_str=True)
    own = dict(signature.parameters)
    added = {
        name: inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
        for name, (annotation, default) in (_COMMON | (_EVENTS if with_events else {})).items()
        if name not in own
    }

    @functools.wraps(command)
    def run(**arguments: Any) -> None:
        VOICE.quiet, VOICE.verbose, VOICE.color = (arguments[name] for name in _COMMON)
        VOICE.events = arguments.get("log_format") is LogFormat.json
        for name in added:
            del arguments[name]
        command(**arguments)

    parameters = [each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in (own | added).values()]
    run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {each.name: each.annotation for each in parameters}
    return run


def report(error: "PackagerError") -> None:
    """Print an error; with `--format json` also as the result, unless a result is printed already."""
    terminal = terminal_of()
    terminal.error(error)
    if VOICE.as_json and not any(each.has_result for each in VOICE.terminals):
        terminal.result({"error": error_json(error)})


def error_json(error: "PackagerError") -> dict[str, Any]:
    """Return an error for machines."""
    problems = [
        {"where": problem.where, "what": problem.message, "hint": problem.hint}
        for problem in getattr(error, "problems", ())
    ]
    answer = {"code": type(error).__name__, "exit_code": error.exit_code, "what": error.what}
    answer |= {"where": error.where, "why": error.why, "hint": error.hint}
    return answer | ({"problems": problems} if problems else {})
