"""The scheduler: which task starts where, by hand and by a simulated clock."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from packager.fleet.drive import drive
from packager.fleet.policy import Policy
from packager.fleet.scheduler import Scheduler
from packager.fleet.simulated import SimulatedFleet, World
from packager.fleet.tasks import AT_HOME, TASK_STAGES, BuildRequest, Machine, Start, Task, TaskEnd
from packager.fleet.windows import Limits, LimitWindow

GB = 10**9


def request(name: str, *, gpus: int = 1, shares: int = 1, priority: int = 0, disk: int = 0, size: int = GB):
    stages = [Task(recipe=name, stage=stage, gpus=gpus) for stage in ("evaluate", "verify")]
    sweeps = [Task(recipe=name, stage="sweep", share=share, gpus=gpus, upload_bytes=size) for share in range(shares)]
    fetch, card = Task(recipe=name, stage="fetch", download_bytes=size), Task(recipe=name, stage="card")
    publish = Task(recipe=name, stage="publish", download_bytes=size, upload_bytes=size, commits=4)
    tasks = (fetch, *sweeps, *stages, card, publish)
    return BuildRequest(recipe=name, tasks=tasks, disk_bytes=disk, store_bytes=disk, priority=priority)


def machines(count: int = 1, **changes) -> tuple[Machine, ...]:
    values = {"gpus": 1, "cpus": 8.0, **changes}
    return tuple(Machine(name=f"m{index}", **values) for index in range(count))


class ByHand:
    """Drives a scheduler one step at a time, and records the starts."""

    def __init__(self, requests: Sequence[BuildRequest], there: Sequence[Machine], policy: Policy | None = None):
        self.scheduler, self.there, self.now = Scheduler(requests, policy), tuple(there), 0.0
        self.running: dict[str, Start] = {}
        self.started: list[str] = []

    def step(self, now: float | None = None) -> list[str]:
        self.now = self.now if now is None else now
        self.scheduler.see(self.there, self.now)
        starts = self.scheduler.assign(self.now)
        for order in starts:
            self.running[str(order.task)] = order
        self.started += (names := [str(order.task) for order in starts])
        return names

    def end(self, name: str, result: Literal["done", "failed", "lost"] = "done", **fields) -> list[str]:
        self.scheduler.take(TaskEnd(task=self.running.pop(name).task, result=result, **fields), self.now)
        return self.step()


def test_the_stages_of_a_recipe_run_in_order_at_home() -> None:
    hand = ByHand([request("a")], machines(2))
    assert hand.step() == ["a fetch"]
    home = hand.running["a fetch"].machine
    assert hand.scheduler.state("a") == "building"
    for done, following in (("fetch", "sweep"), ("sweep", "evaluate"), ("evaluate", "verify"), ("verify", "card")):
        assert hand.end(f"a {done}") == [f"a {following}"]
        assert hand.running[f"a {following}"].machine == home
    assert hand.end("a card") == ["a publish"]
    assert hand.scheduler.state("a") == "built"
    assert hand.end("a publish") == []
    assert hand.scheduler.state("a") == "published"
    assert hand.scheduler.is_finished


def test_one_model_is_swept_while_the_next_is_fetched_and_the_last_is_published() -> None:
    hand = ByHand([request("a"), request("b"), request("c")], machines(), Policy(fetches=1))
    assert hand.step() == ["a fetch"]
    assert hand.end("a fetch") == ["a sweep", "b fetch"]
    assert hand.end("b fetch") == []  # one ahead of the GPU, and no more
    for stage in ("sweep", "evaluate", "verify"):
        hand.end(f"a {stage}")
    assert sorted(hand.running) == ["a card", "b sweep", "c fetch"]
    hand.end("a card")
    assert sorted(hand.running) == ["a publish", "b sweep", "c fetch"]


def test_shares_run_side_by_side_and_all_before_the_next_stage() -> None:
    hand = ByHand([request("a", shares=2)], machines(gpus=2))
    hand.step()
    assert hand.end("a fetch") == ["a sweep", "a sweep 2"]
    assert hand.end("a sweep 2") == []
    assert hand.end("a sweep") == ["a evaluate"]


def test_a_higher_priority_goes_first_and_age_decides_between_equals() -> None:
    hand = ByHand([request("a"), request("b"), request("c", priority=1)], machines(), Policy(fetches=1, ahead=2))
    assert hand.step() == ["c fetch"]
    assert hand.end("c fetch") == ["c sweep", "a fetch"]


def test_a_task_with_several_gpus_is_not_overtaken() -> None:
    hand = ByHand([request("a"), request("b"), request("big", gpus=2)], machines(gpus=2), Policy(fetches=9, ahead=9))
    hand.step()
    for name in ("a", "b", "big"):
        hand.end(f"{name} fetch")
    assert sorted(hand.running) == ["a sweep", "b sweep"]
    hand.end("a sweep")  # its evaluation is nearer to the end, so it goes on
    for stage in ("evaluate", "verify"):
        hand.end(f"a {stage}")
    assert "big sweep" not in hand.running
    for stage in ("sweep", "evaluate", "verify"):
        hand.end(f"b {stage}")
    assert "big sweep" in hand.running


def test_what_is_published_is_deleted_first_and_only_when_there_is_no_room() -> None:
    wanted = [request("a", disk=40), request("b", disk=40), request("c", disk=40)]
    hand = ByHand(wanted, machines(disk_bytes=100), Policy(fetches=9, ahead=9))
    assert hand.step() == ["a fetch", "b fetch"]  # c has no room
    for stage in ("fetch", "sweep", "evaluate", "verify", "card"):
        hand.end(f"a {stage}")
    assert sorted(hand.running) == ["a publish", "b fetch"]
    hand.end("a publish")
    assert hand.running["c fetch"].drop == ("a",)


def test_a_recipe_that_no_machine_can_take_holds_up_nobody_and_says_why() -> None:
    hand = ByHand([request("big", gpus=4), request("a")], machines())
    assert hand.step() == ["a fetch"]
    assert "no machine has 4 GPUs" in hand.scheduler.why("big")
    assert hand.scheduler.waiting_needs() == [{"GPU": 4.0, "CPU": 1.0}]
    hand.there = (*hand.there, Machine(name="large", gpus=4))
    assert hand.step() == ["big fetch"]
    assert hand.scheduler.why("big") == ""


def test_a_failure_waits_longer_each_time_and_parks_the_recipe_with_its_reason() -> None:
    hand = ByHand([request("a")], machines(), Policy(attempts=3, backoff_s=30))
    hand.step()
    hand.end("a fetch")
    assert hand.end("a sweep", "failed", why="out of memory") == []
    assert hand.scheduler.next_wake() == 30
    assert hand.step(29) == []
    assert hand.step(30) == ["a sweep"]
    hand.end("a sweep", "failed", why="out of memory")
    assert hand.scheduler.next_wake() == 30 + 60
    assert hand.step(90) == ["a sweep"]
    hand.end("a sweep", "failed", why="out of memory")
    assert hand.scheduler.state("a") == "parked"
    assert hand.scheduler.why("a") == "sweep: out of memory (3 times)"
    assert hand.scheduler.is_finished
    hand.scheduler.add(request("a"))
    assert hand.step() == ["a fetch"]


def test_an_error_of_the_recipe_parks_it_at_once() -> None:
    hand = ByHand([request("a"), request("b")], machines())
    hand.step()
    hand.end("a fetch", "failed", why="the base model is gated", final=True)
    assert hand.scheduler.state("a") == "parked"
    assert hand.scheduler.why("a") == "fetch: the base model is gated"
    assert not hand.scheduler.is_finished


def test_a_lost_machine_is_no_failure_and_its_recipes_get_another_home() -> None:
    hand = ByHand([request("a", shares=2)], machines(2, gpus=2))
    hand.step()
    home = hand.running["a fetch"].machine
    hand.end("a fetch")
    hand.end("a sweep")  # its result is in the store: it is not done again
    hand.there = tuple(machine for machine in hand.there if machine.name != home)
    assert hand.step() == ["a fetch"]
    assert hand.running["a fetch"].machine != home
    assert hand.end("a fetch") == ["a sweep 2"]
    assert hand.running["a sweep 2"].attempt == 2
    hand.scheduler.take(TaskEnd(task=hand.running["a sweep 2"].task, result="failed", why="once"), 0.0)
    assert hand.scheduler.state("a") == "building"


def test_what_ends_machines_is_parked() -> None:
    hand = ByHand([request("a")], machines(), Policy(losses=3))
    for count in range(3):
        hand.there = (Machine(name=f"again{count}", gpus=1, cpus=8.0),)
        hand.step()
    hand.there = ()
    hand.step()
    assert hand.scheduler.state("a") == "parked"
    assert "lost 3 times" in hand.scheduler.why("a")


def test_a_result_of_a_task_that_was_taken_for_lost_is_not_taken_in() -> None:
    hand = ByHand([request("a")], machines())
    hand.step()
    late = hand.running["a fetch"].task
    hand.there = ()
    hand.step()
    hand.scheduler.take(TaskEnd(task=late, result="done"), 0.0)
    hand.there = machines(1)
    assert hand.step() == ["a fetch"]


def test_publishing_needs_a_machine_that_may_publish() -> None:
    there = (*machines(publishes=False), Machine(name="publisher", cpus=8.0))
    hand = ByHand([request("a")], there)
    hand.step()
    for stage in ("fetch", "sweep", "evaluate", "verify", "card"):
        assert hand.running[f"a {stage}"].machine == "m0"
        hand.end(f"a {stage}")
    assert hand.running["a publish"].machine == "publisher"


def test_commits_of_all_workers_keep_the_limit_of_the_account() -> None:
    limits = Limits(account_commits=LimitWindow(8, 3600))
    hand = ByHand([request(name) for name in "abc"], machines(3), Policy(limits=limits))
    hand.step()
    for stage in ("fetch", "sweep", "evaluate", "verify", "card"):
        for name in "abc":
            hand.end(f"{name} {stage}")
    assert sorted(hand.running) == ["a publish", "b publish"]
    assert "limit of commits" in hand.scheduler.why("c")
    assert hand.step(3599) == []
    assert hand.step(3600) == ["c publish"]


def test_a_store_without_room_lets_go_of_what_is_published() -> None:
    hand = ByHand([request("a", disk=60), request("b", disk=60)], machines(2), Policy(store_bytes=100))
    assert hand.step() == ["a fetch"]
    for stage in TASK_STAGES:
        assert hand.scheduler.store_drops() == []
        hand.end(f"a {stage}")
    assert hand.scheduler.store_drops() == ["a"]
    assert hand.step() == ["b fetch"]


def test_a_store_keeps_what_is_published_until_that_makes_enough_room() -> None:
    """A recipe of 90 bytes cannot begin while b has 50: deleting a, too, would not help it."""
    requests = [request("a", disk=40), request("b", disk=50), request("c", disk=90)]
    hand = ByHand(requests, machines(3), Policy(store_bytes=100))
    assert hand.step() == ["a fetch", "b fetch"]
    for stage in TASK_STAGES:
        hand.end(f"a {stage}")
        assert hand.scheduler.store_drops() == []
    for stage in TASK_STAGES:
        assert hand.scheduler.store_drops() == []
        hand.end(f"b {stage}")
    assert hand.scheduler.store_drops() == ["a", "b"]
    assert hand.step() == ["c fetch"]


def test_what_nothing_can_run_is_given_up_after_a_while() -> None:
    world = World(machines=machines(), seconds=lambda _: 1.0, bytes_per_s=GB)
    scheduler, fleet = Scheduler([request("big", gpus=4), request("a")]), SimulatedFleet(world)
    drive(scheduler, fleet, patience_s=60)
    assert (scheduler.state("a"), scheduler.state("big")) == ("published", "parked")
    assert "no machine has 4 GPUs" in scheduler.why("big")
    assert fleet.now() >= 60


@pytest.mark.parametrize(
    ("taken", "now", "units", "wait"),
    [
        ({}, 0, 5, 0), ({0: 5}, 0, 5, 0), ({0: 6}, 0, 5, 10), ({0: 6}, 9, 5, 1), ({0: 6}, 10, 5, 0),
        ({0: 4, 5: 4}, 6, 5, 4), ({0: 4, 5: 4}, 6, 7, 9), ({}, 0, 25, 0), ({0: 25}, 1, 1, 24), ({3: 1}, 4, 25, 9),
    ],
)  # fmt: skip
def test_a_window(taken: Mapping[float, float], now: float, units: float, wait: float) -> None:
    window = LimitWindow(10, 10)
    for at, amount in taken.items():
        window.take(at, amount)
    assert window.wait_s(now, units) == pytest.approx(wait)


@pytest.mark.parametrize(("beside", "ends"), [(0, 2 + 10 + 15), (500, 2 + 10 + 10), (1200, 2 + 12 + 3), (1500, 2 + 15)])
def test_what_a_task_sends_goes_beside_its_computing_or_after_it(beside: int, ends: float) -> None:
    task = Task(recipe="a", stage="fetch", download_bytes=200, upload_bytes=1500)
    world = World(machines=machines(), seconds=lambda _: 10.0, bytes_per_s=100, beside_bytes=lambda _: beside)
    fleet = SimulatedFleet(world)
    drive(Scheduler([BuildRequest(recipe="a", tasks=(task,))]), fleet)
    assert fleet.now() == pytest.approx(ends)


class Checked(SimulatedFleet):
    """A simulated fleet that looks at each order: nothing runs twice, out of turn, away from home or without room."""

    def __init__(self, world: World, requests: Sequence[BuildRequest]) -> None:
        super().__init__(world)
        self.done: Counter[Task] = Counter()
        self.now_running: dict[Task, Start] = {}
        self.wanted = {each.recipe: each for each in requests}
        self.fetched: dict[str, str] = {}

    def start(self, order: Start) -> None:
        task = order.task
        there = {machine.name: machine for machine in self.machines()}
        self.now_running = {each: run for each, run in self.now_running.items() if run.machine in there}
        assert task not in self.now_running
        self.now_running[task] = order
        machine = there[order.machine]
        here = [each.task for each in self.now_running.values() if each.machine == order.machine]
        assert sum(each.gpus for each in here) <= machine.gpus
        assert sum(each.cpus for each in here) <= machine.cpus
        earlier = TASK_STAGES[: TASK_STAGES.index(task.stage)]
        tasks = self.wanted[task.recipe].tasks
        assert all(self.done[each] for each in tasks if each.stage in earlier)
        if task.stage == "fetch":
            self.fetched[task.recipe] = order.machine
        elif task.stage in AT_HOME:
            assert self.fetched[task.recipe] == order.machine
        super().start(order)

    def wait(self, until: float | None) -> Sequence[TaskEnd]:
        outcomes = super().wait(until)
        for outcome in outcomes:
            del self.now_running[outcome.task]
            self.done[outcome.task] += outcome.result == "done"
        return outcomes


@given(
    sizes=st.lists(st.tuples(st.integers(1, 2), st.integers(1, 3), st.integers(0, 2)), min_size=1, max_size=12),
    failing=st.sampled_from([0.0, 0.2]),
    life=st.sampled_from([None, 200.0]),
    seed=st.integers(0, 99),
)
def test_whatever_fails_everything_ends_and_no_stage_is_done_twice(sizes, failing, life, seed) -> None:
    wanted = [
        request(f"r{index}", gpus=gpus, shares=shares, priority=priority, disk=30, size=GB * gpus)
        for index, (gpus, shares, priority) in enumerate(sizes)
    ]
    world = World(
        machines=machines(3, gpus=2, disk_bytes=70), seconds=lambda task: 5.0 + 10 * task.gpus, bytes_per_s=GB,
        failing=failing, machine_life_s=life, replaced_s=20.0, seed=seed,
    )  # fmt: skip
    scheduler, fleet = Scheduler(wanted, Policy(attempts=50, losses=50, backoff_s=1.0)), Checked(world, wanted)
    drive(scheduler, fleet, patience_s=1000.0)
    assert {scheduler.state(each.recipe) for each in wanted} == {"published"}
    assert all(count == 1 for task, count in fleet.done.items() if task.stage != "fetch")


def test_gpus_are_busy_when_links_are_fast_enough_and_idle_when_they_are_not() -> None:
    wanted = [request(f"r{index}", size=10 * GB) for index in range(40)]
    busy = {}
    for bytes_per_s in (10 * GB, GB / 10):
        world = World(machines=machines(4), seconds=lambda _: 20.0, bytes_per_s=bytes_per_s)
        fleet = SimulatedFleet(world)
        drive(Scheduler(wanted), fleet)
        assert fleet.useful_s == pytest.approx(40 * 60)
        busy[bytes_per_s] = fleet.busy_s / fleet.existing_s
    assert busy[10 * GB] > 0.85
    assert busy[GB / 10] < 0.4  # 100 s to receive, 100 to the store, 100 to publish, for 60 s of computing


def test_small_base_models_do_not_use_up_the_limit_before_a_large_one() -> None:
    def request(name: str, download_bytes: int, priority: int) -> BuildRequest:
        tasks = (Task(recipe=name, stage="fetch", download_bytes=download_bytes),)
        return BuildRequest(recipe=name, tasks=tasks, priority=priority)

    small = [request(f"a/small-{number}", 10, 0) for number in range(50)]
    limits = Limits(fetched=LimitWindow(100, 50))
    scheduler = Scheduler([request("a/first", 30, 2), request("a/large", 100, 1), *small], Policy(limits=limits))
    machines, started = [Machine(name="one", cpus=8)], list[tuple[int, str]]()
    for now in range(60):
        scheduler.see(machines, now)
        for start in scheduler.assign(now):
            started.append((now, start.task.recipe))
            scheduler.take(TaskEnd(task=start.task, result="done"), now)
        if now == 0:
            assert scheduler.next_wake() == 50
            assert not scheduler.is_stalled
    assert started == [(0, "a/first"), (50, "a/large")]
