"""Open GPTQ checkpoints in ExLlamaV2 and write its logits and tokens to files. Needs a CUDA GPU and nvcc.

Stand-alone, run as `python exllamav2_probe.py JOB.json ...` where ExLlamaV2 is installed; `packager_isolated.py`
describes a job and its output files. Exit status 1 if any job failed.
"""

import fcntl
import importlib
import os
import sys
import time
from pathlib import Path
from typing import Any

# At the end of the path, so that our folder hides no package.
sys.path.append(str(Path(__file__).parent))
isolated: Any = importlib.import_module("packager_isolated")

PACKAGES = ("exllamav2", "tokenizers", "safetensors", "numpy", "torch")


class UnavailableError(Exception):
    """This machine lacks something that the runtime needs for every checkpoint."""


def probe(job: dict[str, Any], output: Path) -> dict[str, Any]:
    """Load the checkpoint, compute the rows' logits, generate greedily.

    Returns:
        The fields of result.json for a job that succeeded.

    Raises:
        UnavailableError: there is no CUDA device or no compiler for it.
        RuntimeError: nothing in the model is quantized.
    """
    folder, device = Path(job["model_dir"]), job["device"]
    torch: Any = importlib.import_module("torch")
    require_cuda(torch, device)
    exllamav2 = import_exllamav2()
    digests = isolated.weights_digests(folder)
    longest = max(len(row) for row in [*job["input_ids"], *job["prompts"]]) + job["max_new_tokens"]
    isolated.reset_peak_memory(torch, device)
    started = time.perf_counter()
    model, cache = load(exllamav2, folder, longest)
    torch.cuda.synchronize()
    load_s = time.perf_counter() - started
    kernel = quantized_linear(model)
    started = time.perf_counter()
    rows = (cached_logits(torch, model, cache, row, start=0) for row in job["input_ids"])
    isolated.write_logits(output / "logits.npy", rows, len(job["input_ids"]))
    forward_s = time.perf_counter() - started
    clock = isolated.DecodeClock()
    generated = [
        cached_greedy(torch, model, cache, prompt, job["max_new_tokens"], isolated.end_tokens(folder), clock)
        for prompt in job["prompts"]
    ]
    peak = isolated.peak_memory_bytes(torch, device)
    # The extension owns the quantized matrices: Python's garbage collector does not free them.
    model.unload()
    return {
        "versions": isolated.versions(PACKAGES),
        "device": device,
        "dtype": "float16",
        "kernel": kernel,
        "weights_sha256": digests,
        "generated": generated,
        **clock.fields(),
        "load_s": load_s,
        "forward_s": forward_s,
        "peak_memory_bytes": peak,
    }


def require_cuda(torch: Any, device: str) -> None:
    """Check that the machine has a CUDA GPU and nvcc.

    Raises:
        UnavailableError: one of them is missing.
    """
    if device != "cuda" or not torch.cuda.is_available():
        raise UnavailableError(f"it computes on CUDA only: device {device}, torch {torch.__version__}")
    extensions: Any = importlib.import_module("torch.utils.cpp_extension")
    if extensions.CUDA_HOME is None or not (Path(extensions.CUDA_HOME) / "bin" / "nvcc").exists():
        raise UnavailableError(f"it compiles its kernels, and there is no nvcc: CUDA_HOME is {extensions.CUDA_HOME}")


def import_exllamav2() -> Any:
    """Import ExLlamaV2, which compiles its extension the first time (150 s on 16 cores), and return the package.

    PyTorch locks the compilation with a file. A killed process leaves the file behind, and every later import waits
    without end. This function takes a lock that the operating system releases, and deletes a file that it then finds.
    """
    kernels = Path(sys.prefix) / "kernels"
    kernels.mkdir(exist_ok=True)
    os.environ["TORCH_EXTENSIONS_DIR"] = str(kernels)
    with (kernels / "exllamav2.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        (kernels / "exllamav2_ext" / "lock").unlink(missing_ok=True)
        package: Any = importlib.import_module("exllamav2")
    return package


def load(exllamav2: Any, folder: Path, longest: int) -> tuple[Any, Any]:
    """Return the model on the first GPU and a float16 cache for `longest` tokens."""
    config = exllamav2.ExLlamaV2Config(str(folder))
    config.arch_compat_overrides()
    # Without flash-attn it passes PyTorch's attention a wrong mask: relative logit error 1.1 even on a float16 model.
    config.no_sdpa = True
    model = exllamav2.ExLlamaV2(config)
    model.load()
    return model, exllamav2.ExLlamaV2Cache(model, batch_size=1, max_seq_len=longest)


def quantized_linear(model: Any) -> str:
    """Return the full name of the class that holds the quantized matrices.

    Raises:
        RuntimeError: no linear of the model is quantized.
    """
    quantized = [
        module for module in model.modules_dict.values() if "qweight" in (getattr(module, "q_tensors", None) or ())
    ]
    if not quantized:
        raise RuntimeError("the loaded model has no quantized linear")
    return "+".join(sorted({f"{type(module).__module__}.{type(module).__qualname__}" for module in quantized}))


def cached_logits(torch: Any, model: Any, cache: Any, ids: list[int], *, start: int) -> Any:
    """Return the logits [len(ids), vocab] of tokens that follow the first `start` tokens in the cache.

    The cache lets the runtime split long rows; columns that pad the vocabulary to a multiple of 32 are cut off.
    """
    cache.current_seq_len = start
    logits = model.forward(torch.tensor([ids]), cache, cpu_logits=True)
    return logits[0, :, : model.config.vocab_size]


def cached_greedy(
    torch: Any, model: Any, cache: Any, prompt: list[int], max_new_tokens: int, ends: list[int], clock: Any
) -> list[int]:
    """Return the tokens generated greedily after `prompt`; an end-of-sequence token is the last one."""
    new: list[int] = []
    ids, start = prompt, 0
    clock.begin(len(prompt))
    while len(new) < max_new_tokens and (not new or new[-1] not in ends):
        logits = cached_logits(torch, model, cache, ids, start=start)
        start += len(ids)
        ids = [int(logits[-1].argmax())]
        new += ids
        clock.tick()
    return new


if __name__ == "__main__":
    sys.exit(isolated.main(probe, sys.argv[1:]))
