"""Opens the store at a URL, and tries whether machines can share it."""

import re
import secrets
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

from packager.errors import MachineError, UsageError
from packager.fleet.remote_store import RemoteStore
from packager.fleet.store import FolderStore, Store
from packager.system.text import shown_address

# A URL with a character too few, such as s3:/bucket, and a folder of another machine, such as me@nas:/folder. A single
# letter before the colon is a disk of Windows.
_MISTYPED: Final = re.compile(r"[^/]{2,}:|s3a?//|://")
# A folder's whole path behind a scheme in a form that is not read: local:///folder, File:///folder, file:/folder.
_FOLDER_URL: Final = re.compile(r"(?:file|local):(?:///*(?=/)|(?!//))(?P<path>/.*)", re.IGNORECASE | re.DOTALL)
_WRITERS: Final = 8  # at once, for the check that one of them wins


def open_store(url: str, log: Callable[[str], None] = lambda _: None) -> Store:
    """Open the store at a URL, or in a folder.

    Args:
        url: what a user typed.
        log: gets a line when the store does not answer for some seconds.

    Raises:
        UsageError: nothing can be a store at this URL.
        MachineError: a package that the URL needs is not installed, or the store cannot be opened.
    """
    scheme, separator, rest = url.partition("://")
    is_url = bool(scheme and separator)
    if unclear := _what_is_unclear(url):
        why, hint = unclear
        where = shown_address(url) or "--store"
        raise UsageError("the address of the store is not clear", where=where, why=why, hint=hint)
    if not is_url or scheme == "file":
        return FolderStore(Path(rest if is_url else url).absolute())
    if "::" in scheme:
        raise UsageError(
            "the store is a chain of file systems",
            where=url,
            why="those before the last one keep copies, or have no request that creates a file only if there is none",
            hint="give the last URL of the chain alone",
        )
    return RemoteStore(url, log)


def _what_is_unclear(url: str) -> tuple[str, str] | None:
    """Return why an address may not mean what was meant, and what to do; None where it is clear."""
    scheme, separator, rest = url.partition("://")
    is_url, folder = bool(scheme and separator), _FOLDER_URL.fullmatch(url)
    hint = "write s3://bucket/folder or /folder; for a folder in the working folder, put ./ before its name"
    if not url.strip():
        return "it is empty, as a variable is that was not set", hint
    if folder and scheme != "file":
        why = "a folder is given by its whole path, alone or behind file:// in small letters"
        return why, f"write {shown_address(folder['path'])}, if that is a folder that all machines share"
    is_relative = is_url and scheme.lower() in ("file", "local") and not rest.startswith("/")
    if is_relative or (not is_url and _MISTYPED.match(url)):
        return "as a folder it would lie in the working folder, and each machine would have one of its own", hint
    return None


def check_creates(store: Store) -> None:
    """Refuse a store that lets two writers create the same file: two runs would have one recipe.

    Services that speak S3 without If-None-Match do so, and s3fs before 2024.12, which does not send it. Where fsspec
    has no such request (sftp://, memory://), its client looks for the file first and writes then; the second writer
    here is one that cannot look.

    Raises:
        UsageError: this is such a store, or one that shows a writer what another one has replaced.
        MachineError: it cannot be used now.
    """
    folder = f".probe-{secrets.token_hex(8)}"
    file, other = f"{folder}/file", store.without_looking()
    try:
        store.create(file, b"first")  # may be refused, after an answer that was lost: see `RemoteStore.create`
        try:
            seen = store.read(file)
            twice = other.create(file, b"second")
            with ThreadPoolExecutor(_WRITERS) as pool:
                created = list(pool.map(lambda _: other.create(f"{folder}/raced", b""), range(_WRITERS)))
            other.write(file, b"third")
            stale = store.read(file) == seen
        finally:  # a store that does not answer the first question is not asked again, which would take as long
            store.delete(folder)
    except MachineError as error:  # it names the probe's file, which nobody knows
        raise MachineError(error.what, where=store.url, why=error.why, hint=error.hint) from error
    if twice or created.count(True) > 1:
        raise UsageError(
            "the store does not tell two writers apart",
            where=store.url,
            why="a file that was there was created again, by a writer that could not look for it first: of two runs "
            "that claim a recipe at once both would have it",
            hint="give a folder that all machines share, or a service with conditional writes and its present client, "
            "such as s3://bucket/folder (If-None-Match) with s3fs 2024.12 or later",
        )
    if stale:
        raise UsageError(
            "the store shows what another writer has replaced",
            where=store.url,
            why="a run would take another one for dead, whose signs of life it does not see",
            hint="give a folder that all machines share, or s3://bucket/folder, without a cache in between",
        )
