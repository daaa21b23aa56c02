"""`packager publish` from a recipe to the Hub, as a maintainer runs it: in a process of its own, by environment."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from packager.errors import AuditError, PublishError
from packager.variant import place_of
from tests import tiny_recipe
from tests.loopback_hub import Account, LoopbackHub
from tests.publish_fixtures import git, heads, trees
from tests.test_house_rules import ROOT
from tests.tiny_recipe import ACT_ORDER, BRANCHES, MAIN, REPOSITORY, THREE_BITS

pytestmark = pytest.mark.slow

PROGRAM = "from packager.cli.main import main; main()"
TOKEN, READER = "hf_a_secret_that_writes_0123456789", "hf_a_secret_that_reads_0123456789"


class HubReleaseFixture:
    """A built recipe whose target is the Hub, an empty Hub, and a command line."""

    def __init__(self, folder: Path, recipe: Path, hub: LoopbackHub) -> None:
        self.folder, self.recipe, self.dist, self.hub = folder, recipe, folder / "dist", hub
        self.environ = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "GIT_"))}
        self.environ |= {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(folder / "hf"), "PYTHONPATH": str(ROOT)}
        self.stderr = ""

    @property
    def path(self) -> Path:
        return self.hub.repository(REPOSITORY).path

    def run(self, *arguments: object, token: str = TOKEN, code: int = 0, program: str = PROGRAM) -> str:
        """Run a command, and return what it wrote to standard output."""
        command = [sys.executable, "-c", program, *map(str, arguments)]
        environ = self.environ | ({"HF_TOKEN": token} if token else {})
        done = subprocess.run(
            command, env=environ, cwd=self.folder, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL
        )
        assert done.returncode == code, done.stderr
        self.stderr = done.stderr
        for secret in (TOKEN, READER):
            assert secret not in done.stdout + done.stderr
        return done.stdout

    def publish(self, *options: object, **settings: Any) -> str:
        return self.run("publish", self.recipe, "--dist", self.dist, *options, **settings)

    def asked(self) -> list[str]:
        """Return the requests since the last call."""
        requests = [f"{request.method} {request.path}" for request in self.hub.requests]
        self.hub.requests.clear()
        return requests


@pytest.fixture
def fixture(builds: tiny_recipe.Builds, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[HubReleaseFixture]:
    tokens = {TOKEN: Account("tester"), READER: Account("tester", role="read")}
    project = tmp_path / "project"
    layout = getattr(request, "param", "branches")
    recipe = builds.copy(project, {"repository.target": "hub", "repository.layout": layout})
    with LoopbackHub(tmp_path / "hub", tokens=tokens) as hub:
        yield HubReleaseFixture(project, recipe, hub)


@pytest.mark.slow
def test_a_maintainer_plans_publishes_checks_and_publishes_again(fixture: HubReleaseFixture) -> None:
    plan = json.loads(fixture.publish("--dry-run", "--format", "json"))
    assert [(entry["branch"], entry["action"]) for entry in plan["branches"]] == [
        (ACT_ORDER, "create"),
        (THREE_BITS, "create"),
        (MAIN, "create"),
    ]
    assert plan["dry_run"]
    fixture.publish(code=PublishError.exit_code)
    assert "--yes" in fixture.stderr
    assert "standard input is not a terminal" in fixture.stderr
    assert [request for request in fixture.asked() if not request.startswith(("GET ", "HEAD "))] == []

    report = json.loads(fixture.publish("--yes", "--tag", "v1.0", "--format", "json"))
    assert {entry["branch"]: entry["commit"] for entry in report["branches"]} == {
        branch: heads(fixture.path)[branch] for branch in BRANCHES
    }
    assert git("rev-parse", "v1.0^{commit}", cwd=fixture.path).strip() == heads(fixture.path)[MAIN]
    fixture.asked()
    published, sent = trees(fixture.path), len(fixture.hub.uploaded)
    report = json.loads(fixture.publish("--yes", "--format", "json"))
    assert {entry["action"] for entry in report["branches"]} == {"unchanged"}
    assert [request for request in fixture.asked() if not request.startswith("GET ")] == []
    assert (trees(fixture.path), len(fixture.hub.uploaded)) == (published, sent)

    shown = fixture.run("status", fixture.recipe, "--dist", fixture.dist)
    assert shown.count("not read") == 3
    assert f"packager verify-published hub:{REPOSITORY}" in shown
    result = json.loads(fixture.run("verify-published", REPOSITORY, "--full", "--format", "json"))
    assert [branch["findings"] for branch in result["branches"]] == [[], [], []]
    fixture.run("rollback", REPOSITORY, "--yes", code=PublishError.exit_code)
    assert "nothing to go back to" in fixture.stderr


@pytest.mark.slow
def test_an_edit_is_uploaded_alone_and_rolled_back(fixture: HubReleaseFixture) -> None:
    fixture.publish("--yes")
    fixture.publish("--tag", "v1", code=PublishError.exit_code)
    assert "+ tag v1 on main" in fixture.stderr
    fixture.publish("--tag", "v1", "--yes")
    before, sent = trees(fixture.path), len(fixture.hub.uploaded)
    recipe = json.loads(fixture.recipe.read_text())
    recipe["card"]["title"] = "Tiny the second"
    fixture.recipe.write_text(json.dumps(recipe))
    fixture.run("card", fixture.recipe, "--dist", fixture.dist)
    plan = json.loads(fixture.publish("--dry-run", "--format", "json"))
    changed = [[change["name"] for change in entry["changed"]] for entry in plan["branches"]]
    assert changed == [["README.md", "provenance.json", "recipe.yaml"]] * 3
    fixture.publish("--yes")
    assert len(fixture.hub.uploaded) == sent, "the weights are the same"
    assert trees(fixture.path).keys() == before.keys()
    assert not set(trees(fixture.path).values()) & set(before.values())
    fixture.run("verify-published", REPOSITORY)
    fixture.run("rollback", REPOSITORY, code=PublishError.exit_code)
    assert "--yes" in fixture.stderr
    fixture.run("rollback", REPOSITORY, "--yes")
    assert trees(fixture.path) == before
    assert len(fixture.hub.uploaded) == sent
    fixture.run("verify-published", REPOSITORY)
    fixture.hub.commit(REPOSITORY, {"config.json": b"{}"}, branch=ACT_ORDER)
    result = json.loads(fixture.run("verify-published", REPOSITORY, "--format", "json", code=AuditError.exit_code))
    assert [branch["branch"] for branch in result["branches"] if branch["findings"]] == [ACT_ORDER]


@pytest.mark.parametrize(
    ("token", "words"),
    [("", "there is no token"), (READER, "for reading only"), ("hf_nobody_knows_this_one", "HF_TOKEN")],
)
def test_the_error_for_a_token_names_its_problem(fixture: HubReleaseFixture, token: str, words: str) -> None:
    fixture.publish("--yes", token=token, code=PublishError.exit_code)
    assert words in fixture.stderr
    assert not token or token not in fixture.stderr
    assert [request for request in fixture.asked() if not request.startswith(("GET ", "HEAD "))] == []


@pytest.mark.slow
def test_a_ci_job_publishes_by_its_identity(fixture: HubReleaseFixture) -> None:
    """Its repository is there already: a trusted publisher is named in a repository's settings."""
    hf = str(Path(sys.executable).with_name("hf"))
    environ = fixture.environ | {"HF_TOKEN": TOKEN}
    subprocess.run([hf, "repos", "create", REPOSITORY], env=environ, capture_output=True, check=True)
    fixture.environ |= {"GITHUB_ACTIONS": "true", "HF_OIDC_RESOURCE": REPOSITORY}
    fixture.publish("--yes", token="", code=PublishError.exit_code)
    assert "the Hub gave this CI job no token" in fixture.stderr
    assert "id-token: write" in fixture.stderr
    fixture.hub.ci_secret, fixture.hub.trusting = "the_job_s_secret_0123456789", REPOSITORY
    fixture.environ |= {
        "ACTIONS_ID_TOKEN_REQUEST_URL": f"{fixture.hub.endpoint}/_loopback/id-token?api-version=2.0",
        "ACTIONS_ID_TOKEN_REQUEST_TOKEN": fixture.hub.ci_secret,
    }
    printed = fixture.publish("--yes", "--tag", "v1", token="") + fixture.stderr
    assert set(heads(fixture.path)) == set(BRANCHES)
    secrets = {fixture.hub.ci_secret, *fixture.hub.identities, *fixture.hub.tokens}
    assert len(secrets) == 5
    files = [path for path in fixture.folder.rglob("*") if path.is_file()]
    for secret in secrets:
        assert secret not in printed
        assert [str(path) for path in files if secret.encode() in path.read_bytes()] == []


