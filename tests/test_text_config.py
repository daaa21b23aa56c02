"""Keys that config.json leaves out: the lock has what transformers takes for them, also of models that read images."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from packager.inputs.description_check import description_differences
from packager.model.architecture import Architecture, architecture_of
from packager.model.branch_rules import ModelFacts
from packager.model.checkpoint import length_problem
from packager.model.describe import describe
from packager.model.lock import LockedModel
from packager.model.rope import rope_type
from tests.samples import sampled
from tests.tiny_decoders import tiny_config

READ = ("max_position_embeddings", "sliding_window", "head_dim", "num_attention_heads", "vocab_size")
# gemma-3-4b-it leaves out most keys of its text_config, llava-1.5-7b the heads; gpt_oss scales positions by default.
NAMES = ("gemma3", "llava", "qwen3_vl", "mistral3", "gpt_oss")


def written(name: str, folder: Path, *left_out: str) -> tuple[Path, dict[str, Any]]:
    """Write a tiny config.json without some keys of its part about the language model."""
    config = tiny_config(name).to_dict()
    text = config.get("text_config", config)
    for key in left_out:
        text.pop(key, None)
    (folder / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
    return folder, config


@pytest.fixture(params=sampled(NAMES, "gemma3", "llava"))
def described(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[LockedModel, Any]:
    """A model whose config.json leaves everything out, and transformers' config of its language model."""
    folder, _ = written(request.param, tmp_path, *READ, "rope_parameters", "rope_scaling", "rope_theta")
    return describe(folder, None), AutoConfig.from_pretrained(folder).get_text_config(decoder=True)


def test_what_is_left_out_is_as_transformers_has_it(described: tuple[LockedModel, Any]) -> None:
    locked, text = described
    architecture = architecture_of(locked, "")
    expected = {key: value for key in READ if (value := getattr(text, key, None)) is not None}
    assert {key: architecture.text_config.get(key) for key in expected} == expected
    assert architecture.max_position_embeddings == text.max_position_embeddings
    assert architecture.head_dim_is_derived is (text.head_dim == text.hidden_size / text.num_attention_heads)
    window = getattr(text, "sliding_window", None)
    assert architecture.sliding_window == window
    kinds = [text.rope_parameters, *text.rope_parameters.values()]
    assert architecture.rope_type in [kind.get("rope_type") for kind in kinds if isinstance(kind, dict)]
    assert ModelFacts.of(architecture.config, architecture).vocab_size == text.vocab_size


def test_rows_longer_than_the_default_positions_are_refused(described: tuple[LockedModel, Any]) -> None:
    locked, text = described
    architecture, positions = architecture_of(locked, ""), text.max_position_embeddings
    assert length_problem(architecture, "calibration.seq_len", positions) == ""
    assert f"more than the {positions} positions" in length_problem(architecture, "calibration.seq_len", positions + 1)


def architecture_with(folder: Path, name: str, *left_out: str) -> Architecture:
    return architecture_of(describe(written(name, folder, *left_out)[0], None), "")


def test_what_config_json_says_is_not_written_again(tmp_path: Path) -> None:
    architecture = architecture_with(tmp_path, "gemma3", "head_dim")
    assert architecture.resolved == {"head_dim": 256}
    assert architecture.max_position_embeddings == 256


def test_a_default_scales_the_positions_of_gpt_oss(tmp_path: Path) -> None:
    assert architecture_with(tmp_path, "gpt_oss", "rope_parameters", "rope_scaling").rope_type == "yarn"


def test_a_rotary_embedding_for_each_kind_of_layer_is_read() -> None:
    plain, scaled = {"rope_type": "default", "rope_theta": 1e4}, {"rope_type": "linear", "factor": 8.0}
    assert rope_type({"rope_parameters": {"sliding_attention": plain, "full_attention": scaled}}) == "linear"
    assert rope_type({"rope_parameters": {"sliding_attention": plain, "full_attention": plain}}) == "default"


def test_another_default_is_another_model(tmp_path: Path) -> None:
    """A release of transformers may change it; a lock of an older release of packager does not say it."""
    locked = describe(written("llava", tmp_path, "max_position_embeddings")[0], None)
    assert list(description_differences(locked, locked)) == []
    other = locked.model_copy(update={"resolved": {**(locked.resolved or {}), "max_position_embeddings": 4096}})
    (difference,) = description_differences(locked, other)
    assert difference == "the default of max_position_embeddings is 4096, in the lock 2048"
    older = locked.model_copy(update={"resolved": None})
    assert list(description_differences(older, other)) == []
    assert architecture_of(older, "").max_position_embeddings is None
