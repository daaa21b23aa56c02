"""The card's front matter, which the Hub reads to file, search and link a repository.

https://huggingface.co/docs/hub/model-cards, read in November 2026. Calibration text is never listed under `datasets`:
there it would mean training data.
"""

import re
from collections.abc import Sequence
from pathlib import PurePosixPath

from packager.card.mixed_bits import bits_of_parameters
from packager.errors import CardError
from packager.model.compatibility import Verdict
from packager.receipt import Provenance
from packager.recipe import License, Recipe
from packager.recipe.licenses import hub_license, license_name


def metadata(
    recipe: Recipe, receipts: Sequence[Provenance], model_type: str, verdicts: Sequence[Verdict] = ()
) -> dict[str, str | list[str]]:
    """Return the front matter's fields in the order they are written.

    Args:
        recipe: the repository, its base model and the card's texts.
        receipts: one per variant.
        model_type: from the base model's config.json.
        verdicts: on the branch whose card it is; the Hub's page shows how to open it with `library_name`.

    Raises:
        CardError: the licence has no name the Hub would accept.
    """
    card = recipe.card
    bits = dict.fromkeys(f"{width}-bit" for receipt in receipts for width in bits_of_parameters(receipt.parameters))
    return {
        "base_model": recipe.base_model.id,
        "base_model_relation": "quantized",
        "library_name": _library(verdicts),
        "pipeline_tag": "text-generation",
        "model_type": model_type,
        "model_creator": card.creator,
        "model_name": card.title,
        "language": list(card.language),
        **_license(card.license),
        "quantized_by": card.quantized_by,
        "tags": list(dict.fromkeys(["gptq", *bits, *card.tags, *_creator_tag(card.creator)])),
    }


def _creator_tag(creator: str) -> list[str]:
    """Return the creator as a tag, by which the Hub filters: in lower case, with hyphens between its words."""
    words = re.findall(r"[a-z0-9]+", creator.lower())
    return ["-".join(words)] if words else []


def _library(verdicts: Sequence[Verdict]) -> str:
    """Return the library that opens a branch: GPTQModel where transformers alone refuses it, as with experts."""
    opens = {verdict.loader: verdict.can_load for verdict in verdicts}
    return "gptqmodel" if opens.get("gptqmodel") and not opens.get("transformers", True) else "transformers"


def _license(license_: License) -> dict[str, str | list[str]]:
    link: dict[str, str | list[str]] = {"license_link": license_.link} if license_.link else {}
    if identifier := hub_license(license_.id):
        return {"license": identifier, **link}
    name = license_name(license_.id)
    if not name:
        raise CardError(
            "the licence has no name",
            where="card.license.id",
            why="a card with `license: other` must also name it",
            hint="write the licence's own name, e.g. coqui-public-model-license; the card adds `license: other`",
        )
    if not link:
        texts = {PurePosixPath(path).name for path in license_.files} & {"LICENSE", "LICENSE.md"}
        link = {"license_link": min(texts)} if texts else {}
    return {"license": "other", "license_name": name, **link}
