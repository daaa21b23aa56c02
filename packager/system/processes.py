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
# Variables that make Python or pip use packages outside the virtual environment.
_MISLEADING = frozenset(
    ("PYTHONPATH", "PYTHONHOME", "PYTHONSTARTUP", "PIP_TARGET", "PIP_PREFIX", "PIP_ROOT", "PIP_USER", "PIP_CONSTRAINT")
)
_POLL_S = 0.1


def clean_environ(environ: Mapping[str, str]) -> dict[str, str]:
    """Return `environ` without secrets and without variables that lead out of a virtual environment."""
    return {
        name: value
        for name, value in environ.items()
        if name not in _MISLEADING and not any(word in name.upper() for word in _SECRET_WORDS)
    }


class Processes:
    """Child processes that one task runs, in several threads, and that stop together.

    Ctrl-C reaches the main thread only: the main thread calls `stop_all` before it waits for threads that run children.
    """

    def __init__(self) -> None:
        self._running: set[subprocess.Popen[bytes]] = set()
        self._lock = threading.Lock()
        self._stopping = threading.Event()

    def run(
        self,
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
            out: receives its standard output.
            err: receives its standard error.
            timeout_s: the longest time it may take.
            progress: the time limit starts again whenever this returns another number.
            inherited: descriptors that stay open in the child.

        Raises:
            KeyboardInterrupt: `stop_all` was called.
        """
        with self._lock:
            if self._stopping.is_set():
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
            self._running.add(process)
        try:
            return self._wait(process, timeout_s, progress)
        finally:
            with self._lock:
                _kill(process)
                self._running.discard(process)

    def _wait(self, process: "subprocess.Popen[bytes]", timeout_s: float, progress: Callable[[], int]) -> int | None:
        state, deadline = progress(), time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            try:
                status = process.wait(timeout=_POLL_S)
            except subprocess.TimeoutExpired:
                if (now := progress()) != state:
                    state, deadline = now, time.monotonic() + timeout_s
                continue
            if self._stopping.is_set():
                raise KeyboardInterrupt
            return status
        return None

    def stop_all(self) -> None:
        """Kill every child that runs, in any thread, and start no more."""
        self._stopping.set()
        with self._lock:
            for process in self._running:
                _kill(process)


def _kill(process: "subprocess.Popen[bytes]") -> None:
    """Kill a process that is still running, with everything that it started."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def tail(log: Path, lines: int) -> str:
    """Return the last lines of a log."""
    return "\n".join(log.read_text(encoding="utf-8", errors="replace").rstrip().splitlines()[-lines:])
