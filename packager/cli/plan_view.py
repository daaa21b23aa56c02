"""A build plan: tables for people, JSON with exact integers for machines."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from packager.card.floor import far_lines, floor_lines
from packager.card.numbers import in_unit, short_size, size_unit
from packager.cli.plan_notes import plan_notes
from packager.cli.tables import add_row, fits, new_table, print_line
from packager.model.architecture import Architecture
from packager.model.compatibility import Verdict
from packager.model.runtimes import label_of
from packager.pipeline.built_quality import measured_variants
from packager.pipeline.durations import Duration
from packager.pipeline.plan import BuildPlan
from packager.pipeline.variant_plan import VariantPlan
from packager.prove.evaluation_memory import EvaluationMemory
from packager.quantize.memory import SweepPlan
from packager.recipe import Recipe
from packager.recipe.fields import DRAWING_VERSION
from packager.recipe.text_models import TextSource, WeightedText
from packager.system.text import gigabytes, rough_time
from packager.variant import MAIN

_LOADERS_TITLE = "What loads them (predicted from parameters and shapes)"
_TEXT_COLUMNS = ("Branch", "Act\norder", "Engine")


def print_build_plan(plan: BuildPlan, console: Console) -> None:
    """Print the branches, what loads them and why not, and the memory and disk a build needs."""
    architecture = plan.architecture
    print_line(
        console,
        f"{plan.recipe.repository.id} from {plan.recipe.base_model.id}: {architecture.model_type}, "
        f"{architecture.num_parameters:,} parameters in {architecture.dtype}, {architecture.num_blocks} blocks, "
        f"calibrated on {plan.calibration_tokens:,} tokens",
    )
    for text in text_lines(plan.recipe):
        print_line(console, text)
    console.print(_branch_table(plan))
    for text in context_lines(plan):
        print_line(console, text)
    if any(len(planned.shards) > 1 for planned in plan.variants):
        counts = (f"{planned.variant.branch} {len(planned.shards)}" for planned in plan.variants)
        print_line(console, f"Weights files: {', '.join(counts)}.")
    for text in (*left_lines(plan.architecture), *config_change_lines(plan.changes)):
        print_line(console, text)
    _print_loaders(plan, console)
    for text in [*_reasons(plan.variants), *plan_notes(plan)]:
        print_line(console, text)
    console.print(_needs_table(plan))


def time_lines(found: Sequence[Duration]) -> list[str]:
    """Return a line for each estimate of a build's time, with where it is from."""
    lines = [_time_line(duration) for duration in found]
    return lines or ["Time: not estimated, nothing of about this size was built in this output folder or measured."]


def _time_line(duration: Duration) -> str:
    known = {stage: seconds for stage, seconds in duration.seconds.items() if seconds is not None}
    stages = ", ".join(f"{stage} {rough_time(seconds)}" for stage, seconds in known.items())
    lacking = [stage for stage, seconds in duration.seconds.items() if seconds is None]
    names = " and ".join(filter(None, (", ".join(lacking[:-1]), *lacking[-1:])))
    without = f" without {names}, not measured there" if lacking else ""
    measured = duration.measured
    source = (
        f"from what {measured.model} took in this output folder on {measured.machine}"
        if duration.here
        else f"on {measured.machine}, a reference and not this machine, from {measured.model}"
    )
    return f"Time: about {rough_time(duration.total_s)}{without} ({stages}), {source}."


def durations_json(found: Sequence[Duration]) -> list[dict[str, object]]:
    """Return the estimates for machines: seconds by stage, null for a stage that was not measured."""
    return [
        {
            "machine": duration.measured.machine,
            "model": duration.measured.model,
            "measured_here": duration.here,
            "seconds": {
                stage: None if seconds is None else round(seconds, 1) for stage, seconds in duration.seconds.items()
            },
        }
        for duration in found
    ]


def floor_warnings(plan: BuildPlan, dist: Path) -> list[str]:
    """Return the floor, and what earlier builds in the output folder measured that misses it or is far from fp16."""
    made, floor = measured_variants(plan, dist), plan.recipe.quality
    limits = [
        f"{name} {value:g}"
        for name, value in (("perplexity increase", floor.max_perplexity_increase), ("KL divergence", floor.max_kl))
        if value is not None
    ]
    lines = [f"Floor: {' and '.join(limits)} at most; a variant that misses it is not published."] if limits else []
    return [*lines, *floor_lines(plan.recipe, made), *far_lines(made, MAIN)]


