"""Open GPTQ checkpoints in ExLlamaV2 and write down what it computes. Needs a CUDA GPU and nvcc.

Stand-alone, run as `python exllamav2_probe.py JOB.json ...` in an environment that has ExLlamaV2. A job is an object:
model_dir, device ("cuda"), input_ids (rows of equal length), prompts (token ids), max_new_tokens, output_dir.
Written to output_dir: `logits.npy` float32 [rows, seq_len, vocab], then `result.json`, whose status is "ok" or "error".
Exit status 1 if any job failed.

Functions with the same name are the same in every probe; a test compares them.
"""

import fcntl
import gc
import hashlib
import importlib
import importlib.metadata
import json
import os
import platform
import resource
import sys
import time
import traceback
from pathlib import Path
from typing import Any

PACKAGES = ("exllamav2", "tokenizers", "safetensors", "numpy", "torch")


class UnavailableError(Exception):
    """This machine lacks what the runtime needs, whatever the checkpoint."""


def main(job_files: list[str]) -> int:
    """Run the jobs one after the other; a failed job does not stop the next. Returns the exit status."""
    forbid_network()
    return max([run_job(json.loads(Path(name).read_text(encoding="utf-8"))) for name in job_files], default=1)


def run_job(job: dict[str, Any]) -> int:
    """Run one job and write its result.json last, so that its presence means that the job is over."""
    output = Path(job["output_dir"])
    output.mkdir(parents=True, exist_ok=True)
    try:
        status, result = 0, {"status": "ok", **probe(job, output)}
    except (Exception, SystemExit) as error:
        trace = traceback.format_exc()
        sys.stderr.write(trace)
        sys.stderr.flush()
        status = 1
        result = {"status": "error", "type": type(error).__name__, "message": str(error), "traceback": trace}
    write_json(output / "result.json", result)
    return status


def probe(job: dict[str, Any], output: Path) -> dict[str, Any]:
    """Load the checkpoint, compute the rows' logits, generate greedily.

    Returns:
        What result.json records of a success.

    Raises:
        UnavailableError: there is no CUDA device or no compiler for it.
        RuntimeError: nothing in the model is quantized.
    """
    folder, device = Path(job["model_dir"]), job["device"]
    torch: Any = importlib.import_module("torch")
    require_cuda(torch, device)
    exllamav2 = import_exllamav2()
    digests = weights_digests(folder)
    longest = max(len(row) for row in [*job["input_ids"], *job["prompts"]]) + job["max_new_tokens"]
    reset_peak_memory(torch, device)
    started = time.perf_counter()
    model, cache = load(exllamav2, folder, longest)
    torch.cuda.synchronize()
    load_s = time.perf_counter() - started
    kernel = quantized_linear(model)
    started = time.perf_counter()
    rows = (cached_logits(torch, model, cache, row, start=0) for row in job["input_ids"])
    write_logits(output / "logits.npy", rows, len(job["input_ids"]))
    forward_s = time.perf_counter() - started
    generated = [
        cached_greedy(torch, model, cache, prompt, job["max_new_tokens"], end_tokens(folder))
        for prompt in job["prompts"]
    ]
    peak = peak_memory_bytes(torch, device)
    # Quantized matrices live in the extension, where no garbage collector finds them.
    model.unload()
    return {
        "versions": versions(),
        "device": device,
        "dtype": "float16",
        "kernel": kernel,
        "weights_sha256": digests,
        "generated": generated,
        "load_s": load_s,
        "forward_s": forward_s,
        "peak_memory_bytes": peak,
    }


def require_cuda(torch: Any, device: str) -> None:
    """Check what ExLlamaV2 needs of a machine.

    Raises:
        UnavailableError: something is missing.
    """
    if device != "cuda" or not torch.cuda.is_available():
        raise UnavailableError(f"it computes on CUDA only: device {device}, torch {torch.__version__}")
    extensions: Any = importlib.import_module("torch.utils.cpp_extension")
    if extensions.CUDA_HOME is None or not (Path(extensions.CUDA_HOME) / "bin" / "nvcc").exists():
        raise UnavailableError(f"it compiles its kernels, and there is no nvcc: CUDA_HOME is {extensions.CUDA_HOME}")


