"""The linears whose values are read where the weights are elsewhere, within a number of bytes for each weights file.

Whole blocks are taken, the first, the last and the middle one before the others: linears with the same input are
compared with each other, and a mistake of a program is in all blocks or at an end. Of a linear, g_idx and the bias are
read whole, since their mistakes can be anywhere; of qzeros and scales the first rows.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from packager.model.safetensors_file import StoredTensor
from packager.prove.audit.tensors import BIAS, Linear

# A request of each takes a tenth of a second or more, whatever its size.
_MOST_LINEARS = 64
_MOST_ROWS_BYTES = 16_384
_BLOCK = re.compile(r".*?\.\d{1,6}\.", re.DOTALL)


def sampled_linears(linears: Sequence[Linear], left_bytes: Mapping[Path, int]) -> tuple[Linear, ...]:
    """Return linears of which a sample of the bytes is read, with tensors cut to the rows of the sample.

    Args:
        linears: those of a checkpoint, in the order of their names.
        left_bytes: how many bytes may be read, by weights file; none of a file that is not named.
    """
    left = dict(left_bytes)
    chosen: list[Linear] = []
    for linear in _spread(linears):
        cut = _cut(linear)
        costs: dict[Path, int] = {}
        for tensor in cut.parts.values():
            costs[tensor.path] = costs.get(tensor.path, 0) + tensor.info.size_bytes
        if len(chosen) < _MOST_LINEARS and all(cost <= left.get(path, 0) for path, cost in costs.items()):
            chosen.append(cut)
            for path, cost in costs.items():
                left[path] -= cost
    return tuple(chosen)


def sampled_tensors(linears: Iterable[Linear]) -> tuple[StoredTensor, ...]:
    """Return the tensors that the sample reads."""
    return tuple(tensor for linear in linears for tensor in linear.parts.values())


def _spread(linears: Sequence[Linear]) -> list[Linear]:
    """Return the linears by block: the first, the last and the middle one, then the others."""
    blocks: dict[str, list[Linear]] = {}
    for linear in linears:
        found = _BLOCK.match(linear.name)
        blocks.setdefault(found[0] if found else "", []).append(linear)
    ordered = sorted(blocks, key=lambda name: (len(name), name))
    first = [ordered[position] for position in (0, -1, len(ordered) // 2)] if ordered else []
    return [linear for name in dict.fromkeys([*first, *ordered]) for linear in blocks[name]]


def _cut(linear: Linear) -> Linear:
    """Return a linear without qweight, and with the first rows of qzeros and scales."""
    parts = {"g_idx": linear.parts["g_idx"]}
    for name in ("qzeros", "scales"):
        tensor = linear.parts[name]
        rows, width = tensor.info.shape
        row_bytes = tensor.info.size_bytes // rows
        kept = min(rows, max(1, _MOST_ROWS_BYTES // row_bytes))
        parts[name] = tensor._replace(info=tensor.info._replace(shape=(kept, width)))
    if linear.has_bias:
        parts[BIAS] = linear.parts[BIAS]
    return replace(linear, parts=parts)
