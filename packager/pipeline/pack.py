"""Stage 6, pack: finished blocks become a checkpoint folder, exactly as FORMAT says, but for what the card brings.

The blocks are in the weights files already; what is not quantized is copied from the base model byte by byte, so that
it keeps its dtype and its bits.
"""

import json
from dataclasses import dataclass

from packager.inputs.base_model import SourceModel
from packager.model.checkpoint import PORTABLE_PARAMETERS, shard_index
from packager.model.rope import in_both_spellings
from packager.pipeline.plan import VariantPlan
from packager.quantize.block_store import BlockStore
from packager.receipt import CONFIG, GENERATION_CONFIG, INDEX_SUFFIX, QUANTIZE_CONFIG, TOKENIZER_FILES, FileRecord
from packager.recipe.file import RecipeFile
from packager.system.files import copy_atomic, disk_errors, file_records, write_atomic
from packager.variant import Variant

_CONFIGS = (CONFIG, QUANTIZE_CONFIG, GENERATION_CONFIG)
_WEIGHTS = (".safetensors", INDEX_SUFFIX)


@dataclass(frozen=True, kw_only=True)
class PackJob:
    """What a checkpoint folder is made of.

    Attributes:
        source: the base model.
        recipe_file: for the repository's id and the weights' name.
        variant_plan: the parameters and the shards.
        store: the variant's finished blocks.
    """

    source: SourceModel
    recipe_file: RecipeFile
    variant_plan: VariantPlan
    store: BlockStore


def is_packed(name: str) -> bool:
    """Return whether a file of a branch comes from this stage; the others come with the card."""
    return name in (*_CONFIGS, *TOKENIZER_FILES) or name.endswith(_WEIGHTS)


def pack_checkpoint(job: PackJob) -> dict[str, FileRecord]:
    """Complete the folder of a variant's store, all files fsynced; the caller renames it into its place.

    Returns:
        Size and sha256 of every file.

    Raises:
        PackError: a block is missing.
        MachineError: the disk is full; the finished blocks stay.
    """
    folder = job.store.checkpoint
    job.store.complete(job.source.tensors)
    weights = {shard.file_name for shard in job.variant_plan.shards}
    with disk_errors(folder):
        for path in folder.iterdir():
            if path.name not in weights:  # left by a run that was killed here
                path.unlink()
    for name, content in _configs(job).items():
        write_atomic(folder / name, content)
    for name in TOKENIZER_FILES:
        if (job.source.folder / name).exists():
            copy_atomic(job.source.folder / name, folder / name)
    return {path.name: record for path, record in file_records(sorted(folder.iterdir())).items()}


def _configs(job: PackJob) -> dict[str, bytes]:
    variant = job.variant_plan.variant
    portable = {key: variant.parameters()[key] for key in PORTABLE_PARAMETERS}
    recipe = job.recipe_file.recipe
    files = {
        CONFIG: {**in_both_spellings(job.source.config), "quantization_config": quantization_config(variant)},
        QUANTIZE_CONFIG: {
            **portable,
            "model_name_or_path": recipe.repository.id,
            "model_file_base_name": recipe.checkpoint.weights_name,
        },
    }
    if not (job.source.folder / GENERATION_CONFIG).exists():
        keys = ("bos_token_id", "eos_token_id", "pad_token_id")
        files[GENERATION_CONFIG] = {
            "_from_model_config": True,
            **{key: job.source.config[key] for key in keys if job.source.config.get(key) is not None},
        }
    contents = {name: (json.dumps(content, indent=2) + "\n").encode() for name, content in files.items()}
    if len(job.variant_plan.shards) > 1:
        contents[f"{recipe.checkpoint.weights_name}{INDEX_SUFFIX}"] = shard_index(job.variant_plan.shards)
    return contents


def quantization_config(variant: Variant) -> dict[str, object]:
    """Return config.json's quantization_config: the portable keys and what newer runtimes read."""
    parameters = variant.parameters()
    return {
        "quant_method": "gptq",
        **{key: parameters[key] for key in PORTABLE_PARAMETERS},
        "static_groups": variant.static_groups,
        "checkpoint_format": "gptq",
        "lm_head": False,
    }
