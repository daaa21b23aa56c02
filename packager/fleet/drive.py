"""The loop that a scheduler and an executor share."""

from collections.abc import Callable, Sequence

from packager.fleet.scheduler import Scheduler
from packager.fleet.tasks import Executor, TaskEnd


def drive(
    scheduler: Scheduler,
    executor: Executor,
    *,
    observe: Callable[[Sequence[TaskEnd]], None] = lambda _: None,
    patience_s: float = 0.0,
) -> None:
    """Run everything that a scheduler has, to its end.

    Args:
        scheduler: with the recipes.
        executor: with the machines.
        observe: called after each change, with what became of tasks.
        patience_s: how long to wait for a machine when nothing can start; then the rest is parked.
    """
    stalled_at: float | None = None
    while not scheduler.is_finished:
        now = executor.now()
        scheduler.see(executor.machines(), now)
        starts = scheduler.assign(now)
        for order in starts:
            executor.start(order)
        until = scheduler.next_wake()
        if not scheduler.is_stalled:
            stalled_at = None
        else:
            stalled_at = now if stalled_at is None else stalled_at
            until = stalled_at + patience_s
            if now >= until:
                scheduler.give_up()
                break
        outcomes = executor.wait(until)
        for outcome in outcomes:
            scheduler.take(outcome, executor.now())
        if starts or outcomes:
            observe(outcomes)
    observe(())
