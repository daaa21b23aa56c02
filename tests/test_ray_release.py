"""Releases by nodes of a Ray cluster on this machine: killed at random, with a head that is lost; and with a token."""

import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from typer.testing import CliRunner

from packager.cli.main import app
from packager.errors import MachineError
from tests import tiny_recipe
from tests.import_graph import ROOT
from tests.publish_fixtures import git

RECIPES = int(os.environ.get("RAY_TEST_RECIPES", "12"))
KILL_EVERY_S = float(os.environ.get("RAY_TEST_KILL_EVERY_S", "60"))
PORT = 6397
SEED = 18
MOST_S = 2400
HEAD_AWAY_S = 15  # longer than RAY_gcs_rpc_server_reconnect_timeout_s
VARIANTS = [
    {"branch": "main"}, {"group_size": 16}, {"group_size": 16, "desc_act": True},
    {"branch": "three-bits", "bits": 3, "sym": False},
]  # fmt: skip


def write_recipes(folder: Path) -> list[str]:
    tiny_recipe.write_inputs(folder)
    changes = {"variants": VARIANTS, "calibration.num_samples": 4, "evaluation.num_tokens": 64}
    return [
        str(tiny_recipe.write_recipe(
            folder, {**changes, "repository.id": f"tester/ray-{number:02}-GPTQ", "calibration.seed": number},
            name=f"r{number:02}.yaml",
        ))
        for number in range(RECIPES)
    ]  # fmt: skip


def published_of(dist: Path) -> Mapping[str, tuple[str, int]]:
    """Return the digest of all files of each published branch, and how many commits it has."""
    found = {}
    for folder in sorted((dist / "hub" / "models" / "tester").glob("*-GPTQ")):
        assert git("fsck", "--full", "--strict", cwd=folder) == ""
        for branch in git("for-each-ref", "--format=%(refname:short)", "refs/heads", cwd=folder).split():
            tree, count = (
                git("rev-parse", f"{branch}^{{tree}}", cwd=folder),
                git("rev-list", "--count", branch, cwd=folder),
            )
            found[f"{folder.name} {branch}"] = (tree.strip(), int(count))
    return found


class Cluster:
    """A head without CPUs, and three nodes with two CPUs and a GPU that is none; the first may publish."""

    def __init__(self, folder: Path, **environ: str) -> None:
        self.folder, self.nodes = folder, dict[str, subprocess.Popen[bytes]]()
        self.environ = {
            **os.environ, "PYTHONPATH": str(ROOT), "RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1",
            "RAY_gcs_rpc_server_reconnect_timeout_s": "10", "RAY_DEDUP_LOGS": "0", **environ,
        }  # fmt: skip

    def start(self, name: str, *words: str) -> None:
        command = [
            sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--node-name", name,
            "--disable-usage-stats", "--object-store-memory", "80000000", "--node-ip-address", "127.0.0.1", *words,
        ]  # fmt: skip
        with (self.folder / f"{name}.log").open("ab") as log:
            self.nodes[name] = subprocess.Popen(
                command, env=self.environ, stdout=log, stderr=log, start_new_session=True
            )

    def start_head(self) -> None:
        words = ("--num-cpus", "0", "--num-gpus", "0", "--include-dashboard=false", "--temp-dir", str(self.folder))
        self.start("head", "--head", "--port", str(PORT), *words)
        self.wait_for_head()

    def wait_for_head(self) -> None:
        command = [sys.executable, "-m", "ray.scripts.scripts", "health-check", "--address", f"127.0.0.1:{PORT}"]
        deadline = time.monotonic() + 120
        while subprocess.run(command, env=self.environ, capture_output=True, check=False).returncode:
            assert time.monotonic() < deadline, (self.folder / "head.log").read_text()

    def start_node(self, name: str) -> None:
        resources = ("--resources", '{"publish": 1}') if name == "n1" else ()
        self.start(name, "--address", f"127.0.0.1:{PORT}", "--num-cpus", "2", "--num-gpus", "1", *resources)

    def kill(self, name: str) -> None:
        """End a machine: its raylet, its workers, everything that they started."""
        process = self.nodes.pop(name)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    def restart_head(self) -> None:
        """Lose the head with all that it knows; nodes of before cannot join the new one, and are started anew."""
        names = list(self.nodes)
        self.kill("head")
        time.sleep(HEAD_AWAY_S)  # the client ends, and tries again
        for name in names:
            if name != "head":
                self.kill(name)  # a head does not start beside nodes of another one on its machine
        self.start_head()
        for name in names:
            if name != "head":
                self.start_node(name)

    def end(self) -> None:
        for name in list(self.nodes):
            self.kill(name)


@contextmanager
def running(*names: str, **environ: str) -> Iterator[Cluster]:
    """Run a head and nodes, with more variables."""
    folder = Path(tempfile.mkdtemp(prefix="ray", dir="/tmp"))
    cluster = Cluster(folder, **environ)
    try:
        cluster.start_head()
        for name in names:
            cluster.start_node(name)
        yield cluster
    finally:
        cluster.end()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    with running("n1", "n2", "n3") as cluster:
        yield cluster


