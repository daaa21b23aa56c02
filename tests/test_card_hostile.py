from packager.card import CardTexts, render_card
from packager.card.markdown import extract_code_blocks
from packager.receipt import Provenance
from packager.recipe import Recipe
from tests import card_fixtures as fixtures
from tests.card_page import assert_code_is_valid, front_matter, headings, structure, tables

HOSTILE = (
    "a|b `c` ``d`` {{ 7*7 }} {% raw %} {# x #} <script>alert(1)</script> <!-- [x](https://e.org) ![i](j) "
    "**bold** _it_ ~~no~~ # \\ $(id) ${HOME} \"\"\" ''' &amp; --> ---"
)
HOSTILE_LINES = f"```\n---\n~~~\n{HOSTILE}\n````python\nimport os\n````\n| x | y |\n# heading\n<details>"


def hostile_recipe() -> Recipe:
    return fixtures.llama_recipe(
        title=HOSTILE,
        creator=HOSTILE,
        creator_url="https://e.org/(a\\b*c_d",
        quantized_by=HOSTILE,
        license={
            "id": HOSTILE,
            "link": "https://e.org/l(",
            "files": (f"assets/{HOSTILE.replace('/', '').replace(chr(92), '')}",),
        },
        prompt_template={"name": HOSTILE, "template": f"{HOSTILE_LINES}\n{{prompt}}\n```"},
        system_prompt=HOSTILE_LINES,
        example_prompt=HOSTILE,
        related_repositories=({"title": HOSTILE, "url": "https://e.org/r("},),
    ).model_copy(
        update={
            "variants": tuple(
                entry.model_copy(update={"description": HOSTILE}) for entry in fixtures.llama_recipe().variants
            )
        }
    )


def hostile_receipt(receipt: Provenance) -> Provenance:
    text = receipt.calibration.model_copy(update={"source": HOSTILE, "config": HOSTILE, "split": HOSTILE})
    return receipt.model_copy(
        update={
            "made_with": HOSTILE,
            "device": HOSTILE,
            "calibration": text,
            "evaluation": text,
            "versions": {HOSTILE: HOSTILE},
            "base_model": receipt.base_model.model_copy(update={"dtype": HOSTILE}),
            "loaders": tuple(
                record.model_copy(
                    update={"reason": HOSTILE, "dtype": HOSTILE, "kernel": HOSTILE}
                    | {"device": record.device if record.device == "cpu" else HOSTILE}  # the page says what a CPU runs
                    | {"versions": record.versions | {HOSTILE: HOSTILE}}
                )
                for record in receipt.loaders
            ),
        }
    )


def test_hostile_text_changes_nothing_around_it() -> None:
    recipe = hostile_recipe()
    receipts = [hostile_receipt(receipt) for receipt in fixtures.llama_receipts(recipe)]
    text = render_card(recipe, CardTexts(), receipts, "llama", "main")
    plain = fixtures.llama_recipe()
    usual = render_card(plain, CardTexts(), fixtures.llama_receipts(plain), "llama", "main")

    assert structure(text) == structure(usual)
    assert [len(row) for table in tables(text) for row in table] == [
        len(row) for table in tables(usual) for row in table
    ]
    assert headings(text)[0] == f"{HOSTILE} GPTQ"
    assert front_matter(text)["quantized_by"] == HOSTILE
    assert "49" not in headings(text)[0]
    languages = [block.language for block in extract_code_blocks(usual)]
    assert [block.language for block in extract_code_blocks(text)] == languages
    assert_code_is_valid(text)


def test_hostile_prompts_reach_the_example_unchanged() -> None:
    recipe = hostile_recipe()
    text = render_card(recipe, CardTexts(), fixtures.llama_receipts(recipe), "llama", "main")
    example = next(block for block in extract_code_blocks(text) if "system_prompt" in block.text)
    assignments = example.text[example.text.index("system_prompt =") : example.text.index("inputs =")]
    values: dict[str, object] = {}
    exec(assignments, values)  # noqa: S102  # rendered by this test, from this file's own strings
    assert values["messages"] == [
        {"role": "system", "content": HOSTILE_LINES},
        {"role": "user", "content": HOSTILE},
    ]
    template = next(block for block in extract_code_blocks(text) if block.language == "text")
    assert template.text.rstrip("\n") == recipe.card.prompt_template.template
