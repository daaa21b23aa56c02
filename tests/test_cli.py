"""`cli`, `progress`, `status` and `release`: what people and scripts see: help, results, errors, exit codes."""

import errno
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer
from rich.console import Console
from typer.testing import CliRunner, Result

from packager import __version__
from packager.cli.main import app
from packager.cli.options import read_size
from packager.cli.status_view import print_loaders, print_status
from packager.errors import (
    LoaderError,
    MachineError,
    PackagerError,
    PublishError,
    RecipeError,
    StateError,
)
from packager.pipeline.status import read_status
from packager.receipt import Receipt
from packager.recipe.file import RecipeFile
from packager.system.terminal import Terminal
from tests import tiny_recipe
from tests.checkpoints import Checkpoint, edit_json
from tests.golden_files import check_golden
from tests.locks import read_lock_of, write_lock
from tests.samples import sampled
from tests.test_house_rules import ROOT

COMMANDS = (
    "init", "lock", "plan", "build", "audit", "fix", "verify", "card", "publish", "verify-published", "rollback",
    "status", "release", "doctor", "schema", "diff", "compat", "choose", "report", "queue",
)  # fmt: skip
TOO_LARGE = re.compile(r"(?m)^.*llama-2-13b-chat\.yaml: not built: needs a CUDA GPU with \d+\.\d\d GB\n\Z")
DEMO = str(ROOT / "recipes" / "demo-llama.yaml")
LARGE = str(ROOT / "recipes" / "llama-2-13b-chat.yaml")


def packager(*arguments: object) -> Result:
    """Run the command line in this process; standard output and error are kept apart."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def process(*arguments: str, patch: str = "", **options: Any) -> subprocess.Popen[str]:
    """Start the command line in a process of its own, after the Python statements in `patch`."""
    code = f"{patch}\nfrom packager.cli.main import main\nmain()"
    # With PYTHONUNBUFFERED every write would be flushed, as no user's are.
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.Popen(command, cwd=ROOT, env=environ, text=True, stderr=subprocess.PIPE, **options)


def error_classes(parent: type[PackagerError] = PackagerError) -> list[type[PackagerError]]:
    children = [child for child in parent.__subclasses__() if child.__module__ == "packager.errors"]
    return [parent, *(kind for child in children for kind in error_classes(child))]


@pytest.fixture
def tiny(builds: tiny_recipe.Builds, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the tiny recipe with its dist/, as the present folder."""
    builds.copy(tmp_path / "tiny")
    monkeypatch.chdir(tmp_path / "tiny")
    return tmp_path / "tiny"


def status_text(folder: Path, width: int) -> str:
    stream = io.StringIO()
    recipe_file = RecipeFile.load(folder / "recipe.yaml")
    print_status(recipe_file, tiny_recipe.options(folder / "dist"), Console(file=stream, width=width))
    return stream.getvalue()


def edit_receipt(folder: Path, branch: str, change: Callable[[dict[str, Any]], object]) -> None:
    path = folder / "dist" / "receipts" / tiny_recipe.REPOSITORY / f"{branch}.json"
    receipt = json.loads(path.read_text())
    change(receipt)
    path.write_text(json.dumps(receipt))


def add_loaders(folder: Path) -> None:
    """Give every receipt the records of two loaders that passed and one that did not run."""
    ran = {"required": True, "status": "passed", "device": "cpu", "dtype": "float32", "relative_error": 0.00012}
    ran |= {"top1_agreement": 1.0, "tokens_generated": 39, "tokens_equal": 39, "kernel": "some.package.TorchLinear"}
    records: list[dict[str, Any]] = [
        {"loader": "autogptq", **ran},
        {"loader": "transformers", **ran},
        {"loader": "exllamav2", "required": False, "status": "not run", "reason": "needs a CUDA device"},
    ]
    for branch in tiny_recipe.BRANCHES:
        edit_receipt(folder, branch, lambda receipt: receipt["provenance"].update(loaders=records))


