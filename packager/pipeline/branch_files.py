"""The small files of a branch: made of the base model's, and audited before anything expensive is done.

The audit of a finished folder checks the same files by the same functions. A base model whose files cannot be published
would fail there, after every block was quantized.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from packager.errors import SourceError
from packager.inputs.base_model import fp16_config
from packager.inputs.chat_template import templates_beside
from packager.inputs.source_files import copied_names, read_small
from packager.model.architecture import Architecture
from packager.model.branch_config import branch_file, json_bytes, normalized
from packager.model.branch_rules import ModelFacts
from packager.model.checkpoint import PORTABLE_PARAMETERS, block_keys
from packager.receipt import CONFIG, GENERATION_CONFIG, QUANTIZE_CONFIG
from packager.recipe import Recipe
from packager.system.scratch import ScratchFolder
from packager.variant import Variant

_MOST_SHOWN = 10


@dataclass(frozen=True, kw_only=True)
class BranchNames:
    """The names in a branch's configs: its repository, and the weights file without its ending."""

    repository: str
    weights_name: str


def small_files(
    config: Mapping[str, object],
    copied: Mapping[str, bytes],
    architecture: Architecture,
    variant: Variant,
    names: BranchNames,
) -> dict[str, bytes]:
    """Return the files of a branch that are neither weights nor made by the card stage.

    Args:
        config: config.json as a branch gets it, without the variant.
        copied: the base model's files as a branch gets them.
        architecture: of the base model.
        variant: the parameters.
        names: see `BranchNames`.
    """
    made = {
        CONFIG: {**config, "quantization_config": quantization_config(variant, architecture)},
        QUANTIZE_CONFIG: portable_config(variant, architecture, names),
    }
    if GENERATION_CONFIG not in copied:
        keys = ("bos_token_id", "eos_token_id", "pad_token_id")
        made[GENERATION_CONFIG] = {
            "_from_model_config": True,
            **{key: config[key] for key in keys if config.get(key) is not None},
        }
    return {**{name: json_bytes(content) for name, content in made.items()}, **copied}


def portable_config(variant: Variant, architecture: Architecture, names: BranchNames) -> dict[str, object]:
    """Return quantize_config.json: the keys that every AutoGPTQ accepts, and `dynamic` where linears are left or mixed.

    GPTQModel reads this file and not config.json if both exist. AutoGPTQ opens no such model.
    """
    keys = block_keys(architecture, variant)
    return {
        **{key: variant.parameters()[key] for key in PORTABLE_PARAMETERS},
        "model_name_or_path": names.repository,
        "model_file_base_name": names.weights_name,
        **({"dynamic": keys["dynamic"]} if "dynamic" in keys else {}),
    }


def quantization_config(variant: Variant, architecture: Architecture) -> dict[str, object]:
    """Return config.json's quantization_config: the portable keys and what newer runtimes read."""
    parameters = variant.parameters()
    return {
        "quant_method": "gptq",
        **{key: parameters[key] for key in PORTABLE_PARAMETERS},
        "static_groups": variant.act_order == "static",
        "checkpoint_format": "gptq",
        "lm_head": False,
        **block_keys(architecture, variant),
    }


def check_small_files(folder: Path, recipe: Recipe, architecture: Architecture) -> tuple[str, ...]:
    """Audit what a branch gets of a base model's small files; those that are not there are not judged.

    Args:
        folder: with config.json and the files that the base model has beside its weights.
        recipe: one of its variants stands for all, without the bits of a mix, which are not chosen yet.
        architecture: of the base model.

    Returns:
        A sentence for each value that a branch gets otherwise than the base model has it.

    Raises:
        SourceError: a file cannot be published, or a runtime would refuse it: names file, key and reason of each.
    """
    from packager.prove.audit import audit_small_files  # numpy, which the plan of a model on the Hub does not need

    config = fp16_config(folder)
    facts = ModelFacts.of(config, architecture, template=templates_beside(folder))
    licenses = [name for name in recipe.card.license.base_files if os.path.lexists(folder / name)]
    given = {name: read_small(folder, name) for name in (*copied_names(folder), *licenses)}
    own = normalized(CONFIG, config, facts)
    copied = {name: branch_file(name, data, facts) for name, data in given.items()}
    contents = {name: file.data for name, file in copied.items()}
    names = BranchNames(repository=recipe.repository.id, weights_name=recipe.checkpoint.weights_name)
    first = recipe.expanded_variants()[0]
    files = small_files(own.content, contents, architecture, first.of_width(first.bits), names)
    with ScratchFolder("audit") as scratch:
        for name, data in files.items():
            path = scratch.path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        errors = audit_small_files(scratch.path, architecture).errors
    if errors:
        found = [f"{error.where}: {error.message} ({error.hint})" for error in errors]
        more = f"\n       and {len(found) - _MOST_SHOWN} more" if len(found) > _MOST_SHOWN else ""
        raise SourceError(
            "files of the base model cannot be part of a branch", where=str(folder),
            why="\n       ".join(found[:_MOST_SHOWN]) + more,
            hint="correct them in a folder of your own, name it as base_model.path, and make the lock anew: "
            "packager lock",
        )  # fmt: skip
    return (*own.changes, *(change for file in copied.values() for change in file.changes))
