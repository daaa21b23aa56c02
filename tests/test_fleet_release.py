"""Many recipes at a time: processes of one machine, leases, the state of each recipe, and the command's options."""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from typer.testing import CliRunner

from packager import __version__
from packager.cli.fleet_view import counts_of, limits_of, priorities_of, table_of
from packager.cli.main import app
from packager.errors import MachineError, UsageError
from packager.fleet.build_requests import FleetRecipe, Needs
from packager.fleet.fleet_run import FleetRun
from packager.fleet.leased import LeasedExecutor
from packager.fleet.leases import Lease
from packager.fleet.local_processes import LocalProcesses
from packager.fleet.policy import Policy
from packager.fleet.recipe_state import read_recipe_state
from packager.fleet.store import FolderStore
from packager.fleet.task_processes import task_environ
from packager.fleet.tasks import BuildRequest, Machine, Start, Task, TaskEnd
from packager.fleet.worker import TaskOrder
from tests.import_graph import ROOT
from tests.test_twenty_recipes import end_of as end_of_release

if TYPE_CHECKING:
    from tests.tiny_recipe import Builds

A, B = "tester/a-GPTQ", "tester/b-GPTQ"


def order_of(repository: str) -> TaskOrder:
    return TaskOrder(recipe=f"{repository}.yaml", repository=repository, inputs="i", store="", stage="fetch")


def start_of(repository: str, stage: Any = "fetch", **changes: Any) -> Start:
    return Start(task=Task(recipe=repository, stage=stage, **changes), machine="here")


def machine(tmp_path: Path, program: str, **changes: Any) -> LocalProcesses:
    """A machine whose tasks are a program that gets the call as its last argument."""
    values: dict[str, Any] = {
        "name": "here", "folder": tmp_path, "cache": tmp_path / "cache", "orders": {A: order_of(A), B: order_of(B)},
        "command": (sys.executable, "-c", f"import json, os, sys, time\ncall = json.loads(sys.argv[1])\n{program}"),
        "environ": dict(os.environ), "jobs": 2,
    }  # fmt: skip
    return LocalProcesses(**values | changes)


def end_of(program: str, tmp_path: Path, stage: Any = "fetch", **changes: Any) -> TaskEnd:
    with machine(tmp_path, program, **changes) as here:
        here.start(start_of(A, stage))
        (end,) = here.wait(here.now() + 60)
    return end


ENDS = {
    "done": ('print(\'{"why": "", "exit_code": 0}\')', "done", "", False, 0),
    "the recipe is wrong": ('print(\'{"why": "no", "exit_code": 2}\')', "failed", "no", True, 2),
    "the network is away": ('print(\'{"why": "net", "exit_code": 3}\')', "failed", "net", False, 3),
    "killed": ("os.kill(os.getpid(), 9)", "lost", "killed by SIGKILL", False, 0),
    "says nothing": ("sys.exit('broken pipe dream')", "failed", "exit status 1: broken pipe dream", False, 1),
    "says nonsense": ("print('done')", "failed", "exit status 0: ", False, 1),
}  # fmt: skip


@pytest.mark.parametrize("name", ENDS)
def test_what_becomes_of_a_process(name: str, tmp_path: Path) -> None:
    program, result, why, final, code = ENDS[name]
    task = Task(recipe=A, stage="fetch")
    expected = TaskEnd(task=task, result=result, why=why, final=final, exit_code=code)  # type: ignore[arg-type]
    assert end_of(program, tmp_path) == expected


def test_only_a_process_that_publishes_gets_what_may_write() -> None:
    secrets = {"HF_TOKEN": "w", "PACKAGER_GIT_TOKEN": "g", "PACKAGER_SIGN_KEY": "k", "PACKAGER_SIGN_PASSPHRASE": "p",
               "ACTIONS_ID_TOKEN_REQUEST_TOKEN": "o", "HUGGING_FACE_HUB_TOKEN": "w", "GITHUB_TOKEN": "h",
               "GH_TOKEN": "h", "SSH_AUTH_SOCK": "/a"}  # fmt: skip
    environ = {"PATH": "/bin", **secrets, "PACKAGER_READ_TOKEN": "r", "RAY_AUTH_TOKEN": "t"}
    assert task_environ(environ, "publish") == {"PATH": "/bin", **secrets}
    for stage in ("fetch", "sweep", "evaluate", "verify", "card"):
        found = task_environ(environ, stage)
        assert found == {"PATH": "/bin", "HF_TOKEN": "r", "HF_TOKEN_PATH": os.devnull}, stage


