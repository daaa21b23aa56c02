"""The GPTQ parameters that a checkpoint's tensors themselves show, whatever its configs declare.

Shapes give bits, g_idx gives the size and the order of the groups, qzeros give symmetry and format. A parameter is None
where the tensors do not decide, or where linears differ.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, TypeVar

import numpy as np
import numpy.typing as npt

from packager.errors import SourceError
from packager.prove.audit.config import Declared
from packager.prove.audit.finding import Findings
from packager.prove.audit.model import KnownModel
from packager.prove.audit.tensors import PARTS, Expected, Linear, Parts, check_tensors, split_tensors
from packager.prove.audit.values import V1, V2, OpenFiles, read_rows, value_counts
from packager.prove.audit.weights import Weights
from packager.variant import num_groups

# natural: column // group_size. renumbered: the same groups under other numbers. scattered: groups of the right sizes
# with columns from anywhere, as act order makes them. broken: anything else.
Order = Literal["natural", "renumbered", "scattered", "broken"]
_BITS = (2, 3, 4, 8)
_Value = TypeVar("_Value")
GroupIndex = npt.NDArray[np.int32]


@dataclass(frozen=True, kw_only=True)
class Held:
    """What the tensors show.

    Attributes:
        linears: every quantized linear; none if one of them lacks a tensor or has a wrong shape.
        bits, group_size: of all linears.
        orders: the kind of g_idx of each linear.
        renumbered: of each linear with other numbers of groups, the number of every block of group_size columns.
        uniform_zero: the one value that all of qzeros store, None if they store several.
        holds_zero_0: a stored zero is 0, which the v1 format would read as 1.
        is_asymmetric: every linear has several zeros.
    """

    linears: tuple[Linear, ...] = ()
    bits: int | None = None
    group_size: int | None = None
    orders: Mapping[str, Order] = field(default_factory=dict)
    renumbered: Mapping[str, GroupIndex] = field(default_factory=dict)
    uniform_zero: int | None = None
    holds_zero_0: bool = False
    is_asymmetric: bool = False

    @property
    def checkpoint_format(self) -> str | None:
        """The format that symmetric zeros are stored in."""
        if self.bits is None or self.uniform_zero is None:
            return None
        middle = 1 << (self.bits - 1)
        return {middle - 1: V1, middle: V2}.get(self.uniform_zero)

    @property
    def sym(self) -> bool | None:
        """Whether the grid is symmetric."""
        if self.checkpoint_format is not None:
            return True
        return False if self.is_asymmetric else None

    def order(self, *kinds: Order) -> bool:
        """Return whether every linear has an order of one of these kinds."""
        return bool(self.orders) and set(self.orders.values()) <= set(kinds)


def read_held(weights: Weights, declared: Declared) -> Held:
    """Read the parameters from the headers and the small tensors.

    Raises:
        SourceError: a weights file cannot be read.
    """
    modules = split_tensors(weights)
    shapes = [_shapes(parts) for parts in modules.values()]
    if not shapes or not weights.is_all_read or any(shape is None for shape in shapes):
        return Held()
    try:
        with OpenFiles() as files:
            return _read(weights, modules, [shape for shape in shapes if shape], declared, files)
    except OSError as error:
        raise SourceError("a weights file cannot be read", why=str(error), hint="copy or download it again") from error


@dataclass(frozen=True, kw_only=True)
class _Shape:
    in_features: int
    rows: int
    groups: int

    @property
    def bits(self) -> int | None:
        """Return the bits by which qweight has its rows."""
        return next((bits for bits in _BITS if self.rows * 32 == self.in_features * bits), None)


def _shapes(parts: Parts) -> _Shape | None:
    """Return the sizes of a linear that has all its tensors in the right dtypes, else None."""
    if any(part not in parts or parts[part].info.dtype != dtype for part, dtype in PARTS.items()):
        return None
    ranks = {part: len(parts[part].info.shape) for part in PARTS}
    if ranks != {"qweight": 2, "qzeros": 2, "scales": 2, "g_idx": 1} or any(
        0 in parts[part].info.shape for part in PARTS
    ):
        return None
    return _Shape(
        in_features=parts["g_idx"].info.shape[0],
        rows=parts["qweight"].info.shape[0],
        groups=parts["scales"].info.shape[0],
    )


def _read(
    weights: Weights, modules: Mapping[str, Parts], shapes: Sequence[_Shape], declared: Declared, files: OpenFiles
) -> Held:
    indexes = {
        name: np.concatenate(list(read_rows(parts["g_idx"], files)))[:, 0].astype(np.int32)
        for name, parts in modules.items()
    }
    bits = _one(shape.bits for shape in shapes)
    group_size = _group_size(shapes, list(indexes.values()), declared.group_size)
    if bits is None or group_size is None:
        return Held(bits=bits)
    expected = Expected(declared=replace(declared, bits=bits, group_size=group_size), model=KnownModel())
    linears = check_tensors(weights, expected, Findings())
    if len(linears) != len(modules):
        return Held(bits=bits, group_size=group_size)
    orders = {each.name: _order(indexes[each.name], each) for each in linears}
    zeros = {each.name: _stored_zeros(each, files) for each in linears}
    several = [len(stored) > 1 for stored in zeros.values()]
    return Held(
        linears=linears,
        bits=bits,
        group_size=group_size,
        orders=orders,
        renumbered={
            each.name: indexes[each.name][:: _size(each)] for each in linears if orders[each.name] == "renumbered"
        },
        uniform_zero=None if any(several) else _one(int(stored[0]) for stored in zeros.values()),
        holds_zero_0=any(0 in stored for stored in zeros.values()),
        is_asymmetric=all(several),
    )


def _one(values: Iterable[_Value | None]) -> _Value | None:
    """Return the one value of all, None if they differ."""
    found = set(values)
    return found.pop() if len(found) == 1 else None


def _group_size(shapes: Sequence[_Shape], indexes: Sequence[GroupIndex], declared: int | None) -> int | None:
    def fits(size: int) -> bool:
        return all(num_groups(shape.in_features, size) == shape.groups for shape in shapes)

    if declared is not None and fits(declared):
        return declared
    if fits(-1):
        return -1
    largest = [
        int(np.unique(index, return_counts=True)[1].max())
        for shape, index in zip(shapes, indexes, strict=True)
        if shape.groups > 1
    ]
    size = _one(largest)
    return size if size is not None and fits(size) else None


def _size(linear: Linear) -> int:
    return linear.in_features if linear.group_size == -1 else linear.group_size


def _order(index: GroupIndex, linear: Linear) -> Order:
    size, groups = _size(linear), num_groups(linear.in_features, linear.group_size)
    natural = np.arange(linear.in_features) // size
    if np.array_equal(index, natural):
        return "natural"
    if index.min() < 0 or index.max() >= groups:
        return "broken"
    numbers = index[::size]
    if np.array_equal(index, numbers[natural]) and np.array_equal(np.sort(numbers), np.arange(groups)):
        return "renumbered"
    same = np.array_equal(np.bincount(index, minlength=groups), np.bincount(natural, minlength=groups))
    return "scattered" if same else "broken"


def _stored_zeros(linear: Linear, files: OpenFiles) -> npt.NDArray[np.int64]:
    counts = np.zeros(1 << linear.bits, dtype=np.int64)
    for words in read_rows(linear.parts["qzeros"], files):
        counts += value_counts(words.astype(np.int32, copy=False), linear.bits)
    return np.flatnonzero(counts)
