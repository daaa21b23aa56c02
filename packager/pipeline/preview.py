"""The card of a recipe before anything is built: sizes as planned, everything else marked as not measured and not run.

It is a page to look at, not a README.md, and it lies outside the folders that `publish` reads: no preview is published.
No torch, no network.
"""

from pathlib import Path

from packager import __version__
from packager.card import Prompting, render_card
from packager.card.choice import cached_contexts
from packager.card.hub_page import hub_page
from packager.errors import RecipeError
from packager.pipeline.card_texts import read_card_texts, read_own_templates
from packager.pipeline.cards import prompting_of
from packager.pipeline.plan import BuildPlan, make_plan
from packager.pipeline.variant_plan import VariantPlan
from packager.receipt import TOKENIZER, TOKENIZER_CONFIG, LoaderRecord, MixedText, Provenance, SourceRecord, TextRecord
from packager.recipe.file import RecipeFile
from packager.recipe.text_models import TextSource
from packager.system.files import write_atomic

_NOT_BUILT = "not built yet"


def write_preview(recipe_file: RecipeFile, dist: Path, branch: str) -> Path:
    """Write the preview of a branch's card as an HTML page, and return where it is.

    Raises:
        RecipeError: there is no such branch.
        PlanError: the recipe cannot be built.
        CardError: the card cannot be rendered.
        MachineError: the output folder cannot be written.
    """
    path = dist / "previews" / recipe_file.recipe.repository.id / f"{branch}.html"
    page = hub_page(preview_card(recipe_file, branch), {})
    write_atomic(path, page.encode())
    return path


def preview_card(recipe_file: RecipeFile, branch: str) -> str:
    """Return the card of a branch as far as it is known before a build; raises as `write_preview`."""
    plan = make_plan(recipe_file)
    branches = [variant_plan.variant.branch for variant_plan in plan.variants]
    if branch not in branches:
        raise RecipeError(f"the recipe has no branch {branch!r}", hint=f"it has {', '.join(branches)}")
    return render_card(
        recipe_file.recipe,
        read_card_texts(recipe_file),
        [_predicted(recipe_file, plan, variant_plan) for variant_plan in plan.variants],
        plan.architecture.model_type,
        branch,
        expectations={variant_plan.variant.branch: variant_plan.verdicts for variant_plan in plan.variants},
        prompting=_prompting(recipe_file),
        contexts=cached_contexts(plan.architecture),
        own=read_own_templates(recipe_file),
        is_preview=True,
    )


def _prompting(recipe_file: RecipeFile) -> Prompting:
    """Return what the tokenizer of a local base model does; that of a model on the Hub is not read."""
    path = recipe_file.recipe.base_model.path
    if path is None:
        return Prompting()
    folder = recipe_file.base_folder(path)
    if not all((folder / name).is_file() for name in (TOKENIZER, TOKENIZER_CONFIG)):
        return Prompting()
    return prompting_of(folder)


def _predicted(recipe_file: RecipeFile, plan: BuildPlan, variant_plan: VariantPlan) -> Provenance:
    """Return a record of what the plan knows: no digest, no figure that is measured."""
    recipe, architecture = recipe_file.recipe, plan.architecture
    calibration, evaluation = recipe.calibration, recipe.evaluation
    return Provenance(
        repository=recipe.repository.id,
        branch=variant_plan.variant.branch,
        layout=recipe.repository.layout,
        made_with=f"gptq-packager {__version__}",
        recipe_digest=recipe.digest(),
        variant_digest=variant_plan.digest,
        parameters=variant_plan.variant.parameters(),
        effective={},
        base_model=SourceRecord(
            id=recipe.base_model.id, revision=recipe_file.lock.base_model.revision, digest="", files={},
            dtype=architecture.dtype, num_parameters=architecture.num_parameters,
        ),
        calibration=_text_record(
            calibration.texts, calibration.rows_of_texts, calibration.num_samples, calibration.seq_len, calibration.seed
        ),
        evaluation=_text_record(
            (evaluation,), (evaluation.num_rows,), evaluation.num_rows, evaluation.seq_len, evaluation.seed
        ),
        versions={},
        device="",
        linears=(),
        loaders=tuple(
            LoaderRecord(loader=name, required=name in recipe.loaders.required, status="not run", reason=_NOT_BUILT)
            for name in (*recipe.loaders.required, *recipe.loaders.if_available)
        ),
        weights_bytes=variant_plan.weights_bytes,
        files={},
    )  # fmt: skip


def _text_record(
    texts: tuple[TextSource, ...], rows: tuple[int, ...], num_samples: int, seq_len: int, seed: int
) -> TextRecord:
    first, several = texts[0], len(texts) > 1
    return TextRecord(
        source=" + ".join(text.name for text in texts),
        revision=None if several else first.revision,
        config=None if several else first.config,
        split=None if several else first.split,
        num_samples=num_samples,
        seq_len=seq_len,
        seed=seed,
        text_sha256="",
        digest="",
        mixed=tuple(
            MixedText(
                source=text.name, revision=text.revision, config=text.config, split=text.split, text_sha256="",
                num_samples=count,
            )
            for text, count in zip(texts, rows, strict=True)
        )
        if several
        else (),
    )  # fmt: skip
