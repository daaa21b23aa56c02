"""What `packager status` shows of a build that runs, and of one that was killed."""

import errno
import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from packager.cli.main import app
from packager.cli.status_view import running_line
from packager.pipeline.flow import render
from packager.pipeline.running import RunningBuild, read_running, shown_while_running
from packager.recipe.file import RecipeFile
from packager.system.terminal import Terminal
from tests import tiny_recipe
from tests.tiny_recipe import BRANCHES, workspace, write_all

STEP = RunningBuild(
    pid=7, host="box", started_at=1000.0, stage="quantize", done=8, total=24, text="main block 3/6 loss 0.1 2.0 s",
    seconds_left=125.0, updated_at=1100.0,
)  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "now", "expected"),
    [
        (
            {}, 1100.0,
            "running since 1 min 40 s: quantize, step 8 of 24, main block 3/6 loss 0.1 2.0 s, about 2 min 5 s left "
            "(process 7 on box)",
        ),
        (
            {"total": 0, "text": "", "seconds_left": None, "stage": "verify"}, 8000.0,
            "running since 1 h 56 min: verify, last step 1 h 55 min ago (process 7 on box)",
        ),
        (
            {"total": 0, "text": "", "seconds_left": None, "stage": ""}, 900.0,
            "running since 0 s: starting (process 7 on box)",
        ),
        ({"text": "a\x1b[2Jb", "seconds_left": 0.4}, 1100.0, "a\\x1b[2Jb"),
    ],
)  # fmt: skip
def test_the_line_of_a_running_build(changes: dict[str, Any], now: float, expected: str) -> None:
    assert expected in running_line(STEP.model_copy(update=changes), now)


def test_every_step_is_written_and_the_end_leaves_nothing(tmp_path: Path) -> None:
    terminal, path = Terminal(quiet=True), tmp_path / "work" / "a--b.json"
    path.parent.mkdir()
    with shown_while_running(path, terminal):
        begun = read_running(path)
        assert begun is not None
        assert (begun.stage, begun.total, begun.text) == ("", 0, "")
        with terminal.stage("quantize"), terminal.bar(3) as bar:
            first = read_running(path)
            assert first is not None
            assert (first.stage, first.done, first.total, first.pid) == ("quantize", 0, 0, os.getpid())
            bar.step("one")
            bar.step("two")
            found = read_running(path)
            assert found is not None
            assert (found.done, found.total, found.text) == (2, 3, "two")
            assert found.seconds_left is not None
            assert found.seconds_left < 60
    assert not path.exists()


def test_an_error_leaves_nothing(tmp_path: Path) -> None:
    terminal, path = Terminal(quiet=True), tmp_path / "a.json"
    with pytest.raises(RuntimeError), shown_while_running(path, terminal), terminal.stage("pack"):
        raise RuntimeError
    assert not path.exists()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES, errno.EIO])
def test_a_disk_that_cannot_be_written_stops_no_build(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    path = tmp_path / "a.json"
    monkeypatch.setattr("packager.system.files.tempfile.mkstemp", fail)
    with shown_while_running(path, Terminal(quiet=True)):
        assert read_running(path) is None


def test_what_a_killed_build_left_is_not_shown_while_something_else_runs(tmp_path: Path) -> None:
    found = workspace(tmp_path / "dist")
    found.running_path.parent.mkdir(parents=True)
    found.running_path.write_text(STEP.model_dump_json())
    with found.locked():
        assert read_running(found.running_path) is None


def test_what_a_killed_build_left_is_deleted_wherever_it_lies(tmp_path: Path) -> None:
    found = workspace(tmp_path / "dist")
    elsewhere = tmp_path / "another disk"
    (elsewhere / "notes").mkdir(parents=True)
    found.folder("moved").parent.mkdir(parents=True)
    found.folder("moved").symlink_to(elsewhere)
    folders = (
        found.folder("main"), found.folder("main") / ".eval_results", found.folder("moved") / "notes",
        found.receipt_path("main").parent, found.unfinished_path("main").parent, found.rows.parent,
        found.losses_path("").parent, found.base_scores.parent, found.work, found.work / "main",
        found.work / "main" / "checkpoint", found.work / "verify" / "transformers" / "main",
    )  # fmt: skip
    for folder in folders:
        (folder / ".tmp-folder" / "inner").mkdir(parents=True)
        (folder / ".tmp-file").write_bytes(b"half")
        (folder / "kept.json").write_bytes(b"{}")
    (found.work / ".tmp-link").symlink_to(tmp_path)
    with found.locked():
        assert list(tmp_path.rglob(".tmp-*")) == []
        assert all((folder / "kept.json").exists() for folder in folders)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"pid": "x"}', b"\xff" * 200_000])
