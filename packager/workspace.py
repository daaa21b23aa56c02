"""Where things lie in the output folder, and whether what lies there is still what the receipts say.

dist/builds/<namespace>/<name>/<branch>/         checkpoint folders, as they will be published
dist/receipts/<namespace>/<name>/<branch>.json   what was done and measured
dist/work/<namespace>/<name>/                    finished blocks of a build under way; may be deleted at any time
dist/hub/models/<namespace>/<name>               the local publishing target
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout
from pydantic import ValidationError

from packager.errors import StateError
from packager.files import file_record, list_files, write_atomic
from packager.receipt import Receipt

CARD_FILES = ("README.md", "provenance.json")


@dataclass(frozen=True, kw_only=True)
class Workspace:
    """The output folder of one repository."""

    dist: Path
    repository: str

    @property
    def work(self) -> Path:
        """Finished blocks of a build under way."""
        return self.dist / "work" / self.repository

    @property
    def hub(self) -> Path:
        """Root of the local publishing target."""
        return self.dist / "hub"

    def folder(self, branch: str) -> Path:
        """Return a variant's checkpoint folder."""
        return self.dist / "builds" / self.repository / branch

    def receipt_path(self, branch: str) -> Path:
        """Return where a variant's receipt is kept."""
        return self.dist / "receipts" / self.repository / f"{branch}.json"

    def read_receipt(self, branch: str) -> Receipt | None:
        """Return a variant's receipt, or None when it was never built or was built by another version.

        Raises:
            StateError: the file was damaged.
        """
        path = self.receipt_path(branch)
        try:
            return Receipt.model_validate_json(path.read_bytes())
        except FileNotFoundError:
            return None
        except ValidationError as error:
            raise StateError(
                "a receipt cannot be read",
                where=str(path),
                why=str(error).splitlines()[0],
                hint="somebody edited it, or another version wrote it: delete it to build the variant again",
            ) from error

    def write_receipt(self, receipt: Receipt) -> None:
        """Keep a variant's receipt."""
        write_atomic(self.receipt_path(receipt.provenance.branch), receipt.model_dump_json(indent=2).encode() + b"\n")

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep a second build of the same repository out.

        Raises:
            StateError: one is under way.
        """
        path = self.dist / "work" / f"{self.repository.replace('/', '--')}.lock"
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(path, timeout=0):
                yield
        except Timeout as error:
            raise StateError(
                f"another build of {self.repository} is under way", where=str(path), hint="wait for it, or stop it"
            ) from error


def check_folder(folder: Path, receipt: Receipt, *, ignore: tuple[str, ...] = ()) -> None:
    """Compare a checkpoint folder with its receipt, file by file.

    Args:
        folder: the variant's folder.
        receipt: what was written there.
        ignore: names not compared.

    Raises:
        StateError: a file is missing, was changed, or is not ours; lists each.
    """
    expected = {name: record for name, record in receipt.provenance.files.items() if name not in ignore}
    present = [name for name in list_files(folder) if name not in ignore] if folder.is_dir() else []
    differences = [f"{name} is missing" for name in expected if name not in present]
    differences += [f"{name} is not ours" for name in present if name not in expected]
    differences += [
        f"{name} was changed" for name in present if name in expected and file_record(folder / name) != expected[name]
    ]
    if differences:
        raise StateError(
            "a built folder is not what its receipt says",
            where=str(folder),
            why="; ".join(differences),
            hint="move your changes elsewhere, then delete the folder and run build again",
        )
