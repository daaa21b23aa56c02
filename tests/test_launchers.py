"""The files for Kubernetes and SkyPilot: their shell runs, its options exist, and its parts are all recipes once.

`nox -s launchers` compares them with the schemas of their projects.
"""

import json
import os
import re
import shlex
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML
from typer.testing import CliRunner

from packager.cli.main import app
from packager.errors import AuditError, CalibrationError, CardError, QuantizeError, RecipeError
from tests.test_house_rules import ROOT

FOLDER = ROOT / "docs" / "examples" / "launchers"
# A name with spaces and one with a quote; more than the parts, and no multiple of them.
PATHS = [f"requests/{name}.yaml" for name in ("a", "b c", "d'e", "f", "g", "h", "i", "j", "k", "l")]
STAND_IN = """#!/bin/bash
if [ "$1" = queue ]; then cat "$ANSWER"; else printf '%s\\n' "$@" >> "$CALLS"; exit "${CODE:-0}"; fi
"""


def file_of(name: str) -> Any:
    return YAML(typ="safe").load((FOLDER / name).read_text(encoding="utf-8"))


def kubernetes_pod() -> Any:
    return file_of("kubernetes.yaml")["spec"]["template"]["spec"]


def script_of(name: str) -> str:
    if name == "skypilot.yaml":
        return str(file_of(name)["run"])
    (container,) = kubernetes_pod()["containers"]
    assert container["command"] == ["bash", "-euo", "pipefail", "-c"]
    (script,) = container["args"]
    return f"set -euo pipefail\n{script}"


def part(script: str, variables: Mapping[str, str], folder: Path) -> list[str]:
    """Return the words with which a script calls `packager release`; [] if it does not."""
    (folder / "bin").mkdir(exist_ok=True)
    (folder / "bin" / "packager").write_text(STAND_IN)
    (folder / "bin" / "packager").chmod(0o755)
    answer = {"schema_version": 1, "recipes": [{"path": path, "state": "requested"} for path in PATHS]}
    (folder / "answer.json").write_text(json.dumps(answer))
    calls = folder / "calls"
    calls.unlink(missing_ok=True)
    environ = {
        "PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "HOME": str(folder), "STORE": "s3://bucket/fleet",
        "ANSWER": str(folder / "answer.json"), "CALLS": str(calls), **variables,
    }  # fmt: skip
    done = subprocess.run(["bash", "-c", script], env=environ, cwd=folder, check=False)
    assert done.returncode == int(variables.get("CODE", 0)), "packager's own exit code is what the Job's rules compare"
    return calls.read_text().splitlines() if calls.exists() else []


@pytest.mark.parametrize(
    ("name", "index", "count"),
    [("kubernetes.yaml", "INDEX", "COUNT"), ("skypilot.yaml", "SKYPILOT_NODE_RANK", "SKYPILOT_NUM_NODES")],
)
def test_the_parts_are_all_recipes_once(name: str, index: str, count: str, tmp_path: Path) -> None:
    found: list[str] = []
    for number in range(4):
        words = part(script_of(name), {index: str(number), count: "4"}, tmp_path)
        assert words[:3] == ["release", "--jobs", "1"]
        assert words[3] == "--store"
        found += [word for word in words if word.endswith(".yaml")]
    assert sorted(found) == sorted(PATHS)
    assert part(script_of(name), {index: "40", count: "41"}, tmp_path) == [], "a machine too many does nothing"
    assert part(script_of(name), {index: "0", count: "1", "CODE": "2"}, tmp_path)


@pytest.mark.parametrize("name", ["kubernetes.yaml", "skypilot.yaml"])
def test_the_options_of_the_launchers_exist(name: str) -> None:
    calls = re.findall(r"packager ((?:queue|release) [^|#\n]+)", script_of(name))
    assert len(calls) == 2
    for call in calls:
        command, *words = shlex.split(call)
        shown = CliRunner().invoke(app, [command, "--help"], prog_name="packager").stdout
        known = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", shown.partition("Options:")[2]))
        assert {word for word in words if word.startswith("--")} <= known, call


def test_the_job_is_one_part_for_each_pod_and_starts_again_what_was_lost() -> None:
    spec = file_of("kubernetes.yaml")["spec"]
    (container,) = spec["template"]["spec"]["containers"]
    count = next(each["value"] for each in container["env"] if each["name"] == "COUNT")
    assert int(count) == spec["completions"] == spec["parallelism"]
    (lost, wrong) = spec["podFailurePolicy"]["rules"]
    assert lost == {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}
    parks = (RecipeError, CalibrationError, QuantizeError, AuditError, CardError)  # at once, see decision 39
    assert wrong["onExitCodes"]["values"] == [error.exit_code for error in parks]
    assert wrong["onExitCodes"]["containerName"] == container["name"]
    mounted = {each["name"] for each in container["volumeMounts"]}
    assert mounted == {each["name"] for each in spec["template"]["spec"]["volumes"]}


def test_no_launcher_holds_a_token_and_no_pod_has_rights() -> None:
    assert file_of("skypilot.yaml")["secrets"] == dict.fromkeys(("HF_TOKEN", "PACKAGER_READ_TOKEN"))
    pod = kubernetes_pod()
    assert pod["securityContext"]["runAsNonRoot"]
    assert pod["automountServiceAccountToken"] is False
    (container,) = pod["containers"]
    tokens = {each.pop("name"): each for each in container["env"] if "TOKEN" in each["name"]}
    keys: dict[str, dict[str, Any]] = {
        "HF_TOKEN": {"key": "token"},
        "PACKAGER_READ_TOKEN": {"key": "read-token", "optional": True},
    }
    assert tokens == {name: {"valueFrom": {"secretKeyRef": {"name": "hub-token", **key}}} for name, key in keys.items()}
    assert "env" not in pod["initContainers"][0], "what fetches the requests sees no token"
    assert container["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
