"""A repository as a whole: made, set and described."""

import hashlib
import re
from typing import TYPE_CHECKING, Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from tests.loopback_hub.accounts import is_member, namespace, require_write
from tests.loopback_hub.messages import Answer, Call, RefusedError
from tests.loopback_hub.repository import REPO_ID, Entry, Repository

if TYPE_CHECKING:
    from tests.loopback_hub.hub import LoopbackHub

_FRONT_MATTER = re.compile(r"\A---\r?\n(.*?)\r?\n---", re.DOTALL)


def create_repo(hub: "LoopbackHub", call: Call) -> Answer:
    """Make a repository, or 409 if it is there."""
    wish = call.json()
    kinds = {"model": "", "dataset": "datasets/"}
    if (kind := wish.get("type", "model")) not in kinds:
        raise RefusedError(400, "The loopback hub has models and datasets only")
    repo_id = f"{kinds[kind]}{wish.get('organization') or (call.account and call.account.user)}/{wish['name']}"
    account = require_write(call.account, repo_id)
    if not REPO_ID.fullmatch(repo_id):
        raise RefusedError(400, f"Invalid repository name: {repo_id}")
    values = {"url": f"{hub.endpoint}/{repo_id}", "name": repo_id}
    private = wish.get("visibility") == "private" or bool(wish.get("private"))
    try:
        Repository.create(repo_id, hub.root / f"{repo_id}.git", user=account.user, private=private)
    except FileExistsError:
        return Answer.of_json({"error": "You already created this model repo", **values}, 409)
    return Answer.of_json(values)


def change_settings(hub: "LoopbackHub", call: Call) -> Answer:
    """Set the visibility and the gate."""
    repository = hub.writable(call)
    wish = call.json()
    changes = {name: wish[name] for name in ("private", "gated") if name in wish}
    if "visibility" in wish:
        changes["private"] = wish["visibility"] == "private"
    with repository.lock:
        repository.settings = {**repository.settings, **changes}
    return Answer.of_json(changes)


def validate_yaml(hub: "LoopbackHub", call: Call) -> Answer:
    """Look at a card's front matter before it is committed."""
    content = call.json()["content"]
    try:
        metadata = front_matter(content)
    except YAMLError as error:
        return Answer.of_json({"errors": [{"message": str(error)}], "warnings": []}, 400)
    warnings = [] if metadata else [{"message": "empty or missing yaml metadata in repo card"}]
    return Answer.of_json({"errors": [], "warnings": warnings})


def model_info(hub: "LoopbackHub", call: Call) -> Answer:
    """Describe a repository at a revision."""
    repository = hub.readable(call)
    commit = repository.resolve(call.args.get("rev") or "main")
    files = repository.files(commit)
    _, _, modified, *_ = repository.log(commit, "-1")[0]
    card = front_matter(repository.blob(files["README.md"].oid).decode()) if "README.md" in files else {}
    info = {
        "_id": hashlib.sha256(repository.id.encode()).hexdigest()[:24],
        "id": repository.id.removeprefix("datasets/"),
        "modelId": repository.id,
        "author": namespace(repository.id),
        "sha": commit,
        "lastModified": modified,
        **repository.settings,
        "disabled": False,
        "downloads": 0,
        "likes": 0,
        "tags": card.get("tags", []),
        "cardData": card,
        "siblings": [_sibling(entry, whole=call.is_set("blobs")) for entry in files.values()],
    }
    return Answer.of_json(info)


def _sibling(entry: Entry, *, whole: bool) -> dict[str, Any]:
    if not whole:
        return {"rfilename": entry.path}
    lfs = {"sha256": entry.sha256, "size": entry.size, "pointerSize": entry.pointer_size} if entry.sha256 else None
    return {"rfilename": entry.path, "size": entry.size, "blobId": entry.oid, **({"lfs": lfs} if lfs else {})}


def check_access(hub: "LoopbackHub", call: Call) -> Answer:
    """Answer whether the files may be downloaded."""
    require_ungated(hub.readable(call), call)
    return Answer.of_json({})


def require_ungated(repository: Repository, call: Call) -> None:
    """401 or 403 unless the account may download from a gated repository."""
    if repository.settings["gated"] and not is_member(call.account, repository.id):
        message = f"Access to model {repository.id} is restricted and you are not in the authorized list."
        raise RefusedError(403 if call.account else 401, message, "GatedRepo")


def front_matter(content: str) -> dict[str, Any]:
    """Return a card's metadata."""
    match = _FRONT_MATTER.match(content)
    loaded = YAML(typ="safe", pure=True).load(match[1]) if match else None
    return loaded if isinstance(loaded, dict) else {}
