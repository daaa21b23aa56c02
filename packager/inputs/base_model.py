"""Stage 3, source: open the fp16 base model as files with known digests; the whole model is never in memory.

It is a local folder, or the Hub at a pinned commit. Only safetensors are read: a pickle can run code when it is opened.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

from packager.errors import SourceError
from packager.inputs.hub_session import checked_siblings, is_of_client, open_session
from packager.model.architecture import BLOCK_PREFIX, IGNORED_SUFFIXES, Architecture, read_architecture
from packager.model.config_values import read_config
from packager.model.safetensors_file import StoredTensor, read_tensor, stored_tensors
from packager.receipt import CONFIG, INDEX_SUFFIX, TOKENIZER_FILES, FileRecord, SourceRecord, digest_of
from packager.recipe.file import RecipeFile
from packager.system.files import disk_errors, file_records
from packager.system.text import printable

if TYPE_CHECKING:
    import torch

_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_HUB_PATTERNS = ("*.json", "*.safetensors", "*.model", "*.txt", "*.md", "*.jinja", "LICENSE*", "Notice*", "NOTICE*")


@dataclass(frozen=True, kw_only=True)
class SourceModel:
    """A base model on disk.

    Attributes:
        folder: with its files.
        config: content of config.json.
        architecture: its shapes.
        record: identity and digests, for the receipts.
        tensors: position of every tensor's bytes, by name; derived buffers are left out.
    """

    folder: Path
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


def open_source(recipe_file: RecipeFile, log: Callable[[str], None]) -> SourceModel:
    """Find the base model, download it from the Hub if needed, and check it against the recipe.

    Args:
        recipe_file: the recipe and its path.
        log: receives a line for each download.

    Raises:
        SourceError: the model is missing, gated, has only pickles, is truncated, or differs from its config.json or
            from the recipe's copy of it.
    """
    base = recipe_file.recipe.base_model
    folder = recipe_file.resolve(base.path) if base.path else _download(base.id, str(base.revision), log)
    expected = recipe_file.config if base.config else None
    return read_source(folder, base_id=base.id, revision=base.revision, expected_config=expected)


def read_source(
    folder: Path, *, base_id: str, revision: str | None = None, expected_config: Mapping[str, object] | None = None
) -> SourceModel:
    """Open a folder as a base model: hash every file and check every safetensors header.

    Raises:
        SourceError: see `open_source`.
    """
    config = _fp16_config(folder)
    architecture = read_architecture(config, str(folder / CONFIG))
    if expected_config is not None:
        expected = read_architecture(expected_config, "the recipe's copy of config.json")
        if expected.tensors != architecture.tensors:
            raise SourceError(
                "the base model's config.json does not have the shapes of the recipe's copy",
                where=str(folder / CONFIG),
                hint="replace the copy named by base_model.config with the model's own config.json",
            )
    tensors = _read_tensors(folder, architecture)
    files = {path.name: record for path, record in file_records(model_files(folder)).items()}
    weights = {name: record for name, record in files.items() if name.endswith((".safetensors", CONFIG))}
    record = SourceRecord(
        id=base_id,
        revision=revision,
        digest=digest_of({name: entry.sha256 for name, entry in weights.items()} | _text_files(files)),
        files=files,
        dtype=_dtype_of(tensors),
        num_parameters=architecture.num_parameters,
    )
    return SourceModel(folder=folder, config=config, architecture=architecture, record=record, tensors=tensors)


def model_files(folder: Path) -> list[Path]:
    """Return the files in a model's folder, sorted; hidden files belong to a file manager or a download."""
    return sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))


def _text_files(files: Mapping[str, FileRecord]) -> dict[str, str]:
    return {name: files[name].sha256 for name in TOKENIZER_FILES if name in files}


def _dtype_of(tensors: Mapping[str, StoredTensor]) -> str:
    return ", ".join(sorted({stored.info.dtype for stored in tensors.values()}))


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


def _read_tensors(folder: Path, architecture: Architecture) -> dict[str, StoredTensor]:
    paths = _weights_files(folder)
    if not paths:
        pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
        raise SourceError(
            "no safetensors weights",
            where=str(folder),
            why=f"only pickles are there: {', '.join(pickles[:3])}" if pickles else "no weights at all",
            hint="a pickle can run code when it is opened; name a revision with safetensors, or convert it first",
        )
    found: dict[str, StoredTensor] = {}
    for path in paths:
        for name, stored in stored_tensors(path).items():
            if name in found:
                raise SourceError(f"{name} is stored twice", where=f"{found[name].path.name} and {path.name}")
            found[name] = stored
    return _matched(found, architecture, folder)


def _weights_files(folder: Path) -> list[Path]:
    """Return the weights files: those that the index names, or every safetensors file if there is no index.

    Raises:
        SourceError: the index is damaged, or a shard is missing.
    """
    index = folder / f"model{INDEX_SUFFIX}"
    if not index.exists():
        return sorted(folder.glob("*.safetensors"))
    try:
        names = sorted({str(name) for name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise SourceError("the index of the weights cannot be read", where=str(index), why=str(error)) from error
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise SourceError(
            f"{len(missing)} of {len(names)} weights files are missing",
            where=str(folder),
            why=", ".join(missing[:5]),
            hint="copy or download them again",
        )
    return [folder / name for name in names]


def _matched(found: Mapping[str, StoredTensor], architecture: Architecture, folder: Path) -> dict[str, StoredTensor]:
    expected = {tensor.name: tensor for tensor in architecture.tensors}
    missing = [name for name in expected if name not in found]
    extra = [name for name in found if name not in expected and not name.endswith(tuple(IGNORED_SUFFIXES))]
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
    extra = [name for name in extra if not (name == "lm_head.weight" and architecture.tie_word_embeddings)]
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


def _download(base_id: str, revision: str, log: Callable[[str], None]) -> Path:
    """Download a model at a commit into the Hub's cache and compare its digests with those that the Hub states."""
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
        log(f"fetching {base_id} at {revision[:12]} into the Hub cache")
        folder = Path(huggingface_hub.snapshot_download(base_id, revision=revision, allow_patterns=list(_HUB_PATTERNS)))
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
