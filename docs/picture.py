"""Draw a model card as the README's picture: `python docs/picture.py CARD PICTURE`; needs Chromium."""

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from packager.card.hub_page import CARD_WIDTH, hub_page

_IMAGES = (".png", ".svg")


def main() -> int:
    """Render a card with the images beside it, and take a picture of its beginning."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("card", type=Path, help="README.md of a built variant")
    parser.add_argument("picture", type=Path, help="the PNG file to write")
    parser.add_argument(
        "--width", type=int, default=CARD_WIDTH, help="pixels (%(default)s): the width that cards are made for"
    )
    parser.add_argument("--height", type=int, default=1500, help="pixels (%(default)s)")
    parser.add_argument("--dark", action="store_true", help="the picture of a browser that asks for a dark page")
    options = parser.parse_args()
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        sys.exit("neither chromium nor google-chrome is on the PATH")
    images = {path.name: path.read_bytes() for path in options.card.parent.iterdir() if path.suffix in _IMAGES}
    with tempfile.TemporaryDirectory() as folder:
        html = Path(folder) / "card.html"
        html.write_text(hub_page(options.card.read_text(encoding="utf-8"), images), encoding="utf-8")
        size = f"--window-size={options.width},{options.height}"
        target = f"--screenshot={options.picture.absolute()}"
        dark = ["--blink-settings=preferredColorScheme=0"] if options.dark else []
        subprocess.run(
            [browser, "--headless", "--no-sandbox", "--hide-scrollbars", *dark, size, target, html.as_uri()], check=True
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
