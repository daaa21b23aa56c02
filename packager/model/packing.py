"""A GPTQ checkpoint's tensors: pack, unpack, dequantize and read them, as every GPTQ runtime does (v1 format).

Integers of 2, 3, 4 or 8 bits fill 32-bit words: along the packed axis the values form one little-endian bit stream,
value i occupies bits [bits*i, bits*i + bits), and a 3-bit value may straddle two words. 32 values fill exactly `bits`
words. A weight is scale * (q - zero); the v1 format stores zero - 1.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from packager.errors import SourceError
from packager.model.batches import DEQUANTIZED_AT_ONCE
from packager.model.safetensors_file import StoredTensor, read_tensor, stored_tensors

_PERIOD = 32
_WORD_BITS = 32


def values_per_pack(bits: int) -> int:
    """Return the smallest number of values that fills whole words: 32 for 3 bits, else 32 / bits."""
    return _PERIOD if bits == 3 else _PERIOD // bits


def pack(values: Tensor, bits: int) -> Tensor:
    """Pack along the first axis.

    Args:
        values: integers 0..2^bits-1, [n, m]; n a multiple of `values_per_pack(bits)`.
        bits: 2, 3, 4 or 8.

    Returns:
        int32 [n * bits / 32, m].

    Raises:
        ValueError: n is no such multiple.
    """
    n, m = values.shape
    per = values_per_pack(bits)
    if n % per:
        raise ValueError(f"{n} values of {bits} bits do not fill whole 32-bit words")
    if bits == 3:
        return _pack_straddling(values, bits)
    in_byte = 8 // bits
    values = values.to(torch.uint8).reshape(n // per, 4, in_byte, m)
    packed = values[:, :, 0].clone()
    for i in range(1, in_byte):
        packed |= values[:, :, i] << (bits * i)
    # A word's four bytes, the lowest first: every machine that torch runs on is little-endian.
    words = torch.empty(n // per, m, dtype=torch.int32, device=values.device)
    words.view(torch.uint8).view(n // per, m, 4).copy_(packed.permute(0, 2, 1))
    return words


def _pack_straddling(values: Tensor, bits: int) -> Tensor:
    n, m = values.shape
    grouped = values.reshape(n // _PERIOD, _PERIOD, m)
    words = torch.zeros(n // _PERIOD, bits, m, dtype=torch.int32, device=values.device)
    for i in range(_PERIOD):
        word, shift = divmod(bits * i, 32)
        value = grouped[:, i].to(torch.int32)
        words[:, word] |= value << shift
        if shift + bits > 32:
            words[:, word + 1] |= value >> (32 - shift)
    return words.reshape(n * bits // 32, m)


def unpack(words: Tensor, bits: int) -> Tensor:
    """Undo `pack`: int32 [n * bits / 32, m] -> uint8 [n, m]."""
    per = values_per_pack(bits)
    words_per_pack = per * bits // 32
    packs, m = words.shape[0] // words_per_pack, words.shape[1]
    grouped = words.reshape(packs, words_per_pack, m)
    values = torch.empty(packs, per, m, dtype=torch.uint8, device=words.device)
    for i in range(per):
        word, shift = divmod(bits * i, 32)
        value = grouped[:, word] >> shift  # the shift copies an int32's sign bit; the mask removes the copies
        if shift + bits > 32:
            value &= 2 ** (32 - shift) - 1
            value |= grouped[:, word + 1] << (32 - shift)
        values[:, i] = (value & (2**bits - 1)).to(torch.uint8)
    return values.reshape(packs * per, m)


def pack_zeros(zeros: Tensor, bits: int) -> Tensor:
    """Pack zeros [n_groups, out_features] along out_features in the v1 format, which stores zero - 1.

    Returns:
        int32 [n_groups, out_features * bits / 32].
    """
    return pack((zeros.to(torch.int32) - 1).T & (2**bits - 1), bits).T.contiguous()


def unpack_zeros(words: Tensor, bits: int) -> Tensor:
    """Undo `pack_zeros`: int32 -> uint8 [n_groups, out_features], with the 1 added back."""
    return unpack(words.T.contiguous(), bits).T + 1


def dequantize_linear(read: Callable[[str], Tensor], bits: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the weight [out_features, in_features] that a linear's packed tensors represent, on their device.

    The formula is this module's own: a checkpoint is read without the solver's code, so reading checks the solver.
    In float32 every product is exact: a difference of two integers has 9 bits, a float16 scale 11. So a weight has the
    same bytes on every device, in any dtype.

    Args:
        read: returns the tensor "qweight", "qzeros", "scales" or "g_idx" of the linear.
        bits: 2, 3, 4 or 8.
        dtype: of the result.
    """
    words, zeros, scales, groups = read("qweight"), unpack_zeros(read("qzeros"), bits), read("scales"), read("g_idx")
    zeros, scales, groups = zeros.float(), scales.float(), groups.long()
    per = values_per_pack(bits)
    packs, outputs = words.shape[0] * _WORD_BITS // bits // per, words.shape[1]
    weight = torch.empty(outputs, packs * per, dtype=dtype, device=words.device)
    step = max(1, DEQUANTIZED_AT_ONCE[words.device.type] // (per * outputs))
    for first in range(0, packs, step):
        last = min(first + step, packs)
        q = unpack(words[first * per * bits // _WORD_BITS : last * per * bits // _WORD_BITS], bits).float()
        own = groups[first * per : last * per] if step < packs else groups
        weight[:, first * per : last * per] = q.sub_(zeros[own]).mul_(scales[own]).T
    return weight


class CheckpointReader:
    """Reads a checkpoint's tensors by name; "<linear>.weight" is dequantized [out_features, in_features].

    Calling it raises SourceError for a tensor that the checkpoint does not have.

    Args:
        folder: the checkpoint.
        bits: of its quantized linears; None where they have several: then the shapes of each linear give its own.
        device: where weights are dequantized; all other tensors stay on the CPU.
        dtype: of dequantized weights.

    Attributes:
        names: of all tensors that can be read, dequantized ones included.
        dequantized: the names of those that are dequantized.

    Raises:
        SourceError: a file is not a safetensors file, or is cut off.
    """

    def __init__(
        self,
        folder: Path,
        bits: int | None,
        *,
        device: torch.device = torch.device("cpu"),  # noqa: B008 - immutable
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self._folder, self._bits, self._device, self._dtype = folder, bits, device, dtype
        self._tensors: dict[str, StoredTensor] = {}
        for path in sorted(folder.glob("*.safetensors")):
            self._tensors |= stored_tensors(path)
        linears = [name.removesuffix(".qweight") for name in self._tensors if name.endswith(".qweight")]
        parts = {f"{linear}.{part}" for linear in linears for part in ("qweight", "qzeros", "scales", "g_idx")}
        self.dequantized = frozenset(f"{linear}.weight" for linear in linears)
        self.names = frozenset(self._tensors.keys() - parts | self.dequantized)

    def __call__(self, name: str) -> Tensor:
        """Read a tensor."""
        if name not in self.dequantized:
            return self._stored(name)
        linear = name.removesuffix(".weight")

        def read(part: str) -> Tensor:
            return self._stored(f"{linear}.{part}").to(self._device)

        return dequantize_linear(read, self._bits or self._bits_of(linear), self._dtype)

    def _bits_of(self, linear: str) -> int:
        (words, _), (in_features,) = (self._tensors[f"{linear}.{part}"].info.shape for part in ("qweight", "g_idx"))
        return words * _WORD_BITS // in_features

    def _stored(self, name: str) -> Tensor:
        if name not in self._tensors:
            why = f"{name} is in none of its files"
            raise SourceError("the checkpoint lacks a tensor", where=str(self._folder), why=why)
        return read_tensor(self._tensors[name])
