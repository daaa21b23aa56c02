"""How far a loader's logits may be from ours: by the dtype in which it computes, and by what rounding costs a model."""

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from packager.prove.other_loader import loader_spec

if TYPE_CHECKING:
    from torch import Tensor

# Largest ||loader - reference|| / ||reference|| by the dtype in which the loader computes. Right results measured:
# 0.0005 to 0.002 in float32 and float16, 0.007 in bfloat16; a wrong g_idx, zero or group order gives 0.3 and more.
TOLERANCE = {"float32": 0.005, "float16": 0.01, "bfloat16": 0.03}
# Rounding grows with a model's width and depth. So a difference may also be this many times that of our own forward in
# the loader's dtype, which sums products in float32. Kernels that sum in float16 (ExLlama, ExLlamaV2) had up to 4.1
# times the difference of kernels that do not, on a Llama 2 13B shape. No kernel is known that sums in bfloat16.
ROUNDING_FACTOR = {"float16": 8.0, "bfloat16": 3.0}
LARGEST_TOLERANCE = 0.1  # of any model in any dtype
# A generated token ties with our most likely one if our logits of the two differ by at most this many times the
# tolerance times the root mean square (rms) of our logits there. A logit whose error is the tolerance times rms gives
# the difference of two an error of sqrt(2) times that. So an honest loader's rounding stays 2.8 standard deviations
# inside at the largest error that passes. The loader's own error does not enter.
_TIE_TOLERANCES = 4.0


def relative_error(logits: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    """Return ||logits - expected|| / ||expected||; NaN anywhere gives NaN, which passes no comparison."""
    return float(np.linalg.norm(logits - expected) / np.linalg.norm(expected))


def tolerance_of(loader: str, dtype: str) -> float:
    """Return the largest relative error that passes on any model: of all loaders in `dtype`, or of this one alone."""
    own = loader_spec(loader).float32_tolerance if dtype == "float32" else None
    return TOLERANCE.get(dtype, min(TOLERANCE.values())) if own is None else own


def tolerance_of_model(tolerance: float, dtype: str, rounding_error: float) -> float:
    """Return the largest relative error that passes on one model.

    Args:
        tolerance: on any model.
        dtype: in which the loader computes.
        rounding_error: the relative error of our own forward of the model in this dtype. Where it is not finite, as
            float16 overflows, the tolerance stays.
    """
    if not math.isfinite(rounding_error):
        return tolerance
    return max(tolerance, min(ROUNDING_FACTOR[dtype] * rounding_error, LARGEST_TOLERANCE))


def equal_tokens(gaps: "Iterable[Tensor]", tolerance: float) -> int:
    """Return how many generated tokens are our forward's most likely ones, or tie with them; see `token_gaps`."""
    return sum(int((each <= _TIE_TOLERANCES * tolerance).sum()) for each in gaps)
