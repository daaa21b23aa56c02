"""A published config.json says the rotary embedding so that old and new runtimes read the same."""

from collections.abc import Mapping
from typing import Any

import pytest

from packager.rope import in_both_spellings, misread, rope_type
from tests.test_architecture import tiny_config

LLAMA3 = {"factor": 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 8192}


@pytest.mark.parametrize(
    ("given", "added"),
    [
        ({}, {}),
        ({"rope_theta": 5e5}, {}),
        ({"rope_theta": 5e5, "rope_scaling": None}, {}),
        ({"rope_scaling": {**LLAMA3, "rope_type": "llama3"}, "rope_theta": 5e5}, {}),
        # transformers 5 takes rope_scaling where both are
        ({"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {"rope_theta": 5e5}}, {}),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}, {"rope_theta": 1e6}),
        ({"rope_parameters": {"rope_type": "default"}}, {"rope_theta": 10000.0}),
        ({"rope_parameters": {"rope_type": "default"}, "rope_theta": 5e5}, {"rope_theta": 5e5}),
        ({"rope_parameters": {"rope_theta": 1e6}, "rope_theta": 5e5}, {"rope_theta": 1e6}),
        ({"rope_parameters": {"rope_theta": 1e6}, "rope_scaling": None}, {"rope_theta": 1e6}),
        (
            {"rope_parameters": {**LLAMA3, "rope_type": "llama3", "rope_theta": 5e5}},
            {"rope_theta": 5e5, "rope_scaling": {**LLAMA3, "rope_type": "llama3"}},
        ),
        (
            {"rope_parameters": {"rope_type": "linear", "factor": 4, "rope_theta": 5e5}},
            {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 4.0}},
        ),
    ],
)
def test_what_only_transformers_5_would_read_is_said_the_old_way_too(
    given: Mapping[str, Any], added: Mapping[str, Any]
) -> None:
    config = tiny_config(**given)
    found = in_both_spellings(config)
    assert found == {**config, **added}
    assert rope_type(found) == rope_type(config)
    assert not misread(found)
    assert misread(config) == any(config.get(key, {"rope_theta": 10000.0}.get(key)) != added[key] for key in added)
    pytest.importorskip("transformers")
    # And transformers 5 itself reads the same.
    assert rope_as_read(found) == rope_as_read(config)


def rope_as_read(config: Mapping[str, Any]) -> dict[str, Any]:
    from transformers import LlamaConfig

    read = dict(LlamaConfig(**config).rope_parameters)
    assert read.pop("type", read["rope_type"]) == read["rope_type"]
    return read
