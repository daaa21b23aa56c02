"""The rules of decision 5: imports between rooms, imports of torch, and one meaning per public name."""

import ast
import subprocess
import sys
from collections.abc import Iterable, Iterator
from functools import cache

import pytest

from packager.prove.loaders import LOADERS
from tests.import_graph import ROOT, box_of, circles, imported_names, merged, module_graph, modules

trees = cache(modules)


@cache
def graph() -> dict[str, set[str]]:
    """Return the modules that each module imports."""
    return module_graph(trees())


@pytest.fixture(autouse=True, scope="module")
def _forget() -> Iterator[None]:
    """Free the trees: collecting garbage among their 300,000 objects takes 0.2 s."""
    yield
    graph.cache_clear()
    trees.cache_clear()


# An import goes to the same room or down this table; rooms on one level do not see each other.
ORDER = (
    ("errors", "variant"),
    ("records",),
    ("receipt",),
    ("system",),
    ("model",),
    ("recipe",),
    ("inputs", "card"),
    ("prove",),
    ("quantize", "publish"),
    ("pipeline",),
    ("fleet",),
    ("cli", "api"),
)
# Scripts that run in environments of their own; the package never imports them.
PROGRAMS = {
    "packager.quantize.engines.auto_gptq_script", "packager.prove.loaders.packager_isolated",
    "packager.prove.loaders.lm_eval_script",
    *(f"packager.prove.loaders.{spec.script.stem}" for spec in LOADERS.values()),
}  # fmt: skip
LEVEL = {room: level for level, rooms in enumerate(ORDER) for room in rooms}
# What quantize takes from prove: the environments in which an engine runs.
PROVE_FOR_QUANTIZE = ("packager.prove.environments", "packager.prove.loaders", "packager.prove.probes")
# Packages whose __init__ holds code: each is a package inside a room with its own interface.
FACES = {
    "packager.card", "packager.recipe", "packager.prove.audit", "packager.prove.loaders", "packager.publish.published",
    "packager.publish.rollback", "packager.publish.targets", "packager.quantize.engines",
}  # fmt: skip
# Everything else must not import torch when it is imported: `packager plan` and `--help` start fast.
MAY_IMPORT_TORCH = (
    "packager.model.computed_buffers", "packager.model.contexts", "packager.model.decoder", "packager.model.describe",
    "packager.model.described_groups", "packager.model.experts",
    "packager.model.fused_blocks", "packager.model.fused_kernels", "packager.model.packing", "packager.model.skeleton",
    "packager.model.staged_copies", "packager.model.stored_names", "packager.model.trace",
    "packager.model.traced_forward",
    "packager.prove.evaluate", "packager.prove.verify",
    "packager.quantize",
)  # fmt: skip
TORCH_FREE_IN_QUANTIZE = {
    "packager.quantize", "packager.quantize.block_store", "packager.quantize.engines",
    "packager.quantize.engines.auto_gptq", "packager.quantize.engines.auto_gptq_files",
    "packager.quantize.engines.legacy_config", "packager.quantize.engines.protocol", "packager.quantize.job",
    "packager.quantize.gptq.column_blocks", "packager.quantize.gptq.panels", "packager.quantize.gptq.row_parts",
    "packager.quantize.gptq.side_by_side",
    "packager.quantize.memory", "packager.quantize.shared_reader", "packager.quantize.solving_memory",
    "packager.quantize.tuning_memory", "packager.quantize.tuning_schedule", "packager.quantize.workload",
}  # fmt: skip


def test_an_import_goes_to_the_same_room_or_to_a_lower_one() -> None:
    wrong = [
        f"{name} imports {target}"
        for name, targets in graph().items()
        for target in sorted(targets)
        if name != "packager" and box_of(name) != box_of(target)
        if LEVEL[box_of(target)] >= LEVEL[box_of(name)]
    ]
    assert wrong == []


def test_the_table_of_rooms_is_the_package() -> None:
    assert set(LEVEL) == {box_of(name) for name in trees() if name != "packager"}


def test_quantize_takes_only_environments_of_prove() -> None:
    wrong = [
        f"{name} imports {target}"
        for name, targets in graph().items()
        for target in sorted(targets)
        if box_of(name) == "quantize" and box_of(target) == "prove" and not target.startswith(PROVE_FOR_QUANTIZE)
    ]
    assert wrong == []


def test_no_files_import_each_other_in_a_circle() -> None:
    assert circles({name: targets for name, targets in graph().items() if name != "packager"}) == []


