"""The rules for published repositories, and the collector that every check reports to."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from packager.prove import audit
from packager.prove.audit.finding import Finding, Rule, Severity
from packager.system.text import printable

_MAX_FINDINGS = 20  # of a rule on a branch

_AGAIN = "publish the branch again, or put it back with packager rollback"
_CARD = "render the cards again (packager card) and publish them"


def _rule(hint: str) -> Rule:
    return Rule(severity="error", hint=hint)


def _warning(hint: str) -> Rule:
    return Rule(severity="warning", hint=hint)


# The audit's rules, and the rules about repositories and their branches.
PUBLISHED_RULES: Mapping[str, Rule] = {
    **audit.AUDIT_RULES,
    "branch-unreadable": _rule("run again later; if the error remains, the repository has lost files that it lists"),
    "files-too-many": _rule("packager did not publish this branch: restrict the run with --branch"),
    "provenance-missing": _rule("publish the branch with packager, or name the other branches with --branch"),
    "repository-differs": _rule("publish from the recipe of this repository; after a renaming, publish again"),
    "address-differs": _warning("a git remote may have any address: check that this is the right one"),
    "head-foreign": _warning("look at the changes; to undo them, publish again or use packager rollback"),
    "branch-differs": _rule("these are another variant's files: " + _AGAIN),
    "branch-copied": _rule("variants never have the same weights: one of the records is wrong; " + _AGAIN),
    "remote-file-missing": _rule(_AGAIN),
    "remote-file-unlisted": _rule("packager did not publish this file: remove it, or " + _AGAIN),
    "remote-file-changed": _rule(
        f"{_AGAIN}; what people wrote into a card's sections is kept by packager card RECIPE --keep published, before"
    ),
    "digest-unknown": _rule("run with --full, which reads everything"),
    "loader-failed": _rule(
        "the loader's users get an error or wrong output: put the branch back with packager rollback"
    ),
    "loader-not-run": _warning("run on a machine that has what the loader needs, e.g. a CUDA GPU"),
    "signature-missing": _rule(
        "put the branch back (packager rollback --branch), publish it with --sign-key, or delete it; if the publisher "
        "signs nothing, check without --trusted-key"
    ),
    "signature-invalid": _rule(
        "the files may be another person's: " + _AGAIN + "; a new key of the publisher must be given with --trusted-key"
    ),
    "statement-differs": _rule("the files are not the ones that were signed: " + _AGAIN),
    "release-differs": _rule("the branches are not of one release: " + _AGAIN),
    "release-old": _rule("the repository was set back, or this is an old copy of it: ask the publisher"),
    "release-unsigned": _warning(
        "nobody vouches for the files of that commit: ask the publisher, and use a signed one"
    ),
    "release-set-back": _warning(
        "a rollback without a key, or an old copy: packager publish or rollback with --sign-key makes the next release"
    ),
    "main-missing": _rule("publish main: readers who name no branch get main"),
    "card-table": _rule(_CARD),
    "card-branch-missing": _rule("publish the branch, or " + _CARD),
    "card-branch-unlisted": _rule("delete the branch, or " + _CARD),
    "card-figure": _rule(_CARD),
}


@dataclass(frozen=True, kw_only=True)
class PublishedFinding:
    """One fault of a published repository: branch, file, the broken rule of `PUBLISHED_RULES`, message and hint."""

    branch: str
    file: str
    rule: str
    severity: Severity
    message: str
    hint: str


class Collector:
    """Collects a branch's findings: at most 20 per rule, and the number of the others."""

    def __init__(self, branch: str) -> None:
        self._branch = branch
        self._found: list[PublishedFinding] = []
        self._counts: dict[str, int] = {}

    def add(self, rule: str, file: str, message: str) -> None:
        """Report `message` on `file` under `rule`, which must be in `PUBLISHED_RULES`."""
        known = PUBLISHED_RULES[rule]
        self._counts[rule] = self._counts.get(rule, 0) + 1
        if self._counts[rule] <= _MAX_FINDINGS:
            self._found.append(self._finding(rule, known, printable(file), printable(message)))

    @property
    def has_errors(self) -> bool:
        """Whether an error has been reported."""
        return any(PUBLISHED_RULES[rule].severity == "error" for rule in self._counts)

    def has(self, rule: str) -> bool:
        """Return whether anything was reported under `rule`."""
        return rule in self._counts

    def take(self, findings: Iterable[Finding]) -> None:
        """Report findings of the audit."""
        for finding in findings:
            more = f" (and {len(finding.also)} more like it)" if finding.also else ""
            self.add(finding.code, finding.where, f"{finding.message}{more}")

    def collected(self) -> tuple[PublishedFinding, ...]:
        """Return the reported findings."""
        left_out = [
            self._finding(rule, PUBLISHED_RULES[rule], "", f"and {count - _MAX_FINDINGS:,} more findings of this rule")
            for rule, count in self._counts.items()
            if count > _MAX_FINDINGS
        ]
        return (*self._found, *left_out)

    def _finding(self, rule: str, known: Rule, file: str, message: str) -> PublishedFinding:
        return PublishedFinding(
            branch=self._branch, file=file, rule=rule, severity=known.severity, message=message, hint=known.hint
        )
