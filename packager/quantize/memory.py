"""What quantizing takes of a GPU's and the host's memory, and how to make it fit. Arithmetic only: no torch.

Whatever is chosen here changes time and memory, never a byte of the result.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Literal

from packager.errors import MachineError
from packager.model.architecture import INPUT_GROUPS, Architecture
from packager.system.text import format_bytes

Placement = Literal["device", "host", "disk"]

# Rows travel together in batches of about this many tokens: a GPU needs many to be busy, a CPU works faster on what
# stays in its cache. The products' rounding depends on it, so it is not a matter of memory.
TOKENS_PER_BATCH = {"cpu": 4096, "cuda": 16384}
ELEMENT_BYTES = {"cpu": 4, "cuda": 2}
HOST_LIMIT_BYTES = 16 * 10**9
# Of a GPU's memory, what is left by CUDA's libraries and by the gaps between allocations.
USABLE = 0.92

# Matrices of the widest linear's [in_features, in_features], float32, that live at once while its Hessian is factored.
_SQUARES = 4
# Bytes per weight that live at once while a group of linears is solved: the weights in order, their changes, codes
# twice; and float32 products beside them.
_SOLVE_BYTES = 16
# Batches that wait on the device to be used, are used, or wait to be stored, when activations live elsewhere.
_STAGED_BATCHES = 4
# Copies of a block's weights: as read, as overwritten, and the next block's.
_WEIGHT_COPIES = 3


@dataclass(frozen=True, kw_only=True)
class SweepPlan:
    """How one or several sweeps over the blocks fit into a machine.

    Attributes:
        num_variants: permutations that ride one sweep; the others take further sweeps.
        placement: where activations live between blocks.
        num_batches: of calibration rows.
        suspended_batches: how many of them wait inside a block until their linears are quantized; the others run
            again from the block's beginning each time, which costs time instead of memory.
        device_bytes: estimated peak of the device that computes, without what Python, torch and CUDA take themselves.
        host_bytes: estimated peak of host memory beside a GPU, likewise; 0 where the host computes.
    """

    num_variants: int
    placement: Placement
    num_batches: int
    suspended_batches: int
    device_bytes: int
    host_bytes: int


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What is to be quantized.

    Attributes:
        architecture: of the base model.
        num_samples: calibration rows.
        seq_len: tokens per row.
        num_variants: permutations.
        true_sequential: whether any of them calibrates linears on what the quantized ones before make.
    """

    architecture: Architecture
    num_samples: int
    seq_len: int
    num_variants: int
    true_sequential: bool = True

    def rows_per_batch(self, device_type: str) -> int:
        """Return how many rows travel together."""
        return rows_per_batch(self.seq_len, device_type)


