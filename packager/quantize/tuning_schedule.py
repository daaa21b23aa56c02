"""How long a block is tuned and how far its parameters move. No torch: `plan` estimates time by it."""

from dataclasses import dataclass

from packager.model.batches import rows_per_batch


@dataclass(frozen=True, kw_only=True)
class TuningSchedule:
    """The steps of tuning a block; each is of one batch.

    Attributes:
        steps: how many.
        checks: how often the error over all batches is measured, at equal distances; the last time at the end.
        rate: how far the first step moves an offset at most, in integers; later steps less, down to 0 in equal parts.
        scale_rate: likewise a scale, as a fraction of the one it started with.
    """

    steps: int
    checks: int
    rate: float
    scale_rate: float

    def rates(self, step: int) -> tuple[float, float]:
        """Return how far a step, the first being 0, moves offsets and scales."""
        left = 1 - step / self.steps
        return self.rate * left, self.scale_rate * left

    def is_checked(self, step: int) -> bool:
        """Return whether the error over all batches is measured after a step."""
        return (step + 1) * self.checks // self.steps > step * self.checks // self.steps

    def forwards(self, num_samples: int, seq_len: int, device_type: str) -> float:
        """Return how many forward passes of all calibration rows tuning takes.

        A step is a forward pass of a batch, and a backward pass, which takes twice as long. All rows pass once through
        the original block, and once for each measurement of the error, of which there is one before the first step.
        """
        batch = min(num_samples, rows_per_batch(seq_len, device_type))
        return 3 * self.steps * batch / num_samples + self.checks + 2


SCHEDULE = TuningSchedule(steps=100, checks=4, rate=0.004, scale_rate=0.0001)
