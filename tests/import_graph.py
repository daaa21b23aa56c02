"""The imports of packager/ as a graph: `python -m tests.import_graph [CHECKOUT]` prints its figures.

Every import counts: at the top of a file, inside a function, and under TYPE_CHECKING.
"""

import ast
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
Graph = Mapping[str, set[str]]


def modules(root: Path = ROOT) -> dict[str, ast.Module]:
    """Return the syntax tree of every module, by dotted name; a package has the name of its folder."""
    found = {}
    for path in sorted((root / "packager").rglob("*.py")):
        name = ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
        found[name] = ast.parse(path.read_bytes())
    return found


def imported_names(tree: ast.AST) -> Iterator[str]:
    """Yield the dotted name of everything that a module imports."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def module_graph(trees: Mapping[str, ast.Module]) -> dict[str, set[str]]:
    """Return, for each module, the modules of packager/ that it imports."""
    graph = {}
    for name, tree in trees.items():
        names = {_module_of(imported, trees) for imported in imported_names(tree)}
        graph[name] = names - {"", name, "packager"}
    return graph


def _module_of(imported: str, trees: Mapping[str, ast.Module]) -> str:
    """Return the module that an imported name is, or is defined in; "" for other packages."""
    while imported not in trees:
        imported = imported.rpartition(".")[0]
        if not imported:
            return ""
    return imported


def box_of(module: str) -> str:
    """Return the entry of packager/ that holds a module: a folder, or a file at the top."""
    return module.split(".")[1] if "." in module else module


def merged(graph: Graph, box: Callable[[str], str]) -> dict[str, set[str]]:
    """Return the graph of boxes: an edge where a module of one imports a module of the other."""
    result: dict[str, set[str]] = {}
    for name, targets in graph.items():
        result.setdefault(box(name), set()).update(box(target) for target in targets)
    return {name: targets - {name} for name, targets in result.items()}


def circles(graph: Graph) -> list[set[str]]:
    """Return the strongly connected components with more than one member (Tarjan's algorithm by reachability)."""
    reach = {name: _reachable(graph, name) for name in graph}
    found: list[set[str]] = []
    for name in graph:
        circle = {other for other in reach[name] if name in reach[other]}
        if len(circle) > 1 and circle not in found:
            found.append(circle)
    return found


def _reachable(graph: Graph, start: str) -> set[str]:
    seen: set[str] = set()
    queue = [start]
    while queue:
        for target in graph.get(queue.pop(), ()):
            if target not in seen:
                seen.add(target)
                queue.append(target)
    return seen


def levels(graph: Graph) -> int:
    """Return the number of levels: a module stands above everything that it imports; a circle is one level."""
    names = {name: min(circle) for circle in circles(graph) for name in circle}
    flat = merged(graph, lambda name: names.get(name, name))
    heights: dict[str, int] = {}

    def height(name: str) -> int:
        if name not in heights:
            heights[name] = 1 + max((height(target) for target in flat.get(name, ())), default=0)
        return heights[name]

    return max(map(height, flat))


def figures(root: Path) -> str:
    """Return the figures that docs/decisions/0005-ten-rooms.md has of the first commit with the rooms, as lines."""
    trees = modules(root)
    files = module_graph({name: tree for name, tree in trees.items() if name != "packager"})
    boxes = merged(files, box_of)
    counts: dict[str, int] = {}
    for name in files:
        counts[box_of(name)] = counts.get(box_of(name), 0) + 1
    lines = [
        f"modules                        {len(files)}",
        f"levels of modules              {levels(files)}",
        f"circles of modules             {len(circles(files))}",
        f"entries of packager/           {len(boxes)}",
        f"levels of entries              {levels(boxes)}",
        f"circles of entries             {len(circles(boxes))}",
        f"pairs of entries that import   {sum(map(len, boxes.values()))}",
        "imports between entries        "
        + str(sum(box_of(a) != box_of(b) for a, targets in files.items() for b in targets)),
        "files: " + ", ".join(f"{name} {count}" for name, count in sorted(counts.items())),
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    print(figures(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT))
