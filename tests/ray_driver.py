"""A release by a Ray cluster as `packager release --ray` does it, but tasks are forked from one process with torch.

Usage: ray_driver.py ADDRESS SOCKET DIST STORE RECIPE...; ends with the highest exit code of a recipe.
"""

import os
import sys
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

from packager.cli import ray_process
from packager.fleet.build_requests import Needs
from packager.fleet.fleet_release import FleetSettings, WaitingNeeds, release_by_fleet
from packager.fleet.open_store import open_store
from packager.fleet.policy import Policy
from packager.fleet.ray_fleet import RayFleet
from packager.fleet.worker import TaskOrder
from packager.pipeline.build_options import Options
from packager.pipeline.release import ReleaseChecks
from packager.system.terminal import Terminal
from tests.import_graph import ROOT

# A node that is killed every half minute loses more of a short task than one that is killed every day.
LOSSES = 1000


def main() -> int:
    """Release, and print what becomes of every task."""
    address, socket, dist, store, *recipes = sys.argv[1:]
    terminal, folder = Terminal(verbose=True), Path(dist)

    def open_executor(orders: Mapping[str, TaskOrder], needs: WaitingNeeds) -> RayFleet:
        return RayFleet(
            client=(sys.executable, "-m", ray_process.__name__, address),
            command=(str(ROOT / "tests" / "fork_server.py"), socket),
            client_log=folder / "logs" / "ray-client.log",
            folder=PurePosixPath(dist),
            orders=orders,
            environ=os.environ,
            log=terminal.log,
            needs=needs,
        )

    settings = FleetSettings(
        needs=Needs(gpus=1, publishing=True, store=open_store(store), store_url=store, local_target=folder),
        policy=Policy(losses=LOSSES, backoff_s=2.0, attempts=6),
        name="test",
        open_executor=open_executor,
        patience_s=300.0,
    )
    options = Options(dist=folder, cache=folder / "cache", device="cpu", environ={})
    results = release_by_fleet([Path(each) for each in recipes], options, terminal, ReleaseChecks(here=False), settings)
    for result in results:
        terminal.log(f"{result.repository}: {result.outcome} {result.why}")
    return max(result.exit_code for result in results)


if __name__ == "__main__":
    sys.exit(main())
