"""Repairs of weights files, and the proof that every linear stands for the same weights before and after.

A tensor that is not repaired is copied byte for byte. A repaired one is qzeros (v2 zeros become v1, rows follow their
groups), scales (likewise), or g_idx.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from packager.errors import AuditError, SourceError
from packager.model.safetensors_file import (
    METADATA,
    StoredTensor,
    copy_tensor,
    layout,
    read_header,
    tensors_at,
    write_at,
)
from packager.prove.audit.tensors import Linear
from packager.prove.audit.values import V2, OpenFiles, read_rows, unpack_rows
from packager.prove.held_parameters import GroupIndex
from packager.system.files import disk_errors

_SLICE_VALUES = 1 << 22


@dataclass(frozen=True, kw_only=True)
class WeightsEdits:
    """What is repaired in the weights files.

    Attributes:
        linears: those of the checkpoint, by name.
        to_v1: the zeros are stored as they are (v2), and become one less.
        renumbered: the linears whose groups are numbered anew, with the old number of each block of columns.
        dropped: tensors that are left out: biases that are zero.
        metadata: the file gets the metadata {"format": "pt"} beside its own.
    """

    linears: Mapping[str, Linear] = field(default_factory=dict)
    to_v1: bool = False
    renumbered: Mapping[str, GroupIndex] = field(default_factory=dict)
    dropped: frozenset[str] = frozenset()
    metadata: frozenset[str] = frozenset()

    def touches(self, name: str, tensors: Iterable[str]) -> bool:
        """Return whether a file, with these tensors, changes."""
        return name in self.metadata or any(self._is_edited(tensor) or tensor in self.dropped for tensor in tensors)

    @property
    def edited_linears(self) -> tuple[Linear, ...]:
        """The linears of which a tensor changes."""
        return tuple(each for name, each in self.linears.items() if self.to_v1 or name in self.renumbered)

    def _is_edited(self, tensor: str) -> bool:
        linear, _, part = tensor.rpartition(".")
        if linear not in self.linears:
            return False
        return (self.to_v1 and part == "qzeros") or (
            linear in self.renumbered and part in ("qzeros", "scales", "g_idx")
        )

    def edited(self, tensor: str, files: OpenFiles) -> bytes | None:
        """Return a tensor's new bytes, None if it does not change."""
        if not self._is_edited(tensor):
            return None
        name, _, part = tensor.rpartition(".")
        linear = self.linears[name]
        rows = np.concatenate(list(read_rows(linear.parts[part], files)))
        numbers = self.renumbered.get(name)
        if part == "g_idx":
            return (np.arange(linear.in_features) // _group_columns(linear)).astype("<i4").tobytes()
        if numbers is not None:
            rows = rows[numbers]
        if part == "qzeros" and self.to_v1:
            rows = pack_rows(unpack_rows(rows.astype(np.int32, copy=False), linear.bits) - np.uint8(1), linear.bits)
        return np.ascontiguousarray(rows).astype(rows.dtype.newbyteorder("<"), copy=False).tobytes()


def pack_rows(values: npt.NDArray[np.uint8], bits: int) -> npt.NDArray[np.int32]:
    """Undo `unpack_rows`: uint8 [rows, n], values under 2^bits -> int32 [rows, n * bits / 32]."""
    stream = np.unpackbits(values[..., None], axis=-1, count=bits, bitorder="little")
    packed = np.packbits(stream.reshape(len(values), -1), axis=1, bitorder="little")
    return np.ascontiguousarray(packed).view("<i4")


def write_repaired(source: Path, target: Path, edits: WeightsEdits, files: OpenFiles) -> None:
    """Write a weights file with its repairs.

    Raises:
        SourceError: the file cannot be read.
        MachineError: the disk is full or not writable.
    """
    header = read_header(source)
    stored = tensors_at(source, header)
    kept = [tensor.info for name, tensor in stored.items() if name not in edits.dropped]
    text, placed = layout(target, kept, {**header.metadata, **METADATA})
    with disk_errors(target), target.open("wb") as stream:
        write_at(stream.fileno(), memoryview(text), 0)
        for name, tensor in placed.items():
            if (data := edits.edited(name, files)) is None:
                copy_tensor(stored[name], stream.fileno(), tensor.offset)
            elif len(data) != tensor.info.size_bytes:
                raise AssertionError(f"{name} has {len(data)} bytes, not {tensor.info.size_bytes}")
            else:
                write_at(stream.fileno(), memoryview(data), tensor.offset)
        stream.flush()
        os.fsync(stream.fileno())


def require_same_weights(
    linears: Sequence[Linear], repaired: Mapping[str, StoredTensor], *, stored_format: str
) -> None:
    """Dequantize linears before and after a repair, and compare every weight.

    Args:
        linears: as they were.
        repaired: the tensors of the new files, which are in the v1 format.
        stored_format: the format that the zeros of `linears` are in.

    Raises:
        AuditError: a weight differs: the repair is wrong, and its folder must not be used.
    """
    with OpenFiles() as files:
        for linear in linears:
            after = {part: repaired.get(f"{linear.name}.{part}") for part in ("qweight", "qzeros", "scales", "g_idx")}
            found = {part: tensor for part, tensor in after.items() if tensor is not None}
            if len(found) < len(after) or not _same(linear, found, files, stored_format):
                raise AuditError(
                    f"the repair would change the weights of {linear.name}",
                    why="they were dequantized before and after it, and compared",
                    hint="this is a mistake of packager: nothing was written; please report it with the audit's report",
                )


def _same(linear: Linear, repaired: Mapping[str, StoredTensor], files: OpenFiles, stored_format: str) -> bool:
    before = _Weights(linear.parts, linear.bits, files, shift=0 if stored_format == V2 else 1)
    after = _Weights(repaired, linear.bits, files, shift=1)
    if before.words.shape != after.words.shape:
        return False
    rows = max(1, _SLICE_VALUES // before.words.shape[0] // 32) * 32  # 32 codes fill whole words
    return all(
        np.array_equal(before.columns(first, first + rows), after.columns(first, first + rows), equal_nan=True)
        for first in range(0, linear.in_features, rows)
    )


class _Weights:
    """A linear's weights, dequantized some columns at a time; a weight is scale * (code - zero)."""

    def __init__(self, parts: Mapping[str, StoredTensor], bits: int, files: OpenFiles, *, shift: int) -> None:
        def whole(part: str) -> npt.NDArray[np.integer]:
            return np.concatenate(list(read_rows(parts[part], files)))

        words = np.ascontiguousarray(whole("qweight").T).astype(np.int32, copy=False)
        self.words = words  # [out_features, words of a row]
        self._bits = bits
        self._zeros = unpack_rows(whole("qzeros").astype(np.int32, copy=False), bits).astype(np.float32) + shift
        self._scales = whole("scales").astype(np.uint16).view(np.float16).astype(np.float32)
        self._groups = whole("g_idx")[:, 0].astype(np.int64)

    def columns(self, first: int, end: int) -> npt.NDArray[np.float32]:
        """Return float32 [out_features, columns first to end - 1]; `first` is a multiple of 32."""
        groups = self._groups[first:end]
        words = self.words[:, first * self._bits // 32 : -(-min(end, len(self._groups)) * self._bits // 32)]
        codes = unpack_rows(words, self._bits)[:, : len(groups)].astype(np.float32)
        weights: npt.NDArray[np.float32] = self._scales[groups].T * (codes - self._zeros[groups].T)
        return weights


def _group_columns(linear: Linear) -> int:
    return linear.in_features if linear.group_size == -1 else linear.group_size


def new_tensors(paths: Iterable[Path]) -> dict[str, StoredTensor]:
    """Return the tensors of weights files by name.

    Raises:
        SourceError: one was not written whole.
    """
    tensors: dict[str, StoredTensor] = {}
    for path in paths:
        found = tensors_at(path, read_header(path))
        if twice := tensors.keys() & found.keys():
            raise SourceError("two files hold the same tensor", where=str(path), why=sorted(twice)[0])
        tensors |= found
    return tensors
