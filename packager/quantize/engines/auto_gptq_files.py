"""The files that determine what AutoGPTQ makes: our script and the pinned packages. No torch at import."""

import hashlib
from pathlib import Path

from packager.prove.loaders import ISOLATED, LOADERS

AUTO_GPTQ_SCRIPT = Path(__file__).with_name("auto_gptq_script.py")
# The engine uses the loader's environment: the packages that quantize also open the result.
AUTO_GPTQ_LOCK = LOADERS["autogptq"].requirements


def auto_gptq_digest() -> str:
    """Return the sha256 of our scripts and the pinned packages: it changes when AutoGPTQ may make other bytes."""
    parts = (AUTO_GPTQ_SCRIPT, ISOLATED, AUTO_GPTQ_LOCK)
    return hashlib.sha256(b"".join(part.read_bytes() for part in parts)).hexdigest()
