"""Base model tensors that several threads need at about the same time, each read from disk once."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from threading import Lock
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

# Tensors kept for a slower thread, about three blocks; a thread that is further behind reads them itself.
_MOST_KEPT = 32

_Key = tuple[int, str]  # the number of the sweep, and the tensor's name


@dataclass
class _Kept:
    """A tensor, once it was read; `reading` is held while it is read."""

    tensor: "Tensor | None" = None
    reading: Lock = field(default_factory=Lock)


class SharedReader:
    """Read a tensor for the first thread that asks, and keep it until every other thread of this sweep has asked.

    Args:
        read: returns a named tensor.
        sweeps: for each thread, how often it goes through the model; it asks for a tensor at most once per sweep.
    """

    def __init__(self, read: "Callable[[str], Tensor]", sweeps: Sequence[int]) -> None:
        self._read, self._sweeps = read, sweeps
        self._lock = Lock()
        self._kept: dict[_Key, _Kept] = {}
        self._asked: Counter[_Key] = Counter()

    def for_thread(self) -> "Callable[[str], Tensor]":
        """Return the function by which one thread reads; its tensors are shared and must not be written to."""
        asked: Counter[str] = Counter()

        def read(name: str) -> "Tensor":
            with self._lock:
                key = asked[name], name
                asked[name] += 1
                kept = self._ask(key)
            with kept.reading:
                if kept.tensor is None:
                    kept.tensor = self._read(name)
                return kept.tensor

        return read

    def _ask(self, key: _Key) -> _Kept:
        """Count a thread's request; forget the tensor when all threads that go through this sweep have asked."""
        self._asked[key] += 1
        kept = self._kept.setdefault(key, _Kept())
        if self._asked[key] == sum(sweeps > key[0] for sweeps in self._sweeps):
            del self._kept[key], self._asked[key]
        while len(self._kept) > _MOST_KEPT:
            del self._kept[next(iter(self._kept))]
        return kept
