"""Verify a published repository without any build: its files, records and card.

Each branch has its own record, provenance.json. `branch` compares the whole branch with it, and `card` compares the
table of main's card with the records of all branches. The content of a repository is not trusted: damaged, hostile or
too large files are findings, and all reads are bounded.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from packager.errors import PublishError
from packager.model.devices import DeviceChoice, device_type
from packager.prove.audit.weights import SUFFIX
from packager.prove.environments import RuntimeContext
from packager.publish.published.branch import BranchReport, Depth, verify_branch
from packager.publish.published.card import compare_card
from packager.publish.published.earlier_releases import SearchedHistory, check_earlier_releases
from packager.publish.published.finding import PUBLISHED_RULES, Collector, PublishedFinding
from packager.publish.published.reading import Branch, bounded
from packager.publish.published.signatures import (
    SignedRelease,
    Trust,
    check_release_statement,
    check_statements_present,
)
from packager.publish.published.states import published_states
from packager.publish.release_history import signed_branches
from packager.publish.targets import BranchState, Target
from packager.publish.targets.git import GitTarget
from packager.receipt import PROVENANCE, Provenance
from packager.system.text import printable, shown
from packager.variant import MAIN


@dataclass(frozen=True, kw_only=True)
class PublishedReport:
    """The checks of a repository and their findings.

    Attributes:
        where: the repository's address.
        full: whether every file was downloaded.
        branches: one report per branch, main first.
        card_rows: rows of the card's table that were compared; None if the card was not checked.
        card_findings: findings about main's card.
        signatures_checked: whether a trusted key was given.
        release: the signed release, None if signatures were not checked or main has no valid release statement.
        release_findings: findings about the release statement, and about earlier commits of main.
        history: how many of main's commits were searched for earlier releases; None if main was not checked, or
            nothing is signed and no trusted key was given.
    """

    where: str
    full: bool
    branches: tuple[BranchReport, ...]
    card_rows: int | None
    card_findings: tuple[PublishedFinding, ...]
    signatures_checked: bool = False
    release: SignedRelease | None = None
    release_findings: tuple[PublishedFinding, ...] = ()
    history: SearchedHistory | None = None

    @property
    def findings(self) -> tuple[PublishedFinding, ...]:
        """All findings."""
        of_branches = (finding for report in self.branches for finding in report.findings)
        return (*of_branches, *self.card_findings, *self.release_findings)

    @property
    def passed(self) -> bool:
        """Whether no finding is an error."""
        return not any(finding.severity == "error" for finding in self.findings)

    @property
    def loader_failed(self) -> bool:
        """Whether a loader failed on a branch."""
        return any(finding.rule == "loader-failed" for finding in self.findings)


def verify_published(
    target: Target,
    log: Callable[[str], None],
    *,
    branches: Sequence[str] = (),
    full: bool = False,
    loaders: RuntimeContext | None = None,
    device: DeviceChoice = "auto",
    trust: Trust | None = None,
) -> PublishedReport:
    """Compare a repository with the records of its branches.

    Args:
        target: the repository.
        log: gets a line per branch, and with `full` one per file.
        branches: check only these; the card's table is compared if main is among them.
        full: download every file, one branch at a time, hash it, and run the whole audit.
        loaders: the context in which to run the loaders that a branch's record names; implies `full`.
        device: the device of the loaders and of our own forward.
        trust: the keys that must have signed the repository, None to check no signature.

    Raises:
        PublishError: the repository has no branches, lacks one of `branches`, or no branch could be read.
        MachineError: `full`, and the temporary folder has no space for a branch; or loaders need a GPU that is absent.
    """
    if loaders:
        device_type(device)  # before anything is downloaded
    states = published_states(target, branches)
    # The address of a git remote may be any; those of the Hub and the local target end with the repository's name.
    depth = Depth(
        full=full or loaders is not None,
        address_names_repository=not isinstance(target, GitTarget),
        loaders=loaders,
        device=device,
        trust=trust,
    )
    chosen = sorted(set(branches or states), key=lambda branch: (branch != MAIN, branch))
    reports, provenances = _check_branches(target, chosen, states, depth, log)
    card = Collector(MAIN)
    rows = compare_card(target, states, provenances, card) if not branches or MAIN in chosen else None
    signatures = Collector(MAIN)
    release = _check_release(target, states, reports, provenances, trust, signatures) if trust else None
    # A git remote sends all of main's history: not asked for where nothing is signed and nobody has a key.
    searched = MAIN in chosen and (trust is not None or bool(signed_branches(states)))
    history = check_earlier_releases(target, trust, release, signatures) if searched else None
    return PublishedReport(
        where=target.where,
        full=depth.full,
        branches=tuple(reports),
        card_rows=rows,
        card_findings=card.collected(),
        signatures_checked=trust is not None,
        release=release,
        release_findings=signatures.collected(),
        history=history,
    )


def _check_branches(
    target: Target,
    chosen: Sequence[str],
    states: Mapping[str, BranchState],
    depth: Depth,
    log: Callable[[str], None],
) -> tuple[list[BranchReport], dict[str, Provenance]]:
    """Return the report of each branch, and the valid records by branch.

    Raises:
        PublishError: no branch could be read.
    """
    reports: list[BranchReport] = []
    provenances: dict[str, Provenance] = {}
    failures: list[PublishError] = []
    for branch in chosen:
        found, state = Collector(branch), states[branch]
        report = BranchReport(branch=branch, commit=state.commit)
        try:
            report, provenance = verify_branch(target, report, found, log, depth)
        except PublishError as error:
            failures.append(error)
            found.add("branch-unreadable", "", error.brief)
        else:
            if provenance:
                _compare_branches(branch, provenance, provenances, found)
                provenances[branch] = provenance
        if state.foreign_author and branch in provenances:
            found.add("head-foreign", "", f"{state.foreign_author} made its head {state.commit[:12]}, not packager")
        if not depth.trust:
            check_statements_present(branch, states, found)
        reports.append(replace(report, findings=found.collected()))
        log(f"{printable(branch)}: {'ok' if reports[-1].passed else f'{len(reports[-1].findings)} findings'}")
    if len(failures) == len(chosen):
        raise failures[0]
    return reports, provenances


def _check_release(
    target: Target,
    states: Mapping[str, BranchState],
    reports: Sequence[BranchReport],
    provenances: Mapping[str, Provenance],
    trust: Trust,
    found: Collector,
) -> SignedRelease | None:
    """Check main's release statement against the branches' statements."""
    main = None
    if MAIN in states:
        stored = {name: bounded(file) for name, file in states[MAIN].files.items()}
        main = Branch(target=target, name=MAIN, commit=states[MAIN].commit, stored=stored, safe=frozenset())
    else:
        found.add("main-missing", "", "the release statement belongs on main")
    repository = next((provenance.repository for provenance in provenances.values()), "")
    signed = {report.branch: report.signed for report in reports}
    return check_release_statement(main, repository, signed, list(states), trust, found)


def _compare_branches(branch: str, provenance: Provenance, others: Mapping[str, Provenance], found: Collector) -> None:
    """Report if a record names another repository than the records before it, or has the same weights."""
    for other, record in others.items():
        if provenance.place.repository != record.place.repository:
            message = f"it was built for {shown(provenance.repository)}, {other} for {shown(record.repository)}"
            found.add("repository-differs", PROVENANCE, message)
        if (weights := _weights(provenance)) and weights == _weights(record):
            found.add("branch-copied", PROVENANCE, f"{branch} and {other} have the same weights")


def _weights(provenance: Provenance) -> frozenset[str]:
    """Return the digests of the weights that a record lists."""
    return frozenset(record.sha256 for name, record in provenance.files.items() if name.endswith(SUFFIX))


__all__ = ["PUBLISHED_RULES", "BranchReport", "PublishedFinding", "PublishedReport", "verify_published"]
