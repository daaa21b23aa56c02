"""`packager lock`: what it writes, what it refuses, and how a build compares the lock with the model."""

import json
import re
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner, Result

from packager.cli.main import app
from packager.errors import CalibrationError, MachineError, RecipeError, SourceError
from packager.inputs import describe_in_child as child
from packager.inputs import make_lock as making
from packager.inputs.base_model import open_source
from packager.inputs.describe_in_child import describe_in_child
from packager.inputs.description_check import check_description
from packager.inputs.hub_models import HubModel, remote_header
from packager.model import trace as trace_module
from packager.model.lock import Lock
from packager.model.name_patterns import names_of
from packager.model.safetensors_file import TensorInfo, read_header
from packager.pipeline.lock_recipes import lock_recipes
from packager.prove.audit import audit
from packager.recipe.file import RecipeFile
from packager.recipe.lock_file import lock_path, lock_text, read_recipe_lock
from packager.system.files import sha256_file
from tests.loopback_hub import Account, Answer, Call, LoopbackHub
from tests.publish_fixtures import log_in
from tests.recipe_fixtures import ROOT
from tests.samples import sampled
from tests.tiny_models import CONFIGS, save_model
from tests.tiny_recipe import build, save_tokenizer, workspace, write_inputs, write_recipe

pytestmark = pytest.mark.filterwarnings("ignore:Use .content=:DeprecationWarning")  # of the Hub's client
COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_lock_0123456789"  # noqa: S105 - the loopback Hub's
HUB_MODEL = {"id": "tester/tiny", "revision": COMMIT}


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["lock", *map(str, arguments)], prog_name="packager")


@pytest.fixture
def recipe(tmp_path: Path, in_process: None) -> Path:
    """A recipe with a local base model, and no lock yet."""
    path = write_recipe(write_inputs(tmp_path))
    lock_path(path).unlink()
    return path


def lock_now(recipe: Path, **options: Any) -> Lock:
    for result in lock_recipes([recipe], lambda _: None, **options):
        assert result.is_current
    return read_recipe_lock(lock_path(recipe), recipe)


def refusal(recipe: Path, **options: Any) -> SourceError:
    with pytest.raises(SourceError) as caught:
        lock_now(recipe, **options)
    assert not lock_path(recipe).exists()
    assert "packager-describe-" not in str(caught.value)  # the scratch folder of the process
    return caught.value


def configured(folder: Path, config: dict[str, Any]) -> Path:
    """Write a folder with a config.json alone, and return a recipe whose model on the Hub it is a copy of."""
    write_inputs(folder)
    (folder / "copy").mkdir()
    (folder / "copy" / "config.json").write_text(json.dumps({"torch_dtype": "float16", **config}))
    return write_recipe(folder, {"base_model": HUB_MODEL})


def refused_config(folder: Path, config: dict[str, Any]) -> SourceError:
    return refusal(configured(folder, config), copy=folder / "copy")


def change_config(recipe: Path, **values: Any) -> None:
    path = recipe.parent / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def tensors_changed(
    monkeypatch: pytest.MonkeyPatch, change: Callable[[dict[str, TensorInfo]], dict[str, TensorInfo]]
) -> None:
    """Let the model have other stored tensors than its files."""
    real = describe_in_child
    monkeypatch.setattr(
        making, "describe_in_child", lambda config, tensors, where: real(config, change(tensors or {}), where)
    )


# What is written


@pytest.mark.slow
@pytest.mark.pinned
def test_the_lock_of_the_demo_is_what_is_written_today() -> None:
    """In a process of its own, as the command does it."""
    result = run("--check", ROOT / "recipes" / "demo-llama.yaml")
    assert result.exit_code == 0, result.output


@pytest.mark.long
@pytest.mark.pinned
def test_the_lock_of_a_large_model_is_what_is_written_today(tmp_path: Path) -> None:
    llama = ROOT / "recipes" / "llama-2-13b-chat.yaml"
    config = read_recipe_lock(lock_path(llama), llama).model.config
    (tmp_path / "config.json").write_text(json.dumps(config))
    result = run("--check", "--from", tmp_path, llama)
    assert result.exit_code == 0, result.output


