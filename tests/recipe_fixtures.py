"""A small good recipe with its files, to be broken one edit at a time."""

import json
from pathlib import Path

from packager.errors import RecipeError
from packager.recipe import Recipe
from packager.recipe.file import RecipeFile
from tests.locks import write_lock

ROOT = Path(__file__).resolve().parent.parent
RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))

GOOD = """\
schema_version: 1
repository: {id: demo/demo-GPTQ}
base_model:
  id: demo/demo
  path: model
calibration:
  path: calibration.txt
evaluation:
  path: evaluation.txt
  questions: questions.jsonl
defaults:
  bits: 4
variants:
  - branch: main
    group_size: 128
  - {group_size: 32, desc_act: true}
loaders:
  required: [autogptq]
  if_available: [transformers]
card:
  title: Demo
  creator: demo
  quantized_by: demo
  license: {id: mit}
  prompt_template: {name: plain, template: "{prompt}"}
"""

CONFIG: dict[str, object] = {
    "model_type": "llama",
    "torch_dtype": "float16",
    "num_hidden_layers": 2,
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 640,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
}

Edit = tuple[str, str]


def write_files(folder: Path) -> None:
    """Write every file that GOOD names."""
    (folder / "model").mkdir(parents=True)
    (folder / "model" / "config.json").write_text(json.dumps(CONFIG))
    write_lock(folder / "recipe.yaml", CONFIG, "demo/demo")
    for name in ("calibration.txt", "evaluation.txt", "questions.jsonl"):
        (folder / name).write_text(name)


def edited(*edits: Edit) -> str:
    """Return GOOD with each `(old, new)` applied; `old` must be there exactly once."""
    text = GOOD
    for old, new in edits:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    return text


def load_or_error(path: Path) -> Recipe | RecipeError:
    """Load a recipe; anything but a RecipeError is the caller's failure."""
    try:
        return RecipeFile.load(path).recipe
    except RecipeError as error:
        return error


def problems_of(folder: Path, content: str | bytes) -> list[str]:
    """Write a recipe next to its files and return its problems as `line:column: message (hint)`."""
    path = folder / "recipe.yaml"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    result = load_or_error(path)
    if isinstance(result, Recipe):
        return []
    assert result.problems, result
    return [str(problem).removeprefix(f"{path}:") for problem in result.problems]
