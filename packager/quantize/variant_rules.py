"""What a variant's parameters are to the solver."""

from packager.quantize.gptq.grid import GridRules
from packager.quantize.gptq.order import ColumnOrder
from packager.variant import Bits, Variant


def rules_of(variant: Variant, bits: Bits) -> GridRules:
    """Return the rules by which the grids of a variant's linears with so many bits are found."""
    return GridRules(bits=bits, sym=variant.sym, scale_search=variant.scale_search)


def order_of(variant: Variant) -> ColumnOrder:
    """Return the order of a variant's columns, with its groups."""
    return ColumnOrder(act_order=variant.act_order, group_size=variant.group_size)
