"""Whether a recipe's variants fit the linears of its base model, told from the model's config.json."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final, NamedTuple

from packager.errors import PlanError
from packager.model.architecture import Architecture, LinearSpec, read_architecture
from packager.receipt import CONFIG
from packager.recipe.draft import Draft, Loc, State, name_of
from packager.recipe.paths import locate, path_problem
from packager.recipe.yaml import Finding, Position, Scalar
from packager.system.text import quoted

_MAX_CONFIG_BYTES: Final = 1 << 20
_WORD_BITS: Final = 32


class Parameter(NamedTuple):
    """One parameter of a variant: its value, where it comes from, and whether the recipe wrote it."""

    value: Scalar | State
    at: Position
    written: bool


def shape_findings(draft: Draft, folder: Path, variants: Sequence[Mapping[str, Parameter]]) -> Iterator[Finding]:
    """Yield what does not fit: group sizes, bits and sequence lengths against the base model's shape."""
    architecture = _architecture(draft, folder)
    if isinstance(architecture, Finding):
        yield architecture
    if not isinstance(architecture, Architecture):
        return
    linears = architecture.block_linears
    for parameters in variants:
        bits, group_size = parameters["bits"], parameters["group_size"]
        if isinstance(group_size.value, int) and (message := group_size_problem(group_size.value, linears)):
            yield Finding(group_size.at, message, _fitting(linears))
        if isinstance(bits.value, int) and (message := bits_problem(bits.value, linears)):
            yield Finding(bits.at, message)
    limit = architecture.max_position_embeddings
    for section in ("calibration", "evaluation", "loaders"):
        seq_len = draft.number(section, "seq_len")
        if seq_len is not None and seq_len > limit:
            message = f"{section}.seq_len {seq_len} is more than the {limit} positions of the base model"
            yield Finding(draft.at(section, "seq_len"), message)


def group_size_problem(group_size: int, linears: Sequence[LinearSpec]) -> str:
    """Return which linears `group_size` does not divide, or ""."""
    misfits: dict[int, list[str]] = {}
    for linear in linears:
        if group_size != -1 and linear.in_features % group_size:
            misfits.setdefault(linear.in_features, []).append(_short(linear))
    parts = [f"the {in_features} in_features of {', '.join(names)}" for in_features, names in misfits.items()]
    return f"group_size {group_size} does not divide {' and '.join(parts)}" if parts else ""


def bits_problem(bits: int, linears: Sequence[LinearSpec]) -> str:
    """Return which linears do not fill whole 32-bit words: qweight packs rows, qzeros packs columns. Or ""."""
    names = [
        _short(linear)
        for linear in linears
        if any(features * bits % _WORD_BITS for features in (linear.in_features, linear.out_features))
    ]
    return f"{bits}-bit values of {', '.join(names)} do not fill 32-bit words" if names else ""


def _short(linear: LinearSpec) -> str:
    return linear.name.rpartition(".")[2]


def _fitting(linears: Sequence[LinearSpec]) -> str:
    common = math.gcd(*(linear.in_features for linear in linears))
    sizes = [str(8 << shift) for shift in range(8) if common % (8 << shift) == 0]
    return f"these fit every linear: {', '.join(['-1', *sizes])}"


def _architecture(draft: Draft, folder: Path) -> Architecture | Finding | None:
    """Read the base model's config.json; None when there is no such file, which is said elsewhere."""
    loc: Loc = ("base_model", "config")
    relative = draft.text(*loc)
    if relative is None:
        loc = ("base_model", "path")
        base = draft.text(*loc)
        if base is None or path_problem(folder, base, directory=True)[0]:
            return None
        relative = f"{base}/{CONFIG}"
        if path_problem(folder, relative)[0]:
            return Finding(draft.at(*loc), f"{name_of(loc)}: the folder has no config.json")
    path = locate(folder, relative)
    if path is None or path_problem(folder, relative)[0]:
        return None
    try:
        return read_architecture(_read_json(path), relative)
    except (OSError, ValueError, RecursionError) as error:
        return Finding(draft.at(*loc), f"{name_of(loc)}: {quoted(relative)} cannot be read as a JSON object: {error}")
    except PlanError as error:
        return Finding(draft.at(*loc), f"{name_of(loc)}: {quoted(relative)}: {error.what}: {error.why}", error.hint)


def _read_json(path: Path) -> dict[str, object]:
    with path.open("rb") as stream:
        value = json.loads(stream.read(_MAX_CONFIG_BYTES))
    if not isinstance(value, dict):
        raise ValueError("it holds something else")
    return value
