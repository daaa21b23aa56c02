"""A variant's unfinished checkpoint: each block is written at its final offset in the files that will be published.

The plan fixes every weights file to the byte, so the files are made at their final size before the first block: no byte
is written twice or needs space twice. A block is finished once it has a journal, a small file that is written after the
block's bytes are durable.

work/<branch>/checkpoint/        the weights files; once complete, this folder is renamed to its final path
work/<branch>/block-00000.json   one journal per finished block

Copies of finished blocks may be kept elsewhere, see `BlockCopies`: then another machine goes on where this one ended.
"""

import hashlib
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from pydantic import ValidationError

from packager.errors import PackError
from packager.model.architecture import Architecture
from packager.model.checkpoint import Shard
from packager.model.safetensors_file import StoredTensor, copy_tensor, layout, read_tensor, write_at
from packager.receipt import AnyLinearRecord, LinearRecord
from packager.records import Record
from packager.system.files import disk_errors, fsync_folder, remove_leftovers, reserve, write_atomic

if TYPE_CHECKING:
    from torch import Tensor

_DTYPES = {"I32": "torch.int32", "F16": "torch.float16"}
_DIGEST_LENGTH = 64
# macOS has no fdatasync; fsync also waits for what only describes the file.
_sync = getattr(os, "fdatasync", os.fsync)


class Journal(Record):
    """The record of a finished block.

    Attributes:
        fingerprint: everything that determined the block's bytes, by name.
        sha256: of the block's bytes, its tensors sorted by name.
        linears: one record per linear.
    """

    fingerprint: dict[str, str]
    sha256: str
    linears: tuple[AnyLinearRecord, ...]


class BlockCopies(Protocol):
    """Keeps copies of finished blocks of one variant where other machines find them."""

    def save(self, block: int, journal: bytes, data: bytes) -> None:
        """Keep a finished block: its journal, and the bytes that the journal's sha256 is of."""

    def journal(self, block: int) -> bytes | None:
        """Return the journal of a block that is kept."""

    def data(self, sha256: str) -> bytes | None:
        """Return the bytes of a block that is kept, by their digest."""


