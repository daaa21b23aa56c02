"""The store that machines share, and the leases in it."""

import errno
import importlib
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from packager.errors import MachineError, StateError, UsageError
from packager.fleet.leases import Lease
from packager.fleet.store import FolderStore, RemoteStore, Store, check_creates, open_store

REPOSITORY = "tester/tiny-GPTQ"


@pytest.fixture(params=["folder", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    return open_store(str(tmp_path / "store") if request.param == "folder" else f"memory://{tmp_path.name}")


def test_a_store_keeps_files_by_name(store: Store, tmp_path: Path) -> None:
    assert store.read("a/b") is None
    assert store.size_bytes("a/b") is None
    assert store.names("a") == []
    store.write("a/b", b"one")
    store.write("a/b", b"three")
    (tmp_path / "file").write_bytes(b"content")
    store.put(tmp_path / "file", "a/c/d")
    store.write("e", b"")
    assert (store.read("a/b"), store.size_bytes("a/c/d")) == (b"three", 7)
    assert store.names("a") == ["a/b", "a/c/d"]
    assert store.names("") == ["a/b", "a/c/d", "e"]
    store.get("a/c/d", tmp_path / "new" / "copy")
    assert (tmp_path / "new" / "copy").read_bytes() == b"content"
    with pytest.raises(StateError, match="not in the store"):
        store.get("a/x", tmp_path / "x")
    store.delete("a")
    store.delete("a")
    assert store.names("") == ["e"]


def test_of_several_that_create_a_file_one_does(store: Store) -> None:
    with ThreadPoolExecutor(8) as pool:
        created = list(pool.map(lambda number: store.create("a/b", str(number).encode()), range(32)))
    assert created.count(True) == 1
    assert store.read("a/b") == str(created.index(True)).encode()


@pytest.mark.parametrize("name", ["../a", "a/../../b", "/etc/passwd", "", "a\\b", "a\0"])
def test_a_name_stays_in_the_store(store: Store, name: str) -> None:
    for act in (store.read, store.size_bytes, lambda name: store.write(name, b""), store.delete):
        with pytest.raises(StateError, match="leads out"):
            act(name)


def test_one_run_has_a_recipe_and_another_takes_over_when_it_is_silent(store: Store) -> None:
    first, second, third = (Lease(store, REPOSITORY, name, silent_s=60) for name in ("first", "second", "third"))
    assert first.claim(0)
    assert not second.claim(1000)
    first.beat()
    assert not second.claim(1050)  # it saw a new beat
    assert not second.claim(1109)
    assert not third.claim(5)
    assert second.claim(1110)
    assert third.held_by() == "second"
    with pytest.raises(StateError, match="another run has taken over"):
        first.beat()
    second.beat()
    assert not third.claim(66)
    second.release()
    assert third.claim(67)


def test_of_several_runs_one_claims(store: Store) -> None:
    leases = [Lease(store, REPOSITORY, str(number)) for number in range(8)]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda lease: lease.claim(0), leases)).count(True) == 1


def calls_of(store: Store, local: Path) -> list[Any]:
    return [
        lambda: store.read("a/b"), lambda: store.write("a/b", b""), lambda: store.create("a/b", b""),
        lambda: store.size_bytes("a/b"), lambda: store.names("a"), lambda: store.put(local, "a/b"),
        lambda: store.get("a/b", local.with_name("copy")),
    ]  # fmt: skip


def test_what_a_service_answers_is_an_error_that_may_pass(tmp_path: Path) -> None:
    class Broken:
        def __getattr__(self, name: str) -> Any:
            def fail(*_: object, **__: object) -> None:
                raise RuntimeError("503 Slow Down")

            return fail

    store, local = RemoteStore(f"memory://{tmp_path.name}"), tmp_path / "file"
    vars(store)["_files"] = Broken()
    local.write_bytes(b"")
    for call in (*calls_of(store, local), lambda: store.delete("a")):
        with pytest.raises(MachineError, match="the store cannot be used now") as caught:
            call()
        assert caught.value.why == "RuntimeError: 503 Slow Down"


