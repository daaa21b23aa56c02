"""The values of qzeros, scales, g_idx and bias, read in slices; qweight is never read.

The tensors decide the checkpoint format, not the declaration: there are files that declare one and hold the other
(vLLM PR 38966).
"""

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO, Self

import numpy as np
import numpy.typing as npt

from packager.model.model_folder import open_model_file
from packager.model.safetensors_file import StoredTensor
from packager.prove.audit.config import Declared
from packager.prove.audit.finding import Findings
from packager.prove.audit.tensors import Linear
from packager.variant import num_groups

V1, V2 = "gptq", "gptq_v2"
# Linears of one module that see the same input, by their own names.
FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))

_CHUNK_BYTES = 1 << 20
_NUMPY_DTYPES = {"I32": "<i4", "F16": "<u2"}
# IEEE 754 half precision as integers: numpy's own float16 arithmetic is an order of magnitude slower.
_SIGN, _EXPONENT, _MAGNITUDE = 0x8000, 0x7C00, 0x7FFF
_MAX_HALF = 65504


def unpack_rows(words: npt.NDArray[np.int32], bits: int) -> npt.NDArray[np.uint8]:
    """Return the values packed along the rows of `words`.

    A row is one little-endian stream of bits: value i lies at bits [bits*i, bits*i + bits), so that 3-bit values
    10 and 21 of every 32 spill over a word's border, as AutoGPTQ packs them.

    Args:
        words: int32 [rows, n_words]; n_words * 32 is a multiple of `bits`.
        bits: 1 to 8.

    Returns:
        uint8 [rows, n_words * 32 // bits].
    """
    stream = np.unpackbits(np.ascontiguousarray(words, dtype="<i4").view(np.uint8), axis=1, bitorder="little")
    values = stream.reshape(len(words), -1, bits)
    return np.packbits(values, axis=-1, bitorder="little")[..., 0]


def value_counts(words: npt.NDArray[np.int32], bits: int) -> npt.NDArray[np.int64]:
    """Return how often each of the 2^bits values is packed in `words` [rows, n_words]."""
    repeats = len(words) if (words == words[0]).all() else 1
    values = unpack_rows(words[:1] if repeats > 1 else words, bits)
    return np.bincount(values.ravel(), minlength=1 << bits).astype(np.int64) * repeats


class OpenFiles:
    """Opens each weights file once: a model with experts has tens of thousands of small tensors in a few files."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._streams: dict[Path, BinaryIO] = {}

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the files."""
        self._stack.close()

    def read(self, path: Path, offset: int, size: int) -> bytes:
        """Return bytes of a file, fewer where it ends early.

        Raises:
            OSError: the file cannot be read.
        """
        if path not in self._streams:
            self._streams[path] = self._stack.enter_context(open_model_file(path))
        stream = self._streams[path]
        if hasattr(os, "pread"):
            return os.pread(stream.fileno(), size, offset)
        stream.seek(offset)  # Windows
        return stream.read(size)


