"""Base models on the Hub: which files there are at a revision, their download, and the client's errors translated."""

import glob
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

from packager.errors import SourceError
from packager.inputs.hub_cache import cached_folder, cached_siblings, is_offline, not_cached
from packager.inputs.hub_session import AnswerError, checked_siblings, client_message, is_of_client, open_session
from packager.inputs.model_names import check_names
from packager.inputs.source_files import INDEX, has_index, safetensors_among, weights_in_index
from packager.model.contract_files import content_rule
from packager.model.safetensors_file import Header, header_from
from packager.receipt import SAFETENSORS, FileRecord
from packager.recipe.model_fit import is_commit
from packager.system.files import disk_errors, file_records
from packager.system.text import printable, shown

if TYPE_CHECKING:
    from huggingface_hub.hf_api import RepoSibling

_FIRST_BYTES = 1 << 18  # the headers of most shards
_PARTIAL_CONTENT = 206
_PATIENCE_S = 20.0


@contextmanager
def hub_errors(what: str) -> Iterator[None]:
    """Translate the Hub client's errors while reading `what`.

    Raises:
        SourceError: with a hint, instead of the client's own exceptions.
    """
    from huggingface_hub import errors as hub

    # OSError and the HTTP library's own error, which is httpx's in client 1.x and httpx2's in 2.x.
    failures = cast(tuple[type[Exception], ...], hub.HfHubHTTPError.__bases__)
    open_session()
    try:
        yield
    except hub.GatedRepoError as error:
        raise SourceError(
            f"{what} is gated",
            why="the Hub requires an account that has accepted its licence",
            hint="accept the licence on its page on the Hub, then `hf auth login` or set HF_TOKEN; with "
            "release --jobs or --ray set PACKAGER_READ_TOKEN",
        ) from error
    except hub.RevisionNotFoundError as error:
        raise SourceError(
            f"{what} has no such revision", hint="copy the full commit id from the Hub's history"
        ) from error
    except hub.RepositoryNotFoundError as error:
        raise SourceError(
            f"{what} is not on the Hub, or is private and no token that may read it is set",
            hint="check the id; `hf auth login`; with release --jobs or --ray set PACKAGER_READ_TOKEN",
        ) from error
    except hub.OfflineModeIsEnabled as error:
        raise SourceError(
            f"{what} could not be asked for", why="HF_HUB_OFFLINE is set", hint="unset HF_HUB_OFFLINE and run again"
        ) from error
    except failures as error:
        raise SourceError(
            f"{what} could not be downloaded",
            why=client_message(error) or type(error).__name__,
            hint="run the same command again: what arrived is kept; with all files in the cache, HF_HUB_OFFLINE=1 "
            "builds without the Hub",
        ) from error
    except Exception as error:
        if not is_of_client(error):
            raise
        raise SourceError(
            f"{what} could not be downloaded",
            why=f"the answer is not one that the Hub gives: {printable(client_message(error)) or type(error).__name__}",
            hint="check the address in HF_ENDPOINT, and whether a proxy answers in the server's place",
        ) from error


def access_problem(base_id: str, token: str | None = None) -> str:
    """Return why a model on the Hub cannot be read (gated, private, no network), or "" if it can.

    Args:
        base_id: the model.
        token: whoever has it reads, "" for anybody; None for this user.
    """
    import huggingface_hub

    try:
        with hub_errors(base_id):
            huggingface_hub.HfApi(token=False if token == "" else token).auth_check(base_id)
    except SourceError as error:
        return error.brief
    return ""


@dataclass(frozen=True, kw_only=True)
class HubModel:
    """A base model on the Hub at a commit.

    Attributes:
        id: its name there.
        commit: the commit.
        files: those that a build uses, by name.
        left_out: the names of the others.
    """

    id: str
    commit: str
    files: "Mapping[str, RepoSibling]"
    left_out: tuple[str, ...] = ()

    @property
    def where(self) -> str:
        """The model and its commit, for messages."""
        return f"{self.id} at {self.commit[:12]}"


def resolve_model(base_id: str, revision: str, licenses: Iterable[str]) -> HubModel:
    """Find the commit that a revision means, and the files there.

    Raises:
        SourceError: there is no such model or revision, it has no safetensors, a file is too large for its kind, or
            the names of the files are those of a model that cannot be built, see `check_names`.
    """
    import huggingface_hub

    with hub_errors(f"{base_id} at {revision[:40]}"):
        found = huggingface_hub.HfApi().model_info(base_id, revision=revision, files_metadata=True)
        names = [entry.rfilename for entry in checked_siblings(found.siblings)]
        check_names(names, f"{base_id} at {revision[:12]}")
        files = {entry.rfilename: entry for entry in _used_siblings(found.siblings, licenses, base_id, revision)}
        left_out = tuple(name for name in names if name not in files)
        return HubModel(id=base_id, commit=_checked_commit(found.sha), files=files, left_out=left_out)


