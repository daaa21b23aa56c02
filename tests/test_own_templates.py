"""Templates of a recipe in place of parts of the card: in the sandbox, with file and line of each mistake."""

import json
from pathlib import Path

import pytest

from packager.card import CardTexts, own_template_problems, render_card, templates_dir
from packager.card.own_templates import OwnTemplates
from packager.errors import CardError, PlanError, RecipeError
from packager.model.front_matter import split_front_matter
from packager.pipeline import flow
from packager.pipeline.made_up_figures import made_up_runs, with_made_up_figures
from packager.pipeline.plan import make_plan
from packager.pipeline.predicted_card import PredictedCards, predicted_record
from packager.pipeline.preview import preview_card
from packager.prove.audit.card import words_problems
from packager.recipe.file import RecipeFile
from packager.recipe.task_models import EvaluationTask, TaskData
from packager.system.terminal import Terminal
from tests import card_fixtures as fixtures
from tests import tiny_recipe
from tests.card_page import assert_well_formed
from tests.tiny_recipe import ACT_ORDER, MAIN, Builds

ROOT = Path(__file__).resolve().parents[1]
LICENSE = "_license.md.j2"
TEXTS = ("calibration", "evaluation")


def page(own: OwnTemplates | None = None) -> str:
    recipe = fixtures.minimal_recipe()
    return render_card(recipe, CardTexts(), fixtures.minimal_receipts(recipe), "llama", "main", own=own)


def own(text: str, name: str = LICENSE) -> OwnTemplates:
    return OwnTemplates(folder="card", texts={name: text})


def test_a_template_stands_in_for_its_part_alone() -> None:
    usual = page()
    changed = page(own("## Terms\n\nOf {{ card.license.id | inline }}, {{ branches | length }} branch.\n"))
    assert_well_formed(changed)
    before, _, after = usual.partition("## Licence\n")
    assert changed.startswith(before + "## Terms\n\nOf apache-2.0, 1 branch.\n")
    assert "## Licence" not in changed
    assert "original model's licence" in after
    assert page() == usual, "what is compiled for one recipe is no other recipe's"


@pytest.mark.parametrize(
    ("line", "where"),
    [
        ("{{ card.titel }}", "card/_license.md.j2:2: .*\n  why: .*titel"),
        ("{{ card.__class__.__mro__ }}", "card/_license.md.j2:2: "),
        ("{{ ''.__class__.__base__.__subclasses__() }}", "card/_license.md.j2:2: "),
        ("{{ recipe.model_copy.__globals__ }}", "card/_license.md.j2:2: "),
        ("{% for i in range(10 ** 9) %}x{% endfor %}", "card/_license.md.j2:2: .*\n  why: Range too big"),
        (
            '{% include "../recipe.yaml" %}',
            "card/_license.md.j2:2: a template includes a file that is not a template of the card",
        ),
        ('{% include "/etc/passwd" %}', "'/etc/passwd'\n  hint: include only the card's templates and those of the"),
        ("{{ card.title | nofilter }}", "card/_license.md.j2:2: a template is malformed\n  why: No filter named"),
        ('{% include "_license.md.j2" %}', "card/_license.md.j2:2: .*\n  why: it includes or calls itself without end"),
        ("{{ branches[0].provenance.quality | figure('perplexity') }}", "card/_license.md.j2:2: "),
    ],
)
def test_a_mistake_names_file_and_line_and_the_sandbox_holds(line: str, where: str) -> None:
    with pytest.raises(CardError, match=where):
        page(own(f"## Licence\n{line}\n"))


@pytest.mark.parametrize(
    "text",
    [
        "<script>alert(1)</script>",
        "<div>",
        "```\nnever closed",
        "[a](javascript:alert(1))",
        "hid\u202eden",
        "<form>x</form>",
    ],
)
def test_a_page_that_changes_itself_or_the_browser_is_refused(text: str) -> None:
    with pytest.raises(CardError, match="the recipe's templates make a page that cannot be published"):
        page(own(f"## Licence\n\n{text}\n"))