def test_a_process_gets_its_order_its_folder_and_gpus_of_its_own(tmp_path: Path) -> None:
    program = "print(json.dumps({'why': ' '.join([os.environ['CUDA_VISIBLE_DEVICES'], os.environ.get('HF_TOKEN', '-'),"
    program += "os.environ['HF_HUB_CACHE'], call['order']['stage'], os.getcwd()]), 'exit_code': 3}))"
    environ = {**os.environ, "HF_TOKEN": "secret"}
    with machine(tmp_path, program, gpus=["3", "GPU-7"], environ=environ, disk_bytes=10**9) as here:
        assert here.machines() == (Machine(name="here", gpus=2, cpus=2.75, disk_bytes=10**9),)
        for name in (A, B):
            here.start(start_of(name, "sweep", gpus=1))
        ends: dict[str, TaskEnd] = {}
        while len(ends) < 2:
            ends |= {end.task.recipe: end for end in here.wait(here.now() + 60)}
    seen = {name: end.why.split() for name, end in ends.items()}
    assert {words[0] for words in seen.values()} == {"3", "GPU-7"}
    base = tmp_path / "base-models"
    assert seen[A][1:] == ["-", str(base / "tester--a-GPTQ"), "sweep", str(tmp_path)]
    assert seen[B][3] != seen[A][3] or seen[B][2] == str(base / "tester--b-GPTQ")


def test_what_runs_ends_with_the_executor(tmp_path: Path) -> None:
    beat = tmp_path / "beat"
    with machine(tmp_path, f"while True:\n    open({str(beat)!r}, 'a').write('.')\n    time.sleep(0.01)") as here:
        here.start(start_of(A))
        while not beat.exists():
            time.sleep(0.01)
    length = beat.stat().st_size
    time.sleep(0.1)
    assert beat.stat().st_size == length


class Instant:
    """An executor whose tasks end at once, as they are told to, and whose clock is a number."""

    def __init__(self, ends: Mapping[str, TaskEnd] | None = None) -> None:
        self.ends, self.clock, self.started, self.waiting = ends or {}, 0.0, list[str](), list[TaskEnd]()
        self.there: Sequence[Machine] = (Machine(name="here", cpus=8.0),)

    def now(self) -> float:
        return self.clock

    def machines(self) -> Sequence[Machine]:
        return self.there

    def start(self, order: Start) -> None:
        self.started.append(str(order.task))
        end = self.ends.get(str(order.task), TaskEnd(task=order.task, result="done"))
        self.waiting.append(replace(end, task=order.task))

    def wait(self, until: float | None) -> Sequence[TaskEnd]:
        ends, self.waiting = self.waiting, []
        if not ends and until is not None:
            self.clock = max(self.clock, until)
        return ends


STAGES = ("fetch", "sweep", "card", "publish")


def recipe_of(repository: str, *, stages: Sequence[str] = STAGES) -> FleetRecipe:
    tasks = tuple(Task(recipe=repository, stage=stage) for stage in stages)  # type: ignore[arg-type]
    path = Path(f"{repository}.yaml")
    return FleetRecipe(
        path=path, request=BuildRequest(recipe=repository, tasks=tasks), order=order_of(repository), recipe_digest=""
    )


def run_of(
    executor: Instant, store: FolderStore | None, *recipes: FleetRecipe, log: Callable[[str], None] = lambda _: None,
    attempts: int = 2,
) -> FleetRun:  # fmt: skip
    return FleetRun(
        recipes=recipes, executor=executor, policy=Policy(attempts=attempts), store=store, name="run", log=log
    )


