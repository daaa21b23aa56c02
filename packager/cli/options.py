"""What the commands share: their options, and what is made of them."""

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
    """How a result is printed."""

    text = "text"
    json = "json"


class Device(StrEnum):
    """Where to compute."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


YesOption = Annotated[bool, typer.Option("--yes", "-y", help="Publish where others can see it without being asked.")]
RecipePath = Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe file, e.g. recipes/demo-llama.yaml.")]
FormatOption = Annotated[
    Format, typer.Option("--format", help="text for people, json for machines (on standard output).")
]


def read_size(text: str) -> int:
    """Read a size such as 24GB or 12GiB."""
    from pydantic import ByteSize, TypeAdapter, ValidationError

    try:
        return int(TypeAdapter(ByteSize).validate_python(text))
    except ValidationError as error:
        raise typer.BadParameter(f"{text!r} is not a size such as 24GB or 12GiB") from error


DistOption = Annotated[Path, typer.Option("--dist", help="Output folder: builds, receipts, the local target.")]
DeviceOption = Annotated[
    Device, typer.Option("--device", help="Where to compute; auto takes a CUDA GPU if there is one.")
]
GpuMemoryOption = Annotated[
    int | None,
    typer.Option(
        "--gpu-memory",
        metavar="SIZE",
        parser=read_size,
        help="How much of each GPU quantizing may use, such as 24GB; less takes longer and makes the same bytes.",
        show_default="what is free",
    ),
]
CacheOption = Annotated[
    Path | None,
    typer.Option(
        "--cache",
        help="Where the loaders' environments are kept; XDG_CACHE_HOME is heeded.",
        show_default="~/.cache/gptq-packager",
    ),
]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="Say nothing but results and errors.")]
DIST = Path("dist")


def terminal_of(*, quiet: bool = False) -> "Terminal":
    """Return what a command says everything to."""
    from packager.system.terminal import Terminal

    return Terminal(quiet=quiet)


def open_recipe(recipe: Path, *, quiet: bool = False) -> "tuple[Terminal, RecipeFile]":
    """Return what a command says everything to, and its recipe."""
    from packager.recipe.file import RecipeFile

    return terminal_of(quiet=quiet), RecipeFile.load(recipe)


def options_of(dist: Path, device: Device, cache: Path | None, gpu_memory: int | None = None) -> "Options":
    """Return where and how a command works, with this process's environment."""
    from packager.pipeline.build_state import Options

    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Options(
        dist=dist,
        cache=cache or base / "gptq-packager",
        device=device.value,
        environ=dict(os.environ),
        gpu_memory_bytes=gpu_memory,
    )
