"""Loaders of other packages: the example of docs/, as pip installs it, in a build; and what can be wrong with one."""

import importlib
import json
import re
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from packager.cli.main import app
from packager.errors import LoaderError, LoaderUnavailableError, RecipeError
from packager.pipeline.plan import make_plan
from packager.prove import other_loader
from packager.prove.environments import RuntimeContext, ensure_environment
from packager.prove.other_loader import GROUP_OF_LOADERS, installed_loaders, loader_spec, other_verdicts
from packager.prove.probes import ProbeJob, run_probe
from packager.recipe.file import RecipeFile
from tests import tiny_recipe
from tests.installed_example import EXAMPLES, install_example
from tests.tiny_recipe import ACT_ORDER, MAIN, REPOSITORY, THREE_BITS

ACME = "plugin:acme"
NAMED = {"loaders": {"required": [], "if_available": [ACME], "prompts": ["old bird"]}}
MORE = ("bare = acme_loader:bare", "gone = acme_loader:gone", "none = acme_loader:Path", "odd = acme_loader:odd")
# Loaders that the example does not have: one without rules, and one that a test spoils.
OTHERS = """

from dataclasses import replace

SPOILED = {}


def bare():
    return replace(acme(), rules=())


def odd():
    return replace(acme(), **SPOILED)
"""


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    folder = install_example("loader", GROUP_OF_LOADERS, tmp_path / "site", monkeypatch, MORE)
    with (folder / "__init__.py").open("a") as stream:
        stream.write(OTHERS)
    other_loader._installed.cache_clear()
    yield folder
    other_loader._installed.cache_clear()


def records_of(recipe: Path) -> dict[str, Any]:
    receipts = recipe.parent / "dist" / "receipts" / REPOSITORY
    found = {}
    for branch in tiny_recipe.BRANCHES:
        (found[branch],) = json.loads((receipts / f"{branch}.json").read_text())["provenance"]["loaders"]
    return found


@pytest.mark.slow
def test_a_build_proves_its_variants_in_the_loader_of_another_package(
    builds: tiny_recipe.Builds, installed: Path, tmp_path: Path
) -> None:
    recipe = builds.copy(tmp_path / "tiny")
    tiny_recipe.write_recipe(recipe.parent, NAMED)
    words = [str(recipe), "--dist", str(recipe.parent / "dist")]
    done = CliRunner().invoke(app, ["build", *words, "--cache", str(tmp_path / "cache"), "--device", "cpu"])
    assert done.exit_code == 0, done.output
    records = records_of(recipe)
    for branch in (MAIN, ACT_ORDER):
        record = records[branch]
        assert (record["status"], record["kernel"]) == ("passed", "acme_probe.Llama"), record
        assert record["loader"] == ACME
        assert record["relative_error"] < 1e-5
        assert record["tokens_equal"] == record["tokens_generated"] > 0
        assert (
            record["confinement"] == RuntimeContext(cache=tmp_path, scratch=tmp_path, environ={}, log=print).confinement
        )  # as every loader's on this machine
    assert (records[THREE_BITS]["status"], records[THREE_BITS]["reason"]) == ("refused", "reads 2, 4, 8 bits only")
    card = CliRunner().invoke(app, ["card", *words]).stdout
    assert "acme (of another package)" in card
    assert "kernel acme_probe.Llama, " in " ".join(card.replace("\\", "").split())
    page = tmp_path / "report.html"
    report = CliRunner().invoke(app, ["report", *words, "--output", str(page)])
    assert report.exit_code == 0, report.output
    assert "acme_probe.Llama" in page.read_text(encoding="utf-8")
    assert ACME in page.read_text(encoding="utf-8")
    status = CliRunner().invoke(app, ["status", *words, "--format", "json"])
    assert ACME in status.stdout
    again = CliRunner().invoke(app, ["build", *words, "--cache", str(tmp_path / "cache"), "--device", "cpu"])
    assert "nothing to do" in again.output
    script = installed / "acme_probe.py"
    script.write_text(f"{script.read_text()}# another version\n")
    behind = CliRunner().invoke(app, ["status", *words, "--format", "json"]).stdout
    assert behind.count('"stages_missing": []') == 0, "another probe is another proof"
    assert status.stdout.count('"stages_missing": []') == len(tiny_recipe.BRANCHES)


