"""The tiny decoders: each is a working causal language model that transformers opens again from its folder."""

from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError

from tests.tiny_decoders import (
    ARCHITECTURES,
    LEFT_OUT,
    NAMES,
    open_decoder,
    tiny_config,
    tiny_decoder,
    tiny_model,
    token_ids,
)

_OBSTACLES = (AssertionError, AttributeError, ImportError, RuntimeError, StrictDataclassError, TypeError, ValueError)


def _logits(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=ids, use_cache=False).logits
    return logits


def _check(name: str, folder: Path) -> None:
    assert not getattr(tiny_config(name), "is_encoder_decoder", False), "encoder-decoder"
    ids = token_ids()
    opened, report = open_decoder(tiny_decoder(name, folder), name)
    assert not any(report.values()), report
    logits = _logits(opened, ids)
    assert torch.isfinite(logits).all()
    torch.testing.assert_close(logits, _logits(tiny_model(name), ids), rtol=1e-4, atol=1e-5)
    other = ids.clone()
    other[:, -1] = (ids[:, -1] + 7) % 400 + 3
    changed = (_logits(opened, other) - logits).abs()
    assert changed[:, :-1].max() < 1e-4, "a later token changes earlier logits"
    assert changed[:, -1].max() > 1e-3, "the logits do not depend on the token"


@pytest.mark.parametrize("name", ["gpt2", "llama", "qwen3_moe"])
def test_a_sample_opens_and_computes(name, tmp_path):
    _check(name, tmp_path)


@pytest.mark.long
@pytest.mark.pinned
@pytest.mark.parametrize("name", NAMES)
def test_each_opens_and_computes(name, tmp_path):
    _check(name, tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_dtype_is_that_of_the_files(dtype, tmp_path):
    opened, _ = open_decoder(tiny_decoder("llama", tmp_path, dtype=dtype), "llama")
    assert {parameter.dtype for parameter in opened.parameters()} == {dtype}


def test_the_seed_decides_the_weights():
    first, again, other = (tiny_model("llama", seed=seed).lm_head.weight for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.pinned
def test_each_model_type_is_here_or_has_a_reason():
    from transformers.models.auto import modeling_auto

    known = {
        *modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        *modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    }
    assert sorted([*ARCHITECTURES, *LEFT_OUT]) == sorted(known)


@pytest.mark.long
@pytest.mark.pinned
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("model_type", LEFT_OUT)
def test_each_left_out_cannot_be_here(model_type, tmp_path):
    """One that fails here works now, and belongs to the others, or fails in another way."""
    with pytest.raises(_OBSTACLES, match=LEFT_OUT[model_type][1]):
        _check(model_type, tmp_path)
