"""Every command speaks alike: its options, its JSON, its errors, its log as events."""

import io
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import typer.main
from typer.testing import CliRunner, Result

from packager.cli.main import app
from packager.cli.step_summary import add_step_summary, branches_markdown, results_markdown
from packager.cli.voice import begin, error_json
from packager.errors import Problem, RecipeError, SourceError
from packager.pipeline.many_recipes import RecipeResult
from packager.pipeline.status import read_status
from packager.receipt import LoaderRecord
from packager.recipe.file import RecipeFile
from packager.recipe.schema import recipe_schema, schema_text
from packager.system.events import EVENT_KEYS, event_line, event_schema
from packager.system.terminal import Terminal
from tests import tiny_recipe
from tests.test_house_rules import ROOT

DEMO = str(ROOT / "recipes" / "demo-llama.yaml")
GROUP: Any = typer.main.get_command(app)
COMMANDS: dict[str, Any] = dict(GROUP.commands)
SHARED = ("--dist", "--cache", "--device", "--sign-key", "--quiet", "--color", "--recipes", "--set", "--only")
# One wrong word after each command that makes it fail before it does anything.
FAILING = {
    "init": ["nowhere/model", "--yes", "--license", "x"], "lock": ["nowhere.yaml"], "plan": ["nowhere.yaml"],
    "build": ["nowhere.yaml"], "audit": ["nowhere"], "verify": ["nowhere.yaml"], "card": ["nowhere.yaml"],
    "fix": ["nowhere", "-o", "new"],
    "diff": ["nowhere.yaml"], "compat": ["nowhere.yaml"], "report": ["nowhere.yaml"], "choose": ["./nowhere"],
    "publish": ["nowhere.yaml"], "verify-published": ["./nowhere"], "rollback": ["./nowhere"],
    "status": ["nowhere.yaml"], "release": ["nowhere.yaml", "--fail-fast"], "doctor": ["--cache"],
    "schema": ["nothing"], "queue": ["nowhere.yaml", "--open"],
}  # fmt: skip


