"""Variants: their names, their parameters, and the act order in both spellings."""

from typing import Any, get_args

import pytest
from pydantic import ValidationError

from packager.pipeline.branch_files import BranchNames, portable_config, quantization_config
from packager.recipe import Defaults, VariantEntry, expand
from packager.variant import ActOrder, branch_name, parsed_branch_name, recorded_act_order
from tests.card_fixtures import llama_recipe
from tests.known_models import known_architecture
from tests.test_known_models import tiny_config, variant

ORDERS: tuple[ActOrder, ...] = get_args(ActOrder)


@pytest.mark.parametrize(
    ("defaults", "entry", "expected"),
    [
        ({}, {}, "static"),
        ({}, {"engine": "auto-gptq"}, "none"),
        ({"engine": "auto-gptq"}, {}, "none"),
        ({"engine": "auto-gptq"}, {"engine": "native"}, "static"),
        ({}, {"desc_act": True}, "full"),
        ({}, {"desc_act": False}, "none"),
        ({}, {"act_order": "group"}, "group"),
        ({"desc_act": True}, {}, "full"),
        ({"act_order": "static"}, {}, "static"),
        # A variant's own spelling stands before the defaults', whichever each of them uses.
        ({"act_order": "static"}, {"desc_act": True}, "full"),
        ({"act_order": "static"}, {"desc_act": False}, "none"),
        ({"desc_act": True}, {"act_order": "static"}, "static"),
        ({"desc_act": True}, {"act_order": "none"}, "none"),
        ({"act_order": "full", "desc_act": True}, {"act_order": "none", "desc_act": False}, "none"),
    ],
)
def test_the_act_order_has_two_spellings(defaults: dict[str, Any], entry: dict[str, Any], expected: str) -> None:
    made = expand(VariantEntry.model_validate(entry), Defaults.model_validate(defaults))
    assert made.act_order == expected
    assert made.desc_act is (expected == "full")
    assert made.branch == branch_name(bits=4, group_size=128, act_order=made.act_order)


@pytest.mark.parametrize("model", [Defaults, VariantEntry])
@pytest.mark.parametrize(
    ("act_order", "desc_act"), [("none", True), ("static", True), ("group", False), ("full", False)]
)
def test_spellings_that_contradict_each_other_are_refused(model: Any, act_order: str, desc_act: bool) -> None:
    with pytest.raises(ValidationError, match=f"act_order: {act_order} contradicts desc_act: {str(desc_act).lower()}"):
        model.model_validate({"act_order": act_order, "desc_act": desc_act})


def test_the_conventional_names_stay_and_the_others_say_their_order() -> None:
    assert [branch_name(bits=4, group_size=32, act_order=order) for order in ORDERS] == [
        "gptq-4bit-32g-actorder_False",
        "gptq-4bit-32g-actorder_group",
        "gptq-4bit-32g-actorder_static",
        "gptq-4bit-32g-actorder_True",
    ]
    for order in ORDERS:
        assert parsed_branch_name(branch_name(bits=3, group_size=-1, act_order=order)) == (3, -1, order)
    for name in ("main", "gptq-4bit-32g-actorder_none", "gptq-4bit-32g-actorder_static2", "gptq-4bit-32g"):
        assert parsed_branch_name(name) is None


@pytest.mark.parametrize("order", ORDERS)
def test_a_record_has_the_act_order_and_the_desc_act_of_the_configs(order: ActOrder) -> None:
    parameters = variant(act_order=order).parameters()
    assert parameters["act_order"] == recorded_act_order(parameters) == order
    assert parameters["desc_act"] is (order == "full")
    assert "branch" not in parameters


@pytest.mark.parametrize("order", ORDERS)
def test_the_configs_say_desc_act_where_groups_are_scattered_and_static_groups_where_grids_were_fixed(
    order: ActOrder,
) -> None:
    architecture = known_architecture(tiny_config(), "config.json")
    names = BranchNames(repository="tester/tiny-GPTQ", weights_name="model")
    config = quantization_config(variant(act_order=order), architecture)
    assert (config["desc_act"], config["static_groups"]) == (order == "full", order == "static")
    portable = portable_config(variant(act_order=order), architecture, names)
    assert portable["desc_act"] is (order == "full")
    assert "act_order" not in {*config, *portable}


def test_a_record_of_an_earlier_version_has_desc_act_alone() -> None:
    assert recorded_act_order({"desc_act": False, "static_groups": False}) == "none"
    # Static order was published as desc_act true, in a branch named actorder_True.
    assert recorded_act_order({"desc_act": True, "static_groups": True}) == "full"
    assert recorded_act_order({}) is None
    assert recorded_act_order({"desc_act": "yes"}) is None


@pytest.mark.parametrize(
    ("common", "own"),
    [({"refine": True}, {"refine": False}), ({"effort": "high"}, {"effort": "standard"}),
     ({"target_correction": 0.5}, {"target_correction": 0.0})],
    ids=str,
)  # fmt: skip
def test_what_a_variant_sets_back_to_the_default_is_part_of_the_digest(
    common: dict[str, Any], own: dict[str, Any]
) -> None:
    recipe = llama_recipe()
    defaults = recipe.defaults.model_copy(update=common)
    first, *rest = recipe.variants
    inherits = recipe.model_copy(update={"defaults": defaults})
    sets_back = inherits.model_copy(update={"variants": (first.model_copy(update=own), *rest)})
    assert len({recipe.digest(), inherits.digest(), sets_back.digest()}) == 3