def resolved_text(recipe: Recipe) -> str:
    """Return a whole recipe as YAML: it gives the same digest without what it inherited."""
    from packager.recipe.draft import draft_text  # 70 ms, for this alone

    return draft_text(recipe.model_dump(mode="json", exclude_none=True))


def resolved_json(recipe: Recipe) -> Mapping[str, object]:
    """Return a whole recipe for machines; as JSON is YAML, it is a recipe, too."""
    content: Mapping[str, object] = recipe.model_dump(mode="json", exclude_none=True)
    return content


def context_lines(plan: BuildPlan) -> list[str]:
    """Return what is counted to run a variant, and where the lock does not know it."""
    cached = _size(plan.context_bytes)
    lines = [f"To run: weights and {cached}, what is cached of {plan.context_tokens} tokens; nothing else."]
    if plan.architecture.kv_cache is None:
        lines.append(
            "note: the lock is of an older release and does not say which layers cache the last tokens only, nor what "
            "transformers takes for keys that config.json leaves out: every layer is counted with all tokens, states "
            "are not counted; make it anew: packager lock RECIPE"
        )
    return lines


def _size(size_bytes: int) -> str:
    """Return a size with three digits: 0.11 GB says nothing of a small model."""
    return short_size(size_bytes).replace("\u00a0", " ")


def text_lines(recipe: Recipe) -> list[str]:
    """Return a line for each text that rows are drawn from: those of the calibration, then the evaluation's."""
    return [
        f"{rows.purpose}: {_rows(rows.num_rows)} of {rows.seq_len} tokens, seed {rows.seed}, from {_source(rows.text)}"
        for rows in _planned_rows(recipe)
    ]


class _PlannedRows(NamedTuple):
    """What determines the rows of a text beside the text itself, the tokenizer and the way of drawing."""

    purpose: str
    text: TextSource
    num_rows: int
    seq_len: int
    seed: int


def _planned_rows(recipe: Recipe) -> list[_PlannedRows]:
    """Return the rows of every text, the evaluation's last."""
    calibration, evaluation = recipe.calibration, recipe.evaluation
    counts = zip(calibration.texts, calibration.rows_of_texts, strict=True)
    return [
        *(_PlannedRows("Calibration", text, count, calibration.seq_len, calibration.seed) for text, count in counts),
        _PlannedRows("Evaluation", evaluation, evaluation.num_rows, evaluation.seq_len, evaluation.seed),
    ]


def _rows(count: int) -> str:
    return "1 row" if count == 1 else f"{count:,} rows"


def _source(text: TextSource) -> str:
    """Return a text's source in words: the file, or the split with the commit, and how its rows are read."""
    kind = _documents(text)
    facts = [kind if kind == "conversations" else f"{kind} documents"]
    facts += [f"column {text.column}"] if text.column != "text" else []
    facts += [f"weight {text.weight:g}"] if isinstance(text, WeightedText) else []
    more = f" ({', '.join(facts)})"
    if text.path is not None:
        return f"{text.path}{more}"
    config = f" {text.config}" if text.config is not None else ""
    return f"{text.dataset}{config}, split {text.split}, at {str(text.revision)[:12]}{more}"


def _documents(text: TextSource) -> str:
    """Return how rows are made of a text: "joined" or "separate" documents, or "conversations"."""
    return "conversations" if text.messages_field is not None else text.documents


def left_lines(architecture: Architecture) -> list[str]:
    """Return a line for each reason why modules of the blocks are not quantized, with their names."""
    reasons: dict[str, dict[str, None]] = {}
    for kind in architecture.kinds:
        for module, reason in kind.left.items():
            reasons.setdefault(reason, {})[module] = None
    return [f"Not quantized, because {reason}: {', '.join(modules)}." for reason, modules in reasons.items()]


