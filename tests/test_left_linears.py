"""Linears that stay as they are: the recipe's patterns, and the words with which config.json tells runtimes of them.

The runtimes' own rules are written here once more, from their sources, and asked about every linear of every block.
"""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from packager.cli.plan_view import left_lines
from packager.errors import RecipeError
from packager.model.architecture import Architecture, BlockKind
from packager.model.checkpoint import PORTABLE_KEYS, block_keys, checkpoint_tensors
from packager.model.compatibility import Verdict, verdicts
from packager.model.lock import LockedGroup
from packager.model.runtime_architectures import TRANSFORMERS_FAILS
from packager.pipeline.branch_files import BranchNames, portable_config, quantization_config
from packager.pipeline.plan import make_plan
from packager.prove.audit import audit
from packager.prove.audit.config import Declared
from packager.recipe.file import RecipeFile
from tests.known_models import known_architecture
from tests.recipe_fixtures import GOOD, write_files
from tests.test_known_models import tiny_config, variant
from tests.tiny_recipe import build, workspace, write_all

ARCHITECTURE = known_architecture(tiny_config(num_hidden_layers=12), "config.json")
MODULES = tuple(module for group in ARCHITECTURE.kinds[0].groups for module in group.modules)
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}  # vLLM's llama.py


def optimum_quantizes(section: dict[str, Any], linear: str) -> bool:
    """Repeat optimum/gptq/quantizer.py, `convert_model`: the linears below the blocks, chosen by how names end."""
    blocks = section.get("block_name_to_quantize") or optimum_finds([linear])
    names = section.get("modules_in_block_to_quantize")
    kept = names is None or any(linear.endswith(name) for name in chain.from_iterable(names))
    return linear.startswith(blocks) and kept


def optimum_finds(modules: Sequence[str]) -> str:
    """Repeat optimum/gptq/utils.py, `get_block_name_with_pattern`, of optimum 1.24."""
    patterns = ("transformer.h", "model.decoder.layers", "gpt_neox.layers", "model.layers")
    return next(pattern for pattern in patterns if any(name.startswith(pattern) for name in modules))


def dynamic_leaves(section: dict[str, Any], linear: str) -> bool:
    """Repeat GPTQModel's `_resolve_dynamic_override`, and vLLM's and SGLang's `get_dynamic_override`."""
    for pattern in section.get("dynamic", {}):
        if re.match(pattern.removeprefix("-:").removeprefix("+:"), linear):
            return bool(pattern.startswith("-:"))
    return False


def vllm_quantizes(section: dict[str, Any], linear: str) -> bool:
    """Repeat vLLM's `get_linear_quant_method` and `is_layer_gptq_quantized`; a key that is absent is made from files.

    Raises:
        ValueError: some parts of a fused linear are quantized, some are not.
    """
    if dynamic_leaves(section, linear):
        return False
    names = list(chain.from_iterable(section.get("modules_in_block_to_quantize", [[""]])))
    parent, _, last = linear.rpartition(".")
    found = {any(name in f"{parent}.{part}" for name in names) for part in FUSED.get(last, (last,))}
    if len(found) == 2:
        raise ValueError(linear)
    return found == {True}


def all_linears(architecture: Architecture) -> Iterator[tuple[str, bool]]:
    """Yield the full name of each linear of each block, and whether it is quantized."""
    for kind in architecture.kinds:
        for block in kind.blocks:
            for group in kind.groups:
                for module in group.modules:
                    yield f"{architecture.blocks_path}.{block}.{module}", True
            for module in kind.left:
                yield f"{architecture.blocks_path}.{block}.{module}", False


def split(architecture: Architecture, left: dict[str, set[str]]) -> Architecture:
    """Return the architecture with even and odd blocks as two kinds, each with its own linears left."""
    (kind,) = architecture.kinds
    kinds = list[BlockKind]()
    for name, blocks in (("even", kind.blocks[::2]), ("odd", kind.blocks[1::2])):
        kinds += replace(architecture, kinds=(replace(kind, blocks=blocks),)).leaving(sorted(left[name])).kinds
    return replace(architecture, kinds=tuple(kinds))


