"""The queue: every recipe is a request; the store of a fleet, or this machine's output folder, knows how far it is.

Nothing is changed, and nothing is read from a network but the store.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, get_args

from packager import __version__
from packager.errors import MachineError, PackagerError, UsageError
from packager.fleet.leases import Lease
from packager.fleet.recipe_state import read_recipe_state
from packager.fleet.store import Store
from packager.fleet.tasks import QueueState
from packager.pipeline.build_options import Options
from packager.pipeline.compare_published import compare_published
from packager.pipeline.many_recipes import recipes_among
from packager.pipeline.plan import make_plan
from packager.pipeline.status import BranchStatus, read_status, running_build
from packager.recipe.file import RecipeFile
from packager.system.terminal import Terminal

STATES: Final[tuple[QueueState, ...]] = get_args(QueueState)
_SUFFIXES = (".yaml", ".yml")
_MOST_RECIPES = 100_000
_LINK = "it is a link out of the folder, and is not read"


@dataclass(frozen=True, kw_only=True)
class QueueEntry:
    """A recipe in the queue.

    Attributes:
        path: of the recipe.
        name: of it inside the folder that was given; what a page shows.
        repository: its id; "" if the recipe cannot be read.
        state: where it is.
        stage: what runs, or ran last; "" before the first.
        machine: where it runs; "" if nothing does.
        why: it is parked, or waits; "" if there is nothing to say.
        updated_at: when that was written, in seconds since 1970, by the clock of the run that wrote it; None if nobody
            has begun.
    """

    path: Path
    name: str
    repository: str = ""
    state: QueueState = "requested"
    stage: str = ""
    machine: str = ""
    why: str = ""
    updated_at: float | None = None


def queued_recipes(
    sources: Sequence[Path], patterns: Sequence[str], log: Callable[[str], None], *, dist: Path
) -> tuple[QueueEntry, ...]:
    """Return an entry for each recipe: files, those in folders, and those that fit patterns; each once.

    Args:
        sources: recipes and folders.
        patterns: see `recipes_among`.
        log: likewise.
        dist: the output folder, in which nothing is a request: branches hold their recipes.

    Raises:
        UsageError: a source is not there, or a folder has no recipe, or too many.
        RecipeError: no file fits a pattern.
    """
    names: dict[Path, str] = {}
    for source in sources:
        if not source.exists():
            raise UsageError(f"{source} is neither a recipe nor a folder", hint="name recipes, or folders of recipes")
        found = {source: source.name}
        if source.is_dir():
            found = {path: path.relative_to(source).as_posix() for path in _yaml_files(source, dist.absolute())}
            if not found:
                raise UsageError(f"the folder {source} has no recipe", hint="recipes end with .yaml")
        names = {**found, **names}
    outside = {path for source in sources if source.is_dir() for path in names if _leads_out(path, source)}
    read = recipes_among([path for path in names if path not in outside], patterns, log)
    return (
        *(QueueEntry(path=path, name=names.get(path, path.name)) for path in read),
        *(QueueEntry(path=path, name=names[path], state="parked", why=_LINK) for path in names if path in outside),
    )


def _leads_out(path: Path, folder: Path) -> bool:
    """Return whether a file of a folder is a link out of it: whoever may write there may not read everything here."""
    return path.is_relative_to(folder) and not path.resolve().is_relative_to(folder.resolve())


def _yaml_files(folder: Path, dist: Path) -> Iterator[Path]:
    """Yield the YAML files of a folder, sorted, without hidden ones, those in hidden folders and in the output folder.

    Raises:
        UsageError: there are too many.
    """
    count = 0
    for path in sorted(folder.rglob("*")):
        parts = path.relative_to(folder).parts
        left_out = any(part.startswith(".") for part in parts) or path.absolute().is_relative_to(dist)
        if path.suffix in _SUFFIXES and not left_out and path.is_file():
            count += 1
            if count > _MOST_RECIPES:
                raise UsageError(f"the folder {folder} has more than {_MOST_RECIPES:,} recipes")
            yield path


def read_queue(
    entries: Sequence[QueueEntry], options: Options, store: Store | None, step: Callable[[str], None] = lambda _: None
) -> tuple[QueueEntry, ...]:
    """Return the entries with their states.

    Args:
        entries: of `queued_recipes`.
        options: with the output folder, whose state counts if there is no store.
        store: of a fleet.
        step: gets the name of each recipe that was looked at.

    A recipe that cannot be read or planned, or that has the repository of another one, is parked: no run can build it.

    Raises:
        MachineError: the store cannot be used now.
    """
    taken: dict[str, QueueEntry] = {}
    found = []
    for entry in entries:
        if entry.state == "parked":
            found.append(entry)
            continue
        known = entry
        try:
            file = RecipeFile.load(entry.path)
            known = replace(entry, repository=file.recipe.repository.id)
            other = taken.setdefault(known.repository.lower(), known)
            if other is not known:
                found.append(replace(known, state="parked", why=f"{other.name} builds {other.repository}, too"))
            else:
                found.append(_in_store(known, file, store) if store is not None else _in_folder(known, file, options))
        except PackagerError as error:
            if store is not None and isinstance(error, MachineError):
                raise  # nothing is known of any recipe
            lines = [error.what, error.why] if error.why else [line.strip() for line in str(error).splitlines()]
            found.append(replace(known, state="parked", why=": ".join(lines[:2])))
        step(entry.name)
    return tuple(found)


def _in_store(entry: QueueEntry, file: RecipeFile, store: Store) -> QueueEntry:
    """Return an entry as the run says that has, or had, the recipe's lease.

    What was built, published or parked of another recipe or by another version is a request again. Its inputs are not
    read here: `release` compares them. What a run began that has ended, however it did, is a request, too.

    Raises:
        PlanError: nobody has begun, and nobody can.
    """
    known = read_recipe_state(store, entry.repository)
    if known is None:
        make_plan(file)
        return entry
    now = (file.recipe.digest(), __version__)
    if known.state in ("built", "published", "parked") and (known.recipe_digest, known.version) != now:
        why = f"its recipe or packager changed since it was {known.state}"
        return replace(entry, why=why, updated_at=known.updated_at)
    if known.state == "building" and not Lease(store, entry.repository, "").is_held(time.time()):
        why = "begun: its run has ended, and the next one goes on"
        return replace(entry, stage=known.stage or "", why=why, updated_at=known.updated_at)
    return replace(
        entry, state=known.state, stage=known.stage or "", machine=known.machine, why=known.why,
        updated_at=known.updated_at,
    )  # fmt: skip


def _in_folder(entry: QueueEntry, file: RecipeFile, options: Options) -> QueueEntry:
    """Return an entry as the output folder of this machine says."""
    if (running := running_build(file, options)) is not None:
        return replace(
            entry, state="building", stage=running.stage, machine=running.host, why=running.text,
            updated_at=running.updated_at,
        )  # fmt: skip
    statuses = read_status(file, options)
    if damaged := [f"{status.branch}: {status.problem}" for status in statuses if status.problem]:
        return replace(entry, state="parked", why=damaged[0])
    done = [status for status in statuses if status.receipt is not None and not status.stages_missing]
    if len(done) < len(statuses):
        return replace(entry, why=_begun(statuses, len(done)))
    if file.recipe.repository.target != "local":
        return replace(entry, state="built", why="what is published is not read here")
    differences = compare_published(file, options, Terminal(quiet=True))
    return replace(entry, state="published" if all(each.standing == "same" for each in differences) else "built")


def _begun(statuses: Sequence[BranchStatus], done: int) -> str:
    """Return how far an unfinished build is, with which the next one goes on; "" if there is nothing."""
    blocks = sum(status.blocks_done for status in statuses)
    if not blocks and all(status.receipt is None for status in statuses):
        return ""
    more = f", {blocks} blocks of others" if blocks else ""
    return f"begun: {done} of {len(statuses)} branches are done{more}"


def queue_values(entries: Sequence[QueueEntry]) -> dict[str, Any]:
    """Return the queue as values that `json` can write."""
    counts = Counter(entry.state for entry in entries)
    return {
        "counts": {state: counts[state] for state in STATES},
        "recipes": [{**vars(entry), "path": str(entry.path)} for entry in entries],
    }
