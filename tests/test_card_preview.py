"""The preview of a card before a build: planned sizes, nothing measured, nothing that could be published."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from packager.card import Prompting
from packager.card.hub_page import hub_page
from packager.errors import PublishError, RecipeError
from packager.pipeline.plan import make_plan
from packager.pipeline.preview import preview_card, write_preview
from packager.recipe.file import RecipeFile
from tests import tiny_recipe
from tests.card_page import assert_well_formed, tables
from tests.import_graph import ROOT
from tests.test_card_choice import RECIPES

LLAMA = RECIPES / "llama-2-13b-chat.yaml"
PACKAGER = [sys.executable, "-c", "from packager.cli.main import main; main()"]


def test_a_preview_has_the_planned_sizes_and_no_figure_that_is_measured() -> None:
    recipe_file = RecipeFile.load(LLAMA)
    text = preview_card(recipe_file, "main")
    assert_well_formed(text)
    assert "> **A preview: nothing of this is built or published.**" in text
    plan = make_plan(recipe_file)
    (rows,) = [rows for rows in tables(text) if "Proven in" in rows[0]]
    for row, variant_plan in zip(rows[1:], plan.variants, strict=True):
        shown = dict(zip(rows[0], row, strict=True))
        assert shown["Size, GB"] == f"{variant_plan.weights_bytes / 1e9:.2f}"
        assert shown["VRAM at 4k, GB"] == f"{plan.run_bytes(variant_plan) / 1e9:.1f}"
        assert (shown["KL"], shown["Top-1, %"], shown["Proven in"]) == ("not measured", "not measured", "none")
    page = text.partition("# Original model card")[0]
    assert "were measured on the published files" not in page
    assert "<picture>" not in page
    assert not re.search(r"\b[0-9a-f]{64}\b", page), "a digest of something that is not there"
    assert "not run: not built yet" in page
    assert "The build writes this section" in page
    with pytest.raises(RecipeError, match="the recipe has no branch 'nowhere'"):
        preview_card(recipe_file, "nowhere")


def test_a_preview_is_a_page_outside_of_what_is_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = tiny_recipe.write_all(tmp_path)
    read: list[Path] = []
    monkeypatch.setattr("packager.pipeline.prompting.prompting_of", lambda folder: read.append(folder) or Prompting())
    dist = tmp_path / "dist"
    path = write_preview(RecipeFile.load(recipe), dist, tiny_recipe.ACT_ORDER)
    assert path == dist / "previews" / tiny_recipe.REPOSITORY / f"{tiny_recipe.ACT_ORDER}.html"
    assert [found for found in dist.rglob("*") if found.is_file()] == [path]
    assert read == [tmp_path / "model"], "the tokenizer of a local base model"
    with pytest.raises(PublishError):
        tiny_recipe.publish(RecipeFile.load(recipe), dist)


@pytest.mark.slow
def test_the_command_needs_no_torch_and_writes_where_it_says(tmp_path: Path) -> None:
    without = [PACKAGER[0], "-c", f"import sys; sys.modules.update(torch=None, matplotlib=None); {PACKAGER[2]}"]
    arguments = ["card", str(LLAMA), "--preview", "--dist", str(tmp_path), "--format", "json"]
    done = subprocess.run([*without, *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    written = json.loads(done.stdout)
    assert written["branch"] == "main"
    assert Path(written["preview"]).read_text(encoding="utf-8").startswith("<!doctype html>")
    refused = subprocess.run(
        [*PACKAGER, "card", str(LLAMA), "--open"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert refused.returncode == 2
    assert "a page is written by --preview alone" in refused.stderr


CARD = '---\nlicense: x\ntags:\n- a<b\n---\n# Title\n\n<img src="a.png" alt="b.svg">\n\n| x |\n| - |\n| ~~y~~ |\n'


def test_a_page_makes_no_request_and_has_the_front_matter_and_the_images() -> None:
    page = hub_page(CARD, {"a.png": b"PNG", "b.svg": b"<svg/>"})
    assert "<header>license: x\ntags:\n- a&lt;b</header>" in page
    assert 'src="data:image/png;base64,UE5H"' in page
    assert "<table>" in page
    assert "<s>y</s>" in page
    assert "default-src 'none'" in page
    assert "prefers-color-scheme: dark" in page
    assert not re.findall(r"(?:src|href)=\"(?!data:)", page)
