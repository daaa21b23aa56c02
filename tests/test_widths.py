"""The help of all commands and the main views at 60, 80 and 120 columns, as golden texts (`--update-golden`)."""

import io
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import pytest
import typer.main
from rich.console import Console

from packager.card.choice import CachedContext, Candidate, Opened, choose_branch
from packager.cli import status_view
from packager.cli.audit_view import print_audit
from packager.cli.choosing import print_choice
from packager.cli.compat import known_runtimes, print_compat
from packager.cli.diff_view import print_differences
from packager.cli.doctor import print_checks
from packager.cli.locking import print_lock
from packager.cli.main import app
from packager.cli.plan_view import print_build_plan, time_lines
from packager.cli.publish_view import print_publish_report
from packager.cli.published_view import print_published
from packager.cli.release_view import print_results
from packager.cli.repairing import print_repair
from packager.cli.rollback_view import print_rollback_report
from packager.cli.status_view import print_loaders, print_status
from packager.cli.tables import print_line
from packager.pipeline.compare_published import BranchDifference, ValueChange
from packager.pipeline.compat import compatibility_of_recipe
from packager.pipeline.durations import durations
from packager.pipeline.lock_recipes import LockResult
from packager.pipeline.machine_checks import Environment, MachineCheck
from packager.pipeline.many_recipes import RecipeResult
from packager.pipeline.plan import make_plan
from packager.pipeline.running import RunningBuild
from packager.prove.audit import AuditReport, Facts, Finding
from packager.prove.repair import RepairReport
from packager.prove.repair_configs import Change
from packager.publish.branches import BranchOutcome, PublishReport
from packager.publish.plan import BranchPlan, FileChange, PublishPlan
from packager.publish.published import BranchReport, PublishedFinding, PublishedReport
from packager.publish.rollback import BranchRollback, RollbackOutcome, RollbackPlan, RollbackReport
from packager.publish.targets import CommitRecord
from packager.recipe.file import RecipeFile
from tests.card_fixtures import llama_recipe
from tests.golden_files import check_golden
from tests.import_graph import ROOT
from tests.test_status_view import A, B, C, built, quality_of, ran, receipt_of, without_receipt

WIDTHS = (60, 80, 120)
LARGE = ROOT / "recipes" / "llama-2-13b-chat.yaml"
HELP = """
import sys
from packager.cli.main import app
for words in [[], *([name] for name in sys.argv[1:])]:
    print("$ packager", *words, "--help")
    app([*words, "--help"], prog_name="packager", standalone_mode=False)  # typer's runner is 80 columns wide
    print()
"""
LONG = "no CUDA GPU with 26 GiB of memory, of this one 11 GiB can be used; a longer sentence that has to be folded"


def stripped(text: str) -> str:
    return "".join(f"{line.rstrip()}\n" for line in text.splitlines())


@pytest.mark.pinned
@pytest.mark.parametrize("width", WIDTHS)
def test_the_help_of_all_commands(width: int, update_golden: bool) -> None:
    names = list(typer.main.get_command(app).commands)  # type: ignore[attr-defined]
    environ = {**os.environ, "COLUMNS": str(width), "NO_COLOR": "1"}
    command = [sys.executable, "-c", HELP, *names]
    done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, check=True)
    assert all(f"$ packager {name} --help" in done.stdout for name in names)
    check_golden(f"cli/help_{width}.txt", stripped(done.stdout), update=update_golden)


def plan_view(console: Console) -> None:
    plan = make_plan(RecipeFile.load(LARGE))
    print_build_plan(plan, console)
    for text in time_lines(durations(plan, Path("nowhere"))):
        print_line(console, text)


def status(console: Console) -> None:
    loaders = (ran("transformers"), ran("autogptq", status="failed", reason=LONG), ran("vllm", status="not run"))
    statuses = [built(A, loaders=loaders), built(B, 1, missing=("verify",)), without_receipt(C, "unfinished")]
    running = RunningBuild(
        pid=4711, host="runner-7", started_at=0, stage="quantize", done=8, total=24, text="block 8", seconds_left=780,
        updated_at=4000,
    )  # fmt: skip
    recipe = llama_recipe()
    published = recipe.repository.model_copy(update={"target": "hub"})
    recipe_file: Any = SimpleNamespace(recipe=recipe.model_copy(update={"repository": published}))
    options: Any = None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(status_view, "read_status", lambda *_: statuses)
        patch.setattr(status_view, "running_build", lambda *_: running)
        patch.setattr("time.time", lambda: 4012.0)
        print_status(recipe_file, options, console)


