"""A command that a signal ends takes its children with it, says so in one sentence, and exits with 128 + the signal."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from packager.receipt import Confinement
from packager.system.confinement import refusal
from tests import tiny_recipe

pytestmark = [pytest.mark.crash, pytest.mark.slow]
DRIVER = Path(__file__).with_name("signal_driver.py")
KEPT = "finished work is kept, run the same command again to continue\n"
SAID = {
    signal.SIGTERM: f"ended by SIGTERM: {KEPT}",
    signal.SIGHUP: f"ended by SIGHUP: {KEPT}",
    signal.SIGINT: f"interrupted: {KEPT}",
}
BEAT_S = 60.0
CONFINEMENTS = ("bubblewrap", "namespaces", "none")


def beats(folder: Path) -> int:
    return (folder / "beat").stat().st_size if (folder / "beat").exists() else 0


def start(stage: str, confinement: Confinement, folder: Path) -> "subprocess.Popen[str]":
    """Start the driver and wait until the child's own child computes."""
    if why := refusal(confinement):
        pytest.skip(why)
    process = subprocess.Popen(
        [sys.executable, str(DRIVER), stage, confinement, str(folder)],
        cwd=DRIVER.parents[1], env={**os.environ, "PYTHONPATH": str(DRIVER.parents[1])}, stderr=subprocess.PIPE,
        text=True, start_new_session=True,
    )  # fmt: skip
    deadline = time.monotonic() + BEAT_S
    while not beats(folder):
        assert process.poll() is None, process.communicate()[1]
        if time.monotonic() > deadline:
            process.kill()
            pytest.fail(f"nothing computes: {process.communicate()[1]}")
        time.sleep(0.05)
    return process


def assert_ended_with_children(process: "subprocess.Popen[str]", number: int, folder: Path) -> None:
    try:
        said = process.communicate(timeout=30)[1]
    except subprocess.TimeoutExpired:
        process.kill()
        pytest.fail(f"signal {number} did not end it: {process.communicate()[1]}")
    if number == signal.SIGKILL:
        assert process.returncode == -number
        time.sleep(0.5)  # the children notice it
    else:
        assert process.returncode == 128 + number
        assert said.endswith(SAID[signal.Signals(number)])
        assert "Traceback" not in said
    before = beats(folder)
    time.sleep(0.5)
    assert beats(folder) == before


@pytest.fixture(autouse=True)
def _signals_are_heard() -> Iterator[None]:
    """Start children that no signal is ignored by, even where this process ignores some, as a shell's job does."""
    before = {number: signal.signal(number, signal.SIG_DFL) for number in (signal.SIGHUP, signal.SIGTERM)}
    before[signal.SIGINT] = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def folder(tmp_path: Path, builds: tiny_recipe.Builds) -> Path:
    recipe = builds.copy(tmp_path / "tiny")
    return recipe.parent


LONG = pytest.mark.long  # SIGTERM, SIGHUP and SIGINT go the same way


@pytest.mark.parametrize(
    ("confinement", "number"),
    [
        *[(confinement, number) for confinement in CONFINEMENTS for number in (signal.SIGTERM, signal.SIGKILL)],
        ("none", signal.SIGHUP),
        ("bubblewrap", signal.SIGINT),
        pytest.param("none", signal.SIGINT, marks=LONG),
        pytest.param("bubblewrap", signal.SIGHUP, marks=LONG),
        pytest.param("namespaces", signal.SIGHUP, marks=LONG),
        pytest.param("namespaces", signal.SIGINT, marks=LONG),
    ],
)
def test_loaders_end_with_the_command(number: int, confinement: Confinement, folder: Path) -> None:
    process = start("loader", confinement, folder)
    os.kill(process.pid, number)
    assert_ended_with_children(process, number, folder)


