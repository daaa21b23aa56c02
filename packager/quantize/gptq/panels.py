"""The parts of sums over inputs that are computed: of a Hessian, and of a target correction. No torch.

H is symmetric: of each panel of its rows only the part right of the diagonal is computed. Five panels or more do some
60 % of the work and still are large products. Widths that are no multiple of a tile are several times slower.
"""

_PANELS = 5
_WIDEST_PANEL = 1024
_PANEL_MULTIPLE = 128
_FLOAT32_BYTES = 4


def panels(in_features: int) -> list[slice]:
    """Cut the rows of H into panels of equal width; the last may be narrower."""
    width = min(-(-in_features // (_PANELS * _PANEL_MULTIPLE)) * _PANEL_MULTIPLE, _WIDEST_PANEL)
    return [slice(begin, min(begin + width, in_features)) for begin in range(0, in_features, width)]


def panels_bytes(in_features: int) -> int:
    """Return the bytes of the panels of a sum: their columns begin at their own first row."""
    return sum(
        _FLOAT32_BYTES * (panel.stop - panel.start) * (in_features - panel.start) for panel in panels(in_features)
    )


def shift_rows(in_features: int, out_features: int) -> int:
    """Return the rows of a target correction's sum (see `target_correction`), whose columns are the inputs.

    A row for each input, or for each output where that takes less arithmetic: the outputs of the inputs' differences
    must be computed before, which takes as much as the sum.

    Args:
        in_features: of linears that see the same input.
        out_features: of these linears together.
    """
    return out_features if 2 * out_features < in_features else in_features