@pytest.mark.parametrize(
    ("name", "text", "line", "message"),
    [
        (LICENSE, "a\n{% if %}", 2, "Expected an expression"),
        (LICENSE, "a\n{{ card.title | nofilter }}", 2, "No filter named 'nofilter'"),
        (LICENSE, "a\n{{ card is notest }}", 2, "No test named 'notest'"),
        (LICENSE, "{% if speed %}\n{{ card.title | nofilter }}{% endif %}", 2, "No filter named 'nofilter'"),
        (LICENSE, "{% macro f(a, a) %}{% endmacro %}", 0, "duplicate argument"),
        (LICENSE, "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}", 0, "nested too deeply"),
        (LICENSE, "x" * 100_001, 0, "more than 100000 characters"),
        ("_licence.md.j2", "", 0, "no part of the card has this name; they are _about.md.j2"),
        ("model_card.md.j2", "", 0, "no part of the card has this name"),
    ],
)
def test_what_is_wrong_is_seen_before_anything_is_rendered(name: str, text: str, line: int, message: str) -> None:
    (found,) = own_template_problems(own(text, name))
    assert (found.name, found.line) == (name, line)
    assert message in found.message


def test_a_template_may_ask_for_a_filter() -> None:
    asked = "{% if 'nofilter' is filter %}{{ card.title | nofilter }}{% endif %}"
    assert own_template_problems(own(asked)) == ()


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("<script>alert(1)</script>", "card/_license.md.j2:3"),
        ("Of {{ card.title }} <script>alert(1)</script>", "card/_license.md.j2:3"),
        ("{{ '<form>' }}alert(1)", "card/_license.md.j2:3"),
        ("{% for i in range(2) %}<div>{% endfor %}", "card/_license.md.j2:3"),
        ("{% if card %}<div>{% else %}none{% endif %}", "card/_license.md.j2:3"),
        ("<DIV class={{ card.license.id }}>", "card/_license.md.j2:3"),
        ("[{{ card.license.id }}](javascript:alert(1))", "card/_license.md.j2:3"),
        ("<b onclick='x'>{{ card.license.id }}</b>", "card/_license.md.j2:3"),
        ("hid\u202eden {{ card.license.id }}", "card/_license.md.j2:3"),
        ("<script> {{ card.license.id }}", "card/_license.md.j2:3"),
        ("```{{ card.license.id }}", "card/_license.md.j2:3"),
        ("{{ '<scr' ~ 'ipt>' }}x", "card"),
        ("<i> hf_secret\n\n<i>", "card/_license.md.j2"),
        ("<i>\n\n<i>", "card/_license.md.j2:3"),
    ],
)
def test_what_is_refused_in_the_page_names_the_line_of_the_template(text: str, place: str) -> None:
    templates = OwnTemplates(folder="card", texts={LICENSE: f"## Licence\n\n{text} hf_secret\n", "_webui.md.j2": ""})
    with pytest.raises(CardError) as caught:
        page(templates)
    assert caught.value.where == place
    assert "of the page" not in caught.value.why
    assert "secret" not in str(caught.value), "a line of a template may have a secret"
    assert ("it comes from one of _license.md.j2, _webui.md.j2" in caught.value.why) == (place == "card")


def test_what_no_line_shows_is_placed_at_the_only_file() -> None:
    with pytest.raises(CardError, match=r"card/_license\.md\.j2: the recipe's templates"):
        page(own("{{ '<scr' ~ 'ipt>' }}x\n"))


def with_templates(recipe: Path, text: str, name: str = LICENSE, folder: str = "card") -> RecipeFile:
    content = json.loads(recipe.read_text())
    content["card"]["templates"] = folder
    recipe.write_text(json.dumps(content))
    (recipe.parent / "card").mkdir(exist_ok=True)
    (recipe.parent / "card" / name).write_text(text, encoding="utf-8")
    return RecipeFile.load(recipe)


def test_a_recipes_folder_makes_its_cards_and_previews(tmp_path: Path, builds: Builds) -> None:
    recipe, dist = builds.copy(tmp_path), tmp_path / "dist"
    readme = tiny_recipe.workspace(dist).folder(MAIN) / "README.md"
    before = readme.read_text()
    recipe_file = with_templates(recipe, "## Terms\n\nFirst.\n")
    (tmp_path / "card" / "notes.txt").write_text("{% not a template")
    assert "## Terms\n\nFirst.\n" in preview_card(recipe_file, MAIN)
    flow.render(recipe_file, tiny_recipe.options(dist), Terminal(quiet=True), branch=MAIN)
    assert "## Terms\n\nFirst.\n" in readme.read_text()
    tiny_recipe.publish(with_templates(recipe, "## Terms\n\nFirst.\n"), dist)
    content = json.loads(recipe.read_text())
    del content["card"]["templates"]
    recipe.write_text(json.dumps(content))
    flow.render(RecipeFile.load(recipe), tiny_recipe.options(dist), Terminal(quiet=True), branch=MAIN)
    assert readme.read_text() == before


