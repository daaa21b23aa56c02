"""The keys of a section that belong together; one rule for the text as written and for the finished values."""

from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from fractions import Fraction

from packager.system.text import has_credentials
from packager.variant import ACT_ORDER_OF_DESC_ACT, ActOrder

BITS_AND_MIX = "a variant has bits or mix, not both"
_OF_A_DATASET = frozenset({"revision", "split", "config"})


def base_model_problem(given: AbstractSet[str]) -> str:
    """Return why these fields together do not name one base model, or ""."""
    if "revision" in given and "path" in given:
        return "give either revision (read from the Hub) or path (a local folder), not both"
    if not given & {"revision", "path"}:
        return "give either revision (read from the Hub) or path (a local folder)"
    return ""


def repository_problem(target: str, layout: str, *, url: str | None, plugin: str | None) -> str:
    """Return why these fields together do not name one target, or ""; the text contains no secret."""
    if url is not None and has_credentials(url):
        return "the url has credentials in it: leave them out, and set PACKAGER_GIT_TOKEN where you publish"
    has_url = url is not None
    if (plugin is not None) != (target == "plugin"):
        return "plugin belongs to target plugin" if plugin is not None else "target plugin needs the plugin's name"
    if target in ("git", "plugin") and layout == "repos":
        has = "one url" if target == "git" else "one repository"
        return f"layout repos is for the targets hub and local: target {target} has {has}"
    if has_url == (target == "git"):
        return ""
    return "url belongs to target git" if has_url else "target git needs the url of the remote"


def act_order_problem(act_order: str | None, desc_act: bool | None) -> str:
    """Return why the two spellings of the act order contradict each other, or ""."""
    if act_order is None or desc_act is None or ACT_ORDER_OF_DESC_ACT[desc_act] == act_order:
        return ""
    text = "true" if desc_act else "false"
    return f"act_order: {act_order} contradicts desc_act: {text}, which is act_order: {ACT_ORDER_OF_DESC_ACT[desc_act]}"


def given_act_order(act_order: ActOrder | None, desc_act: bool | None) -> ActOrder | None:
    """Return the act order that a variant, or the defaults, ask for in either spelling; None for none of them."""
    return act_order if act_order is not None or desc_act is None else ACT_ORDER_OF_DESC_ACT[desc_act]


def mix_problem(bits: Sequence[int], mean: float) -> str:
    """Return why there is nothing to choose in a mix, or ""."""
    if len(bits) < 2 or len(set(bits)) < len(bits):
        return "mix.bits names two numbers of bits or more, each once"
    if not min(bits) < mean < max(bits):
        return f"mix.mean is between {min(bits)} and {max(bits)}, of mix.bits: else all linears have the same bits"
    return ""


def text_source_problem(given: AbstractSet[str]) -> str:
    """Return why these fields together do not name one text, or several with weights, or ""."""
    if "sources" in given:
        named = sorted(given & {"path", "text_field", "messages_field", "documents", "dataset", *_OF_A_DATASET})
        return f"{named[0]} belongs into an entry of sources: give either sources or one text" if named else ""
    source = "path (a local file) or dataset (on the Hub)"
    rules = (
        ("path" in given and "dataset" in given, f"give either {source}, not both"),
        (not given & {"path", "dataset"}, f"give either {source}"),
        ("dataset" in given and not given >= {"revision", "split"}, "a Hub dataset needs its revision and split"),
        (
            "path" in given and bool(given & _OF_A_DATASET),
            "revision, split and config belong to a Hub dataset, not to a local file",
        ),
        (
            {"text_field", "messages_field"} <= given,
            "give either text_field (plain text) or messages_field (conversations), not both",
        ),
        (
            {"documents", "messages_field"} <= given,
            "documents is for plain text: conversations are always separate",
        ),
    )
    return next((problem for broken, problem in rules if broken), "")


def rows_by_weight(weights: Sequence[float], num_rows: int) -> tuple[int, ...]:
    """Return how many of `num_rows` each text gives, in proportion to its weight.

    Each gets the whole number below its exact share; the rows that are left go to the largest remainders, of equal
    ones to the first. Shares are exact fractions, so the result is the same on every machine.
    """
    exact = [Fraction(str(weight)) for weight in weights]
    shares = [weight * num_rows / sum(exact) for weight in exact]
    rows = [int(share) for share in shares]
    largest = sorted(range(len(rows)), key=lambda index: (rows[index] - shares[index], index))
    for index in largest[: num_rows - sum(rows)]:
        rows[index] += 1
    return tuple(rows)
