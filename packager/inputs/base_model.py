"""Stage 3, source: open the fp16 base model as files with known digests; the whole model is never in memory.

It is a local folder, or the Hub at a pinned commit. Only safetensors are read: a pickle can run code when it is opened.
"""

import glob
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

from packager.errors import SourceError
from packager.inputs.hub_session import checked_siblings, is_of_client, open_session
from packager.inputs.source_files import (
    INDEX,
    SourceFiles,
    check_contents,
    list_source_files,
    read_small,
)
from packager.model.architecture import BLOCK_PREFIX, IGNORED_SUFFIXES, Architecture, read_architecture
from packager.model.config_values import read_config
from packager.model.contract_files import CONTENT_RULES
from packager.model.safetensors_file import StoredTensor, TensorInfo, read_tensor, stored_tensors
from packager.receipt import CONFIG, TOKENIZER_FILES, FileRecord, SourceRecord, digest_of
from packager.recipe.file import RecipeFile
from packager.system.files import bytes_record, disk_errors, file_records, has_record
from packager.system.text import printable

if TYPE_CHECKING:
    import torch

_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
_MOST_DERIVED_BYTES = 1 << 16  # inverse frequencies: one float for each two dimensions of a head
_MOST_TENSORS = 400_000  # a model of 1000 blocks has 12,000; one with experts many more


@dataclass(frozen=True, kw_only=True)
class SourceModel:
    """A base model on disk.

    Attributes:
        folder: with its files.
        files: the names of those that are used.
        config: content of config.json.
        architecture: its shapes.
        record: identity and digests, for the receipts.
        tensors: position of every tensor's bytes, by name; derived buffers are left out.
    """

    folder: Path
    files: SourceFiles
    config: Mapping[str, object]
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
        if not name.startswith(f"{BLOCK_PREFIX}.") and not bool(tensor.isfinite().all()):
            raise SourceError("the weights contain NaN or Inf", where=name, hint="the base model is damaged")
        return tensor

    def copied(self, name: str) -> bytes:
        """Return the content of one of `files.copied` or `files.licenses`, if it is the one that was checked.

        Raises:
            SourceError: the file was replaced since.
        """
        data = read_small(self.folder, name)
        if bytes_record(data) != self.record.files[name]:
            raise _replaced(self.folder / name)
        return data

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


def open_source(recipe_file: RecipeFile, log: Callable[[str], None]) -> SourceModel:
    """Find the base model, download it from the Hub if needed, and check it against the recipe.

    Args:
        recipe_file: the recipe and its path.
        log: receives a line for each download.

    Raises:
        SourceError: the model is missing, gated, has only pickles, is truncated, or differs from its config.json or
            from the recipe's copy of it; or a file does not hold what its name promises, see `list_source_files`.
    """
    base, licenses = recipe_file.recipe.base_model, recipe_file.recipe.card.license.base_files
    folder = recipe_file.resolve(base.path) if base.path else _download(base.id, str(base.revision), licenses, log)
    expected = recipe_file.config if base.config else None
    source = read_source(
        folder, base_id=base.id, revision=base.revision, expected_config=expected, licenses=licenses
    )  # fmt: skip
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
    folder = recipe_file.resolve(base.path)
    files = list_source_files(folder, recipe_file.recipe.card.license.base_files)
    check_contents(files)
    if files.weights:
        _read_tensors(files, _read_architecture(_fp16_config(folder), folder, recipe_file.config))


def read_source(
    folder: Path,
    *,
    base_id: str,
    revision: str | None = None,
    expected_config: Mapping[str, object] | None = None,
    licenses: Iterable[str] = (),
) -> SourceModel:
    """Open a folder as a base model: check every file that is used, and hash it.

    Raises:
        SourceError: see `open_source`.
    """
    config = _fp16_config(folder)
    architecture = _read_architecture(config, folder, expected_config)
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
    return SourceModel(
        folder=folder, files=listed, config=config, architecture=architecture, record=record, tensors=tensors
    )


