"""A collection on the Hub: what ties repositories together that hold a variant each."""

from collections.abc import Callable, Sequence
from functools import partial

from packager import __version__
from packager.targets.hub_calls import PATIENCE_S, Patience


def collect(
    title: str,
    repository_ids: Sequence[str],
    say: Callable[[str], None],
    *,
    private: bool,
    patience_s: float = PATIENCE_S,
) -> str:
    """Make the collection if there is none of that title, and add what it lacks.

    Args:
        title: of the collection, in the namespace of the first repository.
        repository_ids: namespace/name each, in the order they are to be shown.
        say: gets a line if it was made or something was added, or has to be waited for.
        private: whether a collection that is made is.
        patience_s: seconds that one call may be waited for.

    Returns:
        Its address.

    Raises:
        PublishError: the Hub refused, or could not be reached.
    """
    from huggingface_hub import HfApi

    api = HfApi(library_name="gptq-packager", library_version=__version__)
    patience = Patience(f"{api.endpoint}/collections", say, limit_s=patience_s)
    namespace = repository_ids[0].split("/")[0]
    collection = patience.call(
        "making the collection",
        lambda: api.create_collection(title, namespace=namespace, private=private, exists_ok=True),
    )
    held = {item.item_id for item in collection.items if item.item_type == "model"}
    lacking = [repository_id for repository_id in repository_ids if repository_id not in held]
    for repository_id in lacking:
        add = partial(api.add_collection_item, collection.slug, repository_id, "model", exists_ok=True)
        patience.call(f"adding {repository_id} to the collection", add)
    if lacking:
        say(f"collection {collection.url}: {', '.join(lacking)} added")
    return str(collection.url)
