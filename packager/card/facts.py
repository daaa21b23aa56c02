"""The figures for the card's templates: all from receipts, grouped as the page shows them."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, median_low

from packager.card.choice import CachedContext, device_bytes
from packager.card.comparison import Standing, standings
from packager.card.floor import floor_problems, is_far
from packager.card.numbers import PERCENT, measured, measured_percent
from packager.model.compatibility import Verdict
from packager.model.runtimes import RUNTIMES
from packager.receipt import ExpertLinearRecord, LoaderRecord, Provenance, QualityRecord
from packager.recipe import Recipe
from packager.records import TaskRecord
from packager.variant import Place

# The packages that a reader installs in the versions that AutoGPTQ ran with; torch depends on the reader's hardware.
_LOADER_PACKAGES = (
    *("auto-gptq", "transformers", "accelerate", "peft", "datasets", "tokenizers", "safetensors", "sentencepiece"),
    *("huggingface-hub", "numpy", "pandas", "pyarrow"),
)


@dataclass(frozen=True, kw_only=True)
class ExpertFacts:
    """How the linears of a variant's experts were calibrated.

    Attributes:
        linears: of experts.
        least, median, most: tokens that one of them saw.
        few: of them, those that saw fewer tokens than they have columns, `unseen` included.
        unseen: of them, those that saw no token.
    """

    linears: int
    least: int
    median: int
    most: int
    few: int
    unseen: int


@dataclass(frozen=True, kw_only=True)
class BranchFacts:
    """One row of the provided files.

    Attributes:
        provenance: the branch's receipt.
        description: from the recipe, None if it has none.
        raised: the raised damping of each linear that needed more than the recipe's.
        refined: how many linears were refined; 0 of a variant that refines where all saw too few tokens, else None.
        tuned: of a variant whose blocks were tuned, their error after the tuning over that before, the mean; else None.
        experts: of a model with quantized experts, else None.
        standing: how the branch compares with the others.
        contexts: for each context, the bytes of weights and cache.
    """

    provenance: Provenance
    description: str | None
    raised: tuple[float, ...]
    refined: int | None
    tuned: float | None
    experts: ExpertFacts | None
    standing: Standing
    contexts: tuple[int, ...]

    @property
    def branch(self) -> str:
        """Return the branch's name."""
        return self.provenance.branch

    @property
    def place(self) -> Place:
        """Return the repository and the revision that hold it."""
        return self.provenance.place

    @property
    def floor_problems(self) -> tuple[str, ...]:
        """Return which limits of the recipe's floor it misses."""
        made = self.provenance
        return floor_problems(made.quality, made.floor) if made.quality is not None and made.floor is not None else ()

    @property
    def is_far(self) -> bool:
        """Return whether its perplexity is far above the fp16 model's, where that is a number."""
        quality = self.provenance.quality
        return quality is not None and math.isfinite(quality.perplexity) and is_far(self.provenance)

    def record(self, loader: str) -> LoaderRecord:
        """Return the record of `loader` on this branch; a loader without a record was not run."""
        for record in self.provenance.loaders:
            if record.loader == loader:
                return record
        return LoaderRecord(loader=loader, required=False, status="not run", reason="no record of it in the receipt")

    def task(self, name: str) -> TaskRecord | None:
        """Return the record of a task, None if it was not measured on this branch."""
        return next((record for record in self.provenance.tasks if record.name == name), None)

    def passed(self) -> tuple[str, ...]:
        """Return the names of the loaders that are proven on this branch."""
        return tuple(record.loader for record in self.provenance.loaders if record.status == "passed")

    def weights(self) -> tuple[tuple[str, str], ...]:
        """Return the weights files and their sha256, sorted by name."""
        files = sorted(self.provenance.weights_files.items())
        return tuple((name, record.sha256) for name, record in files)


@dataclass(frozen=True, kw_only=True)
class BaseFigures:
    """What was measured of the fp16 model: its perplexity as shown, and how many questions it answered."""

    perplexity: str
    questions: int
    answered: int


@dataclass(frozen=True, kw_only=True)
class Shared:
    """A value, the branches that have it, and whether these are all branches."""

    value: object
    branches: tuple[str, ...]
    everywhere: bool


