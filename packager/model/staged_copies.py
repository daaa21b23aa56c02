"""Copies from host memory to a GPU through pinned memory, so that they do not stop the threads that launch kernels.

CUDA copies pageable memory through pinned memory of its own and holds a lock meanwhile that a launch on the same GPU
needs: on an H200 a launch waited 29 ms while four threads copied the weights of a block, and the GPU idled.
"""

import torch
from torch import Tensor

from packager.model.batches import STAGED_BYTES


class StagedCopies:
    """Copies piece by piece, any number of threads at once, each through a buffer of its own.

    Args:
        device: where the copies are.
        piece_bytes: of a buffer.
    """

    def __init__(self, device: torch.device, piece_bytes: int = STAGED_BYTES) -> None:
        self._device, self._piece_bytes = device, piece_bytes
        self._free: list[Tensor] = []

    def copy(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        """Return a tensor on the device in this dtype, finished on return; it is copied on the current stream.

        Args:
            tensor: in host memory, or on the device.
            dtype: of the copy.
        """
        if tensor.device.type != "cpu":
            return tensor.to(self._device, dtype)
        copy = torch.empty(tensor.shape, dtype=dtype, device=self._device)
        source = tensor.to(dtype).contiguous().reshape(-1).view(torch.uint8).numpy()
        target, buffer = copy.view(-1).view(torch.uint8), self._take_buffer()
        for begin in range(0, len(source), self._piece_bytes):
            piece = source[begin : begin + self._piece_bytes]
            # Not torch's copy: each thread that calls it would start threads of its own on every core.
            buffer.numpy()[: len(piece)] = piece
            target[begin : begin + len(piece)].copy_(buffer[: len(piece)], non_blocking=True)
            self._wait()
        self._free.append(buffer)
        return copy

    def _take_buffer(self) -> Tensor:
        try:
            return self._free.pop()
        except IndexError:
            return torch.empty(self._piece_bytes, dtype=torch.uint8, pin_memory=self._device.type == "cuda")

    def _wait(self) -> None:
        """Wait until the buffer may be overwritten."""
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).record_event().synchronize()
