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
from typing import Literal

from packager.errors import PlanError
from packager.model.architecture import Architecture, LinearSpec
from packager.model.lock import LockedLinear
from packager.model.runtime_architectures import FUSED_LINEARS
from packager.model.safetensors_file import TensorInfo, file_bytes
from packager.model.tensor_tree import Subtree, TensorTree, ascii_bytes, predicted_bytes
from packager.variant import Variant, num_groups

# The parameters that AutoGPTQ <= 0.3.2 accepts in quantize_config.json; it raises TypeError on any other key.
PORTABLE_PARAMETERS = ("bits", "group_size", "damp_percent", "desc_act", "sym", "true_sequential")
PORTABLE_KEYS = (*PORTABLE_PARAMETERS, "model_name_or_path", "model_file_base_name")
WORD_BITS = 32
# What is read of a branch at most, by all that reads one; `plan` refuses a model whose branches would have more.
# Kimi K2 (10^12 parameters, 384 experts) has 67,304 linears and 269,579 tensors: headers of 33 MB, an index of 25 MB
# and a record of 13 MB, of 23 MB with a refinement and effort.
MOST_TENSORS = 400_000
MOST_LINEARS = 80_000
MOST_HEADERS_BYTES = 64_000_000
MOST_INDEX_BYTES = 64_000_000
MOST_RECORD_BYTES = 32_000_000
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


