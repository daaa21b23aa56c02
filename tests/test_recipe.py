import json
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest

from packager import recipe as models
from packager.errors import RecipeError
from packager.recipe import Recipe
from packager.recipe.checks import FILE_FIELDS, FOLDER_FIELDS, LICENSE_FILES_FIELD
from packager.recipe.fields import Strict
from packager.recipe.file import RecipeFile, load_recipe
from packager.recipe.licenses import LLAMA2_NOTICE
from packager.recipe.schema import recipe_schema
from tests.golden_files import check_golden
from tests.locks import write_lock
from tests.recipe_fixtures import CONFIG, GOOD, RECIPES, ROOT, edited, load_or_error, problems_of, write_files

LLAMA_13B = ROOT / "recipes" / "llama-2-13b-chat.yaml"
ASSETS_13B = ROOT / "recipes" / "assets" / "llama-2-13b-chat"


@pytest.fixture
def folder(tmp_path):
    write_files(tmp_path / "recipes")
    return tmp_path / "recipes"


def load_text(folder, text):
    path = folder / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return load_recipe(path)


def test_a_good_recipe_loads_with_its_defaults(folder):
    recipe = load_text(folder, GOOD)
    assert recipe.calibration.num_samples == 128
    assert recipe.defaults.damp_percent == 0.01
    assert [variant.branch for variant in recipe.expanded_variants()] == ["main", "gptq-4bit-32g-actorder_True"]
    assert recipe.loaders.required == ("autogptq",)


def test_typing_is_yaml_1_2_not_1_1(folder):
    text = edited(
        ("  bits: 4\n", "  damp_percent: 1e-2\n  bits: 0x4\n"),
        ("title: Demo", "title: no"),
        ("creator: demo", "creator: 2026-11-23"),
        ("quantized_by: demo", "quantized_by: 1_000"),
    )
    recipe = load_text(folder, text)
    assert recipe.defaults.damp_percent == 0.01
    assert recipe.defaults.bits == 4
    assert (recipe.card.title, recipe.card.creator, recipe.card.quantized_by) == ("no", "2026-11-23", "1_000")


def test_the_digest_ignores_comments_and_layout(folder):
    first = load_text(folder, GOOD).digest()
    assert (
        load_text(folder, "# a comment\n\n" + GOOD.replace("license: {id: mit}", "license:\n    id: mit")).digest()
        == first
    )
    assert load_text(folder, GOOD.replace("title: Demo", "title: Other")).digest() != first


def test_an_empty_licence_file_is_no_licence(folder):
    (folder / "model" / "LICENSE").touch()
    (folder / "NOTICE").touch()
    text = edited(("license: {id: mit}", "license: {id: mit, files: [NOTICE], base_files: [LICENSE]}"))
    assert problems_of(folder, text) == [
        "24:30: card.license.files[0]: the file 'NOTICE' is empty (the audit refuses empty files in a branch)",
        "24:52: the base model's file 'LICENSE' is empty: no licence (correct the name, or ship the file with the "
        "recipe and name it in card.license.files)",
    ]


def test_strings_are_never_rendered(folder):
    title = "{{ 7 * 7 }} {% include '/etc/passwd' %} ${HOME} %(x)s"
    assert load_text(folder, edited(("title: Demo", f'title: "{title}"'))).card.title == title


def test_every_mistake_of_a_file_is_reported_at_once(request, monkeypatch):
    monkeypatch.chdir(ROOT / "tests" / "golden" / "recipe_errors")
    with pytest.raises(RecipeError) as raised:
        load_recipe(Path("many_mistakes.yaml"))
    update = request.config.getoption("--update-golden", default=False)
    check_golden("recipe_errors/many_mistakes.txt", f"{raised.value}\n", update)


