"""Child processes that run other people's code: with limits, and killed with their children when this process ends."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from packager.system.files import open_regular
from packager.system.posix import require_posix

_SUPERVISOR = Path(__file__).with_name("supervisor.py")
_POLL_S = 0.02
_PATIENCE_S = 2.0  # git's own cleaning up takes milliseconds
_TAIL_BYTES = 1 << 16


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
        max_file_bytes: int = 0,
    ) -> int | None:
        """Run a command in a process group of its own; return its exit status, or None if it took too long.

        What is left of the group is killed when the command ends, when the time is over, when this wait is interrupted,
        and when this process ends, even by SIGKILL.

        Args:
            command: the program and its arguments.
            folder: its working directory.
            environ: its whole environment.
            out: receives its standard output.
            err: receives its standard error.
            timeout_s: the longest time it may take.
            progress: the time limit starts again whenever this returns another number.
            inherited: descriptors that stay open in the child.
            max_file_bytes: the size that no file may exceed which it writes, its output included; 0 for any size.

        Raises:
            KeyboardInterrupt: `stop_all` was called.
        """
        running = self.running(
            command,
            folder=folder,
            environ=environ,
            out=out,
            err=err,
            inherited=inherited,
            max_file_bytes=max_file_bytes,
        )
        with running as process:
            return self._wait(process, timeout_s, progress)

    @contextmanager
    def running(
        self,
        command: Sequence[str],
        *,
        folder: Path,
        environ: Mapping[str, str],
        out: IO[bytes],
        err: IO[bytes],
        inherited: Collection[int] = (),
        max_file_bytes: int = 0,
    ) -> Iterator["subprocess.Popen[bytes]"]:
        """Start a command in a process group of its own; what is left of the group is killed when the block ends.

        The group is killed with this process, too. See `run` for the arguments.

        Raises:
            KeyboardInterrupt: `stop_all` was called.
        """
        require_posix("this command")
        with self._lock:
            if self._stopping.is_set():
                raise KeyboardInterrupt
            process = subprocess.Popen(
                [sys.executable, "-I", "-S", str(_SUPERVISOR), str(max_file_bytes), *command],
                cwd=folder,
                env=environ,
                stdin=subprocess.PIPE,  # never written to: it ends with this process
                stdout=out,
                stderr=err,
                start_new_session=True,
                pass_fds=inherited,
            )
            self._running.add(process)
        try:
            yield process
        finally:
            with self._lock:
                _kill(process)
                self._running.discard(process)

    def _wait(self, process: "subprocess.Popen[bytes]", timeout_s: float, progress: Callable[[], int]) -> int | None:
        state, deadline = progress(), time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            with self._lock:
                ended = _has_ended(process)
            if ended and self._stopping.is_set():
                raise KeyboardInterrupt
            if ended:
                with self._lock:
                    _kill(process)
                return process.returncode
            time.sleep(_POLL_S)
            if (now := progress()) != state:
                state, deadline = now, time.monotonic() + timeout_s
        return None

    def stop_all(self) -> None:
        """Kill every child that runs, in any thread, and start no more."""
        self._stopping.set()
        with self._lock:
            for process in self._running:
                _kill(process)


def _has_ended(process: "subprocess.Popen[bytes]") -> bool:
    """Tell whether a process has ended; it stays a zombie, so that no other process or group gets its number."""
    if process.returncode is not None:
        return True
    if hasattr(os, "waitid"):
        return os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
    if process.poll() is None:  # macOS before Python 3.13
        return False
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)  # at once: nobody else can have the number of a group that is not empty
    return True


def _kill(process: "subprocess.Popen[bytes]") -> None:
    """Kill what is left of a process and of the group that it leads."""
    if process.returncode is None:
        with suppress(ProcessLookupError, PermissionError):  # macOS: a group of zombies
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if process.stdin is not None:
            process.stdin.close()


def end_children() -> None:
    """End the children of this process that still run, and theirs: git, which GitPython leaves behind on an error.

    They are asked first, so that git removes its locks. On Linux only; elsewhere they run to their end.
    """
    running = _descendants(os.getpid())
    if not running:  # Windows has no SIGKILL
        return
    for number, patience_s in ((signal.SIGTERM, _PATIENCE_S), (signal.SIGKILL, 0.0)):
        for process in running:
            with suppress(OSError):
                os.kill(process, number)
        deadline = time.monotonic() + patience_s
        while (running := [each for each in running if _is_running(each)]) and time.monotonic() < deadline:
            time.sleep(_POLL_S)


def _descendants(process: int) -> list[int]:
    found: list[int] = []
    with suppress(OSError):  # it has ended
        for listing in Path(f"/proc/{process}/task").glob("*/children"):
            for child in map(int, listing.read_text(encoding="ascii").split()):
                found += [child, *_descendants(child)]
    return found


def _is_running(process: int) -> bool:
    try:
        state = (
            Path(f"/proc/{process}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[0]
        )
    except OSError:
        return False
    return state not in "ZX"


def ending(status: int) -> str:
    """Return how a command ended: by its exit status, or by the signal that killed it.

    A shell and bubblewrap report a signal as 128 plus its number.
    """
    number = -status if status < 0 else status - 128
    if number in set(signal.Signals):
        return f"killed by {signal.Signals(number).name}"
    return f"exit status {status}"


def tail(log: Path, lines: int) -> str:
    """Return the last lines of a log, at most 64 KiB."""
    with open_regular(log) as stream:
        stream.seek(max(0, stream.seek(0, os.SEEK_END) - _TAIL_BYTES))
        text = stream.read().decode("utf-8", errors="replace")
    return "\n".join(text.rstrip().splitlines()[-lines:])
