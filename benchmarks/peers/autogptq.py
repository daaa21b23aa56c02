"""AutoGPTQ 0.7.1: one permutation, as its README quantizes.

Timed: `model.quantize(...)`, with the weights in host memory. It packs at the end, on the CPU; that time is reported
separately. By default a batch is one row, and activations stay on the GPU between layers; weights are moved per layer.
"""

from __future__ import annotations

import logging
import sys
from typing import Any

from peer import Job, Stopwatch, UnavailableError, need, rows_of, run, versions

SETTINGS = {"use_triton": False, "cache_examples_on_gpu": True}


class _Layers(logging.Handler):
    """Marks the line that AutoGPTQ logs when it begins a layer."""

    def __init__(self, watch: Stopwatch) -> None:
        super().__init__()
        self._watch = watch

    def emit(self, record: logging.LogRecord) -> None:
        """Mark a layer if the line begins one."""
        if record.getMessage().startswith("Start quantizing layer"):
            self._watch.mark()


def quantize(job: Job) -> dict[str, Any]:
    """Quantize one model and save it if asked to."""
    auto_gptq: Any = need("auto_gptq")
    base: Any = need("auto_gptq.modeling._base")
    if job["device"] == "cpu":
        raise UnavailableError("AutoGPTQ quantizes on CUDA only")
    config = auto_gptq.BaseQuantizeConfig(
        bits=job["bits"],
        group_size=job["group_size"],
        damp_percent=job["damp_percent"],
        desc_act=job["desc_act"],
        sym=job["sym"],
        true_sequential=True,
    )
    model = auto_gptq.AutoGPTQForCausalLM.from_pretrained(job["model_dir"], config)
    examples = [{"input_ids": row[None], "attention_mask": row[None].new_ones(1, len(row))} for row in rows_of(job)]
    batch_size = job["batch_size"] if job["fastest"] else 1
    watch = Stopwatch(job["device"])
    handler, pack_model = _Layers(watch), base.pack_model
    base.logger.setLevel(logging.INFO)
    base.logger.addHandler(handler)
    base.pack_model = watch.packing(pack_model)
    try:
        with watch:
            model.quantize(examples, batch_size=batch_size, **SETTINGS)
    finally:
        base.pack_model = pack_model
        base.logger.removeHandler(handler)
    outcome = watch.outcome()
    if job["save_dir"]:
        model.save_quantized(job["save_dir"], use_safetensors=True)
    return {
        **outcome,
        "timed": "model.quantize, packing at its end included and given apart",
        "settings": {**SETTINGS, "batch_size": batch_size},
        "versions": versions("auto-gptq", "accelerate", "numpy"),
    }


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:], quantize))
