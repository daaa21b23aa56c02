"""The commands of the how-tos and of the first tutorial, typed word for word, in order, in a folder as the page has it.

Models and texts are tiny, and the Hub is a loopback one. `NOT_TYPED` has the lines that a test cannot type, with the
reason: a line that is neither typed nor listed there fails.
"""

import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from ruamel.yaml import YAML
from typer.testing import CliRunner

from packager.cli import publishing
from packager.cli.main import app
from packager.pipeline.plan import make_plan
from packager.recipe.file import RecipeFile
from tests import tiny_recipe
from tests.import_graph import ROOT
from tests.loopback_hub import Account, LoopbackHub
from tests.publish_fixtures import heads, log_in

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("in_process"),
    pytest.mark.filterwarnings("ignore:Use .content=:DeprecationWarning"),  # of the Hub's client
]
DOCS = ROOT / "docs"
TOKEN = "hf_a_secret_that_writes_0123456789"  # noqa: S105
INSTALLS = "the tests run in an installation"
NOT_TYPED: Mapping[str, str] = {
    "pip install .": INSTALLS,
    "python3 -m venv .venv": INSTALLS,
    ". .venv/bin/activate": INSTALLS,
    'pip install -c constraints.txt -e ".[build]"': INSTALLS,
    "pip install --require-hashes --only-binary=:all: -r locks/base.txt": INSTALLS,
    "pip install --no-index --no-deps --no-build-isolation .": INSTALLS,
    "nox -s build-all": "nox makes environments; test_twenty_recipes.py releases many recipes",
    "nox -s build-all -- --strict": "nox makes environments; test_cli.py releases strictly",
    "nox -s sbom": "nox makes environments",
    "docker build --tag gptq-packager .": "CI has Docker",
    'docker run --rm --gpus all --security-opt seccomp=unconfined --volume "$PWD:/work" gptq-packager build '
    "recipes/llama-2-13b-chat.yaml": "CI has Docker, and no GPU",
    "packager audit hub:TheBloke/Llama-2-7B-GPTQ@gptq-4bit-32g-actorder_True": "test_audit_published.py has a Hub",
    "packager audit https://huggingface.co/TheBloke/Llama-2-7B-GPTQ/tree/gptq-4bit-32g-actorder_True": (
        "test_audit_published.py has a Hub"
    ),
    "packager audit https://git.example.org/me/model.git@main": "test_audit_published.py has a git server",
    "packager release --recipes 'my-recipes/*.yaml' --jobs 2": "test_fleet_release.py releases by processes",
    "pip install 'gptq-packager[fleet]'": INSTALLS,
    "packager release --recipes '/shared/recipes/*.yaml' --ray 10.0.0.7:6379 --store s3://bucket/fleet "
    "--dist /data/packager --disk 2TB --yes": "test_ray_release.py has a cluster",
    "packager card recipes/demo-llama.yaml --keep published --dry-run": "test_card_sections.py keeps words",
    "packager queue recipes --store /mnt/store": "test_queue.py has a store",
    "packager queue recipes --store s3://bucket/fleet --format json": "test_queue.py has a store",
    "sky jobs launch --secret HF_TOKEN --secret PACKAGER_READ_TOKEN docs/examples/launchers/skypilot.yaml": (
        "nox -s launchers has SkyPilot"
    ),
}
PASSPHRASE = {"PACKAGER_SIGN_PASSPHRASE": "a long passphrase"}  # a command takes it out of its environment
VARIANTS = [{"branch": "main", "group_size": 32}, {"group_size": 32, "desc_act": True}]
Before = Mapping[str, Callable[[], object]]


def lines(page: str) -> list[str]:
    """Return the lines of a page's shell blocks."""
    blocks = re.findall(r"```shell\n(.*?)```", (DOCS / page).read_text(encoding="utf-8"), re.DOTALL)
    return [line for block in blocks for line in block.splitlines()]


def type_page(page: str, before: Before | None = None) -> dict[str, str]:
    """Type a page's commands in the present folder; `before` has what comes to pass before a line of it."""
    known, printed = dict(before or {}), {}
    for line in lines(page):
        known.pop(line, lambda: None)()
        if line in NOT_TYPED:
            continue
        if line.startswith("packager "):
            command, _, file = line.partition(" > ")
            words = _words(command)
            done = CliRunner().invoke(app, words, prog_name="packager", input="y\n" * 3, env=PASSPHRASE)
            assert done.exit_code == 0, f"{line}: {done.output}"
            printed[line] = done.stdout
            if file:
                Path(file).write_text(done.stdout)
        else:
            finished = subprocess.run(line, shell=True, capture_output=True, text=True, check=False)  # noqa: S602
            assert finished.returncode == 0, f"{line}: {finished.stderr}"
            printed[line] = finished.stdout
    assert not known, "the page has these lines no more"
    return printed


def _words(command: str) -> list[str]:
    """Return the words that a shell makes of a command, with the files that its patterns find."""
    script = f"for word in {command}; do printf '%s\\0' \"$word\"; done"
    shown = subprocess.run(["/bin/sh", "-c", script], capture_output=True, check=True)
    return shown.stdout.decode().split("\0")[1:-1]


