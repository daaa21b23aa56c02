"""An executor of Ray: each task is a Ray task on the node that the scheduler names, which starts our process there.

This module does not import ray: `packager/cli/ray_process.py` does, in a process that is started again when it ends.
What ran then counts as lost. The tasks of a node that was only thought lost can do no harm, see `shared_work.py`.
"""

import queue
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from types import TracebackType

from packager.errors import MachineError
from packager.fleet.ray_messages import RayNews, RayNode, RayOrder
from packager.fleet.task_processes import environ_without_secrets, task_end
from packager.fleet.tasks import Machine, Start, TaskEnd
from packager.fleet.worker import TaskCall, TaskOrder

AUTHENTICATION_HINT = (
    "set RAY_AUTH_MODE=token here and on every node, and give all the token of `ray get-auth-token --generate`"
)
_AGAIN_S = 1.0
_MOST_AGAIN_S = 30.0
_END_S = 5.0
_NEEDS_S = 10.0
_MOST_NEEDS = 1000  # that the autoscaler is told of: what it starts meanwhile takes minutes
_REFUSED = b"InvalidAuthToken"  # ray 2.60, gcs_client.cc, in what its library logs
_NAME_DIGITS = 8  # of a node's id: the name of a node that comes back is another one


@dataclass
class RayFleet:
    """The nodes of a Ray cluster.

    Args:
        client: the command of the client process, with the address.
        command: the arguments of Python that start the process of a task on a node.
        client_log: what it and Ray's library print.
        folder: the output folder of the nodes: each works in `machines/NAME` below it, on a disk of its own.
        orders: what is done, by recipe.
        environ: of this process; the client gets them without what may write.
        log: gets a line when the cluster is away or back.
        disk_bytes: of each node, for base models and builds; None for any.
        needs: returns what waits for machines, for Ray's autoscaler.
    """

    client: Sequence[str]
    command: Sequence[str]
    client_log: Path
    folder: PurePosixPath
    orders: Mapping[str, TaskOrder]
    environ: Mapping[str, str]
    log: Callable[[str], None]
    disk_bytes: int | None = None
    needs: Callable[[], Sequence[Mapping[str, float]]] = lambda: ()
    _process: "subprocess.Popen[str] | None" = None
    _news: "queue.Queue[tuple[int, RayNews | None]]" = field(default_factory=queue.Queue)
    _reader: threading.Thread | None = None
    _generation: int = 0
    _nodes: dict[str, RayNode] = field(default_factory=dict)
    _machines: tuple[Machine, ...] = ()
    _running: dict[int, Start] = field(default_factory=dict)
    _count: int = 0
    _again_s: float = _AGAIN_S
    _again_at: float | None = None
    _away: str = ""
    _needed: tuple[dict[str, float], ...] = ()
    _needs_at: float = 0.0
    _logged: int = 0  # bytes in the client's log before this client

    def __enter__(self) -> "RayFleet":
        """Connect.

        Raises:
            MachineError: ray is not installed, the cluster must not be used, or it cannot be reached.
        """
        self._connect()
        try:
            while not self._machines:
                self._hear(self._next(None))
                if self._away and self._lacks_token():
                    why = "it asks for a token, and this command has none, or another one"
                    raise MachineError("the Ray cluster cannot be used", why=why, hint=AUTHENTICATION_HINT)
                if self._away:
                    hint = "start it with ray start --head, or give another address"
                    raise MachineError("the Ray cluster cannot be reached", why=self._away, hint=hint)
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the client: Ray ends the tasks of a client that has gone."""
        self._close()

    def now(self) -> float:
        """Return the time in seconds."""
        return time.monotonic()

    def machines(self) -> Sequence[Machine]:
        """Return the nodes that are alive; none while the cluster is away."""
        return self._machines

    def start(self, order: Start) -> None:
        """Start a task on its node."""
        task, node = order.task, self._nodes.get(order.machine)
        self._count += 1
        self._running[self._count] = order
        if node is None:  # it has gone since the scheduler saw it, which it will see itself
            return
        call = TaskCall(
            order=self.orders[task.recipe].of(task),
            folder=str(self.folder / "machines" / node.name),
            drop=order.drop,
            own_base_models=True,
        )
        self._tell(
            RayOrder(
                number=self._count,
                name=str(task),
                node=node.id,
                call=call.model_dump_json(),
                command=tuple(self.command),
                cpus=task.cpus,
                gpus=task.gpus,
                publishes=task.stage == "publish",
            )
        )

    def wait(self, until: float | None) -> Sequence[TaskEnd]:
        """Return what became of tasks; nothing also when other nodes are there than before, or at a time."""
        self._tell_needs()
        ends: list[TaskEnd] = []
        machines = self._machines
        while not ends and self._machines is machines:
            if self._again_at is not None and self.now() >= self._again_at:
                self._again_at = None
                self._connect()
            times = [each for each in (until, self._again_at) if each is not None]
            news = self._next(min(times, default=None))
            if news is None and until is not None and self.now() >= until:
                break
            ends += self._hear(news)
        return ends

    def _tell_needs(self) -> None:
        """Tell Ray's autoscaler what waits, now and then."""
        if not self._machines or self.now() < self._needs_at:
            return
        self._needs_at = self.now() + _NEEDS_S
        needed = tuple(dict(need) for need in self.needs()[:_MOST_NEEDS])
        if needed != self._needed:
            self._needed = needed
            self._tell(RayOrder(needs=needed))

    def _next(self, until: float | None) -> "tuple[int, RayNews | None] | None":
        with suppress(queue.Empty):
            return self._news.get(timeout=None if until is None else max(0.0, until - self.now()))
        return None

    def _hear(self, heard: "tuple[int, RayNews | None] | None") -> list[TaskEnd]:
        """Take news in, and return what became of a task."""
        if heard is None or heard[0] != self._generation:
            return []  # of a client before
        news = heard[1]
        if news is None:
            self._lose_client()
        elif news.refused:
            raise MachineError(
                "the Ray cluster cannot be used", why=news.refused, hint=news.hint or AUTHENTICATION_HINT
            )
        elif news.away:
            self._away = news.away
        elif news.nodes is not None:
            self._see(news.nodes)
        elif (start := self._running.pop(news.number, None)) is not None:
            if news.failed:
                why = f"cannot be run on its node: {news.text}"
                return [TaskEnd(task=start.task, result="failed", why=why, exit_code=MachineError.exit_code)]
            return [task_end(start, news.text, news.killed)]
        return []

    def _see(self, nodes: Sequence[RayNode]) -> None:
        if self._away:
            self.log("the Ray cluster is back")
        self._away, self._again_s = "", _AGAIN_S
        self._nodes = {f"{node.name}/{node.id[:_NAME_DIGITS]}": node for node in nodes}
        # The scheduler starts the tasks of nodes that went away elsewhere: what is heard of them later is of the past.
        self._running = {number: start for number, start in self._running.items() if start.machine in self._nodes}
        self._machines = tuple(
            Machine(
                name=name, gpus=node.gpus, cpus=node.cpus, disk_bytes=self.disk_bytes, publishes=node.publishes
            )
            for name, node in self._nodes.items()
        )  # fmt: skip

    def _lose_client(self) -> None:
        """The client has ended: nothing is known of any node until it is back."""
        self._close()
        if not self._away:
            self._away = "its client ended"
        if self._machines:
            self.log(
                f"the Ray cluster is away (see {self.client_log}): what ran is lost, and the connection is tried again"
            )
            self._machines = ()
        self._nodes, self._needed, self._needs_at = {}, (), 0.0
        self._running.clear()
        self._again_at = self.now() + self._again_s
        self._again_s = min(_MOST_AGAIN_S, 2 * self._again_s)

    def _lacks_token(self) -> bool:
        """Whether the head refused the client: Ray raises nothing that tells this from a head that is away."""
        with self.client_log.open("rb") as log:
            log.seek(self._logged)
            return _REFUSED in log.read()

    def _connect(self) -> None:
        self._generation += 1
        self.client_log.parent.mkdir(parents=True, exist_ok=True)
        with self.client_log.open("ab") as log:
            self._logged = log.tell()
            self._process = subprocess.Popen(
                self.client, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True,
                env=environ_without_secrets(self.environ), start_new_session=True,
            )  # fmt: skip
        self._reader = threading.Thread(target=self._read, args=(self._process, self._generation), daemon=True)
        self._reader.start()

    def _read(self, process: "subprocess.Popen[str]", generation: int) -> None:
        if process.stdout is not None:
            with process.stdout:
                for line in process.stdout:
                    self._news.put((generation, RayNews.model_validate_json(line)))
        self._news.put((generation, None))

    def _tell(self, order: RayOrder) -> None:
        if self._process is not None and self._process.stdin is not None:
            with suppress(BrokenPipeError):  # its end is heard as news
                self._process.stdin.write(order.model_dump_json(exclude_defaults=True) + "\n")
                self._process.stdin.flush()

    def _close(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        if process.stdin is not None:
            with suppress(BrokenPipeError):
                process.stdin.close()
        try:
            process.wait(_END_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if self._reader is not None:
            self._reader.join()