# Help


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("plan", ["sizes", "loaders", "offline", "without torch", "Exits with 2"]),
        ("build", ["Publishes nothing", "not done again", "Exits with 8", "--cache", "~/.cache/gptq-"]),
        ("audit", ["Exits with 0", "with 7", "with 10", "describes its model", "build extra", "2 MB", "--full reads"]),
        ("fix", ["No weight changes", "is left", "--dry-run", "Exits with 0", "with 7", "must not exist"]),
        ("compat", ["loads, with a limit", "predictions", "Exits with 0", "with 7", "with 10", "--runtime"]),
        ("verify", ["logits", "Exits with 0", "with 8"]),
        ("card", ["no figure", "Exits with 10", "with 11"]),
        ("publish", ["main last", "builds nothing", "Exits with 10", "with 11", "with 7", "--dry-run"]),
        ("status", ["Changes nothing", "Exits with 0"]),
        ("verify-published", ["no build", "no torch", "--full", "with 7", "with 10"]),
        ("rollback", ["new commit", "killed", "--yes", "Exits with 10"]),
        ("release", ["Exits with 0", "--strict", "12", "nothing is built before"]),
    ],
)
def test_the_help_of_a_command_contains_its_main_words(command: str, words: list[str]) -> None:
    result = packager(command, "--help")
    text = " ".join(result.stdout.split())
    assert result.exit_code == 0
    assert [word for word in words if word not in text] == []
    assert packager(command, "-h").stdout == result.stdout


def test_the_first_page_names_every_command_whole_and_every_exit_code() -> None:
    text = packager("--help").stdout
    assert [command for command in COMMANDS if f"\n  {command} " not in text] == []
    assert "..." not in text.partition("Commands:")[2]
    codes = {line.split()[0] for line in text.partition("Exit codes:\n")[2].partition("\n\n")[0].splitlines()}
    assert codes == {
        "0",
        "1",
        "129",
        "130",
        "143",
        *(str(error.exit_code) for error in error_classes() if error is not PackagerError),
    }


def test_no_command_is_help_and_version_is_one_line() -> None:
    assert "Commands:" in packager().output
    result = packager("--version")
    assert (result.exit_code, result.stdout, result.stderr) == (0, f"packager {__version__}\n", "")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["pln"], ["packager: there is no command pln", "did you mean plan?"]),
        (["plan"], ["RECIPE is missing", "--recipes GLOB"]),
        (["publish"], ["packager publish: RECIPE is missing"]),
        (["plan", DEMO, "--fromat", "json"], ["packager plan: there is no option --fromat", "did you mean --format?"]),
        (["plan", DEMO, "--format"], ["--format needs a value"]),
        (["plan", DEMO, "--quiet=3"], ["--quiet takes no value"]),
        (["plan", DEMO, "--format", "yaml"], ["packager plan: --format: it takes text or json, not yaml"]),
        (["build", DEMO, "--device", "gpu"], ["--device: it takes auto, cpu or cuda, not gpu"]),
        (["build", DEMO, "--gpu-memory", "5"], ["--gpu-memory: '5' is 5 bytes, less than 1GB"]),
        (["audit", "nowhere"], ["DIR|REPO: there is no folder nowhere", "packager audit --help"]),
        (["audit", DEMO], [f"DIR|REPO: {DEMO} is a file, not a folder"]),
        (["audit", ".", "--full"], ["--full is for repositories", "leave it out"]),
        (["audit", "hub:a/b@"], ["the branch after @ is empty", "leave out the @ for main"]),
        (["audit", ".", "b"], ["too many arguments: b"]),
        (["init", "a", "--calibration", "."], ["--calibration: . is a folder, not a file"]),
        (["init", "a", "--calibration", "nowhere"], ["--calibration: there is no file nowhere"]),
        (["verify-published", "a/b", "--min-release", "x"], ["--min-release: it takes a whole number"]),
        (["verify-published", "a/b", "--min-release", "0"], ["--min-release: it takes a number of at least 1"]),
        (["status", DEMO, "--watch", "--format", "json"], ["--watch shows one recipe as text"]),
        (["plan", "--recipes", "nowhere/*.yaml"], ["no file fits nowhere/*.yaml"]),
        (["plan", DEMO, "--only", "mian"], ["the recipe has no branch 'mian'", "did you mean 'main'?"]),
        (["card", DEMO, "--branch", "mian"], ["the recipe has no branch 'mian'", "did you mean 'main'?"]),
        (["release"], ["RECIPE is missing"]),
    ],
)
@pytest.mark.parametrize("as_json", [False, True], ids=["text", "json"])
def test_a_wrong_command_line_exits_with_2_and_names_the_mistake(
    arguments: list[str], words: list[str], as_json: bool
) -> None:
    wanted = ["--format=json"] if as_json and "--format" not in arguments else []
    result = packager(*arguments, *wanted)
    text = " ".join(result.stderr.split())
    assert result.exit_code == 2
    assert text.startswith("error: ")
    assert [word for word in words if word not in text] == []
    assert not re.search(r"\b(Usage|Try|Invalid|Input|int|str|list|parse)\b", text)
    if not wanted and arguments[-2:] != ["--format", "json"]:
        assert result.stdout == ""
        return
    answer = json.loads(result.stdout)
    assert answer["schema_version"] == 1
    assert answer["error"]["exit_code"] == 2
    assert {"code", "what", "where", "why", "hint"} <= answer["error"].keys()
    assert answer["error"]["what"] in text


