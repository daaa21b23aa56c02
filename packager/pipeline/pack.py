"""Stage 6, pack: make a checkpoint folder (docs/reference/format.md) of finished blocks, without the card's files.

The blocks are in the weights files already. Tensors that are not quantized are copied from the base model byte by byte,
so that they keep their dtype and their bits.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from packager.inputs.base_model import SourceModel
from packager.model.checkpoint import Shard, shard_index
from packager.pipeline.branch_files import BranchNames, small_files
from packager.quantize.block_store import BlockStore
from packager.receipt import CONFIG, GENERATION_CONFIG, INDEX_SUFFIX, QUANTIZE_CONFIG, TOKENIZER_FILES, FileRecord
from packager.system.files import disk_errors, file_records, write_atomic
from packager.variant import Variant

_CONFIGS = (CONFIG, QUANTIZE_CONFIG, GENERATION_CONFIG)
_WEIGHTS = (".safetensors", INDEX_SUFFIX)


@dataclass(frozen=True, kw_only=True)
class PackJob:
    """The parts of a checkpoint folder.

    Attributes:
        source: the base model.
        tokenizer_files: in the place of the base model's, see `branch_tokenizer`.
        variant: the parameters.
        shards: the weights files.
        repository: id that quantize_config.json names.
        weights_name: file name of the weights, without its ending.
        store: the variant's finished blocks.
    """

    source: SourceModel
    tokenizer_files: Mapping[str, bytes]
    variant: Variant
    shards: Sequence[Shard]
    repository: str
    weights_name: str
    store: BlockStore


def is_packed(name: str) -> bool:
    """Return whether this stage makes a file of a branch; the card stage makes the others."""
    return name in (*_CONFIGS, *TOKENIZER_FILES) or name.endswith(_WEIGHTS)


def pack_checkpoint(job: PackJob) -> dict[str, FileRecord]:
    """Complete the folder of a variant's store, all files fsynced; the caller renames it into its place.

    Returns:
        Size and sha256 of every file.

    Raises:
        PackError: a block is missing.
        SourceError: a file of the base model is no longer the one that was checked.
        MachineError: the disk is full; the finished blocks stay.
    """
    folder = job.store.checkpoint
    job.store.complete(job.source.tensors)
    weights = {shard.file_name for shard in job.shards}
    with disk_errors(folder):
        for path in folder.iterdir():
            if path.name not in weights:  # left by a run that was killed here
                path.unlink()
    for name, content in _small_files(job).items():
        write_atomic(folder / name, content)
    job.source.check_unchanged()
    return {path.name: record for path, record in file_records(sorted(folder.iterdir())).items()}


def _small_files(job: PackJob) -> dict[str, bytes]:
    copied = {name: job.source.copied(name) for name in job.source.files.copied} | dict(job.tokenizer_files)
    names = BranchNames(repository=job.repository, weights_name=job.weights_name)
    files = small_files(job.source.config, copied, job.source.architecture, job.variant, names)
    if len(job.shards) > 1:
        files[f"{job.weights_name}{INDEX_SUFFIX}"] = shard_index(job.shards)
    return files
