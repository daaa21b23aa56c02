"""Golden pictures: cards in a headless browser, 800 pixels wide, on a light and a dark page.

`nox -s pictures` compares them, and `nox -s pictures -- --update-golden` takes new ones, which are then looked at.
The fonts are those of matplotlib, so that they are the same on every machine. Another version of the browser may smooth
letters in another way: a tile of a picture counts as changed from a tenth of the brightness on.
"""

import io
import os
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pytest
from PIL import Image

from packager.card import CardTexts, render_card
from packager.card.choice import CachedContext
from packager.card.hub_page import CARD_WIDTH, hub_page
from packager.card.plot import draw_picture, plot_of
from packager.pipeline.preview import preview_card
from packager.recipe.file import RecipeFile
from tests import card_fixtures as fixtures
from tests.golden_files import GOLDEN
from tests.test_card_choice import RECIPES
from tests.test_card_width import BROWSER

HEIGHT = 2500
TILE = 10  # pixels: about a letter
TENTH = 25.5  # of 255 steps of brightness
FEW = 1  # tiles that may differ: less than a word
FONTS = """<?xml version="1.0"?><!DOCTYPE fontconfig SYSTEM "fonts.dtd"><fontconfig><dir>{fonts}</dir>
<cachedir>{cache}</cachedir>
<alias><family>monospace</family><prefer><family>DejaVu Sans Mono</family></prefer></alias>
<match target="font"><edit name="hintstyle" mode="assign"><const>hintnone</const></edit>
<edit name="rgba" mode="assign"><const>none</const></edit></match></fontconfig>
"""


def measured_card() -> tuple[str, Mapping[str, bytes]]:
    """Return the card of a release with every figure, and its picture's files."""
    recipe = fixtures.llama_recipe()
    receipts = fixtures.llama_receipts(recipe)
    contexts = (*fixtures.LLAMA_CONTEXTS, CachedContext(tokens=32768, cache_bytes=15_200_000_000))
    plot = plot_of(receipts, contexts)
    assert plot is not None
    given = fixtures.llama_expectations(recipe)
    text = render_card(recipe, CardTexts(), receipts, "llama", "main", contexts=contexts, plot=plot, expectations=given)
    return text, draw_picture(plot)


def preview() -> tuple[str, Mapping[str, bytes]]:
    """Return the card of the 13B recipe before it is built."""
    return preview_card(RecipeFile.load(RECIPES / "llama-2-13b-chat.yaml"), "main"), {}


CARDS = {"measured": measured_card, "preview-13b": preview}


def picture_of(page: str, scheme: str, folder: Path) -> Image.Image:
    """Return the beginning of a page as the browser shows it."""
    assert BROWSER is not None, "neither chromium nor google-chrome is on the PATH"
    (folder / "card.html").write_text(page, encoding="utf-8")
    fonts = Path(mpl.get_data_path(), "fonts", "ttf")
    (folder / "fonts.conf").write_text(FONTS.format(fonts=fonts, cache=folder / "cache"), encoding="utf-8")
    command = [BROWSER, "--headless", "--no-sandbox", "--hide-scrollbars", "--disable-lcd-text", "--no-first-run"]
    command += ["--force-device-scale-factor=1", "--force-color-profile=srgb", f"--user-data-dir={folder / 'profile'}"]
    command += [
        f"--blink-settings=preferredColorScheme={int(scheme == 'light')}",
        f"--window-size={CARD_WIDTH},{HEIGHT}",
    ]
    command += [f"--screenshot={folder / 'card.png'}", (folder / "card.html").as_uri()]
    environ = {**os.environ, "FONTCONFIG_FILE": str(folder / "fonts.conf")}
    subprocess.run(command, env=environ, check=True, capture_output=True)
    # 32 colours are enough to see everything, and a sixth of the bytes.
    return Image.open(folder / "card.png").convert("RGB").quantize(32, dither=Image.Dither.NONE)


def changed_tiles(one: Image.Image, other: Image.Image) -> list[tuple[int, int]]:
    """Return where two pictures differ: left and top of each tile whose mean brightness does."""
    if one.size != other.size:
        return [(0, 0)] * (FEW + 1)
    first, second = (np.asarray(each.convert("L"), dtype=np.float64) for each in (one, other))
    tiles = (first - second).reshape(first.shape[0] // TILE, TILE, first.shape[1] // TILE, TILE).mean(axis=(1, 3))
    return [(int(column) * TILE, int(row) * TILE) for row, column in np.argwhere(abs(tiles) > TENTH)]


@pytest.mark.release
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("card", CARDS)
def test_a_card_looks_as_it_did(card: str, scheme: str, tmp_path: Path, update_golden: bool) -> None:
    picture = picture_of(hub_page(*CARDS[card]()), scheme, tmp_path)
    golden = GOLDEN / "pictures" / f"{card}-{scheme}.png"
    if update_golden:
        golden.parent.mkdir(exist_ok=True)
        stream = io.BytesIO()
        picture.save(stream, format="PNG", optimize=True)
        golden.write_bytes(stream.getvalue())
    assert golden.is_file(), f"{golden.name}: no golden picture yet; run nox -s pictures -- --update-golden"
    found = changed_tiles(picture, Image.open(golden))
    kept = tmp_path / golden.name
    picture.save(kept)
    assert len(found) <= FEW, (
        f"{golden.name} changed at {found[:5]}; it is now {kept}; if this is meant, --update-golden"
    )


@pytest.mark.release
def test_a_changed_word_is_seen(tmp_path: Path) -> None:
    text, images = measured_card()
    ours = picture_of(hub_page(text, images), "light", tmp_path)
    shutil.rmtree(tmp_path / "profile")
    assert "none fits" in text
    other = picture_of(hub_page(text.replace("none fits", "it fits", 1), images), "light", tmp_path)
    assert len(changed_tiles(ours, other)) > FEW
    assert changed_tiles(ours, ours) == []
