"""Trees of tensors with any names, in which nothing is shared: what `tensor_tree` computes once, these have often."""

from collections.abc import Iterable

from packager.model.name_patterns import part_key
from packager.model.safetensors_file import TensorInfo
from packager.model.tensor_tree import Subtree, TensorTree


def tree_of(tensors: Iterable[TensorInfo]) -> TensorTree:
    """Return the tree of some tensors."""
    members: list[TensorInfo | Subtree] = []
    below: dict[str, list[TensorInfo]] = {}
    for tensor in tensors:
        part, dot, rest = tensor.name.partition(".")
        if dot:
            below.setdefault(part, []).append(tensor._replace(name=rest))
        else:
            members.append(tensor)
    members += [Subtree(part, tree_of(inside)) for part, inside in below.items()]
    return TensorTree(tuple(sorted(members, key=lambda member: part_key(member.name))))