def write(name: str, repository: str, **changes: Any) -> Path:
    """Write a recipe into recipes/, whose model and texts are there."""
    fields = {"repository.id": repository, "variants": VARIANTS, **changes}
    return tiny_recipe.write_recipe(Path("recipes"), fields, name=name)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with recipes/ and the inputs of tiny recipes, in which commands are typed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    tiny_recipe.write_inputs(tmp_path / "recipes")
    return tmp_path


@pytest.fixture
def hub(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackHub]:
    with LoopbackHub(folder / "hub", tokens={TOKEN: Account("somebody", orgs=("some-org",))}) as hub:
        log_in(hub, TOKEN, monkeypatch)
        constants = huggingface_hub.constants
        address = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace("https://huggingface.co", hub.endpoint)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder / "cache"))
        yield hub


def run(*words: object) -> None:
    done = CliRunner().invoke(app, [str(word) for word in words], env=PASSPHRASE)
    assert done.exit_code == 0, done.output


def test_write_a_recipe(folder: Path, hub: LoopbackHub) -> None:
    model = folder / "recipes" / "model"
    (model / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    huggingface_hub.HfApi().create_repo("some-org/Some-Model-7B")
    huggingface_hub.HfApi().upload_folder(repo_id="some-org/Some-Model-7B", folder_path=model)
    for number, name in enumerate(("my-recipe.yaml", "my-other-recipe.yaml")):
        write(name, f"your-name/Some-Model-{number}-GPTQ")
    printed = type_page("how-to/write-a-recipe.md")
    assert "your-name/Some-Model-7B-GPTQ" in Path("some-model-7b.yaml").read_text()
    assert [each for each in printed if "--set calibration" in each]
    assert (folder / "dist" / "trial").is_dir()
    assert sorted(path.name for path in (folder / "dist" / "builds" / "your-name").iterdir()) == [
        "Some-Model-0-GPTQ",
        "Some-Model-1-GPTQ",
    ]


def test_check_compatibility_and_audit_a_folder(folder: Path) -> None:
    recipe = write("demo-llama.yaml", "demo/demo-llama-GPTQ")
    printed = type_page("how-to/check-compatibility.md")
    assert "vLLM 0.32" in printed["packager compat recipes/demo-llama.yaml"]
    tiny_recipe.build(recipe, folder / "dist")
    tiny_recipe.publish(recipe, folder / "dist")
    built = folder / "dist" / "builds" / "demo" / "demo-llama-GPTQ" / "main"
    shutil.copytree(built, folder / "some" / "folder")

    def damage() -> None:
        """Declare another group size, as somebody's copy that needs a repair does."""
        for name in ("config.json", "quantize_config.json"):
            path = folder / "some" / "folder" / name
            content = json.loads(path.read_text())
            content.get("quantization_config", content)["group_size"] = 16
            path.write_text(json.dumps(content))
        shutil.rmtree(folder / "new", ignore_errors=True)

    def repaired() -> None:
        assert json.loads((folder / "new" / "folder" / "quantize_config.json").read_text())["group_size"] == 32
        shutil.rmtree(folder / "some")
        shutil.copytree(built, folder / "some" / "folder")

    typed = type_page(
        "how-to/audit-a-folder.md",
        {
            "packager fix some/folder --output new/folder --dry-run": damage,
            "packager audit some/folder --format json > report.json": repaired,
        },
    )
    assert "nothing was written: a dry run" in typed["packager fix some/folder --output new/folder --dry-run"]
    assert typed["packager audit dist/hub/models/demo/demo-llama-GPTQ@main"].startswith("passed")
    assert json.loads(Path("report.json").read_text())["passed"] is True
    assert json.loads(Path("report.sarif").read_text())["version"] == "2.1.0"
    assert "<testsuite" in Path("report.xml").read_text()


@pytest.mark.long
def test_release_from_ci(folder: Path) -> None:
    for name, repository in (
        ("llama-2-13b-chat.yaml", "large/model-GPTQ"),
        ("demo-llama.yaml", "demo/demo-llama-GPTQ"),
    ):
        write(name, repository)

    def build_the_demo() -> None:
        run("build", "recipes/demo-llama.yaml")

    dry_run = "packager publish recipes/demo-llama.yaml --dry-run --save-plan plan.json"
    type_page("how-to/release-from-ci.md", {dry_run: build_the_demo})
    status = json.loads(Path("status.json").read_text())
    assert "schema_version" in status
    assert sorted(path.name for path in Path("dist/hub/models").iterdir()) == ["demo", "large"]


@pytest.mark.long
def test_publish(folder: Path, hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> None:
    run("build", write("demo-llama.yaml", "demo/demo-llama-GPTQ"))

    answered: list[object] = []

    def publish_to_hub(title: str, *options: str) -> None:
        changes = {"repository.target": "hub", "card.title": title}
        run("card", write("model.yaml", "somebody/Model-GPTQ", **changes))
        run("publish", "recipes/model.yaml", "--yes", *options)

    def three_releases() -> None:
        for title in ("One", "Two", "Three"):
            publish_to_hub(title, "--sign-key", "sign.key")

    def first() -> None:
        run("build", write("model.yaml", "somebody/Model-GPTQ"))
        publish_to_hub("Zero")

    # Nobody sits at a terminal here who could answer "y".
    monkeypatch.setattr(publishing, "ask_for_consent", lambda _, assume_yes: repr if assume_yes else answered.append)
    # openssl asks a terminal for the passphrase; this one answers for the person who sits there.
    (folder / "bin").mkdir()
    answers = 'case "$1" in genpkey) set -- "$@" -pass env:TYPED;;\n'
    answers += 'pkey) set -- "$@" -passin env:TYPED;; esac\n'
    (folder / "bin" / "openssl").write_text(f'#!/bin/sh\n{answers}exec "{shutil.which("openssl")}" "$@"\n')
    (folder / "bin" / "openssl").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("TYPED", PASSPHRASE["PACKAGER_SIGN_PASSPHRASE"])
    printed = type_page(
        "how-to/publish.md",
        {
            "packager choose hub:somebody/Model-GPTQ --vram 12GB --runtime vllm --context 8192": first,
            "packager verify-published hub:somebody/Model-GPTQ --trusted-key sign.pub --min-release 3": three_releases,
            # The page goes back in a repository that nobody signed; this one is signed by now.
            "packager rollback hub:somebody/Model-GPTQ --dry-run": lambda: monkeypatch.setenv(
                "PACKAGER_SIGN_KEY", "sign.key"
            ),
        },
    )
    choice = printed["packager choose hub:somebody/Model-GPTQ --vram 12GB --runtime vllm --context 8192"]
    assert choice.splitlines()[-1].startswith("take main: ")
    signed = printed["packager verify-published hub:somebody/Model-GPTQ --trusted-key sign.pub --min-release 3"]
    assert "release 3, signed by" in signed
    back = printed["packager rollback hub:somebody/Model-GPTQ --sign-key sign.key"]
    assert "put back" in back
    assert len(answered) == 1, "of the page's changes others see one"


@pytest.mark.long
def test_the_variant_that_the_tutorial_adds_can_be_built(tmp_path: Path) -> None:
    """With the demo's own model and required loaders, which the typed page below replaces by tiny ones."""
    text = (DOCS / "tutorial/first-release.md").read_text()
    added = re.findall(r"```yaml\n(variants:.*?)```", text, re.DOTALL)[0]
    recipe = shutil.copytree(ROOT / "recipes", tmp_path / "recipes") / "demo-llama.yaml"
    changed, count = re.subn(r"(?m)^variants:\n(?:  .*\n)+", added, recipe.read_text())
    recipe.write_text(changed)
    planned = [each.variant.branch for each in make_plan(RecipeFile.load(recipe)).variants]
    (branch,) = re.findall(r"`status` shows that `([^`]*)` is not built", text)
    assert (count, len(planned), planned[-1]) == (1, 5, branch)


def test_the_first_release(folder: Path) -> None:
    write("demo-llama.yaml", "demo/demo-llama-GPTQ")
    page = "tutorial/first-release.md"
    added = YAML(typ="safe").load(re.findall(r"```yaml\n(.*?)```", (DOCS / page).read_text(), re.DOTALL)[0])["variants"]
    typed, again = lines(page), "packager status recipes/demo-llama.yaml"
    assert typed.count(again) == 2
    printed = type_page(page)
    assert "4 bits" not in printed[again]
    assert (folder / "my-variant" / "provenance.json").is_file()
    assert {"branch": "main", "group_size": 128} in added
    more = {"bits": 8, "group_size": 32, "desc_act": True}  # of the tiny model, whose groups are smaller
    write("demo-llama.yaml", "demo/demo-llama-GPTQ", variants=[*VARIANTS, more])
    for line in typed[-3:]:
        run(*_words(line))
    published = heads(Path("dist/hub/models/demo/demo-llama-GPTQ"))
    assert set(published) == {"main", "gptq-4bit-32g-actorder_True", "gptq-8bit-32g-actorder_True"}


def test_run_on_a_cluster(folder: Path) -> None:
    write("one.yaml", "demo/one-GPTQ")
    write("two.yaml", "demo/two-GPTQ", **{"calibration.num_samples": 0})
    printed = type_page("how-to/run-on-a-cluster.md")["packager queue recipes"]
    assert "2 recipes: 1 parked, 1 requested" in printed


def test_every_line_is_of_a_page() -> None:
    pages = [
        *(path.relative_to(DOCS).as_posix() for path in (DOCS / "how-to").glob("*.md")),
        "tutorial/first-release.md",
    ]
    typed = {line for page in pages for line in lines(page)}
    assert set(NOT_TYPED) <= typed
    untested = {page for page in pages if set(lines(page)) - set(NOT_TYPED)} - {
        "how-to/write-a-recipe.md",
        "how-to/check-compatibility.md",
        "how-to/audit-a-folder.md",
        "how-to/release-from-ci.md",
        "how-to/publish.md",
        "how-to/run-on-a-cluster.md",
        "tutorial/first-release.md",
    }
    assert untested == set()
