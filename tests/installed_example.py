"""Packages of docs/examples on the path, with the metadata that an installation writes."""

import shutil
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.import_graph import ROOT

EXAMPLES = ROOT / "docs" / "examples"


def install_example(
    name: str, group: str, site: Path, monkeypatch: pytest.MonkeyPatch, more: Sequence[str] = ()
) -> Path:
    """Put a package of docs/examples into `site`, a folder of the path, and return the folder of its modules.

    Args:
        name: of the example's folder.
        group: of its entry points.
        site: is made.
        monkeypatch: takes it off the path again.
        more: lines of entry points that the example does not have.
    """
    example = EXAMPLES / name
    pyproject = tomllib.loads((example / "pyproject.toml").read_text(encoding="utf-8"))
    project, (module,) = pyproject["project"], pyproject["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    shutil.copytree(example / module, site / module)
    info = site / f"{module}-{project['version']}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")
    lines = [f"{name} = {value}" for name, value in project["entry-points"][group].items()]
    (info / "entry_points.txt").write_text("\n".join([f"[{group}]", *lines, *more, ""]))
    monkeypatch.syspath_prepend(str(site))
    for loaded in [each for each in sys.modules if each.partition(".")[0] == module]:
        monkeypatch.delitem(sys.modules, loaded)
    return site / str(module)
