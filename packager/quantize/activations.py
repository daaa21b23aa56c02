"""A variant's hidden states between blocks, stored on the device, in pinned host memory, or in a file.

Batches that are stored off the device are copied asynchronously, loads and stores on separate CUDA streams.
"""

import weakref
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from packager.quantize.memory import Placement
from packager.system.files import disk_errors, reserve


class Activations:
    """One tensor [rows, seq_len, hidden_size] per batch, read and replaced in order.

    Args:
        batches: the first block's inputs, on the device; shared with other variants, never written to.
        placement: where they are stored.
        folder: for placement "disk"; the files have no name and exist as long as this object.

    Raises:
        MachineError: the disk is full.
    """

    def __init__(self, batches: Sequence[Tensor], placement: Placement, folder: Path | None = None) -> None:
        self._device = batches[0].device
        self._placement = placement
        self._on_device: dict[int, Tensor] = {}
        self._loaded: dict[int, torch.cuda.Event] = {}
        self._stored: dict[int, torch.cuda.Event] = {}
        self._buffers: list[Tensor] = []
        self._load_stream: torch.cuda.Stream | None = None
        self._store_stream: torch.cuda.Stream | None = None
        self._count = len(batches)
        if placement == "device":
            self._on_device = dict(enumerate(batches))
            return
        if self._device.type == "cuda":
            self._load_stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
            self._store_stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        self._buffers = [self._buffer(index, batch, folder) for index, batch in enumerate(batches)]
        for index, batch in enumerate(batches):
            self.put(index, batch)

    def __len__(self) -> int:
        """Return the number of batches."""
        return self._count

    def prefetch_all(self) -> None:
        """Start loading every batch; the device must have room for all of them."""
        for index in range(self._count):
            self._prefetch(index)

    def get(self, index: int) -> Tensor:
        """Return a batch on the device, and prefetch the one after it."""
        self._prefetch(index)
        if self._placement == "device":
            return self._on_device[index]
        batch = self._on_device.pop(index)
        if (loaded := self._loaded.pop(index, None)) is not None:
            stream = torch.cuda.current_stream(self._device)
            stream.wait_event(loaded)
            batch.record_stream(stream)
        if index + 1 < self._count:
            self._prefetch(index + 1)
        return batch

    def put(self, index: int, batch: Tensor) -> None:
        """Replace a batch."""
        if self._placement == "device":
            self._on_device[index] = batch
            return
        self._on_device.pop(index, None)
        self._loaded.pop(index, None)
        if self._store_stream is None:
            self._buffers[index].copy_(batch)
            return
        self._store_stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._store_stream):
            self._buffers[index].copy_(batch, non_blocking=True)
            batch.record_stream(self._store_stream)
            self._stored[index] = self._store_stream.record_event()

    def _prefetch(self, index: int) -> None:
        """Start loading a batch as soon as its last store has finished."""
        if index in self._on_device:
            return
        if self._load_stream is None:
            self._on_device[index] = self._buffers[index].to(self._device, copy=True)
            return
        with torch.cuda.stream(self._load_stream):
            self._load_stream.wait_event(self._stored[index])
            self._on_device[index] = self._buffers[index].to(self._device, non_blocking=True)
            self._loaded[index] = self._load_stream.record_event()

    def _buffer(self, index: int, batch: Tensor, folder: Path | None) -> Tensor:
        """Return memory or a mapped file for one batch."""
        if self._placement == "host":
            buffer = torch.empty(batch.shape, dtype=batch.dtype)
            return _pinned(buffer) if self._device.type == "cuda" else buffer
        if folder is None:
            raise ValueError("activations on disk need a folder")
        path = folder / f"activations-{id(self):x}-{index}"
        with disk_errors(path):
            # Reserve the space now: writing to a mapping that the disk cannot hold kills the process.
            with path.open("xb") as stream:
                reserve(stream.fileno(), batch.numel() * batch.element_size())
            buffer = torch.from_file(str(path), shared=True, size=batch.numel(), dtype=batch.dtype)
            path.unlink()
        return buffer.view(batch.shape)


def _pinned(tensor: Tensor) -> Tensor:
    """Pin a tensor's own memory until it is freed; torch's pinned allocations are rounded up to powers of two."""
    runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    address, size = tensor.data_ptr(), tensor.numel() * tensor.element_size()
    torch.cuda.check_error(runtime.cudaHostRegister(address, size, 0))
    weakref.finalize(tensor.untyped_storage(), runtime.cudaHostUnregister, address)
    return tensor
