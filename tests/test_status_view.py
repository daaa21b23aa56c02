"""Every figure and state of `packager status`, computed again from the receipts and the folders of a build."""

import io
import json
import shutil
from collections.abc import Callable
from decimal import ROUND_HALF_EVEN, Decimal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from packager.cli import status_view
from packager.cli.status_view import print_loaders, print_status
from packager.pipeline.status import BranchStatus, read_status, status_json
from packager.receipt import LoaderRecord, Provenance, QualityRecord, Receipt
from packager.recipe import QualityFloor
from packager.recipe.file import RecipeFile
from tests import card_fixtures as fixtures
from tests import tiny_recipe
from tests.tiny_recipe import ACT_ORDER, BRANCHES, MAIN, THREE_BITS

A, B, C = "main", "gptq-4bit-32g-actorder_True", "gptq-4bit-64g-actorder_True"
COMMITS = {A: "0123456789abcdef" * 2 + "01234567", B: "fedcba9876543210" * 2 + "fedcba98", C: ""}


def provenance_of(branch: str) -> Provenance:
    (found,) = [each for each in fixtures.llama_receipts(fixtures.llama_recipe()) if each.branch == branch]
    return found


def quality_of(index: int = 0, **changes: object) -> QualityRecord:
    quality = QualityRecord(
        num_tokens=1000 + index,
        perplexity=5.43216 + index,
        base_perplexity=5.11111 + index,
        kl_divergence=0.0123456 / 10**index,
        top1_agreement=0.912 + index / 100,
    )
    return quality.model_copy(update=changes)


def receipt_of(branch: str, index: int = 0, **changes: object) -> Receipt:
    """Return a receipt in which no figure is that of another branch or of another field."""
    weights_bytes = (7_255_144_864, 12_345_678, 4_321)[index]
    figures = {"weights_bytes": weights_bytes, "quality": quality_of(index), "loaders": ()}
    return Receipt(
        provenance=provenance_of(branch).model_copy(update=figures | changes),
        stages={},
        seconds={"quantize": 61.25 + index, "evaluate": 0.3, "verify": 100.0},
        peak_memory_bytes=99_000_000_000,
    )


def built(branch: str, index: int = 0, *, missing: tuple[Any, ...] = (), **changes: object) -> BranchStatus:
    receipt = receipt_of(branch, index, **changes)
    return BranchStatus(
        branch=branch,
        state="built",
        blocks_done=0,
        num_blocks=6,
        receipt=receipt,
        stages_missing=missing,
        commit=COMMITS[branch],
        problem="",
    )


def without_receipt(branch: str, state: Any, *, problem: str = "") -> BranchStatus:
    return BranchStatus(
        branch=branch,
        state=state,
        blocks_done=3,
        num_blocks=6,
        receipt=None,
        stages_missing=("weights",),
        commit="",
        problem=problem,
    )


def ran(loader: str, **changes: Any) -> LoaderRecord:
    given = {"loader": loader, "required": True, "status": "passed"}
    return LoaderRecord.model_validate(given | changes)


@pytest.fixture
def show(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    def lines_of(*statuses: BranchStatus, width: int = 200, target: str = "local", url: str = "") -> list[str]:
        monkeypatch.setattr(status_view, "read_status", lambda *_: statuses)
        monkeypatch.setattr(status_view, "running_build", lambda *_: None)
        repository = SimpleNamespace(id="someone/model", target=target, url=url)
        no_floor = {"quality": QualityFloor(), "variants": (), "expanded_variants": tuple}
        recipe_file: Any = SimpleNamespace(recipe=SimpleNamespace(repository=repository, **no_floor))
        options: Any = None
        stream = io.StringIO()
        print_status(recipe_file, options, Console(file=stream, width=width))
        return [" ".join(line.split()) for line in stream.getvalue().splitlines()]

    return lines_of


Show = Callable[..., list[str]]


def rounded(value: float, places: int) -> str:
    return str(Decimal(repr(value)).quantize(Decimal(1).scaleb(-places), ROUND_HALF_EVEN))


def test_the_figures_of_every_branch(show: Show) -> None:
    lines = show(*(built(branch, index) for index, branch in enumerate((A, B, C))))
    assert lines[0] == "someone/model"
    assert lines[3:] == [
        f"{A} 7.26 GB {rounded(5.43216, 4)} 0.0123 01234567 {rounded(61.25 + 100.3, 1)}",
        f"{B} 12.35 MB {rounded(6.43216, 4)} 0.00123 fedcba98 {rounded(62.25 + 100.3, 1)}",
        f"{C} 4.32 kB {rounded(7.43216, 4)} 0.000123 none {rounded(63.25 + 100.3, 1)}",
    ]


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        (built(A, quality=None), "7.26 GB unmeasured 01234567 161.6"),
        (built(A, quality=None, missing=("evaluate",)), "7.26 GB unmeasured 01234567 161.6"),
        (built(A, missing=("evaluate",)), "7.26 GB outdated 01234567 161.6"),
        (built(A, quality=quality_of(kl_divergence=0.0003)), "7.26 GB 5.4322 0.000300 01234567 161.6"),
        (built(A, missing=("weights",)), "7.26 GB 5.4322 0.0123 01234567 161.6"),
        (built(A, missing=("verify",)), "7.26 GB 5.4322 0.0123 unproven 01234567 161.6"),
        (built(A, missing=("verify",), loaders=(ran("autogptq"),)), "7.26 GB 5.4322 0.0123 outdated 01234567 161.6"),
        (without_receipt(A, "not built"), "not built none"),
        (without_receipt(A, "unfinished"), "3 of 6 blocks none"),
        (without_receipt(A, "outdated"), "outdated none"),
        (without_receipt(A, "edited"), "edited none"),
    ],
)
def test_the_words_for_what_is_missing(show: Show, status: BranchStatus, expected: str) -> None:
    assert show(status)[3:] == [f"{A} {expected}"]


