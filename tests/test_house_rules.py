"""Rules of the code: imports, reads and writes, the length of functions and modules, the time to start."""

import ast
import resource
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.samples import sampled

if TYPE_CHECKING:
    from tests.tiny_recipe import Builds

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "packager"
FILES = sorted(PACKAGE.rglob("*.py"))
NAMES = [path.relative_to(ROOT).as_posix() for path in FILES]
# Programs of their own, run by path: in the loaders' environments, and around every child process.
PROBES = {
    name
    for name in NAMES
    if name.endswith(("_script.py", "/supervisor.py"))
    or (name.startswith("packager/prove/loaders/") and not name.endswith("__init__.py"))
}
TERMINAL = {
    "packager/cli/compat.py",
    "packager/cli/init.py",
    "packager/cli/main.py",
    "packager/cli/options.py",
    "packager/cli/publishing.py",
    "packager/cli/fleet_view.py",
    "packager/cli/ray_process.py",
    "packager/cli/releasing.py",
    "packager/cli/task_process.py",
    "packager/cli/step_summary.py",
    "packager/cli/signing.py",
    "packager/cli/auditing.py",
    "packager/api.py",
    "packager/cli/consent.py",
    "packager/cli/signals.py",
    "packager/system/terminal.py",
}
# `python -m packager.recipe.schema` is an entry point of its own: nox runs it, the command line does not know it.
ENTRY_POINTS = {"packager/recipe/schema.py"}
NETWORK = ("packager/inputs/", "packager/publish/targets/", "packager/publish/hub_collection.py")
MAX_FUNCTION_LINES = 60
MAX_MODULE_LINES = 400
BAD_NAMES = {"util", "utils", "helper", "helpers", "common", "base", "manager", "handler", "info", "misc"}

# Runs the command line and ends with the heavy modules that it has imported, on the last line of standard error.
RUN = """
import sys
from tests.samples import sampled
from packager.cli.main import main
try:
    main()
except SystemExit as end:
    if end.code:
        raise
names = {"torch", "transformers", "numpy", "huggingface_hub", "datasets", "git", "safetensors", "tokenizers"}
sys.stderr.write("\\n" + " ".join(sorted(names & set(sys.modules))))
"""


@cache
def trees() -> dict[str, ast.Module]:
    """Return the syntax tree of every module."""
    return {name: ast.parse(path.read_bytes()) for name, path in zip(NAMES, FILES, strict=True)}


@pytest.fixture(autouse=True, scope="module")
def _forget() -> Iterator[None]:
    """Free the trees: collecting garbage among their 300,000 objects takes 0.2 s."""
    yield
    places.cache_clear()
    trees.cache_clear()


def imports(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Yield every imported module with its line, those inside functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports are not used here"
            yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)


def importers(*packages: str) -> dict[str, list[str]]:
    """Return which files import one of `packages`, with the lines."""
    found: dict[str, list[str]] = {}
    for name, tree in trees().items():
        for imported, line in imports(tree):
            if imported.split(".")[0] in packages:
                found.setdefault(name, []).append(f"{name}:{line}: {imported}")
    return found