def test_a_lock_of_a_local_folder_plans_and_is_stable(recipe: Path) -> None:
    before = recipe.read_bytes()
    lock = lock_now(recipe)
    assert (lock.base_model.revision, lock.base_model.files, lock.datasets) == (None, {}, {})
    assert lock.made_with == {"transformers": metadata.version("transformers")}
    assert lock.chat_template_sha256 is not None
    path = lock_path(recipe)
    first, time = path.read_bytes(), path.stat().st_mtime_ns
    (result,) = lock_recipes([recipe], lambda _: None)
    assert (result.status, path.read_bytes(), path.stat().st_mtime_ns) == ("unchanged", first, time)
    assert [entry.name for entry in recipe.parent.iterdir() if entry.name.startswith(".tmp-")] == []
    assert recipe.read_bytes() == before
    assert RecipeFile.load(recipe).architecture.num_blocks == 3


@pytest.mark.slow
def test_the_command_shows_the_model_and_what_is_left(recipe: Path) -> None:
    change = {"hidden_size": 64, "intermediate_size": 100}
    config = CONFIGS["llama"]().to_diff_dict() | change
    copy = recipe.parent / "copy"
    copy.mkdir()
    (copy / "config.json").write_text(json.dumps(config))
    (copy / "generation_config.json").write_text("{}")  # no tokenizer is there all the same
    recipe = write_recipe(recipe.parent, {"base_model": HUB_MODEL})
    result = run(recipe, "--from", copy)
    assert result.exit_code == 0, result.output
    assert "LlamaForCausalLM, 3 blocks" in result.stdout
    assert "blocks 0..2    4 linears quantized in 2 groups" in result.stdout
    assert "not quantized: mlp.down_proj: its shape, 100 to 64, is no multiple of 32" in result.stdout
    assert "no digests of files" in result.stdout
    result = run(recipe, "--from", copy, "--format", "json")
    (shown,) = json.loads(result.stdout)["locks"]
    assert (shown["status"], shown["blocks"], shown["base_model"]["revision"]) == ("unchanged", 3, COMMIT)
    assert len(shown["kinds"][0]["linears"]) == 4
    assert shown["tensors"] == 30


def test_check_writes_nothing_and_shows_a_diff(recipe: Path) -> None:
    missing = run(recipe, "--check")
    assert (missing.exit_code, lock_path(recipe).exists()) == (1, False)
    assert "missing" in missing.stdout
    lock_now(recipe)
    assert run(recipe, "--check").exit_code == 0
    path = lock_path(recipe)
    edited = path.read_text().replace('"vocab_size": 128', '"vocab_size": 129', 1)
    path.write_text(edited)
    differs = run(recipe, "--check")
    assert differs.exit_code == 1
    assert '-  "vocab_size": 129,' in differs.stdout
    assert '+  "vocab_size": 128,' in differs.stdout
    assert path.read_text() == edited
    path.write_bytes(b"\xff not a lock")
    assert run(recipe, "--check").exit_code == 1
    assert run(recipe).exit_code == 0


def test_several_recipes_are_read_before_the_first_lock(recipe: Path) -> None:
    wrong = write_recipe(recipe.parent, {"base_model.revision": COMMIT}, name="wrong.yaml")
    lock_path(wrong).unlink(missing_ok=True)
    result = run(recipe, wrong)
    assert result.exit_code == 2
    assert not lock_path(recipe).exists()
    other = write_recipe(recipe.parent, {"repository": {"id": "tester/other"}}, name="other.yaml")
    assert run(recipe, other).exit_code == 0
    assert lock_path(recipe).read_bytes() == lock_path(other).read_bytes()
    with pytest.raises(RecipeError, match="one recipe"):
        list(lock_recipes([recipe, other], lambda _: None, copy=recipe.parent))


