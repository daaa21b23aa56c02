"""Where a variant's hidden states live between blocks: on the device, in pinned host memory, or in a file.

Off the device they travel while the device computes: the next batch comes and the last one goes on a stream of their
own.
"""

import weakref
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from packager.quantize.memory import Placement
from packager.system.files import disk_errors, reserve


class Activations:
    """One tensor per batch, read and replaced in order.

    Args:
        batches: the first block's inputs, on the device; shared with other variants, never written to.
        placement: where they live.
        folder: for placement "disk"; the files are removed at once and live as long as this object.
    """

    def __init__(self, batches: Sequence[Tensor], placement: Placement, folder: Path | None = None) -> None:
        self._device = batches[0].device
        self._placement = placement
        self._present: dict[int, Tensor] = {}
        self._arrived: dict[int, torch.cuda.Event] = {}
        self._gone: dict[int, torch.cuda.Event] = {}
        self._stored: list[Tensor] = []
        self._coming: torch.cuda.Stream | None = None
        self._going: torch.cuda.Stream | None = None
        self._count = len(batches)
        if placement == "device":
            self._present = dict(enumerate(batches))
            return
        if self._device.type == "cuda":
            self._coming = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
            self._going = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        self._stored = [self._room(index, batch, folder) for index, batch in enumerate(batches)]
        for index, batch in enumerate(batches):
            self.put(index, batch)

    def __len__(self) -> int:
        """Return the number of batches."""
        return self._count

    def expect_all(self) -> None:
        """Let every batch come: they will be asked for soon, and there is room for them."""
        for index in range(self._count):
            self._fetch(index)

    def get(self, index: int) -> Tensor:
        """Return a batch on the device, and let the one after it come."""
        self._fetch(index)
        if self._placement == "device":
            return self._present[index]
        batch = self._present.pop(index)
        if (arrived := self._arrived.pop(index, None)) is not None:
            stream = torch.cuda.current_stream(self._device)
            stream.wait_event(arrived)
            batch.record_stream(stream)
        if index + 1 < self._count:
            self._fetch(index + 1)
        return batch

    def put(self, index: int, batch: Tensor) -> None:
        """Replace a batch."""
        if self._placement == "device":
            self._present[index] = batch
            return
        self._present.pop(index, None)
        self._arrived.pop(index, None)
        if self._going is None:
            self._stored[index].copy_(batch)
            return
        self._going.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._going):
            self._stored[index].copy_(batch, non_blocking=True)
            batch.record_stream(self._going)
            self._gone[index] = self._going.record_event()

    def _fetch(self, index: int) -> None:
        """Let a batch come, once it has been stored."""
        if index in self._present:
            return
        if self._coming is None:
            self._present[index] = self._stored[index].to(self._device, copy=True)
            return
        with torch.cuda.stream(self._coming):
            self._coming.wait_event(self._gone[index])
            self._present[index] = self._stored[index].to(self._device, non_blocking=True)
            self._arrived[index] = self._coming.record_event()

    def _room(self, index: int, batch: Tensor, folder: Path | None) -> Tensor:
        if self._placement == "host":
            room = torch.empty(batch.shape, dtype=batch.dtype)
            return _pinned(room) if self._device.type == "cuda" else room
        if folder is None:
            raise ValueError("activations on disk need a folder")
        path = folder / f"activations-{id(self):x}-{index}"
        with disk_errors(path):
            # Its space is taken now: writing to a mapping that the disk cannot hold kills the process.
            with path.open("xb") as stream:
                reserve(stream.fileno(), batch.numel() * batch.element_size())
            room = torch.from_file(str(path), shared=True, size=batch.numel(), dtype=batch.dtype)
            path.unlink()
        return room.view(batch.shape)


def _pinned(tensor: Tensor) -> Tensor:
    """Pin a tensor's own memory as long as it lives; torch's pinned allocations are rounded up to powers of two."""
    runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    address, size = tensor.data_ptr(), tensor.numel() * tensor.element_size()
    torch.cuda.check_error(runtime.cudaHostRegister(address, size, 0))
    weakref.finalize(tensor.untyped_storage(), runtime.cudaHostUnregister, address)
    return tensor
