"""Copy the demo's recipe with more held-out text than ships with it, for comparisons that need smaller errors.

    python benchmarks/longer_demo.py FOLDER

Then quality.py takes the recipe in FOLDER with `--held-out-tokens 67584`. The first 800 documents are those of the
recipe; the others come from the same generator and the same split, which neither the model nor the calibration text
has.
"""

from __future__ import annotations

import argparse
import importlib
import json
import shutil
import sys
from pathlib import Path
from typing import Any

RECIPES = Path(__file__).parents[1] / "recipes"
DEMO = "demo-llama"


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the recipe and its assets go; must not exist")
    parser.add_argument(
        "--documents", type=int, default=1600, help="of held-out text (default 1600, some 100,000 tokens)"
    )
    given = parser.parse_args()
    make(given.folder, given.documents)
    return 0


def make(folder: Path, documents: int) -> Path:
    """Write the recipe, its lock, the model and the texts into `folder`, and return the recipe's path."""
    shutil.copytree(RECIPES / "assets" / DEMO, folder / "assets" / DEMO)
    for name in (f"{DEMO}.yaml", f"{DEMO}.lock.json"):
        shutil.copyfile(RECIPES / name, folder / name)
    sys.path.insert(0, str(RECIPES / "assets" / DEMO))
    corpus: Any = importlib.import_module("corpus")
    texts = corpus.held_out("evaluation", documents)
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (folder / "assets" / DEMO / "text" / "evaluation.jsonl").write_text(lines, encoding="utf-8")
    return folder / f"{DEMO}.yaml"


if __name__ == "__main__":
    sys.exit(main())
