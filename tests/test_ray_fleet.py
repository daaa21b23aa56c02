"""The executor of Ray with a program in place of its client: nodes come and go, tasks end, the client ends.

tests/test_ray_release.py runs the client itself and Ray.
"""

import json
import os
import sys
from pathlib import Path, PurePosixPath
from typing import Any

import pytest

from packager.errors import MachineError
from packager.fleet.ray_fleet import RayFleet
from packager.fleet.ray_messages import RayNews, RayNode
from packager.fleet.tasks import Machine, Start, Task, TaskEnd
from packager.fleet.worker import TaskCall, TaskOrder

A = "tester/a-GPTQ"
NODE = RayNode(id="0123456789abcdef", name="n1", cpus=2.0, gpus=1, publishes=True)
DONE = '{"why": "", "exit_code": 0}'
# A program that says what it is told to, gives each order to a file, and answers it with the next news.
CLIENT = """
import json, pathlib, sys
began, answers, file = sys.argv[1:]
for line in json.loads(began):
    print(json.dumps(line), flush=True)
answers = json.loads(answers)
for line in sys.stdin:
    pathlib.Path(file).open("a").write(line)
    if not answers:
        sys.exit()
    print(json.dumps(answers.pop(0)), flush=True)
"""


def news(**fields: Any) -> dict[str, Any]:
    return RayNews(**fields).model_dump(mode="json", exclude_defaults=True)


def fleet(tmp_path: Path, *answers: dict[str, Any], began: tuple[dict[str, Any], ...] = (), **changes: Any) -> RayFleet:
    began = began or (news(nodes=(NODE,)),)
    order = TaskOrder(recipe="a.yaml", repository=A, inputs="i", store="s3://s", stage="fetch")
    values: dict[str, Any] = {
        "client": (sys.executable, "-c", CLIENT, json.dumps(began), json.dumps(answers), str(tmp_path / "orders")),
        "command": ("-m", "x"), "client_log": tmp_path / "log", "folder": PurePosixPath("/data"), "orders": {A: order},
        "environ": dict(os.environ), "log": lambda _: None,
    }  # fmt: skip
    return RayFleet(**values | changes)


def start(stage: Any = "sweep", name: str = "n1/01234567", **changes: Any) -> Start:
    return Start(task=Task(recipe=A, stage=stage, **changes), machine=name, drop=("tester/old",))


def ends(there: RayFleet) -> list[TaskEnd]:
    found: list[TaskEnd] = []
    deadline = there.now() + 30
    while not found and there.now() < deadline:
        found += there.wait(deadline)
    return found


def test_a_task_is_sent_to_its_node_with_paths_and_digests_only(tmp_path: Path) -> None:
    with fleet(tmp_path, news(number=1, text=DONE), disk_bytes=7) as there:
        assert there.machines() == (Machine(name="n1/01234567", gpus=1, cpus=2.0, disk_bytes=7),)
        there.start(start(gpus=1, cpus=1.5))
        assert ends(there) == [TaskEnd(task=start(gpus=1, cpus=1.5).task, result="done")]
    order = json.loads((tmp_path / "orders").read_text())
    call = TaskCall.model_validate_json(order.pop("call"))
    assert order == {
        "number": 1, "name": f"{A} sweep", "node": NODE.id, "command": ["-m", "x"], "cpus": 1.5, "gpus": 1,
    }  # fmt: skip
    assert (call.folder, call.drop, call.own_base_models) == ("/data/machines/n1", ("tester/old",), True)
    assert (call.order.stage, call.order.store, call.order.inputs) == ("sweep", "s3://s", "i")


