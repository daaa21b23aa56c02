"""A decoder model's tensors, blocks and linears, as its lock describes them. No torch here: `plan` must stay fast."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import cache, cached_property
from itertools import islice
from typing import NamedTuple, TypeVar

from packager.errors import PlanError
from packager.model.config_values import ConfigReader
from packager.model.lock import LockedExperts, LockedGroup, LockedKind, LockedModel
from packager.model.name_patterns import MOST_NAMES, names_of, natural_key, read_numbers
from packager.model.safetensors_file import DTYPE_BYTES, TensorInfo

# Buffers that old checkpoints store and every runtime computes itself; a quantized branch leaves them out.
IGNORED_SUFFIXES = (".rotary_emb.inv_freq",)

_TOO_MANY_BYTES = 1 << 60
_Item = TypeVar("_Item")


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


class GroupWidths(NamedTuple):
    """What the memory of calibrating a group depends on, see `GroupSpec`."""

    in_features: int
    out_features: int
    held_bytes: int
    held_bytes_per_pair: int
    experts: LockedExperts | None


@dataclass(frozen=True, kw_only=True)
class GroupSpec:
    """Linears of a block that see the same input, and so one Hessian; or those of every expert of a layer.

    Attributes:
        modules: their names inside the block; of experts, those of the first expert, then of the next.
        in_features: of each of them.
        out_features: of all of them together; of experts, of one expert.
        held_bytes: activations of one token, without the block's input, that are alive when the block reaches them, in
            a dtype of two bytes.
        held_bytes_per_pair: likewise, for each pair of tokens of a row.
    """

    modules: tuple[str, ...]
    in_features: int
    out_features: int
    held_bytes: int
    held_bytes_per_pair: int
    experts: LockedExperts | None = None

    @property
    def unit(self) -> str:
        """What a recipe skips as a whole: the module of the experts; "" for linears, which are skipped one by one."""
        return self.experts.parameter.rpartition(".")[0] if self.experts is not None else ""


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
    groups: tuple[GroupSpec, ...]
    left: Mapping[str, str]
    weight_elements: int
    peak_bytes: int
    peak_bytes_per_pair: int


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A decoder model's shapes.

    Attributes:
        config: the base model's config.json.
        model_type: as config.json spells it.
        model_class: of transformers.
        blocks_path: the module that holds the blocks, as transformers builds the model.
        dtype: of most tensors of the base checkpoint, safetensors spelling: F16, BF16 or F32.
        kinds: of blocks.
        num_blocks: of all kinds.
        kv_bytes_per_token: what the model caches of one token, in a dtype of two bytes.
        tied, own: names of tensors that are another tensor, and of those that only config.json calls so.
        tensors: every tensor of the base checkpoint.
        linears: every linear that is quantized, block by block, in the order in which the block reaches them.
    """

    config: Mapping[str, object]
    model_type: str
    model_class: str
    blocks_path: str
    dtype: str
    kinds: tuple[BlockKind, ...]
    num_blocks: int
    hidden_size: int
    vocab_size: int
    kv_bytes_per_token: int
    tied: tuple[str, ...]
    own: tuple[str, ...]
    tensors: tuple[TensorInfo, ...]
    linears: tuple[LinearSpec, ...]

    @property
    def text_config(self) -> Mapping[str, object]:
        """The part of config.json about the language model."""
        text = self.config.get("text_config")
        return text if isinstance(text, Mapping) else self.config

    @property
    def max_position_embeddings(self) -> int | None:
        """The longest row, as config.json gives it under one of its names; None for a model without a limit."""
        names = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")
        values = (self.text_config.get(name) for name in names)
        found = (value for value in values if isinstance(value, int) and not isinstance(value, bool) and value > 0)
        return next(found, None)

    @property
    def ties_tensors(self) -> bool:
        """Whether a tensor is another tensor: mostly the output head is the embedding."""
        return bool(self.tied)

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
        """As in config.json, whether the family uses it or not; None where it can never matter."""
        return ConfigReader(self.text_config).sliding_window()

    @property
    def head_dim_is_derived(self) -> bool:
        """Whether head_dim is hidden_size / num_attention_heads, as runtimes of 2023 assume."""
        head_dim, heads = self.text_config.get("head_dim"), self.text_config.get("num_attention_heads")
        return head_dim is None or (isinstance(heads, int) and head_dim == self.hidden_size / heads)

    @property
    def num_parameters(self) -> int:
        """Parameters, a tied embedding counted once."""
        return sum(math.prod(tensor.shape) for tensor in self.tensors)

    @property
    def base_bytes(self) -> int:
        """Bytes of all tensors of the base checkpoint."""
        return sum(tensor.size_bytes for tensor in self.tensors)

    @cached_property
    def example_linears(self) -> tuple[LinearSpec, ...]:
        """The linears of one block of each kind."""
        examples = {kind.blocks[0] for kind in self.kinds}
        return tuple(linear for linear in self.linears if linear.block in examples)

    @cached_property
    def largest_tensor_bytes(self) -> int:
        """Bytes of the largest tensor of the base checkpoint."""
        return max(tensor.size_bytes for tensor in self.tensors)

    @cached_property
    def group_sizes(self) -> tuple[GroupWidths, ...]:
        """The different sizes of groups; a block of 128 experts has many groups of few sizes."""
        groups = (group for kind in self.kinds for group in kind.groups)
        return tuple(
            dict.fromkeys(
                GroupWidths(g.in_features, g.out_features, g.held_bytes, g.held_bytes_per_pair, g.experts)
                for g in groups
            )
        )

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
        return self.linears[0].name.partition(f".{self.linears[0].block}.")[0] if self.linears else ""

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

        kinds = tuple(_leaving(kind, self, reason) for kind in self.kinds)
        quantized = {
            block: modules
            for kind in kinds
            for modules in ({module for group in kind.groups for module in group.modules},)
            for block in kind.blocks
        }
        linears = tuple(linear for linear in self.linears if linear.module in quantized[linear.block])
        return replace(self, linears=linears, kinds=kinds)

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
    try:
        tensors = _all(
            TensorInfo(name=name, dtype=entry.dtype, shape=entry.shape)
            for entry in locked.tensors
            for name in names_of(entry.names)
        )
        linears = _all(linear for kind in locked.kinds for linear in _linears(kind))
        _check(locked, tensors, linears)
    except ValueError as error:
        raise PlanError(
            "the lock contradicts itself", where=where, why=str(error), hint="make it anew: packager lock"
        ) from error
    kinds = tuple(_kind(kind) for kind in locked.kinds)
    model_type = locked.config.get("model_type")
    return Architecture(
        config=locked.config,
        model_type=model_type if isinstance(model_type, str) else locked.model_class,
        model_class=locked.model_class,
        blocks_path=locked.blocks_path,
        dtype=_most_bytes(tensors),
        kinds=kinds,
        num_blocks=sum(len(kind.blocks) for kind in kinds),
        hidden_size=locked.hidden_size,
        vocab_size=locked.vocab_size,
        kv_bytes_per_token=locked.kv_bytes_per_token,
        tied=locked.tied,
        own=locked.own,
        tensors=tuple(sorted(tensors, key=lambda tensor: natural_key(tensor.name))),
        linears=tuple(sorted(linears, key=lambda linear: linear.block)),
    )


