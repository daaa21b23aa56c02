"""Our own engine behind the protocol: the sweep of `packager.quantize.sweep`."""

import platform
from importlib import metadata

from packager import __version__
from packager.quantize.engines import Made
from packager.quantize.sweep import QuantizeJob, Report, quantize

_PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "greenlet")


class Native:
    """All variants in one sweep over the base model's blocks."""

    def quantize(self, job: QuantizeJob, report: Report) -> Made:
        """See `Engine`."""
        return Made(
            records=quantize(job, report),
            made_with=f"gptq-packager {__version__}",
            versions={"python": platform.python_version(), **{name: metadata.version(name) for name in _PACKAGES}},
        )
