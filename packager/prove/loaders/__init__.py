"""The runtimes that must open what is published: one probe script and one lock of pinned packages each."""

from pathlib import Path

from packager.model.runtimes import RUNTIMES
from packager.prove.environments import LoaderSpec

_HERE = Path(__file__).parent
# What the scripts have in common; their behaviour changes with it.
ISOLATED = _HERE / "packager_isolated.py"
# All locks have wheels, or sources without compiled code, for these.
_REQUIRES_PYTHON = ">=3.11,<3.14"


LOADERS: dict[str, LoaderSpec] = {
    name: LoaderSpec(
        name=name,
        script=_HERE / runtime.probe.script,
        requirements=_HERE / "requirements" / f"{name}.txt",
        devices=runtime.probe.devices,
        requires_python=_REQUIRES_PYTHON,
        description=f"{runtime.title} {runtime.probe.versions}",
    )
    for name, runtime in RUNTIMES.items()
    if runtime.probe is not None
}
