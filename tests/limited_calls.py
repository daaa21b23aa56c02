"""Calls in a process of their own, with the time and the memory that each takes beyond a harmless call (Linux)."""

import ctypes
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

MOST_BYTES_BEYOND = 1_000_000_000
MOST_S = 60.0
_ENDED_AFTER_S = 300.0
_MOST_OUTPUT_BYTES = 1_000_000


@dataclass(frozen=True, kw_only=True)
class Measured:
    """How a call ended, and what it took.

    Attributes:
        status: the exit code; negative: the signal that ended it.
        seconds: by the clock; on a machine with other work, most of it may be waiting.
        cpu_s: seconds of computing, of the process and all that it started and waited for.
        peak_bytes: the most memory that the largest of these processes had at once.
        output: the first million bytes of what was printed.
    """

    status: int
    seconds: float
    cpu_s: float
    peak_bytes: int
    output: str


def run_limited(arguments: Sequence[str], output: Path) -> Measured:
    """Run a command of the program; see `call_limited`."""
    from packager.cli.main import app

    return call_limited(lambda: app(list(arguments)), output)


def call_limited(function: Callable[[], object], output: Path) -> Measured:
    """Call a function in a fork of this process, which is ended after some minutes.

    The fork begins with this process's pages. They are part of its peak, as they are of a harmless call's: the
    difference of the two peaks is what the call took, if this process is small and does no such work itself.
    """
    ctypes.CDLL(None).malloc_trim(0)  # else a call could fill this process's free pages, and no peak would show it
    started = time.monotonic()
    child = os.fork()
    if child == 0:
        _call_and_exit(function, output)
    while True:
        pid, status, usage = os.wait4(child, os.WNOHANG)
        if pid:
            break
        if time.monotonic() - started > _ENDED_AFTER_S:
            os.killpg(child, signal.SIGKILL)
        time.sleep(0.005)
    return Measured(
        status=os.waitstatus_to_exitcode(status),
        seconds=time.monotonic() - started,
        cpu_s=usage.ru_utime + usage.ru_stime,
        peak_bytes=usage.ru_maxrss * 1024,
        output=output.read_bytes()[:_MOST_OUTPUT_BYTES].decode("utf-8", "replace"),
    )


def overstepped(found: Measured, clean: Measured) -> str:
    """Return which limit a call overstepped, beside a harmless call on the same machine; "" if none.

    Other work on the machine makes every call take longer by the clock; the harmless call shows by how much.
    """
    beyond = found.peak_bytes - clean.peak_bytes
    if beyond > MOST_BYTES_BEYOND:
        return f"{beyond / 1e6:.0f} MB more than a harmless call"
    if found.cpu_s > MOST_S:
        return f"{found.cpu_s:.0f} s of computing"
    if found.seconds > MOST_S * max(1.0, clean.seconds / clean.cpu_s):
        return f"{found.seconds:.0f} s, of which it computed for {found.cpu_s:.1f} s"
    return ""


def _call_and_exit(function: Callable[[], object], output: Path) -> None:
    """Call a function with its output in a file, and end this process as the command line would."""
    status = 99
    try:
        os.setsid()
        descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        try:
            function()
            status = 0
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else 1
        except BaseException:  # noqa: BLE001, what `main` would end with
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(status)  # also where nothing can be printed: a fork must not go on as its parent
