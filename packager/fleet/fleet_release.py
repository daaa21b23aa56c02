"""`release` of many recipes at a time: checked and planned like any release, then run by an executor."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path

from packager.fleet.build_requests import FleetRecipe, Needs, fleet_recipe
from packager.fleet.fleet_run import LOOK_S, FleetRow, FleetRun
from packager.fleet.policy import Policy
from packager.fleet.tasks import Executor
from packager.fleet.worker import TaskOrder
from packager.pipeline.build_options import Options
from packager.pipeline.build_state import BuildState
from packager.pipeline.many_recipes import RecipeResult, Results
from packager.pipeline.release import ReleaseChecks, wanted_recipes
from packager.system.terminal import Terminal

WaitingNeeds = Callable[[], Sequence[Mapping[str, float]]]
OpenExecutor = Callable[[Mapping[str, TaskOrder], WaitingNeeds], AbstractContextManager[Executor]]


@dataclass(frozen=True, kw_only=True)
class FleetSettings:
    """How a fleet releases.

    Attributes:
        needs: of tasks.
        policy: the knobs of the scheduler.
        name: of the run, for people.
        open_executor: gets the orders by recipe, and what returns the needs of tasks that wait for a machine.
        patience_s, turn_s: see `FleetRun`.
        show: see `FleetRun`.
    """

    needs: Needs
    policy: Policy = field(default_factory=Policy)
    name: str
    open_executor: OpenExecutor
    patience_s: float = 0.0
    turn_s: float = LOOK_S
    show: Callable[[Sequence[FleetRow]], None] = lambda _: None


def release_by_fleet(
    recipes: Sequence[Path],
    options: Options,
    terminal: Terminal,
    checks: ReleaseChecks,
    settings: FleetSettings,
    show_results: Callable[[Sequence[RecipeResult]], None] = lambda _: None,
) -> tuple[RecipeResult, ...]:
    """Release recipes side by side, and return a result for each, in their order.

    Args:
        recipes: their files.
        options: where and how.
        terminal: gets all messages.
        checks: what is checked first, and whether the recipes are published.
        settings: of the fleet.
        show_results: called at the end, whatever ended the run.

    Raises:
        PublishError, MachineError: of the checks, see `release`.
    """
    results = Results(terminal, by_path={path: RecipeResult(path=path) for path in recipes})
    try:
        left: list[FleetRecipe] = []
        for file in wanted_recipes(results, options, checks):
            with results.recorded(file.path):
                left.append(fleet_recipe(BuildState(file, options, terminal), settings.needs))
        if left and not (checks.strict and any(result.outcome == "failed" for result in results.ordered)):
            _run(left, terminal, settings, results)
    finally:
        show_results(results.ordered)
    return results.ordered


def _run(recipes: Sequence[FleetRecipe], terminal: Terminal, settings: FleetSettings, results: Results) -> None:
    orders = {each.request.recipe: each.order for each in recipes}
    on_screen = terminal.err.is_terminal and not terminal.err.quiet
    runs: list[FleetRun] = []
    with (
        terminal.stage("fleet"),
        settings.open_executor(orders, lambda: runs[0].waiting_needs() if runs else ()) as executor,
    ):
        run = FleetRun(
            recipes=recipes,
            executor=executor,
            policy=settings.policy,
            store=settings.needs.store,
            name=settings.name,
            log=terminal.log,
            show=settings.show,
            patience_s=settings.patience_s,
            turn_s=settings.turn_s,
        )
        runs.append(run)
        try:
            if on_screen:
                run.run()
            else:
                with terminal.bar(len(recipes)) as bar:
                    run.ended = lambda text: bar.step(text, typical=False)
                    run.run()
        finally:
            results.by_path.update(run.results())