@pytest.mark.parametrize(
    ("edit", "expected"),
    [
        # one value
        (("bits: 4", "bits: 5"), "12:9: defaults.bits must be 2, 3, 4 or 8, got the number 5"),
        (("bits: 4", "bits: 4.0"), "12:9: defaults.bits must be a whole number, got the number 4.0 (write 4)"),
        (("bits: 4", "bits: true"), "12:9: defaults.bits must be a whole number, got true"),
        (("bits: 4", "bits:"), "12:3: defaults.bits must be a whole number, got nothing"),
        (
            ("    group_size: 128", "    group_size: abc"),
            "15:17: variants[0].group_size must be a whole number, got the text 'abc'",
        ),
        (
            ("desc_act: true", "desc_act: True_"),
            "16:32: variants[1].desc_act must be true or false, got the text 'True_'",
        ),
        (
            ("title: Demo", "title: 13"),
            "21:10: card.title must be text, got the number 13 (put it in quotes)",
        ),
        (
            ("schema_version: 1", "schema_version: 2"),
            "1:17: schema_version 2 is not known: this packager reads schema_version 1 "
            "(use a packager of that version, or bring the recipe to this one)",
        ),
        (
            ("schema_version: 1", "schema_version: '1'"),
            "1:17: schema_version must be a whole number, got the text '1' (write 1, without quotes)",
        ),
        (("schema_version: 1", "schema_version: true"), "1:17: schema_version must be a whole number, got true"),
        # missing and unknown keys
        (
            ("  title: Demo\n", ""),
            "20:1: card.title is missing (the model's name as people know it, e.g. Meta's Llama 2 13B-chat)",
        ),
        (("license: {id: mit}", "license: {}"), "24:3: card.license.id is missing (the Hub's licence identifier, "),
        (("defaults:", "default:"), "11:1: unknown key 'default' (did you mean 'defaults'?)"),
        (
            ("license: {id: mit}", "license: {id: mit, zzz: 1}"),
            "24:22: unknown key 'zzz' in card.license (known here: id, link, files, base_files)",
        ),
        (("  bits: 4\n", "  bits: 4\n  seq_len: 8\n"), "13:3: unknown key 'seq_len' in defaults"),
        # sources
        (("  path: model\n", ""), "3:1: base_model: give either revision (read from the Hub) or path (a local folder)"),
        (
            ("  path: model\n", f"  revision: {'a' * 40}\n"),
            f"5:13: base_model.revision is '{'a' * 40}', the lock recipe.lock.json is of 'a local folder' (make the ",
        ),
        (
            ("  path: calibration.txt\n", "  dataset: a/b\n"),
            "6:1: calibration: a Hub dataset needs its revision and split",
        ),
        (
            ("  path: evaluation.txt\n", "  path: evaluation.txt\n  split: test\n"),
            "8:1: evaluation: revision, split and config belong to a Hub dataset, not to a local file",
        ),
        (("demo/demo-GPTQ", "Demo/demo"), "2:18: repository.id is the base model's own id"),
        # branches
        (
            ("branch: main", "branch: base"),
            "13:1: no variant has the branch 'main', which a recipe has exactly once "
            "(readers who name no branch get main: add `branch: main` to one variant)",
        ),
        (
            ("{group_size: 32,", "{branch: main, group_size: 32,"),
            "16:14: two variants have the branch 'main', which a recipe has exactly once (the first is at line 14)",
        ),
        (
            ("{group_size: 32, desc_act: true}", "{}\n  - {group_size: 128}"),
            "17:5: two variants have the branch 'gptq-4bit-128g-actorder_static' (the first is at line 16)",
        ),
        (
            ("{group_size: 32,", "{branch: MAIN, group_size: 32,"),
            "16:14: the branches 'main' and 'MAIN' differ only in case (the first is at line 14)",
        ),
        (
            ("{group_size: 32, desc_act: true}", "{act_order: static}\n  - {act_order: full, desc_act: false}"),
            "17:33: variants[2]: act_order: full contradicts desc_act: false, which is act_order: none (",
        ),
        (
            ("bits: 4", "act_order: none\n  desc_act: true"),
            "13:13: defaults: act_order: none contradicts desc_act: true, which is act_order: full (leave ",
        ),
        (
            ("{group_size: 32, desc_act: true}", "{act_order: group}\n  - {act_order: group}"),
            "17:5: two variants have the branch 'gptq-4bit-128g-actorder_group' (the first is at line 16)",
        ),
        (
            ("desc_act: true", "act_order: statc"),
            "16:33: variants[1].act_order must be 'none', 'group', 'static' or 'full', got the text 'statc' (did ",
        ),
        (
            ("desc_act: true", "desc_act: true, static_groups: true"),
            "16:38: unknown key 'static_groups' in variants[1] (write act_order: static in the ",
        ),
        (
            ("desc_act: true", "act_order: group, engine: auto-gptq"),
            "16:48: engine auto-gptq cannot do act_order: group (write act_order: none or static or full in ",
        ),
        (
            ("bits: 4", "scale_search: sined"),
            "12:17: defaults.scale_search must be true, false or 'signed', got the text 'sined' (did you mean",
        ),
        (
            ("desc_act: true", "scale_search: signed, sym: false"),
            "16:49: scale_search: signed is for symmetric grids (an asymmetric grid needs no negative scale: ",
        ),
        (
            ("desc_act: true", "scale_search: signed, engine: auto-gptq"),
            "16:52: engine auto-gptq cannot do scale_search: signed (write scale_search: false in this variant, ",
        ),
        (
            ("desc_act: true", "refine: true, engine: auto-gptq"),
            "16:44: engine auto-gptq cannot do refine: true (write refine: false in this variant, or engine: native",
        ),
        (
            ("desc_act: true", "target_correction: 0.5, engine: auto-gptq"),
            "16:54: engine auto-gptq cannot do target_correction: 0.5 (write target_correction: 0 in this variant, ",
        ),
        (
            ("desc_act: true", "target_correction: 0.5, true_sequential: false"),
            "16:63: target_correction needs true_sequential: true (without it, linears are calibrated on inputs that ",
        ),
        (("bits: 4", "target_correction: 1.5"), "12:22: defaults.target_correction must be at most 1, got the number"),
        # damping, rows, loaders
        (("bits: 4", "damp_percent_limit: 0.001"), "12:23: damp_percent_limit 0.001 is less than damp_percent 0.01"),
        (
            ("  path: evaluation.txt\n", "  path: evaluation.txt\n  num_tokens: 64\n"),
            "10:15: evaluation.num_tokens 64 is less than one row of evaluation.seq_len 2048",
        ),
        (
            ("  path: calibration.txt\n", "  path: calibration.txt\n  seq_len: 8192\n"),
            "8:12: calibration.seq_len 8192 is more than the 4096 positions of the base model",
        ),
        (
            ("[transformers]", "[autogptq]"),
            "19:18: the loader 'autogptq' is listed both as required and as if_available",
        ),
        (("[transformers]", "[transformers, transformers]"), "19:32: the loader 'transformers' is listed twice in "),
        # files
        (("path: model", "path: modell"), "5:9: base_model.path: there is no folder 'modell' in the recipe's folder "),
        (("path: calibration.txt", "path: model"), "7:9: calibration.path: 'model' is not a file"),
        (
            ("path: calibration.txt", "path: ../secret.txt"),
            "7:9: calibration.path must be relative to the recipe's folder and may not leave it, "
            "got the text '../secret.txt'",
        ),
        (("path: evaluation.txt", "path: ./calibration.txt"), "9:9: evaluation reads the same text as calibration "),
        (("questions.jsonl", "calibration.txt"), "10:14: evaluation.questions is the calibration text "),
        (
            ("{id: mit}", "{id: mit, files: [model/config.json]}"),
            "24:30: a licence file cannot be named 'config.json': ",
        ),
        (
            ("{id: mit}", "{id: mit, base_files: [a/b]}"),
            "24:35: card.license.base_files[0] must be a file name without",
        ),
        (("{id: mit}", "{id: mit, base_files: [LICENSE]}"), "24:35: the base model has no file 'LICENSE'"),
        # shapes
        (
            ("group_size: 32,", "group_size: 256,"),
            "16:18: group_size 256 does not divide the 640 in_features of down_proj "
            "(these fit every linear: -1, 8, 16, 32, 64, 128)",
        ),
        (
            ("    group_size: 128", "    group_size: 96"),
            "15:17: group_size 96 does not divide the 256 in_features of q_proj, k_proj, v_proj, o_proj, gate_proj, "
            "up_proj and the 640 in_features of down_proj",
        ),
    ],
)
def test_each_rule_names_its_line_and_column(folder, edit, expected):
    found = problems_of(folder, edited(edit))
    assert len(found) == 1, found
    assert found[0].startswith(expected), found[0]


