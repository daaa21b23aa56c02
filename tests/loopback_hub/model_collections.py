"""Collections: lists of repositories with a title, kept in collections.json."""

import hashlib
import json
import re
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from tests.loopback_hub.accounts import require_write
from tests.loopback_hub.messages import Answer, Call, RefusedError
from tests.loopback_hub.repository import date, write_whole

if TYPE_CHECKING:
    from tests.loopback_hub.hub import LoopbackHub


def list_collections(hub: "LoopbackHub", call: Call) -> Answer:
    """List an owner's collections; the Hub lists at most four items of each, and no position."""
    owner = call.query.get("owner", [""])[0]
    _require_collections(hub)
    found = [entry for entry in _collections(hub).values() if entry["owner"]["name"] == owner]
    listed = ({name: value for name, value in entry.items() if name != "position"} for entry in found)
    return Answer.of_json([{**entry, "items": entry["items"][:4]} for entry in listed])


def get_collection(hub: "LoopbackHub", call: Call) -> Answer:
    """Describe a collection."""
    return Answer.of_json(_collection(_collections(hub), call))


def create_collection(hub: "LoopbackHub", call: Call) -> Answer:
    """Make a collection, or 409 if there is one of that title."""
    _require_collections(hub)
    wish = call.json()
    require_write(call.account, f"{wish['namespace']}/")
    title = re.sub(r"[^a-z0-9]+", "-", wish["title"].lower()).strip("-")
    slug = f"{wish['namespace']}/{title}-{hashlib.sha256(wish['title'].encode()).hexdigest()[:24]}"
    with hub.lock:
        collections = _collections(hub)
        if slug in collections:
            return Answer.of_json({"error": "This collection already exists", "slug": slug}, 409)
        of_its_own = {"slug": slug, "title": wish["title"], "owner": {"name": wish["namespace"]}, "items": []}
        defaults = {"position": len(collections), "theme": "green", "upvotes": 0, "lastUpdated": date(time.time())}
        optional = {"private": bool(wish.get("private")), "description": wish.get("description")}
        collections[slug] = {**of_its_own, **defaults, **optional}
        write_whole(hub.root / "collections.json", json.dumps(collections).encode())
    return Answer.of_json(collections[slug])


def add_collection_item(hub: "LoopbackHub", call: Call) -> Answer:
    """Add a repository to a collection, or 409 if it is in it."""
    wish = call.json()
    require_write(call.account, call.args["slug"])
    with hub.lock:
        collections = _collections(hub)
        items = _collection(collections, call)["items"]
        if wish["item"]["id"] in {item["id"] for item in items}:
            raise RefusedError(409, "Item already in collection")
        hub.repository(wish["item"]["id"])
        note = {"note": {"text": wish["note"]}} if "note" in wish else {}
        items.append({"_id": uuid4().hex[:24], **wish["item"], "position": len(items), **note})
        write_whole(hub.root / "collections.json", json.dumps(collections).encode())
    return Answer.of_json(collections[call.args["slug"]])


def _require_collections(hub: "LoopbackHub") -> None:
    if not hub.dialect.collections:
        raise RefusedError(501, "Collections are not implemented.", "NotImplemented")


def _collections(hub: "LoopbackHub") -> dict[str, Any]:
    path = hub.root / "collections.json"
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}


def _collection(collections: Mapping[str, Any], call: Call) -> dict[str, Any]:
    if call.args["slug"] not in collections:
        raise RefusedError(404, "Collection not found")
    return dict(collections[call.args["slug"]])
