"""The bits of a variant for the card: one number, or those that a mix has and where."""

import re
from collections.abc import Iterable, Mapping, Sequence

from packager.receipt import Provenance
from packager.system.text import joined_by_and

_BLOCK = re.compile(r"\.(\d+)\.")


def bits_in_words(parameters: Mapping[str, object]) -> str:
    """Return `4-bit`, or of a mix `4 and 8 bits, 4.5 on average at most`."""
    if "mix_bits" not in parameters:
        return f"{parameters['bits']}-bit"
    return f"{joined_by_and(bits_of_parameters(parameters))} bits, {parameters['mix_mean']:g} on average at most"


def bits_of_parameters(parameters: Mapping[str, object]) -> tuple[str, ...]:
    """Return the number of bits of a variant's linears, or those that a mix may have."""
    return tuple(str(parameters.get("mix_bits", parameters["bits"])).split(", "))


def chosen_bits(made: Provenance) -> tuple[str, ...]:
    """Return which linears of a mix have which bits, a sentence for each number of bits; () for another variant.

    Linears that have them in the same blocks are named together.
    """
    blocks: dict[int, dict[str, list[int]]] = {}
    for record in made.linears:
        place = _BLOCK.search(record.name)
        if record.bits is not None and place is not None:
            module = record.name[place.end() :]
            blocks.setdefault(record.bits, {}).setdefault(module, []).append(int(place[1]))
    whole = {module: sorted(found) for module, found in _merged(blocks.values()).items()}
    return tuple(f"{bits} bits: {_places(found, whole)}" for bits, found in sorted(blocks.items()))


def _merged(each: Iterable[Mapping[str, list[int]]]) -> dict[str, list[int]]:
    """Return all blocks in which each module is."""
    found: dict[str, list[int]] = {}
    for modules in each:
        for module, blocks in modules.items():
            found.setdefault(module, []).extend(blocks)
    return found


def _places(modules: Mapping[str, list[int]], whole: Mapping[str, list[int]]) -> str:
    alike: dict[tuple[int, ...], list[str]] = {}
    for module, blocks in modules.items():
        everywhere = sorted(blocks) == whole[module]
        alike.setdefault(() if everywhere else tuple(sorted(blocks)), []).append(module)
    return "; ".join(f"{', '.join(names)}{_in_blocks(blocks)}" for blocks, names in alike.items())


def _in_blocks(blocks: Sequence[int]) -> str:
    """Return ` in blocks 0 to 3 and 7`; () are all blocks."""
    if not blocks:
        return " in all blocks"
    runs: list[list[int]] = []
    for block in blocks:
        if runs and runs[-1][-1] == block - 1:
            runs[-1].append(block)
        else:
            runs.append([block])
    parts = [str(run[0]) if len(run) == 1 else f"{run[0]} to {run[-1]}" for run in runs]
    return f" in block{'' if len(blocks) == 1 else 's'} {joined_by_and(parts)}"
