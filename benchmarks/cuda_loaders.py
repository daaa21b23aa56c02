"""Open variants of a model in loaders, kernel by kernel, and print what each computes beside our own forward.

    python benchmarks/cuda_loaders.py --json loaders.json
    python benchmarks/cuda_loaders.py --recipe FOLDER/recipe.yaml --prompts 4:128 --new-tokens 64 --openings 2
    python benchmarks/cuda_loaders.py --layers 6 --permutations 128:static,64:full --searches true
    python benchmarks/cuda_loaders.py --loaders autogptq:triton,vllm:machete --vllm-python VENV/bin/python

The recipe's model is quantized into each permutation, once per --searches value. With --layers it is a model of
Llama-2-13B's shape, or of another one, with that many layers and random weights. Each loader opens all variants in one
process, alone on the machine, through the probe of a build and by the same verdict: logits, digests of what it read,
greedily generated tokens, of which near-ties count as equal. After a colon stands the kernel, by the runtime's own
name; without one it is the probe's choice. Loaders get the environments of their locks; --vllm-python names another
interpreter that has vLLM, such as one of the torch at hand. The exit status is 1 if a loader fails on a variant.

A control shows what the verdict is worth on this model: the answers to one variant, judged as those to another, which
must fail. Random weights have no text to agree on, but variants of them differ as much as those of a trained model do.

Times are those of the last opening: the first one compiles and tunes kernels. Prefill is the time from a prompt to its
first token, decoding that of the tokens after it, one answer at a time.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import get_args

import numpy as np
import torch
from cuda_loaders_table import Opened, table
from make_model import ModelSpec, add_shape_arguments, make, shape_of
from numpy.typing import NDArray
from quality import DEMO, Permutation, permutation_of
from rich.console import Console
from safetensors import safe_open

from packager.errors import LoaderError, LoaderUnavailableError, PackagerError
from packager.pipeline.build_options import Options
from packager.pipeline.build_state import BuildState
from packager.pipeline.quantize_stage import quantize_and_pack
from packager.prove.environments import RuntimeContext, ensure_environment
from packager.prove.loaders import LOADERS, LoaderSpec
from packager.prove.probes import ProbeJob, ProbeResult, run_probes
from packager.prove.verify import (
    Checkpoint,
    VerifyJob,
    checkpoint_of,
    judge_loader,
    references_of,
    rounding_errors,
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
_LOADERS = (
    "autogptq,exllamav2,transformers,transformers:gptq_marlin,gptqmodel,gptqmodel:gptq_marlin,gptqmodel:gptq_torch,"
    "gptqmodel:gptq_exllama_v2"
)
_PERMUTATIONS = "128,32:static,64:group,64:full"
_SEARCHES: dict[str, ScaleSearch] = {"true": True, "signed": "signed", "false": False}
# Rows and tokens per row that a random model is calibrated on; its held-out text has rows of the same length.
_RANDOM_ROWS, _RANDOM_SEQ_LEN = 64, 512
_RANDOM_PROMPTS = (4, 128)
# The loaders that take the name of a kernel.
_CHOOSE = ("autogptq", "transformers", "gptqmodel", VLLM)


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """A loader with one of its kernels.

    Attributes:
        name: as in recipes.
        backend: the kernel by the runtime's own name; None is the probe's choice.
    """

    name: str
    backend: str | None

    @property
    def title(self) -> str:
        """As on the command line."""
        return f"{self.name}:{self.backend}" if self.backend else self.name

    def spec(self) -> LoaderSpec:
        """Return the loader."""
        return LOADERS[self.name]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns 1 if a loader failed or a control passed, an error's status if the build failed."""
    given, permutations = _parse(arguments)
    terminal = Terminal()
    shutil.rmtree(given.work, ignore_errors=True)
    if given.layers is not None:
        given.recipe = _random_model(given)
    options = Options(dist=given.work, cache=given.cache, device=given.device, environ=dict(os.environ))
    found: list[Opened] = []
    try:
        file = RecipeFile.load(given.recipe)
        recipe = with_variants(file.recipe, permutations, [_SEARCHES[name] for name in given.searches.split(",")])
        run = BuildState(replace(file, recipe=recipe), options, terminal)
        with run.workspace.locked():
            run.read_receipts()
            quantize_and_pack(run)
        job = verify_job(run, given)
        for opened in open_all(job, given.loaders, given.vllm_python, given.openings):
            found.append(opened)
            what = f"{opened.branch}, answers to {opened.control}" if opened.control else opened.branch
            terminal.log(f"{opened.runtime} {what}: {opened.record.status} {opened.record.reason}")
            if given.json:  # after each variant: an interrupted run keeps its results
                content = json.dumps([each.plain() for each in found], indent=2)
                write_atomic(given.json.absolute(), content.encode() + b"\n")
    except PackagerError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    Console(width=None if sys.stdout.isatty() else 220).print(table(found))
    return int(not all(each.as_wanted for each in found))


