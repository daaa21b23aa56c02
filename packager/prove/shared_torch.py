"""Share the running interpreter's torch and its dependencies with other virtual environments, by symbolic links."""

import importlib.metadata
from collections.abc import Container, Sequence
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from packager.errors import LoaderUnavailableError


def find(name: str) -> importlib.metadata.Distribution | None:
    """Return an installed distribution of the running interpreter, or None."""
    try:
        return importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def torch_closure() -> dict[str, importlib.metadata.Distribution]:
    """Return torch and everything that it depends on among the installed distributions, by canonical name.

    For a CUDA build that includes the nvidia-* packages and triton. Dependencies that are not installed are left out.
    """
    found: dict[str, importlib.metadata.Distribution] = {}
    seen: set[Requirement] = set()
    queue = [Requirement("torch")]
    while queue:
        wanted = queue.pop()
        distribution = find(wanted.name)
        if distribution is None or wanted in seen:
            continue
        seen.add(wanted)
        found[canonicalize_name(wanted.name)] = distribution
        # A requirement such as cuda-toolkit[cublas,...] selects its dependencies by extras.
        extras = wanted.extras or {""}
        queue += [
            needed
            for needed in map(Requirement, distribution.requires or ())
            if needed.marker is None or any(needed.marker.evaluate({"extra": extra}) for extra in extras)
        ]
    return found


def share_torch(layer: Path, packages: Path, *, exclude: Container[str]) -> None:
    """Make `layer`, a folder of links to torch and its dependencies, and put it on another environment's path.

    Args:
        layer: the folder to make.
        packages: that environment's site-packages; packages installed there take precedence.
        exclude: canonical names of distributions that the environment has itself.

    Raises:
        LoaderUnavailableError: the metadata of the installed torch does not list its files.
    """
    sources: dict[str, list[Path]] = {}
    for name, distribution in torch_closure().items():
        if name in exclude:
            continue
        for top in dict.fromkeys(file.parts[0] for file in distribution.files or ()):
            source = Path(str(distribution.locate_file(top)))
            if top not in ("..", "__pycache__") and not top.endswith(".pth") and source not in sources.get(top, ()):
                sources.setdefault(top, []).append(source)
    if "torch" not in sources:
        raise LoaderUnavailableError(
            "the installed torch cannot be shared with the loaders",
            why="its metadata does not list its files: an editable or hand-made installation",
            hint="install torch from a wheel",
        )
    layer.mkdir()
    for top, places in sources.items():
        _link(layer / top, places)
    (packages / "shared_torch.pth").write_text(f"{layer}\n", encoding="utf-8")


def _link(target: Path, sources: Sequence[Path]) -> None:
    """Link one entry; a namespace package spread over several folders becomes a folder of links."""
    is_metadata = target.suffix in (".dist-info", ".egg-info") and sources[0].is_dir()
    if len(sources) == 1 and not is_metadata:
        target.symlink_to(sources[0])
        return
    target.mkdir()
    for name in dict.fromkeys(child.name for source in sources for child in source.iterdir()):
        # pip cannot uninstall a package without its RECORD: this protects the running interpreter's torch.
        if not (is_metadata and name == "RECORD"):
            _link(target / name, [source / name for source in sources if (source / name).exists()])
