"""What a process does to files and processes, counted, so that it can be ended or refused at a chosen one."""

import os
import re
import signal
from collections.abc import Callable

FILES = frozenset({"os.rename", "os.remove", "os.mkdir", "os.rmdir"})
FILES_AND_PROCESSES = FILES | {"subprocess.Popen", "fcntl.flock"}


class EffectCounter:
    """An audit hook that counts effects, and sends its process a signal before a chosen one.

    An effect is an event of `events` or a file opened for writing. `fatal` is its number, from 1 on (0: none), or a
    pattern of its description. If `act` is given, it is called in place of the signal.
    """

    def __init__(
        self,
        fatal: int | str,
        number: signal.Signals = signal.SIGKILL,
        events: frozenset[str] = FILES,
        act: Callable[[], None] | None = None,
    ) -> None:
        self.fatal = fatal
        self.number = number
        self.events = events
        self.act = act
        self.count = 0

    def __call__(self, event: str, arguments: tuple[object, ...]) -> None:
        flags = arguments[2] if event == "open" else 0
        writes = isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR)
        if event not in self.events and not writes:
            return
        self.count += 1
        if self.count == self.fatal or (isinstance(self.fatal, str) and self.described(event, arguments)):
            self.fatal = 0
            if self.act:
                self.act()
            else:
                os.kill(os.getpid(), self.number)

    def described(self, event: str, arguments: tuple[object, ...]) -> bool:
        return re.search(str(self.fatal), f"{event} {arguments[0]} {arguments[1]}") is not None
