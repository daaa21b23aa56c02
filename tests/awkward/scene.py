"""A sound base model with its recipe, and the troubles that are made in copies of it."""

import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from tests.tiny_recipe import RECIPE, sentences, write_inputs

WEIGHTS = "model.safetensors"
DATASET = "tester/rows"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
# Of a trainer's machine; no published file may hold it.
PRIVATE = "/home/payroll-alice"
# 8 bits, so that a quantized model is near its base: what is lost or misread shows.
_CHANGES: Mapping[str, Any] = {
    "defaults": {"bits": 8, "group_size": 32, "scale_search": False},
    "variants": [{"branch": "main"}],
    "calibration": {"path": "calibration.txt", "num_samples": 8, "seq_len": 32, "seed": 0},
    "evaluation": {"path": "evaluation.txt", "num_tokens": 128, "seq_len": 32},
}

# A template is in one of two places.
_TEMPLATES = frozenset({"chat_template.jinja", "tokenizer_config.json:chat_template"})

Ends = Literal["builds", "refused", "either"]
Tensors = dict[str, torch.Tensor]
Json = dict[str, Any]


class ClashError(Exception):
    """A trouble needs what another one has taken away."""


@dataclass(frozen=True, kw_only=True)
class Trouble:
    """One trouble.

    Attributes:
        name: of its function.
        kind: of its module.
        make: makes it.
        ends: "builds" where transformers takes such a base model as it is, "refused" where nothing right can be built.
        says: words of which a refusal must have one: the key or the file.
        late: whether only computing shows it, so that blocks may have been made before.
        never: strings that may not occur in the rows that are calibrated and measured.
    """

    name: str
    kind: str
    make: Callable[["Case"], object]
    ends: Ends
    says: tuple[str, ...]
    late: bool = False
    never: tuple[str, ...] = ()


TROUBLES: dict[str, Trouble] = {}


def trouble(
    ends: Ends = "either", *says: str, late: bool = False, never: Sequence[str] = ()
) -> Callable[[Callable[["Case"], object]], Callable[["Case"], object]]:
    """Register a trouble; see `Trouble`."""

    def register(make: Callable[[Case], object]) -> Callable[[Case], object]:
        name, kind = str(getattr(make, "__name__", "")), make.__module__.rpartition(".")[2]
        assert name not in TROUBLES, name
        TROUBLES[name] = Trouble(
            name=name, kind=kind, make=make, ends=ends, says=says, late=late, never=tuple(never)
        )  # fmt: skip
        return make

    return register


