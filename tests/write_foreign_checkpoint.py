"""Write a GPTQ checkpoint with AutoGPTQ or with GPTQModel itself, as their users do; run in a loader's environment.

`python write_foreign_checkpoint.py auto-gptq|gptqmodel BASE_FOLDER OUTPUT PARAMETERS.json`. The parameters are the
program's own, of BaseQuantizeConfig or QuantizeConfig; "data" has rows of token ids. Both programs compute on the CPU.
"""

import importlib
import json
import sys
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1] / "packager" / "prove" / "loaders"))
isolated: Any = importlib.import_module("packager_isolated")


def by_auto_gptq(base: str, output: str, parameters: dict[str, Any], rows: list[list[int]]) -> None:
    """Quantize with AutoGPTQ, with the CPU in CUDA's place: see auto_gptq_on_cpu.py."""
    torch: Any = importlib.import_module("torch")
    loop: Any = importlib.import_module("auto_gptq.modeling._base")
    auto_gptq: Any = importlib.import_module("auto_gptq")
    loop.CUDA_0 = torch.device("cpu")
    torch.cuda.is_available = lambda: True
    torch.cuda.synchronize = torch.cuda.empty_cache = lambda: None
    torch.cuda.mem_get_info = lambda: (1 << 40, 1 << 40)
    torch.cuda.max_memory_allocated = lambda: 0
    config = auto_gptq.BaseQuantizeConfig(**parameters)
    model = auto_gptq.AutoGPTQForCausalLM.from_pretrained(base, config)
    examples = [{"input_ids": torch.tensor([row]), "attention_mask": torch.ones(1, len(row))} for row in rows]
    model.quantize(examples, cache_examples_on_gpu=False)
    model.save_quantized(output, use_safetensors=True)


def by_gptqmodel(base: str, output: str, parameters: dict[str, Any], rows: list[list[int]]) -> None:
    """Quantize with GPTQModel on the CPU."""
    isolated.prepare_gptqmodel("cpu")
    isolated.provide_pcre()
    gptqmodel: Any = importlib.import_module("gptqmodel")
    config = gptqmodel.QuantizeConfig(device="cpu", **parameters)
    model = gptqmodel.GPTQModel.load(base, config)
    model.quantize([{"input_ids": row, "attention_mask": [1] * len(row)} for row in rows], batch_size=1)
    model.save(output)


if __name__ == "__main__":
    program, base_folder, output_folder, settings = sys.argv[1:]
    values = json.loads(Path(settings).read_text(encoding="utf-8"))
    write = {"auto-gptq": by_auto_gptq, "gptqmodel": by_gptqmodel}[program]
    write(base_folder, output_folder, values.pop("parameters"), values.pop("rows"))
