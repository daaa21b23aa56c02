"""Draw a model card as the README's picture: `python docs/picture.py CARD PICTURE`; needs Chromium."""

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from markdown_it import MarkdownIt

_STYLE = """
body { font: 16px/1.5 "DejaVu Sans", Helvetica, Arial, sans-serif; margin: 24px 32px; color: #1f2328 }
h1, h2 { border-bottom: 1px solid #d1d9e0; padding-bottom: .3em }
table { border-collapse: collapse; font-size: 14px }
td, th { border: 1px solid #d1d9e0; padding: 6px 10px }
tr:nth-child(2n) { background: #f6f8fa }
code { background: #818b981f; padding: .2em .4em; border-radius: 6px; font-size: 85% }
pre { background: #f6f8fa; padding: 16px; border-radius: 6px }
pre code { background: none; padding: 0 }
blockquote { border-left: .25em solid #d1d9e0; color: #59636e; margin: 0; padding: 0 1em }
a { color: #0969da; text-decoration: none }
"""


def main() -> int:
    """Render the card's Markdown without its metadata, and take a picture of its beginning."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("card", type=Path, help="README.md of a built variant")
    parser.add_argument("picture", type=Path, help="the PNG file to write")
    parser.add_argument("--width", type=int, default=1300, help="pixels (%(default)s): the table needs them")
    parser.add_argument("--height", type=int, default=1230, help="pixels (%(default)s)")
    options = parser.parse_args()
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        sys.exit("neither chromium nor google-chrome is on the PATH")
    body = options.card.read_text(encoding="utf-8").split("\n---\n", 1)[1]
    page = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).render(body)
    with tempfile.TemporaryDirectory() as folder:
        html = Path(folder) / "card.html"
        html.write_text(f"<!doctype html><meta charset=utf-8><style>{_STYLE}</style>{page}", encoding="utf-8")
        size = f"--window-size={options.width},{options.height}"
        target = f"--screenshot={options.picture.absolute()}"
        subprocess.run(
            [browser, "--headless", "--no-sandbox", "--hide-scrollbars", size, target, html.as_uri()], check=True
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