def count_problem(architecture: Architecture) -> str:
    """Return why a branch of a model would hold more than is read of one, or ""."""
    linears = sum(len(kind.blocks) * len(group.modules) for kind in architecture.kinds for group in kind.groups)
    tensors = len(architecture.tree) + 3 * linears  # four for each weight
    if linears <= MOST_LINEARS and tensors <= MOST_TENSORS:
        return ""
    return (
        f"a branch would hold {linears:,} quantized linears and {tensors:,} tensors; "
        f"its checks read {MOST_LINEARS:,} and {MOST_TENSORS:,} at most"
    )


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
def _quantized_parts(rows: int, columns: int, bias: bool, bits: int, group_size: int) -> tuple[TensorInfo, ...]:
    """Return the tensors of a linear by the last part of their names."""
    groups = num_groups(rows, group_size)
    return (
        TensorInfo("qweight", "I32", (rows * bits // WORD_BITS, columns)),
        TensorInfo("qzeros", "I32", (groups, columns * bits // WORD_BITS)),
        TensorInfo("scales", "F16", (groups, columns)),
        TensorInfo("g_idx", "I32", (rows,)),
        *((TensorInfo("bias", "F16", (columns,)),) if bias else ()),
    )


def checkpoint_tensors(architecture: Architecture, variant: Variant) -> TensorTree:
    """Return every tensor of a variant's checkpoint in the base checkpoint's order.

    Linears become qweight, qzeros, scales, g_idx (and bias in F16 where the base has one); the rest keeps the base
    model's dtype; lm_head is not quantized. Of a mix, the bits of each linear are chosen before.
    """
    if variant.mix is not None:
        return _with_own_bits(architecture.tree, "", variant)
    made: dict[int, TensorTree] = {}

    def quantized(tree: TensorTree) -> TensorTree:
        if id(tree) not in made:  # a subtree stands for all that are alike
            members = (
                Subtree(each.name, quantized(each.tree)) if isinstance(each, Subtree) else each for each in tree.members
            )
            made[id(tree)] = TensorTree(_replaced(members, tree.linear, variant.bits, variant.group_size))
        return made[id(tree)]

    return quantized(architecture.tree)


def _with_own_bits(tree: TensorTree, path: str, variant: Variant) -> TensorTree:
    """Return what is stored instead of the tensors below a path, by the bits of each linear."""
    members = [
        Subtree(each.name, _with_own_bits(each.tree, f"{path}.{each.name}".removeprefix("."), variant))
        if isinstance(each, Subtree)
        else each
        for each in tree.members
    ]
    bits = variant.bits if tree.linear is None else variant.bits_of(path)
    return TensorTree(_replaced(members, tree.linear, bits, variant.group_size))


def _replaced(
    members: Iterable[TensorInfo | Subtree], linear: LockedLinear | None, bits: int, group_size: int
) -> tuple[TensorInfo | Subtree, ...]:
    """Return what is stored instead of a linear's tensors, in the place of the first one; all else as it is."""
    if linear is None:
        return tuple(members)
    found: list[TensorInfo | Subtree] = []
    size = linear.in_features, linear.out_features, linear.bias
    parts = _quantized_parts(*size, bits, group_size)
    for member in members:
        if isinstance(member, Subtree):
            found.append(member)
        else:
            found += parts
            parts = ()
    return tuple(found)


def block_keys(architecture: Architecture, variant: Variant | None = None) -> dict[str, object]:
    """Return the keys of quantization_config about the blocks: where they are, what in them is not quantized or mixed.

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
    path = re.escape(architecture.blocks_path)
    dynamic: dict[str, object] = {
        rf"-:^{path}\.{_blocks_pattern(blocks, architecture.num_blocks)}\.{re.escape(module)}$": {}
        for module, blocks in left.items()
    }
    if variant is not None and variant.mix is not None:
        dynamic |= bits_patterns(architecture, variant)
    if dynamic:
        keys["dynamic"] = dynamic
    if left:
        keys["modules_in_block_to_quantize"] = _quantized_names(architecture, left)
    return keys


def bits_patterns(architecture: Architecture, variant: Variant) -> dict[str, object]:
    """Return the entries of `dynamic` that give linears other bits than the variant's, of a mix whose bits are chosen.

    GPTQModel looks for the name of a linear, vLLM and SGLang for that of what they compute as one (`FUSED_LINEARS`),
    the model builder of onnxruntime-genai for names of tensors; all of them match from the name's beginning. So a
    pattern has all names of linears that see the same input, and ends where the name does or a dot follows. Sources:
    gptqmodel.quantization.config, `dynamic_get`; vllm.model_executor.layers.quantization.utils.gptq_utils and
    sglang.srt.layers.quantization.utils, `get_dynamic_override`; onnxruntime_genai.models.loaders.gptq,
    `get_overrides`.
    """
    blocks: dict[tuple[int, tuple[str, ...]], list[int]] = {}
    names = {(linear.block, linear.module): linear.name for linear in architecture.linears}
    for kind in architecture.kinds:
        for block in kind.blocks:
            for group in kind.groups:
                bits = variant.bits_of(names[block, group.modules[0]])
                if bits != variant.bits:
                    blocks.setdefault((bits, group.modules), []).append(block)
    path = re.escape(architecture.blocks_path)
    return {
        rf"+:^{path}\.{_blocks_pattern(found, architecture.num_blocks)}\.{_modules_pattern(modules)}(?:\.|$)": {
            "bits": bits
        }
        for (bits, modules), found in blocks.items()
    }


def _modules_pattern(modules: Sequence[str]) -> str:
    names = [re.escape(name) for name in (*modules, *_fused(modules))]
    return names[0] if len(names) == 1 else f"(?:{'|'.join(names)})"


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
    tree: TensorTree
    size_bytes: int

    @cached_property
    def tensors(self) -> tuple[TensorInfo, ...]:
        """The tensors in the base checkpoint's order."""
        return tuple(self.tree)

    @property
    def tensor_bytes(self) -> int:
        """Bytes of the tensors alone."""
        return self.tree.size_bytes


def split_shards(tree: TensorTree, max_shard_bytes: int, weights_name: str) -> tuple[Shard, ...]:
    """Distribute tensors over files of at most `max_shard_bytes`, in order, the tensors of one module together.

    Args:
        tree: of `checkpoint_tensors`.
        max_shard_bytes: largest file, header included.
        weights_name: `model` gives model.safetensors, or model-00001-of-00003.safetensors and so on.

    Raises:
        PlanError: a module is larger than `max_shard_bytes`.
    """
    parts = _Splitter(max_shard_bytes).split(tree, "")
    return tuple(
        Shard(file_name=_file_name(weights_name, number, len(parts)), tree=part, size_bytes=predicted_bytes(part))
        for number, part in enumerate(parts, 1)
    )


class _Splitter:
    """Fills one file after the other; a tree that fits into the rest of a file is not looked into."""

    def __init__(self, max_shard_bytes: int) -> None:
        self._limit = max_shard_bytes
        self._longest_offsets = 2 * len(str(max_shard_bytes))
        self._empty = self._filled = file_bytes(0, 0) + 8

    def split(self, tree: TensorTree, prefix: str) -> list[TensorTree]:
        """Return the part that goes into the present file, which may be empty, and that of each further file."""
        needed = self._needed(tree, prefix)
        if self._filled + needed <= self._limit:
            self._filled += needed
            return [tree]
        parts: list[list[TensorInfo | Subtree]] = [[]]
        for is_module, members in groupby(tree.members, key=lambda member: isinstance(member, TensorInfo)):
            if is_module:
                module = TensorTree(tuple(members))
                if not self._add(module, prefix):
                    parts.append([])
                parts[-1] += module.members
                continue
            for member in members:
                assert isinstance(member, Subtree)  # noqa: S101 - not a tensor
                here, *further = self.split(member.tree, f"{prefix}{member.name}.")
                parts[-1] += [Subtree(member.name, here)] if here.members else []
                parts += [[Subtree(member.name, part)] for part in further]
        return [TensorTree(tuple(part)) for part in parts]

    def _add(self, module: TensorTree, prefix: str) -> bool:
        """Add the tensors of a module to the present file, or begin another one and return False.

        Raises:
            PlanError: they do not fit into any file.
        """
        needed = self._needed(module, prefix)
        if self._empty + needed > self._limit:
            raise PlanError(
                f"{prefix[:-1] or module.members[0].name} does not fit into one weights file",
                where="checkpoint.max_shard_bytes",
                why=f"its tensors need a file of {self._empty + needed} bytes, the limit is {self._limit}",
                hint="raise checkpoint.max_shard_bytes",
            )
        fits = self._filled + needed <= self._limit
        self._filled = needed + (self._filled if fits else self._empty)
        return fits

    def _needed(self, tree: TensorTree, prefix: str) -> int:
        """Return the bytes that tensors need of a file at most."""
        return tree.totals.most_bytes + len(tree) * (ascii_bytes(prefix) + self._longest_offsets)


def _file_name(weights_name: str, number: int, count: int) -> str:
    return f"{weights_name}.safetensors" if count == 1 else f"{weights_name}-{number:05d}-of-{count:05d}.safetensors"


def shard_index(shards: Sequence[Shard]) -> bytes:
    """Return the content of `<weights_name>.safetensors.index.json`: the total size and each tensor's file."""
    content = {
        "metadata": {"total_size": sum(shard.tensor_bytes for shard in shards)},
        "weight_map": {tensor.name: shard.file_name for shard in shards for tensor in shard.tensors},
    }
    return (json.dumps(content, indent=2, sort_keys=True) + "\n").encode()
