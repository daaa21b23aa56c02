"""Read and write the rotary embedding of a config.json, which has two spellings.

transformers 5 writes `rope_parameters`. Every older runtime reads only `rope_theta` and `rope_scaling`; without them it
silently uses a plain embedding of base 10000. transformers 5 reads both spellings; `rope_scaling` wins.
No torch here: `plan` must stay fast.
"""

import sys
from collections.abc import Mapping

DEFAULT_THETA = 10000.0  # of every family of packager/model/architecture.py
# For these types transformers 4.40 accepts exactly two fields in `rope_scaling`: the type, and the factor as a float.
_TWO_FIELDS = ("linear", "dynamic")


def rope_of(config: Mapping[str, object]) -> Mapping[str, object]:
    """Return the parameters that transformers 5 uses, under either name; empty where config.json has none."""
    keys = ("rope_scaling", "rope_parameters")
    return next((found for key in keys if isinstance(found := config.get(key), Mapping) and found), {})


def rope_type(config: Mapping[str, object]) -> str:
    """Return "default", "linear", "llama3", "yarn" ...; of parameters for each kind of layer the first other one."""
    rope = rope_of(config)
    if is_by_layer_type(rope):
        each = [value for value in rope.values() if isinstance(value, Mapping)]
        return next((kind for kind in map(_rope_type, each) if kind != "default"), "default")
    return _rope_type(rope)


def is_by_layer_type(rope: Mapping[str, object]) -> bool:
    """Return whether there are parameters for each type of layer, such as Gemma 3's for sliding and for full attention.

    The old spelling has no place for them.
    """
    return bool(rope) and all(isinstance(value, Mapping) for value in rope.values())


def _rope_type(rope: Mapping[str, object]) -> str:
    return str(rope.get("rope_type") or rope.get("type") or "default")


def rope_factor(config: Mapping[str, object]) -> float | None:
    """Return the factor of a scaled embedding, None where it is not a finite number."""
    factor = rope_of(config).get("factor")
    if not isinstance(factor, int | float) or isinstance(factor, bool) or not abs(factor) <= sys.float_info.max:
        return None
    return float(factor)


def old_spelling(config: Mapping[str, object]) -> dict[str, object]:
    """Return the old spelling: `rope_theta`, and `rope_scaling` where the embedding is not a plain one."""
    rope, kind = rope_of(config), rope_type(config)
    theta = rope.get("rope_theta", config.get("rope_theta"))
    spelled: dict[str, object] = {"rope_theta": DEFAULT_THETA if theta is None else theta}
    factor = rope_factor(config)
    if kind in _TWO_FIELDS and factor is not None and not rope.keys() - {"rope_type", "type", "factor", "rope_theta"}:
        spelled["rope_scaling"] = {"type": kind, "factor": factor}
    elif kind != "default":
        rest = {key: value for key, value in rope.items() if key not in ("rope_theta", "type")}
        spelled["rope_scaling"] = {**rest, "rope_type": kind}
    return spelled


def misread(config: Mapping[str, object]) -> bool:
    """Return whether a runtime that reads only the old spelling differs from transformers 5, or refuses the config."""
    return bool(spelled_for_all(config))


def spelled_for_all(config: Mapping[str, object]) -> dict[str, object]:
    """Return the keys of the old spelling that a config.json must have so that every runtime reads it alike.

    Where the old spelling is there and right, nothing is returned; nor where there is none.
    """
    if is_by_layer_type(rope_of(config)):
        return {}
    spelled, given = old_spelling(config), config.get("rope_scaling")
    theta = config.get("rope_theta")
    if spelled["rope_theta"] == (DEFAULT_THETA if theta is None else theta):
        del spelled["rope_theta"]
    if "rope_scaling" in spelled and given and (not _is_two_fields(spelled["rope_scaling"]) or _is_two_fields(given)):
        del spelled["rope_scaling"]
    return spelled


def is_old_scaling(config: Mapping[str, object]) -> bool:
    """Return whether transformers 4.40 takes the scaling of a branch's config.json.

    Source: transformers 4.40.2, LlamaConfig._rope_scaling_validation.
    """
    scaling, factor = old_spelling(config).get("rope_scaling"), rope_factor(config)
    return _is_two_fields(scaling) and factor is not None and factor > 1


def gpt_neox_keys_lacking(config: Mapping[str, object]) -> list[str]:
    """Return the old keys of GPT-NeoX's rotary embedding that a config lacks, where transformers 4's default is wrong.

    Source: transformers 4.40.2, transformers.models.gpt_neox; transformers 5 writes rope_parameters.
    """
    rope = config.get("rope_parameters")
    written = rope if isinstance(rope, Mapping) else {}
    keys = (("rotary_pct", "partial_rotary_factor", 0.25), ("rotary_emb_base", "rope_theta", 10000))
    return [key for key, new_key, default in keys if key not in config and written.get(new_key, default) != default]


def _is_two_fields(scaling: object) -> bool:
    """Return whether transformers 4.40 can read a `rope_scaling`: its type, and its factor as a float."""
    return (
        isinstance(scaling, Mapping)
        and scaling.keys() == {"type", "factor"}
        and scaling["type"] in _TWO_FIELDS
        and isinstance(scaling["factor"], float)
    )
