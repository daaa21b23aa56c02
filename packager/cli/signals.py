"""Signals that ask this process to end: SIGTERM and SIGHUP stop a command as Ctrl-C does, with its children.

The first lets the command clean up. A second Ctrl-C ends it at once: a command that is killed loses no finished work.
"""

import os
import signal
import sys
from contextlib import suppress
from types import FrameType

from packager.cli.options import VOICE

# Windows has no SIGHUP.
_NUMBERS = tuple(signal.Signals[name] for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name))
_AGAIN_S = 0.02


class EndedBySignal(KeyboardInterrupt):
    """A signal other than Ctrl-C's asked this process to end. All that cleans up after Ctrl-C does so after this."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = signal.Signals(number)


def raise_on_signals() -> None:
    """Let SIGTERM and SIGHUP raise `EndedBySignal` in the main thread. One that is ignored, as by nohup, stays so.

    After one of them, or Ctrl-C, the next Ctrl-C ends the process. Raised in the middle of cleaning up, it would leave
    threads behind at whose end the process aborts.
    """
    terminals = [stream for stream in (1, 2) if os.isatty(stream)]

    def end(number: int, _: FrameType | None) -> None:
        # Another one must not interrupt the cleaning up. A function would not do: Python removes it when it finalizes.
        for each in _NUMBERS:
            signal.signal(each, signal.SIG_IGN)
        if signal.getsignal(signal.SIGINT) is interrupt:
            signal.signal(signal.SIGINT, _end_at_once)
        for stream in terminals:
            if not os.isatty(stream):  # closed: every write to it would be an error
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
        raise EndedBySignal(number)

    def interrupt(_: int, __: FrameType | None) -> None:
        signal.signal(signal.SIGINT, _end_at_once)
        raise KeyboardInterrupt

    for number in _NUMBERS:
        if signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, end)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, interrupt)
    sys.unraisablehook = _raise_again


def _end_at_once(number: int, _: FrameType | None) -> None:
    from packager.system.processes import end_children

    signal.signal(number, signal.SIG_IGN)
    end_children()
    with suppress(OSError):
        os.write(2, b"ended at once: finished work is kept, run the same command again to continue\n")
    os._exit(128 + number)


def _raise_again(dropped: "sys.UnraisableHookArgs") -> None:
    """Raise an `EndedBySignal` again that Python dropped: it left a finalizer, whose caller cannot get it."""
    error = dropped.exc_value
    if not isinstance(error, EndedBySignal):
        sys.__unraisablehook__(dropped)
        return
    number = error.number

    def end(_: int, __: FrameType | None) -> None:
        raise EndedBySignal(number)

    # Not now: what this hook raises is dropped, too. Windows has no such timer, and no SIGTERM of other programs.
    if hasattr(signal, "setitimer"):
        signal.signal(signal.SIGALRM, end)
        signal.setitimer(signal.ITIMER_REAL, _AGAIN_S)


def end_command(error: KeyboardInterrupt) -> int:
    """End the children that are left, print one sentence, and return the exit status."""
    from packager.system.events import event_line
    from packager.system.processes import end_children

    end_children()
    what, number = "interrupted", signal.SIGINT
    if isinstance(error, EndedBySignal):
        what, number = f"ended by {error.number.name}", error.number
    text = f"{what}: finished work is kept, run the same command again to continue"
    with suppress(OSError):
        sys.stderr.write((event_line("message", {"text": text}) if VOICE.events else text) + "\n")
    return 128 + number
