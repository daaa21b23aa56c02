"""`tensor_tree` against lists of tensors: the same names, sizes of files and files, whatever is shared."""

from collections.abc import Iterator, Sequence
from itertools import groupby

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from packager.errors import PlanError
from packager.model.checkpoint import split_shards
from packager.model.lock import LockedLinear, LockedTensors
from packager.model.name_patterns import names_of, natural_key
from packager.model.safetensors_file import TensorInfo, file_order, header_bytes
from packager.model.tensor_tree import LinearNames, Subtree, TensorTree, predicted_bytes, tensor_tree
from tests.hypothesis_profiles import examples
from tests.tensor_trees import tree_of

DTYPES = ["F32", "I32", "F16", "U8"]
# A name that goes on where another one ends, names that strings and numbers order differently, and escapes.
PARTS = ["h", "h-1", "0", "2", "10", "{0..2}", "{1,10..12}", "{0..120}", "w", "w b", "\xe9", '"', "\U0001f600"]


@st.composite
def patterns(draw: st.DrawFn) -> tuple[LockedTensors, ...]:
    """Draw patterns that stand for no name twice."""
    found: list[LockedTensors] = []
    taken: set[str] = set()
    for parts in draw(st.lists(st.lists(st.sampled_from(PARTS), min_size=1, max_size=4), min_size=1, max_size=8)):
        entry = LockedTensors(
            names=".".join(parts), dtype=draw(st.sampled_from(DTYPES)),
            shape=tuple(draw(st.lists(st.sampled_from([0, 1, 3, 64, 1000]), max_size=2))),
        )  # fmt: skip
        names = set() if sum(part.count("..12") for part in parts) > 1 else set(names_of(entry.names))
        if names and not names & taken:
            taken |= names
            found.append(entry)
    return tuple(found)


def listed(entries: Sequence[LockedTensors]) -> list[TensorInfo]:
    tensors = (TensorInfo(name, each.dtype, each.shape) for each in entries for name in names_of(each.names))
    return sorted(tensors, key=lambda tensor: natural_key(tensor.name))


def file_bytes_of(tensors: Sequence[TensorInfo]) -> int:
    return len(header_bytes(file_order(tensors))) + sum(tensor.size_bytes for tensor in tensors)


@settings(max_examples=examples(200))
@given(entries=patterns())
def test_a_tree_has_the_tensors_and_the_sums_of_their_list(entries: tuple[LockedTensors, ...]) -> None:
    tree, tensors = tensor_tree(entries), listed(entries)
    assert list(tree) == tensors
    assert len(tree) == len(tensors)
    assert tree.size_bytes == sum(tensor.size_bytes for tensor in tensors)
    assert predicted_bytes(tree) == predicted_bytes(tree_of(tensors)) == file_bytes_of(tensors)
    assert all(tensor.name in tree and f"{tensor.name}.x" not in tree for tensor in tensors)


def modules_of(tensors: Sequence[TensorInfo]) -> Iterator[list[TensorInfo]]:
    for _, members in groupby(tensors, key=lambda tensor: tensor.name.rpartition(".")[0]):
        yield list(members)


@settings(max_examples=examples(200))
@given(entries=patterns(), share=st.floats(0.01, 1.1))
def test_files_are_filled_module_by_module(entries: tuple[LockedTensors, ...], share: float) -> None:
    """Modules follow each other, no file is too large, and no file could have had the next one's first module."""
    tensors = listed(entries)
    most = int(file_bytes_of(tensors) * share) + 100
    try:
        shards = split_shards(tensor_tree(entries), most, "model")
    except PlanError:
        slack = 60 + 60 + 2 * len(str(most)) + 8
        assert any(file_bytes_of(module) + len(module) * slack > most for module in modules_of(tensors))
        return
    assert [tensor for shard in shards for tensor in shard.tensors] == tensors
    assert shards == split_shards(tree_of(tensors), most, "model")
    for shard, following in zip(shards, (*shards[1:], None), strict=True):
        assert file_bytes_of(shard.tensors) == shard.size_bytes <= most
        assert shard.tensors or not tensors, "only a model without tensors has an empty file"
        if following is not None:
            module = next(modules_of(following.tensors))
            together = [*shard.tensors, *module]
            slack = sum(12 * len(tensor.name) + 80 + 2 * len(str(most)) for tensor in together)
            assert file_bytes_of(together) + slack > most
            assert shard.tensors[-1].name.rpartition(".")[0] != module[0].name.rpartition(".")[0]


