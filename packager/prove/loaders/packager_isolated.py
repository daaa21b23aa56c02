"""Functions of the scripts that run in the loaders' environments. At import it needs only the standard library.

A script imports this file from its own folder: `packager` is not installed there. A probe's job is a JSON object:
model_dir, device ("cpu" or "cuda"), input_ids (rows of equal length), prompts (token ids), max_new_tokens, output_dir,
backend (the kernel by the runtime's own name, or null for the probe's choice).
Written to output_dir: `logits.npy` float32 [rows, seq_len, vocab], then `result.json`, whose status is "ok" or "error".
"""

import gc
import hashlib
import importlib
import importlib.metadata
import json
import os
import platform
import re
import resource
import sys
import time
import traceback
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

Job = dict[str, Any]
Probe = Callable[[Job, Path], dict[str, Any]]
# What the names of the classes begin with that compute the quantized linears of GPTQModel, and of transformers with it.
GPTQMODEL_KERNELS = "gptqmodel.nn_modules.qlinear."


def main(probe: Probe, job_files: Sequence[str]) -> int:
    """Run the jobs one after the other; a failed job does not stop the next. Returns 1 if any failed.

    Args:
        probe: opens a job's checkpoint, computes, and returns the fields of result.json for a job that succeeded.
        job_files: JSON files with one job each.
    """
    forbid_network()
    return max([run_job(probe, json.loads(Path(name).read_text(encoding="utf-8"))) for name in job_files], default=1)


def run_job(probe: Probe, job: Job) -> int:
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


def forbid_network() -> None:
    """Switch Hugging Face libraries to offline mode, and raise OSError where Python code connects to a network.

    This is for plain errors. The confinement of the process keeps the network from all of its code.
    """
    os.environ.update(
        HF_HUB_OFFLINE="1",
        TRANSFORMERS_OFFLINE="1",
        HF_DATASETS_OFFLINE="1",
        HF_HUB_DISABLE_TELEMETRY="1",
        HF_HUB_DISABLE_PROGRESS_BARS="1",
        TOKENIZERS_PARALLELISM="false",
    )

    def refuse(event: str, arguments: tuple[Any, ...]) -> None:
        # Unix sockets are named by a string; multiprocessing uses them.
        if event == "socket.getaddrinfo" or (event == "socket.connect" and isinstance(arguments[1], tuple)):
            raise OSError(f"a probe must not use the network: {event} {arguments[-1]}")

    sys.addaudithook(refuse)


def versions(packages: Sequence[str]) -> dict[str, str]:
    """Return the versions of Python and of the packages that matter to a script."""
    return {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in packages}}


def weights_digests(folder: Path) -> dict[str, str]:
    """Return the sha256 of every *.safetensors file in `folder`, as this process reads it."""
    digests = {}
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb") as stream:
            digests[file.name] = hashlib.file_digest(stream, "sha256").hexdigest()
    return digests


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


class DecodeClock:
    """Times answers: each prompt until the first token of its answer, and decoding, the tokens after that one.

    Attributes:
        tokens: that were decoded.
        seconds: for all of them.
        prompt_tokens: of the prompts.
        prompt_seconds: for all of them, each with the first token of its answer.
    """

    def __init__(self) -> None:
        self.tokens = 0
        self.seconds = 0.0
        self.prompt_tokens = 0
        self.prompt_seconds = 0.0
        self._begun: float | None = None
        self._last: float | None = None
        self._length = 0

    def begin(self, prompt_tokens: int = 0) -> None:
        """Begin the answer to a prompt of so many tokens; 0 leaves the prompt untimed."""
        self._last, self._length = None, prompt_tokens
        self._begun = time.perf_counter() if prompt_tokens else None

    def tick(self) -> None:
        """Take note of a token that was just found."""
        now = time.perf_counter()
        if self._last is not None:
            self.tokens += 1
            self.seconds += now - self._last
        elif self._begun is not None:
            self.prompt_tokens += self._length
            self.prompt_seconds += now - self._begun
        self._last = now

    def fields(self) -> dict[str, Any]:
        """Return the fields of result.json: a time is null where nothing was timed."""
        return {
            "decode_tokens": self.tokens,
            "decode_s": self.seconds if self.tokens else None,
            "prefill_tokens": self.prompt_tokens,
            "prefill_s": self.prompt_seconds if self.prompt_tokens else None,
        }


