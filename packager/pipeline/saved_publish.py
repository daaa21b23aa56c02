"""Publish in two steps: the first saves a plan, the second publishes exactly that plan."""

from dataclasses import dataclass
from pathlib import Path

from packager.card import templates_dir
from packager.pipeline.build_state import BuildState
from packager.pipeline.card_texts import read_own_templates
from packager.publish.compare_plan import require_as_planned, require_same_subject
from packager.publish.plan import PublishPlan
from packager.publish.saved_plan import PublishSubject, SavedPlan, saved_plan, write_plan
from packager.publish.sign_release import Files
from packager.publish.targets import Target
from packager.receipt import digest_of
from packager.system.files import list_files, sha256_file


@dataclass(frozen=True, kw_only=True)
class PlanFile:
    """The file of a saved plan.

    Attributes:
        path: where it is.
        approved: the plan to publish; None saves the plan of a dry run there.
    """

    path: Path
    approved: SavedPlan | None = None


class PlannedPublish:
    """Saves the plan of a publish, or compares it with the approved one.

    Args:
        run: the build.
        target: where it is published.
        tag: the name that main's commit gets, "" for none.
        plan_file: the file of the plan.

    Raises:
        StalePlanError: the approved plan is of another recipe, repository or target.
    """

    def __init__(self, run: BuildState, target: Target, tag: str, plan_file: PlanFile) -> None:
        self._target, self._file = target, plan_file
        self._subject = _subject_of(run, target, tag)
        if plan_file.approved:
            require_same_subject(plan_file.approved, self._subject, str(plan_file.path))

    def compare(self, plan: PublishPlan, files: Files) -> None:
        """Save a plan, or compare it with the approved one.

        Raises:
            StalePlanError: it is not the approved one.
        """
        now = saved_plan(self._subject, plan, files)
        if self._file.approved:
            require_as_planned(self._file.approved, now, plan, self._target)
        else:
            write_plan(now, self._file.path)


def _subject_of(run: BuildState, target: Target, tag: str) -> PublishSubject:
    repository, folder = run.recipe.repository, templates_dir()
    own = read_own_templates(run.recipe_file)
    built_in = {name: sha256_file(folder / name) for name in list_files(folder)}
    return PublishSubject(
        repository=repository.id,
        target=repository.target,
        address="" if repository.target == "local" else target.where,
        recipe=run.recipe.digest(),
        templates=digest_of(built_in if own is None else [built_in, own.files]),
        tag=tag,
    )
