"""What holds for every test: no network, no silent GPU skip, golden files renewed only when asked."""

import gc
import json
import os
import re
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.hypothesis_profiles import load_default_profile
from tests.quick_interpreter import quicken

if TYPE_CHECKING:
    from packager.prove.environments import RuntimeContext
    from tests.publish_fixtures import Prepared
    from tests.tiny_recipe import Builds

load_default_profile()
# Until the tests are collected: imports make a million objects, and hardly one of them is garbage.
gc.disable()
# Before anything imports the Hub client or a tokenizer.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"


# No test looks at what a loss of power leaves; a killed process loses nothing that it has written. A build waits for
# the disk more than fifty times.
vars(os).update(fsync=lambda _: None, fdatasync=lambda _: None)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="write golden files instead of comparing")
    # Not --dist: that is pytest-xdist's.
    parser.addoption("--dist-folder", default="dist", help="what build-all wrote, for tests marked release")
    caches = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    parser.addoption(
        "--cache-folder", default=f"{caches}/gptq-packager", help="the loaders' environments, for tests marked release"
    )
    parser.addoption(
        "--real-model", help="what benchmarks/real_models.py wrote, for the tutorial of a new user; made if not given"
    )


def pytest_configure(config: pytest.Config) -> None:
    """Let Triton kernels run in its interpreter where no GPU was asked for: read when triton is first imported."""
    # Not for the loaders that the release tests start: their kernels are not made for it.
    if not {"gpu", "release"} & _asked(config):
        os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect tests of a GPU, of a release and long ones unless they are asked for; asked for, they run or fail."""
    unasked = {"gpu", "release", "long"} - _asked(config)
    wanted = [item for item in items if not any(item.get_closest_marker(name) for name in unasked)]
    config.hook.pytest_deselected(items=[item for item in items if item not in wanted])
    items[:] = wanted


def _asked(config: pytest.Config) -> set[str]:
    """Return the words of `-m`."""
    return set(re.findall(r"\w+", config.getoption("-m")))


# Collecting the 500,000 objects of torch and transformers takes 0.15 s; a build and many tests collect garbage.
_MANY_MODULES = 100
_frozen_modules = [0]


def pytest_collection_finish(session: pytest.Session) -> None:
    """Keep the garbage collector off all that collecting the tests has imported."""
    _frozen_modules[0] = len(sys.modules)
    gc.freeze()
    gc.enable()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Keep the garbage collector off the objects of modules that tests have imported; ready the interpreter."""
    if len(sys.modules) - _frozen_modules[0] >= _MANY_MODULES:
        _frozen_modules[0] = len(sys.modules)
        gc.collect()
        gc.freeze()
    if item.get_closest_marker("interpreter"):
        quicken()


@pytest.fixture
def update_golden(request: pytest.FixtureRequest) -> bool:
    return bool(request.config.getoption("--update-golden"))


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the program that describes models run in this process, which has torch already."""
    from packager.inputs import describe_in_child

    def answered(folder: Path, _: str) -> Any:
        describe_in_child._answer(folder, folder / "result.json")
        return json.loads((folder / "result.json").read_text())

    monkeypatch.setattr(describe_in_child, "_run", answered)


@pytest.fixture(scope="module")
def context(tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config) -> "RuntimeContext":
    """The loaders' environments in the folder that --cache-folder names."""
    from packager.prove.environments import RuntimeContext

    return RuntimeContext(
        cache=Path(pytestconfig.getoption("--cache-folder")).expanduser(),
        scratch=tmp_path_factory.mktemp("verify"),
        environ=os.environ,
        log=print,
    )


@pytest.fixture(scope="session")
def builds(tmp_path_factory: pytest.TempPathFactory) -> "Builds":
    """Builds of the tiny recipe, made when a test first asks for one, once for all workers of the test run."""
    from tests.tiny_recipe import Builds  # imports torch and transformers: most tests need neither

    own = tmp_path_factory.getbasetemp()
    folder = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "builds"
    folder.mkdir(exist_ok=True)
    return Builds(folder)


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> "Prepared":
    """Folders that tests begin with, such as published repositories."""
    from tests.publish_fixtures import Prepared

    return Prepared(tmp_path_factory.mktemp("prepared"))


@pytest.fixture(autouse=True, scope="session")
def _git_does_not_wait_for_the_disk() -> None:
    from packager.publish.targets import git_process

    git_process._SETTINGS["core.fsync"] = "none"


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Refuse every connection but those to this machine."""
    connect = socket.socket.connect

    def guarded(self: socket.socket, address: Any) -> None:
        host = address[0] if isinstance(address, tuple) else "localhost"
        if host not in {"localhost", "127.0.0.1", "::1"}:
            raise AssertionError(f"a test tried to reach {host}")
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", guarded)
