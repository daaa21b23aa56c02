"""Mistakes in the command line, in this project's own form: what, and what to do.

typer reports them in the words of click and pydantic, which name Python's types.
"""

import re
from collections.abc import Iterator
from typing import Any, Final

import typer

from packager.errors import UsageError

# Newer releases of typer bring a click of their own: both have the same classes.
UsageMistake: Final[type[Exception]] = next(
    kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException" and issubclass(kind, Exception)
)

_VALUES: Final = (
    (r"(?:file|dir|path)\w* '(?P<value>.*)' does not exist", "there is no {kind} {value}"),
    (r"(?:file|dir|path)\w* '(?P<value>.*)' is a file", "{value} is a file, not a folder"),
    (r"(?:file|dir|path)\w* '(?P<value>.*)' is a directory", "{value} is a folder, not a file"),
    (r"'(?P<value>.*)' is not one of (?P<rule>.*)\.", "it takes {rule}, not {value}"),
    (r".*valid integer.*|.*valid int\b.*", "it takes a whole number"),
    (r".*(?:greater than or equal to|x>=) ?(?P<rule>\d+).*", "it takes a number of at least {rule}"),
)


def usage_error(mistake: Any) -> UsageError:
    """Return a mistake that typer found, in our own words.

    Args:
        mistake: an exception of typer's own click or of click.
    """
    context, kinds = getattr(mistake, "ctx", None), [kind.__name__ for kind in type(mistake).__mro__]
    where = getattr(context, "command_path", "") or "packager"
    what, hint = _described(mistake, kinds, context)
    return UsageError(what, where=where, hint=hint or f"{where} --help shows what it takes")


def _described(mistake: Any, kinds: list[str], context: Any) -> tuple[str, str]:
    message = str(mistake.message or "")
    if "NoSuchOption" in kinds:
        close = list(mistake.possibilities or ()) or _options_like(mistake.option_name, context)
        return f"there is no option {mistake.option_name}", _did_you_mean(close)
    if found := re.match(r"No such command '(.*?)'", message):
        return f"there is no command {found[1]}", _did_you_mean(_close(found[1], list(context.command.commands)))
    if "MissingParameter" in kinds:
        return f"{_name_of(mistake.param)} is missing", getattr(mistake.param, "help", "") or ""
    if "BadOptionUsage" in kinds:
        needs = "takes no value" if "does not take" in message else "needs a value"
        return f"{mistake.option_name} {needs}", ""
    if found := re.match(r"Got unexpected extra arguments?(?:\(s\))? \((.*)\)", message):
        return f"too many arguments: {found[1]}", ""
    name = _name_of(mistake.param) if getattr(mistake, "param", None) is not None else ""
    message = message.removeprefix("Value error, ").rstrip(".")
    return f"{name}: {_value_words(message)}" if name else message, ""


def _value_words(message: str) -> str:
    """Return why a value is refused; a sentence of our own stays."""
    for pattern, words in _VALUES:
        if found := re.fullmatch(pattern, f"{message}." if pattern.endswith(r"\.") else message, re.IGNORECASE):
            named = found.groupdict()
            kind = "folder" if message.lower().startswith("dir") else "file"
            *first, last = re.findall(r"'(.*?)'", named.get("rule") or "") or [named.get("rule") or ""]
            rule = f"{', '.join(first)} or {last}" if first else last
            return words.format(kind=kind, value=named.get("value"), rule=rule)
    return message


def _name_of(parameter: Any) -> str:
    """Return an option as it is written, or the word for an argument in the help."""
    if parameter.param_type_name == "option":
        return str(max(parameter.opts, key=len))
    return str(parameter.metavar or parameter.name.upper())


def _options_like(name: str, context: Any) -> list[str]:
    return _close(name, [option for parameter in _parameters(context) for option in parameter.opts])


def _parameters(context: Any) -> Iterator[Any]:
    yield from getattr(getattr(context, "command", None), "params", ())


def _close(word: str, known: list[str]) -> list[str]:
    import difflib

    return difflib.get_close_matches(word, known, n=1)


def _did_you_mean(close: list[str]) -> str:
    return f"did you mean {close[0]}?" if close else ""
