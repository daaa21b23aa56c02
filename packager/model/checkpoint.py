"""A quantized checkpoint: which variants fit a model, its tensors, its weights files and its portable config keys.

docs/reference/format.md has the format. No torch here: `plan` must stay fast.
"""

import json
import math
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import groupby
from json.encoder import encode_basestring_ascii
from typing import Literal

from packager.errors import PlanError
from packager.model.architecture import Architecture, LinearSpec
from packager.model.runtime_architectures import FUSED_LINEARS
from packager.model.safetensors_file import TensorInfo, predicted_bytes
from packager.variant import Variant, num_groups

# The parameters that AutoGPTQ <= 0.3.2 accepts in quantize_config.json; it raises TypeError on any other key.
PORTABLE_PARAMETERS = ("bits", "group_size", "damp_percent", "desc_act", "sym", "true_sequential")
PORTABLE_KEYS = (*PORTABLE_PARAMETERS, "model_name_or_path", "model_file_base_name")
WORD_BITS = 32
# Where transformers finds the blocks by itself: optimum.gptq.constants, BLOCK_PATTERNS, of 1.24 and of 2.3.
OPTIMUM_BLOCK_PATHS = ("transformer.h", "model.decoder.layers", "gpt_neox.layers", "model.layers")


@dataclass(frozen=True, kw_only=True)
class FitProblem:
    """A parameter that does not fit the linears of a model: what is wrong, and what would fit ("" where unknown)."""

    parameter: Literal["bits", "group_size"]
    message: str
    hint: str = ""


def fit_problems(
    architecture: Architecture, *, bits: int | None = None, group_size: int | None = None
) -> Iterator[FitProblem]:
    """Yield which of the given parameters of a variant do not fit a model.

    group_size must divide the in_features of every linear; in_features and out_features values of `bits` bits must
    fill whole 32-bit words, as qweight packs rows and qzeros packs columns.
    """
    linears = architecture.example_linears
    if group_size is not None and (message := _group_size_message(group_size, linears)):
        yield FitProblem(parameter="group_size", message=message, hint=_fitting(linears))
    if bits is not None and (message := _bits_message(bits, linears)):
        yield FitProblem(parameter="bits", message=message)


def length_problem(architecture: Architecture, key: str, seq_len: int) -> str:
    """Return why token rows of `seq_len`, asked for by the recipe's `key`, are too long for a model, or ""."""
    limit = architecture.max_position_embeddings
    if limit is None or seq_len <= limit:
        return ""
    return f"{key} {seq_len} is more than the {limit} positions of the base model"


def _group_size_message(group_size: int, linears: Sequence[LinearSpec]) -> str:
    misfits: dict[int, list[str]] = {}
    for linear in linears:
        if group_size != -1 and linear.in_features % group_size:
            misfits.setdefault(linear.in_features, []).append(_short_name(linear))
    parts = [
        f"the {in_features} in_features of {', '.join(dict.fromkeys(names))}" for in_features, names in misfits.items()
    ]
    return f"group_size {group_size} does not divide {' and '.join(parts)}" if parts else ""


def _bits_message(bits: int, linears: Sequence[LinearSpec]) -> str:
    names = [
        _short_name(linear)
        for linear in linears
        if any(features * bits % WORD_BITS for features in (linear.in_features, linear.out_features))
    ]
    return f"{bits}-bit values of {', '.join(dict.fromkeys(names))} do not fill {WORD_BITS}-bit words" if names else ""


def _short_name(linear: LinearSpec) -> str:
    return linear.name.rpartition(".")[2]


def _fitting(linears: Sequence[LinearSpec]) -> str:
    common = math.gcd(*(linear.in_features for linear in linears))
    sizes = [str(8 << shift) for shift in range(8) if common % (8 << shift) == 0]
    return f"these fit every linear: {', '.join(['-1', *sizes])}"


def quantized_tensors(linear: LinearSpec, *, bits: int, group_size: int) -> tuple[TensorInfo, ...]:
    """Return the tensors that replace a linear's weight and bias; docs/reference/format.md describes each."""
    parts = _quantized_parts(linear.in_features, linear.out_features, linear.bias, bits, group_size)
    return tuple([TensorInfo(f"{linear.name}.{part}", dtype, shape) for part, dtype, shape in parts])


