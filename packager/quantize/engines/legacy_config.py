"""A base model's config.json for the transformers 4.40 that AutoGPTQ 0.7.1 runs with, and what that cannot compute.

transformers 4.40 silently replaces what it does not know by a default: a rope_theta that is only in
`rope_parameters` becomes 10000, a bias that `mlp_bias` announces is dropped. So every key whose meaning has changed
since is either written the old way or refused before anything is computed. Read from transformers 4.40.2
(`configuration_{llama,mistral,qwen2}.py`, `modeling_*.py`); what its runtime knows is in `model.autogptq_rules`. No
torch: `plan` imports this.
"""

from collections.abc import Mapping

from packager.model.architecture import Architecture
from packager.model.autogptq_rules import AUTOGPTQ_FAMILIES, LEGACY_ROPE_TYPES
from packager.model.rope import old_spelling, rope_factor, rope_type

# AutoGPTQ packs 32 rows and 32 columns at a time and drops the rest.
_PACKED_TOGETHER = 32
# Keys whose meaning or name changed, and auto_map, which AutoGPTQ's trust_remote_code=True would follow.
_REWRITTEN = (
    "rope_parameters",
    "rope_scaling",
    "rope_theta",
    "dtype",
    "torch_dtype",
    "quantization_config",
    "auto_map",
)


def problems(config: Mapping[str, object], architecture: Architecture, seq_len: int) -> list[str]:
    """Return why AutoGPTQ cannot quantize a model, one short clause each, to follow "auto-gptq cannot quantize ...".

    Args:
        config: the base model's config.json.
        architecture: what was read from it.
        seq_len: tokens per calibration row.
    """
    model_type = architecture.model_type
    if model_type not in AUTOGPTQ_FAMILIES:
        known = ", ".join(AUTOGPTQ_FAMILIES)
        return [f"model_type {model_type}: AutoGPTQ 0.7.1 with transformers 4.40 knows {known}"]
    return [
        *_rope_problems(config, model_type),
        *_shape_problems(config, architecture),
        *_window_problems(config, model_type, seq_len),
    ]


def _rope_problems(config: Mapping[str, object], model_type: str) -> list[str]:
    kind = rope_type(config)
    if kind in LEGACY_ROPE_TYPES[model_type] and (kind == "default" or rope_factor(config)):
        return []
    words = "plain, linear and dynamic ones" if model_type == "llama" else "plain ones"
    return [f"a rotary embedding of type {kind}: for {model_type}, transformers 4.40 knows {words}"]


def _shape_problems(config: Mapping[str, object], architecture: Architecture) -> list[str]:
    found = []
    if architecture.model_type == "llama" and config.get("mlp_bias"):
        found.append("mlp_bias: transformers 4.40 silently drops these biases")
    if not architecture.head_dim_is_derived:
        found.append("head_dim: transformers 4.40 assumes hidden_size / num_attention_heads")
    for linear in architecture.example_linears:
        if linear.in_features % _PACKED_TOGETHER or linear.out_features % _PACKED_TOGETHER:
            shape = f"{linear.in_features} x {linear.out_features}"
            found.append(f"{linear.module} of {shape}: AutoGPTQ packs multiples of {_PACKED_TOGETHER} only")
            break
    return found


def _window_problems(config: Mapping[str, object], model_type: str, seq_len: int) -> list[str]:
    """Refuse Qwen2's sliding window where it matters: transformers 4.40 applies it in all blocks, not in some."""
    window = config.get("sliding_window")
    if model_type != "qwen2" or not config.get("use_sliding_window") or not isinstance(window, int):
        return []
    if seq_len <= window:
        return []
    return [f"calibration rows of {seq_len} tokens: transformers 4.40 cannot give Qwen2 its sliding window of {window}"]


def legacy_config(config: Mapping[str, object]) -> dict[str, object]:
    """Return config.json in the spelling of transformers 4.40, for a model without `problems`."""
    legacy = {key: value for key, value in config.items() if key not in _REWRITTEN}
    legacy["rope_theta"] = old_spelling(config)["rope_theta"]
    if (kind := rope_type(config)) != "default":
        # Exactly these two fields: transformers 4.40 refuses others.
        legacy["rope_scaling"] = {"type": kind, "factor": rope_factor(config)}
    return legacy | _window(config) | {"torch_dtype": "float16"}


def _window(config: Mapping[str, object]) -> dict[str, object]:
    """Return the sliding window under which transformers 4.40 attends to the same tokens.

    Its mask covers one token more than the window, and it applies Qwen2's window even when that is switched off.
    """
    window = config.get("sliding_window")
    if config.get("model_type") == "qwen2":
        return {"sliding_window": None}  # one that is on and matters was refused
    return {"sliding_window": window - 1} if isinstance(window, int) else {}