def test_the_result_of_every_loader_and_its_reason_once(show: Show) -> None:
    gone = ran("exllamav2", required=False, status="not run", reason="no CUDA")
    wrong = ran("autogptq", status="failed", reason="logits differ")
    statuses = [
        built(A, loaders=(ran("autogptq"), ran("transformers"), gone)),
        built(B, 1, loaders=(wrong, ran("transformers"), gone)),
    ]
    lines = show(*statuses)
    assert "autogptq ok, transformers ok, exllamav2 not run 01234567" in lines[3]
    assert "autogptq FAILED, transformers ok, exllamav2 not run fedcba98" in lines[4]
    assert lines[5:] == ["exllamav2 not run: no CUDA", "autogptq failed: logits differ"]
    narrow = show(*statuses, width=80)
    assert narrow[5:7] == [
        f"{A}: autogptq ok, transformers ok, exllamav2 not run",
        f"{B}: autogptq FAILED, transformers ok, exllamav2 not run",
    ]
    assert narrow[7:] == lines[5:]
    assert "Loaders" in lines[1]
    assert "Loaders" not in narrow[1]


def test_equal_results_are_one_line_only_if_every_branch_has_them(show: Show) -> None:
    loaders = tuple(ran(name) for name in ("autogptq", "transformers", "exllamav2"))
    words = "autogptq ok, transformers ok, exllamav2 ok"
    two = [built(A, loaders=loaders), built(B, 1, loaders=loaders)]
    assert show(*two, width=80)[5:] == [f"every branch: {words}"]
    assert show(two[0], width=80)[4:] == [f"{A}: {words}"]
    assert show(*two, built(C, 2), width=80)[6:] == [f"{A}: {words}", f"{B}: {words}"]


def test_every_problem_is_printed_once(show: Show) -> None:
    problem = "config.json was changed"
    lines = show(without_receipt(A, "edited", problem=problem), without_receipt(B, "edited", problem=problem))
    assert lines[3:] == [f"{A} edited none", f"{B} edited none", problem]


@pytest.mark.parametrize(
    ("target", "url", "address"),
    [("hub", "", "hub:someone/model"), ("git", "ssh://host/x.git", "ssh://host/x.git"), ("local", "", "")],
)
def test_what_is_remote_is_not_asked(show: Show, target: str, url: str, address: str) -> None:
    (status,) = [BranchStatus(**{**vars(built(A)), "commit": None})]
    lines = show(status, target=target, url=url)
    hints = [line for line in lines if "verify-published" in line]
    assert hints == ([f"to check what is published: packager verify-published {address}"] if address else [])
    assert lines[-1].endswith(" 0.0123 not read 161.6")


def loaders_table(*receipts: Receipt) -> list[str]:
    stream = io.StringIO()
    print_loaders(receipts, Console(file=stream, width=160))
    return [" ".join(line.split()) for line in stream.getvalue().splitlines()]


def test_the_table_of_loaders_and_the_notes_below_it() -> None:
    def record(index: int, **changes: Any) -> LoaderRecord:
        figures = {"relative_error": 0.001234 + index / 100, "top1_agreement": 0.99876 - index / 10}
        counts = {"tokens_generated": 39 + index, "tokens_equal": 30 - index}
        setting = {"device": f"GPU {index}", "dtype": "float16", "kernel": "Marlin"}
        return ran("autogptq", **figures, **counts, **setting, **changes)

    gone = ran("exllamav2", status="not run", reason="no CUDA")
    first = receipt_of(A, 0, loaders=(record(0), gone))
    second = receipt_of(B, 1, loaders=(record(1, status="failed", reason="logits differ"), gone))
    assert loaders_table(first, second)[3:] == [
        f"{A} autogptq ok 0.00123 0.999 30/39",
        f"{A} exllamav2 not run",
        f"{B} autogptq FAILED 0.01123 0.899 29/40",
        f"{B} exllamav2 not run",
        f"{A}: autogptq: float16 on GPU 0, Marlin",
        "exllamav2 not run: no CUDA",
        f"{B}: autogptq: float16 on GPU 1, Marlin",
        f"{B}: autogptq failed: logits differ",
    ]


