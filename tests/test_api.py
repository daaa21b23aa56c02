"""The Python interface: the example of its page, the table of its page, and what it refuses."""

import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

from packager import api
from packager.errors import MachineError, PublishError, RecipeError
from packager.publish.targets.local import LocalTarget
from tests import tiny_recipe
from tests.import_graph import ROOT
from tests.publish_fixtures import heads

PAGE = (ROOT / "docs" / "reference" / "python.md").read_text(encoding="utf-8")


def test_the_example_of_the_page_runs_as_it_is_printed(
    builds: tiny_recipe.Builds, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = builds.copy(tmp_path)
    (tmp_path / "recipes").symlink_to(tmp_path)
    (tmp_path / "demo-llama.yaml").write_bytes(recipe.read_bytes())
    (tmp_path / "demo-llama.lock.json").write_bytes(recipe.with_suffix(".lock.json").read_bytes())
    monkeypatch.chdir(tmp_path)
    (example,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    exec(compile(example, "docs/reference/python.md", "exec"), {})  # noqa: S102, the page's own example
    *lines, head = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == [*tiny_recipe.BRANCHES, *tiny_recipe.BRANCHES]
    assert head == heads(tiny_recipe.hub_folder(Path("dist")))["main"]
    assert [each.state for each in api.status("recipes/demo-llama.yaml")] == ["built"] * 3
    assert api.card("recipes/demo-llama.yaml", branch="three-bits", quiet=True).startswith("---\n")


def test_the_table_of_the_page_has_the_functions_and_their_arguments() -> None:
    rows = dict(re.findall(r"^\| `(\w+)\((.*?)\)` \|", PAGE, re.MULTILINE))
    functions = [name for name in api.__all__ if inspect.isfunction(getattr(api, name))]
    assert sorted(rows) == sorted(functions)
    for name, row in rows.items():
        parameters = inspect.signature(getattr(api, name)).parameters.values()
        names = [each.name for each in parameters if each.kind is not each.KEYWORD_ONLY]
        keywords = [each.name for each in parameters if each.kind is each.KEYWORD_ONLY]
        assert row == ", ".join([*names, *(["*"] if keywords else []), *keywords])


def test_importing_it_imports_nothing_heavy() -> None:
    code = "import sys, packager.api; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert not loaded & {"torch", "numpy", "pydantic", "typer", "rich", "huggingface_hub"}


def test_what_others_see_is_changed_only_if_the_caller_says_so(
    builds: tiny_recipe.Builds, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = builds.copy(tmp_path)
    monkeypatch.setattr(LocalTarget, "is_public", property(lambda _: True))
    with pytest.raises(PublishError, match="others can see this repository") as caught:
        api.publish(recipe, dist=tmp_path / "dist", quiet=True)
    assert "in_public=True" in caught.value.hint
    assert heads(tiny_recipe.hub_folder(tmp_path / "dist")) == {}
    assert api.publish(recipe, dist=tmp_path / "dist", dry_run=True, quiet=True).dry_run
    report = api.publish(recipe, dist=tmp_path / "dist", in_public=True, quiet=True)
    assert [outcome.plan.action for outcome in report.outcomes] == ["create"] * 3


def test_errors_are_those_of_the_commands(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("schema_version: 1\n")
    with pytest.raises(RecipeError) as caught:
        api.plan(tmp_path / "recipe.yaml")
    assert len(caught.value.problems) > 1
    assert issubclass(MachineError, api.PackagerError)
