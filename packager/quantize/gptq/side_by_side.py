"""Which linears that see the same input are solved side by side, as one matrix. No torch.

Wide ones are solved one by one: a GPU is as fast with them, and several GPUs solve them at the same time. Products of
other widths may round in other ways, so this depends on shapes alone, never on the number of GPUs.
"""

from collections.abc import Sequence

# With more output features together than this, a matrix keeps all of a GPU busy.
MOST_FEATURES = 20_000


def solved_together(out_features: Sequence[int]) -> list[slice]:
    """Cut linears, in their order, into those that are solved side by side: as many as fit, or one that does not.

    Args:
        out_features: of each.
    """
    begin, total, found = 0, 0, []
    for place, features in enumerate(out_features):
        if place > begin and total + features > MOST_FEATURES:
            found.append(slice(begin, place))
            begin, total = place, 0
        total += features
    return [*found, slice(begin, len(out_features))]
