"""Which runtimes open which branches, as the page says it: by what ran, else by their checks."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from packager.card.choice import (
    RUNTIME_BYTES,
    CachedContext,
    Candidate,
    Opened,
    best_branch,
    cpu_loaders,
    machine_choices,
    opened_by,
    opened_on_cpu,
)
from packager.card.facts import BranchFacts, Offer
from packager.model.compatibility import Verdict
from packager.model.runtimes import RUNTIMES, label_of, title_of

# The server that GPTQ files are most often served with.
_SERVER = "vllm"


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


def choice_values(
    branches: Sequence[BranchFacts],
    known: Mapping[str, Offer],
    expectations: Mapping[str, Sequence[Verdict]],
    contexts: Sequence[CachedContext],
) -> dict[str, object]:
    """Return what the page says about which branch to take.

    A question, which is a column of its table, is a context and a runtime, "" for any. vLLM has a question of its own
    wherever it opens a branch: what it opens on a GPU need not be proven on a CPU.
    """
    opened = {
        facts.branch: opened_by(facts.provenance, expectations.get(facts.branch, ()), _SERVER) for facts in branches
    }
    served = [branch for branch, how in opened.items() if how.may_be_taken]
    questions = [(context, "") for context in contexts]
    if contexts and served:
        questions.append((contexts[0], _SERVER))
    receipts = [facts.provenance for facts in branches]
    on_gpu = [
        [
            Candidate(receipt=receipt, context=context, opened=opened[receipt.branch] if runtime else Opened())
            for receipt in receipts
        ]
        for context, runtime in questions
    ]
    on_cpu = [
        [Candidate(receipt=receipt, context=context, opened=opened_on_cpu(receipt, runtime)) for receipt in receipts]
        for context, runtime in questions
    ]
    proven = _proven_on_cpu(branches)
    cpu_choice = best_branch([receipt for receipt in receipts if receipt.branch in proven])
    return {
        "choice_columns": [(context, known[runtime].label if runtime else "") for context, runtime in questions],
        "choices": machine_choices(on_gpu, on_cpu),
        "runtime_bytes": RUNTIME_BYTES,
        "served": frozenset(served),
        "served_is_proven": any(opened[branch].opening == "proven" for branch in served),
        "served_on_cpu": [
            receipt.branch for receipt in receipts if opened_on_cpu(receipt, _SERVER).opening == "proven"
        ],
        "cpu_choice": cpu_choice,
        "cpu_loaders": proven.get(cpu_choice, ()),
    }


def _proven_on_cpu(branches: Sequence[BranchFacts]) -> dict[str, tuple[str, ...]]:
    """Return by branch the loaders that passed on a CPU, for the branches that have one."""
    found = {facts.branch: tuple(map(title_of, cpu_loaders(facts.provenance))) for facts in branches}
    return {branch: names for branch, names in found.items() if names}


def _titles(titles: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(titles))
