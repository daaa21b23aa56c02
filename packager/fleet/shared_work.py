"""What was made of one repository, in the store: objects by digest, receipts that name them, finished blocks.

NAMESPACE/NAME/objects/SHA256          a file of a branch; it never changes
NAMESPACE/NAME/receipts/BRANCH.json    written after the objects that it names
NAMESPACE/NAME/blocks/BRANCH/SHA256    the bytes of a finished block of an unfinished branch
NAMESPACE/NAME/blocks/BRANCH/BLOCK     its journal, written after its bytes

A machine that still works although it was given up can only add objects and blocks, or a receipt whose objects are
there.
"""

import hashlib
import re
import shutil
from collections.abc import Iterable
from pathlib import Path

from pydantic import ValidationError

from packager.errors import StateError
from packager.fleet.store import Store
from packager.pipeline.workspace import Workspace
from packager.publish.targets import file_name_problem
from packager.receipt import FileRecord, Receipt
from packager.system.files import TEMPORARY_PREFIX, has_record, replace_folder
from packager.system.parallel import in_parallel
from packager.system.text import printable

_SHA256 = re.compile(r"[0-9a-f]{64}")


class SharedWork:
    """The part of a store that belongs to one repository.

    Args:
        store: the store.
        repository: its id.
    """

    def __init__(self, store: Store, repository: str) -> None:
        self._store, self._repository = store, repository

    def push(self, workspace: Workspace, branches: Iterable[str]) -> None:
        """Copy finished branches to the store; what it has is not copied again."""
        for branch in branches:
            receipt = workspace.read_receipt(branch)
            if receipt is None:
                continue
            folder = workspace.folder(branch)
            in_parallel(lambda entry, at=folder: self._put(at / entry[0], entry[1]), receipt.provenance.files.items())  # type: ignore[misc]
            self._store.write(self._name("receipts", f"{branch}.json"), receipt.model_dump_json(indent=2).encode())
            self._store.delete(self._name("blocks", branch))  # they are part of the branch

    def pull(self, workspace: Workspace, branches: Iterable[str]) -> None:
        """Bring finished branches to an output folder; files that it has are not copied again.

        Raises:
            StateError: the store is damaged.
        """
        for branch in branches:
            receipt, folder = self.receipt(branch), workspace.folder(branch)
            if receipt is None or (folder.exists() and receipt == workspace.read_receipt(branch)):
                continue
            temporary = folder.with_name(f"{TEMPORARY_PREFIX}{branch}")
            shutil.rmtree(temporary, ignore_errors=True)
            for name, record in receipt.provenance.files.items():
                self._get(folder / name, temporary / name, name, record)
            workspace.announce(receipt)
            replace_folder(temporary, folder)
            workspace.write_receipt(receipt)

    def receipt(self, branch: str) -> Receipt | None:
        """Return the receipt of a branch, None if it is not in the store."""
        name, hint = self._name("receipts", f"{branch}.json"), "delete it there: the branch is built again"
        data = self._store.read(name)
        try:
            receipt = None if data is None else Receipt.model_validate_json(data)
        except ValidationError as error:
            raise StateError("a receipt in the store cannot be read", where=name, hint=hint) from error
        if receipt is not None:
            of = (receipt.provenance.repository, receipt.provenance.branch)
            if of != (self._repository, branch):
                why = f"it is of {' '.join(map(printable, of))}"
                raise StateError("a receipt in the store is another branch's", where=name, why=why, hint=hint)
        return receipt

    def drop_blocks(self) -> None:
        """Delete all blocks: nothing is unfinished. Those that were made for losses alone are of no branch."""
        self._store.delete(self._name("blocks"))

    def drop_builds(self) -> None:
        """Delete the objects and receipts of a repository that is published."""
        for part in ("receipts", "objects", "blocks"):
            self._store.delete(self._name(part))

    def blocks(self, branch: str) -> "SharedBlocks":
        """Return the finished blocks of an unfinished branch."""
        return SharedBlocks(self._store, self._name("blocks", branch))

    def _name(self, *parts: str) -> str:
        return "/".join((self._repository, *parts))

    def _put(self, path: Path, record: FileRecord) -> None:
        name = self._object(record.sha256)
        if self._store.size_bytes(name) != record.size_bytes:
            self._store.put(path, name)

    def _get(self, have: Path, path: Path, name: str, record: FileRecord) -> None:
        if problem := file_name_problem(name):
            raise StateError("a receipt in the store names a file that cannot be one", where=name, why=problem)
        path.parent.mkdir(parents=True, exist_ok=True)
        if have.is_file() and has_record(have, record):
            shutil.copyfile(have, path)
            return
        self._store.get(self._object(record.sha256), path)
        if not has_record(path, record):
            raise StateError(
                "a file in the store is not what its receipt says",
                where=self._object(record.sha256),
                hint="the store is damaged: delete the receipts that name the file, and the branches are built again",
            )

    def _object(self, sha256: str) -> str:
        if not _SHA256.fullmatch(sha256):
            raise StateError("a receipt in the store has a digest that is none", where=repr(sha256))
        return self._name("objects", sha256)


class SharedBlocks:
    """The finished blocks of an unfinished branch: what `BlockStore` keeps copies in and takes copies from."""

    def __init__(self, store: Store, folder: str) -> None:
        self._store, self._folder = store, folder

    def save(self, block: int, journal: bytes, data: bytes) -> None:
        """Keep a finished block: first its bytes, then its journal."""
        name = f"{self._folder}/{hashlib.sha256(data).hexdigest()}"
        if self._store.size_bytes(name) != len(data):
            self._store.write(name, data)
        self._store.write(f"{self._folder}/{block:05d}.json", journal)

    def journal(self, block: int) -> bytes | None:
        """Return the journal of a block, None if it is not finished."""
        return self._store.read(f"{self._folder}/{block:05d}.json")

    def data(self, sha256: str) -> bytes | None:
        """Return the bytes of a block by their digest."""
        return self._store.read(f"{self._folder}/{sha256}", large=True) if _SHA256.fullmatch(sha256) else None
