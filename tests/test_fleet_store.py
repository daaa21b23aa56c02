"""The store that machines share, and the leases in it."""

import errno
import hashlib
import importlib
import os
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from typer.testing import CliRunner

from packager.cli.main import app
from packager.errors import MachineError, StateError, UsageError
from packager.fleet import remote_store
from packager.fleet.leases import Lease
from packager.fleet.open_store import check_creates, open_store
from packager.fleet.remote_store import RemoteStore
from packager.fleet.shared_work import SharedWork
from packager.fleet.store import FolderStore, Store

REPOSITORY = "tester/tiny-GPTQ"


class Service(MemoryFileSystem):  # type: ignore[misc]
    """A service with conditional writes: it refuses what is there, whatever its client believes."""

    protocol = "service"
    lock = threading.Lock()

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **_: object) -> None:
        with self.lock:
            if mode == "create" and path in self.store:
                raise FileExistsError(path)
            super().pipe_file(path, value)


fsspec.register_implementation("service", Service, clobber=True)


@pytest.fixture(params=["folder", "service"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    return open_store(str(tmp_path / "store") if request.param == "folder" else f"service://{tmp_path.name}")


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


def test_a_lease_outlives_an_emptied_store_unless_another_run_was_faster(store: Store) -> None:
    first, second, third = (Lease(store, REPOSITORY, name, silent_s=60) for name in ("first", "second", "third"))
    assert second.claim(0)
    second.release()
    assert first.claim(0)
    store.delete(REPOSITORY)
    first.beat()
    assert (second.claim(0), second.held_by()) == (False, "first")
    store.delete(REPOSITORY)
    assert third.claim(0)
    with pytest.raises(StateError, match="another run has taken over") as caught:
        first.beat()
    assert caught.value.why.endswith(": third")


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

    store, local = RemoteStore(f"service://{tmp_path.name}"), tmp_path / "file"
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


def test_a_store_whose_client_looks_itself_is_refused(tmp_path: Path) -> None:
    """fsspec's own `create`: it looks for the file, and writes if there was none; old ones only write."""
    url = f"memory://{tmp_path.name}"
    store = open_store(url)
    store.write("a", b"")
    with pytest.raises(UsageError, match="does not tell two writers apart") as caught:
        check_creates(store)
    assert caught.value.where == url
    assert "both would have it" in caught.value.why
    assert store.names("") == ["a"]


def test_a_service_that_looks_itself_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its client cannot tell; of writers at the same time several win."""
    together = threading.Barrier(8)

    def pipe_file(service: Service, path: str, value: bytes, mode: str = "overwrite", **_: object) -> None:
        there = path in service.store
        if path.endswith("/raced"):
            together.wait(timeout=20)
        if mode == "create" and there:
            raise FileExistsError(path)
        MemoryFileSystem.pipe_file(service, path, value)

    monkeypatch.setattr(Service, "pipe_file", pipe_file)
    with pytest.raises(UsageError, match="does not tell two writers apart"):
        check_creates(open_store(f"service://{tmp_path.name}"))


def test_a_store_that_keeps_what_it_once_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: dict[str, bytes] = {}
    read = Service.cat_file
    monkeypatch.setattr(Service, "cat_file", lambda service, path: kept.setdefault(path, read(service, path)))
    with pytest.raises(UsageError, match="shows what another writer has replaced"):
        check_creates(open_store(f"service://{tmp_path.name}"))


@pytest.mark.parametrize(
    ("url", "what"),
    [("foo://bar", "cannot be opened"), ("dir::memory://a", "a chain"), ("simplecache::s3://bucket/a", "a chain")],
)
def test_a_url_that_opens_no_store_is_refused(url: str, what: str) -> None:
    with pytest.raises(UsageError, match=what) as caught:
        open_store(url)
    assert caught.value.where == url


class Silent:
    """An fsspec file system whose service never answers."""

    def __init__(self) -> None:
        self.answers = threading.Event()

    def __getattr__(self, name: str) -> Any:
        return lambda *_, **__: self.answers.wait()


def test_a_service_that_never_answers_is_waited_for_in_words_and_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """s3fs itself gives up after six minutes."""
    url, lines, service = f"service://{tmp_path.name}", list[str](), Silent()
    monkeypatch.setattr(remote_store, "_NOTICE_S", 0.01)
    monkeypatch.setattr(remote_store, "_LIMIT_S", 0.03)
    monkeypatch.setattr(remote_store, "_PAUSE_S", 0.0)
    monkeypatch.setattr(Service, "pipe_file", service.pipe_file)
    store = open_store(url, lines.append)
    began = time.monotonic()
    with pytest.raises(MachineError, match="the store does not answer") as caught:
        check_creates(store)
    assert time.monotonic() - began < 5
    assert (caught.value.where, caught.value.why) == (url, "no answer within 0.03 s")
    assert "AWS_ENDPOINT_URL" in caught.value.hint
    assert lines == [f"waiting for the store {url}: no answer for 0.01 s, the limit is 0.03 s"]
    with pytest.raises(MachineError):
        store.write("a", b"")
    assert len(lines) == 1, "it is said once"
    service.answers.set()
    assert store.read("a") is None  # an answer
    service.answers.clear()
    with pytest.raises(MachineError):
        store.write("b", b"")
    assert len(lines) == 2
    service.answers.set()


def test_a_service_that_did_not_answer_is_left_alone_for_a_while(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fleet beats for every recipe that it has: each would wait for a minute."""
    now, asked, service = [0.0], list[str](), Silent()
    monkeypatch.setattr(remote_store, "_LIMIT_S", 0.02)
    monkeypatch.setattr("packager.fleet.remote_store.time.monotonic", lambda: now[0])
    monkeypatch.setattr(Service, "pipe_file", lambda _, path, *__: (asked.append(path), service.answers.wait()))
    store = open_store(f"service://{tmp_path.name}")
    for name, why in (("a", "no answer within 0.02 s"), ("b", "it did not answer before, and is asked again in 15 s")):
        with pytest.raises(MachineError, match="the store does not answer") as caught:
            store.write(name, b"")
        assert caught.value.why == why
    assert len(asked) == 1
    now[0] = 15.0
    service.answers.set()
    store.write("b", b"")
    assert len(asked) == 2


def test_a_write_that_was_given_up_never_comes_after_a_newer_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a recipe that is published would be under way again."""
    write, may_end, ended = Service.pipe_file, threading.Event(), threading.Event()

    def slow(*given: Any) -> None:
        may_end.wait()
        write(*given)
        ended.set()

    monkeypatch.setattr(remote_store, "_LIMIT_S", 0.02)
    monkeypatch.setattr(remote_store, "_PAUSE_S", 0.0)
    store = RemoteStore(f"service://{tmp_path.name}")
    monkeypatch.setattr(Service, "pipe_file", slow)
    given_up, held_back = "no answer within", "an earlier write of the same file has not ended"
    for data, why in ((b"building", given_up), (b"published", held_back)):
        with pytest.raises(MachineError, match="the store does not answer") as caught:
            store.write("state", data)
        assert why in caught.value.why
    monkeypatch.setattr(Service, "pipe_file", write)
    store.write("other", b"")
    may_end.set()
    ended.wait()
    while store._given_up[store._path("state")].is_set():
        time.sleep(0.001)
    store.write("state", b"published")
    assert store.read("state") == b"published"


def test_writes_of_one_name_may_be_under_way_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write, both = Service.pipe_file, threading.Barrier(2)
    store = open_store(f"service://{tmp_path.name}")
    monkeypatch.setattr(Service, "pipe_file", lambda *given: (both.wait(10), write(*given)))
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda data: store.write("a", data), (b"1", b"2")))
    assert store.read("a") in (b"1", b"2")


@pytest.mark.parametrize("question", [lambda store: store.names("a"), lambda store: store.delete("a")])
def test_a_question_about_many_objects_takes_the_time_that_it_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, question: Callable[[Any], Any]
) -> None:
    store = open_store(f"service://{tmp_path.name}", pytest.fail)
    store.write("a/b", b"")
    monkeypatch.setattr(remote_store, "_LIMIT_S", 0.01)
    for name in ("find", "rm"):
        asked = getattr(Service, name)
        monkeypatch.setattr(Service, name, lambda *a, asked=asked, **k: (time.sleep(0.05), asked(*a, **k))[1])
    question(store)


def test_a_block_may_take_longer_than_a_question(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A block of a large model takes minutes on a slow link."""
    store, block = open_store(f"service://{tmp_path.name}", pytest.fail), bytes(1_000_001)
    write, read = Service.pipe_file, Service.cat_file
    monkeypatch.setattr(remote_store, "_NOTICE_S", 0.01)
    monkeypatch.setattr(remote_store, "_LIMIT_S", 0.02)
    monkeypatch.setattr(Service, "pipe_file", lambda *given: (time.sleep(0.1), write(*given)))
    monkeypatch.setattr(Service, "cat_file", lambda *given: (time.sleep(0.1), read(*given))[1])
    blocks = SharedWork(store, REPOSITORY).blocks("main")
    digest = hashlib.sha256(block).hexdigest()
    store.write(f"{REPOSITORY}/blocks/main/{digest}", block)
    assert blocks.data(digest) == block


def test_an_error_names_the_store_and_no_password(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object, **__: object) -> None:
        raise PermissionError("https://user:secret@host/a?X-Amz-Signature=secret says no")

    monkeypatch.setattr(Service, "pipe_file", refused)
    store = open_store(f"service://user:secret@{tmp_path.name}/fleet")
    with pytest.raises(MachineError) as caught:
        store.write("a/b", b"")
    assert caught.value.where == f"service://{tmp_path.name}/fleet/a/b"
    assert "secret" not in str(caught.value)
    with pytest.raises(MachineError) as caught:
        check_creates(store)
    assert caught.value.where == f"service://{tmp_path.name}/fleet", "the probe's file is nobody's"
    assert "secret" not in str(caught.value)
    (tmp_path / "file").touch()
    with pytest.raises(MachineError) as caught:
        check_creates(open_store(str(tmp_path / "file" / "store")))
    assert caught.value.where == str(tmp_path / "file" / "store")


@pytest.mark.parametrize(
    "url",
    ["s3:/bucket/a", "s3:bucket", "s3//bucket/a", "file:/srv/fleet", "host:/srv/fleet", "me@nas:/srv/fleet",
     "10.0.0.1:/srv/fleet", "://srv/fleet", "file://srv/fleet", "file://localhost/srv/fleet", "file://~/fleet",
     "file://", "File://srv/fleet", "local://srv/fleet", "local://"],
)  # fmt: skip
def test_a_url_with_a_character_too_few_is_no_folder_of_this_machine(url: str) -> None:
    with pytest.raises(UsageError, match="the address of the store is not clear"):
        open_store(url)
    if "://" not in url:
        open_store(f"./{url}")
    open_store("C:/fleet")
    assert open_store("file:///srv/fleet").url == open_store("/srv/fleet").url


@pytest.mark.parametrize(
    "url", ["local:///srv/fleet", "local:////srv/fleet", "LOCAL:/srv/fleet", "File:///srv/fleet", "file:/srv/fleet"]
)
def test_a_folder_behind_another_scheme_is_named_as_it_is_written(url: str) -> None:
    """fsspec reads local:// and makes no folders: the hint was to check the network."""
    with pytest.raises(UsageError, match="the address of the store is not clear") as caught:
        open_store(url)
    assert caught.value.hint == "write /srv/fleet, if that is a folder that all machines share"


@pytest.mark.parametrize("name", ["file", "local", "locals/a", "files"])
def test_a_folder_may_be_named_like_a_scheme(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert open_store(name).url == str(tmp_path / name)


@pytest.mark.parametrize("url", ["s3:/KEY:SECRET@bucket/a", "s3//KEY:SECRET@bucket/a", "me:SECRET@nas:/srv/fleet"])
def test_a_password_in_a_mistyped_url_is_not_shown(url: str) -> None:
    with pytest.raises(UsageError) as caught:
        open_store(url)
    assert "SECRET" not in str(caught.value)


@pytest.mark.parametrize("url", ["", " "])
@pytest.mark.parametrize("command", [("release", "--jobs", "1"), ("queue",)])
def test_a_store_of_a_variable_that_is_not_set_is_refused(
    command: tuple[str, ...], url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = Path(__file__).resolve().parent.parent / "recipes" / "demo-llama.yaml"
    done = CliRunner().invoke(app, [*command, str(recipe), "--store", url])
    assert (done.exit_code, "it is empty" in done.stderr) == (UsageError.exit_code, True)
    assert not list(tmp_path.iterdir())


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
    store = RemoteStore(f"service://{tmp_path.name}")
    vars(store)["_files"] = Refusing(status)
    assert not store.create("a/b", b"")
    vars(store)["_files"] = Refusing(400)
    with pytest.raises(MachineError, match="cannot be used now"):
        store.create("a/b", b"")


def test_a_store_that_lets_a_file_be_created_twice_is_refused(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    check_creates(store)
    assert store.names("") == []

    def create(store: Store, name: str, data: bytes) -> bool:  # as s3fs does before 2024.12
        store.write(name, data)
        return True

    monkeypatch.setattr(type(store), "create", create)
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
