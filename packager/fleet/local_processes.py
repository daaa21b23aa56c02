"""An executor of local processes: one machine that computes so many recipes at a time, fetches and publishes beside."""

import os
import queue
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from packager.fleet.build_requests import LIGHT_CPUS
from packager.fleet.task_processes import run_task_process, task_end
from packager.fleet.tasks import Machine, Start, TaskEnd
from packager.fleet.worker import TaskCall, TaskOrder
from packager.system.processes import Processes

_LIGHT_TASKS = 3  # that always find room beside those that compute


class LocalProcesses:
    """Runs each task in a process of this machine; all are killed at the end, and with this process.

    Args:
        name: of the machine.
        folder: its output folder.
        cache: of the loaders' environments.
        orders: what is done, by recipe.
        command: starts the process of a task, see `run_task_process`.
        environ: the variables of this process.
        jobs: how many tasks compute at a time.
        gpus: the GPUs that tasks get, as CUDA_VISIBLE_DEVICES names them; none on a machine that computes on its CPU.
        disk_bytes: for base models and builds; None for any.
    """

    def __init__(
        self,
        *,
        name: str,
        folder: Path,
        cache: Path,
        orders: Mapping[str, TaskOrder],
        command: Sequence[str],
        environ: Mapping[str, str],
        jobs: int,
        gpus: Sequence[str] = (),
        disk_bytes: int | None = None,
    ) -> None:
        self._folder, self._cache, self._orders, self._command = folder, cache, orders, command
        self._environ, self._free_gpus = dict(environ), list(gpus)
        if not gpus:  # the cores are shared out
            self._environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // jobs)))
        self._bounded = disk_bytes is not None
        cpus = jobs + _LIGHT_TASKS * LIGHT_CPUS
        self._machines = (Machine(name=name, gpus=len(gpus), cpus=cpus, disk_bytes=disk_bytes),)
        self._processes = Processes()
        self._ends: queue.Queue[TaskEnd] = queue.Queue()
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> "LocalProcesses":
        """Return this."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Kill what runs."""
        self._processes.stop_all()
        for thread in self._threads:
            thread.join()

    def now(self) -> float:
        """Return the time in seconds."""
        return time.monotonic()

    def machines(self) -> Sequence[Machine]:
        """Return this machine."""
        return self._machines

    def start(self, order: Start) -> None:
        """Start the process of a task."""
        task = order.task
        call = TaskCall(
            order=self._orders[task.recipe].of(task),
            folder=str(self._folder.absolute()),
            cache=str(self._cache.absolute()),
            drop=order.drop,
            own_base_models=self._bounded,
        )
        gpus = [self._free_gpus.pop() for _ in range(task.gpus)]
        environ = {**self._environ, "CUDA_VISIBLE_DEVICES": ",".join(gpus)} if gpus else self._environ
        self._threads = [thread for thread in self._threads if thread.is_alive()]
        thread = threading.Thread(target=self._run, args=(order, call, environ, gpus), daemon=True)
        self._threads.append(thread)
        thread.start()

    def wait(self, until: float | None) -> Sequence[TaskEnd]:
        """Return what became of tasks, once there is something, or at a time."""
        ends: list[TaskEnd] = []
        with suppress(queue.Empty):
            ends.append(self._ends.get(timeout=None if until is None else max(0.0, until - self.now())))
            while True:
                ends.append(self._ends.get_nowait())
        return ends

    def _run(self, start: Start, call: TaskCall, environ: Mapping[str, str], gpus: Sequence[str]) -> None:
        try:
            end = task_end(start, *run_task_process(call, self._command, environ, self._processes))
        except KeyboardInterrupt:  # all were stopped
            return
        except OSError as error:
            end = TaskEnd(task=start.task, result="failed", why=f"its process cannot be started: {error}", exit_code=12)
        self._free_gpus.extend(gpus)  # before the scheduler hears of it
        self._ends.put(end)
