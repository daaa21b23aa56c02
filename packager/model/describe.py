"""Describe a base model for its lock: stored tensors, blocks, the linears of each, and why others are left alone.

Needs transformers and the names and shapes of the stored tensors; never a weight.
"""

import json
import re
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from pydantic import JsonValue
from torch import Tensor, nn

from packager.errors import SourceError
from packager.model.architecture import IGNORED_SUFFIXES
from packager.model.computed_buffers import compute_buffers
from packager.model.config_values import READ_KEYS, ConfigReader, read_config, text_part
from packager.model.described_groups import DescribedGroup, GroupDescriber
from packager.model.lock import LockedCache, LockedGroup, LockedKind, LockedModel, LockedTensors, LockedWindow
from packager.model.name_patterns import natural_key, patterns_of, write_numbers
from packager.model.safetensors_file import TensorInfo
from packager.model.skeleton import build_skeleton
from packager.model.stored_names import StoredNames, saved_tensors
from packager.model.trace import Trace, trace
from packager.receipt import CONFIG


def describe(folder: Path, stored: Mapping[str, TensorInfo] | None, own: Collection[str] = ()) -> LockedModel:
    """Describe the model of a folder.

    Args:
        folder: with config.json.
        stored: the tensors of its weights files, by name; None for those that transformers would store, in the dtype
            that config.json gives.
        own: names of stored tensors that are not tied, whatever config.json says.

    Raises:
        SourceError: transformers cannot build the model, the stored tensors are not the model's, or its blocks cannot
            be run one by one; names the module and the reason.
    """
    config = read_config(folder / CONFIG)
    with torch.device("meta"):
        model = build_skeleton(folder, torch.bfloat16)
    stored = _saved(model, config) if stored is None else stored
    stored = {name: tensor for name, tensor in stored.items() if not name.endswith(IGNORED_SUFFIXES)}
    tied = tuple(name for name in _tied_names(model, stored) if name not in own)
    names = StoredNames(model, [name for name in stored if name not in tied])
    _check(names, stored, folder)
    _check_unused(model, names, folder)
    traced = trace(model)
    describer = _Describer(model, traced, names, stored)
    _check_buffers(model, traced)
    head = cast(Any, model).get_output_embeddings()
    return LockedModel(
        model_class=type(model).__name__,
        blocks_path=traced.blocks_path,
        kinds=describer.kinds(),
        hidden_size=traced.hidden_size,
        vocab_size=head.weight.shape[0],
        kv_bytes_per_token=traced.cache_bytes_per_token,
        kv_cache=LockedCache(
            windows=tuple(
                LockedWindow(tokens=tokens, bytes_per_token=size) for tokens, size in sorted(traced.windows.items())
            ),
            state_bytes=traced.state_bytes,
        ),
        tied=tied,
        own=tuple(sorted(own)),
        tensors=_patterns({name: tensor for name, tensor in stored.items() if name not in tied}),
        config=cast(dict[str, Any], config),
        resolved=_resolved(model, config),
    )


def _resolved(model: nn.Module, config: Mapping[str, object]) -> dict[str, JsonValue]:
    """Return `LockedModel.resolved`."""
    text, given = cast(Any, model).config.get_text_config(decoder=True), text_part(config)
    values = {
        key: getattr(text, key, None)
        for key, spellings in READ_KEYS.items()
        if all(given.get(name) is None for name in spellings)
    }
    return {key: value for key, value in json.loads(json.dumps(values)).items() if value is not None}


def _saved(model: nn.Module, config: Mapping[str, object]) -> dict[str, TensorInfo]:
    """Return what transformers would store, in the dtype that config.json gives.

    Raises:
        SourceError: config.json gives none.
    """
    reader = ConfigReader({**text_part(config), **config})
    dtype = reader.dtype()
    if reader.problems:
        raise SourceError(
            "config.json does not give the dtype of the weights", where=CONFIG, why="; ".join(reader.problems),
            hint="describe a folder with the weights: their headers give it",
        )  # fmt: skip
    return {
        name: TensorInfo(name=name, dtype=dtype if tensor.dtype == "BF16" else tensor.dtype, shape=tensor.shape)
        for name, tensor in saved_tensors(model).items()
    }