def test_a_plan_has_the_verdicts_of_the_package(installed: Path, tmp_path: Path) -> None:
    changes = {"loaders": {"required": ["plugin:bare"], "if_available": [ACME]}}
    recipe = tiny_recipe.write_all(tmp_path, changes)
    found = {
        planned.variant.branch: {verdict.loader: verdict for verdict in planned.verdicts}
        for planned in make_plan(RecipeFile.load(recipe)).variants
    }
    own = {branch: verdicts[ACME] for branch, verdicts in found.items()}
    assert [(own[branch].status, own[branch].is_tried) for branch in (MAIN, THREE_BITS)] == [
        ("loads", True),
        ("refused", False),
    ]
    unknown = found[MAIN]["plugin:bare"]
    assert (unknown.status, unknown.is_tried) == ("unknown", True), "a required loader without rules is run, too"
    as_json = json.loads(CliRunner().invoke(app, ["plan", str(recipe), "--format", "json"]).stdout)
    statuses = {each["loader"]: each["status"] for each in as_json["variants"][0]["loaders"]}
    assert (statuses["plugin:bare"], statuses[ACME]) == ("unknown", "loads")
    shown = CliRunner().invoke(app, ["plan", str(recipe)]).stdout
    words = " ".join(shown.split())
    assert "no: acme (of another package) for three-bits: reads 2, 4, 8 bits only" in words
    assert "unknown: bare (of another package): its package has no rules, so only the run tells" in words


