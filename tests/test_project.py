"""Promises of the files around the package: pinned actions, locks, bounds that `nox -s minimums` can install, types."""

import importlib.util
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from ruamel.yaml import YAML
from typer.testing import CliRunner

from packager.cli.main import app
from packager.prove.locks import read_lock

ROOT = Path(__file__).resolve().parent.parent
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
PINNED = re.compile(r"[\w-]+/[\w-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+")


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.name)
def test_every_action_is_pinned_by_its_commit_with_the_version_beside_it(workflow: Path) -> None:
    used = re.findall(r"uses: (?!\./)(.*)", workflow.read_text(encoding="utf-8"))  # ours are of this commit
    assert used
    assert [action for action in used if not PINNED.fullmatch(action.strip())] == []


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.name)
def test_a_workflow_has_read_permission_only_unless_a_job_declares_more(workflow: Path) -> None:
    assert re.search(r"^permissions:\n  contents: read\n\w", workflow.read_text(encoding="utf-8"), re.MULTILINE)


def test_every_dependency_has_one_lower_bound() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for line in [*project["dependencies"], *project["optional-dependencies"]["build"]]:
        assert [clause.operator for clause in Requirement(line).specifier].count(">=") == 1, line


# locks


def versions(path: Path) -> dict[str, str]:
    """Return the versions of a lock, by canonical name; a lock that leaves something open is an error."""
    return {each.name: each.version for each in read_lock(path)}


def pins(path: Path) -> dict[str, str]:
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")]
    pinned = [Requirement(line) for line in lines]
    return {canonicalize_name(each.name): str(each.specifier).removeprefix("==") for each in pinned}


