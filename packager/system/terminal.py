"""The only writer to the terminal: messages go to standard error, results to standard output.

On a terminal a long stage shows a progress bar; elsewhere (a log, CI) each step prints one line. Every stage ends with
one line that has its time.
"""

import io
import json
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from threading import Lock
from typing import TYPE_CHECKING, Any, Final, Literal

from rich.console import Console

from packager.errors import PackagerError, without_passwords
from packager.system.events import EventName, event_line
from packager.system.text import printable_lines

if TYPE_CHECKING:
    from rich.progress import Progress

_LOG_WIDTH = 200
RESULT_VERSION: Final = 1  # of the JSON documents of commands; another form of one of them is another version
ColorChoice = Literal["auto", "always", "never"]
# Not force_terminal for "always": then a log would get bars that overwrite themselves.
_COLORS: Final[Mapping[ColorChoice, dict[str, Any]]] = {
    "auto": {}, "always": {"color_system": "standard"}, "never": {"no_color": True, "color_system": None},
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Step:
    """A step of a stage, or its beginning.

    Attributes:
        stage: its name, "" outside of a stage.
        done: finished steps.
        total: all steps, 0 of a stage without steps.
        text: what was done.
        seconds_left: for the rest; None until two steps have shown how long one takes.
    """

    stage: str
    done: int = 0
    total: int = 0
    text: str = ""
    seconds_left: float | None = None


@dataclass
class Bar:
    """Counts the steps of a stage; several threads may report at once.

    The time that is left follows from the steps after the first one. The first also has the stage's beginning, such as
    the compilation of kernels, which took ten times as long as a block of a model on a GPU.
    """

    progress: "Progress | None"
    total: int
    console: Console
    report: Callable[[int, str, float | None], None] = lambda *_: None
    done: int = 0
    lock: Lock = field(default_factory=Lock)
    _last: float | None = None
    _measured_s: float = 0.0
    _measured: int = 0

    def note(self, text: str) -> None:
        """Show the activity within a step on a terminal; a log has only whole steps."""
        if self.progress is not None:
            self.progress.update(self.progress.task_ids[0], description=f"  {text}")

    def step(self, text: str, *, typical: bool = True) -> None:
        """Advance by one; off a terminal, print a line with the text, the count and the time that is left.

        Args:
            text: what was done.
            typical: whether the steps that are left take as long; not, if its result was there already.
        """
        with self.lock:
            self.done += 1
            now = time.monotonic()
            if self._last is not None and typical:
                self._measured_s, self._measured = self._measured_s + now - self._last, self._measured + 1
            self._last = now
            left = self._left()
            self.report(self.done, text, left)
            if self.progress is not None:
                self.progress.update(self.progress.task_ids[0], advance=1, description=f"  {text}")
                return
            line = f"  [{self.done}/{self.total}] {text}" + (f", {left:.0f} s left" if left is not None else "")
            self.console.print(line, highlight=False, markup=False, soft_wrap=True)

    def _left(self) -> float | None:
        """Return the seconds for the rest; None while nothing says how long a step takes."""
        if self.done == self.total:
            return 0.0
        return self._measured_s / self._measured * (self.total - self.done) if self._measured else None


@dataclass
class Stage:
    """The time of one stage, in seconds; 0 until it has ended."""

    seconds: float = 0.0


class _Lines(io.StringIO):
    """A stream that gives each whole line to a function: the tables of a log become messages."""

    def __init__(self, take: Callable[[str], None]) -> None:
        super().__init__()
        self._take, self._rest = take, ""

    def write(self, text: str) -> int:
        *lines, self._rest = (self._rest + text).split("\n")
        for line in lines:
            if line.strip():
                self._take(line.rstrip())
        return len(text)


class Terminal:
    """Receives the messages, the progress and the results of a command.

    Args:
        quiet: print nothing but errors.
        verbose: print the time of each message since the beginning, and where in our code an error was raised.
        color: "auto" as rich decides, "always" or "never".
        events: write each message and step to standard error as an event, see `events.py`.

    Attributes:
        seconds: the time by the name of the stage, summed over all recipes.
        observe: receives every step, and the beginning of every stage.
        has_result: whether a result was printed as JSON.
    """

    def __init__(
        self, *, quiet: bool = False, verbose: bool = False, color: ColorChoice = "auto", events: bool = False
    ) -> None:
        # A log has no width: tables get enough for their content. Without emoji=False a name like :tada: is replaced.
        width = {stream: None if stream.isatty() else _LOG_WIDTH for stream in (sys.stdout, sys.stderr)}
        self.out = Console(width=width[sys.stdout], emoji=False, **_COLORS[color])
        self._events = events
        file = _Lines(lambda line: self._event("message", text=line)) if events else None
        self.err = Console(file=file, stderr=True, quiet=quiet, emoji=False, width=width[sys.stderr], **_COLORS[color])
        self._errors = Console(stderr=True, emoji=False, **_COLORS[color])
        self.seconds: dict[str, float] = {}
        self.observe: Callable[[Step], None] = lambda _: None
        self.has_result = False
        self._stage = ""
        self._moving: Progress | None = None
        self._started = time.monotonic() if verbose else None

    def log(self, text: str) -> None:
        """Print one message."""
        if self._events:
            self._event("message", text=text)
            return
        since = f"[{time.monotonic() - self._started:8.1f} s] " if self._started is not None else ""
        self.err.print(since + printable_lines(text), highlight=False, markup=False, soft_wrap=True)

    @contextmanager
    def stage(self, name: str) -> Iterator[Stage]:
        """Time a stage and print its time at the end; the value then holds the seconds of this stage."""
        stage, started, outer = Stage(), time.monotonic(), self._stage
        self._stage = name
        self.observe(Step(stage=name))
        if self._events:
            self._event("stage_started", stage=name)
        try:
            with self.busy(name):
                yield stage
        finally:
            self._stage = outer
        stage.seconds = time.monotonic() - started
        self.seconds[name] = self.seconds.get(name, 0.0) + stage.seconds
        if self._events:
            self._event("stage_finished", stage=name, seconds=round(stage.seconds, 3))
        else:
            self.log(f"{name:<10} {stage.seconds:6.1f} s")

    @contextmanager
    def busy(self, text: str) -> Iterator[None]:
        """Show on a terminal that something goes on and for how long, until a bar, or something within it, does."""
        if not self.err.is_terminal or self.err.quiet or self._events:
            yield
            return
        from packager.system.progress_bar import new_spinner

        outer, self._moving = self._moving, new_spinner(self.err, text)
        if outer is not None:
            outer.stop()
        try:
            with self._moving:
                yield
        finally:
            self._moving = outer
            if outer is not None:
                outer.start()

    @contextmanager
    def _instead(self, progress: "Progress") -> Iterator["Progress"]:
        """Show a bar in the place of what `busy` shows: one line moves at a time."""
        if self._moving is not None:
            self._moving.stop()
        try:
            with progress:
                yield progress
        finally:
            if self._moving is not None:
                self._moving.start()

    @contextmanager
    def bar(self, total: int) -> Iterator[Bar]:
        """Show the progress of `total` steps."""

        def report(done: int, text: str, left: float | None) -> None:
            self.observe(Step(stage=self._stage, done=done, total=total, text=text, seconds_left=left))
            if self._events:
                seconds_left = None if left is None else round(left, 1)
                fields = {"done": done, "total": total, "text": text, "seconds_left": seconds_left}
                self._event("step", stage=self._stage, **fields)

        if self._events:
            yield Bar(progress=None, total=total, console=Console(quiet=True), report=report)
            return
        if not self.err.is_terminal or self.err.quiet:
            yield Bar(progress=None, total=total, console=self.err, report=report)
            return
        from packager.system.progress_bar import new_progress  # here: `plan` and `status` show no bar and start faster

        with self._instead(new_progress(self.err)) as progress:
            progress.add_task("", total=total)
            yield Bar(progress=progress, total=total, console=self.err, report=report)

    def result(self, value: Mapping[str, object]) -> None:
        """Print a command's result as JSON on standard output; the first key is the version of its form.

        No address in it has a password.
        """
        self.has_result = True
        self.write(without_passwords(json.dumps({"schema_version": RESULT_VERSION, **value}, indent=2)) + "\n")

    def write(self, text: str) -> None:
        """Write a command's result to standard output unchanged; a reader that ends early (`| head`) is no error."""
        try:
            sys.stdout.write(text)
            sys.stdout.flush()
        except BrokenPipeError:
            self.out.on_broken_pipe()

    def _event(self, event: EventName, **fields: object) -> None:
        if self.err.quiet and event != "error":
            return
        with suppress(BrokenPipeError):  # whoever watched has gone; the build goes on
            sys.stderr.write(event_line(event, fields) + "\n")
            sys.stderr.flush()

    def error(self, error: PackagerError) -> None:
        """Print an error; its first line is marked."""
        if self._events:
            facts = {"what": error.what, "where": error.where, "why": error.why, "hint": error.hint}
            self._event("error", code=type(error).__name__, exit_code=error.exit_code, **facts)
            return
        first, _, rest = printable_lines(str(error)).partition("\n")
        self._errors.print("error:", style="bold red", end=" ")
        self._errors.print(first, markup=False, highlight=False, soft_wrap=True)
        if rest:
            self._errors.print(rest, markup=False, highlight=False, soft_wrap=True)
        if self._started is not None:
            raised = "".join(traceback.format_exception(error)).rstrip()
            self._errors.print(printable_lines(raised), markup=False, highlight=False, soft_wrap=True, style="dim")
