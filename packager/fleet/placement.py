"""Placement: which machine becomes the home of a recipe, where its base model is and all but the publish runs."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from packager.fleet.policy import Policy
from packager.fleet.progress import MachineLoad, RecipeProgress
from packager.fleet.tasks import BuildRequest, Task


@dataclass(frozen=True, kw_only=True)
class Home:
    """The machine that a recipe is fetched to, and the recipes whose files it deletes for it."""

    machine: MachineLoad
    drop: Sequence[str]


def choose_home(
    request: BuildRequest,
    task: Task,
    machines: Iterable[MachineLoad],
    recipes: Mapping[str, RecipeProgress],
    policy: Policy,
) -> Home | None:
    """Return the machine with the least work ahead that has room now, None if none has.

    Args:
        request: the recipe.
        task: its fetch.
        machines: all.
        recipes: whose files machines have.
        policy: how many recipes a machine fetches at a time, and ahead.
    """
    best: Home | None = None
    least = 1 + policy.ahead
    for machine in machines:
        slots = machine.slots(request)
        if slots < 1 or machine.fetching >= policy.fetches or not machine.fits(task):
            continue
        load = len(machine.computing) / slots
        if load >= least:
            continue
        drop = machine.to_drop(request.disk_bytes, recipes)
        if drop is not None:
            best, least = Home(machine=machine, drop=drop), load
    return best


def lacking_machine(request: BuildRequest, machines: Iterable[MachineLoad]) -> str:
    """Return what no machine has that a recipe needs, "" if one has all of it."""
    if any(machine.slots(request) >= 1 for machine in machines):
        return ""
    needs = f"{request.most_gpus} GPUs, {request.most_cpus:g} CPUs, {request.disk_bytes / 1e9:.0f} GB of disk"
    return f"no machine has {needs}"
