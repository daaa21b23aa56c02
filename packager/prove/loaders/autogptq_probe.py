"""Open GPTQ checkpoints in AutoGPTQ and write its logits and tokens to files.

Stand-alone, run as `python autogptq_probe.py JOB.json ...` in an environment that has AutoGPTQ; `packager_isolated.py`
describes a job and its output files. Exit status 1 if any job failed.
"""

import importlib
import sys
import time
from pathlib import Path
from typing import Any

# At the end of the path, so that our folder hides no package.
sys.path.append(str(Path(__file__).parent))
isolated: Any = importlib.import_module("packager_isolated")

PACKAGES = (
    *("auto-gptq", "transformers", "accelerate", "peft", "datasets", "tokenizers", "safetensors", "huggingface-hub"),
    *("numpy", "pandas", "pyarrow", "torch"),
)
KERNELS = "auto_gptq.nn_modules.qlinear."
# By the last word of its module qlinear_*: what from_quantized gets, so that it takes the kernel. What it lacks it
# replaces with a warning: without its extensions it computes on CUDA with torch, in qlinear_cuda or qlinear_cuda_old.
OPTIONS = {
    "cuda": {"use_triton": False, "disable_exllama": True, "disable_exllamav2": True},
    "exllama": {"use_triton": False, "disable_exllama": False, "disable_exllamav2": True},
    "exllamav2": {"use_triton": False, "disable_exllama": True, "disable_exllamav2": False},
    "triton": {"use_triton": True, "disable_exllama": True, "disable_exllamav2": True},
}


def probe(job: dict[str, Any], output: Path) -> dict[str, Any]:
    """Load the checkpoint, compute the rows' logits, generate greedily.

    Returns:
        The fields of result.json for a job that succeeded.

    Raises:
        RuntimeError: it computes with another kernel than the job names.
    """
    torch: Any = importlib.import_module("torch")
    auto_gptq: Any = importlib.import_module("auto_gptq")
    folder, device = Path(job["model_dir"]), job["device"]
    digests = isolated.weights_digests(folder)
    # AutoGPTQ has no float16 products on the CPU: "Unexpected floating ScalarType in at::autocast::prioritize".
    dtype = torch.float32 if device == "cpu" else torch.float16
    backend = job.get("backend")
    options = kernel_options(backend)
    isolated.reset_peak_memory(torch, device)
    started = time.perf_counter()
    wrapper = auto_gptq.AutoGPTQForCausalLM.from_quantized(
        str(folder),
        device="cpu" if device == "cpu" else "cuda:0",
        torch_dtype=dtype,
        use_safetensors=True,
        model_basename=weights_basename(folder),
        inject_fused_attention=False,
        inject_fused_mlp=False,
        **options,
    )
    load_s = time.perf_counter() - started
    # The wrapper's own generate() turns autocast on, which computes in bfloat16 on the CPU.
    model = wrapper.model.eval()
    kernel = isolated.kernel_name(model, KERNELS)
    check_kernel(kernel, backend)
    return {
        **isolated.answers(torch, model, job, output),
        "versions": isolated.versions(PACKAGES),
        "device": device,
        "dtype": str(dtype).removeprefix("torch."),
        "kernel": kernel,
        "weights_sha256": digests,
        "load_s": load_s,
    }


def kernel_options(backend: str | None) -> dict[str, bool]:
    """Return the options of from_quantized that choose a kernel; none for AutoGPTQ's own choice.

    Raises:
        ValueError: there is no such kernel.
    """
    if backend is None:
        return {}
    if backend not in OPTIONS:
        raise ValueError(f"AutoGPTQ has no kernel {backend!r}; there are {', '.join(OPTIONS)}")
    return OPTIONS[backend]


def check_kernel(kernel: str, backend: str | None) -> None:
    """Check that the kernel is the named one.

    Args:
        kernel: full name of the class.
        backend: as in OPTIONS; None for any.

    Raises:
        RuntimeError: it is another one.
    """
    module = kernel.rpartition(".")[0].removeprefix(KERNELS)
    if backend is not None and module not in (f"qlinear_{backend}", f"qlinear_{backend}_old"):
        raise RuntimeError(f"AutoGPTQ computes with {module}: qlinear_{backend} needs what is not installed here")


def weights_basename(folder: Path) -> str:
    """Return the name of the weights without extension, as from_quantized expects it: "model" for model.safetensors.

    Raises:
        ValueError: there is no weights file, or several without an index.
    """
    suffix = ".safetensors.index.json"
    indexes = sorted(folder.glob(f"*{suffix}"))
    if indexes:
        return indexes[0].name.removesuffix(suffix)
    files = sorted(folder.glob("*.safetensors"))
    if len(files) != 1:
        raise ValueError(f"one weights file or an index expected, found {[file.name for file in files]}")
    return files[0].stem


if __name__ == "__main__":
    sys.exit(isolated.main(probe, sys.argv[1:]))