def test_each_recipe_has_a_result_and_a_state_in_the_store(tmp_path: Path) -> None:
    store, task = FolderStore(tmp_path), Task(recipe=B, stage="sweep")
    wrong = TaskEnd(task=task, result="failed", why="NaN", final=True, exit_code=5)
    run = run_of(Instant({f"{B} sweep": wrong}), store, recipe_of(A), recipe_of(B), recipe_of("tester/c", stages=()))
    free: list[bool] = []  # when a recipe ends, not when the run does
    ended: list[str] = []

    def note(text: str) -> None:
        ended.append(text)
        if "before" not in text:
            free.append(Lease(store, text.partition(":")[0], "other").claim(0.0))

    run.ended = note
    run.run()
    assert (free, ended[0]) == ([True, True], "tester/c: published before, from the same inputs")
    found = [(each.repository, each.outcome, each.why, each.exit_code) for each in run.results().values()]
    before = "published before, from the same inputs"
    assert found == [
        (A, "published", "", 0), (B, "failed", "sweep: NaN", 5), ("tester/c", "published", before, 0),
    ]  # fmt: skip
    state, parked = read_recipe_state(store, A), read_recipe_state(store, B)
    assert state is not None
    assert parked is not None
    assert (state.state, state.stage, state.machine, state.inputs) == ("published", "publish", "", "i")
    assert (parked.state, parked.why, state.version, state.run) == ("parked", "sweep: NaN", __version__, "run")


def test_a_machine_is_named_before_what_starts_on_it() -> None:
    logged: list[str] = []
    run_of(Instant(), None, recipe_of(A), log=logged.append).run()
    assert logged[:2] == ["machine here is there", f"{A} fetch: started on here"]
    assert logged.count("machine here is there") == 1


def test_an_interrupted_run_says_so_and_leaves_no_lease(tmp_path: Path) -> None:
    class Interrupted(Instant):
        def wait(self, until: float | None) -> Sequence[TaskEnd]:
            if "tester/a-GPTQ sweep" in self.started:
                raise KeyboardInterrupt
            return super().wait(until)

    store, executor = FolderStore(tmp_path), Interrupted()
    executor.there = (Machine(name="here", cpus=1.0),)
    run = run_of(executor, store, recipe_of(A), recipe_of(B, stages=("publish",)), recipe_of("tester/c-GPTQ"))
    with pytest.raises(KeyboardInterrupt):
        run.run()
    assert [each.outcome for each in run.results().values()] == ["interrupted", "published", "not reached"]
    assert Lease(store, A, "other").claim(0.0)
    state = read_recipe_state(store, A)
    assert state is not None
    assert (state.state, state.machine) == ("requested", "")


def test_a_recipe_of_another_run_waits_and_is_taken_over_when_that_is_silent(tmp_path: Path) -> None:
    store, executor = FolderStore(tmp_path), Instant()
    other = Lease(store, A, "other")
    assert other.claim(0.0)
    other.beat()
    leased = LeasedExecutor(executor, store, "mine", lambda _: None, silent_s=60)
    leased.start(start_of(A))
    (end,) = leased.wait(None)
    assert (end.result, end.why, end.final, executor.started) == ("held", "another run has it: other", False, [])
    executor.clock = 61.0
    leased.start(start_of(A))
    assert executor.started == [f"{A} fetch"]
    third = Lease(store, A, "third")
    assert not third.claim(0.0)
    executor.waiting.clear()
    for _ in range(5):  # it beats while it waits
        leased.wait(executor.clock + 15)
    assert not third.claim(70.0)
    store.create(f"{A}/lease/00000003", b"third")  # as after a pause of this process
    for _ in range(2):
        leased.wait(executor.clock + 15)
    leased.start(start_of(A, "sweep"))
    (end,) = leased.wait(None)
    assert (end.result, end.final) == ("held", True)
    assert end.why.startswith(f"another run has taken over {A}")
    assert executor.started == [f"{A} fetch"]


def test_what_another_run_has_is_no_failure(tmp_path: Path) -> None:
    """Two machines start the same command: the second does what the first has not claimed, and succeeds."""
    store, executor = FolderStore(tmp_path), Instant()
    other, logged = Lease(store, A, "other"), list[str]()
    assert other.claim(0.0)
    run = run_of(executor, store, recipe_of(A), recipe_of(B), log=logged.append)
    wait = executor.wait

    def wait_while_the_other_beats(until: float | None) -> Sequence[TaskEnd]:
        other.beat()
        return wait(until)

    vars(run._noted)["wait"] = wait_while_the_other_beats
    run.run()
    found = [(each.outcome, each.exit_code) for each in run.results().values()]
    assert found == [("elsewhere", 0), ("published", 0)]
    assert run.results()[Path(f"{A}.yaml")].why == "fetch: another run has it: other (2 times)"
    assert run.rows[0].state == "building"
    assert not [line for line in logged if line.startswith(A) and "started" in line]
    assert read_recipe_state(store, A) is None
    other.beat()


