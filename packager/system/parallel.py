"""Threads for work that waits for the disk or hashes: both leave the interpreter free for others."""

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def in_parallel(work: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
    """Return `work(item)` of every item, in the items' order; the first of them to fail, in that order, is raised.

    After a failure or Ctrl-C what has not begun is dropped, and what has begun comes to its end.
    """
    with ThreadPoolExecutor() as pool:
        futures = [pool.submit(work, item) for item in items]
        try:
            return [future.result() for future in futures]
        finally:
            pool.shutdown(cancel_futures=True)
