"""`packager choose`: the card's answer from published records, and what it says where it does not know."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from packager.card.choice import GPU_GB, CachedContext, Candidate, choose_branch, machine_choices, opened_on_cpu
from packager.cli.main import app
from packager.errors import UsageError
from packager.receipt import LoaderRecord
from tests.audit_cases import WEIGHTS
from tests.card_fixtures import fixture_quality
from tests.checkpoints import edit_json
from tests.test_card_choice import LONG, SHORT, asked, receipts_of
from tests.test_published import MAIN, PROVENANCE, REPOSITORY, VARIANT, PublishedFixture

Change = Callable[[dict[str, Any]], object]


@pytest.fixture
def fixture(tmp_path: Path) -> PublishedFixture:
    """Two branches whose records have quality: the variant is the closer one."""
    made = PublishedFixture(tmp_path)
    for branch, kl in ((MAIN, 0.02), (VARIANT, 0.01)):
        quality = fixture_quality(
            7, perplexity=2.0, base_perplexity=1.9, kl_divergence=kl, top1_agreement=0.9
        ).model_dump(mode="json")
        change(made, branch, lambda record, quality=quality: record.update(quality=quality))  # type: ignore[misc]
    return made


def change(made: PublishedFixture, branch: str, how: Change) -> None:
    edit_json(made.folders[branch], PROVENANCE, how)


def choose(made: PublishedFixture, *options: str, address: str = REPOSITORY) -> dict[str, Any]:
    dist = made.root.parent
    words = ["choose", address, "--dist", str(dist), "-q", "--format", "json", *options]
    result = CliRunner().invoke(app, words, prog_name="packager")
    assert result.exit_code == 0, result.stderr
    answer: dict[str, Any] = json.loads(result.stdout)
    return answer


def rows(answer: dict[str, Any], key: str) -> dict[str, Any]:
    return {row["branch"]: row[key] for row in answer["branches"]}


@pytest.mark.parametrize("context", [SHORT, LONG])
@pytest.mark.parametrize("allowed", ["abc", "a", ""])
def test_the_answer_is_that_of_the_card(context: CachedContext, allowed: str) -> None:
    receipts = receipts_of((5 * 10**9, 0.3), (5 * 10**9 + 1, 0.2), (31 * 10**9, 0.1))
    candidates = asked(receipts, context, allowed)
    card = machine_choices([candidates], [candidates])
    for gigabytes in GPU_GB:
        (of_card,) = [
            each.chosen[0].branch for each in card if each.least_gb <= gigabytes <= (each.most_gb or max(GPU_GB))
        ][:1] or [""]
        assert choose_branch(candidates, gigabytes * 10**9).branch == of_card


def test_branches_that_are_not_told_apart_say_so_and_unmeasured_ones_are_not_recommended() -> None:
    def candidates(*receipts: Any) -> list[Candidate]:
        return [Candidate(receipt=receipt, context=SHORT) for receipt in receipts]

    refused = choose_branch(asked(receipts_of((7, 0.1)), SHORT, ""))
    assert (refused.branch, refused.reason) == ("", "the runtime opens none of these branches")
    equal = choose_branch(candidates(*receipts_of((7, 0.1), (5, 0.1))))
    assert (equal.branch, "not told apart" in equal.reason) == ("b", True)
    first, second = receipts_of((7, 0.1), (5, 0.2))
    unmeasured = second.model_copy(update={"quality": None})
    assert choose_branch(candidates(first, unmeasured)).branch == ""
    only = choose_branch(candidates(unmeasured))
    assert (only.branch, "its quality was not measured" in only.reason) == ("b", True)


@pytest.mark.parametrize(
    ("device", "runtime", "opening"),
    [("cpu", "", "proven"), ("cpu", "onnxruntime", "proven"), ("cpu", "vllm", "unknown"), ("cuda", "", "unknown")],
)
def test_a_machine_without_a_gpu_takes_what_was_proven_on_one(device: str, runtime: str, opening: str) -> None:
    (receipt,) = receipts_of((7, 0.1))
    record = LoaderRecord(loader="onnxruntime", required=False, status="passed", device=device)
    assert opened_on_cpu(receipt.model_copy(update={"loaders": (record,)}), runtime).opening == opening


def test_the_records_of_a_repository_are_enough(fixture: PublishedFixture) -> None:
    fixture.publish()
    answer = choose(fixture)
    assert (answer["branch"], answer["revision"]) == (VARIANT, VARIANT)
    assert rows(answer, "kl_divergence") == {MAIN: 0.02, VARIANT: 0.01}
    # Two blocks of 32 columns of keys and of values, in two bytes.
    assert {row["device_bytes"] - row["weights_bytes"] for row in answer["branches"]} == {
        answer["branches"][0]["context_tokens"] * 2 * 2 * 32 * 2
    }
    for_vllm = choose(fixture, "--runtime", "vLLM", "--vram", "8GB")
    assert for_vllm["branch"] == MAIN
    assert rows(for_vllm, "opened") == {MAIN: "expected", VARIANT: "refused"}
    assert choose(fixture, "--vram", "1GB")["branch"] is None, "1 GB is the runtime's"
    on_cpu = choose(fixture, "--cpu")
    assert (on_cpu["branch"], on_cpu["reason"]) == (None, "none of these branches is known to open there")


def test_a_context_that_the_model_does_not_have_is_said(fixture: PublishedFixture) -> None:
    fixture.publish()
    words = ["choose", REPOSITORY, "--dist", str(fixture.root.parent), "--context"]
    most = json.loads((fixture.folders[MAIN] / "config.json").read_text())["max_position_embeddings"]
    longer = CliRunner().invoke(app, [*words, str(100 * most)], prog_name="packager")
    assert (
        f"the model takes {most:,} tokens at most: the memory shown is for these, not for {100 * most:,}"
        in longer.stderr
    )
    whole = CliRunner().invoke(app, [*words, str(most)], prog_name="packager")
    assert (whole.exit_code, "at most" in whole.stderr) == (0, False)


def test_a_git_remote_answers_too(fixture: PublishedFixture) -> None:
    fixture.publish()
    address = (fixture.root / "models" / REPOSITORY).as_uri()
    assert choose(fixture, address=address)["branch"] == VARIANT


def test_people_get_a_table_and_the_answer_last(fixture: PublishedFixture) -> None:
    fixture.publish()
    words = ["choose", REPOSITORY, "--dist", str(fixture.root.parent), "--vram", "8GB", "--runtime", "vllm", "-q"]
    result = CliRunner().invoke(app, words, prog_name="packager")
    assert result.exit_code == 0, result.stderr
    assert result.stdout.splitlines()[-1] == "take main: it is the only one that can be taken"
    assert "refused:" in result.stdout


def test_an_edited_card_changes_no_answer(fixture: PublishedFixture) -> None:
    (fixture.folders[VARIANT] / "README.md").write_text("edited on the website\n")
    fixture.publish()
    answer = choose(fixture)
    assert (answer["branch"], answer["findings"]) == (VARIANT, [])


def larger(record: dict[str, Any]) -> None:
    for name, file in record["files"].items():
        if name.endswith(".safetensors"):
            file["size_bytes"] += 1


def other_config(record: dict[str, Any]) -> None:
    record["files"]["config.json"]["sha256"] = "0" * 64


@pytest.mark.parametrize(
    ("how", "rule"),
    [
        (larger, "remote-file-changed"),
        (other_config, "remote-file-changed"),
        (lambda record: record.update(weights_bytes=1), "provenance-disagrees"),
        (lambda record: record["quality"].update(kl_divergence=float("nan")), "provenance-invalid"),
        (lambda record: record.update(branch="another"), "branch-differs"),
        (lambda record: record["model"].update(kinds=[]), "provenance-invalid"),
        (lambda record: record.pop("linears"), "provenance-invalid"),
    ],
)
def test_a_branch_with_a_wrong_record_is_not_considered(fixture: PublishedFixture, how: Change, rule: str) -> None:
    change(fixture, VARIANT, how)
    fixture.publish()
    answer = choose(fixture)
    assert answer["branch"] == MAIN
    assert list(rows(answer, "fits")) == [MAIN]
    assert rule in {finding["rule"] for finding in answer["findings"] if finding["branch"] == VARIANT}


def test_other_weights_than_those_of_the_record_are_not_considered(fixture: PublishedFixture) -> None:
    (fixture.main / "more.safetensors").write_bytes((fixture.main / WEIGHTS).read_bytes())
    fixture.publish()
    answer = choose(fixture)
    assert list(rows(answer, "fits")) == [VARIANT]
    assert [finding["rule"] for finding in answer["findings"]] == ["remote-file-unlisted"]


def test_what_a_record_of_before_does_not_say_is_not_known(fixture: PublishedFixture) -> None:
    change(fixture, VARIANT, lambda record: record.update(model={}))
    fixture.publish()
    assert choose(fixture)["branch"] == VARIANT, "nothing was asked that is not known"
    of_memory = choose(fixture, "--vram", "8GB")
    assert of_memory["branch"] == MAIN
    assert rows(of_memory, "fits") == {MAIN: True, VARIANT: None}
    of_runtime = choose(fixture, "--runtime", "transformers")
    assert rows(of_runtime, "opened") == {MAIN: "expected", VARIANT: "unknown"}
    of_another_package = choose(fixture, "--runtime", "plugin:Acme")
    assert rows(of_another_package, "opened") == {MAIN: "unknown", VARIANT: "unknown"}
    assert of_runtime["branch"] == MAIN


@pytest.mark.parametrize(
    ("options", "what"),
    [
        (["--runtime", "vlm"], "did you mean 'vllm'?"),
        (["--cpu", "--vram", "8GB"], "give one of them"),
        (["--vram", "12"], "12 bytes, less than 1GB"),
        (["--context", "0"], "--context"),
    ],
)
def test_a_wrong_question_is_refused(tmp_path: Path, options: list[str], what: str) -> None:
    words = ["choose", "a/b", "--dist", str(tmp_path), *options]
    result = CliRunner().invoke(app, words, prog_name="packager")
    assert result.exit_code == UsageError.exit_code
    assert what in result.stderr


def test_a_repository_without_branches_is_an_error(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["choose", str(tmp_path), "--dist", str(tmp_path)], prog_name="packager")
    assert result.exit_code == 10
