"""Check the rules of a recipe that concern several fields, or files on disk.

Every check skips values that the models refused, so that all checks run whatever else is wrong.
"""

import os
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Final

from packager.receipt import (
    ATTESTATION,
    AUTOGPTQ_PINS,
    BRANCH_LOCK,
    BRANCH_RECIPE,
    CONFIG,
    INDEX_SUFFIX,
    PROVENANCE,
    QUANTIZE_CONFIG,
    README,
    RELEASE_ATTESTATION,
    TOKENIZER_FILES,
)
from packager.recipe.field_groups import base_model_problem, repository_problem, rows_by_weight, text_source_problem
from packager.recipe.licenses import FILES_BY_LICENSE, hub_license, license_name, meant_license
from packager.recipe.model_fit import LockedBaseModel, misfits
from packager.recipe.parsed_recipe import Loc, ParsedRecipe, Unreadable, name_of, text_places
from packager.recipe.paths import locate, locate_base, path_problem
from packager.recipe.prompt_template import prompt_problems
from packager.recipe.task_checks import task_problems
from packager.recipe.variant_checks import parameters_of_widths, variant_problems
from packager.recipe.yaml import LocatedProblem, Position
from packager.system.text import quoted

# Every field of type RelativePath; the two lists of licence files are added where they are checked.
FILE_FIELDS: Final[tuple[Loc, ...]] = (
    ("calibration", "path"),
    ("evaluation", "path"),
    ("evaluation", "questions"),
    ("card", "header"),
    ("card", "footer"),
    ("card", "original_card"),
)
FOLDER_FIELDS: Final[tuple[Loc, ...]] = (("base_model", "path"), ("card", "templates"))
LICENSE_FILES_FIELD: Final[Loc] = ("card", "license", "files")
BASE_FILES_FIELD: Final[Loc] = ("card", "license", "base_files")

# A licence file of such a name would replace what the build writes.
_BRANCH_FILES: Final = frozenset(
    name.casefold()
    for name in (
        README,
        PROVENANCE,
        ATTESTATION,
        RELEASE_ATTESTATION,
        CONFIG,
        QUANTIZE_CONFIG,
        BRANCH_RECIPE,
        BRANCH_LOCK,
        AUTOGPTQ_PINS,
        *TOKENIZER_FILES,
    )
)
_MAX_NOTICE: Final = 1_000_000  # bytes
_WEIGHT_SUFFIXES: Final = (".safetensors", INDEX_SUFFIX, ".bin", ".pt")


def check(parsed: ParsedRecipe, folder: Path, model: LockedBaseModel | LocatedProblem | None) -> list[LocatedProblem]:
    """Return what is wrong across fields.

    Args:
        parsed: the recipe.
        folder: the recipe's own.
        model: the answer of `read_locked_model`.
    """
    found = [
        *_sources(parsed),
        *_ids(parsed),
        *variant_problems(parsed),
        *_loaders(parsed),
        *_rows(parsed),
        *_weights(parsed),
        *_held_out(parsed, folder),
        *_paths(parsed, folder),
        *task_problems(parsed, folder),
        *_license_names(parsed),
        *_license(parsed, folder),
        *_model(parsed, model),
    ]
    return list(dict.fromkeys(found))  # a wrong default concerns every variant and is reported once


def _model(parsed: ParsedRecipe, model: LockedBaseModel | LocatedProblem | None) -> Iterator[LocatedProblem]:
    """Report a lock that cannot be used, and what does not fit the model that it describes."""
    if isinstance(model, LocatedProblem):
        yield model
    elif model is not None:
        yield from prompt_problems(parsed, model.lock)
        each = (parameters_of_widths(parsed, index) for index in range(parsed.count("variants")))
        variants = [parameters for widths in each for parameters in widths]
        yield from misfits(parsed, model.architecture, variants)


def _sources(parsed: ParsedRecipe) -> Iterator[LocatedProblem]:
    """Report sections that do not name exactly one source."""
    sections: list[tuple[Loc, Callable[[frozenset[str]], str]]] = [(("base_model",), base_model_problem)]
    for loc, problem_of in (*sections, *((loc, text_source_problem) for loc in text_places(parsed))):
        given = parsed.keys(*loc)
        if given is not None and (problem := problem_of(given)):
            yield LocatedProblem(parsed.key_at(*loc), f"{name_of(loc)}: {problem}")
    repository = parsed.keys("repository")
    target, layout = (parsed.text("repository", key) for key in ("target", "layout"))
    url = (parsed.text("repository", "url") or "") if repository is not None and "url" in repository else None
    plugin = (parsed.text("repository", "plugin") or "") if repository is not None and "plugin" in repository else None
    kinds = (target or "local", layout or "branches")
    if repository is not None and (problem := repository_problem(*kinds, url=url, plugin=plugin)):
        yield LocatedProblem(parsed.key_at("repository"), f"repository: {problem}")


