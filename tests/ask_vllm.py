"""Ask vLLM what it takes; a program of its own, run by vLLM's Python: `python ask_vllm.py QUESTIONS.json`.

A question is [bits, group_size, desc_act, sym, in_features, out_features]. The answer, printed as JSON, has "answers",
a reason or "" for each, and what the rules copy: "classes", "group_sizes", "types" (for CUDA), "head_sizes".
"""

import importlib
import json
import sys
from pathlib import Path
from typing import Any

QUANTIZATION = "vllm.model_executor.layers.quantization"


def refusal(bits: int, group_size: int, desc_act: bool, sym: bool, rows: int, columns: int) -> str:
    """Return why vLLM does not load a linear, from its config to the choice of a kernel, or ""."""
    torch: Any = importlib.import_module("torch")
    kernels: Any = importlib.import_module("vllm.model_executor.kernels.linear")
    auto_gptq: Any = importlib.import_module(f"{QUANTIZATION}.auto_gptq")
    given = {"bits": bits, "group_size": group_size, "desc_act": desc_act, "sym": sym}
    try:
        config = auto_gptq.AutoGPTQConfig.from_config(given)
        auto_gptq.AutoGPTQLinearMethod(config)
        kernels.choose_mp_linear_kernel(
            kernels.MPLinearLayerConfig(
                full_weight_shape=(rows, columns),
                partition_weight_shape=(rows, columns),
                weight_type=config.quant_type,
                act_type=torch.float16,
                group_size=group_size,
                zero_points=False,
            )
        )
    except ValueError as error:
        return str(error)
    return ""


def main(path: str) -> None:
    """Print the answers to the questions in a file."""
    models: Any = importlib.import_module("vllm.model_executor.models.registry")
    auto_gptq: Any = importlib.import_module(f"{QUANTIZATION}.auto_gptq")
    marlin: Any = importlib.import_module(f"{QUANTIZATION}.utils.marlin_utils")
    attention: Any = importlib.import_module("vllm.v1.attention.backends.cpu_attn")
    lists = (models._TEXT_GENERATION_MODELS, models._MULTIMODAL_MODELS, models._TRANSFORMERS_SUPPORTED_MODELS)
    found = {
        "answers": [refusal(*question) for question in json.loads(Path(path).read_text(encoding="utf-8"))],
        "classes": sorted({name for each in lists for name in each}),
        "group_sizes": marlin.MARLIN_SUPPORTED_GROUP_SIZES,
        "types": sorted(auto_gptq.AutoGPTQConfig.TYPE_MAP),
        "head_sizes": attention.CPUAttentionBackend.get_supported_head_sizes(),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
