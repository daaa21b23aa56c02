"""Temporary folders: their owner removes them, or the next run if the owner was killed."""

import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from packager.system.scratch import ScratchFolder, remove_abandoned

OWNER = """
import sys, tempfile
from packager.system.scratch import ScratchFolder
tempfile.tempdir = sys.argv[1]
folder = ScratchFolder("view")
(folder.path / "config").touch()
print(folder.path, flush=True)
sys.stdin.read()
"""


@pytest.fixture
def owner(tmp_path: Path) -> Iterator["subprocess.Popen[str]"]:
    """A process that has a scratch folder, and ends when its standard input does."""
    command = [sys.executable, "-c", OWNER, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield process


def path_of(owner: "subprocess.Popen[str]") -> Path:
    assert owner.stdout is not None
    return Path(owner.stdout.readline().strip())


def test_a_folder_goes_with_its_block(tmp_path: Path) -> None:
    with ScratchFolder("view", within=tmp_path) as scratch:
        (scratch.path / "file").touch()
        assert scratch.path.stat().st_mode & 0o777 == 0o700
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_its_owner_may_not_change_goes_too(tmp_path: Path) -> None:
    with ScratchFolder("view", within=tmp_path) as scratch:
        (scratch.path / "closed" / "inner").mkdir(parents=True)
        (scratch.path / "closed" / "inner").chmod(0)
        (scratch.path / "closed").chmod(0o500)
    assert list(tmp_path.iterdir()) == []


def test_the_folder_of_a_killed_process_goes_with_the_next_run(
    owner: "subprocess.Popen[str]", tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = path_of(owner)
    owner.send_signal(signal.SIGKILL)
    owner.wait()
    assert (left / "config").exists()
    monkeypatch.setattr("packager.system.scratch._searched", set())
    with ScratchFolder("other", within=tmp_path) as scratch:
        assert list(tmp_path.iterdir()) == [scratch.path]


def test_the_folder_of_a_living_process_stays(owner: "subprocess.Popen[str]", tmp_path: Path) -> None:
    kept = path_of(owner)
    remove_abandoned(tmp_path)
    assert (kept / "config").exists()
    owner.communicate()
    assert kept.exists()  # this program has no handler; the folder is abandoned now
    remove_abandoned(tmp_path)
    assert not kept.exists()


def test_only_folders_of_this_program_are_removed(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    (outside / "kept").mkdir(parents=True)
    place = tmp_path / "place"
    (place / "packager-view-abc12345").mkdir(parents=True)  # without a lock: of another version
    (place / "packager-view-file1234.locked").touch()
    (place / "packager-view-link1234.locked").symlink_to(outside)
    (place / "packager-view-made1234.locked").mkdir()
    remove_abandoned(place)
    assert sorted(path.name for path in place.iterdir()) == [
        "packager-view-abc12345", "packager-view-file1234.locked", "packager-view-link1234.locked",
    ]  # fmt: skip
    assert (outside / "kept").exists()
