"""Compare a lock with what the installed transformers says of the same model.

Releases of transformers build a model in other ways, releases of packager quantize other linears of it, and a lock is a
text file: it may have been edited or merged by hand.
"""

import json
from collections.abc import Iterator
from importlib import metadata

from packager.errors import SourceError
from packager.inputs.base_model import SourceModel
from packager.model.lock import Lock, LockedModel
from packager.model.name_patterns import read_numbers

_MOST_SHOWN = 5

Described = dict[str, str]


def check_description(source: SourceModel, lock: Lock) -> None:
    """Describe the base model again; call it while no other thread computes.

    It takes as long as what a build does next, building the model without weights, so it needs no process of its own.

    Raises:
        SourceError: transformers builds other blocks or linears than the lock says; names them.
    """
    from packager.model.describe import describe

    made_with, installed = lock.made_with.get("transformers"), metadata.version("transformers")
    again = describe(source.folder, {name: stored.info for name, stored in source.tensors.items()})
    if moved := list(description_differences(lock.model, again)):
        more = f"; and {len(moved) - _MOST_SHOWN} more" if len(moved) > _MOST_SHOWN else ""
        raise SourceError(
            "the installed transformers builds this model in another way than the lock describes",
            where=str(source.folder),
            why=f"made with transformers {made_with}, installed is {installed}: {'; '.join(moved[:_MOST_SHOWN])}{more}",
            hint="make the lock anew with packager lock, or install the release that made it",
        )


def description_differences(locked: LockedModel, found: LockedModel) -> Iterator[str]:
    """Yield how two descriptions of a model differ in their class, their sizes, their blocks and what is quantized."""
    before, after = _described(locked), _described(found)
    if locked.resolved is not None:  # an older lock does not say it
        before, after = ({**facts, **_defaults(each)} for facts, each in ((before, locked), (after, found)))
    for name in dict.fromkeys((*before, *after)):
        if before.get(name) != after.get(name):
            yield f"{name} is {after.get(name, 'not there')}, in the lock {before.get(name, 'not there')}"


def _defaults(model: LockedModel) -> Described:
    return {f"the default of {key}": json.dumps(value, sort_keys=True) for key, value in (model.resolved or {}).items()}


def _described(model: LockedModel) -> Described:
    """Return what must be equal, by the name under which a message shows it."""
    facts = {
        "the class": model.model_class,
        "the list of blocks": model.blocks_path,
        "the width of the blocks": str(model.hidden_size),
        "the number of logits": str(model.vocab_size),
    }
    for kind in model.kinds:
        for number in read_numbers(kind.blocks):
            block = f"block {number}"
            facts[block] = "there"
            facts |= {f"{block} {module}": "not quantized" for module in kind.left}
            for position, group in enumerate(kind.groups):
                of = group.experts
                experts = f", of {of.count} experts in {of.parameter}" if of is not None else ""
                for linear in group.linears:
                    facts[f"{block} {linear.module}"] = (
                        f"{linear.stored.replace('{block}', str(number))} of {linear.in_features} to "
                        f"{linear.out_features}, {'a' if linear.bias else 'no'} bias, in group {position}{experts}"
                    )
    return facts
