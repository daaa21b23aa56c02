"""Asynchronous copies of device tensors in pinned host memory."""

from collections.abc import Mapping
from functools import cache

import torch
from torch import Tensor


class HostCopies:
    """Start copying tensors to pinned host memory on a stream of their own; CPU tensors are not copied.

    Args:
        tensors: of one device; not to be changed before `wait` returns.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._event: torch.cuda.Event | None = None
        devices = {tensor.device for tensor in tensors.values() if tensor.is_cuda}
        if not devices:
            self._copies = dict(tensors)
            return
        (device,) = devices
        stream = _stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            self._copies = {name: _to_host(tensor, stream) for name, tensor in tensors.items()}
            self._event = stream.record_event()

    def wait(self) -> Mapping[str, Tensor]:
        """Wait for the copies and return them; any thread may call it."""
        if self._event is not None:
            self._event.synchronize()
        return self._copies


@cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def _to_host(tensor: Tensor, stream: torch.cuda.Stream) -> Tensor:
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)
    tensor.record_stream(stream)
    return copy
