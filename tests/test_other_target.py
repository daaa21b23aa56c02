"""Targets of other packages: the example of docs/, as pip installs it, published to, and what can be wrong with one."""

import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from packager.cli.main import app
from packager.errors import PublishError, RecipeError
from packager.publish.targets.other_target import GROUP_OF_TARGETS, open_other_target
from packager.recipe.file import RecipeFile
from tests import tiny_recipe
from tests.installed_example import install_example
from tests.publish_fixtures import heads

PLUGGED = {"repository": {"id": tiny_recipe.REPOSITORY, "target": "plugin", "plugin": "acme"}}


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    more = ["none = acme_target:Mapping", "broken = acme_target:gone"]
    return install_example("target", GROUP_OF_TARGETS, tmp_path / "site", monkeypatch, more)


def test_a_recipe_is_published_to_the_target_of_another_package(
    builds: tiny_recipe.Builds, installed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = builds.copy(tmp_path / "tiny")
    tiny_recipe.write_recipe(recipe.parent, PLUGGED)
    tiny_recipe.build(recipe, recipe.parent / "dist")
    monkeypatch.setenv("ACME_ARCHIVE", str(tmp_path / "archive"))
    command = ["publish", str(recipe), "--dist", str(recipe.parent / "dist")]
    asked = CliRunner().invoke(app, command)
    assert "a confirmation is needed" in asked.stderr, "others see the archive, so a publish asks"
    done = CliRunner().invoke(app, [*command, "--yes"])
    assert done.exit_code == 0, done.output
    assert set(heads(tmp_path / "archive" / "models" / tiny_recipe.REPOSITORY)) == set(tiny_recipe.BRANCHES)
    assert not tiny_recipe.hub_folder(recipe.parent / "dist").exists()
    status = CliRunner().invoke(app, ["status", *command[1:]])
    assert (status.exit_code, "verify-published" in status.stdout) == (0, False)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("nobody", "no installed package has the target nobody.*there are: acme, broken, none"),
        ("broken", "the target broken cannot be opened.*AttributeError"),
        ("none", "the target none cannot be opened.*TypeError"),
        ("acme", "ACME_ARCHIVE is not set"),
    ],
)
def test_what_is_no_target_is_refused(installed: Path, name: str, why: str) -> None:
    with pytest.raises(PublishError) as caught:
        open_other_target(name, "a/b", {}, print)
    assert re.search(why, str(caught.value), re.DOTALL), str(caught.value)


def test_a_target_that_lacks_something_is_refused(installed: Path) -> None:
    with (installed / "__init__.py").open("a") as stream:
        stream.write("\n\ndef gone(*_: object) -> object:\n    return object()\n")
    with pytest.raises(PublishError, match=r"the target broken lacks methods of a target") as caught:
        open_other_target("broken", "a/b", {}, print)
    assert "it has no where, is_public, " in caught.value.why


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"target": "plugin"}, "target plugin needs the plugin's name"),
        ({"plugin": "acme"}, "plugin belongs to target plugin"),
        ({"target": "plugin", "plugin": "acme", "layout": "repos"}, "target plugin has one repository"),
        ({"target": "plugin", "plugin": "acme", "url": "https://example.org/x.git"}, "url belongs to target git"),
    ],
)
def test_keys_that_name_no_target_together_are_refused(tmp_path: Path, fields: dict[str, str], why: str) -> None:
    path = tiny_recipe.write_recipe(tmp_path, {"repository": {"id": "a/b", **fields}})
    with pytest.raises(RecipeError) as caught:
        RecipeFile.load(path)
    assert why in str(caught.value)