def loaders(console: Console) -> None:
    fields = {"relative_error": 0.00123, "top1_agreement": 0.998, "tokens_generated": 32, "tokens_equal": 32}
    passed = ran("transformers", device="cpu", dtype="float32", kernel="torch", **fields)
    records = (passed, ran("exllamav2", reason=LONG, status="not run"))
    print_loaders([receipt_of(A, loaders=records), receipt_of(B, 1, loaders=records)], console)


def release(console: Console) -> None:
    results = [
        RecipeResult(path=Path("recipes/demo-llama.yaml"), repository="demo/demo-llama-GPTQ", outcome="published",
                     seconds=71.2),
        RecipeResult(path=LARGE.relative_to(ROOT), repository="TheBloke/Llama-2-13B-chat-GPTQ", outcome="not built",
                     why=LONG),
        RecipeResult(path=Path("recipes/bad.yaml"), outcome="failed", why="one problem in the recipe", exit_code=2,
                     seconds=0.1),
    ]  # fmt: skip
    print_results(results, console)


def publish(console: Console) -> None:
    change = FileChange(name="model-00001-of-00002.safetensors", size_bytes=4_999_000_000)
    update = BranchPlan(
        branch=B, action="update", parent="a" * 40, foreign_author="A Person <a@example.org>",
        added=(FileChange(name="merges.txt", size_bytes=450_000),), changed=(change,), removed=(change,), num_files=14,
        total_bytes=7_255_144_864, present_bytes=450_000, message=f"{B}: card",
    )  # fmt: skip
    kept = BranchPlan(
        branch=A, action="unchanged", parent="b" * 40, foreign_author="", added=(), changed=(), removed=(),
        num_files=14, total_bytes=7_255_144_864, present_bytes=0,
    )  # fmt: skip
    plan = PublishPlan(
        where="https://huggingface.co/TheBloke/Llama-2-13B-chat-GPTQ", branches=(update, kept), left_alone=("old",),
        final_steps=("tag v1.0 on main",), warnings=("main is not signed",),
    )  # fmt: skip
    outcomes = tuple(BranchOutcome(plan=each, commit="c" * 40, seconds=1.0) for each in plan.branches)
    for dry_run in (True, False):
        print_publish_report(PublishReport(plan=plan, outcomes=outcomes, notes=(), dry_run=dry_run), console)


def diff(console: Console) -> None:
    change = ValueChange(key="calibration.num_samples", published="128", built="256")
    lines = ("--- published", "+++ built", "@@ -1 +1 @@", "-# Llama 2 13B chat", "+# Llama 2 13B Chat")
    found = [
        BranchDifference(branch=A, standing="same"),
        BranchDifference(
            branch=B, standing="changed", weights=True, values=(change,), quality=(quality_of(), quality_of(1)),
            texts={"README.md": lines}, files=("README.md", "config.json", "model.safetensors"),
        ),
        BranchDifference(branch="old", standing="only published"),
    ]  # fmt: skip
    print_differences(found, console, texts=True)


def doctor(console: Console) -> None:
    checks = [
        MachineCheck(name="Python", grade="ok", found="3.11.7"),
        MachineCheck(
            name="git-lfs", grade="note", found="not found", hint="needed for git remotes: https://git-lfs.com"
        ),
        MachineCheck(name="disk", grade="missing", found="1.2 GB free in /work/dist", hint=LONG),
    ]
    print_checks(checks, [Environment(folder=Path("old"), size_bytes=5_200_000_000, used=False)], console)


def audit(console: Console) -> None:
    def finding(code: str, severity: Literal["error", "warning"]) -> Finding:
        where = "model.safetensors: model.layers.0.mlp.down_proj.qweight"
        return Finding(
            code=code, severity=severity, where=where, message=LONG, hint="build the branch again", also=("b",)
        )

    facts = Facts(
        bits=4, group_size=128, desc_act=False, sym=True, num_linears=280, tensors_checked=1283,
        weights_bytes=7_259_000_000,
    )  # fmt: skip
    findings = (finding("tensor-shape", "error"), finding("card-missing", "warning"))
    print_audit(AuditReport(findings=findings, facts=facts), console)


def verify_published(console: Console) -> None:
    finding = PublishedFinding(
        branch=B, file="config.json", rule="remote-file-changed", severity="error", message=LONG, hint="publish again"
    )
    record = ran("transformers", relative_error=0.00123, top1_agreement=0.998)
    read = BranchReport(
        branch=A, commit="a" * 40, num_files=15, total_bytes=7_255_144_864, num_stated=11, num_read=3, num_tensors=902,
        loaders=(record, ran("exllamav2", status="not run", reason=LONG)),
    )  # fmt: skip
    damaged = BranchReport(branch=B, commit="b" * 40, num_files=14, total_bytes=7_255_144_864, findings=(finding,))
    report = PublishedReport(
        where="https://huggingface.co/TheBloke/Llama-2-13B-chat-GPTQ", full=True, branches=(read, damaged), card_rows=4,
        card_findings=(),
    )  # fmt: skip
    print_published(report, console)


