"""Stage 6, pack: make a checkpoint folder (docs/reference/format.md) of finished blocks, without the card's files.

The blocks are in the weights files already. Tensors that are not quantized are copied from the base model byte by byte,
so that they keep their dtype and their bits.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass

from packager.inputs.base_model import SourceModel
from packager.model.architecture import Architecture
from packager.model.checkpoint import PORTABLE_PARAMETERS, Shard, block_keys, shard_index
from packager.model.rope import in_both_spellings
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
        variant: the parameters.
        shards: the weights files.
        repository: id that quantize_config.json names.
        weights_name: file name of the weights, without its ending.
        store: the variant's finished blocks.
    """

    source: SourceModel
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
    for name, content in _configs(job).items():
        write_atomic(folder / name, content)
    for name in job.source.files.copied:
        write_atomic(folder / name, job.source.copied(name))
    job.source.check_unchanged()
    return {path.name: record for path, record in file_records(sorted(folder.iterdir())).items()}


def _configs(job: PackJob) -> dict[str, bytes]:
    variant = job.variant
    files = {
        CONFIG: {
            **in_both_spellings(job.source.config),
            "quantization_config": quantization_config(variant, job.source.architecture),
        },
        QUANTIZE_CONFIG: portable_config(variant, job.source.architecture, job.repository, job.weights_name),
    }
    if GENERATION_CONFIG not in job.source.files.copied:
        keys = ("bos_token_id", "eos_token_id", "pad_token_id")
        files[GENERATION_CONFIG] = {
            "_from_model_config": True,
            **{key: job.source.config[key] for key in keys if job.source.config.get(key) is not None},
        }
    contents = {name: (json.dumps(content, indent=2) + "\n").encode() for name, content in files.items()}
    if len(job.shards) > 1:
        contents[f"{job.weights_name}{INDEX_SUFFIX}"] = shard_index(job.shards)
    return contents


def portable_config(
    variant: Variant, architecture: Architecture, repository: str, weights_name: str
) -> dict[str, object]:
    """Return quantize_config.json: the keys that every AutoGPTQ accepts, and `dynamic` where linears are left.

    GPTQModel reads this file and not config.json if both exist. AutoGPTQ opens no model with linears that are left.
    """
    keys = block_keys(architecture)
    return {
        **{key: variant.parameters()[key] for key in PORTABLE_PARAMETERS},
        "model_name_or_path": repository,
        "model_file_base_name": weights_name,
        **({"dynamic": keys["dynamic"]} if "dynamic" in keys else {}),
    }


def quantization_config(variant: Variant, architecture: Architecture) -> dict[str, object]:
    """Return config.json's quantization_config: the portable keys and what newer runtimes read."""
    parameters = variant.parameters()
    return {
        "quant_method": "gptq",
        **{key: parameters[key] for key in PORTABLE_PARAMETERS},
        "static_groups": variant.static_groups,
        "checkpoint_format": "gptq",
        "lm_head": False,
        **block_keys(architecture),
    }