def _ids(parsed: ParsedRecipe) -> Iterator[LocatedProblem]:
    repository, base_model = parsed.text("repository", "id"), parsed.text("base_model", "id")
    if repository and base_model and repository.casefold() == base_model.casefold():
        yield LocatedProblem(parsed.at("repository", "id"), "repository.id is the base model's own id")


def _loaders(parsed: ParsedRecipe) -> Iterator[LocatedProblem]:
    """Report a loader that is named twice."""
    listed: dict[str, str] = {}
    for name in ("required", "if_available"):
        for index in range(parsed.count("loaders", name)):
            loader = parsed.text("loaders", name, index)
            if loader is None:
                continue
            if loader in listed:
                both = f"twice in loaders.{name}" if listed[loader] == name else "both as required and as if_available"
                yield LocatedProblem(parsed.at("loaders", name, index), f"the loader {loader!r} is listed {both}")
            listed.setdefault(loader, name)


def _rows(parsed: ParsedRecipe) -> Iterator[LocatedProblem]:
    num_tokens, seq_len = parsed.number("evaluation", "num_tokens"), parsed.number("evaluation", "seq_len")
    if num_tokens is not None and seq_len is not None and num_tokens < seq_len:
        yield LocatedProblem(
            parsed.at("evaluation", "num_tokens"),
            f"evaluation.num_tokens {num_tokens} is less than one row of evaluation.seq_len {seq_len}",
        )


def _weights(parsed: ParsedRecipe) -> Iterator[LocatedProblem]:
    """Report a source whose weight gives it no row."""
    count, num_rows = parsed.count("calibration", "sources"), parsed.number("calibration", "num_samples")
    weights = [parsed.get("calibration", "sources", index, "weight") for index in range(count)]
    values = [1.0 if weight is Unreadable.ABSENT else weight for weight in weights]
    numbers = [float(value) for value in values if isinstance(value, int | float)]
    if num_rows is None or not numbers or len(numbers) < count:
        return
    for index, rows in enumerate(rows_by_weight(numbers, num_rows)):
        if not rows:
            message = f"calibration.sources[{index}] gets none of the {num_rows} rows"
            hint = "raise its weight or num_samples, or leave it out"
            yield LocatedProblem(parsed.at("calibration", "sources", index, "weight"), message, hint)


def _held_out(parsed: ParsedRecipe, folder: Path) -> Iterator[LocatedProblem]:
    """Report an evaluation on a calibration text, and a calibration text that is given twice."""
    why = "quality measured on the calibration text proves nothing"
    evaluation = _identity(parsed, folder, ("evaluation",), "path")
    questions = _identity(parsed, folder, ("evaluation",), "questions")
    known: set[tuple[str, ...]] = set()
    for loc in text_places(parsed)[:-1]:
        calibration = _identity(parsed, folder, loc, "path")
        if calibration is None:
            continue
        if calibration in known:
            yield LocatedProblem(parsed.key_at(*loc), f"{name_of(loc)} is a text that is listed before", "add weights")
        known.add(calibration)
        if calibration == evaluation:
            at = parsed.at("evaluation", "path" if parsed.text("evaluation", "path") else "split")
            yield LocatedProblem(at, "evaluation reads the same text as calibration", why)
        if parsed.text("evaluation", "questions") and calibration == questions:
            yield LocatedProblem(
                parsed.at("evaluation", "questions"), "evaluation.questions is the calibration text", why
            )


def _identity(parsed: ParsedRecipe, folder: Path, section: Loc, key: str) -> tuple[str, ...] | None:
    """Return the identity of a text: the real file, or a dataset's configuration and split.

    A slice (`train[:10%]`) counts as its whole split: two slices may overlap.
    """
    path = parsed.text(*section, key)
    if path is not None:
        real = locate(folder, path)
        return None if real is None else (str(real),)
    dataset, split = parsed.text(*section, "dataset"), parsed.text(*section, "split")
    config = parsed.get(*section, "config")
    if dataset is None or split is None or config is Unreadable.WRONG:
        return None
    return (dataset.casefold(), "" if config is Unreadable.ABSENT else str(config), split.partition("[")[0].strip())


