"""A card as one HTML page, about as the Hub shows it: for a look before it is published, and for pictures and tests.

GitHub-flavoured Markdown with the HTML of the card, its front matter as a header, light or dark as the reader's browser
asks. The page makes no request: a policy forbids it, and images are part of the page.
"""

import base64
import html
import re
from collections.abc import Mapping
from pathlib import PurePosixPath

from markdown_it import MarkdownIt

from packager.model.front_matter import split_front_matter

# The width that cards are made for; the Hub's pages are about as wide.
CARD_WIDTH = 800
_KINDS = {".png": "image/png", ".svg": "image/svg+xml"}
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
_STYLE = """
:root { --text: #1f2328; --page: #ffffff; --line: #d1d9e0; --muted: #59636e; --link: #0969da; --even: #f6f8fa;
  --code: #818b981f; color-scheme: light dark }
@media (prefers-color-scheme: dark) { :root { --text: #e6edf3; --page: #0d1117; --line: #3d444d; --muted: #9198a1;
  --link: #4493f8; --even: #151b23; --code: #656c7633 } }
body { font: 16px/1.5 "DejaVu Sans", Helvetica, Arial, sans-serif; margin: 24px 32px; color: var(--text);
  background: var(--page); overflow-wrap: break-word }
h1, h2 { border-bottom: 1px solid var(--line); padding-bottom: .3em }
table { border-collapse: collapse; font-size: 14px; display: block; max-width: 100%; overflow: auto }
td, th { border: 1px solid var(--line); padding: 6px 10px }
tr:nth-child(2n) { background: var(--even) }
code { background: var(--code); padding: .2em .4em; border-radius: 6px; font-size: 85% }
pre { background: var(--even); padding: 16px; border-radius: 6px; overflow: auto }
pre code { background: none; padding: 0 }
blockquote { border-left: .25em solid var(--line); color: var(--muted); margin: 0; padding: 0 1em }
a { color: var(--link); text-decoration: none }
img { max-width: 100% }
header { color: var(--muted); font-size: 12px; border-bottom: 1px solid var(--line); white-space: pre-wrap; columns: 3 }
"""


def hub_page(card: str, images: Mapping[str, bytes]) -> str:
    """Return the page of a card.

    Args:
        card: README.md.
        images: the content of the files that it shows, by the names that it has for them.
    """
    front, body = split_front_matter(card)
    rendered = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).render(body)
    for name, data in images.items():
        kind = _KINDS[PurePosixPath(name).suffix]
        inline = f"data:{kind};base64,{base64.b64encode(data).decode()}"
        rendered = re.sub(rf'(?<=["\s]){re.escape(name)}(?=["\s])', inline, rendered)
    return (
        '<!doctype html><html><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}"><title>Model card</title>'
        f"<style>{_STYLE}</style></head><body><header>{html.escape(front.strip())}</header>{rendered}</body></html>\n"
    )