def test_columns_must_fill_words(folder):
    config = {**CONFIG, "hidden_size": 40, "intermediate_size": 64}
    write_lock(folder / "recipe.yaml", config, "demo/demo")
    text = edited(
        ("bits: 4", "bits: 3"), ("    group_size: 128", "    group_size: -1"), ("group_size: 32", "group_size: 8")
    )
    names = "q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj"
    assert problems_of(folder, text) == [f"12:9: 3-bit values of {names} do not fill 32-bit words"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{", "the lock {path} cannot be read: "),
        ("[" * 100_000, "the lock {path} cannot be read: "),
        ("[]", "the lock {path} cannot be read: it is not a JSON object"),
        ("{}", "the lock {path} is not valid: lock_version: Field required"),
        (None, "there is no lock recipe.lock.json beside the recipe"),
    ],
)
def test_a_lock_that_describes_no_model_is_refused(folder, text, expected):
    path = folder / "recipe.lock.json"
    if text is None:
        path.unlink()
    else:
        path.write_text(text)
    (found,) = problems_of(folder, GOOD)
    assert found.startswith(f"3:1: {expected.format(path=path)}")
    assert found.endswith(f"(make it: packager lock {folder / 'recipe.yaml'})")


def test_a_lock_that_contradicts_itself_is_refused(folder):
    path = folder / "recipe.lock.json"
    path.write_text(path.read_text().replace('"in_features": 640', '"in_features": 641'))
    (found,) = problems_of(folder, GOOD)
    assert found.startswith(
        "3:1: recipe.lock.json: the lock contradicts itself: model.layers.0.mlp.down_proj.weight is "
    )
    assert found.endswith("(make it anew: packager lock)")


