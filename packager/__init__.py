"""Build, prove and publish GPTQ-quantized model repositories from recipe files."""

__version__ = "0.1.0"