def config_change_lines(changes: Sequence[str]) -> list[str]:
    """Return a line for each value that a branch's configs get otherwise than the base model has it."""
    return [f"Not as the base model has it: {change}." for change in changes]


def _branch_table(plan: BuildPlan) -> Table:
    has_engines = any(planned.variant.engine != "native" for planned in plan.variants)
    unit = size_unit(max(plan.run_bytes(planned) for planned in plan.variants))
    columns = ["Branch", "Bits", "Group\nsize", "Act\norder", f"Size,\n{unit}", "Bytes", f"To run,\n{unit}"]
    table = new_table(
        [*columns, "Engine"] if has_engines else columns,
        title="Branches",
        numbers=[column for column in columns if column not in _TEXT_COLUMNS],
        folding=("Branch",),
    )
    for planned in plan.variants:
        variant = planned.variant
        add_row(
            table,
            variant.branch,
            str(variant.bits) if variant.mix is None else f"{variant.mix.mean:g}",
            str(variant.group_size),
            variant.act_order,
            in_unit(planned.weights_bytes, unit),
            f"{planned.weights_bytes:,}",
            in_unit(plan.run_bytes(planned), unit),
            *([variant.engine] if has_engines else []),
        )
    return table


def _print_loaders(plan: BuildPlan, console: Console) -> None:
    """Print which runtime loads which branch: a table if it fits the terminal, else a line per branch."""
    labels = [label_of(verdict.loader) for verdict in plan.variants[0].verdicts]
    table = new_table(
        ("Branch", *(label.replace(" ", "\n") for label in labels)), title=_LOADERS_TITLE, folding=("Branch",)
    )
    for planned in plan.variants:
        add_row(table, planned.variant.branch, *map(_answer, planned.verdicts))
    if fits(table, console):
        console.print(table)
        return
    print_line(console, _LOADERS_TITLE)
    for planned in plan.variants:
        loaded, refused, unknown = (_titles(planned, answer) for answer in ("yes", "no", "unknown"))
        more = f"; refused by {refused}" if refused else ""
        more += f"; tried in {unknown}" if unknown else ""
        print_line(console, f"{planned.variant.branch}: loaded by {loaded or 'nothing'}{more}")


def _answer(verdict: Verdict) -> str:
    return "yes" if verdict.can_load else "unknown" if verdict.is_tried else "no"


def _titles(planned: VariantPlan, answer: str) -> str:
    return ", ".join(label_of(verdict.loader) for verdict in planned.verdicts if _answer(verdict) == answer)


def _reasons(planned: tuple[VariantPlan, ...]) -> list[str]:
    """Return one line per loader and reason, with the branches it holds for: refusals first."""
    branches: dict[Verdict, list[str]] = {}
    for variant_plan in planned:
        for verdict in variant_plan.verdicts:
            if verdict.reason:
                branches.setdefault(verdict, []).append(variant_plan.variant.branch)
    return [
        f"{'note' if verdict.can_load else _answer(verdict)}: {label_of(verdict.loader)}"
        f"{'' if len(names) == len(planned) else ' for ' + ', '.join(names)}: {verdict.reason}"
        for verdict, names in sorted(branches.items(), key=lambda item: item[0].can_load)
    ]


def _needs_table(plan: BuildPlan) -> Table:
    disk = plan.disk
    table = new_table(("Where", "GB", "For"), title="What a build needs", numbers=("GB",), folding=("For",))
    for where, size_bytes, purpose in (
        *_memory_rows(plan),
        ("GPU memory", plan.evaluation.gpu.device_bytes, f"measuring quality, with {_host(plan.evaluation.gpu)}"),
        ("host memory", plan.evaluation.cpu.device_bytes, "measuring quality without a GPU"),
        ("disk", disk.total_bytes, "everything below"),
        ("", disk.source_bytes, "download of the base model"),
        ("", disk.builds_bytes, "checkpoint folders, finished blocks included"),
        ("", disk.publish_bytes, "a local publishing target"),
        *([("", disk.losses_bytes, "measuring losses for mixes")] if disk.losses_bytes else []),
    ):
        add_row(table, where, gigabytes(size_bytes), purpose)
    return table