def greedy(
    torch: Any, model: Any, folder: Path, prompt: list[int], max_new_tokens: int, clock: DecodeClock
) -> list[int]:
    """Return the tokens generated greedily after `prompt`; an end-of-sequence token is the last one."""
    if max_new_tokens < 1:
        return []
    transformers: Any = importlib.import_module("transformers")
    ends = end_tokens(folder)
    # A checkpoint's own generation_config may sample or penalize repetition.
    model.generation_config = transformers.GenerationConfig(
        do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=ends or None, pad_token_id=ends[0] if ends else 0
    )
    ids = torch.tensor([prompt], device=model.device)

    def watch(found: Any, *_: Any, **__: Any) -> Any:
        int(found[0, -1])  # waits for the GPU, which computes while Python goes on
        clock.tick()
        return torch.zeros(found.shape[0], dtype=torch.bool, device=found.device)

    clock.begin(len(prompt))
    criteria = transformers.StoppingCriteriaList([watch])
    with torch.inference_mode():
        made = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), stopping_criteria=criteria)
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
    """Free the GPU memory of earlier jobs and reset the peak."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_memory_bytes(torch: Any, device: str) -> int:
    """Return a peak in bytes: on the GPU that of this job's tensors, on the CPU that of the process so far."""
    if device == "cuda":
        return int(torch.cuda.max_memory_allocated())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def prepare_gptqmodel(device: str) -> None:
    """Set what GPTQModel reads from its environment when it is imported."""
    # Kernels are compiled on first use; a folder in this environment keeps them apart from those of another torch.
    os.environ.setdefault("GPTQMODEL_TORCH_EXTENSIONS_DIR", str(Path(sys.prefix) / "kernels"))
    # GPTQModel refuses its own default number of workers on a small machine.
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "4")
    # Without this variable the Machete kernel downloads CUTLASS.
    os.environ["GPTQMODEL_OFFLINE"] = "1"
    if device == "cpu":
        # The kernel compiles its dequantization, which needs a C++ compiler and took 30 s for two layers.
        os.environ["TORCHDYNAMO_DISABLE"] = "1"


def provide_pcre() -> str:
    """Replace PyPcre by Python's re if PyPcre is not installed; return PyPcre's version, or what replaces it.

    PyPcre exists as C source only. GPTQModel matches module names with it; its patterns mean the same in both.
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


def gptqmodel_backend(quantization: dict[str, Any], device: str) -> str:
    """Return GPTQModel's name of the kernel that computes a checkpoint.

    On the CPU it is the plain PyTorch kernel. The default depends on the processor: with AVX512-BF16 it first compiles
    an extension (160 s on two cores) and then computes in bfloat16. On a GPU it is the Triton kernel, which has no 3
    bits. The default there downloads CUTLASS (Machete, on Hopper) or compiles for minutes (Marlin).

    Args:
        quantization: quantization_config of config.json.
        device: "cpu" or "cuda".
    """
    others = (given.get("bits") for given in (quantization.get("dynamic") or {}).values())
    return "gptq_torch" if device == "cpu" or 3 in (quantization["bits"], *others) else "gptq_triton"


def quantization_config(folder: Path) -> dict[str, Any]:
    """Return quantization_config of config.json.

    Raises:
        ValueError: config.json has none.
    """
    found: dict[str, Any] | None = json.loads((folder / "config.json").read_text(encoding="utf-8")).get(
        "quantization_config"
    )
    if found is None:
        raise ValueError("config.json has no quantization_config: the weights would be taken for plain ones")
    return found


def answers(torch: Any, model: Any, job: Job, output: Path) -> dict[str, Any]:
    """Write the logits of a job's rows, and generate greedily, with a model that computes as transformers' do.

    Returns:
        The fields `generated`, `forward_s` (seconds for all rows), `peak_memory_bytes`, and those of `DecodeClock`.
    """
    started = time.perf_counter()
    rows = job["input_ids"]
    write_logits(output / "logits.npy", (row_logits(torch, model, row) for row in rows), len(rows))
    forward_s = time.perf_counter() - started
    folder, clock = Path(job["model_dir"]), DecodeClock()
    return {
        "generated": [greedy(torch, model, folder, prompt, job["max_new_tokens"], clock) for prompt in job["prompts"]],
        **clock.fields(),
        "forward_s": forward_s,
        "peak_memory_bytes": peak_memory_bytes(torch, job["device"]),
    }


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write `value` so that the file appears whole or not at all."""
    temporary = path.with_name(f".tmp-{path.name}")
    temporary.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    temporary.replace(path)
