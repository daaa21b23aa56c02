"""Stage 8, verify: the recipe's loaders open the variants, and their logits are compared with ours.

torch is imported only when there is work to do.
"""

from collections.abc import Sequence
from dataclasses import replace

from packager.pipeline.build_extra import require_build_extra
from packager.pipeline.build_state import BuildState
from packager.receipt import LoaderRecord


def run_loaders(run: BuildState, *, again: bool = False) -> tuple[str, ...]:
    """Stage 8: run the recipe's loaders on the variants, except those that have results or cannot run on this machine.

    All variants take part even if only one is new: a loader's logits must be closer to this variant's than to others'.

    Args:
        run: the build.
        again: run every loader again, those too whose environment is made on request.
    """
    wanted = run.recipe.loaders
    names = wanted.names if again else run.loaders_to_run()
    if not names and not run.missing("verify") and not again:
        return ()
    require_build_extra()
    from packager.prove.verify import VerifyJob, checkpoint_of, verify

    texts, device = run.texts, run.device
    branches = [branch for branch in run.keys if branch in run.receipts]
    runs = {branch: {made.loader: made for made in run.receipts[branch].runs} for branch in branches}
    chosen = {
        "required": tuple(name for name in wanted.required if name in names),
        "if_available": tuple(name for name in wanted.if_available if name in names),
    }
    job = VerifyJob(
        checkpoints=[checkpoint_of(run.receipts[name].provenance, run.workspace.folder(name)) for name in branches],
        ids=texts.evaluation.ids,
        prompts=texts.prompts,
        loaders=wanted.model_copy(update=chosen),
        device=device,
        context=run.runtime_context(run.workspace.work / "verify"),
        refused={
            variant_plan.variant.branch: {
                verdict.loader: verdict.reason for verdict in variant_plan.verdicts if not verdict.is_tried
            }
            for variant_plan in run.plan.variants
        },
        timed=lambda branch, made: runs[branch].update({made.loader: made}),
        on_request=again,
    )
    with run.terminal.stage("verify") as stage, run.terminal.bar(len(names)) as bar:
        under_way = list(names)

        def finished(name: str) -> None:
            under_way.remove(name)
            bar.step(f"{name} done" + (f", {', '.join(under_way)} under way" if under_way else ""), typical=False)

        records = verify(replace(job, finished=finished), run.terminal.log)
    for branch in branches:
        merged = _with_earlier_results(run, branch, records[branch])
        seconds = stage.seconds / len(branches)
        if set(names) != set(wanted.names):
            seconds += run.receipts[branch].seconds.get("verify", 0.0)
        timed = tuple(runs[branch][name] for name in wanted.names if name in runs[branch])
        run.update_receipt(branch, "verify", seconds, {"loaders": merged}, runs=timed)
    return tuple(branches)


def _with_earlier_results(run: BuildState, branch: str, records: Sequence[LoaderRecord]) -> tuple[LoaderRecord, ...]:
    """Return one record per loader of the recipe; a loader that did not run now keeps its earlier result."""
    receipt = run.receipts[branch]
    current = receipt.stages.get("verify") == run.keys[branch]["verify"]
    found = {record.loader: record for record in receipt.provenance.loaders if current}
    for record in records:
        if record.status != "not run" or found.get(record.loader, record).status == "not run":
            found[record.loader] = record
    return tuple(found[name] for name in run.recipe.loaders.names)