def test_the_circle_finder_finds_circles() -> None:
    graph = {"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}, "e": set()}
    assert circles(graph) == [{"a", "b", "c"}]
    assert circles(merged(graph, lambda name: "x" if name in "abc" else name)) == []


def test_each_room_has_a_docstring() -> None:
    packages = {
        path.parent.relative_to(ROOT).as_posix().replace("/", ".") for path in ROOT.glob("packager/**/__init__.py")
    }
    for name in sorted(packages - {"packager"}):
        tree = trees()[name]
        assert ast.get_docstring(tree), f"{name} has no docstring"
        assert name in FACES or len(tree.body) == 1, f"{name}/__init__.py holds more than its docstring"


def public_names(tree: ast.Module) -> Iterator[str]:
    """Yield the names that a module defines at its top, inside `if`, `try` and `with` too; imports are left out."""
    for node in statements(tree.body):
        if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef):
            yield node.name
        targets = (
            node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        )
        # A target may be a tuple of names, also in parentheses and nested.
        names = (part for target in targets for part in ast.walk(target) if isinstance(part, ast.Name))
        yield from (part.id for part in names if isinstance(part.ctx, ast.Store))


def statements(body: Iterable[ast.AST]) -> Iterator[ast.AST]:
    """Yield statements and those inside them; the bodies of functions and classes are left out."""
    for node in body:
        yield node
        if not isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef):
            yield from statements(
                child for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt | ast.excepthandler)
            )


def test_every_form_of_definition_defines_a_name() -> None:
    text = (
        "A = 1\nB: int = 2\nC, (D, *E) = 1, (2, 3)\nF = G = 1\nx.y = z[0] = 1\ndef h(): i = 1\nclass J: K = 1\n"
        "if A:\n    L = 1\nelse:\n    M = 1\ntry:\n    N = 1\nexcept OSError:\n    O = 1\nfinally:\n    P = 1\n"
    )
    assert sorted(public_names(ast.parse(text))) == [*"ABCDEFGJLMNOP", "h"]


def test_a_public_name_is_defined_once() -> None:
    places: dict[str, list[str]] = {}
    for module, tree in trees().items():
        # Programs of other environments are never imported by the package; the names of the Python interface are those
        # of commands, and the package never imports it.
        if is_program(module) or module == "packager.api":
            continue
        for name in set(public_names(tree)):
            if not name.startswith("_"):
                places.setdefault(name, []).append(module)
    assert {name: found for name, found in places.items() if len(found) > 1} == {}


def is_program(module: str) -> bool:
    """Return whether a module is a script that runs in an environment of its own."""
    return module in PROGRAMS


def may_import_torch(module: str) -> bool:
    listed = any(module == name or module.startswith(f"{name}.") for name in MAY_IMPORT_TORCH)
    return listed and module not in TORCH_FREE_IN_QUANTIZE


def test_modules_are_imported_by_full_names_that_the_graph_sees() -> None:
    wrong = []
    for name, tree in trees().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.level:
                wrong.append(f"{name}:{node.lineno}: a relative import")
            elif isinstance(node, ast.Constant) and node.value in trees():
                wrong.append(f"{name}:{node.lineno}: the name of a module as a string: {node.value}")
    # `logging.getLogger` and `importlib.metadata` want the name of the package itself.
    assert [text for text in wrong if not text.endswith(": packager")] == []


def test_the_package_imports_none_of_its_rooms() -> None:
    assert [name for name in imported_names(trees()["packager"]) if name.startswith("packager.")] == []


def test_plan_imports_no_process_machinery() -> None:
    script = (
        "import sys, packager.pipeline.plan\n"
        "sys.exit(', '.join({'venv', 'packager.prove.environments', 'packager.system.processes'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stderr.strip() == ""


def test_only_the_listed_modules_import_torch() -> None:
    torch_free = [name for name in trees() if not may_import_torch(name) and not is_program(name)]
    assert set(torch_free) >= TORCH_FREE_IN_QUANTIZE
    script = (
        "import importlib, sys\n"
        "for name in sys.argv[1:]:\n"
        "    importlib.import_module(name)\n"
        "    if found := {'torch', 'transformers'} & set(sys.modules):\n"
        "        sys.exit(f'{name} imports {found}')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, *torch_free], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    importing = [name for name, tree in trees().items() if any(n.split(".")[0] == "torch" for n in _top_imports(tree))]
    assert [name for name in importing if not may_import_torch(name) and not is_program(name)] == []


def _top_imports(tree: ast.Module) -> Iterator[str]:
    for node in tree.body:
        yield from (
            imported_names(ast.Module(body=[node], type_ignores=[]))
            if isinstance(node, ast.Import | ast.ImportFrom)
            else ()
        )


@pytest.mark.parametrize("module", MAY_IMPORT_TORCH)
def test_the_list_of_modules_that_import_torch_has_no_stale_name(module: str) -> None:
    assert any(name.startswith(module) for name in trees())