def read_rows(tensor: StoredTensor, files: OpenFiles) -> Iterator[npt.NDArray[np.integer]]:
    """Yield a tensor as slices of whole rows; float16 comes as its bit patterns (uint16).

    Raises:
        OSError: the file cannot be read or became shorter.
    """
    dtype = np.dtype(_NUMPY_DTYPES[tensor.info.dtype])
    width = tensor.info.shape[1] if len(tensor.info.shape) == 2 else 1
    left = tensor.info.shape[0]
    step = max(1, _CHUNK_BYTES // (width * dtype.itemsize))
    offset = tensor.offset
    while left:
        rows = min(step, left)
        size = rows * width * dtype.itemsize
        data = files.read(tensor.path, offset, size)
        if len(data) != size:
            raise OSError(f"{tensor.info.name} ended early")
        yield np.frombuffer(data, dtype=dtype).reshape(rows, width)
        left, offset = left - rows, offset + size


def check_values(linears: Iterable[Linear], declared: Declared, findings: Findings) -> None:
    """Check the values of every linear's small tensors."""
    orders: dict[str, str] = {}
    with OpenFiles() as files:
        for linear in linears:
            try:
                _check_zeros(linear, files, declared, findings)
                _check_scales(linear, files, declared, findings)
                _check_bias(linear, files, findings)
                order = _check_g_idx(linear, files, declared, findings)
            except OSError as error:
                findings.add("file-unreadable", linear.parts["qzeros"].path.name, f"it cannot be read: {error}")
                continue
            if order:
                orders[linear.name] = order
    _check_fused(orders, findings)


def _check_zeros(linear: Linear, files: OpenFiles, declared: Declared, findings: Findings) -> None:
    counts = sum(
        (
            value_counts(words.astype(np.int32, copy=False), linear.bits)
            for words in read_rows(linear.parts["qzeros"], files)
        ),
        start=np.zeros(1 << linear.bits, dtype=np.int64),
    )
    stored = np.flatnonzero(counts)
    middle, declared_format = 1 << (linear.bits - 1), declared.checkpoint_format or V1
    holds = {middle - 1: V1, middle: V2}.get(int(stored[0])) if len(stored) == 1 else None
    if holds not in (None, declared_format):
        source = "declared" if declared.checkpoint_format else "assumed, as checkpoint_format is not declared"
        message = f"all stored zeros are {stored[0]}, which is {holds}; {declared_format} is {source}"
        findings.add("zeros-format", linear.name, message)
    elif declared.sym and holds is None:
        message = f"sym is declared, but the stored zeros run from {stored[0]} to {stored[-1]}"
        findings.add("zeros-not-symmetric", linear.name, message)
    elif declared.sym is False and declared_format == V1 and counts[-1]:
        findings.add("zeros-range", linear.name, f"a stored zero is {len(counts) - 1}: a wrapped 0, or gptq_v2")


def _check_scales(linear: Linear, files: OpenFiles, declared: Declared, findings: Findings) -> None:
    for patterns in read_rows(linear.parts["scales"], files):
        if _is_special(patterns).any():
            findings.add("scale-not-finite", linear.name, "some scales are NaN or infinite")
        # A negative scale mirrors a symmetric grid (decision 26); an asymmetric one has its zero for that.
        negative = (patterns & _SIGN != 0) & (patterns & _MAGNITUDE != 0) & ~_is_special(patterns)
        if declared.sym is False and negative.any():
            findings.add("scale-negative", linear.name, "some scales are negative, and sym is declared false")
        if (patterns & _MAGNITUDE == 0).any():
            findings.add("scale-zero", linear.name, "some scales are 0")
        # The largest distance of a code from its zero: 2^(bits-1) on a symmetric grid, else at most 2^bits - 1.
        distance = 1 << (linear.bits - 1) if declared.sym else (1 << linear.bits) - 1
        finite = (patterns & _MAGNITUDE)[~_is_special(patterns)]
        if finite.size and distance * float(finite.max().astype(np.uint16).view(np.float16)) > _MAX_HALF:
            findings.add("scale-overflow", linear.name, f"a scale times {distance} is beyond float16")


def _check_bias(linear: Linear, files: OpenFiles, findings: Findings) -> None:
    if not linear.has_bias:
        return
    slices = list(read_rows(linear.parts["bias"], files))
    if any(_is_special(patterns).any() for patterns in slices):
        findings.add("bias-not-finite", linear.name, "the bias holds NaN or infinity")
    is_zero = not any((patterns & _MAGNITUDE).any() for patterns in slices)
    if is_zero and linear.needs_bias:
        findings.add("bias-zero", linear.name, "every value of the bias is 0")
    elif not is_zero and not linear.needs_bias:
        findings.add("bias-unexpected", linear.name, "the architecture has no bias here, and the values are not 0")


def _is_special(patterns: npt.NDArray[np.integer]) -> npt.NDArray[np.bool_]:
    special: npt.NDArray[np.bool_] = (patterns & _EXPONENT) == _EXPONENT
    return special


def _check_g_idx(linear: Linear, files: OpenFiles, declared: Declared, findings: Findings) -> str:
    """Check one g_idx; return its digest when it is sound, else ""."""
    g_idx = np.concatenate(list(read_rows(linear.parts["g_idx"], files)))[:, 0]
    groups = num_groups(linear.in_features, linear.group_size)
    size = linear.in_features if linear.group_size == -1 else linear.group_size
    if g_idx.min() < 0 or g_idx.max() >= groups:
        findings.add(
            "g-idx-range", linear.name, f"values from {g_idx.min()} to {g_idx.max()}, expected 0 to {groups - 1}"
        )
        return ""
    natural = np.arange(linear.in_features) // size
    if not declared.desc_act or declared.static_groups:
        if not np.array_equal(g_idx, natural):
            # vLLM, transformers and AutoGPTQ take a missing desc_act for false.
            missing = "desc_act is not declared, which loaders take for false"
            reason = {False: "desc_act is false", None: missing, True: "static_groups is true"}[declared.desc_act]
            findings.add("g-idx-order", linear.name, f"{reason}, but g_idx is not column // {size}")
            return ""
    elif not np.array_equal(np.bincount(g_idx, minlength=groups), np.bincount(natural, minlength=groups)):
        findings.add("g-idx-groups", linear.name, f"its groups do not have {size} columns each")
        return ""
    return hashlib.sha256(g_idx.tobytes()).hexdigest()


def _check_fused(orders: Mapping[str, str], findings: Findings) -> None:
    """Compare the column order of linears that see the same input."""
    parents = dict.fromkeys(name.rpartition(".")[0] for name in orders)
    for parent in parents:
        for group in FUSED:
            members = [name for name in group if f"{parent}.{name}" in orders]
            if len({orders[f"{parent}.{name}"] for name in members}) > 1:
                findings.add("g-idx-fused", parent, f"{', '.join(members)} have the same input but different g_idx")