def test_a_lease_of_a_dead_run_takes_no_attempt(tmp_path: Path) -> None:
    store = FolderStore(tmp_path)
    assert Lease(store, A, "dead").claim(0.0)
    failed = TaskEnd(task=Task(recipe=A, stage="fetch"), result="failed", why="net", exit_code=3)
    executor = Instant({f"{A} fetch": failed})
    run = run_of(executor, store, recipe_of(A), attempts=4)
    run.run()
    assert executor.started == [f"{A} fetch"] * 4
    (result,) = run.results().values()
    assert (result.outcome, result.why, result.exit_code) == ("failed", "fetch: net (4 times)", 3)


class AwayStore(FolderStore):
    """A store that cannot be used for a while."""

    away = False

    def _path(self, name: str) -> Path:
        if self.away:
            raise MachineError("the store cannot be used now", why="503")
        return super()._path(name)


def test_a_store_that_is_away_for_a_while_ends_nothing(tmp_path: Path) -> None:
    """Beats and states are missed; a claim is tried again; what was not written is written later."""

    class Long(Instant):
        """Each task takes a minute; the store is away while the sweep of A runs."""

        def wait(self, until: float | None) -> Sequence[TaskEnd]:
            store.away = self.started[-1:] == [f"{A} sweep"] and self.clock < 110
            at = max((self.clocks[str(each.task)] + 60 for each in self.waiting), default=0.0)
            if self.waiting and until is not None and until < at:
                self.clock = max(self.clock, until)
                return []
            self.clock = max(self.clock, at)
            return super().wait(until)

        def start(self, order: Start) -> None:
            self.clocks[str(order.task)] = self.clock
            super().start(order)

        clocks: dict[str, float] = {}  # noqa: RUF012

    store, logged = AwayStore(tmp_path), list[str]()
    run = run_of(Long(), store, recipe_of(A), log=logged.append)
    run.run()
    assert [each.outcome for each in run.results().values()] == ["published"], logged
    away = [line for line in logged if "503" in line]
    assert len(away) == 2, away  # a beat and a state, each said once
    assert "the store can be used again" in logged
    state = read_recipe_state(store, A)
    assert state is not None
    assert state.state == "published"
    assert Lease(store, A, "other").claim(0.0)


def test_builds_that_a_store_does_not_delete_are_deleted_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, logged, drops = AwayStore(tmp_path), list[str](), [[A], [], []]
    run = run_of(Instant(), store, recipe_of(A), log=logged.append)
    monkeypatch.setattr(run._scheduler, "store_drops", lambda: drops.pop(0))
    store.write(f"{A}/objects/1", b"")
    store.away = True
    for _ in range(2):
        run._write_again()
    store.away = False
    run._write_again()
    assert store.names("") == []
    assert logged == [
        f"{A}: its builds stay in the store for now: the store cannot be used now: 503",
        f"{A}: published, its builds have left the store",
    ]


def test_a_claim_that_the_store_does_not_answer_is_tried_again(tmp_path: Path) -> None:
    store, executor = AwayStore(tmp_path), Instant()
    leased = LeasedExecutor(executor, store, "mine", lambda _: None)
    store.away = True
    leased.start(start_of(A))
    (end,) = leased.wait(None)
    assert (end.result, end.final, end.exit_code) == ("failed", False, MachineError.exit_code)
    store.away = False
    leased.start(start_of(A))
    assert (executor.started, leased.has(A)) == ([f"{A} fetch"], True)


def test_what_runs_for_hours_is_seen_meanwhile(tmp_path: Path) -> None:
    class Long(Instant):
        def wait(self, until: float | None) -> Sequence[TaskEnd]:
            if until is not None and until < 300:
                self.clock = max(self.clock, until)
                return []
            return super().wait(until)

    class Counting(FolderStore):
        written = 0

        def write(self, name: str, data: bytes) -> None:
            self.written += name.endswith("state.json")
            super().write(name, data)

    store = Counting(tmp_path)
    run_of(Long(), store, recipe_of(A, stages=("fetch",))).run()
    assert store.written >= 8, "every half minute of five"


