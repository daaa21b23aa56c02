"""A decoder model's tensors, blocks and linears, as its lock describes them. No torch here: `plan` must stay fast."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import cache, cached_property

from packager.errors import PlanError
from packager.model.config_values import READ_KEYS, ConfigReader, text_part
from packager.model.group_widths import GroupWidths
from packager.model.lock import LockedCache, LockedGroup, LockedModel, LockedTensors
from packager.model.name_patterns import names_of, read_numbers, write_numbers
from packager.model.safetensors_file import DTYPE_BYTES, TensorInfo
from packager.model.tensor_tree import LinearNames, TensorTree, tensor_tree
from packager.model.unmerged_experts import unmerged

# Buffers that old checkpoints store and every runtime computes itself; a quantized branch leaves them out.
IGNORED_SUFFIXES = (".rotary_emb.inv_freq",)

_TOO_MANY_BYTES = 1 << 60


@dataclass(frozen=True, kw_only=True)
class LinearSpec:
    """One weight matrix [out_features, in_features] of a block.

    Attributes:
        name: under which it is stored, such as `model.layers.3.self_attn.q_proj`.
        block: the block's number.
        module: its name inside the block, as transformers builds the model; an expert's has the expert's number.
        parameter: for an expert's linear, the parameter of the block that holds those of all experts; else "".
    """

    name: str
    block: int
    module: str
    in_features: int
    out_features: int
    bias: bool
    parameter: str = ""


@dataclass(frozen=True, kw_only=True)
class BlockKind:
    """Blocks that are alike.

    Attributes:
        blocks: their numbers.
        groups: of linears that are quantized.
        left: weights that are not quantized, by module, with the reason.
        weight_elements: of one block.
        peak_bytes: activations of one token that are alive at most inside the block, in a dtype of two bytes.
        peak_bytes_per_pair: likewise, for each pair of tokens of a row.
    """

    blocks: tuple[int, ...]
    groups: tuple[LockedGroup, ...]
    left: Mapping[str, str]
    weight_elements: int
    peak_bytes: int
    peak_bytes_per_pair: int


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A decoder model's shapes.

    Attributes:
        config: the base model's config.json.
        resolved: what transformers takes for keys that it leaves out, see `text_config`.
        model_type: as config.json spells it.
        model_class: of transformers.
        blocks_path: the module that holds the blocks, as transformers builds the model.
        kinds: of blocks.
        num_blocks: of all kinds.
        kv_bytes_per_token: what the model caches of one token, in a dtype of two bytes.
        kv_cache: which tokens it keeps; None where an older lock does not say it.
        tied, own: names of tensors that are another tensor, and of those that only config.json calls so.
        stored: the tensors of the base checkpoint.
    """

    config: Mapping[str, object]
    resolved: Mapping[str, object]
    model_type: str
    model_class: str
    blocks_path: str
    kinds: tuple[BlockKind, ...]
    num_blocks: int
    hidden_size: int
    vocab_size: int
    kv_bytes_per_token: int
    kv_cache: LockedCache | None
    tied: tuple[str, ...]
    own: tuple[str, ...]
    stored: tuple[LockedTensors, ...]

    @cached_property
    def tree(self) -> TensorTree:
        """The tensors of the base checkpoint by the names of a branch, and of which quantized linears they are.

        The names are the base checkpoint's, but for quantized experts that it stores as one tensor: see `unmerged`.

        Raises:
            ValueError: tensors and linears contradict each other.
        """
        stored = unmerged(self.stored, ((group, kind.blocks) for kind in self.kinds for group in kind.groups))
        return tensor_tree(stored, (names for kind in self.kinds for names in _stored_linears(kind)))

    @cached_property
    def tensors(self) -> tuple[TensorInfo, ...]:
        """Every tensor of `tree`, which takes less time and memory."""
        return tuple(self.tree)

    @cached_property
    def base_tree(self) -> TensorTree:
        """The tensors of the base checkpoint by its own names."""
        return tensor_tree(self.stored)

    @cached_property
    def linears(self) -> tuple[LinearSpec, ...]:
        """Every linear that is quantized, block by block, in the order in which the block reaches them."""
        found = (linear for kind in self.kinds for block in kind.blocks for linear in _linears(kind, block))
        return tuple(sorted(found, key=lambda linear: linear.block))

    @property
    def linear_names(self) -> list[str]:
        """The stored names of `linears`, which are not made."""
        names = {
            kind.blocks: [
                linear.stored.replace("{expert}", expert)
                for group in kind.groups
                for expert in group.numbers
                for linear in group.linears
            ]
            for kind in self.kinds
        }
        blocks = sorted((block, kind.blocks) for kind in self.kinds for block in kind.blocks)
        return [name.replace("{block}", str(block)) for block, kind in blocks for name in names[kind]]

    @cached_property
    def text_config(self) -> Mapping[str, object]:
        """The part of config.json about the language model, with what transformers takes for keys that it lacks."""
        return {**text_part(self.config), **self.resolved}

    @property
    def max_position_embeddings(self) -> int | None:
        """The longest row, under one of the names that configs have for it; None for a model without a limit."""
        values = (self.text_config.get(name) for name in READ_KEYS["max_position_embeddings"])
        found = (value for value in values if isinstance(value, int) and not isinstance(value, bool) and value > 0)
        return next(found, None)

    @property
    def ties_tensors(self) -> bool:
        """Whether a tensor is another tensor: mostly the output head is the embedding."""
        return bool(self.tied)

    @property
    def merges_experts(self) -> bool:
        """Whether the base checkpoint stores quantized experts of a layer as one tensor."""
        return any(group.experts and group.experts.stored for kind in self.kinds for group in kind.groups)

    @property
    def rope_type(self) -> str:
        """The rotary embedding's type: "default", "llama3", "yarn", ..."""
        return ConfigReader(self.text_config).rope_type()

    @property
    def scaled_rope(self) -> bool:
        """Whether the rotary embedding is of another type than the plain one."""
        return self.rope_type != "default"

    @property
    def sliding_window(self) -> int | None:
        """As `text_config` gives it, whether the family uses it or not; None where it can never matter."""
        return ConfigReader(self.text_config).sliding_window()

    @property
    def head_dim_is_derived(self) -> bool:
        """Whether head_dim is hidden_size / num_attention_heads, as runtimes of 2023 assume."""
        head_dim, heads = self.text_config.get("head_dim"), self.text_config.get("num_attention_heads")
        return head_dim is None or (isinstance(heads, int) and head_dim == self.hidden_size / heads)

    @property
    def dtype(self) -> str:
        """The dtype of most bytes of the base checkpoint, safetensors spelling: F16, BF16 or F32."""
        data = self.tree.totals.data
        return max((tensors.dtype for tensors in self.stored), key=lambda dtype: data[dtype][1])

    @property
    def num_parameters(self) -> int:
        """Parameters, a tied embedding counted once."""
        return self.tree.totals.elements

    @property
    def base_bytes(self) -> int:
        """Bytes of all tensors of the base checkpoint."""
        return self.tree.size_bytes

    def cache_bytes(self, num_tokens: int) -> int:
        """Return what the model caches of a row of tokens, in a dtype of two bytes; with `kv_cache` None, at most."""
        known = self.kv_cache or LockedCache()
        beyond = sum(each.bytes_per_token * max(0, num_tokens - each.tokens) for each in known.windows)
        return known.state_bytes + num_tokens * self.kv_bytes_per_token - beyond

    @cached_property
    def example_linears(self) -> tuple[LinearSpec, ...]:
        """The linears of one block of each kind, and of the first of its experts."""
        kinds = sorted(self.kinds, key=lambda kind: kind.blocks[0])
        return tuple(linear for kind in kinds for linear in _linears(kind, kind.blocks[0], experts=1))

    @property
    def largest_tensor_bytes(self) -> int:
        """Bytes of the largest tensor of the base checkpoint."""
        return max(map(_size_bytes, self.stored))

    @cached_property
    def group_sizes(self) -> tuple[GroupWidths, ...]:
        """The different sizes of groups; a block of 128 experts has many groups of few sizes."""
        groups = (group for kind in self.kinds for group in kind.groups)
        return tuple(dict.fromkeys(map(GroupWidths.of, groups)))

    @property
    def group_shapes(self) -> tuple[tuple[int, int, int], ...]:
        """The different shapes of groups: in_features, the sum of the out_features, and the number of experts or 0."""
        groups = (group for kind in self.kinds for group in kind.groups)
        return tuple(
            dict.fromkeys((g.in_features, g.out_features, g.experts.count if g.experts else 0) for g in groups)
        )

    @property
    def blocks_prefix(self) -> str:
        """What the stored names of all linears begin with, before the number of the block; "" without a linear."""
        first = next(iter(self.example_linears), None)
        return first.name.partition(f".{first.block}.")[0] if first is not None else ""

    @property
    def left(self) -> Mapping[str, str]:
        """Why modules of the blocks are not quantized, by module."""
        return {module: reason for kind in self.kinds for module, reason in kind.left.items()}

    def leaving(self, patterns: Sequence[str]) -> "Architecture":
        """Return the architecture with linears left unquantized whose name inside the block fits a pattern.

        Args:
            patterns: `*` stands for anything, dots included. Experts are left if patterns fit their module, or all of
                their linears; they are quantized together, so patterns that fit some of them leave none.
        """
        if not patterns:
            return self

        @cache  # the same few names in every block
        def reason(module: str) -> str:
            fitting = next((pattern for pattern in patterns if fnmatchcase(module, pattern)), None)
            return "" if fitting is None else f"the recipe skips {fitting}"

        return replace(self, kinds=tuple(_leaving(kind, reason) for kind in self.kinds))

    def kind_of(self, block: int) -> BlockKind:
        """Return the kind of a block."""
        return next(kind for kind in self.kinds if block in kind.blocks)


