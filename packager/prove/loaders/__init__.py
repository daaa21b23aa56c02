"""The runtimes that must open what is published: one probe script and one lock of pinned packages each."""

from pathlib import Path

from packager.prove.environments import LoaderSpec

_HERE = Path(__file__).parent
# What the scripts have in common; their behaviour changes with it.
ISOLATED = _HERE / "packager_isolated.py"
# All locks have wheels, or sources without compiled code, for these.
_REQUIRES_PYTHON = ">=3.11,<3.14"


def _spec(name: str, script: str, devices: set[str], description: str) -> LoaderSpec:
    return LoaderSpec(
        name=name,
        script=_HERE / script,
        requirements=_HERE / "requirements" / f"{name}.txt",
        devices=frozenset(devices),
        requires_python=_REQUIRES_PYTHON,
        description=description,
    )


LOADERS: dict[str, LoaderSpec] = {
    spec.name: spec
    for spec in (
        _spec("autogptq", "autogptq_probe.py", {"cpu", "cuda"}, "AutoGPTQ 0.7.1 with transformers 4"),
        _spec("transformers", "transformers_probe.py", {"cpu", "cuda"}, "transformers 5.23 with GPTQModel 7.7"),
        _spec("exllamav2", "exllamav2_probe.py", {"cuda"}, "ExLlamaV2 0.3.2"),
    )
}