def import_exllamav2() -> Any:
    """Import ExLlamaV2, which compiles its extension the first time (150 s on 16 cores), and return the package.

    PyTorch's lock around that is a file that a killed process leaves behind, after which every later import waits for
    ever. A lock that the system releases is held here, so a file found under it is nobody's.
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
    torch: Any, model: Any, cache: Any, prompt: list[int], max_new_tokens: int, ends: list[int]
) -> list[int]:
    """Return the tokens generated greedily after `prompt`; an end-of-sequence token is the last one."""
    new: list[int] = []
    ids, start = prompt, 0
    while len(new) < max_new_tokens and (not new or new[-1] not in ends):
        logits = cached_logits(torch, model, cache, ids, start=start)
        start += len(ids)
        ids = [int(logits[-1].argmax())]
        new += ids
    return new


def forbid_network() -> None:
    """Make Hugging Face libraries work offline, and any other attempt to reach a network an error."""
    os.environ.update(
        HF_HUB_OFFLINE="1",
        TRANSFORMERS_OFFLINE="1",
        HF_DATASETS_OFFLINE="1",
        HF_HUB_DISABLE_TELEMETRY="1",
        HF_HUB_DISABLE_PROGRESS_BARS="1",
        TOKENIZERS_PARALLELISM="false",
        # The user's folder may hold an access token and other people's models.
        HF_HOME=str(Path(sys.prefix) / "huggingface"),
    )

    def refuse(event: str, arguments: tuple[Any, ...]) -> None:
        # Unix sockets are named by a string; multiprocessing uses them.
        if event == "socket.getaddrinfo" or (event == "socket.connect" and isinstance(arguments[1], tuple)):
            raise OSError(f"a probe must not use the network: {event} {arguments[-1]}")

    sys.addaudithook(refuse)


def weights_digests(folder: Path) -> dict[str, str]:
    """Return the sha256 of every *.safetensors file in `folder` as this process sees it."""
    digests = {}
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb") as stream:
            digests[file.name] = hashlib.file_digest(stream, "sha256").hexdigest()
    return digests


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that matter here."""
    return {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in PACKAGES}}


def end_tokens(folder: Path) -> list[int]:
    """Return the end-of-sequence token ids: those of generation_config.json, else those of config.json."""
    for name in ("generation_config.json", "config.json"):
        file = folder / name
        found = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id") if file.is_file() else None
        if found is not None:
            return found if isinstance(found, list) else [found]
    return []


def write_logits(path: Path, logits: Any, num_rows: int) -> None:
    """Write tensors [seq_len, vocab] as one float32 array [num_rows, seq_len, vocab], row by row to save memory."""
    numpy: Any = importlib.import_module("numpy")
    temporary = path.with_name(f".tmp-{path.name}")
    array = None
    for index, row in enumerate(logits):
        if array is None:
            shape = (num_rows, *row.shape)
            array = numpy.lib.format.open_memmap(temporary, mode="w+", dtype=numpy.float32, shape=shape)
        array[index] = row.float().cpu().numpy()
    if array is None:
        raise ValueError("input_ids has no rows")
    array.flush()
    temporary.replace(path)


def reset_peak_memory(torch: Any, device: str) -> None:
    """Forget what the jobs before this one left on the GPU."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_memory_bytes(torch: Any, device: str) -> int:
    """Return the most memory this job's tensors took on the GPU, or on the CPU the process's peak so far, in bytes."""
    if device == "cuda":
        return int(torch.cuda.max_memory_allocated())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write `value` so that the file appears whole or not at all."""
    temporary = path.with_name(f".tmp-{path.name}")
    temporary.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    temporary.replace(path)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
