"""Open GPTQ checkpoints in transformers (with GPTQModel and optimum) and write its logits and tokens to files.

Stand-alone, run as `python transformers_probe.py JOB.json ...` where all three are installed;
`packager_isolated.py` describes a job and its output files. Exit status 1 if any job failed.
"""

import importlib
import sys
import time
from pathlib import Path
from typing import Any

# At the end of the path, so that our folder hides no package.
sys.path.append(str(Path(__file__).parent))
isolated: Any = importlib.import_module("packager_isolated")

PACKAGES = ("transformers", "gptqmodel", "optimum", "accelerate", "tokenizers", "safetensors", "numpy", "torch")


def probe(job: dict[str, Any], output: Path) -> dict[str, Any]:
    """Load the checkpoint, compute the rows' logits, generate greedily.

    Returns:
        The fields of result.json for a job that succeeded.
    """
    folder, device = Path(job["model_dir"]), job["device"]
    isolated.prepare_gptqmodel(device)
    torch: Any = importlib.import_module("torch")
    transformers: Any = importlib.import_module("transformers")
    pcre = isolated.provide_pcre()
    # Otherwise transformers would import it while loading, and the import would count as load time.
    importlib.import_module("gptqmodel")
    digests = isolated.weights_digests(folder)
    dtype = torch.float32 if device == "cpu" else torch.float16
    # These options choose the kernel. The format is still read from the checkpoint.
    quantization = isolated.quantization_config(folder)
    backend = job.get("backend") or isolated.gptqmodel_backend(quantization, device)
    isolated.reset_peak_memory(torch, device)
    started = time.perf_counter()
    model = transformers.AutoModelForCausalLM.from_pretrained(
        str(folder),
        dtype=dtype,
        device_map="cpu" if device == "cpu" else "cuda:0",
        quantization_config=transformers.GPTQConfig(bits=quantization["bits"], backend=backend),
        local_files_only=True,
    ).eval()
    load_s = time.perf_counter() - started
    kernel = isolated.kernel_name(model, isolated.GPTQMODEL_KERNELS)
    return {
        **isolated.answers(torch, model, job, output),
        "versions": {**isolated.versions(PACKAGES), "pypcre": pcre},
        "device": device,
        "dtype": str(dtype).removeprefix("torch."),
        "kernel": kernel,
        "weights_sha256": digests,
        "load_s": load_s,
    }


if __name__ == "__main__":
    sys.exit(isolated.main(probe, sys.argv[1:]))
