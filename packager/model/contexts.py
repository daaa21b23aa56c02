"""The arguments of a block besides the hidden states, as a model's own forward gives them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class OutputOf:
    """In place of an argument: an item of the tuple that an earlier block returned."""

    block: int
    item: int


@dataclass(frozen=True, kw_only=True)
class Context:
    """The other arguments of one block for one batch.

    Attributes:
        args: positional ones after the hidden states.
        kwargs: by name.
        block: the block's number.
        passed: numbers of the items of the block's output that later blocks take.
        outputs: where the blocks of a batch put these items, and find those of blocks before them.
    """

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any]
    block: int = 0
    passed: tuple[int, ...] = ()
    outputs: dict[OutputOf, Tensor] = field(default_factory=dict)

    def given(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return positional arguments and keywords, with the outputs of earlier blocks in their places."""

        def found(value: Any) -> Any:
            return self.outputs[value] if isinstance(value, OutputOf) else value

        return tuple(map(found, self.args)), {name: found(value) for name, value in self.kwargs.items()}

    def keep(self, output: tuple[Any, ...]) -> None:
        """Keep what later blocks take."""
        for item in self.passed:
            self.outputs[OutputOf(block=self.block, item=item)] = output[item]


def shared_contexts(contexts: Sequence[Context], earlier: Sequence[Context] | None) -> Sequence[Context]:
    """Return contexts that hold the tensors of `earlier`, of a batch before this one, where their values are the same.

    Masks and rotary tables of batches of one shape are equal; what depends on the tokens is not. Dicts and lists are
    never shared: a block may write to them.
    """
    if earlier is None:
        return contexts
    compared: dict[tuple[int, int], Any] = {}

    def share(mine: Any, other: Any) -> Any:
        key = id(mine), id(other)
        if key not in compared:
            compared[key] = _shared(mine, other, share)
        return compared[key]

    return [
        replace(
            mine,
            args=tuple(share(a, b) for a, b in zip(mine.args, other.args, strict=True)),
            kwargs={name: share(value, other.kwargs.get(name)) for name, value in mine.kwargs.items()},
        )
        for mine, other in zip(contexts, earlier, strict=True)
    ]


def _shared(mine: Any, other: Any, share: Callable[[Any, Any], Any]) -> Any:
    if isinstance(mine, Tensor) and isinstance(other, Tensor):
        same = mine.shape == other.shape and mine.dtype == other.dtype and torch.equal(mine, other)
        return other if same else mine
    if type(mine) is tuple and type(other) is tuple and len(mine) == len(other):
        return tuple(map(share, mine, other))
    return mine


def own_contexts(contexts: Sequence[Context]) -> Sequence[Context]:
    """Return contexts whose dicts and lists are copies: blocks pass values to later blocks through them.

    A dict or list that several blocks share is one copy, which they share. Tensors are not copied.
    """
    copies: dict[int, Any] = {}

    def own(value: Any) -> Any:
        if id(value) not in copies:
            copies[id(value)] = _copied(value, own)
        return copies[id(value)]

    return [
        replace(
            context, args=own(context.args), kwargs={k: own(v) for k, v in context.kwargs.items()},
            outputs=own(context.outputs),
        )
        for context in contexts
    ]  # fmt: skip


def _copied(value: Any, own: Callable[[Any], Any]) -> Any:
    if isinstance(value, dict):
        return {key: own(item) for key, item in value.items()}
    if isinstance(value, list):
        return [own(item) for item in value]
    if type(value) is tuple:
        items = tuple(own(item) for item in value)
        return items if any(a is not b for a, b in zip(items, value, strict=True)) else value
    return value