def rows_per_batch(seq_len: int, device_type: str) -> int:
    """Return how many rows of `seq_len` tokens travel together on a "cpu" or on "cuda"."""
    return max(1, TOKENS_PER_BATCH[device_type] // seq_len)


def choose_sweep(work: Workload, device_type: str, *, device_limit: int | None, host_limit: int | None) -> SweepPlan:
    """Choose the fastest way that fits: everything on the device if it can be, disk only if nothing else will do.

    Args:
        work: what is to be quantized.
        device_type: "cpu" or "cuda".
        device_limit: bytes of the device; None for any number.
        host_limit: bytes of host memory beside a GPU; None for any number.

    Raises:
        MachineError: it does not fit even in the smallest way; says what that needs.
    """
    smallest: SweepPlan | None = None
    for plan in sweep_ways(work, device_type):
        if not _exceeds(plan.device_bytes, device_limit) and not _exceeds(plan.host_bytes, host_limit):
            return plan
        smallest = min(smallest or plan, plan, key=lambda way: (way.device_bytes, way.host_bytes))
    assert smallest is not None, "there is always a way"  # noqa: S101
    raise MachineError(
        "quantizing does not fit into this machine's memory",
        why=f"it needs {_gb(smallest.device_bytes)} of the device and {_gb(smallest.host_bytes)} of the host; "
        f"there are {_gb(device_limit)} and {_gb(host_limit)}",
        hint="use a larger GPU, a higher --gpu-memory, or fewer calibration rows",
    )


def sweep_ways(work: Workload, device_type: str) -> Iterator[SweepPlan]:
    """Yield ways to quantize, the fastest first.

    Reading the weights once more is cheap: it happens beside the computing. Activations that travel are not always in
    time on the fastest GPUs, and running a batch again costs most.
    """
    batches = -(-work.num_samples // work.rows_per_batch(device_type))
    counts = range(work.num_variants, 0, -1)
    suspended = range(batches, -1, -1) if work.true_sequential else (0,)
    placements: tuple[tuple[Placement, ...], ...] = (("device", "host"), ("disk",))
    if device_type == "cpu":
        placements, suspended = (("device",),), (batches,)
    for wheres in placements:
        for kept, where, count in product(suspended, wheres, counts):
            yield _way(work, device_type, num_batches=batches, suspended=kept, count=count, placement=where)


def _way(
    work: Workload, device_type: str, *, num_batches: int, suspended: int, count: int, placement: Placement
) -> SweepPlan:
    tokens = work.num_samples * work.seq_len
    states = ELEMENT_BYTES[device_type] * tokens * work.architecture.hidden_size
    batch_tokens = min(tokens, work.rows_per_batch(device_type) * work.seq_len)
    staged = min(num_batches, _STAGED_BATCHES) * states * batch_tokens // tokens
    sizes = _Sizes(work.architecture, ELEMENT_BYTES[device_type])
    kept_tokens = min(tokens, suspended * batch_tokens)
    held = count * states if placement == "device" else staged
    # On the device, a suspended batch's input is one of the states already.
    inputs = ELEMENT_BYTES[device_type] * work.architecture.hidden_size if placement == "device" else 0
    device = held + sizes.peak(kept_tokens, batch_tokens, inputs_held=inputs)
    host = 0 if device_type == "cpu" else sizes.host(count) + (count * states if placement == "host" else 0)
    return SweepPlan(
        num_variants=count,
        placement=placement,
        num_batches=num_batches,
        suspended_batches=suspended,
        device_bytes=device,
        host_bytes=host,
    )


class _Sizes:
    """The parts of the estimate; ENGINE.md "Memory", gptq/hessian.py, gptq/solve.py and sweep.py say where they are.

    Args:
        architecture: of the base model.
        element_bytes: of an activation or weight.
    """

    def __init__(self, architecture: Architecture, element_bytes: int) -> None:
        self._hidden, self._intermediate = architecture.hidden_size, architecture.intermediate_size
        self._queries = architecture.num_attention_heads * architecture.head_dim
        self._keys = architecture.num_key_value_heads * architecture.head_dim
        self._element = element_bytes
        self._group_shapes = architecture.group_shapes
        self._largest_tensor = max(tensor.size_bytes for tensor in architecture.tensors)

    @property
    def weights(self) -> int:
        """Bytes of a block's weights."""
        return self._element * sum(in_features * out_features for in_features, out_features in self._group_shapes)

    def host(self, num_variants: int) -> int:
        """Return host memory beside activations: blocks being read, packed blocks being written, a tensor outside."""
        return 2 * self.weights + num_variants * self.weights // 2 + 2 * self._largest_tensor

    def peak(self, suspended_tokens: int, batch_tokens: int, *, inputs_held: int) -> int:
        """Return the peak of the device beside the states: each group of linears, when its turn comes."""
        peaks = []
        for group, (in_features, out_features) in zip(INPUT_GROUPS, self._group_shapes, strict=True):
            waiting = suspended_tokens * (self._suspended(group) - inputs_held)
            square = 4 * in_features**2
            solving = 4 * square + _SOLVE_BYTES * in_features * out_features
            running = square + batch_tokens * self._running()
            peaks.append(waiting + max(_SQUARES * square, solving, running))
        return max(peaks) + _WEIGHT_COPIES * self.weights

    def _suspended(self, group: tuple[str, ...]) -> int:
        """Return what a token holds while its batch waits for a group of linears: the block's input and what is new."""
        name = group[0].rpartition(".")[2]
        held = {
            "q_proj": 2 * self._hidden,
            "o_proj": 2 * self._hidden + 2 * self._queries + 2 * self._keys,
            "gate_proj": 3 * self._hidden,
            "down_proj": 3 * self._hidden + self._intermediate,
        }
        return self._element * held[name]

    def _running(self) -> int:
        """Return what a token of the batch under way takes at most, eager operations included."""
        return self._element * max(4 * self._intermediate, 8 * self._queries)


def _exceeds(size: int, limit: int | None) -> bool:
    return limit is not None and size > limit


def _gb(size: int | None) -> str:
    return "any number of GB" if size is None else format_bytes(size)