def test_the_token_is_in_no_file_and_in_no_address(fixture: HubReleaseFixture) -> None:
    fixture.publish("--yes", "--tag", "v1")
    files = [path for path in fixture.folder.parent.rglob("*") if path.is_file()]
    assert len(files) > 50
    assert [str(path) for path in files if TOKEN.encode() in path.read_bytes()] == []
    assert [request.path for request in fixture.hub.requests if TOKEN in request.path] == []


@pytest.mark.parametrize("fixture", ["repos"], indirect=True)
def test_a_repository_per_variant_and_a_collection(fixture: HubReleaseFixture) -> None:
    places = {branch: place_of(REPOSITORY, "repos", branch).repository for branch in BRANCHES}
    fixture.publish("--yes", "--tag", "v1")
    plan = json.loads(fixture.publish("--dry-run", "--format", "json"))
    assert plan["final_steps"] == []
    (collection,) = json.loads((fixture.hub.root / "collections.json").read_text()).values()
    assert collection["title"] == "Tiny GPTQ"
    assert [item["id"] for item in collection["items"]] == [places[branch] for branch in BRANCHES]
    for branch, place in places.items():
        path = fixture.hub.repository(place).path
        assert list(heads(path)) == [MAIN]
        assert json.loads(git("show", "main:provenance.json", cwd=path))["branch"] == branch
        assert git("rev-parse", "v1^{commit}", cwd=path).strip() == heads(path)[MAIN]
    fixture.asked()
    report = json.loads(fixture.publish("--yes", "--format", "json"))
    assert {entry["action"] for entry in report["branches"]} == {"unchanged"}
    assert [request for request in fixture.asked() if not request.startswith("GET ")] == []