def test_a_required_loader_whose_own_rules_refuse_a_variant_ends_the_plan(installed: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe.write_all(tmp_path, {"loaders": {"required": [ACME]}})
    done = CliRunner().invoke(app, ["plan", str(recipe)])
    assert done.exit_code == 2
    assert "three-bits: the required loader plugin:acme reads 2, 4, 8 bits only" in done.output


@pytest.mark.parametrize(
    ("name", "kind", "why"),
    [
        ("nobody", LoaderUnavailableError, r"no installed package has the loader nobody.*acme, bare, gone, none, odd"),
        ("gone", LoaderError, r"acme_loader:gone.*the loader gone of another package.*AttributeError"),
        ("none", LoaderError, r"acme_loader:Path.*TypeError: a PosixPath was returned"),
    ],
)
def test_what_is_no_loader_is_named(installed: Path, name: str, kind: type[LoaderError], why: str) -> None:
    with pytest.raises(kind) as caught:
        loader_spec(f"plugin:{name}")
    assert re.search(why, str(caught.value), re.DOTALL), str(caught.value)


def raises(*_: object) -> str:
    raise RuntimeError("the rule's own mistake")


def ends(*_: object) -> str:
    sys.exit(0)


HERE = EXAMPLES / "loader" / "acme_loader"
SPOILED: dict[str, tuple[dict[str, object], str]] = {
    "a script that is not there": ({"script": HERE / "gone.py"}, "script: there is no file"),
    "no path": ({"script": None}, "AttributeError"),
    "a lock's name": ({"lock": HERE / "acme_probe.py"}, "lock: acme_probe.py is no name"),
    "a title of two lines": ({"title": "a\nb"}, "title: no line of text"),
    "a version that hides": ({"version": "1\u202e0"}, "version: no line of text"),
    "no device": ({"devices": frozenset()}, "devices: cpu, cuda or both"),
    "another device": ({"devices": {"tpu"}}, "devices: cpu, cuda or both"),
    "a Python": ({"requires_python": "new"}, "InvalidSpecifier"),
    "a rule": ({"rules": ("no",)}, "rules: only those of packager.model.rules"),
}


@pytest.mark.parametrize("name", SPOILED)
def test_what_a_loader_says_wrongly_is_named(installed: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    values, why = SPOILED[name]
    monkeypatch.setattr(importlib.import_module("acme_loader"), "SPOILED", values)
    with pytest.raises(LoaderError) as caught:
        loader_spec("plugin:odd")
    assert "the loader odd of another package is broken" in caught.value.what
    assert caught.value.where == "acme_loader:odd"
    assert why in caught.value.why


@pytest.mark.parametrize("line", ["numpy", "numpy==2.0", "-r other.txt", "numpy @ https://example.org/numpy.whl"])
def test_a_lock_that_pins_nothing_by_digest_is_refused(installed: Path, line: str) -> None:
    (installed / "acme.txt").write_text(f"{line}\n")
    with pytest.raises(LoaderError, match="a lock of packages is not valid"):
        loader_spec(ACME)


@pytest.mark.parametrize(
    "check", [raises, ends, lambda *_: "\x1b[2J", lambda *_: 7], ids=["raises", "ends", "controls", "no text"]
)
def test_a_rule_that_fails_is_named(
    installed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, check: Callable[..., Any]
) -> None:
    acme_loader = importlib.import_module("acme_loader")
    rules = (acme_loader.ACME.refuses(check, "somewhere", "nothing"),)
    monkeypatch.setattr(acme_loader, "SPOILED", {"rules": rules})
    recipe = tiny_recipe.write_all(tmp_path, {"loaders": {"if_available": ["plugin:odd"]}})
    done = CliRunner().invoke(app, ["plan", str(recipe)])
    assert done.exit_code == LoaderError.exit_code
    assert "the loader odd of another package is broken: a rule fails" in done.stderr
    assert "Traceback" not in done.output


HOSTILE = """
import json, os, pathlib, socket, sys
job = json.loads(pathlib.Path(sys.argv[1]).read_text())
seen = {}
for name, attempt in {
    "variable": lambda: os.environ["HF_TOKEN"],
    "home": lambda: pathlib.Path(SECRET).read_text(),
    "network": lambda: socket.create_connection(("127.0.0.1", PORT), 2),
    "write": lambda: pathlib.Path(job["model_dir"], "model.safetensors").write_bytes(b""),
    "package": lambda: pathlib.Path(__file__).write_text(""),
}.items():
    try:
        attempt()
        seen[name] = "done"
    except Exception as error:
        seen[name] = type(error).__name__
print(json.dumps(seen), file=sys.stderr, flush=True)
os._exit(7)
"""


@pytest.mark.slow
def test_the_probe_of_another_package_is_confined(
    installed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret, model = tmp_path / "secret", tmp_path / "model"
    secret.write_text("x")
    model.mkdir()
    (model / "model.safetensors").write_bytes(b"weights")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        text = HOSTILE.replace("SECRET", repr(str(secret))).replace("PORT", str(port))
        (installed / "acme_probe.py").write_text(text)
        environ = {"PATH": "/usr/bin:/bin", "HF_TOKEN": "hf_secret"}
        context = RuntimeContext(cache=tmp_path / "cache", scratch=tmp_path, environ=environ, log=print)
        job = ProbeJob(
            model_dir=model, device="cpu", input_ids=[[1, 2]], prompts=[], max_new_tokens=1, vocab_size=4,
            output_dir=tmp_path / "out",
        )  # fmt: skip
        spec = loader_spec(ACME)
        with pytest.raises(LoaderError) as caught:
            run_probe(spec, ensure_environment(spec, context), job, 30.0, context)
    assert caught.value.what == "plugin:acme did not finish"
    seen = json.loads(caught.value.why.splitlines()[-1])
    assert seen["variable"] == "KeyError"
    assert context.confinement == "none" or "done" not in seen.values(), seen
    assert (model / "model.safetensors").read_bytes() == b"weights" or context.confinement == "none"


@pytest.mark.parametrize("name", ["plugin:", "plugin:../x", "plugin:a b", "plugins:acme", "Plugin:acme", "acme"])
def test_a_name_that_is_no_loader_s_is_a_mistake_of_the_recipe(tmp_path: Path, name: str) -> None:
    recipe = tiny_recipe.write_all(tmp_path, {"loaders": {"required": [name]}})
    with pytest.raises(RecipeError, match=r"loaders\.required"):
        RecipeFile.load(recipe)


def test_only_what_a_recipe_names_is_looked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(other_loader, "entry_points", raises)
    plan = make_plan(RecipeFile.load(tiny_recipe.write_all(tmp_path)))
    variant = plan.variants[0].variant
    assert other_verdicts(["autogptq", "onnxruntime"], variant, plan.architecture) == ()
    assert loader_spec("transformers").name == "transformers"


def test_doctor_lists_the_installed_ones_and_says_what_is_wrong(installed: Path, tmp_path: Path) -> None:
    assert installed_loaders() == tuple(f"plugin:{name}" for name in ("acme", "bare", "gone", "none", "odd"))
    done = CliRunner().invoke(
        app, ["doctor", "--cache", str(tmp_path / "cache"), "--format", "json"], env={"HF_HUB_OFFLINE": "1"}
    )
    checks = {each["name"]: each for each in json.loads(done.stdout)["checks"]}
    assert checks[ACME]["found"].startswith("Acme 1.0: environment not made yet")
    assert "the loader gone of another package is broken" in checks["plugin:gone"]["found"]


def test_the_page_has_the_example_s_own_lines() -> None:
    page = (EXAMPLES.parent / "how-to" / "own-loader.md").read_text(encoding="utf-8")
    pyproject = (EXAMPLES / "loader" / "pyproject.toml").read_text(encoding="utf-8")
    for block in re.findall(r"```toml\n(.*?)```", page, re.DOTALL):
        assert block in pyproject