def test_a_malformed_template_is_an_error_of_the_plan(tmp_path: Path, builds: Builds) -> None:
    recipe_file = with_templates(builds.copy(tmp_path), "a\n\n{% endfor %}\n")
    with pytest.raises(PlanError) as caught:
        make_plan(recipe_file)
    assert f"{tmp_path / 'card' / LICENSE}:3: card.templates: " in caught.value.why


PYTHON = "```python\n{}\n```"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("Call huggingface-cli download.", ":4: card.templates: huggingface-cli is gone, the command is hf ("),
        (
            "huggingface-cli download {{ here.place.repository }}",
            ": card.templates: huggingface-cli is gone, the command is hf (",
        ),
        ("Fill in {{ '{{' }} this }}.", ": card.templates: a template expression was not rendered (change the words"),
        ("{% raw %}{{ size }}{% endraw %}", ": card.templates: a template expression was not rendered"),
        (PYTHON.format("import"), ":5: card.templates: line 1 of this block: "),
        (PYTHON.format("model = {{ card.title | inline }} GPTQ"), ": card.templates: line 1 of this block: "),
        ("{% for each in branches %}--trust-remote-code{% endfor %}", ": card.templates: this model needs no remote"),
        ("token hf_" + "a" * 34, ":4: card.templates: "),
        (
            "<script>alert(1)</script>",
            ":4: card.templates: the recipe's templates make a page that cannot be published: the element <script> is",
        ),
        (
            "[a](javascript:alert(1)) {{ card.title | inline }}",
            ":4: card.templates: the recipe's templates make a page that cannot be published: ",
        ),
        (
            "{% if is_preview %}<a onclick=x>{% endif %}\n\n<form>",
            ":6: card.templates: the recipe's templates make a page that cannot be published: the element <form> is",
        ),
        ("<div>", ":4: card.templates: the recipe's templates make a page that cannot be published: it leaves <div>"),
        ("{{ card.title | nofilter }}", ":4: card.templates: No filter named 'nofilter'"),
        ("{{ card.title is notest }}", ":4: card.templates: No test named 'notest'"),
        (
            '{% include "/etc/passwd" %}',
            ":4: card.templates: a template includes a file that is not a template of the card: '/etc/passwd' (include",
        ),
        ('{{ "".__class__.__mro__ }}', ":4: card.templates: the card's template cannot be filled in: access to"),
        ("{{ 1/0 }}", ":4: card.templates: the card's template cannot be filled in: division by zero"),
        ("{{ 1 / (card.title | length -\ncard.title | length) }}", ":4: card.templates: the card's template cannot"),
        ("{{ card.title + 1 }}", ":4: card.templates: the card's template cannot be filled in: "),
        ("{{ here.branch + 1 }}", ":4: card.templates: the card's template cannot be filled in: "),
        ("{{ range(10 ** 9) }}", ":4: card.templates: the card's template cannot be filled in: Range too big"),
        ("{{ card.links[99] }}", ":4: card.templates: the card's template cannot be filled in: "),
        ("{% for each in branches %}{{ each.branch - 1 }}{% endfor %}", ":4: card.templates: the card's template "),
        ("{{ [1] | join(1, 2, 3, 4) }}", ":4: card.templates: the card's template cannot be filled in: "),
        ("{{ card.titel }}", ":4: card.templates: the card's template cannot be filled in: 'packager.recipe"),
        ("{{ heer.branch }}", ":4: card.templates: the card's template cannot be filled in: 'heer' is undefined"),
        ("{{ card.title | inlien }}", ":4: card.templates: No filter named 'inlien'"),
        ("{% include '_licence.md.j2' %}", ":4: card.templates: a template includes a file that is not a template"),
        ("{% include '_license.md.j2' %}", ":4: card.templates: a template is malformed: it includes or calls itself"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", ":4: card.templates: a template is malformed: it includes"),
        ("{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}", ": card.templates: its parts are nested too deeply"),
        ("{% if 1 %}" * 200 + "{% endif %}" * 200, ": card.templates: too many levels of indentation"),
        (f"{{% if here.branch == '{ACT_ORDER}' %}}\nhuggingface-cli\n{{% endif %}}", ":5: card.templates: huggingface"),
    ],
)
def test_what_the_audit_of_the_card_refuses_is_an_error_of_the_plan(
    text: str, problem: str, tmp_path: Path, builds: Builds
) -> None:
    recipe_file = with_templates(builds.copy(tmp_path), f"## Licence\n\n{'{# #}'}\n{text}\n")
    with pytest.raises(PlanError) as caught:
        make_plan(recipe_file)
    assert f"{tmp_path / 'card' / LICENSE}{problem}" in caught.value.why
    assert "a" * 34 not in caught.value.why, "a secret is not shown whole"


