"""Stage 6, pack: finished blocks become a checkpoint folder, exactly as FORMAT says, but for what the card brings.

Weights are copied from the work files and from the base model byte by byte, so that what is not quantized keeps its
dtype and its bits, and memory stays at one chunk.
"""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from packager.architecture import shard_index
from packager.errors import PackError
from packager.files import copy_atomic, disk_errors, file_record, write_atomic
from packager.plan import VariantPlan
from packager.receipt import FileRecord
from packager.recipe.file import RecipeFile
from packager.safetensors_file import StoredTensor, stored_tensors, write
from packager.source import TOKENIZER_FILES, SourceModel
from packager.variant import Variant

# What AutoGPTQ <= 0.3.2 accepts; it raises TypeError on any other key.
PORTABLE_KEYS = ("bits", "group_size", "damp_percent", "desc_act", "sym", "true_sequential")
_CONFIGS = ("config.json", "quantize_config.json", "generation_config.json")
_WEIGHTS = (".safetensors", ".safetensors.index.json")


@dataclass(frozen=True, kw_only=True)
class PackJob:
    """What a checkpoint folder is made of.

    Attributes:
        source: the base model.
        recipe_file: for the repository's id and the weights' name.
        variant_plan: the parameters and the shards with their predicted sizes.
        work: the variant's finished blocks, `block-00000.safetensors` and so on.
        folder: where to write; the caller renames it into its place.
    """

    source: SourceModel
    recipe_file: RecipeFile
    variant_plan: VariantPlan
    work: Path
    folder: Path


def is_packed(name: str) -> bool:
    """Return whether a file of a branch comes from this stage; the others come with the card."""
    return name in (*_CONFIGS, *TOKENIZER_FILES) or name.endswith(_WEIGHTS)


def pack_checkpoint(job: PackJob) -> dict[str, FileRecord]:
    """Write a variant's folder, all files fsynced; one that is there under this temporary name goes.

    Returns:
        Size and sha256 of every file.

    Raises:
        PackError: a block is missing, or a file's size is not the planned one.
        MachineError: the disk is full; the folder is removed.
    """
    with disk_errors(job.folder):
        shutil.rmtree(job.folder, ignore_errors=True)
        job.folder.mkdir(parents=True)
    try:
        records = _write_weights(job)
        for name, content in _configs(job).items():
            write_atomic(job.folder / name, content)
        for name in TOKENIZER_FILES:
            if (job.source.folder / name).exists():
                copy_atomic(job.source.folder / name, job.folder / name)
        for path in sorted(job.folder.iterdir()):
            if path.name not in records:
                records[path.name] = file_record(path)
    except BaseException:
        shutil.rmtree(job.folder, ignore_errors=True)
        raise
    return dict(sorted(records.items()))


def _write_weights(job: PackJob) -> dict[str, FileRecord]:
    available = dict(job.source.tensors)
    for path in sorted(job.work.glob("block-*.safetensors")):
        available |= stored_tensors(path)
    records = {}
    for shard in job.variant_plan.shards:
        wanted = [_find(available, tensor.name, job) for tensor in shard.tensors]
        records[shard.file_name] = write(job.folder / shard.file_name, wanted)
        if records[shard.file_name].size_bytes != shard.size_bytes:
            raise PackError(
                "a weights file does not have its planned size",
                where=f"{job.variant_plan.variant.branch}/{shard.file_name}",
                why=f"planned {shard.size_bytes} bytes, wrote {records[shard.file_name].size_bytes}",
                hint="this is a defect of packager: please report it with the recipe",
            )
    if len(job.variant_plan.shards) > 1:
        name = f"{job.recipe_file.recipe.checkpoint.weights_name}.safetensors.index.json"
        write_atomic(job.folder / name, shard_index(job.variant_plan.shards))
    return records


def _find(available: Mapping[str, StoredTensor], name: str, job: PackJob) -> StoredTensor:
    if name not in available:
        raise PackError(
            f"{name} was not quantized",
            where=job.variant_plan.variant.branch,
            hint="a block is missing from the work folder: run build again",
        )
    return available[name]


def _configs(job: PackJob) -> dict[str, bytes]:
    variant = job.variant_plan.variant
    portable = {key: variant.parameters()[key] for key in PORTABLE_KEYS}
    recipe = job.recipe_file.recipe
    files = {
        "config.json": {**job.source.config, "quantization_config": quantization_config(variant)},
        "quantize_config.json": {
            **portable,
            "model_name_or_path": recipe.repository.id,
            "model_file_base_name": recipe.checkpoint.weights_name,
        },
    }
    if not (job.source.folder / "generation_config.json").exists():
        keys = ("bos_token_id", "eos_token_id", "pad_token_id")
        files["generation_config.json"] = {
            "_from_model_config": True,
            **{key: job.source.config[key] for key in keys if job.source.config.get(key) is not None},
        }
    return {name: (json.dumps(content, indent=2) + "\n").encode() for name, content in files.items()}


def quantization_config(variant: Variant) -> dict[str, object]:
    """Return config.json's quantization_config: the portable keys and what newer runtimes read."""
    parameters = variant.parameters()
    return {
        "quant_method": "gptq",
        **{key: parameters[key] for key in PORTABLE_KEYS},
        "static_groups": variant.static_groups,
        "checkpoint_format": "gptq",
        "lm_head": False,
    }