def _records(files: SourceFiles, checked: Mapping[str, FileRecord]) -> dict[str, FileRecord]:
    """Return the records of all files that are used, in the order of their names, those already `checked` included."""
    left = {path: path.relative_to(files.folder).as_posix() for path in files.paths}
    hashed = file_records(path for path, name in left.items() if name not in checked)
    return {name: checked[name] if name in checked else hashed[path] for path, name in left.items()}


def _text_files(files: Mapping[str, FileRecord]) -> dict[str, str]:
    return {name: files[name].sha256 for name in TOKENIZER_FILES if name in files}


def _dtype_of(tensors: Mapping[str, StoredTensor]) -> str:
    return ", ".join(sorted({stored.info.dtype for stored in tensors.values()}))


def _read_architecture(
    config: Mapping[str, object], folder: Path, expected_config: Mapping[str, object] | None
) -> Architecture:
    """Return the shapes that a folder's config.json describes.

    Raises:
        PlanError: it does not describe a model.
        SourceError: the recipe's copy describes other shapes.
    """
    architecture = read_architecture(config, str(folder / CONFIG))
    if expected_config is not None:
        expected = read_architecture(expected_config, "the recipe's copy of config.json")
        if expected.tensors != architecture.tensors:
            raise SourceError(
                "the base model's config.json does not have the shapes of the recipe's copy",
                where=str(folder / CONFIG),
                hint="replace the copy named by base_model.config with the model's own config.json",
            )
    return architecture


def _fp16_config(folder: Path) -> Mapping[str, object]:
    """Return a model folder's config.json.

    Raises:
        SourceError: it cannot be read, or the model is already quantized.
    """
    path = folder / CONFIG
    config = read_config(path)
    if config.get("quantization_config") is not None:
        raise SourceError(
            "the base model is already quantized", where=str(path), hint="name the fp16 model as base_model"
        )
    return config


def _read_tensors(files: SourceFiles, architecture: Architecture) -> dict[str, StoredTensor]:
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
    for path in (folder / name for name in files.weights):
        for name, stored in stored_tensors(path).items():
            if name in found:
                raise SourceError(f"{name} is stored twice", where=f"{found[name].path.name} and {path.name}")
            found[name] = stored
        if len(found) > _MOST_TENSORS:
            raise SourceError("the weights hold too many tensors", where=str(folder), why=f"more than {_MOST_TENSORS}")
    return _matched(found, architecture, folder)


def _matched(found: Mapping[str, StoredTensor], architecture: Architecture, folder: Path) -> dict[str, StoredTensor]:
    expected = {tensor.name: tensor for tensor in architecture.tensors}
    missing = [name for name in expected if name not in found]
    extra = [name for name in found if name not in expected and not _is_derived(found[name].info)]
    wrong = [
        f"{name} is {list(found[name].info.shape)}, config.json means {list(tensor.shape)}"
        for name, tensor in expected.items()
        if name in found and found[name].info.shape != tensor.shape
    ]
    wrong += [
        f"{name} is {found[name].info.dtype}, config.json means {tensor.dtype}"
        for name, tensor in expected.items()
        if name in found and found[name].info.dtype != tensor.dtype
    ]
    # Some checkpoints store a tied lm_head as well; runtimes use the embedding.
    if architecture.tie_word_embeddings and (head := found.get(_HEAD)) is not None:
        extra = [name for name in extra if name != _HEAD or head.info.size_bytes > found[_EMBEDDING].info.size_bytes]
    if missing or extra or wrong:
        listed = [f"missing {name}" for name in missing] + [f"unexpected {name}" for name in extra] + wrong
        more = f" and {len(listed) - 5} more" if len(listed) > 5 else ""
        raise SourceError(
            "the weights are not what config.json describes",
            where=str(folder),
            why="; ".join(listed[:5]) + more,
            hint="a shard may be missing: compare the folder with the model's page",
        )
    return {name: found[name] for name in expected}


def _is_derived(tensor: TensorInfo) -> bool:
    """Return whether a tensor is one that runtimes compute themselves; such a tensor is small."""
    return tensor.name.endswith(tuple(IGNORED_SUFFIXES)) and tensor.size_bytes <= _MOST_DERIVED_BYTES


