"""`packager compat`: the verdicts on a recipe, a folder and a repository, and the sources of every rule."""

import json
import re
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from packager.cli.main import app
from packager.model.compatibility import RUNTIME_RULES, verdicts
from packager.model.runtimes import EARLIER_RUNTIMES, RUNTIMES
from packager.recipe.file import RecipeFile
from tests.checkpoints import Checkpoint, edit_json, give_other_bits
from tests.publish_fixtures import git
from tests.test_house_rules import ROOT

LLAMA = ROOT / "recipes" / "llama-2-13b-chat.yaml"
ACT_ORDER = "gptq-4bit-32g-actorder_True"


def compat(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["compat", *map(str, arguments)])


def answer(*arguments: object) -> dict[str, Any]:
    done = compat(*arguments, "--format", "json")
    assert done.exit_code == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def verdicts_of(found: dict[str, Any]) -> dict[tuple[str, str], str]:
    return {
        (branch["branch"], each["runtime"]): each["verdict"]
        for branch in found["branches"]
        for each in branch["runtimes"]
    }


def write_branch(folder: Path, **parameters: Any) -> Path:
    """Write a branch as a build does, with the description of its model."""
    made = Checkpoint(**parameters)
    made.write(folder)
    edit_json(folder, "provenance.json", lambda record: record.update(model=made.description()))
    return folder


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A repository of two branches, and one that holds no checkpoint."""
    folder = tmp_path / "repository"
    write_branch(folder)
    git("init", "--quiet", "--initial-branch", "main", cwd=folder)
    git("add", "-A", cwd=folder)
    git("commit", "--quiet", "-m", "main", cwd=folder)
    git("checkout", "--quiet", "-b", ACT_ORDER, cwd=folder)
    edit_json(folder, "config.json", lambda config: config["quantization_config"].update(desc_act=True))
    git("commit", "--quiet", "-a", "-m", "act order", cwd=folder)
    git("checkout", "--quiet", "--orphan", "notes", cwd=folder)
    git("rm", "--quiet", "-rf", ".", cwd=folder)
    (folder / "notes.txt").write_text("no checkpoint\n")
    git("add", "notes.txt", cwd=folder)
    git("commit", "--quiet", "-m", "notes", cwd=folder)
    return folder


# The rules


def test_every_rule_has_a_source_and_a_day_and_says_what_to_do() -> None:
    for name, rules in RUNTIME_RULES.items():
        assert rules
        for rule in rules:
            source = rule.source
            assert all((source.project, source.version, source.place)), name
            assert date(2026, 11, 1) <= date.fromisoformat(source.read) <= datetime.now(UTC).date(), (name, source)
            assert rule.advice or rule.kind in ("limits", "note"), (name, source)
            assert rule.kind != "note" or not rule.advice, (name, source)


def test_a_verdict_s_reason_is_that_of_its_findings() -> None:
    recipe_file = RecipeFile.load(LLAMA)
    seen = set()
    for variant in recipe_file.recipe.expanded_variants():
        for verdict in verdicts(variant, recipe_file.architecture, earlier=True):
            kinds = {finding.kind for finding in verdict.findings}
            assert verdict.reason == "; ".join(finding.says for finding in verdict.findings)
            assert verdict.can_load is not bool(kinds & {"refuses", "unknown"})
            seen.add(verdict.status)
    assert seen == {"loads", "limited", "refused"}


# A recipe


def test_the_verdicts_on_a_recipe_are_those_of_its_plan() -> None:
    found = answer(LLAMA)
    recipe_file = RecipeFile.load(LLAMA)
    assert found["schema_version"] == 1
    for branch, variant in zip(found["branches"], recipe_file.recipe.expanded_variants(), strict=True):
        expected = verdicts(variant, recipe_file.architecture, earlier=True)
        assert branch["branch"] == variant.branch
        assert branch["parameters"] == {
            "bits": 4,
            "group_size": variant.group_size,
            "desc_act": variant.desc_act,
            "sym": True,
        }
        assert [each["runtime"] for each in branch["runtimes"]] == [*RUNTIMES, *EARLIER_RUNTIMES]
        for each, verdict in zip(branch["runtimes"], expected, strict=True):
            assert each["verdict"] == verdict.status
            assert [finding["says"] for finding in each["findings"]] == [item.says for item in verdict.findings]
    assert verdicts_of(found)[ACT_ORDER, "vllm"] == "refused"
    assert verdicts_of(found)[ACT_ORDER, "vllm-0.29"] == "loads"


def test_text_names_reasons_with_what_to_do_and_where_it_was_read() -> None:
    done = compat(LLAMA, "--runtime", "vllm", "--branch", ACT_ORDER, "--branch", "main")
    assert done.exit_code == 0
    lines = [line.rstrip() for line in done.stdout.splitlines()]
    assert f"{ACT_ORDER}: LlamaForCausalLM, 4 bits, group size 32, desc_act true, symmetric" in lines
    assert re.search(rf"(?m)^vLLM 0.32 +refused +{ACT_ORDER}", done.stdout)
    assert re.search(r"(?m)^vLLM 0.32 +loads, with a limit +main", done.stdout)
    start = lines.index(f"refused: vLLM 0.32 for {ACT_ORDER}: reads no act order with groups (0.29 did)")
    assert lines[start + 1] == "  do: take a branch with act order static, group or none, or vLLM 0.29"
    assert re.match(
        r"  read in: vLLM 0\.32\.0, vllm\.model_executor.*vllm#54809 \(read 20\d\d-\d\d-\d\d\)", lines[start + 2]
    )
    assert lines[-1] == "Predicted by the rules that were read in the runtimes; nothing was run."
    assert "SGLang" not in done.stdout


def test_markdown_is_a_table_whose_numbers_are_its_sources() -> None:
    done = compat(LLAMA, "--format", "markdown")
    assert done.exit_code == 0
    rows = [line for line in done.stdout.splitlines() if line.startswith("| ") and "---" not in line]
    assert {row.count(" | ") for row in rows} == {5}
    numbers = {number for row in rows[1:] for number in re.findall(r"\d+", row.rpartition(" | ")[2])}
    listed = re.findall(r"(?m)^(\d+)\. .* \(read 20\d\d-\d\d-\d\d\)$", done.stdout)
    assert listed == [str(number) for number in range(1, len(numbers) + 1)]
    assert numbers == set(listed)
    assert "gptq-4bit-32g-actorder\\_True" in done.stdout


def test_a_wrong_name_of_a_runtime_or_a_branch_is_refused() -> None:
    done = compat(LLAMA, "--runtime", "vlm")
    assert (done.exit_code, "did you mean 'vllm'?" in done.stderr) == (2, True)
    done = compat(LLAMA, "--branch", "mian")
    assert (done.exit_code, "did you mean 'main'?" in done.stderr) == (2, True)


# A folder


def test_a_folder_is_judged_by_its_configs_and_headers(tmp_path: Path) -> None:
    folder = write_branch(tmp_path / "checkpoint", desc_act=True)
    found = answer(folder)
    (branch,) = found["branches"]
    assert (branch["branch"], branch["model_class"]) == ("checkpoint", "LlamaForCausalLM")
    assert branch["parameters"] == {"bits": 4, "group_size": 32, "desc_act": True, "sym": True}
    answers = verdicts_of(found)
    assert answers["checkpoint", "vllm"] == "refused"
    assert answers["checkpoint", "vllm-0.29"] == "limited"
    assert answers["checkpoint", "exllama"] == "loads"  # tokenizer.model is there
    (folder / "tokenizer.model").unlink()
    (lacking,) = answer(folder, "--runtime", "exllama")["branches"]
    assert [each["says"] for each in lacking["runtimes"][0]["findings"]] == [
        "needs tokenizer.model, which the base model lacks"
    ]


def test_linears_that_are_not_quantized_in_the_files_count(tmp_path: Path) -> None:
    """No config says it: the headers do. vLLM computes q, k and v as one linear."""
    folder = write_branch(tmp_path / "checkpoint")
    assert verdicts_of(answer(folder))["checkpoint", "vllm"] != "refused"
    for path in folder.glob("*.safetensors"):
        path.write_bytes(re.sub(rb"self_attn\.k_proj\.[qsg]", b"self_attn.k_plain.", path.read_bytes()))
    (branch,) = answer(folder, "--runtime", "vllm", "--runtime", "autogptq")["branches"]
    reasons = {each["runtime"]: each["findings"][0]["says"] for each in branch["runtimes"]}
    assert reasons["vllm"] == "computes q_proj and k_proj and v_proj as one linear, k_proj is not quantized, q_proj is"
    assert reasons["autogptq"] == "takes every linear of a block as quantized, self_attn.k_proj is not"


def test_patterns_of_a_checkpoint_are_not_run(tmp_path: Path) -> None:
    """This one takes minutes for a name of 30 letters. The headers say what is quantized; without them nobody does."""
    folder = write_branch(tmp_path / "checkpoint")
    hostile: dict[str, Any] = {"dynamic": {"-:^(([a-z0-9_.])+)+!$": {}}}
    edit_json(folder, "config.json", lambda config: config["quantization_config"].update(hostile))
    (branch,) = answer(folder, "--runtime", "exllamav2")["branches"]
    assert branch["runtimes"][0]["verdict"] == "loads"
    for path in folder.glob("*.safetensors"):
        path.unlink()
    done = compat(folder)
    assert (done.exit_code, "by patterns, which are not tried: download the weights" in done.stderr) == (7, True)


def test_linears_of_other_bits_are_read_from_the_headers(tmp_path: Path) -> None:
    """Of a pattern that takes minutes, as above: which linears it means is seen in their shapes."""
    folder = write_branch(tmp_path / "checkpoint")
    plain = verdicts_of(answer(folder))
    give_other_bits(folder, 8, ["model.layers.1.mlp.down_proj"], pattern="+:^(([a-z0-9_.])+)+!$")
    (branch,) = answer(folder)["branches"]
    assert branch["parameters"] == {"bits": 4, "other_bits": [8], "group_size": 32, "desc_act": False, "sym": True}
    says = {each["runtime"]: each["findings"][0]["says"] for each in branch["runtimes"] if each["findings"]}
    mixed = {each["runtime"]: each["verdict"] for each in branch["runtimes"]}
    for runtime in ("autogptq", "transformers", "gptq-for-llama", "tgi"):
        assert says[runtime] == "reads one number of bits, here are 4 and 8"
        assert (plain["checkpoint", runtime] != "refused", mixed[runtime]) == (True, "refused")
    assert mixed["gptqmodel"] == plain["checkpoint", "gptqmodel"] == "loads"
    assert (mixed["vllm"], mixed["onnxruntime"]) == ("unknown", "unknown")
    for runtime in ("vllm", "sglang", "onnxruntime"):
        assert "in dynamic, which its patterns may not fit" in says[runtime]
    assert "reads 4 bits only" in {says[runtime] for runtime in ("exllama", "exllamav2")}
    assert ", 4 and 8 bits, group size 32, " in compat(folder).stdout


def test_linears_of_other_symmetry_are_not_judged(tmp_path: Path) -> None:
    """No shape shows it, and its pattern is not run."""
    folder = give_other_bits(write_branch(tmp_path / "checkpoint"), 8, ["model.layers.1.mlp.down_proj"])
    more: dict[str, Any] = {"x": {"bits": 8, "sym": False}}
    edit_json(folder, "config.json", lambda config: config["quantization_config"]["dynamic"].update(more))
    done = compat(folder)
    assert (done.exit_code, "dynamic gives single linears other parameters" in done.stderr) == (7, True)


def test_three_bits_beside_four_are_read_by_what_reads_both(tmp_path: Path) -> None:
    folder = give_other_bits(write_branch(tmp_path / "checkpoint"), 3, ["model.layers.1.mlp.down_proj"])
    mixed = verdicts_of(answer(folder))
    assert (mixed["checkpoint", "gptqmodel"], mixed["checkpoint", "vllm"]) == ("loads", "refused")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"dynamic": {"+:.*down_proj.*": {"bits": 8, "sym": False}}}, "dynamic gives single linears other parameters"),
        ({"quant_method": "awq"}, 'quant_method is "awq", not gptq'),
        ({"bits": 5}, "bits is 5"),
        ({"desc_act": "yes"}, 'desc_act is "yes"'),
        ({"checkpoint_format": "gptq_v2"}, 'checkpoint_format is "gptq_v2"'),
        ({"lm_head": True}, "lm_head is quantized"),
        ({"dynamic": {"+:.*down_proj.*": {"bits": 8}}}, "dynamic gives single linears other parameters"),
    ],
)
def test_what_no_rule_is_about_is_said(change: dict[str, Any], says: str, tmp_path: Path) -> None:
    folder = write_branch(tmp_path / "checkpoint")
    edit_json(folder, "quantize_config.json", lambda config: config.pop("desc_act"))
    edit_json(folder, "config.json", lambda config: config["quantization_config"].update(change))
    done = compat(folder)
    assert done.exit_code == 7
    assert "no rule is about such a checkpoint" in done.stderr
    assert says in done.stderr


def test_what_is_no_checkpoint_is_said(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    done = compat(tmp_path / "empty")
    assert (done.exit_code, "there is no config.json in it, and it is no git repository" in done.stderr) == (7, True)
    folder = write_branch(tmp_path / "plain")
    edit_json(folder, "config.json", lambda config: config.pop("quantization_config"))
    done = compat(folder)
    assert (done.exit_code, "it has no quantization_config" in done.stderr) == (7, True)
    assert compat(folder, "--branch", "main").exit_code == 2


# A repository


def test_each_branch_of_a_repository_is_judged(repository: Path, tmp_path: Path) -> None:
    done = compat(repository, "--dist", tmp_path / "dist", "--format", "json")
    found = json.loads(done.stdout)
    answers = verdicts_of(found)
    assert (answers["main", "vllm-cpu"], answers[ACT_ORDER, "vllm-cpu"]) == ("refused", "refused")
    says = {branch["branch"]: branch["runtimes"] for branch in found["branches"]}
    refusals = {
        branch: {finding["says"] for each in runtimes if each["runtime"] == "vllm-cpu" for finding in each["findings"]}
        for branch, runtimes in says.items()
    }
    assert refusals["main"] == {"computes no attention with heads of 16 columns"}
    assert refusals[ACT_ORDER] == {*refusals["main"], "reads no act order with groups (0.29 did)"}
    assert [branch["branch"] for branch in found["branches"]] == ["main", ACT_ORDER, "notes"]
    assert found["branches"][2]["problem"] == "this is no GPTQ checkpoint: there is none"
    assert done.exit_code == 7  # because of notes
    assert compat(repository, "--dist", tmp_path / "dist", "--branch", "main").exit_code == 0
    assert compat(repository, "--dist", tmp_path / "dist", "--branch", "notes").exit_code == 7


def test_a_folder_of_the_local_target_is_a_repository(repository: Path, tmp_path: Path) -> None:
    git("checkout", "--quiet", "main", cwd=repository)
    assert [branch["branch"] for branch in answer(repository)["branches"]] == ["repository"]
    published = tmp_path / "hub" / "models" / "tester" / "tiny-GPTQ"
    published.parent.mkdir(parents=True)
    repository.rename(published)
    done = compat(published, "--dist", tmp_path / "dist", "--format", "json")
    assert [branch["branch"] for branch in json.loads(done.stdout)["branches"]] == ["main", ACT_ORDER, "notes"]


def test_a_large_document_of_a_repository_is_not_read(repository: Path, tmp_path: Path) -> None:
    git("checkout", "--quiet", ACT_ORDER, cwd=repository)
    (repository / "provenance.json").write_bytes(b"{" + b" " * 32_000_000 + b"}")
    git("commit", "--quiet", "-a", "-m", "large", cwd=repository)
    git("checkout", "--quiet", "notes", cwd=repository)  # what lies in the folder is no checkpoint
    done = compat(repository, "--dist", tmp_path / "dist", "--branch", ACT_ORDER)
    assert done.exit_code == 10
    assert "provenance.json is too large" in done.stderr


@pytest.mark.slow
def test_a_folder_of_another_program_is_described_by_transformers(tmp_path: Path, in_process: None) -> None:
    folder = write_branch(tmp_path / "checkpoint")
    (folder / "provenance.json").unlink()
    assert verdicts_of(answer(folder))["checkpoint", "transformers"] == "loads"
    edit_json(folder, "config.json", lambda config: config.update(model_type="mystery"))
    done = compat(folder)
    assert done.exit_code == 7
    assert "the model of this checkpoint is not known" in done.stderr
