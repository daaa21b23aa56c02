"""How long a build will take: from what this machine measured before, else from docs/explanation/measurements.md.

A stage's time grows with the base model's size and with the tokens that it runs. A variant with effort high takes as
long as several others, by the passes of its rows through the model. Tasks take a time for each document with the
examples before it. That is near enough for hours or minutes, not for seconds: the search for grids, the start of a
loader, the length of a task's documents, and other work of the machine are left out. What cannot be known is said.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from pydantic import ValidationError

from packager.pipeline.plan import BuildPlan
from packager.pipeline.variant_plan import VariantPlan
from packager.quantize.tuning_schedule import SCHEDULE
from packager.receipt import SAFETENSORS, Receipt
from packager.recipe.task_models import EvaluationTask
from packager.records import TaskRecord
from packager.system.files import open_regular
from packager.variant import ScaleSearch

TimedStage = Literal["quantize", "pack", "evaluate", "verify", "tasks"]
TIMED_STAGES: Final[tuple[TimedStage, ...]] = ("quantize", "pack", "evaluate", "verify", "tasks")
Computer = Literal["cpu", "cuda"]
_MOST_DISTANCE: Final = 32.0  # between two sizes of base models
_MOST_BYTES: Final = 4_000_000  # of receipts that are read: `plan` is quick
# Quantizing a variant takes as long as so many forward passes of its rows: 0.38 of it are one on an H100, 13B's shape.
_FORWARDS_OF_QUANTIZING: Final = 2.6


@dataclass(frozen=True, kw_only=True)
class Measured:
    """The mean time of a variant's stages.

    Attributes:
        machine: what computed.
        model: what was built.
        base_bytes: size of the base model's weights.
        calibration_tokens: that were calibrated on.
        evaluation_tokens: that were measured on.
        seconds: of one variant, by stage; a stage that was not measured is missing.
        work: of one variant, see `work_of`: the mean of those that were measured.
        tasks: the records of one variant's tasks, whose time is that of the stage tasks.
    """

    machine: str
    computer: Computer
    model: str
    base_bytes: int
    calibration_tokens: int
    evaluation_tokens: int
    seconds: Mapping[TimedStage, float]
    work: float = 1.0
    tasks: tuple[TaskRecord, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Duration:
    """The estimated seconds of each stage of a build; a stage that nobody measured is None.

    Attributes:
        measured: where the figures are from.
        here: whether it was measured in this output folder.
        seconds: by stage; without tasks where the recipe names none.
    """

    measured: Measured
    here: bool
    seconds: Mapping[TimedStage, float | None]

    @property
    def total_s(self) -> float:
        """The sum of the stages that were measured."""
        return sum(seconds for seconds in self.seconds.values() if seconds is not None)


# Of the stage quantize, where a variant without it takes 1: docs/explanation/measurements.md, "What options cost". What
# was not measured counts as 1.
SIGNED_WORK: Final[Mapping[Computer, float]] = {"cpu": 1.14, "cuda": 1.01}
REFINED_WORK: Final[Mapping[Computer, float]] = {"cpu": 1.24, "cuda": 1.0}
CORRECTED_WORK: Final[Mapping[Computer, float]] = {"cpu": 1.49, "cuda": 2.09}
# docs/explanation/measurements.md: "The demo on a CPU" (four variants; without the 35 s that made environments),
# "Real small models" (two variants) and "A 13B shape on a GPU" (four variants).
REFERENCES: Final = (
    Measured(
        machine="2 CPU cores",
        computer="cpu",
        model="the demo",
        base_bytes=8_133_120,
        calibration_tokens=16_384,
        evaluation_tokens=16_320,
        seconds={"quantize": 23.8 / 4, "evaluate": 14.9 / 5, "verify": (49.5 - 38) / 4},
        work=SIGNED_WORK["cpu"],
    ),
    Measured(
        machine="2 CPU cores",
        computer="cpu",
        model="SmolLM2-135M",
        base_bytes=269_030_016,
        calibration_tokens=64 * 256,
        evaluation_tokens=8_160,
        seconds={"quantize": 240 / 2, "pack": 1.3 / 2, "evaluate": 167 / 3, "verify": 430 / 2},
    ),
    Measured(
        machine="one NVIDIA H200",
        computer="cuda",
        model="the shape of Llama 2 13B",
        base_bytes=26_031_728_640,
        calibration_tokens=128 * 2048,
        evaluation_tokens=0,
        seconds={"quantize": 84.4 / 4, "pack": 10 / 4},
    ),
)


def work_of(computer: Computer, scale_search: ScaleSearch, *, refine: bool, corrected: bool, tuning: float) -> float:
    """Return how long quantizing takes for a variant, where one with a plain scale search and nothing else takes 1.

    Args:
        computer: what computes.
        scale_search: of the variant.
        refine: likewise.
        corrected: whether it has a target correction.
        tuning: forward passes of all calibration rows that tuning its blocks takes.
    """
    signed = SIGNED_WORK[computer] if scale_search == "signed" else 1.0
    refined = REFINED_WORK[computer] if refine else 1.0
    return signed * refined * (CORRECTED_WORK[computer] if corrected else 1.0) + tuning / _FORWARDS_OF_QUANTIZING


def durations(plan: BuildPlan, dist: Path) -> tuple[Duration, ...]:
    """Return the estimate from what was built in `dist`; without such a build, that from a reference for each machine.

    Of several the one of the nearest size counts, the newest of equal ones; one of quite another size says nothing.
    """
    wanted = plan.architecture.base_bytes

    def distance(measured: Measured) -> float:
        return max(measured.base_bytes / wanted, wanted / measured.base_bytes)

    near = [measured for measured in _measured_in(dist) if distance(measured) <= _MOST_DISTANCE]
    if near:
        return (_scaled(plan, min(near, key=distance), here=True),)
    found: dict[str, Measured] = {}
    for reference in sorted(REFERENCES, key=distance):
        if distance(reference) <= _MOST_DISTANCE:
            found.setdefault(reference.machine, reference)
    return tuple(_scaled(plan, reference, here=False) for reference in found.values())


def _scaled(plan: BuildPlan, measured: Measured, *, here: bool) -> Duration:
    recipe, count = plan.recipe, len(plan.variants)
    size = plan.architecture.base_bytes / measured.base_bytes
    has_loaders = bool(recipe.loaders.names)
    rows = recipe.calibration
    works = [
        work_of(
            measured.computer, each.variant.scale_search, refine=each.variant.refine,
            corrected=each.variant.target_correction > 0,
            tuning=_tuning(measured.computer, each.variant.effort, rows.num_samples, rows.seq_len),
        )
        for each in (*plan.variants, *plan.only_measured)
    ]  # fmt: skip
    factors: dict[TimedStage, float] = {
        "quantize": sum(works) / measured.work * size * plan.calibration_tokens / measured.calibration_tokens,
        "pack": count * size,
        # The base model runs as often as a variant, and its time is in no variant's.
        "evaluate": (count + 1) * size * recipe.evaluation.num_tokens / max(1, measured.evaluation_tokens),
        # A loader needs its time to start, be the model ever so small.
        "verify": count * max(1.0, size) if has_loaders else 0.0,
    }
    seconds = {
        stage: measured.seconds[stage] * factor if stage in measured.seconds else None
        for stage, factor in factors.items()
    }
    if recipe.evaluation.tasks:
        once = _task_seconds(recipe.evaluation.tasks, measured)
        # The fp16 model answers, too, and no variant that transformers refuses.
        asked = 1 + sum(_is_opened(each, "transformers") for each in plan.variants)
        seconds["tasks"] = None if once is None else asked * size * once
    return Duration(measured=measured, here=here, seconds=seconds)


def _is_opened(variant_plan: VariantPlan, runtime: str) -> bool:
    return all(verdict.can_load for verdict in variant_plan.verdicts if verdict.loader == runtime)


def _task_seconds(tasks: Sequence[EvaluationTask], measured: Measured) -> float | None:
    """Return the seconds of one variant's tasks for a model of the measured size, None where that cannot be known."""
    prompts = sum(record.num_documents * (1 + record.num_fewshot) for record in measured.tasks)
    wanted = [_prompts_of(task, measured.tasks) for task in tasks]
    if not prompts or "tasks" not in measured.seconds or None in wanted:
        return None
    return measured.seconds["tasks"] * sum(filter(None, wanted)) / prompts