@pytest.mark.parametrize(
    ("stage", "number"),
    [
        ("pip", signal.SIGTERM),
        ("pip", signal.SIGKILL),
        ("engine", signal.SIGHUP),
        ("engine", signal.SIGKILL),
        ("git", signal.SIGTERM),
        ("git", signal.SIGINT),
    ],
)
def test_every_other_child_ends_with_the_command(stage: str, number: int, folder: Path) -> None:
    process = start(stage, "none", folder)
    os.kill(process.pid, number)
    assert_ended_with_children(process, number, folder)


@pytest.mark.parametrize("again_s", [0.0, 0.01, 0.1])
def test_a_second_interrupt_ends_the_command_at_once(folder: Path, again_s: float) -> None:
    """Raised while it cleans up, a second Ctrl-C left threads at whose end the process aborted (SIGABRT)."""
    process = start("loader", "none", folder)
    os.kill(process.pid, signal.SIGINT)
    time.sleep(again_s)
    with suppress(ProcessLookupError):
        os.kill(process.pid, signal.SIGINT)
    said = process.communicate(timeout=60)[1]
    # The second number: Python was about to exit, and does not hear signals any more. A shell says 130 for both.
    assert process.returncode in (128 + signal.SIGINT, -signal.SIGINT)
    assert said.endswith(KEPT)
    assert "Traceback" not in said
    before = beats(folder)
    time.sleep(0.5)
    assert beats(folder) == before


def test_a_second_signal_does_not_interrupt_the_cleaning_up(folder: Path) -> None:
    process = start("loader", "none", folder)
    for _ in range(3):
        os.kill(process.pid, signal.SIGTERM)
        time.sleep(0.01)
    assert_ended_with_children(process, signal.SIGTERM, folder)


def test_a_publish_that_was_ended_is_finished_by_the_next_one(folder: Path) -> None:
    process = start("git", "none", folder)
    os.kill(process.pid, signal.SIGTERM)
    assert_ended_with_children(process, signal.SIGTERM, folder)
    report = tiny_recipe.publish(folder / "recipe.yaml", folder / "dist")
    assert report


def test_hangup_is_ignored_under_nohup(folder: Path) -> None:
    previous = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # a child starts with the signals that are ignored
    try:
        process = start("loader", "none", folder)
    finally:
        signal.signal(signal.SIGHUP, previous)
    os.kill(process.pid, signal.SIGHUP)
    time.sleep(0.5)
    assert process.poll() is None
    os.kill(process.pid, signal.SIGTERM)
    assert_ended_with_children(process, signal.SIGTERM, folder)


AT_THE_START = """
import os, signal, sys, typer, typer.core, typer.main

def ended(*_, **__):
    os.kill(os.getpid(), signal.{name})
    raise AssertionError("the signal comes first")

{place} = ended
sys.argv = ["packager", "status", "recipe.yaml"]
from packager.cli.main import main
main()
"""


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", "SIGINT"])
@pytest.mark.parametrize("place", ["typer.main.get_command", "typer.core.TyperGroup.make_context"])
def test_a_signal_before_the_command_begins_is_said_too(name: str, place: str) -> None:
    """Found by the harness `build`: a traceback, while typer read the options of the commands."""
    code = AT_THE_START.format(name=name, place=place)
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=30)
    assert ended.stderr == SAID[signal.Signals[name]]
    assert ended.returncode == 128 + signal.Signals[name]


IN_A_FINALIZER = """
import os, signal, sys, time, weakref
from packager.cli.signals import end_command, raise_on_signals

class Held: pass

raise_on_signals()
held = Held()
weakref.finalize(held, lambda: (os.kill(os.getpid(), signal.{name}), time.sleep(0.2)))
try:
    del held
    time.sleep(20)
except KeyboardInterrupt as error:
    sys.exit(end_command(error))
"""


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_a_signal_during_a_finalizer_is_not_lost(name: str) -> None:
    """Python prints and drops an exception that leaves a finalizer or `__del__`: GitPython has both."""
    code = IN_A_FINALIZER.format(name=name)
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=30)
    assert ended.stderr == SAID[signal.Signals[name]]
    assert ended.returncode == 128 + signal.Signals[name]
