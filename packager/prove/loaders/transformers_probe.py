"""Open GPTQ checkpoints in transformers (with GPTQModel and optimum) and write down what it computes.

Stand-alone, run as `python transformers_probe.py JOB.json ...` where all three are installed;
`packager_isolated.py` says what a job is and what is written. Exit status 1 if any job failed.
"""

import importlib
import importlib.metadata
import json
import os
import re
import sys
import time
import types
from pathlib import Path
from typing import Any

# Behind everything else, so that nothing of ours hides a package.
sys.path.append(str(Path(__file__).parent))
isolated: Any = importlib.import_module("packager_isolated")

PACKAGES = ("transformers", "gptqmodel", "optimum", "accelerate", "tokenizers", "safetensors", "numpy", "torch")
KERNELS = "gptqmodel.nn_modules.qlinear."


def probe(job: dict[str, Any], output: Path) -> dict[str, Any]:
    """Load the checkpoint, compute the rows' logits, generate greedily.

    Returns:
        What result.json records of a success.
    """
    folder, device = Path(job["model_dir"]), job["device"]
    configure(device)
    torch: Any = importlib.import_module("torch")
    transformers: Any = importlib.import_module("transformers")
    pcre = provide_pcre()
    # transformers would import it while loading; its seconds belong to no checkpoint.
    importlib.import_module("gptqmodel")
    digests = isolated.weights_digests(folder)
    dtype = torch.float32 if device == "cpu" else torch.float16
    isolated.reset_peak_memory(torch, device)
    started = time.perf_counter()
    model = transformers.AutoModelForCausalLM.from_pretrained(
        str(folder),
        dtype=dtype,
        device_map="cpu" if device == "cpu" else "cuda:0",
        quantization_config=kernel_choice(transformers, folder, device),
        local_files_only=True,
    ).eval()
    load_s = time.perf_counter() - started
    kernel = isolated.kernel_name(model, KERNELS)
    started = time.perf_counter()
    isolated.write_logits(
        output / "logits.npy",
        (isolated.row_logits(torch, model, row) for row in job["input_ids"]),
        len(job["input_ids"]),
    )
    forward_s = time.perf_counter() - started
    generated = [isolated.greedy(torch, model, folder, prompt, job["max_new_tokens"]) for prompt in job["prompts"]]
    return {
        "versions": {**isolated.versions(PACKAGES), "pypcre": pcre},
        "device": device,
        "dtype": str(dtype).removeprefix("torch."),
        "kernel": kernel,
        "weights_sha256": digests,
        "generated": generated,
        "load_s": load_s,
        "forward_s": forward_s,
        "peak_memory_bytes": isolated.peak_memory_bytes(torch, device),
    }


def configure(device: str) -> None:
    """Set what GPTQModel reads from its environment when it is imported."""
    # Its kernels are compiled on first use; inside this environment they cannot meet those of another torch.
    os.environ.setdefault("GPTQMODEL_TORCH_EXTENSIONS_DIR", str(Path(sys.prefix) / "kernels"))
    # On a small machine its default number of workers is refused.
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "4")
    # Without it the Machete kernel fetches CUTLASS.
    os.environ["GPTQMODEL_OFFLINE"] = "1"
    if device == "cpu":
        # The kernel compiles its dequantization, which needs a C++ compiler and took 30 s for two layers.
        os.environ["TORCHDYNAMO_DISABLE"] = "1"


def provide_pcre() -> str:
    """Put Python's re in the place of PyPcre where that is not installed; return the version or what replaces it.

    PyPcre exists as C source only. GPTQModel matches module names with it, by patterns that both engines read alike.
    """
    try:
        return importlib.metadata.version("pypcre")
    except importlib.metadata.PackageNotFoundError:
        pass
    stand_in: Any = types.ModuleType("pcre")
    stand_in.compile, stand_in.escape, stand_in.split, stand_in.Pattern = re.compile, re.escape, re.split, re.Pattern
    stand_in.Flag = types.SimpleNamespace(CASELESS=re.IGNORECASE, MULTILINE=re.MULTILINE, DOTALL=re.DOTALL)
    sys.modules.setdefault("pcre", stand_in)
    return "replaced by re"


def kernel_choice(transformers: Any, folder: Path, device: str) -> Any:
    """Return the loading options; everything about the format is read from the checkpoint all the same.

    On the CPU the plain PyTorch kernel is asked for: the default depends on the processor, and where that has
    AVX512-BF16 it first compiles an extension (160 s on two cores) and then computes in bfloat16. On a GPU it is the
    Triton kernel: the default there downloads CUTLASS (Machete, on Hopper) or compiles for minutes (Marlin).

    Raises:
        ValueError: the checkpoint does not say that it is quantized.
    """
    quantization = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("quantization_config")
    if quantization is None:
        raise ValueError("config.json has no quantization_config: transformers would take the weights for plain ones")
    backend = "gptq_torch" if device == "cpu" else "gptq_triton"
    return transformers.GPTQConfig(bits=quantization["bits"], backend=backend)


if __name__ == "__main__":
    sys.exit(isolated.main(probe, sys.argv[1:]))