@dataclass(frozen=True, kw_only=True)
class LoaderSetting:
    """The device and the software of a loader's runs; "" where the loader did not report it."""

    device: str
    dtype: str
    kernel: str
    confinement: str
    versions: Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class Offer:
    """The verdicts of a runtime's own checks on the branches.

    Attributes:
        title: the runtime's name; `label` is the name with the version that the checks are of.
        accepted: the branches that it should open.
        refused: the branches that it should not open, by reason.
    """

    title: str
    label: str
    accepted: tuple[str, ...]
    refused: tuple[Shared, ...]

    def accepts(self, branch: str) -> bool:
        """Return whether the runtime should open a branch."""
        return branch in self.accepted

    def is_known(self, branch: str) -> bool:
        """Return whether there is a verdict on a branch."""
        return self.accepts(branch) or bool(self.refusal(branch))

    def refusal(self, branch: str) -> str:
        """Return why the runtime should not open a branch; "" if it should, or if there is no verdict."""
        return next((str(group.value) for group in self.refused if branch in group.branches), "")


def branch_facts(
    recipe: Recipe, receipts: Sequence[Provenance], contexts: Sequence[CachedContext]
) -> tuple[BranchFacts, ...]:
    """Return one row per receipt, in their order."""
    placed = standings(receipts)
    return tuple(
        BranchFacts(
            provenance=provenance,
            description=recipe.variants[index].description,
            raised=_raised(provenance),
            refined=_refined(provenance),
            tuned=_tuned(provenance),
            experts=_experts(provenance),
            standing=placed[index],
            contexts=tuple(device_bytes(provenance, context) for context in contexts),
        )
        for index, provenance in enumerate(receipts)
    )


def loader_names(recipe: Recipe, receipts: Sequence[Provenance]) -> tuple[str, ...]:
    """Return every loader the recipe names or a receipt has a record of, once, in that order."""
    recorded = [record.loader for provenance in receipts for record in provenance.loaders]
    return tuple(dict.fromkeys([*recipe.loaders.required, *recipe.loaders.if_available, *recorded]))


def shared(branches: Sequence[BranchFacts], value_of: Callable[[BranchFacts], object]) -> tuple[Shared, ...]:
    """Group branches by a value they have in common, in order of first appearance."""
    return _grouped([(facts, value_of(facts)) for facts in branches], len(branches))


def by_field(branches: Sequence[BranchFacts], field: str) -> tuple[Shared, ...]:
    """Group branches by one field of their provenance."""
    return shared(branches, lambda facts: getattr(facts.provenance, field))


def by_parameter(branches: Sequence[BranchFacts], name: str) -> tuple[Shared, ...]:
    """Group branches by one of their parameters."""
    return shared(branches, lambda facts: facts.provenance.parameters.get(name))


def by_base(branches: Sequence[BranchFacts]) -> tuple[Shared, ...]:
    """Group the measured branches by what was measured of the fp16 model."""
    return shared(branches, lambda facts: _base_figures(facts.provenance.quality))


def figure(quality: QualityRecord, name: str, *, unit: str = PERCENT) -> str:
    """Return a measured figure with twice its standard error; the name is a field of `QualityErrors`.

    `unit` follows a percentage: "" where the heading of the column says it.
    """
    error = None if quality.errors is None else getattr(quality.errors, name)
    if name == "perplexity_change":
        return measured_percent(quality.perplexity / quality.base_perplexity - 1, error, signed=True, unit=unit)
    value = getattr(quality, name)
    if value is None:
        return "not measured"
    if name == "top1_agreement":
        return measured_percent(value, error, unit=unit)
    return measured(value, error, significant=5 if "perplexity" in name else 3)


def by_experts(branches: Sequence[BranchFacts]) -> tuple[Shared, ...]:
    """Group branches by how their experts were calibrated."""
    return shared(branches, lambda facts: facts.experts)


def loader_rows(branches: Sequence[BranchFacts], loader: str) -> tuple[Shared, ...]:
    """Group branches by the record of `loader`: runs differ in their figures, reasons for no run rarely differ."""
    return shared(branches, lambda facts: facts.record(loader))


def loader_runs(branches: Sequence[BranchFacts], loader: str) -> tuple[Shared, ...]:
    """Group the branches on which `loader` ran by its setting."""
    ran = [facts for facts in branches if facts.record(loader).ran]
    return shared(ran, lambda facts: _setting(facts.record(loader)))


def pinned(record: LoaderRecord) -> tuple[str, ...]:
    """Return pip requirements for the versions that AutoGPTQ ran with: it does not work with later ones."""
    versions = {name.lower().replace("_", "-"): version for name, version in record.versions.items()}
    return tuple(f"{name}=={versions[name]}" for name in _LOADER_PACKAGES if name in versions)


