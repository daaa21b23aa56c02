"""Which runtimes open which branches, as the page says it: by what ran, else by their checks."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from packager.card.choice import cpu_loaders, opened_by
from packager.card.facts import BranchFacts, Offer
from packager.model.compatibility import Verdict
from packager.model.runtimes import RUNTIMES, label_of, title_of


@dataclass(frozen=True, kw_only=True)
class Runtimes:
    """The runtimes that are expected to open a branch, without versions, and those that do not, with versions."""

    expected: tuple[str, ...]
    refused: tuple[str, ...]


def runtimes_of(here: BranchFacts, known: Mapping[str, Offer]) -> Runtimes:
    """Return which runtimes should open a branch, beside those that are proven: by what ran, else by their checks."""
    names = tuple(dict.fromkeys([*RUNTIMES, *(record.loader for record in here.provenance.loaders)]))
    statuses = {name: here.record(name).status for name in names}
    verdicts = {name: known[name].accepts(here.branch) for name in known if known[name].is_known(here.branch)}
    open_ = [name for name in names if statuses[name] == "not run"]
    refused = {name for name in names if statuses[name] in ("failed", "refused")}
    return Runtimes(
        expected=_titles(title_of(name) for name in open_ if verdicts.get(name)),
        refused=_titles(
            label_of(name) for name in names if name in refused or (name in open_ and verdicts.get(name) is False)
        ),
    )


def opens(
    branches: Sequence[BranchFacts], expectations: Mapping[str, Sequence[Verdict]], runtime: str
) -> frozenset[str]:
    """Return the branches that a runtime opens: it passed there, or its checks accept them and it did not run."""
    return frozenset(
        facts.branch
        for facts in branches
        if opened_by(facts.provenance, expectations.get(facts.branch, ()), runtime).may_be_taken
    )


def proven_on_cpu(branches: Sequence[BranchFacts]) -> dict[str, tuple[str, ...]]:
    """Return by branch the loaders that passed on a CPU, for the branches that have one."""
    found = {facts.branch: tuple(map(title_of, cpu_loaders(facts.provenance))) for facts in branches}
    return {branch: names for branch, names in found.items() if names}


def _titles(titles: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(titles))
