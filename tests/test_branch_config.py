"""A branch's configs are normalised: nothing of the base's makers, nothing that a runtime misreads, the same model."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from packager.model.branch_config import branch_file, normalized
from packager.model.branch_rules import BRANCH_RULES, ModelFacts
from packager.model.config_values import is_path
from packager.prove.audit import audit
from packager.receipt import CONFIG, GENERATION_CONFIG, TOKENIZER, TOKENIZER_CONFIG
from tests.test_known_models import tiny_config

pytestmark = pytest.mark.usefixtures("in_process")

FACTS = ModelFacts(vocab_size=32000, dtype="F16")
GONE: Any = object()
# The values of the tiny tokenizer, which transformers 5 saves, that older runtimes do not read: its class, its inputs,
# its clean-up of spaces, its template, and its merges.
OF_TRANSFORMERS_5 = 5


@pytest.mark.parametrize(
    ("name", "given", "wanted"),
    [
        (CONFIG, {"_name_or_path": "meta-llama/Llama-2-7b"}, {"_name_or_path": GONE}),
        (CONFIG, {"_model_name_or_path": "x", "is_local": True}, {"_model_name_or_path": GONE, "is_local": GONE}),
        (CONFIG, {"lora": {"base": "/data/llama", "rank": 8}}, {"lora": {"rank": 8}}),
        (CONFIG, {"corpora": ["a", "C:\\texts"], "log": "file://x"}, {"corpora": GONE, "log": GONE}),
        (CONFIG, {"auto_map": {"AutoConfig": "x.X"}}, {"auto_map": GONE}),
        (CONFIG, {"pretraining_tp": 2}, {"pretraining_tp": GONE}),
        (CONFIG, {"_attn_implementation": "flash_attention_2"}, {"_attn_implementation": GONE}),
        (CONFIG, {"output_hidden_states": True, "return_dict": False},
         {"output_hidden_states": GONE, "return_dict": GONE}),
        (CONFIG, {"rope_scaling": {"rope_type": "linear", "factor": 2}},
         {"rope_scaling": {"type": "linear", "factor": 2.0}}),
        (CONFIG, {"rope_parameters": {"rope_theta": 5e5}}, {"rope_theta": 5e5}),
        (CONFIG, {"pad_token_id": -1, "eos_token_id": [2, -1, 32000]}, {"pad_token_id": None, "eos_token_id": [2]}),
        (CONFIG, {"pad_token_id": 32000}, {"pad_token_id": None}),
        (CONFIG, {"eos_token_id": [-1]}, {"eos_token_id": None}),
        (CONFIG, {"torch_dtype": "bfloat16"}, {"torch_dtype": "float16"}),
        (CONFIG, {"torch_dtype": None}, {"torch_dtype": "float16"}),
        (CONFIG, {"torch_dtype": "float32", "dtype": "float32"}, {"torch_dtype": "float16", "dtype": "float16"}),
        (GENERATION_CONFIG, {"eos_token_id": -1}, {"eos_token_id": None}),
        (GENERATION_CONFIG, {"do_sample": True, "temperature": 0.0}, {"do_sample": False}),
        (GENERATION_CONFIG, {"top_k": -1, "max_new_tokens": -1}, {"top_k": 0, "max_new_tokens": GONE}),
        (TOKENIZER_CONFIG, {"name_or_path": "/root/out/checkpoint-100"}, {"name_or_path": GONE}),
        (TOKENIZER_CONFIG, {"tokenizer_file": "/home/me/.cache/tokenizer.json", "vocab_file": "vocab.json"},
         {"tokenizer_file": GONE}),
        (TOKENIZER_CONFIG, {"auto_map": {"AutoTokenizer": ["x.X", None]}}, {"auto_map": GONE}),
        (TOKENIZER_CONFIG, {"tokenizer_class": "TokenizersBackend", "backend": "tokenizers"},
         {"tokenizer_class": "PreTrainedTokenizerFast", "model_input_names": ["input_ids", "attention_mask"],
          "clean_up_tokenization_spaces": False}),
        (TOKENIZER_CONFIG, {"extra_special_tokens": ["<a>"]},
         {"extra_special_tokens": GONE, "additional_special_tokens": ["<a>"]}),
        (TOKENIZER, {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [["a", "b"], ["ab", "\u0120"]]}},
         {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["a b", "ab \u0120"]}}),
    ],
)  # fmt: skip
def test_a_branch_does_not_get_what_means_nothing_there_or_is_misread(
    name: str, given: Mapping[str, Any], wanted: Mapping[str, Any]
) -> None:
    before = {**(tiny_config(torch_dtype="float16") if name == CONFIG else {}), **given}
    found = normalized(name, before, FACTS)
    expected = {key: value for key, value in {**before, **wanted}.items() if value is not GONE}
    assert found.content == expected
    # 2 and 2.0 are equal in Python, and not to transformers 4.40.
    assert json.dumps(found.content, sort_keys=True) == json.dumps(expected, sort_keys=True)
    assert len(found.changes) == len(wanted)
    assert all(change.startswith(f"{name}: ") for change in found.changes)
    again = normalized(name, found.content, FACTS)
    assert again.content == found.content
    assert again.changes == ()


@pytest.mark.parametrize(
    ("name", "given"),
    [
        (CONFIG, {"pretraining_tp": 1, "use_cache": False, "transformers_version": "4.31.0"}),
        (CONFIG, {"rope_scaling": {"type": "yarn", "factor": 4.0}}),
        (CONFIG, {"eos_token_id": [0, 31999], "pad_token_id": 0}),
        (CONFIG, {"tie_word_embeddings": True}),
        (GENERATION_CONFIG, {"do_sample": False, "temperature": 0.0}),
        # vLLM takes these as its defaults, whatever do_sample says.
        (GENERATION_CONFIG, {"temperature": 0.6, "top_p": 0.9}),
        (TOKENIZER_CONFIG, {"bos_token": "/s", "additional_special_tokens": ["/tool"], "chat_template": "/x"}),
        (TOKENIZER_CONFIG, {"added_tokens_decoder": {"0": {"content": "/home"}}}),
        (TOKENIZER_CONFIG, {"tokenizer_class": "LlamaTokenizer", "extra_special_tokens": {"image_token": "<image>"}}),
        (TOKENIZER, {"model": {"merges": ["a b", "/root /x"]}, "auto_map": "/x"}),
        # Only the pair says which two tokens these are.
        (TOKENIZER, {"model": {"merges": [["a", "b"], ["a b", "c"]]}}),
        (TOKENIZER, {"model": {"merges": [["#version", "b"]]}}),
        (TOKENIZER, {"model": {"type": "Unigram", "vocab": [["a", -1.5]]}}),
    ],
)
def test_what_a_runtime_reads_is_not_changed(name: str, given: Mapping[str, Any]) -> None:
    before = {**(tiny_config(torch_dtype="float16") if name == CONFIG else {}), **given}
    found = normalized(name, before, FACTS)
    assert found.changes == ()
    assert found.content == before
    data = json.dumps(before, indent=7).encode()
    assert branch_file(name, data, FACTS).data == data


def test_a_part_of_a_model_has_rules_of_its_own() -> None:
    text = {"vocab_size": 100, "pad_token_id": -1, "dtype": "bfloat16"}
    towers = {"vision_config": {"vocab_size_of_images": 7, "eos_token_id": 5000, "dtype": "float32"}}
    found = normalized(CONFIG, {"text_config": text, **towers, "image_token_id": 99}, FACTS).content
    assert found == {
        "text_config": {"vocab_size": 100, "pad_token_id": None, "dtype": "float16"}, **towers, "image_token_id": 99,
        "torch_dtype": "float16",
    }  # fmt: skip


def test_weights_in_float32_keep_the_dtype_that_config_json_gives() -> None:
    config = tiny_config(torch_dtype="bfloat16")
    assert normalized(CONFIG, config, ModelFacts(dtype="F32")).content == config
    del config["torch_dtype"]
    assert normalized(CONFIG, config, ModelFacts(dtype="F32")).content["torch_dtype"] == "float32"


def test_a_head_of_its_own_is_not_tied() -> None:
    config = tiny_config(torch_dtype="float16", tie_word_embeddings=True)
    found = normalized(CONFIG, config, ModelFacts(dtype="F16", unties=True))
    assert found.content["tie_word_embeddings"] is False
    assert "head" in found.changes[0]


@pytest.mark.parametrize("value", ["/home/me/x", "/srv/model", "~/x", "D:\\x", "file:///x", ["ok", "/data/x"]])
def test_a_path_is_recognised(value: object) -> None:
    assert is_path(value)


@pytest.mark.parametrize("value", ["/", "meta/llama", "silu", "https://example.org/x", "a / b", 7, None, ["x", 1]])
def test_other_values_are_no_path(value: object) -> None:
    assert not is_path(value)


def test_every_rule_says_why_and_where_it_was_read() -> None:
    for rule in BRANCH_RULES:
        assert rule.reason
        assert rule.source
        assert rule.files


LEFTOVERS: Mapping[str, Mapping[str, Any]] = {
    CONFIG: {
        "_name_or_path": "/home/someone/out/merged", "auto_map": {"AutoModelForCausalLM": "modeling_x.X"},
        "pretraining_tp": 2, "pad_token_id": -1, "dtype": "bfloat16",
    },
    GENERATION_CONFIG: {"do_sample": True, "temperature": 0.0, "eos_token_id": [2, -1]},
    TOKENIZER_CONFIG: {"name_or_path": "/root/out/checkpoint-100", "tokenizer_file": "/root/out/tokenizer.json"},
}  # fmt: skip


@pytest.mark.slow
def test_a_base_with_the_leftovers_of_trainers_builds_and_its_branch_has_none(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    from packager.pipeline.lock_recipes import lock_recipes
    from packager.pipeline.plan import make_plan
    from packager.recipe.file import RecipeFile
    from tests.tiny_recipe import build, workspace, write_inputs, write_recipe

    inputs = write_inputs(tmp_path)
    for name, changes in LEFTOVERS.items():
        path = inputs / "model" / name
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    recipe = write_recipe(inputs, {"variants": [{"branch": "main"}]})
    assert [result.status for result in lock_recipes([recipe], print)] == ["written"]
    planned = make_plan(RecipeFile.load(recipe)).changes
    assert len(planned) == 9 + OF_TRANSFORMERS_5
    build(recipe, tmp_path / "dist")
    branch = workspace(tmp_path / "dist").folder("main")
    config = json.loads((branch / CONFIG).read_text())
    assert not {"_name_or_path", "auto_map", "pretraining_tp"} & config.keys()
    assert (config["pad_token_id"], config["dtype"]) == (None, "float16")
    assert "/root" not in (branch / TOKENIZER_CONFIG).read_text()
    assert audit(branch).errors == ()
    base = AutoModelForCausalLM.from_pretrained(inputs / "model")
    assert base.config.eos_token_id == config["eos_token_id"]


@pytest.mark.slow
def test_lock_and_plan_say_what_a_branch_gets_otherwise(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from typer.testing import CliRunner

    from packager.cli.main import app
    from tests.tiny_recipe import write_inputs, write_recipe

    monkeypatch.setenv("COLUMNS", "200")
    inputs = write_inputs(tmp_path)
    path = inputs / "model" / CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), "auto_map": {"AutoConfig": "x.X"}}))
    recipe = write_recipe(inputs)
    for command in ("lock", "plan"):
        done = CliRunner().invoke(app, [command, str(recipe)])
        assert done.exit_code == 0, done.output
        assert "ot as the base model has it: config.json: auto_map is dropped" in done.output
        found = json.loads(CliRunner().invoke(app, [command, str(recipe), "--format", "json"]).stdout)
        changes = found["locks"][0]["changes"] if command == "lock" else found["base_model"]["changes"]
        assert changes[0] == "config.json: auto_map is dropped: the Python files that it names are not in a branch"
        assert len(changes) == 1 + OF_TRANSFORMERS_5


@pytest.mark.parametrize("command", [pytest.param("lock", marks=pytest.mark.slow), "plan", "build"])
def test_what_cannot_be_published_is_refused_before_the_first_block(tmp_path: Path, command: str) -> None:
    from packager.errors import SourceError
    from packager.pipeline.lock_recipes import lock_recipes
    from packager.pipeline.plan import make_plan
    from packager.recipe.file import RecipeFile
    from tests.tiny_recipe import build, write_inputs, write_recipe

    inputs = write_inputs(tmp_path)
    path = inputs / "model" / TOKENIZER_CONFIG
    (path.parent / "chat_template.jinja").unlink()  # it would be read, and the other one replaced
    text = json.loads(path.read_text())
    path.write_text(json.dumps({**text, "note": "ask hf_abcdefghijklmnopqrstuvwxyz0123", "chat_template": "{% if %}"}))
    recipe = write_recipe(inputs)
    commands: dict[str, Callable[[], object]] = {
        "lock": lambda: list(lock_recipes([recipe], print)),
        "plan": lambda: make_plan(RecipeFile.load(recipe)),
        "build": lambda: build(recipe, tmp_path / "dist"),
    }
    with pytest.raises(SourceError, match="cannot be part of a branch") as caught:
        commands[command]()
    assert "tokenizer_config.json: note" in caught.value.why
    assert "tokenizer_config.json: chat_template: jinja2 cannot read it" in caught.value.why
    assert "hf_abcdefghijkl" not in str(caught.value)
    assert "base_model.path" in caught.value.hint
    assert not list(tmp_path.glob("dist/work/**/*.safetensors"))