def _tied_names(model: nn.Module, stored: Mapping[str, TensorInfo]) -> tuple[str, ...]:
    """Return the names of tensors that the model takes from another tensor, as transformers would store them."""
    tied: Mapping[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    renamed = StoredNames(model, stored)
    found = {name: conversion.names for name in tied if (conversion := renamed.conversions.get(name)) is not None}
    return tuple(sorted({*(name for names in found.values() for name in names), *(set(tied) - set(found))}))


def _check(names: StoredNames, stored: Mapping[str, TensorInfo], folder: Path) -> None:
    """Compare the stored tensors with the model, without reading one.

    Raises:
        SourceError: a tensor is missing or has another shape.
    """
    missing = names.missing()
    if missing:
        raise SourceError(
            "the weights lack tensors that the model needs", where=str(folder),
            why=f"{', '.join(missing[:5])}{f' and {len(missing) - 5} more' if len(missing) > 5 else ''}",
            hint="a shard may be missing, or the installed transformers builds this architecture with other tensors",
        )  # fmt: skip

    def empty(name: str) -> Tensor:
        return torch.empty(stored[name].shape, dtype=torch.bfloat16, device="meta")

    for parameter in names.conversions:
        names.read(parameter, empty)


def _check_unused(model: nn.Module, names: StoredNames, folder: Path) -> None:
    """Refuse stored tensors that the model would compute with if it were built as its maker built it.

    These are further parameters of a module that the model has (a bias), and weights of further modules in one of its
    blocks (a norm). Other tensors belong to what is not used to generate text, such as blocks that guess more tokens.

    Raises:
        SourceError: there are some; names them.
    """
    patterns = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    modules = dict(model.named_modules())
    members = {
        f"{path}.{name}"
        for path, module in modules.items()
        if isinstance(module, nn.ModuleList)
        for name, _ in module.named_children()
    }

    def is_needed(stored: str) -> bool:
        parameter = names.parameter_of(stored)
        path, _, kind = parameter.rpartition(".")
        if any(re.search(pattern, parameter) for pattern in patterns):
            return False
        if path in modules:
            return next(modules[path].parameters(recurse=False), None) is not None
        parts = path.split(".")
        ancestors = {".".join(parts[:depth]) for depth in range(1, len(parts))}
        return kind in ("weight", "bias") and bool(ancestors & members)

    found = [name for name in names.unused if is_needed(name)]
    if found:
        raise SourceError(
            "the weights hold tensors that the model does not have", where=str(folder),
            why=f"{', '.join(found[:5])}{f' and {len(found) - 5} more' if len(found) > 5 else ''}",
            hint="the installed transformers, or config.json, builds another model than the one that was saved",
        )  # fmt: skip


def _check_buffers(model: nn.Module, traced: Trace) -> None:
    """Compute the buffers that a build needs.

    Raises:
        SourceError: transformers does not compute one.
    """
    inside = [name for name, _ in model.named_modules() if name.startswith(f"{traced.blocks_path}.")]
    compute_buffers(model, [*traced.embedding_modules, *inside, *traced.head_modules], torch.device("cpu"))


def _patterns(tensors: Mapping[str, TensorInfo]) -> tuple[LockedTensors, ...]:
    alike: dict[tuple[str, tuple[int, ...]], list[str]] = defaultdict(list)
    for name, tensor in tensors.items():
        alike[tensor.dtype, tensor.shape].append(name)
    entries = [
        LockedTensors(names=pattern, dtype=dtype, shape=shape)
        for (dtype, shape), names in alike.items()
        for pattern in patterns_of(names)
    ]
    return tuple(sorted(entries, key=lambda entry: natural_key(entry.names)))


@dataclass(frozen=True, kw_only=True)
class _Block:
    """What blocks of a kind have in common; the memory of activations, which may differ, is not part of it."""

    groups: tuple[DescribedGroup, ...]
    left: tuple[tuple[str, str], ...]
    weight_elements: int


class _Describer:
    """Finds the kinds of blocks of a traced model."""

    def __init__(self, model: nn.Module, traced: Trace, names: StoredNames, stored: Mapping[str, TensorInfo]) -> None:
        self._trace = traced
        self._blocks = cast(nn.ModuleList, model.get_submodule(traced.blocks_path))
        self._groups = GroupDescriber(model, traced, names, stored)

    def kinds(self) -> tuple[LockedKind, ...]:
        """Return the kinds of blocks, in the order of their first blocks."""
        alike: dict[_Block, list[int]] = defaultdict(list)
        held: dict[_Block, list[tuple[int, ...]]] = defaultdict(list)
        pairs: dict[_Block, list[tuple[int, ...]]] = defaultdict(list)
        for index, module in enumerate(self._blocks):
            described = self._groups.describe(index)
            block = _Block(
                groups=described.groups,
                left=tuple(sorted(described.left.items())),
                weight_elements=sum(parameter.numel() for parameter in module.parameters()),
            )
            alike[block].append(index)
            held[block].append((*described.held, described.peak))
            pairs[block].append((*described.held_pairs, described.peak_pairs))
        found = []
        for block, numbers in alike.items():
            *groups_held, peak = map(self._per_token, _largest(held[block]))
            *groups_pairs, peak_pairs = map(self._per_pair, _largest(pairs[block]))
            groups = tuple(
                LockedGroup(
                    experts=group.experts, linears=group.linears, held_bytes=by_token, held_bytes_per_pair=by_pair
                )
                for group, by_token, by_pair in zip(block.groups, groups_held, groups_pairs, strict=True)
            )
            found.append(
                LockedKind(
                    blocks=write_numbers(numbers),
                    groups=groups,
                    left=dict(block.left),
                    weight_elements=block.weight_elements,
                    peak_bytes=peak,
                    peak_bytes_per_pair=peak_pairs,
                )
            )
        return tuple(found)

    def _per_token(self, size_bytes: int) -> int:
        return -(-size_bytes // self._trace.num_tokens)

    def _per_pair(self, size_bytes: int) -> int:
        return -(-size_bytes // self._trace.num_tokens**2)


def _largest(blocks: list[tuple[int, ...]]) -> Iterator[int]:
    """Yield the largest of the first values of all blocks, then of the second ones, and so on."""
    return (max(values) for values in zip(*blocks, strict=True))