def loaded_by(*arguments: str) -> tuple[set[str], str]:
    """Run a command in a process of its own; return the heavy modules it has imported, and its standard output."""
    done = subprocess.run(
        [sys.executable, "-c", RUN, *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return set(done.stderr.rpartition("\n")[2].split()), done.stdout


@pytest.fixture(scope="module")
def built(builds: "Builds", tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A tiny recipe and the folder it was built into."""
    recipe = builds.copy(tmp_path_factory.mktemp("tiny"))
    return str(recipe), str(recipe.parent / "dist")


COMMANDS = ["plan", "audit", "status", "card", "publish --dry-run", "publish", "release --device cpu"]


@pytest.mark.parametrize("command", sampled(COMMANDS, "publish"))
def test_nothing_but_building_needs_torch(built: tuple[str, str], command: str) -> None:
    recipe, dist = built
    name, *options = command.split()
    where = [f"{dist}/builds/tester/tiny-GPTQ/main"] if name == "audit" else [recipe, "--dist", dist]
    if name == "plan":
        where = [recipe]
    modules, output = loaded_by(name, *where, *options)
    assert not modules & {"torch", "transformers", "datasets", "huggingface_hub"}
    assert output


# Runs the command line and ends with all modules outside the standard library, on the last line of standard error.
COUNT = """
import sys
from packager.cli.main import main
try:
    main()
except SystemExit as end:
    if end.code:
        raise
foreign = [name for name in sys.modules if name.split(".")[0] not in sys.stdlib_module_names]
sys.stderr.write("\\n" + " ".join(foreign))
"""
_DEMO = "recipes/demo-llama.yaml"
# On 2026-11-30 with the versions of constraints.txt, our own with them: 66, 416 and 463.
MOST_MODULES = [(["--help"], 70), (["plan", _DEMO], 425), (["status", _DEMO], 475)]


@pytest.mark.pinned
@pytest.mark.parametrize(("arguments", "most"), sampled(MOST_MODULES, MOST_MODULES[-1]))
def test_commands_import_few_modules(arguments: list[str], most: int, tmp_path: Path) -> None:
    """Time depends on the machine and on who else uses it; the number of modules does not."""
    where = ["--dist", str(tmp_path)] if arguments[0] == "status" else []
    command = [sys.executable, "-c", COUNT, *arguments, *where]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    modules = done.stderr.rpartition("\n")[2].split()
    assert "packager.cli.main" in modules
    assert not {"numpy", "huggingface_hub", "torch", "matplotlib", "git"} & set(modules)
    assert len(modules) <= most, f"{arguments[0]} imports {len(modules)} modules"


@pytest.mark.parametrize(
    ("arguments", "limit_s"),
    sampled(
        [(["--help"], 0.5), (["plan", "--help"], 0.5), (["plan", "recipes/llama-2-13b-chat.yaml"], 1.2)],
        (["plan", "--help"], 0.5),
    ),
)
def test_help_and_plan_start_quickly(arguments: list[str], limit_s: float) -> None:
    def processor_s() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert loaded_by(*arguments)[0] == set()
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    # 0.1 s for --help and 0.4 s for plan on an idle core; the better of two, as the first may have to compile.
    assert min(processor_s(), processor_s()) < limit_s


def test_gptq_imports_torch_and_of_packager_only_errors() -> None:
    wrong = [
        f"{name}:{line}: {imported}"
        for name, tree in trees().items()
        if name.startswith("packager/quantize/gptq/")
        for imported, line in imports(tree)
        if imported.split(".")[0] not in {*sys.stdlib_module_names, "torch", "triton"}
        and not imported.startswith(("packager.errors", "packager.quantize.gptq"))
    ]
    assert not wrong
    assert any(name.startswith("packager/quantize/gptq/") for name in importers("torch"))


def test_only_inputs_and_targets_reach_the_network() -> None:
    clients = ("huggingface_hub", "datasets", "requests", "httpx", "urllib3", "urllib", "http", "socket")
    found = {name: places for name, places in importers(*clients).items() if name not in PROBES}
    assert found.keys() >= {"packager/inputs/hub_models.py", "packager/inputs/dataset_files.py"}
    others = [place for name, places in found.items() if not name.startswith(NETWORK) for place in places]
    assert [place for place in others if "urllib.parse" not in place] == []


def test_probes_import_nothing_of_packager() -> None:
    assert PROBES
    assert not PROBES & importers("packager").keys()


def attributes(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Yield `module.attribute` for every name looked up in a module, and every plain name, with the line."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            yield f"{node.value.id}.{node.attr}", node.lineno
        elif isinstance(node, ast.Name):
            yield node.id, node.lineno
    yield from imports(tree)


@cache
def places() -> dict[str, list[tuple[str, int]]]:
    """Return the modules and the lines in which each name is used."""
    found: dict[str, list[tuple[str, int]]] = {}
    for name, tree in trees().items():
        for used, line in attributes(tree):
            found.setdefault(used, []).append((name, line))
    return found


def users(*names: str, but: set[str]) -> list[str]:
    return [f"{name}:{line}: {used}" for used in names for name, line in places().get(used, []) if name not in but]


def test_only_the_command_line_reads_the_environment() -> None:
    names = ("os.environ", "os.environb", "os.getenv", "os.getenvb", "os.putenv")
    assert users(*names, but=set())
    assert not users(*names, but=TERMINAL | PROBES)


def test_only_the_command_line_writes_to_the_terminal() -> None:
    names = ("print", "input", "sys.stdout", "sys.stderr", "sys.stdin", "typer.echo", "click.echo")
    assert not users(*names, but=TERMINAL | PROBES | ENTRY_POINTS)


def test_only_the_command_line_ends_the_process() -> None:
    names = ("sys.exit", "exit", "quit", "os.abort")
    assert not users(*names, but=TERMINAL | PROBES | ENTRY_POINTS)


def test_functions_and_modules_have_a_largest_length() -> None:
    long = [
        f"{name}:{node.lineno}: {node.name} has {node.end_lineno - node.lineno + 1} lines"
        for name, tree in trees().items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.end_lineno is not None
        and node.end_lineno - node.lineno >= MAX_FUNCTION_LINES
    ]
    for path in FILES:
        lines = len(path.read_text(encoding="utf-8").splitlines())
        if lines > MAX_MODULE_LINES:
            long.append(f"{path.relative_to(ROOT)} has {lines} lines")
    assert not long


def test_no_name_is_meaningless() -> None:
    parts = {part for name in NAMES for part in Path(name).with_suffix("").parts}
    words = {word for part in parts for word in part.replace("base_model", "model").split("_")}
    assert not words & BAD_NAMES


def test_a_broad_except_raises_again_or_has_a_reason() -> None:
    wrong = []
    for name, tree in trees().items():
        lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
        for node in ast.walk(tree):
            if not isinstance(node, ast.ExceptHandler) or name in PROBES:  # a probe reports whatever its runtime raises
                continue
            kinds = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
            broad = any(kind is None or (isinstance(kind, ast.Name) and kind.id in {"BaseException", "Exception"})
                        for kind in kinds)  # fmt: skip
            again = isinstance(node.body[-1], ast.Raise)
            if broad and not again and "noqa: BLE001" not in lines[node.lineno - 1]:
                wrong.append(f"{name}:{node.lineno}")
    assert not wrong
