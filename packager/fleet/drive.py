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
    turn_s: float | None = None,
) -> None:
    """Run everything that a scheduler has, to its end.

    Args:
        scheduler: with the recipes.
        executor: with the machines.
        observe: called after each change, with what became of tasks.
        patience_s: how long to wait for a machine when nothing can start; then the rest is parked.
        turn_s: `observe` is called at least this often, too, even if nothing changes; None for never.
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
        if turn_s is not None:
            until = now + turn_s if until is None else min(until, now + turn_s)
        if starts:
            observe(())
        outcomes = executor.wait(until)
        for outcome in outcomes:
            scheduler.take(outcome, executor.now())
        if outcomes or turn_s is not None:
            observe(outcomes)
    observe(())
