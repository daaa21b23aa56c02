"""The cards of a recipe before anything is built: as far as the plan knows them, or with made-up measurements.

What the plan does not know differs between the two pages, so what both say does not depend on it. No torch, no network.
"""

from dataclasses import dataclass
from functools import cached_property

from packager import __version__
from packager.card import Prompting, render_card
from packager.card.choice import cached_contexts
from packager.card.own_templates import OwnTemplates
from packager.card.plot import plot_of
from packager.model.architecture import Architecture
from packager.pipeline.card_texts import read_card_texts
from packager.pipeline.made_up_figures import made_up_runs, with_made_up_figures
from packager.pipeline.prompting import prompting_of_base
from packager.pipeline.variant_plan import VariantPlan
from packager.receipt import LoaderRecord, MixedText, Provenance, SourceRecord, TextRecord
from packager.recipe.file import RecipeFile
from packager.recipe.text_models import TextSource

_NOT_BUILT = "not built yet"


@dataclass(frozen=True, kw_only=True)
class PredictedCards:
    """The cards of all variants of a recipe before a build.

    Attributes:
        recipe_file: the recipe.
        architecture: of its base model.
        variants: the plans of all its variants, in its order.
    """

    recipe_file: RecipeFile
    architecture: Architecture
    variants: tuple[VariantPlan, ...]

    def page(self, branch: str, own: OwnTemplates | None) -> str:
        """Return the card of a branch as far as it is known: everything else is marked as not measured and not run.

        Raises:
            CardError: the card cannot be rendered.
        """
        return self._page(branch, own, self._records(), self._prompting or Prompting())

    def made_up_page(self, branch: str, own: OwnTemplates | None) -> str:
        """Return the card of a branch as if it was built, with figures that nobody measured; it is never shown.

        Raises:
            CardError: the card cannot be rendered.
        """
        recipe, linears = self.recipe_file.recipe, self.architecture.linear_names
        records = [with_made_up_figures(record, recipe, linears, place) for place, record in enumerate(self._records())]
        has_template = self.recipe_file.lock.chat_template_sha256 is not None
        prompting = self._prompting or Prompting(has_template=has_template, before="<s>")
        return self._page(branch, own, records, prompting, is_preview=False)

    @cached_property
    def _prompting(self) -> Prompting | None:
        return prompting_of_base(self.recipe_file)  # a tokenizer has up to some tens of MB

    def _records(self) -> list[Provenance]:
        return [predicted_record(self.recipe_file, self.architecture, each) for each in self.variants]

    def _page(
        self,
        branch: str,
        own: OwnTemplates | None,
        records: list[Provenance],
        prompting: Prompting,
        *,
        is_preview: bool = True,
    ) -> str:
        contexts = cached_contexts(self.architecture)
        return render_card(
            self.recipe_file.recipe,
            read_card_texts(self.recipe_file),
            records,
            self.architecture.model_type,
            branch,
            expectations={each.variant.branch: each.verdicts for each in self.variants},
            prompting=prompting,
            contexts=contexts,
            plot=plot_of(records, contexts),
            own=own,
            runs={record.branch: made_up_runs(record) for record in records},
            is_preview=is_preview,
        )


def predicted_record(recipe_file: RecipeFile, architecture: Architecture, variant_plan: VariantPlan) -> Provenance:
    """Return a record of what the plan knows: no digest, no figure that is measured."""
    recipe = recipe_file.recipe
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
        not_quantized=dict(architecture.left),
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