@pytest.mark.parametrize(
    ("base", "locked", "expected"),
    [
        ("id: demo/other", None, "4:7: base_model.id is 'demo/other', the lock recipe.lock.json is of 'demo/demo'"),
        (
            "path: model",
            "a" * 40,
            "5:9: base_model.path is 'model', the lock recipe.lock.json is of 'aaaa",
        ),
        (f"revision: {'a' * 40}", "a" * 40, ""),
        (
            f"revision: {'b' * 40}",
            "a" * 40,
            f"5:13: base_model.revision is '{'b' * 40}', the lock recipe.lock.json is of ",
        ),
    ],
)
def test_a_lock_is_of_the_base_model_that_the_recipe_names(folder, base, locked, expected):
    write_lock(folder / "recipe.yaml", CONFIG, "demo/demo", locked)
    old = "id: demo/demo\n" if base.startswith("id") else "path: model\n"
    found = problems_of(folder, edited((f"  {old}", f"  {base}\n")))
    assert [problem[: len(expected)] for problem in found] == ([expected] if expected else [])


def test_slices_of_one_split_count_as_the_same_text(folder):
    source = f"  dataset: a/b\n  revision: {'a' * 40}\n  split: "
    edits = [
        ("  path: calibration.txt\n", source + "train[:10%]\n"),
        ("  path: evaluation.txt\n", source.replace("a/b", "A/B") + "train[10%:]\n"),
    ]
    assert problems_of(folder, edited(*edits))[0].startswith("13:10: evaluation reads the same text as calibration")
    assert problems_of(folder, edited(*edits).replace("train[10%:]", "test")) == []