def rollback(console: Console) -> None:
    def commit(letter: str, title: str) -> CommitRecord:
        return CommitRecord(commit=letter * 40, author="", title=title, message=title, time_s=1_796_000_000)

    weights = FileChange(name="model-00001-of-00002.safetensors", size_bytes=4_999_000_000)
    back = BranchRollback(
        branch=B, action="restore", head=commit("b", f"{B}: other weights: calibration.num_samples 256 (was 128)"),
        to=commit("a", f"{B}: 4-bit, group size 32"), changed=(weights,),
    )  # fmt: skip
    newer = BranchRollback(branch=C, action="left alone", head=commit("c", "x"), reason=LONG, is_newer=True)
    main = BranchRollback(branch="main", action="restore", head=commit("d", "new card"), to=commit("e", "the card"))
    plan = RollbackPlan(
        where="dist/hub/models/demo/demo-llama-GPTQ", release=commit("e", "the card"), branches=(back, newer, main),
        signs=4, warnings=(LONG,),
    )  # fmt: skip
    outcomes = tuple(RollbackOutcome(plan=each, commit="f" * 40, seconds=1.0) for each in plan.branches)
    for dry_run in (True, False):
        print_rollback_report(RollbackReport(plan=plan, outcomes=outcomes, notes=(), dry_run=dry_run), console)


def compat(console: Console) -> None:
    found = compatibility_of_recipe(RecipeFile.load(LARGE), ())
    print_compat(found, known_runtimes(("autogptq", "vllm", "exllamav2")), console)


def fix(console: Console) -> None:
    change = Change(code="zeros-v2", where="model.safetensors", what="v2 zeros become v1 in 280 linears", why=LONG)
    left = Finding(
        code="tensor-shape", severity="error", where="model.safetensors: model.layers.0.mlp.down_proj.qweight",
        message=LONG, hint="build it again", also=("b",),
    )  # fmt: skip
    report = RepairReport(
        folder=Path("old"), output=Path("some/new/folder"), changes=(change,), left=(left,), num_compared=280
    )
    print_repair(report, console, dry_run=False)


def lock(console: Console) -> None:
    recipe = RecipeFile.load(LARGE)
    path = Path("recipes/llama-2-13b-chat.lock.json")
    changes = (f"config.json: {LONG}",)
    result = LockResult(recipe=LARGE, path=path, lock=recipe.lock, changes=changes, status="differs", diff=("-a", "+b"))
    print_lock(result, console)


def choose(console: Console) -> None:
    receipts = [receipt_of(A).provenance, receipt_of(B, 1).provenance]
    context = CachedContext(tokens=4096, cache_bytes=3_355_443_200)
    opened = (Opened(opening="proven"), Opened(opening="refused", reason=LONG))
    candidates = [
        Candidate(receipt=receipt, context=context, opened=each) for receipt, each in zip(receipts, opened, strict=True)
    ]
    published: Any = SimpleNamespace(where="hub:TheBloke/Llama-2-13B-chat-GPTQ", variants=(), findings=())
    print_choice(published, candidates, choose_branch(candidates, 12 * 10**9), 12 * 10**9, console)


VIEWS: tuple[Callable[[Console], None], ...] = (
    plan_view, status, loaders, release, publish, diff, doctor, audit, verify_published, rollback, compat, fix, lock,
    choose,
)  # fmt: skip


@pytest.mark.parametrize("width", WIDTHS)
def test_the_main_views(width: int, update_golden: bool) -> None:
    texts = list(views_at(width))
    check_golden(f"cli/views_{width}.txt", "\n".join(texts), update=update_golden)
    figures = " ".join(texts).split()
    for shown in ("7,255,144,864", "161.6", "0.00123", "71.2", "published", "5.00", "3.11.7"):
        assert shown in " ".join(figures), f"a table cuts {shown}"
    seen = {text.partition("\n")[0].strip("[]"): text for text in texts}
    assert "11 files: sha256 as the repository states it" in " ".join(seen["verify_published"].split())
    assert "1 finding\n" in seen["verify_published"]
    assert "left alone" in seen["rollback"]
    assert "bbbbbbbbbbbb" in seen["verify_published"]
    assert "".join(LONG.split()) in "".join(next(text for text in texts if text.startswith("[release]")).split())


def views_at(width: int) -> Iterator[str]:
    for view in VIEWS:
        stream = io.StringIO()
        view(Console(file=stream, width=width, emoji=False))
        yield f"[{view.__name__}]\n{stripped(stream.getvalue())}"