@lru_cache(maxsize=4096)  # a model has thousands of linears of few shapes
def _quantized_parts(
    rows: int, columns: int, bias: bool, bits: int, group_size: int
) -> tuple[tuple[str, str, tuple[int, ...]], ...]:
    """Return the last part of the name, the dtype and the shape of the tensors of a linear."""
    groups = num_groups(rows, group_size)
    return (
        ("qweight", "I32", (rows * bits // WORD_BITS, columns)),
        ("qzeros", "I32", (groups, columns * bits // WORD_BITS)),
        ("scales", "F16", (groups, columns)),
        ("g_idx", "I32", (rows,)),
        *((("bias", "F16", (columns,)),) if bias else ()),
    )


def checkpoint_tensors(architecture: Architecture, variant: Variant) -> tuple[TensorInfo, ...]:
    """Return every tensor of a variant's checkpoint in the base checkpoint's order.

    Linears become qweight, qzeros, scales, g_idx (and bias in F16 where the base has one); the rest keeps the base
    model's dtype; lm_head is not quantized.
    """
    linears = {linear.name: linear for linear in architecture.linears}
    tensors: list[TensorInfo] = []
    replaced = set()
    for tensor in architecture.tensors:
        module = tensor.name.rpartition(".")[0]
        if module not in linears:
            tensors.append(tensor)
        elif module not in replaced:
            replaced.add(module)
            tensors.extend(quantized_tensors(linears[module], bits=variant.bits, group_size=variant.group_size))
    return tuple(tensors)


def block_keys(architecture: Architecture) -> dict[str, object]:
    """Return the keys of quantization_config about the blocks: where they are, and what in them is not quantized.

    transformers looks for the blocks in the places that optimum knows; it reads any other from `block_name_to_quantize`
    (optimum.gptq.utils, `get_block_name_with_pattern`). The other keys are there only if linears are left:
    GPTQModel, vLLM and SGLang read `dynamic`, where "-:" before a regular expression of module names means "leave
    them", and SGLang asks for the name of what it computes as one linear; transformers and vLLM read
    `modules_in_block_to_quantize`, names of what is quantized.
    """
    keys: dict[str, object] = {}
    if architecture.blocks_path not in OPTIMUM_BLOCK_PATHS:
        keys["block_name_to_quantize"] = architecture.blocks_path
    left = _left(architecture)
    if left:
        path = re.escape(architecture.blocks_path)
        keys["dynamic"] = {
            rf"-:^{path}\.{_blocks_pattern(blocks, architecture.num_blocks)}\.{re.escape(module)}$": {}
            for module, blocks in left.items()
        }
        keys["modules_in_block_to_quantize"] = _quantized_names(architecture, left)
    return keys


def _left(architecture: Architecture) -> dict[str, list[int]]:
    """Return the blocks in which each module is not quantized; modules that runtimes fuse also by their one name."""
    left: dict[str, list[int]] = {}
    for kind in architecture.kinds:
        for module in kind.left:
            left.setdefault(module, []).extend(kind.blocks)
        for module in _fused(kind.left):
            left.setdefault(module, []).extend(kind.blocks)
    return left


def _fused(modules: Collection[str]) -> list[str]:
    """Return what runtimes call the linears that they compute as one, of those whose parts are all in `modules`."""
    parents = dict.fromkeys(module.rpartition(".")[0] for module in modules)
    return [
        f"{parent}.{name}"
        for parent in parents
        for name, parts in FUSED_LINEARS.items()
        if all(f"{parent}.{part}" in modules for part in parts)
    ]


def _quantized_names(architecture: Architecture, left: Iterable[str]) -> list[list[str]]:
    """Return names of the quantized linears: those inside a block, or full ones where a short one means too much.

    optimum takes every linear as quantized whose full name ends with one of the names (optimum.gptq.quantizer,
    `convert_model`); full names of linears end with no other.
    """
    groups = list(dict.fromkeys(group.modules for kind in architecture.kinds for group in kind.groups))
    kept = tuple(module for group in groups for module in group)
    if not any(f".{module}".endswith(kept) for module in left):
        return [list(group) for group in groups]
    path = architecture.blocks_path
    return [
        [f"{path}.{block}.{module}" for module in group.modules]
        for kind in architecture.kinds
        for block in kind.blocks
        for group in kind.groups
    ]


def _blocks_pattern(blocks: Sequence[int], num_blocks: int) -> str:
    if len(blocks) == num_blocks:
        return r"\d+"
    return f"(?:{'|'.join(map(str, sorted(blocks)))})"


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One weights file: its name, its tensors and its exact size, header included."""

    file_name: str
    tensors: tuple[TensorInfo, ...]
    size_bytes: int

    @cached_property
    def tensor_bytes(self) -> int:
        """Bytes of the tensors alone."""
        return sum([tensor.size_bytes for tensor in self.tensors])


def split_shards(tensors: Iterable[TensorInfo], max_shard_bytes: int, weights_name: str) -> tuple[Shard, ...]:
    """Distribute tensors over files of at most `max_shard_bytes`, in order, the tensors of one module together.

    Args:
        tensors: in the order of `checkpoint_tensors`; a module's tensors follow each other.
        max_shard_bytes: largest file, header included.
        weights_name: `model` gives model.safetensors, or model-00001-of-00003.safetensors and so on.

    Raises:
        PlanError: a module is larger than `max_shard_bytes`.
    """
    tensors = list(tensors)
    if _fit_surely(tensors, max_shard_bytes):
        return (_shard(_file_name(weights_name, 1, 1), tensors),)
    empty = filled = predicted_bytes(()) + 8
    longest_offsets = 2 * len(str(max_shard_bytes))
    parts: list[list[TensorInfo]] = [[]]
    for module, members in groupby(tensors, key=lambda tensor: tensor.name.rpartition(".")[0]):
        group = list(members)
        # A header entry has at most 50 characters besides name, shape and offsets: a file can only be smaller.
        entries = sum(50 + len(encode_basestring_ascii(t.name)) + len(str(t.shape)) + longest_offsets for t in group)
        needed = entries + sum(tensor.size_bytes for tensor in group)
        if empty + needed > max_shard_bytes:
            raise PlanError(
                f"{module or group[0].name} does not fit into one weights file",
                where="checkpoint.max_shard_bytes",
                why=f"its tensors need a file of {empty + needed} bytes, the limit is {max_shard_bytes}",
                hint="raise checkpoint.max_shard_bytes",
            )
        if filled + needed > max_shard_bytes:
            parts.append([])
            filled = empty
        parts[-1].extend(group)
        filled += needed
    return tuple(_shard(_file_name(weights_name, number, len(parts)), part) for number, part in enumerate(parts, 1))


def _fit_surely(tensors: Sequence[TensorInfo], max_shard_bytes: int) -> bool:
    """Return whether tensors fit into one file even if every name is escaped and all shapes are long; in a moment."""
    names = 12 * sum([len(tensor.name) for tensor in tensors])
    data = sum([tensor.size_bytes for tensor in tensors])
    return names + 1000 * (len(tensors) + 1) + data <= max_shard_bytes


def _shard(file_name: str, tensors: Sequence[TensorInfo]) -> Shard:
    return Shard(file_name=file_name, tensors=tuple(tensors), size_bytes=predicted_bytes(tensors))


def _file_name(weights_name: str, number: int, count: int) -> str:
    return f"{weights_name}.safetensors" if count == 1 else f"{weights_name}-{number:05d}-of-{count:05d}.safetensors"


def shard_index(shards: Sequence[Shard]) -> bytes:
    """Return the content of `<weights_name>.safetensors.index.json`: the total size and each tensor's file."""
    content = {
        "metadata": {"total_size": sum(tensor.size_bytes for shard in shards for tensor in shard.tensors)},
        "weight_map": {tensor.name: shard.file_name for shard in shards for tensor in shard.tensors},
    }
    return (json.dumps(content, indent=2, sort_keys=True) + "\n").encode()