def test_a_record_that_cannot_be_read_is_none(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.json").write_bytes(content)
    assert read_running(tmp_path / "a.json") is None


@pytest.mark.parametrize("key", ["started_at", "seconds_left", "updated_at"])
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_a_record_without_finite_times_is_none(tmp_path: Path, key: str, value: float) -> None:
    path = tmp_path / "a.json"
    path.write_text(STEP.model_dump_json())
    assert read_running(path) == STEP
    path.write_text(json.dumps({**STEP.model_dump(mode="json"), key: value}))
    assert read_running(path) is None


def test_a_fifo_or_a_link_in_the_records_place_is_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo.json")
    (tmp_path / "a.json").write_text(STEP.model_dump_json())
    (tmp_path / "link.json").symlink_to("a.json")
    assert read_running(tmp_path / "fifo.json") is None  # an open of the FIFO would wait for a writer
    assert read_running(tmp_path / "link.json") is None


def status(recipe: Path, *options: str) -> str:
    done = CliRunner().invoke(app, ["status", str(recipe), "--dist", str(recipe.parent / "dist"), *options])
    assert done.exit_code == 0, done.output
    return done.stdout


def test_publishing_and_rendering_are_seen(
    builds: tiny_recipe.Builds, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, seen = builds.copy(tmp_path), []
    found = workspace(tmp_path / "dist")

    def look(*_: object, **__: object) -> list[object]:
        running = read_running(found.running_path)
        seen.append(running.stage if running else None)
        return []

    monkeypatch.setattr("packager.pipeline.flow.render_cards", look)
    render(RecipeFile.load(recipe), tiny_recipe.options(tmp_path / "dist"), Terminal(quiet=True), branch="main")
    monkeypatch.setattr("packager.pipeline.flow.publish_branches", look)
    tiny_recipe.publish(recipe, tmp_path / "dist")
    assert seen == ["", "publish"]
    assert not found.running_path.parent.exists()


def _build(recipe: Path) -> None:
    tiny_recipe.build(recipe, recipe.parent / "dist")


def _wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.slow
@pytest.mark.crash
def test_a_build_is_seen_while_it_runs_and_its_blocks_after_a_kill(tmp_path: Path) -> None:
    recipe = write_all(tmp_path)
    found = workspace(tmp_path / "dist")
    process = multiprocessing.get_context("spawn").Process(target=_build, args=(recipe,))
    process.start()
    _wait_for(lambda: found.blocks_done(BRANCHES[-1]))
    os.kill(process.pid or 0, signal.SIGSTOP)
    running = json.loads(status(recipe, "--format", "json"))
    assert running["running"]["stage"] == "quantize"
    assert running["running"]["pid"] == process.pid
    assert f"(process {process.pid} on " in status(recipe)
    process.kill()
    process.join()
    after = json.loads(status(recipe, "--format", "json"))
    assert after["running"] is None
    assert [branch["state"] for branch in after["branches"]] == ["unfinished"] * len(BRANCHES)
    assert "1 of 3 blocks" in status(recipe)
    _build(recipe)
    assert not found.running_path.exists()
    assert [branch["state"] for branch in json.loads(status(recipe, "--format", "json"))["branches"]] == ["built"] * 3


@pytest.mark.slow
@pytest.mark.crash
def test_watch_follows_a_build_to_its_end(tmp_path: Path) -> None:
    recipe = write_all(tmp_path)
    process = multiprocessing.get_context("spawn").Process(target=_build, args=(recipe,))
    process.start()
    _wait_for(workspace(tmp_path / "dist").running_path.exists)
    text = status(recipe, "--watch")
    process.join()
    assert text.count("tester/tiny-GPTQ") == 2
    assert text.rstrip().splitlines()[-1].split()[0] == BRANCHES[-1]


def test_status_does_not_disturb_a_build_that_begins(tmp_path: Path) -> None:
    found = workspace(tmp_path / "dist")
    assert not found.is_locked()
    assert not (tmp_path / "dist").exists()
    with found.locked():
        assert found.is_locked()
    assert not found.is_locked()
