"""The addresses and their functions."""

import re
from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING

from tests.loopback_hub.accounts import whoami
from tests.loopback_hub.commits import create_commit, preupload
from tests.loopback_hub.downloads import resolve
from tests.loopback_hub.git_http import serve_git
from tests.loopback_hub.lfs import complete_object, get_object, lfs_batch, lfs_verify, put_object, put_part
from tests.loopback_hub.listings import list_commits, list_paths, list_tree
from tests.loopback_hub.messages import Answer, Call
from tests.loopback_hub.model_collections import (
    add_collection_item,
    create_collection,
    get_collection,
    list_collections,
)
from tests.loopback_hub.models import change_settings, check_access, create_repo, model_info, validate_yaml
from tests.loopback_hub.oidc import exchange, id_token
from tests.loopback_hub.references import create_branch, create_tag, delete_branch, list_refs
from tests.loopback_hub.xet import get_xorb, put_shard, put_xorb, reconstruct, xet_token

if TYPE_CHECKING:
    from tests.loopback_hub.hub import LoopbackHub


Route = tuple[str, re.Pattern[str], "Callable[[LoopbackHub, Call], Answer]"]


def _arm_fault(hub: "LoopbackHub", call: Call) -> Answer:
    hub.fault(**call.json())
    return Answer.of_json({})


def _send_record(hub: "LoopbackHub", call: Call) -> Answer:
    values = {"requests": [asdict(it) for it in hub.requests], "uploaded": [asdict(it) for it in hub.uploaded]}
    return Answer.of_json(values)


def _route(method: str, template: str, respond: "Callable[[LoopbackHub, Call], Answer]") -> Route:
    several = {"id": "[^/]+/[^/]+?", "slug": "[^/]+/[^/]+", "path": ".+", "oid": "[0-9a-f]{64}", "part": "[0-9]+"}
    several |= {"service": "info/refs|git-upload-pack", "hash": "[0-9a-f]{64}", "scope": "read|write"}
    pattern = re.sub(r"{(\w+)}", lambda name: f"(?P<{name[1]}>{several.get(name[1], '[^/]+')})", template)
    return method, re.compile(pattern), respond


_MODELS = (
    _route("GET", "/api/whoami-v2", whoami),
    _route("POST", "/api/repos/create", create_repo),
    _route("POST", "/api/validate-yaml", validate_yaml),
    _route("GET", "/api/models/{id}", model_info),
    _route("GET", "/api/models/{id}/revision/{rev}", model_info),
    _route("GET", "/api/models/{id}/auth-check", check_access),
    _route("PUT", "/api/models/{id}/settings", change_settings),
    _route("POST", "/api/models/{id}/branch/{name}", create_branch),
    _route("DELETE", "/api/models/{id}/branch/{name}", delete_branch),
    _route("POST", "/api/models/{id}/tag/{rev}", create_tag),
    _route("GET", "/api/models/{id}/refs", list_refs),
    _route("GET", "/api/models/{id}/tree/{rev}", list_tree),
    _route("GET", "/api/models/{id}/tree/{rev}/{path}", list_tree),
    _route("POST", "/api/models/{id}/paths-info/{rev}", list_paths),
    _route("GET", "/api/models/{id}/commits/{rev}", list_commits),
    _route("POST", "/api/models/{id}/preupload/{rev}", preupload),
    _route("POST", "/{id}[.]git/info/lfs/objects/batch", lfs_batch),
    _route("POST", "/{id}[.]git/info/lfs/objects/verify", lfs_verify),
    # Where the Hub would name a storage with signed addresses: the client sends no token there.
    _route("GET", "/_lfs/{id}/{oid}", get_object),
    _route("PUT", "/_lfs/{id}/{oid}", put_object),
    _route("PUT", "/_lfs/{id}/{oid}/{part}", put_part),
    _route("POST", "/_lfs/{id}/{oid}", complete_object),
    _route("POST", "/api/models/{id}/commit/{rev}", create_commit),
    _route("GET", "/{id}/resolve/{rev}/{path}", resolve),
    _route("GET", "/{id}(?:[.]git)?/{service}", serve_git),
    _route("POST", "/{id}(?:[.]git)?/{service}", serve_git),
    _route("GET", "/api/collections", list_collections),
    _route("POST", "/api/collections", create_collection),
    _route("GET", "/api/collections/{slug}", get_collection),
    _route("POST", "/api/collections/{slug}/items", add_collection_item),
    _route("GET", "/api/models/{id}/xet-{scope}-token/{rev}", xet_token),
    _route("POST", "/_xet/v1/xorbs/default/{hash}", put_xorb),
    _route("POST", "/_xet/v1/shards", put_shard),
    # The Hub asks itself, too.
    _route("GET", "/(?:_xet|_loopback)/v1/reconstructions/{hash}", reconstruct),
    _route("GET", "/(?:_xet|_loopback)/xorbs/{hash}", get_xorb),
    _route("POST", "/oauth/token", exchange),
    _route("GET", "/_loopback/id-token", id_token),
    _route("POST", "/_loopback/faults", _arm_fault),
    _route("GET", "/_loopback/record", _send_record),
)


def _of_datasets(method: str, pattern: "re.Pattern[str]", respond: "Callable[[LoopbackHub, Call], Answer]") -> Route:
    """Return a route of models for datasets, whose ids have a prefix: in addresses, and in this Hub."""
    models = pattern.pattern.replace("/api/models/", "/api/")
    return method, re.compile(models.replace("(?P<id>", "(?P<id>datasets/")), respond


ROUTES = (*_MODELS, *(_of_datasets(*route) for route in _MODELS if "(?P<id>" in route[1].pattern))
