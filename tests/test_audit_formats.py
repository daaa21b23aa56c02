"""The audit's report as SARIF and as JUnit XML."""

import json
import re
from pathlib import Path
from typing import Any
from urllib.parse import unquote
from xml.etree import ElementTree

import jsonschema
import pytest
from typer.testing import CliRunner

from packager.cli.audit_formats import audit_junit, audit_sarif
from packager.cli.main import app
from packager.errors import AuditError
from packager.prove.audit import AUDIT_RULES, AuditReport, Facts, Finding, audit
from packager.publish.published.audited import AuditedBranch
from tests.audit_cases import SHARDED, Q
from tests.checkpoints import Checkpoint, edit_json, edit_tensors, edit_text
from tests.known_models import describe_known
from tests.sarif_schema import SARIF


def checked(report: AuditReport, remote: AuditedBranch | None = None) -> Any:
    """Return the one run of the SARIF log, after the schema."""
    log = json.loads(audit_sarif(report, remote))
    jsonschema.Draft7Validator(SARIF).validate(log)
    (run,) = log["runs"]
    return run


def broken(tmp_path: Path, checkpoint: Checkpoint = Checkpoint()) -> AuditReport:  # noqa: B008 - frozen
    folder = checkpoint.write(tmp_path / "branch")
    edit_text(folder, "README.md", "hf download", "huggingface-cli download")
    edit_json(folder, "config.json", lambda config: config.update(_name_or_path="/srv/models/llama"))
    edit_json(folder, "generation_config.json", lambda content: content.update(do_sample=False))
    (folder / "tokenizer_config.json").unlink()
    if checkpoint.shards == 1:
        edit_tensors(folder, lambda found: [found.pop(name) for name in list(found) if name.endswith("q_proj.g_idx")])
    return audit(folder, describe=describe_known)


def locations(run: Any, code: str) -> list[Any]:
    return [place for result in run["results"] if result["ruleId"] == code for place in result["locations"]]


def test_a_log_has_each_finding_with_its_file_line_and_tensor(tmp_path: Path) -> None:
    report = broken(tmp_path)
    run = checked(report)
    assert [result["ruleId"] for result in run["results"]] == [finding.code for finding in report.findings]
    rules = run["tool"]["driver"]["rules"]
    for result in run["results"]:
        assert rules[result["ruleIndex"]]["id"] == result["ruleId"]
        assert result["level"] == AUDIT_RULES[result["ruleId"]].severity
    (command,) = locations(run, "card-command")
    line = command["physicalLocation"]["region"]["startLine"]
    assert "huggingface-cli" in (tmp_path / "branch" / "README.md").read_text().splitlines()[line - 1]
    (path,) = locations(run, "local-path")
    assert path["physicalLocation"] == {"artifactLocation": {"uri": "config.json"}}
    assert path["logicalLocations"] == [{"fullyQualifiedName": "_name_or_path"}]
    missing = locations(run, "file-missing")
    assert [place["physicalLocation"]["artifactLocation"]["uri"] for place in missing] == ["tokenizer_config.json"]
    tensors = locations(run, "linear-incomplete")
    assert {place["logicalLocations"][0]["fullyQualifiedName"] for place in tensors} == {
        Q, Q.replace(".0.", ".1."),
    }  # fmt: skip
    assert {place["physicalLocation"]["artifactLocation"]["uri"] for place in tensors} == {"model.safetensors"}
    prints = [result["partialFingerprints"]["findingHash/v1"] for result in run["results"]]
    assert len(set(prints)) == len(prints)


def test_a_tensor_of_shards_is_at_the_index(tmp_path: Path) -> None:
    folder = SHARDED.write(tmp_path / "branch")
    for shard in folder.glob("*-00001-*"):
        edit_tensors(folder, lambda found: found.popitem(), shard.name)
    run = checked(audit(folder, describe=describe_known))
    found = {place["physicalLocation"]["artifactLocation"]["uri"] for place in locations(run, "index-disagrees")}
    assert found == {"model.safetensors.index.json"}


def test_a_sound_checkpoint_is_a_run_without_results(tmp_path: Path) -> None:
    report = audit(Checkpoint().write(tmp_path / "branch"), describe=describe_known)
    remote = AuditedBranch(where="hub:a/b", branch="main", commit="0" * 40, weights_bytes=1, report=report)
    run = checked(report, remote)
    assert (run["results"], run["tool"]["driver"]["rules"]) == ([], [])
    assert run["properties"] == {"branch": "main", "commit": "0" * 40, "repository": "hub:a/b"}
    (suite,) = ElementTree.fromstring(audit_junit(report, "x"))  # noqa: S314 - ours
    (case,) = suite
    assert (suite.get("failures"), suite.get("tests"), case.find("failure")) == ("0", "1", None)


def test_junit_counts_its_cases_and_fails_for_errors_alone(tmp_path: Path) -> None:
    report = broken(tmp_path)
    root = ElementTree.fromstring(audit_junit(report, "some/folder"))  # noqa: S314 - ours
    (suite,) = root
    cases = suite.findall("testcase")
    failed = [case for case in cases if case.find("failure") is not None]
    assert suite.get("name") == "packager audit some/folder"
    for element in (root, suite):
        assert (element.get("tests"), element.get("failures")) == (str(len(cases)), str(len(report.errors)))
    assert len(failed) == len(report.errors)
    assert len(cases) == 1 + len(report.findings)
    (warned,) = [case for case in cases if case.get("classname") == "packager.audit.generation-sampling"]
    assert "hint: set do_sample true" in str(warned.findtext("system-out"))
    (incomplete,) = [case for case in failed if case.get("classname") == "packager.audit.linear-incomplete"]
    assert incomplete.findtext("failure", "").count("q_proj") == 2


HOSTILE = "a\x00\x1b[31m\ud800\ufffe]]><b>&\"'https://me:pass@example.org/x: 7"


@pytest.mark.parametrize("where", [HOSTILE, f"{HOSTILE}:3", "config.json: " + HOSTILE, "../../etc/passwd", ""])
def test_hostile_names_stay_text(where: str) -> None:
    finding = Finding(code="local-path", severity="error", where=where, message=HOSTILE, hint="x", also=(HOSTILE,))
    report = AuditReport(findings=(finding,), facts=Facts(), files=frozenset({"config.json", where}))
    text = audit_junit(report, HOSTILE)
    root = ElementTree.fromstring(text)  # noqa: S314 - ours
    assert {element.tag for element in root.iter()} == {
        "testsuites", "testsuite", "testcase", "system-out", "failure",
    }  # fmt: skip
    run = checked(report)
    assert "pass@" not in text + json.dumps(run)
    for place in locations(run, "local-path"):
        uri = place["physicalLocation"]["artifactLocation"]["uri"]
        assert re.fullmatch(r"[\w.~!$&'()*+,;=:@/%-]*", uri), uri
        assert unquote(uri, errors="surrogatepass") or where == ""


def test_the_command_writes_each_format_and_the_same_exit_code(tmp_path: Path) -> None:
    folder = Checkpoint().write(tmp_path / "branch")
    edit_json(folder, "provenance.json", lambda record: record.update(model=Checkpoint().description()))
    (folder / "NOTES.md").write_text("x")
    for form, passes in (("sarif", json.loads), ("junit", ElementTree.fromstring)):
        done = CliRunner().invoke(app, ["audit", str(folder), "--format", form])
        assert done.exit_code == AuditError.exit_code
        passes(done.stdout)
        assert "provenance-file-unlisted" in done.stdout
