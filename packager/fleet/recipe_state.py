"""The state of a recipe in the store, for whoever looks at a fleet: written by the run that has the recipe's lease.

NAMESPACE/NAME/state.json
"""

from pydantic import FiniteFloat, ValidationError

from packager.fleet.store import Store
from packager.fleet.tasks import QueueState, TaskStage
from packager.records import Record


class RecipeState(Record):
    """What a fleet knows of one recipe.

    Attributes:
        state: where it is in the queue.
        stage: of the task that runs, or ran last; None before the first.
        machine: where that task runs; "" if none does.
        why: it is parked or waits, or how its last task failed; "" if there is nothing to say.
        inputs: the digest of what determines its results, see `inputs_digest`: another one is another build.
        recipe_digest: of its keys alone, for whoever cannot read its inputs.
        version: of packager.
        run: the run that wrote this, for people.
        updated_at: in seconds since 1970, by the clock of that run.
    """

    state: QueueState
    stage: TaskStage | None
    machine: str
    why: str
    inputs: str
    recipe_digest: str
    version: str
    run: str
    updated_at: FiniteFloat


def write_recipe_state(store: Store, repository: str, state: RecipeState) -> None:
    """Replace the state of a recipe."""
    store.write(_name(repository), state.model_dump_json(indent=2).encode() + b"\n")


def read_recipe_state(store: Store, repository: str) -> RecipeState | None:
    """Return the state of a recipe; None if there is none that this version can read."""
    try:
        data = store.read(_name(repository))
        return None if data is None else RecipeState.model_validate_json(data)
    except ValidationError:
        return None


def _name(repository: str) -> str:
    return f"{repository}/state.json"
