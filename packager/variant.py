"""The variant: one GPTQ permutation of a base model, named everywhere by its branch."""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any, Literal

MAIN = "main"
Bits = Literal[2, 3, 4, 8]
EngineName = Literal["native", "auto-gptq"]
# The order of columns, decision 22. GPTQ as published has none; AutoGPTQ's desc_act is full.
ActOrder = Literal["none", "group", "static", "full"]
# Whether smaller scales are tried per group, decision 26; "signed" tries negative ones too.
ScaleSearch = bool | Literal["signed"]
# The act order of a recipe that names none: static order has less error than none, and loads wherever none does.
DEFAULT_ACT_ORDERS: Mapping[EngineName, ActOrder] = {"native": "static", "auto-gptq": "none"}
# What quantizing may take, decision 33; "high" tunes each block after GPTQ.
Effort = Literal["standard", "high"]
# The act order that each value of desc_act asks for.
ACT_ORDER_OF_DESC_ACT: Mapping[bool, ActOrder] = {False: "none", True: "full"}
Layout = Literal["branches", "repos"]
MAX_REPOSITORY_NAME = 96  # on the Hub, without the namespace
# Parameters of which engine auto-gptq knows some values only, with these values.
AUTO_GPTQ_KNOWS: Mapping[str, tuple[object, ...]] = {
    "scale_search": (False,),
    "refine": (False,),
    "target_correction": (0,),
    "effort": ("standard",),
    "act_order": ("none", "static", "full"),
}

# What a conventional branch name says of the act order: True and False are desc_act, the others have no older name.
_NAMES_OF_ACT_ORDERS: Mapping[ActOrder, str] = {"none": "False", "group": "group", "static": "static", "full": "True"}
_CONVENTIONAL = re.compile(r"gptq-(\d{1,9})bit-(-?\d{1,9})g-actorder_(True|False|group|static)")
# The fields of a variant that a mix has, with their values where there is none.
_NO_MIX: Mapping[str, Any] = {"other_bits": (), "own_patterns": False, "mix": None, "linear_bits": ()}
_HEX = re.compile(r"[0-9a-f]{4,40}\Z")
_BRANCH = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}\Z")


@dataclass(frozen=True, kw_only=True)
class BitsMix:
    """What the bits of a variant's linears are chosen from: decision 34.

    Attributes:
        bits: the numbers of bits, rising.
        mean: the weights files are at most as large as if each linear had so many bits; between two of `bits`, too.
    """

    bits: tuple[Bits, ...]
    mean: float

    @property
    def below(self) -> Bits:
        """The most bits that all linears could have: what configs and the branch's name say."""
        return max(bits for bits in self.bits if bits <= self.mean)


