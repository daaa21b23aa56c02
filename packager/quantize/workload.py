"""The sizes that determine the memory of quantizing. No torch."""

from collections.abc import Sequence
from dataclasses import dataclass

from packager.model.architecture import Architecture
from packager.model.batches import rows_per_batch
from packager.quantize.gptq.row_parts import batches_of_rank, most_sums, parts_of_rank
from packager.variant import Variant


@dataclass(frozen=True, kw_only=True)
class Workload:
    """The sizes that determine the memory of quantizing.

    Attributes:
        architecture: of the base model.
        num_samples: calibration rows.
        seq_len: tokens per row.
        num_variants: variants.
        true_sequential: whether any variant calibrates linears on the outputs of the quantized ones before them.
        all_at_once: whether any variant calibrates all linears of a block at once.
        corrected: whether any variant has a target correction, and so the fp16 model's activations beside its own.
        refined_group: columns of the largest group of a variant that refines its linears after the last column; 0: none
            does.
        packed_bits: bits per weight of a solved linear with its scales and zeros, until it is written, of the variant
            with most.
        ranks: devices that share the rows.
        tuned: whether blocks of any variant are tuned (effort: high).
    """

    architecture: Architecture
    num_samples: int
    seq_len: int
    num_variants: int
    true_sequential: bool = True
    all_at_once: bool = False
    corrected: bool = False
    refined_group: int = 0
    packed_bits: float
    ranks: int = 1
    tuned: bool = False

    @classmethod
    def of(
        cls, architecture: Architecture, num_samples: int, seq_len: int, variants: Sequence[Variant], *,
        num_variants: int | None = None, ranks: int = 1,
    ) -> "Workload":  # fmt: skip
        """Return the sizes for variants.

        Args:
            architecture: of the base model.
            num_samples: calibration rows.
            seq_len: tokens per row.
            variants: at least one.
            num_variants: how many there are to quantize, if not these.
            ranks: devices that share the rows.
        """
        return cls(
            architecture=architecture,
            num_samples=num_samples,
            seq_len=seq_len,
            num_variants=len(variants) if num_variants is None else num_variants,
            true_sequential=any(variant.true_sequential for variant in variants),
            all_at_once=not all(variant.true_sequential for variant in variants),
            corrected=any(variant.target_correction > 0 for variant in variants),
            refined_group=max((_columns_of_group(variant) for variant in variants if variant.refine), default=0),
            packed_bits=max(map(_packed_bits, variants)),
            ranks=ranks,
            tuned=any(variant.effort == "high" for variant in variants),
        )

    def rows_per_batch(self, device_type: str) -> int:
        """Return how many rows make a batch."""
        return rows_per_batch(self.seq_len, device_type)

    def shares(self, device_type: str) -> list[range]:
        """Return the batches of each device that shares the rows."""
        batches = -(-self.num_samples // self.rows_per_batch(device_type))
        return [batches_of_rank(rank, self.ranks, batches) for rank in range(self.ranks)]

    def most_sums(self, device_type: str) -> int:
        """Return how many partial sums of a Hessian a device holds at most."""
        batches = -(-self.num_samples // self.rows_per_batch(device_type))
        return max(most_sums(parts_of_rank(rank, self.ranks, batches)) for rank in range(self.ranks))


def _packed_bits(variant: Variant) -> float:
    """Return the bits per weight of a solved linear: its integer, and for each group a float16 scale and a zero.

    Until a block is tuned, the integers are bytes; the packed block is smaller.
    """
    bits = 8 if variant.effort == "high" else max(variant.all_bits)
    return bits + ((16 + bits) / variant.group_size if variant.group_size > 0 else 0)


def _columns_of_group(variant: Variant) -> int:
    """Return the columns of a group; of one that is a whole row, more than any linear has."""
    return variant.group_size if variant.group_size > 0 else 2**31
