"""A store on S3: a server of its own kind on this machine, s3fs as its client, and a release that is killed in between.

Needs s3fs, and MOTO_PYTHON, a Python with moto's server: `nox -s tests-s3` sets both up.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from packager.errors import MachineError
from packager.fleet import remote_store
from packager.fleet.leases import SILENT_S
from packager.fleet.open_store import check_creates, open_store
from packager.fleet.store import Store
from tests import test_fleet_store as stores
from tests import tiny_recipe
from tests.import_graph import ROOT
from tests.test_twenty_recipes import end_of

pytestmark = pytest.mark.release

SECRET, KEY = "wJalrXUtnFEMIK7MDENGbPxRfiCYEXAMPLE", "AKIAIOSFODNN7EXAMPLE"
BUCKET = "fleet"
REPOSITORIES = ("tester/s3-a-GPTQ", "tester/s3-b-GPTQ")
# The same tests as of the other stores, with the fixture of this module.
test_a_store_keeps_files_by_name = stores.test_a_store_keeps_files_by_name
test_of_several_that_create_a_file_one_does = stores.test_of_several_that_create_a_file_one_does
test_one_run_has_a_recipe_and_another_takes_over = (
    stores.test_one_run_has_a_recipe_and_another_takes_over_when_it_is_silent
)
test_of_several_runs_one_claims = stores.test_of_several_runs_one_claims
test_a_store_that_lets_a_file_be_created_twice = stores.test_a_store_that_lets_a_file_be_created_twice_is_refused


class Server:
    """An S3 server in a process of its own, with a log of what it answered."""

    def __init__(self, folder: Path) -> None:
        self._log = folder / "s3.log"
        python = os.environ.get("MOTO_PYTHON") or pytest.fail("MOTO_PYTHON names no Python with moto: nox -s tests-s3")
        environ = {"PATH": os.environ["PATH"], "PYTHONUNBUFFERED": "1"}
        with self._log.open("wb") as log:
            command = [python, str(ROOT / "tests" / "s3_server.py")]
            self._process = subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, stderr=log)
        assert self._process.stdout is not None
        self.port = int(self._process.stdout.readline())

    def halt_after(self, words: str, run: "subprocess.Popen[bytes]") -> None:
        """Wait until the server has answered a request of a run with these words in its line, and halt the server."""
        while words not in self._log.read_text():
            assert run.poll() is None, run.communicate()
            time.sleep(0.002)
        self._process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        self._process.send_signal(signal.SIGCONT)

    def end(self) -> None:
        self._process.kill()
        self._process.communicate()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("s3"))
    values = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.port}", "AWS_ACCESS_KEY_ID": KEY, "AWS_REGION": "eu-central-1",
        "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_CONFIG_FILE": os.devnull, "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
    }  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        for name, value in values.items():
            patch.setenv(name, value)
        import s3fs  # type: ignore[import-not-found,unused-ignore]

        s3fs.S3FileSystem().mkdir(BUCKET)
        yield server
    server.end()


@pytest.fixture
def store(server: Server, tmp_path: Path) -> Store:
    return open_store(f"s3://{BUCKET}/{tmp_path.name}")


CLAIM = """
import sys, time
from packager.fleet.leases import Lease
from packager.fleet.open_store import open_store
store = open_store(sys.argv[1])
print("ready", flush=True)
sys.stdin.readline()
print(*(number for number in range(40) if Lease(store, f"tester/r{number}", sys.argv[2]).claim(time.monotonic())))
"""


def test_two_processes_that_compete_for_leases_never_both_have_one(server: Server, tmp_path: Path) -> None:
    url = f"s3://{BUCKET}/{tmp_path.name}"
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", CLAIM, url, name], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
        )
        for name in ("first", "second")
    ]
    assert [run.stdout.readline() for run in runs if run.stdout is not None] == ["ready\n"] * 2
    for run in runs:
        assert run.stdin is not None
        run.stdin.write("\n")
        run.stdin.flush()
    won = [run.communicate(timeout=120)[0].split() for run in runs]
    assert sorted(map(int, won[0] + won[1])) == list(range(40))


def test_a_bucket_that_is_not_there_is_said_before_anything_is_built(server: Server) -> None:
    with pytest.raises(MachineError) as caught:
        check_creates(open_store("s3://no-such-bucket/fleet"))
    assert caught.value.where == "s3://no-such-bucket/fleet"
    assert "bucket does not exist" in caught.value.why


def test_a_server_that_accepts_and_never_answers_is_given_up(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """s3fs alone asks it for six minutes."""
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setattr(remote_store, "_NOTICE_S", 1.0)
        monkeypatch.setattr(remote_store, "_LIMIT_S", 3.0)
        lines: list[str] = []
        began = time.monotonic()
        with pytest.raises(MachineError, match="the store does not answer") as caught:
            check_creates(open_store(f"s3://{BUCKET}/silent", lines.append))
        assert time.monotonic() - began < 30
        assert caught.value.where == f"s3://{BUCKET}/silent"
        assert lines == [f"waiting for the store s3://{BUCKET}/silent: no answer for 1 s, the limit is 3 s"]


def write_recipes(folder: Path) -> list[str]:
    tiny_recipe.write_inputs(folder)
    changes = {"calibration.num_samples": 4, "evaluation.num_tokens": 64}
    return [
        str(tiny_recipe.write_recipe(folder, {**changes, "repository.id": name}, name=f"{number}.yaml"))
        for number, name in enumerate(REPOSITORIES)
    ]


def release(*words: str) -> "subprocess.Popen[bytes]":
    """Start the command in a process group of its own."""
    command = [sys.executable, "-c", "from packager.cli.main import main; main()", "release", "--device", "cpu", *words]
    return subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
    )  # fmt: skip


def ended(run: "subprocess.Popen[bytes]") -> str:
    output = run.communicate()[0].decode()
    assert run.returncode == 0, output[-4000:]
    return output


def kill(run: "subprocess.Popen[bytes]") -> None:
    """End a run as a machine ends: with all that it has started."""
    family = [run.pid]
    for pid in family:
        for listing in Path(f"/proc/{pid}/task").glob("*/children"):
            family += map(int, listing.read_text().split())
    assert len(family) > 1
    for pid in family:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    run.communicate()


def with_credentials(read: Callable[[], Iterator[tuple[str, bytes]]]) -> list[str]:
    return [name for name, data in read() if SECRET.encode() in data or KEY.encode() in data]


def test_another_machine_goes_on_after_the_last_finished_block_and_no_credential_is_kept(
    server: Server, store: Store, tmp_path: Path
) -> None:
    recipes, url = write_recipes(tmp_path / "recipes"), f"s3://{BUCKET}/{tmp_path.name}"
    alone, one, two = (tmp_path / name for name in ("alone", "one", "two"))
    words = ("--jobs", "2", "--store", url)
    run = release(*recipes, "--dist", str(one), *words)
    server.halt_after(f"PUT /{BUCKET}/{tmp_path.name}/{REPOSITORIES[0]}/blocks/main/00000.json", run)
    kill(run)
    server.go_on()
    finished = [name for name in store.names(f"{REPOSITORIES[0]}/blocks") if name.endswith("/00000.json")]
    assert finished
    assert not store.names(f"{REPOSITORIES[0]}/receipts")
    began = time.monotonic()
    output = ended(release(*recipes, "--dist", str(two), *words))
    assert time.monotonic() - began > SILENT_S, "it took the lease of a run that it could not know to be dead"
    assert "another run has it" in output
    log = (two / "logs" / REPOSITORIES[0] / "sweep.log").read_text()
    assert "blocks that another machine finished are used" in log
    assert f"{REPOSITORIES[1]} publish: started" in output
    assert "started" not in ended(release(*recipes, "--dist", str(two), *words)), "nothing is published again"
    ended(release(*recipes, "--dist", str(alone)))
    assert end_of(two) == end_of(alone)

    def on_disk() -> Iterator[tuple[str, bytes]]:
        for path in (path for folder in (one, two) for path in folder.rglob("*") if path.is_file()):
            yield str(path), path.read_bytes()

    def in_store() -> Iterator[tuple[str, bytes]]:
        for name in store.names(""):
            yield name, store.read(name) or b""

    assert len(list(on_disk())) > 50
    assert len(list(in_store())) > 10
    assert with_credentials(on_disk) == []
    assert with_credentials(in_store) == []
    assert SECRET not in output
