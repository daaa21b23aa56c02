"""The release workflows: who has which right, what is compared before the publish, and the scripts of their steps."""

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

ROOT = Path(__file__).resolve().parent.parent
# Releases one recipe; release.yml, EVERY here, calls it for each.
TEXT = (ROOT / ".github" / "workflows" / "release-recipe.yml").read_text(encoding="utf-8")
WORKFLOW: dict[str, Any] = YAML(typ="safe").load(TEXT)
JOBS: dict[str, Any] = WORKFLOW["jobs"]
EVERY: dict[str, Any] = YAML(typ="safe").load(ROOT / ".github" / "workflows" / "release.yml")
SECRETS = ("secrets.", "github.token", "GITHUB_TOKEN", "HF_OIDC", "id-token")

# Stands for the command: it notes its arguments and what it finds in its environment, and writes the plan.
PACKAGER = """#!/bin/bash
command=$1
printf '%s\\n' "$*" >> "$RUNNER_TEMP/calls"
env | cut -d = -f 1 >> "$RUNNER_TEMP/variables"
[ -e "$RUNNER_TEMP/sign.key" ] && stat -c %a "$RUNNER_TEMP/sign.key" >> "$RUNNER_TEMP/modes"
while [ $# -gt 0 ]; do [ "$1" = --save-plan ] && echo '{"a": "plan"}' > "$2"; shift; done
if [ "$command" = plan ]; then cat "$RUNNER_TEMP/answer"; else echo '## a summary'; fi
exit ${PACKAGER_FAILS:-0}
"""


