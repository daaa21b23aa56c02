"""Child processes that run other people's code: without our secrets, with a time limit, killed with their children."""

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import IO

_SECRET_WORDS = ("TOKEN", "SECRET", "PASSWORD", "KEY", "CREDENTIAL")
# They lead an interpreter or pip to packages outside its environment.
_MISLEADING = frozenset(
    ("PYTHONPATH", "PYTHONHOME", "PYTHONSTARTUP", "PIP_TARGET", "PIP_PREFIX", "PIP_ROOT", "PIP_USER", "PIP_CONSTRAINT")
)
_POLL_S = 0.1

_running: set["subprocess.Popen[bytes]"] = set()
_lock = threading.Lock()
_stopping = threading.Event()


def clean_environ(environ: Mapping[str, str]) -> dict[str, str]:
    """Return `environ` without secrets and without what leads Python or pip out of a virtual environment."""
    return {
        name: value
        for name, value in environ.items()
        if name not in _MISLEADING and not any(word in name.upper() for word in _SECRET_WORDS)
    }


def run(
    command: Sequence[str],
    *,
    folder: Path,
    environ: Mapping[str, str],
    out: IO[bytes],
    err: IO[bytes],
    timeout_s: float,
    progress: Callable[[], int] = lambda: 0,
    inherited: Collection[int] = (),
) -> int | None:
    """Run a command in a process group of its own; return its exit status, or None if it took too long.

    The whole group is killed when the time is over and when this wait is interrupted.

    Args:
        command: the program and its arguments.
        folder: its working directory.
        environ: its whole environment.
        out: takes its standard output.
        err: takes its standard error.
        timeout_s: how long it may take.
        progress: whenever this returns another number, the time starts anew.
        inherited: descriptors that stay open in the child.

    Raises:
        KeyboardInterrupt: `stop_all` was called.
    """
    with _lock:
        if _stopping.is_set():
            raise KeyboardInterrupt
        process = subprocess.Popen(
            command,
            cwd=folder,
            env=environ,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            start_new_session=True,
            pass_fds=inherited,
        )
        _running.add(process)
    try:
        state, deadline = progress(), time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            try:
                status = process.wait(timeout=_POLL_S)
            except subprocess.TimeoutExpired:
                if (now := progress()) != state:
                    state, deadline = now, time.monotonic() + timeout_s
                continue
            if _stopping.is_set():
                raise KeyboardInterrupt
            return status
        return None
    finally:
        with _lock:
            _kill(process)
            _running.discard(process)


def stop_all() -> None:
    """Kill everything that `run` has started in any thread, and let it start nothing more.

    Ctrl-C reaches the main thread only: it calls this before it waits for threads that run probes.
    """
    _stopping.set()
    with _lock:
        for process in _running:
            _kill(process)


def _kill(process: "subprocess.Popen[bytes]") -> None:
    """Kill a process that is still running, with everything that it started."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def tail(log: Path, lines: int) -> str:
    """Return the last lines of a log."""
    return "\n".join(log.read_text(encoding="utf-8", errors="replace").rstrip().splitlines()[-lines:])