def autogptq_pins(provenance: Provenance) -> str:
    """Return the file that pip installs AutoGPTQ's packages from, "" where AutoGPTQ did not pass."""
    records = [record for record in provenance.loaders if record.loader == "autogptq" and record.status == "passed"]
    lines = [line for record in records for line in pinned(record)]
    header = "# The versions that opened these files. torch is not among them: take the build for your hardware.\n"
    return header + "".join(f"{line}\n" for line in lines) if lines else ""


def expectation_rows(
    branches: Sequence[BranchFacts], expectations: Mapping[str, Sequence[Verdict]]
) -> tuple[tuple[str, Shared], ...]:
    """Return per loader title the predicted verdicts of the branches it was not run on."""
    rows: list[tuple[str, Shared]] = []
    for loader in RUNTIMES.values():
        unproven = [facts for facts in branches if not facts.record(loader.name).ran]
        known = [
            (facts, verdict)
            for facts in unproven
            for verdict in expectations.get(facts.branch, ())
            if verdict.loader == loader.name
        ]
        rows += [(loader.label, group) for group in _grouped(known, len(branches))]
    return tuple(rows)


def offers(branches: Sequence[BranchFacts], expectations: Mapping[str, Sequence[Verdict]]) -> dict[str, Offer]:
    """Return by runtime which branches its verdicts accept; a branch without a verdict is not accepted."""
    found = {}
    for runtime in RUNTIMES.values():
        verdicts = [
            (facts, verdict)
            for facts in branches
            for verdict in expectations.get(facts.branch, ())
            if verdict.loader == runtime.name
        ]
        found[runtime.name] = Offer(
            title=runtime.title,
            label=runtime.label,
            accepted=tuple(facts.branch for facts, verdict in verdicts if verdict.can_load),
            refused=_grouped(
                [(facts, verdict.reason) for facts, verdict in verdicts if not verdict.can_load], len(branches)
            ),
        )
    return found


def examples(here: BranchFacts, known: Mapping[str, Offer]) -> frozenset[str]:
    """Return the runtimes that the page may show as a way to load a branch.

    These are the ones that passed, and those that were not run and whose own checks do not refuse it.
    """
    return frozenset(
        name
        for name, offer in known.items()
        for status in (here.record(name).status,)
        if status == "passed" or (status == "not run" and not offer.refusal(here.branch))
    )


def _base_figures(quality: QualityRecord | None) -> BaseFigures | None:
    if quality is None:
        return None
    return BaseFigures(
        perplexity=figure(quality, "base_perplexity"), questions=quality.questions, answered=quality.base_answered
    )


def _setting(record: LoaderRecord) -> LoaderSetting:
    versions = dict(sorted(record.versions.items()))
    return LoaderSetting(
        device=record.device,
        dtype=record.dtype,
        kernel=record.kernel,
        confinement=record.confinement,
        versions=versions,
    )


def _grouped(pairs: Sequence[tuple[BranchFacts, object]], count: int) -> tuple[Shared, ...]:
    # Records hold dictionaries and cannot be keys: a list, compared one by one, of at most 64 branches.
    groups: list[tuple[object, list[str]]] = []
    for facts, value in pairs:
        for known, names in groups:
            if known == value:
                names.append(facts.branch)
                break
        else:
            groups.append((value, [facts.branch]))
    return tuple(Shared(value=value, branches=tuple(names), everywhere=len(names) == count) for value, names in groups)


def _raised(provenance: Provenance) -> tuple[float, ...]:
    asked = float(provenance.parameters["damp_percent"])
    return tuple(linear.damp_percent for linear in provenance.linears if linear.damp_percent > asked)


def _refined(provenance: Provenance) -> int | None:
    if not provenance.parameters.get("refine"):
        return None
    return sum(linear.unrefined_loss is not None for linear in provenance.linears)


def _tuned(provenance: Provenance) -> float | None:
    """Return the mean over the blocks, each of which has one pair of errors, in the records of its linears."""
    pairs = dict.fromkeys((linear.untuned_block_error, linear.block_error) for linear in provenance.linears)
    ratios = [after / before if before else 1.0 for before, after in pairs if before is not None and after is not None]
    return mean(ratios) if ratios else None


def _experts(provenance: Provenance) -> ExpertFacts | None:
    records = [linear for linear in provenance.linears if isinstance(linear, ExpertLinearRecord)]
    if not records:
        return None
    tokens = [record.tokens for record in records]
    return ExpertFacts(
        linears=len(records),
        least=min(tokens),
        median=median_low(tokens),
        most=max(tokens),
        # rho = columns / (columns + tokens)
        few=sum(record.rho > 1 / 2 for record in records),
        unseen=tokens.count(0),
    )
