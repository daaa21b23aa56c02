"""What a release and its client of a Ray cluster tell each other, one JSON object a line. Paths and digests only."""

from packager.records import Record


class RayNode(Record):
    """A node that is alive; `name` is what `ray start --node-name` gave it, otherwise its address."""

    id: str
    name: str
    cpus: float
    gpus: int
    publishes: bool


class RayOrder(Record):
    """Start a task on a node; or, with `needs`, tell Ray's autoscaler which tasks wait for a machine.

    Attributes:
        number: of this start of the task.
        name: of the task, for Ray's lists.
        node: the id of the node.
        call: a `TaskCall` as JSON.
        command: the arguments of Python that start the task's process, before the call.
        cpus, gpus: that Ray sets aside.
        publishes: needs the node's resource `publish`.
        needs: of each task that waits.
    """

    number: int = 0
    name: str = ""
    node: str = ""
    call: str = ""
    command: tuple[str, ...] = ()
    cpus: float = 0.0
    gpus: int = 0
    publishes: bool = False
    needs: tuple[dict[str, float], ...] | None = None


class RayNews(Record):
    """One of: the nodes have changed; a task has ended; the cluster is away; the cluster must not be used.

    Attributes:
        nodes: that are alive.
        number: of the start whose task has ended; 0 if this is no such news.
        text: what `run_task_process` returned, or why there is nothing.
        killed: the process, its worker or its node went away.
        failed: the task could not be run on its node, `text` says why.
        away: why there is no connection.
        refused: why there will never be one.
        hint: what to do.
    """

    nodes: tuple[RayNode, ...] | None = None
    number: int = 0
    text: str = ""
    killed: bool = False
    failed: bool = False
    away: str = ""
    refused: str = ""
    hint: str = ""
