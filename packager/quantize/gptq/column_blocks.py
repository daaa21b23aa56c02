"""How the columns of a linear are cut into column blocks, which are quantized one after the other. No torch."""

COLUMN_BLOCK = 128
# Within 4 column blocks (512 columns) updates are applied block by block; those of earlier blocks in one product.
BLOCKS_AT_ONCE = 4


def some_at_once(count: int) -> list[slice]:
    """Cut the column blocks into those whose updates are applied block by block."""
    return [slice(first, first + BLOCKS_AT_ONCE) for first in range(0, count, BLOCKS_AT_ONCE)]


def inline_group_size(group_size: int) -> int:
    """Return the group size if grids can be found while columns are rounded (a group fits a column block), else 0."""
    return 0 if group_size > COLUMN_BLOCK else group_size


def column_blocks(in_features: int, group_size: int) -> list[tuple[int, int]]:
    """Cut the columns into blocks of at most `COLUMN_BLOCK` that hold whole groups, or part of a single one."""
    if group_size <= COLUMN_BLOCK:
        width = COLUMN_BLOCK // group_size * group_size
        starts = list(range(0, in_features, width))
    else:
        starts = [
            begin
            for group in range(0, in_features, group_size)
            for begin in range(group, min(group + group_size, in_features), COLUMN_BLOCK)
        ]
    return list(zip(starts, [*starts[1:], in_features], strict=True))
