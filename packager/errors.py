"""The error tree: every failure a user can meet, each class with its own exit code.

An error says what happened, where, why, and what to do about it. `cli.py` is the one place that catches these
and turns them into an exit status; third-party errors are translated into one of these where they are raised.
"""

from collections.abc import Sequence
from dataclasses import dataclass


class PackagerError(Exception):
    """A failure with an explanation.

    Args:
        what: one sentence, what could not be done.
        where: the file, `file:line:column`, branch or linear concerned.
        why: the cause, as far as it is known.
        hint: what the user can do next.
    """

    exit_code = 1

    def __init__(self, what: str, *, where: str = "", why: str = "", hint: str = "") -> None:
        super().__init__(what)
        self.what = what
        self.where = where
        self.why = why
        self.hint = hint

    def __str__(self) -> str:
        """Return the message as lines: `where: what`, then why, then hint."""
        lines = [f"{self.where}: {self.what}" if self.where else self.what]
        if self.why:
            lines.append(f"  why: {self.why}")
        if self.hint:
            lines.append(f"  hint: {self.hint}")
        return "\n".join(lines)


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One finding in a file a person wrote: where it is, what is wrong, what to do."""

    where: str
    message: str
    hint: str = ""

    def __str__(self) -> str:
        """Return `where: message (hint)`."""
        hint = f" ({self.hint})" if self.hint else ""
        return f"{self.where}: {self.message}{hint}"


class RecipeError(PackagerError):
    """A recipe cannot be used. Carries every problem found, not only the first."""

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
    """The recipe is well formed but cannot be built as it stands."""

    exit_code = 2


class SourceError(PackagerError):
    """The base model cannot be read, or is not what the recipe says."""

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
    """A checkpoint folder does not keep the format's contract."""

    exit_code = 7


class LoaderError(PackagerError):
    """A runtime failed to open a checkpoint, or computed something else."""

    exit_code = 8


class LoaderUnavailableError(LoaderError):
    """A runtime cannot run on this machine; the message says why."""


class CardError(PackagerError):
    """The model card cannot be rendered."""

    exit_code = 9


class PublishError(PackagerError):
    """The publishing target refused, or is not in the state we left it in."""

    exit_code = 10


class StateError(PackagerError):
    """The working or output folder is not what the receipts say: edited, incomplete, or somebody else's."""

    exit_code = 11


class MachineError(PackagerError):
    """This machine lacks something: disk space, memory, a GPU, git."""

    exit_code = 12
