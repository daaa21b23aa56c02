"""Open GPTQ checkpoints with GPTQModel's own loader and write its logits and tokens to files.

Stand-alone, run as `python gptqmodel_probe.py JOB.json ...` where GPTQModel is installed; `packager_isolated.py`
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

PACKAGES = ("gptqmodel", "transformers", "defuser", "accelerate", "tokenizers", "safetensors", "numpy", "torch")


def probe(job: dict[str, Any], output: Path) -> dict[str, Any]:
    """Load the checkpoint, compute the rows' logits, generate greedily.

    It computes in float16, because GPTQModel's own loader gives its kernels no float32.

    Returns:
        The fields of result.json for a job that succeeded.
    """
    folder, device = Path(job["model_dir"]), job["device"]
    isolated.prepare_gptqmodel(device)
    torch: Any = importlib.import_module("torch")
    pcre = isolated.provide_pcre()
    gptqmodel: Any = importlib.import_module("gptqmodel")
    digests = isolated.weights_digests(folder)
    backend = job.get("backend") or isolated.gptqmodel_backend(isolated.quantization_config(folder), device)
    isolated.reset_peak_memory(torch, device)
    started = time.perf_counter()
    model = gptqmodel.GPTQModel.load(
        str(folder),
        device="cpu" if device == "cpu" else "cuda:0",
        backend=backend,
        dtype=torch.float16,
    ).model.eval()
    load_s = time.perf_counter() - started
    kernel = isolated.kernel_name(model, isolated.GPTQMODEL_KERNELS)
    return {
        **isolated.answers(torch, model, job, output),
        "versions": {**isolated.versions(PACKAGES), "pypcre": pcre},
        "device": device,
        "dtype": "float16",
        "kernel": kernel,
        "weights_sha256": digests,
        "load_s": load_s,
    }


if __name__ == "__main__":
    sys.exit(isolated.main(probe, sys.argv[1:]))