def verdict(architecture: Architecture, loader: str) -> Verdict:
    (found,) = [each for each in verdicts(variant(group_size=32), architecture) if each.loader == loader]
    return found


@given(left=st.fixed_dictionaries({name: st.sets(st.sampled_from(MODULES), max_size=6) for name in ("even", "odd")}))
def test_every_runtime_leaves_exactly_what_is_left(left: dict[str, set[str]]) -> None:
    architecture = split(ARCHITECTURE, left)
    section = block_keys(architecture)
    assert bool(section) is bool(left["even"] | left["odd"])
    for linear, quantized in all_linears(architecture):
        assert optimum_quantizes(section, linear) is quantized
        assert dynamic_leaves(section, linear) is not quantized
    partial = any(
        0 < len(left[name] & {f"{parent}.{part}" for part in parts}) < len(parts)
        for name in left
        for parent, parts in (("self_attn", FUSED["qkv_proj"]), ("mlp", FUSED["gate_up_proj"]))
    )
    for loader in ("vllm", "sglang"):
        assert ("as one linear" in verdict(architecture, loader).reason) is partial
    if not partial:
        for kind in architecture.kinds:
            for block in kind.blocks:
                for parent, name in (("self_attn", "qkv_proj"), ("mlp", "gate_up_proj")):
                    linear = f"{architecture.blocks_path}.{block}.{parent}.{name}"
                    quantized = f"{parent}.{FUSED[name][0]}" not in kind.left
                    assert vllm_quantizes(section, linear) is quantized
                    assert dynamic_leaves(section, linear) is not quantized  # what SGLang asks


def renamed(architecture: Architecture, names: dict[str, str]) -> Architecture:
    """Return the architecture with modules of its blocks called otherwise."""

    def of_group(group: LockedGroup) -> LockedGroup:
        linears = (each.model_copy(update={"module": names.get(each.module, each.module)}) for each in group.linears)
        return group.model_copy(update={"linears": tuple(linears)})

    kinds = (replace(kind, groups=tuple(map(of_group, kind.groups))) for kind in architecture.kinds)
    return replace(architecture, kinds=tuple(kinds))


@pytest.mark.parametrize("name", ["shared.mlp.up_proj", "xmlp.up_proj"], ids=["after a dot", "in the middle of a word"])
def test_a_left_name_that_ends_like_a_kept_one_is_not_taken_for_it(name: str) -> None:
    architecture = renamed(ARCHITECTURE, {"mlp.down_proj": name}).leaving([name])
    section = block_keys(architecture)
    for linear, quantized in all_linears(architecture):
        assert optimum_quantizes(section, linear) is quantized


def test_names_inside_the_block_are_enough_where_blocks_are_alike() -> None:
    section = block_keys(ARCHITECTURE.leaving(["*.down_proj"]))
    assert section == {
        "dynamic": {r"-:^model\.layers\.\d+\.mlp\.down_proj$": {}},
        "modules_in_block_to_quantize": [
            ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
            ["self_attn.o_proj"],
            ["mlp.gate_proj", "mlp.up_proj"],
        ],
    }


@pytest.mark.parametrize(
    "path", ["model.layers", "transformer.h", "gpt_neox.layers", "model.decoder.layers", "backbone.layers", "layers"]
)
def test_blocks_in_a_place_that_transformers_does_not_know_are_named(path: str) -> None:
    section = block_keys(replace(ARCHITECTURE, blocks_path=path))
    found = section.get("block_name_to_quantize") or optimum_finds([f"{path}.0.mlp.up_proj"])
    assert found == path
    assert section.keys() <= {"block_name_to_quantize"}


def test_the_old_runtimes_take_no_model_with_left_linears() -> None:
    architecture = ARCHITECTURE.leaving(["mlp.down_proj"])
    refused = {"autogptq", "exllama", "exllamav2", "gptq-for-llama"}
    for loader in refused:
        assert "mlp.down_proj is not" in verdict(architecture, loader).reason
        assert not verdict(architecture, loader).can_load
    assert verdict(architecture, "transformers").can_load


