"""Run work in threads: disk access and hashing release the interpreter lock."""

import os
import sys
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")
_LOW_PRIORITY = 10  # not the lowest: a thread that holds the interpreter lock must get to release it


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


def run_at_low_priority() -> None:
    """Let this thread compute when no other wants to; only Linux has priorities of threads."""
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _LOW_PRIORITY)
