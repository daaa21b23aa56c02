"""Open GPTQ checkpoints in AutoGPTQ and write down what it computes.

Stand-alone, run as `python autogptq.py JOB.json ...` in an environment that has AutoGPTQ. A job is an object:
model_dir, device ("cpu" or "cuda"), input_ids (rows of equal length), prompts (token ids), max_new_tokens, output_dir.
Written to output_dir: `logits.npy` float32 [rows, seq_len, vocab], then `result.json`, whose status is "ok" or "error".
Exit status 1 if any job failed.

Functions with the same name are the same in every probe; a test compares them.
"""

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

PACKAGES = (
    *("auto-gptq", "transformers", "accelerate", "peft", "datasets", "tokenizers", "safetensors", "huggingface-hub"),
    *("numpy", "pandas", "pyarrow", "torch"),
)
KERNELS = "auto_gptq.nn_modules.qlinear."


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
    """
    torch: Any = importlib.import_module("torch")
    auto_gptq: Any = importlib.import_module("auto_gptq")
    folder, device = Path(job["model_dir"]), job["device"]
    digests = weights_digests(folder)
    # float16 has no matrix product here on the CPU: "Unexpected floating ScalarType in at::autocast::prioritize".
    dtype = torch.float32 if device == "cpu" else torch.float16
    reset_peak_memory(torch, device)
    started = time.perf_counter()
    wrapper = auto_gptq.AutoGPTQForCausalLM.from_quantized(
        str(folder),
        device="cpu" if device == "cpu" else "cuda:0",
        torch_dtype=dtype,
        use_safetensors=True,
        model_basename=weights_basename(folder),
        inject_fused_attention=False,
        inject_fused_mlp=False,
    )
    load_s = time.perf_counter() - started
    # The wrapper's own generate() turns autocast on, which computes in bfloat16 on the CPU.
    model = wrapper.model.eval()
    kernel = kernel_name(model, KERNELS)
    started = time.perf_counter()
    write_logits(
        output / "logits.npy", (row_logits(torch, model, row) for row in job["input_ids"]), len(job["input_ids"])
    )
    forward_s = time.perf_counter() - started
    generated = [greedy(torch, model, folder, prompt, job["max_new_tokens"]) for prompt in job["prompts"]]
    return {
        "versions": versions(),
        "device": device,
        "dtype": str(dtype).removeprefix("torch."),
        "kernel": kernel,
        "weights_sha256": digests,
        "generated": generated,
        "load_s": load_s,
        "forward_s": forward_s,
        "peak_memory_bytes": peak_memory_bytes(torch, device),
    }


def weights_basename(folder: Path) -> str:
    """Return the name of the weights without extension, as from_quantized wants it: "model" for model.safetensors.

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


def kernel_name(model: Any, prefix: str) -> str:
    """Return the full name of the class that computes the quantized linears; several are joined by "+".

    Raises:
        RuntimeError: no module of the model is quantized.
    """
    classes = {type(module) for module in model.modules()}
    names = sorted(f"{each.__module__}.{each.__qualname__}" for each in classes)
    kernels = [name for name in names if name.startswith(prefix)]
    if not kernels:
        raise RuntimeError(f"the loaded model has no quantized linear, only {names}")
    return "+".join(kernels)


def row_logits(torch: Any, model: Any, row: list[int]) -> Any:
    """Return the logits [seq_len, vocab] of one row of token ids."""
    with torch.inference_mode():
        return model(input_ids=torch.tensor([row], device=model.device), use_cache=False).logits[0]


def greedy(torch: Any, model: Any, folder: Path, prompt: list[int], max_new_tokens: int) -> list[int]:
    """Return the tokens generated greedily after `prompt`; an end-of-sequence token is the last one."""
    if max_new_tokens < 1:
        return []
    transformers: Any = importlib.import_module("transformers")
    ends = end_tokens(folder)
    # A checkpoint's own generation_config may sample or punish repetition.
    model.generation_config = transformers.GenerationConfig(
        do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=ends or None, pad_token_id=ends[0] if ends else 0
    )
    ids = torch.tensor([prompt], device=model.device)
    with torch.inference_mode():
        made = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids))
    return [int(token) for token in made[0, len(prompt) :]]


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
