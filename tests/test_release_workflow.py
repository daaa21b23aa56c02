"""The release workflow: who has which right, what is compared before the publish, and the scripts of its steps."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / ".github" / "workflows" / "release.yml").read_text(encoding="utf-8")
WORKFLOW: dict[str, Any] = YAML(typ="safe").load(TEXT)
JOBS: dict[str, Any] = WORKFLOW["jobs"]
SECRETS = ("secrets.", "github.token", "GITHUB_TOKEN", "HF_OIDC", "id-token")

# Stands for the command: it notes its arguments and what it finds in its environment, and writes the plan.
PACKAGER = """#!/bin/bash
printf '%s\\n' "$*" >> "$RUNNER_TEMP/calls"
env | cut -d = -f 1 >> "$RUNNER_TEMP/variables"
[ -e "$RUNNER_TEMP/sign.key" ] && stat -c %a "$RUNNER_TEMP/sign.key" >> "$RUNNER_TEMP/modes"
while [ $# -gt 0 ]; do [ "$1" = --save-plan ] && echo '{"a": "plan"}' > "$2"; shift; done
echo '## a summary'
exit ${PACKAGER_FAILS:-0}
"""


def steps(job: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = JOBS[job]["steps"]
    return found


def step(job: str, words: str) -> dict[str, Any]:
    """Return the one step of a job whose script has these words."""
    (found,) = [each for each in steps(job) if words in each.get("run", "")]
    return found


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
        "publish": "plan",
        "verify": "publish",
    }
    assert {name: job.get("environment") for name, job in JOBS.items() if "environment" in job} == {
        "publish": "release"
    }


def test_plan_and_verify_have_no_right_and_no_secret() -> None:
    assert WORKFLOW["permissions"] == {"contents": "read"}
    for name in ("plan", "verify"):
        assert "permissions" not in JOBS[name]
        assert named(JOBS[name]) == set()


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
    assert users == {
        ("build", build.index(step("build", "packager build"))): ["${{ secrets.HF_READ_TOKEN }}"],
        ("publish", publish.index(step("publish", "packager publish"))): [
            "${{ secrets.SIGN_KEY }}",
            "${{ secrets.SIGN_PASSPHRASE }}",
        ],
    }
    for job in JOBS.values():
        assert named({key: value for key, value in job.items() if key not in ("steps", "permissions")}) == set()
    assert TEXT.count("HF_OIDC_RESOURCE") == 1
    assert publish[-1] is step("publish", "packager publish"), "nothing runs after the token was there"


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


def test_artifacts_are_kept_for_a_day_and_credentials_are_not_kept() -> None:
    for job in JOBS.values():
        for each in job["steps"]:
            if "upload-artifact" in each.get("uses", ""):
                assert (each["with"]["retention-days"], each["with"]["if-no-files-found"]) == (1, "error")
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
        "verify-published a/b",
        f"verify-published a/b --trusted-key {runner.temp}/sign.pub",
    ]