# Errors


@pytest.mark.parametrize("error_class", error_classes(), ids=lambda kind: kind.__name__)
def test_every_error_becomes_its_exit_code_and_no_traceback(
    monkeypatch: pytest.MonkeyPatch, error_class: type[PackagerError]
) -> None:
    def fail(*_: object) -> None:
        raise error_class("it [bold]went[/bold] :bomb: wrong", hint="do [i]this[/i]")

    monkeypatch.setattr("packager.pipeline.plan.make_plan", fail)
    result = packager("plan", DEMO)
    assert (result.exit_code, result.stdout) == (error_class.exit_code, "")
    assert result.stderr == "error: it [bold]went[/bold] :bomb: wrong\n  hint: do [i]this[/i]\n"


def test_each_kind_of_error_has_its_own_exit_code() -> None:
    kinds = [error for error in error_classes() if PackagerError in error.__bases__ and error.exit_code != 2]
    assert len({error.exit_code for error in kinds}) == len(kinds)
    assert LoaderError.exit_code == 8
    assert PublishError.exit_code == 10
    assert {error.exit_code for error in error_classes()} == set(range(1, 13))


def test_an_error_of_the_file_system_has_a_message_and_an_exit_code(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail(*_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", "dist/work")

    monkeypatch.setattr("packager.pipeline.plan.make_plan", fail)
    result = packager("plan", DEMO)
    assert (result.exit_code, result.stdout) == (MachineError.exit_code, "")
    assert result.stderr == "error: dist/work: cannot be used\n  why: Permission denied\n"


def test_a_file_in_place_of_the_output_folder_is_an_error(tiny: Path) -> None:
    shutil.rmtree("dist")
    Path("dist").write_text("")
    for command in ("status", "publish", "card"):
        result = packager(command, "recipe.yaml")
        assert result.exit_code == MachineError.exit_code
        assert result.stderr.startswith("error: dist/")


@pytest.mark.parametrize("folder", ["/proc/x", "/proc/self/x/y", "x" * 300, "a\nb" * 2000])
def test_an_output_folder_that_cannot_be_made_names_the_option(tiny: Path, folder: str) -> None:
    result = packager("build", "recipe.yaml", "--dist", folder)
    assert result.exit_code == MachineError.exit_code
    assert "--dist" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("packager.pipeline.plan.make_plan", fail)
    assert isinstance(packager("plan", DEMO).exception, ZeroDivisionError)


def test_ctrl_c_gives_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("packager.pipeline.plan.make_plan", interrupted)
    result = packager("plan", DEMO)
    assert (result.exit_code, result.stdout) == (130, "")
    assert result.stderr == "interrupted: finished work is kept, run the same command again to continue\n"


@pytest.mark.slow
def test_ctrl_c_in_the_middle_of_work_shows_no_traceback() -> None:
    patch = (
        "import signal, time, packager.pipeline.plan\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a test run in the background ignores it
        "def make_plan(*_):\n"
        "    print('working', flush=True)\n"
        "    time.sleep(60)\n"
        "packager.pipeline.plan.make_plan = make_plan\n"
    )
    running = process("plan", DEMO, patch=patch, stdout=subprocess.PIPE)
    assert running.stdout is not None
    assert running.stdout.readline() == "working\n"
    running.send_signal(signal.SIGINT)
    _, errors = running.communicate(timeout=30)
    assert running.returncode == 130
    assert errors == "interrupted: finished work is kept, run the same command again to continue\n"


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    sampled([["plan", DEMO], ["plan", DEMO, "--format", "json"], ["--help"], ["--version"]], ["plan", DEMO]),
)
def test_a_closed_pipe_is_no_error(arguments: list[str]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    running = process(*arguments, stdout=writer)
    os.close(writer)
    _, errors = running.communicate(timeout=60)
    assert (running.returncode, errors) == (1, "")


GOLDEN_ERRORS: dict[str, tuple[list[str], int]] = {
    "missing_recipe": (["plan", "recipies.yaml"], 2),
    "broken_recipe": (["plan", "broken.yaml"], 2),
    "not_a_recipe": (["build", "dist"], 2),
    "cannot_be_built": (["plan", "narrow.yaml"], 2),
    "publish_before_build": (["publish", "recipe.yaml", "--dist", "elsewhere"], 10),
    "card_before_build": (["card", "recipe.yaml", "--dist", "elsewhere"], 10),
    "card_of_no_branch": (["card", "recipe.yaml", "--branch", "mian"], 2),
    "edited_folder": (["publish", "recipe.yaml", "--dist", "edited"], 11),
    "release_strict": (["release", "large.yaml", "recipe.yaml", "--strict", "--device", "cpu"], 12),
}


@pytest.mark.parametrize("name", GOLDEN_ERRORS)
def test_error_texts(tiny: Path, update_golden: bool, name: str) -> None:
    text = Path("recipe.yaml").read_text()
    Path("broken.yaml").write_text(text.replace('"bits": 4', '"bits": 5').replace('"creator"', '"craetor"'))
    Path("narrow.yaml").write_text(text.replace('"required": []', '"required": ["exllamav2"]'))
    locked = read_lock_of(ROOT / "recipes" / "llama-2-13b-chat.yaml").model.config
    write_lock(Path("large.yaml"), locked, "some/large", "a" * 40)
    for stem in ("broken", "narrow"):
        shutil.copyfile("recipe.lock.json", f"{stem}.lock.json")
    large = json.loads(text) | {"base_model": {"id": "some/large", "revision": "a" * 40}}
    Path("large.yaml").write_text(json.dumps(large | {"repository": {"id": "tester/large-GPTQ"}}))
    shutil.copytree("dist", "edited")
    Path("edited/builds/tester/tiny-GPTQ/main/config.json").write_text("{}")
    arguments, code = GOLDEN_ERRORS[name]
    result = packager(*arguments)
    assert result.exit_code == code
    assert result.stdout == "" or name == "release_strict"  # whose table names every recipe
    text = re.sub(r"[0-9.]+ GB", "<size> GB", result.stderr)  # what the engine needs may change, the words not
    check_golden(f"cli/{name}.txt", text, update=update_golden)


# Results


@pytest.mark.slow
def test_standard_output_holds_only_json(tiny: Path) -> None:
    def result_of(*arguments: object) -> Any:
        result = packager(*arguments, "--format", "json")
        assert result.exit_code == 0, result.stderr
        return json.loads(result.stdout)

    assert [variant["branch"] for variant in result_of("plan", "recipe.yaml")["variants"]] == [*tiny_recipe.BRANCHES]
    assert result_of("card", "recipe.yaml")["card"] == Path("dist/builds/tester/tiny-GPTQ/main/README.md").read_text()
    assert {entry["action"] for entry in result_of("publish", "recipe.yaml", "--dry-run")["branches"]} == {"create"}
    assert not Path("dist/hub/models").exists()
    published = result_of("publish", "recipe.yaml")["branches"]
    status = result_of("status", "recipe.yaml")["branches"]
    assert {entry["branch"]: entry["commit"] for entry in status} == {
        entry["branch"]: entry["commit"] for entry in published
    }
    assert all(entry["state"] == "built" and entry["stages_missing"] == [] for entry in status)
    report = result_of("audit", "dist/builds/tester/tiny-GPTQ/main")
    assert report["passed"] is True
    built_again = result_of("build", "recipe.yaml", "--device", "cpu")
    assert [entry["branch"] for entry in built_again["branches"]] == [*tiny_recipe.BRANCHES]


@pytest.mark.slow
def test_messages_go_to_standard_error_unless_quiet(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("packager.inputs.weights_digests._LONG_TO_HASH_BYTES", 1)
    talking = packager("publish", "recipe.yaml")
    assert re.match(r"comparing \d+\.\d\d [kM]B of finished files with their records\n", talking.stderr)
    assert "main: created at" in talking.stderr
    assert "main: created at" not in talking.stdout
    assert "Published in" in talking.stdout
    quiet = packager("publish", "recipe.yaml", "--quiet")
    assert (quiet.exit_code, quiet.stderr) == (0, "")
    assert "unchanged" in quiet.stdout
    quiet = packager("build", "recipe.yaml", "--quiet")
    assert (quiet.exit_code, quiet.stderr) == (0, "")
    assert "Perplexity" in quiet.stdout


def test_an_audit_s_verdict_is_its_exit_code(tmp_path: Path) -> None:
    folder = Checkpoint().write(tmp_path / "branch")
    edit_json(folder, "provenance.json", lambda record: record.update(model=Checkpoint().description()))
    passed = packager("audit", folder)
    assert (passed.exit_code, passed.stderr) == (0, "")
    (folder / "config.json").write_text("{")
    failed = packager("audit", folder, "--format", "json")
    assert (failed.exit_code, failed.stderr) == (7, "")
    assert json.loads(failed.stdout)["passed"] is False
    assert "json-damaged" in packager("audit", folder).stdout


def test_a_card_is_printed_to_the_byte(tiny: Path) -> None:
    result = packager("card", "recipe.yaml", "--branch", tiny_recipe.ACT_ORDER)
    folder = Path("dist/builds/tester/tiny-GPTQ") / tiny_recipe.ACT_ORDER
    assert result.stdout == (folder / "README.md").read_text()


@pytest.mark.parametrize(
    ("required", "status", "code"),
    [(True, "passed", 0), (True, "not run", 8), (False, "not run", 0), (False, "failed", 8)],
)
def test_the_exit_code_of_verify_depends_on_the_loaders(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, required: bool, status: str, code: int
) -> None:
    add_loaders(tiny)
    change = {"loader": "autogptq", "required": required, "status": status, "reason": ""}
    edit_receipt(tiny, "main", lambda receipt: receipt["provenance"].update(loaders=[change]))
    path = tiny / "dist" / "receipts" / tiny_recipe.REPOSITORY / "main.json"
    receipts = (Receipt.model_validate_json(path.read_bytes()),)
    monkeypatch.setattr("packager.pipeline.flow.reverify", lambda *_: receipts)
    assert packager("verify", "recipe.yaml").exit_code == code
    result = packager("verify", "recipe.yaml", "--format", "json")
    assert json.loads(result.stdout)["branches"]["main"][0]["status"] == status


# Status


@pytest.mark.parametrize("width", [80, 100, 200])
def test_the_status_table_fits_and_cuts_no_branch(tiny: Path, update_golden: bool, width: int) -> None:
    add_loaders(tiny)

    def change(receipt: dict[str, Any]) -> None:
        receipt["seconds"] = {"quantize": 61.4, "pack": 0, "evaluate": 0, "verify": 0}
        receipt["provenance"]["weights_bytes"] = 7_255_144_864
        receipt["provenance"]["quality"] |= {"perplexity": 5.4321, "kl_divergence": 0.01234}

    for branch in tiny_recipe.BRANCHES:
        edit_receipt(tiny, branch, change)
    text = status_text(tiny, width)
    assert max(map(len, text.splitlines())) <= width
    check_golden(f"cli/status_{width}.txt", "".join(f"{line.rstrip()}\n" for line in text.splitlines()), update_golden)


def test_every_figure_of_the_status_is_that_of_the_branch_s_receipt(tiny: Path) -> None:
    add_loaders(tiny)
    sizes = {"main": 7_255_144_864, tiny_recipe.ACT_ORDER: 12_345_678, tiny_recipe.THREE_BITS: 4_321}
    for index, (branch, size_bytes) in enumerate(sizes.items()):

        def change(receipt: dict[str, Any], index: int = index, size_bytes: int = size_bytes) -> None:
            receipt["seconds"] = {"quantize": 61 + index, "pack": 0.4, "evaluate": 0.3, "verify": 100}
            receipt["provenance"]["weights_bytes"] = size_bytes
            quality = {"perplexity": 5.43216 + index, "base_perplexity": 4.1, "kl_divergence": 0.0123456 * 10**-index}
            receipt["provenance"]["quality"] |= quality

        edit_receipt(tiny, branch, change)
    lines = [line.split() for line in status_text(tiny, 200).splitlines()]
    rows = {line[0]: [*line[1:5], line[-1]] for line in lines if line[0] in sizes}
    assert rows == {
        "main": ["7.26", "GB", "5.4322", "0.0123", "161.7"],
        tiny_recipe.ACT_ORDER: ["12.35", "MB", "6.4322", "0.00123", "162.7"],
        tiny_recipe.THREE_BITS: ["4.32", "kB", "7.4322", "0.000123", "163.7"],
    }


def test_a_narrow_table_folds_names_and_cuts_no_figure(tiny: Path) -> None:
    text = status_text(tiny, 50)
    assert max(len(line) for line in text.splitlines() if ":" not in line) <= 50
    assert "…" not in text


def test_an_edited_folder_hides_no_other_variant(tiny: Path) -> None:
    (tiny / "dist/builds/tester/tiny-GPTQ" / tiny_recipe.MAIN / "config.json").write_text("{}")
    shutil.rmtree(tiny / "dist/builds/tester/tiny-GPTQ" / tiny_recipe.THREE_BITS)
    states = read_status(RecipeFile.load(tiny / "recipe.yaml"), tiny_recipe.options(tiny / "dist"))
    assert [(entry.branch, entry.state) for entry in states] == [
        (tiny_recipe.MAIN, "edited"), (tiny_recipe.ACT_ORDER, "built"), (tiny_recipe.THREE_BITS, "not built"),
    ]  # fmt: skip
    assert "config.json was changed" in states[0].problem
    result = packager("status", "recipe.yaml")
    assert result.exit_code == 0
    assert "config.json was changed" in result.stdout
    assert [line.split()[:2] for line in result.stdout.splitlines() if line.startswith("main")] == [["main", "edited"]]


@pytest.mark.parametrize(
    ("old", "new", "shown"),
    [
        ('"num_samples": 12', '"num_samples": 11', "outdated"),  # other weights
        ('"num_tokens": 256', '"num_tokens": 224', "MB  outdated"),  # other measurements
        ('"tester"', '"somebody"', "0."),  # only the card
    ],
)
def test_status_does_not_show_figures_of_another_recipe(tiny: Path, old: str, new: str, shown: str) -> None:
    Path("recipe.yaml").write_text(Path("recipe.yaml").read_text().replace(old, new))
    row = next(line for line in packager("status", "recipe.yaml").stdout.splitlines() if line.startswith("main"))
    assert shown in " ".join(row.split()).replace(" MB ", " MB  ").replace(" kB ", " MB  ")


def test_every_figure_of_the_loaders_table_is_that_of_its_record(tiny: Path) -> None:
    def record(index: int) -> dict[str, Any]:
        figures = {"relative_error": 0.001234 + index / 100, "top1_agreement": 0.99876 - index / 10}
        counts = {"tokens_generated": 39 + index, "tokens_equal": 30 - index}
        return {"loader": "autogptq", "required": True, "status": "passed"} | figures | counts

    def give_records(branch: str, records: list[dict[str, Any]]) -> None:
        edit_receipt(tiny, branch, lambda receipt: receipt["provenance"].update(loaders=records))

    folder = tiny / "dist" / "receipts" / tiny_recipe.REPOSITORY
    receipts = []
    for index, branch in enumerate(tiny_recipe.BRANCHES):
        give_records(branch, [record(index)])
        receipts.append(Receipt.model_validate_json((folder / f"{branch}.json").read_bytes()))
    stream = io.StringIO()
    print_loaders(receipts, Console(file=stream, width=120))
    rows = [line.split() for line in stream.getvalue().splitlines() if "autogptq" in line]
    assert rows == [
        [tiny_recipe.MAIN, "autogptq", "ok", "0.00123", "0.999", "30/39"],
        [tiny_recipe.ACT_ORDER, "autogptq", "ok", "0.01123", "0.899", "29/40"],
        [tiny_recipe.THREE_BITS, "autogptq", "ok", "0.02123", "0.799", "28/41"],
    ]


def test_the_loaders_table_gives_each_reason_once(tiny: Path) -> None:
    add_loaders(tiny)
    folder = tiny / "dist" / "receipts" / tiny_recipe.REPOSITORY
    receipts = [Receipt.model_validate_json((folder / f"{name}.json").read_bytes()) for name in tiny_recipe.BRANCHES]
    stream = io.StringIO()
    print_loaders(receipts, Console(file=stream, width=80))
    text = stream.getvalue()
    assert text.count("needs a CUDA device") == 1
    assert text.count("39/39") == 2 * len(receipts)
    assert "autogptq: float32 on cpu, some.package.TorchLinear" in text


# Release


def test_a_recipe_too_large_for_this_machine_is_left_out_with_the_reason(tmp_path: Path) -> None:
    dist = tmp_path / "dist"
    result = packager("release", LARGE, "--dist", dist, "--device", "cpu")
    assert result.exit_code == 0
    assert TOO_LARGE.fullmatch(result.stdout)
    assert not dist.exists()
    strict = packager("release", LARGE, "--dist", dist, "--device", "cpu", "--strict")
    assert (strict.exit_code, strict.stdout) == (12, "")
    assert "needs a CUDA GPU with" in strict.stderr
    assert not dist.exists()


def test_a_base_install_builds_nothing_and_names_the_missing_packages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lacking() -> None:
        raise MachineError("building needs packages that are not installed", why="missing: torch")

    monkeypatch.setattr("packager.pipeline.release.require_build_extra", lacking)
    result = packager("release", DEMO, "--dist", tmp_path / "dist")
    assert result.exit_code == 0
    assert result.stdout == f"{DEMO}: not built: building needs packages that are not installed (missing: torch)\n"


def table_rows(text: str) -> dict[str, list[str]]:
    """Return the cells of the last table by its first column: the recipe's file."""
    lines = text.rstrip().splitlines()
    start = max(index for index, line in enumerate(lines) if line.startswith("Recipe"))
    return {cells[0]: cells[1:] for line in lines[start + 2 :] if len(cells := re.split(r"\s{2,}", line.rstrip())) > 1}


@pytest.mark.slow
def test_a_release_publishes_the_built_recipes_and_reports_the_others(tiny: Path) -> None:
    result = packager("release", "recipe.yaml", LARGE, "--device", "cpu")
    assert result.exit_code == 0, result.stderr
    assert "nothing to do" in result.stderr
    assert "Perplexity" in result.stdout
    rows = table_rows(result.stdout)
    assert rows["recipe.yaml"][:2] == [tiny_recipe.REPOSITORY, "published"]
    assert rows[LARGE][1] == "not built"
    assert "needs a CUDA GPU with" in rows[LARGE][2]
    assert tiny_recipe.hub_folder(Path("dist")).is_dir()


def bad_recipes(tiny: Path) -> list[str]:
    """Write recipes that are wrong in different ways: no file, a key, a plan, a repository of another recipe."""
    tiny_recipe.write_recipe(tiny, {"card.titel": "x"}, name="key.yaml")
    tiny_recipe.write_recipe(
        tiny, {"repository.id": "a/plan", "variants": [{"branch": "main", "group_size": 7}]}, name="plan.yaml"
    )
    tiny_recipe.write_recipe(tiny, {"repository.id": "a/same", "calibration.seed": 1}, name="one.yaml")
    tiny_recipe.write_recipe(tiny, {"repository.id": "a/SAME", "calibration.seed": 2}, name="two.yaml")
    return ["nowhere.yaml", "key.yaml", "plan.yaml", "one.yaml", "two.yaml"]


@pytest.mark.slow
def test_recipes_that_fail_do_not_stop_the_others(tiny: Path) -> None:
    bad = bad_recipes(tiny)
    result = packager("release", *bad, "recipe.yaml", "--device", "cpu")
    assert result.exit_code == 10  # two of one repository; the others are 2
    rows = table_rows(result.stdout)
    assert list(rows) == [*bad, "recipe.yaml"]
    assert all(("published" if name == "recipe.yaml" else "failed") in cells for name, cells in rows.items())
    assert result.stderr.count("error:") == len(bad)
    assert "did you mean" in result.stderr
    answer = json.loads(packager("release", *bad, "recipe.yaml", "--format", "json", "--device", "cpu").stdout)[
        "recipes"
    ]
    assert [each["exit_code"] for each in answer] == [2, 2, 2, 10, 10, 0]
    assert [each["result"] for each in answer] == [*["failed"] * 5, "published"]


@pytest.mark.parametrize("option", ["--strict", "--fail-fast"])
def test_a_wrong_recipe_ends_a_strict_release_before_anything_is_built(tiny: Path, option: str) -> None:
    result = packager("release", "recipe.yaml", "nowhere.yaml", option)
    assert result.exit_code == RecipeError.exit_code
    assert table_rows(result.stdout)["recipe.yaml"][1] == "not reached"
    assert not tiny_recipe.hub_folder(Path("dist")).exists()


def test_a_strict_release_reports_every_wrong_recipe(tiny: Path) -> None:
    tiny_recipe.write_recipe(tiny, {"card.titel": "x"}, name="key.yaml")
    result = packager("release", "nowhere.yaml", "recipe.yaml", "key.yaml", LARGE, "--strict", "--device", "cpu")
    assert result.exit_code == RecipeError.exit_code
    assert result.stderr.count("error:") == 2
    outcomes = table_rows(result.stdout)
    assert ["failed" in outcomes[name] for name in ("nowhere.yaml", "key.yaml")] == [True, True]
    assert (outcomes["recipe.yaml"][1], outcomes[LARGE][1]) == ("not reached", "not built")
    assert not tiny_recipe.hub_folder(Path("dist")).exists()


@pytest.mark.parametrize(("option", "last"), [((), "failed"), (("--fail-fast",), "not reached")])
def test_a_build_that_fails_ends_the_run_only_if_asked(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, option: tuple[str, ...], last: str
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise StateError("no")

    tiny_recipe.write_recipe(tiny, {"repository.id": "a/other"}, name="other.yaml")
    monkeypatch.setattr("packager.pipeline.release.build", fail)
    result = packager("release", "recipe.yaml", "other.yaml", LARGE, "--device", "cpu", *option)
    assert result.exit_code == StateError.exit_code
    rows = table_rows(result.stdout)
    assert (rows["recipe.yaml"][1], rows["other.yaml"][1], rows[LARGE][1]) == ("failed", last, "not built")


def test_a_path_that_one_build_cannot_use_fails_that_recipe_alone(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(recipe_file: RecipeFile, *_: object) -> None:
        if recipe_file.path.name == "recipe.yaml":
            raise PermissionError(13, "Permission denied", "dist/receipts/a/main.json")
        raise StateError("no")

    tiny_recipe.write_recipe(tiny, {"repository.id": "a/other"}, name="other.yaml")
    monkeypatch.setattr("packager.pipeline.release.build", refused)
    done = packager("release", "recipe.yaml", "other.yaml", "--device", "cpu", "--format", "json")
    first, second = json.loads(done.stdout)["recipes"]
    assert (first["result"], first["exit_code"]) == ("failed", MachineError.exit_code)
    assert first["why"] == "dist/receipts/a/main.json: cannot be used"
    assert (second["result"], second["exit_code"]) == ("failed", StateError.exit_code)
    assert done.exit_code == MachineError.exit_code


def test_a_mistake_of_ours_is_a_failure_and_no_interruption(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def mistaken(*_: object) -> None:
        raise ValueError("first\nsecond")

    monkeypatch.setattr("packager.pipeline.release.build", mistaken)
    done = packager("release", "recipe.yaml", "--device", "cpu", "--format", "json")
    (result,) = json.loads(done.stdout)["recipes"]
    assert isinstance(done.exception, ValueError)
    assert (result["result"], result["exit_code"], result["why"]) == ("failed", 1, "ValueError: first")


def test_an_interrupted_run_says_how_far_it_came(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    tiny_recipe.write_recipe(tiny, {"repository.id": "a/other"}, name="other.yaml")
    monkeypatch.setattr("packager.pipeline.release.build", interrupt)
    result = packager("release", "recipe.yaml", "other.yaml", "--device", "cpu")
    assert result.exit_code == 130
    rows = table_rows(result.stdout)
    assert (rows["recipe.yaml"][1], rows["other.yaml"][1]) == ("interrupted", "not reached")


# Terminal


def test_off_a_terminal_every_step_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    terminal = Terminal()
    with terminal.stage("quantize") as stage, terminal.bar(2) as bar:
        bar.step("a :smile: [b]name[/b] " + "x" * 100)
        bar.step("second")
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert captured.out == ""
    assert len(lines) == 3
    assert lines[0].startswith("  [1/2] a :smile: [b]name[/b] xxx")
    assert "left" not in lines[0], "nothing says yet how long a step takes"
    assert lines[1] == "  [2/2] second, 0 s left"
    assert lines[2].startswith("quantize")
    assert stage.seconds > 0


def test_a_quiet_terminal_prints_errors_only(capsys: pytest.CaptureFixture[str]) -> None:
    terminal = Terminal(quiet=True)
    with terminal.stage("quantize"), terminal.bar(1) as bar:
        bar.step("first")
    terminal.error(StateError("edited", where="dist"))
    assert capsys.readouterr() == ("", "error: dist: edited\n")


def test_a_bar_on_a_terminal_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    stream = io.StringIO()
    terminal.err = Console(file=stream, force_terminal=True, width=100)
    with terminal.bar(2) as bar:
        bar.step("first")
        assert bar.progress is not None
        assert bar.progress.tasks[0].completed == 1
        bar.step("second")
    assert "2/2" in stream.getvalue()


def test_a_stage_without_steps_moves_and_gives_way_to_what_is_within(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    stream = io.StringIO()
    terminal.err = Console(file=stream, force_terminal=True, width=100)

    def moving(text: str) -> bool:
        """Return whether a line with the text is drawn, and drawn anew without another step."""
        drawn = terminal._moving
        assert drawn is not None
        (task,) = drawn.tasks
        before = stream.tell()
        for _ in range(100):
            if stream.tell() > before:
                break
            time.sleep(0.02)
        return drawn.live.is_started and task.description == text and text in stream.getvalue()[before:]

    with terminal.stage("verify"):
        assert moving("verify")
        terminal.log("autogptq: creating its environment")
        with terminal.busy("hashing the base model"):
            assert moving("hashing the base model")
        assert moving("verify")
        outer: Any = terminal._moving
        with terminal.bar(1) as bar:
            assert not outer.live.is_started, "one line moves at a time"
            bar.step("first")
        assert moving("verify")
    assert not outer.live.is_started
    assert "creating its environment" in stream.getvalue()


@pytest.mark.parametrize("size", ["0", "12", "999MB"])
def test_a_gpu_memory_below_1_gb_is_refused(size: str) -> None:
    with pytest.raises(typer.BadParameter, match="such as 12GB"):
        read_size(size)
    assert read_size("1GB") == 10**9