class BlockStore:
    """The weights files of one variant, filled block by block; several threads may use it for different blocks.

    Args:
        folder: the variant's own, named by its branch; its content may be deleted at any time.
        architecture: of the base model.
        shards: the planned weights files.
        fingerprint: everything that determines the blocks' bytes, by name; work of another fingerprint is not resumed.
        log: called with one line when finished work is discarded, with the reason.
        copies: gets each finished block, and has those that other machines finished; None for none.

    Attributes:
        checkpoint: the folder that holds the weights files.
    """

    def __init__(
        self,
        folder: Path,
        shards: Sequence[Shard],
        architecture: Architecture,
        fingerprint: Mapping[str, str],
        log: Callable[[str], None],
        copies: BlockCopies | None = None,
    ) -> None:
        self._copies = copies
        self.checkpoint = folder / "checkpoint"
        self._folder = folder
        self._fingerprint = dict(fingerprint)
        self._log = log
        self._shards = {self.checkpoint / shard.file_name: shard for shard in shards}
        self._headers: dict[Path, bytes] = {}
        planned: dict[str, StoredTensor] = {}
        for path, shard in self._shards.items():
            self._headers[path], in_shard = layout(path, shard.tensors)
            planned |= in_shard
        self._block_of = {linear.name: linear.block for linear in architecture.linears}
        self._blocks: dict[int, dict[str, StoredTensor]] = {block: {} for block in range(architecture.num_blocks)}
        self._others: dict[str, StoredTensor] = {}
        for name in sorted(planned):
            linear = name.rpartition(".")[0]
            kept = self._blocks[self._block_of[linear]] if linear in self._block_of else self._others
            kept[name] = planned[name]
        self._journals: dict[int, Journal] = {}

    def open(self) -> None:
        """Resume the blocks that an earlier run finished, or create the files and reserve their space.

        Temporary files of a run that was killed are deleted: the folder belongs to whoever opens the store.

        Raises:
            MachineError: the disk is full, or the folder cannot be written; it is removed again.
        """
        with disk_errors(self._folder):
            remove_leftovers(self._folder)
            remove_leftovers(self.checkpoint)
        found = {block: self._read_journal(block) for block in self._blocks if self._journal_path(block).exists()}
        journals = {block: journal for block, journal in found.items() if journal is not None}
        reason = self._why_not_resumed(list(journals.values()))
        if journals and reason:
            blocks = "1 finished block is" if len(journals) == 1 else f"{len(journals)} finished blocks are"
            self._log(f"{self._folder.name}: {blocks} not resumed: {reason}")
        self._journals = {} if reason else journals
        if not self._journals:
            self._make_files()
        if self._copies is not None:
            self._take_copies(self._copies)

    def _take_copies(self, copies: BlockCopies) -> None:
        """Write the blocks that other machines finished with the same inputs; copies that are damaged are left out."""
        taken = 0
        for block, planned in self._blocks.items():
            raw = copies.journal(block) if block not in self._journals else None
            try:
                journal = Journal.model_validate_json(raw) if raw is not None else None
            except ValidationError:
                journal = None
            if journal is None or journal.fingerprint != self._fingerprint:
                continue
            data = copies.data(journal.sha256)
            if data is None or hashlib.sha256(data).hexdigest() != journal.sha256:
                self._log(f"{self._folder.name}: the copy of block {block} is damaged and not used")
                continue
            self._write_bytes(planned, [memoryview(data)])
            self._keep(block, journal)
            taken += 1
        if taken:
            self._log(f"{self._folder.name}: {taken} blocks that another machine finished are used")

    def records(self, block: int) -> tuple[LinearRecord, ...] | None:
        """Return the records of a finished block's linears, or None when the block is not finished."""
        journal = self._journals.get(block)
        return journal.linears if journal is not None else None

    def read(self, block: int) -> "dict[str, Tensor] | None":
        """Return a finished block's tensors on the CPU by their full names.

        None when the block is not finished, or when its bytes have changed since they were written: that is logged, and
        the block must be quantized again.
        """
        journal = self._journals.get(block)
        if journal is None:
            return None
        digest, tensors = hashlib.sha256(), {}
        for name, stored in self._blocks[block].items():
            tensors[name] = read_tensor(stored)
            digest.update(_bytes_of(tensors[name]))
        if digest.hexdigest() == journal.sha256:
            return tensors
        self._forget(block, "its bytes are not those that were written")
        return None

    def write(self, block: int, tensors: "Mapping[str, Tensor]", records: Sequence[LinearRecord]) -> None:
        """Write a finished block's CPU tensors; after the return, no crash can lose them.

        Raises:
            PackError: names, dtypes or shapes are not the planned ones.
            MachineError: the disk is full.
        """
        planned = self._blocks[block]
        self._check(block, tensors)
        if self._journals.pop(block, None) is not None:
            self._journal_path(block).unlink()
        parts = [_bytes_of(tensors[name]) for name in planned]
        digest = hashlib.sha256()
        for part in parts:
            digest.update(part)
        self._write_bytes(planned, parts)
        journal = Journal(fingerprint=self._fingerprint, sha256=digest.hexdigest(), linears=tuple(records))
        raw = self._keep(block, journal)
        if self._copies is not None:
            self._copies.save(block, raw, b"".join(parts))

    def _write_bytes(self, planned: Mapping[str, StoredTensor], parts: Sequence[memoryview]) -> None:
        """Write the bytes of tensors, given in one piece or a piece for each, and wait until they are durable.

        Raises:
            MachineError: the disk is full.
        """
        whole = memoryview(parts[0]) if len(parts) == 1 else None
        with disk_errors(self.checkpoint), ExitStack() as stack:
            paths = {stored.path for stored in planned.values()}
            streams = {path: stack.enter_context(path.open("rb+")) for path in paths}
            begin = 0
            for index, stored in enumerate(planned.values()):
                size = stored.info.size_bytes
                data = whole[begin : begin + size] if whole is not None else parts[index]
                write_at(streams[stored.path].fileno(), data, stored.offset)
                begin += size
            for stream in streams.values():
                _sync(stream.fileno())

    def _keep(self, block: int, journal: Journal) -> bytes:
        """Write the journal of a block whose bytes are durable, and return its bytes."""
        raw = journal.model_dump_json(indent=2).encode() + b"\n"
        write_atomic(self._journal_path(block), raw)
        self._journals[block] = journal
        return raw

    def write_from(self, tensors: Mapping[str, StoredTensor], linears: Sequence[LinearRecord]) -> None:
        """Write every unfinished block from a checkpoint whose quantized tensors have the same inputs.

        Args:
            tensors: the checkpoint's, by name; bits, shapes and dtypes are those of the plan.
            linears: the checkpoint's records, in model order.

        Raises:
            PackError: a tensor is missing or is not as planned.
            MachineError: the disk is full.
        """
        for block, planned in self._blocks.items():
            if block in self._journals:
                continue
            found = {name: read_tensor(tensors[name]) for name in planned if name in tensors}
            self.write(block, found, [record for record in linears if self._block_of[record.name] == block])

    def complete(self, tensors: Mapping[str, StoredTensor]) -> None:
        """Write the tensors that are not quantized: the weights files are then complete and durable.

        Args:
            tensors: the base model's, by name.

        Raises:
            PackError: a block is not finished, or a tensor is missing or not as planned.
            MachineError: the disk is full.
        """
        unfinished = sorted(self._blocks.keys() - self._journals.keys())
        if unfinished:
            raise PackError(
                f"{len(unfinished)} of {len(self._blocks)} blocks are not quantized",
                where=self._folder.name,
                why=f"the first is block {unfinished[0]}",
                hint="run build again",
            )
        for name, stored in self._others.items():
            if name not in tensors or tensors[name].info != stored.info:
                raise PackError(f"{name} is not in the base model as planned", where=self._folder.name)
        for path in self._shards:
            with disk_errors(path), path.open("rb+") as stream:
                for name, stored in self._others.items():
                    if stored.path == path:
                        copy_tensor(tensors[name], stream.fileno(), stored.offset)
                os.fsync(stream.fileno())

    def _journal_path(self, block: int) -> Path:
        return self._folder / f"block-{block:05d}.json"

    def _read_journal(self, block: int) -> Journal | None:
        try:
            return Journal.model_validate_json(self._journal_path(block).read_bytes())
        except ValidationError:
            self._forget(block, "its journal is damaged")
            return None

    def _forget(self, block: int, reason: str) -> None:
        self._log(f"{self._folder.name}: block {block} is quantized again: {reason}")
        self._journals.pop(block, None)
        self._journal_path(block).unlink(missing_ok=True)

    def _why_not_resumed(self, journals: Sequence[Journal]) -> str:
        """Return why the folder's blocks cannot be resumed, or "" when they can."""
        for journal in journals:
            if journal.fingerprint != self._fingerprint:
                return _differences(journal.fingerprint, self._fingerprint)
        for path, header in self._headers.items():
            if not path.is_file():
                return f"{path.name} is missing"
            with path.open("rb") as stream:
                if path.stat().st_size != self._shards[path].size_bytes or stream.read(len(header)) != header:
                    return f"{path.name} is not the planned file"
        return ""

    def _make_files(self) -> None:
        """Empty the folder and create the weights files at their final size, with their headers."""
        with disk_errors(self.checkpoint), ExitStack() as undo:
            if self._folder.exists():
                shutil.rmtree(self._folder)
            self.checkpoint.mkdir(parents=True)
            undo.callback(shutil.rmtree, self._folder, ignore_errors=True)
            for path, header in self._headers.items():
                with path.open("xb") as stream:
                    reserve(stream.fileno(), self._shards[path].size_bytes)
                    stream.write(header)
                    stream.flush()
                    os.fsync(stream.fileno())
            fsync_folder(self.checkpoint)
            undo.pop_all()

    def _check(self, block: int, tensors: "Mapping[str, Tensor]") -> None:
        planned = {
            name: (_DTYPES.get(stored.info.dtype), stored.info.shape) for name, stored in self._blocks[block].items()
        }
        given = {name: (str(tensor.dtype), tuple(tensor.shape)) for name, tensor in tensors.items()}
        wrong = [name for name in sorted(planned.keys() | given.keys()) if planned.get(name) != given.get(name)]
        if wrong:
            raise PackError(
                "a block does not have the planned tensors",
                where=f"{self._folder.name}, block {block}",
                why=f"{wrong[0]}: planned {planned.get(wrong[0])}, got {given.get(wrong[0])}",
                hint="this is a defect of packager: please report it with the recipe",
            )


def _bytes_of(tensor: "Tensor") -> memoryview:
    """Return the bytes of a CPU tensor, without a copy where it is contiguous."""
    import torch

    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _differences(old: Mapping[str, str], new: Mapping[str, str]) -> str:
    """Return in which parts two fingerprints differ: both values of a part, unless they are digests.

    The digest of the recipe has the engine's version in it: where the version is another one, that digest says nothing
    of the recipe, and is left out.
    """
    parts = [*new, *(part for part in old if part not in new)]
    changed = [part for part in parts if old.get(part) != new.get(part)]
    found = []
    for part in changed:
        before, after = old.get(part, "nothing"), new.get(part, "nothing")
        name = "the engine's version" if part == "engine" else part
        if part == "recipe" and "engine" in changed:
            continue
        if max(len(before), len(after)) >= _DIGEST_LENGTH:
            found.append(f"{name} differs")
        else:
            found.append(f"{name} was {before} and is {after}")
    return ", ".join(found)
