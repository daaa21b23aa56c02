"""What a process does to files and processes, counted, so that it can be ended or refused at a chosen one."""

import errno
import os
import re
import signal

FILES = frozenset({"os.rename", "os.remove", "os.mkdir", "os.rmdir"})
FILES_AND_PROCESSES = FILES | {"subprocess.Popen", "fcntl.flock"}


class EffectCounter:
    """An audit hook that counts effects, and sends its process a signal before a chosen one.

    An effect is an event of `events` or a file opened for writing. `fatal` is its number, from 1 on (0: none), or a
    pattern of its description. Without a signal, all effects from the chosen one on fail as on a full disk.
    """

    def __init__(
        self, fatal: int | str, number: signal.Signals | None = signal.SIGKILL, events: frozenset[str] = FILES
    ) -> None:
        self.fatal = fatal
        self.number = number
        self.events = events
        self.count = 0

    def __call__(self, event: str, arguments: tuple[object, ...]) -> None:
        flags = arguments[2] if event == "open" else 0
        writes = isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR)
        if event not in self.events and not writes:
            return
        self.count += 1
        if self.number is None:
            makes = event == "os.mkdir" or (writes and arguments[0] != os.devnull)
            if makes and isinstance(self.fatal, int) and 0 < self.fatal <= self.count:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(arguments[0]))
        elif self.count == self.fatal or (isinstance(self.fatal, str) and self.described(event, arguments)):
            os.kill(os.getpid(), self.number)

    def described(self, event: str, arguments: tuple[object, ...]) -> bool:
        return re.search(str(self.fatal), f"{event} {arguments[0]} {arguments[1]}") is not None