def test_many_mistakes_of_a_loop_are_found_with_few_pages(
    tmp_path: Path, builds: Builds, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, rendered, real = builds.copy(tmp_path), list[str](), PredictedCards.page

    def page_of(cards: PredictedCards, branch: str, own: OwnTemplates | None) -> str:
        rendered.append(branch)
        return real(cards, branch, own)

    monkeypatch.setattr(PredictedCards, "page", page_of)
    with_templates(recipe, "{% for i in range(300) %}\nhuggingface-cli {{ i }}\n{% endfor %}\n")
    recipe_file = with_templates(recipe, "## The files\n", "_provided_files.md.j2")
    with pytest.raises(PlanError) as caught:
        make_plan(recipe_file)
    assert caught.value.why.count("\n") == 0, "what is wrong in all branches is said once"
    assert f"{tmp_path / 'card' / LICENSE}: card.templates: huggingface-cli is gone" in caught.value.why
    assert len(rendered) <= 4 * len(tiny_recipe.BRANCHES), "for each branch: with, with none, and without each template"


def test_a_template_that_takes_too_much_memory_is_an_error_of_the_card() -> None:
    with pytest.raises(CardError, match=r"card/_license\.md\.j2:1: .*\n  why: it takes more memory than there is"):
        page(own("{{ ('x' * 10 ** 15) | length }}"))


@pytest.mark.parametrize(
    "text",
    [
        "{{ here.provenance.quality.perplexity }}",
        "{{ here.provenance.quality | figure('perplexity') }}",
        "{{ here.provenance.linears[0].loss }}",
        "{{ here.provenance.versions['autogptq'] }}",
        "{{ here.provenance.versions.get('autogptq') + '!' }}",
        "{{ 'of ' + here.provenance.versions.get('autogptq') }}",
        "{{ 1 / (here.provenance.linears | selectattr('damp_percent', 'gt', 0.01) | list | length) }}",
        "{% set many = here.provenance.linears | selectattr('loss', 'gt', 1) | list | length %}{{ 1 / many }}",
        "{% set card = here.provenance.versions %}{{ card.autogptq }}",
        "{{ here.provenance.device.index('RTX') }}",
        "{{ (here.provenance.linears | selectattr('loss', 'gt', 1) | first).name }}",
        "{{ 1 / here.provenance.linears |\nselectattr('loss', 'gt', 1) | list | length }}",
        "{{ 1 / (\nhere.provenance.linears | selectattr('loss', 'gt', 1) | list | length) }}",
        "{{ speed[0].forward }}",
        "{% if is_preview %}\n\n<form>\n{% endif %}",
        "{% if is_preview %}\n\n<form>\n{% else %}\n<a onclick='x'></a>\n{% endif %}",
        "{% if here.provenance.quality %}{% set better = 1 %}{% endif %}{{ better }}",
        "{% if here.provenance.quality %}measured{% else %}{{ '{{ perplexity }}' }}{% endif %}",
        "{% if is_preview %}huggingface-cli{% endif %}",
        "{% for file in here.provenance.files %}{{ file | code }}{% else %}{{ '{{ files }}' }}{% endfor %}",
        "{{ picture[0] if picture else '{{ picture }}' }}",
        "{{ '{{ how }}' if not here.provenance.loaders[0].ran }}",
        PYTHON.format(
            "perplexity = {{ here.provenance.quality.perplexity if here.provenance.quality else 'not yet' }}"
        ),
        PYTHON.format("device = {{ here.provenance.device | replace(' ', '_') }}"),
        PYTHON.format("{% if speed %}{% endif %}import torch"),
        "`huggingface` and {{ card.title | inline }}",
    ],
)
def test_a_template_that_needs_what_is_measured_is_no_error_of_the_plan(
    text: str, tmp_path: Path, builds: Builds
) -> None:
    recipe_file = with_templates(builds.copy(tmp_path), f"## Licence\n\n{text}\n")
    assert make_plan(recipe_file).variants


def test_made_up_figures_stand_for_all_that_a_build_finds(tmp_path: Path, builds: Builds) -> None:
    recipe, dist = builds.copy(tmp_path), tmp_path / "dist"
    content = json.loads(recipe.read_text())
    content["loaders"]["required"] = ["transformers"]
    recipe.write_text(json.dumps(content))
    recipe_file = RecipeFile.load(recipe)
    plan = make_plan(recipe_file)
    receipt = tiny_recipe.workspace(dist).read_receipt(MAIN)
    assert receipt is not None
    built = receipt.provenance
    before = predicted_record(recipe_file, plan.architecture, plan.variants[0])
    made_up = with_made_up_figures(before, recipe_file.recipe, plan.architecture.linear_names, 0)
    pairs = [(before, made_up, built)]
    pairs += [(getattr(before, name), getattr(made_up, name), getattr(built, name)) for name in TEXTS]
    for known, invented, real in pairs:
        fields = set(type(known).model_fields) - {"recipe_digest"}
        unknown = {field for field in fields if getattr(known, field) != getattr(real, field)}
        assert {"digest", "text_sha256"} & unknown or {"quality", "linears", "files", "loaders"} <= unknown
        assert [field for field in unknown if getattr(invented, field) == getattr(known, field)] == []
    assert made_up.loaders[0].ran
    assert len(made_up_runs(made_up)) == len(made_up.loaders)
    task = EvaluationTask(name="birds", data=TaskData(path="birds.jsonl"), fewshot=TaskData(path="shots.jsonl"))
    evaluation = recipe_file.recipe.evaluation.model_copy(update={"tasks": (task,)})
    asked = recipe_file.recipe.model_copy(update={"evaluation": evaluation})
    assert [each.name for each in with_made_up_figures(before, asked, (), 0).tasks] == ["birds"]


@pytest.mark.parametrize("name", ["demo-llama", "llama-2-13b-chat", "families/qwen3-8b"])
def test_a_page_with_made_up_figures_is_a_whole_card(name: str) -> None:
    recipe_file = RecipeFile.load(ROOT / "recipes" / f"{name}.yaml")
    plan = make_plan(recipe_file)
    cards = PredictedCards(recipe_file=recipe_file, architecture=plan.architecture, variants=plan.variants)
    whole = cards.made_up_page(MAIN, None)
    assert_well_formed(whole)
    assert words_problems(split_front_matter(whole)[1]) == []
    assert "## How these files were made" in whole
    assert "not measured" not in whole
    assert "not built yet" not in whole


def test_built_in_templates_as_those_of_a_recipe_are_no_error_of_the_plan(tmp_path: Path, builds: Builds) -> None:
    recipe = builds.copy(tmp_path)
    for path in sorted(templates_dir().glob("_*.j2")):
        recipe_file = with_templates(recipe, path.read_text(encoding="utf-8"), path.name)
    assert make_plan(recipe_file).variants


@pytest.mark.parametrize("folder", ["nowhere", "recipe.yaml", "../card", "/usr", "link"])
def test_the_folder_is_one_inside_that_of_the_recipe(folder: str, tmp_path: Path, builds: Builds) -> None:
    recipe = builds.copy(tmp_path / "recipe")
    (tmp_path / "outside").mkdir()
    (recipe.parent / "link").symlink_to(tmp_path / "outside")
    with pytest.raises(RecipeError, match=r"card\.templates"):
        with_templates(recipe, "", folder=folder)


def test_a_template_that_leads_out_of_the_folder_is_refused(tmp_path: Path, builds: Builds) -> None:
    recipe_file = with_templates(builds.copy(tmp_path / "recipe"), "")
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "recipe" / "card" / "_webui.md.j2").symlink_to(tmp_path / "secret")
    with pytest.raises(RecipeError, match="_webui"):
        make_plan(recipe_file)
