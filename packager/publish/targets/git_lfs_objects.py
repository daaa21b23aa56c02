"""The objects that a remote keeps in git-lfs, whole or in part.

git-lfs itself downloads whole objects, and of 7 GB an audit reads 2 MB. So parts are read by HTTP: the batch API
(https://github.com/git-lfs/git-lfs/blob/main/docs/api/batch.md) names an address for an object, where most servers
answer a ranged request.
"""

import time
from collections.abc import Callable, Mapping
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from packager.errors import PublishError
from packager.inputs.hub_session import AnswerError, is_of_client, open_session, origin
from packager.publish.targets import StoredFile
from packager.publish.targets.git_lfs import object_path, pointer
from packager.publish.targets.git_remote import RemoteGit
from packager.publish.targets.hub_answers import json_of
from packager.publish.targets.hub_client import begins_with
from packager.system.text import printable

if TYPE_CHECKING:
    from httpx2 import Response

# Where an object is, and the headers of a request there.
_Action = tuple[str, Mapping[str, str]]
_MEDIA_TYPE = "application/vnd.git-lfs+json"


class LfsObjects:
    """Reads a remote's objects.

    Args:
        git: the staging repository, which caches whole objects.
        folder: of the remote, if it is on this machine.
        address: of the remote.
        log: gets a line when the server sends no parts. No more are asked for then.
    """

    def __init__(self, git: RemoteGit, folder: Path | None, address: str, log: Callable[[str], None]) -> None:
        self._git, self._folder, self._address, self._log = git, folder, address, log
        self._actions: dict[str, _Action] = {}
        self._sends_parts = urlsplit(address).scheme in ("http", "https")

    def whole(self, stored: StoredFile) -> Path:
        """Return the path of an object's content, downloaded if necessary.

        Raises:
            PublishError: the remote has no such object.
        """
        path = object_path(self._folder or self._git.worktree, stored.sha256)
        if not path.exists() and not self._folder:
            self._git.reach("lfs", "smudge", stdin=pointer(stored.sha256, stored.size_bytes), discard=True)
        if not path.exists() or path.stat().st_size != stored.size_bytes:
            raise PublishError(f"git-lfs has no object {stored.sha256}", where=self._address)
        return path

    def read(self, stored: StoredFile, start: int, size: int | None) -> bytes:
        """Return an object's content, or `size` bytes of it from `start` on.

        Raises:
            PublishError: the remote has no such object.
        """
        if size is not None and (part := self._part_of(stored, start, size)) is not None:
            return part
        with self.whole(stored).open("rb") as stream:
            stream.seek(start)
            return stream.read(-1 if size is None else size)

    def _part_of(self, stored: StoredFile, start: int, size: int) -> bytes | None:
        """Return a part by HTTP, not hashed, or None if it cannot be had, but perhaps the whole object."""
        size = min(size, stored.size_bytes - start)
        if not self._sends_parts or not 0 < size < stored.size_bytes:
            return None
        if object_path(self._git.worktree, stored.sha256).exists():
            return None
        open_session()
        for wait_s in (*self._git.retries_s, None):
            try:
                return self._part_at_known(stored, start, size) or self._part(self._action(stored), stored, start, size)
            except Exception as error:
                if is_of_client(error) and _may_pass(error) and wait_s is not None:
                    self._log(f"{self._address}: {_words(error)}; trying again in {wait_s:g} s")
                    time.sleep(wait_s)
                    continue
                if is_of_client(error):
                    self._ask_for_no_more(error)
                    return None
                raise
        return None

    def _ask_for_no_more(self, error: Exception) -> None:
        self._sends_parts = False
        what = f"no part of a git-lfs object can be read ({_words(error)}); whole objects are downloaded"
        self._log(f"{self._address}: {what}")

    def _part_at_known(self, stored: StoredFile, start: int, size: int) -> bytes | None:
        """Return a part from the address of an earlier part; None if there is none, or it has expired."""
        if not (action := self._actions.pop(stored.sha256, None)):
            return None
        try:
            return self._part(action, stored, start, size)
        except AnswerError:
            return None

    def _part(self, action: _Action, stored: StoredFile, start: int, size: int) -> bytes:
        from huggingface_hub import get_session

        url, headers = action
        sent = {**headers, "Range": f"bytes={start}-{start + size - 1}"}
        with get_session().stream("GET", url, headers=sent, follow_redirects=True) as response:
            _require_success(response)
            if start and not begins_with(response, start):
                raise AnswerError("the server does not send the part of the object that was asked for")
            data = b""
            for chunk in response.iter_bytes():
                data += chunk
                if len(data) >= size:
                    break  # a server without ranges sends the whole object
        if len(data) < size:
            raise AnswerError("the server sends less of the object than was asked for")
        self._actions[stored.sha256] = action
        return data[:size]

    def _action(self, stored: StoredFile) -> _Action:
        """Ask the server where an object is."""
        from huggingface_hub import get_session

        asked = {"oid": stored.sha256, "size": stored.size_bytes}
        headers = {"Accept": _MEDIA_TYPE, "Content-Type": _MEDIA_TYPE}
        if self._git.authorization:
            headers["Authorization"] = self._git.authorization
        response = get_session().post(
            f"{self._address.rstrip('/').removesuffix('.git')}.git/info/lfs/objects/batch",
            json={"operation": "download", "transfers": ["basic"], "objects": [asked], "hash_algo": "sha256"},
            headers=headers,
        )
        _require_success(response)
        return self._checked(json_of(response))

    def _checked(self, answer: Any) -> _Action:
        try:
            action = answer["objects"][0]["actions"]["download"]
            url, headers = action["href"], action.get("header") or {}
        except (KeyError, IndexError, TypeError, AttributeError):
            raise AnswerError("the server names no address of the object") from None
        texts = isinstance(url, str) and isinstance(headers, dict)
        if not texts or not all(isinstance(text, str) for pair in headers.items() for text in pair):
            raise AnswerError("the server's address of the object is no text")
        scheme = origin(url)[0]
        if scheme not in ("http", "https") or (scheme == "http" and urlsplit(self._address).scheme == "https"):
            raise AnswerError("the server's address of the object is no https address")
        return url, headers


class _BusyError(AnswerError):
    """An answer that may be another one later."""


def _require_success(response: "Response") -> None:
    if response.is_error:
        busy = response.status_code == HTTPStatus.TOO_MANY_REQUESTS or response.is_server_error
        raise (_BusyError if busy else AnswerError)(f"the server answers {response.status_code}")


def _may_pass(error: Exception) -> bool:
    """Return whether a failed request may succeed later: the network failed, or the server is busy."""
    from huggingface_hub.errors import OfflineModeIsEnabled

    return isinstance(error, _BusyError) or not isinstance(error, AnswerError | OfflineModeIsEnabled)


def _words(error: Exception) -> str:
    """Return why a request failed. The client's own messages show addresses, which are signed."""
    return printable(str(error)) if isinstance(error, AnswerError) else type(error).__name__