def list_model(base_id: str, revision: str) -> tuple[str, Mapping[str, int]]:
    """Return the commit that a revision means, and the size in bytes of every file there.

    Raises:
        SourceError: there is no such model or revision, or the Hub failed.
    """
    import huggingface_hub

    with hub_errors(f"{base_id} at {revision[:40]}"):
        # A person waits for this answer: a Hub that hangs is reported after a third of the time of other requests.
        found = huggingface_hub.HfApi().model_info(base_id, revision=revision, files_metadata=True, timeout=_PATIENCE_S)
        siblings = checked_siblings(found.siblings)
        return _checked_commit(found.sha), {sibling.rfilename: sibling.size or 0 for sibling in siblings}


def resolve_dataset(dataset: str, revision: str) -> str:
    """Return the commit that a revision of a dataset means.

    Raises:
        SourceError: there is no such dataset or revision.
    """
    import huggingface_hub

    with hub_errors(f"the dataset {dataset} at {revision}"):
        return _checked_commit(huggingface_hub.HfApi().dataset_info(dataset, revision=revision).sha)


def _checked_commit(commit: object) -> str:
    if not isinstance(commit, str) or not is_commit(commit):
        raise AnswerError(f"{shown(commit)} is not a commit")
    return commit


def _used_siblings(listed: object, licenses: Iterable[str], base_id: str, revision: str) -> "Sequence[RepoSibling]":
    """Return the files of a revision that a build uses, of those that the Hub lists.

    Raises:
        SourceError: there are no safetensors, or a file is larger than one of its kind may be.
    """
    siblings = checked_siblings(listed)
    if not any(_is_weights(sibling.rfilename) for sibling in siblings):
        raise SourceError(
            "the base model has no safetensors weights at this revision",
            where=f"{base_id} at {revision}",
            hint="a pickle can run code when it is opened; name a revision with safetensors",
        )
    wanted = [sibling for sibling in siblings if _is_used(sibling.rfilename, licenses)]
    for sibling in wanted:
        rule = content_rule(sibling.rfilename)
        if rule is not None and (sibling.size or 0) > rule.most_bytes:
            raise SourceError(
                "a file of the base model is too large",
                where=f"{base_id}: {sibling.rfilename}",
                why=f"it has {sibling.size} bytes, such a file may have {rule.most_bytes}",
            )
    return wanted


def _is_used(name: str, licenses: Iterable[str]) -> bool:
    is_weights = "/" not in name and _is_weights(name)
    return is_weights or name in (INDEX, *licenses) or content_rule(name) is not None


def download_files(model_id: str, commit: str, names: Iterable[str]) -> Path:
    """Download files of a model at a commit into the Hub's cache, and return their folder.

    Raises:
        SourceError: the Hub or the network failed, or without a network the cache lacks a file.
        MachineError: the disk is full.
    """
    import huggingface_hub

    if is_offline():
        return cached_folder("model", model_id, commit, names)
    patterns = [glob.escape(name) for name in names]
    with hub_errors(f"{model_id} at {commit[:12]}"), disk_errors(Path("the Hub cache")):
        return Path(huggingface_hub.snapshot_download(model_id, revision=commit, allow_patterns=patterns))


def download_model(
    base_id: str,
    revision: str,
    licenses: Iterable[str],
    log: Callable[[str], None],
    check: Callable[[Path], object] = lambda _: None,
    locked: Iterable[str] = (),
) -> tuple[Path, dict[str, str]]:
    """Download a model at a commit into the Hub's cache, and compare digests of small files with what the Hub states.

    Only what a build uses is downloaded, and no text that is larger than its kind may be. The small files come first.
    Without a network (HF_HUB_OFFLINE) the files are those in the cache, which must be complete.

    Args:
        base_id: the model.
        revision: the commit.
        licenses: names of licence files that the recipe wants.
        log: receives a line.
        check: receives the folder when it holds everything but the weights; may raise.
        locked: names of the files in the recipe's lock: what a complete cache holds.

    Returns:
        The folder, and the digests that the Hub states of the weights, by name, for `check_stated`.

    Raises:
        SourceError: see `resolve_model`; or a file is not the one whose digest the Hub states, or the cache lacks it.
    """
    if is_offline():
        log(f"reading {base_id} at {revision[:12]} from the Hub cache: HF_HUB_OFFLINE is set")
        siblings = _cached_siblings(base_id, revision, licenses, locked)
    else:
        siblings = list(resolve_model(base_id, revision, licenses).files.values())
        log(f"fetching {base_id} at {revision[:12]} into the Hub cache")
    names = [sibling.rfilename for sibling in siblings]
    folder = download_files(base_id, revision, [name for name in names if not _is_weights(name)])
    check(folder)
    weights = weights_among(names, folder)
    download_files(base_id, revision, [name for name in names if name in weights])
    check_digests(folder, [sibling for sibling in siblings if sibling.rfilename not in weights])
    return folder, {name: digest for name, digest in _stated(siblings).items() if name in weights}


