"""Find the model that a person names: ORG/NAME on the Hub, or a folder; and read what its card says of it."""

import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from packager.errors import RecipeError, SourceError
from packager.inputs.hub_cache import cached_commit, cached_folder, cached_siblings, is_offline
from packager.inputs.hub_models import download_files, list_model
from packager.model.front_matter import front_matter_fields, front_matter_text
from packager.model.model_folder import read_inside
from packager.receipt import CONFIG, README
from packager.recipe.fields import LANGUAGE, REPO_ID
from packager.recipe.model_fit import is_commit
from packager.system.text import quoted

_HUB_NAME = re.compile(r"(?:hub:)?(?P<id>[^/@\s]+/[^/@\s]+)(?:@(?P<revision>[^@\s]+))?\Z")
_CACHE_FOLDER = re.compile(r"models--(?P<owner>[^/]+?)--(?P<name>[^/]+)/snapshots/(?P<commit>[0-9a-f]{40})\Z")
_LICENSE_FILE = re.compile(r"(licen[cs]e|notice|copying|use_policy)([._-][A-Za-z0-9._-]{0,40})?\Z", re.IGNORECASE)
_CODE = (".py", ".safetensors", ".bin", ".pt", ".json")
_MOST_CARD_BYTES = 2_000_000
_MOST_FRONT_MATTER = 200_000  # characters; a front matter with many results has that many


@dataclass(frozen=True, kw_only=True)
class NamedModel:
    """A base model as far as a recipe needs to know it.

    Attributes:
        id: ORG/NAME; None of a folder whose name on the Hub is not known.
        requested: the branch or tag that was asked for on the Hub; "" if a commit was.
        commit: on the Hub; None of a folder.
        folder: with config.json and the card, and everything else of a local model.
        complete: whether `folder` is a copy of the model: not what was just read from the Hub.
        names: of the files at the model's top level.
        empty: names of licence files that hold nothing, as far as it is known; the audit refuses them in a branch.
        fields: the front matter of its card; empty if there is none that can be read.
        card_problem: why the card gives nothing, or "".
    """

    id: str | None = None
    requested: str = ""
    commit: str | None = None
    folder: Path
    complete: bool
    names: tuple[str, ...]
    empty: frozenset[str] = frozenset()
    fields: Mapping[str, object] = field(default_factory=dict)
    card_problem: str = ""

    @property
    def license_files(self) -> tuple[str, ...]:
        """The names of the licence files and notices, as far as names tell."""
        return tuple(name for name in sorted(self.names) if _is_license(name) and name not in self.empty)

    @property
    def languages(self) -> tuple[str, ...]:
        """The ISO 639 codes that the card gives."""
        given = self.fields.get("language")
        listed = given if isinstance(given, list) else [given]
        return tuple(dict.fromkeys(code for code in listed if isinstance(code, str) and re.fullmatch(LANGUAGE, code)))

    def text(self, key: str) -> str:
        """Return the text of a key of the front matter, "" if there is none."""
        value = self.fields.get(key)
        return value.strip() if isinstance(value, str) else ""


def _is_license(name: str) -> bool:
    return bool(_LICENSE_FILE.match(name)) and not name.lower().endswith(_CODE)


