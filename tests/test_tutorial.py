"""The tutorial for a model of one's own, typed as it is printed; and the site that shows it."""

import importlib.util
import json
import re
import shlex
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from ruamel.yaml import YAML
from typer.testing import CliRunner

from packager.cli.main import app
from tests.import_graph import ROOT
from tests.publish_fixtures import git
from tests.tiny_recipe import sentences, write_inputs

PAGE = ROOT / "docs" / "tutorial" / "own-model.md"
MOST_COMMANDS = 10
CARD = "---\nlicense: apache-2.0\nlanguage: [en]\n---\n# My model\n"


def commands() -> list[list[str]]:
    """Return every line of the page's shell blocks, as words."""
    blocks = re.findall(r"```shell\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    return [shlex.split(line) for block in blocks for line in block.splitlines()]


def type_all(edit: Callable[[Path], None], *more: str) -> dict[str, str]:
    """Type the page's commands in the present folder; `edit` gets the recipe after `init`, `more` goes to `build`."""
    printed = {}
    for program, *words in commands():
        if program != "packager":  # uv: a test installs nothing
            continue
        added = more if words[0] == "build" else ()
        done = CliRunner().invoke(app, [*words, *added], prog_name="packager")
        assert done.exit_code == 0, f"{words}: {done.output}"
        printed[" ".join(words[:1] + [word for word in words if word == "--preview"])] = done.stdout
        if words[0] == "init":
            edit(Path("my-model.yaml"))
    return printed


def check_end(printed: dict[str, str]) -> None:
    repository = Path("dist/hub/models/your-name/My-Model-GPTQ")
    branches = git("for-each-ref", "--format=%(refname:short)", "refs/heads", cwd=repository).split()
    assert "main" in branches
    assert len(branches) > 1
    assert git("cat-file", "-t", "v1.0", cwd=repository).strip() == "tag"
    assert "apache-2.0" in git("show", "main:README.md", cwd=repository)
    assert printed["verify-published"].splitlines()[-1].startswith("passed")
    assert printed["card"].startswith("---\n")
    assert Path(printed["card --preview"].strip()).is_file()


def test_there_are_at_most_ten_commands() -> None:
    assert [words[0] for words in commands()] == ["uv", *["packager"] * (len(commands()) - 1)]
    assert len(commands()) <= MOST_COMMANDS


@pytest.mark.slow
def test_the_tutorial_as_it_is_printed(tmp_path: Path, in_process: None, monkeypatch: pytest.MonkeyPatch) -> None:
    write_inputs(tmp_path / "made")
    shutil.copytree(tmp_path / "made" / "model", tmp_path / "my-model")
    (tmp_path / "my-model" / "README.md").write_text(CARD)
    for name, count, seed in (("calibration", 600, 3), ("evaluation", 200, 4)):
        lines = (json.dumps({"text": line}) + "\n" for line in sentences(count, seed=seed).splitlines())
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    monkeypatch.chdir(tmp_path)

    def without_loaders(recipe: Path) -> None:
        """A test makes no environments; `nox -s tests-release` types the page with them."""
        text = recipe.read_text()
        changed = re.sub(r"(required|if_available): \[[^\]]*\]", r"\1: []", text)
        assert changed != text
        recipe.write_text(changed)

    check_end(type_all(without_loaders, "--device", "cpu"))


@pytest.mark.release
def test_the_tutorial_with_a_trained_model_and_its_loaders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    demo = ROOT / "recipes" / "assets" / "demo-llama"
    shutil.copytree(demo / "model", tmp_path / "my-model")
    (tmp_path / "my-model" / "README.md").write_text(CARD)
    for name in ("calibration.jsonl", "evaluation.jsonl"):
        shutil.copyfile(demo / "text" / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    cache = str(Path(request.config.getoption("--cache-folder")).expanduser())
    printed = type_all(lambda _: None, "--device", "cpu", "--cache", cache)
    check_end(printed)
    assert "transformers ok" in " ".join(printed["status"].split())


# The site


def site_pages() -> ModuleType:
    spec = importlib.util.spec_from_file_location("site_pages", ROOT / "docs" / "site_pages.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["site_pages"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def in_nav(entry: object) -> list[str]:
    if isinstance(entry, str):
        return [entry]
    children = entry.values() if isinstance(entry, dict) else entry
    assert not isinstance(children, int)
    return [name for child in children for name in in_nav(child)]  # type: ignore[attr-defined]


def test_every_page_has_a_place_in_the_site() -> None:
    config = YAML(typ="safe").load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    docs = ROOT / "docs"
    pages = {path.relative_to(docs).as_posix() for path in docs.rglob("*.md")}
    placed = set(in_nav(config["nav"]))
    assert pages - {name for name in pages if name.startswith("decisions/0")} <= placed
    assert placed - pages == {*site_pages().PAGES.values(), "decisions/index.md"}
    assert config["strict"] is True


def test_links_of_the_root_are_links_of_the_site() -> None:
    module = site_pages()
    text = (
        "[a](docs/how-to/publish.md#go-back) [b](SECURITY.md) [the [c] d](docs/decisions/) "
        "[e](recipes/demo-llama.yaml) [f](https://example.org/x.md) [g](#here) ![h](docs/images/card.png)"
    )
    assert module.links_of_root(text) == (
        "[a](how-to/publish.md#go-back) [b](security.md) [the [c] d](decisions/index.md) e "
        "[f](https://example.org/x.md) [g](#here) ![h](images/card.png)"
    )
    titles = module.decisions()
    for path in (ROOT / "docs" / "decisions").glob("0*.md"):
        assert f"]({path.name})" in titles