def architecture_of(locked: LockedModel, where: str) -> Architecture:
    """Return the architecture that a lock describes.

    Args:
        locked: the lock's part about the model.
        where: the lock's file, for messages.

    Raises:
        PlanError: the lock contradicts itself.
    """
    kinds = tuple(
        BlockKind(
            blocks=read_numbers(kind.blocks),
            groups=kind.groups,
            left=kind.left,
            weight_elements=kind.weight_elements,
            peak_bytes=kind.peak_bytes,
            peak_bytes_per_pair=kind.peak_bytes_per_pair,
        )
        for kind in locked.kinds
    )
    model_type = locked.config.get("model_type")
    architecture = Architecture(
        config=locked.config,
        resolved=locked.resolved or {},
        model_type=model_type if isinstance(model_type, str) else locked.model_class,
        model_class=locked.model_class,
        blocks_path=locked.blocks_path,
        kinds=kinds,
        num_blocks=sum(len(kind.blocks) for kind in kinds),
        hidden_size=locked.hidden_size,
        vocab_size=locked.vocab_size,
        kv_bytes_per_token=locked.kv_bytes_per_token,
        kv_cache=locked.kv_cache,
        tied=locked.tied,
        own=locked.own,
        stored=locked.tensors,
    )
    try:
        _check(architecture)
    except ValueError as error:
        raise PlanError(
            "the lock contradicts itself", where=where, why=str(error), hint="make it anew: packager lock"
        ) from error
    return architecture


