"""`release` by a fleet: its executor, and the table of all recipes while it runs."""

import os
import platform
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

import typer
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from packager.cli import ray_process, task_process
from packager.cli.options import read_size
from packager.cli.queue_view import STATE_STYLES
from packager.cli.tables import add_row, new_table
from packager.errors import UsageError

if TYPE_CHECKING:
    from packager.cli.fleet_options import FleetOptions
    from packager.fleet.fleet_release import OpenExecutor
    from packager.fleet.fleet_run import FleetRow
    from packager.fleet.windows import Limits
    from packager.pipeline.build_options import Options
    from packager.pipeline.many_recipes import RecipeResult
    from packager.pipeline.release import ReleaseChecks
    from packager.system.terminal import Terminal


_OTHER_LINES = 6  # of the screen: the heading, the counts, the shell's own
_REDRAWN_S = 1.0
_PATIENCE_S = 900.0  # for a machine: Ray's autoscaler or an operator brings one
_HOUR_S = 3600.0
_LIMITED = ("download", "upload", "commits")  # by --per-hour
_COMMITS_AN_HOUR = 100.0  # of one repository: the Hub allows about 128


def release_side_by_side(
    paths: "Sequence[Path]",
    options: "Options",
    terminal: "Terminal",
    checks: "ReleaseChecks",
    fleet: "FleetOptions",
    show_results: "Callable[[Sequence[RecipeResult]], None]",
    environ: "Mapping[str, str]",
) -> "tuple[RecipeResult, ...]":
    """Release recipes by processes of this machine, or by a Ray cluster.

    Args:
        paths: of the recipes.
        options: where and how.
        terminal: gets all messages.
        checks: what is checked first.
        fleet: how many at a time, and where they keep what.
        show_results: see `release_by_fleet`.
        environ: of this process, with what may publish.
    """
    from packager.fleet.build_requests import Needs
    from packager.fleet.fleet_release import FleetSettings, release_by_fleet
    from packager.fleet.fleet_run import LOOK_S
    from packager.fleet.open_store import check_creates, open_store
    from packager.fleet.policy import Policy
    from packager.fleet.task_processes import task_environ

    checks = replace(checks, read_token=task_environ(environ, "fetch").get("HF_TOKEN", ""))
    limits = limits_of(fleet.per_hour)
    if fleet.ray:
        gpus = fleet.gpus if fleet.gpus is not None else int(options.device != "cpu")
        open_executor = _ray_fleet(options, terminal, fleet, environ)
    else:
        gpus, open_executor = _local_processes(options, fleet, environ)
    store = None if fleet.store is None else open_store(fleet.store, terminal.log)
    if store is not None:
        check_creates(store)
    needs = Needs(
        gpus=gpus,
        publishing=checks.publishing,
        store=store,
        store_url="" if fleet.store is None else absolute_store(fleet.store),
        local_target=options.dist,
        priorities=priorities_of(paths, fleet.priorities),
    )
    with fleet_table(terminal.err) as show:
        settings = FleetSettings(
            needs=needs,
            policy=Policy(attempts=fleet.attempts, store_bytes=fleet.store_bytes, limits=limits),
            name=f"{platform.node()} pid {os.getpid()}",
            open_executor=open_executor,
            patience_s=_PATIENCE_S if fleet.ray else 0.0,
            turn_s=_REDRAWN_S if terminal.err.is_terminal else LOOK_S,
            show=show,
        )
        return release_by_fleet(paths, options, terminal, checks, settings, show_results)


def _local_processes(
    options: "Options", fleet: "FleetOptions", environ: "Mapping[str, str]"
) -> "tuple[int, OpenExecutor]":
    """Return the GPUs of a task, and what opens this machine's executor."""
    from packager.fleet.local_processes import LocalProcesses

    jobs, gpus = fleet.jobs or 1, _gpus(options, environ)
    per_task = fleet.gpus if fleet.gpus is not None else min(1, len(gpus))
    if per_task > len(gpus):
        raise UsageError(f"--gpus {per_task}: this machine has {len(gpus)} that --device {options.device} may use")
    return per_task, lambda orders, _: LocalProcesses(
        name=platform.node() or "this machine",
        folder=options.dist,
        cache=options.cache,
        orders=orders,
        command=(sys.executable, *_task_command(fleet)),
        environ=environ,
        jobs=jobs,
        gpus=gpus[: per_task * jobs],
        disk_bytes=fleet.disk_bytes,
    )


