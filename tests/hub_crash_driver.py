"""Publish to a loopback Hub many times, kill each publisher at a random moment, and check the repository.

    HF_HUB_DISABLE_XET=1 python -m tests.hub_crash_driver FOLDER --runs 200 --seed 1

The Hub is a process of its own; publishers are forked from this one, which has everything imported, and are killed by
SIGKILL. After each kill, and in all of the history at the end: a branch holds nothing or all of its variant, main's
card is there only when every variant is, and no bytes that had arrived were sent again. Prints one JSON line.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import time
import traceback
import urllib.request
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from packager.publish.branches import BranchContent, publish_branches
from packager.publish.compare_plan import require_as_planned
from packager.publish.plan import PublishPlan
from packager.publish.saved_plan import PublishSubject, SavedPlan, saved_plan
from packager.publish.sign_release import Files
from packager.publish.targets.hub import HubTarget
from tests.publish_fixtures import git, make_content

TOKEN = "hf_writes_0123456789"  # noqa: S105 - the loopback Hub's
BRANCHES = ("main", "gptq-4bit-32g-actorder_True", "gptq-4bit-64g-actorder_True", "gptq-4bit-128g-actorder_True")
EMPTY = {".gitattributes"}


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--planned", action="store_true", help="publish a saved plan, after a kill the same one")
    given = parser.parse_args()
    command = [sys.executable, "-m", "tests.loopback_hub", "--root", str(given.folder / "hub"), "--token", TOKEN]
    server = subprocess.Popen(
        [*command, "--user", "somebody", "--commit-cap", "1000000"], stdout=subprocess.PIPE, text=True
    )
    try:
        assert server.stdout is not None
        endpoint = server.stdout.readline().strip()
        print(json.dumps(run(given.folder, endpoint, given.runs, random.Random(given.seed), planned=given.planned)))
    finally:
        server.kill()
        server.wait()
    return 0


def run(folder: Path, endpoint: str, runs: int, dice: random.Random, *, planned: bool) -> dict[str, object]:
    import huggingface_hub.constants

    os.environ["HF_TOKEN"] = TOKEN
    huggingface_hub.constants.ENDPOINT = endpoint
    huggingface_hub.constants.HF_HUB_OFFLINE = False
    contents = make(folder / "dist")
    saved = plan_of(contents) if planned else None
    started = time.monotonic()
    assert finish(fork(contents, "somebody/Whole", saved)) == 0
    whole_s = time.monotonic() - started
    found: Counter[str] = Counter()
    for number in range(runs):
        repository = f"somebody/Run-{number}"
        child = fork(contents, repository, saved)
        time.sleep(dice.uniform(0, 1.1) * whole_s)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        found[look(folder / "hub" / f"{repository}.git", contents)] += 1
        assert finish(fork(contents, repository, saved)) == 0, f"run {number} did not end"
        assert look(folder / "hub" / f"{repository}.git", contents) == "4 of 4", f"run {number}"
    with urllib.request.urlopen(f"{endpoint}/_loopback/record") as answer:  # noqa: S310 - our own
        uploads = Counter(each["oid"] for each in json.load(answer)["uploaded"] if each["accepted"])
    # Each repository has its own store; every content is one file of one repository.
    assert max(uploads.values()) <= runs + 1, uploads
    return {"runs": runs, "whole_s": round(whole_s, 2), "branches complete when killed": dict(sorted(found.items()))}


def make(dist: Path) -> list[BranchContent]:
    """Return four variants, each with weights and a card of its own, and a tokenizer that all share."""
    dice = random.Random(0)
    return [
        make_content(
            dist,
            branch,
            {
                "README.md": f"---\nlicense: mit\n---\n# {branch}\n".encode(),
                "config.json": json.dumps({"branch": branch}).encode(),
                "tokenizer.json": b"{}" * 1000,
                "model.safetensors": dice.randbytes(300_000),
            },
        )
        for branch in BRANCHES
    ]


def plan_of(contents: Sequence[BranchContent]) -> SavedPlan:
    """Return the plan of publishing to a repository that does not exist."""
    found = []
    subject = PublishSubject(
        repository="somebody/Any", target="hub", address="", recipe="1" * 64, templates="2" * 64, tag=""
    )

    def save(plan: PublishPlan, files: Files) -> None:
        found.append(saved_plan(subject, plan, files))

    target = HubTarget("somebody/Whole")
    publish_branches(contents, target, lambda _: None, dry_run=True, compare=save, may_write=False)
    return found[0]


def fork(contents: Sequence[BranchContent], repository: str, saved: SavedPlan | None) -> int:
    """Start a publisher, of a saved plan if there is one; return its process id."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        sys.stderr = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115 - as long as the process lives
        target = HubTarget(repository)

        def compare(plan: PublishPlan, files: Files) -> None:
            if saved:
                require_as_planned(saved, saved_plan(saved.subject, plan, files), plan, target)

        publish_branches(contents, target, lambda _: None, compare=compare)
        status = 0
    except BaseException:  # noqa: BLE001 - the process ends here
        traceback.print_exc(file=sys.__stderr__)
    finally:
        os._exit(status)


def finish(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def look(repository: Path, contents: Sequence[BranchContent]) -> str:
    """Check every commit of every branch; return how many branches are complete."""
    if not repository.is_dir():
        return "no repository"
    manifests = {content.branch: content.files for content in contents}
    heads = git("for-each-ref", "--format=%(refname:lstrip=2)", "refs/heads", cwd=repository).split()
    complete = set()
    for branch in heads:
        commits = git("rev-list", "--first-parent", branch, cwd=repository).split()
        for place, commit in enumerate(commits):
            names = set(git("ls-tree", "-r", "--name-only", commit, cwd=repository).split())
            if names == EMPTY:
                continue
            assert names == {*manifests[branch], *EMPTY}, (branch, names)
            weights = git("show", f"{commit}:model.safetensors", cwd=repository)
            sha256 = manifests[branch]["model.safetensors"].sha256
            assert f"oid sha256:{sha256}\n" in weights, f"{branch} holds another variant's weights"
            assert (repository / "lfs" / "objects" / sha256[:2] / sha256[2:4] / sha256).is_file()
            assert place == 0, f"{branch} was committed twice"
            complete.add(branch)
    assert "main" not in complete or complete == set(BRANCHES), "main is ahead of its variants"
    return f"{len(complete)} of {len(BRANCHES)}"


if __name__ == "__main__":
    sys.exit(main())
