"""One reading of the base model for several threads that go through it side by side."""

from collections.abc import Callable
from dataclasses import dataclass, field
from threading import Lock
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

# Tensors kept for a thread that lags behind, some three blocks; one that lags further reads them itself.
_MOST_KEPT = 32


@dataclass
class _Kept:
    """A tensor, once it was read, and how many threads have yet to ask for it."""

    left: int
    tensor: "Tensor | None" = None
    reading: Lock = field(default_factory=Lock)


class SharedReader:
    """Read each tensor from disk for the first thread that asks and keep it until all of them have.

    Args:
        read: returns a named tensor.
        readers: how many threads there are; each asks for a tensor once.
    """

    def __init__(self, read: "Callable[[str], Tensor]", readers: int) -> None:
        self._read, self._readers = read, readers
        self._lock = Lock()
        self._kept: dict[str, _Kept] = {}

    def __call__(self, name: str) -> "Tensor":
        """Return a named tensor, not to be written to."""
        with self._lock:
            kept = self._kept.setdefault(name, _Kept(left=self._readers))
            kept.left -= 1
            if not kept.left:
                del self._kept[name]
            while len(self._kept) > _MOST_KEPT:
                del self._kept[next(iter(self._kept))]
        with kept.reading:
            if kept.tensor is None:
                kept.tensor = self._read(name)
            return kept.tensor
