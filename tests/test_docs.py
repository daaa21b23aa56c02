"""The documentation: reference pages in step with the code, links that resolve, commands that exist."""

import ast
import importlib.util
import io
import re
import shlex
import shutil
import tokenize
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest
from typer.testing import CliRunner

from packager.cli.main import app
from packager.model.architecture import LinearSpec
from packager.model.checkpoint import PORTABLE_KEYS, PORTABLE_PARAMETERS, quantized_tensors
from packager.model.runtimes import RUNTIMES
from packager.receipt import CONFIG, PROVENANCE, QUANTIZE_CONFIG, README, TOKENIZER_FILES
from packager.recipe.parsed_recipe import read
from packager.recipe.yaml import parse
from tests.test_house_rules import ROOT

REFERENCE = ROOT / "docs" / "reference"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", *sorted((ROOT / "docs").rglob("*.md"))]
LINK = re.compile(r"\]\(([^()\s]+(?:\([^()\s]*\)[^()\s]*)*)\)")
MODULES = [path for folder in ("packager", "docs", "benchmarks") for path in sorted((ROOT / folder).rglob("*.py"))]
# Text that reads like a folder or a file of this project: folder/, name.py, folder/NAME.md.
FILE_NAME = re.compile(
    r"(?<![\w/.<$~-])(?:[A-Za-z0-9_.-]+/)+(?![\w*<{])"
    r"|(?<![\w/.<$~}>-])(?:[\w.-]+/)*[\w-]+\.(?:py|md|yaml|toml)\b"
)
FOLDERS = ("packager", "docs", "benchmarks", "tests", "recipes", "templates")
OUR_FILES = {
    path.name + "/" * path.is_dir()
    for folder in FOLDERS
    for path in (ROOT / folder).rglob("*")
    if path.suffix != ".pyc"
}
# Folders that a build makes, and files of readers and of other projects.
FOREIGN_FOLDERS = ("dist/", "work/", "builds/", "receipts/", ".eval_results/")
FOREIGN_FILES = {
    "capitals.yaml",
    "defaults.yaml",
    "eval.yaml",
    "my-model.yaml",
    "my-other-recipe.yaml",
    "my-recipe.yaml",
    "recipe.yaml",
    "ruamel.yaml",
    "section-closing.md",
    "section-files.md",
    "section-introduction.md",
    "model.py",
}
SHELL = {"bash", "console", "sh", "shell"}


def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_generate", ROOT / "docs" / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def relative(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path, languages: set[str]) -> Iterator[str]:
    """Yield the fenced code blocks of a page in one of `languages`."""
    fence = re.compile(r"(?ms)^ *```(\w+)\n(.*?)^ *```$")
    yield from (code for language, code in fence.findall(page.read_text(encoding="utf-8")) if language in languages)


def commands(page: Path, program: str) -> Iterator[list[str]]:
    """Yield the words after `program` of each command in a page's shell blocks that runs it."""
    for block in blocks(page, SHELL):
        for line in block.replace("\\\n", " ").splitlines():
            for command in re.split(r"&&|\|\||[|;]", line.removeprefix("$ ")):
                words = shlex.split(command, comments=True)
                if words and words[0].rpartition("/")[2] == program:
                    yield words[1:]


def anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub gives a page's headings."""
    text = re.sub(r"(?ms)^ *```.*?^ *```$", "", page.read_text(encoding="utf-8"))
    headings = (heading.strip().lower() for heading in re.findall(r"(?m)^#+ (.*)$", text))
    return {re.sub(r"[^\w -]", "", heading).replace(" ", "-") for heading in headings}


@pytest.mark.pinned
@pytest.mark.parametrize("name", sorted(generator().PAGES))
def test_a_reference_page_is_in_step_with_the_code(name: str) -> None:
    made = generator().PAGES[name]()
    assert (REFERENCE / name).read_text(encoding="utf-8") == made, "run nox -s docs -- --write"


@pytest.mark.pinned
def test_every_reference_page_is_generated_or_written_and_there() -> None:
    module = generator()
    generated = {path.name for path in REFERENCE.glob("*.md") if module.NOTE in path.read_text(encoding="utf-8")}
    assert generated == set(module.PAGES)
    assert module.main(["--check"]) == 0


