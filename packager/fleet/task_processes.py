"""A task in a process of its own: what the process is told, which variables it gets, and what became of it."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from pydantic import ValidationError

from packager.fleet.tasks import Start, TaskEnd, TaskStage
from packager.fleet.worker import TaskCall, TaskReport, base_model_folder
from packager.system.processes import Processes, ending, tail

# An error of the recipe or of the model: the next attempt would fail in the same way.
_FINAL: Final = frozenset({2, 4, 5, 7, 9})
_MOST_S: Final = 30 * 24 * 3600.0
# What can write to a target that packager knows, or sign for it. `ACTIONS_ID_TOKEN_...` is a CI job's identity. A token
# of another package's target is not known, and what opens the store is needed.
_SECRETS: Final = (
    "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "PACKAGER_GIT_TOKEN", "PACKAGER_READ_TOKEN", "PACKAGER_SIGN_KEY",
    "PACKAGER_SIGN_PASSPHRASE", "ACTIONS_ID_TOKEN_REQUEST_TOKEN", "ACTIONS_ID_TOKEN_REQUEST_URL", "HF_OIDC_RESOURCE",
    "GITHUB_TOKEN", "GH_TOKEN", "SSH_AUTH_SOCK",
)  # fmt: skip


def environ_without_secrets(environ: Mapping[str, str]) -> dict[str, str]:
    """Return variables without those that may write to a target or sign for it, see `_SECRETS`.

    A token that `hf auth login` has written to a file is hidden as well.
    """
    return {name: value for name, value in environ.items() if name not in _SECRETS} | {"HF_TOKEN_PATH": os.devnull}


def task_environ(environ: Mapping[str, str], stage: TaskStage) -> dict[str, str]:
    """Return the variables of a task's process: only one that publishes keeps what may write.

    The others can read gated models with PACKAGER_READ_TOKEN.
    """
    own = {name: value for name, value in environ.items() if not name.startswith("RAY_")}  # may open the cluster
    if stage == "publish":
        return {name: value for name, value in own.items() if name != "PACKAGER_READ_TOKEN"}
    kept = environ_without_secrets(own)
    if token := own.get("PACKAGER_READ_TOKEN"):
        kept["HF_TOKEN"] = token
    return kept


def run_task_process(
    call: TaskCall, command: Sequence[str], environ: Mapping[str, str], processes: Processes
) -> tuple[str, bool]:
    """Run a task in a process, to its end.

    Args:
        call: the task.
        command: starts the process; the call is added as its last argument.
        environ: of this machine, with whatever secrets it has.
        processes: can stop it.

    Returns:
        A `TaskReport` as JSON, and whether the process was killed instead: then the text says how.

    Raises:
        KeyboardInterrupt: it was stopped.
    """
    folder, order = Path(call.folder), call.order
    logs = folder / "logs" / Path(order.repository)
    logs.mkdir(parents=True, exist_ok=True)
    log, result = logs / f"{order.stage}.log", logs / f".{order.stage}.result"
    variables = task_environ(environ, order.stage)
    if call.own_base_models:
        variables["HF_HUB_CACHE"] = str(base_model_folder(folder, order.repository).absolute())
    with log.open("ab") as err, result.open("w+b") as out:
        status = processes.run(
            [*command, call.model_dump_json()],
            folder=folder,
            environ=variables,
            out=out,
            err=err,
            timeout_s=_MOST_S,
        )
        out.seek(0)
        text = out.read().decode(errors="replace").strip()
    result.unlink(missing_ok=True)
    if status is None or status < 0:
        return ("took too long" if status is None else ending(status)), True
    try:
        return TaskReport.model_validate_json(text).model_dump_json(), False
    except ValidationError:
        last = tail(log, 1)
        return TaskReport(why=f"{ending(status)}: {last}", exit_code=1).model_dump_json(), False


def task_end(start: Start, text: str, killed: bool) -> TaskEnd:
    """Return what became of a task, from what `run_task_process` returns. A process that was killed counts as lost."""
    if killed:
        return TaskEnd(task=start.task, result="lost", why=text)
    report = TaskReport.model_validate_json(text)
    if not report.exit_code:
        return TaskEnd(task=start.task, result="done")
    final = report.exit_code in _FINAL
    return TaskEnd(task=start.task, result="failed", why=report.why, final=final, exit_code=report.exit_code)
