"""The card's Python examples give a model the tokens of its chat template, each of them once."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from packager.card import CardTexts, render_card
from packager.card.markdown import extract_code_blocks
from packager.pipeline.prompting import prompting_of
from tests import card_fixtures as fixtures
from tests.family_tokenizers import FAMILIES, save_family
from tests.samples import sampled

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

RUNTIMES = ("transformers", "gptqmodel", "autogptq", "vllm-cpu", "exllamav2")
START = 1  # <s>


def page(folder: Path, **card: Any) -> str:
    """Return a card with the example of each runtime, for a branch with the tokenizer of a folder."""
    recipe = fixtures.llama_recipe(**card)
    receipts = []
    for receipt in fixtures.llama_receipts(recipe):
        more = [
            receipt.loaders[0].model_copy(update={"loader": name}) for name in ("gptqmodel", "vllm-cpu", "exllamav2")
        ]
        others = [record for record in receipt.loaders if record.loader != "exllamav2"]
        receipts.append(receipt.model_copy(update={"loaders": (*others, *more)}))
    return render_card(recipe, CardTexts(), receipts, "llama", "main", prompting=prompting_of(folder))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tokenizer that puts <s> before every text, and whose template writes it, too."""
    save_family(tmp_path, FAMILIES["llama 2"])
    return tmp_path


@pytest.fixture
def model() -> Any:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=1024, **sizes))


class VllmModule:
    """Stands for vllm: `LLM.chat` renders the messages, and `LLM.generate` encodes a text, with the tokenizer."""

    def __init__(self, tokenizer: Any, ids: list[list[int]]) -> None:
        def encoded(tokens: list[int]) -> list[Any]:
            ids.append(tokens)
            return [SimpleNamespace(outputs=[SimpleNamespace(text="an answer")])]

        class Engine:
            def __init__(self, model: str, *, dtype: str, enforce_eager: bool) -> None:
                assert Path(model).is_dir()
                assert enforce_eager
                assert dtype == "float16"

            def get_tokenizer(self) -> Any:
                return tokenizer

            def chat(self, messages: list[dict[str, str]], sampling_params: Any) -> list[Any]:
                assert sampling_params.max_tokens
                return encoded(
                    tokenizer.apply_chat_template(
                        messages, add_generation_prompt=True, tokenize=True, return_dict=False
                    )
                )

            def generate(self, prompts: Any, sampling_params: Any) -> list[Any]:
                assert sampling_params.max_tokens
                given = prompts["prompt_token_ids"] if isinstance(prompts, dict) else tokenizer(prompts)["input_ids"]
                return encoded(given)

        self.LLM, self.SamplingParams = Engine, SimpleNamespace


def exllamav2_modules(tokenizer: Any, ids: list[list[int]]) -> dict[str, Any]:
    """Return what stands for exllamav2 0.3.2; its tokenizer puts the first token before a text by `add_bos` alone."""

    class Generator:
        def __init__(self, *, model: Any, cache: Any, tokenizer: Any) -> None:
            assert tokenizer == "its own"
            assert cache.lazy
            assert model.loaded

        def generate(
            self, prompt: str, max_new_tokens: int, *, add_bos: bool, encode_special_tokens: bool,
            stop_conditions: list[int], completion_only: bool,
        ) -> str:  # fmt: skip
            assert encode_special_tokens
            assert completion_only
            assert max_new_tokens
            assert stop_conditions == [tokenizer.eos_token_id]
            ids.append([START] * add_bos + tokenizer(prompt, add_special_tokens=False)["input_ids"])
            return "an answer"

    def configured(folder: str) -> SimpleNamespace:
        assert Path(folder).is_dir()
        return SimpleNamespace(arch_compat_overrides=lambda: None)

    def modelled(config: Any) -> SimpleNamespace:
        assert config.no_sdpa
        made = SimpleNamespace(loaded=False)
        made.load_autosplit = lambda _: setattr(made, "loaded", True)
        return made

    parts = {
        "ExLlamaV2Config": configured,
        "ExLlamaV2": modelled,
        "ExLlamaV2Cache": lambda _, *, lazy: SimpleNamespace(lazy=lazy),
        "ExLlamaV2Tokenizer": lambda _: "its own",
    }
    generator = SimpleNamespace(ExLlamaV2DynamicGenerator=Generator)
    return {"exllamav2": SimpleNamespace(**parts), "exllamav2.generator": generator}