def _cached_siblings(
    base_id: str, revision: str, licenses: Iterable[str], locked: Iterable[str]
) -> "Sequence[RepoSibling]":
    """Return the files of a model that a build uses, of those that the cache or the lock knows.

    Raises:
        SourceError: neither knows weights.
    """
    from huggingface_hub.hf_api import RepoSibling

    known = {entry.rfilename: entry for entry in cached_siblings("model", base_id, revision)}
    known |= {name: RepoSibling(name) for name in locked if name not in known}
    if not any(_is_weights(name) for name in known):
        raise not_cached("model", base_id, revision, None)
    return _used_siblings([known[name] for name in sorted(known)], licenses, base_id, revision)


def weights_among(names: Collection[str], folder: Path) -> tuple[str, ...]:
    """Return the names of the weights files that a build reads, of a model's files on the Hub.

    Args:
        names: of all its files.
        folder: with the index of the weights, if `names` has it.

    Raises:
        SourceError: see `weights_in_index`.
    """
    return weights_in_index(folder) if has_index(names) else safetensors_among(sorted(names))


def _is_weights(name: str) -> bool:
    return name.endswith(SAFETENSORS)


def check_digests(folder: Path, siblings: "Iterable[RepoSibling]") -> None:
    """Compare the downloaded files with the digests that the Hub states; it states none of small files.

    Raises:
        SourceError: of the first that differs.
    """
    stated = _stated(siblings)
    found = file_records(folder / name for name in stated if (folder / name).exists())
    check_stated(folder, {path.relative_to(folder).as_posix(): record for path, record in found.items()}, stated)


def check_stated(folder: Path, found: Mapping[str, FileRecord], stated: Mapping[str, str]) -> None:
    """Compare downloaded files, by name, with the digests that the Hub states.

    Raises:
        SourceError: of the first that differs.
    """
    for name, record in found.items():
        if record.sha256 != stated.get(name, record.sha256):
            raise SourceError(
                "a downloaded file is damaged",
                where=str(folder / name),
                why="its sha256 is not the one the Hub states",
                hint="delete it and run the same command again",
            )


def _stated(siblings: "Iterable[RepoSibling]") -> dict[str, str]:
    return {sibling.rfilename: sibling.lfs.sha256 for sibling in siblings if sibling.lfs is not None}


def remote_header(model: HubModel, name: str) -> Header:
    """Read the header of a weights file on the Hub, not the tensors behind it.

    Raises:
        SourceError: the Hub failed, or the header does not fit the file.
    """
    size_bytes = model.files[name].size or 0
    with hub_errors(f"{model.where}: {name}"):
        reader = _HeaderReader(model, name)
        return header_from(reader.read, size_bytes, f"{model.where}: {name}")


def remote_bytes(model: HubModel, name: str, begin: int, count: int) -> bytes:
    """Read `count` bytes of a file on the Hub from offset `begin` on; none of a server that does not know ranges.

    Raises:
        SourceError: the Hub failed.
    """
    import huggingface_hub

    url = huggingface_hub.hf_hub_url(model.id, name, revision=model.commit)
    with hub_errors(f"{model.where}: {name}"):
        return _range(url, begin, count)


def _range(url: str, begin: int, count: int) -> bytes:
    """Return `count` bytes of a file, fewer where it ends, and none for a part that the server cannot give."""
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_stream_backoff

    headers = {**build_hf_headers(), "Range": f"bytes={begin}-{begin + count - 1}"}
    data = bytearray()
    with http_stream_backoff("GET", url, headers=headers) as response:
        hf_raise_for_status(response)
        if begin and response.status_code != _PARTIAL_CONTENT:
            return b""
        for block in response.iter_bytes():
            data += block
            if len(data) >= count:  # of a server that does not know ranges, too
                break
    return bytes(data[:count])


class _HeaderReader:
    """Reads the first bytes of a file on the Hub, in one request or two.

    The client's own function for headers keeps the whole answer in memory, which is the whole file where a server does
    not know ranges.
    """

    def __init__(self, model: HubModel, name: str) -> None:
        import huggingface_hub

        self._url = huggingface_hub.hf_hub_url(model.id, name, revision=model.commit)
        self._data, self._position = b"", 0

    def read(self, count: int) -> bytes:
        """Return the next bytes; fewer where the file ends."""
        end = self._position + count
        if end > len(self._data):
            self._data = _range(self._url, 0, max(end, _FIRST_BYTES))
        found, self._position = self._data[self._position : end], end
        return found