def test_checks_across_fields_run_whatever_else_is_wrong(folder):
    found = problems_of(
        folder,
        edited(
            ("{id: demo/demo-GPTQ}", "{id: 7}"),
            ("  title: Demo\n", ""),
            ("path: evaluation.txt", "path: calibration.txt"),
            ("branch: main", "branch: other"),
            ("[transformers]", "[autogptq]"),
            ("group_size: 32,", "group_size: 256, colour: red,"),
        ),
    )
    assert [line.split(" (")[0] for line in found] == [
        "2:18: repository.id must be text, got the number 7",
        "9:9: evaluation reads the same text as calibration",
        "13:1: no variant has the branch 'main', which a recipe has exactly once",
        "16:18: group_size 256 does not divide the 640 in_features of down_proj",
        "16:23: unknown key 'colour' in variants[1]",
        "19:18: the loader 'autogptq' is listed both as required and as if_available",
        "20:1: card.title is missing",
    ]


def test_a_wrong_value_is_reported_once_and_not_guessed_around(folder):
    found = problems_of(folder, edited(("branch: main", "branch: [main]"), ("defaults:\n  bits: 4", "defaults: 4")))
    assert found == [
        "11:11: defaults must be a mapping (indented `key: value` lines), got the number 4",
        "13:13: variants[0].branch must be text, got a list",
    ]


@pytest.mark.parametrize("name", ["link.txt", "linked/secret.txt"])
def test_links_out_of_the_folder_are_refused(folder, name):
    (folder.parent / "secret.txt").write_text("secret")
    (folder / "link.txt").symlink_to(folder.parent / "secret.txt")
    (folder / "linked").symlink_to(folder.parent)
    found = problems_of(folder, edited(("path: calibration.txt", f"path: {name}")))
    leaves = f"'{name}' leaves the recipe's folder through a symbolic link (put a copy of the file there)"
    assert found == [f"7:9: calibration.path: {leaves}"]
    (folder / "recipe.yaml").write_text(GOOD)
    file = RecipeFile.load(folder / "recipe.yaml")
    with pytest.raises(RecipeError, match="leaves the recipe's folder"):
        file.resolve(name)


def test_links_and_loops_inside_the_folder(folder):
    (folder / "inside.txt").symlink_to("calibration.txt")
    (folder / "loop").symlink_to("loop")
    assert problems_of(folder, edited(("path: calibration.txt", "path: inside.txt"))) == []
    assert problems_of(folder, edited(("path: calibration.txt", "path: loop")))[0].startswith(
        "7:9: calibration.path: there"
    )
    linked = edited(("path: calibration.txt", "path: inside.txt"), ("path: evaluation.txt", "path: calibration.txt"))
    assert problems_of(folder, linked)[0].startswith("9:9: evaluation reads the same text as calibration")


def test_resolve_returns_real_paths_and_raises_for_missing_files(folder):
    (folder / "recipe.yaml").write_text(GOOD)
    file = RecipeFile.load(folder / "recipe.yaml")
    assert file.folder == folder
    assert file.resolve("model") == (folder / "model").resolve()
    assert file.resolve("calibration.txt").read_text() == "calibration.txt"
    (folder / "calibration.txt").unlink()
    with pytest.raises(RecipeError, match="there is no file 'calibration"):
        file.resolve("calibration.txt")


