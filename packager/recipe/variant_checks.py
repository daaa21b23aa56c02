"""Check the rules that concern several parameters of a variant, or several variants.

Every check skips values that the models refused, so that all checks run whatever else is wrong.
"""

import json
from collections.abc import Iterator
from typing import Final, get_args

from packager.recipe import Defaults
from packager.recipe.field_groups import BITS_AND_MIX, act_order_problem, mix_problem
from packager.recipe.model_fit import Parameter
from packager.recipe.parsed_recipe import Loc, ParsedRecipe, Unreadable, name_of
from packager.recipe.yaml import LocatedProblem
from packager.variant import (
    ACT_ORDER_OF_DESC_ACT,
    AUTO_GPTQ_KNOWS,
    DEFAULT_ACT_ORDERS,
    MAIN,
    MAX_REPOSITORY_NAME,
    ActOrder,
    Bits,
    BitsMix,
    EngineName,
    branch_name,
    place_of,
)

_ACT_ORDER_KEYS: Final = ("act_order", "desc_act")


def variant_problems(parsed: ParsedRecipe) -> Iterator[LocatedProblem]:
    """Yield what is wrong across the parameters of a variant, and across variants."""
    yield from _act_orders(parsed)
    yield from _branches(parsed)
    yield from _repositories(parsed)
    yield from _damping(parsed)
    yield from _negative_scales(parsed)
    yield from _target_corrections(parsed)
    yield from _engines(parsed)
    yield from _mixes(parsed)


def variant_parameters(parsed: ParsedRecipe, index: int) -> dict[str, Parameter]:
    """Return each parameter of a variant with its position; values that cannot be read stay `Unreadable`.

    Both spellings of the act order are the parameter act_order.
    """
    parameters: dict[str, Parameter] = {}
    for name, field in Defaults.model_fields.items():
        if name in _ACT_ORDER_KEYS:
            continue
        loc: Loc = ("variants", index, name)
        if parsed.get(*loc) is Unreadable.ABSENT:
            loc = ("defaults", name)
        value = parsed.get(*loc)
        written = value is not Unreadable.ABSENT
        at = parsed.at(*loc) if written else parsed.key_at("variants", index)
        parameters[name] = Parameter(value if written else field.default, at, written=written)
    parameters["act_order"] = _act_order(parsed, index, parameters["engine"].value)
    place: Loc = ("variants", index, "mix")
    if "mix" in (parsed.keys("variants", index) or ()):
        mix = _mix_of(parsed, index)
        bits = Unreadable.WRONG if mix is None or mix_problem(mix.bits, mix.mean) else mix.below
        parameters["bits"] = Parameter(bits, parsed.at(*place, "bits"), written=True)
    return parameters


def parameters_of_widths(parsed: ParsedRecipe, index: int) -> list[dict[str, Parameter]]:
    """Return the parameters of a variant for each number of bits that its linears may have."""
    parameters, mix = variant_parameters(parsed, index), _mix_of(parsed, index)
    if mix is None:
        return [parameters]
    return [{**parameters, "bits": parameters["bits"]._replace(value=bits)} for bits in mix.bits]


def _mix_of(parsed: ParsedRecipe, index: int) -> BitsMix | None:
    """Return a variant's mix as it is written; None for none, and where a value of it is wrong."""
    place: Loc = ("variants", index, "mix")
    given = [parsed.get(*place, "bits", each) for each in range(parsed.count(*place, "bits"))]
    bits = tuple(known for each in given for known in get_args(Bits) if known == each)
    mean = parsed.get(*place, "mean")
    if len(bits) < max(1, len(given)) or isinstance(mean, bool) or not isinstance(mean, int | float):
        return None
    return BitsMix(bits=bits, mean=float(mean))


