"""The digests of a base model's weights files: at once, or beside the work on them where hashing takes long.

A base model of 26 GB is hashed for some 15 s. A build computes meanwhile, and nothing is made of what it computed until
the digests are there and are those of the lock.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Lock

from packager.errors import SourceError
from packager.receipt import FileRecord
from packager.system.files import FileIdentity, file_identity, file_records, known_digest, sha256_file
from packager.system.parallel import run_at_low_priority
from packager.system.text import format_bytes

# Less is hashed in less than a second, and an error is shown before anything is computed.
_LONG_TO_HASH_BYTES = 1_000_000_000
_THREADS = 4  # each hashes some 2 GB/s; the work beside them needs the other cores, and the disk
_SHOW_EVERY_S = 10.0


def long_to_hash(size_bytes: int) -> bool:
    """Return whether hashing so many bytes takes so long that other work should not wait."""
    return size_bytes >= _LONG_TO_HASH_BYTES


def replaced_file(path: Path) -> SourceError:
    """Return the error of a file that is not the one that was there when the build began."""
    return SourceError(
        "a file of the base model changed during the build",
        where=str(path),
        why="its sha256 is no longer the one of the file that was checked",
        hint="run the same command again, and let nothing write into that folder meanwhile",
    )


class _Stopped(Exception):  # noqa: N818
    """Internal signal: nobody waits for the digests any more."""


class WeightsDigests:
    """Sizes and digests of a model's weights files.

    Files that together are large can be hashed by threads of low priority, in the context
    `hashed_beside`. Otherwise the first call of `records` hashes them.

    Args:
        folder: of the model.
        names: of the weights files.
        check: gets records as soon as they are known; raises SourceError if they are not those that are expected.
        log: gets a line when hashing begins, when it ends, and while it is waited for.

    Attributes:
        size_bytes: of all files together.
        identities: what the file system knew of each file before it was read.
    """

    def __init__(
        self,
        folder: Path,
        names: Sequence[str],
        check: Callable[[Mapping[str, FileRecord]], None],
        log: Callable[[str], None],
    ) -> None:
        self._folder, self._names, self._check, self._log = folder, tuple(names), check, log
        self.identities: dict[str, FileIdentity] = {name: file_identity(folder / name) for name in self._names}
        self._size_of = {name: (folder / name).stat().st_size for name in self._names}
        self.size_bytes = sum(self._size_of.values())
        self._beside: dict[str, Future[FileRecord]] = {}
        self._records: dict[str, FileRecord] | None = None
        self._hashed_bytes = 0
        self._lock, self._stop = Lock(), Event()

    @property
    def long_to_hash(self) -> bool:
        """Whether other work should not wait: the files are large, and this process has not hashed them yet."""
        unknown = [name for name in self._names if known_digest(self._folder / name) is None]
        return long_to_hash(sum(self._size_of[name] for name in unknown))

    @contextmanager
    def hashed_beside(self) -> Iterator[None]:
        """Hash beside the work of the body, if the digests are not known yet; stop that with the body."""
        try:
            if self._records is None and not self._beside:
                self._start()
            yield
        finally:
            self._stop.set()

    def _start(self) -> None:
        self._log(f"hashing {format_bytes(self.size_bytes)} of the base model beside the work")
        started = time.monotonic()
        largest_first = sorted(self._names, key=self._size_of.__getitem__, reverse=True)
        with_priority = ThreadPoolExecutor(_THREADS, thread_name_prefix="hash", initializer=run_at_low_priority)
        self._beside = {name: with_priority.submit(self._record_of, name, started) for name in largest_first}
        with_priority.shutdown(wait=False)

    def _record_of(self, name: str, started: float) -> FileRecord:
        """Return a file's size and digest.

        Raises:
            SourceError: it is another file than expected, or than the one that was there at first.
        """
        path = self._folder / name
        record = FileRecord(size_bytes=self._size_of[name], sha256=sha256_file(path, self._count))
        if file_identity(path) != self.identities[name]:
            raise replaced_file(path)
        self._check({name: record})
        if self._hashed_bytes == self.size_bytes:
            self._log(f"the base model is hashed, after {time.monotonic() - started:.1f} s")
        return record

    def _count(self, count: int) -> None:
        if self._stop.is_set():
            raise _Stopped
        with self._lock:
            self._hashed_bytes += count

    def known(self) -> bool:
        """Return whether all digests are there; do not wait.

        Raises:
            SourceError: what hashing met so far, see `records`.
        """
        if self._records is not None:
            return True
        done = [each for each in self._beside.values() if each.done()]
        for each in done:
            each.result()
        return bool(done) and len(done) == len(self._names)

    def records(self) -> dict[str, FileRecord]:
        """Return size and sha256 of every file, by name; wait until they are there.

        Raises:
            SourceError: a file is another one than expected, or was replaced meanwhile.
        """
        if self._records is not None:
            return self._records
        if not self._beside:
            found = file_records(self._folder / name for name in self._names)
            records = {name: found[self._folder / name] for name in self._names}
            self._check(records)
        else:
            while not self.known():
                wait(self._beside.values(), _SHOW_EVERY_S, return_when=FIRST_EXCEPTION)
                if not self.known():
                    done, whole = format_bytes(self._hashed_bytes), format_bytes(self.size_bytes)
                    self._log(f"waiting for the digests of the base model: {done} of {whole} are hashed")
            records = {name: self._beside[name].result() for name in self._names}
        self._records = records
        return records
