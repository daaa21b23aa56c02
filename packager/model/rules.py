"""A rule about a runtime: what of a variant it finds, and in which file of the runtime it was read, and when.

A rule is code and not a line of a data file, because most of them compute with shapes; decision 29 has the reasons.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Literal

from packager.model.architecture import Architecture
from packager.system.text import joined_by_and
from packager.variant import Variant

# Returns in a few words what it found, or "".
Check = Callable[[Variant, Architecture], str]
# refuses: the runtime does not load the variant, or computes something else. unknown: for such a model nobody ran it or
# read its code. limits: it loads, with a drawback of this variant or model. note: it loads; this holds for all of them.
RuleKind = Literal["refuses", "unknown", "limits", "note"]


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where a rule was read.

    Attributes:
        project: whose code, or documentation, it is.
        version: of the project: the version that was read.
        place: a file or module of it, with the function where that helps; or an issue.
        read: the day on which it was read last, as year-month-day.
    """

    project: str
    version: str
    place: str
    read: str

    def __str__(self) -> str:
        """Return it as a reader may cite it."""
        return f"{self.project} {self.version}, {self.place} (read {self.read})"


@dataclass(frozen=True, kw_only=True)
class RuntimeRule:
    """A rule of a runtime.

    Attributes:
        check: finds what the rule is about.
        kind: what a finding means.
        source: where the rule was read.
        advice: what a maintainer, or a reader who chooses a branch, can do about a finding; "" for nothing.
    """

    check: Check
    kind: RuleKind
    source: Source
    advice: str = ""

    def finding(self, variant: Variant, architecture: Architecture) -> "RuleFinding | None":
        """Return what the rule finds in a variant, None for nothing."""
        says = self.check(variant, architecture)
        return RuleFinding(kind=self.kind, says=says, advice=self.advice, source=self.source) if says else None


@dataclass(frozen=True, kw_only=True)
class RuleFinding:
    """What a rule found in a variant, in a few words; the rest as in `RuntimeRule`."""

    kind: RuleKind
    says: str
    advice: str
    source: Source


@dataclass(frozen=True, kw_only=True)
class RulesOf:
    """Makes the rules that were read in one version of a program.

    Attributes:
        project, version, read: as in `Source`.
    """

    project: str
    version: str
    read: str

    def refuses(self, check: Check, place: str, advice: str) -> RuntimeRule:
        """Return the rule of a refusal."""
        return self._rule(check, "refuses", place, advice)

    def unknown(self, check: Check, place: str, advice: str) -> RuntimeRule:
        """Return the rule of what was neither run nor read."""
        return self._rule(check, "unknown", place, advice)

    def limits(self, check: Check, place: str, advice: str = "") -> RuntimeRule:
        """Return the rule of a drawback."""
        return self._rule(check, "limits", place, advice)

    def note(self, text: str, place: str) -> RuntimeRule:
        """Return the rule of what holds for each variant and model."""
        return self._rule(lambda _variant, _architecture: text, "note", place, "")

    def _rule(self, check: Check, kind: RuleKind, place: str, advice: str) -> RuntimeRule:
        source = Source(project=self.project, version=self.version, place=place, read=self.read)
        return RuntimeRule(check=check, kind=kind, source=source, advice=advice)


# What a maintainer or a reader can do, where several runtimes refuse alike.
TAKE_SYMMETRIC = "take a symmetric branch (sym: true)"
TAKE_OTHER_RUNTIME = "take one of the runtimes that load it"
QUANTIZE_ALL_OR_NONE = "skip all of them in the recipe, or none (quantize.skip)"
TAKE_ONE_WIDTH = "take a branch whose linears all have the same bits, or GPTQModel's own loader"
TRY_IT = "take a runtime that loads it; this one may, but nobody tried"


def take_bits(known: Sequence[int]) -> str:
    """Return the advice for a number of bits that a runtime does not read."""
    return f"take a branch of {_either(known)} bits"


def take_group_sizes(known: Sequence[int]) -> str:
    """Return the advice for a group size that a runtime does not read."""
    return f"take a branch with group size {_either(known)}"


def _either(values: Sequence[int]) -> str:
    *first, last = map(str, values)
    return f"{', '.join(first)} or {last}" if first else last


def bits_check(*known: int) -> Check:
    """Return the check for numbers of bits that a runtime does not read."""
    words = ", ".join(map(str, known))
    return lambda variant, _: "" if set(variant.all_bits) <= set(known) else f"reads {words} bits only"


def group_sizes_check(*known: int) -> Check:
    """Return the check for group sizes that a runtime does not read."""
    words = ", ".join(map(str, known))
    return lambda variant, _: "" if variant.group_size in known else f"reads group sizes {words} only"


def types_check(known: Sequence[str], words: str) -> Check:
    """Return the check for model types that are not among those known; `words` begin the sentence."""
    names = ", ".join(known)
    return lambda _, architecture: "" if architecture.model_type in known else f"{words} {names} only"


def same_bits(variant: Variant, _: Architecture) -> str:
    """Return the refusal of checkpoints whose linears have several numbers of bits, of runtimes without `dynamic`."""
    return f"reads one number of bits, here are {joined_by_and(variant.all_bits)}" if variant.other_bits else ""


def patterns_check(names: str, types: Collection[str] | None = None) -> Check:
    """Return the check for runtimes that look for other names in `dynamic` than those of modules.

    Our patterns fit them, of the model types for which it was tried; None stands for all types. Patterns of another
    program are regular expressions that are not run here.
    """
    says = f"looks for {names} in dynamic, which its patterns may not fit"

    def check(variant: Variant, architecture: Architecture) -> str:
        fit = variant.own_patterns and (types is None or architecture.model_type in types)
        return says if variant.other_bits and not fit else ""

    return check


def symmetric_only(variant: Variant, _: Architecture) -> str:
    """Return the refusal of asymmetric checkpoints."""
    return "" if variant.sym else "reads symmetric checkpoints only"


def whole_groups(variant: Variant, architecture: Architecture) -> str:
    """Return a linear whose last group is shorter."""
    if variant.group_size == -1:
        return ""
    odd = next((linear for linear in architecture.example_linears if linear.in_features % variant.group_size), None)
    return f"{odd.module} has {odd.in_features} columns, not a multiple of {variant.group_size}" if odd else ""


def all_quantized(_: Variant, architecture: Architecture) -> str:
    """Return a linear that is left unquantized, for runtimes that take every linear of a block as quantized."""
    left = next(iter(architecture.left), None)
    return "" if left is None else f"takes every linear of a block as quantized, {left} is not"