def _random_model(given: argparse.Namespace) -> Path:
    """Make the model with random weights, on the GPU where the run computes there, and return its recipe."""
    spec = ModelSpec(
        shape=shape_of(given),
        rows=_RANDOM_ROWS,
        seq_len=_RANDOM_SEQ_LEN,
        seed=0,
        shard_bytes=5_000_000_000,
        on_gpu=given.device != "cpu" and torch.cuda.is_available(),
    )
    folder: Path = given.work / "random"
    make(folder, spec)
    return folder / "recipe.yaml"


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


def verify_job(run: BuildState, given: argparse.Namespace) -> VerifyJob:
    """Return what the stage "verify" of a build would let loaders compute, with the options of the command line.

    Raises:
        PackagerError: the held-out text is too short for the rows or the prompts.
    """
    context = run.runtime_context(run.workspace.work / "verify")
    changes = {"timeout_s": given.timeout, "max_new_tokens": given.new_tokens, "seq_len": given.seq_len}
    loaders: Loaders = run.recipe.loaders.model_copy(update={name: of for name, of in changes.items() if of})
    ids = run.texts.evaluation.ids
    count, length = given.prompts or (0, 0)
    if count > ids.shape[0] or max(given.seq_len or 0, length) > ids.shape[1]:
        raise LoaderError(f"the held-out text has {ids.shape[0]} rows of {ids.shape[1]} tokens, and more are asked for")
    receipts = run.ordered_receipts()
    return VerifyJob(
        checkpoints=[
            checkpoint_of(receipt.provenance, run.workspace.folder(receipt.provenance.branch)) for receipt in receipts
        ],
        ids=ids,
        prompts=ids[:count, :length].tolist() if given.prompts else run.texts.prompts,
        loaders=loaders,
        device=run.device,
        context=replace(context, confinement=given.confinement) if given.confinement else context,
    )


def open_all(job: VerifyJob, runtimes: Sequence[Runtime], vllm_python: Path | None, openings: int) -> Iterator[Opened]:
    """Yield what each loader makes of each checkpoint, and controls by the first loader that answers for all.

    A loader that cannot run yields its reason for each checkpoint.
    """
    references = references_of(job)
    errors = {
        each.branch: rounding_errors(each, job, references[each.branch], job.context.log) for each in job.checkpoints
    }
    negative = {each.branch: negative_share(each.folder) for each in job.checkpoints}
    controlled = len(job.checkpoints) < 2
    for runtime in runtimes:
        outcomes = _outcomes(job, runtime, vllm_python, openings, next(iter(references.values())).shape[-1])
        for checkpoint, outcome in zip(job.checkpoints, outcomes, strict=True):
            record = _judged(job, runtime, checkpoint, outcome, references, errors[checkpoint.branch])
            yield _opened(runtime, record, outcome, branch=checkpoint.branch, negative=negative[checkpoint.branch])
        if controlled or not all(isinstance(outcome, ProbeResult) for outcome in outcomes):
            continue
        controlled = True
        for index, checkpoint in enumerate(job.checkpoints):
            record = _judged(job, runtime, checkpoint, outcomes[index - 1], references, errors[checkpoint.branch])
            yield Opened(
                runtime=runtime.title,
                branch=checkpoint.branch,
                negative=negative[checkpoint.branch],
                record=record,
                control=job.checkpoints[index - 1].branch,
            )


def _judged(
    job: VerifyJob,
    runtime: Runtime,
    checkpoint: Checkpoint,
    outcome: ProbeResult | LoaderError,
    references: Mapping[str, NDArray[np.float32]],
    errors: Callable[[str], float],
) -> LoaderRecord:
    gaps = token_gaps(checkpoint, sequences_of(outcome, job) if isinstance(outcome, ProbeResult) else [], job)
    return judge_loader(runtime.spec().name, checkpoint, outcome, references, gaps, errors, job)


def _opened(
    runtime: Runtime, record: LoaderRecord, outcome: ProbeResult | LoaderError, *, branch: str, negative: float
) -> Opened:
    opened = Opened(runtime=runtime.title, branch=branch, negative=negative, record=record)
    if isinstance(outcome, LoaderError):
        return opened
    return replace(
        opened,
        load_s=outcome.load_s,
        prefill=outcome.prefill_tokens / outcome.prefill_s if outcome.prefill_s else None,
        decode=outcome.decode_tokens / outcome.decode_s if outcome.decode_s else None,
        peak_memory_bytes=outcome.peak_memory_bytes,
    )