def _linears(kind: BlockKind, block: int, *, experts: int | None = None) -> Iterator[LinearSpec]:
    """Yield the linears of a block; `experts` limits those of whose experts there are any."""
    for group in kind.groups:
        for expert in group.numbers[:experts]:
            for linear in group.linears:
                yield LinearSpec(
                    name=linear.stored.replace("{block}", str(block)).replace("{expert}", expert),
                    block=block,
                    module=linear.module.replace("{expert}", expert),
                    in_features=linear.in_features,
                    out_features=linear.out_features,
                    bias=linear.bias,
                    parameter=group.experts.parameter if group.experts is not None else "",
                )


def _stored_linears(kind: BlockKind) -> Iterator[LinearNames]:
    """Yield each linear of a kind with the pattern of its stored names.

    Raises:
        ValueError: these are not the names of one linear in each block.
    """
    for group in kind.groups:
        experts = write_numbers(range(len(group.numbers)))
        for linear in group.linears:
            rest = linear.stored.replace("{block}", "", 1).replace("{expert}", "", 1)
            if "{" in rest or "}" in rest:
                raise ValueError(f"{linear.stored!r} has a brace besides those of {{block}} and {{expert}}")
            if "{block}" not in linear.stored and len(kind.blocks) > 1:
                raise ValueError("a linear is there twice")
            names = linear.stored.replace("{block}", f"{{{write_numbers(kind.blocks)}}}")
            yield LinearNames(linear, names.replace("{expert}", f"{{{experts}}}"))


def _leaving(kind: BlockKind, reason: Callable[[str], str]) -> BlockKind:
    groups, left = [], dict(kind.left)
    for group in kind.groups:
        if group.experts is not None:
            if skipped := reason(group.unit) or _reason_of_experts(kind, group.unit, reason):
                left[group.unit] = skipped
            else:
                groups.append(group)
            continue
        kept = tuple(linear for linear in group.linears if not reason(linear.module))
        left |= {linear.module: reason(linear.module) for linear in group.linears if reason(linear.module)}
        if kept:
            groups.append(group.model_copy(update={"linears": kept}))
    return replace(kind, groups=tuple(groups), left=left)


def _reason_of_experts(kind: BlockKind, unit: str, reason: Callable[[str], str]) -> str:
    """Return why the experts of a module are left, if each of their linears is; else ""."""
    reasons = [reason(module) for group in kind.groups if group.unit == unit for module in group.modules]
    return reasons[0] if all(reasons) else ""


def _check(architecture: Architecture) -> None:
    """Raise ValueError for what would make the plan wrong."""
    unknown = next((tensors.dtype for tensors in architecture.stored if tensors.dtype not in DTYPE_BYTES), None)
    if unknown is not None:
        raise ValueError(f"{unknown!r} is no dtype of safetensors")
    tree = architecture.tree
    largest = max(architecture.stored, key=_size_bytes)
    if _size_bytes(largest) >= _TOO_MANY_BYTES:
        raise ValueError(f"{next(names_of(largest.names))} is larger than any file")
    if (tied := next((name for name in architecture.tied if name in tree), None)) is not None:
        raise ValueError(f"{tied} is tied to another tensor, and a tensor of its own")


def _size_bytes(tensors: LockedTensors) -> int:
    """Return the bytes of one of the tensors."""
    return math.prod(tensors.shape) * DTYPE_BYTES[tensors.dtype]
