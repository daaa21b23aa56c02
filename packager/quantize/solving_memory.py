"""Estimate the memory of solving the linears of a group, or one expert of a slice. Arithmetic only: no torch.

See `gptq/hessian.py`, `gptq/solve.py`, `gptq/lazy_updates.py`, `gptq/refine.py` and `gptq/target_correction.py`.
"""

from packager.quantize.gptq.column_blocks import BLOCKS_AT_ONCE, COLUMN_BLOCK, inline_group_size
from packager.quantize.gptq.panels import shift_rows

# Float32 matrices [in_features, in_features] while a Hessian is factored: H, which a failure needs again, and two of H
# in solving order, its factor as it is computed, and its factor in the order of U.
_FACTORING_SQUARES = 3
# While columns are quantized: U, and on CUDA its two float16 parts.
_SOLVING_SQUARES = {"cpu": 1, "cuda": 2}
# Bytes per weight while columns are quantized: the deltas 4 and the integers 1; weights of two bytes in solving order,
# for static order those as stored, too, and as float32, or weights of four bytes in both orders; with refinement, the
# errors.
_ROUNDING_BYTES, _ERROR_BYTES = 5 + 8, 4
# While they are refined: the deltas' memory, the integers in two orders, the errors, and the changes of the errors.
_REFINING_BYTES = 4 + 2 + 4 + 4
# While the scale of a group is refined that several column blocks share: its quantized columns, and on CUDA two parts.
_SHARED_BYTES = {"cpu": 4, "cuda": 8}
# Of the column blocks that are quantized together, for each column and output feature float32 numbers: the weights with
# updates, the pending updates, the deltas, and two products.
_NUMBERS_AT_ONCE = 5
# Per input feature: a row of its column block's inverse diagonal block, and of the two copies that it is made from;
# with refinement, for each of the columns at once, a number of U in float32 and in float16 parts.
_DIAGONAL_BYTES, _GATHERED_BYTES = 3 * 4 * COLUMN_BLOCK, 8
# Matrices of the size of S while a target correction's S is solved for: S itself, and on a CPU the solution.
_SHIFTS = {"cpu": 2, "cuda": 1}


def solving_bytes(
    in_features: int, out_features: int, device_type: str, *, refined_group: int = 0, corrected: bool = False
) -> int:
    """Return the bytes of solving linears beside their weights, from their Hessian to their solution.

    Args:
        in_features: of the linears.
        out_features: of all that are solved side by side.
        device_type: "cpu" or "cuda".
        refined_group: columns of a group, where they are refined after the last column; 0: they are not.
        corrected: whether they have a target correction.
    """
    square = 4 * in_features**2
    weights = in_features * out_features
    factoring = _FACTORING_SQUARES * square
    at_once = min(in_features, BLOCKS_AT_ONCE * COLUMN_BLOCK)
    columns = _ROUNDING_BYTES * weights
    beside = 4 * _NUMBERS_AT_ONCE * at_once * out_features + _DIAGONAL_BYTES * in_features
    if refined_group:
        shared = 0 if inline_group_size(refined_group) else min(refined_group, in_features)
        refining = _REFINING_BYTES * weights + _SHARED_BYTES[device_type] * shared * out_features
        columns = max(columns + _ERROR_BYTES * weights, refining)
        beside += _GATHERED_BYTES * at_once * in_features
    solving = max(factoring, _SOLVING_SQUARES[device_type] * square + columns + beside)
    if not corrected:
        return solving
    shift = 4 * shift_rows(in_features, out_features) * in_features
    # H, H damped and its factor; then the targets, in float32, stay until all is solved.
    return max(factoring + _SHIFTS[device_type] * shift, 4 * weights + solving)
