"""A complete recipe folder that builds in a second: a random model, a tokenizer made on the spot, text, a licence."""

import hashlib
import json
import random
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from packager.pipeline import flow
from packager.pipeline.build_options import Options
from packager.pipeline.flow import BuildResult
from packager.pipeline.workspace import Workspace
from packager.publish.branches import PublishReport
from packager.recipe.file import RecipeFile
from packager.system.terminal import Terminal
from tests.locks import write_lock_of_folder
from tests.tiny_models import save_model

REPOSITORY = "tester/tiny-GPTQ"
MAIN, ACT_ORDER, THREE_BITS = "main", "gptq-4bit-16g-actorder_True", "three-bits"
BRANCHES = (MAIN, ACT_ORDER, THREE_BITS)

_WORDS = ("the", "a", "river", "stone", "house", "green", "walks", "sings", "old", "bird", "over", "under", "seven")
_TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'user' %}<s>[INST] {{ m['content'] }} [/INST]"
    "{% else %} {{ m['content'] }}</s>{% endif %}{% endfor %}"
)
_VOCAB_SIZE = 128  # what tests/tiny_models.py gives its embeddings

RECIPE: dict[str, Any] = {
    "schema_version": 1,
    "repository": {"id": REPOSITORY},
    "base_model": {"id": "tester/tiny", "path": "model"},
    "calibration": {"path": "calibration.txt", "num_samples": 12, "seq_len": 32, "seed": 0},
    "evaluation": {"path": "evaluation.txt", "num_tokens": 256, "seq_len": 32, "questions": "questions.jsonl"},
    "defaults": {"bits": 4, "group_size": 32},
    "variants": [
        {"branch": MAIN},
        {"group_size": 16, "desc_act": True},
        {"branch": THREE_BITS, "bits": 3, "sym": False},
    ],
    "loaders": {"required": [], "if_available": [], "prompts": ["old bird"]},
    "card": {
        "title": "Tiny",
        "creator": "nobody",
        "quantized_by": "tester",
        "license": {"id": "apache-2.0", "files": ["LICENSE.txt"]},
        "prompt_template": {"name": "plain", "template": "<s>[INST] {prompt} [/INST]"},
    },
}


def sentences(count: int, *, seed: int) -> str:
    """Return lines of words, other ones for every seed."""
    dice = random.Random(seed)
    return "".join(" ".join(dice.choices(_WORDS, k=12)) + ".\n" for _ in range(count))


def write_inputs(folder: Path, name: str = "llama", *, dtype: torch.dtype = torch.float16, seed: int = 0) -> Path:
    """Write everything but the recipe itself into `folder` and return it."""
    save_model(folder / "model", name, dtype=dtype, seed=seed)
    save_tokenizer(folder / "model")
    (folder / "calibration.txt").write_text(sentences(60, seed=1))
    (folder / "evaluation.txt").write_text(sentences(40, seed=2))
    questions = [{"prompt": "old bird", "answer": "sings"}, {"prompt": "seven", "answer": "green boat"}]
    (folder / "questions.jsonl").write_text("".join(json.dumps(question) + "\n" for question in questions))
    (folder / "LICENSE.txt").write_text("Do what you like.\n")
    return folder


def save_tokenizer(folder: Path, *, vocab_size: int = _VOCAB_SIZE) -> None:
    """Train a byte-level BPE for printable ASCII and save it with a chat template."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<unk>", "<s>", "</s>", "<|endoftext|>"],  # transformers adds the last one to any Qwen2
        initial_alphabet=[chr(code) for code in range(33, 127)],
        show_progress=False,
    )
    tokenizer.train_from_iterator([sentences(60, seed=1)], trainer)
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=_TEMPLATE, **special)
    fast.save_pretrained(folder)


def write_recipe(folder: Path, changes: Mapping[str, Any] | None = None, *, name: str = "recipe.yaml") -> Path:
    """Write a recipe (JSON is YAML) with some of RECIPE's values changed; a key may be dotted: `card.title`."""
    recipe = json.loads(json.dumps(RECIPE))
    for key, value in (changes or {}).items():
        *sections, last = key.split(".")
        section = recipe
        for part in sections:
            section = section.setdefault(part, {})
        section[last] = value
    path = folder / name
    path.write_text(json.dumps(recipe, indent=2))
    base = recipe["base_model"]
    if "path" in base and (folder / base["path"] / "config.json").is_file():
        write_lock_of_folder(path, base["id"], folder / base["path"])
    return path


def write_all(folder: Path, changes: Mapping[str, Any] | None = None, **model: Any) -> Path:
    """Write a whole recipe folder and return the recipe's path; `model` goes to `write_inputs`."""
    return write_recipe(write_inputs(folder, **model), changes)


def options(dist: Path) -> Options:
    return Options(dist=dist, cache=dist / "cache", device="cpu", environ={})


def build(recipe: Path | RecipeFile, dist: Path) -> BuildResult:
    return flow.build(_loaded(recipe), options(dist), Terminal(quiet=True))


def publish(recipe: Path | RecipeFile, dist: Path) -> PublishReport:
    return flow.publish(_loaded(recipe), options(dist), Terminal(quiet=True), dry_run=False)


class Builds:
    """Builds of the tiny recipe, each made once in a test run: tests read them or take copies.

    Args:
        root: a folder that all workers of the test run have.
    """

    def __init__(self, root: Path) -> None:
        self._root = root

    def built(self, changes: Mapping[str, Any] | None = None, *, published: bool = False) -> Path:
        """Return a folder with recipe.yaml, its inputs and dist/; a test may not change a file of it."""
        key = json.dumps([changes or {}, published], sort_keys=True)
        folder = self._root / hashlib.sha256(key.encode()).hexdigest()[:16]
        with FileLock(f"{folder}.lock"):
            if not folder.exists():
                made = folder.with_name(f"{folder.name}.made")  # a worker whose build fails leaves no whole one
                shutil.rmtree(made, ignore_errors=True)
                if published:
                    publish(self.copy(made, changes), made / "dist")
                else:
                    made.mkdir()
                    build(write_all(made, changes), made / "dist")
                made.rename(folder)
        return folder

    def copy(self, folder: Path, changes: Mapping[str, Any] | None = None, *, published: bool = False) -> Path:
        """Copy a build to `folder`, where a test may change it, and return the recipe's path."""
        # Copies, not hard links: tests write into files in place.
        shutil.copytree(self.built(changes, published=published), folder, symlinks=True, dirs_exist_ok=True)
        return folder / "recipe.yaml"


def _loaded(recipe: Path | RecipeFile) -> RecipeFile:
    return recipe if isinstance(recipe, RecipeFile) else RecipeFile.load(recipe)


def workspace(dist: Path) -> Workspace:
    return Workspace(dist=dist, repository=REPOSITORY)


def hub_folder(dist: Path) -> Path:
    return workspace(dist).hub / "models" / REPOSITORY


def built_files(dist: Path, branches: Sequence[str] = BRANCHES) -> dict[str, bytes]:
    """Return the content of every built file by `branch/name`."""
    folders = {branch: workspace(dist).folder(branch) for branch in branches}
    return {
        f"{branch}/{path.relative_to(folder).as_posix()}": path.read_bytes()
        for branch, folder in folders.items()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def leftovers(dist: Path) -> list[str]:
    """Return what a killed run could have left below `dist`: temporary names, half-made files, journals."""
    names = (path.relative_to(dist).as_posix() for path in dist.rglob("*"))
    return sorted(name for name in names if any(part.startswith((".tmp-", "tmp")) for part in name.split("/")))
