"""The only writer to the terminal: messages go to standard error, results to standard output.

On a terminal a long stage shows a progress bar; elsewhere (a log, CI) each step prints one line. Every stage ends with
one line that has its time.
"""

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import Lock
from typing import TYPE_CHECKING

from rich.console import Console

from packager.errors import PackagerError, without_secrets
from packager.system.text import printable_lines

if TYPE_CHECKING:
    from rich.progress import Progress

_LOG_WIDTH = 200


@dataclass(frozen=True, kw_only=True)
class Step:
    """A step of a stage, or its beginning.

    Attributes:
        stage: its name, "" outside of a stage.
        done: finished steps.
        total: all steps, 0 of a stage without steps.
        text: what was done.
        seconds_left: for the rest, None at the beginning.
    """

    stage: str
    done: int = 0
    total: int = 0
    text: str = ""
    seconds_left: float | None = None


@dataclass
class Bar:
    """Counts the steps of a stage; several threads may report at once."""

    progress: "Progress | None"
    total: int
    console: Console
    report: Callable[[int, str, float], None] = lambda *_: None
    done: int = 0
    started: float = field(default_factory=time.monotonic)
    lock: Lock = field(default_factory=Lock)

    def note(self, text: str) -> None:
        """Show the activity within a step on a terminal; a log has only whole steps."""
        if self.progress is not None:
            self.progress.update(self.progress.task_ids[0], description=f"  {text}")

    def step(self, text: str) -> None:
        """Advance by one; off a terminal, print a line with the text, the count and the time that is left."""
        with self.lock:
            self.done += 1
            elapsed = time.monotonic() - self.started
            left = elapsed / self.done * (self.total - self.done)
            self.report(self.done, text, left)
            if self.progress is not None:
                self.progress.update(self.progress.task_ids[0], advance=1, description=f"  {text}")
                return
            line = f"  [{self.done}/{self.total}] {text}, {left:.0f} s left"
            self.console.print(line, highlight=False, markup=False, soft_wrap=True)


@dataclass
class Stage:
    """The time of one stage, in seconds; 0 until it has ended."""

    seconds: float = 0.0


class Terminal:
    """Receives the messages, the progress and the results of a command.

    Args:
        quiet: print nothing but errors.

    Attributes:
        seconds: the time by the name of the stage, summed over all recipes.
        observe: receives every step, and the beginning of every stage.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        # A log has no width: tables get enough for their content. Without emoji=False a name like :tada: is replaced.
        self.out = Console(width=None if sys.stdout.isatty() else _LOG_WIDTH, emoji=False)
        self.err = Console(stderr=True, quiet=quiet, emoji=False, width=None if sys.stderr.isatty() else _LOG_WIDTH)
        self._errors = Console(stderr=True, emoji=False)
        self.seconds: dict[str, float] = {}
        self.observe: Callable[[Step], None] = lambda _: None
        self._stage = ""

    def log(self, text: str) -> None:
        """Print one message."""
        self.err.print(printable_lines(text), highlight=False, markup=False, soft_wrap=True)

    @contextmanager
    def stage(self, name: str) -> Iterator[Stage]:
        """Time a stage and print its time at the end; the value then holds the seconds of this stage."""
        stage, started, outer = Stage(), time.monotonic(), self._stage
        self._stage = name
        self.observe(Step(stage=name))
        try:
            yield stage
        finally:
            self._stage = outer
        stage.seconds = time.monotonic() - started
        self.seconds[name] = self.seconds.get(name, 0.0) + stage.seconds
        self.log(f"{name:<10} {stage.seconds:6.1f} s")

    @contextmanager
    def bar(self, total: int) -> Iterator[Bar]:
        """Show the progress of `total` steps."""

        def report(done: int, text: str, left: float) -> None:
            self.observe(Step(stage=self._stage, done=done, total=total, text=text, seconds_left=left))

        if not self.err.is_terminal or self.err.quiet:
            yield Bar(progress=None, total=total, console=self.err, report=report)
            return
        # Imported here: `plan` and `status` show no bar and start faster without it.
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        with Progress(*columns, TextColumn("{task.description}"), console=self.err, transient=True) as progress:
            progress.add_task("", total=total)
            yield Bar(progress=progress, total=total, console=self.err, report=report)

    def result(self, value: object) -> None:
        """Print a command's result as JSON on standard output; no address in it has a password."""
        self.write(without_secrets(json.dumps(value, indent=2)) + "\n")

    def write(self, text: str) -> None:
        """Write a command's result to standard output unchanged; a reader that ends early (`| head`) is no error."""
        try:
            sys.stdout.write(text)
            sys.stdout.flush()
        except BrokenPipeError:
            self.out.on_broken_pipe()

    def error(self, error: PackagerError) -> None:
        """Print an error; its first line is marked."""
        first, _, rest = printable_lines(str(error)).partition("\n")
        self._errors.print("error:", style="bold red", end=" ")
        self._errors.print(first, markup=False, highlight=False, soft_wrap=True)
        if rest:
            self._errors.print(rest, markup=False, highlight=False, soft_wrap=True)
