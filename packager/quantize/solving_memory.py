"""Estimate the memory of solving the linears of a group, or one expert of a slice. Arithmetic only: no torch.

See `gptq/hessian.py`, `gptq/solve.py`, `gptq/lazy_updates.py`, `gptq/refine.py` and `gptq/target_correction.py`.
"""

from packager.quantize.gptq.panels import shift_rows

# Float32 matrices [in_features, in_features] while a Hessian is factored: H, which a failure needs again, H in solving
# order, and its factor in the order in which it is computed or in that of U. Only two are needed at any time but one.
_FACTORING_SQUARES = 3
# While columns are quantized: U, and on CUDA its two float16 parts.
_SOLVING_SQUARES = {"cpu": 1, "cuda": 2}
# Bytes per weight while columns are quantized: the deltas 4 and the integers 1. Beside them weights of two bytes in
# solving order, for static order those as stored, too, and as float32; or weights of four bytes in both orders.
_COLUMN_BYTES = 5 + 8
# With refinement, per weight: the errors. Per input feature and column: rows of U, in float32 and in float16 parts.
_ERROR_BYTES, _GATHERED_BYTES = 4, 8
# The columns that are quantized together, 4 column blocks, and float32 numbers for each and each output feature: the
# weights with updates, the pending updates, the deltas, and two products.
_COLUMNS_AT_ONCE, _NUMBERS_AT_ONCE = 512, 5
# Per input feature: diagonal blocks of 128 columns, their inverses, and a copy.
_DIAGONAL_BYTES = 3 * 4 * 128
# Matrices of the size of S while a target correction's S is solved for: S itself, and on a CPU the solution.
_SHIFTS = {"cpu": 2, "cuda": 1}


def solving_bytes(
    in_features: int, out_features: int, device_type: str, *, refined: bool = False, corrected: bool = False
) -> int:
    """Return the bytes of solving linears beside their weights, from their Hessian to their solution.

    Args:
        in_features: of the linears.
        out_features: of all that are solved side by side.
        device_type: "cpu" or "cuda".
        refined: whether they are refined after the last column.
        corrected: whether they have a target correction.
    """
    square = 4 * in_features**2
    weights = in_features * out_features
    factoring = _FACTORING_SQUARES * square
    at_once = min(in_features, _COLUMNS_AT_ONCE)
    columns = _COLUMN_BYTES * weights + 4 * _NUMBERS_AT_ONCE * at_once * out_features + _DIAGONAL_BYTES * in_features
    if refined:
        columns += _ERROR_BYTES * weights + _GATHERED_BYTES * at_once * in_features
    solving = max(factoring, _SOLVING_SQUARES[device_type] * square + columns)
    if not corrected:
        return solving
    shift = 4 * shift_rows(in_features, out_features) * in_features
    # H, H damped and its factor; then the targets, in float32, stay until all is solved.
    return max(factoring + _SHIFTS[device_type] * shift, 4 * weights + solving)