def _memory_rows(plan: BuildPlan) -> list[tuple[str, int, str]]:
    """Return the memory of engine native; its name is shown where the recipe has another engine too."""
    memory = plan.memory
    if memory is None:
        return []
    mixed = any(planned.variant.engine != "native" for planned in plan.variants)
    engine = "engine native, " if mixed else ""
    return [
        (
            "GPU memory",
            memory.fastest.device_bytes,
            f"{engine}everything on the GPU (estimated, without the CUDA context)",
        ),
        ("", memory.full_speed.device_bytes, f"{engine}as fast, with {_host(memory.full_speed)}"),
        (
            "",
            memory.least.device_bytes,
            f"{engine}least{_costs(memory.least, memory.fastest)}, with {_host(memory.least)}",
        ),
        ("host memory", memory.cpu.device_bytes, f"{engine}without a GPU"),
    ]


def _costs(way: SweepPlan, fastest: SweepPlan) -> str:
    """Return what a way does for its memory that takes time; how much is known of one model and GPU alone."""
    again = fastest.suspended_batches - way.suspended_batches  # without true_sequential none is ever suspended
    costs = [
        *([f"{again} of {way.num_batches} batches run again for each group of linears"] if again else []),
        *(["weights wait on the host"] if way.weights == "host" else []),
        *(["activations are on disk"] if way.placement == "disk" else []),
    ]
    return f", slower ({', '.join(costs)})" if costs else ""


def _host(needed: SweepPlan | EvaluationMemory) -> str:
    return f"{gigabytes(needed.host_bytes)} GB of host memory"


def build_plan_json(plan: BuildPlan) -> dict[str, object]:
    """Return the plan as JSON values: sizes in bytes, verdicts with reasons, tensors left out."""
    architecture = plan.architecture
    return {
        "schema_version": 1,
        "repository": plan.recipe.repository.id,
        "recipe_digest": plan.recipe.digest(),
        "base_model": {
            "id": plan.recipe.base_model.id,
            "revision": plan.recipe.base_model.revision,
            "model_type": architecture.model_type,
            "dtype": architecture.dtype,
            "num_parameters": architecture.num_parameters,
            "num_blocks": architecture.num_blocks,
            "not_quantized": dict(architecture.left),
            "size_bytes": architecture.base_bytes,
            "changes": list(plan.changes),
        },
        "texts": [
            {
                "purpose": rows.purpose.lower(),
                **rows.text.model_dump(
                    mode="json",
                    include={"path", "dataset", "config", "revision", "split", "weight"},
                    exclude_none=True,
                ),
                "column": rows.text.column,
                "documents": _documents(rows.text),
                "num_rows": rows.num_rows,
                "seq_len": rows.seq_len,
                "seed": rows.seed,
            }
            for rows in _planned_rows(plan.recipe)
        ],
        "drawing_version": DRAWING_VERSION,
        "calibration_tokens": plan.calibration_tokens,
        "context_tokens": plan.context_tokens,
        "context_bytes": plan.context_bytes,
        "context_is_exact": architecture.kv_cache is not None,
        "variants": [_variant_json(plan, planned) for planned in plan.variants],
        "memory": asdict(plan.memory) if plan.memory is not None else None,
        "evaluation_memory": asdict(plan.evaluation),
        "disk": {**asdict(plan.disk), "total_bytes": plan.disk.total_bytes},
    }


def _variant_json(plan: BuildPlan, planned: VariantPlan) -> Mapping[str, object]:
    return {
        "branch": planned.variant.branch,
        "parameters": planned.variant.parameters(),
        "digest": planned.digest,
        "description": planned.description,
        "weights_bytes": planned.weights_bytes,
        "tensor_bytes": planned.tensor_bytes,
        "run_bytes": plan.run_bytes(planned),
        "files": {shard.file_name: shard.size_bytes for shard in planned.shards},
        # Of a mix, the sizes are the largest, and its files are not known before its bits are chosen.
        **({"least_weights_bytes": planned.least_bytes} if planned.variant.mix is not None else {}),
        "loaders": [
            {
                "loader": verdict.loader,
                "status": verdict.status,
                "can_load": verdict.can_load,
                "reason": verdict.reason,
            }
            for verdict in planned.verdicts
        ],
    }
