"""Kill a publish at chosen moments, many times in one process start: run by test_publish_crash.py.

Reads a JSON list of lists of kill points from standard input: each inner list is a chain of killed publishes of one
repository, followed by one that may end. A number n kills before the n-th effect (a git process, a rename, a removal, a
file opened for writing, a folder made); {"seconds": s} kills the whole process group after s seconds, git children
included. Prints one JSON object per chain.
"""

import json
import os
import shutil
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from packager.cli.signals import end_command, raise_on_signals
from packager.publish.branches import BranchContent, PublishReport, publish_branches
from packager.publish.compare_plan import require_as_planned
from packager.publish.plan import PublishPlan
from packager.publish.saved_plan import read_plan, saved_plan
from packager.publish.sign_release import Files
from packager.publish.targets.local import LocalTarget
from tests.effects import FILES_AND_PROCESSES, EffectCounter
from tests.publish_fixtures import (
    REPOSITORY,
    SHORT_WAITS,
    describe,
    files_in,
    fixed_signer,
    git,
    hub_folder,
    leftovers,
    trees,
)

Kill = int | dict[str, Any]


def publish(contents: list[BranchContent], root: Path) -> PublishReport:
    """Publish, signed and exactly a saved plan if the environment says so."""
    signer = fixed_signer(root.with_name("statements")) if os.environ.get("TEST_SIGNED") else None
    target = LocalTarget(root, REPOSITORY, waits=SHORT_WAITS)
    saved = read_plan(Path(os.environ["TEST_PLAN"])) if os.environ.get("TEST_PLAN") else None

    def compare(plan: PublishPlan, files: Files) -> None:
        if saved:
            require_as_planned(saved, saved_plan(saved.subject, plan, files), plan, target)

    return publish_branches(contents, target, lambda _: None, signer=signer, compare=compare)


def publish_in_child(contents: list[BranchContent], root: Path, kill: Kill) -> int:
    """Publish in a forked child that is killed; return the number of effects if it came to its end, else -1.

    Raises:
        SystemExit: the child ended in another way than by its signal, with 128 + its number, or whole.
    """
    wanted: dict[str, Any] = kill if isinstance(kill, dict) else {"effect": kill}
    number = signal.Signals[wanted.get("signal", "SIGKILL")]
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.setsid()
            signal.signal(signal.SIGHUP, signal.SIG_DFL)  # ignored under nohup
            counter = EffectCounter(wanted.get("effect", 0), number, FILES_AND_PROCESSES)
            sys.addaudithook(counter)
            _publish_as_the_command_does(contents, root)
            os.write(writer, str(counter.count).encode())
            os._exit(0)
        finally:
            os._exit(1)  # a fork must not go on as its parent
    os.close(writer)
    if "seconds" in wanted:
        time.sleep(wanted["seconds"])
        if number != signal.SIGKILL:
            os.kill(child, number)
        else:
            try:
                os.killpg(child, number)
            except ProcessLookupError:
                os.kill(child, number)
    _, status = os.waitpid(child, 0)
    with os.fdopen(reader, "rb") as stream:
        count = stream.read()
    # A signal that comes before the handler is there ends the child by itself.
    if os.waitstatus_to_exitcode(status) not in (0, -number, 128 + number):
        raise SystemExit(f"the child failed at {kill}: {os.waitstatus_to_exitcode(status)}")
    return int(count) if count else -1


def _publish_as_the_command_does(contents: list[BranchContent], root: Path) -> None:
    """Publish; SIGTERM and SIGHUP end the process as they end the command."""
    try:
        raise_on_signals()
        publish(contents, root)
        for name in ("SIGTERM", "SIGHUP"):
            signal.signal(signal.Signals[name], signal.SIG_IGN)  # the publish has ended; what follows is this driver's
    except KeyboardInterrupt as error:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115, PTH123 - the process ends here
        os._exit(end_command(error))
    except BaseException:  # noqa: BLE001 - a fork must not go on as its parent
        traceback.print_exc()
        os._exit(1)


def run_chain(before: Path, root: Path, contents: list[BranchContent], kills: list[Kill]) -> object:
    """Start from the state in `before`, publish under each kill, then once more to the end."""
    shutil.rmtree(root, ignore_errors=True)
    if before.exists():
        shutil.copytree(before, root, symlinks=True)
    repository = hub_folder(root)
    between, counts = [], []
    for kill in kills:
        counts.append(publish_in_child(contents, root, kill))
        between.append(trees(repository) if repository.exists() else {})
    report = publish(contents, root)
    return {
        "counts": counts,
        "between": between,
        "trees": trees(repository),
        "status": git("status", "--porcelain", "--ignored", cwd=repository),
        "fsck": git("fsck", "--full", "--strict", "--no-dangling", cwd=repository),
        "main": sorted(files_in(repository)),
        "leftovers": leftovers(root),
        "notes": report.notes,
    }


def main() -> None:
    """Run every chain of standard input: arguments are the state before, the scratch root and the folders."""
    before, root, *folders = map(Path, sys.argv[1:])
    contents = [describe(folder, folder.name) for folder in folders]
    for kills in json.load(sys.stdin):
        print(json.dumps(run_chain(before, root, contents, kills)), flush=True)


if __name__ == "__main__":
    main()