def _mixes(parsed: ParsedRecipe) -> Iterator[LocatedProblem]:
    """Report mixes in which there is nothing to choose, that stand beside bits, or that their engine cannot make."""
    for index in range(parsed.count("variants")):
        place: Loc = ("variants", index, "mix")
        keys = parsed.keys("variants", index) or frozenset()
        if "mix" not in keys:
            continue
        mix, engine = _mix_of(parsed, index), variant_parameters(parsed, index)["engine"]
        if mix is not None and (problem := mix_problem(mix.bits, mix.mean)):
            yield LocatedProblem(parsed.at(*place), f"{name_of(place[:2])}: {problem}")
        if "bits" in keys:
            at = parsed.at("variants", index, "bits")
            yield LocatedProblem(at, f"{name_of(place[:2])}: {BITS_AND_MIX}", "leave bits out: mix.bits has them")
        if engine.value == "auto-gptq":
            hint = "write engine: native, or bits instead of mix"
            yield LocatedProblem(max(engine.at, parsed.at(*place)), "engine auto-gptq cannot do mix", hint)


def _act_order(parsed: ParsedRecipe, index: int, engine: object) -> Parameter:
    """Return a variant's act order: of its own keys, else of the defaults', else what its engine has without them."""
    for place in (("variants", index), ("defaults",)):
        for key in _ACT_ORDER_KEYS:
            value = parsed.get(*place, key)
            if value is not Unreadable.ABSENT:
                meant = ACT_ORDER_OF_DESC_ACT[value] if isinstance(value, bool) else value
                return Parameter(meant, parsed.at(*place, key), written=True)
    left_out = next((order for name, order in DEFAULT_ACT_ORDERS.items() if name == engine), "none")
    return Parameter(left_out, parsed.key_at("variants", index), written=False)


def _act_orders(parsed: ParsedRecipe) -> Iterator[LocatedProblem]:
    """Report two spellings of the act order that contradict each other."""
    places: list[Loc] = [("defaults",), *(("variants", index) for index in range(parsed.count("variants")))]
    for place in places:
        act_order, desc_act = parsed.text(*place, "act_order"), parsed.get(*place, "desc_act")
        if isinstance(desc_act, bool) and (problem := act_order_problem(act_order, desc_act)):
            hint = "leave desc_act out: the branch's configs get the desc_act that runtimes need"
            yield LocatedProblem(parsed.at(*place, "desc_act"), f"{name_of(place)}: {problem}", hint)


def _branch_of(parsed: ParsedRecipe, index: int) -> str | None:
    """Return a variant's branch, written or derived by `branch_name`; None when a value for it is wrong."""
    branch = parsed.get("variants", index, "branch")
    if branch is not Unreadable.ABSENT:
        return branch if isinstance(branch, str) else None
    parameters = variant_parameters(parsed, index)
    bits, group_size, asked = (parameters[name].value for name in ("bits", "group_size", "act_order"))
    act_order: ActOrder | None = next((known for known in get_args(ActOrder) if known == asked), None)
    if isinstance(bits, int) and isinstance(group_size, int) and act_order is not None:
        return branch_name(bits=bits, group_size=group_size, act_order=act_order)
    return None


def _branches(parsed: ParsedRecipe) -> Iterator[LocatedProblem]:
    """Report branch names that are equal but for case, and a recipe without exactly one `main`."""
    names = [_branch_of(parsed, index) for index in range(parsed.count("variants"))]
    first: dict[str, int] = {}
    for index, name in enumerate(names):
        if name is None:
            continue
        earlier = first.setdefault(name.casefold(), index)
        if earlier == index:
            continue
        line = parsed.key_at("variants", earlier).line
        message = f"two variants have the branch {name!r}"
        if names[earlier] != name:
            message = f"the branches {names[earlier]!r} and {name!r} differ only in case"
        elif name == MAIN:
            message = "two variants have the branch 'main', which a recipe has exactly once"
        yield LocatedProblem(parsed.at("variants", index, "branch"), message, f"the first is at line {line}")
    if names and None not in names and MAIN not in names:
        yield LocatedProblem(
            parsed.key_at("variants"),
            "no variant has the branch 'main', which a recipe has exactly once",
            "readers who name no branch get main: add `branch: main` to one variant",
        )


