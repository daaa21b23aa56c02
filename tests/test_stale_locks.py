"""Locks that no longer say what transformers says of the model: a build neither follows nor ignores them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from packager.errors import PlanError, SourceError
from packager.pipeline.build_state import BuildState
from packager.pipeline.plan import make_plan
from packager.recipe.file import RecipeFile
from packager.recipe.lock_file import lock_path
from packager.system.terminal import Terminal
from tests.tiny_recipe import build, options, write_all

Json = dict[str, Any]


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    return write_all(tmp_path)


def change_model(recipe: Path, change: Callable[[Json], object]) -> None:
    path = lock_path(recipe)
    lock = json.loads(path.read_text())
    change(lock["model"])
    path.write_text(json.dumps(lock))


def leave_down_proj(model: Json) -> None:
    (kind,) = model["kinds"]
    del kind["groups"][-1]
    kind["left"]["mlp.down_proj"] = "it is left"


def forget_down_proj(model: Json) -> None:
    del model["kinds"][0]["groups"][-1]


def leave_a_norm(model: Json) -> None:
    model["kinds"][0]["left"]["input_layernorm"] = "it is a norm"


def swap_stored_names(model: Json) -> None:
    _, first, second = model["kinds"][0]["groups"][0]["linears"]
    first["stored"], second["stored"] = second["stored"], first["stored"]


def part_a_group(model: Json) -> None:
    groups = model["kinds"][0]["groups"]
    first, second = groups[2]["linears"]
    groups[2:3] = [{**groups[2], "linears": [first]}, {**groups[2], "linears": [second]}]


def rename_the_list(model: Json) -> None:
    model["blocks_path"] = "model.blocks"


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (leave_down_proj, "block 0 mlp.down_proj is"),
        (forget_down_proj, "block 0 mlp.down_proj is"),
        (leave_a_norm, "block 0 input_layernorm is not there, in the lock not quantized"),
        (swap_stored_names, "block 0 self_attn.k_proj is model.layers.0.self_attn.k_proj of"),
        (part_a_group, "block 0 mlp.up_proj is"),
        (lambda model: model.update(hidden_size=32), "the width of the blocks is 64, in the lock 32"),
        (rename_the_list, "the list of blocks is model.layers, in the lock model.blocks"),
    ],
)
def test_a_lock_that_was_edited_ends_the_build(
    recipe: Path, tmp_path: Path, change: Callable[[Json], object], why: str
) -> None:
    change_model(recipe, change)
    with pytest.raises(SourceError, match="in another way than the lock describes") as caught:
        build(recipe, tmp_path / "dist")
    assert why in caught.value.why
    assert not list((tmp_path / "dist").rglob("*.safetensors"))


def test_a_lock_without_a_linear_plans_nothing(recipe: Path) -> None:
    change_model(recipe, lambda model: model["kinds"][0].update(groups=[]))
    with pytest.raises(PlanError, match="no weight of the model can be quantized"):
        make_plan(RecipeFile.load(recipe))


def test_another_lock_makes_the_built_files_outdated(recipe: Path, tmp_path: Path) -> None:
    """Of a model on the Hub, too, whose files are identified by the commit alone."""

    def digests() -> list[str]:
        state = BuildState(RecipeFile.load(recipe), options(tmp_path / "dist"), Terminal(quiet=True))
        return [plan.digest for plan in state.plan.variants]

    before = digests()
    change_model(recipe, lambda model: model["kinds"][0].update(peak_bytes=1))
    assert digests() == before  # no byte of the result depends on it
    change_model(recipe, leave_down_proj)
    assert not set(digests()) & set(before)
