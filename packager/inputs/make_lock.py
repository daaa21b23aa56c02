"""Make the lock of a recipe: what the base model and the datasets say of themselves. No weights are read.

A base model on the Hub is described from config.json, the small files, and the headers of its weights.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from packager.errors import PlanError, RecipeError, SourceError
from packager.inputs.base_model import add_tensors, fp16_config, tensors_of
from packager.inputs.chat_template import chat_template_digest
from packager.inputs.describe_in_child import describe_in_child
from packager.inputs.hub_models import (
    HubModel,
    check_digests,
    download_files,
    remote_bytes,
    remote_header,
    resolve_dataset,
    resolve_model,
    weights_among,
)
from packager.inputs.lock_prompt import with_prompt
from packager.inputs.model_names import left_out_line
from packager.inputs.source_files import (
    INDEX,
    check_contents,
    check_shards,
    checked_record,
    list_source_files,
)
from packager.inputs.tied_tensors import Same, own_values, same_bytes
from packager.model.architecture import architecture_of
from packager.model.lock import Lock, LockedBase, LockedModel, dataset_key
from packager.model.safetensors_file import StoredTensor, TensorInfo, tensors_at
from packager.receipt import CONFIG, SAFETENSORS, TOKENIZER_FILES, FileRecord
from packager.recipe import Recipe
from packager.recipe.model_fit import is_commit
from packager.recipe.paths import locate_base
from packager.recipe.task_models import TaskData
from packager.recipe.text_models import TextSource
from packager.system.files import file_record
from packager.system.parallel import in_parallel
from packager.system.text import printable

if TYPE_CHECKING:
    from huggingface_hub.hf_api import RepoSibling

# Buffers may be integers; weights of eight bits are somebody's quantization.
_QUANTIZED_DTYPES = frozenset({"F8_E4M3", "F8_E5M2", "I8"})
_MOST_LEFT = 5
_COMPARED_BYTES = 1 << 16  # of a tied tensor on the Hub and of the one that it should be
_MOST_REGULAR_BYTES = 64_000_000  # the Hub wants LFS, and so a digest, from 10 MB on

Log = Callable[[str], None]
# Receives the folder of the base model's small files, or as many of them as are here, and what was described.
SmallFilesCheck = Callable[[Path, LockedModel], None]


def make_lock(
    path: Path,
    recipe: Recipe,
    log: Log,
    *,
    copy: Path | None = None,
    check: SmallFilesCheck = lambda *_: None,
    changed: Log = lambda _: None,
) -> Lock:
    """Describe a recipe's base model, and find the commits of branches and tags.

    Args:
        path: the recipe's file.
        recipe: what it says.
        log: receives a line before what takes long.
        copy: a folder with config.json and perhaps weights, to describe in the place of the model on the Hub.
        check: see `SmallFilesCheck`; may raise.
        changed: see `with_prompt`.

    Raises:
        CalibrationError: the tokenizer cannot be used, see `with_prompt`.
        RecipeError: `copy` and the recipe do not fit.
        SourceError: the base model cannot be read, or is none that can be quantized: names the module and the reason.
    """
    base = recipe.base_model
    if copy is not None:
        return _lock_of_copy(path, recipe, copy, log, check, changed)
    if base.path is None:
        return _lock_of_hub(recipe, log, check, changed)
    folder = locate_base(path.parent, base.path)
    if folder is None:  # a link that was changed since the recipe was checked
        raise SourceError("the base model's folder leaves the recipe's folder", where=base.path)
    return _lock_of_folder(recipe, folder, log, check, changed)


def _lock_of_folder(
    recipe: Recipe, folder: Path, log: Log, check: SmallFilesCheck, changed: Log, *, revision: str | None = None
) -> Lock:
    files = list_source_files(folder, recipe.card.license.base_files)
    check_contents(files)
    config = fp16_config(folder)
    # A copy of config.json alone describes a model whose weights are on the Hub.
    stored = tensors_of(files) if files.weights or revision is None else None
    base = LockedBase(id=recipe.base_model.id, revision=revision, files={})
    lock = _lock(recipe, base, config, stored, chat_template_digest(folder), str(folder), log)
    check(folder, lock.model)
    return with_prompt(lock, recipe, folder, str(folder), changed, partial=revision is not None)


def _lock_of_copy(path: Path, recipe: Recipe, copy: Path, log: Log, check: SmallFilesCheck, changed: Log) -> Lock:
    revision = recipe.base_model.revision
    if revision is None or not is_commit(revision):
        given = "a folder of its own" if revision is None else f"the branch or tag {revision}"
        raise RecipeError(
            f"--from describes a copy of a model on the Hub at a commit; the base_model of {path} has {given}",
            hint="write the full commit id of the copy as base_model.revision",
        )
    return _lock_of_folder(recipe, copy, log, check, changed, revision=revision)


def _lock_of_hub(recipe: Recipe, log: Log, check: SmallFilesCheck, changed: Log) -> Lock:
    base, revision = recipe.base_model, str(recipe.base_model.revision)
    log(f"reading the description of {base.id} at {revision}")
    model = resolve_model(base.id, revision, recipe.card.license.base_files)
    if line := left_out_line(model.left_out):
        log(printable(line))
    needed = (CONFIG, INDEX, *TOKENIZER_FILES)
    small = [name for name, file in model.files.items() if name in needed or file.lfs is None]
    _check_regular(model, small)
    folder = download_files(model.id, model.commit, small)
    check_digests(folder, (model.files[name] for name in small))
    digests = {name: _digest_of_downloaded(folder, name) for name in small}
    weights = weights_among(model.files, folder)
    check_shards(weights, model.files.keys(), model.where)
    files = {
        name: digests.get(name) or _stated(file)
        for name, file in sorted(model.files.items())
        if name in weights or not name.endswith(SAFETENSORS)
    }
    config = fp16_config(folder)
    stored = _remote_tensors(model, weights)

    def same(a: StoredTensor, b: StoredTensor) -> bool:
        # A build, which has the files, compares all bytes.
        count = min(a.info.size_bytes, _COMPARED_BYTES)
        return remote_bytes(model, a.path.name, a.offset, count) == remote_bytes(model, b.path.name, b.offset, count)

    locked = LockedBase(
        id=base.id, requested=None if is_commit(revision) else revision, revision=model.commit, files=files
    )  # fmt: skip
    lock = _lock(recipe, locked, config, stored, chat_template_digest(folder), model.where, log, same)
    check(folder, lock.model)
    return with_prompt(lock, recipe, folder, model.where, changed, partial=False)


def _check_regular(model: HubModel, names: list[str]) -> None:
    """Refuse to download a large file that the Hub states no digest of."""
    for name in names:
        size_bytes = model.files[name].size or 0
        if size_bytes > _MOST_REGULAR_BYTES:
            raise SourceError(
                "a file of the base model has no digest", where=f"{model.where}: {name}",
                why=f"it has {size_bytes} bytes; the Hub states the sha256 of every file of this size",
            )  # fmt: skip


def _digest_of_downloaded(folder: Path, name: str) -> FileRecord:
    if name == INDEX or name.endswith(SAFETENSORS):
        return file_record(folder / name)
    return checked_record(folder, name)


def _stated(file: "RepoSibling") -> FileRecord:
    """Return the size and sha256 that the Hub states of a large file."""
    return FileRecord(size_bytes=file.size or 0, sha256=file.lfs.sha256 if file.lfs is not None else "")


def _remote_tensors(model: HubModel, names: Sequence[str]) -> dict[str, StoredTensor]:
    """Read the headers of weights files, several at a time."""
    found: dict[str, StoredTensor] = {}
    for name, header in zip(names, in_parallel(lambda name: remote_header(model, name), names), strict=True):
        add_tensors(found, tensors_at(Path(name), header), where=model.where)
    return found


def _lock(
    recipe: Recipe,
    base: LockedBase,
    config: Mapping[str, object],
    stored: Mapping[str, StoredTensor] | None,
    chat_template_sha256: str | None,
    where: str,
    log: Log,
    same: Same = same_bytes,
) -> Lock:
    tensors = None if stored is None else {name: tensor.info for name, tensor in stored.items()}
    _check_dtypes(tensors or {}, where)
    log(f"describing {base.id} with transformers")
    model = describe_in_child(config, tensors, where)
    if own := own_values(model.tied, stored or {}, same):
        log(f"config.json calls tied what has values of its own, which a branch keeps: {printable(', '.join(own))}")
        model = describe_in_child(config, tensors, where, own)
    try:
        architecture = architecture_of(model, where)
    except PlanError as error:
        raise SourceError("the model cannot be described", where=where, why=error.why) from error
    if not architecture.example_linears:
        left = [f"{module}: {reason}" for module, reason in architecture.left.items()]
        more = f"; and {len(left) - _MOST_LEFT} more" if len(left) > _MOST_LEFT else ""
        why = f"{'; '.join(left[:_MOST_LEFT])}{more}" or "its blocks hold no linear"
        raise SourceError("no weight of the model can be quantized", where=where, why=why)
    return Lock(
        lock_version=1,
        made_with={"transformers": metadata.version("transformers")},
        base_model=base,
        datasets=_datasets(recipe),
        chat_template_sha256=chat_template_sha256,
        model=model,
    )


def _check_dtypes(tensors: Mapping[str, TensorInfo], where: str) -> None:
    counts = Counter(info.dtype for info in tensors.values() if info.dtype in _QUANTIZED_DTYPES)
    if counts:
        example = next(name for name, info in tensors.items() if info.dtype in counts)
        found = ", ".join(f"{count} tensors are {dtype}" for dtype, count in sorted(counts.items()))
        raise SourceError(
            "the base model is already quantized", where=where, why=f"{found}, such as {example}",
            hint="name the fp16 model as base_model",
        )  # fmt: skip


def _datasets(recipe: Recipe) -> dict[str, str]:
    """Return the commits of the datasets that the recipe names by a branch or tag."""
    texts: list[TextSource | TaskData] = [*recipe.calibration.texts, recipe.evaluation]
    texts += [data for task in recipe.evaluation.tasks for data in task.sources.values()]
    named = {
        (text.dataset, text.revision)
        for text in texts
        if text.dataset is not None and text.revision is not None and not is_commit(text.revision)
    }
    return {dataset_key(dataset, name): resolve_dataset(dataset, name) for dataset, name in sorted(named)}
