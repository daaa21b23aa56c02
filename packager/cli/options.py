"""The options that commands share, and the objects that are made from them."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from packager.pipeline.build_options import Options
    from packager.recipe.file import RecipeFile
    from packager.system.terminal import Terminal


class Format(StrEnum):
    """The format of a result."""

    text = "text"
    json = "json"


class Color(StrEnum):
    """When output is coloured."""

    auto = "auto"
    always = "always"
    never = "never"


class Device(StrEnum):
    """The device that computes."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


YesOption = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask before others can see a change.")]
RecipesArgument = Annotated[
    list[Path] | None,
    typer.Argument(metavar="RECIPE...", help="Recipe files, e.g. recipes/demo-llama.yaml.", show_default=False),
]
GlobOption = Annotated[
    list[str] | None,
    typer.Option(
        "--recipes", metavar="GLOB", help="Also the recipes that fit, e.g. 'recipes/**/*.yaml'; may be repeated."
    ),
]
OnlyOption = Annotated[
    list[str] | None, typer.Option("--only", metavar="BRANCH", help="Only this branch; may be repeated.")
]
TrialOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="For a trial, e.g. calibration.num_samples=16; in --dist/trial, and never published. May be repeated.",
    ),
]
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
        help="Memory of each GPU that quantizing and measuring may use, such as 24GB; quantizing in less takes longer.",
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
DIST = Path("dist")
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="Print results and errors only.")]


@dataclass
class Voice:
    """How the command that runs speaks."""

    quiet: bool = False
    verbose: bool = False
    color: Color = Color.auto
    as_json: bool = False
    events: bool = False
    terminals: "list[Terminal]" = field(default_factory=list)

    def begin(self, *, as_json: bool) -> None:
        """Forget the command before."""
        vars(self).update(vars(Voice(as_json=as_json)))


# Of the command that runs; `begin` in voice.py makes it anew for each.
VOICE = Voice()


def terminal_of(*, quiet: bool = False) -> "Terminal":
    """Return the terminal that the present command writes to."""
    from packager.system.terminal import Terminal

    terminal = Terminal(quiet=quiet or VOICE.quiet, verbose=VOICE.verbose, color=VOICE.color.value, events=VOICE.events)
    VOICE.terminals.append(terminal)
    return terminal


def open_recipe(recipe: Path, *, quiet: bool = False) -> "tuple[Terminal, RecipeFile]":
    """Return the terminal that a command writes to, and the recipe."""
    from packager.recipe.file import RecipeFile

    return terminal_of(quiet=quiet), RecipeFile.load(recipe)


def trial_dist(dist: Path, settings: Sequence[str]) -> Path:
    """Return the output folder: of a trial, one of its own, so that no build is replaced and nothing is published."""
    return dist / "trial" if settings else dist


def options_of(dist: Path, device: Device, cache: Path | None, gpu_memory: int | None = None) -> "Options":
    """Return the options of a command, with the environment of this process."""
    from packager.pipeline.build_options import Options, default_cache

    return Options(
        dist=dist,
        cache=cache or default_cache(os.environ),
        device=device.value,
        environ=dict(os.environ),
        gpu_memory_bytes=gpu_memory,
    )