def test_the_table_shows_what_runs_first_and_counts_all() -> None:
    executor = Instant()
    run = run_of(executor, None, recipe_of(A), recipe_of(B))
    executor.there = ()
    run._started(start_of(B, "sweep"))
    table = table_of(run.rows, now=7.0, most=1)
    assert [str(next(iter(column.cells))) for column in table.columns] == [B, "requested", "sweep", "here", "7", ""]
    assert str(counts_of(run.rows)) == "2 recipes: 2 requested"


@pytest.fixture
def forked(tmp_path: Path) -> Iterator[Sequence[str]]:
    """The command of a process that is forked from one with torch, which takes a second instead of six."""
    server, path = str(ROOT / "tests" / "fork_server.py"), str(tmp_path / "socket")
    command = [sys.executable, server, path]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        yield command
        process.stdin.close()


def kill_once(repository: str, stage: str) -> Callable[[str], None]:
    """Return what kills the process of a task, once, after its start is logged."""
    words = [b"fork_server", f'"stage":"{stage}"'.encode(), repository.encode()]

    def kill() -> None:
        while True:
            for listing in Path("/proc").glob("[0-9]*/cmdline"):
                with suppress(OSError):
                    line, number = listing.read_bytes(), int(listing.parent.name)
                    if all(word in line for word in words) and b"supervisor" not in line:
                        os.kill(number, signal.SIGKILL)
                        return

    def log(text: str) -> None:
        if text == f"{repository} {stage}: started on here":
            threading.Thread(target=kill, daemon=True).start()

    return log


@pytest.mark.crash
def test_two_recipes_a_killed_process_and_the_bytes_of_one_after_the_other(
    tmp_path: Path, forked: Sequence[str], builds: "Builds", monkeypatch: pytest.MonkeyPatch
) -> None:
    from packager.fleet.fleet_release import FleetSettings, release_by_fleet
    from packager.pipeline.release import ReleaseChecks
    from packager.system.terminal import Terminal
    from tests import tiny_recipe

    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    alone, first = builds.built(published=True), tiny_recipe.REPOSITORY
    shutil.copytree(alone, tmp_path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("dist"))
    changes: dict[str, Any] = {"repository.id": B, "calibration.num_samples": 4, "evaluation.num_tokens": 64}
    changes |= {"variants": [{"branch": "main"}]}
    paths = [tmp_path / "recipe.yaml", tiny_recipe.write_recipe(tmp_path, changes, name="second.yaml")]
    options, terminal = tiny_recipe.options(tmp_path / "dist"), Terminal(quiet=True)
    logged, kill = list[str](), kill_once(first, "sweep")
    vars(terminal)["log"] = lambda text: (logged.append(text), kill(text))
    settings = FleetSettings(
        needs=Needs(
            gpus=0, publishing=True, store=FolderStore(tmp_path / "store"), store_url=str(tmp_path / "store"),
            local_target=options.dist,
        ),
        name="test",
        open_executor=lambda orders, _: LocalProcesses(
            name="here", folder=options.dist, cache=options.cache, orders=orders, command=forked,
            environ=dict(os.environ), jobs=2,
        ),
    )  # fmt: skip
    results = release_by_fleet(paths, options, terminal, ReleaseChecks(), settings)
    assert [(each.outcome, each.exit_code) for each in results] == [("published", 0)] * 2, "\n".join(logged)
    assert f"{first} sweep: lost: killed by SIGKILL" in logged
    assert f"{first} sweep: started on here, attempt 2" in logged
    expected, found = end_of_release(alone / "dist"), end_of_release(options.dist)
    assert {name: found[name] for name in expected} == expected
    assert len(found) == 2 * len(expected)
    logged.clear()
    again = release_by_fleet(paths, options, terminal, ReleaseChecks(), settings)
    assert [each.why for each in again] == ["published before, from the same inputs"] * 2
    assert not any("started" in text for text in logged)
    shutil.rmtree(options.dist / "hub" / "models" / first)
    (released, _) = release_by_fleet(paths, options, terminal, ReleaseChecks(), settings)
    assert (released.outcome, released.why) == ("published", "")
    found = end_of_release(options.dist)
    assert {name: found[name] for name in expected} == expected


