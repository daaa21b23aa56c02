"""The rotary embedding in a config.json, which has two spellings.

transformers 5 writes `rope_parameters`. Every older runtime reads `rope_theta` and `rope_scaling` alone and takes what
it does not find for a plain embedding of base 10000, without a word. transformers 5 reads both; `rope_scaling` wins.
No torch here: `plan` must stay fast.
"""

import sys
from collections.abc import Mapping

DEFAULT_THETA = 10000.0  # of every family of packager/model/architecture.py
# In `rope_scaling`, transformers 4.40 wants exactly these two fields of them, the factor as a float.
_TWO_FIELDS = ("linear", "dynamic")


def rope_of(config: Mapping[str, object]) -> Mapping[str, object]:
    """Return what transformers 5 would take, under either name; empty where nothing is said."""
    keys = ("rope_scaling", "rope_parameters")
    return next((found for key in keys if isinstance(found := config.get(key), Mapping) and found), {})


def rope_type(config: Mapping[str, object]) -> str:
    """Return "default", "linear", "llama3", "yarn" ..."""
    rope = rope_of(config)
    return str(rope.get("rope_type") or rope.get("type") or "default")


def rope_factor(config: Mapping[str, object]) -> float | None:
    """Return the factor of a scaled embedding, None where it is no finite number."""
    factor = rope_of(config).get("factor")
    if not isinstance(factor, int | float) or isinstance(factor, bool) or not abs(factor) <= sys.float_info.max:
        return None
    return float(factor)


def old_spelling(config: Mapping[str, object]) -> dict[str, object]:
    """Return `rope_theta` and, where the embedding is not a plain one, `rope_scaling`, as the config means them."""
    rope, kind = rope_of(config), rope_type(config)
    theta = rope.get("rope_theta", config.get("rope_theta"))
    said: dict[str, object] = {"rope_theta": DEFAULT_THETA if theta is None else theta}
    factor = rope_factor(config)
    if kind in _TWO_FIELDS and factor is not None and not rope.keys() - {"rope_type", "type", "factor", "rope_theta"}:
        said["rope_scaling"] = {"type": kind, "factor": factor}
    elif kind != "default":
        rest = {key: value for key, value in rope.items() if key not in ("rope_theta", "type")}
        said["rope_scaling"] = {**rest, "rope_type": kind}
    return said


def misread(config: Mapping[str, object]) -> bool:
    """Return whether a runtime that knows the old spelling alone computes something else than transformers 5."""
    said = old_spelling(config)
    theta = config.get("rope_theta")
    same = said["rope_theta"] == (DEFAULT_THETA if theta is None else theta)
    return not same or ("rope_scaling" in said and not config.get("rope_scaling"))


def in_both_spellings(config: Mapping[str, object]) -> dict[str, object]:
    """Return a config.json that every runtime reads alike; what already says it the old way stays as it is."""
    if not misread(config):
        return dict(config)
    said = old_spelling(config)
    if config.get("rope_scaling"):
        del said["rope_scaling"]
    return {**config, **said}
