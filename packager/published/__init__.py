"""Whether a published repository still is what was published: asked of the repository alone, without any build.

Each branch carries its own record, provenance.json: `branch` compares everything on it with that, and `card` the table
of main's card with every branch's record. Nothing that a repository holds is trusted: what is damaged, hostile or too
large is a finding, and what is read is read in bounded pieces.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from packager.errors import PublishError
from packager.published.branch import BranchProof, prove
from packager.published.card import check_card
from packager.published.finding import RULES, Collector, PublishedFinding
from packager.receipt import Provenance
from packager.targets import Target
from packager.variant import MAIN


@dataclass(frozen=True, kw_only=True)
class PublishedReport:
    """What was proven of a repository.

    Attributes:
        where: the repository.
        full: every file was downloaded.
        branches: one proof each, main first.
        card_rows: rows of the card's table that were compared; None if the card was not looked at.
        card_findings: of the card of main against the branches.
    """

    where: str
    full: bool
    branches: tuple[BranchProof, ...]
    card_rows: int | None
    card_findings: tuple[PublishedFinding, ...]

    @property
    def findings(self) -> tuple[PublishedFinding, ...]:
        """Everything found."""
        return (*(finding for proof in self.branches for finding in proof.findings), *self.card_findings)

    @property
    def passed(self) -> bool:
        """Whether no finding is an error."""
        return not any(finding.severity == "error" for finding in self.findings)


def verify_published(
    target: Target, say: Callable[[str], None], *, branches: Sequence[str] = (), full: bool = False
) -> PublishedReport:
    """Compare a repository with what its branches record of themselves.

    Args:
        target: the repository.
        say: gets a line per branch, and with `full` one per file.
        branches: look at these only; the card's table is compared if main is among them.
        full: download every file, one branch at a time, hash it, and run the whole audit.

    Raises:
        PublishError: nothing is published there, a branch named is not there, or no branch could be read.
        MachineError: `full`, and the temporary folder has no space for a branch.
    """
    states = target.read_branches()
    if not states:
        raise PublishError("nothing is published here", where=target.where, hint="check the address")
    if absent := [branch for branch in branches if branch not in states]:
        raise PublishError(
            f"there is no branch {', '.join(absent)}", where=target.where, hint=f"there are {', '.join(sorted(states))}"
        )
    chosen = sorted(set(branches or states), key=lambda branch: (branch != MAIN, branch))
    proofs: list[BranchProof] = []
    provenances: dict[str, Provenance] = {}
    failures: list[PublishError] = []
    for branch in chosen:
        found = Collector(branch)
        proof = BranchProof(branch=branch, commit=states[branch].commit)
        try:
            proof, provenance = prove(target, proof, found, say, full=full)
        except PublishError as error:
            failures.append(error)
            found.add("branch-unreadable", "", f"{error.what}{f': {error.why}' if error.why else ''}")
        else:
            provenances |= {branch: provenance} if provenance else {}
        proofs.append(replace(proof, findings=found.collected()))
        say(f"{branch}: {'ok' if proofs[-1].passed else f'{len(proofs[-1].findings)} findings'}")
    if len(failures) == len(chosen):
        raise failures[0]
    card = Collector(MAIN)
    rows = check_card(target, states, provenances, card) if not branches or MAIN in chosen else None
    return PublishedReport(
        where=target.where, full=full, branches=tuple(proofs), card_rows=rows, card_findings=card.collected()
    )


__all__ = ["RULES", "BranchProof", "PublishedFinding", "PublishedReport", "verify_published"]
