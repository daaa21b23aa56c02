"""Repairs of config.json, quantize_config.json and the other configs, where the tensors or the files decide."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field

from packager.model.checkpoint import PORTABLE_KEYS, PORTABLE_PARAMETERS
from packager.model.config_values import path_keys
from packager.prove.audit.config import missing_code
from packager.prove.audit.files import JsonObject, Listing, as_object
from packager.prove.audit.values import V1
from packager.prove.held_parameters import Held
from packager.receipt import CONFIG, GENERATION_CONFIG, QUANTIZE_CONFIG, TOKENIZER_CONFIG
from packager.system.text import shown

_CONFIGS = (CONFIG, QUANTIZE_CONFIG, GENERATION_CONFIG, TOKENIZER_CONFIG)
_SECTION = "quantization_config"
_MISSING = object()
# The finding that a repaired value ends, by key.
_CODES = {
    "bits": "linear-shape",
    "group_size": "linear-shape",
    "desc_act": "g-idx-order",
    "sym": "zeros-not-symmetric",
    "checkpoint_format": "zeros-format",
    "quant_method": "quantization-value",
    "lm_head": "lm-head-quantized",
}


@dataclass(frozen=True, kw_only=True)
class Change:
    """One repair.

    Attributes:
        code: of the finding that it ends, "" where the audit has none.
        where: the file, or `file: key`.
        what: what changes there.
        why: why no other repair is right.
    """

    code: str
    where: str
    what: str
    why: str


@dataclass(kw_only=True)
class RepairedConfigs:
    """The configs as they become, and what changes; a config that does not change is not in `documents`."""

    documents: dict[str, JsonObject] = field(default_factory=dict)
    changes: list[Change] = field(default_factory=list)

    def put(self, document: JsonObject, file: str, key: str, value: object, why: str, code: str = "") -> None:
        """Set a key of an object in a config, and record it; nothing happens where it has that value."""
        before = document.get(key, _MISSING)
        if before is not _MISSING and before == value and type(before) is type(value):
            return
        document[key] = value
        what = f"{shown(value)} is written" if before is _MISSING else f"{shown(value)} instead of {shown(before)}"
        self.changes.append(Change(code=code, where=f"{file}: {key}", what=what, why=why))

    def drop(self, document: JsonObject, file: str, key: str, why: str, code: str) -> None:
        """Remove a key of an object in a config, and record it."""
        value = document.pop(key)
        self.changes.append(Change(code=code, where=f"{file}: {key}", what=f"{shown(value)} is removed", why=why))


def repaired_configs(
    documents: Mapping[str, object], listing: Listing, held: Held, *, stem: str, converts_zeros: bool
) -> RepairedConfigs:
    """Return the configs with what is certain.

    Args:
        documents: the checkpoint's JSON files.
        listing: its files.
        held: what its tensors show.
        stem: the name of the weights, without suffix, as it becomes; "" if there are none.
        converts_zeros: the zeros are written in the v1 format.
    """
    found = RepairedConfigs()
    kept = {name: document for name in _CONFIGS if (document := as_object(documents.get(name))) is not None}
    edited = copy.deepcopy(kept)
    config, portable = edited.get(CONFIG), edited.get(QUANTIZE_CONFIG)
    if config is not None and held.bits is not None and held.group_size is not None:
        _repair_parameters(found, edited, listing, held, stem=stem, converts_zeros=converts_zeros)
    if portable is not None and stem:
        _repair_name(found, portable, stem)
    for name, document in edited.items():
        _drop_paths(found, document, name)
        _drop_code(found, document, name, listing)
    found.documents = {name: document for name, document in edited.items() if document != kept.get(name)}
    return found


def _repair_parameters(
    found: RepairedConfigs,
    edited: dict[str, JsonObject],
    listing: Listing,
    held: Held,
    *,
    stem: str,
    converts_zeros: bool,
) -> None:
    """Let both files declare what the tensors show."""
    config, portable = edited[CONFIG], edited.get(QUANTIZE_CONFIG)
    if config.get(_SECTION) is None:
        why = "without it the folder is loaded as an fp16 model; quantize_config.json and the tensors say it"
        found.put(config, CONFIG, _SECTION, _section_of(portable or {}), why, "quantization-config-missing")
    section = as_object(config[_SECTION])
    if section is None:
        return
    decided = _decided(held, section, converts_zeros=converts_zeros)
    _write_decided(found, section, f"{CONFIG}: {_SECTION}", decided)
    if portable is not None:
        _repair_portable(found, portable, section, decided)
    elif not listing.has(QUANTIZE_CONFIG):
        edited[QUANTIZE_CONFIG] = _portable_of(section, stem)
        why = "its keys are those of config.json; AutoGPTQ opens no local folder without it"
        found.changes.append(
            Change(code="quantize-config-missing", where=QUANTIZE_CONFIG, what="the file is written", why=why)
        )


def _section_of(portable: Mapping[str, object]) -> JsonObject:
    named = {key: value for key, value in portable.items() if key not in ("model_name_or_path", "model_file_base_name")}
    return {"quant_method": "gptq", **named}


def _portable_of(section: Mapping[str, object], stem: str) -> JsonObject:
    found = {key: section[key] for key in PORTABLE_PARAMETERS if key in section}
    return {**found, **({"model_file_base_name": stem} if stem else {})}


def _decided(held: Held, section: Mapping[str, object], *, converts_zeros: bool) -> dict[str, tuple[object, str]]:
    """Return the keys whose values the tensors decide, each with the reason."""
    decided: dict[str, tuple[object, str]] = {
        "quant_method": ("gptq", "the weights are qweight, qzeros, scales and g_idx"),
        "bits": (held.bits, "the shapes of qweight and g_idx show it"),
        "group_size": (held.group_size, "the shapes of scales and the groups of g_idx show it"),
    }
    if held.order("natural", "renumbered") and (section.get("desc_act") is not False) and held.group_size != -1:
        decided["desc_act"] = (False, "g_idx is column // group_size, which is static: vLLM refuses desc_act")
    elif held.order("natural", "renumbered", "scattered") and "scattered" in held.orders.values():
        decided["desc_act"] = (True, "g_idx is in act order, and runtimes that are told otherwise ignore it")
    elif held.group_size == -1 and "desc_act" not in section:
        decided["desc_act"] = (False, "with one group for all columns there is no order")
    if held.sym is not None and ("sym" not in section or (held.sym is False and section["sym"] is True)):
        decided["sym"] = (held.sym, "the stored zeros show it")
    if converts_zeros or (held.checkpoint_format == V1 and section.get("sym", True) is True):
        decided["checkpoint_format"] = (V1, "the stored zeros are one less than the zeros")
    if not any(linear.name in ("lm_head", "embed_out") for linear in held.linears):
        decided["lm_head"] = (False, "the output head is not quantized")
    return decided


def _write_decided(
    found: RepairedConfigs, document: JsonObject, place: str, decided: Mapping[str, tuple[object, str]]
) -> None:
    for key, (value, why) in decided.items():
        code = _CODES[key] if key in document else missing_code(key)
        found.put(document, place, key, value, why, code)


def _repair_portable(
    found: RepairedConfigs, portable: JsonObject, section: JsonObject, decided: Mapping[str, tuple[object, str]]
) -> None:
    """Let quantize_config.json have its own keys only, with the decided values."""
    for key in [key for key in portable if key not in PORTABLE_KEYS and key != "dynamic"]:
        if key not in section:
            found.put(section, f"{CONFIG}: {_SECTION}", key, portable[key], "it stood in quantize_config.json")
        elif key not in decided and section[key] != portable[key]:
            continue  # which one is right is not known
        found.drop(portable, QUANTIZE_CONFIG, key, "config.json has it; AutoGPTQ <= 0.4.2 stops at unknown keys",
                   "quantize-config-key")  # fmt: skip
    shared = {key: value for key, value in decided.items() if key in PORTABLE_PARAMETERS}
    _write_decided(found, portable, QUANTIZE_CONFIG, shared)
    for key in ("desc_act", "sym"):
        if key not in portable and key in section:
            found.put(portable, QUANTIZE_CONFIG, key, section[key], "config.json has it", missing_code(key))


def _repair_name(found: RepairedConfigs, portable: JsonObject, stem: str) -> None:
    given = portable.get("model_file_base_name")
    if given is not None and given != stem:
        why = "AutoGPTQ opens the weights of this name"
        found.put(portable, QUANTIZE_CONFIG, "model_file_base_name", stem, why, "weights-name-disagrees")


def _drop_paths(found: RepairedConfigs, document: JsonObject, name: str) -> None:
    parts = {name: document}
    if name == CONFIG and (section := as_object(document.get(_SECTION))) is not None:
        parts[f"{name}: {_SECTION}"] = section
    # GPTQModel keeps its settings there, the folder that it swapped to among them.
    parts |= {f"{place}: meta": meta for place, part in parts.items() if (meta := as_object(part.get("meta")))}
    for place, part in parts.items():
        for key in path_keys(part):
            why = "no runtime reads it: files are opened by their names in the folder"
            found.drop(part, place, key, why, "local-path")


def _drop_code(found: RepairedConfigs, document: JsonObject, name: str, listing: Listing) -> None:
    """Remove an auto_map of which no file is there."""
    if not isinstance(named := document.get("auto_map"), dict):
        return
    entries = [item for value in named.values() for item in (value if isinstance(value, list) else [value]) if item]
    texts = [entry for entry in entries if isinstance(entry, str) and "--" not in entry]
    if (
        entries
        and len(texts) == len(entries)
        and not any(listing.has(f"{entry.rpartition('.')[0]}.py") for entry in texts)
    ):
        found.drop(document, name, "auto_map", "the Python files that it names are not there", "code-missing")
