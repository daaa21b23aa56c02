"""A store that fsspec opens by a URL: S3 by s3fs, Google's and Azure's by gcsfs and adlfs, and whatever is installed.

s3fs 2026.9 tries a request five times, and botocore below it each of these five times more: a server that accepts
connections and never answers keeps it for six minutes. So every question about little has a limit here.
"""

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, ParamSpec, TypeVar

from packager.errors import MachineError, UsageError
from packager.fleet.store import checked_name, missing_file, store_errors
from packager.system.files import disk_errors
from packager.system.parallel import AnswerTimeoutError, in_time

_REFUSED: Final = (409, 412)  # S3: somebody writes this object just now; the object is there
_NOTICE_S: Final = 5.0
_LIMIT_S: Final = 60.0  # four of s3fs's time limits for reading: a service that is slowed down may need some
# After a question without an answer no other one is asked for so long: whoever asks for a hundred recipes, one after
# the other, has other things to do.
_PAUSE_S: Final = 15.0
_SMALL_BYTES: Final = 1_000_000  # what is larger, such as blocks, takes the time that the link takes

Given = ParamSpec("Given")
Reply = TypeVar("Reply")


class RemoteStore:
    """What fsspec opens by a URL. `create` asks the service to refuse an existing object (S3: If-None-Match).

    Args:
        url: the URL.
        log: gets a line when an answer is waited for, the first time and after each answer.
    """

    def __init__(self, url: str, log: Callable[[str], None] = lambda _: None) -> None:
        self.url, self._log, self._silent, self._paused_until = url, log, False, 0.0
        self._given_up: dict[str, threading.Event] = {}  # writes, by path; an event is set until its write ends
        self._files, self._root = self._open()

    def _open(self) -> tuple[Any, str]:
        """Open the store anew; a client of fsspec is else shared by all who open the same URL."""
        with store_errors(self.url, ""):
            try:
                import fsspec

                # What another machine writes or deletes is seen at once.
                options = {"use_listings_cache": False, "skip_instance_cache": True}
                files, root = self._ask(fsspec.core.url_to_fs, self.url, **options)
            except ImportError as error:
                scheme = self.url.partition("://")[0]
                known = "'gptq-packager[s3]'" if scheme in ("s3", "s3a") else "what it names"
                hint = f"pip install {known}, on every machine"
                raise MachineError("the store cannot be opened", where=self.url, why=str(error), hint=hint) from error
            except ValueError as error:  # fsspec knows no such scheme, or the URL has another form
                hint = "give a folder that all machines share, or s3://bucket/folder"
                raise UsageError("the store cannot be opened", where=self.url, why=str(error), hint=hint) from error
        return files, str(root)

    def _ask(self, question: Callable[Given, Reply], *args: Given.args, **kwargs: Given.kwargs) -> Reply:
        """Return what the service answers, if it does in time.

        Raises:
            MachineError: it does not, or did not a moment ago.
        """
        if (pause_s := self._paused_until - time.monotonic()) > 0:
            raise self._no_answer(f"it did not answer before, and is asked again in {pause_s:.0f} s")

        def notice() -> None:
            if not self._silent:
                self._log(
                    f"waiting for the store {self.url}: no answer for {_NOTICE_S:g} s, the limit is {_LIMIT_S:g} s"
                )
            self._silent = True

        def answer() -> Reply:
            try:
                return question(*args, **kwargs)
            finally:  # an error is an answer, too
                self._silent = False

        try:
            return in_time(answer, _LIMIT_S, notice, _NOTICE_S)
        except AnswerTimeoutError as error:
            self._paused_until = time.monotonic() + _PAUSE_S
            raise self._no_answer(str(error)) from error

    def _no_answer(self, why: str) -> MachineError:
        hint = "check the network, and which server the URL's client asks (for S3: AWS_ENDPOINT_URL, AWS_REGION)"
        return MachineError("the store does not answer", where=self.url, why=why, hint=hint)

    def without_looking(self) -> "RemoteStore":
        """Return the same store, opened once more, whose client believes that nothing is there."""
        other = RemoteStore(self.url, self._log)
        vars(other._files).update(_BLIND)
        return other

    def _path(self, name: str) -> str:
        return f"{self._root.rstrip('/')}/{checked_name(name)}"

    def read(self, name: str, *, large: bool = False) -> bytes | None:
        """Return the content of an object, None if there is none."""
        with store_errors(self.url, name), suppress(FileNotFoundError):
            if large:
                return bytes(self._files.cat_file(self._path(name)))
            return bytes(self._ask(self._files.cat_file, self._path(name)))
        return None

    def write(self, name: str, data: bytes) -> None:
        """Write an object, or replace it: services make it visible when it is whole."""
        with store_errors(self.url, name):
            if len(data) > _SMALL_BYTES:
                self._files.pipe_file(self._path(name), data)
            else:
                self._write_in_order(self._path(name), data)

    def _write_in_order(self, path: str, data: bytes) -> None:
        """Write an object unless an older write, which nobody waits for any more, might come after this one."""
        under_way = threading.Event()

        def write() -> None:
            under_way.set()
            try:
                self._files.pipe_file(path, data)
            finally:
                under_way.clear()

        if path in self._given_up and self._given_up[path].is_set():
            raise self._no_answer("an earlier write of the same file has not ended yet")
        try:
            self._ask(write)
        finally:
            if under_way.is_set():
                self._given_up[path] = under_way

    def create(self, name: str, data: bytes) -> bool:
        """Write an object unless there is one of this name; return whether it was written.

        Of a request whose answer was lost, the second try is refused: the object is there, and nobody was told. A lease
        that begins so is taken over like that of a run which has gone silent.
        """
        with store_errors(self.url, name):
            try:
                self._ask(self._files.pipe_file, self._path(name), data, mode="create")
            except FileExistsError:
                return False
            except OSError as error:
                # s3fs knows the refusal of AWS by a word that other services leave out.
                answer = getattr(error.__cause__, "response", {}).get("ResponseMetadata", {})
                if answer.get("HTTPStatusCode") in _REFUSED:
                    return False
                raise
        return True

    def size_bytes(self, name: str) -> int | None:
        """Return the size of an object, None if there is none."""
        with store_errors(self.url, name), suppress(FileNotFoundError):
            return int(self._ask(self._files.info, self._path(name))["size"])
        return None

    def names(self, folder: str) -> list[str]:
        """Return the names of all objects below a folder, sorted."""
        root = self._root.rstrip("/")
        with store_errors(self.url, folder), suppress(FileNotFoundError):
            # Without a limit: it takes as long as there are objects.
            found = self._files.find(f"{root}/{checked_name(folder)}" if folder else root)
            return sorted(path[len(root) + 1 :] for path in found)
        return []

    def put(self, path: Path, name: str) -> None:
        """Copy a local file into the store."""
        with store_errors(self.url, name):
            self._files.put_file(str(path), self._path(name))

    def get(self, name: str, path: Path) -> None:
        """Copy an object to a local path."""
        with store_errors(self.url, name), disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                self._files.get_file(self._path(name), str(path))
            except FileNotFoundError as error:
                raise missing_file(name) from error

    def delete(self, folder: str) -> None:
        """Delete all objects below a folder."""
        with store_errors(self.url, folder), suppress(FileNotFoundError):
            # Without a limit: one that was given up could delete what is written again later.
            self._files.rm(self._path(folder), recursive=True)


def _is_not_there(*_: object, **__: object) -> bool:
    return False


def _finds_nothing(path: object = "", *_: object, **__: object) -> None:
    raise FileNotFoundError(path)


async def _is_not_there_async(*_: object, **__: object) -> bool:
    return False


async def _finds_nothing_async(path: object = "", *_: object, **__: object) -> None:
    raise FileNotFoundError(path)


# What fsspec's clients ask before they write, in the names of their two kinds.
_BLIND: Final = {
    **dict.fromkeys(("exists", "isfile", "isdir"), _is_not_there),
    **dict.fromkeys(("_exists", "_isfile", "_isdir"), _is_not_there_async),
    **dict.fromkeys(("info", "ls"), _finds_nothing),
    **dict.fromkeys(("_info", "_ls"), _finds_nothing_async),
}
