"""Prove every decoder of tests/tiny_decoders.py: `python docs/architectures.py --write` writes what it finds.

docs/reference/architectures.json holds the facts; docs/generate.py makes the page of them. A slow test proves the same.
"""

import argparse
import json
import os
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).parent.parent
FACTS: Final = ROOT / "docs" / "reference" / "architectures.json"


def prove(name: str) -> tuple[str, dict[str, Any]]:
    """Return a name and its facts; an error tells which proof fails."""
    sys.path.insert(0, str(ROOT))
    import torch

    from tests.proven_decoders import facts_of

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        return name, facts_of(name, Path(folder))


def main() -> int:
    """Prove all decoders, or those that are named, and write or compare their facts."""
    sys.path.insert(0, str(ROOT))
    from tests.tiny_decoders import NAMES

    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--write", action="store_true", help="write the facts; else exit 1 if they differ")
    parser.add_argument("names", nargs="*", help="only these")
    options = parser.parse_args()
    old = json.loads(FACTS.read_bytes()) if FACTS.is_file() else {}
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
        found = dict(pool.map(prove, options.names or NAMES))
    changed = [name for name, facts in found.items() if old.get(name) != facts]
    if options.write:
        everything = {**old, **found}
        text = json.dumps({name: everything[name] for name in NAMES if name in everything}, indent=1)
        FACTS.write_text(f"{text}\n", encoding="utf-8")
    elif changed:
        sys.stderr.write(f"not as {FACTS.name} says: {', '.join(changed)}\n")
    return 1 if changed and not options.write else 0


if __name__ == "__main__":
    sys.exit(main())
