"""Describe a base model for its lock: stored tensors, blocks, the linears of each, and why others are left alone.

Needs transformers and the names and shapes of the stored tensors; never a weight.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from packager.errors import SourceError
from packager.model.architecture import IGNORED_SUFFIXES
from packager.model.computed_buffers import compute_buffers
from packager.model.config_values import ConfigReader, read_config
from packager.model.lock import LockedGroup, LockedKind, LockedLinear, LockedModel, LockedTensors
from packager.model.name_patterns import natural_key, patterns_of, write_numbers
from packager.model.safetensors_file import TensorInfo
from packager.model.skeleton import build_skeleton
from packager.model.stored_names import StoredNames, saved_tensors
from packager.model.trace import Trace, trace
from packager.model.traced_forward import is_experts
from packager.receipt import CONFIG

_WIDTH = 32  # 32 values fill whole 32-bit words for every number of bits; kernels take no other widths


def describe(folder: Path, stored: Mapping[str, TensorInfo] | None) -> LockedModel:
    """Describe the model of a folder.

    Args:
        folder: with config.json.
        stored: the tensors of its weights files, by name; None for those that transformers would store, in the dtype
            that config.json gives.

    Raises:
        SourceError: transformers cannot build the model, the stored tensors are not the model's, or its blocks cannot
            be run one by one; names the module and the reason.
    """
    config = read_config(folder / CONFIG)
    with torch.device("meta"):
        model = build_skeleton(folder, torch.bfloat16)
    stored = _saved(model, config) if stored is None else stored
    stored = {name: tensor for name, tensor in stored.items() if not name.endswith(IGNORED_SUFFIXES)}
    tied = _tied_names(model, stored)
    names = StoredNames(model, [name for name in stored if name not in tied])
    _check(names, stored, folder)
    _check_unused(model, names, folder)
    traced = trace(model)
    describer = _Describer(model, traced, names)
    _check_buffers(model, traced)
    head = cast(Any, model).get_output_embeddings()
    return LockedModel(
        model_class=type(model).__name__,
        blocks_path=traced.blocks_path,
        kinds=describer.kinds(),
        hidden_size=traced.hidden_size,
        vocab_size=head.weight.shape[0],
        kv_bytes_per_token=traced.cache_bytes_per_token,
        tied=tied,
        tensors=_patterns({name: tensor for name, tensor in stored.items() if name not in tied}),
        config=cast(dict[str, Any], config),
    )


def _saved(model: nn.Module, config: Mapping[str, object]) -> dict[str, TensorInfo]:
    """Return what transformers would store, in the dtype that config.json gives.

    Raises:
        SourceError: config.json gives none.
    """
    text = config.get("text_config")
    reader = ConfigReader({**text, **config} if isinstance(text, Mapping) else config)
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
    """What blocks of a kind have in common."""

    groups: tuple[tuple[LockedLinear, ...], ...]
    left: tuple[tuple[str, str], ...]
    weight_elements: int


def _why_unreached(name: str, skipped: Sequence[str]) -> str:
    module = next((module for module in skipped if name == module or name.startswith(f"{module}.")), None)
    if module is None:
        return "the model's forward does not call it"
    return f"what {module} computes depends on the tokens' values"


class _Describer:
    """Finds the kinds of blocks of a traced model."""

    def __init__(self, model: nn.Module, traced: Trace, names: StoredNames) -> None:
        self._trace, self._names = traced, names
        self._blocks = cast(nn.ModuleList, model.get_submodule(traced.blocks_path))
        self._uses = Counter(id(parameter) for block in self._blocks for parameter in block.parameters())

    def kinds(self) -> tuple[LockedKind, ...]:
        """Return the kinds of blocks, in the order of their first blocks."""
        alike: dict[_Block, list[int]] = defaultdict(list)
        held: dict[_Block, list[tuple[int, ...]]] = defaultdict(list)
        for index, traced in enumerate(self._trace.blocks):
            block, positions = self._described(index)
            alike[block].append(index)
            held[block].append((*(traced.held[position] for position in positions), traced.peak))
        found = []
        for block, numbers in alike.items():
            *groups_held, peak = (max(values) for values in zip(*held[block], strict=True))
            groups = tuple(
                LockedGroup(linears=linears, held_bytes=self._per_token(size))
                for linears, size in zip(block.groups, groups_held, strict=True)
            )
            found.append(
                LockedKind(
                    blocks=write_numbers(numbers),
                    groups=groups,
                    left=dict(block.left),
                    weight_elements=block.weight_elements,
                    peak_bytes=self._per_token(peak),
                )
            )
        return tuple(found)

    def _per_token(self, size_bytes: int) -> int:
        return -(-size_bytes // self._trace.num_tokens)

    def _described(self, index: int) -> tuple[_Block, list[int]]:
        """Return a block's description, and the positions of its groups among the traced ones."""
        block, traced = self._blocks[index], self._trace.blocks[index]
        reached = Counter(name for group in traced.groups for name in group)
        groups, positions = [], []
        left = {name: _why_unreached(name, traced.skipped) for name in (*traced.skipped, *traced.unreached)}
        for position, group in enumerate(traced.groups):
            linears = []
            for name in group:
                module = block.get_submodule(name)
                reason = self._why_left(index, name, module, reached[name])
                if reason:
                    left[name] = reason
                else:
                    linears.append(self._linear(index, name, cast(nn.Linear, module)))
            if linears:
                groups.append(tuple(linears))
                positions.append(position)
        return _Block(
            groups=tuple(groups), left=tuple(sorted(left.items())),
            weight_elements=sum(parameter.numel() for parameter in block.parameters()),
        ), positions  # fmt: skip

    def _why_left(self, index: int, name: str, module: nn.Module, times: int) -> str:
        """Return why a module's weights stay as they are, or ""."""
        if is_experts(module):
            return "experts are not quantized yet"
        linear = cast(nn.Linear, module)
        shape = f"its shape, {linear.in_features} to {linear.out_features}, is no multiple of {_WIDTH}"
        shared = any(self._uses[id(parameter)] > 1 for parameter in linear.parameters())
        reasons = {
            "the block uses it more than once": times > 1,
            "several blocks share it": shared,
            "it routes tokens to experts": self._is_router(index, name, linear),
            shape: linear.in_features % _WIDTH or linear.out_features % _WIDTH,
            "its weight is stored as a part of another tensor, or in several": not self._stored_alone(index, name),
        }
        return next((reason for reason, holds in reasons.items() if holds), "")

    def _is_router(self, index: int, name: str, linear: nn.Linear) -> bool:
        """Return whether a linear gives one value, or one for each expert, beside a module of experts."""
        parent = self._blocks[index].get_submodule(name.rpartition(".")[0])
        counts = {cast(Tensor, module.down_proj).shape[0] for module in parent.modules() if is_experts(module)}
        return bool(counts) and linear.out_features in {1, *counts}

    def _stored_alone(self, index: int, name: str) -> bool:
        conversion = self._names.conversions.get(f"{self._trace.blocks_path}.{index}.{name}.weight")
        return conversion is not None and conversion.converter is None and conversion.names[0].endswith(".weight")

    def _linear(self, index: int, name: str, linear: nn.Linear) -> LockedLinear:
        parameter = f"{self._trace.blocks_path}.{index}.{name}.weight"
        stored = self._names.conversions[parameter].names[0].removesuffix(".weight")
        return LockedLinear(
            module=name,
            stored=stored.replace(f".{index}.", ".{block}.", 1),
            in_features=linear.in_features,
            out_features=linear.out_features,
            bias=linear.bias is not None,
        )
