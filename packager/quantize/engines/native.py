"""Our own engine behind the protocol: the sweep of `packager.quantize.sweep`."""

import platform
from importlib import metadata

from packager import __version__
from packager.quantize.engines.protocol import EngineResult
from packager.quantize.job import QuantizeJob, Report
from packager.quantize.sweep import quantize

_PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "greenlet")


class Native:
    """All variants in one sweep over the base model's blocks."""

    def quantize(self, job: QuantizeJob, report: Report) -> EngineResult:
        """Quantize with our own engine; arguments, result and errors are those of `Engine.quantize`."""
        return EngineResult(
            records=quantize(job, report),
            made_with=f"gptq-packager {__version__}",
            versions={"python": platform.python_version(), **{name: metadata.version(name) for name in _PACKAGES}},
        )
