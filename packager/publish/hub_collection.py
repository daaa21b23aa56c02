"""A collection on the Hub: groups the repositories of a release that has one repository per variant."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from http import HTTPStatus
from typing import TYPE_CHECKING

from packager.errors import PublishError
from packager.publish.plan import PublishPlan
from packager.publish.targets.hub_calls import RETRY_LIMIT_S, RetryPolicy
from packager.publish.targets.hub_client import hub_api

if TYPE_CHECKING:
    from huggingface_hub import Collection


# Answers of servers with the Hub's protocol that have no collections.
_WITHOUT = (HTTPStatus.NOT_IMPLEMENTED, HTTPStatus.METHOD_NOT_ALLOWED)


class _NoCollectionsError(PublishError):
    """The server has no collections."""


class HubCollection:
    """Adds the repositories of a release to a collection, and makes the collection if none has that title.

    Args:
        title: the collection's title, in the namespace of the first repository.
        repository_ids: namespace/name each, in the order of display.
        private: whether a new collection is private.
        log: gets a line per wait.
        retry_limit_s: total seconds of waiting per call.
    """

    def __init__(
        self,
        title: str,
        repository_ids: Sequence[str],
        *,
        private: bool,
        log: Callable[[str], None],
        retry_limit_s: float = RETRY_LIMIT_S,
    ) -> None:
        self._title, self._ids, self._private, self._log = title, tuple(repository_ids), private, log
        self._namespace = self._ids[0].split("/")[0]
        self._api = hub_api()
        self._retry = RetryPolicy(f"{self._api.endpoint}/collections", log, limit_s=retry_limit_s)
        self._lacking = self._ids

    def plan(self, plan: PublishPlan) -> Sequence[str]:  # noqa: ARG002 - the same for every plan
        """Return the repositories that the collection lacks."""
        try:
            slug = self._retry.call("listing collections", self._slug)
            held = self._held(slug) if slug else set()
        except _NoCollectionsError as error:
            self._lacking = ()
            self._log(f"collection {self._title!r}: left out, this server has no collections ({error.why})")
            return []
        except PublishError as error:  # `apply` tries it again: the branches need no collection
            return [f"collection {self._title!r}: add what it lacks (it could not be read: {error.why or error.what})"]
        self._lacking = tuple(repository_id for repository_id in self._ids if repository_id not in held)
        what = "add" if slug else "make it with"
        return [f"collection {self._title!r}: {what} {', '.join(self._lacking)}"] if self._lacking else []

    def apply(self, heads: Mapping[str, str]) -> None:  # noqa: ARG002 - a collection holds repositories, not commits
        """Make the collection if it does not exist, and add the repositories that it lacks."""
        if not self._lacking:
            return
        make = partial(
            self._api.create_collection,
            self._title,
            namespace=self._namespace,
            private=self._private,
            exists_ok=True,
        )
        slug = self._retry.call("making the collection", make).slug
        for repository_id in self._lacking:
            add = partial(self._api.add_collection_item, slug, repository_id, "model", exists_ok=True)
            self._retry.call(f"adding {repository_id} to the collection", add)

    def _slug(self) -> str:
        """Return the collection's slug on the Hub, "" if it does not exist."""
        from huggingface_hub.errors import HfHubHTTPError

        try:
            found = [entry.slug for entry in self._api.list_collections(owner=self._namespace) if self._is_it(entry)]
        except HfHubHTTPError as error:
            status = error.response.status_code
            if status == HTTPStatus.NOT_FOUND:  # the namespace does not exist yet
                return ""
            if status in _WITHOUT:
                raise _NoCollectionsError("listing collections", why=f"{status}") from None
            raise
        return found[0] if found else ""

    def _is_it(self, entry: "Collection") -> bool:
        return bool(entry.title == self._title)

    def _held(self, slug: str) -> set[str]:
        collection = self._retry.call("reading the collection", lambda: self._api.get_collection(slug))
        return {item.item_id for item in collection.items if item.item_type == "model"}
