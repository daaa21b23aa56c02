"""Thousands of tensors as a tree of the parts of their names, in which subtrees that are alike are one object.

A model has few kinds of blocks: what is summed, converted or cut is computed once for each kind, and counted as often
as it is there. No torch here: `plan` must stay fast.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from json.encoder import encode_basestring, encode_basestring_ascii
from typing import NamedTuple

from packager.model.lock import LockedLinear, LockedTensors
from packager.model.name_patterns import MOST_NAMES, part_key, parts_of
from packager.model.safetensors_file import DTYPE_BYTES, TensorInfo, entry_bytes, file_bytes


class Subtree(NamedTuple):
    """What lies under a part of a name."""

    name: str
    tree: "TensorTree"


class Totals(NamedTuple):
    """Sums over the tensors of a tree, whose names begin there.

    Attributes:
        tensors: how many there are.
        elements: of all of them.
        entry_bytes: of a file's header, without the offsets.
        most_bytes: an upper bound of `entry_bytes` and the data, which is known without the order of the tensors.
        data: for each dtype how many tensors there are, and the bytes of their data.
    """

    tensors: int
    elements: int
    entry_bytes: int
    most_bytes: int
    data: Mapping[str, tuple[int, int]]


@dataclass(frozen=True)
class TensorTree:
    """Tensors by the parts of their names; iterating yields each with its whole name.

    Attributes:
        members: tensors, by the last part of their name, and what lies below further parts, in the order of their
            names, block 2 before block 10.
        linear: that whose weight and bias are among the members; None where they are no linear's.
    """

    members: tuple[TensorInfo | Subtree, ...]
    linear: LockedLinear | None = None

    def __len__(self) -> int:
        return self.totals.tensors

    def __iter__(self) -> Iterator[TensorInfo]:
        return self._named("")

    def outside(self, path: str) -> Iterator[TensorInfo]:
        """Yield the tensors that are not below a path such as `model.layers`, which is not walked through."""
        return self._named("", left_out=path)

    def _named(self, prefix: str, left_out: str = "") -> Iterator[TensorInfo]:
        for member in self.members:
            name = f"{prefix}{member.name}"
            if isinstance(member, TensorInfo):
                yield TensorInfo(name, member.dtype, member.shape)
            elif name != left_out:
                yield from member.tree._named(f"{name}.", left_out)

    def __contains__(self, name: object) -> bool:
        first, dot, rest = str(name).partition(".")
        same = [member for member in self.members if member.name == first]
        if not dot:
            return any(isinstance(member, TensorInfo) for member in same)
        return any(isinstance(member, Subtree) and rest in member.tree for member in same)

    @property
    def size_bytes(self) -> int:
        """Bytes of the data of all tensors."""
        return sum(size for _, size in self.totals.data.values())

    @cached_property
    def totals(self) -> Totals:
        """Sums over all tensors."""
        tensors = elements = entries = most = 0
        data: dict[str, tuple[int, int]] = {}
        for member in self.members:
            inner = _totals_of(member) if isinstance(member, TensorInfo) else member.tree.totals
            dots = 0 if isinstance(member, TensorInfo) else inner.tensors
            tensors += inner.tensors
            elements += inner.elements
            entries += inner.entry_bytes + inner.tensors * _utf8_bytes(member.name) + dots
            most += inner.most_bytes + inner.tensors * ascii_bytes(member.name) + dots
            for dtype, (count, size) in inner.data.items():
                before = data.get(dtype, (0, 0))
                data[dtype] = before[0] + count, before[1] + size
        return Totals(tensors, elements, entries, most, data)

    @cached_property
    def _in_file_order(self) -> tuple[TensorInfo | Subtree, ...]:
        """The members in the order of their names as strings: a part that goes on is followed by a dot."""
        return tuple(sorted(self.members, key=_file_key))

    def ends_below(self, limit: int, dtype: str, begin: int) -> int:
        """Return how many tensors of a dtype end before an offset of a file, if the first one begins at `begin`."""
        found = 0
        for member in self._in_file_order:
            inner = _totals_of(member) if isinstance(member, TensorInfo) else member.tree.totals
            count, size = inner.data.get(dtype, (0, 0))
            if begin + size >= limit:
                if isinstance(member, Subtree) and begin < limit:
                    found += member.tree.ends_below(limit, dtype, begin)
                return found
            found, begin = found + count, begin + size
        return found


def _totals_of(tensor: TensorInfo) -> Totals:
    """Return what a tensor adds to the sums, its name and the offsets apart."""
    entry = entry_bytes(tensor.dtype, tensor.shape)
    # An entry has at most 52 characters besides its name, its shape and the offsets.
    most = 52 + len(str(tensor.shape)) + tensor.size_bytes
    return Totals(1, math.prod(tensor.shape), entry, most, {tensor.dtype: (1, tensor.size_bytes)})


def _file_key(member: TensorInfo | Subtree) -> str:
    return member.name if isinstance(member, TensorInfo) else f"{member.name}."


def _utf8_bytes(text: str) -> int:
    return len(encode_basestring(text).encode()) - 2


def ascii_bytes(text: str) -> int:
    """Return the length of a text in JSON with escapes for all but ASCII, without the quotes."""
    return len(encode_basestring_ascii(text)) - 2


class LinearNames(NamedTuple):
    """A linear, and the pattern of the stored names of all that it stands for."""

    linear: LockedLinear
    names: str


def tensor_tree(tensors: Iterable[LockedTensors], linears: Iterable[LinearNames] = ()) -> TensorTree:
    """Return the tree of all tensors that some patterns stand for.

    Args:
        tensors: of known dtypes.
        linears: of whose weights and biases there must be tensors.

    Raises:
        ValueError: a pattern is malformed, there are more than `MOST_NAMES` tensors or linears, one of them is there
            twice, or a linear's tensors are not as it says.
    """
    entries = _entries((each, each.names) for each in tensors)
    return _tree([*entries, *_entries(linears)], 0, "")


class _Entry(NamedTuple):
    """What stands at the end of names, and the parts that each of these names may have."""

    item: LockedTensors | LockedLinear
    parts: tuple[tuple[str, ...], ...]


def _entries(named: Iterable[tuple[LockedTensors | LockedLinear, str]]) -> list[_Entry]:
    """Read patterns; a short lock can stand for more than the memory holds."""
    entries, count = [], 0
    for item, names in named:
        entries.append(_Entry(item, parts_of(names)))
        count += math.prod(map(len, entries[-1].parts))
        if count > MOST_NAMES:
            raise ValueError(f"it stands for more than {MOST_NAMES} tensors or linears")
    return entries


def _tree(entries: Sequence[_Entry], depth: int, prefix: str) -> TensorTree:
    """Return the tree below names of `depth` parts, of which `prefix` is the first."""
    tensors: dict[str, TensorInfo] = {}
    below: dict[str, list[_Entry]] = {}
    linears = [entry.item for entry in entries if isinstance(entry.item, LockedLinear) and len(entry.parts) == depth]
    if len(linears) > 1:
        raise ValueError("a linear is there twice")
    for entry in entries:
        for part in entry.parts[depth] if depth < len(entry.parts) else ():
            if depth + 1 < len(entry.parts) or isinstance(entry.item, LockedLinear):
                below.setdefault(part, []).append(entry)
            elif part in tensors:
                raise ValueError("a tensor is there twice")
            else:
                tensors[part] = TensorInfo(part, entry.item.dtype, entry.item.shape)
    made: dict[tuple[int, ...], TensorTree] = {}
    branches: list[Subtree] = []
    for part, alike in below.items():
        key = tuple(map(id, alike))
        if key not in made:
            made[key] = _tree(alike, depth + 1, f"{prefix}{part}.")
        branches.append(Subtree(part, made[key]))
    linear = linears[0] if linears else None
    if linear is not None:
        _check_linear(linear, tensors, prefix)
    # A tensor comes before what goes on with its name.
    members: list[TensorInfo | Subtree] = [*tensors.values(), *branches]
    return TensorTree(tuple(sorted(members, key=lambda member: part_key(member.name))), linear)


def _check_linear(linear: LockedLinear, tensors: Mapping[str, TensorInfo], prefix: str) -> None:
    """Raise ValueError if a linear's tensors, by the last part of their names, are not as it says."""
    # A Conv1D is stored as [in_features, out_features].
    if "weight" not in tensors or sorted(tensors["weight"].shape) != sorted((linear.in_features, linear.out_features)):
        raise ValueError(f"{prefix}weight is not a tensor of its shape")
    if linear.bias != ("bias" in tensors):
        raise ValueError(f"{prefix}bias is there, or is not, against what the linear says")


def predicted_bytes(tree: TensorTree) -> int:
    """Return the exact size of a safetensors file that holds the tensors: that of `header_bytes`, and the data."""
    tensors, size = len(tree), tree.size_bytes
    # An offset has one digit, and one more for each power of ten that it reaches.
    ends = tensors + sum(tensors - _ends_below(tree, 10**power) for power in range(1, len(str(size))))
    begins = ends - len(str(size)) + 1 if tensors else 0
    return file_bytes(tree.totals.entry_bytes + ends + begins, size)


def _ends_below(tree: TensorTree, limit: int) -> int:
    """Return how many tensors end before an offset of the file's data; a dtype's tensors follow each other."""
    found = begin = 0
    for dtype in DTYPE_BYTES:
        count, size = tree.totals.data.get(dtype, (0, 0))
        if begin + size >= limit:
            return found + tree.ends_below(limit, dtype, begin)
        found, begin = found + count, begin + size
    return found
