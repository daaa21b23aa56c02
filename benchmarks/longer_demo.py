"""Copy the demo's recipe with more held-out text than ships with it, for comparisons that need smaller errors.

    python benchmarks/longer_demo.py FOLDER

Then quality.py takes the recipe in FOLDER with `--held-out-tokens 67584`. The documents come from the generator of the
recipe's, and from the same split, which neither the model nor the calibration text has.
"""

from __future__ import annotations

import argparse
import importlib
import json
import shutil
import sys
from pathlib import Path
from typing import Any

from shared_text import CalibrationText

RECIPES = Path(__file__).parents[1] / "recipes"
DEMO = "demo-llama"


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the recipe and its assets go; must not exist")
    parser.add_argument(
        "--documents", type=int, default=3000, help="that are generated (default 3000; 1628 are kept, 82,000 tokens)"
    )
    given = parser.parse_args()
    make(given.folder, given.documents)
    return 0


def make(folder: Path, documents: int) -> Path:
    """Write the recipe, its lock, the model and the texts into `folder`, and return the recipe's path.

    Some documents begin with one of a few system prompts, as some of the calibration text do. With so much text these
    would be more shared words than a build allows: such documents are left out.
    """
    shutil.copytree(RECIPES / "assets" / DEMO, folder / "assets" / DEMO)
    for name in (f"{DEMO}.yaml", f"{DEMO}.lock.json"):
        shutil.copyfile(RECIPES / name, folder / name)
    sys.path.insert(0, str(RECIPES / "assets" / DEMO))
    corpus: Any = importlib.import_module("corpus")
    place = folder / "assets" / DEMO / "text"
    rows = (place / "calibration.jsonl").read_text(encoding="utf-8").splitlines()
    known = CalibrationText(json.loads(row)["text"] for row in rows)
    texts = [text for text in corpus.held_out("evaluation", documents) if not known.shared_lines(text)]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (place / "evaluation.jsonl").write_text(lines, encoding="utf-8")
    return folder / f"{DEMO}.yaml"


if __name__ == "__main__":
    sys.exit(main())
