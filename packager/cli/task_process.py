"""The process of one task of a fleet: `python -m packager.cli.task_process [TRUSTED...] CALL`, started by an executor.

TRUSTED are the public keys that may have signed a release before. CALL is a `TaskCall` as JSON. What becomes of the
task is one line on standard output, a `TaskReport`; the log goes to standard error. Exits with 0 if it could say so.
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from packager.errors import PATH_REFUSALS, PackagerError, path_refusal

if TYPE_CHECKING:
    from packager.fleet.worker import TaskCall
    from packager.publish.sign_release import SigningKeys
    from packager.system.terminal import Terminal


def run_one_task() -> None:
    """Run the task, and say what became of it."""
    from packager.fleet.worker import TaskCall, TaskReport
    from packager.system.terminal import Terminal

    *trusted, text = sys.argv[1:]
    call, terminal = TaskCall.model_validate_json(text), Terminal(verbose=True)
    report = TaskReport()
    try:
        try:
            _run(call, terminal, [Path(path) for path in trusted])
        except PATH_REFUSALS as error:
            raise path_refusal(error) or error from error
    except PackagerError as error:
        terminal.error(error)
        why = f"{str(error).splitlines()[0]}" + (f" ({error.why.splitlines()[0].strip()})" if error.why else "")
        report = TaskReport(why=why, exit_code=error.exit_code)
    terminal.write(report.model_dump_json() + "\n")


def _run(call: "TaskCall", terminal: "Terminal", trusted: Sequence[Path]) -> None:
    from packager.fleet.worker import drop_recipes, run_task
    from packager.pipeline.build_options import Options, default_cache

    order, folder = call.order, Path(call.folder)
    drop_recipes(folder, call.drop)
    # First: it takes the passphrase out of the variables, which a target of another package gets.
    keys = _keys(trusted) if order.stage == "publish" else None
    options = Options(
        dist=folder,
        cache=Path(call.cache) if call.cache else default_cache(os.environ),
        device=order.device,
        environ=dict(os.environ),
        gpu_memory_bytes=order.gpu_memory_bytes,
        local_target=Path(order.local_target) if order.local_target else None,
    )
    run_task(order, options, terminal, keys=keys)


def _keys(trusted: Sequence[Path]) -> "SigningKeys":
    """Return the key of the machine that publishes, as its environment names it, and those that are trusted."""
    from packager.cli.signing import signing_keys

    key = os.environ.get("PACKAGER_SIGN_KEY")
    return signing_keys(Path(key) if key else None, list(trusted), ask=False)


if __name__ == "__main__":
    run_one_task()
