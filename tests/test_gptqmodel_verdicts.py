"""What `plan` predicts of GPTQModel's two ways to open a checkpoint: its own loader, and transformers with it."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from packager.model.architecture import Architecture
from packager.model.compatibility import Verdict, verdicts
from packager.model.lock import LockedExperts
from packager.model.runtime_architectures import GPTQMODEL_DROPS, GPTQMODEL_FAILS, GPTQMODEL_OPENS
from packager.prove.environments import environment_name
from packager.prove.loaders import LOADERS
from tests.known_models import known_architecture
from tests.test_known_models import tiny_config, variant

DENSE = known_architecture(tiny_config(), "config.json")


def with_experts(model_type: str) -> Architecture:
    """Return an architecture whose feed-forward linears are those of one expert."""
    experts = LockedExperts(parameter="mlp.experts.gate_up_proj", count=1, top_k=1, per_token=True)
    groups = [
        group.model_copy(update={"experts": experts}) if "mlp" in group.linears[0].module else group
        for group in with_linears(lambda name: name.replace("mlp", "mlp.experts.{expert}")).kinds[0].groups
    ]
    return replace(DENSE, model_type=model_type, kinds=(replace(DENSE.kinds[0], groups=tuple(groups)),))


def with_linears(stored: Callable[[str], str], module: Callable[[str], str] | None = None) -> Architecture:
    """Return an architecture whose linears have other names in files and, by default alike, in the model."""
    groups = []
    for group in DENSE.kinds[0].groups:
        linears = (
            each.model_copy(update={"stored": stored(each.stored), "module": (module or stored)(each.module)})
            for each in group.linears
        )
        groups.append(group.model_copy(update={"linears": tuple(linears)}))
    return replace(DENSE, kinds=(replace(DENSE.kinds[0], groups=tuple(groups)),))


def verdict(loader: str, architecture: Architecture = DENSE, **parameters: Any) -> Verdict:
    made = verdicts(variant(**{"group_size": 32, **parameters}), architecture)
    return next(each for each in made if each.loader == loader)


def test_quantized_experts_are_for_gptqmodel_s_own_loader_only() -> None:
    own = verdict("gptqmodel", with_experts("qwen3_moe"))
    assert (own.can_load, own.reason) == (True, "computes in float16 or bfloat16")
    other = verdict("transformers", with_experts("qwen3_moe"))
    assert (other.can_load, other.reason) == (False, "computes with random experts in place of the quantized ones")


def test_gptqmodel_reads_experts_or_dense_blocks_of_qwen_but_not_both() -> None:
    found = verdict("gptqmodel", replace(DENSE, model_type="qwen3_moe"))
    assert (found.can_load, found.reason) == (False, "keeps a random mlp.gate_proj in place of the quantized one")


def test_gptqmodel_opens_no_model_whose_experts_are_left() -> None:
    kind = replace(DENSE.kinds[0], left={"mlp.experts": "the recipe skips mlp.experts"})
    found = verdict("gptqmodel", replace(DENSE, kinds=(kind,)))
    assert (found.can_load, found.reason) == (False, "looks for quantized experts, mlp.experts is not quantized")


def test_gptqmodel_looks_for_the_names_that_transformers_gives() -> None:
    """Published Mixtrals call `mlp` `block_sparse_moe`: transformers renames it, GPTQModel does not."""
    architecture = with_linears(lambda name: name.replace(".mlp.", ".block_sparse_moe."), str)
    found = verdict("gptqmodel", architecture)
    assert found == Verdict(
        loader="gptqmodel",
        can_load=False,
        reason="looks for model.layers.0.mlp.gate_proj, stored is model.layers.0.block_sparse_moe.gate_proj",
    )
    assert verdict("transformers", architecture).can_load


@pytest.mark.parametrize(
    ("loader", "parameters", "reason"),
    [
        ("gptqmodel", {}, ""),
        ("gptqmodel", {"bits": 3}, ""),
        ("gptqmodel", {"group_size": -1}, ""),
        ("gptqmodel", {"sym": False}, "reads asymmetric checkpoints only if GPTQModel made them"),
        ("gptqmodel", {"group_size": 8}, "reads group sizes -1, 16, 32, 64, 128, 256, 512, 1024 only"),
        ("transformers", {"sym": False}, ""),
        ("transformers", {"group_size": 8}, "reads group sizes -1, 16, 32, 64, 128, 256, 512, 1024 only"),
    ],
)
def test_what_each_of_the_two_refuses(loader: str, parameters: dict[str, Any], reason: str) -> None:
    found = verdict(loader, **parameters)
    assert found.can_load is (not reason)
    assert not reason or found.reason == reason


def test_a_type_that_was_not_run_is_not_promised() -> None:
    found = verdict("gptqmodel", replace(DENSE, model_type="granite_of_tomorrow"))
    assert (found.can_load, found.reason) == (False, "is not proven with granite_of_tomorrow")


def test_the_lists_of_what_was_run_do_not_overlap() -> None:
    assert not GPTQMODEL_OPENS & GPTQMODEL_FAILS.keys()
    assert GPTQMODEL_DROPS.keys() <= GPTQMODEL_OPENS


def test_both_loaders_have_one_environment() -> None:
    own, other = LOADERS["gptqmodel"], LOADERS["transformers"]
    assert own.requirements == other.requirements
    assert environment_name(own) == environment_name(other)
    assert own.script != other.script