def of_type(model_type: str, module: str) -> Architecture:
    return replace(renamed(ARCHITECTURE, {"mlp.down_proj": module}), model_type=model_type)


@pytest.mark.parametrize(
    ("model_type", "module", "reason"),
    [
        ("gpt2", "attn.c_proj", "initializes c_proj.weight when it loads"),
        ("falcon", "mlp.dense_4h_to_h", "does not replace dense_4h_to_h, whose class is not nn.Linear"),
        ("ctrl", "ffn.2", "does not replace ffn.2, because its name is a number"),
    ],
)
def test_transformers_opens_only_what_it_can_replace(model_type: str, module: str, reason: str) -> None:
    architecture = of_type(model_type, module)
    assert reason in verdict(architecture, "transformers").reason
    assert not verdict(architecture, "transformers").can_load
    assert verdict(architecture.leaving([module]), "transformers").can_load


@pytest.mark.parametrize("model_type", TRANSFORMERS_FAILS)
def test_transformers_own_source_shows_why_it_fails(model_type: str) -> None:
    """`_init_weights` names each of these linears, or the model has a class of linears of its own."""
    folder = Path(transformers.models.__path__[0]) / model_type
    source = (folder / f"modeling_{model_type}.py").read_text()
    for name in TRANSFORMERS_FAILS[model_type][0]:
        own = re.search(rf"self\.{name} = (?!nn\.)\w+Linear\(", source)
        assert own or re.search(rf"init\.\w+\(\s*module\.{name}\.weight", source), name


def test_what_is_left_keeps_its_tensors_and_leaves_its_group() -> None:
    architecture = ARCHITECTURE.leaving(["*.k_proj", "*.v_proj", "mlp.*"])
    (kind,) = architecture.kinds
    assert [group.modules for group in kind.groups] == [("self_attn.q_proj",), ("self_attn.o_proj",)]
    shapes = {linear.module: linear.out_features for linear in architecture.linears}
    assert [group.out_features for group in kind.groups] == [shapes["self_attn.q_proj"], shapes["self_attn.o_proj"]]
    assert kind.left == {
        "self_attn.k_proj": "the recipe skips *.k_proj",
        "self_attn.v_proj": "the recipe skips *.v_proj",
        **{f"mlp.{name}": "the recipe skips mlp.*" for name in ("gate_proj", "up_proj", "down_proj")},
    }
    names = {tensor.name for tensor in checkpoint_tensors(architecture, variant(group_size=32))}
    assert "model.layers.0.mlp.up_proj.weight" in names
    assert "model.layers.0.mlp.up_proj.qweight" not in names
    assert "model.layers.0.self_attn.q_proj.qweight" in names
    assert left_lines(architecture) == [
        "Not quantized, because the recipe skips *.k_proj: self_attn.k_proj.",
        "Not quantized, because the recipe skips *.v_proj: self_attn.v_proj.",
        "Not quantized, because the recipe skips mlp.*: mlp.gate_proj, mlp.up_proj, mlp.down_proj.",
    ]


def test_a_model_without_left_linears_has_the_keys_of_before() -> None:
    assert quantization_config(variant(group_size=32), ARCHITECTURE).keys() == {
        "quant_method", "bits", "group_size", "damp_percent", "desc_act", "sym", "true_sequential", "static_groups",
        "checkpoint_format", "lm_head",
    }  # fmt: skip
    names = BranchNames(repository="a/b", weights_name="model")
    assert portable_config(variant(group_size=32), ARCHITECTURE, names).keys() == {*PORTABLE_KEYS}


def test_an_audit_reads_from_config_json_what_is_left() -> None:
    declared = Declared(quantized=frozenset({"mlp.up_proj", "model.layers.1.mlp.gate_proj"}))
    assert not declared.leaves("model.layers.0.mlp.up_proj")
    assert not declared.leaves("model.layers.1.mlp.gate_proj")
    assert declared.leaves("model.layers.0.mlp.gate_proj")
    assert not Declared().leaves("model.layers.0.mlp.gate_proj")