def test_the_error_for_a_missing_recipe_names_the_recipes_nearby(folder):
    (folder / "demo-llama.yaml").write_text(GOOD)
    (folder / ".pre-commit-config.yaml").write_text("repos: []\n")
    (folder / "folder.yaml").mkdir()
    with pytest.raises(RecipeError, match=r"there is no recipe .*demo\.yaml\n  hint: in .* there is demo-llama\.yaml"):
        load_recipe(folder / "demo.yaml")
    with pytest.raises(RecipeError, match=r"there is demo-llama\.yaml$"):  # and neither of the others
        load_recipe(folder / "nothere.yaml")
    with pytest.raises(RecipeError, match="is not a file"):
        load_recipe(folder)


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        ("{branch: main, bits: 9}", ": variants[0].bits must be 2, 3, 4 or 8, got the number 9"),
        ("{branch: main, mix: {bits: [4, 8], mean: 4}}", ": variants[0]: mix.mean is between 4 and 8"),
        (
            "{branch: main, act_order: full, desc_act: false}",
            ": variants[0]: act_order: full contradicts desc_act: false",
        ),
    ],
)
def test_of_an_only_variant_its_own_mistake_is_named(tmp_path, entry, says):
    """And not that the list is empty, which it is for pydantic when its entry is refused."""
    write_files(tmp_path)
    old = "  - branch: main\n    group_size: 128\n  - {group_size: 32, desc_act: true}\n"
    (problem,) = problems_of(tmp_path, edited((old, f"  - {entry}\n")))
    assert says in problem
    (problem,) = problems_of(tmp_path, edited((f"variants:\n{old}", "variants: []\n")))
    assert "variants must have at least 1 entry" in problem


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_shipped_recipe_loads_and_keeps_to_the_schema(path):
    recipe = load_recipe(path)
    schema = "../" * len(path.relative_to(ROOT / "recipes").parts[1:]) + "recipe.schema.json"
    assert path.read_text(encoding="utf-8").startswith(f"# yaml-language-server: $schema={schema}\n")
    jsonschema.Draft202012Validator(recipe_schema()).validate(recipe.model_dump(mode="json", exclude_unset=True))
    branches = ["main", "gptq-4bit-32g-actorder_True", "gptq-4bit-64g-actorder_True", "gptq-4bit-128g-actorder_True"]
    small = path.parent.name == "real"  # groups of 128 do not divide these models' widths
    assert [variant.branch for variant in recipe.expanded_variants()] == branches[: 2 if small else 4]


def test_the_recipes_that_are_shipped():
    """A release run builds those of the folder itself; those below it need the Hub, and are built when asked for."""
    assert [path.relative_to(ROOT / "recipes").as_posix() for path in RECIPES] == [
        "demo-llama.yaml",
        "families/llama-3.1-8b-instruct.yaml",
        "families/mistral-7b-instruct-v0.3.yaml",
        "families/qwen3-8b.yaml",
        "llama-2-13b-chat.yaml",
        "real/gemma-3-270m.yaml",
        "real/smollm2-135m-instruct.yaml",
    ]


def test_the_demo_asks_questions_that_its_model_was_trained_on():
    demo = RecipeFile.load(ROOT / "recipes" / "demo-llama.yaml")
    assert demo.recipe.evaluation.questions is not None
    lines = demo.resolve(demo.recipe.evaluation.questions).read_text(encoding="utf-8").splitlines()
    assert {json.loads(line)["prompt"] for line in lines} >= {
        *demo.recipe.loaders.prompts,
        demo.recipe.card.example_prompt,
    }


def test_the_13b_recipe_has_the_true_prompt_and_licence():
    card = load_recipe(LLAMA_13B).card
    assert card.system_prompt is not None
    assert card.prompt_template.template == f"[INST] <<SYS>>\n{card.system_prompt}\n<</SYS>>\n\n{{prompt}} [/INST]"
    assert card.license.base_files == ("LICENSE.txt", "USE_POLICY.md")
    notice = (ASSETS_13B / "Notice").read_text(encoding="utf-8")
    copyright_line = "Copyright (c) Meta Platforms, Inc. All Rights Reserved."
    assert notice == f"Llama 2 is licensed under the LLAMA 2 Community License, {copyright_line}\n"