REFUSED = {
    ("--jobs", "2", "--ray", "auto"): "give one of them",
    ("--ray", "auto"): "needs --store",
    ("--ray", "auto", "--store", "s", "--sign-key", "k"): "for this machine",
    ("--ray", "auto", "--store", "s", "--cache", "c"): "XDG_CACHE_HOME",
    ("--jobs", "1", "--store", "sftp://user:pw@host/store"): "leave it out",
    ("--ray", "10.0.0.7:6379", "--store", "s"): "RAY_AUTH_MODE=token",
    ("--ray", "ray://10.0.0.7:1", "--store", "s"): "HOST:PORT",
    ("--store", "s"): "need --jobs",
    ("--attempts", "2"): "need --jobs",
    ("--jobs", "2", "--fail-fast"): "one recipe after the other",
    ("--jobs", "2", "--disk", "5GB"): "need --store",
    ("--jobs", "1", "--device", "cpu", "--gpus", "1"): "this machine has 0",
    ("--jobs", "1", "--device", "cpu", "--priority", "x"): "not GLOB=N",
    ("--jobs", "1", "--device", "cpu", "--per-hour", "2TB"): "write download=2TB",
    ("--jobs", "1", "--device", "cpu", "--per-hour", "download=5"): "1GB or more",
    ("--jobs", "1", "--device", "cpu", "--per-hour", "commits=0"): "not WHAT=N",
    ("--per-hour", "commits=5"): "need --jobs",
}  # fmt: skip


def test_what_may_be_done_in_an_hour_is_of_all_recipes_together() -> None:
    limits = limits_of(("download=3GB", "upload=2GB", "commits=7"))
    tasks = {
        stage: Task(recipe="a/b", stage=stage, download_bytes=2 * 10**9, upload_bytes=10**9, commits=5)
        for stage in ("fetch", "sweep", "publish")
    }
    other = {stage: replace(task, recipe="c/d") for stage, task in tasks.items()}
    for stage, wait_s in (("fetch", 3600.0), ("sweep", 0.0), ("publish", 3600.0)):
        assert limits.wait_s(tasks[stage], 10.0) == 0
        limits.take(tasks[stage], 10.0)
        assert limits.wait_s(other[stage], 10.0) == pytest.approx(wait_s)
    uploads = limits_of(("upload=2GB",))
    for number in range(3):
        assert uploads.wait_s(tasks["publish"], number) == pytest.approx(0 if number < 2 else 3598)
        uploads.take(tasks["publish"], number)
    assert limits_of(()).wait_s(other["publish"], 10.0) == 0


@pytest.mark.parametrize("words", REFUSED, ids=" ".join)
def test_options_that_do_not_fit_are_refused(words: tuple[str, ...], tmp_path: Path) -> None:
    recipe = str(ROOT / "recipes" / "demo-llama.yaml")
    done = CliRunner().invoke(app, ["release", recipe, "--dist", str(tmp_path / "dist"), *words])
    assert done.exit_code == UsageError.exit_code
    assert REFUSED[words] in done.stderr
    assert "user:pw" not in done.stderr
    assert not (tmp_path / "dist").exists()


def test_a_store_that_nothing_here_opens_ends_the_command_with_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def url_to_fs(*_: object, **__: object) -> None:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr("fsspec.core.url_to_fs", url_to_fs)
    recipe, words = str(ROOT / "recipes" / "demo-llama.yaml"), ("--jobs", "1", "--device", "cpu")
    where = ("--dist", str(tmp_path / "dist"), "--store", "s3://bucket/folder")
    done = CliRunner().invoke(app, ["release", recipe, *words, *where])
    assert done.exit_code == MachineError.exit_code
    assert "pip install 'gptq-packager[s3]'" in done.stderr
    assert not (tmp_path / "dist").exists()


def test_priorities_are_of_the_last_pattern_that_fits() -> None:
    paths = [Path("recipes/a.yaml"), Path("recipes/urgent/b.yaml"), Path("recipes/urgent/c.yaml")]
    assert priorities_of(paths, ["recipes/urgent/*=5", "*c.yaml=-1"]) == {paths[1]: 5, paths[2]: -1}
    with pytest.raises(UsageError, match="no recipe fits"):
        priorities_of(paths, ["other/*=1"])
