"""Stage 3, source: open the fp16 base model as files with known digests; the whole model is never in memory.

It is a local folder, or the Hub at a pinned commit. Only safetensors are read: a pickle can run code when it is opened.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from packager.errors import SourceError
from packager.inputs.chat_template import templates_beside
from packager.inputs.hub_models import check_stated, download_model
from packager.inputs.lock_check import (
    LOCK_ANEW,
    check_locked_config,
    check_locked_files,
    check_locked_template,
)
from packager.inputs.source_files import (
    SourceFiles,
    check_contents,
    list_source_files,
    read_small,
)
from packager.inputs.tied_tensors import check_tied
from packager.inputs.weights_digests import WeightsDigests, replaced_file
from packager.model.architecture import IGNORED_SUFFIXES, Architecture
from packager.model.branch_config import branch_file, normalized
from packager.model.branch_rules import ModelFacts
from packager.model.checkpoint import MOST_TENSORS
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
_MOST_DERIVED_BYTES = 1 << 16  # inverse frequencies: one float for each two dimensions of a head


@dataclass(frozen=True, kw_only=True)
class SourceModel:
    """A base model on disk.

    Attributes:
        folder: with its files.
        files: the names of those that are used.
        config: content of config.json, as a branch gets it.
        facts: what the rules for a branch's configs know of the model.
        architecture: its shapes.
        base_id: what the recipe calls it.
        revision: its commit, where it is on the Hub.
        dtype: of its tensors.
        small: the records of all files that are used but the weights.
        weights: the digests of the weights files, which may be hashed beside the work on them.
        tensors: position of every tensor's bytes, by name; derived buffers are left out.
    """

    folder: Path
    files: SourceFiles
    config: Mapping[str, object]
    facts: ModelFacts
    architecture: Architecture
    base_id: str
    revision: str | None
    dtype: str
    small: Mapping[str, FileRecord]
    weights: WeightsDigests
    tensors: Mapping[str, StoredTensor]

    @cached_property
    def record(self) -> SourceRecord:
        """Identity and digests, for the receipts; waits until the weights are hashed.

        Raises:
            SourceError: the weights are not those of the lock, or were replaced meanwhile.
        """
        found = {**self.small, **self.weights.records()}
        files = {name: found[name] for name in sorted(found)}
        weights = {name: record for name, record in files.items() if name.endswith((".safetensors", CONFIG))}
        return SourceRecord(
            id=self.base_id,
            revision=self.revision,
            digest=digest_of({name: entry.sha256 for name, entry in weights.items()} | _text_files(files)),
            files=files,
            dtype=self.dtype,
            num_parameters=self.architecture.num_parameters,
        )

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
        if bytes_record(data) != self.small[name]:
            raise replaced_file(self.folder / name)
        return branch_file(name, data, self.facts).data

    def check_unchanged(self) -> None:
        """Compare the weights and config.json with the record; files with unchanged times are not read again.

        Raises:
            SourceError: a file was replaced or written while it was read.
        """
        list_source_files(self.folder, self.files.licenses)
        for name in (CONFIG, *self.files.weights):
            if not has_record(self.folder / name, self.record.files[name]):
                raise replaced_file(self.folder / name)


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
    revision, stated = recipe_file.lock.base_model.revision, dict[str, str]()
    if base.path is not None:
        folder = recipe_file.base_folder(base.path)
        check(folder)
    else:
        locked = recipe_file.lock.base_model.files
        folder, stated = download_model(base.id, str(revision), licenses, log, check, locked)

    def check_weights(found: Mapping[str, FileRecord]) -> None:
        check_stated(folder, found, stated)
        check_locked_files(folder, found, recipe_file)

    source = read_source(
        folder, recipe_file.architecture, base_id=base.id, revision=revision, licenses=licenses,
        check_weights=check_weights, log=log,
    )  # fmt: skip
    check_locked_files(folder, source.small, recipe_file, (*source.small, *source.files.weights))
    check_locked_template(folder, recipe_file)
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
    check_locked_config(fp16_config(folder), folder, recipe_file.architecture)
    if files.weights:
        _read_tensors(files, recipe_file.architecture)
        check_locked_template(folder, recipe_file)


def read_source(
    folder: Path,
    architecture: Architecture,
    *,
    base_id: str,
    revision: str | None = None,
    licenses: Iterable[str] = (),
    check_weights: Callable[[Mapping[str, FileRecord]], None] = lambda _: None,
    log: Callable[[str], None] = lambda _: None,
) -> SourceModel:
    """Open a folder as a base model of an architecture: check every file that is used, and hash it.

    Weights that take long to hash are hashed when `SourceModel.record` is asked for, or before, in the context
    `SourceModel.weights.hashed_beside`.

    Args:
        folder: with the files.
        architecture: that it must have.
        base_id: see `SourceModel`.
        revision: likewise.
        licenses: names of licence files that the recipe wants.
        check_weights: gets the records of the weights files; raises SourceError if they are other ones.
        log: gets a line when hashing beside other work begins and ends.

    Raises:
        SourceError: see `open_source`.
    """
    config = fp16_config(folder)
    check_locked_config(config, folder, architecture)
    listed = list_source_files(folder, licenses)
    checked = check_contents(listed)
    digests = WeightsDigests(folder, listed.weights, check_weights, log)
    tensors = _read_tensors(listed, architecture)
    facts = ModelFacts.of(config, architecture, template=templates_beside(folder))
    source = SourceModel(
        folder=folder, files=listed, config=normalized(CONFIG, config, facts).content, facts=facts,
        architecture=architecture, base_id=base_id, revision=revision, dtype=_dtype_of(tensors),
        small=_small_records(listed, checked), weights=digests, tensors=tensors,
    )  # fmt: skip
    if not digests.long_to_hash:
        digests.records()
    return source


def _small_records(files: SourceFiles, checked: Mapping[str, FileRecord]) -> dict[str, FileRecord]:
    """Return the records of all files that are used but the weights, those already `checked` included."""
    names = [path.relative_to(files.folder).as_posix() for path in files.paths]
    hashed = file_records(files.folder / name for name in files.others)
    return {
        name: checked[name] if name in checked else hashed[files.folder / name]
        for name in names
        if name not in files.weights
    }


def _text_files(files: Mapping[str, FileRecord]) -> dict[str, str]:
    return {name: files[name].sha256 for name in files if content_rule(name) and name != CONFIG}


def _dtype_of(tensors: Mapping[str, StoredTensor]) -> str:
    return ", ".join(sorted({stored.info.dtype for stored in tensors.values()}))


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
    if len(found) > MOST_TENSORS:
        raise SourceError("the weights hold too many tensors", where=where, why=f"more than {MOST_TENSORS}")


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
            hint=f"a shard may be missing: compare the folder with the model's page; {LOCK_ANEW}",
        )
    check_tied(tied, found, folder)
    return {name: found[name] for name in expected}


def _is_derived(tensor: TensorInfo) -> bool:
    """Return whether a tensor is one that runtimes compute themselves; such a tensor is small."""
    return tensor.name.endswith(tuple(IGNORED_SUFFIXES)) and tensor.size_bytes <= _MOST_DERIVED_BYTES