@pytest.mark.slow
def test_pages_do_not_depend_on_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    module = generator()
    before = {name: make() for name, make in module.PAGES.items()}
    for name, value in {"COLUMNS": "200", "FORCE_COLOR": "1", "HOME": "/nowhere", "XDG_CACHE_HOME": "/else"}.items():
        monkeypatch.setenv(name, value)
    assert {name: make() for name, make in module.PAGES.items()} == before
    assert not [name for name, text in before.items() if str(Path.home()) in text or str(ROOT) in text]


@pytest.mark.slow
def test_a_stale_page_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = generator()
    monkeypatch.setattr(module, "ROOT", tmp_path)
    (tmp_path / "docs" / "reference").mkdir(parents=True)
    shutil.copy(module.REFERENCE / "architectures.json", tmp_path / "docs" / "reference")
    monkeypatch.setattr(module, "REFERENCE", tmp_path / "docs" / "reference")
    assert module.main(["--write"]) == 0
    assert module.main(["--check"]) == 0
    (module.REFERENCE / "cli.md").write_text("old")
    assert module.main(["--check"]) == 1
    error = capsys.readouterr().err
    assert "docs/reference/cli.md" in error
    assert "nox -s docs -- --write" in error


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_every_link_resolves(page: Path) -> None:
    text = re.sub(r"(?ms)^ *```.*?^ *```$|`[^`\n]*`", "", page.read_text(encoding="utf-8"))
    broken = []
    for target in LINK.findall(text):
        if target.startswith(("https://", "http://", "mailto:")):
            continue
        name, _, anchor = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        there = path.is_relative_to(ROOT) and path.exists()
        if not there or (anchor and anchor not in anchors(path)):
            broken.append(target)
    assert broken == []


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_commands_in_pages_exist_with_their_options(page: Path) -> None:
    wrong = []
    for words in commands(page, "packager"):
        name = next((word for word in words if not word.startswith("-")), "")
        result = CliRunner().invoke(app, [name, "--help"] if name else ["--help"], prog_name="packager")
        known = set(re.findall(r"(?<![\w-])--?[a-z][a-z-]*", result.stdout.partition("Options:")[2]))
        unknown = [word for word in words if word.startswith("-") and word.partition("=")[0] not in known]
        if result.exit_code or unknown:
            wrong.append(f"packager {' '.join(words)}: {' '.join(unknown) or 'no such command'}")
        named = [word for word in words if word.endswith(".yaml") and word.startswith("recipes/")]
        wrong += [f"there is no {word}" for word in named if not (ROOT / word).exists() and "my-" not in word]
    assert wrong == []


@cache
def nox_sessions() -> set[str]:
    names = set()
    for node in ast.parse((ROOT / "noxfile.py").read_bytes()).body:
        if isinstance(node, ast.FunctionDef):
            for decorator in node.decorator_list:
                given = decorator.keywords if isinstance(decorator, ast.Call) else []
                called = [key.value.value for key in given if key.arg == "name" and isinstance(key.value, ast.Constant)]
                names.add(str(called[0]) if called else node.name)
    return names


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_sessions_in_pages_exist_in_the_noxfile(page: Path) -> None:
    known = nox_sessions()
    assert {"lint", "docs", "build-all"} <= known
    wrong = []
    inline = re.findall(r"`nox (-s [^`]*)`", page.read_text(encoding="utf-8"))
    for words in [*commands(page, "nox"), *(text.split() for text in inline)]:
        ours = words[: words.index("--")] if "--" in words else words
        if "-s" in ours:
            wrong += [word for word in ours[ours.index("-s") + 1 :] if word not in known]
    assert wrong == []


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_recipes_in_pages_are_valid(page: Path) -> None:
    for block in blocks(page, {"yaml"}):
        root, findings = parse(block)
        assert root is not None, block
        assert findings == []
        if isinstance(root.content, dict) and "schema_version" in root.content:
            partial = "extends" in root.content or "base_model" not in root.content
            assert read(root, partial=partial).problems == ()


def missing_files(text: str, folder: Path) -> set[str]:
    """Return the files of this project that a text names and that are not there.

    A name is looked for beside the text, in the repository, in packager/ and in docs/; a bare name anywhere.
    """
    found = set()
    for name in FILE_NAME.findall(re.sub(r"https?://\S+", "", text)):
        if "*" in name or "{" in name or Path(name).name in FOREIGN_FILES or name.startswith(FOREIGN_FOLDERS):
            continue
        roots = (folder, ROOT, ROOT / "packager", ROOT / "docs")
        if not any((root / name).exists() for root in roots) and ("/" in name[:-1] or name not in OUR_FILES):
            found.add(name)
    return found


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_every_file_that_a_page_names_exists(page: Path) -> None:
    assert missing_files(page.read_text(encoding="utf-8"), page.parent) == set()


