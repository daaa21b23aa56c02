"""What can be wrong with a published repository, and the collector that every check reports to."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from packager.errors import PublishError
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


# The audit's rules, and those that only a repository of several branches can break.
RULES: Mapping[str, Rule] = {
    **audit.RULES,
    "branch-unreadable": _rule("run again later; if it stays so, the repository has lost what it lists"),
    "files-too-many": _rule("this is no branch of ours: restrict the run with --branch"),
    "file-name": _rule("remove the file: a name like this leaves the folder it is downloaded to, or does not survive"),
    "provenance-missing": _rule("publish the branch with packager, or leave it out: name the others with --branch"),
    "repository-differs": _rule("publish from the recipe whose repository this is; after a renaming, publish again"),
    "address-differs": _warning("a git remote may have any address: make sure that it is the one you mean"),
    "head-foreign": _warning("look at what they changed: packager publishes again, or rolls back"),
    "branch-differs": _rule("these are another variant's files: " + _AGAIN),
    "branch-copied": _rule("variants never have the same weights: one is not what its record says; " + _AGAIN),
    "remote-file-missing": _rule(_AGAIN),
    "remote-file-unlisted": _rule("somebody else put it there: remove it, or " + _AGAIN),
    "remote-file-changed": _rule(_AGAIN),
    "digest-unknown": _rule("run with --full, which reads everything"),
    "header-too-large": _rule("no model has such a header: " + _AGAIN),
    "loader-failed": _rule("its users get an error or nonsense: put the branch back with packager rollback"),
    "loader-not-run": _warning("run where the loader can run, such as on a machine with a CUDA GPU"),
    "main-missing": _rule("publish main: it is what a reader gets who names no branch"),
    "card-table": _rule(_CARD),
    "card-branch-missing": _rule("publish the branch, or " + _CARD),
    "card-branch-unlisted": _rule("delete the branch, or " + _CARD),
    "card-figure": _rule(_CARD),
}


def unreadable(error: PublishError) -> str:
    """Return why something could not be read, as a finding says it."""
    return f"{error.what}: {error.why}" if error.why else error.what


@dataclass(frozen=True, kw_only=True)
class PublishedFinding:
    """One thing that is wrong with a published repository: where, which of `RULES`, what, and what to do."""

    branch: str
    file: str
    rule: str
    severity: Severity
    message: str
    hint: str


class Collector:
    """Collects a branch's findings; of each rule only so many are kept, the rest is counted."""

    def __init__(self, branch: str) -> None:
        self._branch = branch
        self._found: list[PublishedFinding] = []
        self._counts: dict[str, int] = {}

    def add(self, rule: str, file: str, message: str) -> None:
        """Report `message` on `file` under `rule`, which must be in `RULES`."""
        known = RULES[rule]
        self._counts[rule] = self._counts.get(rule, 0) + 1
        if self._counts[rule] <= _MAX_FINDINGS:
            self._found.append(self._finding(rule, known, printable(file), printable(message)))

    @property
    def has_errors(self) -> bool:
        """Whether an error was reported so far."""
        return any(RULES[rule].severity == "error" for rule in self._counts)

    def has(self, rule: str) -> bool:
        """Return whether anything was reported under `rule`."""
        return rule in self._counts

    def take(self, findings: Iterable[Finding]) -> None:
        """Report what the audit found."""
        for finding in findings:
            more = f" (and {len(finding.also)} more like it)" if finding.also else ""
            self.add(finding.code, finding.where, f"{finding.message}{more}")

    def collected(self) -> tuple[PublishedFinding, ...]:
        """Return what was reported so far."""
        left_out = [
            self._finding(rule, RULES[rule], "", f"and {count - _MAX_FINDINGS:,} more findings of this rule")
            for rule, count in self._counts.items()
            if count > _MAX_FINDINGS
        ]
        return (*self._found, *left_out)

    def _finding(self, rule: str, known: Rule, file: str, message: str) -> PublishedFinding:
        return PublishedFinding(
            branch=self._branch, file=file, rule=rule, severity=known.severity, message=message, hint=known.hint
        )
