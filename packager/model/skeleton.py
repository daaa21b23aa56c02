"""Build a causal language model of transformers without weights: on the meta device, or of tensors without data."""

from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from packager.errors import SourceError

_OWN_ATTENTION = (None, "eager", "sdpa")  # of transformers and torch; others need packages that may not be here

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
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        if config._attn_implementation not in _OWN_ATTENTION:
            config._attn_implementation = None
        _ask_for_logits_only(config)
        model = _class_of(config).from_config(config, dtype=dtype)
    except Exception as error:
        raise SourceError("transformers cannot build this model", where=str(folder), why=str(error)) from error
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
