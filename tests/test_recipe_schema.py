import json

import jsonschema
import pytest
from typer.testing import CliRunner

from packager.cli.main import app
from packager.recipe.fields import PATTERN_MEANINGS
from packager.recipe.schema import defaults_schema, recipe_schema, write_schema
from tests.recipe_fixtures import ROOT

SCHEMA_FILE = ROOT / "recipes" / "recipe.schema.json"


@pytest.mark.pinned
def test_the_schema_file_is_in_step(tmp_path, capsys):
    assert write_schema(["--check", str(SCHEMA_FILE)]) == 0
    assert write_schema(["--write", str(tmp_path / "schema.json")]) == 0
    assert (tmp_path / "schema.json").read_bytes() == SCHEMA_FILE.read_bytes()
    (tmp_path / "schema.json").write_text("{}")
    assert write_schema(["--check", str(tmp_path / "schema.json")]) == 1
    assert "--write" in capsys.readouterr().err
    assert write_schema([]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(SCHEMA_FILE.read_text(encoding="utf-8"))


def test_the_schema_describes_every_key():
    schema = recipe_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    for name, model in (("Recipe", schema), *schema["$defs"].items()):
        assert model["description"], name
        assert model["additionalProperties"] is False, name
        for key, field in model["properties"].items():
            assert "$ref" in field or (field["title"] and field["description"]), f"{name}.{key}"


def test_every_pattern_has_words():
    patterns = {value for key, value in _pairs(recipe_schema()) if key == "pattern"}
    assert patterns == set(PATTERN_MEANINGS)


def _pairs(value):
    if isinstance(value, dict):
        yield from value.items()
    for child in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _pairs(child)


def test_the_schema_of_what_recipes_extend_requires_nothing_and_refuses_what_is_no_key() -> None:
    checker = jsonschema.Draft202012Validator(defaults_schema())
    checker.check_schema(checker.schema)
    good = {"schema_version": 1, "calibration": {"num_samples": 4}, "card": {"quantized_by": "me"}}
    assert checker.is_valid(good)
    assert not checker.is_valid({key: value for key, value in good.items() if key != "schema_version"})
    for wrong in ({"extends": "other.yaml"}, {"card": {"titel": "x"}}, {"calibration": {"num_samples": "many"}}):
        assert not checker.is_valid({**good, **wrong})
    done = CliRunner().invoke(app, ["schema", "defaults"])
    assert json.loads(done.stdout) == defaults_schema()