def test_the_original_card_is_whole_and_its_mistakes_are_gone():
    card = (ASSETS_13B / "original_card.md").read_text(encoding="utf-8")
    assert "llamaste" not in card
    assert "`<<SYS>>` tags" in card
    assert "Llama-2-13b-chat-hf)|\n" in card
    tables = [block.splitlines() for block in card.split("\n\n") if block.startswith("|")]
    assert [len(table) for table in tables] == [5, 6, 9, 9, 5, 5]
    for table in tables:
        assert len({row.count("|") for row in table}) == 1, table


def test_every_relative_path_is_checked_on_disk():
    assert _relative_paths(Recipe) == {*FILE_FIELDS, *FOLDER_FIELDS, LICENSE_FILES_FIELD}


def _relative_paths(model, prefix=()):
    found = set()
    for name, field in model.model_fields.items():
        text = f"{field.annotation} {field.metadata}"
        for inner in vars(models).values():
            if isinstance(inner, type) and issubclass(inner, Strict) and inner in _types(field.annotation):
                found |= _relative_paths(inner, (*prefix, name))
        if "_relative_path" in text or "_folder_path" in text:
            found.add((*prefix, name))
    return found


def _types(annotation):
    return {annotation, *getattr(annotation, "__args__", ())}


def test_loading_imports_nothing_heavy():
    code = (
        "import sys\nfrom pathlib import Path\nfrom packager.recipe.file import load_recipe\n"
        f"load_recipe(Path({str(LLAMA_13B)!r}))\n"
        "heavy = {'torch', 'transformers', 'numpy', 'huggingface_hub', 'jinja2', 'rich', 'typer', 'git', 'yaml'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("license_", "expected"),
    [
        ("{id: llama2}", "the licence llama2 demands files named LICENSE, USE_POLICY, NOTICE in every branch"),
        ("{id: Llama2, files: [Notice]}", "demands files named LICENSE, USE_POLICY in every branch"),
        ("{id: llama-2}", "the Hub has no licence id 'llama-2' (did you mean llama2?)"),
        ("{id: apache 2}", "(did you mean apache-2.0?)"),
        ("{id: Apache License 2.0, link: 'https://example.org'}", "(did you mean apache-2.0?)"),
        ("{id: MIT License}", "(did you mean mit?)"),
        ("{id: GPL v3}", "(did you mean gpl-3.0?)"),
        ("{id: CC BY 4.0}", "(did you mean cc-by-4.0?)"),
        ("{id: house-rules}", "the recipe does not give this licence's text"),
        ("{id: other}", "'other' is not the name of a licence"),
        ("{id: '!!!'}", "'!!!' is not the name of a licence"),
        ("{id: llama2, files: [bad/Notice], base_files: [LICENSE.txt, USE_POLICY.md]}", "this Notice lacks a sentence"),
        ("{id: llama2, files: [Notice], base_files: [LICENSE.txt, USE_POLICY.md]}", ""),
        ("{id: house-rules, files: [Notice]}", ""),
        ("{id: house-rules, link: 'https://example.org'}", ""),
        ("{id: llama5, link: 'https://example.org'}", ""),
        ("{id: ' MIT '}", ""),
    ],
)
def test_a_licence_is_checked_before_anything_is_built(folder, license_, expected):
    (folder / "bad").mkdir()
    (folder / "bad" / "Notice").write_text("Llama 2")
    (folder / "Notice").write_text(LLAMA2_NOTICE.replace(" is ", "\nis "))
    for name in ("LICENSE.txt", "USE_POLICY.md"):
        (folder / "model" / name).write_text("words")
    write_lock(folder / "demo.yaml", CONFIG, "demo/demo")
    (folder / "demo.yaml").write_text(edited(("license: {id: mit}", f"license: {license_}")))
    found = load_or_error(folder / "demo.yaml")
    assert expected in str(found) if expected else isinstance(found, Recipe), found
