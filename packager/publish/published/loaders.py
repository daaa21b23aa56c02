"""Run the loaders that a branch's record names on the downloaded branch, against our own forward of the same files.

Their input is the branch's own card in the branch's own tokens: every branch has this ordinary text, and its sha256 is
in the record. A branch with errors in the earlier checks is not opened.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from packager.errors import MachineError
from packager.inputs.limits import ModelProcess, TextGroup
from packager.model.devices import DeviceChoice, choose_device, gpu_memory_errors
from packager.model.runtimes import OTHER_LOADER
from packager.prove.environments import RuntimeContext
from packager.prove.loaders import LOADERS
from packager.publish.published.finding import Collector
from packager.receipt import PROVENANCE, README, TOKENIZER, LoaderRecord, Provenance
from packager.system.scratch import ScratchFolder
from packager.system.text import printable
from packager.variant import branch_problem

_TEXT_CHARACTERS = 100_000
_PROMPT_TOKENS = 16
_UNKNOWN = "this version of packager does not know it"
_ANOTHERS = "it is another package's, which is run for a recipe of yours, not for a record of anybody's"
_MAX_UNKNOWN = 5  # loaders that this version does not know, of a record


def check_with_loaders(
    context: RuntimeContext,
    device: DeviceChoice,
    folder: Path,
    branch: str,
    provenance: Provenance,
    found: Collector,
    log: Callable[[str], None],
) -> tuple[LoaderRecord, ...]:
    """Run the loaders that a branch's record names on the branch.

    Args:
        context: folders, environment and processes of the loaders.
        device: the device of the loaders and of our own forward.
        folder: the downloaded and audited branch.
        branch: the branch's name.
        provenance: the branch's record.
        found: has the findings of the earlier checks, and gets those of the loaders.
        log: gets a line per loader.

    Returns:
        One record per loader: passed, failed with the difference, or "not run" with the reason.

    Raises:
        MachineError: a loader's environment cannot be written, or the GPU has no memory for our own forward.
    """
    refused = {record.loader: record for record in provenance.loaders if record.status == "refused"}
    ordered = sorted(provenance.loaders, key=lambda each: each.required)
    wanted = {record.loader: record.required for record in ordered if record.loader not in refused}
    known = {name: wanted[name] for name in LOADERS if name in wanted}
    if problem := _problem(branch, folder, found):
        records = [_not_run(name, required, problem) for name, required in known.items()]
    elif known:
        with ScratchFolder("loaders", within=context.scratch) as scratch:
            own = replace(context, scratch=scratch.path)
            records = _run(own, device, folder, branch, provenance, known, log)
    else:
        records = []
    unknown = [name for name in wanted if name not in known][:_MAX_UNKNOWN]
    records += [_not_run(name, wanted[name], _ANOTHERS if _is_other(name) else _UNKNOWN) for name in unknown]
    records += [_not_run(name, record.required, _refusal(record)) for name, record in refused.items()][:_MAX_UNKNOWN]
    if not records:
        found.add("loader-not-run", PROVENANCE, "the record names no loader")
    for record in records:
        if record.status == "failed":
            found.add("loader-failed", record.loader, record.reason)
        elif record.status == "not run" and record.required:
            found.add("loader-not-run", record.loader, record.reason)
    return tuple(records)


def _problem(branch: str, folder: Path, found: Collector) -> str:
    """Return why the branch cannot be opened, or ""."""
    if found.has_errors or branch_problem(branch):
        return "the branch failed the checks before this one"
    if found.has("architecture-unknown"):
        return "its architecture is not supported by the checks"
    if not (folder / TOKENIZER).exists():
        return f"there is no {TOKENIZER} to make tokens with"
    return ""


def _is_other(name: str) -> bool:
    return name.startswith(OTHER_LOADER)


def _refusal(record: LoaderRecord) -> str:
    return printable(f"refused by rule, says the branch's record: {record.reason}")


def _not_run(name: str, required: bool, reason: str) -> LoaderRecord:
    return LoaderRecord(loader=printable(name), required=required, status="not run", reason=reason)


def _run(
    context: RuntimeContext,
    device: DeviceChoice,
    folder: Path,
    branch: str,
    provenance: Provenance,
    wanted: Mapping[str, bool],
    log: Callable[[str], None],
) -> list[LoaderRecord]:
    import torch

    from packager.prove.verify import VerifyJob, check_loaders, checkpoint_of, references_of
    from packager.recipe import Loaders

    loaders = Loaders.model_validate(
        {
            "required": tuple(name for name, required in wanted.items() if required),
            "if_available": tuple(name for name, required in wanted.items() if not required),
        }
    )
    checkpoint = checkpoint_of(provenance.model_copy(update={"branch": branch}), folder)
    try:
        with gpu_memory_errors("run again with --device cpu"):
            rows = _token_rows(folder, loaders.num_rows, loaders.seq_len)
            job = VerifyJob(
                checkpoints=[checkpoint],
                ids=torch.tensor(rows),
                prompts=[rows[0][:_PROMPT_TOKENS]],
                loaders=loaders,
                device=choose_device(device),
                context=context,
            )
            references = references_of(job)
    except MachineError:
        raise
    except Exception as error:  # noqa: BLE001 - untrusted files: tokenizers, transformers and torch may raise any error
        reason = printable(f"our own forward of it failed: {type(error).__name__}: {error}")
        return [
            LoaderRecord(loader=name, required=required, status="failed", reason=reason)
            for name, required in wanted.items()
        ]
    return list(check_loaders(job, references, log)[branch])


def _token_rows(folder: Path, num_rows: int, seq_len: int) -> Sequence[list[int]]:
    """Return `num_rows` rows of `seq_len` token ids of the card; a short card is repeated."""
    text = (folder / README).read_text(encoding="utf-8")[:_TEXT_CHARACTERS]
    tokenizer = (folder / TOKENIZER).read_text(encoding="utf-8")
    with ModelProcess() as process:
        ((ids,),) = process.encode(tokenizer, [TextGroup(texts=[text], add_special_tokens=True)])
    stream = ids * (num_rows * seq_len // len(ids) + 1)
    return [stream[begin : begin + seq_len] for begin in range(0, num_rows * seq_len, seq_len)]
