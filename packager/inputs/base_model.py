"""Stage 3, source: open the fp16 base model as files with known digests; the whole model is never in memory.

It is a local folder, or the Hub at a pinned commit. Only safetensors are read: a pickle can run code when it is opened.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from packager.errors import SourceError
from packager.inputs.chat_template import chat_template_digest, templates_beside
from packager.inputs.hub_models import download_model
from packager.inputs.source_files import (
    SourceFiles,
    check_contents,
    list_source_files,
    read_small,
)
from packager.inputs.tied_tensors import check_tied
from packager.model.architecture import IGNORED_SUFFIXES, Architecture
from packager.model.branch_config import branch_file, normalized
from packager.model.branch_rules import ModelFacts
from packager.model.config_values import read_config, shortened
from packager.model.contract_files import content_rule
from packager.model.safetensors_file import StoredTensor, TensorInfo, all_finite, read_tensor, stored_tensors
from packager.receipt import CONFIG, FileRecord, SourceRecord, digest_of
from packager.recipe.file import RecipeFile
from packager.system.files import bytes_record, file_records, has_record
from packager.system.text import printable

if TYPE_CHECKING:
    import torch

_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_ABSENT = object()
_LOCK_ANEW = "where the model has moved on, make the lock anew: packager lock"
_MOST_DERIVED_BYTES = 1 << 16  # inverse frequencies: one float for each two dimensions of a head
_MOST_TENSORS = 400_000  # a model of 1000 blocks has 12,000; one with experts many more


@dataclass(frozen=True, kw_only=True)
class SourceModel:
    """A base model on disk.

    Attributes:
        folder: with its files.
        files: the names of those that are used.
        config: content of config.json, as a branch gets it.
        facts: what the rules for a branch's configs know of the model.
        architecture: its shapes.
        record: identity and digests, for the receipts.
        tensors: position of every tensor's bytes, by name; derived buffers are left out.
    """

    folder: Path
    files: SourceFiles
    config: Mapping[str, object]
    facts: ModelFacts
    architecture: Architecture
    record: SourceRecord
    tensors: Mapping[str, StoredTensor]

    def read(self, name: str) -> "torch.Tensor":
        """Read one tensor from disk into the CPU's memory, in its stored dtype.

        Raises:
            SourceError: there is no such tensor, or it is outside the blocks and holds NaN or Inf. The tensors of
                blocks are checked on the device, where that costs less.
        """
        if name not in self.tensors:
            raise SourceError(
                "the weights lack a tensor that the model needs",
                where=name,
                why=f"{self.folder} has no tensor of this name",
                hint="the installed transformers may build this architecture with other tensors",
            )
        tensor = read_tensor(self.tensors[name])
        if not name.startswith(f"{self.architecture.blocks_prefix}.") and not all_finite(tensor):
            raise SourceError(
                "the weights contain NaN or Inf", where=name, why=f"in {self.tensors[name].path}",
                hint="the base model is damaged: take the file again, or another revision",
            )  # fmt: skip
        return tensor

    def copied(self, name: str) -> bytes:
        """Return one of `files.copied` or `files.licenses` as a branch gets it, if it is the one that was checked.

        Raises:
            SourceError: the file was replaced since.
        """
        data = read_small(self.folder, name)
        if bytes_record(data) != self.record.files[name]:
            raise _replaced(self.folder / name)
        return branch_file(name, data, self.facts).data

    def check_unchanged(self) -> None:
        """Compare the weights and config.json with the record; files with unchanged times are not read again.

        Raises:
            SourceError: a file was replaced or written while it was read.
        """
        list_source_files(self.folder, self.files.licenses)
        for name in (CONFIG, *self.files.weights):
            if not has_record(self.folder / name, self.record.files[name]):
                raise _replaced(self.folder / name)


def _replaced(path: Path) -> SourceError:
    return SourceError(
        "a file of the base model changed during the build",
        where=str(path),
        why="its sha256 is no longer the one of the file that was checked",
        hint="run the same command again, and let nothing write into that folder meanwhile",
    )


def open_source(
    recipe_file: RecipeFile, log: Callable[[str], None], check: Callable[[Path], object] = lambda _: None
) -> SourceModel:
    """Find the base model, download it from the Hub if needed, and check it against the recipe.

    Args:
        recipe_file: the recipe and its path.
        log: receives a line for each download.
        check: receives the folder when it holds the small files, before weights are downloaded; may raise.

    Raises:
        SourceError: the model is missing, gated, has only pickles, is truncated, or differs from its config.json or
            from the recipe's copy of it; or a file does not hold what its name promises, see `list_source_files`.
    """
    base, licenses = recipe_file.recipe.base_model, recipe_file.recipe.card.license.base_files
    revision = recipe_file.lock.base_model.revision
    if base.path is not None:
        folder = recipe_file.base_folder(base.path)
        check(folder)
    else:
        locked = recipe_file.lock.base_model.files
        folder = download_model(base.id, str(revision), licenses, log, check, locked)
    source = read_source(
        folder, recipe_file.architecture, base_id=base.id, revision=revision, licenses=licenses
    )  # fmt: skip
    _check_files(source, recipe_file)
    _check_chat_template(folder, recipe_file)
    if line := source.files.left_out_line:
        log(printable(line))
    return source


def check_folder_of(recipe_file: RecipeFile) -> None:
    """Check everything about a local base model but the values of its weights; a model on the Hub is not looked at.

    A folder without weights passes: a build can be planned before they are there.

    Raises:
        SourceError: see `open_source`.
    """
    base = recipe_file.recipe.base_model
    if base.path is None:
        return
    folder = recipe_file.base_folder(base.path)
    files = list_source_files(folder, recipe_file.recipe.card.license.base_files)
    check_contents(files)
    _check_config(fp16_config(folder), folder, recipe_file.architecture)
    if files.weights:
        _read_tensors(files, recipe_file.architecture)
        _check_chat_template(folder, recipe_file)


def read_source(
    folder: Path,
    architecture: Architecture,
    *,
    base_id: str,
    revision: str | None = None,
    licenses: Iterable[str] = (),
) -> SourceModel:
    """Open a folder as a base model of an architecture: check every file that is used, and hash it.

    Raises:
        SourceError: see `open_source`.
    """
    config = fp16_config(folder)
    _check_config(config, folder, architecture)
    listed = list_source_files(folder, licenses)
    checked = check_contents(listed)
    tensors = _read_tensors(listed, architecture)
    files = _records(listed, checked)
    weights = {name: record for name, record in files.items() if name.endswith((".safetensors", CONFIG))}
    record = SourceRecord(
        id=base_id,
        revision=revision,
        digest=digest_of({name: entry.sha256 for name, entry in weights.items()} | _text_files(files)),
        files=files,
        dtype=_dtype_of(tensors),
        num_parameters=architecture.num_parameters,
    )
    facts = ModelFacts.of(config, architecture, template=templates_beside(folder))
    return SourceModel(
        folder=folder, files=listed, config=normalized(CONFIG, config, facts).content, facts=facts,
        architecture=architecture, record=record, tensors=tensors,
    )  # fmt: skip


def _records(files: SourceFiles, checked: Mapping[str, FileRecord]) -> dict[str, FileRecord]:
    """Return the records of all files that are used, in the order of their names, those already `checked` included."""
    left = {path: path.relative_to(files.folder).as_posix() for path in files.paths}
    hashed = file_records(path for path, name in left.items() if name not in checked)
    return {name: checked[name] if name in checked else hashed[path] for path, name in left.items()}


def _text_files(files: Mapping[str, FileRecord]) -> dict[str, str]:
    return {name: files[name].sha256 for name in files if content_rule(name) and name != CONFIG}


def _dtype_of(tensors: Mapping[str, StoredTensor]) -> str:
    return ", ".join(sorted({stored.info.dtype for stored in tensors.values()}))


def _check_config(config: Mapping[str, object], folder: Path, architecture: Architecture) -> None:
    """Compare a folder's config.json with the lock's.

    Raises:
        SourceError: they differ; names the keys.
    """
    locked = architecture.config
    keys = sorted({*config, *locked})
    differ = [key for key in keys if config.get(key, _ABSENT) != locked.get(key, _ABSENT)]
    if differ:
        raise SourceError(
            "the base model's config.json is not the one that the lock was made of",
            where=str(folder / CONFIG),
            why="; ".join(f"{key} is {_shown(config, key)}, in the lock {_shown(locked, key)}" for key in differ[:5]),
            hint=_LOCK_ANEW,
        )


def _shown(config: Mapping[str, object], key: str) -> str:
    return shortened(config[key]) if key in config else "absent"


def _check_files(source: SourceModel, recipe_file: RecipeFile) -> None:
    """Compare the files of a base model on the Hub with those of the lock; a lock without files has the commit only.

    Raises:
        SourceError: a file is another one, is not there any more, or is not in the lock.
    """
    locked, found = recipe_file.lock.base_model.files, source.record.files
    if not locked:
        return
    moved = [
        f"{name} has sha256 {record.sha256[:12]} and {record.size_bytes} bytes, "
        f"in the lock {locked[name].sha256[:12]} and {locked[name].size_bytes}"
        for name, record in found.items()
        if name in locked and locked[name] != record
    ]
    # A licence may have been added to the recipe since; the commit identifies it.
    moved += [f"{name} is not in the lock" for name in found if name not in (*locked, *source.files.licenses)]
    moved += [f"{name} is missing" for name in locked if name.endswith(".safetensors") and name not in found]
    if moved:
        raise SourceError(
            "the base model's files are not those that the lock was made of",
            where=str(source.folder),
            why="; ".join(moved[:5]),
            hint=_LOCK_ANEW,
        )


def _check_chat_template(folder: Path, recipe_file: RecipeFile) -> None:
    """Compare the chat template with the lock's. A lock of a commit may have none: the commit identifies the template.

    Raises:
        SourceError: they differ.
    """
    lock = recipe_file.lock
    found, locked = chat_template_digest(folder), lock.chat_template_sha256
    if found == locked or (locked is None and lock.base_model.revision is not None):
        return
    raise SourceError(
        "the base model's chat template is not the one that the lock was made of",
        where=str(folder),
        why=f"its sha256 is {_short(found)}, in the lock {_short(locked)}",
        hint=_LOCK_ANEW,
    )


def _short(digest: str | None) -> str:
    return digest[:12] if digest else "absent"


def fp16_config(folder: Path) -> Mapping[str, object]:
    """Return a model folder's config.json.

    Raises:
        SourceError: it cannot be read, the model is already quantized, or its weights have a name of their own.
    """
    path = folder / CONFIG
    config = read_config(path)
    if method := _quantization_of(config):
        raise SourceError(
            "the base model is already quantized",
            where=str(path),
            why=f"its quantization_config names {method}",
            hint="name the fp16 model as base_model",
        )
    if config.get("transformers_weights") is not None:
        raise SourceError(
            "config.json names a weights file of its own",
            where=str(path),
            why=f"transformers loads {shortened(config['transformers_weights'])}, and other runtimes do not",
            hint="copy the model to a folder of your own, name that file model.safetensors and remove the key "
            "transformers_weights there, and name the folder as base_model.path",
        )
    return config


def _quantization_of(config: Mapping[str, object]) -> str:
    """Return the method of a quantization_config of the model, or of a part of it; "" if there is none."""
    given = config.get("quantization_config")
    if given is not None:
        return shortened(given.get("quant_method") if isinstance(given, Mapping) else given)
    parts = (value for value in config.values() if isinstance(value, Mapping))
    return next(filter(None, map(_quantization_of, parts)), "")


def _read_tensors(files: SourceFiles, architecture: Architecture) -> dict[str, StoredTensor]:
    return _matched(tensors_of(files), architecture, files.folder)


def tensors_of(files: SourceFiles) -> dict[str, StoredTensor]:
    """Return every tensor of a base model's weights files, by name.

    Raises:
        SourceError: there are no weights, a file is damaged, or a tensor is there twice.
    """
    folder = files.folder
    if not files.weights:
        pickles = [name for name in files.left_out if name.endswith(_PICKLES)]
        raise SourceError(
            "no safetensors weights",
            where=str(folder),
            why=f"only pickles are there: {', '.join(pickles[:3])}" if pickles else "no weights at all",
            hint="a pickle can run code when it is opened; name a revision with safetensors, or convert it first",
        )
    found: dict[str, StoredTensor] = {}
    for name in files.weights:
        add_tensors(found, stored_tensors(folder / name), where=str(folder))
    return found


def add_tensors(found: dict[str, StoredTensor], more: Mapping[str, StoredTensor], *, where: str) -> None:
    """Add the tensors of a further weights file.

    Raises:
        SourceError: a tensor is there twice, or there are too many.
    """
    for name, stored in more.items():
        if name in found:
            raise SourceError(f"{name} is stored twice", where=f"{found[name].path.name} and {stored.path.name}")
        found[name] = stored
    if len(found) > _MOST_TENSORS:
        raise SourceError("the weights hold too many tensors", where=where, why=f"more than {_MOST_TENSORS}")


def _matched(found: Mapping[str, StoredTensor], architecture: Architecture, folder: Path) -> dict[str, StoredTensor]:
    expected = {tensor.name: tensor for tensor in architecture.base_tree}
    missing = [name for name in expected if name not in found]
    extra = [name for name in found if name not in expected and not _is_derived(found[name].info)]
    wrong = [
        f"{name} is {list(found[name].info.shape)}, the lock has {list(tensor.shape)}"
        for name, tensor in expected.items()
        if name in found and found[name].info.shape != tensor.shape
    ]
    wrong += [
        f"{name} is {found[name].info.dtype}, the lock has {tensor.dtype}"
        for name, tensor in expected.items()
        if name in found and found[name].info.dtype != tensor.dtype
    ]
    # Some checkpoints store a tied lm_head as well; runtimes use the embedding.
    largest = architecture.largest_tensor_bytes
    tied = {name for name in architecture.tied if name in found and found[name].info.size_bytes <= largest}
    extra = [name for name in extra if name not in tied]
    if missing or extra or wrong:
        listed = [f"missing {name}" for name in missing] + [f"unexpected {name}" for name in extra] + wrong
        more = f" and {len(listed) - 5} more" if len(listed) > 5 else ""
        raise SourceError(
            "the weights are not those that the lock describes",
            where=str(folder),
            why="; ".join(listed[:5]) + more,
            hint=f"a shard may be missing: compare the folder with the model's page; {_LOCK_ANEW}",
        )
    check_tied(tied, found, folder)
    return {name: found[name] for name in expected}


def _is_derived(tensor: TensorInfo) -> bool:
    """Return whether a tensor is one that runtimes compute themselves; such a tensor is small."""
    return tensor.name.endswith(tuple(IGNORED_SUFFIXES)) and tensor.size_bytes <= _MOST_DERIVED_BYTES
