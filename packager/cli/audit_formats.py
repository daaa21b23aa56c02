"""An audit's report for CI services: SARIF 2.1.0 for code scanning, JUnit XML for test results.

SARIF: https://docs.oasis-open.org/sarif/sarif/v2.1.0/sarif-v2.1.0.html. JUnit has no specification: this is the part
that GitLab, Jenkins and GitHub's actions read alike, a test suite whose failed cases are the errors.
"""

import json
import re
from collections.abc import Collection, Iterable, Sequence
from hashlib import sha256
from urllib.parse import quote
from xml.etree import ElementTree

from packager import __version__
from packager.errors import without_passwords
from packager.prove.audit import AUDIT_RULES, AuditReport, Finding
from packager.prove.audit.files import CARD_FILES, REQUIRED_FILES
from packager.prove.audit.weights import SUFFIX
from packager.publish.published.audited import AuditedBranch
from packager.receipt import GENERATION_CONFIG, INDEX_SUFFIX, QUANTIZE_CONFIG, TOKENIZER

SARIF_SCHEMA = "https://docs.oasis-open.org/sarif/sarif/v2.1.0/errata01/os/schemas/sarif-schema-2.1.0.json"
_RULES_PAGE = "docs/reference/audit-findings.md"
# Files that a finding may name though they are missing.
_KNOWN = frozenset({*REQUIRED_FILES, *CARD_FILES, QUANTIZE_CONFIG, GENERATION_CONFIG, TOKENIZER})
# GitHub shows no more of a result's locations, and takes no larger file.
_MOST_LOCATIONS = 1000
_LINE = re.compile(r"(?P<file>.+):(?P<line>[1-9]\d{0,8})", re.DOTALL)
_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def audit_sarif(report: AuditReport, remote: AuditedBranch | None) -> str:
    """Return the report as one run of a SARIF log; its rules are those of the findings.

    A location is a file of the branch, with a line where the finding has one; keys and tensors are logical locations.

    Args:
        report: of the audit.
        remote: the branch, if it was audited where it lies.
    """
    codes = sorted({finding.code for finding in report.findings})
    run: dict[str, object] = {
        "tool": {
            "driver": {
                "name": "packager audit",
                "semanticVersion": __version__,
                "rules": [_sarif_rule(code) for code in codes],
            }
        },
        "results": [_sarif_result(finding, codes, report.files) for finding in report.findings],
        "columnKind": "unicodeCodePoints",
    }
    if remote is not None:
        properties = {"branch": remote.branch, "commit": remote.commit, "repository": remote.where}
        run["properties"] = properties
    log = {"$schema": SARIF_SCHEMA, "version": "2.1.0", "runs": [run]}
    return without_passwords(json.dumps(log, indent=2)) + "\n"


def _sarif_rule(code: str) -> dict[str, object]:
    rule = AUDIT_RULES[code]
    return {
        "id": code,
        "shortDescription": {"text": code.replace("-", " ")},
        "help": {"text": f"{rule.hint}. All findings: {_RULES_PAGE}"},
        "defaultConfiguration": {"level": rule.severity},
    }


def _sarif_result(finding: Finding, codes: Sequence[str], files: Collection[str]) -> dict[str, object]:
    places = (finding.where, *finding.also)
    more = f" ({len(places)} places)" if len(places) > 1 else ""
    return {
        "ruleId": finding.code,
        "ruleIndex": codes.index(finding.code),
        "level": finding.severity,
        "message": {"text": f"{finding.where}: {finding.message}{more}. Hint: {finding.hint}"},
        "locations": [_sarif_location(place, files) for place in places[:_MOST_LOCATIONS]],
        # The same finding in the next run, whatever else changed.
        "partialFingerprints": {
            "findingHash/v1": sha256(
                f"{finding.code}\n{finding.where}\n{finding.message}".encode("utf-8", "backslashreplace")
            ).hexdigest()
        },
    }


def _sarif_location(where: str, files: Collection[str]) -> dict[str, object]:
    file, line, key = _parsed_place(where, files)
    region = {"region": {"startLine": line}} if line else {}
    # GitHub shows no result without a file: that of a tensor is the index, or the one weights file.
    uri = quote(file or _weights_file(files), errors="replace")
    location: dict[str, object] = {"physicalLocation": {"artifactLocation": {"uri": uri}, **region}}
    if key:
        location["logicalLocations"] = [{"fullyQualifiedName": key}]
    return location


def _weights_file(files: Collection[str]) -> str:
    found = [name for ending in (INDEX_SUFFIX, SUFFIX) for name in sorted(files) if name.endswith(ending)]
    return found[0] if found else "."


def _parsed_place(where: str, files: Collection[str]) -> tuple[str, int, str]:
    """Return the file, the line (0 for none) and the key or tensor that a finding's place names."""
    name, separator, key = where.partition(": ")
    found = _LINE.fullmatch(where)
    if where in files or where in _KNOWN:
        return where, 0, ""
    if found and found["file"] in files:
        return found["file"], int(found["line"]), ""
    if separator and (name in files or name in _KNOWN):
        return name, 0, key
    return "", 0, where


def audit_junit(report: AuditReport, place: str) -> str:
    """Return the report as JUnit XML: a case per finding, failed if it is an error, and one for the whole audit.

    A warning is a case that passed, with its text as the output: JUnit has no warnings.

    Args:
        report: of the audit.
        place: what was audited, as it was named.
    """
    errors, warnings = len(report.errors), len(report.warnings)
    counts = {"tests": str(errors + warnings + 1), "failures": str(errors), "errors": "0", "skipped": "0"}
    suites = ElementTree.Element("testsuites", counts)
    suite = ElementTree.SubElement(suites, "testsuite", {"name": _xml(f"packager audit {place}"), **counts})
    whole = ElementTree.SubElement(suite, "testcase", _case("audit", place))
    said = f"{errors} errors, {warnings} warnings; {report.facts.tensors_checked} tensors were checked"
    ElementTree.SubElement(whole, "system-out").text = said
    for finding in (*report.errors, *report.warnings):
        case = ElementTree.SubElement(suite, "testcase", _case(finding.code, finding.where))
        text = _xml(_finding_text(finding))
        if finding.severity == "error":
            message = {"message": _xml(f"{finding.where}: {finding.message}"), "type": finding.code}
            ElementTree.SubElement(case, "failure", message).text = text
        else:
            ElementTree.SubElement(case, "system-out").text = text
    ElementTree.indent(suites)
    return ElementTree.tostring(suites, encoding="unicode", xml_declaration=False) + "\n"


def _case(code: str, where: str) -> dict[str, str]:
    return {"classname": f"packager.audit.{code}", "name": _xml(where)}


def _finding_text(finding: Finding) -> str:
    places: Iterable[str] = (finding.where, *finding.also)
    lines = [f"{finding.severity}: {finding.message}", f"hint: {finding.hint}", *(f"  {place}" for place in places)]
    return "\n".join(lines)


def _xml(text: str) -> str:
    """Return a text without passwords and without the characters that no XML may have."""
    return _NOT_XML.sub(lambda found: f"\\u{ord(found[0]):04x}", without_passwords(text))
