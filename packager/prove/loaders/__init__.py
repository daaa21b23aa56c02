"""The loaders: runtimes that must open every published checkpoint, each with a probe script and a lock of packages."""

import sys
from dataclasses import dataclass
from pathlib import Path

from packaging.specifiers import SpecifierSet

from packager.model.runtimes import RUNTIMES

_HERE = Path(__file__).parent
# The module that every script imports: a change here may change what any script does.
ISOLATED = _HERE / "packager_isolated.py"
# For these Python versions each package of the locks has a wheel, or a source without compiled code.
_REQUIRES_PYTHON = ">=3.11,<3.14"


@dataclass(frozen=True, kw_only=True)
class LoaderSpec:
    """A runtime that must open every published checkpoint.

    Attributes:
        name: the name that recipes and receipts use.
        script: the stand-alone probe.
        requirements: the lock, which pip installs with --no-deps; torch is not in it. Loaders of one lock share one
            environment.
        devices: the types of device that it can compute on, of "cpu" and "cuda".
        requires_python: specifier of the Python versions for which the whole lock can be installed.
        description: its title, and the versions that the lock pins.
        float32_tolerance: see `Probe`.
        on_request: see `Probe`.
    """

    name: str
    script: Path
    requirements: Path
    devices: frozenset[str]
    requires_python: str
    description: str
    float32_tolerance: float | None = None
    on_request: bool = False

    def python_problem(self) -> str:
        """Return why the lock cannot be installed for the running Python, or ""."""
        running = ".".join(map(str, sys.version_info[:3]))
        if running in SpecifierSet(self.requires_python):
            return ""
        return f"{self.name} needs Python {self.requires_python}, and this is Python {running}"

    def device_on(self, device_type: str) -> str:
        """Return "cpu" or "cuda", on which it computes in a run on `device_type`, or "".

        Every machine has a CPU: a loader without CUDA computes there while the run computes on CUDA.
        """
        return device_type if device_type in self.devices else "cpu" if "cpu" in self.devices else ""

    def machine_problem(self, device_type: str) -> str:
        """Return why this loader cannot run on a machine that computes on `device_type` ("cpu" or "cuda"), or ""."""
        if not self.device_on(device_type):
            return f"needs {' or '.join(sorted(self.devices)).upper()}, and this run computes on {device_type}"
        return self.python_problem()


LOADERS: dict[str, LoaderSpec] = {
    name: LoaderSpec(
        name=name,
        script=_HERE / runtime.probe.script,
        requirements=_HERE / "requirements" / f"{runtime.probe.lock}.txt",
        devices=runtime.probe.devices,
        float32_tolerance=runtime.probe.float32_tolerance,
        on_request=runtime.probe.on_request,
        requires_python=_REQUIRES_PYTHON,
        description=f"{runtime.title} {runtime.probe.versions}",
    )
    for name, runtime in RUNTIMES.items()
    if runtime.probe is not None
}
