"""Stage 7, evaluate: the quality of the variants, measured against the fp16 base model.

torch is imported only when there is work to do.
"""

import time

from packager.model.devices import limit_gpu_memory
from packager.pipeline.build_extra import require_build_extra
from packager.pipeline.build_state import BuildState
from packager.system.heap import return_large_blocks


def evaluate(run: BuildState) -> tuple[str, ...]:
    """Stage 7: measure the variants whose quality is not known."""
    missing = run.missing("evaluate")
    if not missing:
        return ()
    require_build_extra()
    from packager.prove.evaluate import quality_of, run_base, run_checkpoint

    if run.device.type == "cpu":
        return_large_blocks()  # so that the host needs the memory that the plan states
    source, texts, device = run.source, run.texts, run.device
    bar_of = run.terminal.bar(len(missing) + 1)
    limited = limit_gpu_memory((device,), run.options.gpu_memory_bytes)
    with run.terminal.stage("evaluate"), bar_of as bar, source.weights.hashed_beside(), limited:
        base = run_base(source, texts, device)
        source.weights.records()  # nothing is recorded of weights that are not those of the lock
        bar.step("fp16 base model")
        for variant_plan in missing:
            branch, started = variant_plan.variant.branch, time.monotonic()
            variant, folder = variant_plan.variant, run.workspace.folder(branch)
            bits = None if variant.mix is not None else variant.bits
            # A name for the result would keep this variant's head while the next variant is run.
            quality = quality_of(base, run_checkpoint(folder, bits, source, texts, device), texts)
            fields = {"quality": quality, "evaluation": texts.evaluation.record}
            run.update_receipt(branch, "evaluate", time.monotonic() - started, fields)
            bar.step(f"{branch} perplexity {quality.perplexity:.4f}, KL {quality.kl_divergence:#.3g}")
    return tuple(variant_plan.variant.branch for variant_plan in missing)