def test_a_stale_handle_is_no_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without its lease's files a run would believe that another one has taken over."""
    store, local = FolderStore(tmp_path / "store"), tmp_path / "file"
    store.write("a/b", b"")
    local.write_bytes(b"")

    def stale(*_: object, **__: object) -> None:
        raise OSError(errno.ESTALE, "Stale file handle")

    for name in ("stat", "mkdir"):
        monkeypatch.setattr(Path, name, stale)
    monkeypatch.setattr("packager.fleet.store.open_regular", stale)
    monkeypatch.setattr(os, "scandir", stale)
    for call in calls_of(store, local):
        with pytest.raises(MachineError, match="the store cannot be used now"):
            call()


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("/dev/zero")], ids=["pipe", "device"])
def test_what_is_no_file_is_not_read(make: Callable[[Path], object], tmp_path: Path) -> None:
    """A pipe has no end until somebody writes."""
    store = open_store(str(tmp_path))
    make(tmp_path / "a")
    for call in (lambda: store.read("a"), lambda: store.get("a", tmp_path / "b")):
        with pytest.raises(MachineError, match="cannot be used now"):
            call()


def test_a_lease_of_more_digits_is_taken_over_too(store: Store) -> None:
    store.create(f"{REPOSITORY}/lease/99999999", b"somebody")
    store.write(f"{REPOSITORY}/lease/99999999.beat", b"released")
    lease = Lease(store, REPOSITORY, "first")
    assert lease.claim(0)
    lease.beat()
    assert not Lease(store, REPOSITORY, "second").claim(1)


@pytest.mark.parametrize("url", ["foo://bar", "sftp://host/folder", "gs://bucket/folder"])
def test_a_url_where_two_writers_may_create_the_same_file_is_refused(url: str) -> None:
    with pytest.raises(UsageError, match="this kind of store cannot be shared") as caught:
        open_store(url)
    assert "both would have it" in caught.value.why


@pytest.mark.parametrize("url", ["s3:/bucket/a", "s3:bucket", "s3//bucket/a", "file:/srv/fleet", "host:/srv/fleet"])
def test_a_url_with_a_character_too_few_is_no_folder_of_this_machine(url: str) -> None:
    with pytest.raises(UsageError, match="neither a URL nor surely a folder"):
        open_store(url)
    open_store(f"./{url}")
    open_store("C:/fleet")


def test_without_s3fs_it_is_said_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)
    monkeypatch.delitem(vars(importlib.import_module("fsspec.registry"))["_registry"], "s3", raising=False)
    with pytest.raises(MachineError) as caught:
        open_store("s3://bucket/folder")
    assert "gptq-packager[s3]" in caught.value.hint


class Refusing:
    """An fsspec file system whose service refuses as botocore tells it, without the word that s3fs looks for."""

    def __init__(self, status: int) -> None:
        self._status = status

    def pipe_file(self, _: str, __: bytes, *, mode: str) -> None:
        assert mode == "create"
        error = OSError(errno.EINVAL, "At least one of the preconditions did not hold")
        error.__cause__ = RuntimeError("ClientError")
        vars(error.__cause__)["response"] = {"ResponseMetadata": {"HTTPStatusCode": self._status}}
        raise error


@pytest.mark.parametrize("status", [409, 412])
def test_a_refused_creation_is_no_error_of_the_store(status: int, tmp_path: Path) -> None:
    store = RemoteStore(f"memory://{tmp_path.name}")
    vars(store)["_files"] = Refusing(status)
    assert not store.create("a/b", b"")
    vars(store)["_files"] = Refusing(400)
    with pytest.raises(MachineError, match="cannot be used now"):
        store.create("a/b", b"")


def test_a_store_that_lets_a_file_be_created_twice_is_refused(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    check_creates(store)
    assert store.names("") == []

    def create(name: str, data: bytes) -> bool:  # as s3fs does before 2024.12
        store.write(name, data)
        return True

    monkeypatch.setattr(store, "create", create)
    with pytest.raises(UsageError, match="does not tell two writers apart"):
        check_creates(store)
    assert store.names("") == []


def test_a_store_whose_first_answer_is_lost_is_not_refused(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    create = store.create
    monkeypatch.setattr(store, "create", lambda name, data: create(name, data) and create(name, data))
    check_creates(store)


def test_a_store_that_does_not_answer_the_first_question_is_asked_no_other(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> bool:
        raise KeyboardInterrupt

    asked: list[str] = []
    monkeypatch.setattr(store, "create", interrupted)
    monkeypatch.setattr(store, "delete", asked.append)
    with pytest.raises(KeyboardInterrupt):
        check_creates(store)
    assert asked == []


def test_who_looks_once_goes_by_the_time_of_the_beat(store: Store) -> None:
    first, looker = Lease(store, REPOSITORY, "first"), Lease(store, REPOSITORY, "")
    now = time.time()
    assert not looker.is_held(now)
    assert first.claim(0)
    assert looker.is_held(now)
    first.beat()
    assert looker.is_held(now + 500)
    assert not looker.is_held(now + 700)
    first.beat()
    first.release()
    assert not looker.is_held(now)