@contextmanager
def hub_errors(what: str) -> Iterator[None]:
    """Translate the Hub client's errors while reading `what`.

    Raises:
        SourceError: with a hint, instead of the client's own exceptions.
    """
    from huggingface_hub import errors as hub

    # OSError and the HTTP library's own error, which is httpx's in client 1.x and httpx2's in 2.x.
    transport = cast(tuple[type[Exception], ...], hub.HfHubHTTPError.__bases__)
    failures: tuple[type[Exception], ...] = (*transport, hub.OfflineModeIsEnabled)
    open_session()
    try:
        yield
    except hub.GatedRepoError as error:
        raise SourceError(
            f"{what} is gated",
            why="the Hub requires an account that has accepted its licence",
            hint="accept the licence on the model's page, then `hf auth login` or set HF_TOKEN",
        ) from error
    except hub.RevisionNotFoundError as error:
        raise SourceError(
            f"{what} has no such revision", hint="copy the full commit id from the Hub's history"
        ) from error
    except hub.RepositoryNotFoundError as error:
        raise SourceError(
            f"{what} is not on the Hub, or is private and no token is set", hint="check the id; `hf auth login`"
        ) from error
    except failures as error:
        raise SourceError(
            f"{what} could not be downloaded",
            why=str(error).splitlines()[0] if str(error) else type(error).__name__,
            hint="run the same command again: what arrived is kept",
        ) from error
    except Exception as error:
        if not is_of_client(error):
            raise
        raise SourceError(
            f"{what} could not be downloaded",
            why=f"the answer is not one that the Hub gives: {printable(str(error)) or type(error).__name__}",
            hint="check the address in HF_ENDPOINT, and whether a proxy answers in the server's place",
        ) from error


def access_problem(base_id: str) -> str:
    """Return why a model on the Hub cannot be read by this user (gated, private, no network), or "" if it can."""
    import huggingface_hub

    try:
        with hub_errors(base_id):
            huggingface_hub.HfApi().auth_check(base_id)
    except SourceError as error:
        return f"{error.what}: {error.why}" if error.why else error.what
    return ""


def _is_used(name: str, licenses: Iterable[str]) -> bool:
    return name in (*CONTENT_RULES, INDEX, *licenses) or ("/" not in name and name.endswith(".safetensors"))


def _download(base_id: str, revision: str, licenses: Iterable[str], log: Callable[[str], None]) -> Path:
    """Download a model at a commit into the Hub's cache and compare its digests with those that the Hub states.

    Only what a build uses is downloaded, and no text that is larger than its kind may be.
    """
    import huggingface_hub

    with hub_errors(f"{base_id} at {revision[:12]}"), disk_errors(Path("the Hub cache")):
        info = huggingface_hub.HfApi().model_info(base_id, revision=revision, files_metadata=True)
        siblings = checked_siblings(info.siblings)
        if not any(sibling.rfilename.endswith(".safetensors") for sibling in siblings):
            raise SourceError(
                "the base model has no safetensors weights at this revision",
                where=f"{base_id} at {revision}",
                hint="a pickle can run code when it is opened; name a revision with safetensors",
            )
        wanted = [sibling for sibling in siblings if _is_used(sibling.rfilename, licenses)]
        for sibling in wanted:
            rule = CONTENT_RULES.get(sibling.rfilename)
            if rule is not None and (sibling.size or 0) > rule.most_bytes:
                raise SourceError(
                    "a file of the base model is too large",
                    where=f"{base_id}: {sibling.rfilename}",
                    why=f"it has {sibling.size} bytes, such a file may have {rule.most_bytes}",
                )
        log(f"fetching {base_id} at {revision[:12]} into the Hub cache")
        names = [glob.escape(sibling.rfilename) for sibling in wanted]
        folder = Path(huggingface_hub.snapshot_download(base_id, revision=revision, allow_patterns=names))
    stated = {folder / sibling.rfilename: sibling.lfs.sha256 for sibling in siblings if sibling.lfs is not None}
    for path, record in file_records(path for path in stated if path.exists()).items():
        if record.sha256 != stated[path]:
            raise SourceError(
                "a downloaded file is damaged",
                where=str(path),
                why="its sha256 is not the one the Hub states",
                hint="delete it and run the same command again",
            )
    return folder