@dataclass(frozen=True, kw_only=True)
class Variant:
    """The parameters that determine one branch's weights.

    Attributes:
        branch: the name of the Hub branch and of the folder, used in every log line.
        bits: bits per weight.
        group_size: columns that share a scale; -1 = the whole row.
        act_order: the order in which columns are quantized. none: as stored. full: by decreasing diag(H), groups cut in
            that order, so every column needs its group in g_idx. static: the same order, but groups of the stored
            columns, with grids that are fixed before any column is quantized. group: by decreasing diag(H) inside each
            group of the stored columns, the groups by their largest diag(H).
        sym: symmetric grid, zero at 2^(bits-1).
        damp_percent: fraction of mean(diag H) added to the diagonal.
        damp_percent_limit: how far damping may be raised when a factorisation fails.
        true_sequential: each linear sees inputs made by the already quantized ones before it.
        scale_search: try smaller scales per group and keep the one with the least weighted squared error; "signed":
            negative ones too, of a symmetric grid.
        refine: after the last column, refit scales and choose integers again, from the last column to the first.
        target_correction: how much of what the quantized linears before a linear did to its inputs its weights make up
            for before they are quantized, 0 to 1.
        effort: "high" tunes the integers and scales of a block's linears together when all are quantized, so that its
            outputs come nearer to those of the original block.
        engine: what quantizes it; auto-gptq knows neither scale_search, refine, target_correction, effort nor act order
            group, nor damp_percent_limit.
        other_bits: the bits that single linears have, or may have, instead of `bits`, as `dynamic` says.
        own_patterns: whether the patterns of `dynamic` are those that we write, and so fit the names that runtimes look
            for.
        mix: what the bits of the linears are chosen from; None where all linears have `bits`, and for a checkpoint that
            was not built from a recipe.
        linear_bits: the bits of each linear by its stored name, of a mix; () before they are chosen.
    """

    branch: str
    bits: Bits
    group_size: int
    act_order: ActOrder
    sym: bool
    damp_percent: float
    damp_percent_limit: float
    true_sequential: bool
    scale_search: ScaleSearch
    refine: bool
    effort: Effort
    engine: EngineName
    target_correction: float = 0.0
    other_bits: tuple[Bits, ...] = ()
    own_patterns: bool = False
    mix: BitsMix | None = None
    linear_bits: tuple[tuple[str, Bits], ...] = ()

    @property
    def all_bits(self) -> tuple[Bits, ...]:
        """The bits of all linears, each number once, rising; of a mix, those that they may have."""
        return tuple(sorted({self.bits, *self.other_bits}))

    @property
    def desc_act(self) -> bool:
        """Whether groups are scattered, as the configs say it to runtimes: g_idx is not column // group_size."""
        return self.act_order == "full"

    @cached_property
    def _bits_by_linear(self) -> Mapping[str, Bits]:
        return dict(self.linear_bits)

    def bits_of(self, linear: str) -> Bits:
        """Return the bits of a linear, by its stored name; of a mix they are chosen before."""
        return self._bits_by_linear[linear] if self.mix is not None else self.bits

    def of_width(self, bits: Bits) -> "Variant":
        """Return the variant whose linears all have a number of bits of the mix, and else the same parameters.

        No branch can have its name.
        """
        return replace(self, branch=f"{self.branch} at {bits} bits", bits=bits, **_NO_MIX)

    def parameters(self) -> dict[str, bool | int | float | str]:
        """Return every parameter but the branch, and desc_act, ready for JSON; those of a correction or a mix if any.

        So the digests and records of variants without them are those of before there were any.
        """
        left_out = {"branch", *_NO_MIX, *(() if self.target_correction else ("target_correction",))}
        found = {key: value for key, value in asdict(self).items() if key not in left_out}
        if self.mix is not None:
            found |= {"mix_bits": ", ".join(map(str, self.mix.bits)), "mix_mean": self.mix.mean}
        return found | {"desc_act": self.desc_act}


def branch_name(*, bits: int, group_size: int, act_order: ActOrder) -> str:
    """Return the default branch of a permutation: `gptq-4bit-32g-actorder_True` for full order, by convention."""
    return f"gptq-{bits}bit-{group_size}g-actorder_{_NAMES_OF_ACT_ORDERS[act_order]}"


def parsed_branch_name(branch: str) -> tuple[int, int, ActOrder] | None:
    """Return bits, group_size and act_order of a name that `branch_name` made, None for any other name."""
    found = _CONVENTIONAL.fullmatch(branch)
    if found is None:
        return None
    act_order = next(order for order, name in _NAMES_OF_ACT_ORDERS.items() if name == found[3])
    return int(found[1]), int(found[2]), act_order


def recorded_act_order(parameters: Mapping[str, object]) -> object:
    """Return the act order of a record's parameters; earlier records have desc_act alone, as their branch's name."""
    desc_act = parameters.get("desc_act")
    older = ACT_ORDER_OF_DESC_ACT[desc_act] if isinstance(desc_act, bool) else None
    return parameters.get("act_order", older)


def branch_problem(branch: str, *, noun: str = "branch") -> str:
    """Return why the name of a branch, or of another `noun`, cannot be used on the Hub, or "" when it can.

    The Hub answers 404 to names with a slash and reads a hex-like name as an abbreviated commit.
    """
    if not _BRANCH.match(branch):
        return f"a {noun} has 1 to 100 letters, digits, '.', '_' or '-' and no '/'"
    if branch.endswith((".lock", ".")) or ".." in branch:
        return "git refuses names that end in '.lock' or '.' or contain '..'"
    if _HEX.match(branch):
        return "it reads as an abbreviated commit"
    return ""


@dataclass(frozen=True, kw_only=True)
class Place:
    """The repository and branch that a variant is published to.

    Attributes:
        repository: namespace/name.
        revision: the branch there.
    """

    repository: str
    revision: str


def place_of(repository: str, layout: Layout, branch: str) -> Place:
    """Return where the variant `branch` of a recipe is published.

    Args:
        repository: the recipe's, namespace/name.
        layout: "branches" keeps all variants in that repository. "repos" gives each its own: `main` keeps the name,
            every other variant appends its branch.
        branch: the variant.
    """
    if layout == "branches":
        return Place(repository=repository, revision=branch)
    return Place(repository=repository if branch == MAIN else f"{repository}-{branch}", revision=MAIN)


def num_groups(in_features: int, group_size: int) -> int:
    """Return how many groups a row of `in_features` columns has."""
    return 1 if group_size == -1 else -(-in_features // group_size)