def test_every_weight_byte_is_hashed_once_and_sent_once(fixture: HubReleaseFixture) -> None:
    """The digest serves the receipt, the audit, the comparison with the Hub and the upload alike."""
    time.sleep(2.1)  # what has just been written may still change unnoticed, and is hashed again
    counting = (
        "import hashlib, json, sys\n"
        "from packager.cli.main import app\n"  # first: it sets what the client must not use
        "import huggingface_hub.lfs, packager.publish.targets\n"
        "packager.publish.targets.NEVER_IN_GIT_BYTES = 50_000\n"
        "file_digest, hashed = hashlib.file_digest, []\n"
        "def count(stream, *rest):\n"
        "    hashed.append(stream.name)\n"
        "    return file_digest(stream, *rest)\n"
        "hashlib.file_digest = count\n"
        "huggingface_hub.lfs.sha_fileobj = count\n"
        "app(sys.argv[1:], standalone_mode=False)\n"
        "json.dump([str(name) for name in hashed], open('hashed.json', 'w'))\n"
    )
    fixture.publish("--yes", program=counting)
    weights = sorted(str(path) for path in (fixture.dist / "builds").rglob("*.safetensors"))
    hashed = json.loads((fixture.folder / "hashed.json").read_text())
    assert sorted(name for name in hashed if name in weights) == weights
    sent = [upload.received for upload in fixture.hub.uploaded]
    assert sorted(sent) == sorted(Path(path).stat().st_size for path in weights)


@pytest.mark.slow
def test_a_plan_is_saved_without_a_token_and_published_with_one(fixture: HubReleaseFixture) -> None:
    """As the release workflow does: the job that plans has no right at all."""
    plan, options = fixture.folder / "plan.json", ("--dry-run", "--save-plan", fixture.folder / "plan.json")

    def asked_to_write() -> list[str]:
        return [request for request in fixture.asked() if not request.startswith(("GET ", "HEAD "))]

    assert "| create |" in fixture.publish(*options, "--format", "markdown", token="")
    assert asked_to_write() == []
    fixture.publish("--plan", plan, code=PublishError.exit_code, token="")
    assert "there is no token" in fixture.stderr
    assert asked_to_write() == []
    fixture.publish("--plan", plan)
    before = heads(fixture.path)
    fixture.publish("--plan", plan)
    assert heads(fixture.path) == before

    fixture.publish(*options, token="")
    fixture.hub.commit(REPOSITORY, {"NEWS.md": b"news"}, branch=THREE_BITS)
    fixture.asked()
    fixture.publish("--plan", plan, code=PublishError.exit_code)
    assert f"{THREE_BITS}: its head:" in fixture.stderr
    assert asked_to_write() == []
    fixture.publish(*options, token="")
    assert TOKEN not in plan.read_text()
    fixture.publish("--plan", plan)
    assert (
        trees(fixture.path)[THREE_BITS] == git("rev-parse", f"{before[THREE_BITS]}^{{tree}}", cwd=fixture.path).strip()
    )