def find_model(named: str, log: Callable[[str], None]) -> NamedModel:
    """Find a model by ORG/NAME, ORG/NAME@REVISION, or the path of a folder, and read its card.

    A folder of the Hub's cache is the model on the Hub at that commit. Without a network (HF_HUB_OFFLINE) a model on
    the Hub is read from the cache.

    Args:
        named: what a person wrote; `hub:` before ORG/NAME tells it from a folder of that name.
        log: receives a line before what takes long.

    Raises:
        RecipeError: the name means nothing, or both a folder and a model.
        SourceError: the model cannot be read.
    """
    hub = _HUB_NAME.match(named)
    folder = Path(os.path.expanduser(named))  # noqa: PTH111, no home folder is no error here
    try:
        is_folder = not named.startswith("hub:") and folder.is_dir()
    except OSError as error:  # a name that is too long
        raise SourceError("the folder cannot be read", where=quoted(named), why=error.strerror or "") from error
    if hub and is_folder and not named.startswith((".", "/", "~")):
        raise RecipeError(
            f"{quoted(named)} is a folder here, and may be a model on the Hub",
            hint=f"write ./{named} for the folder, or hub:{named} for the model on the Hub",
        )
    if is_folder:
        return _of_folder(folder)
    if hub is None or not re.match(REPO_ID, hub["id"]):
        raise RecipeError(
            f"{quoted(named)} is neither a folder nor the name of a model on the Hub",
            hint="write ORG/NAME, ORG/NAME@REVISION, or the path of a folder with config.json and safetensors",
        )
    return _on_hub(hub["id"], hub["revision"] or "main", log)


def _of_folder(folder: Path) -> NamedModel:
    if not (folder / CONFIG).is_file():
        raise SourceError(
            "the folder holds no model", where=str(folder), why=f"it has no {CONFIG}",
            hint="name the folder with config.json, the tokenizer and the safetensors weights of the fp16 model",
        )  # fmt: skip
    cached = _CACHE_FOLDER.search(folder.resolve().as_posix())
    names = tuple(sorted(entry.name for entry in folder.iterdir() if entry.is_file()))
    model = NamedModel(folder=folder, complete=True, names=names, empty=_empty_in(folder, names))
    if cached is not None:
        model = replace(model, id=f"{cached['owner']}/{cached['name']}", commit=cached["commit"])
    return _with_card(model)


def _empty_in(folder: Path, names: Iterable[str]) -> frozenset[str]:
    """Return the licence files of a folder that hold nothing; one that is not there is not known."""
    licenses = [name for name in names if _is_license(name) and (folder / name).is_file()]
    return frozenset(name for name in licenses if not (folder / name).stat().st_size)


def _on_hub(model_id: str, revision: str, log: Callable[[str], None]) -> NamedModel:
    requested, problem = "" if is_commit(revision) else revision, ""
    if is_offline():
        commit = cached_commit("model", model_id, revision)
        log(f"reading {model_id} at {commit[:12]} from the Hub cache: HF_HUB_OFFLINE is set")
        names = tuple(sibling.rfilename for sibling in cached_siblings("model", model_id, commit))
        folder = cached_folder("model", model_id, commit, [CONFIG])
        empty = _empty_in(folder, names)
    else:
        log(f"reading the description of {model_id} at {revision}")
        commit, sizes = list_model(model_id, revision)
        names, empty = tuple(sizes), frozenset(name for name in sizes if _is_license(name) and not sizes[name])
        wanted = [name for name in (CONFIG, README) if name in sizes and sizes[name] <= _MOST_CARD_BYTES]
        folder = download_files(model_id, commit, wanted)
        if README in sizes and README not in wanted:
            problem = f"{README} is larger than {_MOST_CARD_BYTES} bytes"
    return _with_card(
        NamedModel(
            id=model_id, requested=requested, commit=commit, folder=folder, complete=is_offline(),
            names=tuple(name for name in names if "/" not in name), empty=empty, card_problem=problem,
        )
    )  # fmt: skip


def _with_card(model: NamedModel) -> NamedModel:
    """Return the model with the front matter of its card, unless a problem of the card is known."""
    if model.card_problem:
        return model
    if README not in model.names:
        return replace(model, card_problem=f"there is no {README}")
    try:
        text = front_matter_text(read_inside(model.folder, README, _MOST_CARD_BYTES).decode())
        if text is None:
            return replace(model, card_problem=f"{README} has no front matter")
        fields = front_matter_fields(text, most_characters=_MOST_FRONT_MATTER)
    except OSError as error:
        return replace(model, card_problem=f"{README} cannot be read: {error.strerror}")
    except ValueError as error:  # of the decoding, too
        return replace(model, card_problem=f"the front matter of {README} {error}")
    return replace(model, fields=fields)