def comments(path: Path) -> str:
    """Return the comments and docstrings of a module."""
    source = path.read_text(encoding="utf-8")
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    texts = [ast.get_docstring(node) or "" for node in ast.walk(ast.parse(source)) if isinstance(node, documented)]
    if not any(FILE_NAME.search(line.partition("#")[2]) for line in source.splitlines()):
        return "\n".join(texts)  # splitting a module into tokens takes longer than all else
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return "\n".join([*texts, *(token.string for token in tokens if token.type == tokenize.COMMENT)])


def test_every_file_that_a_docstring_or_comment_names_exists() -> None:
    missing = {relative(module): missing_files(comments(module), module.parent) for module in MODULES}
    assert {module: names for module, names in missing.items() if names} == {}


def test_a_file_that_is_not_there_is_found() -> None:
    text = "`gone.py`, packager/gone.py, GONE.md, gone/ and `packager/recipe/file.py`, checks.py, README.md, templates/"
    assert missing_files(text, ROOT) == {"gone.py", "packager/gone.py", "GONE.md", "gone/"}


def test_the_format_page_agrees_with_the_code() -> None:
    page = (REFERENCE / "format.md").read_text(encoding="utf-8")
    assert f"| {', '.join(f'`{key}`' for key in PORTABLE_PARAMETERS)} |" in page
    for key in PORTABLE_KEYS:
        assert f"`{key}`" in page
    for name in (README, PROVENANCE, CONFIG, QUANTIZE_CONFIG, *TOKENIZER_FILES):
        assert f"`{name}`" in page
    linear = LinearSpec(name="x", block=0, module="x", in_features=128, out_features=64, bias=True)
    dtypes = {"I32": "int32", "F16": "float16"}
    rows = dict(re.findall(r"(?m)^\| `(\w+)` \| (int32|float16) \|", page))
    stored = quantized_tensors(linear, bits=4, group_size=32)
    assert rows == {tensor.name.removeprefix("x."): dtypes[tensor.dtype] for tensor in stored}
    for runtime in RUNTIMES.values():
        assert f"| {runtime.label}" in page


def test_the_documented_tolerances_are_those_of_the_code() -> None:
    modules = [(ROOT / "packager" / "prove" / name).read_bytes() for name in ("verify.py", "tolerances.py")]
    constants = {
        target.id: ast.literal_eval(node.value)
        for module in modules
        for node in ast.parse(module).body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name) and target.id in {
            "TOLERANCE", "MIN_TOP1_AGREEMENT", "LARGEST_TOLERANCE", "ROUNDING_FACTOR",
        }
    }  # fmt: skip
    page = " ".join((ROOT / "docs" / "explanation" / "how-it-works.md").read_text(encoding="utf-8").split())
    assert [f"{value:g} in {dtype}" in page for dtype, value in constants["TOLERANCE"].items()] == [True] * 3
    assert f"at {constants['MIN_TOP1_AGREEMENT']:.0%} of".replace("%", " %") in page
    factors = constants["ROUNDING_FACTOR"]
    assert f"with {factors['float16']:g} times (in bfloat16 {factors['bfloat16']:g} times) the difference" in page
    assert f"never more than {constants['LARGEST_TOLERANCE']:g}" in page


def test_the_checks_above_find_mistakes() -> None:
    tutorial = ROOT / "docs" / "tutorial" / "first-release.md"
    assert len(list(commands(tutorial, "packager"))) >= 5
    assert any("schema_version" in block for block in blocks(ROOT / "docs" / "how-to" / "write-a-recipe.md", {"yaml"}))
    assert any(list(commands(page, "nox")) for page in PAGES)


def test_every_test_that_the_security_review_names_exists() -> None:
    text = (ROOT / "docs" / "explanation" / "security-review.md").read_text(encoding="utf-8")
    named = re.findall(r"`(tests/\w+\.py)::(\w+)`", text)
    assert len(named) > 25
    for file, test in named:
        functions = {
            node.name for node in ast.parse((ROOT / file).read_text()).body if isinstance(node, ast.FunctionDef)
        }
        assert test in functions, f"{file}::{test}"