@dataclass(kw_only=True)
class Case:
    """A copy of the scene in which troubles are made.

    Attributes:
        folder: with model/, the texts and the recipe.
        recipe: its content.
        touched: what the trouble that is being made has changed: files, keys of files, tensors, parts of the recipe.
    """

    folder: Path
    recipe: Json = field(default_factory=lambda: json.loads(json.dumps({**RECIPE, **_CHANGES})))
    touched: set[str] = field(default_factory=set)

    @property
    def model(self) -> Path:
        """The base model's folder."""
        return self.folder / str(self.recipe["base_model"]["path"])

    @property
    def cache(self) -> Path:
        """The cache of the Hub's client."""
        return self.folder / "hub"

    def write(self, name: str, content: str | bytes, *, into: Path | None = None) -> None:
        """Write a file of the base model in the place of another, which is a link to the scene's."""
        self.touched.add(name)
        self._put(name, content, into=into)

    def _put(self, name: str, content: str | bytes, *, into: Path | None = None) -> None:
        path = (into or self.model) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)

    def text(self, content: str | bytes, *, name: str = "calibration.txt", part: str = "calibration") -> None:
        """Write a text of the recipe and name it there."""
        self.write(name, content, into=self.folder)
        self.touched.add(f"recipe:{part}")
        for key in ("dataset", "revision", "split", "config"):
            self.recipe[part].pop(key, None)
        self.recipe[part]["path"] = name

    def lines(self, records: Iterable[object], **options: Any) -> None:
        """Write a text of one JSON value per line."""
        self.text("".join(json.dumps(record) + "\n" for record in records), name="calibration.jsonl", **options)

    def dataset(
        self, rows: Mapping[str, Sequence[object]], *, files: Mapping[str, bytes] | None = None, shards: int = 1,
        split: str = "train", **fields: str,
    ) -> None:  # fmt: skip
        """Let the recipe calibrate on a dataset of the Hub, which is in the cache: of rows, and of other files.

        Args:
            rows: by column; the first of `shards` parquet files, of which others are not there.
            files: further files.
            shards: how many there should be.
            split: that the recipe names.
            fields: of the recipe.
        """
        import pyarrow
        from pyarrow import parquet

        self.touched.add("recipe:calibration")
        folder = self.cache / f"datasets--{DATASET.replace('/', '--')}" / "snapshots" / COMMIT
        (folder / "data").mkdir(parents=True)
        if rows:
            table = pyarrow.table({name: list(values) for name, values in rows.items()})
            parquet.write_table(table, folder / "data" / f"train-00000-of-{shards:05d}.parquet")
        for name, content in (files or {}).items():
            (folder / name).write_bytes(content)
        section = self.recipe["calibration"]
        section.pop("path", None)
        section.update(dataset=DATASET, revision=COMMIT, split=split, **fields)

    def json(self, name: str) -> Json:
        """Return a JSON file of the base model; {} if it is not there."""
        path = self.model / name
        if not path.exists():
            return {}
        try:
            content = json.loads(path.read_bytes())
        except ValueError as error:
            raise ClashError(name) from error
        if not isinstance(content, dict):
            raise ClashError(name)
        return content

    def edit(self, name: str, change: Callable[[Json], object]) -> None:
        """Change a JSON file of the base model."""
        content = self.json(name)
        before = dict(content)
        change(content)
        keys = {key for key in before.keys() | content.keys() if before.get(key, self) != content.get(key, self)}
        self.touched |= {f"{name}:{key}" for key in keys}
        self._put(name, json.dumps(content, indent=2))

    def config(self, *drop: str, **values: object) -> None:
        """Change config.json."""
        self.edit("config.json", lambda content: _changed(content, drop, values))

    def generation(self, *drop: str, **values: object) -> None:
        """Change generation_config.json."""
        self.edit("generation_config.json", lambda content: _changed(content, drop, values))

    def tokenizer(self, *drop: str, **values: object) -> None:
        """Change tokenizer_config.json."""
        self.edit("tokenizer_config.json", lambda content: _changed(content, drop, values))

    def backend(self, **values: object) -> None:
        """Change tokenizer.json."""
        if not (self.model / "tokenizer.json").exists():
            raise ClashError("tokenizer.json")
        self.edit("tokenizer.json", lambda content: content.update(values))

    def template(self, template: str, prompt: str | None = None) -> None:
        """Give the model a chat template, and the card what it renders."""
        self.write("chat_template.jinja", template)
        self.touched.add("tokenizer_config.json:chat_template")
        if prompt is not None:
            self.recipe["card"]["prompt_template"] = {"name": "own", "template": prompt}

    def without_template(self) -> None:
        """Take the chat template away, and what needs one."""
        self.touched |= {"recipe:loaders", *_TEMPLATES}
        (self.model / "chat_template.jinja").unlink(missing_ok=True)
        self.tokenizer("chat_template")
        self.recipe["loaders"]["prompts"] = []

    def stored(self) -> Tensors:
        """Return the tensors of the weights."""
        path = self.model / WEIGHTS
        if not path.exists() or path.stat().st_size < 10_000:
            raise ClashError(WEIGHTS)
        try:
            return load_file(path)
        except SafetensorError as error:
            raise ClashError(WEIGHTS) from error

    def tensors(self, change: Callable[[Tensors], object], *, metadata: dict[str, str] | None = None) -> None:
        """Change the weights in place."""
        before = self.stored()
        content = {name: tensor.clone() for name, tensor in before.items()}
        change(content)
        self.touched |= {
            f"tensor:{name}"
            for name in before.keys() | content.keys()
            if name not in before or name not in content or not _same(before[name], content[name])
        }
        self._save(content, WEIGHTS, metadata)

    def save(self, tensors: Tensors, name: str = WEIGHTS, *, metadata: dict[str, str] | None = None) -> None:
        """Write a safetensors file."""
        self.touched.add(name)
        self._save(tensors, name, metadata)

    def _save(self, tensors: Tensors, name: str, metadata: dict[str, str] | None) -> None:
        (self.model / name).unlink(missing_ok=True)
        save_file(tensors, self.model / name, metadata={"format": "pt"} if metadata is None else metadata)

    def shards(self, *, count: int = 2) -> list[str]:
        """Write the weights as shards with an index, and return the shards' names."""
        content = self.stored()
        (self.model / WEIGHTS).unlink()
        names = [f"model-{number + 1:05d}-of-{count:05d}.safetensors" for number in range(count)]
        weight_map: dict[str, str] = {}
        for number, name in enumerate(names):
            part = {key: content[key] for key in sorted(content)[number::count]}
            self.save(part, name)
            weight_map |= dict.fromkeys(part, name)
        index = {"metadata": {}, "weight_map": weight_map}
        self.write("model.safetensors.index.json", json.dumps(index))
        return names

    def write_recipe(self) -> Path:
        """Write the recipe (JSON is YAML) and return its path."""
        path = self.folder / "recipe.yaml"
        path.write_text(json.dumps(self.recipe, indent=1), encoding="utf-8")
        return path


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return (
        one.dtype == other.dtype
        and one.shape == other.shape
        and bool((one.view(torch.uint8) == other.view(torch.uint8)).all())
    )


def _changed(content: Json, drop: Iterable[str], values: Mapping[str, object]) -> None:
    for name in drop:
        content.pop(name, None)
    content.update(values)


class Scene:
    """The sound base model.

    Args:
        folder: empty; copies lie beside it.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        write_inputs(folder)
        (folder / "calibration.txt").write_text(sentences(60, seed=1), encoding="utf-8")

    def copy(self, name: str) -> Case:
        """Return a copy; its files are links to the sound ones, which a trouble replaces and does not change."""
        folder = self._folder.with_name(name)
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(self._folder, folder, copy_function=os.link)
        return Case(folder=folder)


def made(case: Case, troubles: Sequence[Trouble]) -> bool:
    """Make troubles, one after the other; return False if one undoes another, or needs what another has taken away."""
    earlier: set[str] = set()
    for each in troubles:
        case.touched = set()
        names, recipe = _names_in(case.model), json.dumps(case.recipe)
        try:
            each.make(case)
        except (ClashError, FileExistsError, FileNotFoundError, NotADirectoryError, KeyError):
            return False
        if case.model.is_dir():
            case.touched |= names ^ _names_in(case.model)
        before = json.loads(recipe)
        case.touched |= {f"recipe:{key}" for key in before if before[key] != case.recipe[key]}
        if case.touched & _TEMPLATES:
            case.touched |= _TEMPLATES
        if any(_meets(one, other) for one in case.touched for other in earlier):
            return False
        earlier |= case.touched
    return True


def _names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} if folder.is_dir() else set()


def _meets(one: str, other: str) -> bool:
    """Return whether two changes are of the same thing: a file and a key of it are."""
    return one == other or one.startswith(f"{other}:") or other.startswith(f"{one}:")
