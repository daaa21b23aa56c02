"""A published config.json describes the rotary embedding so that old and new runtimes read the same."""

from collections.abc import Mapping
from typing import Any

import pytest

from packager.model.rope import is_old_scaling, misread, rope_factor, rope_type, spelled_for_all
from tests.test_known_models import tiny_config

LLAMA3 = {"factor": 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 8192}


def in_both_spellings(config: Mapping[str, Any]) -> dict[str, Any]:
    return {**config, **spelled_for_all(config)}


@pytest.mark.parametrize(
    ("given", "added"),
    [
        ({}, {}),
        ({"rope_theta": 5e5}, {}),
        ({"rope_theta": 5e5, "rope_scaling": None}, {}),
        ({"rope_scaling": {**LLAMA3, "rope_type": "llama3"}, "rope_theta": 5e5}, {}),
        # transformers 5 takes rope_scaling where both are
        ({"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {"rope_theta": 5e5}}, {}),
        (
            {
                "rope_parameters": {
                    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
                }
            },
            {},
        ),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}, {"rope_theta": 1e6}),
        ({"rope_parameters": {"rope_type": "default"}}, {}),
        ({"rope_parameters": {"rope_type": "default"}, "rope_theta": 5e5}, {}),
        ({"rope_parameters": {"rope_type": None, "rope_theta": 5e5}}, {"rope_theta": 5e5}),
        ({"rope_scaling": {**LLAMA3, "rope_type": "llama3", "rope_theta": 5e5}}, {"rope_theta": 5e5}),
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
        # transformers 4.40 refuses a linear or dynamic one in any other form
        *(
            ({"rope_scaling": {**given, "factor": 2.0}}, {"rope_scaling": {"type": kind, "factor": 2.0}})
            for kind in ("linear", "dynamic")
            for given in ({"rope_type": kind}, {"type": kind, "rope_type": kind})
        ),
        ({"rope_scaling": {"type": "dynamic", "factor": 2}}, {"rope_scaling": {"type": "dynamic", "factor": 2.0}}),
    ],
)
def test_rope_parameters_are_also_written_in_the_old_spelling(
    given: Mapping[str, Any], added: Mapping[str, Any]
) -> None:
    config = tiny_config(**given)
    found = in_both_spellings(config)
    assert found == {**config, **added}
    assert rope_type(found) == rope_type(config)
    assert not misread(found)
    assert misread(config) == bool(added)
    pytest.importorskip("transformers")
    # And transformers 5 itself reads the same.
    assert rope_as_read(found) == rope_as_read(config)


def rope_as_read(config: Mapping[str, Any]) -> dict[str, Any]:
    from transformers import LlamaConfig

    parameters = LlamaConfig(**config).rope_parameters
    assert parameters is not None
    read: dict[str, Any] = {**parameters}
    assert read.pop("type", read["rope_type"]) == read["rope_type"]
    return read


@pytest.mark.parametrize("factor", [10**400, float("inf"), float("nan"), True, "4", None, [4]])
@pytest.mark.parametrize("key", ["rope_parameters", "rope_scaling"])
def test_a_factor_that_is_no_number_raises_no_error(key: str, factor: object) -> None:
    rope: dict[str, Any] = {key: {"rope_type": "linear", "factor": factor, "rope_theta": 5e5}}
    config = tiny_config(**rope)
    assert rope_factor(config) is None
    found: Mapping[str, Any] = in_both_spellings(config)
    assert found["rope_theta"] == 5e5
    assert found["rope_scaling"]["factor"] is factor
    assert found["rope_scaling"]["rope_type"] == "linear"


def test_rope_scaling_keeps_further_fields() -> None:
    rope = {"rope_type": "linear", "factor": 2.0, "partial_rotary_factor": 0.5, "rope_theta": 5e5}
    found = in_both_spellings(tiny_config(rope_parameters=rope))
    assert found["rope_scaling"] == {"rope_type": "linear", "factor": 2.0, "partial_rotary_factor": 0.5}


@pytest.mark.parametrize(
    ("rope", "takes"),
    [
        ({"rope_type": "linear", "factor": 2}, True),
        ({"rope_type": "linear", "factor": 1.0}, False),
        ({"type": "dynamic", "factor": 4.0, "partial_rotary_factor": 0.5}, False),
        ({"type": "yarn", "factor": 4.0}, False),
    ],
)
def test_what_transformers_4_takes_is_known(rope: Mapping[str, Any], takes: bool) -> None:
    assert is_old_scaling(tiny_config(rope_scaling=rope)) is takes
