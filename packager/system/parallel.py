"""Run work in threads: disk access and hashing release the interpreter lock."""

import os
import queue
import sys
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar, cast

Item = TypeVar("Item")
Result = TypeVar("Result")
_LOW_PRIORITY = 10  # not the lowest: a thread that holds the interpreter lock must get to release it


class AnswerTimeoutError(Exception):
    """Work did not end in time."""


def in_parallel(work: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
    """Return `work(item)` for every item, in the items' order; of several errors, raise that of the first item.

    After an error or Ctrl-C, items that have not started are dropped; those that have started are finished.
    """
    with ThreadPoolExecutor() as pool:
        futures = [pool.submit(work, item) for item in items]
        try:
            return [future.result() for future in futures]
        finally:
            pool.shutdown(cancel_futures=True)


def in_time(
    work: Callable[[], Result], limit_s: float, notice: Callable[[], None] = lambda: None, notice_s: float | None = None
) -> Result:
    """Return `work()`, which runs in a thread of its own.

    Args:
        work: what may never end; nothing can stop it, but it does not keep the process from ending.
        limit_s: so long it is waited for.
        notice: is called once, after `notice_s`, if the work has not ended by then.
        notice_s: None for never.

    Raises:
        AnswerTimeoutError: it has not ended within the limit.
    """
    outcome: queue.Queue[tuple[Result | None, BaseException | None]] = queue.Queue()

    def run() -> None:
        try:
            outcome.put((work(), None))
        except BaseException as error:  # noqa: BLE001 - raised again below, where it is waited for
            outcome.put((None, error))

    threading.Thread(target=run, daemon=True).start()
    first_s = limit_s if notice_s is None else min(notice_s, limit_s)
    try:
        try:
            result, error = outcome.get(timeout=first_s)
        except queue.Empty:
            notice()
            result, error = outcome.get(timeout=limit_s - first_s)
    except queue.Empty as late:
        raise AnswerTimeoutError(f"no answer within {limit_s:g} s") from late
    if error is not None:
        raise error
    return cast("Result", result)


def run_at_low_priority() -> None:
    """Let this thread compute when no other wants to; only Linux has priorities of threads."""
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _LOW_PRIORITY)
