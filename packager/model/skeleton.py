"""Build a causal language model of transformers without weights: on the meta device, or of tensors without data."""

import json
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from packager.errors import SourceError
from packager.model.branch_config import normalized
from packager.model.branch_rules import ModelFacts
from packager.model.config_values import read_config, unusable_config
from packager.receipt import CONFIG
from packager.system.scratch import ScratchFolder

_OWN_ATTENTION = (None, "eager", "sdpa")  # of transformers and torch; others need packages that may not be here

_DYNAMIC_ROPE = frozenset(
    {"rope_type", "type", "factor", "rope_theta", "partial_rotary_factor", "original_max_position_embeddings"}
)
_FURTHER_OUTPUTS = ("output_hidden_states", "output_attentions", "output_router_logits")


def build_skeleton(folder: Path, dtype: torch.dtype) -> nn.Module:
    """Build the model that a folder's config.json describes, in the device context of the caller.

    Every Conv1D of GPT-2 and its relatives becomes the nn.Linear that computes the same: see `is_transposed`.

    Args:
        folder: with config.json; its quantization_config is ignored, and an attention of a package that it asks for.
        dtype: of the weights.

    Raises:
        SourceError: transformers does not know the architecture, or cannot build it from this config.json.
    """
    try:
        config = open_config(folder)
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        if config._attn_implementation not in _OWN_ATTENTION:
            config._attn_implementation = None
        _ask_for_logits_only(config)
        model = _class_of(config).from_config(config, dtype=dtype)
    except SourceError:
        raise
    except Exception as error:
        config_json = read_config(folder / CONFIG)
        raise unusable_config(config_json, "transformers cannot build this model", folder, error) from error
    _replace_conv1d(model)
    return cast(nn.Module, model.eval())


def _ask_for_logits_only(config: Any) -> None:
    """Turn off what a training run left in config.json and what makes a forward return more than logits."""
    parts = [config, *(getattr(config, name, None) for name in getattr(config, "sub_configs", ()))]
    for part in parts:
        if part is None:
            continue
        part.return_dict = True
        for name in _FURTHER_OUTPUTS:
            if getattr(part, name, False):
                setattr(part, name, False)


def open_config(folder: Path) -> Any:
    """Open a folder's config.json as a branch gets it: transformers cannot build every model from the base's own.

    Raises:
        SourceError: the file cannot be read. Of what transformers refuses, it raises anything.
    """
    from transformers import AutoConfig

    document = read_config(folder / CONFIG)
    with ScratchFolder("config") as scratch:
        content = normalized(CONFIG, document, ModelFacts.of(document)).content
        (scratch.path / CONFIG).write_text(json.dumps(content), encoding="utf-8")
        config: Any = AutoConfig.from_pretrained(scratch.path, trust_remote_code=False)
    for part in [config, *(getattr(config, name, None) for name in getattr(config, "sub_configs", ()))]:
        if isinstance(rope := getattr(part, "rope_parameters", None), dict):
            part.rope_parameters = _without_dynamic_rope(rope)
    return config


def _without_dynamic_rope(rope: dict[str, Any]) -> dict[str, Any]:
    """Return the parameters of a rotary embedding, or of one per kind of attention, with "dynamic" as "default".

    For rows of at most max_position_embeddings tokens, and no other is computed, both are the same embedding
    (transformers.modeling_rope_utils, _compute_dynamic_ntk_parameters), but which of both reads values of tensors.
    Parameters that are not the usual ones mean something else: Hunyuan's `alpha` scales rows of any length.
    """
    if rope.get("rope_type") == "dynamic" and rope.keys() <= _DYNAMIC_ROPE:
        return {**{key: value for key, value in rope.items() if key not in ("type", "factor")}, "rope_type": "default"}
    return {key: _without_dynamic_rope(value) if isinstance(value, dict) else value for key, value in rope.items()}


def _class_of(config: Any) -> Any:
    """Return the auto class that opens the model as a language model.

    Where both can (with and without the towers that read images), config.json names the class that wrote the files.
    """
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    if type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        return AutoModelForCausalLM
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return AutoModelForImageTextToText
    whole: Any = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(config)]
    named = whole.__name__ in (getattr(config, "architectures", None) or ())
    return AutoModelForImageTextToText if named else AutoModelForCausalLM


def place(model: nn.Module, device: torch.device) -> None:
    """Make the model, and the models of transformers inside it, give a device as theirs.

    transformers takes the first parameter's, which may stay on the meta device: a tower that reads images comes first.
    """
    from transformers import PreTrainedModel

    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            original = type(module)
            members = {"device": device, "__module__": original.__module__, "__qualname__": original.__qualname__}
            module.__class__ = type(original.__name__, (original,), members)


def is_transposed(linear: nn.Module) -> bool:
    """Return whether files store the weight of this nn.Linear as [in_features, out_features]: it was a Conv1D."""
    return bool(getattr(linear, "packager_transposed", False))


def _replace_conv1d(model: nn.Module) -> None:
    from transformers.pytorch_utils import Conv1D

    for name, module in list(model.named_modules()):
        if isinstance(module, Conv1D):
            in_features, out_features = module.weight.shape
            linear = nn.Linear(
                in_features, out_features, bias=True, device=module.weight.device, dtype=module.weight.dtype
            )
            linear.packager_transposed = True  # type: ignore[assignment]
            model.set_submodule(name, linear)
