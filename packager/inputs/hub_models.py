"""Base models on the Hub: which files there are at a revision, their download, and the client's errors translated."""

import glob
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import cast

from packager.errors import SourceError
from packager.inputs.hub_session import checked_siblings, is_of_client, open_session
from packager.inputs.source_files import INDEX
from packager.model.contract_files import CONTENT_RULES
from packager.system.files import disk_errors, file_records
from packager.system.text import printable


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


def download_model(base_id: str, revision: str, licenses: Iterable[str], log: Callable[[str], None]) -> Path:
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