def project_requirements(*extras: str) -> list[Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = [*project["dependencies"], *(line for extra in extras for line in project["optional-dependencies"][extra])]
    return [Requirement(line) for line in lines]


def test_the_lock_of_the_sessions_has_each_version_of_constraints_txt() -> None:
    locked = versions(ROOT / "locks" / "constraints.txt")
    wanted = pins(ROOT / "constraints.txt")
    assert {name: locked.get(name) for name in wanted} == wanted


@pytest.mark.parametrize(("name", "extras"), [("base", ["sign"]), ("build", ["build", "sign"]), ("nox", [])])
def test_other_locks_have_the_same_versions_and_all_that_is_needed(name: str, extras: list[str]) -> None:
    locked, sessions = versions(ROOT / "locks" / f"{name}.txt"), versions(ROOT / "locks" / "constraints.txt")
    shared = locked.keys() & sessions.keys()
    assert {each: locked[each] for each in shared} == {each: sessions[each] for each in shared}
    needed = project_requirements(*extras) if name != "nox" else [Requirement("nox")]
    missing = [each for each in needed if locked.get(canonicalize_name(each.name), "0") not in each.specifier]
    assert missing == []


def test_the_lock_of_giftless_fits_its_input() -> None:
    assert versions(ROOT / "locks" / "giftless.txt") == pins(ROOT / "tests" / "giftless.txt")


def test_ci_installs_nothing_but_from_locks() -> None:
    text = (ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8")
    assert set(re.findall(r"pip install .*", text)) == {"pip install -r locks/nox.txt"}
    for command in re.findall(r"pip install[^&\n]*", (ROOT / "README.md").read_text(encoding="utf-8")):
        assert command.strip() == "pip install -q -r locks/nox.txt"


def test_the_hook_plans_recipes_and_stops_at_a_mistake(tmp_path: Path) -> None:
    (hook,) = YAML(typ="safe").load((ROOT / ".pre-commit-hooks.yaml").read_text(encoding="utf-8"))
    program, *words = hook["entry"].split()
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["scripts"]
    assert (program, hook["id"]) == (*scripts, "packager-plan")

    def takes(name: str) -> bool:
        return bool(re.search(hook["files"], name)) and not re.search(hook["exclude"], name)

    recipes = [path.relative_to(ROOT).as_posix() for path in (ROOT / "recipes").glob("*.yaml")]
    assert all(map(takes, [*recipes, "models/recipes/a.yml"]))
    others = ["recipes/defaults.yaml", "recipes/demo-llama.lock.json", "mkdocs.yml", "recipes/a/b.yaml"]
    assert not any(map(takes, others))
    (tmp_path / "bad.yaml").write_text("schema_version: 1\n")
    demo = str(ROOT / "recipes" / "demo-llama.yaml")
    assert CliRunner().invoke(app, [*words, demo]).exit_code == 0
    assert CliRunner().invoke(app, [*words, demo, str(tmp_path / "bad.yaml")]).exit_code == 2
    page = (ROOT / "docs" / "how-to" / "release-from-ci.md").read_text(encoding="utf-8")
    assert page.count(hook["id"]) == 2
    every = CliRunner().invoke(app, [*words, "--recipes", str(ROOT / "recipes" / "*.yaml")])
    assert every.exit_code == 0, every.output


def test_a_session_runs_every_file_with_tests_of_a_release() -> None:
    sessions = (ROOT / "noxfile.py").read_text(encoding="utf-8")
    marked = [
        path.stem
        for path in (ROOT / "tests").glob("test_*.py")
        if re.search(r"^(@|pytestmark = )pytest\.mark\.release", path.read_text(encoding="utf-8"), re.MULTILINE)
    ]
    assert len(marked) > 10
    assert [name for name in marked if not re.search(rf"\b{name}\b", sessions)] == []


def test_the_image_installs_by_digest_and_runs_as_a_user() -> None:
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    commands = re.sub(r"\\\n\s*", "", text)
    installs = re.findall(r"pip install ([^&\n]*)", commands)
    assert installs
    assert all("--require-hashes" in each or "--no-index" in each for each in installs)
    users = re.findall(r"^USER (\S+)", commands, re.MULTILINE)
    assert users
    assert users[-1] != "root"
    copied = [name for line in re.findall(r"^COPY (.*) \S+$", commands, re.MULTILINE) for name in line.split()]
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    assert ignored[0] == "*"
    assert {f"!{name}" for name in copied} == {line for line in ignored if line.startswith("!")}
    assert [name for name in copied if not (ROOT / name).exists()] == []
    extra = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["hatch"]["build"]["targets"]
    assert set(extra["wheel"]["force-include"]) <= set(copied)


def test_dependabot_renews_actions_and_packages_after_a_week() -> None:
    content: dict[str, Any] = YAML(typ="safe").load((ROOT / ".github" / "dependabot.yml").read_text(encoding="utf-8"))
    assert [update["package-ecosystem"] for update in content["updates"]] == ["github-actions", "pip", "docker"]
    assert [update["cooldown"]["default-days"] for update in content["updates"]] == [7, 7, 7]


@pytest.fixture
def write() -> ModuleType:
    """locks/write.py as a module."""
    spec = importlib.util.spec_from_file_location("write_locks", ROOT / "locks" / "write.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["write_locks"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_lock_is_written_by_the_script(write: ModuleType) -> None:
    there = {path.relative_to(ROOT).as_posix() for path in (ROOT / "locks").glob("*.txt")}
    there |= {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "packager" / "prove" / "loaders" / "requirements").glob("*.txt")
    }
    assert {lock.path for lock in write.LOCKS} == there
    assert all((ROOT / file).is_file() for lock in write.LOCKS for file in lock.files)


def test_torch_gets_the_digests_of_both_builds(write: ModuleType) -> None:
    digests = {name: name * 64 for name in "abc"}
    text = (
        f"sympy==1.0 \\\n    --hash=sha256:{digests['c']}\n"
        f"torch==2.1.0 ; python_version > '3' \\\n    --hash=sha256:{digests['b']}\n"
        "tqdm==1.0\n"
    )
    both = write.with_torch_digests(text, [f"sha256:{digests['a']}"])
    assert write.torch_digests(both) == [f"sha256:{digests['a']}", f"sha256:{digests['b']}"]
    assert both == text.replace("    --hash=sha256:b", f"    --hash=sha256:{digests['a']} \\\n    --hash=sha256:b")
    assert write.with_torch_digests(both, []) == both
    assert write.torch_version(both) == "2.1.0"
    assert write.torch_version("torchvision==1.0\n") == ""


@pytest.mark.parametrize(("version", "wanted"), [("2.1.0", ["a", "b"]), ("2.2.0", ["b"])])
def test_digests_of_before_are_kept_where_the_index_of_torch_is_out_of_reach(
    version: str,
    wanted: list[str],
    write: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def uv(command: list[str], **_: object) -> "subprocess.CompletedProcess[str]":
        if "--default-index" in command:
            return subprocess.CompletedProcess(command, 2, "", "no network")
        (tmp_path / command[-1]).write_text(f"torch=={version} \\\n    --hash=sha256:{'b' * 64}\n")
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(write, "ROOT", tmp_path)
    monkeypatch.setattr(subprocess, "run", uv)
    lock = write.LOCKS[0]
    (tmp_path / "locks").mkdir()
    (tmp_path / lock.path).write_text(f"torch==2.1.0 \\\n    --hash=sha256:{'a' * 64}\n")
    write.write(lock, [])
    found = write.torch_digests((tmp_path / lock.path).read_text())
    assert [each.removeprefix("sha256:")[0] for each in found] == wanted
    assert "not reachable" in capsys.readouterr().out


def test_the_package_declares_that_it_is_typed() -> None:
    assert (ROOT / "packager" / "py.typed").is_file()  # nox -s tests-base looks for it in the installed package
