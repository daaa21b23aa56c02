"""The tutorial for a model of one's own, typed as it is printed; and the site that shows it."""

import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

import pytest
from ruamel.yaml import YAML
from typer.testing import CliRunner

from packager.cli.main import app
from tests.import_graph import ROOT
from tests.publish_fixtures import git
from tests.tiny_recipe import sentences, write_inputs

Run = Callable[[Sequence[str]], str]
PAGE = ROOT / "docs" / "tutorial" / "own-model.md"
MOST_COMMANDS = 10
CARD = "---\nlicense: apache-2.0\nlanguage: [en]\n---\n# My model\n"


def commands() -> list[list[str]]:
    """Return every line of the page's shell blocks, as words."""
    blocks = re.findall(r"```shell\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    return [shlex.split(line) for block in blocks for line in block.splitlines()]


def type_all(run: Run, edit: Callable[[Path], None], *more: str) -> dict[str, str]:
    """Type the page's commands in the present folder; `edit` gets the recipe after `init`, `more` goes to `build`.

    Returns:
        What each command printed, by its name; of `card --preview` by both words.
    """
    printed = {}
    for program, *words in commands():
        added = more if words[0] == "build" else ()
        printed[" ".join(words[:1] + [word for word in words if word == "--preview"])] = run([program, *words, *added])
        if words[0] == "init":
            edit(Path("my-model.yaml"))
    return printed


def in_this_process(line: Sequence[str]) -> str:
    program, *words = line
    if program != "packager":  # uv: `test_a_new_user_with_a_real_model` installs
        return ""
    done = CliRunner().invoke(app, words, prog_name="packager")
    assert done.exit_code == 0, f"{words}: {done.output}"
    return done.stdout


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
        """A test makes no environments; `nox -s tests-tutorial` types the page with them."""
        text = recipe.read_text()
        changed = re.sub(r"(required|if_available): \[[^\]]*\]", r"\1: []", text)
        assert changed != text
        recipe.write_text(changed)

    check_end(type_all(in_this_process, without_loaders, "--device", "cpu"))


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
    printed = type_all(in_this_process, lambda _: None, "--device", "cpu", "--cache", cache)
    check_end(printed)
    assert "transformers ok" in " ".join(printed["status"].split())


# What a machine says of its indexes, certificates and proxies.
MACHINE = re.compile(r"(UV|PIP|SSL|REQUESTS|CURL)_\w+|(HTTPS?|NO|ALL)_PROXY", re.IGNORECASE)


class NewUser:
    """Types commands as a user of a bare machine: an empty home, no variable but those of the machine, no checkout.

    Args:
        home: an empty folder.
    """

    def __init__(self, home: Path) -> None:
        uv = shutil.which("uv")
        assert uv is not None, "uv is not on the PATH: nox -s tests-tutorial installs it"
        folders = [str(home / ".local" / "bin"), str(Path(uv).parent), "/usr/local/bin", "/usr/bin", "/bin"]
        machine = {name: value for name, value in os.environ.items() if MACHINE.fullmatch(name)}
        self.environ = {**machine, "HOME": str(home), "PATH": os.pathsep.join(folders), "LANG": "C.UTF-8"}

    def __call__(self, line: Sequence[str]) -> str:
        folder = ROOT if line[0] == "uv" else Path.cwd()  # the page installs in a checkout
        program = shutil.which(line[0], path=self.environ["PATH"])
        assert program is not None, f"{line[0]} is not there"
        done = subprocess.run(
            [program, *line[1:]], cwd=folder, env=self.environ, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{line}: {done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        return done.stdout


@pytest.fixture
def real_model(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """The folder that benchmarks/real_models.py writes: model/ and two texts."""
    if given := request.config.getoption("--real-model"):
        return Path(given).expanduser().absolute()
    made = tmp_path / "real"
    command = [sys.executable, str(ROOT / "benchmarks" / "real_models.py"), "smollm2-135m-instruct", str(made)]
    subprocess.run(command, check=True)
    return made


def two_small_variants(recipe: Path) -> None:
    """Leave two variants and few rows: all is as `init` wrote it but how long it takes."""
    yaml = YAML()
    content = yaml.load(recipe.read_text(encoding="utf-8"))
    content["calibration"].update(num_samples=16, seq_len=128)
    content["evaluation"].update(num_tokens=2048, seq_len=128)
    del content["variants"][2:]
    with recipe.open("w", encoding="utf-8") as stream:
        yaml.dump(content, stream)


@pytest.mark.release
def test_a_new_user_with_a_real_model(
    tmp_path: Path, real_model: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    home, day = tmp_path / "home", tmp_path / "day"
    shutil.copytree(real_model / "model", day / "my-model")
    for name in ("calibration.jsonl", "evaluation.jsonl"):
        shutil.copyfile(real_model / name, day / name)
    (home / ".cache").mkdir(parents=True)
    # The packages of the loaders are large: those of earlier runs are used.
    (home / ".cache" / "gptq-packager").symlink_to(Path(request.config.getoption("--cache-folder")).expanduser())
    monkeypatch.chdir(day)
    printed = type_all(NewUser(home), two_small_variants)
    check_end(printed)
    shown = " ".join(printed["status"].split())
    assert "transformers ok" in shown
    assert "onnxruntime ok" in shown
    receipts = [json.loads(path.read_text()) for path in (day / "dist" / "receipts").rglob("*.json")]
    assert len(receipts) == 2
    for provenance in (receipt["provenance"] for receipt in receipts):
        assert 0 < provenance["quality"]["kl_divergence"] < 1
        required = [record for record in provenance["loaders"] if record["required"]]
        assert {record["loader"]: record["status"] for record in required} == {
            "transformers": "passed",
            "onnxruntime": "passed",
        }


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
