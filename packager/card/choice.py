"""Which branch for which graphics card: what fits its memory, and of that the closest to the fp16 model."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from packager.card.comparison import closest_of
from packager.model.architecture import Architecture
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


@dataclass(frozen=True, kw_only=True)
class GpuChoice:
    """The branch to take on graphics cards of some sizes.

    Attributes:
        least_gb: the smallest of these cards.
        most_gb: the largest; None for all that are larger.
        chosen: for each question, the branch's name; "" where none fits.
    """

    least_gb: int
    most_gb: int | None
    chosen: tuple[str, ...]


def cached_contexts(architecture: Architecture) -> tuple[CachedContext, ...]:
    """Return the contexts that the card shows: 4,096 and 32,768 tokens, or all that the model has."""
    most = architecture.max_position_embeddings
    lengths = dict.fromkeys(min(tokens, most or tokens) for tokens in _CONTEXT_TOKENS)
    return tuple(CachedContext(tokens=tokens, cache_bytes=architecture.cache_bytes(tokens)) for tokens in lengths)


def device_bytes(receipt: Provenance, context: CachedContext) -> int:
    """Return what a branch takes of a device: its weights and the cache of one row, without the runtime's own."""
    return receipt.weights_bytes + context.cache_bytes


def gpu_choices(
    receipts: Sequence[Provenance],
    questions: Sequence[tuple[CachedContext, Callable[[str], bool]]],
) -> tuple[GpuChoice, ...]:
    """Return the choices by card size; sizes with the same answers are one choice.

    Args:
        receipts: one per branch.
        questions: a context and which branches may be taken, e.g. those that vLLM opens.

    Returns:
        Nothing where the branches cannot be compared.
    """
    if not closest_of(receipts):
        return ()
    answers = {
        gigabytes: tuple(_best(receipts, gigabytes * 10**9, context, allows) for context, allows in questions)
        for gigabytes in GPU_GB
    }
    return tuple(_merged(answers))


def best_branch(receipts: Sequence[Provenance]) -> str:
    """Return the closest branch to the fp16 model; of those that the rows do not tell apart, the smallest."""
    found = closest_of(receipts)
    return min(found, key=lambda receipt: receipt.weights_bytes).branch if found else ""


def _best(
    receipts: Sequence[Provenance], memory_bytes: int, context: CachedContext, allows: Callable[[str], bool]
) -> str:
    room = memory_bytes - RUNTIME_BYTES
    return best_branch([each for each in receipts if allows(each.branch) and device_bytes(each, context) <= room])


def _merged(answers: Mapping[int, tuple[str, ...]]) -> list[GpuChoice]:
    merged: list[GpuChoice] = []
    for gigabytes, chosen in answers.items():
        least = gigabytes
        if merged and merged[-1].chosen == chosen:
            least = merged.pop().least_gb
        most = None if gigabytes == GPU_GB[-1] else gigabytes
        merged.append(GpuChoice(least_gb=least, most_gb=most, chosen=chosen))
    return merged
