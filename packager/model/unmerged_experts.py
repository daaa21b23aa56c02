"""The tensors of experts that a base model stores as one: a branch has a name for each linear of each expert.

Runtimes read quantized experts by these names, whatever the base model's files hold. No torch here.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence

from packager.model.lock import LockedGroup, LockedTensors
from packager.model.name_patterns import names_of, patterns_of, write_numbers


def unmerged(
    stored: Sequence[LockedTensors], groups: Iterable[tuple[LockedGroup, Sequence[int]]]
) -> tuple[LockedTensors, ...]:
    """Return the tensors of a base model with those of quantized experts as one tensor for each linear.

    The bytes are the same: a tensor of all experts holds the weights of their linears and nothing else.

    Args:
        stored: as the files hold them.
        groups: that are quantized, with the numbers of their blocks.

    Raises:
        ValueError: a tensor that a group names is not there, or is not of its size.
    """
    wanted: dict[str, tuple[int, LockedGroup]] = {}
    for group, blocks in groups:
        if group.experts is not None and group.experts.stored is not None:
            wanted |= {group.experts.stored.replace("{block}", str(block)): (block, group) for block in blocks}
    if not wanted:
        return tuple(stored)
    found: list[LockedTensors] = []
    for tensors in stored:
        names = list(names_of(tensors.names)) if len(tensors.shape) == 3 else []
        held = [name for name in names if name in wanted]
        if not held:
            found.append(tensors)
            continue
        rest = patterns_of(name for name in names if name not in wanted)
        found += [tensors.model_copy(update={"names": pattern}) for pattern in rest]
        blocks_of: dict[int, list[int]] = defaultdict(list)
        groups_of: dict[int, LockedGroup] = {}
        for block, group in map(wanted.pop, held):
            blocks_of[id(group)].append(block)
            groups_of[id(group)] = group
        for key, group in groups_of.items():
            found += _linears(group, sorted(blocks_of[key]), tensors)
    if wanted:
        raise ValueError(f"{next(iter(wanted))} is no tensor of three dimensions")
    return tuple(found)


def _linears(group: LockedGroup, blocks: Sequence[int], merged: LockedTensors) -> Iterator[LockedTensors]:
    """Yield the tensors of a group's linears in some blocks.

    Raises:
        ValueError: they do not fill the merged tensor.
    """
    experts = len(group.numbers)
    if experts * group.out_features * group.in_features != math.prod(merged.shape):
        raise ValueError(f"{merged.names} does not hold {experts} experts of {group.linears[0].module} and no more")
    for linear in group.linears:
        names = linear.stored.replace("{block}", f"{{{write_numbers(blocks)}}}")
        yield LockedTensors(
            names=f"{names.replace('{expert}', f'{{{write_numbers(range(experts))}}}')}.weight",
            dtype=merged.dtype,
            shape=(linear.out_features, linear.in_features),
        )
