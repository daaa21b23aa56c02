"""The layout `repos`: a repository for every variant, with its own card and address, published like branches."""

import re
import shutil
from pathlib import Path

import pytest

from packager.card import CardTexts, render_card
from packager.errors import RecipeError
from packager.pipeline import flow
from packager.pipeline.status import read_status
from packager.publish.branches import PublishReport
from packager.receipt import Provenance
from packager.recipe.file import RecipeFile
from packager.system.terminal import Terminal
from packager.variant import Place, place_of
from tests import card_fixtures as fixtures
from tests import tiny_recipe
from tests.card_page import assert_well_formed
from tests.golden_files import check_golden
from tests.publish_fixtures import files_in, git, heads
from tests.tiny_recipe import ACT_ORDER, BRANCHES, MAIN, REPOSITORY

pytestmark = pytest.mark.slow

PLACES = {branch: place_of(REPOSITORY, "repos", branch).repository for branch in BRANCHES}
REPOS = {"repository.layout": "repos"}


def test_main_has_the_repositorys_name_and_others_append_their_branch() -> None:
    assert PLACES[MAIN] == "tester/tiny-GPTQ"
    assert PLACES[ACT_ORDER] == "tester/tiny-GPTQ-gptq-4bit-16g-actorder_True"
    assert {place_of(REPOSITORY, "repos", branch).revision for branch in BRANCHES} == {MAIN}
    assert place_of(REPOSITORY, "branches", ACT_ORDER) == Place(repository=REPOSITORY, revision=ACT_ORDER)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"repository.target": "git", "repository.url": "https://git.example/x.git"}, "target git has one url"),
        ({"repository.target": "git", "repository.url": "https://bob:SECRET@git.example/x.git"}, "has credentials"),
        ({"repository.target": "git", "repository.url": "ssh://git:SECRET@git.example/x.git"}, "has credentials"),
        ({"variants": [{"branch": MAIN}, {"branch": "b" * 90}]}, "has 100 characters, the Hub takes at most 96"),
        ({"variants": [{"branch": MAIN}, {"branch": "a--b"}]}, "the Hub takes no repository tiny-GPTQ-a--b"),
        ({"repository.layout": "repo"}, "did you mean 'repos'"),
    ],
)
def test_an_impossible_layout_is_refused(tmp_path: Path, changes: dict[str, object], problem: str) -> None:
    path = tiny_recipe.write_all(tmp_path, REPOS | changes)
    with pytest.raises(RecipeError, match=problem) as caught:
        RecipeFile.load(path)
    assert "SECRET" not in str(caught.value)


def test_a_card_links_to_its_own_repository_and_names_the_others(update_golden: bool) -> None:
    recipe = fixtures.llama_recipe()
    recipe = recipe.model_copy(update={"repository": recipe.repository.model_copy(update={"layout": "repos"})})
    receipts = [receipt.model_copy(update={"layout": "repos"}) for receipt in fixtures.llama_receipts(recipe)]
    for branch in (MAIN, "gptq-4bit-32g-actorder_True"):
        expectations = fixtures.llama_expectations(recipe)
        text = render_card(recipe, CardTexts(), receipts, "llama", branch, expectations=expectations)
        assert_well_formed(text)
        own = place_of(recipe.repository.id, "repos", branch).repository
        commands = re.findall(r"(?m)^(?:hf download|git clone|vllm serve|python -m sglang).*$", text)
        assert len(commands) == (5 if branch == MAIN else 4), "vLLM refuses act order"
        assert [command for command in commands if not re.search(rf"{re.escape(own)}(?![\w-])", command)] == []
        assert "branch of the table" not in text
        assert f"{recipe.repository.id}:" not in text
        if branch != MAIN:
            check_golden("cards/fixture_repos_variant.md", text, update=update_golden)


class Scene:
    """A tiny recipe with a repository per variant, built, with what was published."""

    def __init__(self, folder: Path) -> None:
        self.dist, self.recipe = folder / "dist", RecipeFile.load(tiny_recipe.write_all(folder, REPOS))
        self.lines: list[str] = []
        tiny_recipe.build(self.recipe, self.dist)

    def publish(self, *, tag: str = "", dry_run: bool = False) -> PublishReport:
        options = tiny_recipe.options(self.dist)
        return flow.publish(self.recipe, options, Terminal(quiet=True), dry_run=dry_run, tag=tag)

    def path(self, branch: str) -> Path:
        return self.dist / "hub" / "models" / PLACES[branch]


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    return Scene(tmp_path_factory.mktemp("repos"))


def test_every_variant_gets_a_repository_and_its_own_files(scene: Scene) -> None:
    plan = scene.publish(dry_run=True).plan
    assert [(entry.branch, entry.action, entry.present_bytes) for entry in plan.branches] == [
        (ACT_ORDER, "create", 0),
        (tiny_recipe.THREE_BITS, "create", 0),
        (MAIN, "create", 0),
    ]
    assert not (scene.dist / "hub").exists()
    scene.publish(tag="v1")
    for branch in BRANCHES:
        path = scene.path(branch)
        assert list(heads(path)) == [MAIN]
        published = {name: data for name, data in files_in(path).items() if not name.startswith(".git/")}
        assert published == files_in(tiny_recipe.workspace(scene.dist).folder(branch))
        provenance = Provenance.model_validate_json(published["provenance.json"])
        assert (provenance.branch, provenance.place.repository) == (branch, PLACES[branch])
        assert PLACES[branch] in published["README.md"].decode()
        assert git("-C", str(path), "rev-parse", "v1^{commit}").strip() == heads(path)[MAIN]
    assert all(status.commit for status in read_status(scene.recipe, tiny_recipe.options(scene.dist)))
    assert scene.publish(tag="v1").plan.changing == ()


def test_files_of_another_repository_count_as_missing(scene: Scene) -> None:
    scene.publish()
    shutil.rmtree(scene.path(ACT_ORDER))
    entry, *others = scene.publish(dry_run=True).plan.branches
    assert (entry.branch, entry.action, entry.present_bytes) == (ACT_ORDER, "create", 0)
    assert {other.action for other in others} == {"unchanged"}
    scene.publish()
    assert files_in(scene.path(ACT_ORDER)).keys() >= {"README.md", "provenance.json"}
