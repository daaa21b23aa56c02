"""What a checkpoint folder, made by any program, declares of itself: its parameters and its model.

Of weights files no more than the headers are read, and where there are none, the configs alone count.
"""

from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

from packager.errors import AuditError
from packager.model.architecture import Architecture
from packager.model.checkpoint import block_keys
from packager.prove.audit.config import Declared, bits_of, check_declared, overrides, widths_of
from packager.prove.audit.files import JsonObject, as_object, list_folder, read_documents
from packager.prove.audit.finding import Findings
from packager.prove.audit.model import Describe, read_model
from packager.prove.audit.tensors import quantized_modules
from packager.prove.audit.weights import Weights, read_weights
from packager.receipt import CONFIG, INDEX_SUFFIX, PROVENANCE, QUANTIZE_CONFIG
from packager.system.text import shown
from packager.variant import ActOrder, Bits, BitsMix, Variant

# The documents that are read, of those that exist.
DECLARING_FILES = (CONFIG, QUANTIZE_CONFIG, PROVENANCE)


@dataclass(frozen=True, kw_only=True)
class DeclaredCheckpoint:
    """A checkpoint's parameters and model.

    Attributes:
        variant: what no config says, such as the damping, has any value.
        architecture: with those linears that the checkpoint has quantized.
    """

    variant: Variant
    architecture: Architecture


def declared_checkpoint(folder: Path, branch: str, describe: Describe | None) -> DeclaredCheckpoint:
    """Read a folder's configs, and the headers of its weights if they are there.

    Args:
        folder: of a checkpoint, or with its `DECLARING_FILES` alone.
        branch: the variant's branch.
        describe: describes the model of a config.json that no provenance.json describes.

    Raises:
        AuditError: the files declare no GPTQ checkpoint, or one whose linears have other parameters than bits of their
            own, or a model that is not known.
    """
    findings = Findings()
    listing = list_folder(folder, findings)
    wanted = {name: size for name, size in listing.sizes.items() if _is_wanted(name)}
    documents = read_documents(replace(listing, sizes=wanted), findings, complete=True)
    weights = read_weights(listing, documents, findings)
    declared = check_declared(documents, weights, findings)
    config = as_object(documents.get(CONFIG))
    section = as_object(config.get("quantization_config")) if config is not None else None
    if section is None:
        why = "there is none" if CONFIG not in listing.sizes else "it has no quantization_config"
        raise _error(folder, "this is no GPTQ checkpoint", why)
    if problem := _problem(section, declared, are_weights_read=weights.is_all_read):
        raise _error(folder, "no rule is about such a checkpoint", problem)
    architecture = read_model(documents, findings, None, describe).architecture
    if architecture is None:
        places = {"architecture-unknown", "config-value", "provenance-invalid"}
        why = "; ".join(each.message for each in findings.collected() if each.code in places)
        raise _error(folder, "the model of this checkpoint is not known", why)
    quantized = quantized_modules(weights) if weights.is_all_read else None
    variant = _variant(branch, declared, widths_of(weights))
    architecture = _without_left(folder, architecture, declared, quantized)
    own = bool(variant.other_bits) and section.get("dynamic") == _own_patterns(variant, architecture, weights)
    return DeclaredCheckpoint(variant=replace(variant, own_patterns=own), architecture=architecture)


def _own_patterns(variant: Variant, architecture: Architecture, weights: Weights) -> object:
    """Return `dynamic` as we write it for linears whose bits are those of their tensors; None where we mix none."""
    if any(group.unit for kind in architecture.kinds for group in kind.groups):
        return None
    held = ((linear.name, bits_of(weights, f"{linear.name}.qweight")) for linear in architecture.linears)
    linear_bits = tuple((name, cast(Bits, bits)) for name, bits in held)
    mix = BitsMix(bits=variant.all_bits, mean=variant.bits)
    return block_keys(architecture, replace(variant, mix=mix, linear_bits=linear_bits)).get("dynamic")


def _is_wanted(name: str) -> bool:
    return name in DECLARING_FILES or name.endswith(INDEX_SUFFIX)


def _error(folder: Path, what: str, why: str) -> AuditError:
    return AuditError(what, where=f"{folder}: {CONFIG}", why=why, hint="packager audit shows all that is wrong with it")


def _problem(section: JsonObject, declared: Declared, *, are_weights_read: bool) -> str:
    """Return why the rules cannot be asked about what a quantization_config declares, or ""."""
    missing = [key for key in ("bits", "group_size", "desc_act", "sym") if getattr(declared, key) is None]
    dynamic = section.get("dynamic") or {}
    if section.get("quant_method") != "gptq":
        problem = f"quant_method is {shown(section.get('quant_method'))}, not gptq"
    elif missing:
        problem = f"{missing[0]} is {shown(section[missing[0]]) if missing[0] in section else 'missing'}"
    elif declared.checkpoint_format not in (None, "gptq"):
        problem = f"checkpoint_format is {shown(declared.checkpoint_format)}"
    elif section.get("lm_head") is True:
        problem = "lm_head is quantized"
    elif overrides(dynamic) and not declared.has_mixed_bits:
        problem = "dynamic gives single linears other parameters"
        problem += "" if are_weights_read else " by patterns, which are not tried: download the weights"
    elif dynamic and declared.quantized is None and not are_weights_read:
        problem = "dynamic leaves linears unquantized by patterns, which are not tried: download the weights"
    else:
        problem = ""
    return problem


def _variant(branch: str, declared: Declared, widths: Collection[int]) -> Variant:
    """Return the declared variant; runtimes go by desc_act, whatever the order in which columns were quantized.

    `widths` are the bits that linears have.
    """
    static: ActOrder = "static" if declared.static_groups else "none"
    return Variant(
        branch=branch,
        bits=cast(Bits, declared.bits),
        group_size=cast(int, declared.group_size),
        act_order="full" if declared.desc_act else static,
        sym=bool(declared.sym),
        damp_percent=0.01,
        damp_percent_limit=0.1,
        true_sequential=True,
        scale_search=False,
        refine=False,
        effort="standard",
        engine="native",
        other_bits=tuple(cast(Bits, bits) for bits in widths if declared.has_mixed_bits and bits != declared.bits),
    )


def _without_left(
    folder: Path, architecture: Architecture, declared: Declared, quantized: Collection[str] | None
) -> Architecture:
    """Return the architecture without the linears that the checkpoint has unquantized.

    Args:
        folder: for messages.
        architecture: of the base model.
        declared: names the quantized linears, or does not.
        quantized: the modules that have quantized tensors; None where the weights were not read.
    """
    left = {
        linear.module
        for linear in architecture.linears
        if (declared.leaves(linear.name) if quantized is None else linear.name not in quantized)
    }
    found = architecture.leaving(sorted(left))
    if not found.example_linears:
        raise _error(folder, "this is no GPTQ checkpoint", "no linear of the model is quantized")
    return found
