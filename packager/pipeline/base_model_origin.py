"""Which base model unfinished work was computed from, while the base model's digests are still being computed.

Finished blocks are resumed if they were computed from the same base model. Its digest is not known when the first block
is written. So each journal has a token, and this file says to which weights files the token belongs: to those that the
file system knows by the same times, and, once they are hashed, to all that have the same digest.
"""

from collections.abc import Callable
from pathlib import Path

from pydantic import ValidationError

from packager.inputs.base_model import SourceModel
from packager.inputs.weights_digests import long_to_hash
from packager.receipt import digest_of
from packager.records import Record
from packager.system.files import write_atomic

_FILE_NAME = ".base-model.json"


class _Kept(Record):
    """The content of the file.

    Attributes:
        state: of the files, see `BaseOrigin`.
        token: of the blocks that were computed from them.
        digest: of the base model; None while it is not known.
    """

    state: str
    token: str
    digest: str | None = None


class BaseOrigin:
    """The base model of a build's blocks.

    Args:
        work: the folder of the unfinished variants; it need not exist yet.
        source: the base model.
        log: gets a line if finished blocks wait for the digests.

    Attributes:
        token: identifies the base model in the journals of the blocks.

    Raises:
        SourceError: the weights had to be hashed, and are not those of the lock.
        MachineError: the folder cannot be written.
    """

    def __init__(self, work: Path, source: SourceModel, log: Callable[[str], None]) -> None:
        self._path, self._source = work / _FILE_NAME, source
        small = {name: record.sha256 for name, record in source.small.items()}
        # Of a file that was written meanwhile the file system knows other times.
        self._state = digest_of([source.weights.identities, small])
        kept, digest = self._read(), source.record.digest if source.weights.known() else None
        if kept is None:
            self.token = digest or self._state
        elif kept.state == self._state:
            self.token = kept.token
        elif kept.digest is None or not any(work.glob("*/block-*.json")):
            self.token = digest or self._state
        else:
            if digest is None:
                log("the base model's files are not those of the last run: finished blocks wait for their digests")
                digest = source.record.digest
            self.token = kept.token if digest == kept.digest else digest
        self._written: str | None = None
        self._write(digest)

    def watch(self) -> None:
        """Keep the digest once it is known; do not wait for it.

        Raises:
            SourceError: the weights are not those of the lock, or were replaced meanwhile.
        """
        if self._written is None and self._source.weights.known():
            self.wait()

    def wait(self) -> None:
        """Wait until the weights are hashed: nothing may be made of the blocks before.

        Raises:
            SourceError: see `watch`.
        """
        self._write(self._source.record.digest)

    def _read(self) -> _Kept | None:
        """Return what an earlier run wrote; a damaged file says nothing."""
        try:
            return _Kept.model_validate_json(self._path.read_bytes())
        except (OSError, ValidationError):
            return None

    def _write(self, digest: str | None) -> None:
        """Write the file, if the digest is new; a small model, whose digest is known at once, needs none."""
        if self._written is not None or not long_to_hash(self._source.weights.size_bytes):
            return
        kept = _Kept(state=self._state, token=self.token, digest=digest)
        write_atomic(self._path, kept.model_dump_json().encode())
        self._written = digest