def _prompts_of(task: EvaluationTask, records: Sequence[TaskRecord]) -> int | None:
    """Return how many documents a task has, each with its examples counted as one more.

    None where neither the recipe nor a record of the same documents says it: `plan` reads no documents.
    """
    record = next((each for each in records if each.name == task.name and _same_documents(task, each)), None)
    num_documents, num_fewshot = task.limit, task.num_fewshot
    if record is not None:
        num_fewshot = record.num_fewshot if num_fewshot is None else num_fewshot
        if record.limit is None or record.num_documents < record.limit:
            num_documents = min(record.num_documents, task.limit or record.num_documents)
    return None if num_documents is None or num_fewshot is None else num_documents * (1 + num_fewshot)


def _same_documents(task: EvaluationTask, record: TaskRecord) -> bool:
    data, known = task.data, record.documents
    source = data.dataset or Path(str(data.path)).name
    return (source, data.config, data.split) == (known.source, known.config, known.split)


def _measured_in(dist: Path) -> list[Measured]:
    """Return what the receipts of an output folder say, one entry for each repository and device, the newest first."""
    groups: dict[tuple[str, str, int], list[Receipt]] = {}
    for receipt in _newest_receipts(dist / "receipts"):
        made = receipt.provenance
        base_bytes = sum(file.size_bytes for name, file in made.base_model.files.items() if name.endswith(SAFETENSORS))
        if base_bytes > 0 and {"weights", "evaluate"} <= receipt.stages.keys():
            groups.setdefault((made.repository, made.device, base_bytes), []).append(receipt)
    return [_mean(group, base_bytes) for (_, _, base_bytes), group in groups.items()]


