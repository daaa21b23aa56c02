"""The engines that quantize: our own and, for comparison, AutoGPTQ. No torch: `plan` imports this.

Every engine returns the same linears as the same tensors (docs/reference/format.md), so packing, verifying, measuring
and the card do not depend on the engine.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from packager.errors import MachineError
from packager.model.architecture import Architecture
from packager.quantize.engines.auto_gptq_files import auto_gptq_digest
from packager.quantize.engines.legacy_config import problems
from packager.variant import EngineName, Variant

if TYPE_CHECKING:
    from packager.prove.environments import RuntimeContext
    from packager.quantize.engines.protocol import Engine

# Raise it whenever our own engine makes other bytes from the same inputs: finished work is then quantized again.
ENGINE_VERSION = 7
# Raise it when the files beside the weights of an auto-gptq variant change; ENGINE_VERSION covers those of our engine.
_FILES_VERSION = 2


def engine_named(name: EngineName, context: "RuntimeContext") -> "Engine":
    """Return an engine; its modules are imported now."""
    if name == "native":
        from packager.quantize.engines.native import Native

        return Native()
    from packager.quantize.engines.auto_gptq import AutoGptq

    return AutoGptq(context)


def engine_version(name: EngineName) -> int | str:
    """Return a value that changes whenever an engine makes other bytes from the same inputs."""
    return ENGINE_VERSION if name == "native" else f"{auto_gptq_digest()}-{_FILES_VERSION}"


def needs_cuda(name: EngineName) -> bool:
    """Return whether an engine computes on CUDA only."""
    return name == "auto-gptq"


def require_engines(names: Iterable[EngineName], device_type: str) -> None:
    """Raise MachineError unless every engine can compute on a type of device, "cpu" or "cuda"."""
    if device_type != "cuda" and any(map(needs_cuda, names)):
        raise MachineError(
            "engine auto-gptq needs a CUDA GPU",
            why=f"AutoGPTQ 0.7.1 quantizes on CUDA only, and this build computes on {device_type}",
            hint="use engine: native, or build on a machine with a GPU",
        )


def engine_problems(
    variants: Sequence[Variant], config: Mapping[str, object], architecture: Architecture, seq_len: int
) -> list[str]:
    """Return one line for each variant and reason why its engine cannot quantize this model.

    Args:
        variants: of the recipe.
        config: the base model's config.json.
        architecture: read from `config`.
        seq_len: tokens per calibration row.
    """
    found = problems(config, architecture, seq_len)
    experts = [module for module in _modules(architecture) if "experts" in module]
    return [
        *(
            f"{variant.branch}: engine auto-gptq cannot quantize {problem}; use engine: native"
            for variant in variants
            if variant.engine == "auto-gptq"
            for problem in found
        ),
        *(
            f"{variant.branch}: effort high cannot tune blocks with experts ({experts[0]}): which of them a token "
            "goes to has no gradient, and gradients through them are not the same in each run; use effort: standard"
            for variant in variants
            if variant.effort == "high" and experts
        ),
    ]


def _modules(architecture: Architecture) -> list[str]:
    """Return the modules of the blocks whose weights could be quantized, of experts their module."""
    quantized = [group.unit or group.modules[0] for kind in architecture.kinds for group in kind.groups]
    return [*quantized, *architecture.left]