def packager(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_the_same_options_for_output(name: str) -> None:
    options = {option: each for each in COMMANDS[name].params for option in (*each.opts, *each.secondary_opts)}
    assert {"--format", "--quiet", "-q", "--verbose", "-v", "--color"} <= options.keys()
    assert options["-q"] is options["--quiet"]
    assert options["-v"] is options["--verbose"]
    text = " ".join(packager(name, "--help").stdout.split())
    for option in ("--format <text|json", "--color <auto|always|never>", "-q, --quiet", "-v, --verbose"):
        assert option in text.replace("[", "<").replace("]", ">"), option
    # An option has one meaning everywhere, and so one help.
    for other in COMMANDS.values():
        for each in other.params:
            for option in {"--dist", "--cache", "--device", "--sign-key", "--quiet", "--color", "--recipes"} & set(
                each.opts
            ):
                assert option not in options or options[option].help == each.help, option


@pytest.mark.parametrize("name", FAILING)
def test_every_command_fails_in_json_with_one_error_and_an_exit_code(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert FAILING.keys() == COMMANDS.keys()
    done = packager(name, "--format", "json", "-q", *FAILING[name])
    assert done.exit_code not in (0, 1), done.stderr
    answer = json.loads(done.stdout)
    assert answer["schema_version"] == 1
    if name == "release":  # its results say it
        (result,) = answer["recipes"]
        assert (result["exit_code"], result["result"]) == (done.exit_code, "failed")
        return
    error = answer["error"]
    assert error["exit_code"] == done.exit_code
    assert all(isinstance(error[key], str) for key in ("code", "what", "where", "why", "hint"))
    assert error["what"] in done.stderr.replace("\n", " ")
    assert not list(tmp_path.iterdir())


def test_the_error_of_a_recipe_lists_its_problems() -> None:
    problem = Problem(where="a.yaml:1:2", message="wrong", hint="right")
    answer = error_json(RecipeError("the recipe a.yaml has one problem", [problem]))
    assert answer["problems"] == [{"where": "a.yaml:1:2", "what": "wrong", "hint": "right"}]
    assert "problems" not in error_json(SourceError("x"))


def test_a_command_forgets_how_the_one_before_spoke() -> None:
    assert packager("plan", "nowhere.yaml", "--format", "json").stdout
    assert packager("plan", "nowhere.yaml").stdout == ""
    begin([])


def test_verbose_names_the_place_and_quiet_is_silent(tmp_path: Path) -> None:
    Path(tmp_path / "base.yaml").write_text("{}")
    Path(tmp_path / "a.yaml").write_text("extends: base.yaml")
    files = [str(tmp_path / name) for name in ("a.yaml", "base.yaml")]
    said = packager("plan", *files, "-v").stderr
    assert re.match(r"\[ +\d+\.\d s\] .*base.yaml is no recipe", said)
    assert "packager.errors.RecipeError" in said
    assert "no recipe" not in packager("plan", *files, "-q").stderr
    assert "RecipeError" not in packager("plan", *files).stderr


@pytest.mark.parametrize(("color", "colored"), [("always", True), ("never", False), ("auto", False)])
def test_color_off_a_terminal(color: str, colored: bool) -> None:
    done = packager("plan", "nowhere.yaml", "--color", color)
    assert ("\x1b[" in done.stderr) is colored


# The schema


def test_the_schema_is_printed_and_named() -> None:
    assert packager("schema").stdout == schema_text()
    assert recipe_schema()["$id"] == "urn:gptq-packager:recipe-schema:1"
    assert json.loads(packager("schema", "events").stdout) == event_schema()
    jsonschema.Draft202012Validator.check_schema(event_schema())


def test_patterns_are_of_both_dialects() -> None:
    patterns = set(re.findall(r'"pattern": "((?:[^"\\]|\\.)*)"', schema_text()))
    assert len(patterns) > 8
    for pattern in (json.loads(f'"{each}"') for each in patterns):
        re.compile(pattern)
        # With the flag u, ECMA-262 knows these escapes alone; Python's (?P<..>), \A and \Z are no part of it.
        escapes = set(re.findall(r"\\(.)", pattern))
        assert escapes <= set("^$\\.*+?()[]{}|/dDsSwWbBnrtfvxu-"), pattern
        assert "(?" not in pattern


# Events


def events(text: str) -> list[dict[str, Any]]:
    validator = jsonschema.Draft202012Validator(event_schema())
    found = [json.loads(line) for line in text.splitlines()]
    for event in found:
        validator.validate(event)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("command", ["build", "release"])
def test_the_log_is_one_event_a_line(
    command: str, builds: tiny_recipe.Builds, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    builds.copy(tmp_path / "tiny")
    monkeypatch.chdir(tmp_path / "tiny")
    tiny_recipe.write_recipe(Path(), {"evaluation.num_tokens": 128})
    done = packager(command, "nowhere.yaml", "recipe.yaml", "--device", "cpu", "--log-format", "json")
    found = events(done.stderr)
    assert {event["event"] for event in found} == EVENT_KEYS.keys()
    (error,) = [event for event in found if event["event"] == "error"]
    assert (error["code"], error["exit_code"], done.exit_code) == ("RecipeError", 2, 2)
    steps = [event for event in found if event["event"] == "step"]
    assert {event["stage"] for event in steps} == {"evaluate"}
    assert [event["done"] for event in steps] == list(range(1, steps[0]["total"] + 1))
    started = [event["stage"] for event in found if event["event"] == "stage_started"]
    assert sorted(started) == sorted(event["stage"] for event in found if event["event"] == "stage_finished")


def test_an_event_with_other_keys_is_no_event() -> None:
    validator = jsonschema.Draft202012Validator(event_schema())
    line = json.loads(event_line("message", {"text": "a\nb"}))
    assert list(validator.iter_errors(line)) == []
    assert list(validator.iter_errors(line | {"more": 1}))
    assert list(validator.iter_errors(line | {"event": "other"}))
    assert "\n" not in event_line("message", {"text": "a\nb"})


class Gone(io.StringIO):
    """A pipe that nobody reads any more."""

    def write(self, _: str) -> int:
        raise BrokenPipeError


def test_whoever_reads_the_events_may_go(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal(events=True)
    monkeypatch.setattr(sys, "stderr", Gone())
    terminal.log("nobody reads this")
    with terminal.stage("quantize"), terminal.bar(1) as bar:
        bar.step("nor this")


def test_a_table_of_the_log_is_messages(capsys: pytest.CaptureFixture[str]) -> None:
    terminal = Terminal(events=True)
    terminal.err.print("a\n\nb  ")
    terminal.err.print("c")
    assert [event["text"] for event in events(capsys.readouterr().err)] == ["a", "b", "c"]
    Terminal(events=True, quiet=True).log("not said")
    assert capsys.readouterr().err == ""


# The summary of a CI job


RESULTS = (
    RecipeResult(path=Path("a.yaml"), repository="x/a", outcome="published", seconds=1.25),
    RecipeResult(path=Path("b.yaml"), outcome="failed", why="it | was <b>wrong</b>\x1b[2J", exit_code=3),
)


def test_the_summary_is_a_table_that_no_text_can_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    summary = tmp_path / "summary.md"
    summary.write_text("before\n")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(summary))
    text = results_markdown("Release", RESULTS)
    add_step_summary(lambda: text, said.append)
    assert summary.read_text() == f"before\n{text}"
    rows = text.splitlines()[2:]
    assert len({len(re.findall(r"(?<!\\)\|", row)) for row in rows}) == 1
    assert "\\<b>" in rows[-1]
    assert rows[-1].isprintable()
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path))
    add_step_summary(lambda: text, said.append)
    assert "cannot be written" in said[0]
    monkeypatch.delenv("GITHUB_STEP_SUMMARY")
    add_step_summary(lambda: str(1 // 0), said.append)
    assert len(said) == 1


def test_a_build_adds_its_branches_or_its_failure_to_the_summary(
    builds: tiny_recipe.Builds, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = builds.copy(tmp_path)
    summary = tmp_path / "summary.md"
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(summary))
    options = ["--dist", str(tmp_path / "dist"), "--device", "cpu"]
    assert CliRunner().invoke(app, ["build", str(recipe), *options]).exit_code == 0
    lines = summary.read_text().splitlines()
    assert lines[0] == f"## Built: {tiny_recipe.REPOSITORY}"
    assert [line.split(" | ")[0] for line in lines[4:]] == [
        f"| {branch.replace('_', chr(92) + '_')}" for branch in tiny_recipe.BRANCHES
    ]
    assert re.fullmatch(r"\| main \| \S+ kB \| \d+\.\d{4} \| \S+ \|  \| \d+\.\d \|", lines[4]), lines[4]
    summary.unlink()
    recipe.write_text("schema_version: 1\n")
    assert CliRunner().invoke(app, ["build", str(recipe), *options]).exit_code == 2
    assert summary.read_text().startswith("## Build\n")
    assert "| failed |" in summary.read_text()


def test_the_branches_of_a_summary_have_the_reasons_below(builds: tiny_recipe.Builds, tmp_path: Path) -> None:
    recipe_file = RecipeFile.load(builds.built() / "recipe.yaml")
    (status, *_) = read_status(recipe_file, tiny_recipe.options(builds.built() / "dist"))
    assert status.receipt is not None
    record = LoaderRecord(loader="vllm", required=False, status="not run", reason="no | <b>GPU</b>")
    provenance = status.receipt.provenance.model_copy(update={"loaders": (record,)})
    failed = replace(status, receipt=status.receipt.model_copy(update={"provenance": provenance}))
    assert branches_markdown("x", [failed]).endswith("\n\n- vllm not run: no \\| \\<b>GPU\\</b>\n")


# Completion


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["packager", "ver"], {"verify", "verify-published"}),
        (["packager", "plan", "--res"], {"--resolved"}),
        (["packager", "build", "--device", "c"], {"cpu", "cuda"}),
    ],
)
def test_the_shell_completes(words: list[str], expected: set[str]) -> None:
    environ = {
        **os.environ, "_PACKAGER_COMPLETE": "complete_bash", "COMP_WORDS": "\n".join(words),
        "COMP_CWORD": str(len(words) - 1),
    }  # fmt: skip
    code = "from packager.cli.main import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environ, text=True, capture_output=True, check=False
    )
    assert set(done.stdout.split()) == expected, done.stderr