def linear(names: str, *, bias: bool = False) -> LinearNames:
    each = LockedLinear(module="q", stored="q", in_features=64, out_features=32, bias=bias)
    return LinearNames(each, names)


def weights(names: str, *shape: int) -> LockedTensors:
    return LockedTensors(names=names, dtype="F16", shape=shape)


def trees_in(tree: TensorTree) -> dict[int, TensorTree]:
    """Return every object of a tree by its id."""
    found = {id(tree): tree}
    for member in tree.members:
        if isinstance(member, Subtree) and id(member.tree) not in found:
            found |= trees_in(member.tree)
    return found


def test_what_is_alike_is_one_object() -> None:
    tree = tensor_tree(
        [weights("h.{0..47}.{0..127}.q.weight", 32, 64), weights("h.{0..47}.norm.weight", 64), weights("head", 9)],
        [linear("h.{0..46}.{0..127}.q")],
    )
    assert len(tree) == 48 * 128 + 48 + 1
    # The whole, "h", blocks 0 to 46 and 47, an expert of each, its linear, and norms.
    assert len(trees_in(tree)) == 1 + 1 + 2 * (1 + 1 + 1 + 1)
    assert [each.linear is None for each in trees_in(tree).values()].count(False) == 1


@pytest.mark.parametrize(
    ("tensors", "linears", "message"),
    [
        ([weights("a.{0..2}.w", 1), weights("a.2.w", 1)], [], "a tensor is there twice"),
        ([weights("{1..11}{1..11}", 1)], [], "a tensor is there twice"),
        ([weights("a.q.weight", 32, 64)], [linear("a.q"), linear("{0..1}"), linear("a.q")], "a linear is there twice"),
        ([weights("{0..2}.weight", 32, 64), weights("3.w", 1)], [linear("{0..3}")], "3.weight is not a tensor of its"),
        ([weights("{0..2}.weight", 32, 64)], [linear("{0..3}")], "3.weight is not a tensor of its shape"),
        ([weights("{0..2}.weight", 32, 32)], [linear("{1..2}")], "1.weight is not a tensor of its shape"),
        ([weights("a.weight", 32, 64), weights("a.bias", 32)], [linear("a")], "a.bias is there, or is not"),
        ([weights("a.weight", 32, 64)], [linear("a", bias=True)], "a.bias is there, or is not"),
        ([weights("{0..399999}", 1), weights("a", 1)], [], "it stands for more than 400000 tensors or linears"),
        ([weights("a", 1)], [linear("{0..399999}"), linear("a")], "it stands for more than 400000 tensors or linears"),
    ],
)
def test_contradictions_are_found(tensors: list[LockedTensors], linears: list[LinearNames], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tensor_tree(tensors, linears)


def test_a_linear_of_a_conv1d_lies_transposed() -> None:
    assert tensor_tree([weights("a.weight", 64, 32)], [linear("a")]).members[0].name == "a"


def test_what_is_outside_a_path_is_found_without_walking_through_it() -> None:
    names = ["a.b.0.c", "a.b.1.c", "a.bc.d", "a.e", "b.0.c", "f"]
    tree = tree_of([TensorInfo(name, "F16", (2, 2)) for name in names])
    assert sorted(tensor.name for tensor in tree.outside("a.b")) == ["a.bc.d", "a.e", "b.0.c", "f"]
    assert sorted(tensor.name for tensor in tree.outside("")) == names