def _all(items: Iterable[_Item]) -> list[_Item]:
    """Return a list of at most `MOST_NAMES` items; a short lock can stand for more than the memory holds."""
    found = list(islice(items, MOST_NAMES + 1))
    if len(found) > MOST_NAMES:
        raise ValueError(f"it stands for more than {MOST_NAMES} tensors or linears")
    return found


def _linears(kind: LockedKind) -> Iterator[LinearSpec]:
    for block in read_numbers(kind.blocks):
        for group in kind.groups:
            for expert in _experts(group):
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


def _experts(group: LockedGroup) -> Iterable[str]:
    """Yield what {expert} stands for; "" once for a group of linears whose names do not hold it."""
    return ("",) if group.experts is None else map(str, range(group.experts.count))


def _kind(kind: LockedKind) -> BlockKind:
    return BlockKind(
        blocks=read_numbers(kind.blocks),
        groups=tuple(
            GroupSpec(
                modules=tuple(
                    linear.module.replace("{expert}", expert) for expert in _experts(group) for linear in group.linears
                ),
                experts=group.experts,
                in_features=group.linears[0].in_features,
                out_features=sum(linear.out_features for linear in group.linears),
                held_bytes=group.held_bytes,
                held_bytes_per_pair=group.held_bytes_per_pair,
            )
            for group in kind.groups
        ),
        left=kind.left,
        weight_elements=kind.weight_elements,
        peak_bytes=kind.peak_bytes,
        peak_bytes_per_pair=kind.peak_bytes_per_pair,
    )