# What is read from a build


@pytest.fixture
def tiny(builds: tiny_recipe.Builds, tmp_path: Path) -> Path:
    """A copy of the tiny recipe, built and published to dist/."""
    builds.copy(tmp_path / "tiny", published=True)
    return tmp_path / "tiny"


def states(folder: Path, recipe: str = "recipe.yaml") -> dict[str, BranchStatus]:
    found = read_status(RecipeFile.load(folder / recipe), tiny_recipe.options(folder / "dist"))
    assert [status.branch for status in found] == list(BRANCHES)
    return {status.branch: status for status in found}


def test_the_state_of_every_folder(tiny: Path) -> None:
    builds = tiny / "dist" / "builds" / tiny_recipe.REPOSITORY
    (builds / MAIN / "config.json").write_text("{}")
    shutil.rmtree(builds / ACT_ORDER)
    (tiny / "dist" / "receipts" / tiny_recipe.REPOSITORY / f"{THREE_BITS}.json").unlink()
    found = states(tiny)
    assert {name: status.state for name, status in found.items()} == {
        MAIN: "edited", ACT_ORDER: "not built", THREE_BITS: "outdated",
    }  # fmt: skip
    assert all(status.receipt is None for status in found.values())
    assert [bool(status.problem) for status in found.values()] == [True, False, False]


def test_the_heads_and_the_missing_stages(tiny: Path) -> None:
    heads = tiny / "dist" / "hub" / "models" / tiny_recipe.REPOSITORY
    changed = json.loads((tiny / "recipe.yaml").read_text())
    changed["evaluation"]["num_tokens"] = 224
    (tiny / "other.yaml").write_text(json.dumps(changed))
    shutil.copy(tiny / "recipe.lock.json", tiny / "other.lock.json")
    receipts = tiny / "dist" / "receipts" / tiny_recipe.REPOSITORY
    for recipe, missing in (("recipe.yaml", ()), ("other.yaml", ("evaluate",))):
        for branch, status in states(tiny, recipe).items():
            assert (status.state, status.problem) == ("built", "")
            assert status.commit == head_of(heads, branch)
            assert status.receipt == Receipt.model_validate_json((receipts / f"{branch}.json").read_bytes())
            assert [stage for stage in status.stages_missing if stage != "verify"] == list(missing)
    assert len({head_of(heads, branch) for branch in BRANCHES}) == 3


def head_of(repository: Path, branch: str) -> str:
    """Return a branch's head as git's own files have it."""
    folder = repository if (repository / "refs").is_dir() else repository / ".git"
    loose = folder / "refs" / "heads" / branch
    if loose.exists():
        return loose.read_text().strip()
    lines = (folder / "packed-refs").read_text().splitlines()
    (commit,) = [line.split()[0] for line in lines if line.endswith(f" refs/heads/{branch}")]
    return commit


def test_a_remote_target_is_not_asked_for_heads(tiny: Path) -> None:
    changed = json.loads((tiny / "recipe.yaml").read_text())
    changed["repository"]["target"] = "hub"
    (tiny / "other.yaml").write_text(json.dumps(changed))
    shutil.copy(tiny / "recipe.lock.json", tiny / "other.lock.json")
    assert {status.commit for status in states(tiny, "other.yaml").values()} == {None}


def test_json_has_the_state_of_every_branch(tiny: Path) -> None:
    builds = tiny / "dist" / "builds" / tiny_recipe.REPOSITORY
    (builds / MAIN / "config.json").write_text("{}")
    found = states(tiny)
    values = json.loads(
        json.dumps(status_json(RecipeFile.load(tiny / "recipe.yaml"), tiny_recipe.options(tiny / "dist")))
    )
    assert values["repository"] == tiny_recipe.REPOSITORY
    main, *others = values["branches"]
    assert (main["branch"], main["state"], main["receipt"]) == (MAIN, "edited", None)
    assert "config.json was changed" in main["problem"]
    assert main["stages_missing"] == ["weights", "evaluate", "verify"]
    heads = tiny / "dist" / "hub" / "models" / tiny_recipe.REPOSITORY
    receipts = tiny / "dist" / "receipts" / tiny_recipe.REPOSITORY
    assert [entry["branch"] for entry in others] == [ACT_ORDER, THREE_BITS]
    for entry in others:
        assert (entry["state"], entry["problem"]) == ("built", None)
        assert entry["commit"] == head_of(heads, entry["branch"])
        assert (
            entry["receipt"]["provenance"]
            == json.loads((receipts / f"{entry['branch']}.json").read_text())["provenance"]
        )
        assert entry["stages_missing"] == list(found[entry["branch"]].stages_missing)
