"""AutoRound 0.16: one permutation, saved in AutoGPTQ's format.

Timed: `quantize`, which packs nothing. Its defaults are those of the command `auto-round` (200 iterations, batches of
8 rows); its best settings those of `auto-round-best` (1000 iterations) on the same rows. It has no act order.
"""

from __future__ import annotations

import sys
from typing import Any

from peer import Job, Stopwatch, UnavailableError, need, rows_of, run, versions

ITERATIONS = {False: 200, True: 1000}
BATCH_SIZE = 8


def quantize(job: Job) -> dict[str, Any]:
    """Quantize one model and save it if asked to."""
    if job["desc_act"]:
        raise UnavailableError("AutoRound has no act order")
    auto_round: Any = need("auto_round")
    transformers: Any = need("transformers")
    torch: Any = need("torch")
    on_gpu = job["device"] == "cuda"
    model = transformers.AutoModelForCausalLM.from_pretrained(
        job["model_dir"], dtype=torch.float16 if on_gpu else torch.float32
    )
    rows = rows_of(job)
    settings = {"iters": ITERATIONS[job["best"]], "batch_size": BATCH_SIZE}
    rounder = auto_round.AutoRound(
        model,
        transformers.AutoTokenizer.from_pretrained(job["model_dir"]),
        bits=job["bits"],
        group_size=job["group_size"],
        sym=job["sym"],
        dataset=list(rows.split(BATCH_SIZE)),
        nsamples=len(rows),
        seqlen=rows.shape[1],
        device_map="cuda:0" if on_gpu else "cpu",
        **settings,
    )
    watch = Stopwatch(job["device"])
    with watch:
        rounder.quantize()
    if job["save_dir"]:
        rounder.save_quantized(job["save_dir"], format="auto_gptq")
    return {
        **watch.outcome(),
        "timed": "AutoRound.quantize, packing not included",
        "settings": settings,
        "versions": versions("auto-round", "accelerate", "numpy"),
    }


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:], quantize))