@pytest.fixture
def given(folder: Path, model: Any, monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The ids of each prompt that a model is given, by code that runs while this is in use."""
    ids: list[list[int]] = []
    generate = model.generate

    def one_token(**named: Any) -> Any:
        ids.extend(named["input_ids"].tolist())
        return generate(**{**named, "max_new_tokens": 1})

    model.generate = one_token
    loads = lambda *_, **__: model  # noqa: E731
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", loads)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda *_, **__: tokenizer)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(folder))
    modules = {
        "vllm": VllmModule(tokenizer, ids),
        **exllamav2_modules(tokenizer, ids),
        "gptqmodel": SimpleNamespace(GPTQModel=SimpleNamespace(load=loads)),
        "auto_gptq": SimpleNamespace(AutoGPTQForCausalLM=SimpleNamespace(from_quantized=loads)),
    }
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    return ids


def run_example(text: str, runtime: str) -> None:
    """Execute the last block of a page that is meant for a runtime."""
    code = [block.text for block in extract_code_blocks(text) if block.run == runtime][-1]
    exec(compile(code, f"card:{runtime}", "exec"), {})  # noqa: S102 - what a reader would run


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("runtime", sampled(RUNTIMES, "autogptq"))
def test_an_example_gives_the_ids_of_the_chat_template(
    folder: Path, given: list[list[int]], runtime: str, capsys: pytest.CaptureFixture[str]
) -> None:
    text = page(folder)
    run_example(text, runtime)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    recipe = fixtures.llama_recipe()
    messages = [
        {"role": "system", "content": recipe.card.system_prompt},
        {"role": "user", "content": recipe.card.example_prompt},
    ]
    wanted = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
    assert given[: 2 if runtime == "transformers" else 1] == [wanted] * (2 if runtime == "transformers" else 1)
    assert len(given) == (3 if runtime == "transformers" else 1)
    if runtime == "transformers":  # the next turn
        answer = tokenizer.decode(given[2][len(wanted) :])
        assert given[2][: len(wanted)] == wanted
        assert "Say it in one sentence." in answer
    assert wanted.count(START) == 1
    assert len(tokenizer(tokenizer.decode(wanted))["input_ids"]) == len(wanted) + 1  # a text gets another one


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("runtime", sampled(RUNTIMES, "autogptq"))
@pytest.mark.parametrize("template", ["Say: {prompt}", "<s>Say: {prompt}"])
def test_an_example_without_a_chat_template_fills_in_the_prompt_template(
    folder: Path, given: list[list[int]], runtime: str, template: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    del config["chat_template"]
    path.write_text(json.dumps(config))
    run_example(page(folder, prompt_template={"name": "own", "template": template}), runtime)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    filled = template.replace("{prompt}", fixtures.llama_recipe().card.example_prompt)
    assert given == [tokenizer(filled, add_special_tokens=not filled.startswith("<s>"))["input_ids"]]
    assert given[0].count(START) == 1


def test_a_card_says_which_token_is_written_twice(folder: Path) -> None:
    sentence = "tokenize this text\nwith `add_special_tokens=False`"
    template = "<s>[INST] {prompt} [/INST]"
    assert sentence in page(folder, prompt_template={"name": "own", "template": template})
    assert sentence not in page(folder, prompt_template={"name": "own", "template": template.removeprefix("<s>")})
    save_family(folder, FAMILIES["llama whose flag asks for more"])
    assert sentence not in page(folder, prompt_template={"name": "own", "template": template})