def _leaving(kind: BlockKind, architecture: Architecture, reason: Callable[[str], str]) -> BlockKind:
    shapes = {linear.module: linear for linear in architecture.linears if linear.block == kind.blocks[0]}
    groups, left = [], dict(kind.left)
    for group in kind.groups:
        if group.experts is not None:
            if skipped := reason(group.unit) or _reason_of_experts(kind, group.unit, reason):
                left[group.unit] = skipped
            else:
                groups.append(group)
            continue
        kept = tuple(module for module in group.modules if not reason(module))
        left |= {module: reason(module) for module in group.modules if reason(module)}
        if kept:
            out_features = sum(shapes[module].out_features for module in kept)
            groups.append(replace(group, modules=kept, out_features=out_features))
    return replace(kind, groups=tuple(groups), left=left)


def _reason_of_experts(kind: BlockKind, unit: str, reason: Callable[[str], str]) -> str:
    """Return why the experts of a module are left, if each of their linears is; else ""."""
    reasons = [reason(module) for group in kind.groups if group.unit == unit for module in group.modules]
    return reasons[0] if all(reasons) else ""


def _check(locked: LockedModel, tensors: list[TensorInfo], linears: list[LinearSpec]) -> None:
    """Raise ValueError for what would make the plan wrong."""
    unknown = next((entry.dtype for entry in locked.tensors if entry.dtype not in DTYPE_BYTES), None)
    if unknown is not None:
        raise ValueError(f"{unknown!r} is no dtype of safetensors")
    largest = max(tensors, key=lambda tensor: tensor.size_bytes)
    if largest.size_bytes >= _TOO_MANY_BYTES:
        raise ValueError(f"{largest.name} is larger than any file")
    shapes = {tensor.name: sorted(tensor.shape) for tensor in tensors}
    if len(shapes) != len(tensors):
        raise ValueError("a tensor is there twice")
    if (tied := next((name for name in locked.tied if name in shapes), None)) is not None:
        raise ValueError(f"{tied} is tied to another tensor, and a tensor of its own")
    if len({linear.name for linear in linears}) != len(linears):
        raise ValueError("a linear is there twice")
    for linear in linears:
        # A Conv1D is stored as [in_features, out_features].
        if shapes.get(f"{linear.name}.weight") != sorted((linear.in_features, linear.out_features)):
            raise ValueError(f"{linear.name}.weight is not a tensor of its shape")
        if linear.bias != (f"{linear.name}.bias" in shapes):
            raise ValueError(f"{linear.name}.bias is there, or is not, against what the linear says")


def _most_bytes(tensors: list[TensorInfo]) -> str:
    """Return the dtype of the most bytes."""
    sizes: dict[str, int] = {}
    for tensor in tensors:
        sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.size_bytes
    return max(sizes, key=lambda dtype: sizes[dtype])
