"""The client of a Ray cluster, a process of its own: `python -m packager.cli.ray_process ADDRESS`. Only it imports ray.

Ray's client library ends its process when the head node is away for too long (`gcs_rpc_server_reconnect_timeout_s`), so
`packager/fleet/ray_fleet.py` starts this process, and starts it again. It reads one JSON object a line and writes one a
line; the keys are those of `RayOrder` and `RayNews`. It ends with its standard input.
"""

import os
import queue
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any

from packager.fleet.ray_messages import RayNews, RayNode, RayOrder
from packager.fleet.task_processes import run_task_process
from packager.fleet.worker import TaskCall
from packager.system.processes import Processes

_POLL_S = 0.2
_NODES_S = 1.0
LOOPBACK = ("127.0.0.1", "localhost", "::1")
_A_TRIFLE = 0.001  # of a resource that a node has or has not


def _run(call: str, command: Sequence[str]) -> tuple[str, bool]:
    """Run a task on a node: the process of packager that is installed there, with the variables of the node."""
    parsed = TaskCall.model_validate_json(call)
    return run_task_process(parsed, [sys.executable, *command], dict(os.environ), Processes())


class _Client:
    """What one connection to a cluster does."""

    def __init__(self, ray: Any, out: Any) -> None:
        self._ray, self._out = ray, out
        self._running: dict[Any, int] = {}
        self._nodes: tuple[RayNode, ...] | None = None

    def say(self, news: RayNews) -> None:
        self._out.write(news.model_dump_json(exclude_defaults=True) + "\n")
        self._out.flush()

    def obey(self, order: RayOrder) -> None:
        if order.needs is not None:
            from ray.autoscaler.sdk import request_resources

            request_resources(bundles=[{name: value for name, value in need.items() if value} for need in order.needs])
            return
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        # The worker process ends with the task: no variable of it is left.
        remote = self._ray.remote(max_calls=1, max_retries=0)(_run).options(
            num_cpus=order.cpus,
            num_gpus=order.gpus,
            resources={"publish": _A_TRIFLE} if order.publishes else None,
            scheduling_strategy=NodeAffinitySchedulingStrategy(node_id=order.node, soft=False),
            name=order.name,
        )
        self._running[remote.remote(order.call, list(order.command))] = order.number

    def look(self) -> None:
        """Say what has ended."""
        done = self._ray.wait(list(self._running), timeout=0)[0] if self._running else []
        for ref in done:
            number = self._running.pop(ref)
            try:
                text, killed = self._ray.get(ref)
            except self._ray.exceptions.RayTaskError as error:
                why = str(error.cause or error).strip().splitlines()[-1]
                self.say(RayNews(number=number, text=why, failed=True))
            except self._ray.exceptions.RayError as error:  # its node or its worker process went away
                self.look_at_nodes()  # first: nothing more is to be started on a node that went away
                self.say(RayNews(number=number, text=type(error).__name__, killed=True))
            else:
                self.say(RayNews(number=number, text=text, killed=killed))

    def look_at_nodes(self) -> None:
        """Say which nodes there are, if they are others than before."""
        nodes = tuple(
            RayNode(
                id=node["NodeID"],
                name=node["NodeName"],
                cpus=node["Resources"].get("CPU", 0.0),
                gpus=int(node["Resources"].get("GPU", 0)),
                publishes="publish" in node["Resources"],
            )
            for node in sorted(self._ray.nodes(), key=lambda node: str(node["NodeID"]))
            if node["Alive"]
        )
        if nodes != self._nodes:
            self._nodes = nodes
            self.say(RayNews(nodes=nodes))


def run_ray_client() -> int:
    """Connect, and do what is asked until standard input ends."""
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what ray prints is no message
    try:
        import ray
    except ImportError as error:
        client = _Client(None, out)
        client.say(RayNews(refused=f"ray is not installed: {error}", hint="pip install 'gptq-packager[fleet]'"))
        return 0
    client = _Client(ray, out)
    try:
        ray.init(address=sys.argv[1], log_to_driver=False, configure_logging=False, namespace="packager")
    except ray.exceptions.AuthenticationError as error:
        client.say(RayNews(refused=str(error).strip().splitlines()[0]))
        return 0
    except (ConnectionError, ValueError, RuntimeError, ray.exceptions.RayError) as error:
        client.say(RayNews(away=str(error).strip().splitlines()[0]))
        return 0
    head = ray.get_runtime_context().gcs_address.rpartition(":")[0].strip("[]")
    own = (*LOOPBACK, ray.util.get_node_ip_address())
    if head not in own and os.environ.get("RAY_AUTH_MODE", "").lower() != "token":
        client.say(RayNews(refused=f"the Ray cluster of {head} is not of this machine, and RAY_AUTH_MODE is not token"))
        return 0
    return _serve(client)


def _serve(client: _Client) -> int:
    orders: queue.Queue[RayOrder | None] = queue.Queue()

    def read() -> None:
        for line in sys.stdin:
            orders.put(RayOrder.model_validate_json(line))
        orders.put(None)

    threading.Thread(target=read, daemon=True).start()
    looked_at = 0.0
    while True:
        if time.monotonic() >= looked_at + _NODES_S:
            looked_at = time.monotonic()
            client.look_at_nodes()
        client.look()
        try:
            order = orders.get(timeout=_POLL_S)
        except queue.Empty:
            continue
        if order is None:
            return 0
        client.obey(order)


if __name__ == "__main__":
    sys.exit(run_ray_client())
