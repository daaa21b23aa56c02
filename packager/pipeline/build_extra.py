"""The packages of the extra `build`: planning, auditing and publishing work without them."""

from importlib import metadata

from packager.errors import MachineError


def require_build_extra(work: str = "building") -> None:
    """Raise MachineError unless the packages of the `build` extra are installed, which `work` needs."""
    lacking = []
    for name in ("torch", "transformers", "safetensors", "greenlet", "matplotlib"):
        try:
            metadata.version(name)
        except metadata.PackageNotFoundError:
            lacking.append(name)
    if lacking:
        raise MachineError(
            f"{work} needs packages that are not installed",
            why=f"missing: {', '.join(lacking)}",
            hint="pip install 'gptq-packager[build]'",
        )