def _paths(parsed: ParsedRecipe, folder: Path) -> Iterator[LocatedProblem]:
    """Report files named in the recipe that are not there."""
    files: list[Loc] = [
        *FILE_FIELDS,
        *((*loc, "path") for loc in text_places(parsed) if len(loc) > 1),
        *((*LICENSE_FILES_FIELD, index) for index in range(parsed.count(*LICENSE_FILES_FIELD))),
    ]
    for loc, directory in (*((loc, False) for loc in files), *((loc, True) for loc in FOLDER_FIELDS)):
        relative = parsed.text(*loc)
        if relative is None:
            continue
        message, hint = path_problem(folder, relative, directory=directory)
        if not message and loc[:-1] == LICENSE_FILES_FIELD and _is_empty(folder / relative):
            message, hint = f"the file {quoted(relative)} is empty", "the audit refuses empty files in a branch"
        if message:
            yield LocatedProblem(parsed.at(*loc), f"{name_of(loc)}: {message}", hint)
    base = parsed.text("base_model", "path")
    located = locate_base(folder, base) if base is not None else None
    if base is None or path_problem(folder, base, directory=True)[0]:
        return
    hint = "correct the name, or ship the file with the recipe and name it in card.license.files"
    for index in range(parsed.count(*BASE_FILES_FIELD)):
        name, at = parsed.text(*BASE_FILES_FIELD, index), parsed.at(*BASE_FILES_FIELD, index)
        if name is None:
            continue
        # Not whether it may be read: in a snapshot of the Hub's cache it is a link, which reading it checks.
        if not os.path.isfile(f"{located}/{name}"):  # noqa: PTH113, False for a name too long
            yield LocatedProblem(at, f"the base model has no file {name!r}", hint)
        elif _is_empty(Path(f"{located}/{name}")):
            yield LocatedProblem(at, f"the base model's file {name!r} is empty: no licence", hint)


def _is_empty(path: Path) -> bool:
    try:
        return path.stat().st_size == 0
    except OSError:  # it may not be looked at: reading it says so
        return False


def _license_names(parsed: ParsedRecipe) -> Iterator[LocatedProblem]:
    """Report licence files that would replace each other or a file of the build."""
    entries: list[tuple[Loc, str]] = []
    for loc in (LICENSE_FILES_FIELD, BASE_FILES_FIELD):
        for index in range(parsed.count(*loc)):
            path = parsed.text(*loc, index)
            if path is not None:
                entries.append(((*loc, index), PurePosixPath(path).name))
    counts: Counter[str] = Counter()
    for loc, name in entries:
        folded = name.casefold()
        counts[folded] += 1
        if folded in _BRANCH_FILES or folded.endswith(_WEIGHT_SUFFIXES):
            yield LocatedProblem(
                parsed.at(*loc), f"a licence file cannot be named {name!r}: the build writes that file"
            )
        elif counts[folded] > 1:
            yield LocatedProblem(parsed.at(*loc), f"two licence files are named {name!r}")


def _license(parsed: ParsedRecipe, folder: Path) -> Iterator[LocatedProblem]:
    """Report a licence id that is misspelled or has no text, and the files that the licence demands."""
    license_id, at = parsed.text("card", "license", "id"), parsed.at("card", "license", "id")
    if license_id is None:
        return
    fields = (LICENSE_FILES_FIELD, BASE_FILES_FIELD)
    paths = [parsed.text(*loc, index) for loc in fields for index in range(parsed.count(*loc))]
    names = [PurePosixPath(path).name for path in paths if path is not None]
    hub = hub_license(license_id)
    if not hub:
        yield from _license_of_its_own(parsed, license_id, at, has_text=bool(names))
    elif None not in paths and (demanded := FILES_BY_LICENSE.get(hub)):
        if missing := demanded.missing(names):
            message = f"the licence {hub} demands files named {', '.join(missing)} in every branch"
            hint = "name them in card.license.base_files (of the base model) or card.license.files (of this folder)"
            yield LocatedProblem(at, message, hint)
        for index in range(parsed.count(*LICENSE_FILES_FIELD)):
            path = locate(folder, parsed.text(*LICENSE_FILES_FIELD, index) or "")
            if path is None or not path.name.lower().startswith("notice") or not path.is_file():
                continue
            with path.open("rb") as stream:
                text = stream.read(_MAX_NOTICE).decode("utf-8", "replace")
            if not demanded.has_notice(text):
                message = f"this Notice lacks a sentence that {hub} demands"
                yield LocatedProblem(parsed.at(*LICENSE_FILES_FIELD, index), message, f"write: {demanded.notice}")


def _license_of_its_own(
    parsed: ParsedRecipe, license_id: str, at: Position, *, has_text: bool
) -> Iterator[LocatedProblem]:
    """Report a licence that the Hub does not list and that is misspelled, has no name, or can be read nowhere."""
    if meant := meant_license(license_id):
        yield LocatedProblem(at, f"the Hub has no licence id {quoted(license_id)}", f"did you mean {meant}?")
    elif not license_name(license_id):
        hint = "write the licence's own name, e.g. coqui-public-model-license; the card adds `license: other`"
        yield LocatedProblem(at, f"{quoted(license_id)} is not the name of a licence", hint)
    elif not has_text and parsed.text("card", "license", "link") is None:
        message = f"the Hub has no licence id {quoted(license_id)}, and the recipe does not give this licence's text"
        hint = "write the Hub's id, or add card.license.link, files or base_files to a licence of its own"
        yield LocatedProblem(at, message, hint)
