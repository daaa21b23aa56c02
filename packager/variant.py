"""The variant: one GPTQ permutation of a base model, named everywhere by its branch."""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Literal

MAIN = "main"
Bits = Literal[2, 3, 4, 8]
EngineName = Literal["native", "auto-gptq"]
Layout = Literal["branches", "repos"]
MAX_REPOSITORY_NAME = 96  # on the Hub, without the namespace
# Parameters that only our own engine has, each with the value that switches it off.
NATIVE_ONLY: Mapping[str, object] = {"scale_search": False}

_CONVENTIONAL = re.compile(r"gptq-(\d{1,9})bit-(-?\d{1,9})g-actorder_(True|False)")
_HEX = re.compile(r"[0-9a-f]{4,40}\Z")
_BRANCH = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}\Z")


@dataclass(frozen=True, kw_only=True)
class Variant:
    """The parameters that determine one branch's weights.

    Attributes:
        branch: the name of the Hub branch and of the folder, used in every log line.
        bits: bits per weight.
        group_size: columns that share a scale; -1 = the whole row.
        desc_act: quantize columns in order of decreasing diag(H) ("act order").
        sym: symmetric grid, zero at 2^(bits-1).
        damp_percent: fraction of mean(diag H) added to the diagonal.
        damp_percent_limit: how far damping may be raised when a factorisation fails.
        true_sequential: each linear sees inputs made by the already quantized ones before it.
        static_groups: grids are fixed from the original weights, before any column is quantized.
        scale_search: try smaller scales per group and keep the one with the least weighted squared error.
        engine: what quantizes it; auto-gptq has no scale_search and never raises damp_percent.
    """

    branch: str
    bits: Bits
    group_size: int
    desc_act: bool
    sym: bool
    damp_percent: float
    damp_percent_limit: float
    true_sequential: bool
    static_groups: bool
    scale_search: bool
    engine: EngineName

    def parameters(self) -> dict[str, bool | int | float | str]:
        """Return every parameter but the branch, ready for JSON."""
        return {key: value for key, value in asdict(self).items() if key != "branch"}


def branch_name(*, bits: int, group_size: int, desc_act: bool) -> str:
    """Return the conventional branch of a permutation, e.g. `gptq-4bit-32g-actorder_True`."""
    return f"gptq-{bits}bit-{group_size}g-actorder_{desc_act}"


def parsed_branch_name(branch: str) -> tuple[int, int, bool] | None:
    """Return bits, group_size and desc_act of a name that `branch_name` made, None for any other name."""
    found = _CONVENTIONAL.fullmatch(branch)
    return (int(found[1]), int(found[2]), found[3] == "True") if found else None


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
