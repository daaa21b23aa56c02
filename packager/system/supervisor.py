"""Run a command that ends when this program's parent ends, however that ends. Needs the standard library only.

Stand-alone, run as `python supervisor.py MAX_FILE_BYTES COMMAND ...`, the leader of a process group of its own, with a
pipe as standard input whose other end the parent alone holds and never writes to. The pipe ends with the parent, even
with one that is killed; then this program kills its group. It ends as the command does: same status, same signal.
"""

import os
import resource
import select
import signal
import sys
from contextlib import suppress
from pathlib import Path


def limit_resources(max_file_bytes: int) -> None:
    """Limit what this process and its children may use; 0 bytes is no limit.

    No limit of the address space: CUDA reserves far more than it uses. None of the number of processes: Linux counts
    all that the user has.
    """
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if max_file_bytes:
        _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        allowed = max_file_bytes if hard == resource.RLIM_INFINITY else min(max_file_bytes, hard)
        resource.setrlimit(resource.RLIMIT_FSIZE, (allowed, allowed))
    with suppress(OSError):  # Linux: when memory runs out, the kernel kills this process before its parent
        Path("/proc/self/oom_score_adj").write_text("500", encoding="ascii")


def run(command: list[str]) -> int:
    """Run the command to its end and return its status as `os.waitstatus_to_exitcode` does."""
    ended, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    try:
        # Python ignores these two signals, and a child would inherit that.
        child = os.posix_spawnp(
            command[0],
            command,
            os.environ,
            file_actions=[(os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0)],
            setsigdef=[signal.SIGPIPE, signal.SIGXFSZ],
        )
    except OSError as error:
        sys.stderr.write(f"{command[0]}: {error.strerror}\n")
        return 127
    while True:
        ready, _, _ = select.select([0, ended], [], [])
        if 0 in ready:
            os.killpg(0, signal.SIGKILL)
        os.read(ended, 64)
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)


def end_like(status: int) -> int:
    """Return an exit status, or end this process by the signal that a negative status stands for."""
    if status < 0:
        with suppress(OSError):  # SIGKILL cannot be set, and needs not be
            signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    return status


if __name__ == "__main__":
    limit_resources(int(sys.argv[1]))
    sys.exit(end_like(run(sys.argv[2:])))
