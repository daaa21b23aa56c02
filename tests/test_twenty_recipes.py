"""A night's release: twenty recipes, three of them bad in different ways; killed twice and run again, the same end.

`nox -s tests` has a night of six recipes.
"""

import json
import random
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from packager.cli.main import app
from packager.errors import CalibrationError, RecipeError, SourceError
from packager.receipt import digest_of
from tests import tiny_recipe
from tests.import_graph import ROOT
from tests.publish_fixtures import git

BAD = {
    "r04.yaml": RecipeError.exit_code,
    "r09.yaml": SourceError.exit_code,
    "r15.yaml": CalibrationError.exit_code,
}
LINES = 7  # that the log of a whole run has at least, for each recipe
SEED = 16


def write_recipes(folder: Path, numbers: Sequence[int]) -> None:
    """Write recipes: r04.yaml is wrong, r09.yaml has a weight that is no number, r15.yaml too little text."""
    tiny_recipe.write_inputs(folder)
    shutil.copytree(folder / "model", folder / "damaged")
    (weights,) = (folder / "damaged").glob("*.safetensors")
    tensors = load_file(weights)
    tensors["model.layers.0.mlp.down_proj.weight"][0, 0] = float("nan")
    save_file(tensors, weights, metadata={"format": "pt"})
    (folder / "short.txt").write_text("old bird\n")
    bad = {"r04.yaml": {"card.titel": "x"}, "r09.yaml": {"base_model.path": "damaged"}}
    bad["r15.yaml"] = {"calibration.path": "short.txt"}
    for number in numbers:
        name = f"r{number:02}.yaml"
        changes = {
            "repository.id": f"tester/night-{number:02}-GPTQ",
            "variants": [{"branch": "main"}],
            "calibration.num_samples": 4,
            "calibration.seed": number,
            "evaluation.num_tokens": 64,
        }
        tiny_recipe.write_recipe(folder, {**changes, **bad.get(name, {})}, name=name)


def end_of(dist: Path) -> Mapping[str, str]:
    """Return the tree of every published repository, and the digest of what was built of each recipe."""
    found = {}
    for folder in sorted((dist / "hub" / "models" / "tester").glob("*-GPTQ")):
        assert git("fsck", "--full", "--strict", cwd=folder) == ""
        found[folder.name] = git("rev-parse", "main^{tree}", cwd=folder).strip()
    for folder in sorted((dist / "builds").rglob("main")):
        files = {path.name: path.read_bytes().hex() for path in folder.iterdir()}
        found[folder.relative_to(dist).as_posix()] = digest_of(files)
    return found


def results_of(stdout: str) -> Mapping[str, tuple[str, int]]:
    recipes = json.loads(stdout[stdout.index("{") :])["recipes"]
    return {Path(each["recipe"]).name: (each["result"], each["exit_code"]) for each in recipes}


def words_of(folder: Path, dist: Path) -> list[str]:
    options = ["--dist", str(dist), "--device", "cpu", "--format", "json"]
    return ["release", "--recipes", f"{folder}/r*.yaml", *options]


def killed_after(lines: int, words: list[str]) -> None:
    """Run a release and kill it after so many lines of its log."""
    code = "from packager.cli.main import main; main()"
    command = [sys.executable, "-c", code, *words]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL) as run:
        assert run.stderr is not None
        seen = [line for line, _ in zip(run.stderr, range(lines), strict=False)]
        run.kill()
    assert (len(seen), run.returncode) == (lines, -9), b"".join(seen).decode()


@pytest.mark.crash
@pytest.mark.parametrize("numbers", [(3, 4, 9, 10, 15, 16), pytest.param(range(20), marks=pytest.mark.long)], ids=len)
def test_a_release_of_many_recipes_goes_on_and_ends_the_same_after_two_kills(
    tmp_path: Path, numbers: Sequence[int]
) -> None:
    write_recipes(tmp_path, numbers)
    expected = {f"r{number:02}.yaml": ("published", 0) for number in numbers}
    expected |= {name: ("failed", code) for name, code in BAD.items()}
    whole = CliRunner().invoke(app, words_of(tmp_path, tmp_path / "whole"))
    assert results_of(whole.stdout) == expected, whole.stderr
    assert whole.exit_code == max(BAD.values())
    lines = LINES * len(numbers)
    assert len(whole.stderr.splitlines()) > lines
    dice = random.Random(SEED)
    for _ in range(2):
        killed_after(dice.randrange(5, lines // 2), words_of(tmp_path, tmp_path / "killed"))
    again = CliRunner().invoke(app, words_of(tmp_path, tmp_path / "killed"))
    assert results_of(again.stdout) == expected, again.stderr
    assert end_of(tmp_path / "killed") == end_of(tmp_path / "whole")
    assert len(end_of(tmp_path / "whole")) == 2 * (len(numbers) - len(BAD))
    assert tiny_recipe.leftovers(tmp_path / "killed") == []
