"""Branches and tags."""

import subprocess
from typing import TYPE_CHECKING

from tests.loopback_hub.messages import Answer, Call, RefusedError
from tests.loopback_hub.repository import NOTHING, Repository

if TYPE_CHECKING:
    from tests.loopback_hub.hub import LoopbackHub


def create_branch(hub: "LoopbackHub", call: Call) -> Answer:
    """Make a branch from a starting point; without one it begins where main is."""
    repository = hub.writable(call)
    starting_point = repository.resolve(call.json().get("startingPoint") or "main")
    return _create_reference(repository, f"refs/heads/{call.args['name']}", starting_point)


def _create_reference(repository: Repository, reference: str, commit: str) -> Answer:
    try:
        repository.git("check-ref-format", reference)
    except subprocess.CalledProcessError:
        raise RefusedError(400, f"Invalid reference name: {reference}") from None
    with repository.lock:
        if reference in repository.references():
            raise RefusedError(409, "Reference already exists")
        repository.point(reference, commit, NOTHING)
    return Answer.of_json({"ref": reference, "targetCommit": commit})


def delete_branch(hub: "LoopbackHub", call: Call) -> Answer:
    """Delete a branch; main stays."""
    repository, name = hub.writable(call), call.args["name"]
    if name == "main":
        raise RefusedError(403, "Cannot delete main branch")
    repository.git("update-ref", "-d", f"refs/heads/{name}", repository.head(name))
    return Answer.of_json({"success": True})


def create_tag(hub: "LoopbackHub", call: Call) -> Answer:
    """Make a tag, with a message or without."""
    repository, wish = hub.writable(call), call.json()
    commit = repository.resolve(call.args["rev"])
    answer = _create_reference(repository, f"refs/tags/{wish['tag']}", commit)
    if message := wish.get("message"):
        user = call.account.user if call.account else ""
        identity = ("-c", f"user.name={user}", "-c", f"user.email={user}@users.noreply.loopback")
        repository.git(*identity, "tag", "--force", "--annotate", f"--message={message}", wish["tag"], commit)
    return answer


def list_refs(hub: "LoopbackHub", call: Call) -> Answer:
    """List branches and tags with what they point to."""
    found: dict[str, list[dict[str, str]]] = {"heads": [], "tags": []}
    for reference, commit in hub.readable(call).references().items():
        _, group, name = reference.split("/", 2)
        found[group].append({"name": name, "ref": reference, "targetCommit": commit})
    if hub.dialect.wide_ids:
        found = {
            key: [{**item, "targetCommit": item["targetCommit"] + "0" * 24} for item in of] for key, of in found.items()
        }
    listed: dict[str, object] = {"branches": found["heads"], "tags": found["tags"], "converts": []}
    if hub.dialect.null_lists:
        listed = {key: value or None for key, value in listed.items()}
    return Answer.of_json({**listed, **({"pullRequests": []} if call.is_set("include_prs") else {})})