WHAT_ENDS = {
    "its node went away": (news(number=1, text="NodeDiedError", killed=True), "lost", "NodeDiedError", 0),
    "its node lacks the file system": (
        news(number=1, text="no such folder", failed=True), "failed", "cannot be run on its node: no such folder", 12,
    ),
    "the network failed": (
        news(number=1, text='{"why": "net", "exit_code": 3}'), "failed", "net", 3,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WHAT_ENDS)
def test_what_becomes_of_a_task(name: str, tmp_path: Path) -> None:
    answer, result, why, code = WHAT_ENDS[name]
    with fleet(tmp_path, answer) as there:
        there.start(start("publish"))
        (end,) = ends(there)
    assert (end.result, end.why, end.exit_code) == (result, why, code)
    assert json.loads((tmp_path / "orders").read_text())["publishes"]


def test_a_client_that_ends_is_started_again_and_its_tasks_are_lost(tmp_path: Path) -> None:
    said: list[str] = []
    with fleet(tmp_path, log=said.append) as there:
        before = there.machines()
        there.start(start())
        deadline = there.now() + 30
        assert there.wait(deadline) == []
        assert there.machines() == ()  # so the scheduler loses what ran
        while not there.machines() and there.now() < deadline:
            there.wait(deadline)
        assert there.machines() == before
        there.start(start())  # an end of the task before would be taken for one of this
    assert [text.partition(" (")[0] for text in said] == ["the Ray cluster is away", "the Ray cluster is back"]


def test_nodes_that_come_and_go_are_seen(tmp_path: Path) -> None:
    again = NODE.model_copy(update={"id": "f" * 16, "publishes": False})
    with fleet(tmp_path, news(nodes=(again,))) as there:
        there.start(start())
        assert there.wait(there.now() + 30) == []
        assert there.machines() == (Machine(name="n1/ffffffff", gpus=1, cpus=2.0, publishes=False),)


def test_what_is_heard_late_of_a_node_that_went_away_is_of_no_task_of_now(tmp_path: Path) -> None:
    other = NODE.model_copy(update={"id": "f" * 16})
    late = news(number=1, text="NodeDiedError", killed=True)
    with fleet(tmp_path, news(nodes=(other,)), late, news(number=3, text=DONE)) as there:
        there.start(start())
        assert there.wait(there.now() + 30) == []
        there.start(start(name="n1/ffffffff"))  # the same task, elsewhere
        there.start(start("verify", name="n1/ffffffff"))
        (end,) = ends(there)
        assert (end.task.stage, end.result) == ("verify", "done")


def test_what_waits_is_told_once(tmp_path: Path) -> None:
    needs = [{"GPU": 1.0, "CPU": 1.0}]
    with fleet(tmp_path, news(nodes=(NODE,)), news(number=1, text=DONE), needs=lambda: needs) as there:
        there.wait(there.now() + 30)
        there.start(start())
        assert [end.result for end in ends(there)] == ["done"]
    told = [json.loads(line) for line in (tmp_path / "orders").read_text().splitlines()]
    assert [line.get("needs") for line in told] == [needs, None]


@pytest.mark.parametrize(
    ("began", "why"),
    [
        (news(refused="ray is not installed", hint="pip install"), "ray is not installed"),
        (news(away="no cluster at 10.0.0.7"), "no cluster at 10.0.0.7"),
    ],
)
def test_a_cluster_that_cannot_be_used_is_an_error(began: dict[str, Any], why: str, tmp_path: Path) -> None:
    with pytest.raises(MachineError) as raised, fleet(tmp_path, began=(began,)):
        pass
    assert raised.value.why == why
    assert raised.value.hint


@pytest.mark.parametrize(
    ("before", "said", "what"),
    [
        ("", "Unauthenticated: RPC error: InvalidAuthToken: missing or incorrect", "cannot be used"),
        ("InvalidAuthToken\n", "no route to host", "cannot be reached"),
    ],
)
def test_a_head_that_refuses_the_token_is_not_taken_for_one_that_is_away(
    before: str, said: str, what: str, tmp_path: Path
) -> None:
    (tmp_path / "log").write_text(before)
    away = news(away="Failed to connect to Ray cluster at 10.0.0.7:6379")
    program = f"import sys; print({said!r}, file=sys.stderr); print({json.dumps(away)!r}, flush=True); sys.stdin.read()"
    with pytest.raises(MachineError, match=what) as raised, fleet(tmp_path, client=(sys.executable, "-c", program)):
        pass
    assert ("RAY_AUTH_MODE=token" in raised.value.hint) == (what == "cannot be used")
