"""GPTQModel 7.7: one permutation.

Timed: `model.quantize(...)`, which packs in threads while the next layer is solved. By default a batch is one row, and
weights are moved to disk layer by layer; its fastest settings do neither. `act_group_aware` keeps its default: on
without desc_act. Its best settings are `mse`, a search of scales, and FOEM with GPTAQ's correction.
"""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path
from typing import Any

from peer import Job, Stopwatch, need, rows_of, run, versions

FASTEST = {"offload_to_disk": False}
# The exponent of GPTQ's own script, and the values that FOEMConfig's docstring calls the best for both corrections.
_MSE, _ALPHA, _BETA = 2.4, 0.25, 0.2
# The loaders replace PyPcre, which exists as C source only.
_PROBE = Path(__file__).parents[2] / "packager" / "prove" / "loaders" / "packager_isolated.py"


class _Layers:
    """Receives GPTQModel's callback for a finished layer."""

    def __init__(self, watch: Stopwatch) -> None:
        self._watch = watch

    def layer_complete(self, *, layer_idx: int, submodule_finalized: bool) -> None:  # noqa: ARG002 - its signature
        """Mark the end of a layer's solving; its packing may still run."""
        if not submodule_finalized:
            self._watch.mark()


def configure() -> None:
    """Set the environment variables that GPTQModel reads at import: offline, and enough workers on few cores."""
    os.environ["GPTQMODEL_OFFLINE"] = "1"
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", str(max(4, os.cpu_count() or 1)))


def quantize(job: Job) -> dict[str, Any]:
    """Quantize one model and save it if asked to."""
    configure()
    pcre = runpy.run_path(str(_PROBE))["provide_pcre"]()
    gptqmodel: Any = need("gptqmodel")
    torch: Any = need("torch")
    settings: dict[str, Any] = dict(FASTEST) if job["fastest"] else {}
    shown = dict(settings)
    if job["best"]:
        config_of: Any = need("gptqmodel.quantization.config")
        settings |= {"mse": _MSE, "foem": config_of.FOEMConfig(alpha=_ALPHA, beta=_BETA)}
        shown |= {"mse": _MSE, "foem": {"alpha": _ALPHA, "beta": _BETA}}
    batch_size = job["batch_size"] if job["fastest"] else 1
    config = gptqmodel.QuantizeConfig(
        bits=job["bits"],
        group_size=job["group_size"],
        desc_act=job["desc_act"],
        sym=job["sym"],
        damp_percent=job["damp_percent"],
        true_sequential=True,
        **settings,
    )
    on_gpu = job["device"] == "cuda"
    model = gptqmodel.GPTQModel.load(
        job["model_dir"], config, device="cuda:0" if on_gpu else "cpu", dtype=torch.float16 if on_gpu else torch.float32
    )
    rows = rows_of(job)
    examples = [{"input_ids": row[None], "attention_mask": torch.ones_like(row[None])} for row in rows]
    watch = Stopwatch(job["device"])
    model.layer_callback = _Layers(watch)
    with watch:
        model.quantize(examples, batch_size=batch_size)
    outcome = watch.outcome()
    if job["save_dir"]:
        model.save(job["save_dir"])
    return {
        **outcome,
        "timed": "model.quantize, packing included",
        "settings": {**shown, "batch_size": batch_size, "act_group_aware": bool(config.act_group_aware)},
        "versions": {**versions("gptqmodel", "accelerate", "numpy"), "pypcre": pcre},
    }


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:], quantize))
