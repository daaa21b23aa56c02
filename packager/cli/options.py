"""The options that commands share, and the objects that are made from them."""

import os
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from packager.pipeline.build_state import Options
    from packager.recipe.file import RecipeFile
    from packager.system.terminal import Terminal


class Format(StrEnum):
    """The format of a result."""

    text = "text"
    json = "json"


class Device(StrEnum):
    """The device that computes."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


YesOption = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask before others can see a change.")]
RecipePath = Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe file, e.g. recipes/demo-llama.yaml.")]
FormatOption = Annotated[
    Format, typer.Option("--format", help="text for people, json for machines (on standard output).")
]


# Less memory than CUDA itself takes is a mistake: 0, or a size without its unit.
_LEAST_BYTES = 10**9


def read_size(text: str) -> int:
    """Return the bytes of a size such as 24GB or 12GiB.

    Raises:
        BadParameter: the text is not a size, or the size is under 1 GB.
    """
    from pydantic import ByteSize, TypeAdapter, ValidationError

    try:
        size = int(TypeAdapter(ByteSize).validate_python(text))
    except ValidationError as error:
        raise typer.BadParameter(f"{text!r} is not a size such as 24GB or 12GiB") from error
    if size < _LEAST_BYTES:
        raise typer.BadParameter(f"{text!r} is {size} bytes, less than 1GB: write a size with its unit, such as 12GB")
    return size


DistOption = Annotated[Path, typer.Option("--dist", help="Output folder: builds, receipts, local target.")]
DeviceOption = Annotated[
    Device, typer.Option("--device", help="Where to compute; auto uses a CUDA GPU if there is one.")
]
GpuMemoryOption = Annotated[
    int | None,
    typer.Option(
        "--gpu-memory",
        metavar="SIZE",
        parser=read_size,
        help="Memory of each GPU that quantizing may use, such as 24GB; less takes longer and makes the same bytes.",
        show_default="what is free",
    ),
]
CacheOption = Annotated[
    Path | None,
    typer.Option(
        "--cache",
        help="Folder of the loaders' virtual environments; XDG_CACHE_HOME changes the default.",
        show_default="~/.cache/gptq-packager",
    ),
]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="Print results and errors only.")]
DIST = Path("dist")


def terminal_of(*, quiet: bool = False) -> "Terminal":
    """Return the terminal that a command writes to."""
    from packager.system.terminal import Terminal

    return Terminal(quiet=quiet)


def open_recipe(recipe: Path, *, quiet: bool = False) -> "tuple[Terminal, RecipeFile]":
    """Return the terminal that a command writes to, and the recipe."""
    from packager.recipe.file import RecipeFile

    return terminal_of(quiet=quiet), RecipeFile.load(recipe)


def options_of(dist: Path, device: Device, cache: Path | None, gpu_memory: int | None = None) -> "Options":
    """Return the options of a command, with the environment of this process."""
    from packager.pipeline.build_state import Options

    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Options(
        dist=dist,
        cache=cache or base / "gptq-packager",
        device=device.value,
        environ=dict(os.environ),
        gpu_memory_bytes=gpu_memory,
    )
