"""Golden files: the texts that tests compare theirs with, byte by byte.

A changed text is accepted with `pytest --update-golden`; the difference is then reviewed like code.
"""

import difflib
from pathlib import Path

GOLDEN = Path(__file__).resolve().parent / "golden"


def check_golden(name: str, text: str, update: bool = False) -> None:
    """Compare `text` with the file `name` below tests/golden; write it there first when `update` is set."""
    path = GOLDEN / name
    if update:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8", newline="\n")
    assert path.is_file(), f"{path.name}: no golden file yet; run with --update-golden"
    expected = path.read_text(encoding="utf-8")
    changes = difflib.unified_diff(expected.splitlines(), text.splitlines(), f"golden/{name}", "now", lineterm="", n=1)
    difference = "\n".join(changes)
    assert text == expected, f"{name} changed; if this is meant, run with --update-golden\n{difference}"
