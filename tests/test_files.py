"""`files` and `parallel`: digests of many files at once, in order, and of a file that did not change only once."""

import hashlib
import os
import threading
from pathlib import Path
from typing import Any

import pytest

from packager.errors import StateError
from packager.inputs.source_files import list_source_files
from packager.pipeline.workspace import differences
from packager.publish.branches import check_folders
from packager.system import files as files_module
from packager.system.files import file_record, file_records, has_record
from packager.system.parallel import in_parallel
from tests.publish_fixtures import make_content


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the names of the files that were hashed since."""
    names: list[str] = []

    def record(path: Path) -> object:
        names.append(path.name)
        return file_record(path)

    monkeypatch.setattr(files_module, "file_record", record)
    return names


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the names of the files whose content was read since; what was just written counts as settled."""
    names: list[str] = []
    digest = hashlib.file_digest

    def counted(stream: Any, name: str) -> object:
        names.append(Path(stream.name).name)
        return digest(stream, name)

    monkeypatch.setattr(files_module, "_SETTLED_NS", -(10**12))
    monkeypatch.setattr(hashlib, "file_digest", counted)
    return names


@pytest.fixture
def paths(tmp_path: Path) -> list[Path]:
    for number in range(20):
        (tmp_path / f"{number:02d}").write_bytes(bytes([number]) * number * 1000)
    return sorted(tmp_path.iterdir())


def test_records_are_those_of_each_file_in_the_order_asked_for(paths: list[Path], hashed: list[str]) -> None:
    records = file_records(reversed(paths))
    assert list(records) == list(reversed(paths))
    assert records == {path: file_record(path) for path in paths}
    assert sorted(hashed) == [path.name for path in paths]
    assert file_records([]) == {}


def test_a_base_model_s_file_is_hashed_once_unless_it_changes(paths: list[Path], read: list[str]) -> None:
    first = file_records(paths)
    assert list(first) == paths
    assert file_records(paths[:5]) == dict(list(first.items())[:5])
    assert len(read) == len(paths)
    paths[3].write_bytes(bytes([7]) * 3000)
    changed = file_records(paths)
    assert changed[paths[3]] == file_record(paths[3]) != first[paths[3]]
    assert read[len(paths) :] == ["03"]


def test_a_change_with_the_old_time_is_noticed(paths: list[Path], read: list[str]) -> None:
    file_records(paths)
    stat = paths[3].stat()
    paths[3].write_bytes(bytes([7]) * 3000)
    os.utime(paths[3], ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert file_records(paths)[paths[3]] == file_record(paths[3])


class CoarseTimes:
    """A file's status with the times of a file system that counts whole seconds."""

    def __init__(self, status: os.stat_result) -> None:
        self._status = status

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._status, name)
        return value // 10**9 * 10**9 if name in ("st_mtime_ns", "st_ctime_ns") else value


def test_a_base_model_s_file_that_is_rewritten_at_once_is_hashed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its size, inode and, within a tick of the file system's clock, its times are unchanged."""
    stat, fstat = os.stat, os.fstat
    monkeypatch.setattr(os, "stat", lambda *arguments, **named: CoarseTimes(stat(*arguments, **named)))
    monkeypatch.setattr(os, "fstat", lambda descriptor: CoarseTimes(fstat(descriptor)))
    path = tmp_path / "tokenizer.json"
    for number in range(20):
        content = f"{number:04d}".encode()
        path.write_bytes(content)
        (record,) = file_records(list_source_files(tmp_path).paths).values()
        assert record.sha256 == hashlib.sha256(content).hexdigest()


def test_results_come_in_order_and_from_threads() -> None:
    barrier = threading.Barrier(3, timeout=30)

    def work(number: int) -> int:
        barrier.wait()
        return number * number

    assert in_parallel(work, [3, 1, 2]) == [9, 1, 4]
    assert in_parallel(work, []) == []


def test_the_first_failure_in_order_is_raised() -> None:
    def work(number: int) -> int:
        if number:
            raise ValueError(str(number))
        return number

    with pytest.raises(ValueError, match="2"):
        in_parallel(work, [0, 2, 1, 3])


def grow(path: Path) -> None:
    """Let a file be a sparse one of a terabyte, which takes an hour to hash."""
    os.truncate(path, 1 << 40)


def test_a_file_of_another_size_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    path.write_bytes(b"weights")
    record = file_record(path)
    assert has_record(path, record)
    assert differences(tmp_path, {path.name: record}) == []
    path.write_bytes(b"Weights")
    assert not has_record(path, record)
    grow(path)
    assert not has_record(path, record)
    assert differences(tmp_path, {path.name: record}) == ["w.safetensors was changed"]


def test_a_file_of_another_size_is_not_published(tmp_path: Path) -> None:
    content = make_content(tmp_path, "main", {"README.md": b"card", "w.safetensors": b"weights"})
    grow(tmp_path / "main" / "w.safetensors")
    with pytest.raises(StateError, match="changed after the build") as caught:
        check_folders([content])
    assert "1,099,511,627,776 bytes instead of 7" in caught.value.why
