"""The base install on a system without POSIX: its modules are imported and its commands run without what Windows lacks.

A process of its own refuses the modules that only POSIX has, and forgets the names of `os` and `signal` that Windows
does not have. What only Windows does otherwise (its paths, open files that cannot be renamed), a job of CI shows.
numpy needs `os.uname` on Linux, so that stays.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from packager.errors import MachineError
from packager.system import posix
from packager.system.posix import FolderLock
from tests.import_graph import ROOT
from tests.samples import sampled
from tests.tiny_recipe import Builds, hub_folder

# The standard library is imported first: it looks for these names when it is imported, and not on Windows alone.
WITHOUT_POSIX = """
import asyncio, concurrent.futures, getpass, http.client, inspect, os, pathlib, shutil, signal, ssl, subprocess, sys
import tempfile, uuid, zipfile
MODULES = {"fcntl", "grp", "posix_ipc", "pty", "pwd", "resource", "syslog", "termios", "tty"}

class Refused:
    def find_spec(self, name, path=None, target=None):
        if name in MODULES:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

for name in MODULES:
    sys.modules.pop(name, None)
sys.meta_path.insert(0, Refused())
NAMES = {
    os: "O_CLOEXEC O_DIRECTORY O_NOCTTY O_NOFOLLOW O_NONBLOCK fchmod fork geteuid getuid killpg mkfifo posix_fallocate "
    "posix_spawnp pread setsid waitid",
    signal: "SIGALRM SIGCHLD SIGHUP SIGKILL setitimer",
}
for module, names in NAMES.items():
    for name in names.split():
        if hasattr(module, name):
            delattr(module, name)
os.supports_dir_fd.clear()
"""
# What runs in processes of its own, on Linux and macOS, or compiles for a GPU.
POSIX_ALONE = ("packager.prove.loaders.", "packager.system.supervisor", "packager.quantize.")
BASE_COMMANDS = ("plan", "init", "card", "status", "audit", "verify-published", "publish", "diff", "rollback", "schema")


def run(code: str, *arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-W", "ignore", "-c", WITHOUT_POSIX + code, *arguments]
    # Its locks are others than those of the tests beside it: of their temporary folder it would remove each scratch
    # folder as an abandoned one.
    with tempfile.TemporaryDirectory() as folder:
        environ = {**os.environ, "TMPDIR": folder}
        return subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, check=False)


def packager(*arguments: str) -> str:
    done = run("from packager.cli.main import main\nmain()", *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_every_module_of_the_base_install_can_be_imported() -> None:
    """Those of the build extra are left out only where they need torch, as a base install has no torch."""
    code = f"""
import importlib, pkgutil
import packager
for name in ("torch", "transformers"):
    sys.modules[name] = None
done = []
for module in pkgutil.walk_packages(packager.__path__, "packager.", onerror=lambda name: None):
    if not module.name.startswith({POSIX_ALONE!r}):
        try:
            importlib.import_module(module.name)
        except ModuleNotFoundError as error:
            assert error.name in ("torch", "transformers", "greenlet", "matplotlib", "pyarrow"), (module.name, error)
            continue
        done.append(module.name)
print(*done)
"""
    done = run(code)
    assert done.returncode == 0, done.stderr
    names = done.stdout.split()
    assert len(names) > 150
    for needed in ("cli.main", "pipeline.plan", "pipeline.init_recipe", "pipeline.flow", "prove.audit", "card",
                   "publish.published", "publish.targets.hub", "system.scratch"):  # fmt: skip
        assert f"packager.{needed}" in names


def test_a_pipe_of_few_characters_gets_the_others_as_escapes(tmp_path: Path) -> None:
    recipe = tmp_path / "\u30ec\u30b7\u30d4.yaml"
    recipe.write_text("schema_version: 1\n")
    environ = {**os.environ, "PYTHONIOENCODING": "cp1252"}
    command = [sys.executable, "-c", "from packager.cli.main import main\nmain()", "status", "--format", "json"]
    done = subprocess.run([*command, str(recipe)], cwd=ROOT, env=environ, capture_output=True, check=False)
    assert done.returncode == 2
    assert b"\\u30ec" in done.stdout
    assert b"\\u30ec" in done.stderr


PLANS = [["plan", "recipes/demo-llama.yaml"], ["plan", "recipes/llama-2-13b-chat.yaml"], ["--help"]]


@pytest.mark.parametrize("arguments", sampled(PLANS, PLANS[0]), ids=" ".join)
def test_plan_and_help_run(arguments: list[str]) -> None:
    assert len(packager(*arguments).splitlines()) > 10


@pytest.mark.slow
@pytest.mark.parametrize("command", BASE_COMMANDS)
def test_every_command_of_the_base_install_shows_its_help(command: str) -> None:
    assert f"Usage: packager {command}" in packager(command, "--help")


@pytest.mark.slow
def test_a_build_of_another_machine_is_shown_audited_and_published(builds: Builds, tmp_path: Path) -> None:
    recipe = builds.copy(tmp_path)
    for lock in (tmp_path / "dist").rglob("*.lock"):
        lock.unlink()  # without fcntl, and not on Windows, filelock takes a file that is there for a lock
    options = [str(recipe), "--dist", str(tmp_path / "dist")]
    assert "main" in packager("status", *options)
    assert packager("card", *options).startswith("---\n")
    assert "passed" in packager("audit", str(next((tmp_path / "dist" / "builds").rglob("main"))))
    assert "create" in packager("publish", *options, "--dry-run")
    packager("publish", *options, "--tag", "v1")
    assert "passed" in packager("verify-published", str(hub_folder(tmp_path / "dist")))
    assert not list(tmp_path.rglob("*.locked"))


@pytest.mark.parametrize("arguments", [["build", "recipes/demo-llama.yaml"]], ids=" ".join)
def test_what_runs_others_code_says_that_it_needs_posix(arguments: list[str], tmp_path: Path) -> None:
    code = "from packager.cli.main import main\nmain()"
    done = run(code, *arguments, "--dist", str(tmp_path), "--device", "cpu")
    assert done.returncode == MachineError.exit_code
    assert done.stderr.startswith("error: build needs Linux or macOS\n"), done.stderr
    assert "WSL" in done.stderr


@pytest.mark.parametrize("with_posix", [True, False])
def test_a_locked_folder_is_taken_by_nobody_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, with_posix: bool
) -> None:
    if not with_posix:
        monkeypatch.setattr(posix, "IS_POSIX", False)
    with FolderLock(tmp_path, wait=True) as lock:
        assert lock.is_own
        with pytest.raises(BlockingIOError):
            FolderLock(tmp_path, wait=False)
    lock.release()
    FolderLock(tmp_path, wait=False).release()
    with pytest.raises(FileNotFoundError):
        FolderLock(tmp_path / "nowhere", wait=True)
