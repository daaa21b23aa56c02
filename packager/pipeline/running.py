"""What a running build does now: written beside its lock at every step, so that `packager status` can show it."""

import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pydantic import FiniteFloat, ValidationError

from packager.errors import MachineError
from packager.records import Record
from packager.system.files import open_regular, write_atomic
from packager.system.terminal import Step, Terminal

_MOST_BYTES = 100_000


class RunningBuild(Record):
    """The last step of a build.

    Attributes:
        pid: of its process.
        host: the machine's name.
        started_at: of the build, in seconds since 1970.
        stage: its name, e.g. "quantize"; "" before the first stage.
        done: steps of the stage, 0 before the first.
        total: steps of the stage, 0 where it has no steps.
        text: the last step.
        seconds_left: of the stage, None before two of its steps have shown how long one takes.
        updated_at: of this record, in seconds since 1970.
    """

    pid: int
    host: str
    started_at: FiniteFloat
    stage: str
    done: int
    total: int
    text: str
    seconds_left: FiniteFloat | None
    updated_at: FiniteFloat


@contextmanager
def shown_while_running(path: Path, terminal: Terminal) -> Iterator[None]:
    """Write every step that a terminal shows to a file, which is there from the beginning and gone at the end.

    After a kill the file stays, until something takes the build's lock again. A file that cannot be written stops no
    build.
    """
    started_at, observer = time.time(), terminal.observe

    def write(step: Step) -> None:
        running = RunningBuild(
            pid=os.getpid(),
            host=platform.node(),
            started_at=started_at,
            stage=step.stage,
            done=step.done,
            total=step.total,
            text=step.text,
            seconds_left=step.seconds_left,
            updated_at=time.time(),
        )
        with suppress(MachineError, OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(path, running.model_dump_json().encode() + b"\n")

    def observe(step: Step) -> None:
        observer(step)
        write(step)

    write(Step(stage=""))
    terminal.observe = observe
    try:
        yield
    finally:
        terminal.observe = observer
        with suppress(OSError):
            path.unlink(missing_ok=True)
            path.parent.rmdir()  # if nothing else is in it


def read_running(path: Path) -> RunningBuild | None:
    """Return the last step of the build that holds the lock; None if there is no record that can be read."""
    try:
        with open_regular(path) as stream:
            return RunningBuild.model_validate_json(stream.read(_MOST_BYTES))
    except (OSError, ValidationError):
        return None
