"""The card's prompt template is the model's chat template: on every day, with every token that a reader must write."""

from collections.abc import Iterator
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from packager.errors import CalibrationError
from packager.inputs.chat import card_prompt, check_prompt_template, prompt_chat, render_messages
from packager.inputs.limits import ModelProcess
from packager.model.lock import LockedPrompt
from packager.recipe.file import RecipeFile
from packager.recipe.prompt_template import prompt_difference
from tests.tiny_recipe import write_all

CHATML = (
    "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n"
    "{% endif %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CHATML_PROMPT = "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"
INST = "{% for m in messages %}{{ bos_token }}[INST] {{ m['content'] }} [/INST]{% endfor %}"
# The beginning of Llama 3.2's template.
DATED = (
    "{%- if not date_string is defined %}{%- if strftime_now is defined %}"
    "{%- set date_string = strftime_now('%d %b %Y') %}{%- else %}{%- set date_string = '26 Jul 2024' %}{%- endif %}"
    "{%- endif %}Today Date: {{ date_string }}\n{% for m in messages %}{{ m['content'] }}{% endfor %}"
)


@pytest.fixture(scope="module")
def process() -> Iterator[ModelProcess]:
    with ModelProcess() as process:
        yield process


@pytest.fixture(scope="module")
def recipe_file(tmp_path_factory: pytest.TempPathFactory) -> RecipeFile:
    return RecipeFile.load(write_all(tmp_path_factory.mktemp("recipe")))


def tokenizer(template: str | dict[str, str], bos: str = "<s>", *, adds: bool = False) -> Any:
    """Return a tokenizer of a few words, which puts `bos` before every text or does not."""
    made = Tokenizer(models.WordLevel({"<unk>": 0, bos: 1, "a": 2}, "<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.add_special_tokens([bos])
    if adds:
        made.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, 1)])
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token=bos, chat_template=template)


def with_template(recipe_file: RecipeFile, template: str, system_prompt: str | None = None) -> RecipeFile:
    card = recipe_file.recipe.card
    prompt_template = card.prompt_template.model_copy(update={"template": template})
    card = card.model_copy(update={"prompt_template": prompt_template, "system_prompt": system_prompt})
    recipe = recipe_file.recipe.model_copy(update={"card": card})
    return RecipeFile(
        path=recipe_file.path, recipe=recipe, lock=recipe_file.lock, architecture=recipe_file.architecture
    )


def check(recipe_file: RecipeFile, made: Any, process: ModelProcess) -> None:
    check_prompt_template(recipe_file, card_prompt(recipe_file.recipe, made, process))


def test_a_card_without_the_first_token_of_chatml_is_refused(recipe_file: RecipeFile, process: ModelProcess) -> None:
    made = tokenizer(CHATML, "<|im_start|>")
    check(with_template(recipe_file, CHATML_PROMPT), made, process)
    check(with_template(recipe_file, CHATML_PROMPT.strip()), made, process)
    with pytest.raises(CalibrationError, match="is not the model's chat template") as caught:
        check(with_template(recipe_file, CHATML_PROMPT.removeprefix("<|im_start|>")), made, process)
    assert 'the tokenizer renders "<|im_start|>system\\nBe kind.' in caught.value.why


def test_only_a_token_that_the_tokenizer_adds_may_be_left_out(recipe_file: RecipeFile, process: ModelProcess) -> None:
    whole, without = (
        with_template(recipe_file, text) for text in ("<s>[INST] {prompt} [/INST]", "[INST] {prompt} [/INST]")
    )
    check(whole, tokenizer(INST), process)
    check(whole, tokenizer(INST, adds=True), process)
    check(without, tokenizer(INST, adds=True), process)
    with pytest.raises(CalibrationError, match="is not the model's chat template") as caught:
        check(without, tokenizer(INST), process)
    assert caught.value.why.endswith('renders "<s>[INST] {prompt} [/INST]"')
    with pytest.raises(CalibrationError):  # the tokenizer adds one, the template none: a reader gets one, not two
        check(
            whole, tokenizer("{% for m in messages %}[INST] {{ m['content'] }} [/INST]{% endfor %}", adds=True), process
        )


def test_a_date_is_open_in_the_card_and_fixed_everywhere_else(recipe_file: RecipeFile, process: ModelProcess) -> None:
    made = tokenizer(DATED)
    check(with_template(recipe_file, "Today Date: {date}\n{prompt}"), made, process)
    with pytest.raises(CalibrationError, match="is not the model's chat template") as caught:
        check(with_template(recipe_file, "Today Date: 29 Nov 2026\n{prompt}"), made, process)
    assert "{date} stands for today's date" in caught.value.hint
    assert render_messages(made, [prompt_chat("a")], process) == ["Today Date: 26 Jul 2024\na"]


def test_named_templates_render_the_default_one(recipe_file: RecipeFile, process: ModelProcess) -> None:
    made = tokenizer({"default": INST, "tool_use": "{{ tools | length }}"})
    assert card_prompt(recipe_file.recipe, made, process) == LockedPrompt(text="<s>[INST] {prompt} [/INST]")
    with pytest.raises(CalibrationError, match="none is called default") as caught:
        card_prompt(recipe_file.recipe, tokenizer({"rag": INST, "tool_use": INST}), process)
    assert caught.value.hint


def test_a_base_model_without_a_template_has_no_prompt(recipe_file: RecipeFile, process: ModelProcess) -> None:
    made = tokenizer(INST)
    made.chat_template = None
    with pytest.raises(CalibrationError, match="no chat template") as caught:
        card_prompt(recipe_file.recipe, made, process)
    assert "loaders.prompts" in caught.value.hint
    recipe = recipe_file.recipe
    silent = {
        "loaders": recipe.loaders.model_copy(update={"prompts": ()}),
        "evaluation": recipe.evaluation.model_copy(update={"questions": None}),
    }
    assert card_prompt(recipe.model_copy(update=silent), made, process) is None


REFUSED = {
    "system": ("{{ raise_exception('no system role') if messages[0]['role'] == 'system' }}{{ messages[0]['content'] }}",
               "no system role", "leave out card.system_prompt"),
    "message": ("Hello.", "for {prompt} it renders 'Hello.'", "ask the model's author"),
    "length": ("{{ messages[0]['content'] }}{{ 'x' * 200000 }}", "characters", ""),
}  # fmt: skip


@pytest.mark.parametrize(("template", "why", "hint"), REFUSED.values(), ids=REFUSED)
def test_a_template_that_no_card_can_show_is_refused(
    recipe_file: RecipeFile, process: ModelProcess, template: str, why: str, hint: str
) -> None:
    system = "Be brief." if "raise_exception" in template else None
    with pytest.raises(CalibrationError, match="the model's chat template") as caught:
        check(with_template(recipe_file, "{prompt}", system), tokenizer(template), process)
    assert why in caught.value.why
    assert hint in caught.value.hint


@pytest.mark.parametrize(
    ("given", "is_equal"),
    [
        ("<s>{prompt}", True),
        ("{prompt}", True),
        ("\n <s>{prompt}\n", True),
        ("<s><s>{prompt}", False),
        ("s>{prompt}", False),
    ],
)
def test_what_the_tokenizer_adds_is_left_out_once(given: str, is_equal: bool) -> None:
    assert (prompt_difference(given, LockedPrompt(text="<s>{prompt}", added="<s>")) == "") == is_equal