def _mean(receipts: Sequence[Receipt], base_bytes: int) -> Measured:
    made = receipts[0].provenance
    scored = [receipt for receipt in receipts if receipt.provenance.tasks]
    seconds: dict[TimedStage, float] = {}
    for stage in TIMED_STAGES:
        # A variant that transformers does not open has no tasks, and took no time for them.
        timed = scored if stage == "tasks" else receipts
        times = [receipt.seconds[stage] for receipt in timed if stage in receipt.seconds]
        if times:
            seconds[stage] = sum(times) / len(times)
    computer: Computer = "cpu" if made.device == "cpu" else "cuda"
    works = [_work_of(receipt, computer) for receipt in receipts]
    return Measured(
        machine=made.device,
        computer=computer,
        model=made.repository,
        base_bytes=base_bytes,
        calibration_tokens=made.calibration.num_samples * made.calibration.seq_len,
        evaluation_tokens=made.evaluation.num_samples * made.evaluation.seq_len,
        seconds=seconds,
        work=sum(works) / len(works),
        tasks=scored[0].provenance.tasks if scored else (),
    )


def _work_of(receipt: Receipt, computer: Computer) -> float:
    parameters, rows = receipt.provenance.parameters, receipt.provenance.calibration
    signed = parameters.get("scale_search") == "signed"
    tuning = _tuning(computer, parameters.get("effort"), rows.num_samples, rows.seq_len)
    return work_of(
        computer, "signed" if signed else True, refine=parameters.get("refine") is True,
        corrected=bool(parameters.get("target_correction")), tuning=tuning,
    )  # fmt: skip


def _tuning(computer: Computer, effort: object, num_samples: int, seq_len: int) -> float:
    return SCHEDULE.forwards(num_samples, seq_len, computer) if effort == "high" else 0.0


def _newest_receipts(folder: Path) -> list[Receipt]:
    """Return receipts that can be read, the newest first; `status` and `build` report those that cannot."""
    found: list[tuple[float, int, Path]] = []
    for path in folder.glob("*/*/*.json"):
        try:
            status = path.lstat()
        except OSError:
            continue
        found.append((status.st_mtime, status.st_size, path))
    receipts, left = [], _MOST_BYTES
    for _, size_bytes, path in sorted(found, reverse=True):
        left -= size_bytes
        if left < 0:
            break
        try:
            with open_regular(path) as stream:
                receipts.append(Receipt.model_validate_json(stream.read(_MOST_BYTES)))
        except (OSError, ValidationError):
            continue
    return receipts