def disturb(cluster: Cluster, run: "subprocess.Popen[bytes]", dist: Path) -> list[str]:
    """Kill a node at random now and then, and the head once, until a release ends; return what was done."""
    dice, began, done = random.Random(SEED), time.monotonic(), list[str]()
    while run.poll() is None and time.monotonic() < began + MOST_S:
        time.sleep(0.5)
        if time.monotonic() < began + (len(done) + 1) * KILL_EVERY_S:
            continue
        published = len(list((dist / "hub" / "models" / "tester").glob("*-GPTQ")))
        if published >= RECIPES // 3 and not any("head" in each for each in done):
            name = "head"
            cluster.restart_head()
        else:
            name = dice.choice(("n1", "n2", "n3"))
            cluster.kill(name)
            cluster.start_node(name)
        done.append(f"{time.monotonic() - began:.0f} s: killed {name}, {published} repositories were there")
    return [*done, f"{time.monotonic() - began:.0f} s: ended"]


@pytest.mark.release
def test_nodes_that_are_killed_and_a_head_that_is_restarted_change_nothing(tmp_path: Path, cluster: Cluster) -> None:
    recipes = write_recipes(tmp_path / "recipes")
    alone = CliRunner().invoke(app, ["release", *recipes, "--dist", str(tmp_path / "alone"), "--device", "cpu"])
    assert alone.exit_code == 0, alone.stderr
    socket, dist, log = tmp_path / "socket", tmp_path / "dist", tmp_path / "log"
    serving = [sys.executable, str(ROOT / "tests" / "fork_server.py"), str(socket)]
    words = [f"127.0.0.1:{PORT}", str(socket), str(dist), str(tmp_path / "store"), *recipes]
    with (
        subprocess.Popen(serving, env=cluster.environ, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as server,
        log.open("wb") as stream,
    ):
        assert server.stdout is not None
        assert server.stdout.readline() == b"ready\n"
        command = [sys.executable, "-m", "tests.ray_driver", *words]
        run = subprocess.Popen(command, cwd=ROOT, env=cluster.environ, stdout=stream, stderr=stream)
        try:
            events = disturb(cluster, run, dist)
        finally:
            run.kill()
            run.wait()
    (tmp_path / "events").write_text("\n".join(events) + "\n")
    text = log.read_text()
    assert run.returncode == 0, text[-6000:]
    assert any("killed head" in each for each in events), "too few recipes: the head was not restarted"
    assert "lost" in text
    expected = published_of(tmp_path / "alone")
    assert published_of(dist) == expected
    assert {count for _, count in expected.values()} == {1}
    assert len(expected) == RECIPES * len(VARIANTS)


def home_with(folder: Path, token: str) -> dict[str, str]:
    """Return the variables of a machine whose user has a token, or none."""
    (folder / ".ray").mkdir(parents=True)
    if token:
        (folder / ".ray" / "auth_token").write_text(token)
    return {"HOME": str(folder), "RAY_AUTH_MODE": "token"}


@pytest.mark.release
def test_a_cluster_with_a_token_releases_and_refuses_who_has_none(tmp_path: Path) -> None:
    generate = "from ray.scripts.scripts import main; main()"
    home = {"HOME": str(tmp_path / "home")}
    (tmp_path / "home").mkdir()
    command = [sys.executable, "-c", generate, "get-auth-token", "--generate"]
    subprocess.run(command, env={**os.environ, **home}, capture_output=True, check=True)
    token = (tmp_path / "home" / ".ray" / "auth_token").read_text()
    assert len(token) > 30
    tiny_recipe.write_inputs(tmp_path / "recipes")
    recipe = tiny_recipe.write_recipe(tmp_path / "recipes", {"evaluation.num_tokens": 64})
    dist, store = tmp_path / "dist", tmp_path / "store"
    with running("n1", **home, RAY_AUTH_MODE="token") as cluster:

        def release(environ: Mapping[str, str]) -> "subprocess.CompletedProcess[str]":
            program = [sys.executable, "-c", "from packager.cli.main import main; main()"]
            words = ["release", str(recipe), "--ray", f"127.0.0.1:{PORT}", "--store", str(store), "--dist", str(dist)]
            variables = {**cluster.environ, **environ}
            return subprocess.run(
                [*program, *words], cwd=ROOT, env=variables, capture_output=True, text=True, check=False
            )  # fmt: skip

        refused = {
            "none": release(home_with(tmp_path / "none", "")),
            "another": release(home_with(tmp_path / "another", "0" * 64)),
            "not asked for": release({**home, "RAY_AUTH_MODE": "disabled"}),
        }
        for name, done in refused.items():
            assert done.returncode == MachineError.exit_code, (name, done.stderr)
            assert "the Ray cluster cannot be used" in done.stderr, (name, done.stderr)
            assert "ray get-auth-token --generate" in " ".join(done.stderr.split()), (name, done.stderr)
        assert not (dist / "hub").exists()
        done = release(home)
        assert done.returncode == 0, done.stderr[-4000:]
    assert len(published_of(dist)) == len(tiny_recipe.BRANCHES)
    kept = [path for folder in (dist, store) for path in folder.rglob("*") if path.is_file()]
    assert len(kept) > 20
    assert not [path for path in kept if token.encode() in path.read_bytes()]
    assert token not in done.stderr + done.stdout