def _ray_fleet(
    options: "Options", terminal: "Terminal", fleet: "FleetOptions", environ: "Mapping[str, str]"
) -> "OpenExecutor":
    """Return what opens the executor of a Ray cluster.

    Raises:
        UsageError: the cluster is not of this machine, and is not asked for a token.
    """
    from packager.fleet.ray_fleet import AUTHENTICATION_HINT, RayFleet

    address = environ.get("RAY_ADDRESS", "auto") if fleet.ray == "auto" else fleet.ray
    host = address.rpartition(":")[0].strip("[]")
    if "://" in address:
        raise UsageError(f"--ray {address}", why="Ray's client protocol is not used", hint="give HOST:PORT of the head")
    if address != "auto" and host not in ray_process.LOOPBACK and environ.get("RAY_AUTH_MODE", "").lower() != "token":
        raise UsageError(f"--ray {address}: whoever reaches it could run code", hint=AUTHENTICATION_HINT)
    return lambda orders, needs: RayFleet(
        client=(sys.executable, "-m", ray_process.__name__, address),
        command=_task_command(fleet),
        client_log=options.dist / "logs" / "ray-client.log",
        folder=PurePosixPath(options.dist.absolute()),
        orders=orders,
        environ=environ,
        log=terminal.log,
        disk_bytes=fleet.disk_bytes,
        needs=needs,
    )


def _task_command(fleet: "FleetOptions") -> tuple[str, ...]:
    """Return the arguments of Python that start the process of a task."""
    return ("-m", task_process.__name__, *(str(path.absolute()) for path in fleet.trusted_keys))


def absolute_store(url: str) -> str:
    """Return the URL of a store as every process of it understands it: a folder with its whole path."""
    return url if "://" in url else str(Path(url).absolute())


def priorities_of(paths: "Sequence[Path]", words: Sequence[str]) -> "dict[Path, int]":
    """Return the priority of each recipe, from words such as 'urgent/*=5'.

    Raises:
        UsageError: a word is not GLOB=N, or no recipe fits.
    """
    found: dict[Path, int] = {}
    for word in words:
        pattern, _, number = word.rpartition("=")
        if not pattern or not number.removeprefix("-").isdecimal():
            raise UsageError(f"--priority {word!r} is not GLOB=N", hint="write 'recipes/urgent-*=5'")
        fitting = [path for path in paths if fnmatch(str(path), pattern)]
        if not fitting:
            raise UsageError(f"--priority {word!r}: no recipe fits {pattern!r}")
        found |= dict.fromkeys(fitting, int(number))
    return found


def limits_of(words: Sequence[str]) -> "Limits":
    """Return what a fleet may do in an hour, from words such as 'download=2TB'.

    Raises:
        UsageError: a word is not WHAT=N.
    """
    from packager.fleet.windows import Limits, LimitWindow

    found = {"commits of each": _COMMITS_AN_HOUR}
    for word in words:
        what, _, number = word.partition("=")
        try:
            if what not in _LIMITED:
                raise ValueError(what)
            found[what] = read_size(number) if what != "commits" else int(number)
            if found[what] < 1:
                raise ValueError(number)
        except (ValueError, typer.BadParameter) as error:
            raise UsageError(
                f"--per-hour {word!r} is not WHAT=N",
                hint="write download=2TB or upload=500GB, 1GB or more, or commits=500",
            ) from error
    windows = {what: LimitWindow(amount, _HOUR_S) for what, amount in found.items()}
    return Limits(
        commits=windows["commits of each"],
        account_commits=windows.get("commits"),
        fetched=windows.get("download"),
        published=windows.get("upload"),
    )


def _gpus(options: "Options", environ: "Mapping[str, str]") -> list[str]:
    """Return the GPUs that tasks can have, as CUDA_VISIBLE_DEVICES names them."""
    if options.device == "cpu":
        return []
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    named = [name for name in environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    return named[:count] if named else [str(index) for index in range(count)]


@contextmanager
def fleet_table(console: Console) -> "Iterator[Callable[[Sequence[FleetRow]], None]]":
    """Show the rows of a fleet on a terminal as one table; elsewhere the log has a line for each task."""
    if not console.is_terminal or console.quiet:
        yield lambda _: None
        return
    with Live(console=console, auto_refresh=False, transient=True) as live:
        drawn = [0.0]

        def show(rows: "Sequence[FleetRow]") -> None:
            if (now := time.monotonic()) >= drawn[0] + _REDRAWN_S / 2:
                drawn[0] = now
                live.update(Group(table_of(rows, now, console.height - _OTHER_LINES), counts_of(rows)), refresh=True)

        yield show


def table_of(rows: "Sequence[FleetRow]", now: float, most: int) -> Table:
    """Return the rows that fit a screen: those that run, then parked, waiting and finished ones."""
    order = ("building", "built", "parked", "requested", "published")
    shown = sorted(rows, key=lambda row: (row.began_at is None, order.index(row.state)))[: max(1, most)]
    table = new_table(("Recipe", "State", "Stage", "Machine", "Seconds", "Why"), numbers=["Seconds"], folding=["Why"])
    for row in shown:
        seconds = "" if row.began_at is None else f"{now - row.began_at:.0f}"
        state = Text(row.state, style=STATE_STYLES[row.state])
        add_row(table, row.repository, state, row.stage or "", row.machine, seconds, row.why)
    return table


def counts_of(rows: "Sequence[FleetRow]") -> Text:
    """Return how many recipes are in which state."""
    counts = Counter(row.state for row in rows)
    return Text(f"{len(rows)} recipes: {', '.join(f'{count} {state}' for state, count in counts.items())}")