def _outcomes(
    job: VerifyJob, runtime: Runtime, vllm_python: Path | None, openings: int, vocab_size: int
) -> list[ProbeResult | LoaderError]:
    """Run one loader over all checkpoints, in one process; return the last opening of each, or its first failure."""
    spec = runtime.spec()
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
            output_dir=job.context.scratch / runtime.title.replace(":", "-") / str(opening) / checkpoint.branch,
            backend=runtime.backend,
        )
        for opening in range(openings)
        for checkpoint in job.checkpoints
    ]
    found = run_probes(spec, python, probes, job.loaders.timeout_s, job.context)
    by_checkpoint = [found[index :: len(job.checkpoints)] for index in range(len(job.checkpoints))]
    return [next((each for each in tries if isinstance(each, LoaderError)), tries[-1]) for tries in by_checkpoint]


def _python(spec: LoaderSpec, runtime: Runtime, vllm_python: Path | None, context: RuntimeContext) -> Path:
    if runtime.name == VLLM and vllm_python is not None:
        return vllm_python
    return ensure_environment(spec, context)


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


def _parse(arguments: Sequence[str] | None) -> tuple[argparse.Namespace, list[Permutation]]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--recipe", type=Path, help="whose model and texts are used (default: the demo's)")
    add_shape_arguments(parser, layers=None)
    add("--permutations", default=_PERMUTATIONS, help=f"GROUP_SIZE[:ACT_ORDER],... (default {_PERMUTATIONS})")
    add("--searches", default="true,signed", help="values of scale_search (default true,signed)")
    add("--loaders", default=_LOADERS, help=f"LOADER[:KERNEL],... (default {_LOADERS})")
    add("--openings", type=_count, default=1, help="times that a loader opens each variant (default 1)")
    add("--seq-len", type=_count, help="tokens per compared row (default: the recipe's)")
    add("--prompts", type=_prompts, metavar="COUNT:TOKENS", help="prompts from held-out text (default: the recipe's)")
    add("--new-tokens", type=_count, help="tokens generated per prompt (default: the recipe's)")
    add("--vllm-python", type=lambda text: Path(text).absolute(), metavar="PATH", help="an interpreter that has vLLM")
    add("--device", choices=["auto", "cpu", "cuda"], default="auto")
    add("--confinement", choices=get_args(Confinement), help="of the loaders (default: the strongest that works)")
    add("--timeout", type=int, default=600, help="seconds a loader may take for one variant (default 600)")
    add("--work", type=Path, default=Path("build/cuda-loaders"), help="emptied first (default build/cuda-loaders)")
    add("--cache", type=Path, default=Path.home() / ".cache" / "gptq-packager", help="of the loaders' environments")
    add("--json", type=Path, help="write all results here")
    given = parser.parse_args(arguments)
    if given.layers is None:
        given.recipe = given.recipe or DEMO
    elif given.recipe:
        parser.error("--layers makes a model, and --recipe names one: give one of them")
    else:
        given.prompts = given.prompts or _RANDOM_PROMPTS
    given.loaders = [_runtime(parser, text) for text in given.loaders.split(",")]
    if unknown := set(given.searches.split(",")) - set(_SEARCHES):
        parser.error(f"{', '.join(sorted(unknown))}: scale_search is {', '.join(_SEARCHES)}")
    return given, [permutation_of(parser, text) for text in given.permutations.split(",")]


def _count(text: str) -> int:
    if not re.fullmatch(r"[1-9]\d*", text):
        raise argparse.ArgumentTypeError(f"{text!r}: expected a number, 1 or more")
    return int(text)


def _prompts(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"([1-9]\d*):([1-9]\d*)", text)
    if found is None:
        raise argparse.ArgumentTypeError(f"{text!r}: expected COUNT:TOKENS, such as 4:128")
    return int(found[1]), int(found[2])


def _runtime(parser: argparse.ArgumentParser, text: str) -> Runtime:
    name, _, backend = text.partition(":")
    if name not in LOADERS:
        parser.error(f"no such loader: {name}; there are {', '.join(LOADERS)}")
    if backend and name not in _CHOOSE:
        parser.error(f"{name} has no kernels to choose from")
    return Runtime(name=name, backend=backend or None)


if __name__ == "__main__":
    sys.exit(main())
