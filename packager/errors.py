"""The error tree: every failure a user can meet, each class with its own exit code.

An error names what happened, where, why, and what to do about it. `packager/cli/main.py` alone catches these and turns
them into an exit status. Third-party errors are translated into one of these where they are raised.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

# `user:password@` of an address. A password may hold any character but a blank and a quotation mark, so it ends at the
# last @ of the host's part; also beyond a slash, if what follows the first colon is no port.
_USER = re.compile(
    r"(?P<scheme>\b[A-Za-z][A-Za-z0-9+.-]{0,19}://)"
    r"(?P<user>[^\s/?#'\"<>]{0,1000}@|[^\s/?#'\"<>:\[]{0,100}:(?!\d{1,5}(?:[/?#\s'\"<>]|$))[^\s'\"<>]{0,1000}@)"
)
_QUERY = re.compile(r"(\b[A-Za-z][A-Za-z0-9+.-]{0,19}://[^\s'\"<>?]{0,500})\?[^\s'\"<>]{1,8000}")


def without_secrets(text: str) -> str:
    """Return text whose addresses have no password, and no query, which may be a signature that opens a file."""
    safe = without_passwords(text)
    return _QUERY.sub(r"\1?...", safe) if "?" in safe else safe


def without_passwords(text: str) -> str:
    """Return text whose addresses have no password; nothing else is changed.

    The user's name is left out, too, unless it stands alone before a host that is not asked by HTTP (ssh://git@host).
    """
    return _USER.sub(_without_user, text) if "@" in text else text


def _without_user(found: re.Match[str]) -> str:
    harmless = ":" not in found["user"] and not found["scheme"].lower().startswith("http")
    return found[0] if harmless else found["scheme"]


class PackagerError(Exception):
    """A failure with an explanation, in which no address has a password.

    Args:
        what: one sentence: the action that failed.
        where: the file, `file:line:column`, branch or linear concerned.
        why: the cause, as far as it is known.
        hint: the next step for the user.
    """

    exit_code = 1

    def __init__(self, what: str, *, where: str = "", why: str = "", hint: str = "") -> None:
        super().__init__(without_secrets(what))
        self.what = without_secrets(what)
        self.where = without_secrets(where)
        self.why = without_secrets(why)
        self.hint = without_secrets(hint)

    @property
    def brief(self) -> str:
        """`what: why`, for one line of a table or a log, where the place is named already."""
        return f"{self.what}: {self.why}" if self.why else self.what

    def __str__(self) -> str:
        """Return the message as lines: `where: what`, then why, then hint."""
        lines = [f"{self.where}: {self.what}" if self.where else self.what]
        if self.why:
            lines.append(f"  why: {self.why}")
        if self.hint:
            lines.append(f"  hint: {self.hint}")
        return "\n".join(lines)


# Raised for a path in the output folder that is of another kind or of another user. A full disk is reported where the
# file is written.
PATH_REFUSALS = (PermissionError, FileExistsError, NotADirectoryError, IsADirectoryError)


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One problem in a file that a person wrote: its position, a message, and a hint."""

    where: str
    message: str
    hint: str = ""

    def __str__(self) -> str:
        """Return `where: message (hint)`."""
        hint = f" ({self.hint})" if self.hint else ""
        return f"{self.where}: {self.message}{hint}"


class UsageError(PackagerError):
    """The command line is wrong."""

    exit_code = 2


class RecipeError(PackagerError):
    """A recipe cannot be used. Holds every problem found, not only the first."""

    exit_code = 2

    def __init__(self, what: str, problems: Sequence[Problem] = (), *, hint: str = "") -> None:
        super().__init__(what, hint=hint)
        self.problems = tuple(problems)

    def __str__(self) -> str:
        """Return the summary line followed by one line per problem."""
        lines = [self.what, *(f"  {problem}" for problem in self.problems)]
        if self.hint:
            lines.append(f"  hint: {self.hint}")
        return "\n".join(lines)


class PlanError(PackagerError):
    """The recipe is well formed, but cannot be built from its base model."""

    exit_code = 2


class SourceError(PackagerError):
    """The base model cannot be read, or differs from the recipe."""

    exit_code = 3


class CalibrationError(PackagerError):
    """The calibration or evaluation text cannot be used."""

    exit_code = 4


class QuantizeError(PackagerError):
    """A linear cannot be quantized: NaN, a factorisation beyond the damping limit, an unusable shape."""

    exit_code = 5


class PackError(PackagerError):
    """A checkpoint folder cannot be written."""

    exit_code = 6


class AuditError(PackagerError):
    """A checkpoint folder violates the format: docs/reference/format.md."""

    exit_code = 7


class LoaderError(PackagerError):
    """A runtime failed to open a checkpoint, or computed other values."""

    exit_code = 8


class LoaderUnavailableError(LoaderError):
    """A runtime cannot run on this machine; the message names the reason."""


class CardError(PackagerError):
    """The model card cannot be rendered."""

    exit_code = 9


class PublishError(PackagerError):
    """The publishing target refused, or changed since it was read."""

    exit_code = 10


class StateError(PackagerError):
    """The working or output folder differs from the receipts: edited, incomplete, or of another recipe."""

    exit_code = 11


class MachineError(PackagerError):
    """This machine lacks something: disk space, memory, a GPU, git."""

    exit_code = 12


def path_refusal(error: OSError) -> MachineError | None:
    """Return the error to show for one of PATH_REFUSALS; None if it names no path."""
    if error.filename is None:
        return None
    return MachineError("cannot be used", where=str(error.filename), why=error.strerror or "")