def steps(job: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = JOBS[job]["steps"]
    return found


def step(job: str, words: str) -> dict[str, Any]:
    """Return the one step of a job whose script has these words."""
    (found,) = [each for each in steps(job) if words in each.get("run", "")]
    return found


def artifact_of(step: dict[str, Any]) -> str:
    """Return the name of a step's artifact without the part that tells the recipes of a run apart, or ""."""
    name: str = step.get("with", {}).get("name", "")
    assert not name or name.startswith("${{ inputs.prefix }}")
    return name.removeprefix("${{ inputs.prefix }}")


def texts(value: object) -> Iterator[str]:
    """Yield every key and value below `value`."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield str(key)
            yield from texts(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from texts(inner)
    else:
        yield str(value)


def named(value: object) -> set[str]:
    """Return which of the words that mean a right or a secret are below `value`."""
    return {word for word in SECRETS for text in texts(value) if word in text}


def test_the_jobs_follow_each_other_and_people_approve_between_plan_and_publish() -> None:
    assert {name: job.get("needs") for name, job in JOBS.items()} == {
        "build": None,
        "plan": "build",
        "publish": ["build", "plan"],
        "verify": "publish",
    }
    assert {name: job.get("environment") for name, job in JOBS.items() if "environment" in job} == {
        "publish": "release"
    }


def test_plan_and_verify_have_no_right_and_no_secret_but_the_key_that_opens_the_artifact() -> None:
    assert WORKFLOW["permissions"] == {"contents": "read"}
    for name in ("plan", "verify"):
        assert "permissions" not in JOBS[name]
        assert named([each for each in JOBS[name]["steps"] if "dist.sh" not in each.get("run", "")]) == set()
    assert named({key: value for key, value in JOBS["plan"].items() if key != "steps"}) == set()


def test_one_job_may_ask_for_a_token_and_nothing_may_write_to_the_repository() -> None:
    assert {name: job["permissions"] for name, job in JOBS.items() if "permissions" in job} == {
        "publish": {"contents": "read", "id-token": "write"}
    }
    assert named(WORKFLOW.get("env", {})) == set()


def test_a_secret_is_in_the_environment_of_the_step_that_needs_it_and_nowhere_else() -> None:
    users = {
        (name, key): [str(value) for value in each["env"].values() if named(value)]
        for name, job in JOBS.items()
        for key, each in enumerate(job["steps"])
        if named(each)
    }
    build, publish = steps("build"), steps("publish")
    artifact = {
        (name, steps(name).index(step(name, "dist.sh"))): ["${{ secrets.ARTIFACT_KEY }}"]
        for name in ("build", "plan", "publish")
    }
    assert users == {
        **artifact,
        ("build", build.index(step("build", "nox -s build-all"))): ["${{ secrets.HF_READ_TOKEN }}"],
        ("publish", publish.index(step("publish", "packager publish"))): [
            "${{ secrets.SIGN_KEY }}",
            "${{ secrets.SIGN_PASSPHRASE }}",
        ],
    }
    for job in JOBS.values():
        assert named({key: value for key, value in job.items() if key not in ("steps", "permissions")}) == set()
    assert TEXT.count("HF_OIDC_RESOURCE") == 1
    assert publish[-1] is step("publish", "packager publish"), "nothing runs after the token was there"


def test_the_gpu_job_builds_strictly_beside_the_checkout_and_cannot_publish() -> None:
    build = step("build", "nox -s build-all")["run"]
    assert build == 'nox -s build-all -- "$RECIPE" --strict --no-publish --dist "$GITHUB_WORKSPACE/../dist"'
    assert '"$GITHUB_WORKSPACE/../dist" "$REPOSITORY"' in step("build", "dist.sh pack")["run"]


def test_every_recipe_is_released_by_the_workflow_of_one() -> None:
    caller = EVERY["jobs"]["release"]
    called = WORKFLOW["on"]["workflow_call"]
    assert caller["uses"] == "./.github/workflows/release-recipe.yml"
    assert caller["with"].keys() == called["inputs"].keys()
    # Secrets that are not passed by name are empty in the called workflow, and no error tells.
    assert caller["secrets"] == {name: f"${{{{ secrets.{name} }}}}" for name in called["secrets"]}
    assert called["secrets"].keys() == {word.removeprefix("secrets.") for word in re.findall(r"secrets\.\w+", TEXT)}
    assert EVERY["permissions"] == {"contents": "read"}
    assert named(EVERY["jobs"]["recipes"]) == set()


def test_exactly_the_approved_plan_is_published() -> None:
    publish = steps("publish")
    check, last = step("publish", "sha256sum"), step("publish", "packager publish")
    downloads = [publish.index(each) for each in publish if "download-artifact" in each.get("uses", "")]
    assert max(downloads) < publish.index(check) < publish.index(last)
    assert check["env"]["PLAN_SHA256"] == "${{ needs.plan.outputs.sha256 }}"
    assert JOBS["plan"]["outputs"] == {"sha256": "${{ steps.plan.outputs.sha256 }}"}
    assert '--plan "$RUNNER_TEMP/plan.json"' in last["run"]
    assert "--yes" not in TEXT
    assert TEXT.count("packager publish") == 2


def test_exactly_what_was_built_is_planned_and_published() -> None:
    assert JOBS["build"]["outputs"] == {"sha256": "${{ steps.pack.outputs.sha256 }}"}
    assert step("build", "dist.sh pack")["id"] == "pack"
    (packed,) = [each["with"]["path"] for each in steps("build") if artifact_of(each) == "dist"]
    assert packed == "${{ runner.temp }}/dist.tar"
    for name in ("plan", "publish"):
        found, unpack = steps(name), step(name, "dist.sh unpack")
        downloads = [found.index(each) for each in found if "download-artifact" in each.get("uses", "")]
        assert max(downloads) < found.index(unpack) < found.index(step(name, "packager publish"))
        assert unpack["env"]["DIST_SHA256"] == "${{ needs.build.outputs.sha256 }}"


def test_every_job_installs_what_the_locks_name() -> None:
    for workflow in (ROOT / ".github" / "workflows").glob("*.yml"):
        for line in workflow.read_text(encoding="utf-8").splitlines():
            if "pip install" in line:
                assert "-r locks/" in line or "--no-index --no-deps" in line, f"{workflow.name}: {line.strip()}"


def test_every_release_keeps_its_bills_of_materials() -> None:
    assert step("build", "-s sbom")
    (kept,) = [each["with"]["path"] for each in steps("build") if artifact_of(each) == "sbom"]
    assert kept == "dist/sbom"


def test_artifacts_are_kept_for_a_day_and_credentials_are_not_kept() -> None:
    for job in JOBS.values():
        for each in job["steps"]:
            if "upload-artifact" in each.get("uses", ""):
                days = {"dist": 1, "plan": 1, "sbom": None}[artifact_of(each)]
                assert (each["with"].get("retention-days"), each["with"]["if-no-files-found"]) == (days, "error")
            if "checkout" in each.get("uses", ""):
                assert each["with"]["persist-credentials"] is False


def test_no_input_is_part_of_a_script() -> None:
    assert not [each["run"] for job in JOBS.values() for each in job["steps"] if "${{" in each.get("run", "")]


# the scripts


class Runner:
    """Runs the scripts of the steps as GitHub does, with a stand-in for the command."""

    def __init__(self, folder: Path) -> None:
        self.temp = folder / "temp"
        self.temp.mkdir()
        program = folder / "bin" / "packager"
        program.parent.mkdir()
        program.write_text(PACKAGER)
        program.chmod(0o755)
        self.files = {name: folder / name for name in ("GITHUB_STEP_SUMMARY", "GITHUB_OUTPUT")}
        self.environ = {
            "PATH": f"{program.parent}{os.pathsep}{os.environ['PATH']}",
            "RUNNER_TEMP": str(self.temp),
            "RECIPE": "recipes/a recipe.yaml",
            **{name: str(path) for name, path in self.files.items()},
        }

    def run(self, script: dict[str, Any], **values: str) -> int:
        """Run a step; its variables are empty unless given."""
        assert script.get("shell") == "bash"
        own = dict.fromkeys(script.get("env", {}), "")
        command = ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", script["run"]]
        done = subprocess.run(command, env={**self.environ, **own, **values}, capture_output=True, check=False)
        return done.returncode

    def noted(self, name: str) -> list[str]:
        path = self.temp / name
        return path.read_text().splitlines() if path.exists() else []


@pytest.fixture
def runner(tmp_path: Path) -> Runner:
    return Runner(tmp_path)


def test_the_plan_is_saved_shown_and_named_by_its_digest(runner: Runner) -> None:
    plan = step("plan", "packager publish")
    assert runner.run(plan) == 0
    options = f"--dry-run --save-plan {runner.temp}/plan.json --format markdown"
    assert runner.noted("calls") == [f"publish recipes/a recipe.yaml {options}"]
    assert runner.files["GITHUB_STEP_SUMMARY"].read_text() == "## a summary\n"
    output = runner.files["GITHUB_OUTPUT"].read_text()
    check = step("publish", "sha256sum")
    digest = output.strip().removeprefix("sha256=")
    assert runner.run(check, PLAN_SHA256=digest) == 0
    for wrong in ("", "0" * 64, digest[:-1]):
        assert runner.run(check, PLAN_SHA256=wrong) != 0
    (runner.temp / "plan.json").write_text("{}")
    assert runner.run(check, PLAN_SHA256=digest) != 0
    assert runner.run(plan, TAG="v1.0 x", SIGN_PUBLIC_KEY="PEM") == 0
    assert runner.noted("calls")[1].endswith(f"{options} --tag v1.0 x --sign-key {runner.temp}/sign.pub")
    assert (runner.temp / "sign.pub").read_text() == "PEM\n"


def test_the_recipes_become_a_matrix_and_a_wrong_one_ends_the_run(runner: Runner) -> None:
    (script,) = [each for each in EVERY["jobs"]["recipes"]["steps"] if each.get("id") == "list"]
    answers = [{"recipe": f"recipes/{name}.yaml", "repository": f"org/{name}", "why": ""} for name in ("a", "b")]
    (runner.temp / "answer").write_text(json.dumps({"schema_version": 1, "recipes": answers}))
    assert runner.run(script, RECIPES="recipes/* .yaml") == 0
    assert runner.noted("calls") == ["plan --recipes recipes/* .yaml --format json"]
    name, _, matrix = runner.files["GITHUB_OUTPUT"].read_text().strip().partition("=")
    assert (name, json.loads(matrix)) == ("matrix", [{k: a[k] for k in ("recipe", "repository")} for a in answers])
    runner.files["GITHUB_OUTPUT"].unlink()
    assert runner.run(script, PACKAGER_FAILS="2") == 2
    assert not runner.files["GITHUB_OUTPUT"].exists()


def test_a_plan_that_cannot_be_made_fails_the_job(runner: Runner) -> None:
    assert runner.run(step("plan", "packager publish"), PACKAGER_FAILS="10") == 10
    assert not runner.files["GITHUB_OUTPUT"].exists()


@pytest.mark.parametrize("status", ["0", "10"])
def test_the_signing_key_is_in_a_private_file_only_while_it_is_needed(runner: Runner, status: str) -> None:
    publish = step("publish", "packager publish")
    assert runner.run(publish, SIGN_KEY="a secret", PACKAGER_FAILS=status) == int(status)
    (call,) = runner.noted("calls")
    assert call.endswith(f"--plan {runner.temp}/plan.json --format markdown --sign-key {runner.temp}/sign.key")
    assert runner.noted("modes") == ["600"]
    assert "SIGN_KEY" not in runner.noted("variables")
    assert not (runner.temp / "sign.key").exists()


def test_without_a_key_nothing_is_signed(runner: Runner) -> None:
    assert runner.run(step("publish", "packager publish")) == 0
    assert "--sign-key" not in runner.noted("calls")[0]
    verify = step("verify", "verify-published")
    assert runner.run(verify, REPOSITORY="a/b") == 0
    assert runner.run(verify, REPOSITORY="a/b", SIGN_PUBLIC_KEY="PEM") == 0
    assert runner.noted("calls")[1:] == [
        "verify-published hub:a/b",
        f"verify-published hub:a/b --trusted-key {runner.temp}/sign.pub",
    ]


# the artifact


class Handover:
    """A folder in which one job packs dist and another unpacks it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.tar, self.output = folder, folder / "dist.tar", folder / "output"
        own = ("builds/org/own/.hidden", "builds/org/own/main/w.bin", "receipts/org/own/main.json")
        for name in (*own, "builds/org/other/main/w.bin", "receipts/org/own2/main.json", "rows/a"):
            path = folder / "dist" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"the content of {name}")
        self.files = {name: content for name, content in self.listed().items() if name in own}

    def listed(self) -> dict[str, str]:
        dist = self.folder / "dist"
        return {str(path.relative_to(dist)): path.read_text() for path in dist.rglob("*") if path.is_file()}

    def run(self, action: str, **values: str) -> "subprocess.CompletedProcess[str]":
        environ = {"PATH": os.environ["PATH"], "GITHUB_OUTPUT": str(self.output), **values}
        command = [str(ROOT / ".github" / "dist.sh"), action, str(self.tar)]
        command += [str(self.folder / "dist"), "org/own"] if action == "pack" else []
        return subprocess.run(command, cwd=self.folder, env=environ, capture_output=True, text=True, check=False)

    def pack(self, **values: str) -> str:
        """Pack the repository's part of dist, delete dist, and return the digest."""
        done = self.run("pack", **values)
        assert done.returncode == 0, done.stderr
        shutil.rmtree(self.folder / "dist")
        return self.output.read_text().strip().rpartition("sha256=")[2]


