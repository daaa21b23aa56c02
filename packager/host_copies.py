"""Copies of device tensors on their way to the host, while the device goes on."""

from collections.abc import Mapping

import torch
from torch import Tensor


class HostCopies:
    """Start copying tensors to pinned host memory; CPU tensors are taken as they are.

    Args:
        tensors: on the current stream's device; not to be changed before `arrived` returns.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        on_gpu = any(tensor.is_cuda for tensor in tensors.values())
        self._copies = {name: _to_host(tensor) for name, tensor in tensors.items()}
        self._event = torch.cuda.current_stream().record_event() if on_gpu else None

    def arrived(self) -> Mapping[str, Tensor]:
        """Wait for the copies and return them; any thread may."""
        if self._event is not None:
            self._event.synchronize()
        return self._copies


def _to_host(tensor: Tensor) -> Tensor:
    if not tensor.is_cuda:
        return tensor
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)
