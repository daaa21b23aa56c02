"""Run troubles alone and combined; print what ends wrong, with the command that repeats it.

python -m tests.awkward --alone
python -m tests.awkward --seed 7 --most 2000 --minutes 30
python -m tests.awkward --troubles tied_with_a_head_of_its_own,no_dtype
"""

import argparse
import json
import os
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import combinations
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before the Hub's client is imported

from tests.awkward.judge import Judge, Verdict, quiet_libraries
from tests.awkward.known import KNOWN
from tests.awkward.scene import TROUBLES, Trouble


def main() -> int:
    """Run what the command line asks for; return 1 if a case ends wrong."""
    parser = argparse.ArgumentParser(prog="python -m tests.awkward", description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0, help="chooses the combinations")
    parser.add_argument("--most", type=int, default=200, help="combinations that are tried")
    parser.add_argument("--minutes", type=float, default=60.0, help="no case begins later than this")
    parser.add_argument("--alone", action="store_true", help="each trouble by itself, no combinations")
    parser.add_argument("--troubles", help="these together, names with commas between them")
    parser.add_argument("--known", action="store_true", help="also those that are known to end wrong")
    parser.add_argument("--json", type=Path, help="where the figures go")
    given = parser.parse_args()
    vars(os).update(fsync=lambda _: None, fdatasync=lambda _: None)
    quiet_libraries()
    names = [name for name in sorted(TROUBLES) if given.known or given.troubles or name not in KNOWN]
    if given.troubles:
        chosen: Iterator[Sequence[str]] = iter([given.troubles.split(",")])
    elif given.alone:
        chosen = ([name] for name in names)
    else:
        chosen = drawn(names, given.seed, given.most)
    with tempfile.TemporaryDirectory() as folder:
        figures, failed = run(Path(folder), chosen, time.monotonic() + given.minutes * 60)
    print(json.dumps(figures))
    if given.json:
        given.json.write_text(json.dumps({"figures": figures, "failed": failed}, indent=1), encoding="utf-8")
    return 1 if failed else 0


def drawn(names: Sequence[str], seed: int, most: int) -> Iterator[Sequence[str]]:
    """Yield combinations of two or three troubles; try `number` depends on the seed and its number alone."""
    for number in range(most):
        dice = random.Random(f"{seed}/{number}")
        yield dice.sample(names, dice.choice((2, 2, 3)))


def run(folder: Path, chosen: Iterator[Sequence[str]], until: float) -> tuple[dict[str, float], list[dict[str, str]]]:
    """Judge combinations; return the figures, and each wrong end once, with the fewest troubles that make it."""
    counts: Counter[str] = Counter()
    slowest, failed, seen = 0.0, [], set()
    with Judge(folder) as judge:
        for names in chosen:
            if time.monotonic() > until:
                break
            troubles = [TROUBLES[name] for name in names]
            verdict = judge.judge(troubles)
            counts[verdict.ended] += 1
            slowest = max(slowest, verdict.seconds)
            if not verdict.problem:
                continue
            counts["wrong"] += 1
            fewest, verdict = shrunk(judge, troubles, verdict)
            key = ",".join(sorted(each.name for each in fewest))
            if key in seen:
                continue
            seen.add(key)
            failed.append({"troubles": key, "problem": verdict.problem, "said": verdict.said})
            print(f"WRONG {verdict.problem}\n  {verdict.said}\n  python -m tests.awkward --troubles {key}", flush=True)
    counts["cases"] = sum(counts[ended] for ended in ("built", "refused", "traceback"))
    return {**counts, "slowest_s": round(slowest, 1)}, failed


def shrunk(judge: Judge, troubles: Sequence[Trouble], verdict: Verdict) -> tuple[Sequence[Trouble], Verdict]:
    """Return the fewest of some troubles that end wrong."""
    for size in range(1, len(troubles)):
        for fewer in combinations(troubles, size):
            found = judge.judge(fewer)
            if found.problem:
                return fewer, found
    return troubles, verdict


if __name__ == "__main__":
    sys.exit(main())
