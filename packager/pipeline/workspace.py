"""The paths in the output folder, and the comparison of its files with the receipts.

dist/builds/<namespace>/<name>/<branch>/         checkpoint folders, as they will be published
dist/receipts/<namespace>/<name>/<branch>.json   what was done and measured
dist/receipts/<namespace>/<name>/unfinished/     receipts of files that a run is putting in place
dist/rows/<namespace>/<name>/rows.json           the token ids of its texts; may be deleted at any time
dist/losses/<namespace>/<name>/<digest>.json     of variants that were quantized for their losses; may be deleted, too
dist/tasks/<namespace>/<name>/base.json          what the fp16 model scores in its tasks; may be deleted at any time
dist/work/<namespace>/<name>/<branch>/           a checkpoint under construction; may be deleted at any time
dist/work/<namespace>/<name>/.running.json       what a running build does now; no branch has such a name
dist/work/<namespace>/<name>/.base-model.json    of which base model a large model's blocks are, see `base_model_origin`
dist/work/<namespace>--<name>.lock               the lock of a running build
dist/hub/models/<namespace>/<name>               the local publishing target
dist/previews/<namespace>/<name>/<branch>.html   cards before a build; no other command reads them
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from filelock import FileLock, Timeout
from pydantic import ValidationError

from packager.errors import AuditError, MachineError, StateError
from packager.model.architecture import Architecture
from packager.prove.audit import audit
from packager.receipt import SAFETENSORS, FileRecord, Receipt
from packager.system.files import (
    LOCK_WAIT_S,
    disk_errors,
    has_record,
    list_files,
    remove_leftovers,
    remove_leftovers_below,
    write_atomic,
)
from packager.system.parallel import in_parallel


@dataclass(frozen=True, kw_only=True)
class Workspace:
    """The output folder of one repository."""

    dist: Path
    repository: str

    @property
    def work(self) -> Path:
        """Checkpoints under construction; a rename moves them to the builds, on the same file system."""
        return self.dist / "work" / self.repository

    @property
    def rows(self) -> Path:
        """The file that keeps the token ids of the texts for the next run; unlike `work`, it stays after a build."""
        return self.dist / "rows" / self.repository / "rows.json"

    def losses_path(self, digest: str) -> Path:
        """Return the file that keeps the losses of a variant that is quantized for them alone."""
        return self.dist / "losses" / self.repository / f"{digest}.json"

    @property
    def base_scores(self) -> Path:
        """The file that keeps what the fp16 model scores in the recipe's tasks."""
        return self.dist / "tasks" / self.repository / "base.json"

    @property
    def hub(self) -> Path:
        """Root of the local publishing target."""
        return self.dist / "hub"

    def folder(self, branch: str) -> Path:
        """Return a variant's checkpoint folder."""
        return self.dist / "builds" / self.repository / branch

    def receipt_path(self, branch: str) -> Path:
        """Return where a variant's receipt is kept."""
        return self._receipts / f"{branch}.json"

    def unfinished_path(self, branch: str) -> Path:
        """Return where a variant's next receipt is kept while its files are put in place."""
        return self._receipts / "unfinished" / f"{branch}.json"

    @property
    def running_path(self) -> Path:
        """Return where a running build says what it does."""
        return self.work / ".running.json"

    @property
    def _lock_path(self) -> Path:
        return self.dist / "work" / f"{self.repository.replace('/', '--')}.lock"

    def is_locked(self) -> bool:
        """Return whether a build of this repository is in progress; it waits for the lock if it begins just now."""
        if not self._lock_path.exists():
            return False
        try:
            with FileLock(self._lock_path, timeout=0):
                return False
        except Timeout:
            return True
        except OSError:  # of a folder that only its owner may write
            return False

    def blocks_done(self, branch: str) -> int:
        """Return how many blocks of an unfinished variant are finished."""
        return sum(1 for _ in (self.work / branch).glob("block-*.json"))

    @property
    def _receipts(self) -> Path:
        return self.dist / "receipts" / self.repository

    def read_receipt(self, branch: str) -> Receipt | None:
        """Return a variant's receipt, or None when it was never built.

        A run may be killed after it has put all files in place and before it writes the receipt: then this is the
        receipt that it announced.

        Raises:
            StateError: the file was damaged, or another version wrote it.
        """
        announced = self.announced(branch)
        if announced is not None and not differences(self.folder(branch), announced.provenance.files):
            return announced
        return self._read(self.receipt_path(branch))

    def receipts_with(
        self, variant_digest: str, key: Callable[[], str], log: Callable[[str], None]
    ) -> Iterator[tuple[Path, Receipt]]:
        """Yield the folder and the receipt of every finished variant, of any repository in `dist`, that was made alike.

        That is, with the same parameters of the same base model: `key` returns the key of the stage "quantize".
        Damaged receipts, and folders whose weights files are not exactly those of the receipt, are left out; `log`
        receives the reason of each.
        """
        root = self.dist / "receipts"
        for path in sorted(root.glob("*/*/*.json")):
            other = replace(self, repository=path.parent.relative_to(root).as_posix())
            try:
                receipt = other.read_receipt(path.stem)
                if receipt is None or receipt.provenance.variant_digest != variant_digest:
                    continue
                if receipt.stages.get("quantize") != key():
                    continue
                folder = other.folder(path.stem)
                stated = {folder / name: record for name, record in receipt.provenance.weights_files.items()}
                found = set(folder.glob(f"*{SAFETENSORS}"))
                same = found == stated.keys() and all(in_parallel(lambda file: has_record(*file), stated.items()))
            except (StateError, OSError) as error:
                log(f"{path} is not used: {error}")
                continue
            if same:
                yield folder, receipt
            else:
                log(f"{folder} is not used: its weights files are not those of its receipt")

    def announced(self, branch: str) -> Receipt | None:
        """Return the receipt that an unfinished run announced, if there is one."""
        return self._read(self.unfinished_path(branch))

    def _read(self, path: Path) -> Receipt | None:
        try:
            return Receipt.model_validate_json(path.read_bytes())
        except FileNotFoundError:
            return None
        except ValidationError as error:
            raise StateError(
                "a receipt cannot be read",
                where=str(path),
                why=_first_problem(error),
                hint=f"it is damaged or another version's: delete it and {self.folder(path.stem)} to build that again",
            ) from error

    def announce(self, receipt: Receipt) -> None:
        """Write the receipt of files that will be put in place: after a kill, the next run recognises the files."""
        _write(self.unfinished_path(receipt.provenance.branch), receipt)

    def write_receipt(self, receipt: Receipt) -> None:
        """Write a variant's receipt, and delete the announced one."""
        branch = receipt.provenance.branch
        _write(self.receipt_path(branch), receipt)
        self.unfinished_path(branch).unlink(missing_ok=True)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Lock out other builds of the same repository, and delete the unfinished files of a killed one.

        Raises:
            StateError: another build is in progress.
            MachineError: the output folder cannot be written.
        """
        path = self._lock_path
        lock = FileLock(path, timeout=LOCK_WAIT_S)
        hint = "name a folder that can be written with --dist"
        try:
            with disk_errors(path, hint=hint):
                path.parent.mkdir(parents=True, exist_ok=True)
                lock.acquire()
        except Timeout as error:
            raise StateError(
                f"another build of {self.repository} is in progress", where=str(path), hint="wait for it, or stop it"
            ) from error
        except OSError as error:  # /proc answers that there is no such file
            raise MachineError(
                "the output folder cannot be made", where=str(self.dist), why=str(error), hint=hint
            ) from error
        try:
            with disk_errors(self.dist):
                self._remove_leftovers()
            yield
        finally:
            lock.release()

    def _remove_leftovers(self) -> None:
        self.running_path.unlink(missing_ok=True)
        builds, kept = self.folder("main").parent, (self.rows, self.losses_path(""), self.base_scores)
        for parent in (builds, self._receipts, self.work, *(path.parent for path in kept)):
            remove_leftovers(parent)
            for folder in parent.glob("*/"):  # of a branch; it may be a link to another disk
                remove_leftovers_below(folder)


def _first_problem(error: ValidationError) -> str:
    """Return the first thing that is wrong with a receipt, with its location in the JSON."""
    first = error.errors(include_url=False, include_input=False)[0]
    return f"{'.'.join(map(str, first['loc'])) or 'the receipt'}: {first['msg'].removeprefix('Value error, ')}"


def _write(path: Path, receipt: Receipt) -> None:
    write_atomic(path, receipt.model_dump_json(indent=2).encode() + b"\n")


def check_folder(folder: Path, receipt: Receipt, *, ignore: Collection[str]) -> None:
    """Compare a checkpoint folder with its receipt, file by file.

    Args:
        folder: the variant's folder.
        receipt: what was written there.
        ignore: names not compared.

    Raises:
        StateError: a file is missing, was changed, or is not in the receipt; lists each.
    """
    if found := differences(folder, receipt.provenance.files, ignore=ignore):
        raise StateError(
            "a built folder differs from its receipt",
            where=str(folder),
            why="; ".join(found),
            hint="move your changes elsewhere, then delete the folder and run build again",
        )


def differences(folder: Path, files: Mapping[str, FileRecord], *, ignore: Collection[str] = ()) -> list[str]:
    """Return how a folder differs from its files' records, one sentence per file."""
    expected = {name: record for name, record in files.items() if name not in ignore}
    present = [name for name in list_files(folder) if name not in ignore] if folder.is_dir() else []
    found = [f"{name} is missing" for name in expected if name not in present]
    found += [f"{name} is not in the receipt" for name in present if name not in expected]
    there = [name for name in expected if name in present]
    same = in_parallel(lambda name: has_record(folder / name, expected[name]), there)
    return found + [f"{name} was changed" for name, kept in zip(there, same, strict=True) if not kept]


def audit_or_raise(folders: Sequence[Path], architecture: Architecture, *, complete: bool) -> None:
    """Audit built folders of a base model's architecture, in parallel.

    Raises:
        AuditError: of the first folder with errors; the message has at most ten of them.
    """
    reports = in_parallel(lambda folder: audit(folder, complete=complete, architecture=architecture), folders)
    for folder, report in zip(folders, reports, strict=True):
        if not report.passed:
            raise AuditError(
                f"{len(report.errors)} finding{'' if len(report.errors) == 1 else 's'} in the checkpoint folder",
                where=str(folder),
                why="; ".join(f"{finding.where}: {finding.message}" for finding in report.errors[:10]),
                hint=f"packager audit {folder} shows them all",
            )
