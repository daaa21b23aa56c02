"""Ask vLLM for the bits of its layers; a program of its own, run by vLLM's Python: `python ask_vllm_bits.py FILE`.

The file has "config", a quantization_config, and "names" of layers. Printed as JSON: the bits of each.
"""

import copy
import importlib
import json
import sys
from pathlib import Path
from typing import Any

QUANTIZATION = "vllm.model_executor.layers.quantization"


def main(path: str) -> None:
    """Print the answers to the questions in a file."""
    auto_gptq: Any = importlib.import_module(f"{QUANTIZATION}.auto_gptq")
    gptq_utils: Any = importlib.import_module(f"{QUANTIZATION}.utils.gptq_utils")
    asked = json.loads(Path(path).read_text(encoding="utf-8"))
    found = {}
    for name in asked["names"]:
        config = auto_gptq.AutoGPTQConfig.from_config(copy.deepcopy(asked["config"]))
        gptq_utils.override_config(config, prefix=name)  # as get_linear_quant_method does
        found[name] = config.weight_bits
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