@pytest.fixture
def handover(tmp_path: Path) -> Handover:
    return Handover(tmp_path)


@pytest.mark.parametrize("key", ["", "a secret"])
def test_the_artifact_is_handed_over_as_it_was_packed(handover: Handover, key: str) -> None:
    digest = handover.pack(ARTIFACT_KEY=key)
    assert (b"the content of" in handover.tar.read_bytes()) == (key == "")
    done = handover.run("unpack", ARTIFACT_KEY=key, DIST_SHA256=digest)
    assert done.returncode == 0, done.stderr
    assert handover.listed() == handover.files
    assert not handover.tar.exists(), "the space is needed"
    assert key == "" or key not in done.stdout + done.stderr + handover.output.read_text()


def test_a_replaced_artifact_is_refused_before_it_is_opened(handover: Handover) -> None:
    digest = handover.pack(ARTIFACT_KEY="a secret")
    data = handover.tar.read_bytes()
    for wrong in (data[:-1] + bytes([data[-1] ^ 1]), b""):
        handover.tar.write_bytes(wrong)
        assert handover.run("unpack", ARTIFACT_KEY="a secret", DIST_SHA256=digest).returncode != 0
        assert not (handover.folder / "dist").exists()
    handover.tar.write_bytes(data)
    for wrong_digest in ("", "0" * 64):
        assert handover.run("unpack", ARTIFACT_KEY="a secret", DIST_SHA256=wrong_digest).returncode != 0
    for key in ("", "another"):
        assert handover.run("unpack", ARTIFACT_KEY=key, DIST_SHA256=digest).returncode != 0
        shutil.rmtree(handover.folder / "dist")
        assert handover.tar.exists()


def test_an_unencrypted_artifact_is_said(handover: Handover) -> None:
    assert "::notice::" in handover.run("pack").stdout
    assert "::notice::" not in handover.run("pack", ARTIFACT_KEY="x").stdout


def test_a_failing_cipher_fails_the_job(handover: Handover) -> None:
    shutil.rmtree(handover.folder / "dist" / "receipts")
    assert handover.run("pack", ARTIFACT_KEY="a secret").returncode != 0
    assert not handover.output.exists()


def test_links_in_an_artifact_are_refused(handover: Handover) -> None:
    (handover.folder / "dist" / "builds" / "org" / "own" / "link").symlink_to("/etc/passwd")
    digest = handover.pack()
    done = handover.run("unpack", DIST_SHA256=digest)
    assert done.returncode == 1
    assert "dist/builds/org/own/link is neither a file nor a folder" in done.stdout
