"""The arguments of a block besides the hidden states, as a model's own forward gives them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Context:
    """The other arguments of one block for one batch: positional ones after the hidden states, and keywords."""

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any]


def shared_contexts(contexts: Sequence[Context], earlier: Sequence[Context] | None) -> Sequence[Context]:
    """Return `earlier`, the contexts of a batch before this one, where they hold the same values, else `contexts`.

    Masks and rotary tables of batches of one shape are equal; what depends on the tokens is not. Dicts and lists are
    never shared: a block may write to them.
    """
    if earlier is None:
        return contexts
    compared: dict[tuple[int, int], bool] = {}

    def equal(a: Any, b: Any) -> bool:
        key = id(a), id(b)
        if key not in compared:
            compared[key] = _equal(a, b, equal)
        return compared[key]

    def alike(a: Context, b: Context) -> bool:
        if a.kwargs.keys() != b.kwargs.keys():
            return False
        return equal(a.args, b.args) and all(equal(value, b.kwargs[key]) for key, value in a.kwargs.items())

    same = all(alike(*pair) for pair in zip(contexts, earlier, strict=True))
    return earlier if same else contexts


def _equal(a: Any, b: Any, equal: Callable[[Any, Any], bool]) -> bool:
    if type(a) is not type(b):
        return False
    if isinstance(a, Tensor):
        return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, tuple):
        return len(a) == len(b) and all(equal(*pair) for pair in zip(a, b, strict=True))
    return bool(a == b) if isinstance(a, (type(None), bool, int, float, str, torch.dtype, torch.device)) else False


def own_contexts(contexts: Sequence[Context]) -> Sequence[Context]:
    """Return contexts whose dicts and lists are copies: blocks pass values to later blocks through them.

    A dict or list that several blocks share is one copy, which they share. Tensors are not copied.
    """
    copies: dict[int, Any] = {}

    def own(value: Any) -> Any:
        if id(value) not in copies:
            copies[id(value)] = _copied(value, own)
        return copies[id(value)]

    owned = [
        Context(args=own(context.args), kwargs={k: own(v) for k, v in context.kwargs.items()}) for context in contexts
    ]
    changed = any(
        a is not b
        for context, mine in zip(contexts, owned, strict=True)
        for a, b in zip((*context.args, *context.kwargs.values()), (*mine.args, *mine.kwargs.values()), strict=True)
    )
    return owned if changed else contexts


def _copied(value: Any, own: Callable[[Any], Any]) -> Any:
    if isinstance(value, dict):
        return {key: own(item) for key, item in value.items()}
    if isinstance(value, list):
        return [own(item) for item in value]
    if type(value) is tuple:
        items = tuple(own(item) for item in value)
        return items if any(a is not b for a, b in zip(items, value, strict=True)) else value
    return value
