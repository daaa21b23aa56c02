"""llm-compressor: one permutation of W4A16 with its GPTQ modifier and the sequential pipeline.

Timed: `oneshot(...)`: tracing, calibrating, solving; not packing, which happens when a compressed model is saved. It
solves all linears of a layer from the unquantized layer's activations (true_sequential False in GPTQ's words), which
takes two forwards per layer where the others take up to five. Its act order is "static": columns are solved in order of
decreasing diag(H), but groups are those of the stored order (static_groups). What is saved is the dequantized model.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from peer import Job, Stopwatch, need, rows_of, run, versions


def quantize(job: Job) -> dict[str, Any]:
    """Quantize one model and save its dequantized weights if asked to."""
    llmcompressor: Any = need("llmcompressor")
    modifiers: Any = need("llmcompressor.modifiers.gptq")
    session: Any = need("llmcompressor.core.session_functions")
    torch: Any = need("torch")
    transformers: Any = need("transformers")
    dtype = torch.float16 if job["device"] == "cuda" else torch.float32
    model = transformers.AutoModelForCausalLM.from_pretrained(job["model_dir"], dtype=dtype)
    weights = {
        "num_bits": job["bits"], "type": "int", "symmetric": job["sym"], "strategy": "group",
        "group_size": job["group_size"],
    }  # fmt: skip
    actorder = "static" if job["desc_act"] else None
    modifier = modifiers.GPTQModifier(
        config_groups={"group_0": {"targets": ["Linear"], "weights": weights}},
        ignore=["lm_head"],
        actorder=actorder,
        dampening_frac=job["damp_percent"],
    )
    settings: dict[str, Any] = {"pipeline": "sequential", "batch_size": 1}
    if job["fastest"]:
        # Activations stay on the GPU between layers, as with the others; the default is the CPU.
        device = "cuda:0" if job["device"] == "cuda" else "cpu"
        settings |= {"sequential_offload_device": device, "batch_size": job["batch_size"]}
    rows = rows_of(job)
    watch = Stopwatch(job["device"])
    ended = session.LifecycleCallbacks.sequential_epoch_end

    def layer_done(modules: Any, **rest: Any) -> Any:
        state = ended(modules, **rest)
        watch.mark()
        return state

    session.LifecycleCallbacks.sequential_epoch_end = layer_done
    try:
        with watch:
            llmcompressor.oneshot(
                model=model,
                recipe=modifier,
                dataset=_loader(torch, rows, settings["batch_size"]),
                num_calibration_samples=len(rows),
                max_seq_length=rows.shape[1],
                **settings,
            )
    finally:
        session.LifecycleCallbacks.sequential_epoch_end = ended
    outcome = watch.outcome()
    if job["save_dir"]:
        _save(model, Path(job["model_dir"]), Path(job["save_dir"]))
    return {
        **outcome,
        "timed": "oneshot, without packing",
        "settings": {**settings, "actorder": actorder, "true_sequential": False},
        "versions": versions("llmcompressor", "compressed-tensors", "accelerate", "numpy"),
    }


def _loader(torch: Any, rows: Any, batch_size: int) -> Any:
    """Return a loader of batches in the form that the pipeline expects."""

    def collate(part: list[Any]) -> dict[str, Any]:
        ids = torch.stack(part)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    return torch.utils.data.DataLoader(list(rows), batch_size=batch_size, shuffle=False, collate_fn=collate)


def _save(model: Any, source: Path, folder: Path) -> None:
    """Write the weights as the modifier left them, rounded to the grid, and the base model's config."""
    safetensors: Any = need("safetensors.torch")
    weights = {
        name: parameter.detach().to("cpu").contiguous()
        for name, parameter in model.state_dict().items()
        if name.endswith((".weight", ".bias"))
    }
    folder.mkdir(parents=True, exist_ok=True)
    safetensors.save_file(weights, str(folder / "model.safetensors"))
    (folder / "config.json").write_bytes((source / "config.json").read_bytes())


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:], quantize))