def _repositories(parsed: ParsedRecipe) -> Iterator[LocatedProblem]:
    """Report repository names that the Hub refuses."""
    repository = parsed.text("repository", "id")
    if repository is None or parsed.text("repository", "layout") != "repos":
        return
    for index in range(parsed.count("variants")):
        branch = _branch_of(parsed, index)
        if branch is None:
            continue
        name = place_of(repository, "repos", branch).repository.split("/")[-1]
        if len(name) > MAX_REPOSITORY_NAME:
            text = f"the repository {name} has {len(name)} characters, the Hub takes at most {MAX_REPOSITORY_NAME}"
            yield LocatedProblem(parsed.at("variants", index, "branch"), text, "shorten repository.id or the branch")
        elif "--" in name or name.endswith(".git"):
            text = f"the Hub takes no repository {name}: it has '--' in it or ends in '.git'"
            yield LocatedProblem(parsed.at("variants", index, "branch"), text)


def _damping(parsed: ParsedRecipe) -> Iterator[LocatedProblem]:
    for index in range(parsed.count("variants")):
        parameters = variant_parameters(parsed, index)
        damp, limit = parameters["damp_percent"], parameters["damp_percent_limit"]
        if isinstance(damp.value, float) and isinstance(limit.value, float) and limit.value < damp.value:
            at = max(parameter.at for parameter in (damp, limit) if parameter.written)
            hint = "" if limit.written else f"the limit is {limit.value} unless the recipe gives another"
            yield LocatedProblem(at, f"damp_percent_limit {limit.value} is less than damp_percent {damp.value}", hint)


def _negative_scales(parsed: ParsedRecipe) -> Iterator[LocatedProblem]:
    """Report a search of negative scales in variants whose grids are not symmetric."""
    for index in range(parsed.count("variants")):
        parameters = variant_parameters(parsed, index)
        search, sym = parameters["scale_search"], parameters["sym"]
        if search.value == "signed" and sym.value is False:
            hint = "an asymmetric grid needs no negative scale: write scale_search: true, or sym: true"
            yield LocatedProblem(max(search.at, sym.at), "scale_search: signed is for symmetric grids", hint)


def _target_corrections(parsed: ParsedRecipe) -> Iterator[LocatedProblem]:
    """Report a target correction in variants that calibrate all linears of a block at once."""
    for index in range(parsed.count("variants")):
        parameters = variant_parameters(parsed, index)
        correction, sequential = parameters["target_correction"], parameters["true_sequential"]
        if isinstance(correction.value, int | float) and correction.value and sequential.value is False:
            hint = "without it, linears are calibrated on inputs that the linears of their block did not change"
            yield LocatedProblem(
                max(correction.at, sequential.at), "target_correction needs true_sequential: true", hint
            )


def _engines(parsed: ParsedRecipe) -> Iterator[LocatedProblem]:
    """Report parameters that only our own engine knows in variants of another engine."""
    for index in range(parsed.count("variants")):
        parameters = variant_parameters(parsed, index)
        engine = parameters["engine"]
        if engine.value not in get_args(EngineName) or engine.value == "native":
            continue
        for name, known in AUTO_GPTQ_KNOWS.items():
            asked = parameters[name]
            if isinstance(asked.value, Unreadable) or asked.value is None or asked.value in known:
                continue
            at = max(parameter.at for parameter in (engine, asked) if parameter.written)
            hint = f"write {name}: {' or '.join(map(_written, known))} in this variant, or engine: native"
            yield LocatedProblem(at, f"engine {engine.value} cannot do {name}: {_written(asked.value)}", hint)
        if parsed.get("variants", index, "damp_percent_limit") is not Unreadable.ABSENT:
            at = parsed.at("variants", index, "damp_percent_limit")
            message = f"engine {engine.value} never raises damping: damp_percent_limit has no effect in this variant"
            yield LocatedProblem(at, message, "leave it out, or use engine: native")


def _written(value: object) -> str:
    """Return a value as a recipe has it."""
    return json.dumps(value) if isinstance(value, bool) else str(value)