def test_without_the_build_extra_the_error_names_it(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = metadata.version

    def version(name: str) -> str:
        if name == "torch":
            raise metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(metadata, "version", version)
    with pytest.raises(MachineError, match="making a lock needs packages") as caught:
        lock_now(recipe)
    assert "gptq-packager[build]" in caught.value.hint


# What is refused


@pytest.mark.parametrize(
    ("config", "what", "why"),
    [
        ({"model_type": "t5"}, "an encoder and a decoder", "'t5'"),
        ({"model_type": "bart", "is_encoder_decoder": True}, "an encoder and a decoder", "'bart'"),
        ({"model_type": "vit"}, "not one that generates text", "'vit'"),
        ({"model_type": "nobody"}, "transformers does not know this model", "no model_type 'nobody'"),
        ({}, "config.json names no model", "model_type is null, not a name"),
        ({"model_type": ["llama"]}, "config.json names no model", 'model_type is ["llama"], not a name'),
        (
            {"model_type": "nobody", "auto_map": {"AutoConfig": "configuration_x.X"}},
            "the model brings its own code, which is not run",
            "auto_map",
        ),
        ({"model_type": "llama", "quantization_config": {"quant_method": "gptq"}}, "already quantized", '"gptq"'),
        (
            {"model_type": "llava", "text_config": {"quantization_config": {"quant_method": "awq"}}},
            "already quantized",
            '"awq"',
        ),
        ({"model_type": "llama", "num_hidden_layers": 10**9}, "too many blocks", "num_hidden_layers is 1000000000"),
        ({"model_type": "trocr", "decoder_layers": 10**9}, "too many blocks", "decoder_layers"),
        ({"model_type": "llama", "hidden_size": 64, "num_attention_heads": 7}, "", ""),
        ({"model_type": "llama", "hidden_size": "many"}, "", ""),
    ],
)
def test_a_model_that_is_no_decoder_is_refused_with_the_reason(
    tmp_path: Path, in_process: None, config: dict[str, Any], what: str, why: str
) -> None:
    error = refused_config(tmp_path, config)
    assert what in error.what
    assert why in error.why
    assert error.why
    assert error.where.startswith(str(tmp_path / "copy"))


def test_a_model_without_a_linear_that_kernels_take_is_refused_with_the_reasons(
    tmp_path: Path, in_process: None
) -> None:
    sizes = {"hidden_size": 48, "intermediate_size": 80, "num_attention_heads": 4, "num_key_value_heads": 2}
    error = refused_config(tmp_path, CONFIGS["llama"]().to_diff_dict() | sizes)
    assert error.what == "no weight of the model can be quantized"
    assert error.why.startswith("mlp.down_proj: its shape, 80 to 48, is no multiple of 32; mlp.gate_proj: its shape")
    assert error.why.endswith("and 2 more")


def test_a_model_that_computes_between_its_blocks_is_refused_with_the_block(
    recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaModel

    real = LlamaModel.forward

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        second = self.layers[1]
        if not hasattr(second, "forward_before"):
            second.forward_before = second.forward
        first = self.layers[0]
        own = LlamaDecoderLayer.__call__
        monkeypatch.setattr(
            LlamaDecoderLayer,
            "__call__",
            lambda block, states, *a, **k: own(block, states if block is first else states * 1.5, *a, **k),
        )
        try:
            return real(self, *args, **kwargs)
        finally:
            monkeypatch.setattr(LlamaDecoderLayer, "__call__", own)

    monkeypatch.setattr(LlamaModel, "forward", forward)
    monkeypatch.setattr(trace_module, "_kept", OrderedDict())  # models of this config were traced with the real forward
    error = refusal(recipe)
    assert error.what == "the model computes something between two blocks"
    assert error.where.endswith("model: model.layers.1")


def test_a_missing_shard_and_a_missing_tensor_are_named(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (recipe.parent / "model" / "model.safetensors").rename(recipe.parent / "model" / "all.safetensors")
    index = {"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors", "x": "all.safetensors"}}
    path = recipe.parent / "model" / "model.safetensors.index.json"
    path.write_text(json.dumps(index))
    error = refusal(recipe)
    assert error.what == "1 of 2 weights files are missing"
    assert error.why == "model-00001-of-00002.safetensors"
    path.unlink()
    tensors_changed(
        monkeypatch, lambda all_: {name: each for name, each in all_.items() if name != "model.norm.weight"}
    )
    error = refusal(recipe)
    assert error.what == "the weights lack tensors that the model needs"
    assert error.why == "model.norm.weight"


@pytest.mark.parametrize(
    "name", ["model.layers.1.self_attn.q_proj.bias", "model.layers.1.extra_norm.weight", "model.norm.bias"]
)
def test_tensors_that_the_model_does_not_have_are_named(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    extra = TensorInfo(name=name, dtype="F16", shape=(64,))
    tensors_changed(monkeypatch, lambda all_: {**all_, name: extra})
    error = refusal(recipe)
    assert error.what == "the weights hold tensors that the model does not have"
    assert error.why == name


@pytest.mark.parametrize(
    "name", ["model.layers.3.self_attn.q_proj.weight", "vision.blocks.0.weight", "model.layers.1.self_attn.mask"]
)
def test_tensors_of_parts_that_do_not_generate_are_kept(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Blocks that guess further tokens, the vision part of a text model, and old masks."""
    extra = TensorInfo(name=name, dtype="F16", shape=(64, 64))
    tensors_changed(monkeypatch, lambda all_: {**all_, name: extra})
    lock = lock_now(recipe)
    assert name in [each for entry in lock.model.tensors for each in names_of(entry.names)]


def test_eight_bit_weights_are_refused(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = TensorInfo(name="model.layers.0.mlp.up_proj.weight", dtype="F8_E4M3", shape=(96, 64))
    with pytest.raises(SourceError, match="already quantized") as caught:
        making._check_dtypes({info.name: info}, "here")
    assert caught.value.why == f"1 tensors are F8_E4M3, such as {info.name}"


def test_pickles_and_links_out_of_the_folder_are_refused(recipe: Path) -> None:
    weights = recipe.parent / "model" / "model.safetensors"
    weights.rename(recipe.parent / "elsewhere.safetensors")
    (recipe.parent / "model" / "pytorch_model.bin").write_bytes(b"x")
    assert "only pickles" in refusal(recipe).why
    weights.symlink_to(recipe.parent / "elsewhere.safetensors")
    assert "leads out of the folder" in refusal(recipe).why


@pytest.mark.slow
def test_limits_end_the_process_that_describes(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    config = json.loads((recipe.parent / "model" / "config.json").read_text())
    monkeypatch.setattr(child, "_CPU_S", 1)
    with pytest.raises(SourceError, match="cannot be described") as caught:
        child.describe_in_child(config, None, "here")
    assert caught.value.why == "transformers took more than 1 s of processor time"
    monkeypatch.setattr(child, "_CPU_S", 60)
    monkeypatch.setattr(child, "_MEMORY_BYTES", 24 << 20)
    with pytest.raises(SourceError) as caught:
        child.describe_in_child(config, None, "here")
    assert caught.value.where == "here"


def test_the_process_that_describes_gets_no_secret(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    environ = child._environ(tmp_path)
    assert TOKEN not in str(environ)
    assert environ["HF_HUB_OFFLINE"] == "1"


def test_a_copy_needs_a_commit_in_the_recipe(recipe: Path) -> None:
    with pytest.raises(RecipeError, match="a folder of its own"):
        lock_now(recipe, copy=recipe.parent / "model")
    recipe = write_recipe(recipe.parent, {"base_model": {"id": "tester/tiny", "revision": "main"}})
    with pytest.raises(RecipeError, match="the branch or tag main"):
        lock_now(recipe, copy=recipe.parent / "model")
    recipe = write_recipe(recipe.parent, {"base_model": HUB_MODEL})
    lock = lock_now(recipe, copy=recipe.parent / "model")
    assert (lock.base_model.revision, lock.base_model.files) == (COMMIT, {})


# The prompt


LOCKED = {"system_prompt": None, "text": "<s>[INST] {prompt} [/INST]", "added": ""}


def test_the_lock_holds_the_prompt_and_plan_compares_it(recipe: Path) -> None:
    lock_now(recipe)
    lock = read_recipe_lock(lock_path(recipe), recipe)
    assert lock.prompt is not None
    assert lock.prompt.model_dump() == LOCKED
    RecipeFile.load(recipe)
    values = json.loads(recipe.read_text())
    values["card"]["prompt_template"]["template"] = "[INST] {prompt} [/INST]"
    recipe.write_text(json.dumps(values, indent=2))
    with pytest.raises(RecipeError) as caught:
        RecipeFile.load(recipe)
    (problem,) = caught.value.problems
    assert 'card has "[INST] {prompt} [/INST]", the tokenizer renders "<s>[INST] {prompt} [/INST]"' in problem.message
    assert "card.prompt_template.template" in problem.hint
    assert ":" in problem.where


def test_another_system_prompt_needs_a_new_lock(recipe: Path) -> None:
    lock_now(recipe)
    values = json.loads(recipe.read_text())
    values["card"]["system_prompt"] = "Be brief."
    recipe.write_text(json.dumps(values, indent=2))
    with pytest.raises(RecipeError, match=r"another card\.system_prompt"):
        RecipeFile.load(recipe)
    prompt = lock_now(recipe).prompt
    assert prompt is not None
    assert prompt.system_prompt == "Be brief."


UNUSABLE: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "no tokenizer": (lambda model: (model / "tokenizer_config.json").unlink(), "has no tokenizer", "same revision"),
    "a template that fails": (
        lambda model: (model / "chat_template.jinja").write_text("{{ raise_exception('never') }}"),
        "chat template cannot be rendered", "ask the model's author",
    ),
    "no template for the prompts": (
        lambda model: (model / "chat_template.jinja").unlink(), "has no chat template", "leave out loaders.prompts",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("change", "what", "hint"), UNUSABLE.values(), ids=UNUSABLE)
def test_a_tokenizer_that_cannot_be_used_is_refused_before_the_lock(
    recipe: Path, change: Callable[[Path], object], what: str, hint: str
) -> None:
    change(recipe.parent / "model")
    with pytest.raises(CalibrationError, match=what) as caught:
        lock_now(recipe)
    assert str(recipe.parent / "model") in caught.value.where
    assert hint in caught.value.hint


# The Hub


@pytest.fixture
def hub(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackHub]:
    """A Hub that has the recipe's base model."""
    with LoopbackHub(tmp_path / "hub", tokens={TOKEN: Account("tester")}) as hub:
        log_in(hub, TOKEN, monkeypatch)
        address = huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE.replace("https://huggingface.co", hub.endpoint)
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", address)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
        huggingface_hub.HfApi().create_repo("tester/tiny")
        upload(tmp_path / "model")
        yield hub


def upload(folder: Path) -> None:
    huggingface_hub.HfApi().upload_folder(repo_id="tester/tiny", folder_path=folder)


def on_hub(recipe: Path, revision: str) -> Path:
    return write_recipe(recipe.parent, {"base_model": {"id": "tester/tiny", "revision": revision}})


@pytest.mark.slow
def test_a_branch_on_the_hub_is_resolved_and_its_files_pinned(recipe: Path, hub: LoopbackHub) -> None:
    local = lock_now(recipe)
    recipe, model = on_hub(recipe, "main"), recipe.parent / "model"
    hub.requests.clear()
    lock = lock_now(recipe)
    commit = lock.base_model.revision
    assert commit == huggingface_hub.HfApi().model_info("tester/tiny").sha
    assert (lock.base_model.requested, lock.model) == ("main", local.model)
    assert lock.chat_template_sha256 == local.chat_template_sha256
    stated = {name: record.sha256 for name, record in lock.base_model.files.items()}
    assert stated == {path.name: sha256_file(path) for path in model.iterdir() if path.suffix != ".md"}
    loaded = RecipeFile.load(recipe)
    assert loaded.recipe.base_model.revision == commit
    assert not list((recipe.parent / "cache").rglob("*.safetensors"))
    upload_changed(model)
    renewed = run(recipe, "--check")
    assert renewed.exit_code == 1
    assert str(commit) in renewed.stdout
    assert open_source(loaded, lambda _: None).record.revision == commit  # the build reads what was locked


def test_a_model_that_its_names_refuse_is_refused_before_a_file_is_downloaded(recipe: Path, hub: LoopbackHub) -> None:
    recipe = on_hub(recipe, "main")
    huggingface_hub.HfApi().delete_file("tokenizer.json", "tester/tiny")
    (recipe.parent / "model" / "tokenizer.json").rename(recipe.parent / "model" / "qwen.tiktoken")
    upload(recipe.parent / "model")
    hub.requests.clear()
    with pytest.raises(SourceError, match=r"has no tokenizer\.json") as caught:
        lock_now(recipe)
    assert "qwen.tiktoken" in caught.value.why
    assert not [request for request in hub.requests if "/resolve/" in str(request)]


def test_named_templates_of_a_model_on_the_hub_are_pinned_and_part_of_a_branch(recipe: Path, hub: LoopbackHub) -> None:
    folder = recipe.parent / "model" / "additional_chat_templates"
    folder.mkdir()
    (folder / "tool_use.jinja").write_text("TOOL {{ messages[0]['content'] }}")
    (recipe.parent / "model" / "trainer_state.json").write_text("{}")
    upload(recipe.parent / "model")
    recipe, lines = on_hub(recipe, "main"), list[str]()
    (result,) = lock_recipes([recipe], lines.append)
    assert "additional_chat_templates/tool_use.jinja" in result.lock.base_model.files
    assert "not used and not copied of the base model: .gitattributes, trainer_state.json" in lines
    source = open_source(RecipeFile.load(recipe), lambda _: None)
    assert "chat_template.jinja" not in source.files.copied
    written = json.loads(source.copied("tokenizer_config.json"))["chat_template"]
    assert [template["name"] for template in written] == ["default", "tool_use"]
    assert written[1]["template"].startswith("TOOL")
    assert any("additional_chat_templates" in change for change in result.changes)


def upload_changed(model: Path) -> None:
    path = model / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "temperature": 0.5}))
    upload(model)


def test_a_file_that_moved_on_the_hub_is_named_by_the_build(recipe: Path, hub: LoopbackHub) -> None:
    recipe = on_hub(recipe, "main")
    lock = lock_now(recipe)
    files = lock.base_model.files
    other = files["tokenizer.json"].model_copy(update={"sha256": "0" * 64})
    rest = {name: record for name, record in files.items() if name != "generation_config.json"}
    changed = lock.base_model.model_copy(update={"files": {**rest, "tokenizer.json": other}})
    lock_path(recipe).write_text(lock_text(lock.model_copy(update={"base_model": changed})))
    with pytest.raises(SourceError, match="not those that the lock was made of") as caught:
        open_source(RecipeFile.load(recipe), lambda _: None)
    assert "tokenizer.json has sha256" in caught.value.why
    assert "generation_config.json is not in the lock" in caught.value.why
    assert "packager lock" in caught.value.hint


@pytest.mark.slow
@pytest.mark.parametrize(("change", "own"), [(0.0, ()), (0.5, ("lm_head.weight",))])
def test_a_stored_head_on_the_hub_is_compared_without_a_download_of_the_weights(
    recipe: Path, hub: LoopbackHub, change: float, own: tuple[str, ...]
) -> None:
    model = save_model(recipe.parent / "model", "llama-tied")
    tensors = load_file(model / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + change
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    upload(model)
    recipe = on_hub(recipe, "main")
    assert lock_now(recipe).model.own == own
    assert not list((recipe.parent / "cache").rglob("*.safetensors"))
    assert ("lm_head.weight" in open_source(RecipeFile.load(recipe), lambda _: None).tensors) is bool(own)


@pytest.mark.parametrize("indexed", sampled([True, False], False))
def test_weights_of_another_format_are_neither_locked_nor_downloaded(
    recipe: Path, hub: LoopbackHub, indexed: bool
) -> None:
    """Mistral's repositories have every weight twice: in consolidated.safetensors, under other names."""
    model = recipe.parent / "model"
    (model / "consolidated.safetensors").write_bytes((model / "model.safetensors").read_bytes())
    weights = {"model.safetensors"}
    if indexed:
        weights = {"model-00001-of-00001.safetensors"}
        (model / "model.safetensors").rename(model / next(iter(weights)))
        index = {"weight_map": {name: next(iter(weights)) for name in read_header(model / next(iter(weights))).tensors}}
        (model / "model.safetensors.index.json").write_text(json.dumps(index))
        huggingface_hub.HfApi().delete_file("model.safetensors", "tester/tiny")
    upload(model)
    recipe = on_hub(recipe, "main")
    assert {name for name in lock_now(recipe).base_model.files if name.endswith(".safetensors")} == weights
    source = open_source(RecipeFile.load(recipe), lambda _: None)
    assert set(source.files.weights) == weights
    assert {path.name for path in (recipe.parent / "cache").rglob("*.safetensors")} == weights


DAMAGED = [b"", b"short", b"\xff" * 64, (10).to_bytes(8, "little") + b"{}        tail"]


@pytest.mark.parametrize("data", sampled(DAMAGED, DAMAGED[-1]))
def test_a_damaged_header_on_the_hub_is_one_error(recipe: Path, hub: LoopbackHub, data: bytes) -> None:
    (recipe.parent / "model" / "model.safetensors").write_bytes(data)
    upload(recipe.parent / "model")
    recipe = on_hub(recipe, "main")
    lock_path(recipe).unlink(missing_ok=True)
    error = refusal(recipe)
    assert "model.safetensors" in error.where
    assert "safetensors" in error.what


def test_a_server_that_ignores_ranges_is_understood(
    recipe: Path, hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("packager.inputs.hub_models._FIRST_BYTES", 16)
    ranges: list[str] = []

    def whole(call: Call, answer: Answer, size: int) -> Answer:
        ranges.extend(filter(None, [call.headers.get("Range")]))
        answer.length = size
        return answer

    monkeypatch.setattr("tests.loopback_hub.downloads.ranged", whole)
    monkeypatch.setattr("tests.loopback_hub.lfs.ranged", whole)
    recipe = on_hub(recipe, "main")
    assert lock_now(recipe).base_model.requested == "main"
    assert ranges[0] == "bytes=0-15"
    assert len(ranges) == 2


def test_an_endless_answer_is_read_no_further_than_the_header(monkeypatch: pytest.MonkeyPatch) -> None:
    class Endless:
        status_code = 200

        def iter_bytes(self) -> Iterator[bytes]:
            for count in range(1000):
                assert count < 100
                yield bytes(1 << 16)

    monkeypatch.setattr("huggingface_hub.utils.http_stream_backoff", lambda *_, **__: nullcontext(Endless()))
    monkeypatch.setattr("huggingface_hub.utils.hf_raise_for_status", lambda _: None)
    files: Any = {"x.safetensors": SimpleNamespace(size=10**12)}
    with pytest.raises(SourceError, match="header does not fit") as caught:
        remote_header(HubModel(id="a/b", commit=COMMIT, files=files), "x.safetensors")
    assert caught.value.where == "a/b at 0123456789ab: x.safetensors"


def test_what_is_not_there_on_the_hub_is_one_error(recipe: Path, hub: LoopbackHub) -> None:
    error = refusal(on_hub(recipe, "no-such-branch"))
    assert "no such revision" in error.what
    recipe = write_recipe(recipe.parent, {"base_model": {"id": "tester/nothing", "revision": "main"}})
    assert "not on the Hub" in refusal(recipe).what


def test_a_datasets_branch_is_pinned(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Found:
        sha = "b" * 40

    asked = []
    monkeypatch.setattr(
        huggingface_hub.HfApi, "dataset_info", lambda _, name, revision: asked.append((name, revision)) or Found
    )
    text = {"dataset": "a/b", "revision": "main", "seq_len": 32}
    recipe = write_recipe(
        recipe.parent,
        {"calibration": {**text, "split": "train"}, "evaluation": {**text, "split": "test", "revision": "c" * 40}},
    )
    with pytest.raises(RecipeError) as before:
        RecipeFile.load(recipe)
    assert "calibration.revision is 'main', the lock recipe.lock.json has no commit of it" in str(before.value)
    assert f"packager lock {recipe}" in str(before.value)
    assert lock_now(recipe).datasets == {"a/b@main": "b" * 40}
    assert asked == [("a/b", "main")]
    loaded = RecipeFile.load(recipe).recipe
    assert (loaded.calibration.revision, loaded.evaluation.revision) == ("b" * 40, "c" * 40)


# The recipe, the lock and the build


@pytest.mark.parametrize(
    ("revision", "problem"),
    [
        ("main", ""), ("v1.0", ""), ("refs/pr/3", ""), ("feature/x_y", ""), ("face", ""), ("a" * 40, ""),
        ("abcdef0", "whole commit id"), ("A" * 40, "whole commit id"), ("a" * 41, "whole commit id"),
        ("a..b", "branch or tag"), ("-x", "branch or tag"), ("x y", "branch or tag"), ("x.lock", "branch or tag"),
        ("../x", "branch or tag"), ("x?y", "branch or tag"), ("x" * 300, "branch or tag"), ("", "branch or tag"),
    ],
)  # fmt: skip
def test_a_revision_is_a_commit_or_a_name(tmp_path: Path, revision: str, problem: str) -> None:
    from pydantic import TypeAdapter, ValidationError

    from packager.recipe.fields import PATTERN_MEANINGS, Revision

    try:
        TypeAdapter(Revision).validate_python(revision)
        found = ""
    except ValidationError as error:
        found = f"{error} {PATTERN_MEANINGS.values()}"
    assert problem in found
    assert bool(problem) == bool(found)


def test_a_lock_of_something_else_is_refused_with_the_command(recipe: Path) -> None:
    lock_now(recipe)
    text = lock_path(recipe).read_text()
    hub_recipe = on_hub(recipe, "main")
    for path, lock, problem in (
        (hub_recipe, text, "base_model.revision is 'main', the lock recipe.lock.json is of 'a local folder'"),
        (hub_recipe, text.replace('"revision": null', f'"revision": "{COMMIT}"', 1), "base_model.revision is 'main'"),
    ):
        lock_path(path).write_text(lock)
        with pytest.raises(RecipeError, match=re.escape(problem)) as caught:
            RecipeFile.load(path)
        assert f"packager lock {path}" in str(caught.value)
    pinned = text.replace('"requested": null, "revision": null', f'"requested": "main", "revision": "{COMMIT}"', 1)
    lock_path(hub_recipe).write_text(pinned)
    assert RecipeFile.load(hub_recipe).recipe.base_model.revision == COMMIT
    assert RecipeFile.load(on_hub(recipe, COMMIT)).recipe.base_model.revision == COMMIT
    local = write_recipe(recipe.parent)
    lock_path(local).write_text(pinned)
    with pytest.raises(RecipeError, match=r"base_model.path is 'model', the lock recipe.lock.json is of '0123"):
        RecipeFile.load(local)


@pytest.mark.parametrize("command", ["plan", "build", "release"])
def test_without_a_lock_there_is_one_error_with_the_command_that_makes_it(recipe: Path, command: str) -> None:
    result = CliRunner().invoke(app, [command, str(recipe)], prog_name="packager")
    assert result.exit_code == 2
    assert result.stderr.count("there is no lock recipe.lock.json beside the recipe") == 1
    assert f"packager lock {recipe}" in result.stderr
    assert not lock_path(recipe).exists()


def test_a_chat_template_that_moved_is_an_error(recipe: Path) -> None:
    lock_now(recipe)
    loaded = RecipeFile.load(recipe)
    open_source(loaded, lambda _: None)
    template = recipe.parent / "model" / "chat_template.jinja"
    template.write_text("{# moved #}" + template.read_text())
    with pytest.raises(SourceError, match="chat template is not the one") as caught:
        open_source(loaded, lambda _: None)
    assert "packager lock" in caught.value.hint
    lock_now(recipe)
    open_source(RecipeFile.load(recipe), lambda _: None)


def test_another_transformers_that_builds_the_same_is_no_error(recipe: Path) -> None:
    lock_now(recipe)
    loaded = RecipeFile.load(recipe)
    source = open_source(loaded, lambda _: None)
    for version in (metadata.version("transformers"), "4.0"):
        check_description(source, loaded.lock.model_copy(update={"made_with": {"transformers": version}}))


@pytest.mark.slow
def test_another_transformers_that_builds_other_linears_ends_the_build(recipe: Path, tmp_path: Path) -> None:
    lock = lock_now(recipe)
    raw = json.loads(lock_text(lock))
    raw["made_with"]["transformers"] = "4.0"
    groups = raw["model"]["kinds"][0]["groups"]
    del groups[-1]
    lock_path(recipe).write_text(lock_text(Lock.model_validate_json(json.dumps(raw))))
    with pytest.raises(SourceError, match="in another way than the lock describes") as caught:
        build(recipe, tmp_path / "dist")
    assert "made with transformers 4.0" in caught.value.why
    assert "block 0 mlp.down_proj is" in caught.value.why
    assert "in the lock not there" in caught.value.why
    assert not list((tmp_path / "dist").rglob("*.safetensors"))


@pytest.mark.slow
def test_tied_and_other_models_are_described(tmp_path: Path, in_process: None) -> None:
    for name in ("llama-tied", "qwen3"):
        folder = tmp_path / name
        write_inputs(folder)
        save_model(folder / "model", name, dtype=torch.bfloat16)
        save_tokenizer(folder / "model")
        lock = lock_now(write_recipe(folder))
        assert bool(lock.model.tied) == (name == "llama-tied")
        assert {entry.dtype for entry in lock.model.tensors} == {"BF16"}
        assert RecipeFile.load(folder / "recipe.yaml").architecture.dtype == "BF16"


@pytest.mark.slow
def test_a_base_model_of_several_dtypes_builds_and_keeps_them(recipe: Path, tmp_path: Path) -> None:
    """Norms, routers and scales are float32 in many models; the audit after packing refused them, hours later."""
    path = recipe.parent / "model" / "model.safetensors"
    tensors = {name: tensor.float() if "norm" in name else tensor for name, tensor in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})
    lock_now(recipe)
    build(recipe, tmp_path / "dist")
    folder = workspace(tmp_path / "dist").folder("main")
    built = read_header(folder / "model.safetensors").tensors
    assert {built[name].dtype for name in tensors if "norm" in name} == {"F32"}
    assert {built[name].dtype for name in ("lm_head.weight", "model.embed_tokens.weight")} == {"F16"}
    assert audit(folder).errors == ()  # of strangers, too, who have no lock


def test_a_lock_has_no_path_of_the_machine_that_trained_the_model(recipe: Path) -> None:
    config_path = recipe.parent / "model" / "config.json"
    content = json.loads(config_path.read_text())
    config_path.write_text(json.dumps(content | {"_name_or_path": "/home/someone/run", "note": {"from": "~/data"}}))
    lock = lock_now(recipe)
    assert "_name_or_path" not in lock.model.config
    assert lock.model.config["note"] == {}
    assert "/home/someone" not in lock_path(recipe).read_text()
    # The folder is still the one that the lock was made of, and another value elsewhere is seen.
    open_source(RecipeFile.load(recipe), lambda _: None)
    config_path.write_text(json.dumps(content | {"_name_or_path": "/home/other", "rms_norm_eps": 0.5, "note": {}}))
    with pytest.raises(SourceError, match="not the one that the lock was made of") as caught:
        open_source(RecipeFile.load(recipe), lambda _: None)
    assert caught.value.why.startswith("rms_norm_eps is 0.5")