def recipe_with(folder: Path, text: str, *, group_size: int = 128) -> Path:
    """Write a recipe that requires no loader: AutoGPTQ takes no model with left linears."""
    if not folder.is_dir():
        folder.mkdir()
    write_files(folder)
    path = folder / "recipe.yaml"
    good = GOOD.replace("required: [autogptq]", "required: []").replace("group_size: 128", f"group_size: {group_size}")
    path.write_text(good + text)
    return path


def test_a_pattern_that_fits_no_module_is_an_error_at_its_line(tmp_path: Path) -> None:
    path = recipe_with(tmp_path, "quantize:\n  skip:\n    - mlp.down_proj\n    - '*.q_porj'\n")
    line = path.read_text().splitlines().index("    - '*.q_porj'") + 1
    with pytest.raises(RecipeError) as caught:
        RecipeFile.load(path)
    (problem,) = caught.value.problems
    assert problem.where == f"{path}:{line}:7"
    assert problem.message == "quantize.skip: '*.q_porj' fits no module of the base model's blocks"
    assert "self_attn.q_proj" in problem.hint


def test_a_recipe_that_skips_everything_is_refused(tmp_path: Path) -> None:
    path = recipe_with(tmp_path, "quantize: {skip: ['mlp.*', 'self_attn.*']}\n")
    with pytest.raises(RecipeError) as caught:
        RecipeFile.load(path)
    assert [problem.message for problem in caught.value.problems] == ["quantize.skip leaves no linear to quantize"]


def test_patterns_are_a_part_of_the_digest_and_their_order_is_not(tmp_path: Path) -> None:
    def digests(name: str, text: str) -> list[str]:
        plan = make_plan(RecipeFile.load(recipe_with(tmp_path / name, text)))
        return [planned.digest for planned in plan.variants]

    none = digests("none", "")
    one = digests("one", "quantize: {skip: ['*.down_proj']}\n")
    two = digests("two", "quantize: {skip: ['*.o_proj', '*.down_proj']}\n")
    assert digests("empty", "quantize: {skip: []}\n") == none
    assert digests("other order", "quantize: {skip: ['*.down_proj', '*.o_proj']}\n") == two
    assert len({*none, *one, *two}) == 6


def test_sizes_are_compared_with_the_linears_that_are_quantized(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="one problem") as caught:
        RecipeFile.load(recipe_with(tmp_path / "all", "", group_size=256))
    assert "down_proj" in caught.value.problems[0].message
    path = recipe_with(tmp_path / "skipped", "quantize: {skip: ['*.down_proj']}\n", group_size=256)
    assert list(RecipeFile.load(path).architecture.left) == ["mlp.down_proj"]


@pytest.mark.slow
def test_a_branch_with_left_linears_says_so_wherever_it_is_read(tmp_path: Path) -> None:
    """In config.json, provenance.json and on the card; the weights are the base model's; a foreign audit is content."""
    path = write_all(tmp_path, {"variants": [{"branch": "main"}], "quantize.skip": ["*.down_proj"]})
    (receipt,) = build(path, tmp_path / "dist").receipts
    reason = "the recipe skips *.down_proj"
    assert receipt.provenance.not_quantized == {"mlp.down_proj": reason}
    folder = workspace(tmp_path / "dist").folder("main")
    assert json.loads((folder / "provenance.json").read_text())["not_quantized"] == {"mlp.down_proj": reason}
    card = (folder / "README.md").read_text().replace("\\", "")
    assert f"* Left as in the base model: `mlp.down_proj` ({reason})." in card
    section = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert list(section["dynamic"]) == [r"-:^model\.layers\.\d+\.mlp\.down_proj$"]
    portable = json.loads((folder / "quantize_config.json").read_text())
    assert portable["dynamic"] == section["dynamic"], "GPTQModel reads this file first"
    name = "model.layers.0.mlp.down_proj.weight"
    assert torch.equal(
        load_file(folder / "model.safetensors")[name], load_file(tmp_path / "model" / "model.safetensors")[name]
    )
    assert not [finding for finding in audit(folder, complete=True).findings if finding.severity == "error"]
    assert not any(record.name.endswith("down_proj") for record in receipt.provenance.linears)
