"""The options of `release` for many recipes at a time."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import typer

from packager.cli.options import read_size
from packager.errors import UsageError
from packager.system.text import has_credentials

JobsOption = Annotated[
    int | None,
    typer.Option(
        "--jobs",
        metavar="N",
        min=1,
        help="Compute N recipes at a time on this machine, each on GPUs of its own or on its share of the cores, and "
        "fetch and publish others meanwhile.",
    ),
]
RayOption = Annotated[
    str,
    typer.Option(
        "--ray",
        metavar="ADDRESS",
        help="Use the machines of a Ray cluster: HOST:PORT of its head, or auto for the cluster of this machine or of "
        "RAY_ADDRESS. Needs --store, and pip install 'gptq-packager[fleet]' everywhere.",
        show_default="none",
    ),
]
StoreOption = Annotated[
    str | None,
    typer.Option(
        "--store",
        metavar="URL",
        help="With --jobs or --ray: where builds, finished blocks, states and leases are kept for other machines and "
        "runs: a folder that all share, s3://bucket/folder with the extra s3, or another service that fsspec opens and "
        "that can create a file only if there is none.",
        show_default="none",
    ),
]
DiskOption = Annotated[
    int | None,
    typer.Option(
        "--disk",
        metavar="SIZE",
        parser=read_size,
        help="With --store: what base models and builds may take on a machine, such as 500GB. What is published is "
        "deleted first.",
        show_default="no limit",
    ),
]
StoreSizeOption = Annotated[
    int | None,
    typer.Option(
        "--store-size",
        metavar="SIZE",
        parser=read_size,
        help="With --store: what builds may take in it. Those that are published are deleted first.",
        show_default="no limit",
    ),
]
GpusOption = Annotated[
    int | None,
    typer.Option(
        "--gpus",
        metavar="N",
        min=0,
        help="With --jobs or --ray: GPUs of each recipe.",
        show_default="1 if there are any",
    ),
]
AttemptsOption = Annotated[
    int,
    typer.Option(
        "--attempts",
        metavar="N",
        min=1,
        help="With --jobs or --ray: a task that fails is tried again after 30 s, 60 s and so on; after N "
        "attempts its recipe is parked. An error of the recipe or the model parks it at once.",
    ),
]
PriorityOption = Annotated[
    list[str] | None,
    typer.Option(
        "--priority",
        metavar="GLOB=N",
        help="With --jobs or --ray: recipes whose path fits go before those with a lower number; 0 is the default. "
        "May be repeated: the last one that fits counts.",
    ),
]
PerHourOption = Annotated[
    list[str] | None,
    typer.Option(
        "--per-hour",
        metavar="WHAT=N",
        help="With --jobs or --ray: what all machines together may do in an hour: download=2TB of base models, "
        "upload=1TB of branches, commits=500 of all repositories. May be repeated.",
        show_default="100 commits of each repository",
    ),
]


@dataclass(frozen=True, kw_only=True)
class FleetOptions:
    """The options of `release` for many recipes at a time."""

    jobs: int | None = None
    ray: str = ""
    store: str | None = None
    disk_bytes: int | None = None
    store_bytes: int | None = None
    gpus: int | None = None
    attempts: int = 4
    priorities: Sequence[str] = ()
    per_hour: Sequence[str] = ()
    trusted_keys: Sequence[Path] = field(default=(), compare=False)  # of one recipe after the other, too

    @property
    def several(self) -> bool:
        """Whether several recipes are released at a time."""
        return self.jobs is not None or bool(self.ray)

    def check(self, *, fail_fast: bool, sign_key: bool, cache: bool = False) -> None:
        """Refuse options that do not go together.

        Raises:
            UsageError: says which.
        """
        if self.jobs is not None and self.ray:
            raise UsageError("--jobs is for this machine, --ray for others", hint="give one of them")
        if not self.several:
            if self != FleetOptions():
                raise UsageError(
                    "--store, --disk, --store-size, --gpus, --attempts, --priority and --per-hour need --jobs or --ray",
                    hint="give --jobs N or --ray ADDRESS, or leave them out",
                )
            return
        if fail_fast:
            raise UsageError("--fail-fast is for one recipe after the other", hint="leave it out")
        if self.ray and sign_key:
            raise UsageError(
                "--sign-key is for this machine, and --ray publishes on others",
                hint="set PACKAGER_SIGN_KEY and PACKAGER_SIGN_PASSPHRASE for the nodes that publish, and not here",
            )
        if self.ray and cache:
            raise UsageError(
                "--cache is for this machine, and --ray makes loaders' environments on others",
                hint="set XDG_CACHE_HOME for the nodes",
            )
        if self.store is not None and has_credentials(self.store):
            raise UsageError(
                "the address of --store has a password or a key in it",
                why="the process of each task, also on other machines, gets it on its command line",
                hint="leave it out: what opens the store finds it in its own files or variables, such as AWS_PROFILE",
            )
        if self.ray and self.store is None:
            raise UsageError("--ray needs --store", why="machines share nothing else", hint="name a folder or a URL")
        if (self.disk_bytes or self.store_bytes) and self.store is None:
            raise UsageError(
                "--disk and --store-size need --store",
                why="what a machine deletes must be kept somewhere else",
                hint="name a folder or a URL with --store",
            )
