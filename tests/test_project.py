"""Promises of the files around the package: pinned actions, bounds that `nox -s minimums` can install, types."""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
PINNED = re.compile(r"[\w-]+/[\w-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+")


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.name)
def test_every_action_is_pinned_by_its_commit_with_the_version_beside_it(workflow: Path) -> None:
    used = re.findall(r"uses: (.*)", workflow.read_text(encoding="utf-8"))
    assert used
    assert [action for action in used if not PINNED.fullmatch(action.strip())] == []


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.name)
def test_a_workflow_has_read_permission_only_unless_a_job_declares_more(workflow: Path) -> None:
    assert re.search(r"^permissions:\n  contents: read\n\w", workflow.read_text(encoding="utf-8"), re.MULTILINE)


def test_every_dependency_has_one_lower_bound() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for line in [*project["dependencies"], *project["optional-dependencies"]["build"]]:
        assert [clause.operator for clause in Requirement(line).specifier].count(">=") == 1, line


def test_the_package_declares_that_it_is_typed() -> None:
    assert (ROOT / "packager" / "py.typed").is_file()  # nox -s tests-base looks for it in the installed package
